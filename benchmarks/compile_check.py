"""``python -m benchmarks.compile_check``: compiles every GPU kernel that ships to machine code, without a GPU.

Every Triton kernel is compiled with every configuration that a launcher chooses over the shape classes of
``benchmarks.launches``. The table says, for each kernel and architecture, the span of its configurations: registers,
bytes spilled, shared memory, and the share of a multiprocessor's warps that these leave room for. The check fails where
a kernel does not compile, needs more shared memory than a block may have, or spills. The CUDA C++ kernels follow, where
there is an nvcc (``benchmarks.compile_check_cuda``).

python -m benchmarks.compile_check                                sm_80, sm_90, sm_120, gfx942; each configuration once
python -m benchmarks.compile_check --all --json report.json       every supported architecture, every specialisation
python -m benchmarks.compile_check --arch sm_90 --kernel attention --verbose
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import compile_check_cuda, compile_report
from benchmarks.compile_report import cache_folder, coloured, span, verdict
from benchmarks.launches import TARGETS, Launch, Target, capture, one_per_configuration


@dataclass(frozen=True)
class Resources:
    """What one kernel needs on one architecture; ``error`` where it did not compile.

    ``seconds`` is how long the compilers took. ``spills`` are bytes of loads and stores (NVIDIA), or vector registers
    in memory (AMD: scalar registers that are kept in lanes of vector registers cost no memory and are not counted).
    """

    registers: int = 0
    spills: int = 0
    shared: int = 0
    seconds: float = 0.0
    error: str | None = None


@dataclass(frozen=True)
class Result:
    """One launch on one target."""

    target: Target
    launch: Launch
    resources: Resources
    cached: bool = False

    @property
    def num_warps(self) -> int:
        """Warps of a block."""
        return int(self.launch.options.get("num_warps", 4))

    @property
    def occupancy(self) -> float:
        """The share of a multiprocessor's warps that fit."""
        return self.target.occupancy(self.resources.registers, self.resources.shared, self.num_warps)

    @property
    def failure(self) -> str | None:
        """Why this launch must not ship; None where it may."""
        if self.resources.error is not None:
            return self.resources.error
        if self.resources.shared > self.target.max_shared:
            return f"needs {self.resources.shared} bytes of shared memory; a block has {self.target.max_shared}"
        if self.occupancy == 0:
            return f"{self.resources.registers} registers for each of {self.num_warps} warps do not fit"
        if self.resources.spills and self.launch.may_spill is None:
            return f"spills: {self.resources.spills}"
        return None

    def as_json(self) -> dict[str, object]:
        """For the report."""
        return {
            "arch": self.target.name,
            "kernel": self.launch.name,
            "config": self.launch.config(),
            "options": self.launch.options,
            "shape_classes": sorted(set(self.launch.labels)),
            **asdict(self.resources),
            "occupancy": round(self.occupancy, 4),
            "may_spill": self.launch.may_spill,
            "failure": self.failure,
        }


def compile_launch(launch: Launch, target: Target) -> Resources:
    """Compiles one launch with the compilers that Triton carries, and reads what it needs off their reports."""
    import triton
    from triton import knobs
    from triton.compiler import ASTSource

    source = ASTSource(launch.kernel, launch.signature, launch.constexprs, launch.attrs)
    output, start = io.StringIO(), time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        _knobs(knobs, folder),
        contextlib.redirect_stdout(output),
        _diagnostics() as diagnostics,
    ):
        try:
            compiled = triton.compile(source, target=target.gpu_target(), options=dict(launch.options))
            assembly = {kind: str(compiled.asm[kind]) for kind in ("amdgcn",) if kind in compiled.asm}
            shared = int(compiled.metadata.shared)
        except Exception as error:
            # Of the compiler's own passes: any kind of error is a finding about the kernel.
            lines = [line for line in diagnostics() if "error:" in line or "LLVM ERROR" in line]
            return Resources(error="; ".join([f"{type(error).__name__}: {error}".strip(), *lines])[:2000])
    seconds = round(time.perf_counter() - start, 2)
    resources = _from_ptxas(output.getvalue()) if target.is_cuda else _from_amdgcn(assembly["amdgcn"])
    return replace(resources, shared=shared, seconds=seconds)


