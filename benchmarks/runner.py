"""Checks cases, times them, and says what was found as plain data; needs torch alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from benchmarks.measure import Ceilings, as_json, measure, provenance
from benchmarks.registry import Case
from gtp_kernels import backends


def run_cases(
    cases: Iterable[Case], device: torch.device, ceilings: Ceilings, *, rounds: int, dtype: str
) -> list[dict[str, Any]]:
    """Checks and times cases; a case that fails its check gets ``error`` and no numbers."""
    results = []
    for case in cases:
        result: dict[str, Any] = {
            "case": case.op, "shape": case.shape, "dtype": dtype,
            "bytes": case.num_bytes, "flops": case.flops, **case.about,
        }  # fmt: skip
        results.append(result)
        with torch.inference_mode():
            try:
                with backends.record() as ran:
                    case.check()
                    case.calls["ours"]()
            except AssertionError as error:
                result["error"] = str(error)
                continue
            result["backends"] = sorted({backend for _, backend in ran} - {"reference"}) or ["reference"]
            spreads, modes = measure(case.calls, device, rounds=rounds)
        result["seconds"] = {name: spread.samples for name, spread in spreads.items()}
        result["median"] = {name: spread.median for name, spread in spreads.items()}
        result["quartiles"] = {name: [spread.low, spread.high] for name, spread in spreads.items()}
        result["ratio"] = {name: spreads["ours"].ratio(s).median for name, s in spreads.items() if name != "ours"}
        result["mode"] = modes
        if case.num_bytes or case.flops:
            result["ceiling_share"] = ceilings.seconds(case.num_bytes, case.flops) / spreads["ours"].median
        if case.items:
            result["per_second"] = {name: case.items / spread.median for name, spread in spreads.items()}
    return results


def report(device: torch.device, ceilings: Ceilings, results: list[dict[str, Any]], **more: object) -> dict[str, Any]:
    """What is written as JSON."""
    return {**provenance(device), **more, "ceilings": as_json(ceilings), "results": results}
