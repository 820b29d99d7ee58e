"""Token propagation: the definition, in plain PyTorch (Section 3.2.3).

X^s = X^k + α Â^p X^p   (Equation 10),   s^s = s^k + α Â^p s^p   (Equation 12)
"""

from __future__ import annotations

import torch
from torch import Tensor

from gtp_kernels import checks
from gtp_kernels.graph import TokenGraph
from gtp_kernels.reference.attention import compute_dtype


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
    """The definition of :func:`gtp_kernels.propagate`: a TokenGraph is propagated through its dense form."""
    alpha, prefix = check_propagate(
        x, weight, index_kept, index_prop, standard, alpha, token_scales, cls_token, num_prefix
    )
    check_index_values(weight, index_kept, index_prop, prefix, x.shape[1])
    return _propagate(x, weight, index_kept, index_prop, standard, alpha, token_scales, prefix, x.dtype)


def _propagate(
    x: Tensor,
    weight: Tensor | TokenGraph | None,
    index_kept: Tensor,
    index_prop: Tensor,
    standard: str,
    alpha: float,
    token_scales: Tensor | None,
    prefix: int,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | TokenGraph | None, Tensor | None]:
    wide = x.to(compute_dtype(x.dtype))
    kept, prop = take_rows(wide, index_kept), take_rows(wide, index_prop)
    scales = None if token_scales is None else token_scales.to(compute_dtype(token_scales.dtype))
    scales_kept = None if scales is None else scales.gather(1, index_kept)
    scales_prop = None if scales is None else scales.gather(1, index_prop)
    weight_out = weight
    if standard == "Mean" and index_prop.shape[1]:
        kept = torch.cat((kept, prop.mean(1, keepdim=True)), 1)
        if scales_kept is not None and scales_prop is not None:
            scales_kept = torch.cat((scales_kept, scales_prop.sum(1, keepdim=True)), 1)
    elif standard == "GraphProp":
        assert weight is not None
        dense = weight.to_dense() if isinstance(weight, TokenGraph) else weight
        rows = take_rows(dense, index_kept - prefix)
        to_kept = rows.gather(2, (index_prop - prefix).unsqueeze(1).expand(-1, rows.shape[1], -1))
        kept = kept + alpha * over_edges(to_kept, prop)
        if scales_kept is not None and scales_prop is not None:
            scales_kept = scales_kept + alpha * over_edges(to_kept, scales_prop.unsqueeze(-1)).squeeze(-1)
        if isinstance(weight, TokenGraph):
            weight_out = weight.with_token(weight.token.gather(1, index_kept - prefix))
        else:
            weight_out = rows.gather(2, (index_kept - prefix).unsqueeze(1).expand(-1, rows.shape[1], -1))
    out = torch.cat((wide[:, :prefix], kept), 1).to(out_dtype)
    if token_scales is None or scales is None or scales_kept is None:
        return out, weight_out, None
    return out, weight_out, torch.cat((scales[:, :prefix], scales_kept), 1).to(token_scales.dtype)


