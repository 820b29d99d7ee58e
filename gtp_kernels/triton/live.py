"""Triton kernels of live_select and live_merge, and live_graph in torch's own.

Every edge slot of the CSR gets the cosine of the two rows that carry its ends, as an integer in the order of the
values; then one program an image walks the rows in the order of their scores, and reads but those integers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gtp_kernels import reference
from gtp_kernels.graph import TokenGraph
from gtp_kernels.ops import _library
from gtp_kernels.reference.attention import compute_dtype
from gtp_kernels.reference.live import LEAST_IMPORTANCE
from gtp_kernels.triton import configs, propagate, runtime, select
from gtp_kernels.triton.propagate import _edge_range, _load_y, _normalise, _number
from gtp_kernels.triton.select import _keys

# What stands in `into` beside a row's target. The first two stay.
_TARGET = tl.constexpr(-3)
_STAYS = tl.constexpr(-2)
_DROPPED = tl.constexpr(-1)


@triton.jit
def _unit_kernel(
    p_k, p_unit, p_best, p_first,
    H, n, d, R, blocks,
    stride_b, stride_h, stride_n, stride_d,
    WIDE: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """unit[b, i] = Σ_h k[b, h, R + i] / H over its length (over 1 where that is 0); best[b, i] = less than any cosine;
    first[b, i] = -1. Reads B·H·n·d elements, writes B·n·d; H + 3 FLOPs an element of unit."""
    ACC: tl.constexpr = tl.float64 if WIDE else tl.float32
    KEY: tl.constexpr = tl.int64 if WIDE else tl.int32
    nothing: tl.constexpr = -0x7FFFFFFFFFFFFFFF - 1 if WIDE else -0x7FFFFFFF - 1
    pid = tl.program_id(0).to(tl.int64)
    b = pid // blocks
    o_i = (pid % blocks) * BLOCK_I + tl.arange(0, BLOCK_I)
    o_d = tl.arange(0, BLOCK_D).to(tl.int64)
    m_i = o_i < n
    m_k = m_i[:, None] & (o_d < d)[None, :]
    p_k += b * stride_b + (o_i + R)[:, None] * stride_n + o_d[None, :] * stride_d
    # [BLOCK_I, BLOCK_D]
    b_mean = tl.zeros([BLOCK_I, BLOCK_D], ACC)
    for h in range(H):
        b_mean += tl.load(p_k + tl.full([], h, tl.int64) * stride_h, mask=m_k, other=0.0).to(ACC)
    b_mean = b_mean / H
    b_norm = tl.sqrt(tl.sum(b_mean * b_mean, axis=1))
    b_norm = tl.where(b_norm == 0, 1.0, b_norm)
    tl.store(p_unit + (b * n + o_i)[:, None] * d + o_d[None, :], b_mean / b_norm[:, None], mask=m_k)
    tl.store(p_best + b * n + o_i, tl.full([BLOCK_I], nothing, KEY), mask=m_i)
    tl.store(p_first + b * n + o_i, tl.full([BLOCK_I], -1, tl.int32), mask=m_i)


@triton.jit
def _edge_kernel(
    p_unit, p_indptr, p_indices, p_rep, p_best, p_first, p_next, p_other, p_weight,
    n, d, origins, E,
    WIDE: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The edges of one original token u, which the row rep[u] carries: other[b, e] = the row at the other end, -1 where
    that is none or the same; weight[b, e] = their cosine (-1 for what is no number), the same to the bit for both
    directions; best[b, rep[u]] = max of the weights; u joins the list first[b, rep[u]], next[b, u], … -1.
    Reads a unit key per edge (from cache) and 8 bytes, writes 8 bytes; 2·d FLOPs. The order of a list depends on the
    run, nothing that is read off it does."""
    ACC: tl.constexpr = tl.float64 if WIDE else tl.float32
    KEY: tl.constexpr = tl.int64 if WIDE else tl.int32
    nothing: tl.constexpr = -0x7FFFFFFFFFFFFFFF - 1 if WIDE else -0x7FFFFFFF - 1
    pid = tl.program_id(0).to(tl.int64)
    b = pid // origins
    u = (pid % origins).to(tl.int32)
    row = tl.load(p_rep + pid)
    is_row = (row >= 0) & (row < n)
    # Not by _edge_range: the edges decide where is stored.
    begin = tl.maximum(tl.load(p_indptr + b * (origins + 1) + u), 0)
    end = tl.load(p_indptr + b * (origins + 1) + u + 1)
    end = tl.where(is_row, tl.minimum(end, E), 0)
    before = tl.atomic_xchg(p_first + b * n + row, u, mask=is_row, sem="relaxed")
    tl.store(p_next + pid, before, mask=is_row)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < d
    p_unit += b * n * d
    # [BLOCK_D]
    b_own = tl.load(p_unit + row.to(tl.int64) * d + o_d, mask=m_d & is_row, other=0.0)
    b_best = tl.full([BLOCK_E], nothing, KEY)
    for e0 in range(begin, end, BLOCK_E):
        o_e = e0 + tl.arange(0, BLOCK_E)
        m_e = o_e < end
        b_column = tl.load(p_indices + b * E + o_e, mask=m_e, other=-1)
        m_edge = m_e & (b_column >= 0) & (b_column < origins)
        b_other = tl.load(p_rep + b * origins + b_column, mask=m_edge, other=-1)
        m_edge = m_edge & (b_other >= 0) & (b_other < n) & (b_other != row)
        # [BLOCK_E, BLOCK_D]
        p_row = p_unit + b_other.to(tl.int64)[:, None] * d + o_d[None, :]
        b_unit = tl.load(p_row, mask=m_edge[:, None] & m_d[None, :], other=0.0)
        b_cosine = tl.sum(b_own[None, :] * b_unit, axis=1).to(ACC)
        b_cosine = tl.where(tl.abs(b_cosine) < float("inf"), b_cosine, -1.0)
        b_weight = tl.where(m_edge, _keys(b_cosine, WIDE), nothing)
        tl.store(p_other + b * E + o_e, tl.where(m_edge, b_other, -1), mask=m_e)
        tl.store(p_weight + b * E + o_e, b_weight, mask=m_e)
        b_best = tl.maximum(b_best, b_weight)
    best = tl.max(b_best, 0)
    tl.atomic_max(p_best + b * n + row, best, mask=is_row & (best > nothing), sem="relaxed")


