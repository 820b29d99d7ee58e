"""The demo model, real weights on real photographs: the cpu backend against the reference, and its speed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import timm
import torch
from torch import Tensor, nn

import gtp_kernels
import gtp_vit
from gtp_kernels import backends
from gtp_vit import patch_timm, photos, timing, weights

Attend = tuple[Tensor, gtp_kernels.AttentionScores]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """DINOv2 ViT-S/14 at 224 x 224, unpatched."""
    model = timm.create_model(weights.DEMO_MODEL, pretrained=False, img_size=224, num_classes=0)
    weights.load_weights(model, weights.read_weights(weights.demo_weights_path()))
    return model.eval()


@pytest.fixture(scope="module")
def images(model: nn.Module) -> Tensor:
    config = model.pretrained_cfg
    return photos.photographs(224, mean=config["mean"], std=config["std"])[1]


@pytest.fixture
def patched(model: nn.Module) -> Iterator[nn.Module]:
    yield gtp_vit.patch(model, num_prop=8, sparsity=0.6)
    gtp_vit.unpatch(model)


def relative_errors(ours: Tensor, expected: Tensor) -> Tensor:
    """[B]: the error of an image's features over their norm."""
    return (ours - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)


@torch.inference_mode()
def test_the_backends_agree(patched: nn.Module, images: Tensor) -> None:
    with backends.use_backend("reference"):
        expected = patched.forward_head(patched.forward_features(images))
    with backends.record() as ran:
        ours = patched.forward_head(patched.forward_features(images))
    assert {name for _, name in ran} == {"cpu"}
    errors = relative_errors(ours, expected)
    # A value within rounding of a threshold, or of the P-th importance, may fall on either side.
    assert float(errors.median()) < 1e-4, errors
    assert float((errors >= 1e-4).float().mean()) <= 0.25, errors


@torch.inference_mode()
def test_the_backends_agree_on_every_image_once_the_choices_are_the_same(
    patched: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference's kept indices and thresholded positions, imposed on the cpu backend."""
    masks: list[Tensor] = []
    choices: list[tuple[Tensor, Tensor]] = []
    flips = 0
    select = gtp_kernels.select_tokens
    attend = patch_timm.attend

    def noting_select(*args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        choices.append(select(*args, **kwargs))
        return choices[-1]

    def noting_attend(q: Tensor, k: Tensor, v: Tensor, scale: float, state: object, options: object) -> Attend:
        masks.append(map_of(q, k, scale, state.token_scales, options.sparsity) > 0)
        return attend(q, k, v, scale, state, options)

    def map_of(q: Tensor, k: Tensor, scale: float, scales: Tensor | None, sparsity: float) -> Tensor:
        """The map that the backend multiplies v with, column block by column block: v is the identity."""
        identity = torch.eye(q.shape[2]).expand(*q.shape[:2], -1, -1)
        columns = [
            nn.functional.pad(part, (0, q.shape[3] - part.shape[3])) for part in identity.split(q.shape[3], dim=3)
        ]
        return torch.cat(
            [gtp_kernels.attention_with_scores(q, k, c, scales, sparsity=sparsity, scale=scale)[0] for c in columns], 3
        )[..., : q.shape[2]]

    def imposed_attend(q: Tensor, k: Tensor, v: Tensor, scale: float, state: object, options: object) -> Attend:
        nonlocal flips
        out, scores = attend(q, k, v, scale, state, options)
        ours = map_of(q, k, scale, state.token_scales, options.sparsity)
        imposed = map_of(q, k, scale, state.token_scales, 1.0) * masks.pop(0)
        flips += int(((ours > 0) != (imposed > 0)).sum())
        correction = (imposed - ours) @ v
        return out + correction, scores

    with monkeypatch.context() as patcher, backends.use_backend("reference"):
        patcher.setattr(gtp_kernels, "select_tokens", noting_select)
        patcher.setattr(patch_timm, "attend", noting_attend)
        expected = patched.forward_features(images)
    positions = sum(mask.numel() for mask in masks)
    with monkeypatch.context() as patcher, backends.use_backend("cpu"):
        patcher.setattr(gtp_kernels, "select_tokens", lambda *args, **kwargs: choices.pop(0))
        patcher.setattr(patch_timm, "attend", imposed_attend)
        ours = patched.forward_features(images)
    assert not masks
    assert not choices
    errors = relative_errors(ours, expected)
    assert float(errors.max()) < 1e-4, errors
    # What had to be imposed is rounding, not another threshold: at most one value in a hundred thousand.
    assert flips <= positions / 1e5, (flips, positions)


@pytest.mark.serial
@torch.inference_mode()
def test_the_patched_model_is_faster(model: nn.Module, images: Tensor) -> None:
    unpatched = timm.create_model(weights.DEMO_MODEL, pretrained=False, img_size=224, num_classes=0).eval()
    patched = gtp_vit.patch(model, num_prop=8, sparsity=0.6)
    try:
        spreads = timing.interleave(
            {"patched": lambda: patched(images), "unpatched": lambda: unpatched(images)}, rounds=7
        )
    finally:
        gtp_vit.unpatch(model)
    assert spreads["unpatched"].ratio(spreads["patched"]).median > 1.0
