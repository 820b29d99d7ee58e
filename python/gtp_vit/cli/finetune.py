"""`gtp-vit finetune`: trains a patched model on, with timm's optimiser, scheduler, mixup and loss.

The defaults are the recipe of the paper (Section 4.1): DeiT's data augmentation and training recipe, 30 epochs, base
learning rate 1e-5, minimum 1e-6. As in DeiT the rate is the base rate times the images of a step over 512, the minimum
and the warm-up rate are not scaled, and the rate changes from epoch to epoch. DeiT's moving average of the weights,
which the authors keep but do not evaluate, is left out.

Every random number is drawn from a generator seeded by (seed, epoch, position): an image's augmentation by its place
in the epoch, mixup and drop path by the step. No generator has a state that outlives a step, so a run that goes on from
a checkpoint computes what it would have computed, and what is read does not depend on the number of workers or of
processes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel

import gtp_kernels
from gtp_kernels import backends
from gtp_vit import weights
from gtp_vit.cli import common, data, distributed
from gtp_vit.cli import eval as evaluation

# What is drawn: the order of an epoch, an image's augmentation, the rest of a step.
_ORDER, _IMAGE, _STEP = range(3)
# What a run may change when it goes on.
_FREE = ("root", "output", "resume", "checkpoint_steps", "workers", "device", "threads", "source", "pretrained")


@click.command(short_help="Fine-tune a patched model with the paper's recipe.")
@click.option(
    "--data",
    "root",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Holds train/ and val/ with class folders, or with --val-split the class folders themselves.",
)
@click.option("--val-split", type=click.FloatRange(0, 1, min_open=True, max_open=True), help="Share held out.")
@click.option(
    "--output", required=True, type=click.Path(file_okay=False, path_type=Path), help="For last.pt, best.pt, log.jsonl."
)
@click.option(
    "--resume", metavar="auto|FILE", help="auto: go on from last.pt in --output, where there is one. FILE: from that."
)
@common.model_options
@click.option("--new-head", is_flag=True, help="Leave the classifier of --weights out and start one for these classes.")
@click.option("--epochs", type=click.IntRange(min=1), default=30, show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True, help="Of each process.")
@click.option(
    "--lr",
    type=click.FloatRange(0, min_open=True),
    default=1e-5,
    show_default=True,
    help="Base rate, for 512 images a step.",
)
@click.option("--scale-lr/--no-scale-lr", default=True, show_default=True, help="Times the images of a step / 512.")
@click.option("--min-lr", type=click.FloatRange(0), default=1e-6, show_default=True, help="At the end; not scaled.")
@click.option(
    "--warmup-lr", type=click.FloatRange(0), default=1e-6, show_default=True, help="At the start; not scaled."
)
@click.option("--warmup-epochs", type=click.IntRange(min=0), default=5, show_default=True)
@click.option("--opt", default="adamw", show_default=True, help="An optimiser of timm.")
@click.option("--sched", type=click.Choice(["cosine", "tanh", "poly", "step"]), default="cosine", show_default=True)
@click.option("--weight-decay", type=click.FloatRange(0), default=0.05, show_default=True)
@click.option(
    "--clip-grad", type=click.FloatRange(0, min_open=True), help="Largest norm of the gradient.  [default: any]"
)
@click.option("--drop-path", type=click.FloatRange(0, 1, max_open=True), default=0.1, show_default=True)
@click.option("--mixup", type=click.FloatRange(0), default=0.8, show_default=True, help="α of mixup; 0 is off.")
@click.option("--cutmix", type=click.FloatRange(0), default=1.0, show_default=True, help="α of CutMix; 0 is off.")
@click.option(
    "--smoothing", type=click.FloatRange(0, 1, max_open=True), default=0.1, show_default=True, help="Of labels."
)
@click.option("--augment/--no-augment", default=True, show_default=True, help="Random crops, flips, and the next two.")
@click.option(
    "--auto-augment", default="rand-m9-mstd0.5-inc1", show_default=True, help="A policy as timm names it, or none."
)
@click.option(
    "--erase", type=click.FloatRange(0, 1), default=0.25, show_default=True, help="Probability of random erasing."
)
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="DeiT's repeated augmentation: versions of an image; an epoch is as long, with fewer images.",
)
@click.option(
    "--amp",
    type=click.Choice(["none", "bfloat16", "float16"]),
    default="none",
    show_default=True,
    help="Mixed precision.",
)
@click.option("--grad-checkpointing", is_flag=True, help="Recompute blocks in the backward: less memory, more time.")
@click.option(
    "--checkpoint-steps",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Also write last.pt after so many steps; 0 after epochs alone.",
)
@common.run_options
def finetune(**options: Any) -> None:
    """Fine-tune a patched Vision Transformer on a folder of images.

    Writes last.pt, from which --resume goes on with the same result; best.pt, which `gtp-vit eval --weights` reads; and
    log.jsonl, a line for each epoch.

    Under torchrun each process takes --batch-size images a step (DistributedDataParallel).
    """
    place = common.checked_device(options["device"], options["backend"])
    backend = options["backend"]
    forced = backends.use_backend(backend) if backend is not None else contextlib.nullcontext()
    with common.plain_errors(), distributed.processes(place) as group, forced, common.num_threads(options["threads"]):
        Run(group, options).train()


class Run:
    """A training run: what it is made of, and where it stands."""

    def __init__(self, group: distributed.Group, options: dict[str, Any]) -> None:
        self.group, self.options = group, options
        self.console = Console(quiet=group.rank > 0)
        self.output: Path = options["output"]
        self.step_size = options["batch_size"] * group.size  # images of one step, over all processes
        train, val = _folders(options)
        if (options["mixup"] or options["cutmix"]) and options["batch_size"] % 2:
            raise click.UsageError(f"--batch-size must be even with mixup or CutMix; got {options['batch_size']}")
        self.count = len(train.files)
        if self.count < self.step_size:
            raise click.UsageError(f"{self.count} training images do not fill one step of {self.step_size}")
        self.model, self.weights = self._model(len(train.classes))
        self._data(train, val)
        self._optimisation(len(train.classes))
        self.settings = json.loads(json.dumps({
            **{key: value for key, value in options.items() if key not in _FREE and key != "batch_size"},
            "images_per_step": self.step_size,
            "train": train.digest(with_sizes=False),
            "val": val.digest(with_sizes=False),
            "gtp_kernels": gtp_kernels.__version__,
        }))  # fmt: skip
        self.epoch, self.step, self.loss_sum, self.best = 0, 0, 0.0, -1.0
        self.unreadable: dict[str, str] = {}

    def _model(self, num_classes: int) -> tuple[nn.Module, str]:
        o = self.options
        model, origin = common.load_model(
            o["name"],
            o["source"],
            o["pretrained"],
            o["seed"],
            {"img_size": o["img_size"], "drop_path_rate": o["drop_path"], **o["model_kwargs"]},
            num_classes,
            o["new_head"],
        )
        if not o["no_patch"]:
            common.patched(model, {key: o[key] for key in common.PATCH_OPTIONS})
        if o["grad_checkpointing"]:
            model.set_grad_checkpointing(True)  # type: ignore[operator]  # a method of timm's models
        return model.to(self.group.device), origin

    def _data(self, train: data.Folder, val: data.Folder) -> None:
        from timm.data import create_transform

        o, config = self.options, common.data_config(self.model)
        augmented = create_transform(
            **config,
            is_training=True,
            no_aug=not o["augment"],
            auto_augment=None if o["auto_augment"] == "none" else o["auto_augment"],
            re_prob=o["erase"],
            re_mode="pixel",
        )
        self.train_images = Training(train, augmented, o["seed"])
        self.val_images = data.Images(val, create_transform(**config))

    def _optimisation(self, num_classes: int) -> None:
        from timm.data import Mixup
        from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
        from timm.optim import create_optimizer_v2
        from timm.scheduler import create_scheduler_v2

        o = self.options
        rate = o["lr"] * self.step_size / 512 if o["scale_lr"] else o["lr"]
        if rate < o["min_lr"]:
            self.console.print(
                f"[yellow]The learning rate {rate:.3g} for {self.step_size} images a step is below --min-lr "
                f"{o['min_lr']:.3g}[/]: it is kept as it is."
            )
        try:
            self.optimizer = create_optimizer_v2(self.model, o["opt"], lr=rate, weight_decay=o["weight_decay"])
            self.scheduler, _ = create_scheduler_v2(
                self.optimizer,
                sched=o["sched"],
                num_epochs=o["epochs"],
                min_lr=min(o["min_lr"], rate),
                warmup_lr=min(o["warmup_lr"], rate),
                warmup_epochs=o["warmup_epochs"],
            )
        except (ValueError, AssertionError) as error:
            raise click.UsageError(f"--opt, --sched: {common.first_line(error)}") from error
        self.mixup = None
        if o["mixup"] or o["cutmix"]:
            self.mixup = Mixup(o["mixup"], o["cutmix"], label_smoothing=o["smoothing"], num_classes=num_classes)
        self.loss = SoftTargetCrossEntropy() if self.mixup else LabelSmoothingCrossEntropy(o["smoothing"])
        self.scaler = GradScaler(self.group.device.type, enabled=o["amp"] == "float16")

    def train(self) -> None:
        """Trains to the last epoch, from where the run stands."""
        self.output.mkdir(parents=True, exist_ok=True)
        self._resume()
        if self.group.rank == 0:
            self._cut_log()
        several = f" in {self.group.size} processes" if self.group.size > 1 else ""
        self.console.print(
            f"[bold]{escape(self.options['name'])}[/] ({escape(self.weights)} weights), {self.count} images to train "
            f"on, {len(self.val_images)} to validate, {self.step_size} a step{several}, "
            f"{common.machine(self.group.device)}",
            highlight=False,
        )
        if self.weights == "random":
            self.console.print(
                "[yellow]The weights are random[/]: this trains from scratch. Give --weights or --pretrained."
            )
        model: nn.Module = self.model
        if self.group.size > 1:
            model = DistributedDataParallel(model)
        while self.epoch < self.options["epochs"]:
            self._train_epoch(model)
            self._end_epoch()

    def _train_epoch(self, model: nn.Module) -> None:
        o, group = self.options, self.group
        self.scheduler.step(self.epoch)
        model.train()
        first, start = self.step, time.perf_counter()
        with Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=self.console, transient=True, disable=group.rank > 0,
        ) as progress:  # fmt: skip
            task = progress.add_task(f"epoch {self.epoch}", total=self.steps, completed=self.step)
            for batch in data.loader(self.train_images, self._batches(), o["workers"], group.device):
                self.unreadable |= dict(batch.unreadable)
                _seed(o["seed"], self.epoch, _STEP, self.step, group.rank)
                self.loss_sum += self._update(model, batch)
                self.step += 1
                progress.update(task, completed=self.step)
                if o["checkpoint_steps"] and self.step % o["checkpoint_steps"] == 0:
                    self._save("last.pt")
        self.speed = (self.step - first) * self.step_size / (time.perf_counter() - start)

    def _update(self, model: nn.Module, batch: data.Batch) -> float:
        """One step on this process's images; its loss."""
        device, o = self.group.device, self.options
        images, labels = batch.images.to(device, non_blocking=True), batch.labels.to(device, non_blocking=True)
        if self.mixup is not None:
            images, labels = self.mixup(images, labels)
        with self._autocast():
            loss = self.loss(model(images), labels)
        value = loss.item()
        if not math.isfinite(value):
            raise click.ClickException(
                f"the loss is {value} in epoch {self.epoch}, step {self.step}, at learning rate "
                f"{self.optimizer.param_groups[0]['lr']:.3g}; last.pt in {self.output} is of before"
            )
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if o["clip_grad"] is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), o["clip_grad"])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return float(value)

    def _end_epoch(self) -> None:
        """Evaluates, writes a line of the log and the checkpoints, and turns to the next epoch."""
        o, group = self.options, self.group
        self.model.eval()
        with self._autocast():
            records, _ = evaluation.evaluate(
                evaluation.Accuracy(self.model), self.val_images, o["batch_size"], o["workers"], group
            )
        found = evaluation.summary(records)
        if found["images"] == 0:
            raise click.ClickException(f"none of the {len(self.val_images)} validation images could be read")
        gathered = group.gather((self.loss_sum / self.steps, self.unreadable))
        unreadable = {file: why for _, part in gathered for file, why in part.items()}
        line = {
            "epoch": self.epoch,
            "lr": self.optimizer.param_groups[0]["lr"],
            "loss": math.fsum(loss for loss, _ in gathered) / group.size,
            **{key: found[key] for key in ("top1", "top5", "top1_count", "images", "not_finite")},
            "images_per_second": self.speed,
            "unreadable": [*unreadable.items(), *found["unreadable"]],
        }
        self.console.print(
            f"epoch {self.epoch}: loss {line['loss']:.4f}, top-1 {line['top1']:.2f} %, top-5 {line['top5']:.2f} %, "
            f"learning rate {line['lr']:.3g}"
            + (f", [yellow]{len(line['unreadable'])} images could not be read[/]" if line["unreadable"] else ""),
            highlight=False,
        )
        if group.rank == 0:
            with (self.output / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
        better = found["top1"] > self.best
        self.best = max(self.best, found["top1"])
        self.epoch, self.step, self.loss_sum, self.unreadable = self.epoch + 1, 0, 0.0, {}
        if better:
            self._save("best.pt")
        self._save("last.pt")

    @property
    def steps(self) -> int:
        """Steps of an epoch; images that do not fill one are left out of this epoch."""
        return self.count // self.step_size

    def _batches(self) -> Iterable[list[tuple[int, int, int]]]:
        """What this process reads in the rest of the epoch: for each image the epoch, its position, and the file."""
        epoch, size, group = self.epoch, self.step_size, self.group
        generator = torch.Generator().manual_seed(_hash(self.options["seed"], epoch, _ORDER))
        order = torch.randperm(self.count, generator=generator)
        order = order.repeat_interleave(self.options["repeats"])[: self.count]
        # Every group.size-th: the versions of an image go to different processes.
        return (
            [(epoch, at, int(order[at])) for at in range(step * size + group.rank, (step + 1) * size, group.size)]
            for step in range(self.step, self.steps)
        )

    def _autocast(self) -> torch.autocast:
        amp = self.options["amp"]
        return torch.autocast(self.group.device.type, getattr(torch, amp, None), enabled=amp != "none")

    def _save(self, name: str) -> None:
        """Writes a checkpoint, whole or not at all; the first process does."""
        gathered = self.group.gather((self.loss_sum, self.unreadable))
        if self.group.rank > 0:
            return
        path = self.output / name
        state = {
            "model": self.model.state_dict(),
            "settings": self.settings,
            "epoch": self.epoch,
            "best": self.best,
        }
        if name == "last.pt":
            state |= {
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "step": self.step,
                "loss_sums": [loss for loss, _ in gathered],
                "unreadable": {file: why for _, part in gathered for file, why in part.items()},
            }
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    def _resume(self) -> None:
        """Goes on from a checkpoint where one is asked for."""
        asked, last = self.options["resume"], self.output / "last.pt"
        if asked is None:
            if last.exists():
                raise click.UsageError(f"{self.output} holds a run: give --resume auto, or another --output")
            return
        if asked == "auto" and not last.exists():
            return
        path = last if asked == "auto" else Path(asked)
        state = _read_checkpoint(path, self.group.device)
        theirs = state["settings"]
        if changed := [key for key, ours in self.settings.items() if theirs.get(key) != ours]:
            raise click.UsageError(
                f"--resume: {path} is of another run: "
                + "; ".join(f"{key} was {theirs.get(key)}, is {self.settings[key]}" for key in changed)
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step, self.best = state["epoch"], state["step"], state["best"]
        losses = state["loss_sums"]
        self.loss_sum = losses[self.group.rank] if len(losses) == self.group.size else sum(losses) / len(losses)
        self.unreadable = state["unreadable"]
        self.console.print(f"Going on from {path}: epoch {self.epoch}, step {self.step}.", highlight=False)

    def _cut_log(self) -> None:
        """Drops the lines of epochs that are yet to come: a run may have ended between its log and its checkpoint."""
        log = self.output / "log.jsonl"
        if log.exists():
            lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["epoch"] < self.epoch]
            log.write_text("".join(kept), encoding="utf-8")


class Training(data.Images):
    """Images by (epoch, position, file): the position in the epoch decides every random number of the transform.

    In place of an image that cannot be read comes the next file that can, so that all batches are full.
    """

    def __init__(self, folder: data.Folder, transform: Any, seed: int) -> None:
        super().__init__(folder, transform)
        self.seed = seed

    def __getitem__(self, key: Any) -> data.Item:
        epoch, position, number = key
        unreadable: tuple[tuple[str, str], ...] = ()
        for following in range(len(self)):
            _seed(self.seed, epoch, _IMAGE, position)
            item = super().__getitem__((number + following) % len(self))
            unreadable += item.unreadable
            if item.image is not None:
                return data.Item(item.image, item.label, unreadable)
        raise OSError(f"none of the {len(self)} training images could be read; {' '.join(unreadable[0])}")


def _folders(options: dict[str, Any]) -> tuple[data.Folder, data.Folder]:
    """The images to train on and those to validate on, with the classes of the former."""
    root, share = options["root"], options["val_split"]
    parts = [root / "train", root / "val"]
    if share is None:
        if not all(part.is_dir() for part in parts):
            raise click.UsageError(f"{root} has no train/ and val/: give --val-split to hold images out")
        index = {name: label for label, name in enumerate(data.class_names(parts[0]))}
        if unknown := [name for name in data.class_names(parts[1]) if name not in index]:
            raise click.UsageError(f"{parts[1]} has class folders that train/ lacks: {', '.join(unknown[:6])}")
        return data.labelled(parts[0], index), data.labelled(parts[1], index)
    if all(part.is_dir() for part in parts):
        raise click.UsageError(f"--val-split: {root} has train/ and val/ already")
    folder = data.labelled(root, {name: label for label, name in enumerate(data.class_names(root))})
    count = len(folder.files)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(options["seed"])).tolist()
    held = max(1, round(share * count))
    return _part(folder, sorted(order[held:])), _part(folder, sorted(order[:held]))


def _read_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """What `Run._save` wrote as last.pt."""
    if not path.is_file():
        raise FileNotFoundError(f"--resume: no such file: {path}")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # damaged and foreign files raise almost anything
        raise weights.WeightsError(f"--resume: {path} is not a checkpoint ({type(error).__name__})") from error
    wanted = ("model", "settings", "epoch", "best", "optimizer", "scaler", "step", "loss_sums", "unreadable")
    if not isinstance(state, dict) or (missing := [key for key in wanted if key not in state]):
        lacks = f"; it lacks {', '.join(missing)}" if isinstance(state, dict) else ""
        raise weights.WeightsError(f"--resume: {path} is no last.pt of finetune{lacks}")
    return state


def _part(folder: data.Folder, positions: list[int]) -> data.Folder:
    files = tuple(folder.files[position] for position in positions)
    return replace(folder, files=files, labels=tuple(folder.labels[position] for position in positions))


def _hash(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _seed(*numbers: int) -> None:
    """Seeds Python's, NumPy's and PyTorch's generators."""
    from timm.utils import random_seed

    random_seed(_hash(*numbers))
