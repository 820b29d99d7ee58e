"""csrc/cuda/live.cu on the emulated GPU (tests/native/emulated_gpu.h) against the definition."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator
from typing import Any

import emulated
import pytest
import torch
from test_cuda_graph import DTYPES, GUARD, guarded
from test_cuda_propagate import guarded as fenced
from torch import Tensor

import gtp_kernels
from gtp_kernels import LiveGraph, LiveSelection, TokenGraph, native, reference

HALVES = [torch.bfloat16, torch.float16]
INT, POINTER, DOUBLE = ctypes.c_int64, ctypes.c_void_p, ctypes.c_double


class Arguments(ctypes.Structure):
    """SelectArguments of ``native/cuda_live_shim.cpp``."""

    _fields_ = (
        ("k", POINTER), ("stride_k", INT * 4), ("dtype", INT), ("importance", POINTER), ("importance_dtype", INT),
        *((name, POINTER) for name in ("indptr", "indices", "rep", "sizes")),
        *((name, INT) for name in ("batch", "heads", "tokens", "head_size", "prefix", "prop", "origins", "capacity")),
        ("gamma", DOUBLE),
        *((name, POINTER) for name in ("index_kept", "index_prop", "target", "share", "sizes_out", "rep_out")),
    )  # fmt: skip


class Live:
    """live_graph and live_select of the CUDA backend; ``launches`` of the last selection."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.allocations: list[Tensor] = []
        self.launches = 0

    def new(self, *shape: int, dtype: torch.dtype) -> Tensor:
        inside, whole = guarded(math.prod(shape), dtype)
        self.allocations.append(whole)
        return inside.reshape(shape)

    def graph(self, graph: TokenGraph) -> LiveGraph:
        batch, n, capacity = graph.indptr.shape[0], graph.indptr.shape[1] - 1, graph.indices.shape[1]
        sizes = (INT * 3)(batch, n, capacity)
        indptr, indices = self.new(batch, n + 1, dtype=torch.int32), self.new(batch, 2 * capacity, dtype=torch.int32)
        workspace = self.new(self.library.live_graph_workspace(sizes), dtype=torch.uint8)
        tensors = (graph.indptr, graph.indices, indptr, indices, workspace)
        checked(self.library.live_graph(sizes, *(POINTER(t.data_ptr()) for t in tensors)))
        return LiveGraph(indptr, indices, torch.arange(n, dtype=torch.int32).repeat(batch, 1))

    def select(
        self,
        k: Tensor,
        importance: Tensor,
        live: LiveGraph,
        num_prop: int,
        sizes: Tensor,
        *,
        gamma: float = 0.25,
        num_prefix: int = 1,
    ) -> LiveSelection:
        batch, heads, tokens, size = k.shape
        n, origins = tokens - num_prefix, live.rep.shape[1]
        kept, prop, target = (self.new(batch, count, dtype=torch.int64) for count in (n - num_prop, num_prop, num_prop))
        share, sizes_out = (self.new(batch, count, dtype=torch.float32) for count in (n, tokens - num_prop))
        rep = self.new(batch, origins, dtype=torch.int32)
        arguments = Arguments(
            k.data_ptr(), (INT * 4)(*k.stride()), DTYPES[k.dtype], importance.data_ptr(), DTYPES[importance.dtype],
            *(t.data_ptr() for t in (live.indptr, live.indices, live.rep, sizes)),
            batch, heads, tokens, size, num_prefix, num_prop, origins, live.indices.shape[1], gamma,
            *(t.data_ptr() for t in (kept, prop, target, share, sizes_out, rep)),
        )  # fmt: skip
        self.launches = self.library.live_select_launches(ctypes.byref(arguments))
        workspace = self.new(self.library.live_select_workspace(ctypes.byref(arguments)), dtype=torch.uint8)
        checked(self.library.live_select(ctypes.byref(arguments), POINTER(workspace.data_ptr())))
        return LiveSelection(kept, prop, target, share, sizes_out, LiveGraph(live.indptr, live.indices, rep))


