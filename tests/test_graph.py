"""build_graph and TokenGraph on every backend against the definition."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from conftest import backend_params
from hypothesis import given
from hypothesis import strategies as st
from tolerances import close
from torch import Tensor

import gtp_kernels
from gtp_kernels import TokenGraph, backends, reference
from gtp_kernels.ops import _library

# Those whose operators are registered with torch; the definition is not.
OPERATOR_BACKENDS = [name for name in backend_params() if name != "reference"]


def embedded(batch: int, num_tokens: int, channels: int = 24, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, num_tokens, channels, generator=torch.Generator().manual_seed(num_tokens)).to(dtype)


def check_csr(graph: TokenGraph) -> None:
    """The contract of the CSR: ascending columns within a row, zero padding, every view in range."""
    n = graph.num_tokens
    assert (graph.indptr[:, 0] == 0).all()
    assert (graph.indptr[:, 1:] >= graph.indptr[:, :-1]).all()
    assert (graph.indptr[:, -1] <= graph.indices.shape[1]).all()
    for indptr, indices, values in zip(graph.indptr.tolist(), graph.indices, graph.values, strict=True):
        assert not indices[indptr[n] :].any()
        assert not values[indptr[n] :].any()
        for begin, end in pairwise(indptr):
            row = indices[begin:end]
            assert (row[1:] > row[:-1]).all()
            assert ((row >= 0) & (row < n)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("graph_type", ["Spatial", "Semantic", "Mixed"])
@pytest.mark.parametrize("semantics", ["official", "paper"])
@pytest.mark.parametrize("num_prefix", [0, 1, 5])
def test_matches_definition(backend: str, dtype: torch.dtype, graph_type: str, semantics: str, num_prefix: int) -> None:
    x = embedded(2, 35 + num_prefix, dtype=dtype)
    ours = gtp_kernels.build_graph(x, (5, 7), graph_type, 4, num_prefix, semantics)
    theirs = reference.build_graph(x.double(), (5, 7), graph_type, 4, num_prefix, semantics)
    check_csr(ours)
    for name in ("indptr", "indices", "token"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert torch.equal(ours.values, theirs.values)


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
    ],
)
def test_sizes(backend: str, grid: tuple[int, int], channels: int, dtype: torch.dtype) -> None:
    x = embedded(1 if grid == (28, 28) else 2, grid[0] * grid[1] + 1, channels, dtype)
    ours = gtp_kernels.build_graph(x, grid)
    theirs = reference.build_graph(x.double(), grid)
    check_csr(ours)
    assert torch.equal(ours.indices, theirs.indices)
    assert torch.equal(ours.values, theirs.values)


@pytest.mark.parametrize(
    ("grid", "neighbours", "dtype"),
    [
        *(((4, 4), m, dtype) for m in (1, 2, 15) for dtype in (torch.float32, torch.float64, torch.bfloat16)),
        ((9, 8), 66, torch.float32),
    ],
)
def test_numbers_of_neighbours(backend: str, grid: tuple[int, int], neighbours: int, dtype: torch.dtype) -> None:
    x = embedded(1, grid[0] * grid[1] + 1, 16, dtype)
    for graph_type in ("Semantic", "Mixed"):
        ours = gtp_kernels.build_graph(x, grid, graph_type, neighbours)
        theirs = reference.build_graph(x.double(), grid, graph_type, neighbours)
        check_csr(ours)
        assert torch.equal(ours.indices, theirs.indices)
        assert torch.equal(ours.values, theirs.values)


def test_spatial_is_the_eight_neighbours(backend: str) -> None:
    dense = gtp_kernels.build_graph(embedded(1, 12), (3, 4), "Spatial", num_prefix=0).to_dense()[0]
    degree = torch.tensor([3, 5, 5, 3, 5, 8, 8, 5, 3, 5, 5, 3])
    assert torch.equal((dense > 0).sum(1), degree)
    assert float(dense[0, 5]) == pytest.approx(1 / math.sqrt(3 * 8))
    assert float(dense[0, 2]) == 0.0
    assert float(dense[3, 4]) == 0.0


def test_semantic_count_follows_the_semantics(backend: str) -> None:
    for num_prefix, semantics, count in ((0, "official", 4), (0, "paper", 3), (1, "official", 3), (5, "official", 3)):
        x = embedded(1, 16 + num_prefix)
        graph = gtp_kernels.build_graph(x, (4, 4), "Semantic", 3, num_prefix, semantics)
        assert torch.equal(graph.indptr[0].diff(), torch.full((16,), count, dtype=torch.int32))


def test_exact_ties_take_the_lower_index_and_never_exceed_m(backend: str) -> None:
    x = torch.ones(1, 9, 4)
    graph = gtp_kernels.build_graph(x, (3, 3), "Semantic", 2, 0, "paper")
    assert graph.indices.reshape(9, 2).tolist() == [[1, 2], [0, 2]] + [[0, 1]] * 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_many_exact_ties(backend: str, dtype: torch.dtype) -> None:
    # Signed unit vectors: every similarity is -1, 0 or 1, exactly.
    generator = torch.Generator().manual_seed(0)
    kind = torch.randint(0, 3, (2, 71), generator=generator)
    sign = torch.randint(0, 2, (2, 71, 1), generator=generator) * 2 - 1
    x = (torch.nn.functional.one_hot(kind, 5) * sign).to(dtype)
    ours = gtp_kernels.build_graph(x, (7, 10), "Semantic", 9)
    assert torch.equal(ours.indices, reference.build_graph(x, (7, 10), "Semantic", 9).indices)


def test_zero_and_nan_rows(backend: str) -> None:
    x = embedded(1, 9, 6)
    x[0, 4] = 0.0
    x[0, 7] = math.nan
    graph = gtp_kernels.build_graph(x, (3, 3), "Semantic", 3, 0, "paper")
    theirs = reference.build_graph(x, (3, 3), "Semantic", 3, 0, "paper")
    assert torch.equal(graph.indices, theirs.indices)
    assert torch.isfinite(graph.values).all()
    assert 7 not in graph.indices.reshape(9, 3)[[0, 1, 2, 3, 5, 6, 8]]


def test_no_neighbours_and_one_token(backend: str) -> None:
    graph = gtp_kernels.build_graph(embedded(2, 9), (3, 3), "Semantic", 0, 0, "paper")
    assert graph.indices.shape == (2, 0)
    assert not graph.to_dense().any()
    one = gtp_kernels.build_graph(embedded(2, 2), (1, 1), "Mixed", 0)
    assert one.to_dense().tolist() == [[[0.0]], [[0.0]]]


def test_rows_without_edges_have_weight_zero(backend: str) -> None:
    # A row with edges into a row without any: the weight of that edge is 0, not infinite.
    dense = torch.zeros(1, 3, 3)
    dense[0, 0, 1] = 0.5
    graph = TokenGraph.from_dense(dense)
    x = embedded(1, 4)
    out, _, _ = gtp_kernels.propagate(x, graph, torch.tensor([[1, 3]]), torch.tensor([[2]]), alpha=1.0)
    close(out[0, 1], x[0, 1] + 0.5 * x[0, 2])
    close(out[0, 2], x[0, 3])


def test_empty_batch(backend: str) -> None:
    graph = gtp_kernels.build_graph(embedded(0, 10), (3, 3))
    assert graph.indptr.shape == (0, 10)
    assert graph.to_dense().shape == (0, 9, 9)


def test_strided_input(backend: str) -> None:
    wide = torch.randn(2, 24, 17, generator=torch.Generator().manual_seed(0)).transpose(1, 2)
    ours = gtp_kernels.build_graph(wide, (4, 4))
    assert torch.equal(ours.indices, reference.build_graph(wide.contiguous(), (4, 4)).indices)
    half = torch.randn(4, 17, 24, generator=torch.Generator().manual_seed(0))[::2, :, ::2]
    assert torch.equal(gtp_kernels.build_graph(half, (4, 4)).indices, reference.build_graph(half, (4, 4)).indices)


@given(batch=st.integers(0, 3), n=st.integers(0, 7), density=st.floats(0, 1), seed=st.integers(0, 99))
def test_dense_round_trip(batch: int, n: int, density: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.rand(batch, n, n, generator=generator)
    dense = dense * (torch.rand(batch, n, n, generator=generator) < density)
    graph = TokenGraph.from_dense(dense)
    check_csr(graph)
    assert torch.equal(graph.to_dense(), dense)
    if dense.numel():
        assert graph.indices.shape[1] == int((dense != 0).flatten(1).sum(1).max())


def test_graph_does_not_depend_on_threads(cpu_backend: str) -> None:
    x = embedded(2, 197, 96)
    before = torch.get_num_threads()
    graphs = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            graphs.append(gtp_kernels.build_graph(x, (14, 14)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(graphs[0].indices, g.indices) for g in graphs)


@pytest.mark.parametrize("backend", OPERATOR_BACKENDS, indirect=True)
@pytest.mark.parametrize("graph_type", ["Spatial", "Semantic", "Mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(backend: str, graph_type: str, dtype: torch.dtype) -> None:
    x = embedded(2, 13, dtype=dtype)
    ops = _library.operators(backends.choose("graph", x))
    torch.library.opcheck(ops.build_graph, (x, 3, 4, graph_type, 3, 1, "official"))


def test_compile_fullgraph(backend: str) -> None:
    def step(x: Tensor) -> TokenGraph:
        return gtp_kernels.build_graph(x, (4, 4), num_neighbours=3)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):
        x = embedded(batch, 17)
        assert torch.equal(compiled(x).indices, step(x).indices)


@pytest.mark.no_op_runs
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": torch.zeros(17, 8)}, ValueError, "x must be 3-dimensional"),
        ({"x": torch.zeros(1, 17, 0)}, ValueError, "at least one channel"),
        ({"x": [1.0]}, TypeError, "x must be a tensor"),
        ({"grid_size": (4, 5)}, ValueError, "grid_size must cover the 16 image tokens"),
        ({"grid_size": 4}, TypeError, "grid_size must be a pair"),
        ({"grid_size": (-4, -4)}, ValueError, "grid_size\\[0\\] must be at least 1"),
        ({"graph_type": "None"}, ValueError, "graph_type must be one of Spatial, Semantic, Mixed"),
        ({"num_neighbours": 16}, ValueError, "num_neighbours must be in \\[0, 16\\)"),
        ({"num_neighbours": -1}, ValueError, "num_neighbours must be at least 0"),
        ({"num_prefix": 18}, ValueError, "num_prefix must be at most"),
        ({"semantics": "p"}, ValueError, "semantics must be one of"),
    ],
)
def test_bad_input(backend: str, arguments: dict[str, object], error: type[Exception], message: str) -> None:
    defaults: dict[str, object] = {"x": torch.zeros(1, 17, 8), "grid_size": (4, 4)}
    for module in (gtp_kernels, reference):
        with pytest.raises(error, match=message):
            module.build_graph(**(defaults | arguments))


def test_from_dense_bad_input() -> None:
    with pytest.raises(ValueError, match="dense must have shape"):
        TokenGraph.from_dense(torch.zeros(1, 3, 4))
    with pytest.raises(TypeError, match="dense must be float32"):
        TokenGraph.from_dense(torch.zeros(1, 3, 3, dtype=torch.bool))


def test_spatial_does_not_look_at_the_number_of_neighbours(backend: str) -> None:
    graph = gtp_kernels.build_graph(embedded(1, 5), (2, 2), "Spatial")
    assert graph.indices.shape == (1, 12)


def test_from_dense_carries_no_gradient() -> None:
    assert not TokenGraph.from_dense(torch.ones(1, 2, 2, requires_grad=True)).values.requires_grad
