"""A patched model as an ONNX file of standard operators: no scatter, no custom domain, any batch.

The model is exported with the operators of ``gtp_kernels`` as nodes, and each node is then replaced by its definition
from ``gtp_kernels.reference``. Four things are written anew, for what ONNX lacks, leaves open or
runs slowly:

    kthvalue      TopK of the shorter side, and its last value
    select_tokens those above the P-th value by TopK, equal ones by index; TopK of equal values is not relied on
    build_graph   the dense Âᵀ [B, n, n] in place of the CSR: neighbours by TopK and comparison with the M-th value,
                  equal ones by their running count, lower indices first (Equations 5 to 9)
    propagate     rows of Âᵀ gathered at the tokens that leave, then at those that stay, and one MatMul (10, 12)

Live edges are not among them: :func:`gtp_vit.export.export` refuses them, as the walk over the tokens that leave would
take a loop.

The step needs finite features: a weight of zero times infinity is NaN here, where the kernels have no edge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from gtp_kernels import reference
from gtp_kernels.reference import AttentionScores
from gtp_kernels.reference.attention import compute_dtype
from gtp_kernels.reference.graph import num_semantic_neighbours


def lower(program: ExportedProgram) -> ExportedProgram:
    """The program with PyTorch's own operators in place of those of ``gtp_kernels``, free of scatter and ``kthvalue``.

    Args:
        program: from ``torch.export.export``, run by the CPU operators of ``gtp_kernels``.
    """
    return program.run_decompositions(decompositions())


def decompositions() -> dict[Any, Callable[..., Any]]:
    """PyTorch's decompositions, with those of the operators of ``gtp_kernels`` for inference."""
    ours, aten = torch.ops.gtp_kernels, torch.ops.aten
    table: dict[Any, Callable[..., Any]] = dict(torch.export.default_decompositions())
    table[ours.attention_with_scores.default] = _attention
    table[ours.token_importance.default] = _importance
    table[ours.select_tokens.default] = select_tokens
    table[ours.build_graph.default] = _build_graph
    table[ours.residual_propagate_norm.default] = residual
    table[ours.select_residual_propagate_norm.default] = _select_residual
    table[aten.kthvalue.default] = kthvalue
    return table