def checked(text: bytes | None) -> None:
    if text is not None:
        raise RuntimeError(text.decode())


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(emulated.build("cuda_live_shim.cpp", tmp_path_factory.mktemp("cuda_live"))))
    for name in ("live_graph", "live_select"):
        getattr(loaded, name).restype = ctypes.c_char_p
        getattr(loaded, f"{name}_workspace").restype = INT
    loaded.live_select_launches.restype = INT
    return loaded


@pytest.fixture
def live(library: ctypes.CDLL) -> Iterator[Live]:
    kernels = Live(library)
    yield kernels
    for whole in kernels.allocations:
        assert (whole[:GUARD] == 0xFF).all()
        assert (whole[-GUARD:] == 0xFF).all()


@pytest.fixture(params=[1, 2])
def seed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """In which order lanes, warps and blocks run."""
    monkeypatch.setenv("GTP_EMULATED_SEED", str(request.param))
    return int(request.param)


def token_graph(batch: int, n: int, degree: int, generator: torch.Generator) -> TokenGraph:
    """Up to ``degree`` edges a row, every seventh row without any; not symmetric."""
    dense = torch.rand(batch, n, n, generator=generator)
    dense[torch.rand(batch, n, n, generator=generator).argsort(-1) >= degree] = 0
    dense[:, ::7] = 0
    dense.diagonal(dim1=1, dim2=2).zero_()
    return TokenGraph.from_dense(dense)


def case(
    n: int = 40, d: int = 16, heads: int = 3, prefix: int = 1, batch: int = 2, degree: int = 6,
    dtype: torch.dtype = torch.float32, seed: int = 0,
) -> tuple[Tensor, Tensor, TokenGraph, Tensor]:  # fmt: skip
    """k, importance, a graph, sizes."""
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(batch, heads, prefix + n, d, generator=generator).to(dtype)
    importance = torch.rand(batch, n, generator=generator)
    sizes = torch.randint(1, 9, (batch, prefix + n), generator=generator).float()
    return k, importance, token_graph(batch, n, degree, generator), sizes


def same(found: LiveSelection, expected: LiveSelection) -> None:
    for name in ("index_kept", "index_prop", "target"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert torch.equal(found.live.rep, expected.live.rep)
    torch.testing.assert_close(found.share, expected.share, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.sizes, expected.sizes, rtol=1e-6, atol=0)


def check(
    live: Live, k: Tensor, importance: Tensor, edges: LiveGraph, props: tuple[int, ...], sizes: Tensor, **options: Any
) -> None:
    """Block after block; of each the rows that are left go on."""
    for num_prop in props:
        found = live.select(k, importance, edges, num_prop, sizes, **options)
        same(found, reference.live_select(k.double(), importance.double(), edges, num_prop, sizes, **options))
        prefix = options.get("num_prefix", 1)
        k = torch.cat(
            (k[:, :, :prefix], k.gather(2, found.index_kept[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3]))),
            2,
        )
        importance = importance.gather(1, found.index_kept - prefix) * 1.1
        edges, sizes = found.live, found.sizes


# --- live_graph -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "degree"), [(1, 1), (2, 1), (33, 4), (40, 40), (97, 0), (801, 5)])
def test_graph(live: Live, seed: int, n: int, degree: int) -> None:
    graph = token_graph(2, n, degree, torch.Generator().manual_seed(n))
    found, expected = live.graph(graph), reference.live_graph(graph)
    assert torch.equal(found.indptr, expected.indptr)
    assert torch.equal(found.indices, expected.indices)


def test_graph_of_one_direction_and_of_both(live: Live) -> None:
    dense = torch.zeros(3, 5, 5)
    dense[0, 0, 1:] = 1  # a star that points outwards
    dense[1, 1:, 0] = 1  # inwards
    dense[2, 0, 1:] = dense[2, 1:, 0] = 1
    found = live.graph(TokenGraph.from_dense(dense))
    for image in range(3):
        assert found.indptr[image].tolist() == [0, 4, 5, 6, 7, 8]
        assert found.indices[image, :8].tolist() == [1, 2, 3, 4, 0, 0, 0, 0]


def test_graph_with_loops(live: Live) -> None:
    graph = TokenGraph.from_dense(torch.eye(40)[None].repeat(2, 1, 1))
    found, expected = live.graph(graph), reference.live_graph(graph)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.indptr, expected.indptr)


