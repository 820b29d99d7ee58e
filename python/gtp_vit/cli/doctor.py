"""`gtp-vit doctor`: whether token propagation pays on this machine, for which P, and why not where it does not.

Three candidates take turns for each P: the model, the model patched, and the model with P tokens cut off in each block
for nothing (free slicing), which is the least that any token reduction can cost. A matrix product of the model's width
takes its turn with them: it says what the machine could do. The reasons are drawn from these times alone.
"""

from __future__ import annotations

import contextlib
import copy
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

import gtp_kernels
import gtp_vit
from gtp_kernels import backends
from gtp_vit import graphs, slicing, timing
from gtp_vit.cli import common

# Rows of the product that measures the machine: enough for its full rate on a GPU too.
_PRODUCT_ROWS = 4096
# Of the largest P that fits.
_SHARES = (0.125, 0.25, 0.5, 0.75)
# A model whose products would take less than this share of its time is bound by something else.
_BUSY = 0.5
# Quartiles further apart than this tell little.
_NOISY = 1.5
# Less work than this to save, and the noise of a machine hides it.
_LITTLE_WORK = 1.08


@dataclass(frozen=True)
class Measured:
    """One way of running the model, for one P.

    Attributes:
        mode: eager, compiled, or graph (a CUDA graph).
        num_prop: P.
        tokens: image tokens after the last block.
        milliseconds: of a batch: unpatched, patched, and sliced where the model can be.
        speedup: the unpatched over the patched, round by round: median and quartiles.
        slicing: the unpatched over the sliced, median; None where the model cannot be sliced.
        promise: GMACs of the unpatched over those of the patched.
        rate: GMAC/s of a large matrix product of the model's width, in its dtype.
        rate_float32: the same in float32, where the dtype is another and the device a CPU.
        busy: the share of the unpatched model's time that its products would take at that rate.
        backends: what ran the ops of the patched model.
        notes: why ops ran in plain PyTorch, where some did.
    """

    mode: str
    num_prop: int
    tokens: int
    milliseconds: dict[str, float]
    speedup: tuple[float, float, float]
    slicing: float | None
    promise: float
    rate: float
    rate_float32: float | None
    busy: float
    backends: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def pays(self) -> bool:
        """Whether three of four rounds were faster."""
        return self.speedup[1] > 1


@dataclass(frozen=True)
class Setting:
    """What every measurement shares.

    Attributes:
        batch, image_tokens, blocks: sizes.
        device, dtype: by name.
        channels: C.
        gmacs: of one image, unpatched.
    """

    batch: int
    image_tokens: int
    blocks: int
    channels: int
    device: str
    dtype: str
    gmacs: float


