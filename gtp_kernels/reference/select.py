"""Importance of the image tokens and the choice of those that leave: the definition, in plain PyTorch (Section 3.2.1).

Γ_j = ⊕_heads diag_j,  Ψ_j = ⊕_heads colsum_j,  importance: Γ·Ψ (Mixed), Γ+Ψ (Sum), Γ (Diag), Ψ (IMG), CLS row
"""

from __future__ import annotations

import torch
from torch import Tensor

from gtp_kernels import checks
from gtp_kernels.reference.attention import AttentionScores, compute_dtype, scores_of_map


def token_importance(
    scores: AttentionScores, standard: str = "MixedAttnMax", num_prefix: int = 1, semantics: str = "official"
) -> Tensor:
    """The definition of :func:`gtp_kernels.token_importance`."""
    standard, num_prefix = check_importance(scores, standard, num_prefix, semantics)
    diag, colsum, cls_row = (tensor[:, :, num_prefix:].detach() for tensor in scores)
    if semantics == "paper":
        colsum = colsum - diag

    def over_heads(tensor: Tensor) -> Tensor:
        return tensor.mean(1) if standard.endswith("Mean") else tensor.amax(1)

    if standard.startswith("CLSAttn"):
        return over_heads(cls_row)
    if standard.startswith("IMGAttn"):
        return over_heads(colsum)
    if standard.startswith("DiagAttn"):
        return over_heads(diag)
    if standard.startswith("SumAttn"):
        return over_heads(diag) + over_heads(colsum)
    return over_heads(diag) * over_heads(colsum)


def check_importance(scores: AttentionScores, standard: str, num_prefix: int, semantics: str) -> tuple[str, int]:
    """Checks the arguments of ``token_importance``; returns (standard, num_prefix)."""
    if not isinstance(scores, AttentionScores):
        raise TypeError(f"scores must be AttentionScores; got {type(scores).__name__}")
    standard = checks.standard("standard", standard, checks.SCORE_STANDARDS)
    checks.choice("semantics", semantics, checks.SEMANTICS)
    checks.scores(*scores)
    num_prefix = checks.prefix(num_prefix, None, scores.diag.shape[2], "scores")
    if standard.startswith("CLSAttn") and num_prefix == 0:
        raise ValueError(f"standard {standard!r} reads the class token's row: num_prefix must be at least 1; got 0")
    return standard, num_prefix


def select_tokens(
    importance: Tensor, num_prop: int, *, num_prefix: int = 1, order: str = "grid"
) -> tuple[Tensor, Tensor]:
    """The definition of :func:`gtp_kernels.select_tokens`."""
    num_prop, num_prefix = check_select(importance, num_prop, num_prefix, order)
    # Stable sorts: first by falling value (lower index first on ties), then NaN behind everything else.
    value = importance.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    rank = torch.sort(value, dim=1, descending=True, stable=True)[1]
    rank = rank.gather(1, torch.sort(importance.isnan().gather(1, rank).to(torch.uint8), dim=1, stable=True)[1])
    kept = rank[:, : importance.shape[1] - num_prop]
    prop = rank[:, importance.shape[1] - num_prop :]
    if order == "grid":
        kept, prop = kept.sort(1)[0], prop.sort(1)[0]
    return kept + num_prefix, prop + num_prefix


def check_select(importance: Tensor, num_prop: int, num_prefix: int, order: str) -> tuple[int, int]:
    """Checks the arguments of ``select_tokens``; returns (num_prop, num_prefix)."""
    checks.floating("importance", importance, 2, "[B, n]")
    checks.choice("order", order, checks.ORDERS)
    return checks.num_prop(num_prop, importance.shape[1]), checks.integer("num_prefix", num_prefix)


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
    """The definition of :func:`gtp_kernels.select`."""
    standard, prefix = check_select_source(weight, standard, num_prop, cls_token, num_prefix, semantics, generator)
    if standard == "Random":
        importance = random_importance(weight, prefix, generator)
    elif standard in checks.MAP_STANDARDS:
        rows = map_rows(weight, standard, prefix)  # type: ignore[arg-type]  # checked: a dense map
        importance = -(rows @ rows.transpose(-1, -2)).sum(-1)
    else:
        scores = weight if isinstance(weight, AttentionScores) else scores_of_map(weight)
        importance = token_importance(scores, standard, prefix, semantics)
    return select_tokens(importance, num_prop, num_prefix=prefix, order="importance")


def check_select_source(
    weight: Tensor | AttentionScores,
    standard: str,
    num_prop: int,
    cls_token: bool,
    num_prefix: int | None,
    semantics: str,
    generator: object,
) -> tuple[str, int]:
    """Checks the arguments of ``select``; returns (standard, number of prefix tokens)."""
    standard = checks.standard("standard", standard, checks.STANDARDS)
    checks.choice("semantics", semantics, checks.SEMANTICS)
    if isinstance(weight, AttentionScores):
        checks.scores(*weight)
        num_tokens = weight.diag.shape[2]
        if standard in checks.MAP_STANDARDS:
            raise ValueError(f"standard {standard!r} needs the dense map [B, H, N, N] as weight; got AttentionScores")
    elif isinstance(weight, Tensor):
        checks.floating("weight", weight, 4, "[B, H, N, N]")
        num_tokens = weight.shape[3]
        if weight.shape[2] != num_tokens or weight.shape[1] == 0 or num_tokens == 0:
            raise ValueError(f"weight must be [B, H, N, N] with H, N of at least 1; got shape {tuple(weight.shape)}")
    else:
        raise TypeError(f"weight must be a tensor [B, H, N, N] or AttentionScores; got {type(weight).__name__}")
    prefix = checks.prefix(num_prefix, cls_token, num_tokens, "weight")
    if standard.startswith("CLSAttn") and (prefix == 0 or not cls_token):
        raise ValueError(
            f"standard {standard!r} reads the class token's row: cls_token must be True and num_prefix at least 1; "
            f"got cls_token={cls_token}, num_prefix={num_prefix}"
        )
    checks.num_prop(num_prop, num_tokens - prefix)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None; got {type(generator).__name__}")
    return standard, prefix


def random_importance(weight: Tensor | AttentionScores, prefix: int, generator: torch.Generator | None) -> Tensor:
    """float32 [B, n] drawn from a normal distribution."""
    like = weight.diag if isinstance(weight, AttentionScores) else weight
    return torch.randn(like.shape[0], like.shape[-1] - prefix, device=like.device, generator=generator)


def map_rows(weight: Tensor, standard: str, prefix: int) -> Tensor:
    """[B, n, N] rows of the image queries over heads, at unit length (a zero row stays zero); float32 or float64."""
    rows = weight[:, :, prefix:].to(compute_dtype(weight.dtype))
    rows = rows.mean(1) if standard.endswith("Mean") else rows.amax(1)
    norm = rows.norm(dim=-1, keepdim=True)
    return rows / torch.where(norm == 0, 1.0, norm)
