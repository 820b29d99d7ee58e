"""The `gtp-vit` command group. A command's module is imported when that command is asked for."""

from __future__ import annotations

import importlib
from typing import Any

import click

import gtp_kernels
from gtp_kernels.backends import BackendError

# Name -> where the click command is.
COMMANDS = {
    "demo": "gtp_vit.cli.demo:demo",
    "doctor": "gtp_vit.cli.doctor:doctor",
    "eval": "gtp_vit.cli.eval:evaluate_command",
    "export": "gtp_vit.cli.export:export",
    "finetune": "gtp_vit.cli.finetune:finetune",
    "tune": "gtp_vit.cli.tune:tune",
}


class LazyGroup(click.Group):
    """A group whose commands are named in `COMMANDS` and imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *COMMANDS})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command; a forced backend that cannot run (``GTP_KERNELS_BACKEND``) is a message, no traceback."""
        try:
            return super().invoke(ctx)
        except BackendError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(gtp_kernels.__version__, package_name="gtp-kernels")
def cli() -> None:
    """Graph-based token propagation for pre-trained Vision Transformers."""
