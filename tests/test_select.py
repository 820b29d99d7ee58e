"""token_importance, select_tokens and select on every backend against the definition."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import backend_params
from hypothesis import given
from hypothesis import strategies as st
from tolerances import close
from torch import Tensor

import gtp_kernels
from gtp_kernels import AttentionScores, backends, checks, reference
from gtp_kernels.ops import _library
from gtp_kernels.reference.select import map_rows

# Those whose operators are registered with torch; the definition is not.
OPERATOR_BACKENDS = [name for name in backend_params() if name != "reference"]


def scores_of(batch: int, heads: int, num_tokens: int, dtype: torch.dtype = torch.float32) -> AttentionScores:
    generator = torch.Generator().manual_seed(num_tokens)
    return AttentionScores(*(torch.rand(batch, heads, num_tokens, generator=generator, dtype=dtype) for _ in range(3)))


def attention(batch: int, heads: int, num_tokens: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randn(batch, heads, num_tokens, num_tokens, generator=generator).mul(3).softmax(-1).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("semantics", ["official", "paper"])
@pytest.mark.parametrize("standard", checks.SCORE_STANDARDS)
def test_importance_matches_definition(backend: str, standard: str, semantics: str, dtype: torch.dtype) -> None:
    scores = scores_of(3, 4, 37, dtype)
    for num_prefix in (1, 5) if standard.startswith("CLS") else (0, 1, 5):
        ours = gtp_kernels.token_importance(scores, standard, num_prefix, semantics)
        close(ours, reference.token_importance(scores, standard, num_prefix, semantics))


def test_importance_is_that_of_the_formula(backend: str) -> None:
    diag = torch.tensor([[[9.0, 1.0, 2.0], [9.0, 3.0, 1.0]]])
    colsum = torch.tensor([[[9.0, 5.0, 7.0], [9.0, 4.0, 8.0]]])
    scores = AttentionScores(diag, colsum, diag)
    assert gtp_kernels.token_importance(scores).tolist() == [[15.0, 16.0]]
    assert gtp_kernels.token_importance(scores, semantics="paper").tolist() == [[12.0, 14.0]]
    assert gtp_kernels.token_importance(scores, "SumAttnMax").tolist() == [[8.0, 10.0]]
    assert gtp_kernels.token_importance(scores, "MixedAttnMean").tolist() == [[9.0, 11.25]]


def test_importance_of_nan_is_nan(backend: str) -> None:
    scores = scores_of(1, 3, 6)
    scores.diag[0, 1, 4] = math.nan
    for standard in ("MixedAttnMax", "MixedAttnMean", "DiagAttnMax"):
        assert gtp_kernels.token_importance(scores, standard).isnan().tolist() == [[False, False, False, True, False]]


SIZES = [
    # n image tokens, and P: both ends and between
    (1, 0), (2, 1), (16, 0), (16, 1), (16, 15), (62, 31), (63, 8), (63, 62), (196, 0), (196, 14), (196, 195), (256, 13),
    (256, 255), (784, 100),
]  # fmt: skip


@pytest.mark.parametrize("num_tokens", [1, 17, 63, 197, 257, 785])
def test_importance_of_every_size(backend: str, num_tokens: int) -> None:
    scores = scores_of(2, 3, num_tokens)
    for standard in ("MixedAttnMax", "SumAttnMax", "IMGAttnMean"):
        for num_prefix in (0, 1):
            ours = gtp_kernels.token_importance(scores, standard, num_prefix, "paper")
            close(ours, reference.token_importance(scores, standard, num_prefix, "paper"))


def test_importance_of_strided_scores(backend: str) -> None:
    wide = torch.rand(3, 21, 2, 8, generator=torch.Generator().manual_seed(0))
    diag, colsum, cls_row = wide[:, 2:19, 1].transpose(1, 2), wide[..., 0, 3].unsqueeze(1)[..., :17], wide[:, 4:, 0, :1]
    scores = AttentionScores(diag, colsum.expand(-1, 8, -1), cls_row.transpose(1, 2).expand(-1, 8, -1))
    for standard in ("MixedAttnMax", "SumAttnMax", "CLSAttnMean"):
        ours = gtp_kernels.token_importance(scores, standard, 1, "paper")
        close(ours, reference.token_importance(scores, standard, 1, "paper"))


@pytest.mark.parametrize("order", ["grid", "importance"])
@pytest.mark.parametrize(
    ("num_prefix", "count", "num_prop"), [(0, 63, 8), (5, 63, 8), (0, 1, 0), *((1, *size) for size in SIZES)]
)
def test_selection_matches_definition(backend: str, order: str, num_prefix: int, count: int, num_prop: int) -> None:
    importance = torch.randn(2, count, generator=torch.Generator().manual_seed(count))
    ours = gtp_kernels.select_tokens(importance, num_prop, num_prefix=num_prefix, order=order)
    theirs = reference.select_tokens(importance, num_prop, num_prefix=num_prefix, order=order)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert ours[1].shape == (2, num_prop)


@pytest.mark.parametrize("order", ["grid", "importance"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("count", "num_prop"), [(16, 9), (63, 31), (196, 120), (256, 40)])
def test_selection_among_exact_ties_and_nan(
    backend: str, order: str, dtype: torch.dtype, count: int, num_prop: int
) -> None:
    generator = torch.Generator().manual_seed(count)
    values = torch.tensor([math.nan, -math.inf, -1.0, -0.0, 0.0, 1.0, 1.0, math.inf], dtype=dtype)
    importance = values[torch.randint(0, 8, (2, count), generator=generator)]
    ours = gtp_kernels.select_tokens(importance, num_prop, order=order)
    theirs = reference.select_tokens(importance, num_prop, order=order)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_selection_from_strided_importance(backend: str) -> None:
    wide = torch.randn(4, 80, 3, generator=torch.Generator().manual_seed(0))
    for importance in (wide[::2, 5:68, 1], wide[:2, :63, 0].t().contiguous().t(), wide[:1, :63, 0].expand(3, -1)):
        ours = gtp_kernels.select_tokens(importance, 20)
        theirs = reference.select_tokens(importance, 20)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_tie_rule_on_integers(backend: str) -> None:
    importance = torch.tensor([[3.0, 1.0, 2.0, 1.0, 3.0, 1.0]])
    kept, prop = gtp_kernels.select_tokens(importance, 2, num_prefix=0, order="importance")
    assert kept.tolist() == [[0, 4, 2, 1]]
    assert prop.tolist() == [[3, 5]]
    kept, prop = gtp_kernels.select_tokens(importance, 2, num_prefix=1)
    assert kept.tolist() == [[1, 2, 3, 5]]
    assert prop.tolist() == [[4, 6]]


def test_nan_is_lower_than_minus_infinity_and_zeros_tie(backend: str) -> None:
    importance = torch.tensor([[math.nan, -math.inf, 0.0, -0.0, math.inf, -math.nan]])
    kept, prop = gtp_kernels.select_tokens(importance, 3, num_prefix=0, order="importance")
    assert kept.tolist() == [[4, 2, 3]]
    assert prop.tolist() == [[1, 0, 5]]


@given(
    values=st.lists(
        st.sampled_from([0.0, -0.0, 1.0, 2.0, -1.0, math.inf, -math.inf, math.nan]), min_size=1, max_size=30
    ),
    share=st.floats(0, 0.99),
    order=st.sampled_from(["grid", "importance"]),
)
def test_selection_properties(values: list[float], share: float, order: str) -> None:
    importance = torch.tensor([values])
    num_prop = int(share * len(values))
    with gtp_kernels.use_backend("cpu"):
        kept, prop = gtp_kernels.select_tokens(importance, num_prop, num_prefix=2, order=order)
    expected = reference.select_tokens(importance, num_prop, num_prefix=2, order=order)
    assert torch.equal(kept, expected[0])
    assert torch.equal(prop, expected[1])
    assert sorted(torch.cat((kept, prop), 1)[0].tolist()) == list(range(2, 2 + len(values)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("standard", [*checks.SCORE_STANDARDS, *checks.MAP_STANDARDS])
def test_select_from_a_dense_map(backend: str, standard: str, dtype: torch.dtype) -> None:
    weight = attention(2, 3, 26, dtype)
    kept, prop = gtp_kernels.select(weight, standard, 6)
    expected = reference.select(weight.double(), standard, 6)
    # By value, not by index: what stays is at least as important as what leaves.
    if standard in checks.MAP_STANDARDS:
        rows = map_rows(weight.double(), standard, 1)
        importance = -(rows @ rows.transpose(1, 2)).sum(-1)
    else:
        importance = reference.token_importance(reference.scores_of_map(weight.double()), standard, 1)
    ranked = importance.gather(1, torch.cat((kept, prop), 1) - 1)
    assert (ranked[:, 1:] <= ranked[:, :-1] * (1 + 1e-5 * ranked[:, :-1].sign())).all()
    assert kept.shape == expected[0].shape
    assert prop.shape == expected[1].shape


def test_select_takes_scores_and_maps_alike(backend: str) -> None:
    weight = attention(2, 3, 26)
    scores = reference.scores_of_map(weight)
    for semantics in ("official", "paper"):
        by_map = gtp_kernels.select(weight, "MixedAttnMax", 5, semantics=semantics)
        by_scores = gtp_kernels.select(scores, "MixedAttnMax", 5, semantics=semantics)
        assert all(torch.equal(a, b) for a, b in zip(by_map, by_scores, strict=True))


@pytest.mark.parametrize("over", ["Mean", "Max"])
def test_the_papers_name_of_a_standard(backend: str, over: str) -> None:
    weight, scores = attention(2, 3, 17), scores_of(2, 3, 17)
    for module in (gtp_kernels, reference):
        for source in (weight, scores):
            kept, prop = module.select(source, f"BroadAttn{over}", 4)
            expected = module.select(source, f"IMGAttn{over}", 4)
            assert torch.equal(kept, expected[0])
            assert torch.equal(prop, expected[1])
        importance = module.token_importance(scores, f"BroadAttn{over}")
        assert torch.equal(importance, module.token_importance(scores, f"IMGAttn{over}"))


def test_select_is_the_authors_function_by_position(backend: str) -> None:
    # select(attn, standard, num_prop, cls_token, W): what the authors' blocks call, on a map without ties.
    weight = attention(2, 3, 17)
    kept, prop = gtp_kernels.select(weight, standard="MixedAttnMax", num_prop=4, cls_token=True, W=object())
    rank = weight.diagonal(dim1=-2, dim2=-1)[:, :, 1:].max(1)[0] * weight[:, :, :, 1:].sum(-2).max(1)[0]
    rank = rank.argsort(dim=1, descending=True)
    assert torch.equal(kept, rank[:, :-4] + 1)
    assert torch.equal(prop, rank[:, -4:] + 1)
    kept, prop = gtp_kernels.select(weight, "IMGAttnMean", 4, False)
    rank = weight.sum(-2).mean(1).argsort(dim=1, descending=True)
    assert torch.equal(kept, rank[:, :-4])


def test_no_token_leaves_at_zero(backend: str) -> None:
    kept, prop = gtp_kernels.select(attention(2, 3, 17), "MixedAttnMax", 0)
    assert kept.shape == (2, 16)
    assert prop.shape == (2, 0)


def test_random_is_seeded(backend: str) -> None:
    weight = attention(2, 1, 17)
    draws = [
        gtp_kernels.select(weight, "Random", 5, generator=torch.Generator(weight.device).manual_seed(seed))[1]
        for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_empty_batch_and_single_token(backend: str) -> None:
    kept, prop = gtp_kernels.select(attention(0, 2, 9), "MixedAttnMax", 3)
    assert kept.shape == (0, 5)
    assert prop.shape == (0, 3)
    kept, prop = gtp_kernels.select(attention(2, 2, 1), "MixedAttnMax", 0)
    assert kept.shape == prop.shape == (2, 0)


@pytest.mark.parametrize("backend", OPERATOR_BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(backend: str, dtype: torch.dtype) -> None:
    ops = _library.operators(backends.choose("select", torch.empty(0, dtype=dtype)))
    scores = scores_of(2, 3, 12, dtype)
    torch.library.opcheck(ops.token_importance, (*scores, "MixedAttnMax", 1, "paper"))
    for order in checks.ORDERS:
        torch.library.opcheck(ops.select_tokens, (torch.randn(2, 11, dtype=dtype), 3, 1, order))


def test_compile_fullgraph(backend: str) -> None:
    def step(weight: Tensor) -> tuple[Tensor, Tensor]:
        return gtp_kernels.select(weight, "MixedAttnMax", 5)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):
        weight = attention(batch, 2, 17)
        assert all(torch.equal(a, b) for a, b in zip(compiled(weight), step(weight), strict=True))


@pytest.mark.no_op_runs
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weight": None}, TypeError, "weight must be a tensor"),
        ({"weight": torch.zeros(1, 9, 9)}, ValueError, "weight must be 4-dimensional"),
        ({"weight": torch.zeros(1, 2, 9, 8)}, ValueError, "weight must be \\[B, H, N, N\\]"),
        ({"weight": torch.zeros(1, 2, 9, 9, dtype=torch.int64)}, TypeError, "weight must be float32"),
        ({"standard": "Best"}, ValueError, "standard must be one of CLSAttnMean"),
        ({"standard": "None"}, ValueError, "standard must be one of"),
        ({"num_prop": 8}, ValueError, "num_prop must be in \\[0, 8\\)"),
        ({"num_prop": -1}, ValueError, "num_prop must be at least 0"),
        ({"num_prop": 2.0}, TypeError, "num_prop must be an int"),
        ({"num_prefix": 10}, ValueError, "num_prefix must be at most"),
        ({"cls_token": 1}, TypeError, "cls_token must be a bool"),
        ({"semantics": "x"}, ValueError, "semantics must be one of"),
        ({"standard": "CLSAttnMax", "cls_token": False}, ValueError, "reads the class token's row"),
        ({"standard": "CLSAttnMax", "cls_token": False, "num_prefix": 4}, ValueError, "reads the class token's row"),
        ({"weight": scores_of(1, 2, 9), "standard": "CosSimMax"}, ValueError, "needs the dense map"),
    ],
)
def test_bad_input(backend: str, arguments: dict[str, object], error: type[Exception], message: str) -> None:
    defaults: dict[str, object] = {"weight": torch.zeros(1, 2, 9, 9), "num_prop": 2}
    for module in (gtp_kernels, reference):
        with pytest.raises(error, match=message):
            module.select(**(defaults | arguments))


@pytest.mark.no_op_runs
def test_bad_scores(backend: str) -> None:
    good = torch.zeros(1, 2, 9)
    with pytest.raises(TypeError, match="scores must be AttentionScores"):
        gtp_kernels.token_importance((good, good, good))
    with pytest.raises(ValueError, match="scores.colsum must have shape"):
        gtp_kernels.token_importance(AttentionScores(good, good[:, :1], good))
    with pytest.raises(TypeError, match="scores.diag must be float32 or float64"):
        gtp_kernels.token_importance(AttentionScores(good.half(), good.half(), good.half()))
    with pytest.raises(ValueError, match="order must be one of importance, grid"):
        gtp_kernels.select_tokens(good[0], 1, order="up")


@pytest.mark.no_op_runs
def test_bad_generator_and_prefix(backend: str) -> None:
    with pytest.raises(TypeError, match="generator must be a torch.Generator"):
        gtp_kernels.select(torch.zeros(1, 2, 9, 9), "Random", 2, generator=5)
    with pytest.raises(TypeError, match="cls_token must be a bool"):
        gtp_kernels.select(torch.zeros(1, 2, 9, 9), "Random", 2, "no", num_prefix=1)
    with pytest.raises(ValueError, match="num_prefix must be below"):
        gtp_kernels.select_tokens(torch.zeros(1, 9), 2, num_prefix=2**62)


def test_compile_with_a_changing_number(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda weight, num_prop: gtp_kernels.select(weight, num_prop=num_prop)[0], fullgraph=True, backend="aot_eager"
    )
    weight = attention(2, 2, 17)
    for num_prop in (1, 2, 5):
        assert torch.equal(compiled(weight, num_prop), gtp_kernels.select(weight, num_prop=num_prop)[0])
