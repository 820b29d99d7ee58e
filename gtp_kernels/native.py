"""Loads the native library, or keeps the reason why it is not there.

``libgtp_kernels.so`` holds the operators (C++ definitions and CPU kernels, no Python in it); ``_C`` beside it holds
build information and the raw CPU routines. Both are optional: without them the operators are defined from
``ops/schemas.txt`` and run the reference.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

import torch

LIBRARY = Path(__file__).with_name("libgtp_kernels.so")
HOW_TO_BUILD = (
    "install a C++17 compiler (Debian: apt-get install g++), then, past pip's cache of the pure-Python wheel: "
    "pip cache remove gtp_kernels; GTP_NATIVE=1 pip install --force-reinstall --no-deps gtp-kernels "
    "(in a checkout: . for gtp-kernels). GTP_NATIVE=1 makes pip say what else is missing"
)


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
