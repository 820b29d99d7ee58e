"""attention_with_scores: public function, operator, fake kernel, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gtp_kernels import backends, checks, reference
from gtp_kernels.ops import _library
from gtp_kernels.reference import AttentionScores
from gtp_kernels.reference import attention as definition


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
    """Attention that also gives the scores of its map, which is never written to main memory.

        A = softmax(q kᵀ · scale + log(token_scales))     (Equation 11)
        A_ij = 0 where A_ij < T, nothing is renormalised  (Section 3.2.4)
        out = A v

    T is taken per image and head. ``official``: the k-th smallest of the N² values, ``k = int(N * N * (1 - θ))``, k = 0
    keeps all; ``paper``: the ``ceil(θ * N * N)``-th largest. Arithmetic is float32 (float64 for float64 input).

    Args:
        q, k, v: [B, H, N, d], one floating dtype, any strides.
        token_scales: [B, N], not negative, any floating dtype, used in the arithmetic's type; None is all ones.
        sparsity: θ in (0, 1], the share of the map that stays.
        scale: factor of the logits; None is ``d ** -0.5``.
        semantics: ``official`` or ``paper``; here it changes the threshold only.

    Returns:
        out [B, H, N, d] in q's dtype, laid out so that ``out.transpose(1, 2).reshape(B, N, H * d)`` is a view; and
        :class:`AttentionScores` (diag, colsum, cls_row), each [B, H, N] float32 (float64 for float64 input), of the map
        that multiplied v. ``colsum`` counts all N queries.

    Gradients reach q, k and v through out, reverse mode and first order (the backend ``reference`` has the others);
    scores and token scales are not differentiable. The backward recomputes the
    map. Under autocast, q, k and v are cast as scaled_dot_product_attention's are.

    Raises:
        TypeError, ValueError: an argument's type, dtype, device, shape or value, named.
        RuntimeError: the forced backend cannot run.
    """
    q, k, v = _library.autocast(q, k, v)
    sparsity, scale = checks.attention(q, k, v, token_scales, sparsity, scale, semantics)
    return unchecked_attention(q, k, v, token_scales, sparsity, scale, semantics)


def unchecked_attention(
    q: Tensor, k: Tensor, v: Tensor, token_scales: Tensor | None, sparsity: float, scale: float, semantics: str
) -> tuple[Tensor, AttentionScores]:
    """:func:`attention_with_scores` for a caller whose arguments are right by construction; no autocast either."""
    backend = backends.choose("attention", q, k, v)
    if backend == "reference":
        return reference.attention_with_scores(
            q, k, v, token_scales, sparsity=sparsity, scale=scale, semantics=semantics
        )
    _library.refuse_forward_mode(q, k, v)
    if token_scales is not None:
        token_scales = token_scales.detach().to(definition.compute_dtype(q.dtype))
    out, diag, colsum, cls_row = _library.operators(backend).attention_with_scores(
        q, k, v, token_scales, sparsity, scale, semantics
    )
    return out, AttentionScores(diag, colsum, cls_row)


@_library.fake("attention_with_scores")
def _fake(
    q: Tensor, k: Tensor, v: Tensor, token_scales: Tensor | None, sparsity: float, scale: float, semantics: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, num_tokens, size = q.shape
    out = q.new_empty(batch, num_tokens, heads, size).transpose(1, 2)
    scores = (q.new_empty(batch, heads, num_tokens, dtype=definition.compute_dtype(q.dtype)) for _ in range(3))
    return (out, *scores)  # type: ignore[return-value]  # one and three


@_library.fake("attention_with_scores_backward")
def _backward_fake(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_scales: Tensor | None,
    sparsity: float,
    scale: float,
    semantics: str,
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (q, k, v))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, token_scales, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, token_scales)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ops: Any, ctx: Any, grad_out: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    grads = ops.attention_with_scores_backward(grad_out, *ctx.saved_tensors, *ctx.options)
    return (*grads, None, None, None, None)


def _no_second_order(ops: Any, ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
    raise RuntimeError(
        "attention_with_scores is differentiable once; for second-order gradients use the plain PyTorch definition: "
        "with gtp_kernels.use_backend('reference')"
    )


def _reference_kernel(
    q: Tensor, k: Tensor, v: Tensor, token_scales: Tensor | None, sparsity: float, scale: float, semantics: str
) -> tuple[Tensor, ...]:
    out, scores = reference.attention_with_scores(
        q, k, v, token_scales, sparsity=sparsity, scale=scale, semantics=semantics
    )
    return (out, *scores)


_library.implement("attention_with_scores", _reference_kernel)
_library.implement("attention_with_scores_backward", definition.attention_with_scores_backward)
_library.autograd("attention_with_scores", _backward, _setup_context)
_library.autograd("attention_with_scores_backward", _no_second_order, lambda ctx, inputs, output: None)
