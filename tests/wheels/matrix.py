"""``python tests/wheels/matrix.py dist/*.whl [--torch 2.11.0 ...]``: one wheel beside several releases of torch.

Each release gets a fresh environment, into which it, the wheel and transformers are installed and in which smoke.py
and benchmarks/smoke.py run, away from the source tree; the environment is removed before the next one is made.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
SMOKE = HERE.parents[1] / "benchmarks" / "smoke.py"
# 2.13 as a build for CPUs, whose library has no CUDA beside it; the others as PyPI has them.
RELEASES = ("2.11.0", "2.12.1", "2.13.0+cpu", "2.14.1", "2.15.0")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# gtp_vit's lower bound; it needs no torchvision, which would have to fit each torch.
MODELS = "transformers>=5.18"
_NEEDED_GIB = 14


def run(command: list[str], folder: Path) -> str | None:
    """None, or the last lines of what a command said when it failed."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "GTP_KERNELS_NATIVE")}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        print("".join(f"   {line}\n" for line in done.stdout.strip().splitlines()[-4:]), end="", flush=True)
        return None
    return "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])


def beside(release: str, wheel: Path, folder: Path) -> str | None:
    """Installs and tests the wheel beside one release of torch; None, or why that failed."""
    free = shutil.disk_usage(folder).free / 2**30
    if free < _NEEDED_GIB:
        return f"{free:.0f} GiB are free in {folder}, and an environment may take {_NEEDED_GIB}"
    place = folder / "environment"
    python = str(place / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", "--no-cache-dir", "--disable-pip-version-check"]
    # An index that cannot be reached must not hold up a release that another one has.
    index = ["--extra-index-url", CPU_INDEX, "--retries", "0", "--timeout", "20"] if release.endswith("+cpu") else []
    shutil.copy(SMOKE, folder / "ops.py")
    shutil.copy(HERE / "smoke.py", folder / "wheel.py")
    try:
        for command in (
            [sys.executable, "-m", "venv", str(place)],
            [*install, *index, f"torch=={release}", "numpy", MODELS, str(wheel)],
            [python, "wheel.py", release],
            [python, "ops.py", "cpu"],
        ):
            if (fault := run(command, folder)) is not None:
                return fault
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument(
        "--torch", nargs="+", default=RELEASES, metavar="VERSION", help="exact releases, 2.13.0+cpu say"
    )
    options = parser.parse_args()
    faults = {}
    for release in options.torch:
        print(f"-- torch {release}", flush=True)
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="gtp-matrix-") as folder:
            fault = beside(release, options.wheel.resolve(), Path(folder))
        if fault is not None:
            faults[release] = fault
            print(fault, file=sys.stderr)
        print(f"   {'FAILED' if fault else 'passed'} in {time.monotonic() - start:.0f} s", flush=True)
    print(f"{options.wheel.name}: {len(options.torch) - len(faults)} of {len(options.torch)} releases of torch")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
