"""Photographs that come inside scikit-image and scikit-learn, so that nothing is downloaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Package, folder inside it, file. Only files that the wheels themselves carry: scikit-image fetches its others.
_BUNDLED = (
    ("skimage", "data", "chelsea.png"),
    ("sklearn", "datasets/images", "china.jpg"),
    ("skimage", "data", "coffee.png"),
    ("skimage", "data", "astronaut.png"),
    ("skimage", "data", "motorcycle_left.png"),
    ("sklearn", "datasets/images", "flower.jpg"),
    ("skimage", "data", "rocket.jpg"),
    ("skimage", "data", "camera.png"),
)
_DISTRIBUTIONS = {"skimage": "scikit-image", "sklearn": "scikit-learn"}


def bundled_files() -> list[Path]:
    """The photographs on this disk, in a fixed order; what is not installed is left out."""
    found = []
    for package, folder, name in _BUNDLED:
        root = package_folder(package)
        if root is not None and (root / folder / name).is_file():
            found.append(root / folder / name)
    return found


def package_folder(package: str) -> Path | None:
    """The folder of an installed top-level package, found without importing it; None where it is not installed."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def photographs(
    size: int | tuple[int, int] = 224,
    count: int | None = None,
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> tuple[list[str], Tensor]:
    """The bundled photographs, cropped around the centre to the shape asked for and resized with antialiasing.

    Args:
        size: side, or (height, width), in pixels.
        count: how many; None for all.
        mean: per channel, taken off values in [0, 1].
        std: per channel, what the rest is divided by.

    Returns:
        The names, and a float32 tensor [count, 3, height, width].

    Raises:
        ValueError: `count` or `size` out of range.
        FileNotFoundError: a package that carries the photographs is missing.
    """
    files = bundled_files()
    missing = sorted(_DISTRIBUTIONS[package] for package in _DISTRIBUTIONS if package_folder(package) is None)
    if missing and (not files or count is None or count > len(files)):
        raise FileNotFoundError(
            f'the photographs come with {" and ".join(missing)}, not installed here: pip install "gtp-kernels[demo]"'
        )
    if count is not None and not 0 <= count <= len(files):
        raise ValueError(f"count: expected 0 to {len(files)}, the photographs at hand, got {count}")
    return read_photographs(files[:count], size, mean=mean, std=std)


def read_photographs(
    files: Iterable[Path | str],
    size: int | tuple[int, int] = 224,
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> tuple[list[str], Tensor]:
    """Any image files, prepared as `photographs` prepares its own: names (the stems) and float32 [n, 3, H, W].

    Raises:
        ValueError: a size below 1, or a file that is no image.
        FileNotFoundError: a file is missing.
    """
    from PIL import Image, ImageOps

    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"size: sizes start at 1, got {(height, width)}")
    names, images = [], []
    for file in map(Path, files):
        try:
            with Image.open(file) as opened:
                image = ImageOps.exif_transpose(opened).convert("RGB")
        except FileNotFoundError:
            raise
        except OSError as error:
            raise ValueError(f"{file}: not an image that can be read ({error})") from error
        # Crops to the aspect ratio around the centre, then resizes; Pillow's filters are antialiased.
        fitted = ImageOps.fit(image, (width, height), method=Image.Resampling.BICUBIC)
        names.append(file.stem.removesuffix("_left"))
        images.append(torch.from_numpy(np.array(fitted)))
    if not images:
        return [], torch.empty(0, 3, height, width)
    pixels = torch.stack(images).permute(0, 3, 1, 2).float() / 255
    channels = (1, 3, 1, 1)
    return names, (pixels - torch.tensor(tuple(mean)).view(channels)) / torch.tensor(tuple(std)).view(channels)
