"""Folders of images, and batches of them in which an image that cannot be read is named and left out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from gtp_vit.cli import common


@dataclass(frozen=True)
class Folder:
    """Images of a folder.

    Attributes:
        root: the folder.
        files: paths below it, sorted by class and name.
        labels: the class of each file; -1 where there are none.
        classes: names of the class folders, sorted; empty where there are none.
    """

    root: Path
    files: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...] = ()

    def digest(self, with_sizes: bool = True) -> str:
        """SHA-256 of the paths and labels, and the sizes, which are read from the disk."""
        digest = hashlib.sha256()
        for file, label in zip(self.files, self.labels, strict=True):
            path = self.root / file
            size = path.stat().st_size if with_sizes and path.exists() else -1
            digest.update(f"{file}\0{label}\0{size}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()


def class_names(root: Path) -> list[str]:
    """The class folders of `root`, sorted, as torchvision's `ImageFolder` sees them."""
    from torchvision.datasets.folder import find_classes

    try:
        return find_classes(root)[0]
    except FileNotFoundError:
        return []


def labelled(root: Path, index: dict[str, int]) -> Folder:
    """The images below the class folders of `root`, as torchvision's `ImageFolder` finds them.

    Args:
        index: class folder -> label; a folder that is not in it is left out, an empty one has no images.

    Raises:
        click.UsageError: there are no images.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    samples = make_dataset(root, index, extensions=IMG_EXTENSIONS, allow_empty=True) if index else []
    if not samples:
        raise click.UsageError(f"no images below the class folders of {root} ({', '.join(IMG_EXTENSIONS)})")
    files = tuple(Path(path).relative_to(root).as_posix() for path, _ in samples)
    return Folder(root, files, tuple(label for _, label in samples), tuple(sorted(index)))


def unlabelled(root: Path) -> Folder:
    """All images below `root`, in whatever folders.

    Raises:
        click.UsageError: there are none.
    """
    from torchvision.datasets.folder import is_image_file

    found = (path for path in root.rglob("*") if is_image_file(path.name) and path.is_file())
    files = sorted(path.relative_to(root).as_posix() for path in found)
    if not files:
        raise click.UsageError(f"no images below {root}")
    return Folder(root, tuple(files), (-1,) * len(files))


def class_index(root: Path, names: Sequence[str], model: Any, class_map: Path | None, subset: bool) -> dict[str, int]:
    """Class folder -> class of the model: by its names of them, by position, or as `--class-map` or `--subset` has it.

    Raises:
        click.UsageError: the model has no classes, the folders are not as many, or one of them is no class.
    """
    count = int(model.num_classes)
    if count == 0:
        raise click.UsageError("the model has no classifier: give --label-free, or weights that have one")
    if class_map is not None:
        known, what = _read_class_map(class_map), class_map.name
    elif subset:
        known, what = _subset(model), f"the {count} classes of the model"
    elif names and set(names) <= (labels := getattr(model, "label2id", {})).keys():
        known, what = labels, "the labels of the model"
    elif len(names) == count:
        return {name: label for label, name in enumerate(names)}
    else:
        raise click.UsageError(
            f"{root} has {len(names)} class folders and the model {count} classes: give --class-map FILE, "
            "--subset (ImageNet's WordNet ids, or indices, as names of the folders), or --label-free"
        )
    if unknown := [name for name in names if name not in known]:
        listed = ", ".join(unknown[:6]) + (", ..." if len(unknown) > 6 else "")
        raise click.UsageError(f"{len(unknown)} class folders are not among {what}: {listed}")
    index = {name: known[name] for name in names}
    if outside := {name: label for name, label in index.items() if not 0 <= label < count}:
        name, label = next(iter(outside.items()))
        raise click.UsageError(f"the model has {count} classes, from 0; {what} has {label} for {name}")
    return index


def _read_class_map(path: Path) -> dict[str, int]:
    """A class map: a JSON object from names to indices, or the name of class k in line k."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".json":
        return {name.strip(): label for label, name in enumerate(text.splitlines())}
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise click.UsageError(f"--class-map: {path.name} is not JSON ({error})") from error
    if not isinstance(found, dict) or not all(type(label) is int for label in found.values()):
        raise click.UsageError(f"--class-map: {path.name} must be an object from folder names to class indices")
    return found


def _subset(model: nn.Module) -> dict[str, int]:
    """What the folders of a subset may be called: indices, and the WordNet ids of the list that timm infers."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    known = {str(label): label for label in range(int(model.num_classes))}  # type: ignore[arg-type]
    if (subset := infer_imagenet_subset(model)) is not None:
        known |= {name: label for label, name in enumerate(ImageNetInfo(subset).label_names())}
    return known


@dataclass(frozen=True)
class Item:
    """One image, [3, H, W], or None; and what could not be read: pairs of file and reason."""

    image: Tensor | None
    label: int
    unreadable: tuple[tuple[str, str], ...] = ()


class Images(Dataset[Item]):
    """The images of a folder, transformed by `transform`."""

    def __init__(self, folder: Folder, transform: Any) -> None:
        self.folder = folder
        self.transform = transform

    def __len__(self) -> int:
        return len(self.folder.files)

    def __getitem__(self, position: int) -> Item:
        from torchvision.datasets.folder import pil_loader

        file, label = self.folder.files[position], self.folder.labels[position]
        try:
            image = pil_loader(self.folder.root / file)
        except Exception as error:  # a damaged file raises almost anything
            return Item(None, label, ((file, f"{type(error).__name__}: {common.first_line(error)}"),))
        return Item(self.transform(image), label)


@dataclass(frozen=True)
class Batch:
    """images [n, 3, H, W], labels int64 [n], and what could not be read: pairs of file and reason."""

    images: Tensor
    labels: Tensor
    unreadable: list[tuple[str, str]]

    def pin_memory(self) -> Batch:
        return Batch(self.images.pin_memory(), self.labels.pin_memory(), self.unreadable)


def collate(items: Sequence[Item]) -> Batch:
    """One batch of the images that could be read; n may be 0."""
    images = [item.image for item in items if item.image is not None]
    labels = [item.label for item in items if item.image is not None]
    return Batch(
        torch.stack(images) if images else torch.empty(0),
        torch.tensor(labels, dtype=torch.int64),
        [entry for item in items for entry in item.unreadable],
    )


def loader(dataset: Dataset[Item], batches: Iterable[Any], workers: int, device: torch.device) -> DataLoader[Any]:
    """A loader of `batches`, each a list of what `dataset` takes. It draws nothing from the global generator."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),
    )
