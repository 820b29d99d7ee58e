"""GTP in timm's Vision Transformers (``timm.models.vision_transformer.VisionTransformer``, timm 1.0).

``patch_timm_eva`` adds timm's other class of them, ``Eva``.

What changes: the class of the model, of its blocks and of their attention, and nothing else. The model also gets one
attribute, ``gtp``, the frozen :class:`GTPConfig`. Parameters, buffers, hooks and state_dict keys are those of before.
Hooks of a block see what it now takes and gives, (x, state, options) and (x, state); those of its attention,
(out, scores).

A class of models whose authors never thresholded its map says so by ``official_threshold = False``: under the official
semantics its θ is then 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from timm.layers.attention import Attention
from timm.layers.drop import DropPath
from timm.layers.layer_scale import LayerScale
from timm.layers.norm import LayerNorm, LayerNormFp32, RmsNorm, RmsNormFp32
from timm.models._features import feature_take_indices
from timm.models.eva import Eva
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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
from gtp_vit.flops import noise
from gtp_vit.linear import feed_forward, has_hooks, linear
from gtp_vit.restore import restore_tokens
from gtp_vit.tracing import Recorder, start_recording
from gtp_vit.work import ModelWork, block_work, features, outside


class GTPAttention(Attention):
    """timm's ``Attention``; asked by a patched block it also returns the scores of its map, and thresholds the map."""

    def forward(
        self, x: Tensor, *args: Any, state: State | None = None, options: LayerOptions | None = None, **kwargs: Any
    ) -> Any:
        if state is None or options is None:
            return super().forward(x, *args, **kwargs)
        batch, num_tokens, _ = x.shape
        qkv = linear(self.qkv, x).reshape(batch, num_tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        return attend_and_project(self, x, self.q_norm(q), self.k_norm(k), v, state, options)


def attend_and_project(
    attn: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor, state: State, options: LayerOptions
) -> tuple[Tensor, Any]:
    """What follows the projections of x [B, N, C] to q, k, v [B, H, N, d] in an attention of timm's; and the scores."""
    if attn.training and _dropout_rate(attn.attn_drop) > 0:
        raise ValueError(_attention_dropout(options.block, _dropout_rate(attn.attn_drop)))
    gate = getattr(attn, "gate", None)  # timm has gates since 1.0.28
    # Under autocast a norm may return float32: the attention runs in the type of the projection, as SDPA does.
    out, scores = attend(q.to(v.dtype), k.to(v.dtype), v, attn.scale, state, options)
    out = attn.norm(out.transpose(1, 2).flatten(2))
    if gate is not None:
        out = out * gate(x).sigmoid()
    return attn.proj_drop(linear(attn.proj, out)), scores


class GTPBlock(Block):
    """timm's ``Block``; the tokens leave between the attention and the second norm, in one step with both residuals."""

    def forward(  # type: ignore[override]  # the state of the forward comes as an argument
        self, x: Tensor, state: State, options: LayerOptions
    ) -> tuple[Tensor, State]:
        if changes_nothing(state, options):
            return super().forward(x), state.finished(options)
        branch, scores = self.attn(self.norm1(x), state=state, options=options)
        layer_scale: Any = None
        if (
            type(self.ls1) is LayerScale
            and not has_hooks(self.ls1)
            and folds(self.ls1.gamma, self.drop_path1, x, branch)
        ):
            layer_scale = self.ls1.gamma
        else:
            branch = self.drop_path1(self.ls1(branch))
        norm = fused_norm(self.norm2, torch.promote_types(x.dtype, branch.dtype), x.device.type)
        x, normed, state = summarise(x, branch, scores, state, options, layer_scale, norm)
        if normed is None:
            normed = self.norm2(x)
        if isinstance(self.ls2, nn.Identity) and not has_hooks(self.ls2) and not acts(self.drop_path2):
            return feed_forward(self.mlp, normed, residual=x), state
        return x + self.drop_path2(self.ls2(feed_forward(self.mlp, normed))), state


class GTPResPostBlock(ResPostBlock):
    """timm's ``ResPostBlock``; the tokens leave where the normalised attention branch joins the residual stream."""

    def forward(  # type: ignore[override]  # the state of the forward comes as an argument
        self, x: Tensor, state: State, options: LayerOptions
    ) -> tuple[Tensor, State]:
        if changes_nothing(state, options):
            return super().forward(x), state.finished(options)
        return post_norm_forward(self, x, state, options)


def post_norm_forward(block: Any, x: Tensor, state: State, options: LayerOptions) -> tuple[Tensor, State]:
    """A patched block of which each branch is normalised before it joins the residual stream x [B, N, C]."""
    branch, scores = block.attn(x, state=state, options=options)
    branch = block.drop_path1(block.norm1(branch))
    x, _, state = summarise(x, branch, scores, state, options, None, Norm())
    return x + block.drop_path2(block.norm2(feed_forward(block.mlp, x))), state


class GTPModel:
    """What a patched model does instead of its base class; first among the bases of every patched class.

    Attributes:
        gtp: the options.
        gtp_base: the class that the model was built as.
        gtp_root: the class of timm that its forward is that of.
        gtp_blocks, gtp_attentions: what each class of block and attention becomes.
    """

    gtp: GTPConfig
    gtp_base: type[nn.Module]
    gtp_root: ClassVar[type[nn.Module]] = VisionTransformer
    gtp_blocks: ClassVar[dict[type[nn.Module], type[nn.Module]]] = {Block: GTPBlock, ResPostBlock: GTPResPostBlock}
    gtp_attentions: ClassVar[dict[type[nn.Module], type[nn.Module]]] = {Attention: GTPAttention}

    def gtp_embed(self: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The tokens before the first block, prefix first, of embedded patches; and their rotary embedding."""
        return self.norm_pre(self.patch_drop(self._pos_embed(x))), None

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
        x, rope = self.gtp_embed(x)
        num_prefix, blocks = self.num_prefix_tokens, len(self.blocks)
        num_image_tokens = x.shape[1] - num_prefix
        if height * width != num_image_tokens:
            raise ValueError(
                f"the {num_image_tokens} image tokens after the embedding are not the {height} x {width} patches of "
                "the input: patch dropout, and embeddings that add or drop tokens, are not supported"
            )
        self.gtp.check_fit(num_image_tokens, blocks)
        recorder = start_recording(self, self.gtp, blocks, x.shape[0], (height, width), num_prefix, x.device)
        state = first_state(x, (height, width), self.gtp, blocks, num_prefix, recorder, rope)
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
        return (_rebuild, (self.gtp_base, type(self).__bases__[0]), *reduced[2:])


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
    mixin = _mixin_of(model)
    _check_model(model, mixin)
    if config.semantics == "official" and not getattr(model, "official_threshold", True):
        config = replace(config, sparsity=1.0)
    depth = len(model.blocks)
    blocks = list(dict.fromkeys(model.blocks))
    for index, block in enumerate(model.blocks):
        _check_block(index, block, mixin)
    height, width = model.patch_embed.grid_size
    config.check_fit(height * width, depth)
    if config.selection.startswith("CLSAttn") and getattr(model, "cls_token", None) is None:
        raise ValueError(
            f"selection = {config.selection!r} reads the attention of a class token, and this model has none "
            f"(prefix tokens: {model.num_prefix_tokens})"
        )
    if config.propagation == "Mean" and getattr(model, "rope", None) is not None:
        raise ValueError(
            "propagation = 'Mean' makes tokens that have no position, and the rotary position embedding of "
            f"{type(model).__name__} rotates every image token by its own; use 'GraphProp' or 'None'"
        )
    patched = _patched_class(type(model), mixin)
    model.gtp = config
    model.__class__ = patched
    for block in blocks:
        block.__class__ = mixin.gtp_blocks[type(block)]
        block.attn.__class__ = mixin.gtp_attentions[type(block.attn)]
    return model


def unpatch(model: Any) -> Any:
    """Gives a patched model its classes back; :func:`gtp_vit.unpatch` says what is raised."""
    if not issubclass(type(model), GTPModel):
        raise ValueError(f"model must be patched by gtp_vit.patch; got an unpatched {type(model).__name__}")
    original = {patched: plain for plain, patched in (model.gtp_blocks | model.gtp_attentions).items()}
    model.__class__ = model.gtp_base
    del model.gtp
    for module in model.modules():
        if type(module) in original:
            module.__class__ = original[type(module)]
    return model


def work(model: Any, size: int | tuple[int, int] | None = None) -> ModelWork:
    """The work of a model, patched or not, as a formula; ``size`` as in :func:`gtp_vit.schedule`."""
    if not isinstance(model, GTPModel):
        _check_model(model, _mixin_of(model))
    prefix, channels = model.num_prefix_tokens, model.embed_dim
    image = noise(model, model.patch_embed.img_size if size is None else size, "size")
    grids: list[tuple[int, int]] = []

    def embed() -> None:
        x = model.patch_embed(image)
        grids.append(tuple(x.shape[1:3]) if x.ndim == 4 else model.patch_embed.grid_size)

    constant, final_token = outside(
        model, embed, lambda tokens: model.forward_head(features(model, tokens, channels)), prefix
    )
    blocks = tuple(block_work(block, block.attn, _width(block.attn), block.attn.num_heads) for block in model.blocks)
    return ModelWork(blocks, channels, grids[0], prefix, constant, final_token)


def _width(attn: Any) -> int:
    """H · d."""
    return int(attn.q_proj.out_features if attn.qkv is None else attn.qkv.out_features // 3)


def _mixin_of(model: object) -> type[GTPModel]:
    """What goes first among the bases of the patched class of ``model``."""
    if not isinstance(model, Eva):
        return GTPModel
    from gtp_vit.patch_timm_eva import GTPEva  # builds on this module

    return GTPEva


def _patched_class(base: type[nn.Module], mixin: type[GTPModel]) -> type[nn.Module]:
    """The subclass of ``base`` that a patched model gets; made once."""
    if base not in _PATCHED_MODELS:
        body = {"__module__": __name__, "__doc__": f"{base.__name__} with GTP.", "gtp_base": base}
        _PATCHED_MODELS[base] = type(f"GTP{base.__name__}", (mixin, base), body)
    return _PATCHED_MODELS[base]


def _rebuild(base: type[nn.Module], mixin: type[GTPModel]) -> nn.Module:
    """An empty patched model, which copy or pickle fills."""
    patched = _patched_class(base, mixin)
    empty: nn.Module = patched.__new__(patched)
    return empty


def _check_model(model: Any, mixin: type[GTPModel]) -> None:
    name = type(model).__name__
    if isinstance(model, GTPModel):
        raise ValueError(f"model is patched already ({name}): call gtp_vit.unpatch(model) first")
    root = mixin.gtp_root
    if not isinstance(model, root):
        raise TypeError(
            "model must be built on timm.models.vision_transformer.VisionTransformer or timm.models.eva.Eva; "
            f"got {name} (patch the model itself, before it is wrapped or compiled)"
        )
    for method in (method for method in _METHODS if hasattr(root, method)):
        if method in vars(model):
            raise TypeError(f"model has its own {method} in place of that of {name}, which patching would bypass")
        owner = next(base for base in type(model).__mro__ if method in vars(base))
        if owner is not next(base for base in root.__mro__ if method in vars(base)):
            raise TypeError(
                f"{name} is not supported: {owner.__name__} overrides {method}; subclasses of {root.__name__} may "
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


def _check_block(index: int, block: Any, mixin: type[GTPModel]) -> None:
    name = type(block).__name__
    if type(block) not in mixin.gtp_blocks:
        raise TypeError(f"block {index} is {name}; supported are {_names(mixin.gtp_blocks)} of timm")
    if type(block.attn) not in mixin.gtp_attentions:
        raise TypeError(
            f"block {index} ({name}) has {type(block.attn).__name__}; supported: {_names(mixin.gtp_attentions)} of timm"
        )
    for module, what in ((block, name), (block.attn, f"the attention of {name}")):
        if "forward" in vars(module):
            raise TypeError(
                f"block {index}: {what} has its own forward in place of that of its class, which patching would bypass"
            )
    rate = _dropout_rate(block.attn.attn_drop)
    if rate > 0:
        raise ValueError(_attention_dropout(index, rate))


def _names(classes: Iterable[type[nn.Module]]) -> str:
    return " and ".join(each.__name__ for each in classes)


def _attention_dropout(block: int, rate: float) -> str:
    return (
        f"attention dropout must be off; got attn_drop = {rate} in block {block}: scores are taken from the whole map "
        "(build the model with attn_drop_rate=0, or set block.attn.attn_drop.p = 0 in every block)"
    )


def _dropout_rate(module: nn.Module) -> float:
    return float(getattr(module, "p", 0.0))


def acts(drop_path: Any) -> bool:
    """Whether the module may change what goes through it."""
    if has_hooks(drop_path):
        return True
    return not isinstance(drop_path, nn.Identity) and not (
        type(drop_path) is DropPath and (drop_path.drop_prob == 0.0 or not drop_path.training)
    )


def folds(gamma: Tensor, drop_path: Any, x: Tensor, branch: Tensor) -> bool:
    """Whether a layer scale may be handed to the fused step: nothing acts between it and the residual addition."""
    dtype = torch.promote_types(x.dtype, branch.dtype)
    return not acts(drop_path) and torch.promote_types(dtype, gamma.dtype) == dtype


def fused_norm(norm: Any, dtype: torch.dtype, device_type: str) -> Norm:
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
