"""The command line of gtp_vit: `gtp-vit`, or `python -m gtp_vit.cli`."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs `gtp-vit`. Exits with 2 for a wrong command line, with 1 for what failed while it ran."""
    try:
        from gtp_vit.cli.app import cli
    except ModuleNotFoundError as error:
        if error.name not in ("click", "rich"):
            raise
        sys.exit(f'gtp-vit needs {error.name}, which is not installed: pip install "gtp-kernels[demo]"')
    cli(prog_name="gtp-vit")
