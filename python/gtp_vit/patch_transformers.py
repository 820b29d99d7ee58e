"""GTP in the vision towers of transformers (5.18 and later): ViT, DeiT, DINOv2 (with registers), CLIP and SigLIP.

What changes: the class of the tower, of its encoder, of its layers and of their attention, and nothing else. The tower
also gets one attribute, ``gtp``, the frozen :class:`GTPConfig`, and so does the model around it where that was given to
``patch``. Parameters, buffers, configuration, hooks and state_dict keys are those of before.

A tower's forward takes the arguments of the original and returns its output class: with the tokens that are left, or,
patched with ``restore=True``, with the full grid (:mod:`gtp_vit.restore`) in ``last_hidden_state`` and every hidden
state. Norms and pooling see what the model computed, not what was filled in. Hooks of a layer see what it now takes and
gives, (x, state, options) and (x, state); those of its attention, (out, scores); those of an encoder, (x, run) and
(x, hidden states).

Why classes, and no function in the library's attention interface (``ALL_ATTENTION_FUNCTIONS``, chosen by
``config._attn_implementation``): such a function gets q, k and v, and what it returns beside the output is thrown away
by the layer, which is where the tokens have to leave. It would have to find its block's state, too, and arguments of
the forward do not reach it in every tower (SigLIP's attention passes none on). A block for which GTP changes nothing
(P = 0, θ = 1, no token scales) is the original, and there the interface decides as ever: eager, SDPA or flash.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip import modeling_clip as clip
from transformers.models.deit import modeling_deit as deit
from transformers.models.dinov2 import modeling_dinov2 as dinov2
from transformers.models.dinov2_with_registers import modeling_dinov2_with_registers as registers
from transformers.models.siglip import modeling_siglip as siglip
from transformers.models.vit import modeling_vit as vit
from transformers.utils.output_capturing import capture_outputs

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
from gtp_vit.work import ModelWork, block_work, features, outside, per_token

if Version(transformers.__version__) < Version("5.18"):
    raise ImportError("the layers of earlier versions are built otherwise")


class Run(NamedTuple):
    """One forward: the state before the first layer, the options of each, and which hidden states are asked for."""

    state: State
    options: tuple[LayerOptions, ...]
    wanted: frozenset[int]


class GTPAttention(nn.Module):
    """An attention of the library; asked by a patched layer it also returns the scores of its thresholded map."""

    gtp_names: ClassVar[tuple[str, str, str]] = ("o_proj", "scaling", "attention_dropout")

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        state: State | None = None,
        options: LayerOptions | None = None,
        **kwargs: Any,
    ) -> Any:
        if state is None or options is None:
            return super().forward(hidden_states, attention_mask=attention_mask, **kwargs)
        output, scale, dropout = (getattr(self, name) for name in self.gtp_names)
        if self.training and dropout > 0:
            raise ValueError(_attention_dropout(options.block, dropout))
        q, k, v = (
            linear(project, hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out, scores = attend(q, k, v, scale, state, options)
        return linear(output, out.transpose(1, 2).flatten(2)), scores


class LayerNames(NamedTuple):
    """What the parts of a layer are called; ``None`` for a part that it does not have."""

    norm1: str
    attention: str
    layer_scale1: str | None
    drop: str | None
    norm2: str
    layer_scale2: str | None


class GTPLayer(nn.Module):
    """A pre-norm layer of the library; the tokens leave between its attention and its second norm."""

    gtp_names: ClassVar[LayerNames]

    def forward(self: Any, hidden_states: Tensor, state: State, options: LayerOptions) -> tuple[Tensor, State]:
        if changes_nothing(state, options):
            return super().forward(hidden_states, None), state.finished(options)
        norm1, attention, scale1, drop, norm2, scale2 = (name and getattr(self, name) for name in self.gtp_names)
        x = hidden_states
        branch, scores = attention(norm1(x), state=state, options=options)
        layer_scale: Any = None
        if _folds(scale1, drop, x, branch):
            layer_scale = scale1.lambda1
        else:
            branch = _through(drop, _through(scale1, branch))
        norm = _fused_norm(norm2, torch.promote_types(x.dtype, branch.dtype))
        x, normed, state = summarise(x, branch, scores, state, options, layer_scale, norm)
        if normed is None:
            normed = norm2(x)
        if scale2 is None and not _acts(drop):
            return feed_forward(self.mlp, normed, residual=x), state
        return x + _through(drop, _through(scale2, feed_forward(self.mlp, normed))), state


class GTPEncoder(nn.Module):
    """An encoder of the library: its loop over the layers, with the state of the forward."""

    gtp_layers: ClassVar[str] = "layers"

    def forward(self: Any, inputs_embeds: Tensor, run: Run) -> tuple[Tensor, list[Tensor | None]]:
        return run_layers(getattr(self, self.gtp_layers), inputs_embeds, run)


def run_layers(layers: Iterable[nn.Module], x: Tensor, run: Run) -> tuple[Tensor, list[Tensor | None]]:
    """The tokens after the last layer, and the hidden states: before the first one and after each, where wanted."""
    state, hidden = run.state, [x if 0 in run.wanted else None]
    for layer, options in zip(layers, run.options, strict=True):
        x, state = layer(x, state, options)
        hidden.append(x if options.block + 1 in run.wanted else None)
    return x, hidden


class Tokens(NamedTuple):
    """What the layers give: the tokens x that are left, and the hidden states as an output shows them."""

    x: Tensor
    hidden_states: tuple[Tensor | None, ...] | None
    recorder: Recorder | None
    """Of a tower that restores the grid."""

    def shown(self, x: Tensor) -> Tensor:
        """As an output shows it: x [B, tokens that are left, C], the final norm included, or its full grid."""
        return x if self.recorder is None else restore_tokens(x, self.recorder)


class GTPTower(nn.Module):
    """What a patched tower does instead of its base class; first among the bases of every patched tower."""

    gtp: GTPConfig
    gtp_layers: ClassVar[str] = "encoder.layers"
    gtp_conv: ClassVar[str] = "embeddings.patch_embeddings.projection"
    gtp_prefix: ClassVar[int] = 1
    """Prefix tokens, of which the first is the class token; registers come on top."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # save_pretrained writes this name as the architecture of the checkpoint, which is that of the unpatched class.
        cls.__name__ = cls.__name__.removeprefix("GTP")

    @classmethod
    def is_custom_code(cls) -> bool:
        """False, as of the class that was patched: save_pretrained gives checkpoints the keys of the hub by it."""
        return False

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers reads this off the source of a class's module; layers that GTP leaves alone use its interface.
        return True

    def gtp_tokens(self: Any, x: Tensor, pixel_values: Tensor, output_hidden_states: Any) -> Tokens:
        """Runs the layers on the embedded tokens x [B, R+n, C] of pixel_values [B, 3, H, W].

        Raises:
            ValueError: image tokens that are not the grid of patches; a size at which ``num_prop`` does not fit.
        """
        config, layers = self.gtp, self.get_submodule(self.gtp_layers)
        num_prefix, depth = _num_prefix(self), len(layers)
        height, width = _grid(self.get_submodule(self.gtp_conv), *pixel_values.shape[-2:])
        num_image_tokens = x.shape[1] - num_prefix
        if height * width != num_image_tokens:
            raise ValueError(
                f"the {num_image_tokens} image tokens after the embedding are not the {height} x {width} patches of "
                "the input: embeddings that add or drop tokens are not supported"
            )
        config.check_fit(num_image_tokens, depth)
        recorder = start_recording(self, config, depth, x.shape[0], (height, width), num_prefix, x.device)
        state = first_state(x, (height, width), config, depth, num_prefix, recorder)
        wanted = _wanted(output_hidden_states, depth + 1)
        run = Run(state, layer_options(config, depth, num_prefix), wanted)
        if self.gtp_layers == "layers":
            x, hidden = run_layers(layers, x, run)
        else:
            x, hidden = self.encoder(x, run)
        restored = recorder if config.restore else None
        if restored is not None:
            # Block i gives hidden state i + 1.
            steps = enumerate(hidden[1:])
            hidden[1:] = [None if each is None else restore_tokens(each, restored, block) for block, each in steps]
        return Tokens(x, tuple(hidden) if output_hidden_states else None, restored)

    def gtp_check(self: Any, pixel_values: Tensor | None, options: dict[str, Any]) -> Any:
        """Refuses what a patched tower cannot take; returns the ``output_hidden_states`` that hold.

        Raises:
            ValueError: no pixel values; a mask, causal attention, or attention maps asked for.
        """
        if pixel_values is None:
            raise ValueError("pixel_values must be a tensor [B, 3, H, W]; got None")
        for name in ("attention_mask", "head_mask"):
            if options.get(name) is not None:
                raise ValueError(
                    f"{name} must be None in a patched model: tokens leave, so a mask of the input has no rows"
                )
        if options.get("is_causal", getattr(self.config, "is_causal", False)):
            raise ValueError("is_causal must be False in a patched model: its attention is not causal")
        if options.get("output_attentions", getattr(self.config, "output_attentions", False)):
            raise ValueError(
                "output_attentions must be False in a patched model: the attention map is never written; "
                "call gtp_vit.unpatch(model) first, or gtp_vit.trace(model) for what the selection saw"
            )
        return options.get("output_hidden_states", getattr(self.config, "output_hidden_states", False))


