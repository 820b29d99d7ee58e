"""Live edges: the definition, in plain PyTorch. Ours, not the paper's.

The edges of the token graph stay, their weights follow the keys of the block: a token that leaves is merged into the
neighbour that it resembles most. A map ``rep`` from every original token to the row that carries it contracts the
graph, so that a row has the edges of all that it absorbed and the CSR never changes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gtp_kernels import checks
from gtp_kernels.graph import LiveGraph, LiveSelection, TokenGraph
from gtp_kernels.reference.attention import compute_dtype
from gtp_kernels.reference.propagate import apply_norm, check_residual, over_edges, take_rows

LEAST_IMPORTANCE = 1e-6  # of the mean
STAYS, DROPPED = -2, -1


def live_graph(graph: TokenGraph) -> LiveGraph:
    """The definition of :func:`gtp_kernels.live_graph`."""
    n, capacity = graph.num_tokens, graph.indices.shape[1]
    rows, columns = graph.edge_rows(), graph.indices.long()
    both_rows, both_columns = torch.cat((rows, columns), 1), torch.cat((columns, rows), 1)
    # Sorted by row, then column; an edge that is there in both directions is counted once, what is no edge goes last.
    none = n * n
    cell = torch.where(torch.cat((rows, rows), 1) < n, both_rows * n + both_columns, none).sort(1).values
    again = torch.zeros_like(cell, dtype=torch.bool)
    again[:, 1:] = cell[:, 1:] == cell[:, :-1]
    cell = cell.masked_fill(again, none).sort(1).values
    filled = cell < none
    first_cell = torch.arange(n + 1, device=cell.device) * n
    indptr = torch.searchsorted(cell, first_cell.expand(cell.shape[0], -1).contiguous()).int()
    assert cell.shape[1] == 2 * capacity
    return LiveGraph(indptr, (cell % max(n, 1) * filled).int(), graph.token)


def live_scores(k: Tensor, importance: Tensor, live: LiveGraph, gamma: float, prefix: int) -> tuple[Tensor, Tensor]:
    """(1 − best edge) · (importance / mean)^γ of each image row [B, n], low for those that leave first; +inf for a row
    without edges, and where it would be NaN. And its unit keys [B, n, d], the mean over heads."""
    unit = unit_keys(k, prefix)
    relative = importance / importance.mean(1, keepdim=True)
    relative = torch.where(relative > LEAST_IMPORTANCE, relative, LEAST_IMPORTANCE).to(unit.dtype)
    best = torch.where(live.adjacency(unit.shape[1]), cosines(unit), -torch.inf).amax(2)
    scores = torch.where(best == -torch.inf, torch.inf, (1 - best) * relative**gamma)
    return torch.where(scores.isnan(), torch.inf, scores), unit


def unit_keys(k: Tensor, prefix: int) -> Tensor:
    """Keys [B, H, N, d] to the image rows' [B, n, d], the mean over heads at unit length; a zero row stays zero."""
    mean = k[:, :, prefix:].detach().to(compute_dtype(k.dtype)).mean(1)
    norm = mean.norm(dim=-1, keepdim=True)
    return mean / torch.where(norm == 0, 1.0, norm)


def cosines(unit: Tensor) -> Tensor:
    """[B, n, n], symmetric to the bit, as two rows that prefer each other tie; what is NaN counts as −1."""
    lower = (unit @ unit.transpose(1, 2)).nan_to_num(nan=-1.0, posinf=-1.0, neginf=-1.0).tril()
    return lower + lower.tril(-1).transpose(1, 2)


