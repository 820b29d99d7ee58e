"""live_graph, live_select and live_merge: public functions, operators, fake kernels, autograd of the merge."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gtp_kernels import backends, reference
from gtp_kernels.graph import LiveGraph, LiveSelection, TokenGraph
from gtp_kernels.ops import _library
from gtp_kernels.reference import live as definition
from gtp_kernels.reference.attention import compute_dtype
from gtp_kernels.reference.propagate import norm_backward


def live_graph(graph: TokenGraph) -> LiveGraph:
    """The edges of a token graph for live edges: both directions, every original token carried by its own row.

    Args:
        graph: from :func:`build_graph`; its values are not used.

    Raises:
        TypeError: not a TokenGraph.
    """
    if not isinstance(graph, TokenGraph):
        raise TypeError(f"graph must be a TokenGraph; got {type(graph).__name__}")
    backend = backends.choose("live", graph.indptr)
    if backend == "reference":
        return reference.live_graph(graph)
    indptr, indices = _library.operators(backend).live_graph(graph.indptr, graph.indices)
    return LiveGraph(indptr, indices, graph.token)


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
    """Which P image rows leave, and into which neighbour each is merged: ours, not the paper's.

    An edge of the original graph connects the rows that carry its ends now; its weight is the cosine of their keys,
    mean over heads. Rows with a low (1 − best edge) · (importance / mean)^γ go first, each into its most similar
    neighbour that has not left, which then stays. ``gtp_kernels.reference.live`` is the definition, with what happens
    where edges or targets run out.

    Args:
        k: [B, H, N, d], the keys that entered the attention, prefix rows first.
        importance: [B, n], as from :func:`token_importance`; below 1e-6 of the mean, and NaN, it counts as that.
        live: the graph of the current rows.
        num_prop: P < n.
        sizes: [B, N]; how many tokens each row stands for.
        gamma: γ ≥ 0, the weight of the importance.
        num_prefix: R.

    Returns:
        :class:`LiveSelection`, for :func:`live_merge`. Not differentiable.

    Raises:
        TypeError, ValueError: an argument, named, with what may come.
    """
    gamma = definition.check_live_select(k, importance, live, num_prop, sizes, gamma, num_prefix)
    return unchecked_live_select(k, importance, live, num_prop, sizes, gamma, num_prefix)


def unchecked_live_select(
    k: Tensor, importance: Tensor, live: LiveGraph, num_prop: int, sizes: Tensor, gamma: float, prefix: int
) -> LiveSelection:
    """:func:`live_select` for a caller whose arguments are right by construction."""
    backend = backends.choose("live", k)
    if backend == "reference":
        return reference.live_select(k, importance, live, num_prop, sizes, gamma=gamma, num_prefix=prefix)
    *rest, rep = _library.operators(backend).live_select(
        k.detach(), importance.detach().to(compute_dtype(importance.dtype)), live.indptr, live.indices, live.rep,
        sizes.detach().float(), num_prop, gamma, prefix,
    )  # fmt: skip
    kept, prop, target, share, sizes = rest
    return LiveSelection(kept, prop, target, share, sizes, LiveGraph(live.indptr, live.indices, rep))


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
    """The step between attention and MLP with live edges, in one pass over memory.

        y = x + layer_scale · branch
        x_i = (s_i y_i + Σ_j s_j y_j) / (s_i + Σ_j s_j)  over the j that go to i; y_i where none does
        normed = norm(x)

    Args:
        x, branch: [B, N, C], floating dtypes of their own; the result has their promoted type.
        selection: from :func:`live_select`.
        layer_scale, norm_weight, norm_bias: [C] or None; norm_eps, norm: as in :func:`residual_propagate_norm`.
        num_prefix: R.

    Returns:
        (x [B, N − P, C], prefix rows first, then the kept ones; normed, None where ``norm`` is ``none``).

    Gradients reach x, branch, layer_scale, norm_weight and norm_bias.

    Raises:
        TypeError: not a LiveSelection; a tensor of another dtype.
        ValueError: shapes that do not fit each other, or tensors on several devices; a negative ``norm_eps``; an index
            outside [R, N), where it is looked at (on a CPU, or with GTP_KERNELS_DEBUG=1).
    """
    prefix, eps = definition.check_live_merge(
        x, branch, selection, layer_scale, norm_weight, norm_bias, norm_eps, norm, num_prefix
    )
    return unchecked_live_merge(x, branch, selection, layer_scale, norm_weight, norm_bias, eps, norm, prefix)


def unchecked_live_merge(
    x: Tensor,
    branch: Tensor,
    selection: LiveSelection,
    layer_scale: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    norm: str,
    prefix: int,
) -> tuple[Tensor, Tensor | None]:
    """:func:`live_merge` for a caller whose arguments are right by construction."""
    backend = backends.choose("live", x, branch, layer_scale, norm_weight, norm_bias)
    if backend == "reference":
        return reference.live_merge(
            x, branch, selection, layer_scale=layer_scale, norm_weight=norm_weight, norm_bias=norm_bias, norm_eps=eps,
            norm=norm, num_prefix=prefix,
        )  # fmt: skip
    _library.refuse_forward_mode(x, branch, layer_scale, norm_weight, norm_bias)
    out, normed = _library.operators(backend).live_merge(
        x, branch, layer_scale, *selection[:4], norm_weight, norm_bias, eps, norm, prefix
    )
    return out, None if norm == "none" else normed


@_library.fake("live_graph")
def _graph_fake(indptr: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(indptr), indices.new_empty(indices.shape[0], 2 * indices.shape[1])


@_library.fake("live_select")
def _select_fake(
    k: Tensor,
    importance: Tensor,
    indptr: Tensor,
    indices: Tensor,
    rep: Tensor,
    sizes: Tensor,
    num_prop: int,
    gamma: float,
    num_prefix: int,
) -> tuple[Tensor, ...]:
    batch, n = importance.shape
    return (
        k.new_empty(batch, n - num_prop, dtype=torch.int64),
        k.new_empty(batch, num_prop, dtype=torch.int64),
        k.new_empty(batch, num_prop, dtype=torch.int64),
        k.new_empty(batch, n, dtype=torch.float32),
        k.new_empty(batch, num_prefix + n - num_prop, dtype=torch.float32),
        torch.empty_like(rep),
    )


@_library.fake("live_merge")
def _merge_fake(
    x: Tensor,
    branch: Tensor,
    layer_scale: Tensor | None,
    index_kept: Tensor,
    index_prop: Tensor,
    target: Tensor,
    share: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    norm: str,
    num_prefix: int,
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, branch.dtype)
    out = x.new_empty(x.shape[0], num_prefix + index_kept.shape[1], x.shape[2], dtype=dtype)
    return out, _library.absent(x, dtype) if norm == "none" else torch.empty_like(out)


def _merge_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, branch, layer_scale, *selection, norm_weight, norm_bias, eps, norm, prefix = inputs
    ctx.save_for_backward(branch, layer_scale, *selection, norm_weight, norm_bias, output[0])
    ctx.eps, ctx.norm, ctx.prefix, ctx.x_dtype = eps, norm, prefix, x.dtype


def _merge_backward(ops: Any, ctx: Any, grad_out: Tensor, grad_normed: Tensor) -> tuple[Tensor | None, ...]:
    branch, layer_scale, index_kept, index_prop, target, share, norm_weight, norm_bias, out = ctx.saved_tensors
    dtype = compute_dtype(out.dtype)
    grad = grad_out.to(dtype)
    grad_weight = grad_bias = grad_scale = None
    if ctx.norm != "none":
        step, grad_weight, grad_bias = norm_backward(
            grad_normed.to(dtype), out.to(dtype), norm_weight, norm_bias, ctx.eps, ctx.norm
        )
        grad = grad + step
    grad = definition.merge_transpose(grad, index_kept, index_prop, target, share, ctx.prefix)
    grad_branch = grad
    if layer_scale is not None:
        grad_scale = (grad * branch).sum((0, 1)).to(layer_scale.dtype)
        grad_branch = grad * layer_scale
    return (
        grad.to(ctx.x_dtype), grad_branch.to(branch.dtype), grad_scale, *(None,) * 4, grad_weight, grad_bias,
        *(None,) * 3,
    )  # fmt: skip


def _graph_kernel(indptr: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    token = torch.arange(indptr.shape[1] - 1, dtype=torch.int32, device=indptr.device).repeat(indptr.shape[0], 1)
    live = reference.live_graph(TokenGraph(indptr, indices, indices.float(), token))
    return live.indptr, live.indices


def _select_kernel(
    k: Tensor,
    importance: Tensor,
    indptr: Tensor,
    indices: Tensor,
    rep: Tensor,
    sizes: Tensor,
    num_prop: int,
    gamma: float,
    num_prefix: int,
) -> tuple[Tensor, ...]:
    found = reference.live_select(
        k, importance, LiveGraph(indptr, indices, rep), num_prop, sizes, gamma=gamma, num_prefix=num_prefix
    )
    return (*found[:5], found.live.rep)


def _merge_kernel(
    x: Tensor,
    branch: Tensor,
    layer_scale: Tensor | None,
    index_kept: Tensor,
    index_prop: Tensor,
    target: Tensor,
    share: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    norm: str,
    num_prefix: int,
) -> tuple[Tensor, Tensor]:
    empty = LiveGraph(index_kept, index_kept, index_kept)  # the merge does not look at it
    selection = LiveSelection(index_kept, index_prop, target, share, share, empty)
    out, normed = reference.live_merge(
        x, branch, selection, layer_scale=layer_scale, norm_weight=norm_weight, norm_bias=norm_bias, norm_eps=norm_eps,
        norm=norm, num_prefix=num_prefix,
    )  # fmt: skip
    return out, _library.absent(x, out.dtype) if normed is None else normed


_library.implement("live_graph", _graph_kernel)
_library.implement("live_select", _select_kernel)
_library.implement("live_merge", _merge_kernel)
_library.autograd("live_merge", _merge_backward, _merge_setup)
