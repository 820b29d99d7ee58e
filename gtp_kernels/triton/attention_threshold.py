"""The exact threshold of the attention map of one head: the rank-th smallest of its N² values.

The bits of A, which is never negative, are ordered as integers: the keys. A sample of the map (every row, one in SAMPLE
columns, other columns in the next block of rows) says where the threshold may be: a histogram of two octaves a bin over
all floats, then one of 64 bins where the first put it, give a bracket of keys. One pass counts what is below the
bracket and collects what is in it, and the threshold is selected among the few collected. Where the bracket missed, or
held more than there is room for (many equal values do that), the head is searched by radix passes over the whole map
instead; so the result is exact always, and nothing waits for the host. Counts are integers: the order in which
programs add to them does not show.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gtp_kernels.triton.attention_map import dot, map_tile, operand, weights

BINS = tl.constexpr(64)
_BITS = tl.constexpr(6)
_COARSE = tl.constexpr(24)
# Above the key of 1.0: NaN, and the end of all keys.
_NAN = tl.constexpr(0x3F800001)
_NAN_DOUBLE = tl.constexpr(0x3FF0000000000001)
_CHUNK = tl.constexpr(1024)


@triton.jit
def _key(b_p):
    """Integers ordered as the weights in [0, 1], NaN above 1."""
    if b_p.dtype == tl.float64:
        return tl.where(b_p == b_p, b_p.to(tl.int64, bitcast=True), _NAN_DOUBLE)
    else:
        return tl.where(b_p == b_p, b_p.to(tl.int32, bitcast=True), _NAN)


@triton.jit
def _value(key, DOUBLE: tl.constexpr):
    """T of its key; 0, which keeps every value, where the rank-th smallest is NaN."""
    if DOUBLE:
        return tl.where(key >= _NAN_DOUBLE, 0, key).to(tl.float64, bitcast=True)
    else:
        return tl.where(key >= _NAN, 0, key).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _count_bins(b_key, m_valid, low, shift, SIZE: tl.constexpr):
    """[BINS] int32: how many keys lie in each bin of width 2^shift from `low`."""
    b_bin = ((b_key - low) >> shift).to(tl.int64)
    m_bin = m_valid & (b_bin >= 0) & (b_bin < BINS)
    b_bin = tl.reshape(tl.where(m_bin, b_bin, 0).to(tl.int32), [SIZE], can_reorder=True)
    return tl.histogram(b_bin, BINS, mask=tl.reshape(m_bin, [SIZE], can_reorder=True))


@triton.jit
def _bin_of(b_count, before, rank):
    """The bin that holds the rank-th smallest, where `before` keys come before the first bin; the last, where none."""
    b_reached = before + tl.cumsum(b_count, 0)
    return tl.minimum(tl.sum((b_reached < rank).to(tl.int32), 0), BINS - 1)


@triton.jit
def _shift_of(span):
    """log2 of the width of bins, BINS of which hold `span` keys."""
    o_bit = tl.minimum(tl.arange(0, 32) + _BITS, 31)
    return tl.sum((((span - 1) >> o_bit) > 0).to(tl.int32), 0)


@triton.jit
def sample_rows(
    q, b_max, b_inv, m_row, block, low, shift, p_k, p_size, o_dim, q_dim, k_row, k_dim, size_row, N, D, scale,
    SAMPLE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr,
    SIZES: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """[BINS] int32: the sampled keys of a block of rows, in bins of width 2^shift from `low`."""
    b_hist = tl.zeros([BINS], tl.int32)
    for first in range(0, tl.cdiv(N, SAMPLE), BN):
        o_col = (block * 5) % SAMPLE + (first + tl.arange(0, BN)) * SAMPLE
        k = operand(p_k, o_col, o_dim, k_row, k_dim, N, D, CHUNK)
        _e, b_p = map_tile(
            q, k, b_max, b_inv, o_col, p_size, q_dim, k_dim, size_row, N, D, scale, 0.0,
            CHUNK, SIZES, False, PRECISION, UPCAST,
        )  # fmt: skip
        b_hist += _count_bins(_key(b_p), m_row[:, None] & (o_col < N)[None, :], low, shift, BM * BN)
    return b_hist


@triton.jit
def sample_coarsely(
    q, b_max, b_inv, m_row, block, p_k, p_size, o_dim, q_dim, k_row, k_dim, size_row, N, D, scale,
    SAMPLE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr,
    SIZES: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The first histogram of `sample_rows`: two octaves a bin, over all keys."""
    return sample_rows(
        q, b_max, b_inv, m_row, block, 0, _COARSE, p_k, p_size, o_dim, q_dim, k_row, k_dim, size_row, N, D, scale,
        SAMPLE, BM, BN, CHUNK, SIZES, PRECISION, UPCAST,
    )  # fmt: skip