@click.command(short_help="Does patching pay on this machine? Which P, how much, and why not.")
@click.argument("name", metavar="MODEL")
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, help="B, images in a batch.")
@click.option("--size", type=click.IntRange(min=1), help="S, the side of the images.  [default: the model's]")
@click.option(
    "--num-prop",
    "values",
    metavar="P[,P...]",
    callback=lambda ctx, param, value: None if value is None else common.num_prop(ctx, param, value),
    help="Each P is measured.  [default: four, up to the largest that fits]",
)
@common.patch_options_but_num_prop
@click.option("--compile", "compiled", is_flag=True, help="Also under torch.compile: minutes on a CPU.")
@click.option("--rounds", type=click.IntRange(min=3), default=9, show_default=True, help="Timed batches of each.")
@click.option("--dtype", type=click.Choice(list(common.DTYPES)), default="float32", show_default=True)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, ...; auto is cuda where there is one.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: PyTorch's choice]")
@click.option("--backend", type=click.Choice(backends.NAMES), help="Force a backend of gtp_kernels.")
@click.option(
    "--model-kwargs",
    metavar="NAME=VALUE",
    multiple=True,
    callback=common.model_kwargs,
    help="For timm.create_model, depth=4 say, or a JSON object; may be repeated.",
)
@click.option(
    "--json", "output", type=click.Path(dir_okay=False, path_type=Path, allow_dash=True), help="Report; - prints it."
)
def doctor(
    name: str,
    batch: int,
    size: int | None,
    values: int | tuple[int, ...] | None,
    compiled: bool,
    rounds: int,
    dtype: str,
    device: str,
    threads: int | None,
    backend: str | None,
    model_kwargs: dict[str, Any],
    output: Path | None,
    **options: Any,
) -> None:
    """Measure on this machine what patching MODEL, a Vision Transformer of timm, brings at a batch and image size.

    Says which P pays and how much, beside what the GMACs promise and what cutting the tokens off for nothing would
    bring; and where it does not pay, why. Weights are random: speed does not depend on them, accuracy does, and for
    that there is gtp-vit eval.
    """
    place = common.checked_device(device, backend)
    to_stdout = output is not None and str(output) == "-"
    if output is not None and not to_stdout:
        common.check_folder(output, "--json")
    console = Console(stderr=to_stdout)
    forced = backends.use_backend(backend) if backend is not None else contextlib.nullcontext()
    with common.plain_errors(), common.num_threads(threads), forced, torch.inference_mode():
        kwargs = {**model_kwargs, **({} if size is None else {"img_size": size})}
        model, _ = common.load_model(name, None, False, 0, kwargs)
        model = model.eval().to(device=place, dtype=common.DTYPES[dtype])
        setting, images, candidates = _prepare(model, batch, place, dtype, values, options)
        modes = ["eager", *(["graph"] if place.type == "cuda" else []), *(["compiled"] if compiled else [])]
        columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("measuring", total=len(modes) * len(candidates))
            found = []
            for mode in modes:
                for num_prop in candidates:
                    progress.update(task, description=f"{mode}, P = {num_prop}")
                    found.append(measure(model, images, mode, num_prop, setting, options, rounds))
                    progress.advance(task)
        about = f"{name}, {images.shape[-2]} × {images.shape[-1]}, {dtype}, batch {batch}, {common.machine(place)}"
        report = _report(about, setting, found, options)
    if output is not None:
        text = json.dumps(report, indent=2) + "\n"
        click.echo(text, nl=False) if to_stdout else output.write_text(text)
    if not to_stdout:
        console.print(f"[bold]{about}, torch {torch.__version__}[/]", highlight=False, soft_wrap=True)
        console.print(_table(found))
        for line in [*verdict(setting, found), *report["reasons"]]:
            console.print(line, highlight=False, markup=False, soft_wrap=True)


def _prepare(
    model: Any, batch: int, place: torch.device, dtype: str, values: int | tuple[int, ...] | None, options: Any
) -> tuple[Setting, Tensor, tuple[int, ...]]:
    """The facts, a batch of noise, and the values of P to measure, all checked by patching copies."""
    depth = len(getattr(model, "blocks", ()))
    none: Any = common.patched(copy.deepcopy(model), {**options, "num_prop": 0})
    height, width = common.data_config(model)["input_size"][-2:]
    if model.patch_embed.num_patches < 1:
        raise click.BadParameter(f"{height} × {width} is smaller than one patch of the model", param_hint="--size")
    images = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))
    images = images.to(place, common.DTYPES[dtype])
    with gtp_vit.trace(none) as trace:
        none(images[:1])
    tokens = trace.grid_size[0] * trace.grid_size[1]
    largest = none.gtp.largest_num_prop(tokens, depth)
    if values is None:
        if largest < 1:
            raise click.UsageError(f"{tokens} image tokens are too few for {depth} blocks: none can leave in each")
        chosen = sorted({max(1, round(largest * share)) for share in _SHARES})
    else:
        chosen = sorted({values} if isinstance(values, int) else set(values))
        if chosen[0] < 1 or chosen[-1] > largest:
            raise click.BadParameter(
                f"P must be in [1, {largest}] for {tokens} image tokens and {depth} blocks; got {chosen}",
                param_hint="--num-prop",
            )
    setting = Setting(batch, tokens, depth, model.embed_dim, place.type, dtype, gtp_vit.gmacs(model, images[:1]))
    return setting, images, tuple(chosen)


