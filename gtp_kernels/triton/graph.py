"""Triton kernels of build_graph (Equations 5 to 9).

Cosine similarities with a running top M per row, never storing n × n; then the CSR of the union with the grid.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gtp_kernels.reference.attention import compute_dtype
from gtp_kernels.reference.graph import edge_capacity, num_semantic_neighbours
from gtp_kernels.triton import configs, runtime


def dot_precision() -> str:
    """What tl.dot does with float32: IEEE products, unless torch's own matmul precision allows TF32."""
    if torch.version.hip is None and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "ieee"


@triton.jit
def _norm_kernel(
    p_x, p_inverse, n, C, R, stride_b, stride_n, stride_c, WIDE: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """inverse[b, i] = 1 / max(|x_i|, 1e-12); 0 where finite values overflow the norm, NaN where one is not finite.
    Reads B·n·C elements, writes B·n; 2·C FLOPs a row."""
    ACC: tl.constexpr = tl.float64 if WIDE else tl.float32
    pid = tl.program_id(0).to(tl.int64)
    p_x += (pid // n) * stride_b + (pid % n + R) * stride_n
    b_square = tl.zeros([BLOCK_C], ACC)
    b_bad = tl.zeros([BLOCK_C], tl.int32)
    for c0 in range(0, C, BLOCK_C):
        o_c = c0 + tl.arange(0, BLOCK_C).to(tl.int64)
        b_x = tl.load(p_x + o_c * stride_c, mask=o_c < C, other=0.0).to(ACC)
        b_square += b_x * b_x
        b_bad |= 1 - (tl.abs(b_x) < float("inf")).to(tl.int32)
    norm = tl.sqrt(tl.sum(b_square, 0))
    inverse = 1.0 / tl.where(norm > 1e-12, norm, 1e-12)
    inverse = tl.where(tl.max(b_bad, 0) > 0, float("nan"), inverse)
    tl.store(p_inverse + pid, inverse)


@triton.jit
def _nearest_kernel(
    p_x, p_inverse, p_nearest,
    n, C, R, M, blocks,
    stride_b, stride_n, stride_c,
    WIDE: tl.constexpr, CAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """nearest[b, i, :] = the M tokens j ≠ i of largest x_i·x_j / (|x_i| |x_j|), in any order; ties: lower j; NaN last.
    2·n²·C FLOPs an image; reads x once per row block (from cache), writes 4·B·n·M bytes. Half types are multiplied as
    they are, exactly, and the norms come in after the product."""
    ACC: tl.constexpr = tl.float64 if WIDE else tl.float32
    KEY: tl.constexpr = tl.int64 if WIDE else tl.int32
    magnitude: tl.constexpr = 0x7FFFFFFFFFFFFFFF if WIDE else 0x7FFFFFFF
    infinity: tl.constexpr = 0x7FF0000000000000 if WIDE else 0x7F800000
    # Below NaN, which is one above: places that hold no candidate.
    nothing: tl.constexpr = -magnitude - 1
    pid = tl.program_id(0).to(tl.int64)
    b = pid // blocks
    o_i = (pid % blocks).to(tl.int32) * BLOCK_I + tl.arange(0, BLOCK_I)
    m_i = o_i < n
    p_x += b * stride_b
    p_left = p_x + (o_i.to(tl.int64) + R)[:, None] * stride_n
    b_inverse_i = tl.load(p_inverse + b * n + o_i, mask=m_i, other=0.0)
    o_m = tl.arange(0, BLOCK_M)
    # [BLOCK_I, BLOCK_M] the best so far: NaN at indices above all others; places beyond M are never the worst.
    b_best = tl.where(o_m[None, :] < M, nothing + 1, magnitude).to(KEY) + tl.zeros([BLOCK_I, BLOCK_M], KEY)
    b_which = tl.where(o_m < M, n + o_m, -1)[None, :] + tl.zeros([BLOCK_I, BLOCK_M], tl.int32)

    for j0 in range(0, n, BLOCK_J):
        o_j = j0 + tl.arange(0, BLOCK_J)
        m_j = o_j < n
        p_right = p_x + (o_j.to(tl.int64) + R)[:, None] * stride_n
        # [BLOCK_I, BLOCK_J]
        b_dot = tl.zeros([BLOCK_I, BLOCK_J], ACC)
        for c0 in range(0, C, BLOCK_C):
            o_c = c0 + tl.arange(0, BLOCK_C).to(tl.int64)
            m_c = o_c < C
            b_left = tl.load(p_left + o_c[None, :] * stride_c, mask=m_i[:, None] & m_c[None, :], other=0.0)
            b_right = tl.load(p_right + o_c[None, :] * stride_c, mask=m_j[:, None] & m_c[None, :], other=0.0)
            if CAST:
                b_left, b_right = b_left.to(ACC), b_right.to(ACC)
            if WIDE:
                b_dot += tl.sum(b_left[:, None, :] * b_right[None, :, :], axis=2)
            else:
                b_dot = tl.dot(b_left, tl.trans(b_right), b_dot, input_precision=PRECISION)
        b_inverse_j = tl.load(p_inverse + b * n + o_j, mask=m_j, other=0.0)
        b_similarity = b_dot * b_inverse_i[:, None] * b_inverse_j[None, :]
        # A row whose norm overflowed is 0 at unit length, whatever its products are; NaN in the other row stays.
        overflow = (b_inverse_i[:, None] == 0.0) | (b_inverse_j[None, :] == 0.0)
        b_similarity = tl.where(overflow, b_inverse_i[:, None] * b_inverse_j[None, :], b_similarity)
        b_bits = b_similarity.to(KEY, bitcast=True)
        b_size = b_bits & magnitude
        b_key = tl.where(b_bits < 0, b_bits ^ magnitude, b_bits)
        b_key = tl.where(b_size == 0, 0, b_key)
        b_key = tl.where(b_size > infinity, nothing + 1, b_key)
        b_key = tl.where(m_j[None, :] & (o_i[:, None] != o_j[None, :]), b_key, nothing)

        improved = 1
        while improved > 0:
            # [BLOCK_I] the best candidate of the block, and the worst of the best so far
            b_top = tl.max(b_key, axis=1)
            b_top_j = tl.min(tl.where(b_key == b_top[:, None], o_j[None, :], n + BLOCK_J + BLOCK_M), axis=1)
            b_worst = tl.min(b_best, axis=1)
            b_worst_j = tl.max(tl.where(b_best == b_worst[:, None], b_which, -1), axis=1)
            m_take = m_i & ((b_top > b_worst) | ((b_top == b_worst) & (b_top > nothing) & (b_top_j < b_worst_j)))
            replaced = m_take[:, None] & (b_best == b_worst[:, None]) & (b_which == b_worst_j[:, None])
            b_best = tl.where(replaced, b_top[:, None], b_best)
            b_which = tl.where(replaced, b_top_j[:, None], b_which)
            b_key = tl.where(o_j[None, :] == b_top_j[:, None], nothing, b_key)
            improved = tl.sum(m_take.to(tl.int32), 0)
    p_out = p_nearest + (b * n + o_i[:, None]) * M + o_m[None, :]
    tl.store(p_out, b_which, mask=m_i[:, None] & (o_m[None, :] < M))


@triton.jit
def _candidates(
    p_nearest, row0, o_i, o_t, n, M, height, width, SPATIAL: tl.constexpr, SEMANTIC: tl.constexpr
):  # fmt: skip
    """int32 [rows, candidates] columns of the tokens o_i, unordered, each once; -1 where there is none. The first M are
    the semantic neighbours (less those on the grid, where SPATIAL), the next 8 the grid neighbours."""
    y, x = (o_i // width)[:, None], (o_i % width)[:, None]
    m_i = (o_i < n)[:, None]
    b_column = tl.zeros([o_i.shape[0], o_t.shape[0]], tl.int32) - 1
    if SEMANTIC:
        m_nearest = m_i & (o_t < M)[None, :]
        b_nearest = tl.load(p_nearest + (row0 + o_i)[:, None] * M + o_t[None, :], mask=m_nearest, other=-1)
        m_nearest = m_nearest & (b_nearest >= 0) & (b_nearest < n)
        if SPATIAL:
            away_y, away_x = tl.abs(b_nearest // width - y), tl.abs(b_nearest % width - x)
            m_nearest = m_nearest & ((away_y > 1) | (away_x > 1))
        b_column = tl.where(m_nearest, b_nearest, -1)
    if SPATIAL:
        # The places 0 … 8 of a 3 × 3 window without its centre.
        side = o_t - M
        side = side + (side >= 4).to(tl.int32)
        v, u = y + (side // 3)[None, :] - 1, x + (side % 3)[None, :] - 1
        m_side = ((o_t >= M) & (o_t < M + 8))[None, :] & m_i
        m_side = m_side & (v >= 0) & (v < height) & (u >= 0) & (u < width)
        b_column = tl.where(m_side, v * width + u, b_column)
    return b_column


@triton.jit
def _indptr_kernel(
    p_nearest, p_indptr, p_indices, p_values,
    n, M, height, width, E,
    SPATIAL: tl.constexpr, SEMANTIC: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """indptr[b] = the running sum of the degrees; zeros in indices and values beyond the last edge. One program an
    image. Reads 4·B·n·M bytes, writes 4·B·n and the padding."""
    b = tl.program_id(0).to(tl.int64)
    p_indptr += b * (n + 1)
    edges = tl.zeros([], tl.int32)
    tl.store(p_indptr, edges)
    for i0 in range(0, n, BLOCK_I):
        o_i = i0 + tl.arange(0, BLOCK_I)
        b_degree = tl.zeros([BLOCK_I], tl.int32)
        for t0 in range(0, M + 8, BLOCK_T):
            b_column = _candidates(
                p_nearest, b * n, o_i, t0 + tl.arange(0, BLOCK_T), n, M, height, width, SPATIAL, SEMANTIC
            )  # fmt: skip
            b_degree += tl.sum((b_column >= 0).to(tl.int32), axis=1)
        tl.store(p_indptr + 1 + o_i, edges + tl.cumsum(b_degree, 0), mask=o_i < n)
        edges += tl.sum(b_degree, 0)
    for e0 in range(edges, E, BLOCK_E):
        o_e = e0 + tl.arange(0, BLOCK_E)
        tl.store(p_indices + b * E + o_e, tl.zeros([BLOCK_E], tl.int32), mask=o_e < E)
        tl.store(p_values + b * E + o_e, tl.zeros([BLOCK_E], tl.float32), mask=o_e < E)


@triton.jit
def _emit_kernel(
    p_nearest, p_indptr, p_indices, p_values,
    n, M, height, width, E, blocks,
    SPATIAL: tl.constexpr, SEMANTIC: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """indices[indptr[i] + rank of j] = j,  values = 1 / sqrt(deg_i · deg_j) in float64, rounded once, for the columns j
    of row i; the rank by counting, (M + 8)² comparisons a row. Reads 4·B·n·M bytes, writes 8 an edge."""
    pid = tl.program_id(0).to(tl.int64)
    b = pid // blocks
    o_i = (pid % blocks).to(tl.int32) * BLOCK_I + tl.arange(0, BLOCK_I)
    o_t = tl.arange(0, BLOCK_T)
    # [BLOCK_I, BLOCK_T]
    b_column = _candidates(p_nearest, b * n, o_i, o_t, n, M, height, width, SPATIAL, SEMANTIC)
    b_rank = tl.zeros([BLOCK_I, BLOCK_T], tl.int32)
    for u0 in range(0, BLOCK_T, BLOCK_U):
        b_other = _candidates(
            p_nearest, b * n, o_i, u0 + tl.arange(0, BLOCK_U), n, M, height, width, SPATIAL, SEMANTIC
        )  # fmt: skip
        # [BLOCK_I, BLOCK_T, BLOCK_U]
        before = (b_other[:, None, :] >= 0) & (b_other[:, None, :] < b_column[:, :, None])
        b_rank += tl.sum(before.to(tl.int32), axis=2)
    p_indptr += b * (n + 1)
    m_i = o_i < n
    b_begin = tl.load(p_indptr + o_i, mask=m_i, other=0)
    b_degree = tl.load(p_indptr + o_i + 1, mask=m_i, other=0) - b_begin
    m_edge = b_column >= 0
    b_degree_j = tl.load(p_indptr + b_column + 1, mask=m_edge, other=0) - tl.load(
        p_indptr + b_column, mask=m_edge, other=0
    )
    b_product = b_degree.to(tl.float64)[:, None] * b_degree_j.to(tl.float64)
    b_value = tl.where(b_product > 0.0, 1.0 / tl.sqrt(tl.where(b_product > 0.0, b_product, 1.0)), 0.0).to(tl.float32)
    o_e = b_begin[:, None] + b_rank
    m_edge = m_edge & (o_e < E)
    tl.store(p_indices + b * E + o_e, b_column, mask=m_edge)
    tl.store(p_values + b * E + o_e, b_value, mask=m_edge)


def build_graph(
    x: Tensor, height: int, width: int, graph_type: str, num_neighbours: int, num_prefix: int, semantics: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``build_graph``: the CSR (indptr, indices, values) of the image tokens x[:, num_prefix:]."""
    batch, _, channels = x.shape
    n = height * width
    neighbours = num_semantic_neighbours(n, num_neighbours, num_prefix, semantics)
    edges = edge_capacity(height, width, graph_type, neighbours)
    indptr = x.new_empty(batch, n + 1, dtype=torch.int32)
    indices = x.new_empty(batch, edges, dtype=torch.int32)
    values = x.new_empty(batch, edges, dtype=torch.float32)
    if runtime.any_zero(batch):
        return indptr, indices, values
    spatial = graph_type != "Semantic"
    semantic = graph_type != "Spatial" and neighbours > 0
    nearest = indices
    if semantic:
        nearest = x.new_empty(batch, n, neighbours, dtype=torch.int32)
        dtype = compute_dtype(x.dtype)
        wide = dtype == torch.float64
        inverse = x.new_empty(batch, n, dtype=dtype)
        tile = configs.lookup("norm", x.device, x.dtype)
        runtime.launch(_norm_kernel)[(batch * n,)](
            x, inverse, n, channels, num_prefix, *x.stride(), WIDE=wide, BLOCK_C=tile["channels"],
            num_warps=tile["num_warps"],
        )  # fmt: skip
        tile = configs.lookup("nearest", x.device, x.dtype, neighbours=int(neighbours))
        blocks = triton.cdiv(n, tile["rows"])
        # The matrix units of gfx11 have layouts for no tensor narrower than 16: "least_best" widens the best so far.
        best = max(runtime.next_power_of_2(int(neighbours)), tile["least_best"])
        runtime.launch(_nearest_kernel)[(batch * blocks,)](
            x, inverse, nearest, n, channels, num_prefix, neighbours, blocks, *x.stride(), WIDE=wide,
            CAST=runtime.INTERPRETED, PRECISION=dot_precision(), BLOCK_I=tile["rows"], BLOCK_J=tile["columns"],
            BLOCK_C=tile["channels"], BLOCK_M=best, num_warps=tile["num_warps"], num_stages=tile["num_stages"],
        )  # fmt: skip
    listed = int(neighbours) if semantic else 0
    tile = configs.lookup("indptr", x.device, torch.int32)
    runtime.launch(_indptr_kernel)[(batch,)](
        nearest, indptr, indices, values, n, listed, height, width, edges, SPATIAL=spatial, SEMANTIC=semantic,
        BLOCK_I=tile["rows"], BLOCK_T=tile["candidates"], BLOCK_E=tile["padding"], num_warps=tile["num_warps"],
    )  # fmt: skip
    if edges and n:
        tile = configs.lookup("emit", x.device, torch.int32, neighbours=listed)
        candidates = max(runtime.next_power_of_2(listed + 8), 8)
        others = min(candidates, tile["others"])
        rows = max(tile["compared"] // (candidates * others), 1)
        blocks = triton.cdiv(n, rows)
        runtime.launch(_emit_kernel)[(batch * blocks,)](
            nearest, indptr, indices, values, n, listed, height, width, edges, blocks, SPATIAL=spatial,
            SEMANTIC=semantic, BLOCK_I=rows, BLOCK_T=candidates, BLOCK_U=others, num_warps=tile["num_warps"],
        )  # fmt: skip
    return indptr, indices, values
