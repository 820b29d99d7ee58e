"""The graph of the image tokens: the definition, in plain PyTorch (Section 3.2.2).

spatial: the 8 neighbours on the grid (Equation 5); semantic: the M largest cosine similarities of a row
(Equations 6, 7); mixed: their union (Equation 8); weights Â_ij = A_ij / sqrt(deg_i · deg_j) (Equation 9)
"""

from __future__ import annotations

import torch
from torch import Tensor

from gtp_kernels import checks
from gtp_kernels.graph import TokenGraph
from gtp_kernels.reference.attention import compute_dtype


def num_spatial_edges(height: int, width: int) -> int:
    """Directed edges among the 8-neighbours of a height × width grid."""
    return 2 * (height * (width - 1) + width * (height - 1) + 2 * (height - 1) * (width - 1))


def num_semantic_neighbours(num_tokens: int, num_neighbours: int, num_prefix: int, semantics: str) -> int:
    """M, or M + 1 in ``official`` semantics without prefix tokens; at most n − 1."""
    extra = int(semantics == "official" and num_prefix == 0)
    return max(min(num_neighbours + extra, num_tokens - 1), 0)


def edge_capacity(height: int, width: int, graph_type: str, neighbours: int) -> int:
    """E: the most edges that a graph of this type can have, ``neighbours`` per row of its semantic part."""
    n = height * width
    if graph_type == "Spatial":
        return num_spatial_edges(height, width)
    if graph_type == "Semantic":
        return n * neighbours
    return min(num_spatial_edges(height, width) + n * neighbours, n * (n - 1))


def build_graph(
    x: Tensor,
    grid_size: tuple[int, int],
    graph_type: str = "Mixed",
    num_neighbours: int = 8,
    num_prefix: int = 1,
    semantics: str = "official",
) -> TokenGraph:
    """The definition of :func:`gtp_kernels.build_graph`; it writes the n × n similarities."""
    height, width, num_neighbours, num_prefix = checks.embedded_tokens(
        x, grid_size, graph_type, num_neighbours, num_prefix, semantics
    )
    n, batch = height * width, x.shape[0]
    neighbours = num_semantic_neighbours(n, num_neighbours, num_prefix, semantics)
    adjacency = torch.zeros(batch, n, n, dtype=torch.bool, device=x.device)
    if graph_type != "Semantic":
        adjacency |= spatial_adjacency(height, width, x.device)
    if graph_type != "Spatial":
        adjacency |= semantic_adjacency(x[:, num_prefix:], neighbours)
    degree = adjacency.sum(2).double()
    # In float64, rounded once: torch's float32 root is not correctly rounded, and every backend is to give equal bits.
    product = degree.unsqueeze(2) * degree.unsqueeze(1)
    weights = torch.where(adjacency & (product > 0), 1.0 / product.sqrt(), 0.0).float()
    return TokenGraph._from_edges(adjacency.flatten(1), weights, edge_capacity(height, width, graph_type, neighbours))


def spatial_adjacency(height: int, width: int, device: torch.device) -> Tensor:
    """bool [n, n]: adjacent on the grid, diagonals included, a token and itself not."""
    index = torch.arange(height * width, device=device)
    row, col = index // width, index % width
    near = ((row[:, None] - row).abs() <= 1) & ((col[:, None] - col).abs() <= 1)
    return near.fill_diagonal_(False)


def semantic_adjacency(x: Tensor, neighbours: int) -> Tensor:
    """bool [B, n, n]: for each row of x [B, n, C] its ``neighbours`` most similar others, lower index first on ties."""
    dtype = compute_dtype(x.dtype)
    unit = torch.nn.functional.normalize(x.to(dtype), dim=-1, eps=1e-12)
    similarity = unit @ unit.transpose(-1, -2)
    similarity = similarity.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    # Below every similarity, NaN included: a token is never its own neighbour.
    order = similarity.diagonal_scatter(torch.full_like(similarity[:, 0], -torch.inf), dim1=1, dim2=2)
    rank = torch.sort(order, dim=-1, descending=True, stable=True)[1]
    # A row whose own entry ties with NaN at -inf would still meet itself: move it last.
    own = rank == torch.arange(x.shape[1], device=x.device)[:, None]
    rank = rank.gather(-1, torch.sort(own.to(torch.uint8), dim=-1, stable=True)[1])[..., :neighbours]
    return torch.zeros_like(similarity, dtype=torch.bool).scatter_(-1, rank, True)
