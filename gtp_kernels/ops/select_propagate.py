"""select_residual_propagate_norm: the operator, for blocks; its fake kernel. It has no public function and no autograd.

Importance, selection and the step between attention and MLP in one call, on ``cuda`` in one launch: by definition what
token_importance, select_tokens and residual_propagate_norm give one after the other, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gtp_kernels import backends
from gtp_kernels.graph import TokenGraph
from gtp_kernels.ops import _library, propagate
from gtp_kernels.ops.select import unchecked_importance, unchecked_select
from gtp_kernels.reference import AttentionScores, select_tokens, token_importance
from gtp_kernels.reference.propagate import check_graph_values


def unchecked_select_residual(
    x: Tensor,
    branch: Tensor,
    scores: AttentionScores,
    graph: TokenGraph | None,
    selection: str,
    num_prop: int,
    order: str,
    semantics: str,
    layer_scale: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    norm: str,
    standard: str,
    alpha: float,
    token_scales: Tensor | None,
    prefix: int,
) -> tuple[Tensor, Tensor | None, TokenGraph | None, Tensor | None, Tensor, Tensor]:
    """Lets the P least important image tokens leave: the three ops in one, for a caller whose arguments are right.

    Args:
        x, branch: [B, N, C].
        scores: each [B, H, N], float32 or float64.
        selection: the standard of :func:`gtp_kernels.token_importance`; ``semantics`` too is of that function.
        num_prop, order: as in :func:`gtp_kernels.select_tokens`.
        graph, layer_scale, norm_weight, norm_bias, eps, norm, standard, alpha, token_scales, prefix: as in
            :func:`gtp_kernels.residual_propagate_norm`.

    Returns:
        What residual_propagate_norm returns, then index_kept [B, K] and index_prop [B, P].

    Where a gradient is needed, or the backend has not both kernels, the three ops run.
    """
    differentiable = (x, branch, layer_scale, norm_weight, norm_bias)
    if not (torch.is_grad_enabled() and backends.any_requires_grad(*differentiable)):
        backend = backends.choose("select", scores.diag)
        if backend != "reference":
            dtype = torch.promote_types(x.dtype, branch.dtype)
            if backends.choose("propagate", *differentiable, dtype=dtype) == backend:
                return _fused(
                    backend, x, branch, scores, graph, selection, num_prop, order, semantics, layer_scale, norm_weight,
                    norm_bias, eps, norm, standard, alpha, token_scales, prefix,
                )  # fmt: skip
    importance = unchecked_importance(scores, selection, prefix, semantics)
    index_kept, index_prop = unchecked_select(importance, num_prop, prefix, order)
    step = propagate.unchecked_residual(
        x, branch, graph, index_kept, index_prop, layer_scale, norm_weight, norm_bias, eps, norm, standard, alpha,
        token_scales, prefix,
    )  # fmt: skip
    return *step, index_kept, index_prop


def _fused(
    backend: str,
    x: Tensor,
    branch: Tensor,
    scores: AttentionScores,
    graph: TokenGraph | None,
    selection: str,
    num_prop: int,
    order: str,
    semantics: str,
    layer_scale: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    norm: str,
    standard: str,
    alpha: float,
    token_scales: Tensor | None,
    prefix: int,
) -> tuple[Tensor, Tensor | None, TokenGraph | None, Tensor | None, Tensor, Tensor]:
    _library.refuse_forward_mode(x, branch, layer_scale, norm_weight, norm_bias)
    if backend != "cpu":
        check_graph_values(graph)
    try:
        out, normed, token, scales_out, index_kept, index_prop = _library.operators(
            backend
        ).select_residual_propagate_norm(
            x, branch, layer_scale, *propagate.graph_parts(graph, standard), *scores, selection, num_prop, order,
            semantics, propagate.wide_scales(token_scales), norm_weight, norm_bias, eps, norm, standard, alpha, prefix,
        )  # fmt: skip
    except RuntimeError:
        check_graph_values(graph)
        raise
    if standard == "GraphProp" and graph is not None:
        graph = graph.with_token(token)
    scales_out = None if token_scales is None else scales_out.to(token_scales.dtype)
    return out, None if norm == "none" else normed, graph, scales_out, index_kept, index_prop


@_library.fake("select_residual_propagate_norm")
def _fake(
    x: Tensor,
    branch: Tensor,
    layer_scale: Tensor | None,
    indptr: Tensor | None,
    indices: Tensor | None,
    values: Tensor | None,
    token: Tensor | None,
    diag: Tensor,
    colsum: Tensor,
    cls_row: Tensor,
    selection: str,
    num_prop: int,
    order: str,
    semantics: str,
    *step: Any,
) -> tuple[Tensor, ...]:
    num_prefix = step[-1]  # of what residual_propagate_norm takes from token_scales on
    batch, num_tokens, _ = x.shape
    index_kept = x.new_empty(batch, num_tokens - num_prefix - num_prop, dtype=torch.int64)
    index_prop = x.new_empty(batch, num_prop, dtype=torch.int64)
    given = (x, branch, layer_scale, indptr, indices, values, token, index_kept, index_prop)
    return *propagate.residual_fake(*given, *step), index_kept, index_prop


def _kernel(
    x: Tensor,
    branch: Tensor,
    layer_scale: Tensor | None,
    indptr: Tensor | None,
    indices: Tensor | None,
    values: Tensor | None,
    token: Tensor | None,
    diag: Tensor,
    colsum: Tensor,
    cls_row: Tensor,
    selection: str,
    num_prop: int,
    order: str,
    semantics: str,
    *step: Any,
) -> tuple[Tensor, ...]:
    num_prefix = step[-1]
    importance = token_importance(AttentionScores(diag, colsum, cls_row), selection, num_prefix, semantics)
    index_kept, index_prop = select_tokens(importance, num_prop, num_prefix=num_prefix, order=order)
    given = (x, branch, layer_scale, indptr, indices, values, token, index_kept, index_prop)
    return *propagate.residual_kernel(*given, *step), index_kept, index_prop


_library.implement("select_residual_propagate_norm", _kernel)
