"""What training keeps for the backward: less than the unpatched model with its attention maps, and no map at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import gtp_vit

timm = pytest.importorskip("timm")

BATCH = 2


class Saved:
    """The memory behind the tensors that autograd saves, each storage once, without the parameters."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.storages: dict[int, Any] = {}
        self.shapes: set[tuple[int, ...]] = set()

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.parameters:
            self.storages[storage.data_ptr()] = storage  # held, so that no other takes its place
            self.shapes.add(tuple(tensor.shape))
        return tensor

    @property
    def megabytes(self) -> float:
        return sum(storage.nbytes() for storage in self.storages.values()) / 1e6


def step(model: Any, images: Tensor) -> Saved:
    """A forward in training mode and its backward."""
    saved = Saved(model)
    with saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        loss = model.train()(images).square().sum()
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    return saved


def maps(saved: Saved, num_tokens: int) -> list[tuple[int, ...]]:
    """The shapes of attention maps: what has more than half the tokens, and no more than all, on both last sides."""
    sides = range(num_tokens // 2 + 1, num_tokens + 1)
    return [shape for shape in saved.shapes if len(shape) > 2 and shape[-1] in sides and shape[-2] in sides]


def test_less_is_saved_than_by_eager_attention(cpu_backend: str) -> None:
    torch.manual_seed(0)
    images = torch.randn(BATCH, 3, 224, 224)
    model: Any = timm.create_model("deit_small_patch16_224")
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    for block in model.blocks:
        block.attn.fused_attn = False
    eager = step(model, images)
    for block in model.blocks:
        block.attn.fused_attn = True
    fused = step(model, images)
    whole = step(gtp_vit.patch(model, num_prop=0, sparsity=0.6), images)
    patched = step(gtp_vit.patch(gtp_vit.unpatch(model), num_prop=8, sparsity=0.6), images)
    print(
        f"DeiT-S, {BATCH} images, saved for the backward: eager {eager.megabytes:.0f} MB, fused "
        f"{fused.megabytes:.0f} MB, patched P = 0 {whole.megabytes:.0f} MB, P = 8 {patched.megabytes:.0f} MB"
    )
    assert maps(eager, tokens), "the test sees a map where there is one"
    assert maps(patched, tokens) == []
    assert maps(whole, tokens) == []
    assert patched.megabytes < eager.megabytes
    map_megabytes = len(model.blocks) * BATCH * model.blocks[0].attn.num_heads * tokens**2 * 4 / 1e6
    assert whole.megabytes < eager.megabytes - map_megabytes / 2, "without the maps, by more than tokens leaving"