def live_select(
    k: Tensor,
    importance: Tensor,
    live: LiveGraph,
    num_prop: int,
    sizes: Tensor,
    *,
    gamma: float = 0.25,
    num_prefix: int = 1,
) -> LiveSelection:
    """The definition of :func:`gtp_kernels.live_select`."""
    gamma = check_live_select(k, importance, live, num_prop, sizes, gamma, num_prefix)
    scores, unit = live_scores(k, importance, live, gamma, num_prefix)
    batch, n = scores.shape
    near = torch.where(live.adjacency(n), cosines(unit), -torch.inf)
    into = torch.tensor([walk(s.tolist(), w.tolist(), num_prop) for s, w in zip(scores, near, strict=True)])
    into = into.reshape(batch, n).to(k.device)
    stays = into == STAYS
    rows = torch.sort((~stays).to(torch.uint8), dim=1, stable=True)[1]
    kept, prop = rows[:, : n - num_prop], rows[:, n - num_prop :]
    # Where every row ends up: in its own place, in that of its target, or nowhere.
    own = torch.where(stays, stays.cumsum(1) - 1, -1)
    place = torch.where(stays, own, torch.where(into < 0, -1, own.gather(1, into.clamp(min=0))))
    image_sizes = sizes[:, num_prefix:].double()
    total = image_sizes.new_zeros(batch, n - num_prop + 1).scatter_add_(1, place % (n - num_prop + 1), image_sizes)
    share = torch.where(place < 0, 0.0, image_sizes / total.gather(1, place.clamp(min=0)))
    rep = torch.where(live.rep < 0, -1, place.gather(1, live.rep.clamp(min=0).long()).int())
    return LiveSelection(
        kept + num_prefix,
        prop + num_prefix,
        place.gather(1, prop),
        share.float(),
        torch.cat((sizes[:, :num_prefix], total[:, :-1].float()), 1),
        LiveGraph(live.indptr, live.indices, rep),
    )


def walk(scores: list[float], near: list[list[float]], num_prop: int) -> list[int]:
    """For each row of one image the row that it goes to; STAYS, or DROPPED.

    In rising order of score, of equal ones the higher index first, a row leaves if no other has gone to it and a
    neighbour is there that has not left; the most similar one of those, of equal ones the lower index, stays for good.
    At most n − P rows can stay: once as many are targets, a row may only join one of them. What is missing then, the
    lowest-scoring rows that are no target are dropped.

    Args:
        scores: [n].
        near: [n][n], the cosine of two neighbours, −inf where there is no edge.
        num_prop: P < n.
    """
    n = len(scores)
    order = sorted(range(n), key=lambda row: (scores[row], -row))
    into = [STAYS] * n
    targets: set[int] = set()
    left = 0
    for row in order:
        if left == num_prop:
            return into
        if row in targets:
            continue
        full = len(targets) == n - num_prop
        takers = [j for j in range(n) if near[row][j] > -torch.inf and into[j] == STAYS and (j in targets or not full)]
        if takers:
            into[row] = max(takers, key=lambda j: (near[row][j], -j))
            targets.add(into[row])
            left += 1
    for row in order:
        if left == num_prop:
            break
        if row not in targets and into[row] == STAYS:
            into[row] = DROPPED
            left += 1
    return into