@triton.jit
def _targets(b_coarse, rank, N, SAMPLE: tl.constexpr):
    """The ranks within the sample between which the threshold is sought, and the size of the sample.

    A share of 1 / 64 of the map to either side, 4 / N below 256 tokens, where a sample is small, and 16 / N above 1024,
    so that there is room for what lies between; none where everything is sampled.
    """
    taken = tl.sum(b_coarse, 0)
    total = tl.cast(N, tl.int64) * N
    centre = tl.cast(rank, tl.int64) * taken // total
    if SAMPLE == 1:
        return centre, centre, taken
    else:
        slack = taken * tl.minimum(tl.maximum(N // 64, 4), 16) // N + 1
        return centre - slack, centre + slack + 1, taken


@triton.jit
def fine_range(b_coarse, rank, N, SAMPLE: tl.constexpr):
    """(low, shift) of the bins of the second histogram, from the first [BINS] int64."""
    lower, upper, taken = _targets(b_coarse, rank, N, SAMPLE)
    first = _bin_of(b_coarse, 0, lower)
    last = _bin_of(b_coarse, 0, tl.minimum(upper, taken))
    return first << _COARSE, _shift_of((last - first + 1) << _COARSE)


@triton.jit
def bracket(b_coarse, b_fine, rank, N, SAMPLE: tl.constexpr):
    """(low, high): the threshold's key is sought in [low, high), 0 < low; from both histograms [BINS] int64."""
    lower, upper, taken = _targets(b_coarse, rank, N, SAMPLE)
    edge, shift = fine_range(b_coarse, rank, N, SAMPLE)
    before = tl.sum(tl.where(tl.arange(0, BINS) < (edge >> _COARSE), b_coarse, 0), 0)
    first = _bin_of(b_fine, before, lower)
    last = _bin_of(b_fine, before, tl.minimum(upper, taken))
    # The sample says nothing about what is beyond its smallest or largest value.
    low = tl.where(lower < 1, 1, tl.maximum(edge + (first << shift), 1))
    high = tl.where(upper > taken, _NAN + 1, edge + ((last + 1) << shift))
    return low, high


@triton.jit
def collect_rows(
    q, b_max, b_inv, m_row, low, high, p_candidates, p_count, below, count,
    p_k, p_size, o_dim, q_dim, k_row, k_dim, size_row, N, D, scale, room,
    SHARED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr,
    SIZES: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Counts the keys of a block of rows below `low`, and collects those in [low, high), as far as there is room.

    The counters go on from `below` and `count`; SHARED: other programs collect too, and `p_count` is the counter.

    torch finds what a kernel writes by following the address of every store back through the values it is made of, to
    a load or, through calls, to whatever pointers these were given. The keys decide where keys are stored: so that q,
    k and the scales are not taken for written, they are loaded here, and q in the kernel, without helpers.
    """
    for first in range(0, N, BN):
        o_col = first + tl.arange(0, BN)
        m_col = o_col < N
        # [BN, 1]
        p_row = p_k + tl.minimum(o_col, N - 1).to(tl.int64)[:, None] * k_row
        if CHUNK < o_dim.shape[0]:
            b_s = tl.zeros([BM, BN], tl.float32)
            for start in range(0, D, CHUNK):
                o_part = (start + tl.arange(0, CHUNK))[None, :].to(tl.int64)
                b_a = tl.load(q + o_part * q_dim, mask=o_part < D, other=0.0)
                b_b = tl.load(p_row + o_part * k_dim, mask=o_part < D, other=0.0)
                b_s += dot(b_a, tl.trans(b_b), PRECISION, UPCAST)
        else:
            b_k = tl.load(
                p_row + o_dim.to(tl.int64)[None, :] * k_dim, mask=m_col[:, None] & (o_dim < D)[None, :], other=0.0
            )
            b_s = dot(q, tl.trans(b_k), PRECISION, UPCAST)
        b_size = tl.full([BN], 1.0, tl.float32)
        if SIZES:
            b_size = tl.load(p_size + o_col.to(tl.int64) * size_row, mask=m_col, other=1.0)
        _e, b_p = weights(b_s, b_size, o_col, b_max, b_inv, N, scale, 0.0, SIZES)
        # [BM, BN]
        b_key = _key(b_p)
        m_valid = m_row[:, None] & m_col[None, :]
        below += tl.sum(tl.sum((m_valid & (b_key < low)).to(tl.int32), 1), 0)
        m_in = m_valid & (b_key >= low) & (b_key < high)
        b_in = m_in.to(tl.int32)
        # [BM]
        b_row = tl.sum(b_in, 1)
        found = tl.sum(b_row, 0)
        place = count
        if SHARED:
            place = tl.atomic_add(p_count, found.to(tl.int64), sem="relaxed")
        count += found
        b_place = (tl.cumsum(b_row, 0) - b_row)[:, None] + tl.cumsum(b_in, 1) - 1 + place.to(tl.int64)
        tl.store(p_candidates + b_place, b_key, mask=m_in & (b_place < room))
    return below, count


@triton.jit
def _narrow(b_hist, low, shift, rank):
    """(low, shift, rank) of the bin that holds the rank-th smallest; shift −1 where the bin was one key."""
    digit = _bin_of(b_hist, 0, rank)
    rank -= tl.sum(tl.where(tl.arange(0, BINS) < digit, b_hist, 0), 0)
    low += digit.to(low.dtype) << shift.to(low.dtype)
    return low, tl.where(shift > 0, tl.maximum(shift - _BITS, 0), -1), rank


@triton.jit
def _select(p_candidates, count, low, high, rank):
    """The rank-th smallest of `count` keys in [low, high): 24 bits at most, 6 bits a pass."""
    shift = _shift_of(high - low)
    while shift >= 0:
        b_hist = tl.zeros([BINS], tl.int32)
        for first in range(0, count, _CHUNK):
            o_key = first + tl.arange(0, _CHUNK)
            b_key = tl.load(p_candidates + o_key, mask=o_key < count, other=0)
            b_hist += _count_bins(b_key, o_key < count, low, shift, _CHUNK)
        low, shift, rank = _narrow(b_hist, low, shift, rank)
    return low


@triton.jit
def search_map(
    p_q, p_k, p_size, p_stats, o_dim, q_row, q_dim, k_row, k_dim, size_row, N, D, scale, scale_low, rank,
    BM: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr,
    SIZES: tl.constexpr, DOUBLE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """T by radix passes of 6 bits over the whole map of one head: 5 passes, 11 in float64."""
    if DOUBLE:
        low, shift = tl.full([], 0, tl.int64), tl.full([], 62 - _BITS, tl.int32)
    else:
        low, shift = tl.full([], 0, tl.int32), tl.full([], 30 - _BITS, tl.int32)
    rest = tl.cast(rank, tl.int64)
    while shift >= 0:
        b_hist = tl.zeros([BINS], tl.int64)
        for start in range(0, N, BM):
            o_row = start + tl.arange(0, BM)
            m_row = o_row < N
            q = operand(p_q, o_row, o_dim, q_row, q_dim, N, D, CHUNK)
            b_max = tl.load(p_stats + o_row, mask=m_row, other=0.0)
            b_inv = tl.load(p_stats + N + o_row, mask=m_row, other=0.0)
            for first in range(0, N, BN):
                o_col = first + tl.arange(0, BN)
                k = operand(p_k, o_col, o_dim, k_row, k_dim, N, D, CHUNK)
                _e, b_p = map_tile(
                    q, k, b_max, b_inv, o_col, p_size, q_dim, k_dim, size_row, N, D, scale, scale_low,
                    CHUNK, SIZES, DOUBLE, PRECISION, UPCAST,
                )  # fmt: skip
                b_hist += _count_bins(_key(b_p), m_row[:, None] & (o_col < N)[None, :], low, shift, BM * BN)
        low, shift, rest = _narrow(b_hist, low, shift, rest)
    return _value(low, DOUBLE)


@triton.jit
def threshold_among(p_candidates, below, count, low, high, room, rank):
    """T, among the candidates of a bracket; −1 where they do not hold it."""
    within = tl.cast(rank, tl.int64) - below
    # Below a bracket from key 1 there are only zeros.
    threshold = tl.where((within < 1) & (low == 1), 0.0, -1.0)
    if (within >= 1) & (within <= count) & (count <= room):
        threshold = _value(_select(p_candidates, count, low, high, within), False)
    return threshold