def _products(setting: Setting, place: torch.device) -> tuple[dict[str, Callable[[], object]], int]:
    """The first product of a feed-forward over many tokens, by dtype, and its multiply-accumulates."""
    x = torch.randn(_PRODUCT_ROWS, setting.channels, device=place)
    weight = torch.randn(4 * setting.channels, setting.channels, device=place)
    names = [setting.dtype, *(["float32"] if setting.dtype != "float32" and setting.device == "cpu" else [])]
    pairs = {name: (x.to(common.DTYPES[name]), weight.to(common.DTYPES[name])) for name in names}
    calls: dict[str, Callable[[], object]] = {
        f"product {name}": partial(F.linear, left, right) for name, (left, right) in pairs.items()
    }
    return calls, x.numel() * len(weight)


def measure(
    model: nn.Module,
    images: Tensor,
    mode: str,
    num_prop: int,
    setting: Setting,
    options: dict[str, Any],
    rounds: int,
) -> Measured:
    """Times the model, its patched copy and free slicing in turns.

    Args:
        model: unpatched, in evaluation mode; it stays as it is.
        mode: eager, compiled or graph.
        num_prop: P of every block.
        options: further ones of gtp_vit.patch.
    """
    patched: Any = common.patched(_sharing(model), {**options, "num_prop": num_prop})
    modules: dict[str, nn.Module] = {"unpatched": model, "patched": patched}
    with contextlib.suppress(TypeError):  # other blocks than timm's: there is no such baseline
        modules["sliced"] = slicing.sliced(model, num_prop)
    with warnings.catch_warnings(), backends.record() as ran:
        warnings.simplefilter("ignore", backends.BackendWarning)  # said in the reasons, for every P
        with gtp_vit.trace(patched) as trace:
            patched(images[:1])
    with _runnable(modules, mode, images) as calls:
        products, macs = _products(setting, images.device)
        seconds = timing.interleave({**calls, **products}, rounds=rounds, device=images.device, min_seconds=0.01)
    # The fastest sample of each: what disturbed a slower one is no property of the model.
    rates = {label.split()[-1]: macs / min(seconds.pop(label).samples) / 1e9 for label in products}
    rate = rates.pop(setting.dtype)
    gain = seconds["unpatched"].ratio(seconds["patched"])
    freely = seconds["unpatched"].ratio(seconds["sliced"]).median if "sliced" in seconds else None
    return Measured(
        mode=mode,
        num_prop=num_prop,
        tokens=trace.layers[-1].kept_tokens.shape[1],
        milliseconds={label: 1e3 * spread.median for label, spread in seconds.items()},
        speedup=(gain.median, gain.low, gain.high),
        slicing=freely,
        promise=setting.gmacs / gtp_vit.gmacs(patched, images[:1]),
        rate=rate,
        rate_float32=rates.get("float32"),
        busy=setting.gmacs * setting.batch / rate / min(seconds["unpatched"].samples),
        backends=tuple(sorted({name for _, name in ran})),
        notes=tuple(_why_plain(op, images.device.type) for op, name in dict.fromkeys(ran) if name == "reference"),
    )


def _why_plain(op: str, device: str) -> str:
    if backends.forced() is not None:
        return f"{op} (the backend reference is forced)"
    refusals = {name: backends.refusal(name, op, device) for name in backends.NAMES}
    return f"{op} ({'; '.join(f'{name}: {reason}' for name, reason in refusals.items() if reason)})"


