"""What can be timed: op → inputs, ours, baselines, and how to see that both compute the same.

Baselines: ``sdpa`` is torch's fused attention, which gives no scores; ``sdpa+bias`` the same with log token scales;
``definition`` is the plain PyTorch reference. Shapes are those of DeiT-S (B16 H6 d64) and ViT-B/8 (B4 H12 d64).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import gtp_kernels
from gtp_kernels import reference

Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One row of the table: ``calls["ours"]`` and the baselines by name; ``check`` raises where ours is wrong."""

    op: str
    shape: str
    calls: dict[str, Call]
    check: Call


def attention_cases(dtype: torch.dtype) -> list[Case]:
    """attention_with_scores at θ = 0.6 with token scales."""
    cases = []
    for batch, heads, num_tokens, size in ((16, 6, 197, 64), (16, 6, 133, 64), (4, 12, 785, 64)):
        generator = torch.Generator().manual_seed(0)
        qkv = torch.randn(batch, num_tokens, 3, heads, size, generator=generator).to(dtype)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scales = 1 + torch.rand(batch, num_tokens, generator=generator)
        cases.append(_attention_case(q, k, v, scales))
    return cases


def _attention_case(q: Tensor, k: Tensor, v: Tensor, scales: Tensor) -> Case:
    bias = scales.log()[:, None, None].to(q.dtype)

    def ours() -> Tensor:
        return gtp_kernels.attention_with_scores(q, k, v, scales, sparsity=0.6)[0]

    def check() -> None:
        expected = reference.attention_with_scores(q, k, v, scales, sparsity=0.6)[0]
        _agree(ours(), expected, 1e-3 if q.dtype == torch.float32 else 4e-2)

    calls: dict[str, Call] = {
        "ours": ours,
        "sdpa": lambda: F.scaled_dot_product_attention(q, k, v),
        "sdpa+bias": lambda: F.scaled_dot_product_attention(q, k, v, bias),
        "definition": lambda: reference.attention_with_scores(q, k, v, scales, sparsity=0.6),
    }
    batch, heads, num_tokens, size = q.shape
    return Case("attention", f"B{batch} H{heads} N{num_tokens} d{size}", calls, check)


def select_cases(dtype: torch.dtype) -> list[Case]:
    """Importance and selection of 8 tokens; the baseline is the same by torch.topk and sort."""
    scores = gtp_kernels.AttentionScores(*(torch.rand(16, 6, 197) for _ in range(3)))

    def ours() -> tuple[Tensor, Tensor]:
        return gtp_kernels.select_tokens(gtp_kernels.token_importance(scores), 8)

    def plain() -> tuple[Tensor, Tensor]:
        importance = scores.diag[:, :, 1:].amax(1) * scores.colsum[:, :, 1:].amax(1)
        rank = importance.argsort(1, descending=True)
        return rank[:, :-8].sort(1)[0] + 1, rank[:, -8:].sort(1)[0] + 1

    def check() -> None:
        if not all(torch.equal(a, b) for a, b in zip(ours(), plain(), strict=True)):
            raise AssertionError("the selections differ")

    return [Case("select", "B16 H6 N197 P8", {"ours": ours, "plain": plain}, check)]


def propagate_cases(dtype: torch.dtype) -> list[Case]:
    """The fused step; the baselines are the definition and the unfused parts of an unpatched block."""
    generator = torch.Generator().manual_seed(0)
    x, branch = (torch.randn(16, 197, 384, generator=generator).to(dtype) for _ in range(2))
    graph = gtp_kernels.build_graph(x, (14, 14))
    kept, prop = gtp_kernels.select_tokens(torch.rand(16, 196, generator=generator), 8)
    scales = torch.ones(16, 197)
    weight, bias = torch.ones(384, dtype=dtype), torch.zeros(384, dtype=dtype)
    affine = {"norm_weight": weight, "norm_bias": bias, "token_scales": scales}

    def ours() -> Tensor:
        return gtp_kernels.residual_propagate_norm(x, branch, graph, kept, prop, **affine)[0]

    def definition() -> Tensor:
        return reference.residual_propagate_norm(x, branch, graph, kept, prop, **affine)[0]

    calls: dict[str, Call] = {
        "ours": ours,
        "add+norm": lambda: F.layer_norm(x + branch, (384,), weight, bias, 1e-6),
        "definition": definition,
    }
    return [
        Case(
            "propagate", "B16 N197 C384 P8", calls, lambda: _agree(ours(), definition(), 2 * torch.finfo(dtype).eps * 8)
        )
    ]


def graph_cases(dtype: torch.dtype) -> list[Case]:
    """build_graph, Mixed, M = 8; the baseline is the definition."""
    cases = []
    for batch, side, channels in ((16, 14, 384), (4, 28, 768)):
        x = torch.randn(batch, side * side + 1, channels, generator=torch.Generator().manual_seed(0)).to(dtype)

        def ours(x: Tensor = x, side: int = side) -> Tensor:
            return gtp_kernels.build_graph(x, (side, side)).indices

        def definition(x: Tensor = x, side: int = side) -> Tensor:
            return reference.build_graph(x, (side, side)).indices

        def check(ours: Call = ours, definition: Call = definition) -> None:
            # Similarities within rounding of each other may take each other's place.
            if (ours() == definition()).float().mean() < 0.5:  # type: ignore[union-attr]  # both are tensors
                raise AssertionError("the graphs differ")

        calls: dict[str, Call] = {"ours": ours, "definition": definition}
        cases.append(Case("graph", f"B{batch} n{side * side} C{channels}", calls, check))
    return cases


OPS = {
    "attention": attention_cases,
    "select": select_cases,
    "propagate": propagate_cases,
    "graph": graph_cases,
}


def model_case(name: str, batch: int, num_prop: int, dtype: torch.dtype) -> Case:
    """A timm model: ours is patched; ``timm`` is unpatched; ``slicing`` cuts off the last P tokens of each block."""
    import copy

    import timm

    import gtp_vit

    torch.manual_seed(0)
    dense = timm.create_model(name, pretrained=False).eval().to(dtype)
    patched = gtp_vit.patch(copy.deepcopy(dense), num_prop=num_prop, sparsity=0.6)
    sliced = copy.deepcopy(dense)
    for block in sliced.blocks:
        block.__class__ = _sliced_block(type(block), num_prop)
    images = torch.randn(batch, 3, *dense.patch_embed.img_size, generator=torch.Generator().manual_seed(0)).to(dtype)

    def check() -> None:
        with torch.inference_mode(), gtp_kernels.use_backend("reference"):
            expected = patched.forward_features(images[:1])
        with torch.inference_mode():
            ours = patched.forward_features(images[:1])
        if ours.shape != expected.shape:
            raise AssertionError(f"shapes differ: {tuple(ours.shape)}, {tuple(expected.shape)}")

    calls: dict[str, Call] = {
        "ours": lambda: patched(images),
        "timm": lambda: dense(images),
        "slicing": lambda: sliced(images),
    }
    return Case(name, f"B{batch} P{num_prop}", calls, check)


def _sliced_block(base: type, num_prop: int) -> type:
    class Sliced(base):  # type: ignore[misc]  # a timm block
        def forward(self, x: Tensor) -> Tensor:
            x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
            x = x[:, : x.shape[1] - num_prop]
            return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))  # type: ignore[no-any-return]

    return Sliced


def _agree(ours: Tensor, expected: Tensor, tolerance: float) -> None:
    error = float((ours.double() - expected.double()).norm() / expected.double().norm())
    if not error < tolerance:
        raise AssertionError(f"relative error {error:.1e}, above {tolerance:.1e}")
