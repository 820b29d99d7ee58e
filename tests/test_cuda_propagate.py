"""The CUDA kernels of selection and step on the emulated GPU of ``native/emulated_gpu.h``, against the definition."""

from __future__ import annotations

import ctypes
import math
import mmap
from typing import Any

import emulated
import pytest
import torch
from test_propagate import slack_of_norm
from tolerances import close
from torch import Tensor

from gtp_kernels import LiveGraph, LiveSelection, TokenGraph, checks, reference
from gtp_kernels.reference import AttentionScores

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DTYPE_NUMBER = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
STANDARD_NUMBER = {"None": 0, "Mean": 1, "GraphProp": 2, "Merge": 3}
NORM_NUMBER = {"none": 0, "layer": 1, "rms": 2}
SOURCE_NUMBER = {"CLSAttn": 0, "IMGAttn": 1, "DiagAttn": 2, "MixedAttn": 3, "SumAttn": 4}


INT, POINTER, DOUBLE = ctypes.c_int64, ctypes.c_void_p, ctypes.c_double
ROWS = (("data", POINTER), ("dtype", INT), ("stride_b", INT), ("stride_n", INT))


def structure(name: str, fields: str) -> type[ctypes.Structure]:
    """A structure of ``native/cuda_propagate_shim.cpp``: ``name:kind`` for each field, ``name`` alone for an int64."""
    kinds: dict[str, Any] = {"": INT, "p": POINTER, "d": DOUBLE, "rows": Rows, "vector": Vector}
    return type(
        name,
        (ctypes.Structure,),
        {"_fields_": [(f.partition(":")[0], kinds[f.partition(":")[2]]) for f in fields.split()]},
    )


class Rows(ctypes.Structure):
    _fields_ = ROWS


class Vector(ctypes.Structure):
    _fields_ = ROWS[:2]


Importance = structure(
    "Importance",
    "diag:p colsum:p cls_row:p batch heads tokens prefix source aggregate subtract_diag importance:p",
)
Step = structure(
    "Step",
    "x:rows branch:rows layer_scale:vector token_scales:vector norm_weight:vector norm_bias:vector "
    "batch tokens channels prefix kept prop index_kept:p index_prop:p indptr:p indices:p values:p token:p "
    "origins capacity standard norm out_dtype alpha:d norm_eps:d target:p share:p x_out:p normed:p token_out:p "
    "scales_out:p",
)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(emulated.build("cuda_propagate_shim.cpp", tmp_path_factory.mktemp("cuda_propagate"))))
    for name in ("token_importance", "select_tokens", "propagate", "select_propagate"):
        getattr(loaded, f"shim_{name}").restype = ctypes.c_char_p
    return loaded


@pytest.fixture(params=[1, 2])
def seed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """In which order lanes, warps and blocks run."""
    monkeypatch.setenv("GTP_EMULATED_SEED", str(request.param))
    return int(request.param)


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def vector(tensor: Tensor | None) -> Any:
    return Vector() if tensor is None else Vector(tensor.data_ptr(), DTYPE_NUMBER[tensor.dtype])


def rows(tensor: Tensor | None) -> Any:
    if tensor is None:
        return Rows()
    return Rows(tensor.data_ptr(), DTYPE_NUMBER[tensor.dtype], tensor.stride(0), tensor.stride(1))


def checked(text: bytes | None) -> None:
    if text is not None:
        raise RuntimeError(text.decode())


def importance_arguments(scores: AttentionScores, standard: str, num_prefix: int, semantics: str) -> tuple[Any, Tensor]:
    batch, heads, tokens = scores.diag.shape
    out = torch.empty(batch, tokens - num_prefix)
    kind = standard.removesuffix("Mean").removesuffix("Max")
    arguments = Importance(
        *(tensor.data_ptr() for tensor in scores), batch, heads, tokens, num_prefix, SOURCE_NUMBER[kind],
        int(standard.endswith("Max")), int(semantics == "paper"), address(out),
    )  # fmt: skip
    return arguments, out


