"""``python -m benchmarks.lines``: what this package has to reach on a CPU, measured, beside what it reaches.

Each piece is measured in turns within one process, and its numbers are written as soon as it is done; run again with
the same sources, what is there is not measured again. Ratios are medians of one run. Exits with 1 if a line is missed.

python -m benchmarks.lines                                     everything; about half an hour on two cores
python -m benchmarks.lines --only attention --fresh
python -m benchmarks.lines --only "deit_small.* b8 .*float32"
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.measure import Ceilings, measure_ceilings, provenance, slug
from benchmarks.models import live_case, model_case
from benchmarks.registry import OPS, Setting
from benchmarks.runner import run_cases
from gtp_vit.timing import processor_name

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
DTYPES = ("float32", "bfloat16")
MODELS = (
    ("deit_small_patch16_224", 1),
    ("deit_small_patch16_224", 8),
    ("deit_small_patch16_224", 16),
    ("deit_base_patch16_224", 4),
)
LIVE_MODELS = (("deit_small_patch16_224", 8), ("deit_small_patch16_224", 16))
NUM_PROPS = (1, 8, 14)
# A batch of one image takes milliseconds, and the line of LiveGraph is two parts in a hundred: more against noise.
ROUNDS, ROUNDS_OF_ONE, ROUNDS_OF_LIVE = 9, 41, 21
MEMORY = """
import pathlib, torch, gtp_kernels

def resident(name):  # VmRSS, or VmHWM, its peak; ru_maxrss would begin at the peak of the process that started this one
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))

def attend(tokens):
    q, k, v = torch.randn(3, 1, 12, tokens, 64)
    scales = torch.rand(1, tokens) + 0.5
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = resident("VmRSS")
    with gtp_kernels.use_backend("cpu"):
        out, scores = gtp_kernels.attention_with_scores(q, k, v, scales, sparsity=0.6)
    return resident("VmHWM") - before - sum(x.numel() * x.element_size() for x in (out, *scores))

