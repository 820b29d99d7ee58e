"""The full grid of tokens again, from those that remain after GTP: what dense heads and patch mergers need.

Block by block, the last one first, the rows that left a block are filled from what the same block handed them to:

    GraphProp   the weighted mean Σ_i Â_ij x_i / Σ_i Â_ij of the kept neighbours i that row j went to (Equation 10);
                α cancels, because every row of it is divided by the same
    Mean        the row that carries their mean
    LiveGraph   the row that it was merged into
    None        the kept row that is nearest on the grid (of equal distances the lower index); also a row of GraphProp
                none of whose neighbours stayed, and one of LiveGraph that was dropped

A row that stayed is given back as it is. All of it is linear in x and carries gradients to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gtp_vit.tracing import Recorder, Trace


def restore_grid(tokens: Tensor, trace: Trace, after: int | None = None) -> Tensor:
    """The dense map of a traced forward: [B, h, w, C] from the rows that remained, prefix rows dropped.

    Args:
        tokens: [B, rows, C], floating: what ``forward_features`` of the traced forward gave, or its image rows alone.
        trace: from :func:`gtp_vit.trace`.
        after: the block that ``tokens`` come from; the last one by default.

    Raises:
        RuntimeError: no forward was recorded.
        TypeError: ``tokens`` is not a floating-point tensor.
        ValueError: ``after`` is not a block that was recorded; ``tokens`` are not the rows that it left.
    """
    recorder = trace._recorded()
    if not isinstance(tokens, Tensor) or not tokens.is_floating_point():
        what = f"a tensor of {tokens.dtype}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"tokens must be a floating-point tensor [B, rows, C]; got {what}")
    blocks = len(recorder.token_scales)
    if after is not None and not 0 <= after < blocks:
        raise ValueError(f"after must be a recorded block, 0 to {blocks - 1}; got {after}")
    prefix = recorder.num_prefix
    rows = recorder.num_rows(after)
    if tokens.ndim != 3 or tokens.shape[0] != recorder.batch or tokens.shape[1] not in (rows, prefix + rows):
        raise ValueError(
            f"tokens must be [{recorder.batch}, {rows}, C], or [{recorder.batch}, {prefix + rows}, C] with prefix "
            f"rows: what block {blocks - 1 if after is None else after} left; got {tuple(tokens.shape)}"
        )
    return _restore(tokens[:, -rows:], recorder, after).unflatten(1, recorder.grid_size)


def restore_tokens(x: Tensor, recorder: Recorder, after: int | None = None) -> Tensor:
    """The sequence at its full length: [B, R + n, C] from x [B, R + rows, C], what block ``after`` left."""
    prefix = recorder.num_prefix
    return torch.cat((x[:, :prefix], _restore(x[:, prefix:], recorder, after)), 1)


def _restore(x: Tensor, recorder: Recorder, after: int | None) -> Tensor:
    """Image rows [B, rows, C] to [B, n, C]."""
    standard = recorder.config.propagation
    dense = recorder.graph.to_dense() if standard == "GraphProp" and recorder.graph is not None else None
    steps = [step for step in recorder.steps() if after is None or step.block <= after]
    for step in reversed(steps):
        kept, prop = step.kept, step.prop
        stayed = x[:, : kept.shape[1]]
        if standard == "Mean":
            filled = x[:, -1:].expand(-1, prop.shape[1], -1)
        else:
            filled = _nearest(stayed, step.kept_tokens, step.prop_tokens, recorder.grid_size[1])
            if step.target is not None:
                into = step.target.unsqueeze(-1).expand(-1, -1, x.shape[-1])
                filled = torch.where(into < 0, filled, stayed.gather(1, into.clamp(min=0)))
            if dense is not None:
                filled = _through(stayed, dense, step.kept_tokens, step.prop_tokens, filled)
        rows = torch.cat((kept, prop), 1).unsqueeze(-1).expand(-1, -1, x.shape[-1])
        together = torch.cat((stayed, filled), 1)
        x = torch.empty_like(together).scatter(1, rows, together)
    return x


def _through(x: Tensor, dense: Tensor, kept: Tensor, prop: Tensor, otherwise: Tensor) -> Tensor:
    """The mean [B, P, C] of x [B, K, C] by the weights with which each of P tokens entered the K ones."""
    batch = torch.arange(len(dense), device=dense.device)[:, None, None]
    dtype = torch.promote_types(x.dtype, torch.float32)
    weights = dense[batch, kept.unsqueeze(1), prop.unsqueeze(2)].to(dtype)  # [B, P, K]
    total = weights.sum(-1, keepdim=True)
    mean = (weights / torch.where(total > 0, total, 1.0)) @ x.to(dtype)
    return torch.where(total > 0, mean.to(x.dtype), otherwise)


def _nearest(x: Tensor, kept: Tensor, prop: Tensor, width: int) -> Tensor:
    """For each of P tokens the row [B, P, C] of the kept one that is nearest on a grid of ``width`` columns."""
    down = prop.unsqueeze(2) // width - kept.unsqueeze(1) // width
    right = prop.unsqueeze(2) % width - kept.unsqueeze(1) % width
    # Distance first, then place: argmin promises nothing among equals.
    place = torch.arange(kept.shape[1], device=kept.device)
    nearest = ((down * down + right * right) * kept.shape[1] + place).argmin(-1)
    return x.gather(1, nearest.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
