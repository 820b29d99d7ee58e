"""Timing that can be trusted on a shared machine: candidates take turns, and every number has its spread."""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles; `samples` are in the order in which they were taken."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.samples))

    @property
    def low(self) -> float:
        """The first quartile."""
        return float(np.quantile(self.samples, 0.25))

    @property
    def high(self) -> float:
        """The third quartile."""
        return float(np.quantile(self.samples, 0.75))

    def per_second(self, items: float = 1.0) -> Spread:
        """Seconds per call turned into items per second, where one call handles `items`."""
        return Spread(tuple(items / sample for sample in self.samples))

    def ratio(self, other: Spread) -> Spread:
        """This over the other, round by round: what slows a whole round cancels.

        Raises:
            ValueError: the two have different numbers of samples.
        """
        if len(self.samples) != len(other.samples):
            raise ValueError(f"other: expected {len(self.samples)} samples, got {len(other.samples)}")
        return Spread(tuple(mine / theirs for mine, theirs in zip(self.samples, other.samples, strict=True)))


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 10,
    warmup: int = 2,
    device: torch.device | str = "cpu",
    min_seconds: float = 0.0,
    before_each: Callable[[], object] | None = None,
    progress: Callable[[], object] | None = None,
) -> dict[str, Spread]:
    """Seconds per call of every candidate, measured in turns: A B A B.

    Args:
        candidates: what to time, by name; each is called without arguments.
        rounds: how many samples each gets.
        warmup: calls of each before the first sample.
        device: where the work runs; anything but the CPU is synchronised around every sample.
        min_seconds: a sample repeats its call until it should last this long, judged by the warm-up.
        before_each: runs untimed before every sample, to empty a cache for instance.
        progress: called after every warm-up call and every sample, (warmup + rounds) * len(candidates) times.

    Raises:
        ValueError: no candidates, fewer than one round, or a negative warm-up.
    """
    if not candidates:
        raise ValueError("candidates: expected at least one")
    if rounds < 1 or warmup < 0:
        raise ValueError(f"rounds, warmup: expected at least 1 and 0, got {rounds} and {warmup}")
    device = torch.device(device)

    def sample(call: Callable[[], object], repeats: int) -> float:
        if before_each is not None:
            before_each()
        synchronise(device)
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        synchronise(device)
        seconds = (time.perf_counter() - start) / repeats
        if progress is not None:
            progress()
        return seconds

    repeats = dict.fromkeys(candidates, 1)
    for _ in range(warmup):
        for name, call in candidates.items():
            repeats[name] = max(1, int(np.ceil(min_seconds / max(sample(call, 1), 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            samples[name].append(sample(call, repeats[name]))
    return {name: Spread(tuple(values)) for name, values in samples.items()}


def synchronise(device: torch.device) -> None:
    """Waits until the device has done what it was given; the CPU has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def processor_name() -> str:
    """The CPU's name for people."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
