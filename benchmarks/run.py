"""``python -m benchmarks.run``: times ours and each baseline in turns, after ours was found to be right.

python -m benchmarks.run                                        every op, float32
python -m benchmarks.run --op attention --dtype bfloat16
python -m benchmarks.run --model deit_small_patch16_224 --batch 8 --num-prop 8 --json result.json
"""

from __future__ import annotations

import json
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import gtp_kernels
from benchmarks.cases import OPS, Case, model_case
from gtp_kernels import native
from gtp_vit.timing import Spread, interleave


@click.command(help=__doc__)
@click.option("--op", "ops", multiple=True, type=click.Choice(sorted(OPS)), help="Ops to time; all by default.")
@click.option("--model", default=None, help="A timm model to time instead of ops.")
@click.option("--batch", default=8, show_default=True, help="Images, with --model.")
@click.option("--num-prop", default=8, show_default=True, help="P, with --model.")
@click.option("--dtype", default="float32", type=click.Choice(["float32", "bfloat16", "float16"]), show_default=True)
@click.option("--rounds", default=9, show_default=True, help="Samples of each candidate.")
@click.option("--threads", default=None, type=int, help="CPU threads; torch's own choice by default.")
@click.option("--json", "output", default=None, type=click.Path(path_type=Path), help="Also write JSON here.")
def main(
    ops: tuple[str, ...],
    model: str | None,
    batch: int,
    num_prop: int,
    dtype: str,
    rounds: int,
    threads: int | None,
    output: Path | None,
) -> None:
    """Times what was asked for and prints a table."""
    if threads is not None:
        torch.set_num_threads(threads)
    kind = getattr(torch, dtype)
    if model is None:
        cases = [case for op in ops or OPS for case in OPS[op](kind)]
    else:
        cases = [model_case(model, batch, num_prop, kind)]
    console = Console()
    table = Table("case", "shape", "candidate", "median ms", "quartiles", "ours / it", title=f"CPU, {dtype}")
    results = []
    with torch.inference_mode():
        for case in track(cases, "timing", console=console, transient=True):
            case.check()
            spreads = interleave(case.calls, rounds=rounds, min_seconds=0.02)
            _add_rows(table, case, spreads)
            results.append(
                {"case": case.op, "shape": case.shape, "seconds": {n: s.samples for n, s in spreads.items()}}
            )
    console.print(table)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({**_provenance(), "dtype": dtype, "results": results}, indent=1) + "\n")


def _add_rows(table: Table, case: Case, spreads: dict[str, Spread]) -> None:
    ours = spreads["ours"]
    for name, spread in spreads.items():
        ratio = "" if name == "ours" else f"{ours.ratio(spread).median:.2f}"
        quartiles = f"{spread.low * 1e3:.3f} to {spread.high * 1e3:.3f}"
        table.add_row(case.op, case.shape, name, f"{spread.median * 1e3:.3f}", quartiles, ratio)
    table.add_section()


def _provenance() -> dict[str, object]:
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    extension = native.extension()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip() or None,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "gtp_kernels": gtp_kernels.__version__,
        "native": None if extension is None else extension.build_info(),
    }


if __name__ == "__main__":
    main()
