"""Compiles every ``csrc/cuda/*.cu`` to machine code, without a GPU; ``python -m benchmarks.compile_check`` calls it.

The compiler is the nvcc that the build would take. ptxas reports registers, stack, spills and static shared memory of
every kernel; the tensor-core instructions are counted in its disassembly. A kernel fails where it spills or has a stack
(an array that is indexed at run time lies in local memory, as slow as a spill), a source where it does not compile or
where ptxas warns, as it does of launch bounds that it ignores.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import compile_report
from benchmarks.compile_report import ROOT, coloured, span, verdict

SOURCES = ROOT / "csrc" / "cuda"
# What CMakeLists.txt gives device code.
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG")
# Kernels, by name, that may use local memory, each with the reason.
MAY_SPILL: dict[str, str] = {}


@dataclass(frozen=True)
class Kernel:
    """One entry of one source on one architecture; sizes in bytes, those of what it calls included.

    ``name`` is as in the source, ``arguments`` are those of the template. ``tensor_core`` counts instructions of the
    machine code, None where there is nothing to disassemble it with.
    """

    name: str
    arguments: str
    registers: int
    spills: int
    stack: int
    shared: int
    tensor_core: int | None = None

    @property
    def failure(self) -> str | None:
        """Why it must not ship; None where it may."""
        if self.name in MAY_SPILL:
            return None
        if self.spills:
            return f"spills: {self.spills} bytes"
        return f"stack: {self.stack} bytes" if self.stack else None


@dataclass(frozen=True)
class Result:
    """One source on one architecture; ``error`` where it did not compile."""

    source: str
    arch: str
    kernels: tuple[Kernel, ...] = ()
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0
    error: str | None = None
    cached: bool = False

    @property
    def failures(self) -> list[str]:
        """Why it must not ship, a line for each reason."""
        reasons = [self.error] if self.error is not None else []
        reasons += self.warnings
        reasons += [f"{k.name}{k.arguments}: {k.failure}" for k in self.kernels if k.failure is not None]
        return [f"{self.source} on {self.arch}: {reason}" for reason in reasons]


@functools.cache
def _setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gtp_kernels_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def find_nvcc() -> tuple[str | None, tuple[str, ...]]:
    """The nvcc that the build would take, and what was tried before it."""
    found: tuple[str | None, tuple[str, ...]] = _setup().find_nvcc()
    return found


def find_nvdisasm() -> str | None:
    """As pip installs it, or on the PATH."""
    folders = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu[0-9]*/bin"), reverse=True)
    places = (*map(str, folders), None)
    return next((path for path in (shutil.which("nvdisasm", path=place) for place in places) if path), None)


def sources(part: str = "") -> list[Path]:
    """The sources whose name or text contains ``part``."""
    return [path for path in sorted(SOURCES.glob("*.cu")) if part in path.stem or part in path.read_text()]


def check(
    paths: Sequence[Path],
    architectures: Sequence[str],
    nvcc: str,
    *,
    jobs: int = 2,
    cache: Path | None = None,
    console: Console | None = None,
) -> list[Result]:
    """Compiles each source for each architecture, ``jobs`` at once; ``cache`` holds earlier results."""
    nvdisasm = find_nvdisasm()
    tools = [_version(nvcc), _version(nvdisasm) if nvdisasm else "no nvdisasm"]
    work = [(path, arch) for path in paths for arch in architectures]
    with (
        Progress(console=console, transient=True, disable=console is None) as progress,
        ThreadPoolExecutor(jobs) as pool,
    ):
        task = progress.add_task("compiling", total=len(work))

        def one(path: Path, arch: str) -> Result:
            kept = None if cache is None else cache / f"{_digest(path, arch, tools)}.json"
            result = _load(kept)
            if result is None:
                result = compile_source(path, arch, nvcc, nvdisasm)
                if kept is not None and result.error is None:
                    compile_report.store(kept, asdict(result))
            progress.advance(task)
            return result

        return list(pool.map(one, *zip(*work, strict=True))) if work else []


def compile_source(path: Path, arch: str, nvcc: str, nvdisasm: str | None) -> Result:
    """Compiles one source for one architecture, and reads what its kernels need off the reports."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / f"{path.stem}.cubin"
        command = [nvcc, *FLAGS, f"-arch={arch}", "-cubin", "-Xptxas=-v", "-I", str(ROOT / "csrc")]
        start = time.perf_counter()
        done = subprocess.run([*command, "-o", str(cubin), str(path)], capture_output=True, text=True, check=False)
        result = Result(path.name, arch, seconds=round(time.perf_counter() - start, 2))
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if re.search(r"error|fatal", line)]
            return replace(result, error="\n".join(lines or [done.stderr])[:2000])
        counts = _tensor_core(cubin, nvdisasm)
    try:
        kernels = kernels_of(done.stderr, counts)
    except ValueError as error:
        return replace(result, error=str(error))
    return replace(result, kernels=kernels, warnings=warnings_of(done.stderr))


