"""Checks cases, times them, and says what was found as plain data; needs torch alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from benchmarks.measure import Ceilings, as_json, measure, provenance
from benchmarks.registry import Call, Case
from gtp_kernels import backends


def run_cases(
    cases: Iterable[Case],
    device: torch.device,
    ceilings: Ceilings,
    *,
    rounds: int,
    dtype: str,
    warmup: int = 2,
    progress: Callable[[str, float], object] = lambda what, share: None,
    rivals: Iterable[str] = (),
) -> list[dict[str, Any]]:
    """Checks and times cases.

    A case whose check fails gets ``error`` and no numbers; a baseline that cannot run is named in ``left_out``.
    ``rivals`` are backends whose kernels are timed beside ``ours``, which then is the backend that is forced: each is
    put through the same check, and where that fails it is named in ``wrong``.
    ``progress`` is told what runs, and which share of that case is done.
    """
    results = []
    for case in cases:
        what = f"{case.op} {case.shape}"
        progress(f"checking {what}", 0.0)
        # Beyond eight shapes of one function torch.compile would run it uncompiled, without a word.
        torch.compiler.reset()
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
            except Exception as error:
                # Whatever a compiler or a launch raises; the other cases go on.
                result["error"] = _reason(error)
                continue
            result["backends"] = sorted({backend for _, backend in ran} - {"reference"}) or ["reference"]
            calls, left_out = _runnable(case, progress)
            wrong = {}
            for name in rivals:
                if name in result["backends"]:
                    continue
                progress(f"checking {what}: {name}", 0.0)
                call = partial(_forced, name, case.calls["ours"])
                try:
                    _forced(name, case.check)
                    call()
                except backends.BackendError as error:
                    left_out[name] = error.reason
                except Exception as error:
                    # Wrong numbers, or whatever a launch raises.
                    wrong[name] = str(error) if isinstance(error, AssertionError) else _reason(error)
                else:
                    calls[name] = call
            done, total = 0, len(calls) * (rounds + warmup)

            def step(what: str = what, total: int = total) -> None:
                nonlocal done
                done += 1
                progress(f"timing {what}", done / total)

            everything, modes = measure(calls, device, rounds=rounds, warmup=warmup, progress=step)
        spreads = {name: spread for name, spread in everything.items() if name not in case.parts}
        if left_out:
            result["left_out"] = left_out
        if wrong:
            result["wrong"] = wrong
        result["seconds"] = {name: spread.samples for name, spread in spreads.items()}
        result["median"] = {name: spread.median for name, spread in spreads.items()}
        result["quartiles"] = {name: [spread.low, spread.high] for name, spread in spreads.items()}
        result["ratio"] = {name: spreads["ours"].ratio(s).median for name, s in spreads.items() if name != "ours"}
        result["mode"] = modes
        if case.num_bytes or case.flops:
            result["ceiling_share"] = ceilings.seconds(case.num_bytes, case.flops) / spreads["ours"].median
        if case.items:
            result["per_second"] = {name: case.items / spread.median for name, spread in spreads.items()}
        result["parts"] = {
            name: {
                "of": whole,
                "median": everything[name].median,
                "quartiles": [everything[name].low, everything[name].high],
                "share": everything[name].ratio(everything[whole]).median,
            }
            for name, (whole, _) in case.parts.items()
            if name in everything and whole in everything
        }
    return results


def _forced(backend: str, call: Call) -> object:
    with backends.use_backend(backend):
        return call()


def _runnable(case: Case, progress: Callable[[str, float], object]) -> tuple[dict[str, Call], dict[str, str]]:
    """The calls that run here, after one call of each, and why the others do not; ``ours`` was checked before."""
    calls, left_out = dict(case.calls), {}
    calls.update({name: call for name, (_, call) in case.parts.items()})
    for name, call in list(calls.items()):
        if name == "ours":
            continue
        progress(f"preparing {case.op} {case.shape}: {name}", 0.0)
        try:
            call()
        except Exception as error:
            # Of a baseline: a backend that this device lacks, a compiler that is not installed, too little memory.
            left_out[name] = _reason(error)
            del calls[name]
    return calls, left_out


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def report(device: torch.device, ceilings: Ceilings, results: list[dict[str, Any]], **more: object) -> dict[str, Any]:
    """What is written as JSON."""
    return {**provenance(device), **more, "ceilings": as_json(ceilings), "results": results}