def test_no_edges_no_tokens_and_no_images(live: Live) -> None:
    for batch, n, capacity in ((0, 5, 7), (2, 0, 0), (2, 5, 0), (2, 0, 3)):
        empty = torch.zeros(batch, capacity, dtype=torch.int32)
        indptr = torch.zeros(batch, n + 1, dtype=torch.int32)
        found = live.graph(TokenGraph(indptr, empty, empty.float(), torch.zeros(batch, n, dtype=torch.int32)))
        assert not found.indptr.any()
        assert not found.indices.any()


# What a CSR of 40 tokens may be spoilt with; 0x7f7f7f7f and beyond are far out of range.
SPOILT = [-1, 40, -(2**31), 2**31 - 1, 0x7F7F7F7F, 0, 7]


def spoil(tensor: Tensor, generator: torch.Generator) -> Tensor:
    values = torch.tensor(SPOILT, dtype=torch.int32)
    drawn = values[torch.randint(len(values), tensor.shape, generator=generator)]
    return torch.where(torch.rand(tensor.shape, generator=generator) < 0.3, drawn, tensor).contiguous()


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("draw", range(4))
def test_a_graph_that_lies_reads_and_writes_nothing_outside(live: Live, draw: int, at_end: bool) -> None:
    generator = torch.Generator().manual_seed(draw)
    k, importance, graph, sizes = case(seed=draw)
    k, importance, sizes = (fenced(t, at_end) for t in (k, importance, sizes))
    indptr, indices = (fenced(spoil(t, generator), at_end) for t in (graph.indptr, graph.indices))
    live.graph(TokenGraph(indptr, indices, graph.values, graph.token))
    edges = live.graph(graph)
    edges = LiveGraph(*(fenced(spoil(t, generator), at_end) for t in (edges.indptr, edges.indices, edges.rep)))
    for num_prop in (0, 9, 39):
        found = live.select(k, importance, edges, num_prop, sizes)
        rows = torch.cat((found.index_kept, found.index_prop), 1).sort(1).values
        assert rows.tolist() == [list(range(1, 41))] * 2
        for places in (found.target, found.live.rep):
            assert places.numel() == 0 or (places.min() >= -1 and places.max() < 40 - num_prop)


# --- live_select ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_matches_definition(live: Live, seed: int, dtype: torch.dtype, prefix: int) -> None:
    k, importance, graph, sizes = case(67, 24, prefix=prefix, dtype=dtype)
    check(live, k, importance, live.graph(graph), (9, 0, 20, 37), sizes, num_prefix=prefix)
    assert live.launches == 1


@pytest.mark.parametrize("d", [0, 1, 2, 3, 4, 5, 31, 32, 33, 63, 64, 65, 80, 127, 128, 129, 256])
@pytest.mark.parametrize("heads", [1, 8, 9])
def test_head_sizes(live: Live, d: int, heads: int) -> None:
    # In one dimension every cosine is 1 or -1: scores tie, and that of two tokens of equal importance too.
    k, importance, graph, sizes = case(30, d, heads, batch=1)
    check(live, k, importance, live.graph(graph), (7, 12), sizes)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(("n", "d"), [(101, 256), (1100, 65), (9, 4096)])
