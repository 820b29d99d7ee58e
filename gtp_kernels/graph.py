"""TokenGraph: the sparse graph of the image tokens, built once and never changed.

The CSR stays over the n original image tokens for the whole network. What a layer changes is only the view of it:
``token`` says which original token stands behind each current row. An edge counts in a layer when its source
leaves there and its target stays. LiveGraph is the same for edges whose weights follow the keys of the block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True, eq=False)
class TokenGraph:
    """One CSR per image over the original image tokens, and the view of the current rows.

    Made by :func:`gtp_kernels.build_graph` or :meth:`from_dense`; the constructor takes its parts as they are, and the
    ops check them when they use them.

    Attributes:
        indptr: int32 [B, n+1]; row i of image b owns the edges ``indptr[b, i]:indptr[b, i+1]``. A row may be empty.
        indices: int32 [B, E]; the column (original token) of each edge, once and ascending in a row. E is fixed by the
            graph type and the grid, so that shapes are static; what lies beyond ``indptr[:, n]`` is padding (zero).
        values: float32 [B, E]; the normalised weights Â (paper, Equation 9).
        token: int32 [B, m]; the original token behind each current image row (prefix tokens are not counted).
    """

    indptr: Tensor
    indices: Tensor
    values: Tensor
    token: Tensor

    @property
    def num_tokens(self) -> int:
        """n, the number of original image tokens."""
        return self.indptr.shape[1] - 1

    def with_token(self, token: Tensor) -> TokenGraph:
        """The same graph seen through other rows: ``token`` int32 [B, m]."""
        return TokenGraph(self.indptr, self.indices, self.values, token)

    def edge_rows(self) -> Tensor:
        """int64 [B, E]: the row of each edge; n for padding."""
        batch, num_edges = self.indices.shape
        slots = torch.arange(num_edges, dtype=torch.int32, device=self.indptr.device).expand(batch, -1).contiguous()
        return torch.searchsorted(self.indptr[:, 1:].contiguous(), slots, right=True)

    def to_dense(self) -> Tensor:
        """float32 [B, m, m]: the weights among the current rows, zero where there is no edge.

        Trusts the contents of the CSR; RuntimeError where they index outside of it.
        """
        n, batch = self.num_tokens, self.indptr.shape[0]
        cells = self.edge_rows() * n + self.indices.long()
        dense = self.values.new_zeros(batch, (n + 1) * n + 1)
        dense.scatter_(1, cells.clamp_(max=(n + 1) * n), self.values)
        dense = dense[:, : n * n].reshape(batch, n, n)
        token = self.token.long()
        rows = dense.gather(1, token.unsqueeze(2).expand(-1, -1, n))
        return rows.gather(2, token.unsqueeze(1).expand(-1, token.shape[1], -1))

    @classmethod
    def from_dense(cls, dense: Tensor) -> TokenGraph:
        """The graph of the non-zero entries of ``dense`` [B, n, n], any floating dtype, rounded to float32.

        E is the most of any image; finding it waits for the device. The graph carries no gradient.

        Raises:
            TypeError, ValueError: ``dense`` is not a floating-point tensor [B, n, n].
        """
        from gtp_kernels import checks

        checks.floating("dense", dense, 3, "[B, n, n]")
        checks.shape_is("dense", dense, (dense.shape[0], dense.shape[1], dense.shape[1]), "[B, n, n]")
        dense = dense.detach()
        edges = (dense != 0).flatten(1)
        most = int(edges.sum(1).max()) if dense.numel() else 0
        return cls._from_edges(edges, dense, most)

    @classmethod
    def _from_edges(cls, edges: Tensor, dense: Tensor, capacity: int) -> TokenGraph:
        batch, n = dense.shape[:2]
        # Edge cells first, in ascending order: a stable sort of "is not an edge".
        cells = torch.sort((~edges).to(torch.uint8), dim=1, stable=True).indices[:, :capacity]
        indptr = torch.zeros(batch, n + 1, dtype=torch.int32, device=dense.device)
        indptr[:, 1:] = edges.reshape(batch, n, n).sum(2).cumsum(1)
        filled = torch.arange(capacity, device=dense.device) < indptr[:, n:]
        values = dense.flatten(1).gather(1, cells).float()
        indices = (cells % n if n else cells).to(torch.int32)
        token = torch.arange(n, dtype=torch.int32, device=dense.device).repeat(batch, 1)
        return cls(indptr, indices * filled, torch.where(filled, values, 0.0), token)


@dataclass(frozen=True, eq=False)
class LiveGraph:
    """The edges of a token graph in both directions, and which current row carries each original token.

    Made by :func:`gtp_kernels.live_graph`. The edges of a row are those of all the tokens that it carries.

    Attributes:
        indptr: int32 [B, n+1]; indices: int32 [B, E]: one CSR per image over the n original image tokens, symmetric,
            rows ascending; what lies beyond ``indptr[:, n]`` is padding (zero).
        rep: int32 [B, n]; the current image row (prefix rows not counted) that carries each original token, −1 where
            it was dropped.
    """

    indptr: Tensor
    indices: Tensor
    rep: Tensor

    def adjacency(self, num_rows: int) -> Tensor:
        """bool [B, m, m]: which of the ``num_rows`` current rows have an edge between what they carry."""
        batch, num_edges = self.indices.shape
        slots = torch.arange(num_edges, dtype=torch.int32, device=self.indptr.device).expand(batch, -1).contiguous()
        start = torch.searchsorted(self.indptr[:, 1:].contiguous(), slots, right=True)
        filled = slots < self.indptr[:, -1:]
        last = max(self.rep.shape[1] - 1, 0)
        rows = self.rep.gather(1, start.clamp(max=last)).long() if num_edges else start
        columns = self.rep.gather(1, self.indices.long()).long()
        edge = filled & (rows >= 0) & (columns >= 0) & (rows != columns)
        cells = torch.where(edge, rows * num_rows + columns, num_rows * num_rows)
        found = torch.zeros(batch, num_rows * num_rows + 1, dtype=torch.bool, device=self.indptr.device)
        return found.scatter_(1, cells, True)[:, :-1].reshape(batch, num_rows, num_rows)


class LiveSelection(NamedTuple):
    """What :func:`gtp_kernels.live_select` decided for B images.

    Attributes:
        index_kept: int64 [B, n − P]; index_prop: int64 [B, P]: rows that stay and leave, prefix counted, ascending.
        target: int64 [B, P]; where each that leaves goes, a place in ``index_kept``, −1 for a row that is dropped.
        share: float32 [B, n]; the part that a row has in the one that it ends up in: its size over that of all of them.
        sizes: float32 [B, N − P]; how many tokens each remaining row stands for, prefix rows first.
        live: the graph as the remaining rows carry it.
    """

    index_kept: Tensor
    index_prop: Tensor
    target: Tensor
    share: Tensor
    sizes: Tensor
    live: LiveGraph


pytree.register_dataclass(TokenGraph)
pytree.register_dataclass(LiveGraph)
