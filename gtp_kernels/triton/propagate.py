"""Triton kernels of propagate, its backward and dense forms, and residual_propagate_norm.

y = x, or x + layer_scale · branch.  x_out = the prefix rows of y, then for each kept token i, in index_kept's order,
    y_i + α Σ_j Â_ij y_j   over the propagated j, in CSR order (Equations 10 and 12).
"""

from __future__ import annotations

import ctypes
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from gtp_kernels.ops import _library
from gtp_kernels.reference.attention import compute_dtype
from gtp_kernels.triton import configs, runtime, select

NORMS = {"none": 0, "layer": 1, "rms": 2}


def row_block(channels: int, largest: int) -> int:
    """Channels of a program of the kernels that work row by row: the whole row, up to ``largest``."""
    return min(max(runtime.next_power_of_2(channels), 32), largest)


def split_float(value: float) -> tuple[float, float]:
    """(high, low): two float32 whose float64 sum is ``value`` to 48 bits; a kernel takes a float as float32."""
    high = ctypes.c_float(value).value
    return high, ctypes.c_float(value - high).value if math.isfinite(high) else 0.0


@triton.jit
def _number(high, low, dtype: tl.constexpr):
    """A number that came as ``split_float``, in ``dtype``."""
    return tl.zeros([], dtype) + high + low


@triton.jit
def _leaver_kernel(p_token, p_prop, p_leaver, N, P, R, origins, blocks, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr):
    """leaver[b, t] = the row of x of the propagated token whose original token is t, or -1.
    n0·P comparisons an image; reads 12·P bytes per program, writes 4·B·n0."""
    pid = tl.program_id(0).to(tl.int64)
    b = pid // blocks
    o_t = (pid % blocks).to(tl.int32) * BLOCK_T + tl.arange(0, BLOCK_T)
    b_row = tl.full([BLOCK_T], -1, tl.int32)
    for j0 in range(0, P, BLOCK_P):
        b_prop, b_origin = _leaving(p_token, p_prop, b, j0, N, P, R, BLOCK_P)
        # [BLOCK_T, BLOCK_P]
        same = o_t[:, None] == b_origin[None, :]
        b_row = tl.maximum(b_row, tl.max(tl.where(same, b_prop[None, :], -1), axis=1))
    tl.store(p_leaver + b * origins + o_t, b_row, mask=o_t < origins)


@triton.jit
def _leaving(p_token, p_prop, b, j0, N, P, R, BLOCK_P: tl.constexpr):
    """int32 [BLOCK_P], twice: the rows of x of the propagated tokens j0 …, and their original tokens (-2: none)."""
    o_j = j0 + tl.arange(0, BLOCK_P)
    m_j = o_j < P
    b_prop = tl.load(p_prop + b * P + o_j, mask=m_j, other=R)
    b_prop = tl.minimum(tl.maximum(b_prop, R), N - 1).to(tl.int32)
    b_origin = tl.load(p_token + b * (N - R) + b_prop - R, mask=m_j, other=-2)
    return b_prop, tl.where(m_j, b_origin, -2)


@triton.jit
def _edge_range(p_indptr, b, origin, m, origins, E):
    """(begin, end) of the CSR row ``origin``, within [0, E]; empty where not ``m`` or where there is no such row."""
    m = m & (origin >= 0) & (origin < origins)
    p_row = p_indptr + b * (origins + 1) + origin
    begin = tl.load(p_row, mask=m, other=0)
    end = tl.load(p_row + 1, mask=m, other=0)
    return tl.maximum(begin, 0), tl.minimum(end, E)