def select_tokens(library: ctypes.CDLL, importance: Tensor, num_prop: int, order: str, num_prefix: int = 1) -> Any:
    batch, count = importance.shape
    kept = torch.empty(batch, count - num_prop, dtype=torch.int64)
    prop = torch.empty(batch, num_prop, dtype=torch.int64)
    checked(
        library.shim_select_tokens(
            POINTER(address(importance)), INT(batch), INT(count), INT(num_prop), INT(num_prefix),
            INT(order == "grid"), POINTER(address(kept)), POINTER(address(prop)),
        )
    )  # fmt: skip
    return kept, prop


def step_arguments(
    x: Tensor,
    graph: TokenGraph | None,
    kept: Tensor,
    prop: Tensor,
    *,
    branch: Tensor | None = None,
    layer_scale: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-6,
    norm: str = "none",
    standard: str = "GraphProp",
    alpha: float = 0.1,
    token_scales: Tensor | None = None,
    target: Tensor | None = None,
    share: Tensor | None = None,
    num_prefix: int = 1,
) -> tuple[Any, tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]]:
    """The arguments and the outputs, (x_out, normed, token_out, scales_out)."""
    batch, tokens, channels = x.shape
    dtype = x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype)
    num_rows = num_prefix + kept.shape[1] + int(standard == "Mean" and prop.shape[1] > 0)
    out = torch.empty(batch, num_rows, channels, dtype=dtype)
    normed = None if norm == "none" else torch.empty_like(out)
    token_out = torch.empty(batch, kept.shape[1], dtype=torch.int32) if standard == "GraphProp" else None
    scales_out = None if token_scales is None else torch.empty(batch, num_rows, dtype=token_scales.dtype)
    csr = (None,) * 4 if graph is None else (graph.indptr, graph.indices, graph.values, graph.token)
    arguments = Step(
        rows(x), rows(branch), vector(layer_scale), vector(token_scales), vector(norm_weight), vector(norm_bias),
        batch, tokens, channels, num_prefix, kept.shape[1], prop.shape[1], address(kept), address(prop),
        *(address(tensor) for tensor in csr), 0 if graph is None else graph.indptr.shape[1] - 1,
        0 if graph is None else graph.indices.shape[1], STANDARD_NUMBER[standard], NORM_NUMBER[norm],
        DTYPE_NUMBER[dtype], alpha, norm_eps,
        *(address(tensor) for tensor in (target, share, out, normed, token_out, scales_out)),
    )  # fmt: skip
    return arguments, (out, normed, token_out, scales_out)


def step(library: ctypes.CDLL, x: Tensor, graph: TokenGraph | None, kept: Tensor, prop: Tensor, **options: Any) -> Any:
    arguments, outputs = step_arguments(x, graph, kept, prop, **options)
    checked(library.shim_propagate(ctypes.byref(arguments)))
    return outputs


def check_step(
    library: ctypes.CDLL, x: Tensor, graph: TokenGraph | None, kept: Tensor, prop: Tensor, **options: Any
) -> None:
    """Against the definition: residual_propagate_norm where there is a branch, otherwise propagate."""
    out, normed, token_out, scales_out = step(library, x, graph, kept, prop, **options)
    compare(out, normed, token_out, scales_out, x, graph, kept, prop, **options)


def compare(
    out: Tensor,
    normed: Tensor | None,
    token_out: Tensor | None,
    scales_out: Tensor | None,
    x: Tensor,
    graph: TokenGraph | None,
    kept: Tensor,
    prop: Tensor,
    **options: Any,
) -> None:
    theirs: tuple[Any, ...]
    if options.get("branch") is None:
        options.pop("branch", None)
        plain = reference.propagate(x, graph, kept, prop, **options)
        theirs = (plain[0], None, *plain[1:])
    else:
        theirs = reference.residual_propagate_norm(x, options.pop("branch"), graph, kept, prop, **options)
    close(out, theirs[0])
    if normed is not None:
        close(normed, theirs[1], slack_of_norm(theirs[0]))
    if token_out is not None:
        assert torch.equal(token_out, theirs[2].token)
    if scales_out is not None:
        close(scales_out, theirs[3])