@contextlib.contextmanager
def _knobs(knobs: object, folder: str) -> Iterator[None]:
    """ptxas's report is printed, and nothing is taken from or left in the user's Triton cache.

    Line numbers are left out, which need a fifth of the compilers' time on sm_90 and change no register count: 24.3 and
    19.1 s of CPU time for the same 43 configurations.
    """
    cache, nvidia, compilation = knobs.cache, knobs.nvidia, knobs.compilation  # type: ignore[attr-defined]  # a module
    before = cache.dir, nvidia.dump_ptxas_log, compilation.disable_line_info
    cache.dir, nvidia.dump_ptxas_log, compilation.disable_line_info = folder, True, True
    try:
        yield
    finally:
        cache.dir, nvidia.dump_ptxas_log, compilation.disable_line_info = before


@contextlib.contextmanager
def _diagnostics() -> Iterator[Callable[[], list[str]]]:
    """Its value gives the lines that the compiler, which is not Python, wrote to the standard error stream."""
    with tempfile.TemporaryFile() as file:
        sys.stderr.flush()
        before = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield lambda: (file.seek(0), file.read().decode(errors="replace").splitlines())[1]
        finally:
            os.dup2(before, 2)
            os.close(before)


def _from_ptxas(log: str) -> Resources:
    registers = re.findall(r"Used (\d+) registers", log)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if not registers or not spills:
        return Resources(error=f"ptxas reported no registers: {log[-500:]}")
    return Resources(max(map(int, registers)), sum(int(value) for pair in spills for value in pair))


def _from_amdgcn(assembly: str) -> Resources:
    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", assembly)
        if found is None:
            raise ValueError(f"the assembly has no .{name}")
        return int(found.group(1))

    # The unified file of CDNA holds accumulation registers too; .vgpr_count is the sum.
    return Resources(field("vgpr_count"), field("vgpr_spill_count"))


def check(
    launches: Mapping[str, Sequence[Launch]],
    *,
    jobs: int | None = None,
    cache: Path | None = None,
    console: Console | None = None,
) -> list[Result]:
    """Compiles launches, by the name of their target, in ``jobs`` processes; ``cache`` holds earlier results."""
    work = [(TARGETS[name], launch) for name, several in launches.items() for launch in several]
    paths = [None if cache is None else cache / f"{_digest(launch, target)}.json" for target, launch in work]
    found = [_load(path) for path in paths]
    todo = [index for index, resources in enumerate(found) if resources is None]
    results = {i: Result(*work[i], resources, cached=True) for i, resources in enumerate(found) if resources}
    for index, resources in _compile_all(work, todo, jobs or os.cpu_count() or 1, console):
        results[index] = Result(*work[index], resources)
        path = paths[index]
        if path is not None and resources.error is None:
            compile_report.store(path, asdict(resources))
    return [results[index] for index in range(len(work))]


def _digest(launch: Launch, target: Target) -> str:
    import triton

    # The kernel's key holds its source and that of what it calls; the rest is Triton's, compilers included.
    return hashlib.sha256(f"2 {triton.__version__} {target.name} {launch.key()}".encode()).hexdigest()


def _load(path: Path | None) -> Resources | None:
    try:
        found = compile_report.load(path)
        return None if found is None else Resources(**found)
    except TypeError:
        return None


_WORK: list[tuple[Target, Launch]] = []


def _compile_one(index: int) -> Resources:
    # Kernels cannot be pickled: the processes are forked, and find the work where it was.
    target, launch = _WORK[index]
    return compile_launch(launch, target)


def _compile_all(
    work: list[tuple[Target, Launch]], todo: list[int], jobs: int, console: Console | None
) -> Iterator[tuple[int, Resources]]:
    global _WORK
    _WORK = work
    left = set(todo)
    with Progress(console=console, transient=True, disable=console is None) as progress:
        task = progress.add_task("compiling", total=len(todo))
        # A compiler that crashes takes the pool with it; then the rest goes one by one, to see which one it was.
        for groups in ([todo], ([index] for index in todo)):
            for group in groups:
                for index, resources in _run(sorted(left & set(group)), min(jobs, len(group))):
                    if resources is None and len(group) > 1:
                        continue
                    left.discard(index)
                    progress.advance(task)
                    yield index, resources or Resources(error="the compiler crashed")


def _run(indices: list[int], jobs: int) -> Iterator[tuple[int, Resources | None]]:
    if not indices:
        return
    with warnings.catch_warnings():
        # Python 3.12 warns of threads at a fork; the children only compile.
        warnings.simplefilter("ignore", DeprecationWarning)
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork")) as pool:
            futures: dict[Future[Resources], int] = {pool.submit(_compile_one, index): index for index in indices}
            for future in as_completed(futures):
                error = future.exception()
                if error is not None and not isinstance(error, BrokenProcessPool):
                    raise error
                yield futures[future], None if error is not None else future.result()


