"""csrc/cuda/graph.cu on the emulated GPU (tests/native/emulated_gpu.h) against the definition."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator

import emulated
import pytest
import torch
from test_graph import check_csr, embedded
from torch import Tensor

from gtp_kernels import TokenGraph, reference
from gtp_kernels.reference.graph import edge_capacity, num_semantic_neighbours

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
TYPES = ["Spatial", "Semantic", "Mixed"]
GUARD = 64

Build = Callable[..., TokenGraph]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(emulated.build("cuda_graph_shim.cpp", tmp_path_factory.mktemp("cuda_graph"))))
    loaded.graph_workspace.restype = ctypes.c_int64
    return loaded


def guarded(count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``count`` elements that hold anything, and the allocation around them, whose ends must stay as they are."""
    whole = torch.full((count * dtype.itemsize + 2 * GUARD,), 0xFF, dtype=torch.uint8)
    return whole[GUARD : GUARD + count * dtype.itemsize].view(dtype), whole


@pytest.fixture
def build(library: ctypes.CDLL) -> Iterator[Build]:
    """build_graph of the CUDA backend."""
    allocations = []

    def run(
        x: Tensor,
        grid_size: tuple[int, int],
        graph_type: str = "Mixed",
        num_neighbours: int = 8,
        num_prefix: int = 1,
        semantics: str = "official",
    ) -> TokenGraph:
        batch, tokens, channels = x.shape
        height, width = grid_size
        n = height * width
        neighbours = num_semantic_neighbours(n, num_neighbours, num_prefix, semantics)
        capacity = edge_capacity(height, width, graph_type, neighbours)
        assert x.stride(2) == 1
        sizes = (ctypes.c_int64 * 9)(
            batch, tokens, channels, num_prefix, height, width, TYPES.index(graph_type), neighbours, capacity
        )
        indptr, of_indptr = guarded(batch * (n + 1), torch.int32)
        indices, of_indices = guarded(batch * capacity, torch.int32)
        values, of_values = guarded(batch * capacity, torch.float32)
        workspace, of_workspace = guarded(library.graph_workspace(sizes), torch.uint8)
        allocations.extend((of_indptr, of_indices, of_values, of_workspace))
        error = ctypes.create_string_buffer(256)
        good = library.build_graph(
            ctypes.c_void_p(x.data_ptr()),
            DTYPES[x.dtype],
            (ctypes.c_int64 * 2)(x.stride(0), x.stride(1)),
            sizes,
            *(ctypes.c_void_p(t.data_ptr()) for t in (indptr, indices, values, workspace)),
            error,
        )
        assert bool(good) == (error.value == b"")
        if not good:
            raise RuntimeError(error.value.decode())
        token = torch.arange(n, dtype=torch.int32).repeat(batch, 1)
        shape = (batch, capacity)
        return TokenGraph(indptr.reshape(batch, n + 1), indices.reshape(shape), values.reshape(shape), token)

    yield run
    for whole in allocations:
        assert (whole[:GUARD] == 0xFF).all()
        assert (whole[-GUARD:] == 0xFF).all()


def equal(ours: TokenGraph, theirs: TokenGraph) -> None:
    check_csr(ours)
    for name in ("indptr", "indices", "values", "token"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("graph_type", TYPES)
@pytest.mark.parametrize("semantics", ["official", "paper"])
@pytest.mark.parametrize("num_prefix", [0, 1, 5])
def test_matches_definition(build: Build, dtype: torch.dtype, graph_type: str, semantics: str, num_prefix: int) -> None:
    x = embedded(2, 35 + num_prefix, dtype=dtype)
    arguments = ((5, 7), graph_type, 4, num_prefix, semantics)
    theirs = reference.build_graph(x.double(), *arguments)
    x[:, :num_prefix] = math.nan  # not read
    equal(build(x, *arguments), theirs)


@pytest.mark.parametrize(
    ("grid", "channels", "dtype"),
    [
        ((4, 4), 24, torch.bfloat16),
        ((1, 17), 8, torch.float32),
        ((9, 1), 5, torch.float32),
        ((2, 31), 12, torch.bfloat16),
        ((14, 14), 384, torch.float32),
        ((16, 16), 64, torch.bfloat16),
        ((28, 28), 24, torch.float32),
        ((5, 13), 33, torch.float16),
        ((43, 3), 1, torch.float32),
        ((64, 64), 16, torch.float32),
    ],
)
def test_sizes(build: Build, grid: tuple[int, int], channels: int, dtype: torch.dtype) -> None:
    n = grid[0] * grid[1]
    x = embedded(1 if n > 500 else 2, n + 1, channels, dtype)
    equal(build(x, grid), reference.build_graph(x.double(), grid))


@pytest.mark.parametrize(
    ("grid", "neighbours"),
    [*(((4, 4), m) for m in (1, 2, 15)), *(((12, 12), m) for m in (32, 33, 64, 65, 143))],
)
def test_numbers_of_neighbours(build: Build, grid: tuple[int, int], neighbours: int) -> None:
    x = embedded(2, grid[0] * grid[1] + 1, 16)
    for graph_type in ("Semantic", "Mixed"):
        equal(build(x, grid, graph_type, neighbours), reference.build_graph(x.double(), grid, graph_type, neighbours))


def test_exact_ties_take_the_lower_index_and_never_exceed_m(build: Build) -> None:
    graph = build(torch.ones(1, 9, 4), (3, 3), "Semantic", 2, 0, "paper")
    assert graph.indices.reshape(9, 2).tolist() == [[1, 2], [0, 2]] + [[0, 1]] * 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("grid", "neighbours"), [((7, 10), 9), ((15, 17), 40), ((11, 13), 70)])
