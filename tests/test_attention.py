"""attention_with_scores on every backend against the definition."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import pytest
import torch
from conftest import backend_params
from hypothesis import given
from hypothesis import strategies as st
from tolerances import OF_EAGER, close, rounds_weights
from torch import Tensor

import gtp_kernels
from gtp_kernels import backends, reference
from gtp_kernels.ops import _library
from gtp_kernels.reference.attention import threshold_rank

# Those whose operators are registered with torch; the definition is not.
OPERATOR_BACKENDS = [name for name in backend_params() if name != "reference"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def usual() -> torch.dtype:
    """The type of tests that are about something else: float32, or float16 for the backend that takes halves only."""
    return torch.float16 if backends.forced() == "cuda" else torch.float32


def inputs(shape: tuple[int, ...], dtype: torch.dtype | None = None, seed: int = 0) -> tuple[Tensor, ...]:
    dtype = usual() if dtype is None else dtype
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
    scales = 0.5 + 2 * torch.rand(shape[0], shape[2], generator=generator)
    return q, k, v, scales


def check_against_definition(
    q: Tensor, k: Tensor, v: Tensor, scales: Tensor | None, sparsity: float, semantics: str, scale: float | None = None
) -> None:
    """Compares with the definition in float64; an entry within rounding of the threshold may fall on either side."""
    out, scores = gtp_kernels.attention_with_scores(
        q, k, v, scales, sparsity=sparsity, semantics=semantics, scale=scale
    )
    wide = [t.double() for t in (q, k, v)]
    full = reference.attention_map(*wide[:2], scales, scale=scale)
    attn = reference.attention_map(*wide[:2], scales, sparsity=sparsity, semantics=semantics, scale=scale)
    # The exponential turns the rounding of the largest logits, absolute, into a relative error of the weights.
    score_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    logits = (wide[0] @ wide[1].transpose(-1, -2)) * factor
    relative = torch.finfo(score_dtype).eps * logits.abs().amax()
    unsure = full * relative
    if sparsity < 1:
        smallest = torch.where(attn > 0, attn, math.inf).flatten(2).amin(-1)[..., None, None]
        margin = (1e-13 if q.dtype == torch.float64 else 4e-6) + relative
        unsure = torch.where((full - smallest).abs() <= margin * smallest, full, unsure)
    exact = attn @ wide[2]
    rounding = torch.zeros((), dtype=torch.float64)
    if rounds_weights(backends.forced(), q.dtype):
        rounding = OF_EAGER * (eager(q, k, v, scales, attn, factor).double() - exact).abs().amax()
    close(out, exact.to(q.dtype), unsure @ wide[2].abs() + rounding)
    expected = reference.scores_of_map(attn)
    slack = reference.scores_of_map(unsure)
    for name in ("diag", "colsum", "cls_row"):
        close(getattr(scores, name), getattr(expected, name).to(score_dtype), getattr(slack, name))


def eager(q: Tensor, k: Tensor, v: Tensor, scales: Tensor | None, attn: Tensor, factor: float) -> Tensor:
    """The attention as plain PyTorch computes it in the type of its input, thresholded as the map ``attn``."""
    logits = (q @ k.transpose(-1, -2)) * factor
    if scales is not None:
        logits = logits + scales.log()[:, None, None, :].to(q.dtype)
    return logits.softmax(-1).masked_fill(attn == 0, 0.0) @ v


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", [1.0, 0.6])
@pytest.mark.parametrize("semantics", ["official", "paper"])
def test_matches_definition(backend: str, dtype: torch.dtype, sparsity: float, semantics: str) -> None:
    q, k, v, scales = inputs((2, 3, 63, 32), dtype)
    check_against_definition(q, k, v, scales, sparsity, semantics)


@pytest.mark.parametrize("num_tokens", [1, 2, 15, 16, 17, 63, 197, 257, 333])
@pytest.mark.parametrize("size", [64, 24])
def test_odd_sizes(backend: str, num_tokens: int, size: int) -> None:
    q, k, v, scales = inputs((1, 2, num_tokens, size), seed=num_tokens)
    check_against_definition(q, k, v, scales, 0.6, "official")
    check_against_definition(q, k, v, None, 1.0, "paper")


@pytest.mark.parametrize("sparsity", [1.0, 0.6])
def test_many_tokens(backend: str, sparsity: float) -> None:
    q, k, v, scales = inputs((1, 1, 785, 64), torch.bfloat16)
    check_against_definition(q, k, v, scales, sparsity, "official")


@pytest.mark.parametrize("size", [1, 7, 80, 128, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_sizes(backend: str, size: int, dtype: torch.dtype) -> None:
    q, k, v, scales = inputs((2, 2, 37, size), dtype, seed=size)
    check_against_definition(q, k, v, scales, 0.5, "paper", scale=0.3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_views_and_layout(backend: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(2, 21, 3, 4, 16, generator=generator).to(dtype)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    check_against_definition(q, k, v, None, 0.7, "official")
    out, _ = gtp_kernels.attention_with_scores(q, k, v)
    rows = out.transpose(1, 2).reshape(2, 21, 64)
    assert rows.untyped_storage().data_ptr() == out.untyped_storage().data_ptr()
    # A last stride other than one, an offset, a broadcast head.
    odd = torch.randn(2, 2, 16, 23, generator=generator).to(dtype)[..., 1:].transpose(2, 3)
    check_against_definition(odd, odd.flip(1), odd[:, :1].expand_as(odd), None, 0.7, "official")


@pytest.mark.parametrize("num_tokens", [7, 33, 64])
@pytest.mark.parametrize("semantics", ["official", "paper"])
@pytest.mark.parametrize("sparsity", [0.001, 0.25, 0.6, 0.999, 1.0])
def test_kept_count_is_exact(backend: str, num_tokens: int, semantics: str, sparsity: float) -> None:
    # With the identity as v, out is the thresholded map itself.
    q, k, _, scales = inputs((2, 3, num_tokens, num_tokens), seed=3)
    v = torch.eye(num_tokens, dtype=usual()).expand(2, 3, -1, -1)
    out, _ = gtp_kernels.attention_with_scores(q, k, v, scales, sparsity=sparsity, semantics=semantics)
    rank = threshold_rank(num_tokens, sparsity, semantics)
    expected = num_tokens**2 - max(rank - 1, 0)
    if semantics == "paper":
        assert expected == math.ceil(sparsity * num_tokens * num_tokens)
    assert torch.equal((out > 0).sum((-1, -2)), torch.full((2, 3), expected))


def test_ties_at_the_threshold_all_stay(backend: str) -> None:
    # Logits 0 and log 3, as many of each in every row: the values are 1/(2N) and 3/(2N), each tied exactly.
    num_tokens = 32
    k = torch.zeros(1, 1, num_tokens, num_tokens, dtype=usual())
    k[:, :, ::2, 0] = math.log(3.0)
    q = torch.ones(1, 1, num_tokens, num_tokens, dtype=usual())
    v = torch.eye(num_tokens, dtype=usual())[None, None]
    for sparsity, kept in ((0.4, 0.5), (0.5, 0.5), (0.6, 1.0)):
        out, _ = gtp_kernels.attention_with_scores(q, k, v, scale=1.0, sparsity=sparsity, semantics="paper")
        assert int((out > 0).sum()) == int(kept * num_tokens**2), sparsity


def test_limits_of_the_sparsity(backend: str) -> None:
    num_tokens = 20
    q, k, _, scales = inputs((1, 2, num_tokens, num_tokens), seed=4)
    v = torch.eye(num_tokens, dtype=usual()).expand(1, 2, -1, -1)
    for sparsity, kept in ((1e-9, 1), (1 / num_tokens**2, 1), (1 - 1e-9, num_tokens**2), (1.0, num_tokens**2)):
        out, _ = gtp_kernels.attention_with_scores(q, k, v, scales, sparsity=sparsity, semantics="paper")
        assert (out > 0).sum((-1, -2)).tolist() == [[kept, kept]], sparsity


@contextlib.contextmanager
def tile(backend: str, q: Tensor, **changes: int) -> Iterator[None]:
    """Changes what the Triton kernels are launched with; nothing for other backends."""
    if backend != "triton":
        yield
        return
    from gtp_kernels.triton import configs

    known = configs.lookup("attention", q.device, q.dtype, tokens=q.shape[2], size=q.shape[3])
    with configs.override("attention", {**known, **changes}):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes",
    [
        {"candidates": 0},
        {"candidates": 1},
        {"sample": 1},
        {"sample": 8},
        {"whole_head": 0},
        {"whole_head": 0, "sample": 0},
    ],
    ids=lambda changes: "-".join(f"{name}={value}" for name, value in changes.items()),
)
def test_every_way_to_the_threshold(backend: str, changes: dict[str, int], dtype: torch.dtype) -> None:
    # Room for no candidate: every bracket overflows. Room for one per token: some do.
    q, k, v, scales = inputs((1, 2, 40, 16), dtype)
    with tile(backend, q, search_warps=4, **changes):
        check_against_definition(q, k, v, scales, 0.6, "official")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparsity", [0.05, 0.6, 0.95])
def test_a_sample_that_misleads(backend: str, sparsity: float, dtype: torch.dtype) -> None:
    # With one-hot queries k holds the logits. Every block of 32 rows is sampled at other columns, one in four: only
    # there they are large.
    num_tokens, every = 40, 4
    generator = torch.Generator().manual_seed(2)
    row, column = torch.arange(num_tokens)[:, None], torch.arange(num_tokens)
    sampled = (column - row // 32 * 5) % every == 0
    logits = torch.rand(num_tokens, num_tokens, generator=generator) + 10 * sampled
    q = torch.eye(num_tokens)[None, None].to(dtype)
    v = torch.randn(1, 1, num_tokens, num_tokens, generator=generator).to(dtype)
    with tile(backend, q, sample=every):
        check_against_definition(q, logits.T[None, None].to(dtype), v, None, sparsity, "official", scale=1.0)


def test_all_equal_map_stays_whole(backend: str) -> None:
    q = torch.zeros(1, 2, 50, 8, dtype=usual())
    v = torch.ones(1, 2, 50, 8, dtype=usual())
    out, scores = gtp_kernels.attention_with_scores(q, q, v, sparsity=0.01)
    close(out, v)
    close(scores.colsum, torch.ones(1, 2, 50))


@pytest.mark.parametrize("sparsity", [1.0, 0.5])
def test_nan_and_infinity_stay_where_the_definition_puts_them(backend: str, sparsity: float) -> None:
    q, k, v, _ = inputs((1, 2, 20, 16))
    q[0, 0, 3, 2] = math.nan
    k[0, 1, 5, 1] = math.inf
    out, scores = gtp_kernels.attention_with_scores(q, k, v, sparsity=sparsity)
    expected, expected_scores = reference.attention_with_scores(q, k, v, sparsity=sparsity)
    assert torch.equal(out.isnan(), expected.isnan())
    for ours, theirs in zip(scores, expected_scores, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
    assert not out[0, 0, 0].isnan().any()


def test_extreme_logits(backend: str) -> None:
    q, k, v, _ = inputs((1, 1, 40, 8))
    check_against_definition(q * 100, k, v, None, 1.0, "official")
    scales = torch.ones(1, 40)
    scales[0, 7] = 0.0
    out, scores = gtp_kernels.attention_with_scores(q, k, v, scales)
    assert float(scores.colsum[0, 0, 7]) == 0.0
    assert torch.isfinite(out).all()


def test_half_scales_are_taken(backend: str) -> None:
    q, k, v, scales = inputs((1, 2, 19, 8), torch.bfloat16)
    half = scales.to(torch.bfloat16)
    check_against_definition(q, k, v, half, 1.0, "official")
    ours = gtp_kernels.attention_with_scores(q, k, v, half)
    wide = gtp_kernels.attention_with_scores(q, k, v, half.float())
    assert all(torch.equal(x, y) for x, y in zip((ours[0], *ours[1]), (wide[0], *wide[1]), strict=True))


@pytest.mark.parametrize("shape", [(0, 2, 9, 4), (2, 0, 9, 4)])
def test_empty_batch(backend: str, shape: tuple[int, ...]) -> None:
    q = torch.zeros(shape, dtype=usual())
    out, scores = gtp_kernels.attention_with_scores(q, q, q, sparsity=0.6)
    assert out.shape == shape
    batch, heads, num_tokens, size = shape
    if backend != "reference":  # what the fake kernel says
        assert out.stride() == torch.empty(batch, num_tokens, heads, size).transpose(1, 2).stride()
    assert scores.diag.shape == shape[:3]


def test_results_do_not_depend_on_threads(cpu_backend: str) -> None:
    q, k, v, scales = inputs((3, 5, 97, 32))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            out, scores = gtp_kernels.attention_with_scores(q, k, v, scales, sparsity=0.6)
            results.append(torch.cat([out.flatten(), *(s.flatten() for s in scores)]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@given(
    num_tokens=st.integers(1, 40),
    sparsity=st.floats(0.01, 1.0),
    semantics=st.sampled_from(["official", "paper"]),
    seed=st.integers(0, 1000),
)
def test_properties(num_tokens: int, sparsity: float, semantics: str, seed: int) -> None:
    q, k, v, scales = inputs((1, 2, num_tokens, 8), seed=seed)
    with gtp_kernels.use_backend("cpu"):
        check_against_definition(q, k, v, scales, sparsity, semantics)
        _, scores = gtp_kernels.attention_with_scores(q, k, v, scales)
    close(scores.colsum.sum(-1), torch.full((1, 2), float(num_tokens)))


@pytest.mark.parametrize("sparsity", [1.0, 0.6])
def test_gradcheck(backend: str, sparsity: float) -> None:
    q, k, v, scales = inputs((2, 2, 9, 4), torch.float64, seed=11)
    leaves = [t.requires_grad_() for t in (q, k, v)]

    def out_only(*tensors: Tensor) -> Tensor:
        return gtp_kernels.attention_with_scores(*tensors, scales, sparsity=sparsity)[0]

    # The interpreter takes a second a call: random directions instead of every element.
    assert torch.autograd.gradcheck(out_only, leaves, fast_mode=backend == "triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", [1.0, 0.6])
@pytest.mark.parametrize("size", [16, 48])
def test_backward_matches_the_definition(backend: str, dtype: torch.dtype, sparsity: float, size: int) -> None:
    q, k, v, scales = inputs((2, 3, 33, size), dtype)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out, scores = gtp_kernels.attention_with_scores(*leaves, scales, sparsity=sparsity)
    assert not scores.colsum.requires_grad
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    out.backward(grad)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    attn = reference.attention_map(*wide[:2], scales, sparsity=sparsity)
    exact = torch.autograd.grad(attn @ wide[2], wide, grad.double())
    rounding = [torch.zeros((), dtype=torch.float64)] * 3
    if backend == "triton" and q.element_size() == 2:
        plain = [t.detach().requires_grad_() for t in leaves]
        result = eager(*plain, scales, attn.detach(), size**-0.5)
        eager_grads = torch.autograd.grad(result, plain, grad)
        rounding = [OF_EAGER * (e.double() - x).abs().amax() for e, x in zip(eager_grads, exact, strict=True)]
    for leaf, expected, error in zip(leaves, exact, rounding, strict=True):
        close(leaf.grad, expected.to(dtype), error)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", OPERATOR_BACKENDS, indirect=True)
def test_opcheck(backend: str, dtype: torch.dtype) -> None:
    q, k, v, scales = inputs((2, 2, 11, 8), dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    # What has no backward is checked without.
    leaves = [t.requires_grad_(torch.is_grad_enabled()) for t in (q, k, v)]
    operator = _library.operators(backends.choose("attention", q)).attention_with_scores
    torch.library.opcheck(operator, (*leaves, scales.to(wide), 0.6, 0.3, "official"))


def test_compile_fullgraph_with_a_changing_batch(backend: str) -> None:
    def step(q: Tensor, k: Tensor, v: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        out, scores = gtp_kernels.attention_with_scores(q, k, v, scales, sparsity=0.6)
        return out.transpose(1, 2).flatten(2), scores.diag * scores.colsum

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=None, backend="aot_eager")
    for batch in (2, 3, 5):
        arguments = inputs((batch, 2, 17, 8), seed=batch)
        for ours, eager in zip(compiled(*arguments), step(*arguments), strict=True):
            close(ours, eager)


def test_autocast_casts_as_sdpa_does(backend: str) -> None:
    q, k, v, scales = inputs((1, 2, 9, 8))
    with torch.autocast(q.device.type, torch.bfloat16):
        out, _ = gtp_kernels.attention_with_scores(q, k.bfloat16(), v, scales)
    assert out.dtype == torch.bfloat16


@pytest.mark.no_op_runs
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": None}, TypeError, "q must be a tensor"),
        ({"q": torch.zeros(2, 9, 4)}, ValueError, "q must be 4-dimensional"),
        ({"q": torch.zeros(1, 2, 9, 4, dtype=torch.int32)}, TypeError, "q must be float32"),
        ({"k": torch.zeros(1, 2, 8, 4)}, ValueError, "k must have shape"),
        ({"v": None}, TypeError, "v must be a tensor"),
        ({"v": torch.zeros(1, 2, 9, 4, dtype=torch.float64)}, TypeError, "v must have q's dtype"),
        ({"v": torch.zeros(1, 2, 9, 4, device="meta")}, ValueError, "v must be on the device of q"),
        ({"token_scales": torch.ones(1, 8)}, ValueError, "token_scales must have shape"),
        ({"token_scales": torch.ones(1, 9, dtype=torch.int64)}, TypeError, "token_scales must be float32"),
        ({"sparsity": 0.0}, ValueError, "sparsity must be in"),
        ({"sparsity": 1.5}, ValueError, "sparsity must be in"),
        ({"sparsity": math.nan}, ValueError, "sparsity must be in"),
        ({"sparsity": "high"}, TypeError, "sparsity must be a number"),
        ({"scale": math.inf}, ValueError, "scale must be finite"),
        ({"semantics": "theirs"}, ValueError, "semantics must be one of official, paper"),
        ({"semantics": 3}, TypeError, "semantics must be a string"),
    ],
)
def test_bad_input(backend: str, change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments: dict[str, object] = {name: torch.zeros(1, 2, 9, 4) for name in ("q", "k", "v")}
    with pytest.raises(error, match=message):
        gtp_kernels.attention_with_scores(**(arguments | change))
    with pytest.raises(error, match=message):
        reference.attention_with_scores(**(arguments | change))


@pytest.mark.no_op_runs
def test_no_tokens_is_an_error(backend: str) -> None:
    q = torch.zeros(1, 2, 0, 4)
    with pytest.raises(ValueError, match="at least one token"):
        gtp_kernels.attention_with_scores(q, q, q)


def test_higher_order_and_forward_mode_are_refused_not_wrong(cpu_backend: str) -> None:
    q, k, v, _ = inputs((1, 2, 9, 4), torch.float64)
    q.requires_grad_()
    out, _ = gtp_kernels.attention_with_scores(q, k, v)
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match="reverse-mode gradients only"):
        torch.func.jvp(lambda q: gtp_kernels.attention_with_scores(q, k, v)[0], (q,), (torch.ones_like(q),))


def test_compile_dynamic(backend: str) -> None:
    def step(q: Tensor) -> Tensor:
        return gtp_kernels.attention_with_scores(q, q, q, sparsity=0.6)[0]

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 2, 17, 8), (3, 2, 21, 8)):
        q = inputs(shape)[0]
        close(compiled(q), step(q))
