"""The attention map, tile by tile: what every pass over it shares, so that every pass sees the same bits.

    x_ij = q_i · k_j · scale + log(size_j)
    A_ij = exp(x_ij − max_i) · inv_i,   inv_i = 1 / Σ_j exp(x_ij − max_i)

A is never stored. The row statistics are computed once; every pass then recomputes A by `product` and `weights` alone:
an explicit fused multiply-add, one subtraction, one exponential, one product.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot(a, b, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """a @ b, accumulated in float32 (float64 for float64)."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    if a.dtype == tl.float64:
        return tl.dot(a, b, input_precision=PRECISION, out_dtype=tl.float64)
    else:
        return tl.dot(a, b, input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def head_of(p, head, H, stride_batch, stride_head):
    """The matrix [N, D] of one image and head, of a tensor [B, H, N, D]."""
    return p + (head // H) * stride_batch + (head % H) * stride_head


@triton.jit
def load_rows(p, o_row, o_dim, stride_row, stride_dim, N, D):
    """[rows, BD] of a matrix [N, D] of any strides; zero outside."""
    p_row = p + o_row.to(tl.int64)[:, None] * stride_row + o_dim.to(tl.int64)[None, :] * stride_dim
    return tl.load(p_row, mask=(o_row < N)[:, None] & (o_dim < D)[None, :], other=0.0)


@triton.jit
def operand(p, o_row, o_dim, stride_row, stride_dim, N, D, CHUNK: tl.constexpr):
    """What `product` takes of a matrix [N, D]: the rows, [rows, BD]; or, where it multiplies CHUNK < BD dimensions at a
    time, pointers to them, [rows, 1] (beyond the last row: to the last)."""
    if CHUNK < o_dim.shape[0]:
        return p + tl.minimum(o_row, N - 1).to(tl.int64)[:, None] * stride_row
    else:
        return load_rows(p, o_row, o_dim, stride_row, stride_dim, N, D)


@triton.jit
def product(a, b, a_dim, b_dim, D, CHUNK: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """a @ bᵀ [rows of a, rows of b] of two operands. Products that are no tensor core's keep whole rows in registers:
    only with few dimensions at a time do they fit."""
    if a.dtype.is_ptr():
        ACC: tl.constexpr = tl.float64 if a.dtype.element_ty == tl.float64 else tl.float32
        b_total = tl.zeros([a.shape[0], b.shape[0]], ACC)
        for first in range(0, D, CHUNK):
            o_dim = (first + tl.arange(0, CHUNK))[None, :].to(tl.int64)
            b_a = tl.load(a + o_dim * a_dim, mask=o_dim < D, other=0.0)
            b_b = tl.load(b + o_dim * b_dim, mask=o_dim < D, other=0.0)
            b_total += dot(b_a, tl.trans(b_b), PRECISION, UPCAST)
        return b_total
    else:
        return dot(a, tl.trans(b), PRECISION, UPCAST)


@triton.jit
def load_sizes(p_size, o_col, size_row, N, SIZES: tl.constexpr, DOUBLE: tl.constexpr):
    """[BN] token scales; ones where there are none."""
    if SIZES:
        return tl.load(p_size + o_col.to(tl.int64) * size_row, mask=o_col < N, other=1.0)
    elif DOUBLE:
        return tl.full(o_col.shape, 1.0, tl.float64)
    else:
        return tl.full(o_col.shape, 1.0, tl.float32)


@triton.jit
def _logits(b_s, b_size, o_col, N, scale, scale_low, SIZES: tl.constexpr):
    """x_ij of the products s_ij, in base 2 for float32 (the factor log2(e) is in `scale`), in base e for float64; −inf
    beyond the last key, whose weight is then 0."""
    b_bias = tl.zeros(o_col.shape, b_s.dtype)
    if SIZES:
        if b_s.dtype == tl.float64:
            b_bias = tl.log(b_size)
        else:
            b_bias = tl.log2(b_size)
    b_bias = tl.where(o_col < N, b_bias, float("-inf"))
    factor = tl.cast(scale, b_s.dtype)
    if b_s.dtype == tl.float64:
        factor += tl.cast(scale_low, tl.float64)
    return tl.fma(b_s, tl.zeros_like(b_s) + factor, tl.zeros_like(b_s) + b_bias[None, :])


@triton.jit
def _exp(x):
    """The exponential in the base of `_logits`."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        return tl.exp2(x)


@triton.jit
def weights(b_s, b_size, o_col, b_max, b_inv, N, scale, scale_low, SIZES: tl.constexpr):
    """[BM, BN], twice: exp(x − max), and A, of the products s. A row whose logits are all −inf is NaN, as torch.softmax
    has it."""
    b_e = _exp(_logits(b_s, b_size, o_col, N, scale, scale_low, SIZES) - b_max[:, None])
    return b_e, b_e * b_inv[:, None]


@triton.jit
def map_tile(
    q, k, b_max, b_inv, o_col, p_size, q_dim, k_dim, size_row, N, D, scale, scale_low,
    CHUNK: tl.constexpr, SIZES: tl.constexpr, DOUBLE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """`weights` of two operands."""
    b_size = load_sizes(p_size, o_col, size_row, N, SIZES, DOUBLE)
    b_s = product(q, k, q_dim, k_dim, D, CHUNK, PRECISION, UPCAST)
    return weights(b_s, b_size, o_col, b_max, b_inv, N, scale, scale_low, SIZES)


@triton.jit
def row_statistics(
    q, p_k, p_v, p_size, o_dim, q_dim, k_row, k_dim, v_row, v_dim, size_row, N, D, scale, scale_low,
    OUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, CHUNK: tl.constexpr,
    SIZES: tl.constexpr, DOUBLE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """(max_i, inv_i) of a block of rows; with OUT also A v [BM, BD], nothing dropped (else unspecified)."""
    if DOUBLE:
        b_max = tl.full([BM], float("-inf"), tl.float64)
        b_sum = tl.zeros([BM], tl.float64)
        b_out = tl.zeros([BM, BD if OUT else 1], tl.float64)
    else:
        b_max = tl.full([BM], float("-inf"), tl.float32)
        b_sum = tl.zeros([BM], tl.float32)
        b_out = tl.zeros([BM, BD if OUT else 1], tl.float32)
    for first in range(0, N, BN):
        o_col = first + tl.arange(0, BN)
        k = operand(p_k, o_col, o_dim, k_row, k_dim, N, D, CHUNK)
        b_size = load_sizes(p_size, o_col, size_row, N, SIZES, DOUBLE)
        # [BM, BN]
        b_s = product(q, k, q_dim, k_dim, D, CHUNK, PRECISION, UPCAST)
        b_x = _logits(b_s, b_size, o_col, N, scale, scale_low, SIZES)
        b_new = tl.maximum(b_max, tl.max(b_x, 1))
        # A row without a finite logit so far keeps the sum 0.
        b_finite = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_e = _exp(b_x - b_finite[:, None])
        b_decay = _exp(b_max - b_finite)
        b_sum = b_sum * b_decay + tl.sum(b_e, 1)
        b_max = b_new
        if OUT:
            b_v = load_rows(p_v, o_col, o_dim, v_row, v_dim, N, D)
            b_out = b_out * b_decay[:, None] + dot(b_e.to(b_v.dtype), b_v, PRECISION, UPCAST)
    b_inv = 1.0 / b_sum
    if OUT:
        b_out *= b_inv[:, None]
    return b_max, b_inv, b_out
