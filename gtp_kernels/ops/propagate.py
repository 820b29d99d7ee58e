"""propagate and residual_propagate_norm: public functions, operators, fake kernels, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gtp_kernels import backends, reference
from gtp_kernels.graph import TokenGraph
from gtp_kernels.ops import _library
from gtp_kernels.reference.attention import compute_dtype
from gtp_kernels.reference.propagate import (
    check_index_values,
    check_propagate,
    check_residual,
    dense_transpose,
    graph_of,
    norm_backward,
    propagate_backward,
)


def propagate(
    x: Tensor,
    weight: Tensor | TokenGraph | None,
    index_kept: Tensor,
    index_prop: Tensor,
    standard: str = "GraphProp",
    alpha: float = 0.1,
    token_scales: Tensor | None = None,
    cls_token: bool = True,
    *,
    num_prefix: int | None = None,
) -> tuple[Tensor, Tensor | TokenGraph | None, Tensor | None]:
    """Hands the features of the tokens that leave to their kept neighbours; a drop-in for the authors' function.

        x_i += α Σ_j Â_ij x_j  over the propagated j       (Equation 10)
        s_i += α Σ_j Â_ij s_j                              (Equation 12)

    Args:
        x: [B, N, C], any floating dtype, prefix tokens first.
        weight: Â of the current image tokens, dense [B, n, n] or a TokenGraph; only ``GraphProp`` reads it.
        index_kept, index_prop: int64 [B, n - P] and [B, P], indices into x (prefix counted). Each image token is in one
            of them, once: their range is checked, that they divide the tokens is not.
        standard: ``GraphProp``; ``None`` drops; ``Mean`` appends the mean of the propagated tokens, with the sum of
            their scales (P = 0 appends nothing).
        alpha: α.
        token_scales: [B, N], any floating dtype, or None.
        cls_token: whether there is one prefix token (True) or none.
        num_prefix: R; where given it replaces ``cls_token``.

    Returns:
        (x, weight, token_scales): prefix rows, then the kept rows in the order of ``index_kept``; the weight of the
        remaining tokens, of the kind that came in, nothing renormalised; the scales in their dtype, or None.

    The gradient reaches x only, in reverse mode. A weight of zero is no edge: what is not finite in a token stays with
    its neighbours.

    Raises:
        TypeError, ValueError: an argument, named, with what may come (index values are looked at on the CPU only).
    """
    alpha, prefix = check_propagate(
        x, weight, index_kept, index_prop, standard, alpha, token_scales, cls_token, num_prefix
    )
    dense = standard == "GraphProp" and isinstance(weight, Tensor)
    backend = backends.choose("propagate", x, dense=dense)
    if backend == "reference":
        if isinstance(weight, Tensor):
            weight = weight.detach()
        scales = None if token_scales is None else token_scales.detach()
        return reference.propagate(x, weight, index_kept, index_prop, standard, alpha, scales, num_prefix=prefix)
    _library.refuse_forward_mode(x)
    if backend != "cpu":
        check_index_values(weight, index_kept, index_prop, prefix, x.shape[1])
    scales = wide_scales(token_scales)
    ops = _library.operators(backend)
    try:
        if standard == "GraphProp" and isinstance(weight, Tensor):
            out, weight, scales_out = ops.propagate_dense(
                x, weight.detach(), index_kept, index_prop, scales, alpha, prefix
            )
        else:
            parts = graph_parts(weight, standard)
            out, token, scales_out = ops.propagate(x, *parts, index_kept, index_prop, scales, standard, alpha, prefix)
            if standard == "GraphProp" and isinstance(weight, TokenGraph):
                weight = weight.with_token(token)
    except RuntimeError:
        # The native kernels check index values themselves; their error is told again in the words of this function.
        check_index_values(weight, index_kept, index_prop, prefix, x.shape[1])
        raise
    return out, weight, None if token_scales is None else scales_out.to(token_scales.dtype)


def residual_propagate_norm(
    x: Tensor,
    branch: Tensor,
    graph: TokenGraph | None,
    index_kept: Tensor,
    index_prop: Tensor,
    *,
    layer_scale: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-6,
    norm: str = "layer",
    standard: str = "GraphProp",
    alpha: float = 0.1,
    token_scales: Tensor | None = None,
    num_prefix: int = 1,
) -> tuple[Tensor, Tensor | None, TokenGraph | None, Tensor | None]:
    """The step between attention and MLP of a GTP block, in one pass over memory.

        x, graph, token_scales = propagate(x + layer_scale · branch, graph, …)
        normed = norm(x)

    Args:
        x, branch: [B, N, C], floating dtypes of their own; the result has their promoted type.
        graph: TokenGraph, for ``standard="GraphProp"``; else handed through.
        index_kept, index_prop, standard, alpha, token_scales, num_prefix: as in :func:`propagate`.
        layer_scale: [C] or None (one).
        norm_weight, norm_bias: [C] or None.
        norm_eps: ε ≥ 0 of the norm.
        norm: ``layer``, (x - mean) / sqrt(var + ε) · weight + bias over C; ``rms``, x / sqrt(mean(x²) + ε) · weight; or
            ``none``.

    Returns:
        (x, normed, graph, token_scales); normed is None where ``norm`` is ``none``. It is computed from the rounded x.

    Gradients reach x, branch, layer_scale, norm_weight and norm_bias.

    Raises:
        TypeError, ValueError: an argument, named, with what may come.
    """
    alpha, prefix, eps = check_residual(
        x, branch, graph, index_kept, index_prop, layer_scale, norm_weight, norm_bias, norm_eps, norm, standard, alpha,
        token_scales, num_prefix,
    )  # fmt: skip
    return unchecked_residual(
        x, branch, graph, index_kept, index_prop, layer_scale, norm_weight, norm_bias, eps, norm, standard, alpha,
        token_scales, prefix,
    )  # fmt: skip


def unchecked_residual(
    x: Tensor,
    branch: Tensor,
    graph: TokenGraph | None,
    index_kept: Tensor,
    index_prop: Tensor,
    layer_scale: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    norm: str,
    standard: str,
    alpha: float,
    token_scales: Tensor | None,
    prefix: int,
) -> tuple[Tensor, Tensor | None, TokenGraph | None, Tensor | None]:
    """:func:`residual_propagate_norm` for a caller whose arguments are right by construction."""
    dtype = torch.promote_types(x.dtype, branch.dtype)
    backend = backends.choose("propagate", x, branch, layer_scale, norm_weight, norm_bias, dtype=dtype)
    if backend == "reference":
        return reference.residual_propagate_norm(
            x, branch, graph, index_kept, index_prop, layer_scale=layer_scale, norm_weight=norm_weight,
            norm_bias=norm_bias, norm_eps=eps, norm=norm, standard=standard, alpha=alpha,
            token_scales=None if token_scales is None else token_scales.detach(), num_prefix=prefix,
        )  # fmt: skip
    _library.refuse_forward_mode(x, branch, layer_scale, norm_weight, norm_bias)
    if backend != "cpu":
        check_index_values(graph, index_kept, index_prop, prefix, x.shape[1])
    try:
        out, normed, token, scales_out = _library.operators(backend).residual_propagate_norm(
            x, branch, layer_scale, *graph_parts(graph, standard), index_kept, index_prop, wide_scales(token_scales),
            norm_weight, norm_bias, eps, norm, standard, alpha, prefix,
        )  # fmt: skip
    except RuntimeError:
        check_index_values(graph, index_kept, index_prop, prefix, x.shape[1])
        raise
    if standard == "GraphProp" and graph is not None:
        graph = graph.with_token(token)
    scales = None if token_scales is None else scales_out.to(token_scales.dtype)
    return out, None if norm == "none" else normed, graph, scales


def wide_scales(token_scales: Tensor | None) -> Tensor | None:
    """Token scales [B, N] as the operators take them."""
    return None if token_scales is None else token_scales.detach().to(compute_dtype(token_scales.dtype))


def graph_parts(graph: object, standard: str) -> tuple[Tensor | None, ...]:
    """indptr, indices, values, token; None each where the propagation reads no graph."""
    if standard == "GraphProp" and isinstance(graph, TokenGraph):
        return graph.indptr, graph.indices, graph.values, graph.token
    return None, None, None, None


def _num_rows(index_kept: Tensor, index_prop: Tensor, standard: str, num_prefix: int) -> int:
    return num_prefix + index_kept.shape[1] + (1 if standard == "Mean" and index_prop.shape[1] else 0)


def _fake_rest(
    x: Tensor, token: Tensor | None, index_kept: Tensor, rows: int, token_scales: Tensor | None, standard: str
) -> tuple[Tensor, Tensor]:
    if standard == "GraphProp":
        token_out = x.new_empty(index_kept.shape, dtype=torch.int32)
    else:
        token_out = _library.absent(x, torch.int32)
    if token_scales is None:
        return token_out, _library.absent(x, torch.float32)
    return token_out, token_scales.new_empty(x.shape[0], rows)


@_library.fake("propagate")
def _propagate_fake(
    x: Tensor,
    indptr: Tensor | None,
    indices: Tensor | None,
    values: Tensor | None,
    token: Tensor | None,
    index_kept: Tensor,
    index_prop: Tensor,
    token_scales: Tensor | None,
    standard: str,
    alpha: float,
    num_prefix: int,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = _num_rows(index_kept, index_prop, standard, num_prefix)
    out = x.new_empty(x.shape[0], rows, x.shape[2])
    return (out, *_fake_rest(x, token, index_kept, rows, token_scales, standard))


@_library.fake("propagate_backward")
def _propagate_backward_fake(
    grad: Tensor,
    indptr: Tensor | None,
    indices: Tensor | None,
    values: Tensor | None,
    token: Tensor | None,
    index_kept: Tensor,
    index_prop: Tensor,
    standard: str,
    alpha: float,
    num_prefix: int,
) -> Tensor:
    return grad.new_empty(grad.shape[0], num_prefix + index_kept.shape[1] + index_prop.shape[1], grad.shape[2])


@_library.fake("propagate_dense")
def _dense_fake(
    x: Tensor,
    weight: Tensor,
    index_kept: Tensor,
    index_prop: Tensor,
    token_scales: Tensor | None,
    alpha: float,
    num_prefix: int,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, kept = index_kept.shape
    rows = num_prefix + kept
    scales = _library.absent(x, torch.float32) if token_scales is None else token_scales.new_empty(batch, rows)
    return x.new_empty(batch, rows, x.shape[2]), weight.new_empty(batch, kept, kept), scales


@_library.fake("residual_propagate_norm")
def residual_fake(
    x: Tensor,
    branch: Tensor,
    layer_scale: Tensor | None,
    indptr: Tensor | None,
    indices: Tensor | None,
    values: Tensor | None,
    token: Tensor | None,
    index_kept: Tensor,
    index_prop: Tensor,
    token_scales: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    norm: str,
    standard: str,
    alpha: float,
    num_prefix: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fake kernel of the operator."""
    rows = _num_rows(index_kept, index_prop, standard, num_prefix)
    dtype = torch.promote_types(x.dtype, branch.dtype)
    out = x.new_empty(x.shape[0], rows, x.shape[2], dtype=dtype)
    normed = _library.absent(x, dtype) if norm == "none" else torch.empty_like(out)
    return (out, normed, *_fake_rest(x, token, index_kept, rows, token_scales, standard))


