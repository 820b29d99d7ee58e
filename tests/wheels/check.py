"""``python tests/wheels/check.py dist/*.whl``: what the native files of a wheel need from the system that loads them.

In the manner of manylinux: the shared objects that they name, and the highest version of the symbols of glibc and
libstdc++, must be among those that POLICIES and NEEDED list. libtorch is found beside the package, and CUDA's runtime
is inside the library, so that neither is a reason to refuse to load. Needs readelf.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# What may be named: libtorch without torch_cuda, which CPU builds lack; the C++ runtime; glibc; our own.
NEEDED = {
    *("libtorch.so", "libtorch_cpu.so", "libc10.so"),
    *("libstdc++.so.6", "libgcc_s.so.1"),
    *("libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1"),
    *("ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"),
    "libgtp_kernels.so",
}
# The highest versions that a manylinux platform promises (PEP 600), by its glibc.
POLICIES = {
    "2_28": {"GLIBC": "2.28", "GLIBCXX": "3.4.24", "CXXABI": "1.3.11"},
    "2_34": {"GLIBC": "2.34", "GLIBCXX": "3.4.29", "CXXABI": "1.3.13"},
}
RUN_PATHS = {"libgtp_kernels": "$ORIGIN/../torch/lib", "_C": "$ORIGIN"}


def readelf(option: str, path: Path) -> str:
    return subprocess.run(
        ["readelf", option, "--wide", str(path)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"LC_ALL": "C"},
    ).stdout


def needed(path: Path) -> set[str]:
    """The shared objects that a library names."""
    return set(re.findall(r"\(NEEDED\).*\[(.+?)\]", readelf("--dynamic", path)))


def versions(path: Path) -> dict[str, str]:
    """The highest version of the symbols that a library takes from elsewhere, by family."""
    required = readelf("--version-info", path).partition("Version needs section")[2]
    found: dict[str, str] = {}
    for family, version in re.findall(r"Name: ([A-Z]+)_([\d.]+)", required):
        found[family] = max(found.get(family, "0"), version, key=parts)
    return found


def parts(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def faults(path: Path, policy: str) -> list[str]:
    """What a library needs that a system of this policy, with torch, need not have; sentences."""
    found = [f"{path.name} needs {name}, which is not on the list" for name in sorted(needed(path) - NEEDED)]
    for family, limit in POLICIES[policy].items():
        version = versions(path).get(family, "0")
        if parts(version) > parts(limit):
            found.append(f"{path.name} needs {family}_{version}; manylinux_{policy} has {limit}")
    run_path = re.findall(r"\(R(?:UN)?PATH\).*\[(.*)\]", readelf("--dynamic", path))
    if run_path != [RUN_PATHS[path.name.partition(".")[0]]]:
        found.append(f"{path.name} looks for libraries in {run_path or 'no folder'}")
    return found


def check(wheel: Path, policy: str) -> list[str]:
    """The faults of a wheel; prints what its native files need."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".so")]
        stems = sorted(Path(name).name.partition(".")[0] for name in names)
        if stems != ["_C", "libgtp_kernels"]:
            return [f"{wheel.name} must hold libgtp_kernels.so and one _C, and nothing else native; it has {names}"]
        tag = wheel.name.split("-")[2]
        module = next(name for name in names if "/_C." in name)
        found = [] if tag.removeprefix("cp") in module else [f"{wheel.name} is for {tag}, and has {module}"]
        for name in names:
            path = Path(archive.extract(name, folder))
            print(f"{path.name}: {', '.join(sorted(needed(path)))}")
            print("  " + ", ".join(f"{family}_{version}" for family, version in sorted(versions(path).items())))
            found += faults(path, policy)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheels", nargs="+", type=Path)
    parser.add_argument("--policy", choices=POLICIES, default="2_34", help="manylinux_… (torch's own is 2_28)")
    options = parser.parse_args(arguments)
    found = [fault for wheel in options.wheels for fault in check(wheel, options.policy)]
    for fault in found:
        print(fault, file=sys.stderr)
    print(f"manylinux_{options.policy}: {f'{len(found)} faults' if found else 'fine'}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
