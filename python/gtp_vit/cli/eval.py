"""`gtp-vit eval`: accuracy of a patched model on a folder of images, or its agreement with the unpatched one.

The unit of work is a batch: which images are in it depends on the folder and `--batch-size` alone. Each is judged once,
by whichever process takes it and in whichever run, so that one process, several, and a run that was interrupted give
the same counts.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

import gtp_kernels
import gtp_vit
from gtp_kernels import backends
from gtp_vit import timing
from gtp_vit.cli import common, data, distributed, hf

Record = dict[str, Any]
_NAMED = 5


@click.command("eval", short_help="Accuracy of a patched model on a folder of images.")
@click.option(
    "--data",
    "root",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Class folders with images in them; images alone are compared with the unpatched model.",
)
@common.model_options
@click.option("--num-classes", type=click.IntRange(min=0), help="[default: as in --weights, or the model's]")
@click.option(
    "--crop-pct", type=click.FloatRange(0, 1, min_open=True), help="Share of the side kept.  [default: the model's]"
)
@click.option(
    "--class-map",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Class folder to class: a JSON object from name to index, or the name of class k in line k.",
)
@click.option("--subset", is_flag=True, help="The folders are some of the classes, named by WordNet id or index.")
@click.option("--label-free", is_flag=True, help="Compare with the unpatched model, whatever the folders.")
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--dtype", type=click.Choice(list(common.DTYPES)), default="float32", show_default=True)
@click.option(
    "--json",
    "output",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Report. While the run lasts, what is done lies beside it; the same command continues from there.",
)
@common.run_options
def evaluate_command(
    root: Path,
    name: str,
    source: Path | None,
    pretrained: bool,
    model_kwargs: dict[str, Any],
    img_size: int | None,
    no_patch: bool,
    num_classes: int | None,
    crop_pct: float | None,
    class_map: Path | None,
    subset: bool,
    label_free: bool,
    batch_size: int,
    dtype: str,
    output: Path | None,
    workers: int,
    device: str,
    threads: int | None,
    backend: str | None,
    seed: int,
    **options: Any,
) -> None:
    """Top-1 and top-5 accuracy, speed and GMACs of a patched Vision Transformer on a folder of images.

    Class folders, sorted by name, are the classes of the model in order. Without class folders, or with --label-free,
    the patched model is compared with the unpatched one: how often their first class is the same, and the cosine of
    their features.

    --model hf:FOLDER takes a classifier of transformers as save_pretrained wrote it, with its image processor. Where it
    has the names of all class folders among its labels, these decide which class a folder is.

    Under torchrun the images are divided among the processes, each image once.
    """
    place = common.checked_device(device, backend)
    if output is not None:
        common.check_folder(output, "--json")
    forced = backends.use_backend(backend) if backend is not None else contextlib.nullcontext()
    with common.plain_errors(), distributed.processes(place) as group, common.num_threads(threads), forced:
        console = Console(quiet=group.rank > 0)
        names = data.class_names(root)
        compare = label_free or not names
        if compare and no_patch:
            raise click.UsageError(
                f"--no-patch leaves nothing to compare with the unpatched model, and {root} is read without labels"
            )
        if compare and (class_map or subset):
            raise click.UsageError(f"--class-map and --subset need class folders; {root} is read without labels")
        if name.startswith(hf.PREFIX):
            _check_unused(name, source, pretrained, model_kwargs, img_size, num_classes, crop_pct)
            model: nn.Module = hf.load(name)
            origin = "its own"
        else:
            model, origin = common.load_model(
                name, source, pretrained, seed, {"img_size": img_size, **model_kwargs}, num_classes
            )
        model = model.eval().to(group.device, common.DTYPES[dtype])
        unpatched = copy.deepcopy(model) if compare else model
        if not no_patch:
            common.patched(model.model if isinstance(model, hf.Classifier) else model, options)
        index = {} if compare else data.class_index(root, names, model, class_map, subset)
        folder = data.unlabelled(root) if compare else data.labelled(root, index)
        transform, config = _transform(model, crop_pct)
        settings = {
            "model": name,
            "model_kwargs": model_kwargs,
            "weights": origin,
            "weights_digest": _digest_of_weights(model),
            "patch": None if no_patch else options,
            "input_size": list(config["input_size"]),
            "crop_pct": config["crop_pct"],
            "processor": config.get("processor"),
            "label_free": compare,
            "batch_size": batch_size,
            "dtype": dtype,
            "device": place.type,
            "backend": backend,
            "seed": seed,
            "files": folder.digest(),
            "gtp_kernels": gtp_kernels.__version__,
            "torch": torch.__version__,
        }
        journal = Journal(output, settings, group)
        _say_what_runs(console, settings, folder, group)
        if journal.note:
            console.print(journal.note, highlight=False)
        judge = Agreement(model, unpatched) if compare else Accuracy(model)
        with Progress(
            TextColumn("batches"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console,
            transient=True, disable=group.rank > 0,
        ) as progress:  # fmt: skip
            total = math.ceil(len(folder.files) / batch_size)
            task = progress.add_task("", total=total, completed=len(journal.done))

            def finished(record: Record) -> None:
                journal.add(record)
                progress.advance(task, group.size)

            records, speed = evaluate(
                judge,
                data.Images(folder, transform),
                batch_size,
                workers,
                group,
                common.DTYPES[dtype],
                seed,
                journal.done,
                finished,
                warm_up=True,
            )
        report = {
            **summary(records),
            "images_per_second_end_to_end": speed,
            "gmacs": gtp_vit.gmacs(model, config["input_size"][-2:]),
            "gmacs_unpatched": gtp_vit.gmacs(unpatched, config["input_size"][-2:]) if compare else None,
            "processes": group.size,
            "machine": common.machine(group.device),
            "settings": settings,
        }
        journal.close(report)
        if report["images"] == 0:
            raise click.ClickException(
                f"none of the {len(folder.files)} images could be read; {' '.join(report['unreadable'][0])}"
            )
        for line in _findings(report):
            console.print(line, highlight=False)
        if output is not None:
            console.print(f"Report: [bold]{escape(str(output))}[/]", highlight=False)


class Accuracy:
    """Counts how often the label is the first, or among the first five, of a model's classes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, images: Tensor, labels: Tensor) -> Record:
        """Counts of images [n, 3, H, W] and labels [n]; logits that are not finite are counted, and are wrong."""
        logits, seconds = _timed(self.model, images)
        finite = logits.isfinite().all(-1)
        best = logits.topk(min(5, logits.shape[-1])).indices
        hits = (best == labels[:, None]) & finite[:, None]
        return {
            "top1": int(hits[:, 0].sum()),
            "top5": int(hits.any(-1).sum()),
            "not_finite": int((~finite).sum()),
            "seconds": seconds,
        }


