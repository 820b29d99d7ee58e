"""Loads the native library, or keeps the reason why it is not there.

``libgtp_kernels.so`` holds the operators (C++ definitions and CPU kernels, no Python in it); ``_C`` beside it holds
build information and the raw CPU routines. Both are optional: without them the operators are defined from
``ops/schemas.txt`` and run the reference.
"""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

LIBRARY = Path(__file__).with_name("libgtp_kernels.so")
EMULATED_LIBRARY = "libgtp_kernels_cuda_emulated.so"
HOW_TO_BUILD = (
    "install a C++17 compiler (Debian: apt-get install g++), then, past pip's cache of the pure-Python wheel: "
    "pip cache remove gtp_kernels; GTP_NATIVE=1 pip install --force-reinstall --no-deps gtp-kernels "
    "(in a checkout: . for gtp-kernels). GTP_NATIVE=1 makes pip say what else is missing"
)
HOW_TO_BUILD_CUDA = (
    "with a CUDA toolkit (nvcc), past pip's cache: pip cache remove gtp_kernels; GTP_NATIVE=1 GTP_CUDA=1 "
    "pip install --force-reinstall --no-deps --no-build-isolation gtp-kernels (in a checkout: . for gtp-kernels)"
)
EMULATED = os.environ.get("GTP_KERNELS_EMULATE_CUDA") == "1"
"""Whether the backend ``cuda`` is its emulation: the same kernels, run on the host on CPU tensors. For tests."""


def _load() -> str | None:
    if os.environ.get("GTP_KERNELS_NATIVE") == "0":
        return "switched off by GTP_KERNELS_NATIVE=0"
    if not LIBRARY.exists():
        return f"{LIBRARY.name} was not built; {HOW_TO_BUILD}"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return (
            f"{LIBRARY.name} does not load with torch {torch.__version__} (it needs torch 2.11 or later): "
            f"{error.__cause__ or error}; "
            f"{HOW_TO_BUILD}"
        )
    return None


missing: str | None = _load()
"""Why the native library is not loaded; None where it is."""


def extension() -> ModuleType | None:
    """The pybind11 module ``_C``, or None where it was not built."""
    if missing is not None:
        return None
    try:
        from gtp_kernels import _C
    except ImportError:
        return None
    return _C


def build_info() -> dict[str, Any]:
    """What ``_C`` says of the build; empty where it was not built."""
    module = extension()
    return {} if module is None else dict(module.build_info())


@functools.cache
def cuda_missing() -> str | None:
    """Why the native library has no CUDA kernels; None where it has."""
    if missing is not None:
        return missing
    if torch.version.hip is not None:
        return "it needs an NVIDIA GPU and a torch built for CUDA; this one is built for ROCm"
    # Asked of the dispatcher: the kernels are there even where the build information is not.
    if not torch._C._dispatch_has_kernel_for_dispatch_key("gtp_kernels::attention_with_scores", "CUDA"):
        return f"{LIBRARY.name} was built without CUDA kernels; build it {HOW_TO_BUILD_CUDA}"
    return None


@functools.cache
def has_cuda_code(capability: tuple[int, int]) -> bool:
    """Whether the library has CUDA kernels that a device of this capability runs, as far as it is known."""
    if cuda_missing() is not None:
        return False
    return any(_runs(name, capability) for name in build_info().get("cuda_archs", ()))


def _runs(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for ``90-real``, ``90a-real``, ``90-virtual`` or ``90`` (both), as CMake names them, runs there."""
    match = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", architecture)
    if match is None:
        return False
    built, kind = (int(match[1]), int(match[2])), match[4]
    if match[3]:
        return built == capability
    # Machine code runs on later minors of its major, and what the driver compiles runs on everything later.
    return built <= capability and (kind != "-real" or built[0] == capability[0])


def emulated_library() -> Path:
    """The library of the emulated CUDA kernels; ``GTP_KERNELS_EMULATED_LIBRARY`` names another."""
    return Path(os.environ.get("GTP_KERNELS_EMULATED_LIBRARY") or LIBRARY.with_name(EMULATED_LIBRARY))


@functools.cache
def emulation_missing() -> str | None:
    """Why the emulated CUDA kernels cannot be had; None where they can."""
    path = emulated_library()
    return None if path.is_file() else f"its emulation was not built: {path} is not there"