def case(
    n: int = 35,
    num_prop: int = 8,
    num_prefix: int = 1,
    batch: int = 2,
    channels: int = 24,
    dtype: torch.dtype = torch.float32,
    degree: int = 6,
) -> tuple[Tensor, TokenGraph, Tensor, Tensor, Tensor]:
    """x, a graph whose rows have up to ``degree`` edges or none, kept, prop in an arbitrary order, scales float32.

    The graph has four original tokens more than there are rows.
    """
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(batch, num_prefix + n, channels, generator=generator).to(dtype)
    origins = n + 4
    dense = torch.rand(batch, origins, origins, generator=generator) + 0.01
    places = torch.rand(batch, origins, origins, generator=generator).argsort(-1)
    dense[places >= min(degree, origins)] = 0
    dense[:, ::7] = 0
    token = torch.rand(batch, origins, generator=generator).argsort(1)[:, :n].to(torch.int32)
    graph = TokenGraph.from_dense(dense / max(degree, 1))
    graph = TokenGraph(graph.indptr, graph.indices, graph.values, token.contiguous())
    order = torch.rand(batch, n, generator=generator).argsort(1) + num_prefix
    scales = 0.5 + torch.rand(batch, num_prefix + n, generator=generator)
    return x, graph, order[:, : n - num_prop].contiguous(), order[:, n - num_prop :].contiguous(), scales


# --- selection --------------------------------------------------------------------------------------------------------


def scores_of(batch: int, heads: int, tokens: int, *, special: bool = False) -> AttentionScores:
    generator = torch.Generator().manual_seed(tokens)
    values = torch.rand(3, batch, heads, tokens, generator=generator)
    if special:
        places = torch.rand(values.shape, generator=generator)
        values[places < 0.02] = math.nan
        values[(places >= 0.02) & (places < 0.04)] = math.inf
        values[places > 0.9] = 0.0
    return AttentionScores(*values.unbind())


@pytest.mark.parametrize("standard", checks.SCORE_STANDARDS)
@pytest.mark.parametrize("semantics", checks.SEMANTICS)
def test_importance(library: ctypes.CDLL, standard: str, semantics: str) -> None:
    for heads, tokens, num_prefix, special in (
        (1, 2, 1, False),
        (3, 40, 1, True),
        (8, 198, 5, False),
        (17, 300, 2, True),
    ):
        scores = scores_of(2, heads, tokens, special=special)
        arguments, out = importance_arguments(scores, standard, num_prefix, semantics)
        checked(library.shim_token_importance(ctypes.byref(arguments)))
        close(out, reference.token_importance(scores, standard, num_prefix, semantics))


