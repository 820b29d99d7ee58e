"""Triton kernels of token_importance and select_tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gtp_kernels.triton import configs, runtime

_COMBINE = {"CLSAttn": "one", "IMGAttn": "one", "DiagAttn": "one", "SumAttn": "sum", "MixedAttn": "product"}


@triton.jit
def _importance_kernel(
    p_first, p_second, p_minus, p_out,
    H, N, R, blocks,
    stride_first_b, stride_first_h, stride_first_n,
    stride_second_b, stride_second_h, stride_second_n,
    stride_minus_b, stride_minus_h, stride_minus_n,
    COMBINE: tl.constexpr, MEAN: tl.constexpr, MINUS_FIRST: tl.constexpr, MINUS_SECOND: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[b, i] = ⊕_h first[b, h, R + i]  (· or +)  ⊕_h second[b, h, R + i], ⊕ the maximum or mean; either may have
    ``minus`` taken off before. Reads B·H·n elements per source, writes B·n; as many FLOPs."""
    pid = tl.program_id(0).to(tl.int64)
    b = pid // blocks
    o_i = (pid % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_i = o_i < N - R
    o_n = o_i + R
    p_first += b * stride_first_b + o_n * stride_first_n
    p_second += b * stride_second_b + o_n * stride_second_n
    p_minus += b * stride_minus_b + o_n * stride_minus_n

    # [BLOCK_N]
    b_first = tl.load(p_first, mask=m_i, other=0.0)
    b_second = b_first
    if COMBINE != "one":
        b_second = tl.load(p_second, mask=m_i, other=0.0)
    if MINUS_FIRST or MINUS_SECOND:
        b_minus = tl.load(p_minus, mask=m_i, other=0.0)
        if MINUS_FIRST:
            b_first -= b_minus
        if MINUS_SECOND:
            b_second -= b_minus
    for h in range(1, H):
        head = tl.full([], h, tl.int64)
        b_x = tl.load(p_first + head * stride_first_h, mask=m_i, other=0.0)
        b_y = b_x
        if COMBINE != "one":
            b_y = tl.load(p_second + head * stride_second_h, mask=m_i, other=0.0)
        if MINUS_FIRST or MINUS_SECOND:
            b_minus = tl.load(p_minus + head * stride_minus_h, mask=m_i, other=0.0)
            if MINUS_FIRST:
                b_x -= b_minus
            if MINUS_SECOND:
                b_y -= b_minus
        if MEAN:
            b_first += b_x
            b_second += b_y
        else:
            # NaN wins, as in torch.amax.
            b_first = tl.where((b_x > b_first) | (b_x != b_x), b_x, b_first)
            b_second = tl.where((b_y > b_second) | (b_y != b_y), b_y, b_second)
    if MEAN:
        b_first = b_first / H
        b_second = b_second / H
    b_out = b_first
    if COMBINE == "sum":
        b_out = b_first + b_second
    if COMBINE == "product":
        b_out = b_first * b_second
    tl.store(p_out + b * (N - R) + o_i, b_out, mask=m_i)


# torch finds what a kernel writes by following the address of every store back through the values it is made of, to a
# load or, through calls, to whatever pointers these were given. Ranks decide where indices are stored: so that the
# importance is not taken for written, the kernels load it themselves.
@triton.jit
def _keys(b_x, WIDE: tl.constexpr):
    """Integers in the order of the values: NaN lowest, -0 equal to 0."""
    magnitude: tl.constexpr = 0x7FFFFFFFFFFFFFFF if WIDE else 0x7FFFFFFF
    infinity: tl.constexpr = 0x7FF0000000000000 if WIDE else 0x7F800000
    if WIDE:
        b_bits = b_x.to(tl.int64, bitcast=True)
    else:
        b_bits = b_x.to(tl.float32).to(tl.int32, bitcast=True)
    b_size = b_bits & magnitude
    b_key = tl.where(b_bits < 0, b_bits ^ magnitude, b_bits)
    b_key = tl.where(b_size == 0, 0, b_key)
    return tl.where(b_size > infinity, -magnitude - 1, b_key)


@triton.jit
def _count_before(b_key, o_i, b_other, o_j):
    """[BLOCK_I] int32: how many of the tokens j come before token i by (value falling, index rising). A place outside
    the row is NaN at a higher index: before nobody."""
    # [BLOCK_I, BLOCK_J]
    before = (b_other[None, :] > b_key[:, None]) | (
        (b_other[None, :] == b_key[:, None]) & (o_j[None, :] < o_i[:, None])
    )
    return tl.sum(before.to(tl.int32), axis=1)


@triton.jit
def _rank_kernel(
    p_importance, p_rank, p_kept, p_prop,
    n, K, R, blocks, stride_b, stride_n,
    SCATTER: tl.constexpr, WIDE: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """rank[b, i] = #{j before i}, or with SCATTER index[b, rank] = i + R at once (order by importance).
    n² comparisons an image; reads n values per program, writes B·n ranks (4 bytes) or indices (8)."""
    pid = tl.program_id(0).to(tl.int64)
    b = pid // blocks
    o_i = (pid % blocks).to(tl.int32) * BLOCK_I + tl.arange(0, BLOCK_I)
    m_i = o_i < n
    p_row = p_importance + b * stride_b
    b_key = _keys(tl.load(p_row + o_i.to(tl.int64) * stride_n, mask=m_i, other=float("nan")), WIDE)
    b_rank = tl.zeros([BLOCK_I], tl.int32)
    for j0 in range(0, n, BLOCK_J):
        o_j = j0 + tl.arange(0, BLOCK_J)
        b_other = _keys(tl.load(p_row + o_j.to(tl.int64) * stride_n, mask=o_j < n, other=float("nan")), WIDE)
        b_rank += _count_before(b_key, o_i, b_other, o_j)
    if SCATTER:
        b_index = o_i.to(tl.int64) + R
        tl.store(p_kept + b * K + b_rank, b_index, mask=m_i & (b_rank < K))
        tl.store(p_prop + b * (n - K) + b_rank - K, b_index, mask=m_i & (b_rank >= K))
    else:
        tl.store(p_rank + b * n + o_i, b_rank, mask=m_i)


@triton.jit
def _compact_kernel(
    p_importance, p_rank, p_kept, p_prop,
    n, K, R, stride_b, stride_n,
    RANKED: tl.constexpr, WIDE: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """kept[b, #{kept j < i}] = i + R where rank[b, i] < K, else prop[b, #{left j < i}] = i + R: grid order.
    One program an image; n² comparisons where the ranks are not given; writes 8·B·n bytes."""
    b = tl.program_id(0).to(tl.int64)
    before = tl.zeros([], tl.int32)
    for i0 in range(0, n, BLOCK_I):
        o_i = i0 + tl.arange(0, BLOCK_I)
        m_i = o_i < n
        if RANKED:
            b_rank = tl.load(p_rank + b * n + o_i, mask=m_i, other=0)
        else:
            p_row = p_importance + b * stride_b
            b_key = _keys(tl.load(p_row + o_i.to(tl.int64) * stride_n, mask=m_i, other=float("nan")), WIDE)
            b_rank = tl.zeros([BLOCK_I], tl.int32)
            for j0 in range(0, n, BLOCK_J):
                o_j = j0 + tl.arange(0, BLOCK_J)
                b_other = _keys(tl.load(p_row + o_j.to(tl.int64) * stride_n, mask=o_j < n, other=float("nan")), WIDE)
                b_rank += _count_before(b_key, o_i, b_other, o_j)
        m_kept = m_i & (b_rank < K)
        b_kept = m_kept.to(tl.int32)
        b_place = before + tl.cumsum(b_kept, 0) - b_kept
        b_index = o_i.to(tl.int64) + R
        tl.store(p_kept + b * K + b_place, b_index, mask=m_kept)
        tl.store(p_prop + b * (n - K) + o_i - b_place, b_index, mask=m_i & (b_rank >= K))
        before += tl.sum(b_kept)


def token_importance(
    diag: Tensor, colsum: Tensor, cls_row: Tensor, standard: str, num_prefix: int, semantics: str
) -> Tensor:
    """The operator ``token_importance``: importance [B, N - R] of the image tokens, in the scores' dtype."""
    batch, heads, tokens = diag.shape
    count = tokens - num_prefix
    out = diag.new_empty(batch, count)
    if runtime.any_zero(batch, count):
        return out
    kind = standard.removesuffix("Mean").removesuffix("Max")
    paper = semantics == "paper"
    first = cls_row if kind == "CLSAttn" else colsum if kind == "IMGAttn" else diag
    tile = configs.lookup("importance", diag.device, diag.dtype, tokens=int(count))
    blocks = triton.cdiv(count, tile["tokens"])
    runtime.launch(_importance_kernel)[(batch * blocks,)](
        first, colsum, diag, out, heads, tokens, num_prefix, blocks,
        *first.stride(), *colsum.stride(), *diag.stride(),
        COMBINE=_COMBINE[kind], MEAN=standard.endswith("Mean"), MINUS_FIRST=paper and kind == "IMGAttn",
        MINUS_SECOND=paper and kind in ("SumAttn", "MixedAttn"), BLOCK_N=tile["tokens"],
        num_warps=tile["num_warps"],
    )  # fmt: skip
    return out


def select_tokens(importance: Tensor, num_prop: int, num_prefix: int, order: str) -> tuple[Tensor, Tensor]:
    """The operator ``select_tokens``: int64 [B, n - P] that stay and [B, P] of lowest importance that leave."""
    batch, count = importance.shape
    num_kept = count - num_prop
    kept = importance.new_empty(batch, num_kept, dtype=torch.int64)
    prop = importance.new_empty(batch, num_prop, dtype=torch.int64)
    if runtime.any_zero(batch, count):
        return kept, prop
    scatter = order == "importance"
    wide = importance.dtype == torch.float64
    tile = configs.lookup("compact", importance.device, importance.dtype, tokens=int(count))
    # Whether the one program an image of the grid order is given the ranks, by a launch before it.
    apart = bool(tile["ranked"])
    rank = kept
    if scatter or apart:
        rank = kept if scatter else importance.new_empty(batch, count, dtype=torch.int32)
        _rank(importance, rank, kept, prop, num_kept, num_prefix, scatter)
    if not scatter:
        runtime.launch(_compact_kernel)[(batch,)](
            importance, rank, kept, prop, count, num_kept, num_prefix, *importance.stride(),
            RANKED=apart, WIDE=wide, BLOCK_I=tile["tokens"], BLOCK_J=tile["others"], num_warps=tile["num_warps"],
        )  # fmt: skip
    return kept, prop


def order_by_rank(scores: Tensor, order: Tensor, scratch: Tensor) -> None:
    """order[b, :] = the indices of scores [B, n] by (score falling, index rising); ``scratch`` is like ``order``."""
    _rank(scores, order, order, scratch, scores.shape[1], 0, True)


def _rank(
    importance: Tensor, rank: Tensor, kept: Tensor, prop: Tensor, num_kept: int, num_prefix: int, scatter: bool
) -> None:
    batch, count = importance.shape
    tile = configs.lookup("rank", importance.device, importance.dtype, tokens=int(count))
    blocks = triton.cdiv(count, tile["tokens"])
    runtime.launch(_rank_kernel)[(batch * blocks,)](
        importance, rank, kept, prop, count, num_kept, num_prefix, blocks, *importance.stride(),
        SCATTER=scatter, WIDE=importance.dtype == torch.float64, BLOCK_I=tile["tokens"], BLOCK_J=tile["others"],
        num_warps=tile["num_warps"],
    )  # fmt: skip
