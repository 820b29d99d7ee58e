"""token_importance, select_tokens, select: public functions, operators, fake kernels. None is differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from gtp_kernels import backends, checks, reference
from gtp_kernels.ops import _library
from gtp_kernels.reference import AttentionScores, scores_of_map
from gtp_kernels.reference.attention import compute_dtype
from gtp_kernels.reference.select import (
    check_importance,
    check_select,
    check_select_source,
    map_rows,
    random_importance,
)


def token_importance(
    scores: AttentionScores, standard: str = "MixedAttnMax", num_prefix: int = 1, semantics: str = "official"
) -> Tensor:
    """Importance of every image token (Section 3.2.1).

    With ⊕ the maximum or mean over heads, each taken on its own: Γ = ⊕ diag, Ψ = ⊕ colsum; ``MixedAttn*`` is Γ·Ψ,
    ``SumAttnMax`` Γ + Ψ, ``DiagAttn*`` Γ, ``IMGAttn*`` Ψ, ``CLSAttn*`` ⊕ cls_row. Under ``paper`` the diagonal is
    subtracted from the column sums, once. ``BroadAttn*``, the paper's name, is ``IMGAttn*``.

    Args:
        scores: AttentionScores of [B, H, N], float32 or float64.
        standard: one of the names above, ending in Mean or Max.
        num_prefix: R, tokens before the image tokens; ``CLSAttn*`` needs a class token in row 0.
        semantics: ``official`` or ``paper``.

    Returns:
        [B, N - R] in the scores' dtype.

    Raises:
        TypeError, ValueError: an argument, named, with what may come.
    """
    standard, num_prefix = check_importance(scores, standard, num_prefix, semantics)
    return unchecked_importance(scores, standard, num_prefix, semantics)


def unchecked_importance(scores: AttentionScores, standard: str, num_prefix: int, semantics: str) -> Tensor:
    """:func:`token_importance` for a caller whose arguments are right by construction."""
    backend = backends.choose("select", scores.diag)
    if backend == "reference":
        return reference.token_importance(scores, standard, num_prefix, semantics)
    ops = _library.operators(backend)
    return ops.token_importance(*(s.detach() for s in scores), standard, num_prefix, semantics)


def select_tokens(
    importance: Tensor, num_prop: int, *, num_prefix: int = 1, order: str = "grid"
) -> tuple[Tensor, Tensor]:
    """The P image tokens of lowest importance leave; equal importance: the higher index leaves; NaN is the lowest.

    Args:
        importance: [B, n], any floating dtype.
        num_prop: P, 0 ≤ P < n.
        num_prefix: R, added to the indices.
        order: ``grid`` (ascending index) or ``importance`` (falling importance, ties lower index first).

    Returns:
        (index_kept, index_prop): int64 [B, n - P] and [B, P], indices into x (prefix counted).

    Raises:
        TypeError, ValueError: an argument, named, with what may come.
    """
    num_prop, num_prefix = check_select(importance, num_prop, num_prefix, order)
    return unchecked_select(importance, num_prop, num_prefix, order)


def unchecked_select(importance: Tensor, num_prop: int, num_prefix: int, order: str) -> tuple[Tensor, Tensor]:
    """:func:`select_tokens` for a caller whose arguments are right by construction."""
    backend = backends.choose("select", importance, num_prefix=num_prefix)
    if backend == "reference":
        return reference.select_tokens(importance, num_prop, num_prefix=num_prefix, order=order)
    wide = importance.detach().to(compute_dtype(importance.dtype))
    return _library.operators(backend).select_tokens(wide, num_prop, num_prefix, order)


def select(
    weight: Tensor | AttentionScores,
    standard: str = "MixedAttnMax",
    num_prop: int = 8,
    cls_token: bool = True,
    W: object = None,
    *,
    num_prefix: int | None = None,
    semantics: str = "official",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Selects the tokens to keep and to propagate; a drop-in for the authors' function of this name.

    Args:
        weight: the attention map [B, H, N, N], or its AttentionScores.
        standard: a name of :func:`token_importance`; ``CosSimMean`` or ``CosSimMax`` (dense map only: minus the summed
            cosine similarity of a token's query row to all others'); ``Random`` (normal draws).
        num_prop: P, 0 ≤ P < n.
        cls_token: whether row 0 is a class token.
        W: accepted and unused, as the authors' callers pass it.
        num_prefix: R; where given it replaces ``cls_token`` as the number of prefix tokens.
        semantics: ``official`` or ``paper``.
        generator: of the draws of ``Random``.

    Returns:
        (index_kept, index_prop): int64 [B, n - P] and [B, P], indices into x (prefix counted), both by falling
        importance, ties lower index first.

    Raises:
        TypeError, ValueError: an argument, named, with what may come.
    """
    standard, prefix = check_select_source(weight, standard, num_prop, cls_token, num_prefix, semantics, generator)
    if standard == "Random":
        importance = random_importance(weight, prefix, generator)
    elif standard in checks.MAP_STANDARDS:
        rows = map_rows(weight.detach(), standard, prefix)  # type: ignore[union-attr]  # checked: a map
        importance = -(rows @ rows.sum(1).unsqueeze(-1)).squeeze(-1)
    else:
        scores = weight if isinstance(weight, AttentionScores) else scores_of_map(weight.detach())
        importance = token_importance(scores, standard, prefix, semantics)
    return select_tokens(importance, num_prop, num_prefix=prefix, order="importance")


@_library.fake("token_importance")
def _importance_fake(
    diag: Tensor, colsum: Tensor, cls_row: Tensor, standard: str, num_prefix: int, semantics: str
) -> Tensor:
    return diag.new_empty(diag.shape[0], diag.shape[2] - num_prefix)


@_library.fake("select_tokens")
def _select_fake(importance: Tensor, num_prop: int, num_prefix: int, order: str) -> tuple[Tensor, Tensor]:
    batch, count = importance.shape
    kept = importance.new_empty(batch, count - num_prop, dtype=torch.int64)
    return kept, importance.new_empty(batch, num_prop, dtype=torch.int64)


def _importance_kernel(
    diag: Tensor, colsum: Tensor, cls_row: Tensor, standard: str, num_prefix: int, semantics: str
) -> Tensor:
    return reference.token_importance(AttentionScores(diag, colsum, cls_row), standard, num_prefix, semantics)


def _select_kernel(importance: Tensor, num_prop: int, num_prefix: int, order: str) -> tuple[Tensor, Tensor]:
    return reference.select_tokens(importance, num_prop, num_prefix=num_prefix, order=order)


_library.implement("token_importance", _importance_kernel)
_library.implement("select_tokens", _select_kernel)
