"""``python -m benchmarks.readme``: writes the GPU part of README.md from ``benchmarks/results/<device>/*.json``.

It stands between two comments there; nothing else is touched. ``--check`` writes nothing and exits with 1 where the two
differ. Only what ``benchmarks.gpu`` wrote on a GPU is taken: without that, the part says that nothing was measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- gpu: python -m benchmarks.readme -->", "<!-- gpu: end -->"
NOTHING = "Not yet measured on a GPU."
MODEL_BASELINES = {"timm": "timm (SDPA)", "slicing": "free slicing", "tome": "ToMe on SDPA, same r"}
OP_BASELINES = ("sdpa", "sdpa+bias", "definition", "definition compiled", "plain", "add+norm")

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
        yield _models(_results(steps["models"]))
    if "ops" in steps:
        yield _ops(_results(steps["ops"]))
    yield "; ".join(_statuses(steps)) + "."


def _results(report: Report) -> list[dict[str, Any]]:
    return [result for piece in report["pieces"].values() for result in piece.get("results", [])]


def _models(results: Iterable[dict[str, Any]]) -> str:
    head = ["model", "batch", "P", "type", "images/s", *(f"× {label}" for label in MODEL_BASELINES.values())]
    rows = []
    for result in results:
        row = [result["model"], str(result["batch"]), str(result["num_prop"]), result["dtype"]]
        if "median" not in result:
            rows.append([*row, "wrong result", *([""] * len(MODEL_BASELINES))])
            continue
        ratios = [_times(result, name) for name in MODEL_BASELINES]
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


def replaced(text: str, part: str) -> str:
    """README's text with its GPU part replaced.

    Raises:
        ValueError: the comments are not there, each once.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"README.md must have {BEGIN} and {END}, each once")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{part}\n{END}{rest.split(END)[1]}"


def main(arguments: list[str] | None = None) -> int:
    """Writes or checks; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where it would change")
    options = parser.parse_args(arguments)
    path = ROOT / "README.md"
    text = path.read_text()
    new = replaced(text, render(load(ROOT / "benchmarks" / "results")))
    if options.check:
        return int(new != text)
    path.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