def table_of(results: Iterable[Result], *, verbose: bool = False) -> Table:
    """A row for each kernel and target, the span of its configurations in every column; ``verbose``: a row for each."""
    groups: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        key: tuple[str, ...] = (result.launch.name, result.target.name)
        if verbose:
            key += (result.launch.config(), f"{result.num_warps} warps, {result.launch.options.get('num_stages', '-')}")
        groups.setdefault(key, []).append(result)
    rows = {}
    for key, group in groups.items():
        good = [r for r in group if r.resources.error is None]
        rows[key] = (
            *(() if verbose else (str(len(group)),)),
            span(r.resources.registers for r in good),
            coloured(max((r.resources.spills for r in good), default=0)),
            span((r.resources.shared / 1024 for r in good), "{:.1f}"),
            span((r.occupancy * 100 for r in good), "{:.0f}") + " %",
            verdict(sum(r.failure is not None for r in group)),
        )
    keys = ("kernel", "arch", *(("constants", "warps, stages") if verbose else ()))
    columns = (*(() if verbose else ("configurations",)), "registers", "spills", "shared KB", "occupancy")
    return compile_report.table_of("Triton, compiled ahead of time", keys, columns, rows)


@click.command(help=__doc__)
@click.option("--arch", "names", multiple=True, type=click.Choice(list(TARGETS)), help="Architectures.")
@click.option("--all", "every", is_flag=True, help="Every supported architecture, and every specialisation.")
@click.option(
    "--kernel", default="", help="Only kernels whose name, or the operator that launches them, contains this."
)
@click.option("--verbose", is_flag=True, help="A row for every configuration.")
@click.option("--jobs", default=None, type=int, help="Processes; one per core by default.")
@click.option("--no-cache", is_flag=True, help="Compile anew what is known from before.")
@click.option("--json", "output", default=None, type=click.Path(path_type=Path), help="Also write a report here.")
def main(
    names: tuple[str, ...],
    every: bool,
    kernel: str,
    verbose: bool,
    jobs: int | None,
    no_cache: bool,
    output: Path | None,
) -> None:
    """Compiles, prints, and exits with 1 where a kernel must not ship."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    targets = [t for t in TARGETS.values() if (t.name in names if names else every or t.core)]
    launches = {target.name: _chosen(capture(target), kernel) for target in targets}
    if not every:
        launches = {name: one_per_configuration(several) for name, several in launches.items()}
    sources = compile_check_cuda.sources(kernel)
    if not any(launches.values()) and not sources:
        raise click.UsageError(f"no kernel matches {kernel!r}")
    cache = None if no_cache else cache_folder()
    report: dict[str, object] = {}
    failures = 0
    if any(launches.values()):
        results = check(launches, jobs=jobs, cache=cache, console=console)
        failures += _print(
            console,
            table_of(results, verbose=verbose),
            [
                f"{r.launch.name} on {r.target.name} ({r.launch.config()}; num_warps={r.num_warps}; "
                f"{r.launch.labels[0]}): {r.failure}"
                for r in results
                if r.failure is not None
            ],
            [r.cached for r in results],
        )
        report["results"] = [result.as_json() for result in results]
    architectures = [target.name for target in targets if target.is_cuda]
    if sources and architectures:
        nvcc, tried = compile_check_cuda.find_nvcc()
        if nvcc is None:
            line = "; ".join(["CUDA C++ not compiled: there is no nvcc that works", *tried])
            console.print(line, markup=False, highlight=False)
        else:
            compiled = compile_check_cuda.check(
                sources, architectures, nvcc, jobs=min(jobs or os.cpu_count() or 1, 2), cache=cache, console=console
            )
            failures += _print(
                console,
                compile_check_cuda.table_of(compiled, verbose=verbose),
                [reason for result in compiled for reason in result.failures],
                [result.cached for result in compiled],
            )
            report["cuda"] = [asdict(result) for result in compiled]
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(1 if failures else 0)


def _print(console: Console, table: Table, failures: Sequence[str], cached: Sequence[bool]) -> int:
    console.print(table)
    for failure in failures:
        console.print(failure, style="red", markup=False, highlight=False)
    console.print(f"{len(cached)} compilations, {sum(cached)} of them known from before; {len(failures)} failures")
    return len(failures)


def _chosen(launches: list[Launch], part: str) -> list[Launch]:
    return [launch for launch in launches if part in launch.name or any(part in label for label in launch.labels)]


if __name__ == "__main__":
    main()
