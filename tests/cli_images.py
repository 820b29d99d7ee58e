"""What the tests of `gtp-vit eval` and `finetune` share: folders of tiny images, a tiny model, and ways to run them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner, Result
from PIL import Image

MODEL = (
    "--model", "vit_tiny_patch16_224", "--img-size", "32", "--model-kwargs", "patch_size=8", "--model-kwargs",
    '{"depth": 2, "embed_dim": 32}', "--model-kwargs", "num_heads=2",
    "--num-prop", "3", "--num-neighbours", "4",
)  # fmt: skip
KWARGS: dict[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}


def write_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 44, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_classes(root: Path, counts: Mapping[str, int], seed: int = 0) -> list[Path]:
    """Class folders with so many images each; all different."""
    paths = [root / name / f"{number:03}.png" for name, count in counts.items() for number in range(count)]
    for offset, path in enumerate(paths):
        write_image(path, seed + offset)
    return paths


def run(*arguments: object) -> Result:
    from gtp_vit.cli.app import cli

    return CliRunner().invoke(cli, [str(argument) for argument in arguments], prog_name="gtp-vit")


def ok(*arguments: object) -> str:
    """The output of a command that succeeds, with single spaces."""
    result = run(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return " ".join(result.output.split())


def environment() -> dict[str, str]:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def torchrun(processes: int, *arguments: object) -> str:
    """What `torchrun` prints, for several processes on this machine that meet at a free port."""
    launcher = "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)
    done = subprocess.run(
        [sys.executable, "-m", *launcher, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=environment(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return " ".join(done.stdout.split())
