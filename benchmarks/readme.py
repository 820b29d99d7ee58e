"""``python -m benchmarks.readme``: writes the numbers of README.md from ``benchmarks/results/<device>/*.json``.

They stand between comments there; nothing else is touched. ``--check`` writes nothing and exits with 1 where the two
differ. The CPU part is what ``benchmarks.lines`` wrote, the GPU part what ``benchmarks.gpu`` wrote on a GPU: without
that, it says that nothing was measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NOTHING = "Not yet measured on a GPU."
CPU_BASELINES = {
    "timm": "timm (SDPA)",
    "slicing": "free slicing",
    "slicing, fused linear": "free slicing with our linear layers",
    "tome": "ToMe on SDPA, same r",
}
MODEL_BASELINES = {"timm": "timm (SDPA)", "slicing": "free slicing", "tome": "ToMe on SDPA, same r"}
OP_BASELINES = (
    "cuda",
    "triton",
    "sdpa",
    "sdpa flash",
    "sdpa cudnn",
    "sdpa efficient",
    "sdpa math",
    "sdpa+bias",
    "sdpa+sums",
    "definition",
    "definition compiled",
    "kthvalue",
    "topk",
    "plain",
    "add+norm",
    "tome",
)

Report = dict[str, Any]


def load(folder: Path) -> dict[str, dict[str, Report]]:
    """The reports of every device, by folder and step; those of a CPU or of a dry run are left out."""
    found: dict[str, dict[str, Report]] = {}
    for path in sorted(folder.glob("*/*.json")):
        report = json.loads(path.read_text())
        if "step" in report and "pieces" in report and "capability" in report and not report.get("dry_run"):
            found.setdefault(path.parent.name, {})[str(report["step"])] = report
    return found


def render(devices: Mapping[str, Mapping[str, Report]]) -> str:
    """The text between the comments."""
    if not devices:
        return NOTHING
    return "\n\n".join(part for name, steps in devices.items() for part in _device(name, steps))


def _device(name: str, steps: Mapping[str, Report]) -> Iterator[str]:
    first = next(iter(steps.values()))
    versions = (
        f"driver {first.get('driver')}, CUDA {first.get('cuda')}, torch {first['torch']}, Triton {first['triton']}"
    )
    commits = sorted({str(report.get("commit") or report.get("source")) for report in steps.values()})
    yield f"**{first['device']}**, {versions}; commit {', '.join(commits)}; `benchmarks/results/{name}/`."
    if "models" in steps:
        models, live = _split(_results(steps["models"]))
        yield _models(models)
        yield from _live(live)
    if "ops" in steps:
        yield _ops(_results(steps["ops"]))
    yield "; ".join(_statuses(steps)) + "."


def render_cpu(folder: Path) -> str:
    """The text of the CPU part: a table of models and one of the attention for every machine."""
    parts = []
    for path in sorted(folder.glob("*/lines.json")):
        report = json.loads(path.read_text())
        results = [result for result in _results(report) if "median" in result]
        origin = f"{report['threads']} threads, torch {report['torch']}; commit {report['commit']}"
        parts.append(f"**{report['device']}**, {origin}; `benchmarks/results/{path.parent.name}/lines.json`.")
        models, live = _split(result for result in results if "model" in result)
        parts.append(_cpu_models(models))
        parts += _live(live)
        parts.append(_cpu_attention([result for result in results if result["case"] == "attention"]))
    return "\n\n".join(parts) or "Not yet measured."


def _split(results: Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Those of models, and those with live edges, which have other baselines."""
    results = list(results)
    live = [result for result in results if result.get("propagation") == "LiveGraph"]
    return [result for result in results if result not in live], live


def _cpu_models(results: list[dict[str, Any]]) -> str:
    groups: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["model"], result["batch"], result["dtype"]), []).append(result)
    rows = []
    for (name, batch, dtype), group in groups.items():
        group.sort(key=lambda result: int(result["num_prop"]))
        several = [" / ".join(_times(result, baseline) for result in group) for baseline in CPU_BASELINES]
        rows.append([name, str(batch), dtype, " / ".join(str(result["num_prop"]) for result in group), *several])
    head = ["model", "batch", "type", "P", *(f"× {label}" for label in CPU_BASELINES.values())]
    return "End to end, ×: larger is faster; one number for each P.\n\n" + _table(head, rows)


