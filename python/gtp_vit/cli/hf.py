"""Classifiers of transformers in folders that ``save_pretrained`` wrote, for `gtp-vit eval --model hf:FOLDER`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

import gtp_vit
from gtp_vit import weights
from gtp_vit.cli import common

PREFIX = "hf:"
_HEADS = ("classifier", "cls_classifier", "distillation_classifier")
# Of two shapes: a processor that neither resizes to one size nor crops does not make batches.
_PROBES = ((90, 60), (60, 90))


class Transform:
    """The image processor of a folder: an image of PIL -> float32 [3, H, W]."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, image: Any) -> Tensor:
        pixels: Tensor = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        return pixels

    @property
    def settings(self) -> dict[str, Any]:
        """What the folder says of it."""
        settings: dict[str, Any] = json.loads(self.processor.to_json_string())
        return settings


class Classifier(nn.Module):
    """A classifier of transformers that answers as a model of timm does; its pooled features stand for the tokens.

    Attributes:
        model: the classifier, which is what can be patched.
        transform: of its folder.
        input_size: (3, height, width) of the images that it makes.
        num_classes: 0 where there is no head.
        label2id: the name of each class.
    """

    def __init__(self, model: Any, transform: Transform, input_size: tuple[int, ...]) -> None:
        super().__init__()
        self.model, self.transform, self.input_size = model, transform, input_size
        self.num_classes = int(model.config.num_labels)
        # The numbers in label2id may be strings; transformers makes those of id2label integers.
        self.label2id: dict[str, int] = {label: int(index) for index, label in (model.config.id2label or {}).items()}

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images).logits
        return logits

    def forward_features(self, images: Tensor) -> Tensor:
        """What each head sees: [n, heads, C]."""
        seen: list[Tensor] = []
        hooks = [head.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for head in self._heads()]
        try:
            self.model(images)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(seen, 1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The logits [n, classes], or, before them, x."""
        if pre_logits:
            return x
        # The two heads of a distilled model are averaged, as it does itself.
        return torch.stack([head(row) for head, row in zip(self._heads(), x.unbind(1), strict=True)]).mean(0)

    def _heads(self) -> list[nn.Module]:
        return [getattr(self.model, name) for name in _HEADS if hasattr(self.model, name)]


def load(name: str) -> Classifier:
    """The classifier in the folder that ``name``, `hf:FOLDER`, says; nothing is downloaded.

    Raises:
        FileNotFoundError, OSError: there is none, or a file of it is missing or damaged.
        ImportError: transformers is not installed, or too old.
        click.UsageError: a model that cannot be patched, or images that do not fit it.
        gtp_vit.weights.WeightsError: missing and unexpected keys, other shapes; all are named.
    """
    folder = Path(name.removeprefix(PREFIX)).expanduser()
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json: {PREFIX}FOLDER takes what save_pretrained wrote")
    try:
        from transformers import AutoImageProcessor, AutoModelForImageClassification
    except ImportError as error:
        raise ImportError(f'transformers does not import ({error}): pip install "gtp-kernels[transformers]"') from error
    from PIL import Image

    with _quiet():
        try:
            model, report = AutoModelForImageClassification.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in the report
            )
        except (ImportError, OSError):
            raise
        except Exception as error:  # damaged files and foreign configurations raise almost anything
            raise weights.WeightsError(f"{folder}: no classifier of images ({common.first_line(error)})") from error
        try:
            processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            transform = Transform(processor)
            sizes = {tuple(transform(Image.new("RGB", size)).shape) for size in _PROBES}
        except (ImportError, OSError):
            raise
        except Exception as error:  # as above
            raise weights.WeightsError(f"{folder}: no image processor ({common.first_line(error)})") from error
    weights.check_keys(
        f"{folder} does not fit {type(model).__name__}",
        sorted(report["missing_keys"]),
        sorted(report["unexpected_keys"]),
        sorted(f"{key} {list(found)} instead of {list(wanted)}" for key, found, wanted in report["mismatched_keys"]),
    )
    supported = [kind for kind in gtp_vit._library_of(model).HEADED if "ForImageClassification" in kind.__name__]
    if type(model) not in supported:
        listed = ", ".join(kind.__name__ for kind in supported)
        raise click.UsageError(f"{folder} holds a {type(model).__name__}; supported are {listed}")
    if len(sizes) > 1:
        raise click.UsageError(f"{folder}: the image processor makes images of several sizes, {sorted(sizes)}")
    classifier = Classifier(model, transform, *sizes)
    try:
        with torch.inference_mode():
            classifier.eval()(torch.zeros(1, *classifier.input_size))
    except (ValueError, RuntimeError) as error:  # sizes that the model refuses, or that its convolution does
        raise click.UsageError(f"{folder}: the image processor does not fit the model: {error}") from error
    return classifier


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bars and reports: what matters of them becomes an error."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
