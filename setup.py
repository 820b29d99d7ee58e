"""Builds the native part with CMake and Ninja; everything else about the package is in pyproject.toml.

Environment:
    GTP_NATIVE   0: pure Python on purpose; 1: a missing compiler is an error. Otherwise a machine without a compiler
                 or CMake gets a warning and a package that runs the reference and Triton. A compile error is an error.
    GTP_CUDA     0: no CUDA kernels; 1: a missing CUDA toolkit is an error. Otherwise they are built where one is found.
    CUDACXX, CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS, CXX, CMAKE_ARGS   as elsewhere.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 11)
USUAL_CUDA = Path("/usr/local/cuda")


class MissingError(Exception):
    """Something that the native build needs is not on this machine."""


def tool(name: str) -> str | None:
    """A program on the PATH, beside the interpreter, or inside the pip package of that name."""
    beside = os.pathsep.join([str(Path(sys.executable).parent), sysconfig.get_path("scripts")])
    found = shutil.which(name) or shutil.which(name, path=beside)
    if found is None and (spec := importlib.util.find_spec(name)) and spec.origin:
        found = shutil.which(name, path=str(Path(spec.origin).parent / "data" / "bin"))
    return found


def package_folder(name: str) -> Path | None:
    """Where a package is installed, without importing it."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


def torch_folder() -> Path:
    folder = package_folder("torch")
    if folder is None:
        raise MissingError("torch is not installed in the build environment")
    header = folder / "include" / "torch" / "headeronly" / "version.h"
    text = header.read_text() if header.exists() else ""
    found = tuple(
        int(match[1]) if (match := re.search(rf"#define TORCH_VERSION_{part} (\d+)", text)) else 0
        for part in ("MAJOR", "MINOR")
    )
    if found < OLDEST_TORCH:
        raise MissingError(f"torch {'.'.join(map(str, found))} is too old: the stable ABI of 2.11 or later is needed")
    return folder


def compiler() -> str:
    if command := shlex.split(os.environ.get("CXX", "")):  # "g++-13", and also "ccache g++" or "g++ -m64"
        if path := shutil.which(command[0]):
            return ";".join([path, *command[1:]])
        raise MissingError(f"no C++ compiler: CXX is {os.environ['CXX']!r}, and {command[0]} is not there")
    names = ["c++", "g++", "clang++"]
    for name in names:
        if path := shutil.which(name):
            return path
    raise MissingError(f"no C++ compiler: looked for {', '.join(names)}")


def nvidia_packages() -> list[Path]:
    """Where pip puts NVIDIA's packages.

    An isolated build imports from a folder of its own; what the user installed is in purelib.
    """
    spec = importlib.util.find_spec("nvidia")
    imported = spec.submodule_search_locations if spec else None
    return [Path(folder) for folder in (*(imported or ()), f"{sysconfig.get_path('purelib')}/nvidia")]


def nvcc_candidates() -> list[str]:
    """nvcc where torch's own builds look for it (CUDACXX, CUDA_HOME, the PATH, /usr/local/cuda), then pip's packages.

    What CUDACXX or CUDA_HOME name is the only candidate, there or not.
    """
    if named := os.environ.get("CUDACXX"):
        return [shutil.which(named) or named]
    if home := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return [str(Path(home) / "bin" / "nvcc")]
    installed = [path for folder in nvidia_packages() for path in sorted(folder.glob("cu[0-9]*/bin"), reverse=True)]
    found = [shutil.which("nvcc", path=path) for path in (None, str(USUAL_CUDA / "bin"), *map(str, installed))]
    return list(dict.fromkeys(path for path in found if path))


def cuda_environment(nvcc: str) -> dict[str, str]:
    """What this nvcc needs beside its path: the one that pip installs looks for lib64, and its libraries are in lib."""
    root = Path(nvcc).resolve().parents[1]
    if (root / "lib64").exists() or not (root / "lib" / "libcudart_static.a").exists():
        return {}
    return {"LIBRARY_PATH": os.pathsep.join(filter(None, [str(root / "lib"), os.environ.get("LIBRARY_PATH")]))}


