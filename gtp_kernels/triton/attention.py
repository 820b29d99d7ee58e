"""Triton kernels of the attention that returns its scores, and of its gradients. No N × N map reaches global memory.

    x_ij = q_i · k_j · scale + log(size_j)
    A_ij = exp(x_ij − max_i) / Σ_j exp(x_ij − max_i),   A_ij = 0 where A_ij < T

Two forms. Up to 256 tokens one program takes one head, whose keys stay in cache, and everything is one launch. Beyond
that (and for float32, float64, large heads and the backward) the row maximum and 1 / sum are found first and every
later kernel recomputes A from them.

The threshold is the k-th smallest of the N² values, found exactly. The float bits of A (never negative) are ordered as
integers: a first histogram over a window of 8 octaves around 1 / N finds a range of an eighth of an octave, and
histograms of 1024 bins narrow it by 10 bits each, until the k-th smallest is the smallest of its bin: the lower edge of
that bin divides the values as the k-th smallest does. Every pass must see the same bits, so A is recomputed by
`_logits` and `_weights` alone: an explicit fused multiply-add, one subtraction, one exponential, one product, from row
statistics that are computed once and stored. Counts are integers, so that the order of the atomics does not show.
"""

from __future__ import annotations

import math
import struct
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gtp_kernels.reference.attention import compute_dtype, threshold_rank
from gtp_kernels.triton import runtime

_LOG2E = 1.4426950408889634
WINDOW_BINS = tl.constexpr(64)
BINS = tl.constexpr(1024)
BITS = tl.constexpr(10)


class Tiles(NamedTuple):
    """Sizes of a launch.

    Attributes:
        whole_rows: one program per head, all of it in one launch.
        rows, columns: the tile of the map; equal, so that the diagonal lies in diagonal tiles.
        num_warps, num_stages: Triton's launch options.
    """

    whole_rows: bool
    rows: int
    columns: int
    num_warps: int
    num_stages: int


def tiles(num_tokens: int, size: int, dtype: torch.dtype, *, backward: bool = False) -> Tiles:
    """The tile of a shape class: what compiles without spilling on sm_80."""
    dims = max(runtime.next_power_of_2(size), 16)
    half = dtype in (torch.float16, torch.bfloat16)
    if dtype == torch.float64:
        return Tiles(False, 16, 16, 4, 1)
    if backward and dims > (128 if half else 64):
        return Tiles(False, 16, 16, 4, 2)
    if not half:
        return Tiles(False, 32, 32, 4 if dims <= 64 and not backward else 8, 1)
    if not backward and num_tokens <= 256 and dims <= 64:
        return Tiles(True, 32, 32, 2, 2)
    return Tiles(False, 64, 64, 4 if dims <= 64 else 8, 2 if dims <= 128 else 1)


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """a @ b, accumulated in float32 (float64 for float64)."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    if a.dtype == tl.float64:
        return tl.dot(a, b, input_precision=PRECISION, out_dtype=tl.float64)
    else:
        return tl.dot(a, b, input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def _rows(p, o_row, o_dim, stride_row, stride_dim, N, D):
    """Rows of a matrix [N, D] of any strides; zero outside."""
    # [rows, BD]
    p_row = p + o_row.to(tl.int64)[:, None] * stride_row + o_dim.to(tl.int64)[None, :] * stride_dim
    return tl.load(p_row, mask=(o_row < N)[:, None] & (o_dim < D)[None, :], other=0.0)


@triton.jit
def _head(p, head, H, stride_batch, stride_head):
    """The matrix [N, D] of one image and head, of a tensor [B, H, N, D]."""
    return p + (head // H) * stride_batch + (head % H) * stride_head


@triton.jit
def _bias(p_size, o_col, stride, N, SIZES: tl.constexpr, DOUBLE: tl.constexpr):
    """log(size_j) in the base of the exponential; −inf beyond the last key, whose weight is then 0."""
    if DOUBLE:
        b_bias = tl.zeros(o_col.shape, tl.float64)
    else:
        b_bias = tl.zeros(o_col.shape, tl.float32)
    if SIZES:
        b_size = tl.load(p_size + o_col.to(tl.int64) * stride, mask=o_col < N, other=1.0)
        if DOUBLE:
            b_bias = tl.log(b_size)
        else:
            b_bias = tl.log2(b_size)
    return tl.where(o_col < N, b_bias, float("-inf"))


@triton.jit
def _logits(b_q, b_k, b_bias, scale, scale_low, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """x_ij, in base 2 for float32 (the factor log2(e) is in `scale` and `b_bias`), in base e for float64."""
    # [BM, BN]
    b_s = _dot(b_q, tl.trans(b_k), PRECISION, UPCAST)
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
def _weights(b_x, b_max, b_inv):
    """exp(x − max) and A = exp(x − max) · inv. A row whose logits are all −inf is NaN, as torch.softmax has it."""
    b_e = _exp(b_x - b_max[:, None])
    return b_e, b_e * b_inv[:, None]


@triton.jit
def _online(b_x, b_max, b_sum):
    """Takes a block of logits into the maximum and sum so far; also exp(old max − new max) and exp(x − new max)."""
    b_new = tl.maximum(b_max, tl.max(b_x, 1))
    # A row without a finite logit so far keeps the sum 0.
    b_finite = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_e = _exp(b_x - b_finite[:, None])
    b_decay = _exp(b_max - b_finite)
    return b_new, b_sum * b_decay + tl.sum(b_e, 1), b_decay, b_e


@triton.jit
def _key(b_p):
    """Integers ordered as the weights in [0, 1], NaN above 1."""
    if b_p.dtype == tl.float64:
        return tl.where(b_p == b_p, b_p.to(tl.int64, bitcast=True), 0x3FF0000000000001)
    else:
        return tl.where(b_p == b_p, b_p.to(tl.int32, bitcast=True), 0x3F800001)


@triton.jit
def _window(b_key, exponent, DOUBLE: tl.constexpr):
    """The bin of the first histogram: eighths of octaves from the biased 2^exponent, the rest in the end bins."""
    if DOUBLE:
        b_bin = ((b_key - (tl.cast(exponent, tl.int64) << 52)) >> 49) + 1
    else:
        b_bin = ((b_key - (tl.cast(exponent, tl.int32) << 23)) >> 20) + 1
    return tl.minimum(tl.maximum(b_bin, 0), WINDOW_BINS - 1).to(tl.int32)


@triton.jit
def _bin_of_rank(b_hist, rank, COUNT: tl.constexpr):
    """The bin of the rank-th smallest value, and its rank within that bin."""
    o_bin = tl.arange(0, COUNT)
    b_hist = b_hist.to(tl.int64)
    digit = tl.sum((tl.cumsum(b_hist, 0) < rank).to(tl.int32), 0)
    return digit, rank - tl.sum(tl.where(o_bin < digit, b_hist, 0), 0)


@triton.jit
def _narrow_window(b_hist, rank, exponent, DOUBLE: tl.constexpr):
    """(low, shift, rank) after the first histogram: lower edge, log2 of the next bins' width (−1: settled)."""
    digit, rank = _bin_of_rank(b_hist, tl.cast(rank, tl.int64), WINDOW_BINS)
    if DOUBLE:
        base, width, whole = tl.cast(exponent, tl.int64) << 52, 49, 62
        one = 0x3FF0000000000000
    else:
        base, width, whole = tl.cast(exponent, tl.int64) << 23, 20, 30
        one = 0x3F800000
    inner = (digit > 0) & (digit < WINDOW_BINS - 1)
    low = tl.where(digit > 0, base + ((digit - 1).to(tl.int64) << width), 0)
    high = tl.where(inner, low + (tl.full([], 1, tl.int64) << width), base)
    shift = tl.where(inner, width - BITS, whole - BITS)
    settled = (rank == 1) & (digit < WINDOW_BINS - 1) & (high <= one + 1)
    return low, tl.where(settled, -1, shift), rank


