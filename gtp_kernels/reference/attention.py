"""Attention that also returns the importance scores of its map: the definition, in plain PyTorch.

S = q kᵀ · scale + log(token_scales)          (Equation 11)
A = softmax(S, keys), then A_ij = 0 where A_ij < T   (Section 3.2.4)
out = A v,  diag_j = A_jj,  colsum_j = Σ_i A_ij,  cls_row_j = A_0j
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gtp_kernels import checks


class AttentionScores(NamedTuple):
    """What the selection reads of an attention map; each [B, H, N], float32 (float64 for float64 input).

    Attributes:
        diag: the diagonal A_jj (Equation 3: regeneration difficulty).
        colsum: the column sums Σ_i A_ij over all N queries (Equation 4: broadcasting ability).
        cls_row: row 0, the attention of the class token where there is one.
    """

    diag: Tensor
    colsum: Tensor
    cls_row: Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of the arithmetic: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def threshold_rank(num_tokens: int, sparsity: float, semantics: str) -> int:
    """The 1-based rank, from the smallest of the N² values, of the threshold; 0 keeps every value.

    ``official``: ``int(N * N * (1 - θ))``. ``paper``: the ``ceil(θ * N * N)``-th largest.
    """
    if semantics == "official":
        return int(num_tokens * num_tokens * (1 - sparsity))
    kept = math.ceil(sparsity * num_tokens * num_tokens)
    rank = num_tokens * num_tokens - kept + 1
    return 0 if rank <= 1 else rank


def attention_map(
    q: Tensor,
    k: Tensor,
    token_scales: Tensor | None = None,
    *,
    sparsity: float = 1.0,
    scale: float | None = None,
    semantics: str = "official",
) -> Tensor:
    """The thresholded softmax map [B, H, N, N], float32 (float64 for float64 input).

    Args, errors: those of :func:`gtp_kernels.attention_with_scores`.
    """
    sparsity, scale = checks.attention(q, k, k, token_scales, sparsity, scale, semantics)
    return _map(q, k, token_scales, sparsity, scale, semantics)


def _map(q: Tensor, k: Tensor, token_scales: Tensor | None, sparsity: float, scale: float, semantics: str) -> Tensor:
    dtype = compute_dtype(q.dtype)
    logits = (q.to(dtype) @ k.to(dtype).transpose(-1, -2)) * scale
    if token_scales is not None:
        logits = logits + token_scales.detach().to(dtype).log()[:, None, None, :]
    attn = logits.softmax(-1)
    rank = threshold_rank(q.shape[2], sparsity, semantics)
    if rank == 0 or attn.numel() == 0:
        return attn
    threshold = attn.detach().flatten(2).kthvalue(rank, dim=-1).values[..., None, None]
    return attn.masked_fill(attn < threshold, 0.0)


def attention_with_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_scales: Tensor | None = None,
    *,
    sparsity: float = 1.0,
    scale: float | None = None,
    semantics: str = "official",
) -> tuple[Tensor, AttentionScores]:
    """The definition of :func:`gtp_kernels.attention_with_scores`; it writes the N × N map."""
    sparsity, scale = checks.attention(q, k, v, token_scales, sparsity, scale, semantics)
    attn = _map(q, k, token_scales, sparsity, scale, semantics)
    # [B, N, H, d] in memory, seen as [B, H, N, d]
    out = (attn @ v.to(attn.dtype)).to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2)
    return out, scores_of_map(attn.detach())


def scores_of_map(attn: Tensor) -> AttentionScores:
    """The scores of a map [B, H, N, N], in float32 (float64 for float64)."""
    dtype = compute_dtype(attn.dtype)
    return AttentionScores(
        attn.diagonal(dim1=-2, dim2=-1).to(dtype, copy=True),
        attn.sum(-2, dtype=dtype),
        attn[:, :, 0].to(dtype, copy=True),
    )


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
    """Gradients for q, k, v [B, H, N, d]; the map is recomputed image by image, so memory is that of one image's map.

    With A the softmax map, M its mask and dA = (dO vᵀ) ∘ M:  dv = (A ∘ M)ᵀ dO,  dS = A ∘ (dA − Σ_j A_j dA_j),
    dq = dS k · scale,  dk = dSᵀ q · scale. Token scales get no gradient.
    """
    dtype = compute_dtype(q.dtype)
    grads = tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (q, k, v))
    rank = threshold_rank(q.shape[2], sparsity, semantics)
    for b in range(q.shape[0]):
        one = slice(b, b + 1)
        bq, bk, bv, b_grad = (t[one].to(dtype) for t in (q, k, v, grad_out))
        attn = _map(bq, bk, None if token_scales is None else token_scales[one], 1.0, scale, semantics)
        grad_attn = b_grad @ bv.transpose(-1, -2)
        masked = attn
        if rank:
            dropped = attn < attn.flatten(2).kthvalue(rank, dim=-1).values[..., None, None]
            masked = attn.masked_fill(dropped, 0.0)
            grad_attn = grad_attn.masked_fill_(dropped, 0.0)
        grads[2][one] = masked.transpose(-1, -2) @ b_grad
        grad_logits = attn * (grad_attn - (attn * grad_attn).sum(-1, keepdim=True)) * scale
        grads[0][one] = grad_logits @ bk
        grads[1][one] = grad_logits.transpose(-1, -2) @ bq
    return grads  # type: ignore[return-value]  # three of them
