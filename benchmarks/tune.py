"""``python -m benchmarks.tune``: finds the tiles of ``gtp_kernels/triton/configs/<arch>.json`` on the GPU it runs on.

Every op runs on the shape classes below, the most important first, and the look-ups that it makes are what there is to
tune. From the tile that ships, and from every tile stored for the choice, one key after the other is varied over the
values below until nothing gets faster. A candidate's results are compared with those of the tile that ships before
it is timed, in turns with it; one that does not compile, does not fit or differs is recorded with the reason. A tile
wins where it is at least 3 % faster over the shape classes that share it, slower on none, and spills nothing.

python -m benchmarks.tune --json build/tune.json                   the report only; run again, it goes on from there
python -m benchmarks.tune --choice attention --budget 900 --write  and into the package
python -m benchmarks.tune --apply FILE                             a report into the package, without a GPU
python -m benchmarks.tune --tiny                                   tries the tool, in Triton's interpreter

``make compile-check ARGS="--arch sm_90"`` checks what was written. Exits with 3 where time was up before the end.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import math
import os
import sys
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor

Tile = dict[str, int]
Outputs = tuple[Tensor, ...]
# A candidate's time over that of the tile that ships, for each problem; or why it has none.
Verdict = dict[str, float] | str

MIN_GAIN = 0.03
MAX_LOSS = 0.01
# What a key may be, of every choice or of one. Others are sizes of a block: half and double of what ships.
VALUES: dict[str, tuple[int, ...]] = {
    "num_warps": (1, 2, 4, 8, 16),
    "num_stages": (1, 2, 3, 4),
    "attention.rows": (16, 32, 64, 128),
    "whole_head": (0, 1),
    "ranked": (0, 1),
    "least_best": (1,),
    # The most channels of a block: no row of a model is as long.
    "row.channels": (),
    "propagate_backward.channels": (),
}


@dataclass(frozen=True)
class Problem:
    """One op on one shape class.

    Attributes:
        name: for people.
        make: the inputs, once; its value runs the op.
        tolerance: of what is floating-point, relative, by norm.
        flips: the share of what is not that may differ: values within rounding of each other take each other's place.
        view: what is compared, where it is not what the op returns.
    """

    name: str
    make: Callable[[], Callable[[], Outputs]]
    tolerance: float
    flips: float = 0.0
    view: Callable[[Outputs], Outputs] = tuple


def problems(device: torch.device, *, tiny: bool = False) -> list[Problem]:
    """All of them, the most important first: bfloat16 before float32, what a forward runs before what trains."""
    found: list[Problem] = []
    dtypes = (torch.float32,) if tiny else (torch.bfloat16, torch.float32)
    heads = [(128, 6, 197, 64), (32, 12, 785, 64), (128, 6, 109, 64), (128, 6, 61, 64), (32, 16, 257, 80)]
    heads += [(32, 8, 197, 128), (64, 12, 197, 32), (32, 4, 197, 256)]
    streams = [(128, 14, 384), (128, 14, 768), (32, 28, 768), (64, 14, 1024)]
    if tiny:
        heads, streams = [(1, 1, 17, 16)], [(1, 4, 16)]
    for dtype in dtypes:
        for shape in heads:
            thetas = (0.6,) if tiny else (0.6, 1.0)
            found += [attention_problem(device, dtype, shape, theta, backward=False) for theta in thetas]
            if shape is heads[0]:
                for stream in streams:
                    found += stream_problems(device, dtype, stream, ("residual", "select", "graph"))
    for dtype in dtypes:
        found += [attention_problem(device, dtype, shape, 0.6, backward=True) for shape in heads]
        for stream in streams:
            found += stream_problems(device, dtype, stream, ("propagate", "backward", "dense", "rank", "live", "merge"))
    for dtype in dtypes:
        found += stream_problems(device, dtype, (1, 6, 16) if tiny else streams[0], ("many",))
        found += stream_problems(device, dtype, (1, 3, 8208) if tiny else (32, 14, 12288), ("residual",))
    return found


def attention_problem(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int, int], theta: float, *, backward: bool
) -> Problem:
    """q, k and v as views of one projection; with token scales below θ = 1."""
    batch, heads, num_tokens, size = shape
    kind = "attention_with_scores_backward" if backward else "attention_with_scores"

    def make() -> Callable[[], Outputs]:
        qkv = _randn(device, dtype, batch, num_tokens, 3, heads, size)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scales = 1 + _randn(device, torch.float32, batch, num_tokens).abs() if theta < 1 else None
        arguments = (q, k, v, scales, theta, size**-0.5, "official")
        if backward:
            grad = _randn(device, dtype, batch, num_tokens, heads, size).transpose(1, 2)
            return lambda: _operators().attention_with_scores_backward(grad, *arguments)
        return lambda: _operators().attention_with_scores(*arguments)

    name = f"{kind} B{batch} H{heads} N{num_tokens} d{size} θ={theta:g} {_name(dtype)}"
    return Problem(name, make, 1e-3 if dtype == torch.float32 else 2e-2)


def stream_problems(
    device: torch.device, dtype: torch.dtype, stream: tuple[int, int, int], kinds: Sequence[str]
) -> Iterator[Problem]:
    """What runs on the residual stream [B, 1 + side², C], 8 tokens leaving."""
    batch, side, channels = stream
    n, num_prop = side * side, 8 if side > 6 else 3

    def inputs(leave: int = num_prop) -> tuple[Tensor, Any, Tensor, Tensor]:
        import gtp_kernels

        x = _randn(device, dtype, batch, 1 + n, channels)
        # By the definition, so that only what is timed looks tiles up.
        with gtp_kernels.use_backend("reference"):
            graph = gtp_kernels.build_graph(x[:1, :, :384].float(), (side, side))
            kept, prop = gtp_kernels.select_tokens(_randn(device, torch.float32, batch, n), leave)
        csr = [t.expand(batch, -1).contiguous() for t in (graph.indptr, graph.indices, graph.values, graph.token)]
        return x, csr, kept, prop

    def residual() -> Callable[[], Outputs]:
        x, csr, kept, prop = inputs()
        gamma, weight, bias = _randn(device, dtype, 3, channels).unbind(0)
        scales = 1 + _randn(device, torch.float32, batch, 1 + n).abs()
        tail = (scales, weight, bias, 1e-6, "layer", "GraphProp", 0.1, 1)
        return lambda: _operators().residual_propagate_norm(x, x, gamma, *csr, kept, prop, *tail)

    def propagate(leave: int = num_prop) -> Callable[[], Outputs]:
        x, csr, kept, prop = inputs(leave)
        scales = 1 + _randn(device, torch.float32, batch, 1 + n).abs()
        return lambda: _operators().propagate(x, *csr, kept, prop, scales, "GraphProp", 0.1, 1)

    def backward() -> Callable[[], Outputs]:
        x, csr, kept, prop = inputs()
        grad = x[:, num_prop:].contiguous()
        return lambda: (_operators().propagate_backward(grad, *csr, kept, prop, "GraphProp", 0.1, 1),)

    def dense() -> Callable[[], Outputs]:
        x, _, kept, prop = inputs()
        weight = _randn(device, dtype, batch, n, n)
        return lambda: _operators().propagate_dense(x, weight, kept, prop, None, 0.1, 1)

    def select() -> Callable[[], Outputs]:
        diag, colsum, cls_row = _randn(device, torch.float32, 3, batch, 6, 1 + n).abs().unbind(0)

        def call() -> Outputs:
            ops = _operators()
            importance = ops.token_importance(diag, colsum, cls_row, "MixedAttnMax", 1, "official")
            return (*ops.select_tokens(importance, num_prop, 1, "grid"),)

        return call

    def rank() -> Callable[[], Outputs]:
        importance = _randn(device, torch.float32, batch, n)
        return lambda: _operators().select_tokens(importance, num_prop, 1, "importance")

    def graph() -> Callable[[], Outputs]:
        x, *_ = inputs()
        return lambda: _operators().build_graph(x, side, side, "Mixed", min(8, n - 1), 1, "official")

    def live_arguments() -> tuple[Any, ...]:
        import gtp_kernels

        x, (indptr, indices, values, token), _, _ = inputs()
        k = _randn(device, dtype, batch, 1 + n, max(channels // 64, 1), min(channels, 64)).transpose(1, 2)
        with gtp_kernels.use_backend("reference"):
            live = gtp_kernels.live_graph(gtp_kernels.TokenGraph(indptr, indices, values, token))
        importance, sizes = _randn(device, torch.float32, batch, n).abs(), torch.ones(batch, 1 + n, device=device)
        return x, (k, importance, live.indptr, live.indices, live.rep, sizes, num_prop, 0.25, 1)

    def live() -> Callable[[], Outputs]:
        _, arguments = live_arguments()
        return lambda: (*_operators().live_select(*arguments),)

    def merge() -> Callable[[], Outputs]:
        import gtp_kernels
        from gtp_kernels.graph import LiveGraph

        x, (k, importance, *graph, sizes, leave, gamma, prefix) = live_arguments()
        with gtp_kernels.use_backend("reference"):
            found = gtp_kernels.live_select(
                k, importance, LiveGraph(*graph), leave, sizes, gamma=gamma, num_prefix=prefix
            )
        scale, weight, bias = _randn(device, dtype, 3, channels).unbind(0)
        return lambda: _operators().live_merge(x, x, scale, *found[:4], weight, bias, 1e-6, "layer", 1)

    makers = dict(residual=residual, propagate=propagate, backward=backward, dense=dense, select=select, rank=rank)
    makers.update(many=partial(propagate, 40 if side > 6 else n - 1), graph=graph, live=live, merge=merge)
    for kind in kinds:
        scores_only = kind in ("select", "rank")
        view = _adjacency if kind == "graph" else tuple
        name = f"{kind} B{batch} n{n}" + ("" if scores_only else f" C{channels} {_name(dtype)}")
        # A rounding moves an edge, or a merge.
        flips = 2e-3 if kind in ("graph", "live") else 0.0
        yield Problem(name, makers[kind], 16 * torch.finfo(dtype).eps, flips, view)


def _operators() -> Any:
    importlib.import_module("gtp_kernels.triton")  # defines them
    from gtp_kernels.ops import _library

    return getattr(torch.ops, _library.TRITON_NAMESPACE)


@contextlib.contextmanager
def _launching(launch: Any) -> Iterator[None]:
    """The problems call the launchers, and those ``launch`` in the place of ``runtime.launch``."""
    from benchmarks.launches import recording
    from gtp_kernels.triton import runtime

    launchers = types.SimpleNamespace(**importlib.import_module("gtp_kernels.triton").LAUNCHERS)
    with (
        recording(launch, runtime.launch),
        mock.patch.object(sys.modules[__name__], "_operators", return_value=launchers),
    ):
        yield


class _Nothing:
    """A launch that does nothing, as a launcher may subscript it with a grid and call it."""

    def __call__(self, *args: Any, **kwargs: Any) -> _Nothing:
        return self

    def __getitem__(self, grid: Any) -> _Nothing:
        return self


def _adjacency(outputs: Outputs) -> Outputs:
    """Which columns every row has, bool [B, n, n], and the values: an edge more or less shifts all behind it."""
    indptr, indices, values = outputs
    batch, n = indptr.shape[0], indptr.shape[1] - 1
    edge = torch.arange(indices.shape[1], device=indices.device).expand_as(indices)
    row = torch.searchsorted(indptr[:, 1:].contiguous(), edge.to(indptr.dtype).contiguous(), right=True)
    dense = torch.zeros(batch, (n + 1) * n, device=values.device)
    dense.scatter_(1, row * n + indices, values)
    dense = dense[:, : n * n]
    return (dense > 0, dense)


def _randn(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator(device).manual_seed(sum(shape)), device=device).to(dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def difference(ours: Outputs, expected: Outputs, problem: Problem) -> str | None:
    """How a candidate's outputs differ from those of the tile that ships; None where they do not."""
    if len(ours) != len(expected):
        return f"differs: {len(ours)} outputs, {len(expected)} expected"
    for number, (a, b) in enumerate(zip(ours, expected, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"differs: output {number} is {a.dtype} {tuple(a.shape)}"
        if a.numel() == 0:
            continue
        if a.is_floating_point():
            error = float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))
            # A flipped edge changes its own value and those of its neighbours.
            limit = max(problem.tolerance, math.sqrt(problem.flips))
            if not error <= limit:
                return f"differs: output {number}, relative error {error:.1e}, above {limit:.1e}"
        else:
            share = float((a != b).float().mean())
            if share > problem.flips:
                return f"differs: output {number}, in {share:.2%} of the places"
    return None