class _GTPViT(GTPTower):
    gtp_layers = "layers"

    @capture_outputs  # nothing is captured: it sees to return_dict, and keeps the hooks of a model around this one out
    def forward(
        self: Any,
        pixel_values: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        wanted = self.gtp_check(pixel_values, dict(kwargs, attention_mask=attention_mask))
        assert pixel_values is not None
        pixel_values = pixel_values.to(self.embeddings.patch_embeddings.projection.weight.dtype)
        x = self.embeddings(
            pixel_values, bool_masked_pos=bool_masked_pos, interpolate_pos_encoding=interpolate_pos_encoding
        )
        tokens = self.gtp_tokens(x, pixel_values, wanted)
        x = self.layernorm(tokens.x)
        pooled = self.pooler(x) if self.pooler is not None else None
        return BaseModelOutputWithPooling(tokens.shown(x), pooled, tokens.hidden_states)


class _GTPDinov2(GTPTower):
    gtp_layers = "encoder.layer"

    @capture_outputs
    def forward(
        self: Any,
        pixel_values: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        wanted = self.gtp_check(pixel_values, dict(kwargs, attention_mask=attention_mask))
        x = self.embeddings(pixel_values, bool_masked_pos=bool_masked_pos)
        tokens = self.gtp_tokens(x, pixel_values, wanted)
        x = self.layernorm(tokens.x)
        return BaseModelOutputWithPooling(tokens.shown(x), x[:, 0, :], tokens.hidden_states)


class GTPViTAttention(GTPAttention, vit.ViTAttention):
    pass


class GTPViTLayer(GTPLayer, vit.ViTLayer):
    gtp_names = LayerNames("layernorm_before", "attention", None, "dropout", "layernorm_after", None)


class GTPViTModel(_GTPViT, vit.ViTModel):
    """ViTModel with GTP."""


class GTPDeiTAttention(GTPAttention, deit.DeiTAttention):
    pass


class GTPDeiTLayer(GTPLayer, deit.DeiTLayer):
    gtp_names = GTPViTLayer.gtp_names


class GTPDeiTModel(_GTPViT, deit.DeiTModel):
    """DeiTModel with GTP; class and distillation token stay."""

    gtp_prefix = 2


class GTPDinov2Attention(GTPAttention, dinov2.Dinov2Attention):
    pass


class GTPDinov2Layer(GTPLayer, dinov2.Dinov2Layer):
    gtp_names = LayerNames("norm1", "attention", "layer_scale1", "drop_path", "norm2", "layer_scale2")


class GTPDinov2Encoder(GTPEncoder, dinov2.Dinov2Encoder):
    gtp_layers = "layer"


class GTPDinov2Model(_GTPDinov2, dinov2.Dinov2Model):
    """Dinov2Model with GTP."""


class GTPDinov2WithRegistersAttention(GTPAttention, registers.Dinov2WithRegistersAttention):
    pass


class GTPDinov2WithRegistersLayer(GTPLayer, registers.Dinov2WithRegistersLayer):
    gtp_names = GTPDinov2Layer.gtp_names


class GTPDinov2WithRegistersEncoder(GTPEncoder, registers.Dinov2WithRegistersEncoder):
    gtp_layers = "layer"


class GTPDinov2WithRegistersModel(_GTPDinov2, registers.Dinov2WithRegistersModel):
    """Dinov2WithRegistersModel with GTP; the registers stay."""


class GTPCLIPAttention(GTPAttention, clip.CLIPAttention):
    gtp_names = ("out_proj", "scale", "dropout")


class GTPCLIPEncoderLayer(GTPLayer, clip.CLIPEncoderLayer):
    gtp_names = LayerNames("layer_norm1", "self_attn", None, None, "layer_norm2", None)


class GTPCLIPEncoder(GTPEncoder, clip.CLIPEncoder):
    pass


class GTPCLIPVisionModel(GTPTower, clip.CLIPVisionModel):
    """CLIPVisionModel with GTP."""

    gtp_conv = "embeddings.patch_embedding"

    @capture_outputs
    def forward(
        self: Any, pixel_values: Tensor | None = None, interpolate_pos_encoding: bool | None = False, **kwargs: Any
    ) -> Any:
        wanted = self.gtp_check(pixel_values, kwargs)
        x = self.pre_layrnorm(self.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding))
        tokens = self.gtp_tokens(x, pixel_values, wanted)
        pooled = self.post_layernorm(tokens.x[:, 0, :])
        return BaseModelOutputWithPooling(tokens.shown(tokens.x), pooled, tokens.hidden_states)


class GTPSiglipAttention(GTPAttention, siglip.SiglipAttention):
    gtp_names = GTPCLIPAttention.gtp_names


class GTPSiglipEncoderLayer(GTPLayer, siglip.SiglipEncoderLayer):
    gtp_names = GTPCLIPEncoderLayer.gtp_names


class GTPSiglipEncoder(GTPEncoder, siglip.SiglipEncoder):
    pass


class GTPSiglipVisionModel(GTPTower, siglip.SiglipVisionModel):
    """SiglipVisionModel with GTP; its pooling head attends to the tokens that are left, whatever the output shows."""

    gtp_conv = "embeddings.patch_embedding"
    gtp_prefix = 0

    @capture_outputs
    def forward(
        self: Any, pixel_values: Tensor | None = None, interpolate_pos_encoding: bool | None = False, **kwargs: Any
    ) -> Any:
        wanted = self.gtp_check(pixel_values, kwargs)
        x = self.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        tokens = self.gtp_tokens(x, pixel_values, wanted)
        x = self.post_layernorm(tokens.x)
        pooled = self.head(x) if self.use_head else None
        return BaseModelOutputWithPooling(tokens.shown(x), pooled, tokens.hidden_states)


_TOWERS: dict[type[nn.Module], type[GTPTower]] = {
    vit.ViTModel: GTPViTModel,
    deit.DeiTModel: GTPDeiTModel,
    dinov2.Dinov2Model: GTPDinov2Model,
    registers.Dinov2WithRegistersModel: GTPDinov2WithRegistersModel,
    clip.CLIPVisionModel: GTPCLIPVisionModel,
    siglip.SiglipVisionModel: GTPSiglipVisionModel,
}
_ENCODERS: dict[type[nn.Module], type[GTPEncoder]] = {
    dinov2.Dinov2Encoder: GTPDinov2Encoder,
    registers.Dinov2WithRegistersEncoder: GTPDinov2WithRegistersEncoder,
    clip.CLIPEncoder: GTPCLIPEncoder,
    siglip.SiglipEncoder: GTPSiglipEncoder,
}
_LAYERS: dict[type[nn.Module], type[GTPLayer]] = {
    vit.ViTLayer: GTPViTLayer,
    deit.DeiTLayer: GTPDeiTLayer,
    dinov2.Dinov2Layer: GTPDinov2Layer,
    registers.Dinov2WithRegistersLayer: GTPDinov2WithRegistersLayer,
    clip.CLIPEncoderLayer: GTPCLIPEncoderLayer,
    siglip.SiglipEncoderLayer: GTPSiglipEncoderLayer,
}
_ATTENTIONS: dict[type[nn.Module], type[GTPAttention]] = {
    vit.ViTAttention: GTPViTAttention,
    deit.DeiTAttention: GTPDeiTAttention,
    dinov2.Dinov2Attention: GTPDinov2Attention,
    registers.Dinov2WithRegistersAttention: GTPDinov2WithRegistersAttention,
    clip.CLIPAttention: GTPCLIPAttention,
    siglip.SiglipAttention: GTPSiglipAttention,
}
_PATCHED: dict[type[nn.Module], Any] = {**_TOWERS, **_ENCODERS, **_LAYERS, **_ATTENTIONS}
_ORIGINAL = {patched: original for original, patched in _PATCHED.items()}
# Models of one tower and a linear head on its class token or on the mean of its tokens.
HEADED = (
    vit.ViTForImageClassification,
    deit.DeiTForImageClassification,
    deit.DeiTForImageClassificationWithTeacher,
    dinov2.Dinov2ForImageClassification,
    registers.Dinov2WithRegistersForImageClassification,
    clip.CLIPVisionModelWithProjection,
    clip.CLIPForImageClassification,
    siglip.SiglipForImageClassification,
)
# Models around a tower that fewer tokens fit.
_HOLDERS = (*HEADED, clip.CLIPModel, siglip.SiglipModel)
SUPPORTED = ", ".join(cls.__name__ for cls in _TOWERS)
_BIAS = "its attention adds a relative position bias"
_WINDOWS = "its windows of attention need every token in its place"
_REFUSED = {
    "beit": _BIAS,
    "data2vec-vision": _BIAS,
    "dinov3_vit": "its attention rotates queries and keys by their place on the grid",
    "hiera": _WINDOWS,
    "pvt": "its attention reduces the grid of keys",
    "pvt_v2": "its attention reduces the grid of keys",
    "sam": _BIAS,
    "swin": _WINDOWS,
    "swinv2": _WINDOWS,
    "timm_wrapper": "it holds a model of timm: patch model.timm_model",
    "vitdet": _BIAS,
}
_DROPS: dict[type[nn.Module], str] = {
    nn.Dropout: "p",
    dinov2.Dinov2DropPath: "drop_prob",
    registers.Dinov2WithRegistersDropPath: "drop_prob",
}
_LAYER_SCALES = (dinov2.Dinov2LayerScale, registers.Dinov2WithRegistersLayerScale)


def patch(model: Any, config: GTPConfig) -> Any:
    """Patches the tower of a model of transformers in place; :func:`gtp_vit.patch` says what is raised."""
    tower = _find_tower(model, config)
    layers = tower.get_submodule(_TOWERS[type(tower)].gtp_layers)
    for module in (model, tower):
        if not isinstance(getattr(module, "gtp", config), GTPConfig):
            raise ValueError(
                f"{type(module).__name__} has an attribute gtp ({type(module.gtp).__name__}), where patching keeps its "
                "options"
            )
    _check_tower(tower, layers)
    _check_options(tower, config, len(layers))
    for module in (model, tower):
        module.gtp = config
    for module in _parts(tower, layers):
        module.__class__ = _PATCHED[type(module)]
    return model


def unpatch(model: Any) -> Any:
    """Gives a patched tower its classes back; :func:`gtp_vit.unpatch` says what is raised."""
    towers = [module for module in model.modules() if isinstance(module, GTPTower)]
    if len(towers) != 1:
        raise ValueError(
            f"model must be patched by gtp_vit.patch; got an unpatched {type(model).__name__}"
            if not towers
            else f"model must hold one patched tower; this {type(model).__name__} holds {len(towers)}: unpatch each"
        )
    tower = towers[0]
    for module in (model, tower):
        vars(module).pop("gtp", None)
    for module in tower.modules():
        if type(module) in _ORIGINAL:
            module.__class__ = _ORIGINAL[type(module)]
    return model


def work(model: Any, size: int | tuple[int, int] | None = None) -> ModelWork:
    """The work of a tower, or of one with a head, patched or not; ``size`` as in :func:`gtp_vit.schedule`."""
    path, tower = _one_tower(model)
    if tower is not model and type(model) not in HEADED:
        raise TypeError(
            f"model must be a vision tower of transformers, alone or with a classifier or projection; got "
            f"{type(model).__name__}: give its tower, model.{path}"
        )
    kind = _kind(tower)
    layers = tower.get_submodule(kind.gtp_layers)
    if type(tower) in _TOWERS:
        _check_tower(tower, layers)
    nominal = _nominal_size(tower)
    image = noise(tower, nominal if size is None else size, "size")
    height, width = image.shape[-2:]
    grid_size = _grid(tower.get_submodule(kind.gtp_conv), height, width)
    if min(grid_size) < 1:
        raise ValueError(f"size must hold at least one patch; got {(height, width)}")
    # DINOv2 takes any size as it is.
    anyhow = (height, width) == nominal or issubclass(kind, _GTPDinov2)
    options = {} if anyhow else {"interpolate_pos_encoding": True}
    pooling = tower.head if kind is GTPSiglipVisionModel and tower.use_head else nn.Identity()
    channels = tower.config.hidden_size
    constant, final_token = outside(
        tower,
        lambda: tower.embeddings(image, **options),
        lambda tokens: pooling(features(tower, tokens, channels)),
        _num_prefix(tower),
    )
    # Linear heads, which see one token.
    constant += per_token(model) - per_token(tower) + per_token(getattr(tower, "pooler", None) or nn.Identity())
    blocks = tuple(
        block_work(layer, attention, attention.q_proj.out_features, attention.q_proj.out_features // attention.head_dim)
        for layer, attention in ((layer, _attention_of(layer)) for layer in layers)
    )
    return ModelWork(blocks, channels, grid_size, _num_prefix(tower), constant, final_token, restores=True)


def _find_tower(model: Any, config: GTPConfig) -> Any:
    """The one tower in ``model``, which may be the model itself; not patched yet."""
    name = type(model).__name__
    if any(isinstance(module, GTPTower) for module in model.modules()):
        raise ValueError(f"model is patched already ({name}): call gtp_vit.unpatch(model) first")
    path, tower = _one_tower(model)
    if tower is not model and type(model) not in _HOLDERS and not config.restore:
        raise ValueError(
            f"restore must be True for a {name}, which may need every token of its tower; got False "
            f"(or patch the tower itself, model.{path})"
        )
    return tower


def _one_tower(model: Any) -> tuple[str, Any]:
    """Path and module of the one tower in ``model``, patched or not."""
    name = type(model).__name__
    towers = {path: module for path, module in model.named_modules() if _kind(module) in _TOWERS.values()}
    if not towers:
        reason = _REFUSED.get(getattr(getattr(model, "config", None), "model_type", ""), "it holds none of them")
        raise TypeError(f"model must be, or hold, one of {SUPPORTED} of transformers; got {name}: {reason}")
    if len(towers) > 1:
        raise TypeError(
            f"model must hold one vision tower; {name} holds {len(towers)}: patch each by itself ({', '.join(towers)})"
        )
    (found,) = towers.items()
    return found


def _kind(module: nn.Module) -> Any:
    """The class of a module once it is patched."""
    return _PATCHED.get(type(module), type(module))


def _parts(tower: Any, layers: Any) -> list[nn.Module]:
    """The modules that change class, each once."""
    encoder = [] if _TOWERS[type(tower)].gtp_layers == "layers" else [tower.encoder]
    attentions = [_attention_of(layer) for layer in layers]
    return list(dict.fromkeys([tower, *encoder, *layers, *attentions]))


def _attention_of(layer: Any) -> Any:
    return getattr(layer, _kind(layer).gtp_names.attention)


def _check_tower(tower: Any, layers: Any) -> None:
    name = type(tower).__name__
    for index, layer in enumerate(layers):
        if type(layer) not in _LAYERS:
            supported = ", ".join(cls.__name__ for cls in _LAYERS)
            raise TypeError(f"layer {index} of {name} is {type(layer).__name__}; supported layers are {supported}")
        attention = _attention_of(layer)
        if type(attention) not in _ATTENTIONS:
            supported = ", ".join(cls.__name__ for cls in _ATTENTIONS)
            raise TypeError(
                f"layer {index} of {name} has {type(attention).__name__}; supported attentions are {supported}"
            )
        rate = getattr(attention, _ATTENTIONS[type(attention)].gtp_names[2])
        if rate > 0:
            raise ValueError(_attention_dropout(index, rate))
    for module in _parts(tower, layers):
        if type(module) not in _PATCHED:
            raise TypeError(f"{name} has an encoder of class {type(module).__name__}, which is not supported")
        if "forward" in vars(module):
            raise TypeError(
                f"{name}: a {type(module).__name__} has its own forward in place of that of its class, which patching "
                "would bypass"
            )


def _check_options(tower: Any, config: GTPConfig, depth: int) -> None:
    patched = _TOWERS[type(tower)]
    rows, columns = _grid(tower.get_submodule(patched.gtp_conv), *_nominal_size(tower))
    config.check_fit(rows * columns, depth)
    if config.selection.startswith("CLSAttn") and patched.gtp_prefix == 0:
        raise ValueError(
            f"selection = {config.selection!r} reads the attention of a class token, and {type(tower).__name__} has "
            "none"
        )


def _attention_dropout(layer: int, rate: float) -> str:
    return (
        f"attention dropout must be off; got {rate} in layer {layer}: scores are taken from the whole map "
        "(set attention_probs_dropout_prob, or attention_dropout, to 0 in the configuration before building the model)"
    )


def _num_prefix(tower: Any) -> int:
    registers = getattr(tower.embeddings, "register_tokens", None)
    prefix: int = _kind(tower).gtp_prefix
    return prefix if registers is None else prefix + int(registers.shape[1])


def _nominal_size(tower: Any) -> tuple[int, int]:
    """(height, width) of the images that the tower was built for."""
    size = tower.config.image_size
    height, width = size if isinstance(size, Iterable) else (size, size)
    return height, width


def _grid(conv: Any, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of patches of an image."""
    rows, columns = (
        (size - kernel) // stride + 1
        for size, kernel, stride in zip((height, width), conv.kernel_size, conv.stride, strict=True)
    )
    return rows, columns


def _wanted(output_hidden_states: Any, count: int) -> frozenset[int]:
    """The indices of the hidden states to keep, of ``count``: all, none, or those chosen by number (-1: the last)."""
    if not output_hidden_states:
        return frozenset()
    if isinstance(output_hidden_states, bool):
        return frozenset(range(count))
    chosen = [output_hidden_states] if isinstance(output_hidden_states, int) else output_hidden_states
    return frozenset(index % count for index in chosen if -count <= index < count)


def _through(module: Any, x: Tensor) -> Tensor:
    return x if module is None else module(x)


def _acts(drop: Any) -> bool:
    """Whether the module, a dropout or stochastic depth, may change what goes through it."""
    if drop is None:
        return False
    if has_hooks(drop):
        return True
    if type(drop) is nn.Identity:
        return False
    return type(drop) not in _DROPS or (drop.training and getattr(drop, _DROPS[type(drop)]) > 0)


def _folds(layer_scale: Any, drop: Any, x: Tensor, branch: Tensor) -> bool:
    """Whether the layer scale may be handed to the fused step: nothing acts between it and the residual addition."""
    if type(layer_scale) not in _LAYER_SCALES or has_hooks(layer_scale) or _acts(drop):
        return False
    dtype = torch.promote_types(x.dtype, branch.dtype)
    return torch.promote_types(dtype, layer_scale.lambda1.dtype) == dtype


def _fused_norm(norm: Any, dtype: torch.dtype) -> Norm:
    """The arguments for a LayerNorm over channels in ``dtype`` that can be fused; for another norm, kind "none"."""
    if type(norm) is not nn.LayerNorm or len(norm.normalized_shape) != 1 or has_hooks(norm):
        return Norm()
    if norm.weight is not None and norm.weight.dtype != dtype:
        return Norm()
    return Norm("layer", norm.weight, norm.bias, norm.eps)