def _live(results: list[dict[str, Any]]) -> list[str]:
    rows = []
    for r in results:
        row = [r["model"], str(r["batch"]), r["dtype"], str(r["num_prop"])]
        several = [_times(r, "tome"), _times(r, "GraphProp")] if "median" in r else ["wrong result", ""]
        rows.append([*row, *several])
    head = ['`propagation="LiveGraph"`', "batch", "type", "P", "× ToMe", "× GraphProp"]
    return [_table(head, rows)] if rows else []


def _cpu_attention(results: list[dict[str, Any]]) -> str:
    names = ("sdpa", "sdpa+bias", "definition", "definition compiled")
    rows = [
        [r["shape"], r["dtype"], f"{r['median']['ours'] * 1e3:.2f}", *(_times(r, name) for name in names)]
        for r in results
    ]
    head = ["`attention_with_scores`, θ = 0.6", "type", "ms", *(f"× {name}" for name in names)]
    return _table(head, rows)


def _results(report: Report) -> list[dict[str, Any]]:
    return [result for piece in report["pieces"].values() for result in piece.get("results", [])]


def _models(results: Iterable[dict[str, Any]]) -> str:
    results = list(results)
    other = [name for name in ("triton", "cuda") if any(name in result.get("median", {}) for result in results)]
    names = [*MODEL_BASELINES, *other]
    head = ["model", "batch", "P", "type", "images/s", *(f"× {MODEL_BASELINES.get(name, name)}" for name in names)]
    rows = []
    for result in results:
        row = [result["model"], str(result["batch"]), str(result["num_prop"]), result["dtype"]]
        if "median" not in result:
            rows.append([*row, "wrong result", *([""] * len(names))])
            continue
        ratios = [_times(result, name) for name in names]
        rows.append([*row, f"{result['per_second']['ours']:,.0f}", *ratios])
    return "End to end, ×: larger is faster.\n\n" + _table(head, rows)


def _ops(results: list[dict[str, Any]]) -> str:
    names = [name for name in OP_BASELINES if any(name in result.get("median", {}) for result in results)]
    head = ["op", "shape", "type", "µs", *(f"× {name}" for name in names), "of ceiling"]
    rows = []
    for result in results:
        row = [result["case"], result["shape"], result["dtype"]]
        if "median" not in result:
            rows.append([*row, "wrong result", *([""] * len(names)), ""])
            continue
        share = f"{result['ceiling_share']:.0%}" if "ceiling_share" in result else ""
        rows.append([*row, f"{result['median']['ours'] * 1e6:.1f}", *(_times(result, name) for name in names), share])
    return "Each op, ×: larger is faster.\n\n" + _table(head, rows)


def _times(result: Mapping[str, Any], name: str) -> str:
    """How many times as fast ours is; the ratios in reports are of times."""
    return f"{1 / result['ratio'][name]:.2f}" if name in result["ratio"] else "–"


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _statuses(steps: Mapping[str, Report]) -> Iterator[str]:
    """What ran and did not, step by step; nothing that did not pass is left unsaid."""
    for step, report in steps.items():
        pieces = report["pieces"]
        if step == "tests":
            ran = sum(p.get("tests", 0) - p.get("skipped", 0) for p in pieces.values())
            bad = sum(p.get("failures", 0) + p.get("errors", 0) for p in pieces.values())
            yield f"tests: {ran} ran, {bad} failed"
        elif step == "sanitize":
            yield "compute-sanitizer: " + ", ".join(f"{name} {piece['status']}" for name, piece in pieces.items())
        other = [f"{name} {p['status']}" for name, p in pieces.items() if p["status"] not in ("passed", "none")]
        if other and step != "sanitize":
            yield f"{step}, not passed: " + ", ".join(other)


def replaced(text: str, name: str, part: str, command: str = "benchmarks.readme") -> str:
    """A document's text with the part called ``name`` replaced, which ``python -m command`` writes.

    Raises:
        ValueError: its comments are not there, each once.
    """
    begin, end = f"<!-- {name}: python -m {command} -->", f"<!-- {name}: end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"the document must have {begin} and {end}, each once")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{part}\n{end}{rest.split(end)[1]}"


def generated(text: str, folder: Path) -> str:
    """README's text with every part as the results in ``folder`` have it."""
    return replaced(replaced(text, "cpu", render_cpu(folder)), "gpu", render(load(folder)))


def main(arguments: list[str] | None = None) -> int:
    """Writes or checks; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where it would change")
    options = parser.parse_args(arguments)
    path = ROOT / "README.md"
    text = path.read_text()
    new = generated(text, ROOT / "benchmarks" / "results")
    if options.check:
        return int(new != text)
    path.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
