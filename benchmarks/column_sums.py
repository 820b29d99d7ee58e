"""The scores of an attention map by a kernel of their own, beside torch's fused attention: the baseline that does in
two steps, over the whole map, what ``attention_with_scores`` does in one.

torch's kernel gives the output and the logarithm of each row's sum of exponentials, from which this one computes
``diag``, ``colsum`` and ``cls_row``: softmax(q kᵀ · scale) again, summed over the queries, not thresholded.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def _column_sums(  # type: ignore[no-untyped-def]  # Triton's language
    q, k, lse, diag, colsum, cls_row, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_lse,
    heads, scale, N: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """One block of BN keys of one (image, head), walked over by all queries, BM at a time.

    WIDE multiplies in float32: the interpreter has no products of halves.
    """
    head = tl.program_id(1).to(tl.int64)
    o_k, o_d = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BD)
    m_k, m_d = o_k < N, o_d < D
    p_q = q + head // heads * stride_qb + head % heads * stride_qh
    p_k = k + head // heads * stride_kb + head % heads * stride_kh
    p_lse = lse + head * stride_lse
    m_keys = m_k[:, None] & m_d
    # [BN, BD]
    b_k = tl.load(p_k + o_k[:, None] * stride_kn + o_d, mask=m_keys, other=0.0)
    # [BN]
    b_own = tl.load(p_q + o_k[:, None] * stride_qn + o_d, mask=m_keys, other=0.0)
    b_first = tl.load(p_q + o_d, mask=m_d, other=0.0)
    b_diag = tl.sum(b_own.to(tl.float32) * b_k.to(tl.float32), 1) * scale
    b_cls = tl.sum(b_first[None, :].to(tl.float32) * b_k.to(tl.float32), 1) * scale
    tl.store(diag + head * N + o_k, tl.exp(b_diag - tl.load(p_lse + o_k, mask=m_k, other=0.0)), mask=m_k)
    tl.store(cls_row + head * N + o_k, tl.exp(b_cls - tl.load(p_lse)), mask=m_k)
    b_sum = tl.zeros((BN,), tl.float32)
    for start in range(0, N, BM):
        o_q = start + tl.arange(0, BM)
        m_q = o_q < N
        b_q = tl.load(p_q + o_q[:, None] * stride_qn + o_d, mask=m_q[:, None] & m_d, other=0.0)
        if WIDE:
            b_q, b_k = b_q.to(tl.float32), b_k.to(tl.float32)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        b_lse = tl.load(p_lse + o_q, mask=m_q, other=float("inf"))
        # [BM, BN]; 0 beyond the last query
        b_sum += tl.sum(tl.exp(b_s * scale - b_lse[:, None]), 0)
    tl.store(colsum + head * N + o_k, b_sum, mask=m_k)


def column_sums(q: Tensor, k: Tensor, lse: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """diag, colsum and cls_row, each float32 [B, H, N].

    Args:
        q, k: [B, H, N, d], the last stride 1.
        lse: float32 [B, H, N or more], natural logarithms of the rows' sums of exponentials.
        scale: factor of the logits.
    """
    batch, heads, num_tokens, size = q.shape
    lse = lse.contiguous()
    diag, colsum, cls_row = (torch.empty(batch, heads, num_tokens, device=q.device) for _ in range(3))
    # Products of float32 keep more in registers: 64 spills on sm_90.
    block = 64 if q.element_size() == 2 else 32
    options: dict[str, Any] = {} if INTERPRETED else {"num_warps": 4, "num_stages": 2}
    _column_sums[(triton.cdiv(num_tokens, block), batch * heads)](
        q, k, lse, diag, colsum, cls_row, *q.stride()[:3], *k.stride()[:3], lse.shape[-1],
        heads, scale, N=num_tokens, D=size, BD=max(16, triton.next_power_of_2(size)), BM=block, BN=block,
        WIDE=INTERPRETED, **options,
    )  # fmt: skip
    return diag, colsum, cls_row


def sdpa_with_scores(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, diag, colsum and cls_row of the whole map, without token scales."""
    aten: Any = torch.ops.aten
    scale = q.shape[-1] ** -0.5
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    elif q.element_size() == 2:
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2]
    else:
        out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=scale)[:2]
    return (out, *column_sums(q, k, lse, scale))