def test_more_keys_than_fit_into_shared_memory(live: Live, seed: int, dtype: torch.dtype, n: int, d: int) -> None:
    k, importance, graph, sizes = case(n, d, 2, batch=1 if n > 1000 else 2, dtype=dtype)
    check(live, k, importance, live.graph(graph), (n // 5, n // 2), sizes)
    live.select(k, importance, live.graph(graph), 3, sizes)
    assert live.launches == 4


def test_one_form_chooses_as_the_other(live: Live) -> None:
    """Channels of zeros change no bit; with enough of them the keys no longer fit into shared memory."""
    few, importance, graph, sizes = case(101, 64, 2)
    edges = live.graph(graph)
    found = []
    for size in (64, 256):
        k = torch.zeros(2, 2, 102, size)
        k[..., :64] = few
        found.append(live.select(k, importance, edges, 40, sizes))
        assert live.launches == (1 if size == 64 else 4)
    for one, other in zip(found[0][:5], found[1][:5], strict=True):
        assert torch.equal(one, other)
    assert torch.equal(found[0].live.rep, found[1].live.rep)
    same(found[0], reference.live_select(few.double(), importance.double(), edges, 40, sizes))


@pytest.mark.skipif(native.missing is not None, reason="the CPU kernels were not built")
def test_more_rows_than_fit_into_shared_memory(live: Live) -> None:
    n, width = 9216, 96
    place = torch.arange(n)
    right = torch.where(place % width < width - 1, place + 1, -1)
    below = torch.where(place < n - width, place + width, -1)
    columns = torch.stack((right, below), 1)
    filled = columns >= 0
    indptr = torch.cat((torch.zeros(1), filled.sum(1).cumsum(0))).int()[None]
    indices = columns[filled].int()[None]
    graph = TokenGraph(indptr, indices, indices.float(), place.int()[None])
    generator = torch.Generator().manual_seed(0)
    # Every cosine is -1, 0 or 1, exactly, so that the CPU kernel, which needs no n x n map, chooses the same rows.
    k = torch.nn.functional.one_hot(torch.randint(64, (1, 1, n), generator=generator), 64).float()
    k *= torch.randint(2, (n, 1), generator=generator) * 2 - 1
    importance, sizes = torch.rand(1, n, generator=generator), torch.ones(1, n)
    edges = live.graph(graph)
    found = live.select(k, importance, edges, 900, sizes, gamma=1.0, num_prefix=0)
    assert live.launches == 4
    with gtp_kernels.use_backend("cpu"):
        assert torch.equal(edges.indices, gtp_kernels.live_graph(graph).indices)
        same(found, gtp_kernels.live_select(k, importance, edges, 900, sizes, gamma=1.0, num_prefix=0))


@pytest.mark.parametrize("num_prop", [0, 1, 20, 39])
@pytest.mark.parametrize("degree", [0, 1, 3, 40])
def test_from_none_to_all_but_one(live: Live, seed: int, num_prop: int, degree: int) -> None:
    k, importance, graph, sizes = case(degree=degree)
    check(live, k, importance, live.graph(graph), (num_prop,), sizes)


@pytest.mark.parametrize("prefix", [0, 5])
def test_one_row(live: Live, prefix: int) -> None:
    k, importance, graph, sizes = case(1, prefix=prefix)
    found = live.select(k, importance, live.graph(graph), 0, sizes, num_prefix=prefix)
    assert found.index_kept.tolist() == [[prefix]] * 2
    assert found.share.tolist() == [[1.0]] * 2
    assert found.live.rep.tolist() == [[0]] * 2
    assert torch.equal(found.sizes, sizes)


def test_no_images_and_no_rows(live: Live) -> None:
    for batch, n in ((0, 4), (2, 0)):
        edges = LiveGraph(*(torch.zeros(batch, count, dtype=torch.int32) for count in (n + 1, 0, n)))
        found = live.select(torch.ones(batch, 2, 1 + n, 8), torch.ones(batch, n), edges, 0, torch.ones(batch, 1 + n))
        assert found.sizes.shape == (batch, 1 + n)
        assert (found.sizes == 1).all()


@pytest.mark.parametrize("d", [8, 256])
@pytest.mark.parametrize("num_prop", [3, 50, 100])
def test_all_keys_equal(live: Live, seed: int, d: int, num_prop: int) -> None:
    """Every cosine and so every score ties to the bit: the highest indices leave, into the lowest neighbour."""
    k, importance, graph, sizes = case(101, d, 1)
    k[:] = torch.randn(d, generator=torch.Generator().manual_seed(d))
    importance[:] = 0.7
    edges = live.graph(graph)
    found = live.select(k, importance, edges, num_prop, sizes)
    assert live.launches == (1 if d == 8 else 4)
    # The sums of the definition round in an order of their own: it is asked for keys whose products are exact.
    same(found, reference.live_select(torch.ones(2, 1, 102, 1), importance, edges, num_prop, sizes))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_cosines_are_the_same_from_both_ends(live: Live, dtype: torch.dtype) -> None:
    """Two rows that are each other's best have the same score to the bit, so that of each pair the higher leaves."""
    for d in (24, 61, 200):
        k, importance, _, sizes = case(60, d, 3, dtype=dtype)
        dense = torch.zeros(2, 60, 60)
        dense[:, range(0, 60, 2), range(1, 60, 2)] = 1
        importance[:] = 1
        found = live.select(k, importance, live.graph(TokenGraph.from_dense(dense)), 30, sizes, gamma=0.0)
        assert found.index_prop.tolist() == [list(range(2, 61, 2))] * 2


@pytest.mark.parametrize("gamma", [0.0, 0.25, 1.0, 3.0])
@pytest.mark.parametrize("importance_dtype", [torch.float32, torch.float64])
def test_importance(live: Live, gamma: float, importance_dtype: torch.dtype) -> None:
    k, importance, graph, sizes = case()
    importance[0, :9] = 0.0
    importance[1, 5] = 1e6
    importance[1, 6] = -3.0
    check(live, k, importance.to(importance_dtype), live.graph(graph), (8, 9), sizes, gamma=gamma)


@pytest.mark.parametrize(
    "what", ["keys", "some keys", "infinite keys", "zero keys", "importance", "infinite importance", "zero importance"]
)
@pytest.mark.parametrize("d", [7, 500])
def test_what_is_no_number(live: Live, what: str, d: int) -> None:
    k, importance, graph, sizes = case(60, d)
    if what == "keys":
        k[:] = math.nan
    elif what == "some keys":
        k[:, 0, ::3, 5] = math.nan
    elif what == "infinite keys":
        k[:, :, ::3, 5] = math.inf
    elif what == "zero keys":
        k[:, :, ::3] = 0
    elif what == "zero importance":
        importance[:] = 0
    else:
        importance[:, ::3] = math.inf if what == "infinite importance" else math.nan
    edges = live.graph(graph)
    found = live.select(k, importance, edges, 25, sizes)
    same(found, reference.live_select(k.double(), importance.double(), edges, 25, sizes))
    assert found.share.isfinite().all()


Change = Callable[[Tensor], Tensor]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(
    "change",
    [
        lambda k: torch.stack((k, k, k), 2)[:, :, 1],
        lambda k: k.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2),
        lambda k: torch.cat((k, k), 3)[..., 1 : 1 + k.shape[3]],
        lambda k: torch.cat((k, k[..., :1]), 3)[..., : k.shape[3]],
        lambda k: torch.stack((k, k), 4)[..., 1],
        lambda k: k[:, :1].expand(-1, 3, -1, -1),
        lambda k: k.flip(3).flip(3),
    ],
    ids=["qkv", "channels before heads", "offset by one", "odd rows", "every other", "expanded", "contiguous"],
)
def test_strides(live: Live, dtype: torch.dtype, change: Change) -> None:
    k, importance, graph, sizes = case(dtype=dtype)
    edges, strided = live.graph(graph), change(k)
    found = live.select(strided, importance, edges, 11, sizes)
    expected = live.select(strided.contiguous(), importance, edges, 11, sizes)
    for ours, theirs in zip(found[:5], expected[:5], strict=True):
        assert torch.equal(ours, theirs)
    same(found, reference.live_select(strided.double(), importance.double(), edges, 11, sizes))


def test_rows_that_carry_many_tokens(live: Live, seed: int) -> None:
    """Each of three rows carries a third of 400 tokens, some carry none, and some tokens were dropped."""
    k, importance, _, sizes = case(12, 16)
    _, _, graph, _ = case(400, degree=9, seed=1)
    rep = torch.randint(-1, 3, (2, 400), generator=torch.Generator().manual_seed(0), dtype=torch.int32) * 4
    rep[:, ::50] = torch.tensor([1, 2, 3, 5, 6, 7, 9, 10], dtype=torch.int32)
    full = live.graph(graph)
    edges = LiveGraph(full.indptr, full.indices, rep.clamp(min=-1))
    check(live, k, importance, edges, (4, 4), sizes)


def test_float64_is_refused(live: Live) -> None:
    k, importance, graph, sizes = case(9)
    with pytest.raises(RuntimeError, match="the CUDA kernel live_select takes no float64"):
        live.select(k.double(), importance, live.graph(graph), 2, sizes)