attend(8)
print(attend(4096))
"""


@dataclass(frozen=True)
class Line:
    """One number and what it has to be: at least ``line``, or at most where ``at_most``; ``goal`` is beyond it."""

    what: str
    value: float
    line: float | None
    goal: float | None = None
    at_most: bool = False

    @property
    def holds(self) -> bool:
        """Whether the line is held; where there is none, yes."""
        return self.line is None or self._reaches(self.line)

    @property
    def verdict(self) -> str:
        """``goal``, ``holds`` or ``missed``."""
        if not self.holds:
            return "missed"
        return "goal" if self.goal is not None and self._reaches(self.goal) else "holds"

    def _reaches(self, bound: float) -> bool:
        return self.value <= bound if self.at_most else self.value >= bound


def pieces(ceilings: Callable[[str], Ceilings]) -> Iterator[tuple[str, Callable[[Any], dict[str, Any]]]]:
    """Every piece by name; each takes a progress callback and returns what it measured."""
    for dtype in DTYPES:
        yield f"attention {dtype}", partial(_attention, ceilings, dtype)
    for dtype in DTYPES:
        for name, batch in MODELS:
            for num_prop in NUM_PROPS:
                yield f"{name} b{batch} P{num_prop} {dtype}", partial(_model, ceilings, name, batch, num_prop, dtype)
        for name, batch in LIVE_MODELS:
            yield f"{name} LiveGraph b{batch} P8 {dtype}", partial(_live, ceilings, name, batch, dtype)
    yield "memory", _memory


def _attention(ceilings: Callable[[str], Ceilings], dtype: str, progress: Any) -> dict[str, Any]:
    cases = OPS["attention"](Setting(CPU, getattr(torch, dtype)))
    return {"results": run_cases(cases, CPU, ceilings(dtype), rounds=15, dtype=dtype, progress=progress)}


def _model(
    ceilings: Callable[[str], Ceilings], name: str, batch: int, num_prop: int, dtype: str, progress: Any
) -> dict[str, Any]:
    case = model_case(name, batch, Setting(CPU, getattr(torch, dtype), num_prop))
    rounds = ROUNDS_OF_ONE if batch == 1 else ROUNDS
    return {"results": run_cases([case], CPU, ceilings(dtype), rounds=rounds, dtype=dtype, progress=progress)}


def _live(ceilings: Callable[[str], Ceilings], name: str, batch: int, dtype: str, progress: Any) -> dict[str, Any]:
    case = live_case(name, batch, Setting(CPU, getattr(torch, dtype), 8))
    found = run_cases([case], CPU, ceilings(dtype), rounds=ROUNDS_OF_LIVE, dtype=dtype, progress=progress)
    return {"results": found}


def _memory(progress: Any) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", MEMORY], check=True, capture_output=True, text=True)
    return {"bytes": int(done.stdout)}


def lines(found: dict[str, dict[str, Any]]) -> Iterator[Line]:
    """The lines that the pieces found so far say something about."""
    for piece in found.values():
        for result in piece.get("results", []):
            if "ratio" not in result:
                yield Line(f"{result['case']} {result['shape']} {result['dtype']}: {result['error']}", 0.0, 1.0)
            elif result["case"] == "attention":
                yield from _attention_lines(result)
            elif result.get("propagation") == "LiveGraph":
                yield from _live_lines(result)
            else:
                yield from _model_lines(result)
        if "bytes" in piece:
            what = "attention B1 H12 N4096 float32: MB above inputs and outputs"
            yield Line(what, piece["bytes"] / 1e6, 64, None, True)


def _attention_lines(result: dict[str, Any]) -> Iterator[Line]:
    what = f"attention {result['shape']} {result['dtype']}"
    line, goal = (1.15, 1.0) if "N785" in result["shape"] else (0.9, 0.75)
    yield Line(f"{what}: time / SDPA", result["ratio"]["sdpa"], line, goal, True)
    yield Line(f"{what}: times as fast as the definition", 1 / result["ratio"]["definition"], 10, 15)


def _model_lines(result: dict[str, Any]) -> Iterator[Line]:
    name, batch, num_prop, dtype = (result[key] for key in ("model", "batch", "num_prop", "dtype"))
    what = f"{name} b{batch} P{num_prop} {dtype}"
    speed = {baseline: 1 / ratio for baseline, ratio in result["ratio"].items()}
    yield Line(f"{what}: × free slicing", speed["slicing"], 0.97, 1.05)
    yield Line(f"{what}: × free slicing with our linear layers", speed["slicing, fused linear"], None)
    if num_prop == 8:
        yield Line(f"{what}: × ToMe", speed["tome"], 1.1, 1.15)
    if num_prop == 8 and dtype == "float32" and batch > 1:
        yield Line(f"{what}: × timm", speed["timm"], 1.3, 1.4)
    elif num_prop == 1 and dtype == "float32":
        yield Line(f"{what}: × timm", speed["timm"], 1.0)
    else:
        yield Line(f"{what}: × timm", speed["timm"], None)


def _live_lines(result: dict[str, Any]) -> Iterator[Line]:
    what = f"{result['case']} b{result['batch']} P{result['num_prop']} {result['dtype']}"
    yield Line(f"{what}: time / GraphProp", result["ratio"]["GraphProp"], 1.02, None, True)
    yield Line(f"{what}: × ToMe", 1 / result["ratio"]["tome"], 1.1)


def table_of(found: list[Line]) -> Table:
    """The table that people read."""
    table = Table("what", "measured", "line", "goal", "")
    colours = {"goal": "green", "holds": "", "missed": "red"}
    for line in found:
        sign = "≤" if line.at_most else "≥"
        bounds = ["" if bound is None else f"{sign} {bound:g}" for bound in (line.line, line.goal)]
        verdict = "" if line.line is None else line.verdict
        table.add_row(
            line.what, f"{line.value:.2f}", *bounds, verdict, style=colours[line.verdict] if verdict else "dim"
        )
    return table


def default_path() -> Path:
    """``benchmarks/results/<processor>-<threads>-threads/lines.json``."""
    return (
        ROOT / "benchmarks" / "results" / f"{slug(processor_name())}-{torch.get_num_threads()}-threads" / "lines.json"
    )


@click.command(help=__doc__)
@click.option("--only", default="", help="Only pieces whose name matches this regular expression.")
@click.option("--fresh", is_flag=True, help="Measure again what is there.")
@click.option("--threads", default=None, type=int, help="CPU threads; torch's own choice by default.")
@click.option("--json", "output", default=None, type=click.Path(path_type=Path), help="Where the numbers go.")
def main(only: str, fresh: bool, threads: int | None, output: Path | None) -> None:
    """Measures what is asked for, and prints every line."""
    if threads is not None:
        torch.set_num_threads(threads)
    path = output or default_path()
    console = Console(width=None if sys.stdout.isatty() else 140)
    report: dict[str, Any] = {**provenance(CPU), "pieces": {}}
    if path.is_file():
        earlier = json.loads(path.read_text())
        if earlier["source"] == report["source"]:
            report["pieces"] = earlier["pieces"]
    known: dict[str, Ceilings] = {}

    def ceilings(dtype: str) -> Ceilings:
        if dtype not in known:
            known[dtype] = measure_ceilings(CPU, getattr(torch, dtype))
        return known[dtype]

    chosen = [(name, run) for name, run in pieces(ceilings) if re.search(only, name)]
    if not chosen:
        raise click.UsageError(f"no piece matches {only!r}")
    with Progress(console=console, transient=True) as bar:
        whole = bar.add_task("pieces", total=len(chosen))
        task = bar.add_task("", total=1.0)
        for name, run in chosen:
            if fresh or name not in report["pieces"]:
                report["pieces"][name] = run(lambda what, share: bar.update(task, description=what, completed=share))
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(report, indent=1) + "\n")
            bar.advance(whole)
    found = list(lines({name: report["pieces"][name] for name, _ in chosen}))
    console.print(table_of(found))
    missed = sum(not line.holds for line in found)
    console.print(f"{len([line for line in found if line.line is not None])} lines, {missed} missed; {path}")
    raise SystemExit(1 if missed else 0)


if __name__ == "__main__":
    main()
