"""How many tokens leave in which block, for a given amount of work."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from torch import nn

import gtp_vit
from gtp_kernels import checks
from gtp_vit.config import GTPConfig
from gtp_vit.work import ModelWork

SHAPES = ("constant", "increasing", "decreasing", "keep-rate")


def schedule(
    model: nn.Module,
    gmacs: float | None = None,
    shape: str = "constant",
    *,
    num_prop: float | None = None,
    size: int | tuple[int, int] | None = None,
    **options: Any,
) -> tuple[int, ...]:
    """P of each block, for ``gtp_vit.patch(model, num_prop=...)``, so that the model does a given amount of work.

    The work is that which :func:`gmacs` counts once the model is patched with the same options; it is computed, and no
    block runs. ``shape`` says how the tokens that leave are spread over the blocks, and of the schedules of that shape
    the one whose work is nearest to ``gmacs`` is taken: the paper's P for the GMACs that it prints.

    Args:
        model: patched or not; it stays as it is. Of transformers, a vision tower, alone or with a classifier or
            projection.
        gmacs: the target, GMACs of one image; the schedule may do a little more or less. Either this or ``num_prop``
            is given.
        shape: ``constant`` (the same P in every block), ``increasing`` or ``decreasing`` (P rises or falls linearly,
            up to rounding, over the blocks), or ``keep-rate`` (every block keeps the same share of its image tokens, as
            EViT does, so that most leave in the first ones).
        num_prop: instead of a target, the mean of P over the blocks, not to be exceeded: schedules of one whole
            ``num_prop`` and different shapes let equally many tokens leave.
        size: the image size, one number or (height, width); the model's nominal one where ``None``. Models of
            transformers interpolate their positions for another one.
        options: those of :func:`patch` (``propagation``, ``graph_type``, …), which change the work; what is not given
            is as in the patched model, or, where it is not patched, as in :func:`patch`.

    Returns:
        One int per block.

    Raises:
        TypeError: an argument of the wrong kind, or a model that cannot be patched.
        ValueError: an unknown ``shape`` or option; neither or both of ``gmacs`` and ``num_prop``; a ``gmacs`` above the
            work of the unpatched model or below that of the deepest schedule; a ``num_prop`` above the mean of that.
    """
    shape = checks.choice("shape", shape, SHAPES)
    if (gmacs is None) == (num_prop is None):
        raise ValueError(
            f"one of gmacs and num_prop must be given, and not both; got gmacs = {gmacs}, num_prop = {num_prop}"
        )
    work = _work(model, size)
    config = _config(model, options)
    if config.selection == "None":
        raise ValueError("selection must not be 'None': no token leaves, whatever the schedule")
    found = list(_schedules(shape, work, config))
    if gmacs is None:
        return _of_mean(found, checks.number("num_prop", num_prop), shape, len(work.blocks))
    target = checks.number("gmacs", gmacs)
    counted = {values: work.macs(dataclasses.replace(config, num_prop=values)) / 1e9 for values in found}
    most, least = counted[found[0]], min(counted.values())
    if not least <= target <= most:
        raise ValueError(
            f"gmacs must be in [{least:.6g}, {most:.6g}], from the deepest {shape!r} schedule to the unpatched model; "
            f"got {target}"
        )
    return min(found, key=lambda values: (abs(counted[values] - target), counted[values]))


def _work(model: nn.Module, size: int | tuple[int, int] | None) -> ModelWork:
    work: ModelWork = gtp_vit._library_of(model).work(model, size)
    return work


def _config(model: nn.Module, options: dict[str, Any]) -> GTPConfig:
    """The options that the schedule is for, without tokens that leave."""
    # A tower of transformers may have been patched by itself.
    configs = (vars(module).get("gtp") for module in model.modules())
    config = next((found for found in configs if isinstance(found, GTPConfig)), GTPConfig())
    unknown = set(options) - {field.name for field in dataclasses.fields(GTPConfig)}
    if unknown:
        raise TypeError(f"schedule takes the options of gtp_vit.patch; got {', '.join(sorted(unknown))}")
    return dataclasses.replace(config, **{**options, "num_prop": 0})


def _schedules(shape: str, work: ModelWork, config: GTPConfig) -> Iterator[tuple[int, ...]]:
    """All schedules of a shape, from that in which no token leaves to the deepest."""
    depth, n = len(work.blocks), work.num_image_tokens
    if shape == "constant":
        for num_prop in range(config.largest_num_prop(n, depth) + 1):
            yield (num_prop,) * depth
        return
    for total in itertools.count():
        values = tuple(_spread(shape, total, n, depth, config.propagation == "Mean"))
        try:
            dataclasses.replace(config, num_prop=values).token_counts(n, depth)
        except ValueError:
            return
        yield values


def _spread(shape: str, total: int, num_image_tokens: int, depth: int, mean: bool) -> list[int]:
    """``total`` over ``depth`` blocks: the differences of a running sum, rounded."""
    if shape == "keep-rate":
        rate = max(1 - total / num_image_tokens, 0)
        left = [round(num_image_tokens * rate ** (block / depth)) for block in range(depth + 1)]
        fewer = (before - after for before, after in itertools.pairwise(left))
        # Where Mean appends a token, one more leaves.
        return sorted((count + int(mean and count > 0) for count in fewer), reverse=True)
    sums = [round(total * block * (block + 1) / (depth * (depth + 1))) for block in range(depth + 1)]
    # Sorted, as rounding may exchange neighbours.
    return sorted((after - before for before, after in itertools.pairwise(sums)), reverse=shape == "decreasing")


def _of_mean(found: list[tuple[int, ...]], mean: float, shape: str, depth: int) -> tuple[int, ...]:
    largest = max(map(sum, found))
    # A mean that was divided by the depth, or printed, is not off by a token for its last digit.
    total = mean * depth + 1e-3
    if mean < 0 or total > largest + 2e-3:
        raise ValueError(
            f"num_prop must be in [0, {largest / depth:.6g}] for a {shape!r} schedule of this model; got {mean}"
        )
    return max((values for values in found if sum(values) <= total), key=sum)