@triton.jit
def _load_y(
    p_x, p_branch, b_layer_scale, row, o_c, m_c, stride_xn, stride_xc, stride_rn, stride_rc,
    BRANCH: tl.constexpr, LAYER_SCALE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """[BLOCK_C] y of one row of x, in the wide type, not rounded."""
    b_y = tl.load(p_x + row * stride_xn + o_c * stride_xc, mask=m_c, other=0.0).to(ACC)
    if BRANCH:
        b_step = tl.load(p_branch + row * stride_rn + o_c * stride_rc, mask=m_c, other=0.0).to(ACC)
        if LAYER_SCALE:
            b_step *= b_layer_scale
        b_y += b_step
    return b_y


@triton.jit
def _normalise(b_x, p_weight, p_bias, o_c, m_c, C, eps, NORM: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr):
    """[BLOCK_C] LayerNorm (NORM 1) or RMSNorm (2) of one whole row, 0 outside it."""
    if NORM == 1:
        b_x = tl.where(m_c, b_x - tl.sum(b_x, 0) / C, 0.0)
    b_unit = b_x * (1.0 / tl.sqrt(tl.sum(b_x * b_x, 0) / C + eps))
    if WEIGHT:
        b_unit *= tl.load(p_weight + o_c, mask=m_c, other=0.0).to(b_unit.dtype)
    if BIAS:
        b_unit += tl.load(p_bias + o_c, mask=m_c, other=0.0).to(b_unit.dtype)
    return b_unit


@triton.jit
def _row_kernel(
    p_x, p_branch, p_layer_scale, p_indptr, p_indices, p_values, p_token, p_leaver, p_kept, p_prop, p_scales,
    p_weight, p_bias, p_out, p_normed, p_token_out, p_scales_out,
    N, C, rows, K, P, R, origins, E,
    stride_xb, stride_xn, stride_xc, stride_rb, stride_rn, stride_rc,
    alpha, alpha_low, eps, eps_low,
    BRANCH: tl.constexpr, LAYER_SCALE: tl.constexpr, GRAPH: tl.constexpr, DIRECT: tl.constexpr, MEAN: tl.constexpr,
    SCALES: tl.constexpr, SCALES_WIDE: tl.constexpr, NORM: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One row of x_out: y_i + α Σ_j Â_ij y_j (GRAPH; P > 0), y_i, or the mean of the propagated y (the last row, MEAN);
    then normed = norm(x_out) of the rounded row, the row's token scale and original token. GRAPH with DIRECT compares
    the row's columns with the propagated tokens, without it asks ``leaver``.
    Reads x (and branch) once and each propagated row once per edge that counts, writes x_out (and normed) once; 2·C
    FLOPs per such edge, 8·C per row for the norm: bound by memory."""
    ACC: tl.constexpr = tl.float64 if WIDE else tl.float32
    SCALE: tl.constexpr = tl.float64 if SCALES_WIDE else tl.float32
    pid = tl.program_id(0).to(tl.int64)
    b = pid // rows
    r = (pid % rows).to(tl.int32)
    o_c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    first_block = tl.program_id(1) == 0
    is_kept = (r >= R) & (r < R + K)
    own = tl.load(p_kept + b * K + r - R, mask=is_kept, other=0).to(tl.int64)
    own = tl.where(is_kept, tl.maximum(own, R), r)
    own = tl.minimum(own, N - 1)
    p_x += b * stride_xb
    p_branch += b * stride_rb
    p_scales += b * N

    b_layer_scale = tl.zeros([BLOCK_C], ACC)
    if LAYER_SCALE:
        b_layer_scale = tl.load(p_layer_scale + o_c, mask=m_c, other=0.0).to(ACC)
    # [BLOCK_C]
    b_y = _load_y(
        p_x, p_branch, b_layer_scale, own, o_c, m_c, stride_xn, stride_xc, stride_rn, stride_rc,
        BRANCH, LAYER_SCALE, ACC,
    )  # fmt: skip
    scale = tl.zeros([], SCALE)
    if SCALES:
        scale = tl.load(p_scales + own).to(SCALE)

    changed = False
    b_total = tl.zeros([BLOCK_C], ACC)
    total_scale = tl.zeros([], SCALE)
    if GRAPH:
        origin = tl.load(p_token + b * (N - R) + own - R, mask=is_kept, other=-1)
        tl.store(p_token_out + b * K + r - R, origin, mask=is_kept & first_block)
    if GRAPH and BLOCK_P > 0:
        begin, end = _edge_range(p_indptr, b, origin, is_kept, origins, E)
        if DIRECT:
            b_prop, b_origin = _leaving(p_token, p_prop, b, 0, N, P, R, BLOCK_P)
        edges = 0
        for e0 in range(begin, end, BLOCK_E):
            o_e = e0 + tl.arange(0, BLOCK_E)
            m_e = o_e < end
            b_column = tl.load(p_indices + b * E + o_e, mask=m_e, other=-1)
            m_e = m_e & (b_column >= 0) & (b_column < origins)
            b_value = tl.load(p_values + b * E + o_e, mask=m_e, other=0.0)
            # [BLOCK_E] the row of x behind each column, -1 where it does not leave
            if DIRECT:
                same = m_e[:, None] & (b_column[:, None] == b_origin[None, :])
                b_row = tl.max(tl.where(same, b_prop[None, :], -1), axis=1)
            else:
                b_row = tl.load(p_leaver + b * origins + b_column, mask=m_e, other=-1)
            b_hit = (b_row >= 0).to(tl.int32)
            b_turn = tl.cumsum(b_hit, 0)
            hits = tl.sum(b_hit, 0)
            for turn in range(hits):
                m_turn = (b_row >= 0) & (b_turn == turn + 1)
                row = tl.sum(tl.where(m_turn, b_row, 0), 0).to(tl.int64)
                value = tl.sum(tl.where(m_turn, b_value, 0.0), 0)
                b_other = _load_y(
                    p_x, p_branch, b_layer_scale, row, o_c, m_c, stride_xn, stride_xc, stride_rn, stride_rc,
                    BRANCH, LAYER_SCALE, ACC,
                )  # fmt: skip
                b_total += value.to(ACC) * b_other
                if SCALES:
                    total_scale += value.to(SCALE) * tl.load(p_scales + row).to(SCALE)
            edges += hits
        factor = _number(alpha, alpha_low, ACC)
        # A row without an edge that counts stays as it is, whatever α is.
        changed = edges > 0
        b_y = tl.where(changed, b_y + factor * b_total, b_y)
        if SCALES:
            scale_factor = _number(alpha, alpha_low, SCALE)
            scale = tl.where(changed, scale + scale_factor * total_scale, scale)
    if MEAN:
        is_mean = r == R + K
        for j in range(tl.where(is_mean, P, 0)):
            row = tl.minimum(tl.maximum(tl.load(p_prop + b * P + j).to(tl.int64), R), N - 1)
            b_total += _load_y(
                p_x, p_branch, b_layer_scale, row, o_c, m_c, stride_xn, stride_xc, stride_rn, stride_rc,
                BRANCH, LAYER_SCALE, ACC,
            )  # fmt: skip
            if SCALES:
                total_scale += tl.load(p_scales + row).to(SCALE)
        changed = is_mean
        b_y = tl.where(is_mean, b_total / P, b_y)
        scale = tl.where(is_mean, total_scale, scale)

    b_out = b_y.to(p_out.dtype.element_ty)
    if not BRANCH:
        # Bit for bit, NaN included.
        b_out = tl.where(changed, b_out, tl.load(p_x + own * stride_xn + o_c * stride_xc, mask=m_c, other=0.0))
    tl.store(p_out + (b * rows + r) * C + o_c, b_out, mask=m_c)
    if SCALES:
        tl.store(p_scales_out + b * rows + r, scale, mask=first_block)
    if NORM > 0:
        epsilon = _number(eps, eps_low, ACC)
        b_unit = _normalise(b_out.to(ACC), p_weight, p_bias, o_c, m_c, C, epsilon, NORM, WEIGHT, BIAS)
        tl.store(p_normed + (b * rows + r) * C + o_c, b_unit.to(p_normed.dtype.element_ty), mask=m_c)


@triton.jit
def _norm_kernel(
    p_x, p_weight, p_bias, p_normed, C, eps, eps_low,
    NORM: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, WIDE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """normed = (x - mean) / sqrt(variance + ε) · weight + bias of a row too long for one block; x [rows, C] contiguous.
    Reads a row three times (from cache after the first), writes it once; 8·C FLOPs."""
    ACC: tl.constexpr = tl.float64 if WIDE else tl.float32
    row = tl.program_id(0).to(tl.int64) * C
    epsilon = _number(eps, eps_low, ACC)
    mean = tl.zeros([], ACC)
    if NORM == 1:
        for c0 in range(0, C, BLOCK_C):
            o_c = c0 + tl.arange(0, BLOCK_C)
            mean += tl.sum(tl.load(p_x + row + o_c, mask=o_c < C, other=0.0).to(ACC), 0)
        mean = mean / C
    square = tl.zeros([], ACC)
    for c0 in range(0, C, BLOCK_C):
        o_c = c0 + tl.arange(0, BLOCK_C)
        m_c = o_c < C
        b_x = tl.where(m_c, tl.load(p_x + row + o_c, mask=m_c, other=0.0).to(ACC) - mean, 0.0)
        square += tl.sum(b_x * b_x, 0)
    inverse = 1.0 / tl.sqrt(square / C + epsilon)
    for c0 in range(0, C, BLOCK_C):
        o_c = c0 + tl.arange(0, BLOCK_C)
        m_c = o_c < C
        b_x = (tl.load(p_x + row + o_c, mask=m_c, other=0.0).to(ACC) - mean) * inverse
        if WEIGHT:
            b_x *= tl.load(p_weight + o_c, mask=m_c, other=0.0).to(ACC)
        if BIAS:
            b_x += tl.load(p_bias + o_c, mask=m_c, other=0.0).to(ACC)
        tl.store(p_normed + row + o_c, b_x.to(p_normed.dtype.element_ty), mask=m_c)


@triton.jit
def _backward_kernel(
    p_grad, p_indptr, p_indices, p_values, p_token, p_kept, p_prop, p_grad_x,
    N, C, K, P, R, origins, E,
    stride_gb, stride_gn, stride_gc,
    alpha, alpha_low,
    GRAPH: tl.constexpr, MEAN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad_x of a prefix or kept row = its row of grad; of a propagated row j = α Σ_i Â_ij grad_i over the kept i in
    the order of index_kept (GRAPH), grad_mean / P (MEAN), or 0.
    Reads grad once, and once per edge that counts; a propagated row looks through the edges of all kept rows (4 bytes
    each, from cache); writes grad_x once."""
    ACC: tl.constexpr = tl.float64 if WIDE else tl.float32
    pid = tl.program_id(0).to(tl.int64)
    b = pid // N
    r = (pid % N).to(tl.int32)
    o_c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    p_grad += b * stride_gb + o_c * stride_gc
    leaves = r >= R + K
    is_kept = (r >= R) & (r < R + K)
    target = tl.load(p_kept + b * K + r - R, mask=is_kept, other=0)
    target += tl.load(p_prop + b * P + r - R - K, mask=leaves, other=0)
    target = tl.where(r < R, r, tl.maximum(target.to(tl.int64), R))
    target = tl.minimum(target, N - 1)
    # [BLOCK_C]
    b_copy = tl.load(p_grad + r.to(tl.int64) * stride_gn, mask=m_c & (r < R + K), other=0.0)
    if GRAPH:
        b_total = tl.zeros([BLOCK_C], ACC)
        edges = 0
        own = tl.load(p_token + b * (N - R) + target - R, mask=leaves, other=-2)
        for k0 in range(0, tl.where(leaves, K, 0), BLOCK_K):
            o_k = k0 + tl.arange(0, BLOCK_K)
            m_k = o_k < K
            b_kept = tl.load(p_kept + b * K + o_k, mask=m_k, other=R).to(tl.int64)
            b_kept = tl.minimum(tl.maximum(b_kept, R), N - 1)
            b_origin = tl.load(p_token + b * (N - R) + b_kept - R, mask=m_k, other=-1)
            b_begin, b_end = _edge_range(p_indptr, b, b_origin, m_k, origins, E)
            longest = tl.max(b_end - b_begin, 0)
            # [BLOCK_K] the value of the edge from each kept row to this one, and whether there is one
            b_value = tl.zeros([BLOCK_K], tl.float32)
            b_hit = tl.zeros([BLOCK_K], tl.int32)
            for e0 in range(0, longest, BLOCK_E):
                o_e = b_begin[:, None] + e0 + tl.arange(0, BLOCK_E)[None, :]
                m_e = o_e < b_end[:, None]
                b_column = tl.load(p_indices + b * E + o_e, mask=m_e, other=-1)
                m_e = m_e & (b_column >= 0) & (b_column < origins) & (b_column == own)
                b_value += tl.sum(tl.load(p_values + b * E + o_e, mask=m_e, other=0.0), axis=1)
                b_hit = tl.maximum(b_hit, tl.max(m_e.to(tl.int32), axis=1))
            b_turn = tl.cumsum(b_hit, 0)
            hits = tl.sum(b_hit, 0)
            for turn in range(hits):
                m_turn = (b_hit > 0) & (b_turn == turn + 1)
                k = tl.sum(tl.where(m_turn, o_k, 0), 0).to(tl.int64)
                value = tl.sum(tl.where(m_turn, b_value, 0.0), 0)
                b_grad = tl.load(p_grad + (R + k) * stride_gn, mask=m_c, other=0.0)
                b_total += value.to(ACC) * b_grad.to(ACC)
            edges += hits
        factor = _number(alpha, alpha_low, ACC)
        b_total = tl.where(edges > 0, factor * b_total, 0.0)
        b_copy = tl.where(leaves, b_total.to(b_copy.dtype), b_copy)
    if MEAN:
        b_mean = tl.load(p_grad + (b - b + R + K) * stride_gn, mask=m_c & leaves, other=0.0).to(ACC) / P
        b_copy = tl.where(leaves, b_mean.to(b_copy.dtype), b_copy)
    tl.store(p_grad_x + (b * N + target) * C + o_c, b_copy, mask=m_c)


@triton.jit
def _dense_kernel(
    p_x, p_graph, p_kept, p_prop, p_scales, p_out, p_scales_out,
    N, C, K, P, R, blocks,
    stride_xb, stride_xn, stride_xc, stride_wb, stride_wi, stride_wj,
    alpha, alpha_low,
    SCALES: tl.constexpr, SCALES_WIDE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """x_out[i] = x[kept i] + α Σ_p W[kept i, prop p] x[prop p], the same for token_scales; prefix rows are copied.
    Reads x once (the propagated rows once per row block) and K·P weights per channel block; 2·K·P·C FLOPs."""
    ACC: tl.constexpr = tl.float64 if WIDE else tl.float32
    SCALE: tl.constexpr = tl.float64 if SCALES_WIDE else tl.float32
    pid = tl.program_id(0).to(tl.int64)
    b = pid // blocks
    o_i = (pid % blocks).to(tl.int32) * BLOCK_I + tl.arange(0, BLOCK_I)
    m_i = o_i < R + K
    is_kept = m_i & (o_i >= R)
    o_c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_kept = tl.load(p_kept + b * K + o_i - R, mask=is_kept, other=0).to(tl.int64)
    b_source = tl.where(is_kept, tl.maximum(b_kept, R), o_i)
    b_source = tl.minimum(b_source, N - 1)
    p_x += b * stride_xb
    p_graph += b * stride_wb + (b_source - R) * stride_wi
    p_scales += b * N

    # [BLOCK_I, BLOCK_C]
    b_total = tl.zeros([BLOCK_I, BLOCK_C], ACC)
    b_scale = tl.zeros([BLOCK_I], SCALE)
    for j in range(P):
        prop = tl.load(p_prop + b * P + j).to(tl.int64)
        prop = tl.minimum(tl.maximum(prop, R), N - 1)
        # [BLOCK_I]; a weight of zero is no edge, whatever stands in the row
        b_graph = tl.load(p_graph + (prop - R) * stride_wj, mask=is_kept, other=0.0)
        # [BLOCK_C]
        b_x = tl.load(p_x + prop * stride_xn + o_c * stride_xc, mask=m_c, other=0.0).to(ACC)
        b_total += tl.where(b_graph[:, None] != 0, b_graph.to(ACC)[:, None] * b_x[None, :], 0.0)
        if SCALES:
            other = tl.load(p_scales + prop).to(SCALE)
            b_scale += tl.where(b_graph != 0, b_graph.to(SCALE) * other, 0.0)
    factor = _number(alpha, alpha_low, ACC)
    m_out = m_i[:, None] & m_c[None, :]
    b_own = tl.load(p_x + b_source[:, None] * stride_xn + o_c[None, :] * stride_xc, mask=m_out, other=0.0).to(ACC)
    b_own = tl.where(is_kept[:, None] & (P > 0), b_own + factor * b_total, b_own)
    p_out += (b * (R + K) + o_i[:, None]) * C + o_c[None, :]
    tl.store(p_out, b_own.to(p_out.dtype.element_ty), mask=m_out)
    if SCALES:
        scale_factor = _number(alpha, alpha_low, SCALE)
        b_own_scale = tl.load(p_scales + b_source, mask=m_i, other=0.0).to(SCALE)
        b_own_scale = tl.where(is_kept & (P > 0), b_own_scale + scale_factor * b_scale, b_own_scale)
        tl.store(p_scales_out + b * (R + K) + o_i, b_own_scale, mask=m_i & (tl.program_id(1) == 0))


@triton.jit
def _weight_kernel(
    p_graph, p_kept, p_out, N, K, R, stride_wb, stride_wi, stride_wj, BLOCK_K: tl.constexpr
):  # fmt: skip
    """weight_out[b, i, j] = weight[b, kept i - R, kept j - R]: reads and writes B·K² elements."""
    pid = tl.program_id(0).to(tl.int64)
    b = pid // K
    o_j = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_j = o_j < K
    row = tl.load(p_kept + pid).to(tl.int64)
    row = tl.minimum(tl.maximum(row, R), N - 1) - R
    b_column = tl.load(p_kept + b * K + o_j, mask=m_j, other=R).to(tl.int64)
    b_column = tl.minimum(tl.maximum(b_column, R), N - 1) - R
    b_weight = tl.load(p_graph + b * stride_wb + row * stride_wi + b_column * stride_wj, mask=m_j)
    tl.store(p_out + pid * K + o_j, b_weight, mask=m_j)


def propagate(
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
    """The operator ``propagate``: (x, token, token_scales) of the rows that remain."""
    out, _, token_out, scales_out = _transition(
        x, None, None, indptr, indices, values, token, index_kept, index_prop, token_scales, None, None, 0.0, "none",
        standard, alpha, num_prefix,
    )  # fmt: skip
    return out, token_out, scales_out


def residual_propagate_norm(
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
    """The operator ``residual_propagate_norm``: (x, normed, token, token_scales) of the rows that remain."""
    return _transition(
        x, branch, layer_scale, indptr, indices, values, token, index_kept, index_prop, token_scales, norm_weight,
        norm_bias, norm_eps, norm, standard, alpha, num_prefix,
    )  # fmt: skip


def select_residual_propagate_norm(
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
    token_scales: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    norm: str,
    standard: str,
    alpha: float,
    num_prefix: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operator ``select_residual_propagate_norm``: the launches of the three that it stands for."""
    importance = select.token_importance(diag, colsum, cls_row, selection, num_prefix, semantics)
    index_kept, index_prop = select.select_tokens(importance, num_prop, num_prefix, order)
    out, normed, token_out, scales_out = _transition(
        x, branch, layer_scale, indptr, indices, values, token, index_kept, index_prop, token_scales, norm_weight,
        norm_bias, norm_eps, norm, standard, alpha, num_prefix,
    )  # fmt: skip
    return out, normed, token_out, scales_out, index_kept, index_prop


def _transition(
    x: Tensor,
    branch: Tensor | None,
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
    batch, tokens, channels = x.shape
    num_kept, num_prop = index_kept.shape[1], index_prop.shape[1]
    mean = standard == "Mean" and num_prop > 0
    graph = standard == "GraphProp"
    rows = num_prefix + num_kept + int(mean)
    dtype = x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype)
    out = x.new_empty(batch, rows, channels, dtype=dtype)
    normed = _library.absent(x, dtype) if norm == "none" else torch.empty_like(out)
    token_out = x.new_empty(batch, num_kept, dtype=torch.int32) if graph else _library.absent(x, torch.int32)
    if token_scales is None:
        scales_out = _library.absent(x, torch.float32)
    else:
        scales_out = token_scales.new_empty(batch, rows)
    if runtime.any_zero(batch, rows):
        return out, normed, token_out, scales_out

    kept, prop = index_kept.contiguous(), index_prop.contiguous()
    origins = edges = 0
    walks = graph and num_prop > 0
    tile = configs.lookup("row", x.device, dtype, channels=int(channels), leaving=int(num_prop) if walks else 0)
    # More leaving tokens than "compared" are looked up in a table that another kernel makes.
    direct = num_prop <= tile["compared"]
    block_p = 0
    leaver = kept
    if graph:
        indptr, indices, values, token = _graph_arrays(indptr, indices, values, token)
        origins, edges = indptr.shape[1] - 1, indices.shape[1]
        if walks:
            block_p = min(max(runtime.next_power_of_2(int(num_prop)), 8), tile["compared"])
            if not direct:
                leaver = _leavers(token, prop, tokens, num_prefix, origins)
    wide = compute_dtype(dtype) == torch.float64
    block_c = row_block(int(channels), tile["channels"])
    blocks_c = max(triton.cdiv(channels, block_c), 1)
    norm_kind = NORMS[norm]
    weight = None if norm_weight is None else norm_weight.contiguous()
    bias = None if norm_bias is None else norm_bias.contiguous()
    alpha_high, alpha_low = split_float(alpha)
    eps_high, eps_low = split_float(norm_eps)
    runtime.launch(_row_kernel)[(batch * rows, blocks_c)](
        x, x if branch is None else branch, x if layer_scale is None else layer_scale.contiguous(),
        kept if indptr is None else indptr, kept if indices is None else indices, x if values is None else values,
        kept if token is None else token, leaver, kept, prop,
        x if token_scales is None else token_scales.contiguous(), x if weight is None else weight,
        x if bias is None else bias, out, normed, token_out, scales_out,
        tokens, channels, rows, num_kept, num_prop, num_prefix, origins, edges,
        *x.stride(), *(x if branch is None else branch).stride(), alpha_high, alpha_low, eps_high, eps_low,
        BRANCH=branch is not None, LAYER_SCALE=layer_scale is not None, GRAPH=graph, DIRECT=direct, MEAN=mean,
        SCALES=token_scales is not None, SCALES_WIDE=token_scales is not None and token_scales.dtype == torch.float64,
        NORM=norm_kind if blocks_c == 1 else 0, WEIGHT=weight is not None, BIAS=bias is not None, WIDE=wide,
        BLOCK_P=block_p, BLOCK_E=tile["edges"], BLOCK_C=block_c, num_warps=tile["num_warps"],
    )  # fmt: skip
    if norm_kind and blocks_c > 1:
        norm_long_rows(out, normed, weight, bias, norm_eps, norm)
    return out, normed, token_out, scales_out


def norm_long_rows(
    x: Tensor, normed: Tensor, weight: Tensor | None, bias: Tensor | None, norm_eps: float, norm: str
) -> None:
    """normed = norm(x) of contiguous rows [B, rows, C] that are too long for the kernel that made them."""
    batch, rows, channels = x.shape
    tile = configs.lookup("long_row", x.device, x.dtype)
    runtime.launch(_norm_kernel)[(batch * rows,)](
        x, x if weight is None else weight, x if bias is None else bias, normed, channels, *split_float(norm_eps),
        NORM=NORMS[norm], WEIGHT=weight is not None, BIAS=bias is not None,
        WIDE=compute_dtype(x.dtype) == torch.float64, BLOCK_C=tile["channels"], num_warps=tile["num_warps"],
    )  # fmt: skip


def _graph_arrays(
    indptr: Tensor | None, indices: Tensor | None, values: Tensor | None, token: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four graph arguments, contiguous; ``GraphProp`` always has them."""
    if indptr is None or indices is None or values is None or token is None:
        raise ValueError("indptr, indices, values and token must be given where standard is 'GraphProp'")
    return indptr.contiguous(), indices.contiguous(), values.contiguous(), token.contiguous()


def _leavers(token: Tensor, prop: Tensor, tokens: int, num_prefix: int, origins: int) -> Tensor:
    """int32 [B, n0]: the row of x of each original token that leaves, -1 for the others."""
    batch, num_prop = prop.shape
    leaver = token.new_empty(batch, origins, dtype=torch.int32)
    tile = configs.lookup("leaver", token.device, token.dtype)
    blocks = triton.cdiv(origins, tile["tokens"])
    if blocks:
        runtime.launch(_leaver_kernel)[(batch * blocks,)](
            token, prop, leaver, tokens, num_prop, num_prefix, origins, blocks,
            BLOCK_T=tile["tokens"], BLOCK_P=tile["leaving"], num_warps=tile["num_warps"],
        )  # fmt: skip
    return leaver


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
    """The operator ``propagate_backward``: the gradient of x [B, N, C] from that of the propagated x."""
    batch, _, channels = grad.shape
    num_kept, num_prop = index_kept.shape[1], index_prop.shape[1]
    tokens = num_prefix + num_kept + num_prop
    grad_x = grad.new_empty(batch, tokens, channels)
    if runtime.any_zero(batch, tokens, channels):
        return grad_x
    kept, prop = index_kept.contiguous(), index_prop.contiguous()
    graph = standard == "GraphProp" and num_prop > 0
    origins = edges = 0
    if graph:
        indptr, indices, values, token = _graph_arrays(indptr, indices, values, token)
        origins, edges = indptr.shape[1] - 1, indices.shape[1]
    wide = grad.dtype == torch.float64
    tile = configs.lookup("propagate_backward", grad.device, grad.dtype, channels=int(channels))
    block_c = row_block(int(channels), tile["channels"])
    runtime.launch(_backward_kernel)[(batch * tokens, triton.cdiv(channels, block_c))](
        grad, kept if indptr is None else indptr, kept if indices is None else indices,
        grad if values is None else values, kept if token is None else token, kept, prop, grad_x,
        tokens, channels, num_kept, num_prop, num_prefix, origins, edges, *grad.stride(), *split_float(alpha),
        GRAPH=graph, MEAN=standard == "Mean" and num_prop > 0, WIDE=wide,
        BLOCK_K=tile["kept"], BLOCK_E=tile["edges"], BLOCK_C=block_c, num_warps=tile["num_warps"],
    )  # fmt: skip
    return grad_x


def propagate_dense(
    x: Tensor,
    weight: Tensor,
    index_kept: Tensor,
    index_prop: Tensor,
    token_scales: Tensor | None,
    alpha: float,
    num_prefix: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``propagate_dense``: (x, weight, token_scales) of the rows that remain."""
    batch, tokens, channels = x.shape
    num_kept, num_prop = index_kept.shape[1], index_prop.shape[1]
    rows = num_prefix + num_kept
    out = x.new_empty(batch, rows, channels)
    weight_out = weight.new_empty(batch, num_kept, num_kept)
    scales_out = _library.absent(x, torch.float32) if token_scales is None else token_scales.new_empty(batch, rows)
    if runtime.any_zero(batch, rows):
        return out, weight_out, scales_out
    kept, prop = index_kept.contiguous(), index_prop.contiguous()
    wide = compute_dtype(x.dtype) == torch.float64
    tile = configs.lookup("dense", x.device, x.dtype)
    blocks = triton.cdiv(rows, tile["rows"])
    runtime.launch(_dense_kernel)[(batch * blocks, max(triton.cdiv(channels, tile["channels"]), 1))](
        x, weight, kept, prop, x if token_scales is None else token_scales.contiguous(), out, scales_out,
        tokens, channels, num_kept, num_prop, num_prefix, blocks, *x.stride(), *weight.stride(), *split_float(alpha),
        SCALES=token_scales is not None, SCALES_WIDE=token_scales is not None and token_scales.dtype == torch.float64,
        WIDE=wide, BLOCK_I=tile["rows"], BLOCK_C=tile["channels"], num_warps=tile["num_warps"],
    )  # fmt: skip
    if num_kept:
        tile = configs.lookup("weight", weight.device, weight.dtype, kept=int(num_kept))
        runtime.launch(_weight_kernel)[(batch * num_kept, triton.cdiv(num_kept, tile["columns"]))](
            weight, kept, weight_out, tokens, num_kept, num_prefix, *weight.stride(),
            BLOCK_K=tile["columns"], num_warps=tile["num_warps"],
        )  # fmt: skip
    return out, weight_out, scales_out
