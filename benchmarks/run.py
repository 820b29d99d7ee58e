"""``python -m benchmarks.run``: times ours and each baseline in turns, after ours was found to be right.

``of ceiling`` is the share of the machine's ceiling: the least time that ours would need at the bandwidth of a copy and
the rate of a matrix product, both measured at the start, over the time that it took. Above 1, caches helped.

python -m benchmarks.run                                        every op, float32
python -m benchmarks.run --op attention --dtype bfloat16
python -m benchmarks.run --device cuda --dtype bfloat16 --model deit_small_patch16_224 --compile max-autotune
python -m benchmarks.run --model deit_small_patch16_224 --batch 8 --num-prop 8 --json result.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.measure import device_name, measure_ceilings
from benchmarks.models import COMPILE_MODES, model_case
from benchmarks.registry import OPS, Setting
from benchmarks.runner import report, run_cases

# On a GPU both are timed: ours is the one that is forced or chosen, the other stands beside it.
GPU_BACKENDS = ("triton", "cuda")


def table_of(results: Iterable[dict[str, Any]], title: str) -> Table:
    """The table that people read."""
    table = Table("case", "shape", "candidate", "median ms", "quartiles", "ours / it", "of ceiling", "", title=title)
    for result in results:
        head = (result["case"], result["shape"])
        if "error" in result:
            table.add_row(*head, "ours", f"[red]wrong: {result['error']}")
        for name, median in result.get("median", {}).items():
            low, high = result["quartiles"][name]
            ratio = "" if name == "ours" else f"{result['ratio'][name]:.2f}"
            share = f"{result['ceiling_share']:.0%}" if name == "ours" and "ceiling_share" in result else ""
            quartiles = f"{low * 1e3:.3f} to {high * 1e3:.3f}"
            speed = f"{result['per_second'][name]:.1f}/s" if "per_second" in result else ""
            table.add_row(*head, name, f"{median * 1e3:.3f}", quartiles, ratio, share, speed)
        for name, part in result.get("parts", {}).items():
            low, high = part["quartiles"]
            quartiles = f"{low * 1e3:.3f} to {high * 1e3:.3f}"
            about = f"{part['share']:.0%} of {part['of']}"
            table.add_row(*head, f"({name})", f"{part['median'] * 1e3:.3f}", quartiles, "", "", about)
        for name, reason in result.get("wrong", {}).items():
            table.add_row(*head, name, f"[red]wrong: {reason}")
        for name, reason in result.get("left_out", {}).items():
            table.add_row(*head, name, f"left out: {reason}")
        table.add_section()
    return table


@click.command(help=__doc__)
@click.option("--op", "ops", multiple=True, type=click.Choice(sorted(OPS)), help="Ops to time; all by default.")
@click.option("--model", default=None, help="A timm model to time instead of ops.")
@click.option("--batch", default=8, show_default=True, help="Images, with --model.")
@click.option("--num-prop", default=8, show_default=True, help="P.")
@click.option("--compile", "compile_mode", default="none", type=click.Choice(COMPILE_MODES), show_default=True)
@click.option("--device", "where", default="cpu", type=click.Choice(["cpu", "cuda"]), show_default=True)
@click.option("--dtype", default="float32", type=click.Choice(["float32", "bfloat16", "float16"]), show_default=True)
@click.option("--rounds", default=9, show_default=True, help="Samples of each candidate.")
@click.option("--threads", default=None, type=int, help="CPU threads; torch's own choice by default.")
@click.option("--json", "output", default=None, type=click.Path(path_type=Path), help="Also write JSON here.")
@click.option("--tiny", is_flag=True, help="Tiny shapes: tries the tool, measures nothing.")
def main(
    ops: tuple[str, ...],
    model: str | None,
    batch: int,
    num_prop: int,
    compile_mode: str,
    where: str,
    dtype: str,
    rounds: int,
    threads: int | None,
    output: Path | None,
    tiny: bool,
) -> None:
    """Times what was asked for and prints a table."""
    if threads is not None:
        torch.set_num_threads(threads)
    if where == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device cuda: torch sees no CUDA device here")
    device = torch.device(where)
    setting = Setting(device, getattr(torch, dtype), num_prop, tiny)
    console = Console(width=None if sys.stdout.isatty() else 120)
    with console.status("measuring the machine"):
        ceilings = measure_ceilings(device, setting.dtype, tiny=tiny)
    results = []
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("preparing", total=1.0)

        def progress(what: str, share: float) -> None:
            bar.update(task, description=what, completed=share)

        for name in [model] if model else ops or OPS:
            create = {"img_size": 64, "depth": 2} if tiny else {}
            cases = (
                [model_case(model, batch, setting, compile_mode=compile_mode, **create)]
                if model
                else OPS[name](setting)
            )
            rivals = GPU_BACKENDS if where == "cuda" else ()
            results += run_cases(cases, device, ceilings, rounds=rounds, dtype=dtype, progress=progress, rivals=rivals)
    name = "CPU" if where == "cpu" else device_name(device)
    console.print(table_of(results, f"{name}, {dtype}"))
    console.print(
        f"ceilings: {ceilings.bytes_per_second / 1e9:.0f} GB/s copied, {ceilings.flops_per_second / 1e9:.0f} GFLOP/s"
    )
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report(device, ceilings, results, dtype=dtype), indent=1) + "\n")
    if any("error" in result or "wrong" in result for result in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