def _sharing(model: nn.Module) -> nn.Module:
    """A copy with the same weights."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


@contextlib.contextmanager
def _runnable(modules: dict[str, nn.Module], mode: str, images: Tensor) -> Iterator[dict[str, Callable[[], object]]]:
    """What to time. Compiled code of one P is dropped before the next: its guards would be asked first."""
    if mode == "compiled":
        torch.compiler.reset()
        runs: dict[str, Any] = {
            label: torch.compile(module, dynamic=False, fullgraph=True) for label, module in modules.items()
        }
    elif mode == "graph":
        runs = {label: graphs.graphed(module, images) for label, module in modules.items()}
    else:
        runs = dict(modules)
    yield {label: lambda run=run: run(images) for label, run in runs.items()}  # type: ignore[misc]  # one of each
    if mode == "compiled":
        torch.compiler.reset()


def verdict(setting: Setting, found: Sequence[Measured]) -> Iterator[str]:
    """One sentence per mode: which P pays, and how much."""
    for mode in dict.fromkeys(one.mode for one in found):
        rows = [one for one in found if one.mode == mode]
        paying = [one for one in rows if one.pays]
        if not paying:
            best = max(rows, key=lambda one: one.speedup[0])
            yield f"{mode}: patching does not pay here; the best was ×{best.speedup[0]:.2f}, with P = {best.num_prop}."
            continue
        first, best = min(paying, key=lambda one: one.num_prop), max(paying, key=lambda one: one.speedup[0])
        yield (
            f"{mode}: patching pays from P = {first.num_prop} (×{first.speedup[0]:.2f}); "
            f"the most was ×{best.speedup[0]:.2f}, with P = {best.num_prop}."
        )


def reasons(setting: Setting, one: Measured) -> Iterator[str]:
    """Why a P does not pay, or gives less than half of what its GMACs promise; nothing where it does."""
    gain, saved = one.speedup[0], one.promise - 1
    if one.pays and gain - 1 >= saved / 2:
        return
    if one.speedup[2] > _NOISY * one.speedup[1]:
        yield f"the machine is too busy to tell: quartiles from ×{one.speedup[1]:.2f} to ×{one.speedup[2]:.2f}"
    if "reference" in one.backends:
        yield f"plain PyTorch ran, which is slow: {', '.join(one.notes)}"
    if one.promise < _LITTLE_WORK:
        yield (
            f"too few tokens leave: P = {one.num_prop} of {setting.image_tokens} in each of {setting.blocks} blocks "
            f"is ×{one.promise:.2f} less work"
        )
    if one.slicing is not None and one.slicing - 1 < saved / 2:
        yield (
            f"the time does not follow the tokens: cutting them off for nothing gives ×{one.slicing:.2f}, "
            f"where the GMACs promise ×{one.promise:.2f}"
        )
    if one.busy < _BUSY:
        yield (
            f"launch-bound, or bound by memory: at the {one.rate:.0f} GMAC/s measured here the products would take "
            f"{one.busy:.0%} of the unpatched model's time; "
            "a larger batch, --compile, or on a GPU gtp_vit.graphed may help"
        )
    if one.rate_float32 is not None and one.rate < one.rate_float32:
        yield (
            f"{setting.dtype} has no fast path on this CPU: {one.rate:.0f} GMAC/s, "
            f"against {one.rate_float32:.0f} in float32"
        )
    if one.slicing is not None and one.slicing > gain:
        times = one.milliseconds
        cost, freed = times["patched"] - times["sliced"], times["unpatched"] - times["sliced"]
        per_block = 1 / setting.blocks
        yield (
            f"scores, selection and propagation cost {cost * per_block:.3f} ms a block, and the tokens that leave save "
            f"{freed * per_block:.3f} ms, at {setting.image_tokens} image tokens and batch {setting.batch}"
        )


def _report(about: str, setting: Setting, found: Sequence[Measured], options: dict[str, Any]) -> dict[str, Any]:
    rows = [{**asdict(one), "pays": one.pays, "reasons": list(reasons(setting, one))} for one in found]
    return {
        "about": about,
        "torch": torch.__version__,
        "gtp_kernels": gtp_kernels.__version__,
        "threads": torch.get_num_threads(),
        "setting": asdict(setting),
        "options": options,
        "results": rows,
        "verdict": list(verdict(setting, found)),
        "reasons": [f"{row['mode']}, P = {row['num_prop']}: {reason}." for row in rows for reason in row["reasons"]],
    }


def _table(found: Sequence[Measured]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    headings = ("", "P", "tokens", "before, ms", "patched", "speed", "quartiles", "sliced", "GMACs")
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for one in found:
        median, low, high = one.speedup
        table.add_row(
            one.mode,
            str(one.num_prop),
            str(one.tokens),
            f"{one.milliseconds['unpatched']:.1f}",
            f"{one.milliseconds['patched']:.1f}",
            f"{'[green]' if one.pays else '[yellow]'}×{median:.2f}[/]",
            f"{low:.2f}–{high:.2f}",
            "" if one.slicing is None else f"×{one.slicing:.2f}",
            f"×{one.promise:.2f}",
        )
    return table
