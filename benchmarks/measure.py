"""Measuring: candidates in turns, the machine's ceilings, and where the numbers come from."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

import gtp_kernels
from gtp_kernels import native
from gtp_vit.timing import Spread, interleave, processor_name

Call = Callable[[], object]


@dataclass(frozen=True)
class Ceilings:
    """What this machine was measured to do: a copy's bytes per second, read and written, and FLOPs per second."""

    bytes_per_second: float
    flops_per_second: float

    def seconds(self, num_bytes: int, flops: int) -> float:
        """The least time for this traffic and these products, each at its ceiling."""
        return max(num_bytes / self.bytes_per_second, flops / self.flops_per_second)


def measure_ceilings(device: torch.device, dtype: torch.dtype, *, tiny: bool = False) -> Ceilings:
    """The best of several copies, far larger than the caches, and of several square matrix products."""
    on_gpu = device.type != "cpu"
    side = 64 if tiny else 8192 if on_gpu else 2048
    count = 2**16 if tiny else 2**30 if on_gpu else 2**27
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a = torch.randn(side, side, device=device).to(dtype)
    copy = best(lambda: target.copy_(source), device)
    product = best(lambda: a @ a, device)
    return Ceilings(2 * count / copy, 2 * side**3 / product)


def best(call: Call, device: torch.device, rounds: int = 7) -> float:
    """The shortest of ``rounds`` calls, in seconds."""
    return min(interleave({"": call}, rounds=rounds, device=device)[""].samples)


def measure(
    calls: Mapping[str, Call],
    device: torch.device,
    *,
    rounds: int,
    warmup: int = 2,
    min_seconds: float = 0.02,
    progress: Call | None = None,
) -> tuple[dict[str, Spread], dict[str, str]]:
    """Seconds per call of every candidate, in turns, and how each was run: ``eager`` or ``graph``.

    ``progress`` is called after every call of a candidate, (warmup + rounds) · len(calls) times.

    On a CUDA device every candidate is captured into a CUDA graph where it can be, so that kernels are timed and not
    their launches, and the L2 cache is emptied before every sample; the device's own clock is read.
    """
    if device.type != "cuda":
        spreads = interleave(
            calls, rounds=rounds, warmup=warmup, device=device, min_seconds=min_seconds, progress=progress
        )
        return spreads, dict.fromkeys(calls, "eager")
    captured = {name: _graph(call) for name, call in calls.items()}
    modes = {name: "eager" if replay is None else "graph" for name, replay in captured.items()}
    ready = {name: captured[name] or call for name, call in calls.items()}
    cache = torch.empty(256 * 2**20, dtype=torch.uint8, device=device)
    samples: dict[str, list[float]] = {name: [] for name in ready}
    for number in range(-warmup, rounds):
        for name, call in ready.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # The host runs ahead while the cache is being emptied, so that launches are not what is timed.
            cache.zero_()
            start.record()
            call()
            end.record()
            end.synchronize()
            if number >= 0:
                samples[name].append(start.elapsed_time(end) / 1e3)
            if progress is not None:
                progress()
    return {name: Spread(tuple(values)) for name, values in samples.items()}, modes


def _graph(call: Call) -> Call | None:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def device_name(device: torch.device) -> str:
    """For people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor_name()


def slug(name: str) -> str:
    """A folder's name: ``NVIDIA H200`` becomes ``nvidia-h200``."""
    return "-".join(name.lower().replace("/", " ").replace("_", "-").split())


def provenance(device: torch.device | None = None) -> dict[str, object]:
    """Date, commit, machine, device, driver and versions."""
    device = device or torch.device("cpu")
    root = Path(__file__).resolve().parents[1]
    commit = _output("git", "-C", str(root), "describe", "--always", "--dirty", "--exclude", "*")
    # A copy of the tree may have come without its history.
    commit = commit or os.environ.get("GTP_COMMIT")
    extension = native.extension()
    found: dict[str, object] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "source": source_digest(),
        "machine": platform.machine(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "gtp_kernels": gtp_kernels.__version__,
        "native": None if extension is None else extension.build_info(),
    }
    if device.type == "cuda":
        found["cuda"] = torch.version.cuda or torch.version.hip
        found["driver"] = _driver()
        found["capability"] = list(torch.cuda.get_device_capability(device))
    return found


def source_digest() -> str:
    """Of what runs: the packages and the benchmarks. Equal for equal sources, whatever was committed."""
    root = Path(__file__).resolve().parents[1]
    patterns = ("gtp_kernels/**/*", "python/**/*", "benchmarks/*", "csrc/**/*")
    suffixes = (".py", ".json", ".txt", ".cpp", ".h", ".cu", ".cuh")
    found = sorted({path for pattern in patterns for path in root.glob(pattern) if path.suffix in suffixes})
    # Made of results: with it, writing it would make them those of other sources.
    found = [path for path in found if path.name != "evidence.json"]
    digest = hashlib.sha256()
    for path in found:
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _driver() -> str | None:
    found = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if found is not None:
        return found.splitlines()[0]
    for path in (Path("/proc/driver/nvidia/version"), Path("/sys/module/amdgpu/version")):
        if path.is_file():
            return path.read_text().strip().splitlines()[0]
    return None


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def as_json(ceilings: Ceilings) -> dict[str, float]:
    """For reports."""
    return asdict(ceilings)