def live_merge(
    x: Tensor,
    branch: Tensor,
    selection: LiveSelection,
    *,
    layer_scale: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-6,
    norm: str = "layer",
    num_prefix: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """The definition of :func:`gtp_kernels.live_merge`."""
    index_kept, index_prop, target, share, _, _ = selection
    out_dtype = torch.promote_types(x.dtype, branch.dtype)
    dtype = compute_dtype(out_dtype)
    wide = branch.to(dtype) if layer_scale is None else branch.to(dtype) * layer_scale.to(dtype)
    wide = x.to(dtype) + wide
    kept, prop = take_rows(wide, index_kept), take_rows(wide, index_prop)
    own, part = (share.gather(1, index - num_prefix).to(dtype) for index in (index_kept, index_prop))
    joins = target.unsqueeze(1) == torch.arange(index_kept.shape[1], device=x.device)[:, None]  # [B, K, P]
    merged = over_edges(torch.where(joins, part.unsqueeze(1), 0.0), prop) + own.unsqueeze(2) * kept
    kept = torch.where(joins.any(2, keepdim=True), merged, kept)
    out = torch.cat((wide[:, :num_prefix], kept), 1).to(out_dtype)
    return out, apply_norm(out, norm, norm_weight, norm_bias, norm_eps)


def merge_transpose(
    grad: Tensor, index_kept: Tensor, index_prop: Tensor, target: Tensor, share: Tensor, num_prefix: int
) -> Tensor:
    """The gradient [B, N, C] of what :func:`live_merge` merges from that of its result [B, R + K, C]."""
    batch, num_prop = index_prop.shape
    columns = grad.shape[2]
    own, part = (share.gather(1, index - num_prefix).to(grad.dtype) for index in (index_kept, index_prop))
    image = grad[:, num_prefix:]
    to_prop = image.gather(1, target.clamp(min=0).unsqueeze(2).expand(-1, -1, columns)) * part.unsqueeze(2)
    result = grad.new_zeros(batch, grad.shape[1] + num_prop, columns)
    result = result.scatter(1, index_kept.unsqueeze(2).expand(-1, -1, columns), image * own.unsqueeze(2))
    result = result.scatter(1, index_prop.unsqueeze(2).expand(-1, -1, columns), to_prop)
    return torch.cat((grad[:, :num_prefix], result[:, num_prefix:]), 1)


def check_live_merge(
    x: Tensor,
    branch: Tensor,
    selection: LiveSelection,
    layer_scale: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    norm: str,
    num_prefix: int,
) -> tuple[int, float]:
    """Checks the arguments of ``live_merge``; returns (number of prefix tokens, eps)."""
    if not isinstance(selection, LiveSelection):
        raise TypeError(f"selection must be a LiveSelection; got {type(selection).__name__}")
    index_kept, index_prop, target, share = selection[:4]
    _, prefix, eps = check_residual(
        x, branch, None, index_kept, index_prop, layer_scale, norm_weight, norm_bias, norm_eps, norm, "None", 0.0, None,
        num_prefix,
    )  # fmt: skip
    checks.index("selection.target", target, x.shape[0])
    checks.shape_is("selection.target", target, tuple(index_prop.shape), "[B, P]")
    checks.floating("selection.share", share, 2, "[B, n]")
    checks.shape_is("selection.share", share, (x.shape[0], x.shape[1] - prefix), "[B, N - R]")
    checks.same_device(x=x, target=target, share=share)
    checks.index_range("selection.index_kept", index_kept, prefix, x.shape[1])
    checks.index_range("selection.index_prop", index_prop, prefix, x.shape[1])
    return prefix, eps


def check_live_select(
    k: Tensor, importance: Tensor, live: LiveGraph, num_prop: int, sizes: Tensor, gamma: float, num_prefix: int
) -> float:
    """Checks the arguments of ``live_select``; returns gamma."""
    checks.floating("k", k, 4, "[B, H, N, d]")
    checks.floating("importance", importance, 2, "[B, n]")
    prefix = checks.prefix(num_prefix, None, k.shape[2], "k")
    checks.shape_is("importance", importance, (k.shape[0], k.shape[2] - prefix), "[B, N - R]")
    checks.num_prop(num_prop, importance.shape[1])
    checks.floating("sizes", sizes, 2, "[B, N]")
    checks.shape_is("sizes", sizes, (k.shape[0], k.shape[2]), "[B, N]")
    gamma = checks.number("gamma", gamma)
    if gamma < 0:
        raise ValueError(f"gamma must be at least 0; got {gamma}")
    if not isinstance(live, LiveGraph):
        raise TypeError(f"live must be a LiveGraph; got {type(live).__name__}")
    for name, part in (("live.indptr", live.indptr), ("live.indices", live.indices), ("live.rep", live.rep)):
        if part.dtype != torch.int32 or part.ndim != 2 or part.shape[0] != k.shape[0]:
            raise ValueError(f"{name} must be int32 [B, …] with B = {k.shape[0]}; got {part.dtype} {tuple(part.shape)}")
    checks.shape_is("live.indptr", live.indptr, (k.shape[0], live.rep.shape[1] + 1), "[B, n0 + 1]")
    checks.same_device(k=k, importance=importance, sizes=sizes, rep=live.rep)
    return gamma
