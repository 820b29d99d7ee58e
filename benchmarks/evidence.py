"""``python -m benchmarks.evidence``: writes ``gtp_kernels/evidence.json`` from ``benchmarks/results/*/ops.json``.

It lists the shape classes for which the backend ``cuda`` comes before ``triton`` when nothing is forced: those in which
it gave the right result and was faster in the same run, by at least 2 %, at every shape that was measured. A class
spans from one measured number of tokens to the next where that is at most three times as many and both were won.
``--check`` writes nothing and exits with 1 where the file would change.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PATH = ROOT / "gtp_kernels" / "evidence.json"
# Less may be noise: quartiles of one run lie about as far apart.
LEAST_SPEEDUP = 1.02
LARGEST_GAP = 3


@dataclass(frozen=True)
class Point:
    """One measured shape; ``speedup`` of cuda over triton is 0 where cuda was wrong or did not run."""

    tokens: int
    speedup: float
    file: str
    commit: str


def entries(folder: Path) -> list[dict[str, Any]]:
    """What the reports below ``folder``, ``benchmarks/results``, say; the order does not depend on theirs."""
    groups: dict[tuple[str, str, str, str, int], list[Point]] = {}
    for path in sorted(folder.glob("*/*.json")):
        report = json.loads(path.read_text())
        if report.get("step") != "ops" or "capability" not in report or report.get("dry_run"):
            continue
        capability = ".".join(map(str, report["capability"]))
        name, commit = f"benchmarks/results/{path.parent.name}/{path.name}", str(report["commit"])
        for result in (result for piece in report["pieces"].values() for result in piece.get("results", [])):
            if "tokens" not in result:
                continue
            width = "head_size" if "head_size" in result else "channels"
            key = (result["case"], capability, result.get("arithmetic", result["dtype"]), width, result[width])
            groups.setdefault(key, []).append(Point(result["tokens"], speedup(result), name, commit))
    return [entry for key in sorted(groups) for entry in _classes(*key, groups[key])]


def speedup(result: Mapping[str, Any]) -> float:
    """How many times as fast as triton cuda was; 0 where one of them was wrong or did not run."""
    ran, ratio = result.get("backends"), result.get("ratio", {})
    if ran == ["triton"] and "cuda" in ratio:
        return float(ratio["cuda"])
    if ran == ["cuda"] and "triton" in ratio:
        return 1 / float(ratio["triton"])
    return 0.0


def _classes(
    op: str, capability: str, dtype: str, width: str, size: int, points: list[Point]
) -> Iterator[dict[str, Any]]:
    """The runs of neighbouring numbers of tokens at which every point was won."""
    run: list[Point] = []
    for tokens in sorted({point.tokens for point in points}):
        here = [point for point in points if point.tokens == tokens]
        won = all(point.speedup >= LEAST_SPEEDUP for point in here)
        if run and (not won or tokens > LARGEST_GAP * run[-1].tokens):
            yield _entry(op, capability, dtype, width, size, run)
            run = []
        if won:
            run += here
    if run:
        yield _entry(op, capability, dtype, width, size, run)


def _entry(op: str, capability: str, dtype: str, width: str, size: int, run: list[Point]) -> dict[str, Any]:
    return {
        "op": op,
        "capability": capability,
        "dtype": dtype,
        width: size,
        "tokens": [run[0].tokens, run[-1].tokens],
        "speedup": round(min(point.speedup for point in run), 3),
        "file": ", ".join(sorted({point.file for point in run})),
        "commit": ", ".join(sorted({point.commit for point in run})),
    }


def written(folder: Path) -> str:
    """The text of the file."""
    return json.dumps(entries(folder), indent=1) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Writes or checks; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where it would change")
    options = parser.parse_args(arguments)
    text = written(ROOT / "benchmarks" / "results")
    if options.check:
        return int(not PATH.is_file() or PATH.read_text() != text)
    PATH.write_text(text)
    print(f"{len(json.loads(text))} shape classes prefer cuda; {PATH.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