def kernels_of(log: str, tensor_core: dict[str, int] | None = None) -> tuple[Kernel, ...]:
    """What ``ptxas -v`` says of each entry, and of the functions after it, which it calls."""
    _, *parts = re.split(r"^ptxas info\s*: Compiling entry function '(\S+)' for .*$", log, flags=re.MULTILINE)
    kernels = []
    for symbol, name, text in zip(parts[::2], demangled(parts[::2]), parts[1::2], strict=True):
        registers = re.search(r"Used (\d+) registers", text)
        memory = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
        if registers is None or not memory:
            raise ValueError(f"ptxas reported no registers for {name}: {text[-500:]}")
        stack, stores, loads = (sum(map(int, column)) for column in zip(*memory, strict=True))
        shared = re.search(r"(\d+) bytes smem", text)
        count = None if tensor_core is None else tensor_core.get(symbol)
        size = int(shared[1]) if shared else 0
        kernels.append(Kernel(*split_name(name), int(registers[1]), stores + loads, stack, size, count))
    return tuple(kernels)


def warnings_of(log: str) -> tuple[str, ...]:
    """What ptxas warns of, with the names of kernels as in the source."""
    lines = [line for line in log.splitlines() if re.match(r"ptxas\b.*\bwarning\s*:", line)]
    symbols = sorted({symbol for line in lines for symbol in re.findall(r"\b_Z\w+", line)})
    names = dict(zip(symbols, demangled(symbols), strict=True))
    return tuple(re.sub(r"\b_Z\w+", lambda found: "".join(split_name(names[found[0]])), line) for line in lines)


def split_name(name: str) -> tuple[str, str]:
    """``void gtp::cuda::rows<gtp::BFloat16, 4>(gtp::Params)`` as ``rows`` and ``<BFloat16, 4>``."""
    name = re.sub(r"\(anonymous namespace\)::|\bgtp::(cuda::)?", "", name)
    found = re.fullmatch(r"(?:void )?(.*?)(<.*>)?\(.*\)", name)
    return (found[1], found[2] or "") if found else (name, "")


def demangled(symbols: Sequence[str]) -> list[str]:
    """The names of symbols as in the source; without c++filt the symbols."""
    # binutils has it, without which nvcc's host compiler does not link either.
    if not symbols or shutil.which("c++filt") is None:
        return list(symbols)
    done = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def _tensor_core(cubin: Path, nvdisasm: str | None) -> dict[str, int] | None:
    """By symbol: HMMA, and on later architectures what else multiplies matrices; None where it cannot be read."""
    if nvdisasm is None:
        return None
    done = subprocess.run([nvdisasm, str(cubin)], capture_output=True, text=True, check=False)
    _, *parts = re.split(r"^\.text\.(\S+):$", done.stdout, flags=re.MULTILINE)
    counts = (len(re.findall(r"\b[A-Z]+MMA\b", text)) for text in parts[1::2])
    return None if done.returncode else dict(zip(parts[::2], counts, strict=True))


def _included(path: Path, seen: set[Path]) -> set[Path]:
    """A source and the files of ``csrc`` that it is made of."""
    if path not in seen and path.is_file():
        seen.add(path)
        for name in re.findall(r'^\s*#\s*include "([^"]+)"', path.read_text(), re.MULTILINE):
            for folder in (path.parent, ROOT / "csrc"):
                _included((folder / name).resolve(), seen)
    return seen


def _digest(path: Path, arch: str, tools: Sequence[str]) -> str:
    parts = [file.read_bytes() for file in sorted(_included(path.resolve(), set()))]
    made_by = "\0".join(["cuda 1", arch, *FLAGS, *tools, path.name, os.environ.get("NVCC_APPEND_FLAGS", "")])
    return hashlib.sha256(b"\0".join([made_by.encode(), *parts])).hexdigest()


def _version(tool: str) -> str:
    return subprocess.run([tool, "--version"], capture_output=True, text=True, check=False).stdout


def _load(path: Path | None) -> Result | None:
    found = compile_report.load(path)
    try:
        if found is None:
            return None
        kernels = tuple(Kernel(**kernel) for kernel in found.pop("kernels"))
        return Result(**{**found, "kernels": kernels, "warnings": tuple(found["warnings"]), "cached": True})
    except (KeyError, TypeError):
        return None


def table_of(results: Iterable[Result], *, verbose: bool = False) -> Table:
    """A row for each kernel and architecture, the span of its instantiations in every column; ``verbose``: for each."""
    groups: dict[tuple[str, ...], list[Kernel]] = {}
    for result in results:
        for kernel in result.kernels:
            key = (kernel.name, result.arch, *((kernel.arguments,) if verbose else ()))
            groups.setdefault(key, []).append(kernel)
    rows = {}
    for key, group in groups.items():
        rows[key] = (
            *(() if verbose else (str(len(group)),)),
            span(k.registers for k in group),
            coloured(max(k.spills for k in group)),
            coloured(max(k.stack for k in group)),
            span((k.shared / 1024 for k in group), "{:.1f}"),
            span(k.tensor_core for k in group if k.tensor_core is not None),
            verdict(sum(k.failure is not None for k in group)),
        )
    keys = ("kernel", "arch", *(("template arguments",) if verbose else ()))
    columns = (
        *(() if verbose else ("instantiations",)),
        *("registers", "spills", "stack", "static shared KB", "tensor-core instructions"),
    )
    return compile_report.table_of("CUDA C++, compiled ahead of time", keys, columns, rows)
