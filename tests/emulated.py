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
FLAGS = ["-std=c++17", "-fPIC", "-U_FORTIFY_SOURCE", "-Wall", "-Wextra", "-Werror", "-DGTP_EMULATE_CUDA"]


def build(shim: str, folder: Path, *, csrc: Path = CSRC, optimize: str = "-O2") -> Path:
    """``tests/native/<shim>`` with the sources of ``csrc``, compiled into ``folder``: the path of the library.

    Under ``GTP_EMULATED_RACES=1`` with the detector of tests/native/emulated_races.h. ``GTP_EMULATED_SHIM`` names a
    library that is there already: test_cuda_mutations.py and test_cuda_races.py run tests on mutated kernels.
    """
    if given := os.environ.get("GTP_EMULATED_SHIM"):
        return Path(given)
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    target = folder / Path(shim).with_suffix(".so").name
    command = [compiler, *FLAGS, optimize, f"-I{csrc}", f"-I{NATIVE}", str(NATIVE / shim)]
    if os.environ.get("GTP_EMULATED_RACES") != "1":
        subprocess.run([*command, "-shared", "-o", str(target)], check=True)
        return target
    # Linked without the flag: what the compiler calls is the detector's, not the library's that comes with it.
    compiled = target.with_suffix(".o")
    watched = ["-fsanitize=thread", "-DGTP_EMULATED_RACES", "-g1"]  # -g1: a debugger shows where it ends
    wrapped = [f"-Wl,--wrap={name}" for name in ("memcpy", "memmove", "memset")]
    subprocess.run([*command, *watched, "-c", "-o", str(compiled)], check=True)
    subprocess.run([compiler, "-shared", str(compiled), *wrapped, "-Wl,--no-undefined", "-o", str(target)], check=True)
    return target