@dataclass(frozen=True)
class Job:
    """One shape class of one choice, and the problems that look it up."""

    choice: str
    dtype: str
    dimensions: tuple[tuple[str, int], ...]

    @property
    def key(self) -> str:
        """In reports."""
        return " ".join([self.choice, self.dtype, *(f"{name}={value}" for name, value in self.dimensions)])


def survey(found: Iterable[Problem]) -> dict[Job, tuple[Tile, list[Problem]]]:
    """What every problem looks up, with the tile that ships, in the order of first use; nothing is compiled or run."""
    from gtp_kernels.triton import configs

    jobs: dict[Job, tuple[Tile, list[Problem]]] = {}
    once: dict[str, Problem] = {}
    for problem in found:
        once.setdefault(problem.name, problem)  # some do not depend on the dtype of the stream, and come with each
    for problem in once.values():
        call = problem.make()
        with configs.override() as asked, _launching(_Nothing()):
            call()
        for one in asked:
            job = Job(one.choice, _name(one.dtype), tuple(sorted(one.dimensions.items())))
            sharing = jobs.setdefault(job, (dict(one.tile), []))[1]
            if problem not in sharing:
                sharing.append(problem)
    return jobs


def values_of(choice: str, key: str, shipped: int) -> list[int]:
    """What a key of a tile may be; 0 stands for what a tile does not use."""
    blocks = (max(shipped // 2, 1), shipped * 2) if shipped else ()
    other = VALUES.get(f"{choice}.{key}", VALUES.get(key, blocks))
    return sorted({*other, shipped})


def search(
    choice: str,
    shipped: Tile,
    stored: Iterable[Tile],
    evaluate: Callable[[list[Tile]], list[Verdict]],
    *,
    limit: int | None = None,
) -> list[tuple[Tile, Verdict]]:
    """Everything that was tried, beside the tile that ships.

    ``evaluate`` gets at most ``limit`` candidates in all. A tile that was tried is not tried again.
    """
    tried: dict[str, tuple[Tile, Verdict]] = {json.dumps(shipped): (shipped, {})}

    def attempt(tiles: Iterable[Tile]) -> None:
        new = {json.dumps(tile): tile for tile in tiles if set(tile) == set(shipped)}
        new = {key: {name: tile[name] for name in shipped} for key, tile in new.items()}
        unknown = [tile for tile in new.values() if json.dumps(tile) not in tried]
        if limit is not None:
            unknown = unknown[: max(limit - len(tried) + 1, 0)]
        if unknown:
            for tile, verdict in zip(unknown, evaluate(unknown), strict=True):
                tried[json.dumps(tile)] = (tile, verdict)

    def best() -> Tile:
        return min(tried.values(), key=lambda pair: score(pair[1]))[0]

    attempt(stored)
    while True:
        before = best()
        for key in shipped:
            tile = best()
            attempt({**tile, key: value} for value in values_of(choice, key, tile[key]))
        if best() == before:
            return [pair for pair in tried.values() if pair[0] != shipped]


def score(verdict: Verdict) -> float:
    """The geometric mean of the ratios, 1 for the tile that ships; infinite where there is none or one is a loss."""
    if isinstance(verdict, str) or any(ratio > 1 + MAX_LOSS for ratio in verdict.values()):
        return math.inf
    return math.exp(sum(map(math.log, verdict.values())) / max(len(verdict), 1))


class Bench:
    """Checks and times the candidates of one job; ``attempting`` is told of a tile before it first runs."""

    def __init__(
        self,
        job: Job,
        shipped: Tile,
        sharing: Sequence[Problem],
        device: torch.device,
        *,
        rounds: int,
        attempting: Callable[[Tile | None], None] = lambda tile: None,
    ) -> None:
        self.job, self.shipped, self.device, self.rounds, self.attempting = job, shipped, device, rounds, attempting
        self.calls = {problem.name: (problem, problem.make()) for problem in sharing}
        with torch.inference_mode():
            self.expected = {
                name: problem.view(self.run(call, shipped)) for name, (problem, call) in self.calls.items()
            }

    def run(self, call: Callable[[], Outputs], tile: Tile) -> Outputs:
        """The op's outputs with a tile."""
        from gtp_kernels.triton import configs

        dtype = getattr(torch, self.job.dtype)
        with configs.override(self.job.choice, tile, dtype, **dict(self.job.dimensions)):
            return tuple(call())

    def refusal(self, tile: Tile) -> str | None:
        """Why a candidate is not timed."""
        self.attempting(tile)
        try:
            for name, (problem, call) in self.calls.items():
                with torch.inference_mode():
                    outputs = problem.view(self.run(call, tile))
                    if self.device.type == "cuda":
                        torch.cuda.synchronize()
                found = difference(outputs, self.expected[name], problem)
                if found is not None:
                    return found
        except Exception as error:
            # Whatever a compiler or a launch makes of a bad tile.
            return f"{type(error).__name__}: {str(error).strip()[:200]}"
        finally:
            self.attempting(None)
        return None

    def evaluate(self, tiles: list[Tile], rounds: int | None = None) -> list[Verdict]:
        """Each candidate's time over that of the tile that ships, by problem, or why it has none."""
        from benchmarks.measure import measure

        reasons = [self.refusal(tile) for tile in tiles]
        ratios: list[dict[str, float]] = [{} for _ in tiles]
        timed = {str(index): tile for index, tile in enumerate(tiles) if reasons[index] is None}
        for name, (_, call) in self.calls.items():
            if not timed:
                break
            candidates = {
                label: (lambda call=call, tile=tile: self.run(call, tile))
                for label, tile in {"shipped": self.shipped, **timed}.items()
            }
            with torch.inference_mode():
                spreads, _ = measure(candidates, self.device, rounds=rounds or self.rounds, warmup=0, min_seconds=0)
            for label in timed:
                ratios[int(label)][name] = median(spreads[label].ratio(spreads["shipped"]).samples)
        return [found if reason is None else reason for reason, found in zip(reasons, ratios, strict=True)]

    def spills(self, tile: Tile) -> str | None:
        """Why ``benchmarks.compile_check`` would refuse the tile on this machine; None where it would not."""
        from benchmarks.compile_check import Result, compile_launch
        from benchmarks.launches import TARGETS, Recorder
        from gtp_kernels.triton import configs, runtime

        target = TARGETS.get(configs.architecture(self.device))
        if target is None or runtime.INTERPRETED:
            return None
        recorder = Recorder(target)
        with _launching(recorder):
            for _, call in self.calls.values():
                self.run(call, tile)
        failures = [Result(target, one, compile_launch(one, target)).failure for one in recorder.launches.values()]
        return next(filter(None, failures), None)


def tune(
    job: Job,
    shipped: Tile,
    bench: Bench,
    stored: Iterable[Tile] = (),
    *,
    crashed: Sequence[Tile] = (),
    limit: int | None = None,
) -> dict[str, Any]:
    """Searches, times the best again with more rounds, and says what was found."""
    earlier: Verdict = "the process ended while it ran"

    def evaluate(tiles: list[Tile]) -> list[Verdict]:
        fresh = iter(bench.evaluate([tile for tile in tiles if tile not in crashed]))
        return [earlier if tile in crashed else next(fresh) for tile in tiles]

    tried = search(job.choice, shipped, stored, evaluate, limit=limit)
    winner, ratio = shipped, 1.0
    for tile, verdict in sorted(tried, key=lambda pair: score(pair[1])):
        if score(verdict) > 1 - MIN_GAIN:
            break
        (again,) = bench.evaluate([tile], rounds=3 * bench.rounds if bench.rounds > 1 else 1)
        why = bench.spills(tile) if score(again) <= 1 - MIN_GAIN else "not as fast when timed again"
        if why is None:
            winner, ratio = tile, score(again)
            break
        tried[[other for other, _ in tried].index(tile)] = (tile, why)
    return {
        "choice": job.choice,
        "dtype": job.dtype,
        "dimensions": dict(job.dimensions),
        "limits": limits_of(job, bench.device),
        "problems": list(bench.calls),
        "shipped": shipped,
        "tile": winner,
        "ratio": ratio,
        "tried": [
            {"tile": tile, "why": verdict} if isinstance(verdict, str) else {"tile": tile, "ratios": verdict}
            for tile, verdict in tried
        ],
    }


def limits_of(job: Job, device: torch.device) -> dict[str, int]:
    """How far the entry that now answers reaches, for those of the job's dimensions that it limits."""
    from gtp_kernels.triton import configs

    dtype, known = getattr(torch, job.dtype), dict(job.dimensions)
    stored = [*configs.load(configs.architecture(device)).get(job.choice, ()), *configs.load("default")[job.choice]]
    entry: Mapping[str, Any] = next(entry for entry in stored if configs.matches(entry, dtype, known))
    return {name: entry[f"max_{name}"] for name in known if f"max_{name}" in entry}


def entries(jobs: Iterable[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The entries of ``<arch>.json``: every class of a choice and dtype that was tuned, where any tile of it changed.

    A class is met by its own entry first: entries go from the smallest dimensions to the largest. The largest class
    below a limit of the entry that shipped stands for all up to that limit.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for job in jobs:
        groups.setdefault((job["choice"], job["dtype"]), []).append(job)
    found: dict[str, list[dict[str, Any]]] = {}
    for (choice, dtype), several in groups.items():
        if all(job["tile"] == job["shipped"] for job in several):
            continue
        for job in sorted(several, key=lambda job: math.prod(max(value, 1) for value in job["dimensions"].values())):
            limits = {}
            for name, value in job["dimensions"].items():
                limit = job["limits"].get(name, value)
                others = (other["dimensions"][name] for other in several)
                limits[f"max_{name}"] = value if any(value < other <= limit for other in others) else limit
            found.setdefault(choice, []).append({"dtypes": [dtype], **limits, "tile": job["tile"]})
    return found


def merged(
    before: Mapping[str, list[dict[str, Any]]], new: Mapping[str, list[dict[str, Any]]]
) -> dict[str, list[dict[str, Any]]]:
    """The entries of a file with new ones before them; those of the same conditions are replaced."""

    def conditions(entry: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in entry.items() if key != "tile"}

    out = dict(before)
    for choice, several in new.items():
        known = [conditions(entry) for entry in several]
        out[choice] = [*several, *(e for e in before.get(choice, ()) if conditions(e) not in known)]
    return out


def dump(content: Mapping[str, list[dict[str, Any]]]) -> str:
    """The text of a file: an entry per line, as in ``default.json``."""
    lists = [
        f' "{choice}": [\n' + ",\n".join(f"  {json.dumps(entry)}" for entry in several) + "\n ]"
        for choice, several in content.items()
    ]
    return "{\n" + ",\n".join(lists) + "\n}\n"


def write(report: Mapping[str, Any], folder: Path) -> Path | None:
    """Adds what a report found to ``<arch>.json``; None where no tile changed.

    Raises:
        ValueError: the report is of no architecture that ships.
    """
    report = report.get("pieces", {}).get("tune", {}).get("found", report)
    if report.get("tiny") or not str(report.get("arch", "")).startswith(("sm_", "gfx")):
        raise ValueError("not the report of a GPU: there is nothing to write")
    new = entries(report["jobs"].values())
    if not new:
        return None
    path = folder / f"{report['arch']}.json"
    before = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(dump(merged(before, new)))
    return path


def _identity(arch: str, device: torch.device, tiny: bool) -> dict[str, Any]:
    """What a report must be of, so that its jobs need not be done again."""
    import triton

    from benchmarks.measure import device_name

    folder = Path(__file__).resolve().parents[1] / "gtp_kernels" / "triton"
    sources = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    return {
        "arch": arch, "name": device_name(device), "torch": torch.__version__, "triton": triton.__version__,
        "kernels": hashlib.sha256(sources).hexdigest()[:12], "tiny": tiny,
    }  # fmt: skip


def run(
    *, choices: Sequence[str], output: Path | None, tiny: bool, budget: float, rounds: int, device: torch.device
) -> tuple[dict[str, Any], bool]:
    """Tunes until the time is up: the report, and whether every job was done."""
    import gtp_kernels
    from benchmarks.measure import provenance
    from gtp_kernels.triton import configs

    end = time.monotonic() + budget
    arch = configs.architecture(device)
    identity = _identity(arch, device, tiny)
    report: dict[str, Any] = {**identity, **provenance(device), "jobs": {}, "crashed": [], "trying": None}
    earlier = _load(output)
    if all(earlier.get(key) == value for key, value in identity.items()):
        report["jobs"], report["crashed"] = earlier.get("jobs", {}), earlier.get("crashed", [])
        if earlier.get("trying"):
            report["crashed"].append(earlier["trying"])

    def save() -> None:
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(report, indent=1) + "\n")

    complete = True
    with gtp_kernels.use_backend("triton"):
        with torch.inference_mode():
            jobs = survey(problems(device, tiny=tiny))
        for job, (shipped, sharing) in jobs.items():
            if (choices and job.choice not in choices) or job.key in report["jobs"]:
                continue
            if time.monotonic() > end:
                complete = False
                break

            def attempting(tile: Tile | None, key: str = job.key) -> None:
                report["trying"] = None if tile is None else {"job": key, "tile": tile}
                save()

            known = [load for name in ("default", arch) for load in configs.load(name).get(job.choice, [])]
            bench = Bench(job, shipped, sharing, device, rounds=rounds, attempting=attempting)
            found = tune(
                job, shipped, bench, [dict(entry["tile"]) for entry in known], limit=1 if tiny else None,
                crashed=[one["tile"] for one in report["crashed"] if one["job"] == job.key],
            )  # fmt: skip
            report["jobs"][job.key] = found
            save()
            change = "as it ships" if found["tile"] == shipped else f"{found['ratio']:.3f} with {found['tile']}"
            print(f"{job.key}: {len(found['tried'])} tried, {change}", flush=True)
    save()
    return report, complete


def _load(path: Path | None) -> dict[str, Any]:
    try:
        return {} if path is None else dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}


def main(arguments: list[str] | None = None) -> int:
    """Tunes, or applies a report; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--choice", action="append", default=[], help="only this one; may be given again")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the report, written after every step")
    parser.add_argument("--write", action="store_true", help="write what was found into the package")
    parser.add_argument("--apply", type=Path, metavar="FILE", help="write what this report found, and tune nothing")
    parser.add_argument("--tiny", action="store_true", help="one candidate on tiny shapes; nothing is written")
    parser.add_argument("--budget", type=float, default=450, help="seconds (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="samples of each candidate (default: %(default)s)")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() and not options.tiny else "cpu")
    if options.apply is None and device.type == "cpu":
        if not options.tiny:
            print("torch sees no GPU here; --tiny tries the tool without one", file=sys.stderr)
            return 2
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported

    from gtp_kernels.triton import configs

    complete = True
    if options.apply is not None:
        report = _load(options.apply)
    else:
        report, complete = run(
            choices=options.choice, output=options.json, tiny=options.tiny, budget=options.budget,
            rounds=1 if options.tiny else options.rounds, device=device,
        )  # fmt: skip
    if options.apply is not None or (options.write and not options.tiny):
        path = write(report, configs.FOLDER)
        print("no tile changed" if path is None else f"{path}: check it with make compile-check")
    return 0 if complete else 3


if __name__ == "__main__":
    sys.exit(main())