def kthvalue(x: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """``torch.kthvalue`` by ``topk``, unsorted, from the side with fewer values."""
    size = x.shape[dim]
    if 2 * k <= size:
        values, indices = x.topk(k, dim, largest=False, sorted=False)
        chosen, position = values.amax(dim, keepdim=True), values.argmax(dim, keepdim=True)
    else:
        values, indices = x.topk(size - k + 1, dim, largest=True, sorted=False)
        chosen, position = values.amin(dim, keepdim=True), values.argmin(dim, keepdim=True)
    index = indices.gather(dim, position)
    return (chosen, index) if keepdim else (chosen.squeeze(dim), index.squeeze(dim))


def _attention(
    q: Tensor, k: Tensor, v: Tensor, token_scales: Tensor | None, sparsity: float, scale: float, semantics: str
) -> tuple[Tensor, ...]:
    out, scores = reference.attention_with_scores(
        q, k, v, token_scales, sparsity=sparsity, scale=scale, semantics=semantics
    )
    return (out, *scores)


def _importance(
    diag: Tensor, colsum: Tensor, cls_row: Tensor, standard: str, num_prefix: int, semantics: str
) -> Tensor:
    return reference.token_importance(AttentionScores(diag, colsum, cls_row), standard, num_prefix, semantics)


def select_tokens(importance: Tensor, num_prop: int, num_prefix: int, order: str) -> tuple[Tensor, Tensor]:
    """The operator ``select_tokens`` in grid order, right whatever order TopK gives to equal values.

    What runs ONNX files breaks ties as it likes: here values only are taken from TopK, and every index is its own key.
    """
    if order != "grid":
        raise ValueError(f"order must be 'grid' for ONNX; got {order!r}")
    n = importance.shape[1]
    lost = importance.isnan()
    value = torch.where(lost, -torch.inf, importance)
    last = value.topk(n - num_prop, dim=1).values[:, -1:]
    above, equal = value > last, (value == last) & ~lost
    none = lost & (last == -torch.inf)
    left = n - num_prop - above.sum(1, keepdim=True)
    stays = above | (equal & (_count(equal) <= left)) | (none & (_count(none) <= left - equal.sum(1, keepdim=True)))
    index = torch.arange(n, dtype=torch.int32, device=importance.device)
    key = torch.where(stays, index, index + n)
    kept = key.topk(n - num_prop, dim=1, largest=False).values
    prop = key.topk(num_prop, dim=1).values.flip(1) - n
    return kept.long() + num_prefix, prop.long() + num_prefix


def _count(mask: Tensor) -> Tensor:
    """How many are set up to here, along the last dimension."""
    return mask.to(torch.int32).cumsum(-1)


def _build_graph(
    x: Tensor, height: int, width: int, graph_type: str, num_neighbours: int, num_prefix: int, semantics: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Âᵀ where the operator has the values of its edges; nothing reads what stands for indptr and indices."""
    weight = dense_graph(x, height, width, graph_type, num_neighbours, num_prefix, semantics).transpose(1, 2)
    unused = x.new_zeros(x.shape[0], 1, dtype=torch.int32)
    return unused, unused.clone(), weight


def dense_graph(
    x: Tensor, height: int, width: int, graph_type: str, num_neighbours: int, num_prefix: int, semantics: str
) -> Tensor:
    """Â [B, n, n], float32, of :func:`gtp_kernels.build_graph`, with neither sort nor scatter nor float64."""
    n, batch = height * width, x.shape[0]
    index = torch.arange(n, device=x.device)
    other = index[:, None] != index
    adjacency = torch.zeros(n, n, dtype=torch.bool, device=x.device)
    if graph_type != "Semantic":
        row, column = index // width, index % width
        near = ((row[:, None] - row).abs() <= 1) & ((column[:, None] - column).abs() <= 1)
        adjacency = near & other
    adjacency = adjacency.expand(batch, n, n)
    neighbours = num_semantic_neighbours(n, num_neighbours, num_prefix, semantics)
    if graph_type != "Spatial" and neighbours:
        adjacency = adjacency | _semantic(x[:, num_prefix:], neighbours, other)
    degree = adjacency.sum(2).float()
    # At most n², exact in float32 up to n = 4096.
    product = degree.unsqueeze(2) * degree.unsqueeze(1)
    return torch.where(adjacency & (product > 0), 1.0 / product.clamp(min=1.0).sqrt(), 0.0)


def _semantic(x: Tensor, neighbours: int, other: Tensor) -> Tensor:
    """bool [B, n, n]: per row of x [B, n, C] its ``neighbours`` ≥ 1 most similar others, lower index first on ties."""
    unit = torch.nn.functional.normalize(x.to(compute_dtype(x.dtype)), dim=-1, eps=1e-12)
    similarity = unit @ unit.transpose(-1, -2)
    similarity = torch.where(other & ~similarity.isnan(), similarity, -torch.inf)
    last = similarity.topk(neighbours, dim=-1).values[..., -1:]
    above = similarity > last
    equal = (similarity == last) & other
    left = neighbours - above.sum(-1, keepdim=True)
    return above | (equal & (_count(equal) <= left))


def _select_residual(
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
    importance = _importance(diag, colsum, cls_row, selection, num_prefix, semantics)
    index_kept, index_prop = select_tokens(importance, num_prop, num_prefix, order)
    given = (x, branch, layer_scale, indptr, indices, values, token, index_kept, index_prop)
    return *residual(*given, *step), index_kept, index_prop


def residual(
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
    """The operator ``residual_propagate_norm``, with Âᵀ [B, n, n] in place of ``values``."""
    out_dtype = torch.promote_types(x.dtype, branch.dtype)
    dtype = compute_dtype(out_dtype)
    step = branch.to(dtype) if layer_scale is None else branch.to(dtype) * layer_scale.to(dtype)
    wide = x.to(dtype) + step
    kept, prop = rows_of(wide, index_kept), rows_of(wide, index_prop)
    token_out = index_kept.new_zeros(0, dtype=torch.int32)
    scales_kept = scales_prop = None
    if token_scales is not None:
        scales_kept = rows_of(token_scales.unsqueeze(2), index_kept)
        scales_prop = rows_of(token_scales.unsqueeze(2), index_prop)
    if standard == "Mean" and index_prop.shape[1]:
        kept = torch.cat((kept, prop.mean(1, keepdim=True)), 1)
        if scales_kept is not None and scales_prop is not None:
            scales_kept = torch.cat((scales_kept, scales_prop.sum(1, keepdim=True)), 1)
    elif standard == "GraphProp":
        assert values is not None
        assert token is not None
        tokens = token.long().unsqueeze(2)
        stays = rows_of(tokens, index_kept - num_prefix).squeeze(2)
        leaves = rows_of(tokens, index_prop - num_prefix).squeeze(2)
        # [B, P, n] of Âᵀ, turned to [B, n, P], then [B, K, P]: P columns are read, never n.
        to_kept = rows_of(rows_of(values, leaves).transpose(1, 2), stays)
        kept = kept + alpha * (to_kept.to(dtype) @ prop)
        if scales_kept is not None and scales_prop is not None:
            scales_kept = scales_kept + alpha * (to_kept.to(scales_prop.dtype) @ scales_prop)
        token_out = stays.to(torch.int32)
    out = torch.cat((wide[:, :num_prefix], kept), 1).to(out_dtype)
    scales_out = x.new_zeros(0, dtype=torch.float32)
    if token_scales is not None and scales_kept is not None:
        scales_out = torch.cat((token_scales[:, :num_prefix], scales_kept.squeeze(2)), 1)
    return out, _norm(out, norm, norm_weight, norm_bias, norm_eps), token_out, scales_out


def _norm(x: Tensor, norm: str, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    if norm == "none":
        return x.new_zeros(0)
    dtype = compute_dtype(x.dtype)
    wide = x.to(dtype)
    weight = None if weight is None else weight.to(dtype)
    if norm == "layer":
        normed = torch.nn.functional.layer_norm(
            wide, (x.shape[2],), weight, None if bias is None else bias.to(dtype), eps
        )
    else:
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        normed = normed if weight is None else normed * weight
    return normed.to(x.dtype)


def rows_of(x: Tensor, index: Tensor) -> Tensor:
    """x [B, N, C], index int64 [B, K] -> [B, K, C]: one Gather of whole rows of x seen as [B·N, C]."""
    batch, size, channels = x.shape
    first = torch.arange(batch, device=x.device).unsqueeze(1) * size
    rows = x.reshape(batch * size, channels).index_select(0, (index + first).flatten())
    return rows.reshape(batch, index.shape[1], channels)


def refused(model: Any) -> str | None:
    """What an ``onnx.ModelProto`` has that this export must not write; None where it has standard operators only."""
    for opset in model.opset_import:
        if opset.domain not in ("", "ai.onnx"):
            return f"the domain {opset.domain!r}"
    if model.functions:
        return f"the function {model.functions[0].name!r}"
    for node in _nodes(model.graph):
        if node.domain not in ("", "ai.onnx"):
            return f"{node.domain}::{node.op_type}"
        if node.op_type.startswith("Scatter"):
            return str(node.op_type)
    return None


def _nodes(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)