def nvcc_fault(nvcc: str) -> str | None:
    """Why this nvcc cannot build a library; None where it can. Its version alone would not tell.

    Headers, cicc and runtime are packages of their own on PyPI, and a host compiler can be too new.
    """
    if not os.access(nvcc, os.X_OK):
        return "not there"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.cu").write_text("__global__ void kernel(int *p) { *p = 0; }\n")
        command = [nvcc, "-shared", "-Xcompiler=-fPIC", "-cudart=static", "-o", "kernel.so", "kernel.cu"]
        environment = {**os.environ, **cuda_environment(nvcc)}
        try:
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"does not run: {error}"
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    reason = next((line for line in lines if re.search("error|fatal|cannot|not found", line, re.IGNORECASE)), None)
    return None if done.returncode == 0 else f"does not work: {reason or (lines or [f'exit {done.returncode}'])[-1]}"


@functools.cache
def find_nvcc() -> tuple[str | None, tuple[str, ...]]:
    """The first nvcc that works, and what was tried before it: path and reason."""
    tried = []
    for path in nvcc_candidates():
        fault = nvcc_fault(path)
        if fault is None:
            return path, tuple(tried)
        tried.append(f"{path}: {fault}")
    return None, tuple(tried)


def cuda_compiler() -> str | None:
    """nvcc, where there are kernels for it; one that does not work counts as none, with a warning."""
    if switch("GTP_CUDA") == "OFF" or not any((ROOT / "csrc" / "cuda").glob("*.cu")):
        return None
    nvcc, tried = find_nvcc()
    if nvcc is None and (tried or switch("GTP_CUDA") == "ON"):
        looked = "CUDACXX, CUDA_HOME, the PATH, /usr/local/cuda and pip's nvidia-cuda-nvcc"
        warn("the CUDA kernels are NOT built: no nvcc works.", *(tried or [f"There is none; looked in {looked}."]))
    return nvcc