@pytest.mark.parametrize("order", checks.ORDERS)
@pytest.mark.parametrize("count", [1, 2, 31, 32, 33, 196, 257, 512, 513, 1100, 2049, 4100])
def test_select(library: ctypes.CDLL, order: str, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    plain = torch.randn(2, count, generator=generator)
    ties = torch.randint(0, 3, (2, count), generator=generator).float()
    special = torch.tensor([math.nan, -math.inf, math.inf, 0.0, -0.0, 1e-40, -1e-40, -1.0, 2.0, -math.nan])
    special = special[torch.randint(0, len(special), (2, count), generator=generator)]
    for importance in (plain, ties, special, torch.zeros(2, count)):
        for num_prop in sorted({0, 1, count // 3, count - 1} - {count}):
            ours = select_tokens(library, importance, num_prop, order)
            theirs = reference.select_tokens(importance, num_prop, order=order)
            assert torch.equal(ours[0], theirs[0])
            assert torch.equal(ours[1], theirs[1])


def test_select_of_more_tokens_than_fit_into_shared_memory(library: ctypes.CDLL) -> None:
    importance = torch.randint(0, 5000, (1, 26000), generator=torch.Generator().manual_seed(0)).float()
    for ours, theirs in zip(
        select_tokens(library, importance, 5000, "grid"), reference.select_tokens(importance, 5000), strict=True
    ):
        assert torch.equal(ours, theirs)


# --- step -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("standard", checks.PROPAGATIONS)
@pytest.mark.parametrize("scales_dtype", [None, torch.float32, torch.float64])
def test_propagate(
    library: ctypes.CDLL, seed: int, dtype: torch.dtype, standard: str, scales_dtype: torch.dtype | None
) -> None:
    for channels in (1, 3, 24, 40):
        x, graph, kept, prop, scales = case(channels=channels, dtype=dtype)
        check_step(
            library, x, graph, kept, prop, standard=standard, alpha=0.3,
            token_scales=None if scales_dtype is None else scales.to(scales_dtype),
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", checks.NORMS)
@pytest.mark.parametrize("standard", checks.PROPAGATIONS)
def test_residual_step(library: ctypes.CDLL, seed: int, dtype: torch.dtype, norm: str, standard: str) -> None:
    for channels, vector_dtype in ((3, torch.float64), (40, torch.float32), (44, dtype), (384, torch.float64)):
        x, graph, kept, prop, scales = case(channels=channels, dtype=dtype)
        generator = torch.Generator().manual_seed(3)
        options: dict[str, Any] = {"branch": torch.randn(x.shape, generator=generator).to(dtype), "norm": norm}
        check_step(library, x, graph, kept, prop, standard=standard, **options)
        scale, weight, bias = torch.randn(3, channels, generator=generator).to(vector_dtype)
        options |= {"layer_scale": scale, "token_scales": scales}
        if norm != "none":
            options["norm_weight"] = weight
        if norm == "layer":
            options["norm_bias"] = bias
        check_step(library, x, graph, kept, prop, standard=standard, alpha=0.7, norm_eps=1e-3, **options)


HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize(
    ("x_dtype", "branch_dtype"),
    [(torch.float32, h) for h in HALVES] + [(h, torch.float32) for h in HALVES] + [(HALVES[0], HALVES[1])],
)
@pytest.mark.parametrize("channels", [7, 256])
def test_mixed_dtypes(library: ctypes.CDLL, x_dtype: torch.dtype, branch_dtype: torch.dtype, channels: int) -> None:
    x, graph, kept, prop, _ = case(channels=channels, dtype=x_dtype)
    branch = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).to(branch_dtype)
    check_step(library, x, graph, kept, prop, branch=branch, norm="layer")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [128, 260, 388, 512, 768, 1024, 1030, 1536, 1664, 2048, 2052, 2100])
def test_channels(library: ctypes.CDLL, dtype: torch.dtype, channels: int) -> None:
    x, graph, kept, prop, scales = case(n=9, num_prop=4, batch=1, channels=channels, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    branch = torch.randn(x.shape, generator=generator).to(dtype)
    vectors = torch.randn(3, channels, generator=generator).to(dtype)
    options = dict(zip(("layer_scale", "norm_weight", "norm_bias"), vectors, strict=True))
    check_step(library, x, graph, kept, prop, branch=branch, norm="layer", token_scales=scales, alpha=0.7, **options)
    check_step(library, x, graph, kept, prop, token_scales=scales, alpha=0.7)
    check_step(library, x, graph, kept, prop, standard="Mean")


@pytest.mark.parametrize("standard", checks.PROPAGATIONS)
@pytest.mark.parametrize(
    ("n", "num_prop", "num_prefix", "batch"),
    [(1, 0, 0, 1), (1, 0, 1, 2), (2, 1, 1, 1), (35, 0, 5, 2), (35, 34, 1, 2), (62, 61, 0, 3), (196, 8, 1, 5)],
)
def test_sizes(
    library: ctypes.CDLL, seed: int, standard: str, n: int, num_prop: int, num_prefix: int, batch: int
) -> None:
    x, graph, kept, prop, scales = case(n, num_prop, num_prefix, batch)
    for branch in (None, x.flip(1)):
        norm = {} if branch is None else {"norm": "layer"}
        check_step(
            library, x, graph, kept, prop, branch=branch, standard=standard, token_scales=scales,
            num_prefix=num_prefix, **norm,
        )  # fmt: skip


def test_empty_batch(library: ctypes.CDLL) -> None:
    x, graph, kept, prop, _ = case()
    empty = TokenGraph(*(tensor[:0] for tensor in (graph.indptr, graph.indices, graph.values, graph.token)))
    step(library, x[:0], empty, kept[:0], prop[:0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [40, 41])
@pytest.mark.parametrize(("n", "degree", "num_prop"), [(20, 24, 17), (100, 99, 90), (300, 70, 280)])
def test_many_edges_in_a_row(
    library: ctypes.CDLL, seed: int, dtype: torch.dtype, channels: int, n: int, degree: int, num_prop: int
) -> None:
    x, graph, kept, prop, scales = case(n, num_prop, channels=channels, dtype=dtype, degree=degree)
    branch = x.flip(1)
    check_step(library, x, graph, kept, prop, branch=branch, norm="layer", token_scales=scales, alpha=0.7)


def test_more_tokens_than_the_table_holds(library: ctypes.CDLL) -> None:
    """The leavers are looked for one by one: the originals do not fit into shared memory."""
    x, graph, kept, prop, scales = case(channels=8)
    shift = 100_000
    indptr = torch.cat((graph.indptr.new_zeros(2, shift), graph.indptr), 1)
    graph = TokenGraph(indptr, graph.indices + shift, graph.values, graph.token + shift)
    ours = step(library, x, graph, kept, prop, token_scales=scales, alpha=0.7)
    small = TokenGraph(indptr[:, shift:].contiguous(), graph.indices - shift, graph.values, graph.token - shift)
    theirs = step(library, x, small, kept, prop, token_scales=scales, alpha=0.7)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[3], theirs[3])
    compare(*theirs, x, small, kept, prop, token_scales=scales, alpha=0.7)


def test_strided_and_misaligned_input(library: ctypes.CDLL) -> None:
    x, graph, kept, prop, _ = case(channels=48)
    wide = torch.randn(36, 2, 101)
    for view in (
        torch.cat((x, x), 2)[..., 48:],
        x.transpose(0, 1).contiguous().transpose(0, 1),
        wide[..., 1:49].transpose(0, 1),
        wide[..., :96:2].contiguous()[..., 2:46].transpose(0, 1),
        x[:1].expand(2, -1, -1),
    ):
        branch = view.flip(1).to(torch.bfloat16)
        check_step(library, view, graph, kept, prop, branch=branch, norm="rms")
        check_step(library, view, graph, kept, prop)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [24, 25])
def test_a_row_without_an_edge_is_copied_bit_for_bit(library: ctypes.CDLL, dtype: torch.dtype, channels: int) -> None:
    integer = torch.int16 if dtype.itemsize == 2 else torch.int32
    info = torch.iinfo(integer)
    bits = torch.randint(
        info.min, info.max, (2, 36, channels), generator=torch.Generator().manual_seed(0), dtype=integer
    )
    _, graph, kept, prop, _ = case()
    empty = TokenGraph(torch.zeros_like(graph.indptr), graph.indices, graph.values, graph.token)
    expected = torch.cat((bits[:, :1], bits.gather(1, kept.unsqueeze(-1).expand(-1, -1, channels))), 1)
    for standard in ("GraphProp", "None"):
        out = step(library, bits.view(dtype), empty, kept, prop, standard=standard)[0]
        assert torch.equal(out.view(integer), expected)


def guarded(tensor: Tensor, at_end: bool) -> Tensor:
    """A copy that begins or ends where a page does, beside a page that nobody may touch."""
    size, page = tensor.numel() * tensor.itemsize, mmap.PAGESIZE
    whole = -(-size // page) * page
    memory = mmap.mmap(-1, whole + 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for at in (start, start + page + whole):
        assert ctypes.CDLL(None).mprotect(POINTER(at), ctypes.c_size_t(page), 0) == 0
    offset = page + (whole - size if at_end else 0)
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(tensor.shape)
    return copy.copy_(tensor)


@pytest.mark.parametrize("channels", [24, 25])
@pytest.mark.parametrize("at_end", [False, True])
def test_bad_values_read_nothing_outside(library: ctypes.CDLL, channels: int, at_end: bool) -> None:
    x, graph, kept, prop, scales = case(channels=channels)
    x, kept, prop, scales = (guarded(tensor, at_end) for tensor in (x, kept, prop, scales))
    names = ("indptr", "indices", "values", "token")
    arrays = {name: guarded(getattr(graph, name), at_end) for name in names}
    largest = torch.iinfo(torch.int32).max
    capacity, origins = graph.indices.shape[1], graph.indptr.shape[1] - 1
    for value in (-1, largest, -largest - 1, 1 << 20, origins, capacity - 1, capacity + 1):
        for name in ("indptr", "indices", "token"):
            before = arrays[name].clone()
            arrays[name][:, ::3] = value
            step(library, x, TokenGraph(**arrays), kept, prop, token_scales=scales)
            arrays[name].copy_(before)
    for index in (kept, prop):
        before = index.clone()
        for wrong in (-1, 0, 36, 1 << 40, -(1 << 62)):
            index.fill_(wrong)
            for standard in checks.PROPAGATIONS:
                step(library, x, TokenGraph(**arrays), kept, prop, token_scales=scales, standard=standard)
        index.copy_(before)


def test_what_is_refused(library: ctypes.CDLL) -> None:
    x, graph, kept, prop, _ = case()
    with pytest.raises(RuntimeError, match="float64"):
        step(library, x.double(), graph, kept, prop)


# --- the merge of live edges ------------------------------------------------------------------------------------------


def merge_case(
    n: int, num_prop: int, num_prefix: int = 1, channels: int = 24, dtype: torch.dtype = torch.float32
) -> Any:
    """x, branch and a selection; targets and shares as they come, some of no row and some of nothing."""
    x, _, kept, prop, _ = case(n, num_prop, num_prefix, channels=channels, dtype=dtype)
    generator = torch.Generator().manual_seed(n + channels)
    target = torch.randint(-1, n - num_prop, (2, num_prop), generator=generator)
    share = torch.rand(2, n, generator=generator)
    share[:, ::5] = 0
    branch = torch.randn(x.shape, generator=generator).to(dtype)
    return x, branch, LiveSelection(kept, prop, target, share, share, LiveGraph(kept, kept, kept))


def check_merge(library: ctypes.CDLL, x: Tensor, branch: Tensor, selection: LiveSelection, **options: Any) -> None:
    kept, prop, target, share, _, _ = selection
    given = dict(options, standard="Merge", branch=branch, target=target, share=share)
    out, normed, _, _ = step(library, x, None, kept, prop, **given)
    theirs = reference.live_merge(x, branch, selection, **options)
    close(out, theirs[0])
    if normed is not None:
        close(normed, theirs[1], slack_of_norm(theirs[0]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", checks.NORMS)
def test_merge(library: ctypes.CDLL, seed: int, dtype: torch.dtype, norm: str) -> None:
    for channels, vector_dtype in ((3, torch.float64), (40, torch.float32), (384, dtype), (772, dtype), (1540, dtype)):
        x, branch, selection = merge_case(9 if channels > 400 else 45, 4, channels=channels, dtype=dtype)
        check_merge(library, x, branch, selection, norm=norm)
        generator = torch.Generator().manual_seed(3)
        scale, weight, bias = torch.randn(3, channels, generator=generator).to(vector_dtype)
        options: dict[str, Any] = {"layer_scale": scale, "norm": norm, "norm_eps": 1e-3}
        if norm != "none":
            options["norm_weight"] = weight
        if norm == "layer":
            options["norm_bias"] = bias
        check_merge(library, x, branch, selection, **options)


@pytest.mark.parametrize(("n", "num_prop"), [(1, 0), (2, 1), (40, 0), (40, 39), (100, 33), (140, 98), (300, 8)])
@pytest.mark.parametrize("num_prefix", [0, 1, 5])
def test_merge_of_few_and_many(library: ctypes.CDLL, n: int, num_prop: int, num_prefix: int) -> None:
    x, branch, selection = merge_case(n, num_prop, num_prefix)
    check_merge(library, x, branch, selection, norm="layer", num_prefix=num_prefix)
    into_one = selection._replace(target=torch.zeros_like(selection.target))
    check_merge(library, x, branch, into_one, norm="none", num_prefix=num_prefix)


@pytest.mark.parametrize("channels", [24, 25])
def test_merge_of_what_is_not_finite(library: ctypes.CDLL, channels: int) -> None:
    """A row that goes nowhere, or with a share of nothing, leaves no trace; another one only where it goes."""
    x, branch, selection = merge_case(35, 8, channels=channels)
    kept, prop, target, share, _, _ = selection
    target[:, 0], target[:, 1:3] = -1, 4
    share.scatter_(1, prop[:, 1:3] - 1, torch.tensor([0.0, 0.5]).repeat(2, 1))
    x.scatter_(1, prop[:, :2, None].expand(-1, -1, channels), math.nan)
    for expected in (0, channels):
        out = step(library, x, None, kept, prop, standard="Merge", branch=branch, target=target, share=share)[0]
        assert out[:, 5].isnan().sum(1).tolist() == [expected] * 2
        assert int(out.isnan().sum()) == 2 * expected
        check_merge(library, x, branch, selection, norm="none")
        x.scatter_(1, prop[:, 2:3, None].expand(-1, -1, channels), math.nan)


@pytest.mark.parametrize("channels", [24, 25])
@pytest.mark.parametrize("at_end", [False, True])
def test_bad_targets_read_nothing_outside(library: ctypes.CDLL, channels: int, at_end: bool) -> None:
    x, branch, selection = merge_case(35, 8, channels=channels)
    selection.target[:, ::2] = torch.tensor([-7, 28, 2**32, -(2**63)])
    for name, bad in (("index_kept", 36), ("index_prop", -(2**40))):
        getattr(selection, name)[:, 1] = bad
    x, branch, kept, prop, target, share = (guarded(t, at_end) for t in (x, branch, *selection[:4]))
    step(library, x, None, kept, prop, standard="Merge", branch=branch, target=target, share=share, norm="layer")


# --- selection and step in one launch ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", checks.ORDERS)
@pytest.mark.parametrize("standard", checks.PROPAGATIONS)
def test_select_propagate(library: ctypes.CDLL, seed: int, dtype: torch.dtype, order: str, standard: str) -> None:
    """The same bits as the three kernels one after the other."""
    for n, num_prop, num_prefix, channels in ((1, 0, 1, 24), (35, 8, 1, 25), (196, 34, 2, 40), (600, 61, 0, 4)):
        x, graph, _, _, scales = case(n, num_prop, num_prefix, channels=channels, dtype=dtype)
        scores = scores_of(2, 3, num_prefix + n, special=True)
        arguments, importance = importance_arguments(scores, "MixedAttnMax", num_prefix, "official")
        checked(library.shim_token_importance(ctypes.byref(arguments)))
        kept, prop = select_tokens(library, importance, num_prop, order, num_prefix)
        options: dict[str, Any] = dict(
            branch=x.flip(1), norm="layer", standard=standard, token_scales=scales, num_prefix=num_prefix, alpha=0.7
        )
        expected = (importance, kept, prop, *step(library, x, graph, kept, prop, **options))
        arguments, importance = importance_arguments(scores, "MixedAttnMax", num_prefix, "official")
        kept, prop = torch.full_like(kept, -1), torch.full_like(prop, -1)
        step_of, outputs = step_arguments(x, graph, kept, prop, **options)
        checked(library.shim_select_propagate(ctypes.byref(arguments), INT(order == "grid"), ctypes.byref(step_of)))
        for ours, theirs in zip((importance, kept, prop, *outputs), expected, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))