def test_many_exact_ties(build: Build, dtype: torch.dtype, grid: tuple[int, int], neighbours: int) -> None:
    # Signed unit vectors: every similarity is -1, 0 or 1, exactly.
    generator = torch.Generator().manual_seed(0)
    n = grid[0] * grid[1]
    kind = torch.randint(0, 3, (2, n + 1), generator=generator)
    sign = torch.randint(0, 2, (2, n + 1, 1), generator=generator) * 2 - 1
    x = (torch.nn.functional.one_hot(kind, 5) * sign).to(dtype)
    equal(build(x, grid, "Semantic", neighbours), reference.build_graph(x, grid, "Semantic", neighbours))


def test_equal_rows_are_equally_similar(build: Build) -> None:
    # Wherever they stand among the tiles and lanes: the lower index first.
    few = embedded(1, 3, 37)
    kind = torch.randint(0, 3, (300,), generator=torch.Generator().manual_seed(1))
    graph = build(few[:, kind], (15, 20), "Semantic", 5, 0, "paper")
    for i, row in enumerate(graph.indices.reshape(300, 5).tolist()):
        same = [j for j in torch.nonzero(kind == kind[i]).flatten().tolist() if j != i]
        assert row == same[:5]


def test_zeros_of_either_sign_tie(build: Build) -> None:
    # The product of the first two rows underflows to -0 in the last channel of a chunk; that of rows 0 and 2 is 0.
    x = torch.zeros(1, 4, 16)
    x[0, [0, 1, 2, 3], [0, 1, 2, 0]] = torch.tensor([1.0, 1.0, 1.0, -1.0])
    x[0, :2, 15] = torch.tensor([1e-25, -1e-25])
    assert build(x, (2, 2), "Semantic", 1, 0, "paper").indices[0, 0] == 1


def test_sweeps_do_not_overtake_each_other(build: Build) -> None:
    # An odd number of chunks: the second sweep fetches where the first one reads last.
    x = embedded(1, 120, 48)
    for neighbours in (65, 119):
        arguments = ((10, 12), "Semantic", neighbours, 0, "paper")
        equal(build(x, *arguments), reference.build_graph(x.double(), *arguments))


@pytest.mark.parametrize("neighbours", [3, 6])
def test_zero_nan_and_infinite_rows(build: Build, neighbours: int) -> None:
    x = embedded(1, 9, 6)
    x[0, 4] = 0.0
    x[0, 5, 1] = math.inf
    x[0, 7] = math.nan
    x[0, 8] *= 3e38  # its norm overflows
    theirs = reference.build_graph(x, (3, 3), "Semantic", neighbours, 0, "paper")
    equal(build(x, (3, 3), "Semantic", neighbours, 0, "paper"), theirs)


def test_all_rows_nan(build: Build) -> None:
    x = torch.full((1, 70, 3), math.nan)
    for neighbours in (3, 66):
        theirs = reference.build_graph(x, (7, 10), "Mixed", neighbours, 0, "paper")
        equal(build(x, (7, 10), "Mixed", neighbours, 0, "paper"), theirs)


def test_no_neighbours_one_token_and_no_images(build: Build) -> None:
    graph = build(embedded(2, 9), (3, 3), "Semantic", 0, 0, "paper")
    assert graph.indices.shape == (2, 0)
    assert not graph.indptr.any()
    equal(
        build(embedded(2, 9), (3, 3), "Mixed", 0, 0, "paper"),
        reference.build_graph(embedded(2, 9), (3, 3), "Spatial", 0, 0),
    )
    for graph_type in TYPES:
        one = build(embedded(2, 2), (1, 1), graph_type, 0)
        assert one.indptr.tolist() == [[0, 0], [0, 0]]
        assert build(embedded(0, 10), (3, 3), graph_type).indptr.shape == (0, 10)


def test_strided_input(build: Build) -> None:
    wide = torch.randn(4, 34, 29, generator=torch.Generator().manual_seed(0))
    x = wide[::2, 1::2, 3:26]
    equal(build(x, (4, 4)), reference.build_graph(x.double(), (4, 4)))
    equal(
        build(wide[:1, :17].expand(3, -1, -1), (4, 4)),
        reference.build_graph(wide[:1, :17].repeat(3, 1, 1).double(), (4, 4)),
    )


@pytest.mark.parametrize("seed", range(3))
def test_does_not_depend_on_the_order_of_threads(build: Build, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    x = embedded(3, 197, 48)
    monkeypatch.setenv("GTP_EMULATED_SEED", str(seed))
    for neighbours in (8, 70):
        theirs = reference.build_graph(x.double(), (14, 14), "Mixed", neighbours)
        equal(build(x, (14, 14), "Mixed", neighbours), theirs)


def test_float64_is_refused(build: Build) -> None:
    with pytest.raises(RuntimeError, match="x must be float32, bfloat16 or float16 on this backend, not float64"):
        build(embedded(1, 10, dtype=torch.float64), (3, 3))