def over_edges(weight: Tensor, x: Tensor) -> Tensor:
    """Σ_j weight_ij x_j over the edges; weight [B, K, P], x [B, P, C] -> [B, K, C].

    A weight of zero is no edge: what is infinite or NaN in x stays with its neighbours, as it does in a sparse graph.
    """
    weight = weight.to(x.dtype)
    total = x.new_zeros(weight.shape[0], weight.shape[1], x.shape[2])
    for j in range(weight.shape[2]):
        edge = weight[:, :, j, None]
        total = total + torch.where(edge != 0, edge * x[:, j, None], 0.0)
    return total


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """x [B, N, C], index [B, K] -> [B, K, C]."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]))


def check_propagate(
    x: Tensor,
    weight: Tensor | TokenGraph | None,
    index_kept: Tensor,
    index_prop: Tensor,
    standard: str,
    alpha: float,
    token_scales: Tensor | None,
    cls_token: bool | None,
    num_prefix: int | None,
    name: str = "weight",
) -> tuple[float, int]:
    """Checks the arguments of ``propagate``; returns (alpha, number of prefix tokens)."""
    checks.floating("x", x, 3, "[B, N, C]")
    checks.choice("standard", standard, checks.PROPAGATIONS)
    alpha = checks.number("alpha", alpha)
    prefix = checks.prefix(num_prefix, cls_token, x.shape[1])
    checks.tokens_and_indices(x, index_kept, index_prop, token_scales, prefix)
    if standard == "GraphProp":
        batch, n = x.shape[0], x.shape[1] - prefix
        if isinstance(weight, TokenGraph):
            checks.graph(weight.indptr, weight.indices, weight.values, weight.token, batch, n, x.device, name)
        elif isinstance(weight, Tensor):
            checks.dense_graph(weight, batch, n)
            checks.same_device(x=x, weight=weight)
        else:
            kinds = "a TokenGraph" if name == "graph" else "a TokenGraph or a tensor [B, n, n]"
            raise TypeError(f"{name} must be {kinds} where standard is 'GraphProp'; got {type(weight).__name__}")
    return alpha, prefix


def check_index_values(
    weight: Tensor | TokenGraph | None, index_kept: Tensor, index_prop: Tensor, prefix: int, num_tokens: int
) -> None:
    """Checks the values of the indices; the native kernels do so themselves, and tell less."""
    checks.index_range("index_kept", index_kept, prefix, num_tokens)
    checks.index_range("index_prop", index_prop, prefix, num_tokens)
    check_graph_values(weight)


def check_graph_values(weight: Tensor | TokenGraph | None) -> None:
    """The same of a graph."""
    if isinstance(weight, TokenGraph):
        checks.index_range("weight.token", weight.token, 0, weight.num_tokens)
        checks.index_range("weight.indices", weight.indices, 0, weight.num_tokens)
        checks.index_range("weight.indptr", weight.indptr, 0, weight.indices.shape[1] + 1)
        checks.index_range("the differences of weight.indptr", weight.indptr.diff(dim=1), 0, weight.num_tokens + 1)


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
    """The definition of :func:`gtp_kernels.residual_propagate_norm`."""
    alpha, prefix, eps = check_residual(
        x, branch, graph, index_kept, index_prop, layer_scale, norm_weight, norm_bias, norm_eps, norm, standard, alpha,
        token_scales, num_prefix,
    )  # fmt: skip
    check_index_values(graph, index_kept, index_prop, prefix, x.shape[1])
    out_dtype = torch.promote_types(x.dtype, branch.dtype)
    dtype = compute_dtype(out_dtype)
    step = branch.to(dtype) if layer_scale is None else branch.to(dtype) * layer_scale.to(dtype)
    out, graph_out, scales = _propagate(
        x.to(dtype) + step, graph, index_kept, index_prop, standard, alpha, token_scales, prefix, out_dtype
    )
    assert not isinstance(graph_out, Tensor)
    return out, apply_norm(out, norm, norm_weight, norm_bias, eps), graph_out, scales


def apply_norm(x: Tensor, norm: str, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float) -> Tensor | None:
    """The norm over channels of x [B, N, C] in its type; None where ``norm`` is "none"."""
    if norm == "none":
        return None
    dtype = compute_dtype(x.dtype)
    wide = x.to(dtype)
    weight = None if norm_weight is None else norm_weight.to(dtype)
    if norm == "layer":
        bias = None if norm_bias is None else norm_bias.to(dtype)
        normed = torch.nn.functional.layer_norm(wide, (x.shape[2],), weight, bias, eps)
    else:
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        normed = normed if weight is None else normed * weight
    return normed.to(x.dtype)


def check_residual(
    x: Tensor,
    branch: Tensor,
    graph: TokenGraph | None,
    index_kept: Tensor,
    index_prop: Tensor,
    layer_scale: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    norm: str,
    standard: str,
    alpha: float,
    token_scales: Tensor | None,
    num_prefix: int,
) -> tuple[float, int, float]:
    """Checks the arguments of ``residual_propagate_norm``; returns (alpha, number of prefix tokens, eps)."""
    if isinstance(graph, Tensor):
        raise TypeError("graph must be a TokenGraph or None; got a tensor (TokenGraph.from_dense makes one of it)")
    alpha, prefix = check_propagate(
        x, graph, index_kept, index_prop, standard, alpha, token_scales, None, num_prefix, "graph"
    )
    checks.floating("branch", branch, 3, "[B, N, C]")
    checks.shape_is("branch", branch, x.shape, "that of x")
    checks.choice("norm", norm, checks.NORMS)
    vectors = {"layer_scale": layer_scale, "norm_weight": norm_weight, "norm_bias": norm_bias}
    for name, vector in vectors.items():
        if vector is not None:
            checks.floating(name, vector, 1, "[C]")
            checks.shape_is(name, vector, (x.shape[2],), "[C]")
    if norm == "rms" and norm_bias is not None:
        raise ValueError("norm_bias must be None where norm is 'rms'")
    if x.shape[2] == 0:
        raise ValueError(f"x must have at least one channel; got shape {tuple(x.shape)}")
    checks.same_device(x=x, branch=branch, **vectors)
    eps = checks.number("norm_eps", norm_eps)
    if eps < 0:
        raise ValueError(f"norm_eps must be at least 0; got {eps}")
    return alpha, prefix, eps


def graph_of(
    indptr: Tensor | None, indices: Tensor | None, values: Tensor | None, token: Tensor | None
) -> TokenGraph | None:
    """The TokenGraph of an operator's four graph arguments, None where they are."""
    if indptr is None or indices is None or values is None or token is None:
        return None
    return TokenGraph(indptr, indices, values, token)