def gpus_here() -> str:
    """The compute capabilities of this machine's GPUs, as in TORCH_CUDA_ARCH_LIST; empty where it has none."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    found = sorted({line.strip() for line in done.stdout.splitlines()})
    return ";".join(found) if all(re.fullmatch(r"\d+\.\d+", name) for name in found) else ""


def cuda_architectures() -> str:
    """TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX"), else this machine's GPUs, in CMake's words ("80-real;90-real;90-virtual").

    Empty where neither says anything: CMakeLists.txt then has a list for all.
    """
    architectures: list[str] = []
    if switch("GTP_CUDA") == "OFF":
        return ""
    for entry in re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or gpus_here()):
        if not entry:
            continue
        match = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", entry)
        if match is None:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST has {entry!r}; entries look like 9.0, 9.0a or 9.0+PTX")
        name = match[1] + match[2]
        architectures += [f"{name}-real"] + ([f"{name}-virtual"] if match[3] else [])
    return ";".join(architectures)


def switch(name: str) -> str:
    value = os.environ.get(name, "").strip()
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name} is {value!r}; it must be 0, 1 or unset")
    return {"0": "OFF", "1": "ON", "": "AUTO"}[value]


def configure_arguments() -> list[str]:
    """The CMake command line without its output folder; raises MissingError."""
    cmake = tool("cmake")
    if cmake is None:
        raise MissingError("no CMake: neither on the PATH nor as a pip package")
    arguments = [cmake, "-S", str(ROOT), f"-DCMAKE_CXX_COMPILER={compiler()}", f"-DTORCH_DIR={torch_folder()}"]
    # What CMake remembers of another torch (an isolated build has its own) must not outlive it.
    arguments += ["-U", "TORCH_LIB_*"]
    if ninja := tool("ninja"):
        arguments += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    if pybind11 := package_folder("pybind11"):
        arguments += [f"-Dpybind11_DIR={pybind11 / 'share' / 'cmake' / 'pybind11'}", "-DGTP_PYTHON_MODULE=ON"]
        arguments += [f"-DPython_EXECUTABLE={sys.executable}"]
    else:
        warn("pybind11 is not installed: the module _C (build information, unit tests) is left out")
        arguments += ["-DGTP_PYTHON_MODULE=OFF"]
    arguments += [f"-DGTP_CUDA={switch('GTP_CUDA')}", f"-DGTP_CUDA_ARCHITECTURES={cuda_architectures()}"]
    return arguments + shlex.split(os.environ.get("CMAKE_ARGS", ""))


def warn(*lines: str) -> None:
    bar = "*" * 88
    print("\n".join([bar, *(f"* gtp-kernels: {line}" for line in lines), bar]), file=sys.stderr, flush=True)


class BuildNative(build_ext):
    """Puts libgtp_kernels and _C into the package folder: the one in the tree for an editable or in-place build."""

    def run(self) -> None:
        for extension in self.extensions:
            self.build_extension(extension)

    def output_folder(self) -> Path:
        return (ROOT if self.in_tree() else Path(self.build_lib).resolve()) / "gtp_kernels"

    def in_tree(self) -> bool:
        return bool(self.inplace or getattr(self, "editable_mode", False))

    def build_extension(self, extension: Extension) -> None:
        build = ROOT / "build" / f"native-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        nvcc = cuda_compiler()
        # With another compiler CMake drops its cache, and with it the -D of the command line.
        compilers = f"{compiler()}\n{nvcc}\n"
        stamp = build / "compilers.txt"
        if build.exists() and not (stamp.exists() and stamp.read_text() == compilers):
            shutil.rmtree(build)
        build.mkdir(parents=True, exist_ok=True)
        stamp.write_text(compilers)
        version = self.distribution.get_version()
        arguments = [f"-DGTP_OUTPUT_DIR={self.output_folder()}", f"-DGTP_VERSION={version}", "-B", str(build)]
        # The tests of a checkout run the CUDA kernels on an emulated GPU.
        arguments += [f"-DGTP_EMULATE_CUDA={'ON' if self.in_tree() else 'OFF'}"]
        # CMake's own search knows the PATH only; an nvcc that does not work counts as none.
        environment = {**os.environ, **(cuda_environment(nvcc) if nvcc else {}), "CUDACXX": nvcc or "no-nvcc"}
        subprocess.run([*configure_arguments(), *arguments], check=True, env=environment)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run([str(tool("cmake")), "--build", str(build), "--parallel", jobs], check=True, env=environment)

    def native_files(self) -> list[str]:
        return [str(path) for path in sorted(self.output_folder().glob("*.so"))]

    def get_outputs(self) -> list[str]:
        return [] if getattr(self, "editable_mode", False) else self.native_files()

    def get_output_mapping(self) -> dict[str, str]:
        return {}


def extensions() -> list[Extension]:
    """The native build, or nothing (a pure-Python package) where it is not wanted or cannot be made."""
    wanted = switch("GTP_NATIVE")
    if wanted == "OFF":
        return []
    try:
        configure_arguments()
    except MissingError as reason:
        for name in ("GTP_NATIVE", "GTP_CUDA"):
            if switch(name) == "ON":
                raise SystemExit(f"{name}=1, and the native build is not possible: {reason}") from None
        warn(
            f"the native kernels are NOT built: {reason}.",
            "The package works without them: the reference on CPUs (slow), Triton on GPUs.",
            "To have them, install a C++17 compiler (Debian: apt-get install g++), then install this again.",
        )
        return []
    return [Extension("gtp_kernels._C", sources=[])]


if __name__ == "__main__":  # benchmarks/compile_check_cuda.py and the tests import the search for compilers
    setup(
        package_dir={"gtp_kernels": "gtp_kernels", "gtp_vit": "python/gtp_vit"},
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildNative},
    )
