"""GTP in timm's ``Eva`` (``timm.models.eva.Eva``): EVA, EVA-02, DINOv3, ViTs with rotary position embedding, PE.

What changes is what ``patch_timm`` changes. A rotary position embedding turns queries and keys by the position of their
token; a token that stays is turned by the position that it had, which :class:`gtp_vit.block.Rotary` knows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.attention import AttentionRope
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import Tensor

from gtp_vit.block import LayerOptions, State, changes_nothing, summarise
from gtp_vit.linear import feed_forward, linear
from gtp_vit.patch_timm import GTPModel, acts, attend_and_project, folds, fused_norm, post_norm_forward


class GTPEvaAttention(EvaAttention):
    """timm's ``EvaAttention``; asked by a patched block it also returns the scores of its map."""

    def forward(
        self: Any, x: Tensor, *args: Any, state: State | None = None, options: LayerOptions | None = None, **kwargs: Any
    ) -> Any:
        if state is None or options is None:
            return super().forward(x, *args, **kwargs)
        if self.qkv is None or self.q_bias is None:
            return _attention(self, x, state, options)
        bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
        if getattr(self, "qkv_bias_separate", False):
            qkv = self.qkv(x) + bias
        else:
            qkv = F.linear(x, self.qkv.weight, bias)
        return _attention(self, x, state, options, qkv)


class GTPAttentionRope(AttentionRope):
    """timm's ``AttentionRope``; asked by a patched block it also returns the scores of its map."""

    def forward(
        self, x: Tensor, *args: Any, state: State | None = None, options: LayerOptions | None = None, **kwargs: Any
    ) -> Any:
        if state is None or options is None:
            return super().forward(x, *args, **kwargs)
        return _attention(self, x, state, options)


def _attention(
    attn: Any, x: Tensor, state: State, options: LayerOptions, qkv: Tensor | None = None
) -> tuple[Tensor, Any]:
    """The attention of x [B, N, C]; ``qkv`` [B, N, 3·H·d] where the projection has been done."""
    num_heads = attn.num_heads
    if attn.qkv is None:
        # With grouped queries keys and values have fewer heads.
        num_kv_heads = getattr(attn, "num_kv_heads", num_heads)
        projections = ((attn.q_proj, num_heads), (attn.k_proj, num_kv_heads), (attn.v_proj, num_kv_heads))
        q, k, v = (linear(layer, x).unflatten(2, (heads, -1)).transpose(1, 2) for layer, heads in projections)
    else:
        qkv = linear(attn.qkv, x) if qkv is None else qkv
        q, k, v = qkv.unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if state.rotary is not None:
        rope = state.rotary.rows(options.block)
        q, k = _rotate(attn, q, rope), _rotate(attn, k, rope)
    if k.shape[1] != num_heads:
        groups = num_heads // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return attend_and_project(attn, x, q, k, v, state, options)


def _rotate(attn: Any, x: Tensor, rope: Tensor) -> Tensor:
    """x [B, H, N, d] with its image tokens turned by their positions; the prefix stays."""
    prefix = attn.num_prefix_tokens
    half = {"half": True} if getattr(attn, "rotate_half", False) else {}
    return torch.cat((x[:, :, :prefix], apply_rot_embed_cat(x[:, :, prefix:], rope, **half)), 2)


class GTPEvaBlock(EvaBlock):
    """timm's ``EvaBlock``; the tokens leave between the attention and the second norm."""

    def forward(  # type: ignore[override]  # the state of the forward comes as an argument
        self, x: Tensor, state: State, options: LayerOptions
    ) -> tuple[Tensor, State]:
        if changes_nothing(state, options):
            return super().forward(x, rope=_rope(state, options)), state.finished(options)
        branch, scores = self.attn(self.norm1(x), state=state, options=options)
        layer_scale = self.gamma_1
        if layer_scale is None or not folds(layer_scale, self.drop_path1, x, branch):
            branch = self.drop_path1(branch if layer_scale is None else layer_scale * branch)
            layer_scale = None
        norm = fused_norm(self.norm2, torch.promote_types(x.dtype, branch.dtype), x.device.type)
        x, normed, state = summarise(x, branch, scores, state, options, layer_scale, norm)
        if normed is None:
            normed = self.norm2(x)
        if self.gamma_2 is None and not acts(self.drop_path2):
            return feed_forward(self.mlp, normed, residual=x), state
        branch = feed_forward(self.mlp, normed)
        return x + self.drop_path2(branch if self.gamma_2 is None else self.gamma_2 * branch), state


class GTPEvaBlockPostNorm(EvaBlockPostNorm):
    """timm's ``EvaBlockPostNorm``; the tokens leave where the normalised attention branch joins the residual stream."""

    def forward(  # type: ignore[override]  # the state of the forward comes as an argument
        self, x: Tensor, state: State, options: LayerOptions
    ) -> tuple[Tensor, State]:
        if changes_nothing(state, options):
            return super().forward(x, rope=_rope(state, options)), state.finished(options)
        return post_norm_forward(self, x, state, options)


def _rope(state: State, options: LayerOptions) -> Tensor | None:
    return None if state.rotary is None else state.rotary.rows(options.block)


class GTPEva(GTPModel):
    """What a patched ``Eva`` does instead of its base class."""

    gtp_root = Eva
    gtp_blocks = {EvaBlock: GTPEvaBlock, EvaBlockPostNorm: GTPEvaBlockPostNorm}  # noqa: RUF012
    gtp_attentions = {EvaAttention: GTPEvaAttention, AttentionRope: GTPAttentionRope}  # noqa: RUF012

    def gtp_embed(self: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The tokens before the first block, prefix first, of embedded patches; and their rotary embedding."""
        x, rope = self._pos_embed(x)
        return self.norm_pre(x), rope