@triton.jit
def _narrow(b_hist, low, shift, rank, DOUBLE: tl.constexpr):
    """(low, shift, rank) after a further histogram, whose bins of width 2^shift begin at `low`; settled ranges stay."""
    if DOUBLE:
        one = 0x3FF0000000000000
    else:
        one = 0x3F800000
    width = tl.maximum(shift, 0)
    digit, rest = _bin_of_rank(b_hist, rank, BINS)
    edge = low + (digit.to(tl.int64) << width)
    # A bin that may hold NaN is settled only at width 1: no value but NaN itself may stand for a NaN threshold.
    settled = (width == 0) | ((rest == 1) & (edge + (tl.full([], 1, tl.int64) << width) <= one + 1))
    following = tl.where(settled, -1, tl.maximum(width - BITS, 0))
    active = shift >= 0
    return tl.where(active, edge, low), tl.where(active, following, -1), tl.where(active, rest, rank)


@triton.jit
def _threshold(low, DOUBLE: tl.constexpr):
    """T of a settled range; 0, which keeps every value, where the k-th smallest is NaN."""
    if DOUBLE:
        return tl.where(low > 0x3FF0000000000000, 0, low).to(tl.float64, bitcast=True)
    else:
        return tl.where(low > 0x3F800000, 0, low).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _add_to_bins(p_hist, b_key, m_valid, low, shift):
    """Counts the keys of the range from `low` into global bins of width 2^shift; few keys are left in it."""
    b_bin = (b_key - low.to(b_key.dtype)) >> shift.to(b_key.dtype)
    m_bin = m_valid & (b_bin >= 0) & (b_bin < BINS)
    b_one = tl.full(b_bin.shape, 1, p_hist.dtype.element_ty)
    tl.atomic_add(p_hist + tl.where(m_bin, b_bin, 0), b_one, mask=m_bin, sem="relaxed")


