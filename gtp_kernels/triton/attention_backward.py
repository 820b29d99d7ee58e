"""Triton kernels of the gradients of the attention. The map is recomputed, and thresholded as in the forward.

With A the softmax map, M the mask of A >= T, dA = (dO vᵀ) ∘ M and δ_i = Σ_j A_ij dA_ij:
    dv = (A ∘ M)ᵀ dO,   dS = A ∘ (dA − δ),   dq = dS k · scale,   dk = dSᵀ q · scale
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gtp_kernels.triton import runtime
from gtp_kernels.triton.attention import Problem
from gtp_kernels.triton.attention_map import dot, head_of, load_rows, map_tile, operand, product


@triton.jit
def _grad_q_kernel(
    p_grad, p_q, p_k, p_v, p_size, p_stats, p_threshold, p_delta, p_grad_q,
    g_batch, g_head, g_row, g_dim, q_batch, q_head, q_row, q_dim, k_batch, k_head, k_row, k_dim,
    v_batch, v_head, v_row, v_dim, size_batch, size_row,
    H, N, D, scale, scale_low, factor, factor_low,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, CHUNK: tl.constexpr, PART: tl.constexpr,
    SIZES: tl.constexpr, RANKED: tl.constexpr, DOUBLE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """δ of a block of rows, and PART dimensions of its dq.

    Per program: q and dO once, k and v twice. FLOPs: 8·BM·N·d + 2·BM·N·PART.
    """
    blocks = tl.cdiv(N, BM)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    o_row = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    m_row = o_row < N
    o_dim = tl.arange(0, BD)
    o_part = tl.program_id(1) * PART + tl.arange(0, PART)
    p_k = head_of(p_k, head, H, k_batch, k_head)
    p_v = head_of(p_v, head, H, v_batch, v_head)
    p_size += (head // H) * size_batch
    p_stats += head * 2 * N
    q = operand(head_of(p_q, head, H, q_batch, q_head), o_row, o_dim, q_row, q_dim, N, D, CHUNK)
    grad = operand(head_of(p_grad, head, H, g_batch, g_head), o_row, o_dim, g_row, g_dim, N, D, CHUNK)
    b_max = tl.load(p_stats + o_row, mask=m_row, other=0.0)
    b_inv = tl.load(p_stats + N + o_row, mask=m_row, other=0.0)
    if RANKED:
        threshold = tl.load(p_threshold + head)
    if DOUBLE:
        b_delta = tl.zeros([BM], tl.float64)
        b_grad_q = tl.zeros([BM, PART], tl.float64)
    else:
        b_delta = tl.zeros([BM], tl.float32)
        b_grad_q = tl.zeros([BM, PART], tl.float32)
    for turn in tl.static_range(2):
        for start in range(0, N, BN):
            o_col = start + tl.arange(0, BN)
            k = operand(p_k, o_col, o_dim, k_row, k_dim, N, D, CHUNK)
            v = operand(p_v, o_col, o_dim, v_row, v_dim, N, D, CHUNK)
            # [BM, BN]
            _e, b_p = map_tile(
                q, k, b_max, b_inv, o_col, p_size, q_dim, k_dim, size_row, N, D, scale, scale_low,
                CHUNK, SIZES, DOUBLE, PRECISION, UPCAST,
            )  # fmt: skip
            b_da = product(grad, v, g_dim, v_dim, D, CHUNK, PRECISION, UPCAST)
            if RANKED:
                b_da = tl.where(b_p < threshold, 0.0, b_da)
            if turn == 0:
                b_delta += tl.sum(b_p * b_da, 1)
            else:
                b_ds = b_p * (b_da - b_delta[:, None])
                b_k = load_rows(p_k, o_col, o_part, k_row, k_dim, N, D)
                b_grad_q += dot(b_ds.to(b_k.dtype), b_k, PRECISION, UPCAST)
    tl.store(p_delta + head * N + o_row, b_delta, mask=m_row & (tl.program_id(1) == 0))
    b_factor = tl.cast(factor, b_grad_q.dtype)
    if DOUBLE:
        b_factor += tl.cast(factor_low, tl.float64)
    p_row = p_grad_q + head * N * D + o_row.to(tl.int64)[:, None] * D + o_part[None, :]
    b_grad_q = (b_grad_q * b_factor).to(p_grad_q.dtype.element_ty)
    tl.store(p_row, b_grad_q, mask=m_row[:, None] & (o_part < D)[None, :])


@triton.jit
def _grad_kv_kernel(
    p_grad, p_q, p_k, p_v, p_size, p_stats, p_threshold, p_delta, p_grad_k, p_grad_v,
    g_batch, g_head, g_row, g_dim, q_batch, q_head, q_row, q_dim, k_batch, k_head, k_row, k_dim,
    v_batch, v_head, v_row, v_dim, size_batch, size_row,
    H, N, D, scale, scale_low, factor, factor_low,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, CHUNK: tl.constexpr, PART: tl.constexpr,
    SIZES: tl.constexpr, RANKED: tl.constexpr, DOUBLE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """PART dimensions of dk and dv of a block of keys; δ is read.

    Per program: k and v once, q and dO once. FLOPs: 4·N·BN·(d + PART).
    """
    blocks = tl.cdiv(N, BN)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    o_col = (tl.program_id(0) % blocks) * BN + tl.arange(0, BN)
    o_dim = tl.arange(0, BD)
    o_part = tl.program_id(1) * PART + tl.arange(0, PART)
    p_q = head_of(p_q, head, H, q_batch, q_head)
    p_grad = head_of(p_grad, head, H, g_batch, g_head)
    p_size += (head // H) * size_batch
    p_stats += head * 2 * N
    k = operand(head_of(p_k, head, H, k_batch, k_head), o_col, o_dim, k_row, k_dim, N, D, CHUNK)
    v = operand(head_of(p_v, head, H, v_batch, v_head), o_col, o_dim, v_row, v_dim, N, D, CHUNK)
    if RANKED:
        threshold = tl.load(p_threshold + head)
    # [BN, PART]
    if DOUBLE:
        b_grad_k = tl.zeros([BN, PART], tl.float64)
        b_grad_v = tl.zeros([BN, PART], tl.float64)
    else:
        b_grad_k = tl.zeros([BN, PART], tl.float32)
        b_grad_v = tl.zeros([BN, PART], tl.float32)
    for start in range(0, N, BM):
        o_row = start + tl.arange(0, BM)
        m_row = o_row < N
        q = operand(p_q, o_row, o_dim, q_row, q_dim, N, D, CHUNK)
        grad = operand(p_grad, o_row, o_dim, g_row, g_dim, N, D, CHUNK)
        b_max = tl.load(p_stats + o_row, mask=m_row, other=0.0)
        b_inv = tl.load(p_stats + N + o_row, mask=m_row, other=0.0)
        b_delta = tl.load(p_delta + head * N + o_row, mask=m_row, other=0.0)
        # [BM, BN]
        _e, b_p = map_tile(
            q, k, b_max, b_inv, o_col, p_size, q_dim, k_dim, size_row, N, D, scale, scale_low,
            CHUNK, SIZES, DOUBLE, PRECISION, UPCAST,
        )  # fmt: skip
        b_p = tl.where(m_row[:, None], b_p, 0.0)
        b_da = product(grad, v, g_dim, v_dim, D, CHUNK, PRECISION, UPCAST)
        b_a = b_p
        if RANKED:
            m_drop = b_p < threshold
            b_a = tl.where(m_drop, 0.0, b_p)
            b_da = tl.where(m_drop, 0.0, b_da)
        b_grad = load_rows(p_grad, o_row, o_part, g_row, g_dim, N, D)
        b_grad_v += dot(tl.trans(b_a.to(b_grad.dtype)), b_grad, PRECISION, UPCAST)
        b_ds = tl.where(m_row[:, None], b_p * (b_da - b_delta[:, None]), 0.0)
        b_q = load_rows(p_q, o_row, o_part, q_row, q_dim, N, D)
        b_grad_k += dot(tl.trans(b_ds.to(b_q.dtype)), b_q, PRECISION, UPCAST)
    b_factor = tl.cast(factor, b_grad_k.dtype)
    if DOUBLE:
        b_factor += tl.cast(factor_low, tl.float64)
    o_out = head * N * D + o_col.to(tl.int64)[:, None] * D + o_part[None, :]
    m_out = (o_col < N)[:, None] & (o_part < D)[None, :]
    tl.store(p_grad_k + o_out, (b_grad_k * b_factor).to(p_grad_k.dtype.element_ty), mask=m_out)
    tl.store(p_grad_v + o_out, b_grad_v.to(p_grad_v.dtype.element_ty), mask=m_out)


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
    if runtime.any_zero(*grad_q.shape):
        return grad_q, grad_k, grad_v
    problem = Problem("attention_backward", q, k, token_scales, sparsity, scale, semantics)
    stats, threshold = problem.statistics(None, None)
    delta = q.new_empty(problem.programs, problem.num_tokens, dtype=problem.dtype)
    inputs = (grad_out, q, k, v, problem.token_scales, stats, threshold, delta)
    strides = (*grad_out.stride(), *q.stride(), *k.stride(), *v.stride(), *problem.size_strides)
    numbers = (*problem.shape, *problem.scale, *problem.factor)
    part = min(problem.tile["part"] or problem.constants["BD"], problem.constants["BD"])
    constants = {**problem.constants, "PART": part, "RANKED": problem.rank > 0}
    parts = problem.constants["BD"] // part
    grid = (*problem.grid, parts)
    runtime.launch(_grad_q_kernel)[grid](*inputs, grad_q, *strides, *numbers, **constants)
    runtime.launch(_grad_kv_kernel)[grid](*inputs, grad_k, grad_v, *strides, *numbers, **constants)
    return grad_q, grad_k, grad_v
