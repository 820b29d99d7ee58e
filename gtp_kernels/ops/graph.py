"""build_graph: public function, operator, fake kernel. Not differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from gtp_kernels import backends, checks, reference
from gtp_kernels.graph import TokenGraph
from gtp_kernels.ops import _library
from gtp_kernels.reference import graph as definition


def build_graph(
    x: Tensor,
    grid_size: tuple[int, int],
    graph_type: str = "Mixed",
    num_neighbours: int = 8,
    num_prefix: int = 1,
    semantics: str = "official",
) -> TokenGraph:
    """The normalised graph of the image tokens, built once per forward (Section 3.2.2).

    Spatial: the 8 neighbours on the grid (Equation 5). Semantic: per row the M largest cosine similarities, self
    excluded, lower index first on ties (Equations 6, 7). Mixed: the union (Equation 8). The graph is directed; weights
    are A_ij / sqrt(deg_i · deg_j) with row degrees (Equation 9), 0 for an edge from or to a row without edges.

    Args:
        x: [B, N, C], any floating dtype: the embedded tokens after position embedding and pre-norm, prefix first.
        grid_size: (height, width) of the image tokens, height · width = N - R.
        graph_type: ``Spatial``, ``Semantic`` or ``Mixed``.
        num_neighbours: M, 0 ≤ M < n (unused by ``Spatial``).
        num_prefix: R.
        semantics: ``official`` takes M + 1 neighbours where R = 0, as the authors' code does; ``paper`` M.

    Returns:
        TokenGraph over the n image tokens; its capacity E depends on the grid, the type and M only.

    Raises:
        TypeError, ValueError: an argument, named, with what may come.
    """
    height, width, num_neighbours, num_prefix = checks.embedded_tokens(
        x, grid_size, graph_type, num_neighbours, num_prefix, semantics
    )
    backend = backends.choose("graph", x)
    if backend == "reference":
        return reference.build_graph(x, (height, width), graph_type, num_neighbours, num_prefix, semantics)
    indptr, indices, values = _library.operators(backend).build_graph(
        x.detach(), height, width, graph_type, num_neighbours, num_prefix, semantics
    )
    token = torch.arange(height * width, dtype=torch.int32, device=x.device).repeat(x.shape[0], 1)
    return TokenGraph(indptr, indices, values, token)


@_library.fake("build_graph")
def _fake(
    x: Tensor, height: int, width: int, graph_type: str, num_neighbours: int, num_prefix: int, semantics: str
) -> tuple[Tensor, Tensor, Tensor]:
    batch, n = x.shape[0], height * width
    neighbours = definition.num_semantic_neighbours(n, num_neighbours, num_prefix, semantics)
    edges = definition.edge_capacity(height, width, graph_type, neighbours)
    indptr = x.new_empty(batch, n + 1, dtype=torch.int32)
    return indptr, x.new_empty(batch, edges, dtype=torch.int32), x.new_empty(batch, edges, dtype=torch.float32)


def _reference_kernel(
    x: Tensor, height: int, width: int, graph_type: str, num_neighbours: int, num_prefix: int, semantics: str
) -> tuple[Tensor, Tensor, Tensor]:
    graph = reference.build_graph(x, (height, width), graph_type, num_neighbours, num_prefix, semantics)
    return graph.indptr, graph.indices, graph.values


_library.implement("build_graph", _reference_kernel)
