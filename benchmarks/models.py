"""End to end: a timm model patched, against the same weights unpatched, with tokens cut off, and with ToMe."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import gtp_kernels
import gtp_vit
from benchmarks.registry import Case, Setting, agree
from benchmarks.tome import MergeOnly, ToMe
from gtp_vit.slicing import sliced

COMPILE_MODES = ("none", "default", "max-autotune")


def model_case(name: str, batch: int, setting: Setting, *, compile_mode: str = "none", **create: Any) -> Case:
    """One model: ``ours`` is patched (θ = 0.6); the baselines share its weights and input.

    ``timm`` is unpatched; ``slicing`` cuts off the last P tokens of each block, the floor of what token reduction can
    cost; ``slicing, fused linear`` does that with the linear layers of ``ours`` (on a CPU, not compiled), which tells
    what those give from what the rest gives; ``tome`` merges P tokens in each block. Its matching and merging alone
    are reported apart, ``tome overhead``.
    The FLOPs are those of the matrix products of ``ours``, as ``gtp_vit.gmacs`` counts them.

    Args:
        name: of timm.
        batch: images.
        setting: device, dtype, P.
        compile_mode: ``none``, or how torch.compile compiles every candidate. On a GPU each of them is timed as one
            CUDA graph either way.
        create: further arguments of ``timm.create_model``.
    """
    import timm

    torch.manual_seed(0)
    dense: Any = timm.create_model(name, pretrained=False, **create).eval().to(setting.device, setting.dtype)
    num_prop = setting.num_prop
    patched: Any = gtp_vit.patch(copy.deepcopy(dense), num_prop=num_prop, sparsity=0.6)
    images = setting.randn(batch, 3, *dense.patch_embed.img_size)
    num_tokens = dense.patch_embed.num_patches + dense.num_prefix_tokens
    heads = dense.blocks[0].attn.num_heads
    merging = MergeOnly(len(dense.blocks), num_prop, dense.embed_dim // heads, dense.num_prefix_tokens)
    tokens = setting.randn(batch, num_tokens, dense.embed_dim)

    modules = {"ours": patched, "timm": dense, "slicing": sliced(dense, num_prop), "tome": ToMe(dense, num_prop)}
    if not setting.on_gpu and compile_mode == "none":
        modules["slicing, fused linear"] = sliced(dense, num_prop, fused=True)
    calls = _calls(modules, images, compile_mode)
    parts = {"tome overhead": ("tome", _call(_compiled(merging, compile_mode), tokens))}
    flops = round(2e9 * batch * gtp_vit.gmacs(patched, images[:1]))
    shape = _shape(batch, num_prop, compile_mode)
    about = {"model": name, "batch": batch, "num_prop": num_prop, "compile": compile_mode, "sparsity": 0.6}
    check = _check(patched, dense.num_prefix_tokens, images)
    return Case(name, shape, calls, check, flops=flops, items=batch, parts=parts, about=about)


def live_case(name: str, batch: int, setting: Setting, *, compile_mode: str = "none", **create: Any) -> Case:
    """One model: ``ours`` is patched with LiveGraph (θ = 0.6); beside it GraphProp, and ToMe, at the same P.

    Arguments as of :func:`model_case`.
    """
    import timm

    torch.manual_seed(0)
    dense: Any = timm.create_model(name, pretrained=False, **create).eval().to(setting.device, setting.dtype)
    num_prop = setting.num_prop
    ours, published = (
        gtp_vit.patch(copy.deepcopy(dense), num_prop=num_prop, sparsity=0.6, propagation=propagation)
        for propagation in ("LiveGraph", "GraphProp")
    )
    images = setting.randn(batch, 3, *dense.patch_embed.img_size)
    modules = {"ours": ours, "GraphProp": published, "tome": ToMe(dense, num_prop)}
    calls = _calls(modules, images, compile_mode)
    flops = round(2e9 * batch * gtp_vit.gmacs(ours, images[:1]))
    shape = _shape(batch, num_prop, compile_mode)
    about = {
        "model": name, "batch": batch, "num_prop": num_prop, "propagation": "LiveGraph", "compile": compile_mode,
        "sparsity": 0.6,
    }  # fmt: skip
    check = _check(ours, dense.num_prefix_tokens, images)
    return Case(f"{name} LiveGraph", shape, calls, check, flops=flops, items=batch, about=about)


def _calls(modules: dict[str, Any], images: Tensor, compile_mode: str) -> dict[str, Callable[[], object]]:
    return {label: _call(_compiled(module, compile_mode), images) for label, module in modules.items()}


def _shape(batch: int, num_prop: int, compile_mode: str) -> str:
    return f"B{batch} P{num_prop}" + ("" if compile_mode == "none" else f" {compile_mode}")


def _check(patched: Any, num_prefix: int, images: Tensor) -> Callable[[], None]:
    def check() -> None:
        with torch.inference_mode(), gtp_kernels.use_backend("reference"):
            expected = patched.forward_features(images[:1])
        with torch.inference_mode():
            ours = patched.forward_features(images[:1])
        # With random weights rounding decides many selections; the class token hardly sees which tokens stayed, nor
        # does the mean of all, where there is none.
        pooled = (lambda x: x[:, 0]) if num_prefix else (lambda x: x.mean(1))
        agree("pooled token", pooled(ours), pooled(expected), 0.2)
        if ours.shape != expected.shape:
            raise AssertionError(f"shapes differ: {tuple(ours.shape)}, {tuple(expected.shape)}")

    return check


def _compiled(module: Any, mode: str) -> Callable[[Tensor], object]:
    if mode == "none":
        return module
    # The runner captures CUDA graphs itself, the same way for every candidate.
    chosen = "max-autotune-no-cudagraphs" if mode == "max-autotune" else mode
    return torch.compile(module, mode=chosen, dynamic=False)


def _call(module: Callable[[Tensor], object], inputs: Tensor) -> Callable[[], object]:
    return lambda: module(inputs)
