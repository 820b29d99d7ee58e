"""Tile choices are data: ``<architecture>.json`` beside this file, and ``default.json`` for what they do not say.

A file maps the name of a choice (``attention``, ``attention_backward``, ``nearest``, …) to a list of entries; the first
one that the shape class satisfies counts, first of the architecture's file, then of ``default.json``. ::

    {"attention": [{"dtypes": ["bfloat16", "float16"], "max_tokens": 256, "tile": {"rows": 32, "num_warps": 4}}]}

``dtypes`` and ``max_<name>`` (the largest value of that dimension) are the conditions, ``tile`` is what is chosen. The
last entry of every list of ``default.json`` has no condition: a shape or an architecture that nobody tuned for gets a
tile that compiles without spilling wherever it was tried. Nothing is searched at a user's first call;
``python -m benchmarks.tune`` writes these files on a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

FOLDER = Path(__file__).parent
DEFAULT = "default"


def architecture(device: torch.device) -> str:
    """The name of the device's architecture: ``sm_90``, ``gfx942``; ``interpreter`` for the CPU."""
    return _architecture(device.index or 0) if device.type == "cuda" else "interpreter"


@functools.lru_cache
def _architecture(index: int) -> str:
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(index).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


@functools.lru_cache
def load(name: str) -> dict[str, list[dict[str, Any]]]:
    """What ``<name>.json`` says; nothing where there is no such file."""
    path = FOLDER / f"{name}.json"
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def matches(entry: Mapping[str, Any], dtype: torch.dtype, dimensions: Mapping[str, int]) -> bool:
    """Whether a shape class satisfies the conditions of an entry."""
    for condition, limit in entry.items():
        if condition == "dtypes":
            if str(dtype).removeprefix("torch.") not in limit:
                return False
        elif condition.startswith("max_") and dimensions[condition.removeprefix("max_")] > limit:
            return False
    return True


def lookup(choice: str, device: torch.device, dtype: torch.dtype, **dimensions: int) -> Mapping[str, int]:
    """The tile of a shape class.

    Args:
        choice: the name of the choice.
        device: where the kernel will run.
        dtype: of the tensors that it reads.
        dimensions: what ``max_<name>`` refers to.

    Raises:
        KeyError: a choice that ``default.json`` does not have, or a condition on a dimension that was not given.
    """
    tile = _lookup(choice, architecture(device), dtype, tuple(sorted(dimensions.items())))
    return _overridden(Asked(choice, dtype, dimensions, tile)) if _overrides else tile


class Asked(NamedTuple):
    """One look-up: what was asked, and the tile that ships for it."""

    choice: str
    dtype: torch.dtype
    dimensions: dict[str, int]
    tile: Mapping[str, int]


class _Override(NamedTuple):
    choice: str | None
    tile: Mapping[str, int]
    dtype: torch.dtype | None
    dimensions: dict[str, int]
    asked: list[Asked]


_overrides: list[_Override] = []


@contextlib.contextmanager
def override(
    choice: str | None = None,
    tile: Mapping[str, int] | None = None,
    dtype: torch.dtype | None = None,
    **dimensions: int,
) -> Iterator[list[Asked]]:
    """For a tuner: ``lookup`` answers ``tile`` where ``choice``, and whatever else is given, is what it is asked for.

    Its value is the list of every look-up that is made while it is open. Without a choice nothing is overridden. The
    innermost override that applies counts. It holds for the whole process, since a backward may run in a thread of
    its own; look-ups are not remembered beyond it.

    Raises:
        ValueError: a choice without a tile, or a tile without a choice.
    """
    if (choice is None) != (tile is None):
        raise ValueError(f"override takes a choice together with a tile; got {choice!r} and {tile!r}")
    entry = _Override(choice, MappingProxyType(dict(tile or {})), dtype, dimensions, [])
    _overrides.append(entry)
    try:
        yield entry.asked
    finally:
        _overrides[:] = [other for other in _overrides if other is not entry]


def _overridden(asked: Asked) -> Mapping[str, int]:
    tile = asked.tile
    for entry in _overrides:
        entry.asked.append(asked)
        if (
            entry.choice == asked.choice
            and entry.dtype in (None, asked.dtype)
            and all(asked.dimensions.get(name) == value for name, value in entry.dimensions.items())
        ):
            tile = entry.tile
    return tile


@functools.lru_cache(maxsize=4096)
def _lookup(choice: str, arch: str, dtype: torch.dtype, dimensions: tuple[tuple[str, int], ...]) -> Mapping[str, int]:
    known = dict(dimensions)
    for entry in (*load(arch).get(choice, ()), *load(DEFAULT)[choice]):
        if matches(entry, dtype, known):
            return MappingProxyType(dict(entry["tile"]))
    raise KeyError(f"{choice}: no entry of {DEFAULT}.json takes {dtype} {known}")
