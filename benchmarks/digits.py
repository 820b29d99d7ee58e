"""A small Vision Transformer trained on scikit-learn's handwritten digits: the data, the model, the training.

The 1,797 grey images of 8 × 8 pixels are sampled at 56 × 56, which makes 14 × 14 patches: as many tokens as in DeiT,
and as many blocks, so that P tokens per block mean the same as there. A seed is trained in minutes on two cores: most
epochs see images of half the size, which are a quarter of the tokens.

No part of the training knows of token reduction: no patch dropout, no distillation, no attention dropout.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import sklearn
import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor


@dataclass(frozen=True)
class Recipe:
    """The model and how it is trained.

    Attributes:
        img_size, patch_size, embed_dim, depth, num_heads: of the Vision Transformer.
        epochs: passes over the training images.
        full_size_epochs: how many of these, the last ones, see images of ``img_size``; the others see half of it.
        batch_size, learning_rate, weight_decay, smoothing: of AdamW and of the cross entropy; the rate falls as a
            cosine after a warm-up over the first tenth.
        rotation, shift, zoom: the largest of the random rotations (degrees), shifts (of the image's side) and changes
            of size (1 + zoom times as large or as small).
        train_images, test_images: the split, which is stratified and the same for every seed.
    """

    img_size: int = 56
    patch_size: int = 4
    embed_dim: int = 64
    depth: int = 12
    num_heads: int = 2
    epochs: int = 50
    full_size_epochs: int = 5
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    smoothing: float = 0.1
    rotation: float = 12.0
    shift: float = 0.1
    zoom: float = 0.15
    train_images: int = 1347
    test_images: int = 450

    def sizes(self) -> Iterator[int]:
        """The image size of each epoch."""
        for epoch in range(self.epochs):
            yield self.img_size if epoch >= self.epochs - self.full_size_epochs else self.img_size // 2


# For trying the tool.
TINY = Recipe(
    img_size=32, embed_dim=16, depth=2, num_heads=2, epochs=2, full_size_epochs=1, train_images=64, test_images=40
)


class Digits(NamedTuple):
    """Images [N, 8, 8] in [0, 1], float32, and their labels [N], int64."""

    images: Tensor
    labels: Tensor


def load(recipe: Recipe) -> tuple[Digits, Digits]:
    """The images for training and for testing."""
    found = load_digits()
    train_x, test_x, train_y, test_y = train_test_split(
        found.images / 16, found.target, train_size=recipe.train_images, test_size=recipe.test_images,
        stratify=found.target, random_state=0,
    )  # fmt: skip
    return (
        Digits(torch.from_numpy(train_x).float(), torch.from_numpy(train_y).long()),
        Digits(torch.from_numpy(test_x).float(), torch.from_numpy(test_y).long()),
    )


def sampled(images: Tensor, size: int, affine: Tensor | None = None) -> Tensor:
    """Images [B, 8, 8] sampled at ``size`` × ``size``: [B, 1, size, size], black at −1.

    Args:
        affine: [B, 2, 3], where in the image each pixel is looked up; the identity by default.
    """
    if affine is None:
        affine = torch.eye(2, 3).expand(len(images), 2, 3)
    grid = F.affine_grid(affine, [len(images), 1, size, size], align_corners=False)
    return 2 * F.grid_sample(images[:, None], grid, "bicubic", "zeros", align_corners=False) - 1


def random_affine(recipe: Recipe, count: int) -> Tensor:
    """Small rotations, shifts and changes of size: [count, 2, 3], drawn from torch's generator."""
    angle, zoom, x, y = torch.rand(4, count) * 2 - 1
    angle = torch.deg2rad(angle * recipe.rotation)
    factor = (1 + recipe.zoom) ** zoom
    cos, sin = factor * angle.cos(), factor * angle.sin()
    # The image spans [−1, 1].
    x, y = 2 * recipe.shift * x, 2 * recipe.shift * y
    return torch.stack((cos, -sin, x, sin, cos, y), 1).reshape(count, 2, 3)


def create(recipe: Recipe) -> Any:
    """The model with random weights; timm's, and nothing changed in it."""
    return VisionTransformer(
        img_size=recipe.img_size,
        patch_size=recipe.patch_size,
        in_chans=1,
        num_classes=10,
        embed_dim=recipe.embed_dim,
        depth=recipe.depth,
        num_heads=recipe.num_heads,
        dynamic_img_size=True,
    )


def train(recipe: Recipe, seed: int, data: Digits, progress: Callable[[], object]) -> Any:
    """A model trained on ``data``, in evaluation mode; ``progress`` is called after each epoch.

    The seed decides the first weights, the order of the images and what is done to them.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = create(recipe).train()
        optimizer = create_optimizer_v2(model, opt="adamw", lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        steps = len(data.images) // recipe.batch_size
        total = steps * recipe.epochs
        schedule = CosineLRScheduler(
            optimizer, t_initial=total, lr_min=recipe.learning_rate / 100, warmup_t=max(1, total // 10),
            warmup_lr_init=recipe.learning_rate / 100, t_in_epochs=False,
        )  # fmt: skip
        for epoch, size in enumerate(recipe.sizes()):
            # What is left over by the last whole batch is another remainder in each epoch.
            order = torch.randperm(len(data.images))[: steps * recipe.batch_size]
            for step, chosen in enumerate(order.split(recipe.batch_size)):
                schedule.step_update(epoch * steps + step)
                images = sampled(data.images[chosen], size, random_affine(recipe, len(chosen)))
                loss = F.cross_entropy(model(images), data.labels[chosen], label_smoothing=recipe.smoothing)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
            progress()
    return model.eval()


def digest(recipe: Recipe) -> str:
    """Of what decides the trained weights beside the seed: this file, the recipe, the libraries."""
    about = json.dumps([asdict(recipe), torch.__version__, timm.__version__, sklearn.__version__])
    return hashlib.sha256(Path(__file__).read_bytes() + about.encode()).hexdigest()[:12]


def trained(recipe: Recipe, seed: int, folder: Path, progress: Callable[[], object] = lambda: None) -> Any:
    """The model of a seed: trained once, read from ``folder`` after that."""
    path = folder / f"{digest(recipe)}-{seed}.pt"
    if path.is_file():
        model = create(recipe)
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    model = train(recipe, seed, load(recipe)[0], progress)
    folder.mkdir(parents=True, exist_ok=True)
    # A file that is there is whole.
    part = path.with_suffix(".part")
    torch.save(model.state_dict(), part)
    part.replace(path)
    return model
