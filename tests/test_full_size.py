"""The paper's models and their relatives at full size, with random weights: patched, against the backend reference."""

import pytest
import timm
import torch
from torch import nn

import gtp_kernels
import gtp_vit

# Those of Tables 1, 6 and 7 and of the supplement, then what was pre-trained in other ways, by their names in timm.
FAMILIES = {
    "DeiT-S": "deit_small_patch16_224",
    "DeiT-B": "deit_base_patch16_224",
    "DeiT-S, distilled": "deit_small_distilled_patch16_224",
    "ViT-B/8": "vit_base_patch8_224",
    "ViT-L": "vit_large_patch16_224",
    "EVA-L": "eva_large_patch14_196",
    "ViT-Medium-GAP-256": "vit_medium_patch16_gap_256",
    "ViT-Medium-GAP-384": "vit_medium_patch16_gap_384",
    "CLIP": "vit_base_patch16_clip_224.openai",
    "SigLIP": "vit_base_patch16_siglip_224.webli",
    "MAE": "vit_base_patch16_224.mae",
    "DINO": "vit_small_patch16_224.dino",
    "DINOv2": "vit_small_patch14_dinov2.lvd142m",
    "DINOv2 with registers": "vit_small_patch14_reg4_dinov2.lvd142m",
    "DINOv3": "vit_small_patch16_dinov3.lvd1689m",
    "EVA-02": "eva02_base_patch14_224.mim_in22k",
}
# Together these take a minute.
SLOW = {
    "ViT-B/8",
    "ViT-L",
    "EVA-L",
    "ViT-Medium-GAP-384",
    "SigLIP",
    "MAE",
    "DINOv2",
    "DINOv2 with registers",
    "EVA-02",
}


def build(name):
    """The model at full size; its weights are drawn here, as timm's own initialisation takes seconds."""
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False).eval()
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
        for module in model.modules():
            # Scales of norms and of layers are near one.
            for scale in ("gamma", "gamma_1", "gamma_2", *(["weight"] if "Norm" in type(module).__name__ else [])):
                if isinstance(getattr(module, scale, None), nn.Parameter):
                    getattr(module, scale).add_(1)
            if hasattr(module, "init_non_persistent_buffers"):
                module.init_non_persistent_buffers()
    return model


def images(model, dtype=torch.float32):
    return torch.randn(1, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(1)).to(dtype)


def forwards(model, x):
    """Features and trace, of the fast backend and of the definition."""
    with torch.inference_mode():
        with gtp_kernels.backends.record() as ran, gtp_vit.trace(model) as trace:
            features = model.forward_features(x)
        assert {backend for _, backend in ran} == {"cpu"}
        with gtp_kernels.use_backend("reference"), gtp_vit.trace(model) as definition:
            expected = model.forward_features(x)
    return (features, trace.layers), (expected, definition.layers)


@pytest.mark.parametrize("family", [pytest.param(key, marks=[pytest.mark.slow] * (key in SLOW)) for key in FAMILIES])
def test_against_the_reference(family):
    model = build(FAMILIES[family])
    depth = len(model.blocks)
    # With θ = 1, as values within rounding of a threshold may fall on either side of it.
    gtp_vit.patch(model, num_prop=8, sparsity=1.0)
    (features, layers), (expected, definition) = forwards(model, images(model))
    assert features.shape[1] == model.num_prefix_tokens + model.patch_embed.num_patches - 8 * depth
    for layer, defined in zip(layers, definition, strict=True):
        ranked = defined.importance[0].sort().values
        assert ranked[8] - ranked[7] > 2e-5 * ranked[8], "rounding may decide which tokens leave: take another seed"
        assert torch.equal(layer.prop_tokens, defined.prop_tokens)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)


def test_with_a_threshold():
    """In double precision no value is within rounding of a threshold; token scales are float32 in any model."""
    model = gtp_vit.patch(build(FAMILIES["DeiT-S"]).double(), num_prop=8, sparsity=0.6)
    (features, layers), (expected, definition) = forwards(model, images(model, torch.float64))
    for layer, defined in zip(layers, definition, strict=True):
        assert torch.equal(layer.prop_tokens, defined.prop_tokens)
    torch.testing.assert_close(features, expected, rtol=1e-6, atol=1e-6)