def _propagate_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[1:7])
    ctx.options = inputs[8:]
    ctx.mark_non_differentiable(*output[1:])


def _propagate_backward(ops: Any, ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = ops.propagate_backward(grad, *ctx.saved_tensors, *ctx.options)
    return (grad_x, *(None,) * 10)


def _transpose_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:7])
    ctx.options = inputs[7:]


def _transpose_backward(ops: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The transpose of the transpose: the propagation itself."""
    *arguments, index_kept, index_prop = ctx.saved_tensors
    out, _, _ = ops.propagate(grad, *arguments, index_kept, index_prop, None, *ctx.options)
    return (out, *(None,) * 9)


def _dense_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[1:4])
    ctx.alpha, ctx.num_prefix = inputs[5:]
    ctx.mark_non_differentiable(*output[1:])


def _dense_backward(ops: Any, ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    weight, index_kept, index_prop = ctx.saved_tensors
    grad_x = dense_transpose(grad, weight, index_kept, index_prop, ctx.alpha, ctx.num_prefix)
    return (grad_x, *(None,) * 6)


def _residual_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    (
        x,
        branch,
        layer_scale,
        *graph,
        index_kept,
        index_prop,
        _,
        norm_weight,
        norm_bias,
        eps,
        norm,
        standard,
        alpha,
        prefix,
    ) = inputs
    ctx.save_for_backward(branch, layer_scale, *graph, index_kept, index_prop, norm_weight, norm_bias, output[0])
    ctx.options, ctx.eps, ctx.norm, ctx.x_dtype = (standard, alpha, prefix), eps, norm, x.dtype
    ctx.mark_non_differentiable(*output[2:])


def _residual_backward(
    ops: Any, ctx: Any, grad_out: Tensor, grad_normed: Tensor, *_: Tensor
) -> tuple[Tensor | None, ...]:
    branch, layer_scale, *graph, index_kept, index_prop, norm_weight, norm_bias, out = ctx.saved_tensors
    dtype = compute_dtype(out.dtype)
    grad = grad_out.to(dtype)
    grad_weight = grad_bias = grad_scale = None
    if ctx.norm != "none":
        step, grad_weight, grad_bias = norm_backward(
            grad_normed.to(dtype), out.to(dtype), norm_weight, norm_bias, ctx.eps, ctx.norm
        )
        grad = grad + step
    grad = ops.propagate_backward(grad, *graph, index_kept, index_prop, *ctx.options)
    grad_branch = grad
    if layer_scale is not None:
        grad_scale = (grad * branch).sum((0, 1)).to(layer_scale.dtype)
        grad_branch = grad * layer_scale
    grad_branch = grad_branch.to(branch.dtype)
    return (
        grad.to(ctx.x_dtype), grad_branch, grad_scale, *(None,) * 7, grad_weight, grad_bias, *(None,) * 5
    )  # fmt: skip


def _propagate_kernel(
    x: Tensor,
    indptr: Tensor | None,
    indices: Tensor | None,
    values: Tensor | None,
    token: Tensor | None,
    index_kept: Tensor,
    index_prop: Tensor,
    token_scales: Tensor | None,
    standard: str,
    alpha: float,
    num_prefix: int,
) -> tuple[Tensor, Tensor, Tensor]:
    graph = graph_of(indptr, indices, values, token)
    out, graph_out, scales = reference.propagate(
        x, graph, index_kept, index_prop, standard, alpha, token_scales, num_prefix=num_prefix
    )
    return out, *_rest(x, graph_out, scales, standard)


def _dense_kernel(
    x: Tensor,
    weight: Tensor,
    index_kept: Tensor,
    index_prop: Tensor,
    token_scales: Tensor | None,
    alpha: float,
    num_prefix: int,
) -> tuple[Tensor, Tensor, Tensor]:
    out, weight_out, scales = reference.propagate(
        x, weight, index_kept, index_prop, "GraphProp", alpha, token_scales, num_prefix=num_prefix
    )
    assert isinstance(weight_out, Tensor)
    return out, weight_out, _library.absent(x, torch.float32) if scales is None else scales


def residual_kernel(
    x: Tensor,
    branch: Tensor,
    layer_scale: Tensor | None,
    indptr: Tensor | None,
    indices: Tensor | None,
    values: Tensor | None,
    token: Tensor | None,
    index_kept: Tensor,
    index_prop: Tensor,
    token_scales: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    norm: str,
    standard: str,
    alpha: float,
    num_prefix: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator by its definition."""
    out, normed, graph, scales = reference.residual_propagate_norm(
        x, branch, graph_of(indptr, indices, values, token), index_kept, index_prop, layer_scale=layer_scale,
        norm_weight=norm_weight, norm_bias=norm_bias, norm_eps=norm_eps, norm=norm, standard=standard, alpha=alpha,
        token_scales=token_scales, num_prefix=num_prefix,
    )  # fmt: skip
    normed = _library.absent(x, out.dtype) if normed is None else normed
    return out, normed, *_rest(x, graph, scales, standard)


def _rest(x: Tensor, graph: object, scales: Tensor | None, standard: str) -> tuple[Tensor, Tensor]:
    used = standard == "GraphProp" and isinstance(graph, TokenGraph)
    token = graph.token if used else _library.absent(x, torch.int32)  # type: ignore[attr-defined]  # a TokenGraph
    return token, _library.absent(x, torch.float32) if scales is None else scales


_library.implement("propagate", _propagate_kernel)
_library.implement("propagate_dense", _dense_kernel)
_library.implement("propagate_backward", propagate_backward)
_library.implement("residual_propagate_norm", residual_kernel)
_library.autograd("propagate", _propagate_backward, _propagate_setup)
_library.autograd("propagate_backward", _transpose_backward, _transpose_setup)
_library.autograd("propagate_dense", _dense_backward, _dense_setup)
_library.autograd("residual_propagate_norm", _residual_backward, _residual_setup)
