"""LV-ViT (Jiang et al., "All Tokens Matter: Token Labeling for Training Better Vision Transformers", 2021).

A Vision Transformer with three changes, here on timm's ``VisionTransformer``, whose blocks and interfaces it keeps:

    stem     a 7 x 7 convolution of stride 2 and two of 3 x 3, each normalised, then patches of half the size
    block    x + f(x) / λ for both residual branches f, λ = 2
    head     logits = head(class token) + 0.5 · max over the other tokens of aux_head(token)

Its state_dict has the key names and shapes of the released checkpoints (listed in ``lvvit_keys.json``).
:func:`gtp_vit.patch` takes it like any model of timm: the maximum is then over the tokens that remain.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.format import nchw_to
from timm.layers.layer_scale import LayerScale
from timm.layers.norm import LayerNorm
from timm.layers.patch_embed import PatchEmbed
from timm.layers.weight_init import trunc_normal_
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from gtp_vit.weights import load_weights, read_weights

STEM_CHANNELS = 64
AUX_WEIGHT = 0.5


class ConvStem(PatchEmbed):
    """timm's ``PatchEmbed`` behind three convolutions, the first of which halves the resolution.

    Args:
        patch_size: even; the projection then takes patches of half of it.
        in_chans, embed_dim: channels of the image, and C.
        options: those of ``PatchEmbed``; padding of images to whole patches is not among them.
    """

    def __init__(self, patch_size: int = 16, in_chans: int = 3, embed_dim: int = 768, **options: Any) -> None:
        if patch_size < 2 or patch_size % 2:
            raise ValueError(f"patch_size must be even and positive, as the stem halves the image; got {patch_size}")
        super().__init__(patch_size=patch_size, in_chans=STEM_CHANNELS, embed_dim=embed_dim, **options)
        if self.dynamic_img_pad:
            raise ValueError("dynamic_img_pad must be False: the stem of LV-ViT takes whole patches only")
        half, width = patch_size // 2, STEM_CHANNELS
        place: dict[str, Any] = dict(device=self.proj.weight.device, dtype=self.proj.weight.dtype)
        self.conv1 = nn.Conv2d(in_chans, width, 7, stride=2, padding=3, bias=False, **place)
        self.bn1 = nn.BatchNorm2d(width, **place)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False, **place)
        self.bn2 = nn.BatchNorm2d(width, **place)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1, bias=False, **place)
        self.bn3 = nn.BatchNorm2d(width, **place)
        self.proj = nn.Conv2d(width, embed_dim, half, stride=half, **place)

    def forward(self, x: Tensor) -> Tensor:
        """Images x [B, in_chans, H, W] to tokens [B, n, C], or [B, h, w, C] where the input size is dynamic.

        Raises:
            ValueError: another size than the nominal one, or where it is dynamic, one that is not whole patches.
        """
        height, width = x.shape[-2:]
        if self.strict_img_size and (height, width) != tuple(self.img_size):
            raise ValueError(
                f"images must be {self.img_size[0]} x {self.img_size[1]}; got {height} x {width} "
                "(build the model with img_size, or with dynamic_img_size=True)"
            )
        if height % self.patch_size[0] or width % self.patch_size[1]:
            raise ValueError(
                f"images must consist of whole patches of {self.patch_size[0]} x {self.patch_size[1]}; "
                f"got {height} x {width}"
            )
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = norm(conv(x)).relu()
        x = self.proj(x)
        if self.flatten:
            return x.flatten(2).transpose(1, 2)
        tokens: Tensor = nchw_to(x, self.output_fmt)
        return tokens

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Another nominal input size.

        Raises:
            ValueError: another patch size, which is that of the stem.
        """
        if patch_size is not None and tuple(nn.modules.utils._pair(patch_size)) != tuple(self.patch_size):
            raise ValueError(f"patch_size of LV-ViT cannot be changed from {self.patch_size}; got {patch_size}")
        super().set_input_size(img_size)


