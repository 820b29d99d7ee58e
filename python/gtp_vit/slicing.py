"""Free slicing: the floor of what token reduction can cost, as a baseline for timing. The results mean nothing."""

from __future__ import annotations

import copy
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gtp_vit import linear


def sliced(model: Any, num_prop: int, *, fused: bool = False) -> Any:
    """A copy of a timm model (the weights are shared) that drops the last P tokens between attention and MLP.

    Args:
        model: unpatched, with timm's own ``Block``.
        num_prop: P, in each block.
        fused: its linear layers are those of a patched model, :mod:`gtp_vit.linear`.

    Raises:
        TypeError: a model with other blocks.
    """
    from timm.models.vision_transformer import Block

    for block in getattr(model, "blocks", ()) or (None,):
        if type(block) is not Block:
            raise TypeError(
                "model: free slicing takes models whose blocks are timm's vision_transformer.Block; "
                f"got {type(model).__name__} with {type(block).__name__}"
            )
    out = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for block in out.blocks:
        block.__class__ = _sliced_block(type(block), num_prop, fused)
    return out


def _sliced_block(base: type, num_prop: int, fused: bool) -> type:
    class Sliced(base):
        def forward(self, x: Tensor) -> Tensor:
            branch = _attention(self.attn, self.norm1(x)) if fused else self.attn(self.norm1(x))
            x = x + self.drop_path1(self.ls1(branch))
            x = x[:, : x.shape[1] - num_prop]
            normed = self.norm2(x)
            if fused and isinstance(self.ls2, nn.Identity):
                return linear.feed_forward(self.mlp, normed, x.contiguous())
            return x + self.drop_path2(self.ls2(linear.feed_forward(self.mlp, normed) if fused else self.mlp(normed)))

    return Sliced


def _attention(attention: Any, x: Tensor) -> Tensor:
    batch, num_tokens, channels = x.shape
    qkv = linear.linear(attention.qkv, x).reshape(batch, num_tokens, 3, attention.num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attention.q_norm(q), attention.k_norm(k)
    out = F.scaled_dot_product_attention(q, k, v, scale=attention.scale)
    return linear.linear(attention.proj, attention.norm(out.transpose(1, 2).reshape(batch, num_tokens, channels)))