@triton.jit
def _score_kernel(
    p_importance, p_best, p_score, n, gamma, gamma_low, least, least_low, WIDE: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """score[b, i] = (1 - best[b, i]) · max(importance / mean, least)^γ; +inf for a row without edges. One program an
    image. The power is taken in float64, so that rounding it is all that could part it from the definition's.
    Reads 16·n bytes, writes 4·n; about 100 FLOPs a row."""
    ACC: tl.constexpr = tl.float64 if WIDE else tl.float32
    KEY: tl.constexpr = tl.int64 if WIDE else tl.int32
    magnitude: tl.constexpr = 0x7FFFFFFFFFFFFFFF if WIDE else 0x7FFFFFFF
    b = tl.program_id(0).to(tl.int64)
    p_importance += b * n
    total = tl.zeros([], tl.float64)
    for i0 in range(0, n, BLOCK_N):
        o_i = i0 + tl.arange(0, BLOCK_N)
        total += tl.sum(tl.load(p_importance + o_i, mask=o_i < n, other=0.0).to(tl.float64), 0)
    mean = total / n
    exponent = _number(gamma, gamma_low, tl.float64)
    floor = _number(least, least_low, tl.float64)
    for i0 in range(0, n, BLOCK_N):
        o_i = i0 + tl.arange(0, BLOCK_N)
        m_i = o_i < n
        b_relative = tl.load(p_importance + o_i, mask=m_i, other=0.0).to(tl.float64) / mean
        b_relative = tl.where(b_relative > floor, b_relative, floor)
        b_power = tl.where(exponent == 0, 1.0, tl.exp2(exponent * tl.log2(b_relative))).to(ACC)
        b_key = tl.load(p_best + b * n + o_i, mask=m_i, other=0)
        b_best = tl.where(b_key < 0, b_key ^ magnitude, b_key).to(KEY).to(ACC, bitcast=True)
        b_score = (1.0 - b_best) * b_power
        b_score = tl.where((b_key == -magnitude - 1) | (b_score != b_score), float("inf"), b_score)
        tl.store(p_score + b * n + o_i, b_score, mask=m_i)


@triton.jit
def _walk_kernel(
    p_order, p_indptr, p_rep, p_first, p_next, p_other, p_weight, p_sizes, p_into, p_place, p_total,
    p_kept, p_prop, p_target, p_share, p_sizes_out, p_rep_out,
    n, P, R, origins, E,
    WIDE: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Who leaves, and into whom: ``reference.live.walk`` over the rows order[b, n - 1], order[b, n - 2], …, then every
    result of live_select. One program an image.
    Each of the P rows that leave looks at the edges of all that it carries, 12 bytes each from cache; the rest reads
    and writes about 60·n bytes. What threads write for each other lies in p_into, p_place and p_total."""
    KEY: tl.constexpr = tl.int64 if WIDE else tl.int32
    nothing: tl.constexpr = -0x7FFFFFFFFFFFFFFF - 1 if WIDE else -0x7FFFFFFF - 1
    b = tl.program_id(0).to(tl.int64)
    K = n - P
    p_order += b * n
    p_into += b * n
    p_place += b * n
    p_total += b * n
    p_sizes += b * (R + n)
    for i0 in range(0, n, BLOCK_N):
        o_i = i0 + tl.arange(0, BLOCK_N)
        m_i = o_i < n
        tl.store(p_into + o_i, tl.full([BLOCK_N], _STAYS, tl.int32), mask=m_i)
        tl.store(p_total + o_i, tl.load(p_sizes + R + o_i, mask=m_i, other=0.0).to(tl.float64), mask=m_i)
    tl.debug_barrier()

    left = tl.zeros([], tl.int32)
    targets = tl.zeros([], tl.int32)
    i = n - 1
    while (i >= 0) & (left < P):
        row = tl.load(p_order + i)
        state = tl.load(p_into + row)
        u = tl.load(p_first + b * n + row)
        u = tl.where(state == _STAYS, u, -1)
        full = targets == K
        # [BLOCK_E] the best taker so far in each place of a block of edges, and whether it is a new target
        b_most = tl.full([BLOCK_E], nothing, KEY)
        b_taker = tl.zeros([BLOCK_E], tl.int32) + n
        b_new = tl.zeros([BLOCK_E], tl.int32)
        while u >= 0:
            begin, end = _edge_range(p_indptr, b, u, u >= 0, origins, E)
            for e0 in range(begin, end, BLOCK_E):
                o_e = e0 + tl.arange(0, BLOCK_E)
                m_e = o_e < end
                b_other = tl.load(p_other + b * E + o_e, mask=m_e, other=-1)
                b_weight = tl.load(p_weight + b * E + o_e, mask=m_e, other=nothing)
                b_state = tl.load(p_into + b_other, mask=m_e & (b_other >= 0), other=_DROPPED)
                m_take = (b_state == _TARGET) | ((b_state == _STAYS) & (full == 0))
                m_take = m_take & ((b_weight > b_most) | ((b_weight == b_most) & (b_other < b_taker)))
                b_most = tl.where(m_take, b_weight, b_most)
                b_taker = tl.where(m_take, b_other, b_taker)
                b_new = tl.where(m_take, (b_state == _STAYS).to(tl.int32), b_new)
            u = tl.load(p_next + b * origins + u)
        most = tl.max(b_most, 0)
        taker = tl.min(tl.where(b_most == most, b_taker, n), 0)
        found = taker < n
        total = tl.load(p_total + taker, mask=found, other=0.0)
        total += tl.load(p_sizes + R + row, mask=found, other=0.0).to(tl.float64)
        # Every thread has read what one of them now writes.
        tl.debug_barrier()
        tl.store(p_total + taker, total, mask=found)
        tl.store(p_into + taker, _TARGET, mask=found)
        tl.store(p_into + row, taker, mask=found)
        tl.debug_barrier()
        targets += tl.max(tl.where(b_taker == taker, b_new, 0), 0)
        left += found.to(tl.int32)
        i -= 1

    missing = P - left
    before = tl.zeros([], tl.int32)
    for i0 in range(0, tl.where(missing > 0, n, 0), BLOCK_N):
        o_i = i0 + tl.arange(0, BLOCK_N)
        m_i = o_i < n
        b_row = tl.load(p_order + n - 1 - o_i, mask=m_i, other=0)
        m_stays = m_i & (tl.load(p_into + b_row, mask=m_i, other=_DROPPED) == _STAYS)
        b_turn = before + tl.cumsum(m_stays.to(tl.int32), 0)
        tl.store(p_into + b_row, tl.full([BLOCK_N], _DROPPED, tl.int32), mask=m_stays & (b_turn <= missing))
        before += tl.sum(m_stays.to(tl.int32), 0)
    tl.debug_barrier()

    # place: of a row that stays its place among those, of the others -1 - theirs.
    p_sizes_out += b * (R + K)
    for r0 in range(0, R, BLOCK_N):
        o_r = r0 + tl.arange(0, BLOCK_N)
        tl.store(p_sizes_out + o_r, tl.load(p_sizes + o_r, mask=o_r < R, other=0.0), mask=o_r < R)
    before = tl.zeros([], tl.int32)
    for i0 in range(0, n, BLOCK_N):
        o_i = i0 + tl.arange(0, BLOCK_N)
        m_i = o_i < n
        b_stays = (m_i & (tl.load(p_into + o_i, mask=m_i, other=_DROPPED) <= _STAYS)).to(tl.int32)
        b_place = before + tl.cumsum(b_stays, 0) - b_stays
        m_stays = b_stays > 0
        tl.store(p_place + o_i, tl.where(m_stays, b_place, b_place - o_i - 1), mask=m_i)
        tl.store(p_kept + b * K + b_place, o_i.to(tl.int64) + R, mask=m_stays)
        tl.store(p_prop + b * P + o_i - b_place, o_i.to(tl.int64) + R, mask=m_i & (b_stays == 0))
        b_total = tl.load(p_total + o_i, mask=m_stays, other=0.0)
        tl.store(p_sizes_out + R + b_place, b_total.to(tl.float32), mask=m_stays)
        before += tl.sum(b_stays, 0)
    tl.debug_barrier()

    for i0 in range(0, n, BLOCK_N):
        o_i = i0 + tl.arange(0, BLOCK_N)
        m_i = o_i < n
        b_into = tl.load(p_into + o_i, mask=m_i, other=_DROPPED)
        b_place = tl.load(p_place + o_i, mask=m_i, other=0)
        b_holder = tl.where(b_into <= _STAYS, o_i, b_into)
        m_held = m_i & (b_holder >= 0)
        b_size = tl.load(p_sizes + R + o_i, mask=m_held, other=0.0).to(tl.float64)
        b_share = tl.where(m_held, b_size / tl.load(p_total + b_holder, mask=m_held, other=1.0), 0.0)
        tl.store(p_share + b * n + o_i, b_share.to(tl.float32), mask=m_i)
        b_target = tl.load(p_place + b_holder, mask=m_held, other=-1)
        tl.store(p_target + b * P - 1 - b_place, b_target.to(tl.int64), mask=m_i & (b_place < 0))
    for u0 in range(0, origins, BLOCK_N):
        o_u = u0 + tl.arange(0, BLOCK_N)
        m_u = o_u < origins
        b_row = tl.load(p_rep + b * origins + o_u, mask=m_u, other=-1)
        m_row = (b_row >= 0) & (b_row < n)
        b_into = tl.load(p_into + b_row, mask=m_row, other=_DROPPED)
        b_holder = tl.where(b_into <= _STAYS, b_row, b_into)
        b_place = tl.load(p_place + b_holder, mask=m_row & (b_holder >= 0), other=-1)
        tl.store(p_rep_out + b * origins + o_u, b_place, mask=m_u)


@triton.jit
def _merge_kernel(
    p_x, p_branch, p_layer_scale, p_kept, p_prop, p_target, p_share, p_weight, p_bias, p_out, p_normed,
    N, C, rows, K, P, R,
    stride_xb, stride_xn, stride_xc, stride_rb, stride_rn, stride_rc,
    eps, eps_low,
    LAYER_SCALE: tl.constexpr, NORM: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One row of out: y = x + layer_scale · branch of a row that nothing goes to, else share_i y_i + Σ_j share_j y_j
    over the j with target[j] = its place, in index_prop's order; then normed = norm(out) of the rounded row.
    Reads x and branch once, writes out (and normed) once; a row looks through the P targets (8 bytes each, from
    cache); 2·C FLOPs per row that leaves, 8·C per row for the norm: bound by memory."""
    ACC: tl.constexpr = tl.float64 if WIDE else tl.float32
    pid = tl.program_id(0).to(tl.int64)
    b = pid // rows
    r = (pid % rows).to(tl.int32)
    o_c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    is_kept = r >= R
    own = tl.load(p_kept + b * K + r - R, mask=is_kept, other=0).to(tl.int64)
    own = tl.minimum(tl.where(is_kept, tl.maximum(own, R), r), N - 1)
    p_x += b * stride_xb
    p_branch += b * stride_rb
    p_share += b * (N - R) - R

    b_layer_scale = tl.zeros([BLOCK_C], ACC)
    if LAYER_SCALE:
        b_layer_scale = tl.load(p_layer_scale + o_c, mask=m_c, other=0.0).to(ACC)
    # [BLOCK_C]
    b_y = _load_y(
        p_x, p_branch, b_layer_scale, own, o_c, m_c, stride_xn, stride_xc, stride_rn, stride_rc, True, LAYER_SCALE, ACC
    )  # fmt: skip
    b_total = tl.zeros([BLOCK_C], ACC)
    sources = tl.zeros([], tl.int32)
    for j0 in range(0, tl.where(is_kept, P, 0), BLOCK_P):
        o_j = j0 + tl.arange(0, BLOCK_P)
        m_j = o_j < P
        b_hit = (tl.load(p_target + b * P + o_j, mask=m_j, other=-1) == r - R).to(tl.int32)
        b_row = tl.load(p_prop + b * P + o_j, mask=m_j, other=R)
        b_row = tl.minimum(tl.maximum(b_row, R), N - 1)
        b_turn = tl.cumsum(b_hit, 0)
        hits = tl.sum(b_hit, 0)
        for turn in range(hits):
            row = tl.sum(tl.where((b_hit > 0) & (b_turn == turn + 1), b_row, 0), 0).to(tl.int64)
            share = tl.load(p_share + row).to(ACC)
            b_other = _load_y(
                p_x, p_branch, b_layer_scale, row, o_c, m_c, stride_xn, stride_xc, stride_rn, stride_rc,
                True, LAYER_SCALE, ACC,
            )  # fmt: skip
            # A part of zero is none, whatever stands in the row.
            b_total += tl.where(share == 0, 0.0, share * b_other)
        sources += hits
    share = tl.load(p_share + own, mask=is_kept, other=0.0).to(ACC)
    b_out = tl.where(sources > 0, b_total + share * b_y, b_y).to(p_out.dtype.element_ty)
    tl.store(p_out + pid * C + o_c, b_out, mask=m_c)
    if NORM > 0:
        epsilon = _number(eps, eps_low, ACC)
        b_unit = _normalise(b_out.to(ACC), p_weight, p_bias, o_c, m_c, C, epsilon, NORM, WEIGHT, BIAS)
        tl.store(p_normed + pid * C + o_c, b_unit.to(p_normed.dtype.element_ty), mask=m_c)


def live_graph(indptr: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The operator ``live_graph``: the definition, two sorts of the edges, which wait for nothing; once a forward."""
    rows = indptr[:, 1:]
    live = reference.live_graph(TokenGraph(indptr, indices, indices, rows))
    return live.indptr, live.indices


def live_select(
    k: Tensor,
    importance: Tensor,
    indptr: Tensor,
    indices: Tensor,
    rep: Tensor,
    sizes: Tensor,
    num_prop: int,
    gamma: float,
    num_prefix: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operator ``live_select``: (index_kept, index_prop, target, share, sizes, rep) of the rows that remain."""
    batch, heads, _, size = k.shape
    n, origins, edges = importance.shape[1], rep.shape[1], indices.shape[1]
    num_kept = n - num_prop

    def new(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return k.new_empty(shape, dtype=dtype)

    kept = new(batch, num_kept, dtype=torch.int64)
    prop, target = (new(batch, num_prop, dtype=torch.int64) for _ in range(2))
    share, sizes_out = (new(batch, count, dtype=torch.float32) for count in (n, num_prefix + num_kept))
    rep_out = new(batch, origins)
    if runtime.any_zero(batch):
        return kept, prop, target, share, sizes_out, rep_out
    indptr, indices, rep = indptr.contiguous(), indices.contiguous(), rep.contiguous()
    dtype = compute_dtype(k.dtype)
    wide = dtype == torch.float64
    key = torch.int64 if wide else torch.int32
    order, first, into, place = (new(batch, n) for _ in range(4))
    following, other = new(batch, origins), new(batch, edges)
    weight = new(batch, edges, dtype=key)
    # Where nothing leaves, the walk asks for none of it.
    if num_prop:
        unit, best = new(batch, n, size, dtype=dtype), new(batch, n, dtype=key)
        block_d = max(runtime.next_power_of_2(int(size)), 16)
        tile = configs.lookup("live_keys", k.device, k.dtype)
        block_i = max(tile["elements"] // block_d, 1)
        blocks = triton.cdiv(n, block_i)
        runtime.launch(_unit_kernel)[(batch * blocks,)](
            k, unit, best, first, heads, n, size, num_prefix, blocks, *k.stride(), WIDE=wide,
            BLOCK_I=block_i, BLOCK_D=block_d, num_warps=tile["num_warps"],
        )  # fmt: skip
        if origins and edges:
            tile = configs.lookup("live_edges", k.device, dtype)
            runtime.launch(_edge_kernel)[(batch * origins,)](
                unit, indptr, indices, rep, best, first, following, other, weight, n, size, origins, edges, WIDE=wide,
                BLOCK_E=max(tile["elements"] // block_d, 1), BLOCK_D=block_d, num_warps=tile["num_warps"],
            )  # fmt: skip
        score = new(batch, n, dtype=dtype)
        tile = configs.lookup("live_scores", k.device, dtype)
        runtime.launch(_score_kernel)[(batch,)](
            importance.contiguous(), best, score, n, *propagate.split_float(gamma),
            *propagate.split_float(LEAST_IMPORTANCE), WIDE=wide, BLOCK_N=tile["rows"], num_warps=tile["num_warps"],
        )  # fmt: skip
        # Falling by score, of equal ones the lower index first: backwards this is the order of the walk.
        select.order_by_rank(score, order, into)
    tile = configs.lookup("live_walk", k.device, dtype)
    runtime.launch(_walk_kernel)[(batch,)](
        order, indptr, rep, first, following, other, weight, sizes.float().contiguous(), into, place,
        new(batch, n, dtype=torch.float64), kept, prop, target, share, sizes_out, rep_out,
        n, num_prop, num_prefix, origins, edges, WIDE=wide, BLOCK_E=tile["edges"], BLOCK_N=tile["rows"],
        num_warps=tile["num_warps"], num_stages=1,
    )  # fmt: skip
    return kept, prop, target, share, sizes_out, rep_out


def live_merge(
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
    """The operator ``live_merge``: (x, normed) of the rows that remain."""
    batch, tokens, channels = x.shape
    num_kept, num_prop = index_kept.shape[1], index_prop.shape[1]
    rows = num_prefix + num_kept
    dtype = torch.promote_types(x.dtype, branch.dtype)
    out = x.new_empty(batch, rows, channels, dtype=dtype)
    normed = _library.absent(x, dtype) if norm == "none" else torch.empty_like(out)
    if runtime.any_zero(batch, rows, channels):
        return out, normed
    tile = configs.lookup("live_merge", x.device, dtype, channels=int(channels))
    block_c = propagate.row_block(int(channels), tile["channels"])
    blocks_c = triton.cdiv(channels, block_c)
    norm_kind = propagate.NORMS[norm]
    weight = None if norm_weight is None else norm_weight.contiguous()
    bias = None if norm_bias is None else norm_bias.contiguous()
    runtime.launch(_merge_kernel)[(batch * rows, blocks_c)](
        x, branch, x if layer_scale is None else layer_scale.contiguous(), index_kept.contiguous(),
        index_prop.contiguous(), target.contiguous(), share.contiguous(), x if weight is None else weight,
        x if bias is None else bias, out, normed,
        tokens, channels, rows, num_kept, num_prop, num_prefix, *x.stride(), *branch.stride(),
        *propagate.split_float(norm_eps), LAYER_SCALE=layer_scale is not None, NORM=norm_kind if blocks_c == 1 else 0,
        WEIGHT=weight is not None, BIAS=bias is not None, WIDE=compute_dtype(dtype) == torch.float64,
        BLOCK_P=min(max(runtime.next_power_of_2(int(num_prop)), 8), tile["leaving"]), BLOCK_C=block_c,
        num_warps=tile["num_warps"],
    )  # fmt: skip
    if norm_kind and blocks_c > 1:
        propagate.norm_long_rows(out, normed, weight, bias, norm_eps, norm)
    return out, normed
