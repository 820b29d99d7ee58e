"""Triton kernels of the attention that returns its scores. No N × N map reaches global memory.

    A = softmax(q kᵀ · scale + log(size)),   A_ij = 0 where A_ij < T      (`attention_map`, `attention_threshold`)
    out = A v,   diag_j = A_jj,   colsum_j = Σ_i A_ij,   cls_row_j = A_0j

Two forms. Up to 256 tokens one program takes one head, whose keys and values stay in cache: one launch, or with a
threshold three: the threshold, the search where it is needed, and the rest. Beyond that (and for other types and head
sizes) programs share a head: the row statistics; a sample of the map, twice; the candidates; the threshold among them,
or, where they do not hold it, by a search; the output; the scores. Without a threshold the statistics and the output
are one kernel.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gtp_kernels.reference.attention import compute_dtype, threshold_rank
from gtp_kernels.triton import configs, runtime
from gtp_kernels.triton.attention_map import dot, head_of, load_rows, map_tile, operand, row_statistics
from gtp_kernels.triton.attention_threshold import (
    BINS,
    bracket,
    collect_rows,
    fine_range,
    sample_coarsely,
    sample_rows,
    search_map,
    threshold_among,
)

_LOG2E = 1.4426950408889634
# Of each head: two histograms, and the counts of keys below and in the bracket.
_COUNTS = tl.constexpr(2 * 64 + 2)


@triton.jit
def _head_threshold_kernel(
    p_q, p_k, p_size, p_stats, p_candidates, p_threshold,
    q_batch, q_head, q_row, q_dim, k_batch, k_head, k_row, k_dim, size_batch, size_row,
    H, N, D, scale, scale_low, rank, room,
    SAMPLE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, CHUNK: tl.constexpr,
    SIZES: tl.constexpr, DOUBLE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """stats and T of one image and head, from both samples and the candidates; −1 where they do not hold T.

    Per program: q and k, again from cache for every pass. FLOPs: (4 + 4 / SAMPLE)·N²·d.
    """
    head = tl.program_id(0).to(tl.int64)
    p_q = head_of(p_q, head, H, q_batch, q_head)
    p_k = head_of(p_k, head, H, k_batch, k_head)
    p_size += (head // H) * size_batch
    o_dim = tl.arange(0, BD)
    p_stats += head * 2 * N
    p_candidates += head * (room + 4)
    # [BINS]
    b_coarse = tl.zeros([BINS], tl.int64)
    for start in range(0, N, BM):
        o_row = start + tl.arange(0, BM)
        m_row = o_row < N
        q = operand(p_q, o_row, o_dim, q_row, q_dim, N, D, CHUNK)
        b_max, b_inv, _out = row_statistics(
            q, p_k, p_k, p_size, o_dim, q_dim, k_row, k_dim, k_row, k_dim, size_row, N, D, scale, 0.0,
            False, BM, BN, BD, CHUNK, SIZES, False, PRECISION, UPCAST,
        )  # fmt: skip
        tl.store(p_stats + o_row, b_max, mask=m_row)
        tl.store(p_stats + N + o_row, b_inv, mask=m_row)
        b_coarse += sample_coarsely(
            q, b_max, b_inv, m_row, start // BM, p_k, p_size, o_dim, q_dim, k_row, k_dim, size_row, N, D, scale,
            SAMPLE, BM, BN, CHUNK, SIZES, PRECISION, UPCAST,
        )  # fmt: skip
    tl.debug_barrier()
    edge, shift = fine_range(b_coarse, rank, N, SAMPLE)
    b_fine = tl.zeros([BINS], tl.int64)
    for start in range(0, N, BM):
        o_row = start + tl.arange(0, BM)
        m_row = o_row < N
        q = operand(p_q, o_row, o_dim, q_row, q_dim, N, D, CHUNK)
        b_max = tl.load(p_stats + o_row, mask=m_row, other=0.0)
        b_inv = tl.load(p_stats + N + o_row, mask=m_row, other=0.0)
        b_fine += sample_rows(
            q, b_max, b_inv, m_row, start // BM, edge, shift, p_k, p_size, o_dim, q_dim, k_row, k_dim, size_row,
            N, D, scale, SAMPLE, BM, BN, CHUNK, SIZES, PRECISION, UPCAST,
        )  # fmt: skip
    low, high = bracket(b_coarse, b_fine, rank, N, SAMPLE)
    # What decides where keys are stored comes from loads: see `collect_rows`.
    p_scratch = p_candidates + room
    tl.store(p_scratch, low)
    tl.store(p_scratch + 1, high)
    tl.debug_barrier()
    low, high = tl.load(p_scratch), tl.load(p_scratch + 1)
    below, count = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    for start in range(0, N, BM):
        o_row = start + tl.arange(0, BM)
        m_row = o_row < N
        p_row = p_q + tl.minimum(o_row, N - 1).to(tl.int64)[:, None] * q_row
        if CHUNK < BD:
            q = p_row
        else:
            o_part = o_dim.to(tl.int64)[None, :]
            q = tl.load(p_row + o_part * q_dim, mask=m_row[:, None] & (o_part < D), other=0.0)
        b_max = tl.load(p_stats + o_row, mask=m_row, other=0.0)
        b_inv = tl.load(p_stats + N + o_row, mask=m_row, other=0.0)
        below, count = collect_rows(
            q, b_max, b_inv, m_row, low, high, p_candidates, p_candidates, below, count,
            p_k, p_size, o_dim, q_dim, k_row, k_dim, size_row, N, D, scale, room,
            False, BM, BN, CHUNK, SIZES, PRECISION, UPCAST,
        )  # fmt: skip
        tl.store(p_scratch + 2, below)
        tl.store(p_scratch + 3, count)
        tl.debug_barrier()
        below, count = tl.load(p_scratch + 2), tl.load(p_scratch + 3)
        tl.debug_barrier()
    tl.store(p_threshold + head, threshold_among(p_candidates, below, count, low, high, room, rank))


@triton.jit
def _whole_head_kernel(
    p_q, p_k, p_v, p_size, p_out, p_stats, p_threshold, p_diag, p_colsum, p_cls,
    q_batch, q_head, q_row, q_dim, k_batch, k_head, k_row, k_dim, v_batch, v_head, v_row, v_dim, size_batch, size_row,
    H, N, D, scale, scale_low,
    BLOCKS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    CHUNK: tl.constexpr, SIZES: tl.constexpr, RANKED: tl.constexpr, DOUBLE: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out, diag, colsum and cls_row of one image and head, N <= BLOCKS · BN; with RANKED of the A_ij >= T.

    Reads q, k, v and writes out once (4·N·d values); k and v are read again from cache, per block of rows.
    FLOPs: 4·N²·d, and 2·N²·d for the row statistics where RANKED does not give them.
    """
    head = tl.program_id(0).to(tl.int64)
    p_q = head_of(p_q, head, H, q_batch, q_head)
    p_k = head_of(p_k, head, H, k_batch, k_head)
    p_v = head_of(p_v, head, H, v_batch, v_head)
    p_size += (head // H) * size_batch
    o_dim = tl.arange(0, BD)
    if RANKED:
        p_stats += head * 2 * N
        threshold = tl.load(p_threshold + head)
    p_out += (head // H) * N * H * D + (head % H) * D
    # [BLOCKS, BN]
    b_colsum = tl.zeros([BLOCKS, BN], tl.float32)
    o_block = tl.arange(0, BLOCKS)[:, None]
    for start in range(0, N, BM):
        o_row = start + tl.arange(0, BM)
        m_row = o_row < N
        q = operand(p_q, o_row, o_dim, q_row, q_dim, N, D, CHUNK)
        if RANKED:
            b_max = tl.load(p_stats + o_row, mask=m_row, other=0.0)
            b_inv = tl.load(p_stats + N + o_row, mask=m_row, other=0.0)
        else:
            b_max, b_inv, _out = row_statistics(
                q, p_k, p_v, p_size, o_dim, q_dim, k_row, k_dim, v_row, v_dim, size_row, N, D, scale, 0.0,
                False, BM, BN, BD, CHUNK, SIZES, False, PRECISION, UPCAST,
            )  # fmt: skip
        # [BM, BD]
        b_out = tl.zeros([BM, BD], tl.float32)
        for first in range(0, N, BN):
            o_col = first + tl.arange(0, BN)
            k = operand(p_k, o_col, o_dim, k_row, k_dim, N, D, CHUNK)
            # [BM, BN]
            b_e, b_p = map_tile(
                q, k, b_max, b_inv, o_col, p_size, q_dim, k_dim, size_row, N, D, scale, 0.0,
                CHUNK, SIZES, False, PRECISION, UPCAST,
            )  # fmt: skip
            if RANKED:
                m_drop = b_p < threshold
                b_e = tl.where(m_drop, 0.0, b_e)
                b_p = tl.where(m_drop, 0.0, b_p)
            b_v = load_rows(p_v, o_col, o_dim, v_row, v_dim, N, D)
            b_out += dot(b_e.to(b_v.dtype), b_v, PRECISION, UPCAST)
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
    p_q, p_k, p_v, p_size, p_out, p_stats,
    q_batch, q_head, q_row, q_dim, k_batch, k_head, k_row, k_dim, v_batch, v_head, v_row, v_dim, size_batch, size_row,
    H, N, D, scale, scale_low,
    OUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, CHUNK: tl.constexpr,
    SIZES: tl.constexpr, DOUBLE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """stats = (max_i, 1 / Σ_j exp(x_ij − max_i)) of a block of rows; with OUT also out = A v, nothing dropped.

    Per program: q once, k (and v) once, from cache after the first program of a head. FLOPs: 2·BM·N·d, twice that with
    OUT.
    """
    blocks = tl.cdiv(N, BM)
    block = tl.program_id(0) % blocks
    head = (tl.program_id(0) // blocks).to(tl.int64)
    o_row = block * BM + tl.arange(0, BM)
    m_row = o_row < N
    o_dim = tl.arange(0, BD)
    p_k = head_of(p_k, head, H, k_batch, k_head)
    p_v = head_of(p_v, head, H, v_batch, v_head)
    p_size += (head // H) * size_batch
    p_stats += head * 2 * N
    # [BM, BD]
    q = operand(head_of(p_q, head, H, q_batch, q_head), o_row, o_dim, q_row, q_dim, N, D, CHUNK)
    b_max, b_inv, b_out = row_statistics(
        q, p_k, p_v, p_size, o_dim, q_dim, k_row, k_dim, v_row, v_dim, size_row, N, D, scale, scale_low,
        OUT, BM, BN, BD, CHUNK, SIZES, DOUBLE, PRECISION, UPCAST,
    )  # fmt: skip
    tl.store(p_stats + o_row, b_max, mask=m_row)
    tl.store(p_stats + N + o_row, b_inv, mask=m_row)
    if OUT:
        p_row = p_out + (head // H) * N * H * D + (head % H) * D + o_row.to(tl.int64)[:, None] * H * D + o_dim[None, :]
        tl.store(p_row, b_out.to(p_out.dtype.element_ty), mask=m_row[:, None] & (o_dim < D)[None, :])


@triton.jit
def _bracket_kernel(
    p_q, p_k, p_size, p_stats, p_counts, p_candidates,
    q_batch, q_head, q_row, q_dim, k_batch, k_head, k_row, k_dim, size_batch, size_row,
    H, N, D, scale, scale_low, rank, room,
    STEP: tl.constexpr, SAMPLE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, CHUNK: tl.constexpr,
    SIZES: tl.constexpr, DOUBLE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Of a block of rows: the first histogram (STEP 0), the second (1), the keys below and in the bracket (2).

    Per program: q once, k once (one row in SAMPLE for a histogram). FLOPs: 2·BM·N·d, 1 / SAMPLE of it.
    """
    blocks = tl.cdiv(N, BM)
    block = tl.program_id(0) % blocks
    head = (tl.program_id(0) // blocks).to(tl.int64)
    o_row = block * BM + tl.arange(0, BM)
    m_row = o_row < N
    o_dim = tl.arange(0, BD)
    p_k = head_of(p_k, head, H, k_batch, k_head)
    p_size += (head // H) * size_batch
    p_stats += head * 2 * N
    p_counts += head * _COUNTS
    # See `collect_rows`.
    p_row = head_of(p_q, head, H, q_batch, q_head) + tl.minimum(o_row, N - 1).to(tl.int64)[:, None] * q_row
    if CHUNK < BD:
        q = p_row
    else:
        o_part = o_dim.to(tl.int64)[None, :]
        q = tl.load(p_row + o_part * q_dim, mask=m_row[:, None] & (o_part < D), other=0.0)
    b_max = tl.load(p_stats + o_row, mask=m_row, other=0.0)
    b_inv = tl.load(p_stats + N + o_row, mask=m_row, other=0.0)
    p_bin = p_counts + tl.arange(0, BINS)
    if STEP == 0:
        b_hist = sample_coarsely(
            q, b_max, b_inv, m_row, block, p_k, p_size, o_dim, q_dim, k_row, k_dim, size_row, N, D, scale,
            SAMPLE, BM, BN, CHUNK, SIZES, PRECISION, UPCAST,
        )  # fmt: skip
        tl.atomic_add(p_bin, b_hist.to(tl.int64), mask=b_hist > 0, sem="relaxed")
    elif STEP == 1:
        edge, shift = fine_range(tl.load(p_bin), rank, N, SAMPLE)
        b_hist = sample_rows(
            q, b_max, b_inv, m_row, block, edge, shift, p_k, p_size, o_dim, q_dim, k_row, k_dim, size_row, N, D, scale,
            SAMPLE, BM, BN, CHUNK, SIZES, PRECISION, UPCAST,
        )  # fmt: skip
        tl.atomic_add(p_bin + BINS, b_hist.to(tl.int64), mask=b_hist > 0, sem="relaxed")
    else:
        low, high = bracket(tl.load(p_bin), tl.load(p_bin + BINS), rank, N, SAMPLE)
        below, _count = collect_rows(
            q, b_max, b_inv, m_row, low, high, p_candidates + head * (room + 4), p_counts + 2 * BINS + 1,
            tl.full([], 0, tl.int32), tl.full([], 0, tl.int32),
            p_k, p_size, o_dim, q_dim, k_row, k_dim, size_row, N, D, scale, room,
            True, BM, BN, CHUNK, SIZES, PRECISION, UPCAST,
        )  # fmt: skip
        tl.atomic_add(p_counts + 2 * BINS, below.to(tl.int64), sem="relaxed")


@triton.jit
def _select_kernel(p_counts, p_candidates, p_threshold, N, rank, room, SAMPLE: tl.constexpr):
    """T of one image and head, among its candidates, which are read up to 4 times; −1 where they do not hold it."""
    head = tl.program_id(0).to(tl.int64)
    p_counts += head * _COUNTS
    p_bin = p_counts + tl.arange(0, BINS)
    low, high = bracket(tl.load(p_bin), tl.load(p_bin + BINS), rank, N, SAMPLE)
    below, count = tl.load(p_counts + 2 * BINS), tl.load(p_counts + 2 * BINS + 1)
    tl.store(p_threshold + head, threshold_among(p_candidates + head * (room + 4), below, count, low, high, room, rank))


@triton.jit
def _search_kernel(
    p_q, p_k, p_size, p_stats, p_threshold,
    q_batch, q_head, q_row, q_dim, k_batch, k_head, k_row, k_dim, size_batch, size_row,
    H, N, D, scale, scale_low, rank,
    SELECTED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, CHUNK: tl.constexpr,
    SIZES: tl.constexpr, DOUBLE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """T of one image and head by radix passes over its map, where it is not SELECTED already.

    10·N²·d FLOPs, 22 in float64; none where there is a threshold.
    """
    head = tl.program_id(0).to(tl.int64)
    known = -1.0
    if SELECTED:
        known = tl.load(p_threshold + head)
    if known < 0.0:
        threshold = search_map(
            head_of(p_q, head, H, q_batch, q_head), head_of(p_k, head, H, k_batch, k_head),
            p_size + (head // H) * size_batch, p_stats + head * 2 * N, tl.arange(0, BD), q_row, q_dim, k_row, k_dim,
            size_row, N, D, scale, scale_low, rank, BM, BN, CHUNK, SIZES, DOUBLE, PRECISION, UPCAST,
        )  # fmt: skip
        tl.store(p_threshold + head, threshold)


@triton.jit
def _output_kernel(
    p_q, p_k, p_v, p_size, p_out, p_stats, p_threshold,
    q_batch, q_head, q_row, q_dim, k_batch, k_head, k_row, k_dim, v_batch, v_head, v_row, v_dim, size_batch, size_row,
    H, N, D, scale, scale_low,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, CHUNK: tl.constexpr,
    SIZES: tl.constexpr, DOUBLE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out_i = Σ_j A_ij v_j over the A_ij >= T, for a block of rows.

    Per program: q once, k and v once, out written. FLOPs: 4·BM·N·d.
    """
    blocks = tl.cdiv(N, BM)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    o_row = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    m_row = o_row < N
    o_dim = tl.arange(0, BD)
    p_k = head_of(p_k, head, H, k_batch, k_head)
    p_v = head_of(p_v, head, H, v_batch, v_head)
    p_size += (head // H) * size_batch
    p_stats += head * 2 * N
    threshold = tl.load(p_threshold + head)
    q = operand(head_of(p_q, head, H, q_batch, q_head), o_row, o_dim, q_row, q_dim, N, D, CHUNK)
    b_max = tl.load(p_stats + o_row, mask=m_row, other=0.0)
    b_inv = tl.load(p_stats + N + o_row, mask=m_row, other=0.0)
    # [BM, BD]
    if DOUBLE:
        b_out = tl.zeros([BM, BD], tl.float64)
    else:
        b_out = tl.zeros([BM, BD], tl.float32)
    for start in range(0, N, BN):
        o_col = start + tl.arange(0, BN)
        k = operand(p_k, o_col, o_dim, k_row, k_dim, N, D, CHUNK)
        b_v = load_rows(p_v, o_col, o_dim, v_row, v_dim, N, D)
        # [BM, BN]
        b_e, b_p = map_tile(
            q, k, b_max, b_inv, o_col, p_size, q_dim, k_dim, size_row, N, D, scale, scale_low,
            CHUNK, SIZES, DOUBLE, PRECISION, UPCAST,
        )  # fmt: skip
        b_e = tl.where(b_p < threshold, 0.0, b_e)
        b_out += dot(b_e.to(b_v.dtype), b_v, PRECISION, UPCAST)
    p_row = p_out + (head // H) * N * H * D + (head % H) * D + o_row.to(tl.int64)[:, None] * H * D + o_dim[None, :]
    b_out *= b_inv[:, None]
    tl.store(p_row, b_out.to(p_out.dtype.element_ty), mask=m_row[:, None] & (o_dim < D)[None, :])


@triton.jit
def _scores_kernel(
    p_q, p_k, p_size, p_stats, p_threshold, p_diag, p_colsum, p_cls,
    q_batch, q_head, q_row, q_dim, k_batch, k_head, k_row, k_dim, size_batch, size_row,
    H, N, D, scale, scale_low,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, CHUNK: tl.constexpr,
    SIZES: tl.constexpr, RANKED: tl.constexpr, DOUBLE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """diag_j = A_jj, colsum_j = Σ_i A_ij (rows in ascending blocks), cls_row_j = A_0j, for a block of keys.

    Per program: k once, q and the row statistics once. FLOPs: 2·N·BN·d.
    """
    blocks = tl.cdiv(N, BN)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks) * BN
    o_col = first + tl.arange(0, BN)
    o_dim = tl.arange(0, BD)
    p_q = head_of(p_q, head, H, q_batch, q_head)
    p_size += (head // H) * size_batch
    p_stats += head * 2 * N
    k = operand(head_of(p_k, head, H, k_batch, k_head), o_col, o_dim, k_row, k_dim, N, D, CHUNK)
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
        q = operand(p_q, o_row, o_dim, q_row, q_dim, N, D, CHUNK)
        b_max = tl.load(p_stats + o_row, mask=m_row, other=0.0)
        b_inv = tl.load(p_stats + N + o_row, mask=m_row, other=0.0)
        # [BM, BN]
        _e, b_p = map_tile(
            q, k, b_max, b_inv, o_col, p_size, q_dim, k_dim, size_row, N, D, scale, scale_low,
            CHUNK, SIZES, DOUBLE, PRECISION, UPCAST,
        )  # fmt: skip
        if RANKED:
            b_p = tl.where(b_p < threshold, 0.0, b_p)
        b_colsum += tl.sum(tl.where(m_row[:, None], b_p, 0.0), 0)
        if start == first:
            m_diag = o_row[:, None] == o_col[None, :]
            tl.store(p_diag + head * N + o_row, tl.sum(tl.where(m_diag, b_p, 0.0), 1), mask=m_row)
        if start == 0:
            b_cls = tl.sum(tl.where((o_row == 0)[:, None], b_p, 0.0), 0)
            tl.store(p_cls + head * N + o_col, b_cls, mask=o_col < N)
    tl.store(p_colsum + head * N + o_col, b_colsum, mask=o_col < N)


class Problem:
    """One call: its tile, and the arguments that its kernels share.

    The tile (``configs``): ``rows``, of a block of the map, and as many columns; ``chunk``, how many dimensions a
    product of rows takes at a time (0: all); ``sample``, of how many columns one is sampled for the bracket (0: none
    is sampled, the threshold is searched by radix passes); ``candidates``, how many keys of the bracket there is room
    for, per token; ``num_warps`` and ``num_stages``; ``search_warps``, of the radix passes; and in the backward
    ``part``, how many dimensions of the gradients one program computes (0: all).
    """

    def __init__(
        self,
        choice: str,
        q: Tensor,
        k: Tensor,
        token_scales: Tensor | None,
        sparsity: float,
        scale: float,
        semantics: str,
    ) -> None:
        batch, self.heads, num_tokens, size = q.shape
        self.num_tokens, self.size = int(num_tokens), int(size)
        self.programs = batch * self.heads
        self.q, self.k = q, k
        self.tile = configs.lookup(choice, q.device, q.dtype, tokens=self.num_tokens, size=self.size)
        self.dtype = compute_dtype(q.dtype)
        self.rank = threshold_rank(self.num_tokens, sparsity, semantics)
        self.room = self.tile["candidates"] * self.num_tokens
        self.token_scales = q if token_scales is None else token_scales
        self.size_strides = (0, 0) if token_scales is None else token_scales.stride()
        # A Python float reaches a kernel as float32: double precision travels in two parts.
        double = self.dtype == torch.float64
        self.factor = _split(scale)
        self.scale = self.factor if double else (scale * _LOG2E, 0.0)
        block = max(runtime.next_power_of_2(self.size), 16)
        self.constants: dict[str, Any] = {
            "BM": self.tile["rows"],
            "BN": self.tile["rows"],  # equal, so that the diagonal lies in diagonal tiles
            "BD": block,
            "CHUNK": min(self.tile["chunk"] or block, block),
            "SIZES": token_scales is not None,
            "DOUBLE": double,
            "PRECISION": _precision(q.dtype),
            "UPCAST": runtime.INTERPRETED and q.dtype == torch.bfloat16,
            "num_warps": self.tile["num_warps"],
            "num_stages": self.tile["num_stages"],
        }

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.heads, self.num_tokens, self.size

    @property
    def grid(self) -> tuple[int]:
        """A program for each block of rows, or of columns, of each head."""
        return (self.programs * -(-self.num_tokens // self.tile["rows"]),)

    def stats(self) -> Tensor:
        """Room for the maximum and 1 / sum of every row."""
        return self.q.new_empty(self.programs, 2, self.num_tokens, dtype=self.dtype)

    def candidates(self) -> Tensor:
        """Room for the keys that the bracket of each head holds, and for four numbers."""
        return self.q.new_empty(self.programs, self.room + 4, dtype=torch.int32)

    def statistics(self, v: Tensor | None, out: Tensor | None) -> tuple[Tensor, Tensor]:
        """The statistics of every row and, where there is one, the threshold of every head; with ``out`` also A v,
        where nothing is dropped."""
        stats = self.stats()
        value = self.k if v is None else v
        runtime.launch(_stats_kernel)[self.grid](
            self.q, self.k, value, self.token_scales, self.q if out is None else out, stats,
            *self.q.stride(), *self.k.stride(), *value.stride(), *self.size_strides, *self.shape, *self.scale,
            OUT=out is not None, **self.constants,
        )  # fmt: skip
        if not self.rank:
            return stats, stats
        threshold = self.q.new_empty(self.programs, dtype=self.dtype)
        sample = self.tile["sample"]
        counts = self.q.new_zeros(self.programs, _COUNTS.value, dtype=torch.int64) if sample else stats
        candidates = self.candidates() if sample else stats
        strides = (*self.q.stride(), *self.k.stride(), *self.size_strides)
        for step in range(3 if sample else 0):
            runtime.launch(_bracket_kernel)[self.grid](
                self.q, self.k, self.token_scales, stats, counts, candidates, *strides, *self.shape, *self.scale,
                self.rank, self.room, STEP=step, SAMPLE=sample, **self.constants,
            )  # fmt: skip
        if sample:
            runtime.launch(_select_kernel)[(self.programs,)](
                counts, candidates, threshold, self.num_tokens, self.rank, self.room, SAMPLE=sample, num_warps=8
            )
        self.search(stats, threshold, selected=sample > 0)
        return stats, threshold

    def head_thresholds(self) -> tuple[Tensor, Tensor]:
        """The statistics of every row and the threshold of every head, with one program a head."""
        stats, candidates = self.stats(), self.candidates()
        threshold = self.q.new_empty(self.programs, dtype=self.dtype)
        runtime.launch(_head_threshold_kernel)[(self.programs,)](
            self.q, self.k, self.token_scales, stats, candidates, threshold,
            *self.q.stride(), *self.k.stride(), *self.size_strides, *self.shape, *self.scale, self.rank, self.room,
            SAMPLE=self.tile["sample"], **self.constants,
        )  # fmt: skip
        self.search(stats, threshold, selected=True)
        return stats, threshold

    def search(self, stats: Tensor, threshold: Tensor, *, selected: bool) -> None:
        """Thresholds by radix passes: where they are negative, or, not ``selected``, all."""
        runtime.launch(_search_kernel)[(self.programs,)](
            self.q, self.k, self.token_scales, stats, threshold,
            *self.q.stride(), *self.k.stride(), *self.size_strides, *self.shape, *self.scale, self.rank,
            SELECTED=selected, **{**self.constants, "num_warps": self.tile["search_warps"]},
        )  # fmt: skip


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
    if runtime.any_zero(*out.shape):
        return result
    problem = Problem("attention", q, k, token_scales, sparsity, scale, semantics)
    ranked = problem.rank > 0
    strides = (*q.stride(), *k.stride(), *v.stride(), *problem.size_strides)
    if problem.tile["whole_head"]:
        stats, threshold = problem.head_thresholds() if ranked else (diag, diag)
        runtime.launch(_whole_head_kernel)[(problem.programs,)](
            q, k, v, problem.token_scales, out, stats, threshold, diag, colsum, cls_row,
            *strides, *problem.shape, *problem.scale,
            BLOCKS=runtime.next_power_of_2(-(-problem.num_tokens // problem.tile["rows"])),
            RANKED=ranked, **problem.constants,
        )  # fmt: skip
        return result
    stats, threshold = problem.statistics(v, None if ranked else out)
    if ranked:
        runtime.launch(_output_kernel)[problem.grid](
            q, k, v, problem.token_scales, out, stats, threshold,
            *strides, *problem.shape, *problem.scale, **problem.constants,
        )  # fmt: skip
    runtime.launch(_scores_kernel)[problem.grid](
        q, k, problem.token_scales, stats, threshold, diag, colsum, cls_row,
        *q.stride(), *k.stride(), *problem.size_strides, *problem.shape, *problem.scale,
        RANKED=ranked, **problem.constants,
    )  # fmt: skip
    return result