class LVViT(VisionTransformer):
    """LV-ViT; ``forward`` takes images [B, in_chans, H, W] and gives logits [B, num_classes].

    With ``semantics="official"``, :func:`gtp_vit.patch` lets the whole attention map of this model stand, as the
    authors' LV-ViT does: the options on ``model.gtp`` say ``sparsity`` 1. Under ``"paper"`` the threshold θ acts here
    as everywhere.

    Args:
        img_size: nominal input size, one number or (H, W), in whole patches.
        patch_size, in_chans, embed_dim, depth, num_heads, mlp_ratio: as in ``VisionTransformer``.
        num_classes: of both heads; 0 for a model without heads, which gives the class token [B, C].
        skip_lam: λ, positive, the divisor of both residual branches; 1 / λ is rounded where λ is no power of two.
        return_dense: for training with token labels: in training mode ``forward`` gives the pair of class logits
            [B, num_classes] and token logits [B, tokens that remain, num_classes], which the combined logits are
            made of. Without it both modes give the combined logits. Token mixing is left to the training loop.
        dynamic_img_size: whether any input size of whole patches is taken; position embeddings are resampled.
        drop_path_rate: stochastic depth, rising linearly from 0 at the first block to this rate at the last.
        proj_drop_rate, attn_drop_rate: as in ``VisionTransformer``.

    Raises:
        ValueError: an image that is not whole patches, an odd patch size, or λ ≤ 0.
    """

    # Read by gtp_vit.patch.
    official_threshold = False

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 384,
        depth: int = 16,
        num_heads: int = 6,
        mlp_ratio: float = 3.0,
        skip_lam: float = 2.0,
        return_dense: bool = False,
        dynamic_img_size: bool = False,
        drop_path_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
    ) -> None:
        if not skip_lam > 0:
            raise ValueError(f"skip_lam must be positive; got {skip_lam}")
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=False,
            init_values=1 / skip_lam,
            dynamic_img_size=dynamic_img_size,
            drop_path_rate=drop_path_rate,
            proj_drop_rate=proj_drop_rate,
            attn_drop_rate=attn_drop_rate,
            embed_layer=ConvStem,
            norm_layer=partial(LayerNorm, eps=1e-5),
        )
        if any(side % patch_size for side in self.patch_embed.img_size):
            raise ValueError(f"img_size must be a multiple of patch_size = {patch_size}; got {img_size}")
        self.return_dense = return_dense
        height, width = self.patch_embed.img_size
        self.default_cfg = self.pretrained_cfg = _data_config((in_chans, height, width), num_classes)
        # timm reads the grid of a checkpoint off this and the projection, whose input is half the image.
        self.pretrained_model_args = dict(img_size=(height // 2, width // 2))
        block: Any
        for block in self.blocks:
            _fix(block.ls1)
            _fix(block.ls2)
        self.aux_head: nn.Module = nn.Identity()
        self._reset_aux_head()
        trunc_normal_(self.cls_token, std=0.02)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """Features x [B, 1 + tokens that remain, C] to what :meth:`forward` gives; ``pre_logits``: the class token."""
        pooled = self.pool(x)
        if pre_logits or self.num_classes == 0:
            return pooled
        tokens = self.aux_head(x[:, self.num_prefix_tokens :])
        if self.return_dense and self.training:
            return self.head(pooled), tokens
        return self.head(pooled) + AUX_WEIGHT * tokens.amax(1)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New heads, both of them, for ``num_classes`` classes."""
        super().reset_classifier(num_classes, global_pool)
        self._reset_aux_head()

    def _reset_aux_head(self) -> None:
        if self.num_classes == 0:
            self.aux_head = nn.Identity()
            return
        like = next(self.parameters())
        head = nn.Linear(self.embed_dim, self.num_classes, device=like.device, dtype=like.dtype)
        self.aux_head = head.train(self.training)
        self._init_weights(self.aux_head)


def lvvit_s(num_classes: int = 1000, img_size: int | tuple[int, int] = 224, **options: Any) -> LVViT:
    """LV-ViT-S: 16 blocks, C = 384, 6 heads, 26.15 million parameters at 224 x 224; random weights.

    Args:
        options: other arguments of :class:`LVViT`; those that make it S may be changed too.
    """
    shape = dict(embed_dim=384, depth=16, num_heads=6)
    return LVViT(num_classes=num_classes, img_size=img_size, **(shape | options))


def lvvit_m(num_classes: int = 1000, img_size: int | tuple[int, int] = 224, **options: Any) -> LVViT:
    """LV-ViT-M: 20 blocks, C = 512, 8 heads, 55.83 million parameters at 224 x 224; random weights.

    Args:
        options: other arguments of :class:`LVViT`; those that make it M may be changed too.
    """
    shape = dict(embed_dim=512, depth=20, num_heads=8)
    model = LVViT(num_classes=num_classes, img_size=img_size, **(shape | options))
    model.default_cfg["crop_pct"] = 1.0
    return model


MODELS: dict[str, Callable[..., LVViT]] = {"lvvit_s": lvvit_s, "lvvit_m": lvvit_m}


def load_checkpoint(model: LVViT, path: Path | str) -> LVViT:
    """Loads a released or saved checkpoint into ``model``, all of it or nothing.

    The file holds a state dict, alone or under ``state_dict`` or ``model`` (their running averages ``state_dict_ema``
    or ``model_ema`` where it has them); ``module.`` before its keys is dropped, and position embeddings of another,
    square grid are resampled. No code in the file runs.

    Returns:
        ``model``.

    Raises:
        FileNotFoundError: no such file.
        TypeError: ``model`` is not an LV-ViT.
        gtp_vit.weights.WeightsError: a ValueError; a file that cannot be read, or missing keys, unexpected keys or
            other shapes, with their number and some of them by name.
    """
    if not isinstance(model, LVViT):
        raise TypeError(f"model must be an LVViT; got {type(model).__name__}")
    load_weights(model, read_weights(path), str(path))
    return model


def _fix(scale: LayerScale) -> None:
    """Makes 1 / λ a constant, in no state_dict: released checkpoints have none, and nothing trains it."""
    # Still timm's LayerScale, so that the fused step takes it. Multiplying by 1 / 2 is dividing by 2, bit for bit.
    gamma = scale.gamma.detach()
    del scale.gamma
    scale.register_buffer("gamma", gamma, persistent=False)


def _data_config(input_size: tuple[int, int, int], num_classes: int) -> dict[str, Any]:
    """The evaluation settings of the released models, in timm's terms."""
    return {
        "num_classes": num_classes,
        "input_size": input_size,
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.conv1",
        "classifier": ("head", "aux_head"),
    }
