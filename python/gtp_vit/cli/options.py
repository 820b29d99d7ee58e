"""The options of :func:`gtp_vit.patch` as options of a command."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from gtp_kernels import checks
from gtp_vit.config import GRAPH_TYPES, PROPAGATIONS, SELECTIONS

Command = TypeVar("Command", bound=Callable[..., Any])


def num_prop(ctx: click.Context, param: click.Parameter, value: str) -> int | tuple[int, ...]:
    """P: one number, or one per block separated by commas."""
    try:
        numbers = tuple(int(part) for part in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is neither a number nor numbers separated by commas") from error
    return numbers[0] if len(numbers) == 1 else numbers


_OPTIONS = (
    click.option(
        "--num-prop",
        metavar="P[,P...]",
        callback=num_prop,
        default="8",
        show_default=True,
        help="P, the tokens that leave in each block, or one number per block.",
    ),
    click.option(
        "--sparsity", type=float, default=0.6, show_default=True, help="θ, the share of the attention map kept."
    ),
    click.option("--alpha", type=float, default=0.2, show_default=True, help="α, how much a neighbour takes in."),
    click.option("--selection", type=click.Choice(SELECTIONS), default="MixedAttnMax", show_default=True),
    click.option("--propagation", type=click.Choice(PROPAGATIONS), default="GraphProp", show_default=True),
    click.option("--graph-type", type=click.Choice(GRAPH_TYPES), default="Mixed", show_default=True),
    click.option(
        "--num-neighbours", type=int, default=8, show_default=True, help="M, the semantic neighbours of a token."
    ),
    click.option(
        "--token-scale/--no-token-scale", default=True, show_default=True, help="Count what a token stands for."
    ),
    click.option("--semantics", type=click.Choice(checks.SEMANTICS), default="official", show_default=True),
)


def gtp_options(command: Command) -> Command:
    """Decorator: gives a command the options of :func:`gtp_vit.patch`, under its names."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
