"""Compiles CUDA sources for the emulated GPU (tests/native/emulated_gpu.h), behind a shim that ctypes can call."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

NATIVE = Path(__file__).parent / "native"
CSRC = Path(__file__).parents[1] / "csrc"
# setjmp between stacks is what _FORTIFY_SOURCE takes for an attack.
FLAGS = ["-std=c++17", "-shared", "-fPIC", "-U_FORTIFY_SOURCE", "-Wall", "-Wextra", "-Werror", "-DGTP_EMULATE_CUDA"]


def build(shim: str, folder: Path, *, csrc: Path = CSRC, optimize: str = "-O2") -> Path:
    """``tests/native/<shim>`` with the sources of ``csrc``, compiled into ``folder``: the path of the library.

    ``GTP_EMULATED_SHIM`` names one that is there already: test_cuda_mutations.py runs tests on mutated kernels.
    """
    if given := os.environ.get("GTP_EMULATED_SHIM"):
        return Path(given)
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    target = folder / Path(shim).with_suffix(".so").name
    folders = [f"-I{csrc}", f"-I{NATIVE}"]
    subprocess.run([compiler, *FLAGS, optimize, *folders, str(NATIVE / shim), "-o", str(target)], check=True)
    return target