@triton.jit
def _row_statistics(
    b_q,
    p_k,
    p_size,
    o_dim,
    k_row,
    k_dim,
    size_row,
    N,
    D,
    scale,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SIZES: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """(max_i, 1 / Σ_j exp(x_ij − max_i)) of a block of rows, in float32."""
    b_max = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    for first in range(0, N, BN):
        o_col = first + tl.arange(0, BN)
        b_k = _rows(p_k, o_col, o_dim, k_row, k_dim, N, D)
        b_bias = _bias(p_size, o_col, size_row, N, SIZES, False)
        b_x = _logits(b_q, b_k, b_bias, scale, 0.0, PRECISION, UPCAST)
        b_max, b_sum, _decay, _e = _online(b_x, b_max, b_sum)
    return b_max, 1.0 / b_sum


@triton.jit
def _whole_rows_kernel(
    p_q,
    p_k,
    p_v,
    p_size,
    p_out,
    p_diag,
    p_colsum,
    p_cls,
    p_stats,
    p_hist,
    q_batch,
    q_head,
    q_row,
    q_dim,
    k_batch,
    k_head,
    k_row,
    k_dim,
    v_batch,
    v_head,
    v_row,
    v_dim,
    size_batch,
    size_row,
    H,
    N,
    D,
    scale,
    rank,
    exponent,
    BLOCKS: tl.constexpr,
    PASSES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    SIZES: tl.constexpr,
    RANKED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """out = A v, diag_j = A_jj, colsum_j = Σ_i A_ij, cls_row_j = A_0j of one image and head, N <= BLOCKS · BN.

    Reads q, k, v and writes out once (4·N·d values); k and v are read again from cache, per block of rows.
    FLOPs: 6·N²·d, and 2·N²·d per pass of the threshold (2 or 3 passes, 4 at most).
    """
    head = tl.program_id(0).to(tl.int64)
    p_q = _head(p_q, head, H, q_batch, q_head)
    p_k = _head(p_k, head, H, k_batch, k_head)
    p_v = _head(p_v, head, H, v_batch, v_head)
    p_size += (head // H) * size_batch
    o_dim = tl.arange(0, BD)
    threshold = 0.0
    if RANKED:
        p_stats += head * 2 * N
        # [64]
        b_hist = tl.zeros([WINDOW_BINS], tl.int32)
        for start in range(0, N, BM):
            o_row = start + tl.arange(0, BM)
            m_row = o_row < N
            b_q = _rows(p_q, o_row, o_dim, q_row, q_dim, N, D)
            b_max, b_inv = _row_statistics(
                b_q, p_k, p_size, o_dim, k_row, k_dim, size_row, N, D, scale, BM, BN, SIZES, PRECISION, UPCAST
            )
            tl.store(p_stats + o_row, b_max, mask=m_row)
            tl.store(p_stats + N + o_row, b_inv, mask=m_row)
            for first in range(0, N, BN):
                o_col = first + tl.arange(0, BN)
                b_k = _rows(p_k, o_col, o_dim, k_row, k_dim, N, D)
                b_bias = _bias(p_size, o_col, size_row, N, SIZES, False)
                b_x = _logits(b_q, b_k, b_bias, scale, 0.0, PRECISION, UPCAST)
                b_e, b_p = _weights(b_x, b_max, b_inv)
                b_bin = tl.reshape(_window(_key(b_p), exponent, False), [BM * BN], can_reorder=True)
                m_bin = tl.reshape(m_row[:, None] & (o_col < N)[None, :], [BM * BN], can_reorder=True)
                b_hist += tl.histogram(b_bin, WINDOW_BINS, mask=m_bin)
        low, shift, rest = _narrow_window(b_hist, rank, exponent, False)
        p_bins = p_hist + head * PASSES * BINS
        # The program's own stores and atomics are read back below.
        tl.debug_barrier()
        while shift >= 0:
            for start in range(0, N, BM):
                o_row = start + tl.arange(0, BM)
                m_row = o_row < N
                b_q = _rows(p_q, o_row, o_dim, q_row, q_dim, N, D)
                b_max = tl.load(p_stats + o_row, mask=m_row, other=0.0)
                b_inv = tl.load(p_stats + N + o_row, mask=m_row, other=0.0)
                for first in range(0, N, BN):
                    o_col = first + tl.arange(0, BN)
                    b_k = _rows(p_k, o_col, o_dim, k_row, k_dim, N, D)
                    b_bias = _bias(p_size, o_col, size_row, N, SIZES, False)
                    b_x = _logits(b_q, b_k, b_bias, scale, 0.0, PRECISION, UPCAST)
                    b_e, b_p = _weights(b_x, b_max, b_inv)
                    _add_to_bins(p_bins, _key(b_p), m_row[:, None] & (o_col < N)[None, :], low, shift)
            tl.debug_barrier()
            # [1024]
            b_bins = tl.load(p_bins + tl.arange(0, BINS), volatile=True)
            low, shift, rest = _narrow(b_bins, low, shift, rest, False)
            p_bins += BINS
        threshold = _threshold(low, False)

    p_out += (head // H) * N * H * D + (head % H) * D
    # [BLOCKS, BN]
    b_colsum = tl.zeros([BLOCKS, BN], tl.float32)
    o_block = tl.arange(0, BLOCKS)[:, None]
    for start in range(0, N, BM):
        o_row = start + tl.arange(0, BM)
        m_row = o_row < N
        b_q = _rows(p_q, o_row, o_dim, q_row, q_dim, N, D)
        if RANKED:
            b_max = tl.load(p_stats + o_row, mask=m_row, other=0.0)
            b_inv = tl.load(p_stats + N + o_row, mask=m_row, other=0.0)
        else:
            b_max, b_inv = _row_statistics(
                b_q, p_k, p_size, o_dim, k_row, k_dim, size_row, N, D, scale, BM, BN, SIZES, PRECISION, UPCAST
            )
        # [BM, BD]
        b_out = tl.zeros([BM, BD], tl.float32)
        for first in range(0, N, BN):
            o_col = first + tl.arange(0, BN)
            # [BM, BN]
            b_k = _rows(p_k, o_col, o_dim, k_row, k_dim, N, D)
            b_bias = _bias(p_size, o_col, size_row, N, SIZES, False)
            b_x = _logits(b_q, b_k, b_bias, scale, 0.0, PRECISION, UPCAST)
            b_e, b_p = _weights(b_x, b_max, b_inv)
            if RANKED:
                m_drop = b_p < threshold
                b_e = tl.where(m_drop, 0.0, b_e)
                b_p = tl.where(m_drop, 0.0, b_p)
            b_v = _rows(p_v, o_col, o_dim, v_row, v_dim, N, D)
            b_out += _dot(b_e.to(b_v.dtype), b_v, PRECISION, UPCAST)
            b_sum = tl.sum(tl.where(m_row[:, None], b_p, 0.0), 0)
            b_colsum += tl.where(o_block * BN == first, b_sum[None, :], 0.0)
            if start == first:
                m_diag = o_row[:, None] == o_col[None, :]
                tl.store(p_diag + head * N + o_row, tl.sum(tl.where(m_diag, b_p, 0.0), 1), mask=m_row)
            if start == 0:
                b_cls = tl.sum(tl.where((o_row == 0)[:, None], b_p, 0.0), 0)
                tl.store(p_cls + head * N + o_col, b_cls, mask=o_col < N)
        p_row = p_out + o_row.to(tl.int64)[:, None] * H * D + o_dim[None, :]
        b_out *= b_inv[:, None]
        tl.store(p_row, b_out.to(p_out.dtype.element_ty), mask=m_row[:, None] & (o_dim < D)[None, :])
    o_col = o_block * BN + tl.arange(0, BN)[None, :]
    tl.store(p_colsum + head * N + o_col, b_colsum, mask=o_col < N)


@triton.jit
def _stats_kernel(
    p_q,
    p_k,
    p_v,
    p_size,
    p_out,
    p_stats,
    q_batch,
    q_head,
    q_row,
    q_dim,
    k_batch,
    k_head,
    k_row,
    k_dim,
    v_batch,
    v_head,
    v_row,
    v_dim,
    size_batch,
    size_row,
    H,
    N,
    D,
    scale,
    scale_low,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    SIZES: tl.constexpr,
    DOUBLE: tl.constexpr,
    OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """stats = (max_i, 1 / Σ_j exp(x_ij − max_i)) of a block of rows; with OUT also out = A v, nothing dropped.

    Per program: q once, k (and v) once, from cache after the first program of a head. FLOPs: 2·BM·N·d, OUT 4·BM·N·d.
    """
    blocks = tl.cdiv(N, BM)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    o_row = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    m_row = o_row < N
    o_dim = tl.arange(0, BD)
    p_k = _head(p_k, head, H, k_batch, k_head)
    p_v = _head(p_v, head, H, v_batch, v_head)
    p_size += (head // H) * size_batch
    p_stats += head * 2 * N
    # [BM, BD]
    b_q = _rows(_head(p_q, head, H, q_batch, q_head), o_row, o_dim, q_row, q_dim, N, D)
    if DOUBLE:
        b_max = tl.full([BM], float("-inf"), tl.float64)
        b_sum = tl.zeros([BM], tl.float64)
        b_out = tl.zeros([BM, BD], tl.float64)
    else:
        b_max = tl.full([BM], float("-inf"), tl.float32)
        b_sum = tl.zeros([BM], tl.float32)
        b_out = tl.zeros([BM, BD], tl.float32)
    for start in range(0, N, BN):
        o_col = start + tl.arange(0, BN)
        b_k = _rows(p_k, o_col, o_dim, k_row, k_dim, N, D)
        b_bias = _bias(p_size, o_col, size_row, N, SIZES, DOUBLE)
        # [BM, BN]
        b_x = _logits(b_q, b_k, b_bias, scale, scale_low, PRECISION, UPCAST)
        b_max, b_sum, b_decay, b_e = _online(b_x, b_max, b_sum)
        if OUT:
            b_v = _rows(p_v, o_col, o_dim, v_row, v_dim, N, D)
            b_out = b_out * b_decay[:, None] + _dot(b_e.to(b_v.dtype), b_v, PRECISION, UPCAST)
    b_inv = 1.0 / b_sum
    tl.store(p_stats + o_row, b_max, mask=m_row)
    tl.store(p_stats + N + o_row, b_inv, mask=m_row)
    if OUT:
        p_row = p_out + (head // H) * N * H * D + (head % H) * D + o_row.to(tl.int64)[:, None] * H * D + o_dim[None, :]
        b_out *= b_inv[:, None]
        tl.store(p_row, b_out.to(p_out.dtype.element_ty), mask=m_row[:, None] & (o_dim < D)[None, :])


@triton.jit
def _range_after(p_window, p_hist, head, rank, exponent, PASSES: tl.constexpr, DOUBLE: tl.constexpr):
    """(low, shift, rank) that the window and the first PASSES histograms of a head leave."""
    b_hist = tl.load(p_window + head * WINDOW_BINS + tl.arange(0, WINDOW_BINS))
    low, shift, rest = _narrow_window(b_hist, rank, exponent, DOUBLE)
    for i in tl.static_range(PASSES):
        b_hist = tl.load(p_hist + i * BINS + tl.arange(0, BINS))
        low, shift, rest = _narrow(b_hist, low, shift, rest, DOUBLE)
    return low, shift, rest


@triton.jit
def _count_kernel(
    p_q,
    p_k,
    p_size,
    p_stats,
    p_window,
    p_hist,
    q_batch,
    q_head,
    q_row,
    q_dim,
    k_batch,
    k_head,
    k_row,
    k_dim,
    size_batch,
    size_row,
    H,
    N,
    D,
    scale,
    scale_low,
    rank,
    exponent,
    PASS: tl.constexpr,
    PASSES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    SIZES: tl.constexpr,
    DOUBLE: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """hist[bin(A_ij)] += 1 over a block of rows: PASS 0 fills the window, PASS p the p-th histogram.

    Per program: q once, k once. FLOPs: 2·BM·N·d; none where the earlier passes have settled the threshold.
    """
    blocks = tl.cdiv(N, BM)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    o_row = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    m_row = o_row < N
    o_dim = tl.arange(0, BD)
    p_k = _head(p_k, head, H, k_batch, k_head)
    p_size += (head // H) * size_batch
    p_stats += head * 2 * N
    p_hist += head * PASSES * BINS
    low, shift = tl.full([], 0, tl.int64), tl.full([], 0, tl.int32)
    if PASS > 0:
        low, shift, _rest = _range_after(p_window, p_hist, head, rank, exponent, PASS - 1, DOUBLE)
    if shift >= 0:
        b_q = _rows(_head(p_q, head, H, q_batch, q_head), o_row, o_dim, q_row, q_dim, N, D)
        b_max = tl.load(p_stats + o_row, mask=m_row, other=0.0)
        b_inv = tl.load(p_stats + N + o_row, mask=m_row, other=0.0)
        # [64]
        b_hist = tl.zeros([WINDOW_BINS], tl.int32)
        for start in range(0, N, BN):
            o_col = start + tl.arange(0, BN)
            b_k = _rows(p_k, o_col, o_dim, k_row, k_dim, N, D)
            b_bias = _bias(p_size, o_col, size_row, N, SIZES, DOUBLE)
            # [BM, BN]
            b_x = _logits(b_q, b_k, b_bias, scale, scale_low, PRECISION, UPCAST)
            _e, b_p = _weights(b_x, b_max, b_inv)
            m_valid = m_row[:, None] & (o_col < N)[None, :]
            if PASS == 0:
                b_bin = tl.reshape(_window(_key(b_p), exponent, DOUBLE), [BM * BN], can_reorder=True)
                m_bin = tl.reshape(m_valid, [BM * BN], can_reorder=True)
                b_hist += tl.histogram(b_bin, WINDOW_BINS, mask=m_bin)
            else:
                _add_to_bins(p_hist + (PASS - 1) * BINS, _key(b_p), m_valid, low, shift)
        if PASS == 0:
            p_bins = p_window + head * WINDOW_BINS + tl.arange(0, WINDOW_BINS)
            tl.atomic_add(p_bins, b_hist.to(p_window.dtype.element_ty), mask=b_hist > 0, sem="relaxed")


@triton.jit
def _threshold_kernel(p_window, p_hist, p_threshold, rank, exponent, PASSES: tl.constexpr, DOUBLE: tl.constexpr):
    """T of each image and head from its histograms: at most PASSES · 1024 counts read, one value written."""
    head = tl.program_id(0).to(tl.int64)
    p_hist += head * PASSES * BINS
    low, _shift, _rest = _range_after(p_window, p_hist, head, rank, exponent, PASSES, DOUBLE)
    tl.store(p_threshold + head, _threshold(low, DOUBLE))


@triton.jit
def _output_kernel(
    p_q,
    p_k,
    p_v,
    p_size,
    p_out,
    p_stats,
    p_threshold,
    q_batch,
    q_head,
    q_row,
    q_dim,
    k_batch,
    k_head,
    k_row,
    k_dim,
    v_batch,
    v_head,
    v_row,
    v_dim,
    size_batch,
    size_row,
    H,
    N,
    D,
    scale,
    scale_low,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    SIZES: tl.constexpr,
    DOUBLE: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """out_i = Σ_j A_ij v_j over the A_ij >= T, for a block of rows.

    Per program: q once, k and v once, out written. FLOPs: 4·BM·N·d.
    """
    blocks = tl.cdiv(N, BM)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    o_row = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    m_row = o_row < N
    o_dim = tl.arange(0, BD)
    p_k = _head(p_k, head, H, k_batch, k_head)
    p_v = _head(p_v, head, H, v_batch, v_head)
    p_size += (head // H) * size_batch
    p_stats += head * 2 * N
    threshold = tl.load(p_threshold + head)
    b_q = _rows(_head(p_q, head, H, q_batch, q_head), o_row, o_dim, q_row, q_dim, N, D)
    b_max = tl.load(p_stats + o_row, mask=m_row, other=0.0)
    b_inv = tl.load(p_stats + N + o_row, mask=m_row, other=0.0)
    # [BM, BD]
    if DOUBLE:
        b_out = tl.zeros([BM, BD], tl.float64)
    else:
        b_out = tl.zeros([BM, BD], tl.float32)
    for start in range(0, N, BN):
        o_col = start + tl.arange(0, BN)
        b_k = _rows(p_k, o_col, o_dim, k_row, k_dim, N, D)
        b_v = _rows(p_v, o_col, o_dim, v_row, v_dim, N, D)
        b_bias = _bias(p_size, o_col, size_row, N, SIZES, DOUBLE)
        # [BM, BN]
        b_x = _logits(b_q, b_k, b_bias, scale, scale_low, PRECISION, UPCAST)
        b_e, b_p = _weights(b_x, b_max, b_inv)
        b_e = tl.where(b_p < threshold, 0.0, b_e)
        b_out += _dot(b_e.to(b_v.dtype), b_v, PRECISION, UPCAST)
    p_row = p_out + (head // H) * N * H * D + (head % H) * D + o_row.to(tl.int64)[:, None] * H * D + o_dim[None, :]
    b_out *= b_inv[:, None]
    tl.store(p_row, b_out.to(p_out.dtype.element_ty), mask=m_row[:, None] & (o_dim < D)[None, :])


@triton.jit
def _scores_kernel(
    p_q,
    p_k,
    p_size,
    p_stats,
    p_threshold,
    p_diag,
    p_colsum,
    p_cls,
    q_batch,
    q_head,
    q_row,
    q_dim,
    k_batch,
    k_head,
    k_row,
    k_dim,
    size_batch,
    size_row,
    H,
    N,
    D,
    scale,
    scale_low,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    SIZES: tl.constexpr,
    RANKED: tl.constexpr,
    DOUBLE: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """diag_j = A_jj, colsum_j = Σ_i A_ij (rows in ascending blocks), cls_row_j = A_0j, for a block of keys.

    Per program: k once, q and the row statistics once. FLOPs: 2·N·BN·d.
    """
    blocks = tl.cdiv(N, BN)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    o_col = (tl.program_id(0) % blocks) * BN + tl.arange(0, BN)
    m_col = o_col < N
    o_dim = tl.arange(0, BD)
    p_q = _head(p_q, head, H, q_batch, q_head)
    p_stats += head * 2 * N
    b_k = _rows(_head(p_k, head, H, k_batch, k_head), o_col, o_dim, k_row, k_dim, N, D)
    b_bias = _bias(p_size + (head // H) * size_batch, o_col, size_row, N, SIZES, DOUBLE)
    # [BN]
    if DOUBLE:
        b_colsum = tl.zeros([BN], tl.float64)
    else:
        b_colsum = tl.zeros([BN], tl.float32)
    if RANKED:
        threshold = tl.load(p_threshold + head)
    for start in range(0, N, BM):
        o_row = start + tl.arange(0, BM)
        m_row = o_row < N
        b_q = _rows(p_q, o_row, o_dim, q_row, q_dim, N, D)
        b_max = tl.load(p_stats + o_row, mask=m_row, other=0.0)
        b_inv = tl.load(p_stats + N + o_row, mask=m_row, other=0.0)
        # [BM, BN]
        b_x = _logits(b_q, b_k, b_bias, scale, scale_low, PRECISION, UPCAST)
        _e, b_p = _weights(b_x, b_max, b_inv)
        if RANKED:
            b_p = tl.where(b_p < threshold, 0.0, b_p)
        b_colsum += tl.sum(tl.where(m_row[:, None], b_p, 0.0), 0)
        first = (tl.program_id(0) % blocks) * BN
        if start == first:
            m_diag = o_row[:, None] == o_col[None, :]
            tl.store(p_diag + head * N + o_row, tl.sum(tl.where(m_diag, b_p, 0.0), 1), mask=m_row)
        if start == 0:
            b_cls = tl.sum(tl.where((o_row == 0)[:, None], b_p, 0.0), 0)
            tl.store(p_cls + head * N + o_col, b_cls, mask=o_col < N)
    tl.store(p_colsum + head * N + o_col, b_colsum, mask=m_col)


@triton.jit
def _grad_q_kernel(
    p_grad,
    p_q,
    p_k,
    p_v,
    p_size,
    p_stats,
    p_threshold,
    p_delta,
    p_grad_q,
    g_batch,
    g_head,
    g_row,
    g_dim,
    q_batch,
    q_head,
    q_row,
    q_dim,
    k_batch,
    k_head,
    k_row,
    k_dim,
    v_batch,
    v_head,
    v_row,
    v_dim,
    size_batch,
    size_row,
    H,
    N,
    D,
    scale,
    scale_low,
    factor,
    factor_low,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    SIZES: tl.constexpr,
    RANKED: tl.constexpr,
    DOUBLE: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """dA = (dO vᵀ) ∘ M,  δ_i = Σ_j A_ij dA_ij,  dS = A ∘ (dA − δ),  dq = dS k · scale, for a block of rows.

    Per program: q and dO once, k and v twice. FLOPs: 10·BM·N·d.
    """
    blocks = tl.cdiv(N, BM)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    o_row = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    m_row = o_row < N
    o_dim = tl.arange(0, BD)
    p_k = _head(p_k, head, H, k_batch, k_head)
    p_v = _head(p_v, head, H, v_batch, v_head)
    p_size += (head // H) * size_batch
    p_stats += head * 2 * N
    b_q = _rows(_head(p_q, head, H, q_batch, q_head), o_row, o_dim, q_row, q_dim, N, D)
    b_grad = _rows(_head(p_grad, head, H, g_batch, g_head), o_row, o_dim, g_row, g_dim, N, D)
    b_max = tl.load(p_stats + o_row, mask=m_row, other=0.0)
    b_inv = tl.load(p_stats + N + o_row, mask=m_row, other=0.0)
    if RANKED:
        threshold = tl.load(p_threshold + head)
    if DOUBLE:
        b_delta = tl.zeros([BM], tl.float64)
        b_grad_q = tl.zeros([BM, BD], tl.float64)
    else:
        b_delta = tl.zeros([BM], tl.float32)
        b_grad_q = tl.zeros([BM, BD], tl.float32)
    for start in range(0, N, BN):
        o_col = start + tl.arange(0, BN)
        b_k = _rows(p_k, o_col, o_dim, k_row, k_dim, N, D)
        b_v = _rows(p_v, o_col, o_dim, v_row, v_dim, N, D)
        b_bias = _bias(p_size, o_col, size_row, N, SIZES, DOUBLE)
        # [BM, BN]
        b_x = _logits(b_q, b_k, b_bias, scale, scale_low, PRECISION, UPCAST)
        _e, b_p = _weights(b_x, b_max, b_inv)
        b_da = _dot(b_grad, tl.trans(b_v), PRECISION, UPCAST)
        if RANKED:
            b_da = tl.where(b_p < threshold, 0.0, b_da)
        b_delta += tl.sum(b_p * b_da, 1)
    tl.store(p_delta + head * N + o_row, b_delta, mask=m_row)
    for start in range(0, N, BN):
        o_col = start + tl.arange(0, BN)
        b_k = _rows(p_k, o_col, o_dim, k_row, k_dim, N, D)
        b_v = _rows(p_v, o_col, o_dim, v_row, v_dim, N, D)
        b_bias = _bias(p_size, o_col, size_row, N, SIZES, DOUBLE)
        b_x = _logits(b_q, b_k, b_bias, scale, scale_low, PRECISION, UPCAST)
        _e, b_p = _weights(b_x, b_max, b_inv)
        b_da = _dot(b_grad, tl.trans(b_v), PRECISION, UPCAST)
        if RANKED:
            b_da = tl.where(b_p < threshold, 0.0, b_da)
        b_ds = b_p * (b_da - b_delta[:, None])
        b_grad_q += _dot(b_ds.to(b_k.dtype), b_k, PRECISION, UPCAST)
    b_factor = tl.cast(factor, b_grad_q.dtype)
    if DOUBLE:
        b_factor += tl.cast(factor_low, tl.float64)
    p_row = p_grad_q + head * N * D + o_row.to(tl.int64)[:, None] * D + o_dim[None, :]
    b_grad_q = (b_grad_q * b_factor).to(p_grad_q.dtype.element_ty)
    tl.store(p_row, b_grad_q, mask=m_row[:, None] & (o_dim < D)[None, :])


@triton.jit
def _grad_kv_kernel(
    p_grad,
    p_q,
    p_k,
    p_v,
    p_size,
    p_stats,
    p_threshold,
    p_delta,
    p_grad_k,
    p_grad_v,
    g_batch,
    g_head,
    g_row,
    g_dim,
    q_batch,
    q_head,
    q_row,
    q_dim,
    k_batch,
    k_head,
    k_row,
    k_dim,
    v_batch,
    v_head,
    v_row,
    v_dim,
    size_batch,
    size_row,
    H,
    N,
    D,
    scale,
    scale_low,
    factor,
    factor_low,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    SIZES: tl.constexpr,
    RANKED: tl.constexpr,
    DOUBLE: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """dv = (A ∘ M)ᵀ dO,  dk = dSᵀ q · scale, for a block of keys; dS as in `_grad_q_kernel`, whose δ is read.

    Per program: k and v once, q and dO once. FLOPs: 8·N·BN·d.
    """
    blocks = tl.cdiv(N, BN)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    o_col = (tl.program_id(0) % blocks) * BN + tl.arange(0, BN)
    o_dim = tl.arange(0, BD)
    p_q = _head(p_q, head, H, q_batch, q_head)
    p_grad = _head(p_grad, head, H, g_batch, g_head)
    p_stats += head * 2 * N
    b_k = _rows(_head(p_k, head, H, k_batch, k_head), o_col, o_dim, k_row, k_dim, N, D)
    b_v = _rows(_head(p_v, head, H, v_batch, v_head), o_col, o_dim, v_row, v_dim, N, D)
    b_bias = _bias(p_size + (head // H) * size_batch, o_col, size_row, N, SIZES, DOUBLE)
    if RANKED:
        threshold = tl.load(p_threshold + head)
    # [BN, BD]
    if DOUBLE:
        b_grad_k = tl.zeros([BN, BD], tl.float64)
        b_grad_v = tl.zeros([BN, BD], tl.float64)
    else:
        b_grad_k = tl.zeros([BN, BD], tl.float32)
        b_grad_v = tl.zeros([BN, BD], tl.float32)
    for start in range(0, N, BM):
        o_row = start + tl.arange(0, BM)
        m_row = o_row < N
        b_q = _rows(p_q, o_row, o_dim, q_row, q_dim, N, D)
        b_grad = _rows(p_grad, o_row, o_dim, g_row, g_dim, N, D)
        b_max = tl.load(p_stats + o_row, mask=m_row, other=0.0)
        b_inv = tl.load(p_stats + N + o_row, mask=m_row, other=0.0)
        b_delta = tl.load(p_delta + head * N + o_row, mask=m_row, other=0.0)
        # [BM, BN]
        b_x = _logits(b_q, b_k, b_bias, scale, scale_low, PRECISION, UPCAST)
        _e, b_p = _weights(b_x, b_max, b_inv)
        b_p = tl.where(m_row[:, None], b_p, 0.0)
        b_da = _dot(b_grad, tl.trans(b_v), PRECISION, UPCAST)
        b_a = b_p
        if RANKED:
            m_drop = b_p < threshold
            b_a = tl.where(m_drop, 0.0, b_p)
            b_da = tl.where(m_drop, 0.0, b_da)
        b_grad_v += _dot(tl.trans(b_a.to(b_grad.dtype)), b_grad, PRECISION, UPCAST)
        b_ds = tl.where(m_row[:, None], b_p * (b_da - b_delta[:, None]), 0.0)
        b_grad_k += _dot(tl.trans(b_ds.to(b_q.dtype)), b_q, PRECISION, UPCAST)
    b_factor = tl.cast(factor, b_grad_k.dtype)
    if DOUBLE:
        b_factor += tl.cast(factor_low, tl.float64)
    o_out = head * N * D + o_col.to(tl.int64)[:, None] * D + o_dim[None, :]
    m_out = (o_col < N)[:, None] & (o_dim < D)[None, :]
    tl.store(p_grad_k + o_out, (b_grad_k * b_factor).to(p_grad_k.dtype.element_ty), mask=m_out)
    tl.store(p_grad_v + o_out, b_grad_v.to(p_grad_v.dtype.element_ty), mask=m_out)


class _Problem:
    """The arguments that the kernels of one call share."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        token_scales: Tensor | None,
        sparsity: float,
        scale: float,
        semantics: str,
        tile: Tiles,
    ) -> None:
        batch, self.heads, num_tokens, size = q.shape
        self.num_tokens, self.size = int(num_tokens), int(size)
        self.programs = batch * self.heads
        self.q, self.k, self.tile = q, k, tile
        self.dtype = compute_dtype(q.dtype)
        self.double = self.dtype == torch.float64
        self.rank = threshold_rank(self.num_tokens, sparsity, semantics)
        self.token_scales = q if token_scales is None else token_scales
        self.size_strides = (0, 0) if token_scales is None else token_scales.stride()
        # A Python float reaches a kernel as float32: double precision travels in two parts.
        self.factor = _split(scale)
        self.scale = self.factor if self.double else (scale * _LOG2E, 0.0)
        log2_tokens = (self.num_tokens - 1).bit_length()
        self.exponent = (1023 if self.double else 127) - log2_tokens - 5
        # After the window: 20 bits are left of float32 (49 of float64), or 30 (62) where it was missed.
        self.passes = 7 if self.double else 3
        self.constants: dict[str, Any] = {
            "BM": tile.rows,
            "BN": tile.columns,
            "BD": max(runtime.next_power_of_2(self.size), 16),
            "SIZES": token_scales is not None,
            "PRECISION": _precision(q.dtype),
            "UPCAST": runtime.INTERPRETED and q.dtype == torch.bfloat16,
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
        }
        if not tile.whole_rows:
            self.constants["DOUBLE"] = self.double

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.heads, self.num_tokens, self.size

    def row_grid(self) -> tuple[int]:
        return (self.programs * -(-self.num_tokens // self.tile.rows),)

    def column_grid(self) -> tuple[int]:
        return (self.programs * -(-self.num_tokens // self.tile.columns),)

    def stats(self) -> Tensor:
        """Room for the maximum and 1 / sum of every row."""
        return self.q.new_empty(self.programs, 2, self.num_tokens, dtype=self.dtype)

    def histograms(self, bins: int) -> Tensor:
        """Zeroed counts; 64-bit where one bin may have to count 2³¹ values."""
        dtype = torch.int64 if self.num_tokens**2 >= 2**31 else torch.int32
        return self.q.new_zeros(self.programs, bins, dtype=dtype)

    def row_statistics(self, v: Tensor | None, out: Tensor | None) -> Tensor:
        """The statistics of every row; with `out` also A v, where nothing is dropped."""
        stats = self.stats()
        value = self.k if v is None else v
        runtime.launch(_stats_kernel)[self.row_grid()](
            self.q,
            self.k,
            value,
            self.token_scales,
            self.q if out is None else out,
            stats,
            *self.q.stride(),
            *self.k.stride(),
            *value.stride(),
            *self.size_strides,
            *self.shape,
            *self.scale,
            OUT=out is not None,
            **self.constants,
        )
        return stats

    def thresholds(self, stats: Tensor) -> Tensor:
        """T of every image and head, exact."""
        window = self.histograms(WINDOW_BINS.value)
        hist = self.histograms(self.passes * BINS.value)
        for number in range(self.passes + 1):
            runtime.launch(_count_kernel)[self.row_grid()](
                self.q,
                self.k,
                self.token_scales,
                stats,
                window,
                hist,
                *self.q.stride(),
                *self.k.stride(),
                *self.size_strides,
                *self.shape,
                *self.scale,
                self.rank,
                self.exponent,
                PASS=number,
                PASSES=self.passes,
                **self.constants,
            )
        threshold = self.q.new_empty(self.programs, dtype=self.dtype)
        runtime.launch(_threshold_kernel)[(self.programs,)](
            window, hist, threshold, self.rank, self.exponent, PASSES=self.passes, DOUBLE=self.double, num_warps=4
        )
        return threshold


def _split(value: float) -> tuple[float, float]:
    """`value` as two float32 numbers whose sum it is, to 48 bits."""
    if not math.isfinite(value) or abs(value) > 3.4e38:
        return value, 0.0
    high = struct.unpack("f", struct.pack("f", value))[0]
    return high, value - high


def _precision(dtype: torch.dtype) -> str:
    """IEEE products, unless torch's own matmul may use TF32."""
    if dtype != torch.float32 or runtime.INTERPRETED or torch.version.hip is not None:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def attention_with_scores(
    q: Tensor, k: Tensor, v: Tensor, token_scales: Tensor | None, sparsity: float, scale: float, semantics: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launcher of the operator: out [B, H, N, d] (memory [B, N, H, d]); diag, colsum and cls_row [B, H, N]."""
    batch, heads, num_tokens, size = q.shape
    out = q.new_empty(batch, num_tokens, heads, size)
    diag, colsum, cls_row = (q.new_empty(batch, heads, num_tokens, dtype=compute_dtype(q.dtype)) for _ in range(3))
    result = out.transpose(1, 2), diag, colsum, cls_row
    if out.numel() == 0:
        return result
    tile = tiles(int(num_tokens), int(size), q.dtype)
    problem = _Problem(q, k, token_scales, sparsity, scale, semantics, tile)
    ranked = problem.rank > 0
    if tile.whole_rows:
        runtime.launch(_whole_rows_kernel)[(problem.programs,)](
            q,
            k,
            v,
            problem.token_scales,
            out,
            diag,
            colsum,
            cls_row,
            problem.stats() if ranked else diag,
            problem.histograms(problem.passes * BINS.value) if ranked else diag,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *problem.size_strides,
            *problem.shape,
            problem.scale[0],
            problem.rank,
            problem.exponent,
            BLOCKS=runtime.next_power_of_2(-(-problem.num_tokens // tile.columns)),
            PASSES=problem.passes,
            RANKED=ranked,
            **problem.constants,
        )
        return result
    stats = problem.row_statistics(v, None if ranked else out)
    threshold = problem.thresholds(stats) if ranked else stats
    if ranked:
        runtime.launch(_output_kernel)[problem.row_grid()](
            q,
            k,
            v,
            problem.token_scales,
            out,
            stats,
            threshold,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *problem.size_strides,
            *problem.shape,
            *problem.scale,
            **problem.constants,
        )
    runtime.launch(_scores_kernel)[problem.column_grid()](
        q,
        k,
        problem.token_scales,
        stats,
        threshold,
        diag,
        colsum,
        cls_row,
        *q.stride(),
        *k.stride(),
        *problem.size_strides,
        *problem.shape,
        *problem.scale,
        RANKED=ranked,
        **problem.constants,
    )
    return result


def attention_with_scores_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_scales: Tensor | None,
    sparsity: float,
    scale: float,
    semantics: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launcher of the operator: gradients of q, k and v, contiguous [B, H, N, d]. The map is recomputed."""
    grad_q, grad_k, grad_v = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    if grad_q.numel() == 0:
        return grad_q, grad_k, grad_v
    tile = tiles(int(q.shape[2]), int(q.shape[3]), q.dtype, backward=True)
    problem = _Problem(q, k, token_scales, sparsity, scale, semantics, tile)
    ranked = problem.rank > 0
    stats = problem.row_statistics(None, None)
    threshold = problem.thresholds(stats) if ranked else stats
    delta = q.new_empty(problem.programs, problem.num_tokens, dtype=problem.dtype)
    inputs = (grad_out, q, k, v, problem.token_scales, stats, threshold, delta)
    strides = (*grad_out.stride(), *q.stride(), *k.stride(), *v.stride(), *problem.size_strides)
    numbers = (*problem.shape, *problem.scale, *problem.factor)
    runtime.launch(_grad_q_kernel)[problem.row_grid()](
        *inputs, grad_q, *strides, *numbers, RANKED=ranked, **problem.constants
    )
    runtime.launch(_grad_kv_kernel)[problem.column_grid()](
        *inputs, grad_k, grad_v, *strides, *numbers, RANKED=ranked, **problem.constants
    )
    return grad_q, grad_k, grad_v