class Agreement:
    """Compares a model with the unpatched one: the first class where there is a head, and the features."""

    def __init__(self, model: Any, unpatched: Any) -> None:
        self.models = model, unpatched
        self.has_head = model.num_classes > 0

    def __call__(self, images: Tensor, labels: Tensor) -> Record:
        """Counts of images [n, 3, H, W]; the labels are not read."""
        record: Record = {}
        features, classes, finite = [], [], torch.ones(len(images), dtype=torch.bool, device=images.device)
        for model, name in zip(self.models, ("seconds", "seconds_unpatched"), strict=True):
            (found, logits), record[name] = _timed(functools.partial(self._outputs, model), images)
            features.append(found)
            classes.append(logits.argmax(-1))
            finite &= found.isfinite().all(-1) & logits.isfinite().all(-1)
        cosine = F.cosine_similarity(features[0], features[1], dim=-1)[finite].double().tolist()
        if self.has_head:
            record["same_class"] = int(((classes[0] == classes[1]) & finite).sum())
        return record | {
            "compared": len(cosine),
            "cosine_sum": math.fsum(cosine),
            "cosine_min": min(cosine, default=None),
            "not_finite": int((~finite).sum()),
        }

    @staticmethod
    def _outputs(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = model.forward_features(images)
        return model.forward_head(tokens, pre_logits=True).float().flatten(1), model.forward_head(tokens).float()


def evaluate(
    judge: Callable[[Tensor, Tensor], Record],
    dataset: data.Images,
    batch_size: int,
    workers: int,
    group: distributed.Group,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    done: Sequence[Record] = (),
    finished: Callable[[Record], object] = lambda record: None,
    warm_up: bool = False,
) -> tuple[list[Record], float | None]:
    """Judges each batch of a data set once, in one of the processes.

    Args:
        judge: images [n, 3, H, W] and labels [n] on the device -> counts; the models are in evaluation mode.
        done: records of batches that were judged before.
        finished: called with each new record of this process.
        warm_up: judge the first batch of each process once more, beforehand, so that its time counts like the others.

    Returns:
        The records of all batches in order, the same in every process; images per second of all processes together,
        from file to result, or None where nothing was left to do.
    """
    known = {record["batch"] for record in done}
    left = [number for number in range(math.ceil(len(dataset) / batch_size)) if number not in known]
    mine = left[group.rank :: group.size]
    positions = [range(number * batch_size, min((number + 1) * batch_size, len(dataset))) for number in mine]
    records: list[Record] = []
    start = time.perf_counter()
    with torch.inference_mode():
        loader = data.loader(dataset, positions, workers, group.device)
        for number, batch in zip(mine, loader, strict=True):
            record: Record = {"batch": number, "images": len(batch.labels), "unreadable": batch.unreadable}
            if len(batch.labels):
                images = batch.images.to(group.device, dtype, non_blocking=True)
                labels = batch.labels.to(group.device, non_blocking=True)
                if warm_up:
                    before = time.perf_counter()
                    judge(images, labels)
                    start += time.perf_counter() - before
                    warm_up = False
                # A selection may draw numbers; they belong to the batch, wherever and whenever it is judged.
                torch.manual_seed(int(np.random.SeedSequence((seed, number)).generate_state(1)[0]))
                record |= judge(images, labels)
            records.append(record)
            finished(record)
    seconds = time.perf_counter() - start
    gathered = group.gather((records, seconds))
    new = [record for part, _ in gathered for record in part]
    speed = sum(record["images"] for record in new) / max(time for _, time in gathered) if new else None
    return sorted([*done, *new], key=lambda record: int(record["batch"])), speed


def summary(records: Iterable[Record]) -> Record:
    """Totals of the batches: counts, and shares of the images that could be read, in percent."""
    records = list(records)

    def total(key: str) -> int:
        return sum(record.get(key, 0) for record in records)

    def seconds(key: str) -> float:
        return math.fsum(record.get(key, 0.0) for record in records)

    images = total("images")
    result: Record = {
        "images": images,
        "unreadable": [tuple(entry) for record in records for entry in record["unreadable"]],
        "not_finite": total("not_finite"),
    }
    for key in ("top1", "top5", "same_class"):
        if any(key in record for record in records):
            result |= {f"{key}_count": total(key), key: 100 * total(key) / images}
    if compared := total("compared"):
        result["cosine"] = math.fsum(record.get("cosine_sum", 0.0) for record in records) / compared
        result["cosine_min"] = min(record["cosine_min"] for record in records if record.get("compared"))
    for key, name in (("seconds", "images_per_second"), ("seconds_unpatched", "images_per_second_unpatched")):
        if seconds(key) > 0:
            result[name] = images / seconds(key)
    return result


class Journal:
    """The finished batches of a run, kept beside its report until that is written.

    Each process appends to a file of its own, `<report>.<rank>.partial`: the settings in the first line, a record in
    each other. A run with the same settings takes over what it finds, whatever the number of processes then and now;
    a line that was cut off is one batch to do again.

    Attributes:
        done: the records that were found.
        note: what to tell the user about them.
    """

    def __init__(self, output: Path | None, settings: Record, group: distributed.Group) -> None:
        self.output, self.group = output, group
        self.settings: Record = json.loads(json.dumps(settings))  # as it comes back from a file
        self.done: list[Record] = []
        self.note = ""
        self.stream: Any = None
        if output is None:
            return
        if group.rank == 0:
            self._take_over()
        self.done, self.note = group.gather((self.done, self.note))[0]
        if group.rank > 0:
            self._write([])
        self.stream = self._path(group.rank).open("a", encoding="utf-8")

    def add(self, record: Record) -> None:
        """Keeps a record: it survives the end of this process."""
        if self.stream is not None:
            self.stream.write(json.dumps(record) + "\n")
            self.stream.flush()

    def close(self, report: Record) -> None:
        """Writes the report, and removes what was kept for it."""
        if self.output is None:
            return
        self.stream.close()
        self.group.gather(None)
        if self.group.rank == 0:
            _replace(self.output, json.dumps(report, indent=1) + "\n")
            for path in self._found():
                path.unlink()

    def _path(self, rank: int) -> Path:
        assert self.output is not None
        return self.output.with_name(f"{self.output.name}.{rank}.partial")

    def _found(self) -> list[Path]:
        """The files of all processes, of this run or another."""
        assert self.output is not None
        ours = re.compile(re.escape(self.output.name) + r"\.\d+\.partial")
        return sorted(path for path in self.output.parent.iterdir() if ours.fullmatch(path.name))

    def _take_over(self) -> None:
        found: dict[int, Record] = {}
        for path in self._found():
            settings, *records = _lines(path) or [{}]
            if settings != self.settings:
                changed = ", ".join(key for key in self.settings if settings.get(key) != self.settings[key])
                self.note = f"[yellow]Starting anew[/]: an interrupted run had other settings ({changed})."
                found = {}
                break
            found |= {record["batch"]: record for record in records}
        self.done = [found[number] for number in sorted(found)]
        if self.done:
            self.note = f"Continuing an interrupted run: {len(self.done)} batches are done."
        self._write(self.done)
        for path in self._found():
            if path != self._path(0):
                path.unlink()

    def _write(self, records: list[Record]) -> None:
        _replace(self._path(self.group.rank), "".join(json.dumps(line) + "\n" for line in [self.settings, *records]))


def _lines(path: Path) -> list[Record]:
    """The JSON lines of a file, up to the first that is cut off."""
    found: list[Record] = []
    with contextlib.suppress(json.JSONDecodeError):
        for line in path.read_text(encoding="utf-8").splitlines():
            found.append(json.loads(line))  # noqa: PERF401  # what came before the error is kept
    return found


def _replace(path: Path, text: str) -> None:
    """Writes a file whole, or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _timed(call: Callable[[Tensor], Any], images: Tensor) -> tuple[Any, float]:
    timing.synchronise(images.device)
    start = time.perf_counter()
    result = call(images)
    timing.synchronise(images.device)
    return result, time.perf_counter() - start


def _check_unused(name: str, *values: object) -> None:
    """Options that would change the model of a folder are not given; click.UsageError where they are."""
    options = ("--weights", "--pretrained", "--model-kwargs", "--img-size", "--num-classes", "--crop-pct")
    pairs = zip(options, values, strict=True)
    if given := [option for option, value in pairs if value is not None and value is not False and value != {}]:
        raise click.UsageError(f"{', '.join(given)} cannot be given with {name}: its folder decides")


def _transform(model: nn.Module, crop_pct: float | None) -> tuple[Any, Record]:
    """timm's transform for evaluation, or that of a folder of transformers, and what it was made from."""
    if isinstance(model, hf.Classifier):
        return model.transform, {
            "input_size": model.input_size,
            "crop_pct": None,
            "processor": model.transform.settings,
        }
    from timm.data import create_transform

    config = common.data_config(model)
    if crop_pct is not None:
        config["crop_pct"] = crop_pct
    return create_transform(**config), config


def _digest_of_weights(model: nn.Module) -> str:
    """SHA-256 of the names and values of a model's state."""
    digest = hashlib.sha256()
    for key, value in model.state_dict().items():
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _say_what_runs(console: Console, settings: Record, folder: data.Folder, group: distributed.Group) -> None:
    sizes = " × ".join(map(str, settings["input_size"][-2:]))
    several = f", {group.size} processes" if group.size > 1 else ""
    console.print(
        f"[bold]{escape(settings['model'])}[/] ({escape(settings['weights'])} weights), {sizes}, {settings['dtype']}, "
        f"batch {settings['batch_size']}, {common.machine(group.device)}{several}, torch {torch.__version__}",
        highlight=False,
    )
    if settings["weights"] == "random":
        console.print(
            "[yellow]The weights are random[/]: speed and GMACs mean something, the rest does not. Give --weights or "
            "--pretrained."
        )
    if settings["label_free"]:
        console.print(f"{len(folder.files)} images, without labels: compared with the unpatched model.")
    else:
        console.print(f"{len(folder.files)} images in {len(folder.classes)} class folders.")


def _findings(report: Record) -> Iterable[Any]:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    for key, label in (("top1", "top-1"), ("top5", "top-5"), ("same_class", "same first class")):
        if key in report:
            table.add_row(label, f"{report[key]:.2f} %  ({report[f'{key}_count']} of {report['images']})")
    if "cosine" in report:
        table.add_row("feature cosine", f"{report['cosine']:.4f} (min {report['cosine_min']:.4f})")
    both = ", both models" if "images_per_second_unpatched" in report else ""
    for key, label in (
        ("images_per_second", "images/s, model alone, per process"),
        ("images_per_second_unpatched", "  unpatched"),
        ("images_per_second_end_to_end", f"images/s, from file to result{both}"),
    ):
        if report.get(key) is not None:
            table.add_row(label, f"{report[key]:.1f}")
    table.add_row("GMACs", f"{report['gmacs']:.2f}")
    if report["gmacs_unpatched"] is not None:
        table.add_row("  unpatched", f"{report['gmacs_unpatched']:.2f}")
    yield table
    if report["not_finite"]:
        yield f"[red]{report['not_finite']} images gave values that are not finite[/]; they count as wrong."
    if unreadable := report["unreadable"]:
        yield f"[yellow]{len(unreadable)} images could not be read[/] and are left out:"
        for file, why in unreadable[:_NAMED]:
            yield f"  {escape(file)} ({escape(why)})"
        if len(unreadable) > _NAMED:
            yield f"  and {len(unreadable) - _NAMED} more"