def propagate_backward(
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
    """Gradient of x [B, N, C] from that of the propagated x [B, rows, C]: the transpose of the linear map."""
    if standard == "GraphProp":
        graph = graph_of(indptr, indices, values, token)
        assert graph is not None
        dense = graph.to_dense()
        return dense_transpose(grad, dense, index_kept, index_prop, alpha, num_prefix)
    num_kept, num_prop = index_kept.shape[1], index_prop.shape[1]
    grad_x = grad.new_zeros(grad.shape[0], num_prefix + num_kept + num_prop, grad.shape[2])
    grad_x[:, :num_prefix] = grad[:, :num_prefix]
    grad_x.scatter_(1, _columns(index_kept, grad), grad[:, num_prefix : num_prefix + num_kept])
    if standard == "Mean" and num_prop:
        share = (grad[:, num_prefix + num_kept :] / num_prop).expand(-1, num_prop, -1)
        grad_x.scatter_(1, _columns(index_prop, grad), share)
    return grad_x


def dense_transpose(
    grad: Tensor, weight: Tensor, index_kept: Tensor, index_prop: Tensor, alpha: float, num_prefix: int
) -> Tensor:
    """The transpose of the propagation through a dense weight [B, n, n]; grad [B, R + K, C] -> [B, N, C]."""
    dtype = compute_dtype(grad.dtype)
    rows = take_rows(weight, index_kept - num_prefix)
    to_kept = rows.gather(2, (index_prop - num_prefix).unsqueeze(1).expand(-1, rows.shape[1], -1)).to(dtype)
    grad_prop = (alpha * (to_kept.transpose(1, 2) @ grad[:, num_prefix:].to(dtype))).to(grad.dtype)
    num_tokens = num_prefix + index_kept.shape[1] + index_prop.shape[1]
    grad_x = grad.new_zeros(grad.shape[0], num_tokens, grad.shape[2])
    grad_x = grad_x.scatter(1, _columns(index_kept, grad), grad[:, num_prefix:])
    grad_x = grad_x.scatter(1, _columns(index_prop, grad), grad_prop)
    return torch.cat((grad[:, :num_prefix], grad_x[:, num_prefix:]), 1)


def _columns(index: Tensor, grad: Tensor) -> Tensor:
    return index.unsqueeze(-1).expand(-1, -1, grad.shape[2])


def norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, norm: str
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of the norm's input [B, N, C], weight [C], bias [C] (None where absent); all in the wide type."""
    if norm == "layer":
        wide_weight, wide_bias = (None if t is None else t.to(x.dtype) for t in (weight, bias))
        _, mean, inverse = torch.native_layer_norm(x, x.shape[-1:], wide_weight, wide_bias, eps)
        asked = [True, weight is not None, bias is not None]
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
            grad, x, x.shape[-1:], mean, inverse, wide_weight, wide_bias, asked
        )
        return (
            grad_x,
            None if weight is None else grad_weight.to(weight.dtype),
            None if bias is None else grad_bias.to(bias.dtype),
        )
    inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    unit = x * inverse
    inner = grad if weight is None else grad * weight
    grad_x = (inner - unit * (inner * unit).mean(-1, keepdim=True)) * inverse
    grad_weight = None if weight is None else (grad * unit).sum((0, 1)).to(weight.dtype)
    return grad_x, grad_weight, None if bias is None else grad.sum((0, 1)).to(bias.dtype)
