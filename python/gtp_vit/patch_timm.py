"""GTP in timm's Vision Transformers (``timm.models.vision_transformer.VisionTransformer``, timm 1.0).

What changes: the class of the model, of its blocks and of their attention, and nothing else. The model also gets one
attribute, ``gtp``, the frozen :class:`GTPConfig`. Parameters, buffers, hooks and state_dict keys are those of before.
Hooks of a block see what it now takes and gives, (x, state, options) and (x, state); those of its attention,
(out, scores).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers.attention import Attention
from timm.layers.drop import DropPath
from timm.layers.layer_scale import LayerScale
from timm.layers.norm import LayerNorm, LayerNormFp32, RmsNorm, RmsNormFp32
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gtp_kernels import checks
from gtp_vit.block import (
    LayerOptions,
    Norm,
    State,
    attend,
    changes_nothing,
    first_state,
    layer_options,
    summarise,
)
from gtp_vit.config import GTPConfig
from gtp_vit.linear import feed_forward, has_hooks, linear
from gtp_vit.restore import restore_tokens
from gtp_vit.tracing import Recorder, start_recording


class GTPAttention(Attention):
    """timm's ``Attention``; asked by a patched block it also returns the scores of its map, and thresholds the map."""

    def forward(
        self, x: Tensor, *args: Any, state: State | None = None, options: LayerOptions | None = None, **kwargs: Any
    ) -> Any:
        if state is None or options is None:
            return super().forward(x, *args, **kwargs)
        if self.training and _dropout_rate(self.attn_drop) > 0:
            raise ValueError(_attention_dropout(options.block, _dropout_rate(self.attn_drop)))
        batch, num_tokens, _ = x.shape
        gate = getattr(self, "gate", None)  # timm has gates since 1.0.28
        gate = None if gate is None else gate(x).sigmoid()
        qkv = linear(self.qkv, x).reshape(batch, num_tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        # Under autocast a norm may return float32: the attention runs in the type of the projection, as SDPA does.
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        out, scores = attend(q, k, v, self.scale, state, options)
        out = self.norm(out.transpose(1, 2).reshape(batch, num_tokens, self.num_heads * self.head_dim))
        if gate is not None:
            out = out * gate
        return self.proj_drop(linear(self.proj, out)), scores


class GTPBlock(Block):
    """timm's ``Block``; the tokens leave between the attention and the second norm, in one step with both residuals."""

    def forward(  # type: ignore[override]  # the state of the forward comes as an argument
        self, x: Tensor, state: State, options: LayerOptions
    ) -> tuple[Tensor, State]:
        if changes_nothing(state, options):
            return super().forward(x), state.finished(options)
        branch, scores = self.attn(self.norm1(x), state=state, options=options)
        layer_scale: Any = None
        if _folds(self.ls1, self.drop_path1, x, branch):
            layer_scale = self.ls1.gamma
        else:
            branch = self.drop_path1(self.ls1(branch))
        norm = _fused_norm(self.norm2, torch.promote_types(x.dtype, branch.dtype), x.device.type)
        x, normed, state = summarise(x, branch, scores, state, options, layer_scale, norm)
        if normed is None:
            normed = self.norm2(x)
        if isinstance(self.ls2, nn.Identity) and not has_hooks(self.ls2) and not _acts(self.drop_path2):
            return feed_forward(self.mlp, normed, residual=x), state
        return x + self.drop_path2(self.ls2(feed_forward(self.mlp, normed))), state


class GTPResPostBlock(ResPostBlock):
    """timm's ``ResPostBlock``; the tokens leave where the normalised attention branch joins the residual stream."""

    def forward(  # type: ignore[override]  # the state of the forward comes as an argument
        self, x: Tensor, state: State, options: LayerOptions
    ) -> tuple[Tensor, State]:
        if changes_nothing(state, options):
            return super().forward(x), state.finished(options)
        branch, scores = self.attn(x, state=state, options=options)
        branch = self.drop_path1(self.norm1(branch))
        x, _, state = summarise(x, branch, scores, state, options, None, Norm())
        return x + self.drop_path2(self.norm2(feed_forward(self.mlp, x))), state


class GTPModel:
    """What a patched model does instead of its base class; first among the bases of every patched class."""

    gtp: GTPConfig
    gtp_base: type[nn.Module]

    def forward_features(self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Embeds images x [B, 3, H, W] and runs the patched blocks: [B, tokens that remain, C], prefix first.

        Raises:
            ValueError: a mask or causal attention; an input size at which ``num_prop`` does not fit.
        """
        x, _, _ = self._run_blocks(x, attn_mask, is_causal)
        features: Tensor = self.norm(x)
        return features

    def forward_intermediates(
        self: Any,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """timm's, of the patched blocks. Patched with ``restore=True`` all of it, the final features too, has the
        tokens of the unpatched model; otherwise those that remained after each block, prefix tokens apart.

        Raises:
            ValueError: ``output_fmt`` "NCHW" without ``restore=True``; what :meth:`forward_features` refuses.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC'; got {output_fmt!r}")
        if output_fmt == "NCHW" and not self.gtp.restore:
            raise ValueError(
                "output_fmt must be 'NLC' here: the tokens that remain form no grid; "
                "patch with restore=True to have the grid restored"
            )
        take, last = feature_take_indices(len(self.blocks), indices)
        depth = last + 1 if stop_early else len(self.blocks)
        x, recorder, taken = self._run_blocks(x, attn_mask, is_causal, depth, take)
        # Norms see what the model computed, not what was filled in.
        taken = {block: self.norm(y) if norm else y for block, y in taken.items()}
        features = None if intermediates_only else self.norm(x)
        if recorder is not None and self.gtp.restore:
            taken = {block: restore_tokens(y, recorder, block) for block, y in taken.items()}
            features = None if features is None else restore_tokens(features, recorder)
        prefix_tokens = [y[:, : self.num_prefix_tokens] for y in taken.values()]
        intermediates = [y[:, self.num_prefix_tokens :] for y in taken.values()]
        if output_fmt == "NCHW":
            intermediates = [y.unflatten(1, recorder.grid_size).permute(0, 3, 1, 2).contiguous() for y in intermediates]
        with_prefix = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            result = {"image_intermediates": intermediates}
            if with_prefix:
                result["image_intermediates_prefix"] = prefix_tokens
            return result if intermediates_only else {**result, "image_features": features}
        pairs = list(zip(intermediates, prefix_tokens, strict=True)) if with_prefix else intermediates
        return pairs if intermediates_only else (features, pairs)

    def get_intermediate_layers(
        self: Any,
        x: Tensor,
        n: int | list[int] | tuple[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        attn_mask: Tensor | None = None,
    ) -> Any:
        """timm's: :meth:`forward_intermediates`, "NCHW" with ``reshape``, without the final features."""
        return self.forward_intermediates(
            x,
            n,
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
            attn_mask=attn_mask,
        )

    def _run_blocks(
        self: Any,
        x: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        depth: int | None = None,
        take: Sequence[int] = (),
    ) -> tuple[Tensor, Recorder | None, dict[int, Tensor]]:
        """Images x through the embedding and the first ``depth`` blocks, all by default.

        Returns:
            x [B, tokens that remain, C] before the final norm; what was recorded; x after each block in ``take``.
        """
        if attn_mask is not None:
            raise ValueError(
                "attn_mask must be None in a patched model: tokens leave, so a mask of the input has no rows"
            )
        if is_causal:
            raise ValueError("is_causal must be False in a patched model: its attention is not causal")
        x = self.patch_embed(x)
        height, width = x.shape[1:3] if x.ndim == 4 else self.patch_embed.grid_size
        x = self.norm_pre(self.patch_drop(self._pos_embed(x)))
        num_prefix, blocks = self.num_prefix_tokens, len(self.blocks)
        num_image_tokens = x.shape[1] - num_prefix
        if height * width != num_image_tokens:
            raise ValueError(
                f"the {num_image_tokens} image tokens after the embedding are not the {height} x {width} patches of "
                "the input: patch dropout, and embeddings that add or drop tokens, are not supported"
            )
        self.gtp.check_fit(num_image_tokens, blocks)
        recorder = start_recording(self, self.gtp, blocks, x.shape[0], (height, width), num_prefix, x.device)
        state = first_state(x, (height, width), self.gtp, blocks, num_prefix, recorder)
        taken = {}
        for block, options in zip(
            self.blocks[:depth], layer_options(self.gtp, blocks, num_prefix)[:depth], strict=True
        ):
            if self.grad_checkpointing:
                x, state = checkpoint(block, x, state, options, use_reentrant=False)
            else:
                x, state = block(x, state, options)
            if options.block in take:
                taken[options.block] = x
        return x, recorder, taken

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time, so a copy or a pickle names the class that it was made from.
        reduced = super().__reduce_ex__(max(protocol, 2))
        assert isinstance(reduced, tuple)
        return (_rebuild, (self.gtp_base,), *reduced[2:])


_PATCHED: dict[type[nn.Module], type[nn.Module]] = {
    Block: GTPBlock,
    ResPostBlock: GTPResPostBlock,
    Attention: GTPAttention,
}
_ORIGINAL = {patched: original for original, patched in _PATCHED.items()}
_PATCHED_MODELS: dict[type[nn.Module], type[nn.Module]] = {}
_NORMS: dict[type[nn.Module], str] = {
    LayerNorm: "layer",
    LayerNormFp32: "layer",
    nn.LayerNorm: "layer",
    RmsNorm: "rms",
    RmsNormFp32: "rms",
}
_METHODS = ("__call__", "_call_impl", "forward", "forward_features", "forward_intermediates", "get_intermediate_layers")


def patch(model: Any, config: GTPConfig) -> Any:
    """Patches a timm model in place; :func:`gtp_vit.patch` says what is raised."""
    _check_model(model)
    depth = len(model.blocks)
    blocks = list(dict.fromkeys(model.blocks))
    for index, block in enumerate(model.blocks):
        _check_block(index, block)
    height, width = model.patch_embed.grid_size
    config.check_fit(height * width, depth)
    if config.selection.startswith("CLSAttn") and getattr(model, "cls_token", None) is None:
        raise ValueError(
            f"selection = {config.selection!r} reads the attention of a class token, and this model has none "
            f"(prefix tokens: {model.num_prefix_tokens})"
        )
    if config.selection in checks.MAP_STANDARDS:
        warnings.warn(
            f"selection = {config.selection!r} needs the N x N attention map: it runs without the fused attention",
            stacklevel=3,
        )
    patched = _patched_class(type(model))
    model.gtp = config
    model.__class__ = patched
    for block in blocks:
        block.__class__ = _PATCHED[type(block)]
        block.attn.__class__ = GTPAttention
    return model


def unpatch(model: Any) -> Any:
    """Gives a patched model its classes back; :func:`gtp_vit.unpatch` says what is raised."""
    if not issubclass(type(model), GTPModel):
        raise ValueError(f"model must be patched by gtp_vit.patch; got an unpatched {type(model).__name__}")
    model.__class__ = model.gtp_base
    del model.gtp
    for module in model.modules():
        if type(module) in _ORIGINAL:
            module.__class__ = _ORIGINAL[type(module)]
    return model


def _patched_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``base`` that a patched model gets; made once."""
    if base not in _PATCHED_MODELS:
        body = {"__module__": __name__, "__doc__": f"{base.__name__} with GTP.", "gtp_base": base}
        _PATCHED_MODELS[base] = type(f"GTP{base.__name__}", (GTPModel, base), body)
    return _PATCHED_MODELS[base]


def _rebuild(base: type[nn.Module]) -> nn.Module:
    """An empty patched model, which copy or pickle fills."""
    patched = _patched_class(base)
    empty: nn.Module = patched.__new__(patched)
    return empty


def _check_model(model: Any) -> None:
    name = type(model).__name__
    if isinstance(model, GTPModel):
        raise ValueError(f"model is patched already ({name}): call gtp_vit.unpatch(model) first")
    if not isinstance(model, VisionTransformer):
        raise TypeError(
            f"model must be built on timm.models.vision_transformer.VisionTransformer; got {name} "
            "(patch the model itself, before it is wrapped or compiled)"
        )
    for method in _METHODS:
        if method in vars(model):
            raise TypeError(f"model has its own {method} in place of that of {name}, which patching would bypass")
        owner = next(base for base in type(model).__mro__ if method in vars(base))
        if owner is not next(base for base in VisionTransformer.__mro__ if method in vars(base)):
            raise TypeError(
                f"{name} is not supported: {owner.__name__} overrides {method}; subclasses of VisionTransformer may "
                "change the embedding and the heads"
            )
    if hasattr(model, "gtp"):
        raise ValueError(f"model has an attribute gtp ({type(model.gtp).__name__}), where patching keeps its options")
    if getattr(model.patch_embed, "grid_size", None) is None:
        raise ValueError(
            f"model.patch_embed ({type(model.patch_embed).__name__}) has no grid_size: build the model with img_size"
        )
    rate = getattr(model.patch_drop, "prob", 0.0)
    if rate > 0:
        raise ValueError(f"patch dropout must be off; got patch_drop_rate = {rate} (set model.patch_drop.prob = 0)")


def _check_block(index: int, block: Any) -> None:
    name = type(block).__name__
    if type(block) not in (Block, ResPostBlock):
        raise TypeError(f"block {index} is {name}; supported blocks are Block and ResPostBlock of timm")
    if type(block.attn) is not Attention:
        raise TypeError(
            f"block {index} ({name}) has {type(block.attn).__name__}; the supported attention is Attention of timm"
        )
    for module, what in ((block, name), (block.attn, f"the attention of {name}")):
        if "forward" in vars(module):
            raise TypeError(
                f"block {index}: {what} has its own forward in place of that of its class, which patching would bypass"
            )
    rate = _dropout_rate(block.attn.attn_drop)
    if rate > 0:
        raise ValueError(_attention_dropout(index, rate))


def _attention_dropout(block: int, rate: float) -> str:
    return (
        f"attention dropout must be off; got attn_drop = {rate} in block {block}: scores are taken from the whole map "
        "(build the model with attn_drop_rate=0, or set block.attn.attn_drop.p = 0 in every block)"
    )


def _dropout_rate(module: nn.Module) -> float:
    return float(getattr(module, "p", 0.0))


def _acts(drop_path: Any) -> bool:
    """Whether the module may change what goes through it."""
    if has_hooks(drop_path):
        return True
    return not isinstance(drop_path, nn.Identity) and not (
        type(drop_path) is DropPath and (drop_path.drop_prob == 0.0 or not drop_path.training)
    )


def _folds(layer_scale: Any, drop_path: Any, x: Tensor, branch: Tensor) -> bool:
    """Whether the layer scale may be handed to the fused step: nothing acts between it and the residual addition."""
    if type(layer_scale) is not LayerScale or has_hooks(layer_scale):
        return False
    dtype = torch.promote_types(x.dtype, branch.dtype)
    return not _acts(drop_path) and torch.promote_types(dtype, layer_scale.gamma.dtype) == dtype


def _fused_norm(norm: Any, dtype: torch.dtype, device_type: str) -> Norm:
    """The arguments for a norm over channels in ``dtype`` that can be fused; for another one, kind "none"."""
    kind = _NORMS.get(type(norm))
    if kind is None or len(norm.normalized_shape) != 1 or has_hooks(norm):
        return Norm()
    if getattr(norm, "_fast_norm", False) and torch.is_autocast_enabled(device_type):
        return Norm()  # there timm's fast norm works in the type of autocast
    weight, bias = norm.weight, getattr(norm, "bias", None)
    if weight is not None and weight.dtype != dtype:
        return Norm()
    return Norm(kind, weight, bias, norm.eps)
