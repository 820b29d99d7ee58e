"""Options for one model, found without labels: those with which it agrees best with itself unpatched.

All candidates do the same work. Successive halving drops most of them after a few images; what is left of the time
goes into small changes of the best one, of its budget per block above all. The images that decide are not those on
which a result should be judged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gtp_vit
from gtp_kernels import checks
from gtp_vit.config import GTPConfig
from gtp_vit.schedule import _work
from gtp_vit.work import ModelWork

Options = dict[str, Any]

PUBLISHED: Options = {"sparsity": 0.6, "alpha": 0.2, "propagation": "GraphProp", "graph_type": "Mixed"}
PRUNING: Options = {"sparsity": 1.0, "propagation": "None", "graph_type": "None"}
LIVE: Options = {"sparsity": 1.0, "propagation": "LiveGraph", "graph_type": "Mixed", "gamma": 0.25}
BASELINES: dict[str, Options] = {
    "GTP as published": PUBLISHED,
    "GTP, θ = 1": PUBLISHED | {"sparsity": 1.0},
    "no propagation": PRUNING,
    "LiveGraph, Spatial": LIVE | {"graph_type": "Spatial"},
    "LiveGraph, Mixed": LIVE,
    "LiveGraph, Mixed, CLSAttnMean": LIVE | {"selection": "CLSAttnMean"},
}
# What a candidate may have; neighbours in these lists are what a small change goes to.
CHOICES: dict[str, tuple[Any, ...]] = {
    "sparsity": (0.6, 0.8, 0.9, 0.95, 1.0),
    "alpha": (0.05, 0.1, 0.2, 0.3),
    "gamma": (0.0, 0.1, 0.25, 0.5, 1.0),
    "graph_type": ("Spatial", "Mixed", "Semantic"),
    "num_neighbours": (2, 4, 8, 16),
    "selection": ("MixedAttnMax", "CLSAttnMax", "CLSAttnMean"),
}
READ = {
    "LiveGraph": ("sparsity", "gamma", "graph_type", "num_neighbours", "selection"),
    "GraphProp": ("sparsity", "alpha", "graph_type", "num_neighbours", "selection"),
    "None": ("sparsity", "selection"),
}
FINALISTS = 5
FIRST_IMAGES = 16  # with 4, chance decides which candidates are dropped first


class Outputs(NamedTuple):
    """What a model gives for n images, float32.

    Attributes:
        pooled: [n, C], what the classifier sees: the class token, or the mean of the tokens.
        logits: [n, classes]; ``None`` where there is no head.
        patches: [n, h · w, C], the image tokens, restored to the full grid; ``None`` where nobody asked.
    """

    pooled: Tensor
    logits: Tensor | None
    patches: Tensor | None


class Agreement(NamedTuple):
    """How much of what a model gives is left, for each of n images; float32 [n], ``None`` where it was not compared.

    Attributes:
        pooled: cosine of the pooled feature.
        logits: cosine of the logits, their mean over the classes taken off.
        top1: 1 where the first class is the same, else 0.
        patches: mean over the patches of the cosine of their features.
    """

    pooled: Tensor
    logits: Tensor | None
    top1: Tensor | None
    patches: Tensor | None

    @property
    def loss(self) -> Tensor:
        """[n]: one minus the mean of the cosines that were compared."""
        parts = [part for part in (self.pooled, self.logits, self.patches) if part is not None]
        return 1 - torch.stack(parts).mean(0)


def mean_angle(loss: Tensor) -> float:
    """Of losses [n], in radians: 1 − cosine is half of the squared angle between two features, where it is small.

    Losses have a long tail. In their mean one image of the hard kind outweighs a hundred others, in the mean of their
    logarithms it weighs no more than any.
    """
    return float(_angle(loss).mean())


def _angle(loss: Tensor) -> Tensor:
    return (2 * loss.clamp(min=0)).sqrt()


def outputs(model: Any, images: Tensor, *, patches: bool = False, batch_size: int = 8) -> Outputs:
    """What ``model``, of timm, patched or not, gives for ``images`` [n, 3, H, W].

    Args:
        patches: whether the features of the patches are wanted too, restored where the model is patched.
    """
    pooled, logits, rows = [], [], []
    patched = isinstance(vars(model).get("gtp"), GTPConfig)
    with torch.inference_mode():
        for part in images.split(batch_size):
            with gtp_vit.trace(model) if patched and patches else contextlib.nullcontext() as trace:
                tokens = model.forward_features(part)
            if patches:
                full = tokens[:, model.num_prefix_tokens :]
                rows.append((full if trace is None else gtp_vit.restore_grid(tokens, trace).flatten(1, 2)).float())
            pooled.append(model.forward_head(tokens, pre_logits=True).float().flatten(1))
            if getattr(model, "num_classes", 0):
                logits.append(model.forward_head(tokens).float())
    return Outputs(torch.cat(pooled), torch.cat(logits) if logits else None, torch.cat(rows) if rows else None)


def agreement(found: Outputs, expected: Outputs) -> Agreement:
    """Compares two models on the same images, in what both gave."""
    logits = top1 = patches = None
    if found.logits is not None and expected.logits is not None:
        mine, theirs = (part - part.mean(1, keepdim=True) for part in (found.logits, expected.logits))
        logits = F.cosine_similarity(mine, theirs, dim=-1)
        top1 = (mine.argmax(1) == theirs.argmax(1)).float()
    if found.patches is not None and expected.patches is not None:
        patches = F.cosine_similarity(found.patches, expected.patches, dim=-1).mean(1)
    return Agreement(F.cosine_similarity(found.pooled, expected.pooled, dim=-1), logits, top1, patches)


@contextlib.contextmanager
def patched(model: nn.Module, options: Options) -> Iterator[nn.Module]:
    """``model``, patched with ``options`` inside the context only."""
    gtp_vit.patch(model, **options)
    try:
        yield model
    finally:
        gtp_vit.unpatch(model)


def work_of(model: nn.Module, size: tuple[int, int]) -> ModelWork:
    """The work of ``model`` at an image size, as a formula of its options.

    Raises:
        TypeError: a model that cannot be patched.
    """
    return _work(model, size)


def fit(work: ModelWork, options: Options, weights: Sequence[float], gmacs: float) -> tuple[int, ...]:
    """P of each block, in proportion to ``weights`` up to rounding: the fewest tokens that bring the work to ``gmacs``.

    The work of the result is at most ``gmacs``, and that of one token less, spread the same way, is more.

    Args:
        work: from the library that patches the model.
        options: those of :func:`gtp_vit.patch`, without ``num_prop``.
        weights: one per block, not negative and not all zero.
        gmacs: as :func:`gtp_vit.gmacs` counts them.

    Raises:
        ValueError: other ``weights``; ``gmacs`` cannot be reached with them.
    """
    if len(weights) != len(work.blocks):
        raise ValueError(f"weights must have one value per block; got {len(weights)} for {len(work.blocks)} blocks")
    if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise ValueError(f"weights must be finite, at least 0 and not all 0; got {tuple(weights)}")
    for total in range(work.num_image_tokens):
        num_prop = _spread(total, weights)
        if _macs(work, options, num_prop) <= gmacs:
            return num_prop
    raise ValueError(f"gmacs = {gmacs:.6g} cannot be reached with the weights {tuple(weights)}")


def _macs(work: ModelWork, options: Options, num_prop: tuple[int, ...]) -> float:
    return work.macs(GTPConfig(num_prop=num_prop, **options)) / 1e9


def _spread(total: int, weights: Sequence[float]) -> tuple[int, ...]:
    """``total`` in whole parts that are as near to the proportions as their running sums can be."""
    scale, so_far, left = total / sum(weights), 0.0, 0
    parts = []
    for weight in weights:
        so_far += weight * scale
        parts.append(round(so_far) - left)
        left += parts[-1]
    return tuple(parts)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Options of :func:`gtp_vit.patch`, with ``num_prop`` from ``weights``."""

    options: Options
    weights: tuple[float, ...]

    def key(self) -> tuple[Any, ...]:
        """Equal for two that patch alike."""
        return tuple(sorted(self.options.items()))


@dataclasses.dataclass(frozen=True)
class Result:
    """What :func:`tune` found.

    Attributes:
        best: the options, for ``gtp_vit.patch(model, **best)``.
        loss: the mean angle to what the unpatched model gives (:func:`mean_angle`) on the images that decided.
        candidates: how many were tried.
        steps: how many small changes were tried, and how many of them were kept.
        finished: whether the halving came to its end before the time was over.
    """

    best: Options
    loss: float
    candidates: int
    steps: tuple[int, int]
    finished: bool


def tune(
    model: nn.Module,
    images: Tensor,
    gmacs: float,
    *,
    seconds: float = 600.0,
    patches: bool = False,
    num_candidates: int = 64,
    max_steps: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: Callable[[str, float], object] | None = None,
) -> Result:
    """The options with which ``model`` agrees best with itself unpatched, at ``gmacs`` of work.

    The first half of the time goes to successive halving over ``num_candidates``, the rest to small changes of the
    best. A constant P is left, and a change is kept, only where the gain is above its standard error over the images.
    More time, or a faster machine, tries more; what is tried, and in which order, depends on ``seed`` alone.

    Args:
        model: of timm, not patched, in evaluation mode; it is as before afterwards.
        images: [n, 3, H, W] as the model wants them, on its device, in its dtype; H × W is the size that is tuned for.
        gmacs: of one image, not to be exceeded.
        seconds: how long it may take; what runs then is finished.
        patches: whether the features of the patches count too, beside the pooled feature and the logits.
        num_candidates: how many to start with.
        max_steps: how many small changes to try; ``None`` for as many as there is time for.
        batch_size: images of one forward.
        seed: of the candidates and of the changes.
        progress: called with what is going on, and the share of the time that is over.

    Raises:
        TypeError: a model that cannot be patched, or is not of timm.
        ValueError: a patched model; no images; ``gmacs`` out of reach.
    """
    if isinstance(vars(model).get("gtp"), GTPConfig):
        raise ValueError("model must not be patched: it is compared with itself unpatched")
    if not hasattr(model, "forward_features"):
        raise TypeError(f"model must be of timm, whose forward_features is compared; got {type(model).__name__}")
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"images must be [n, 3, H, W] with n > 0; got {tuple(images.shape)}")
    gmacs, seconds = checks.number("gmacs", gmacs), checks.number("seconds", seconds)
    start = time.monotonic()
    search = _Search(model, images, gmacs, patches, batch_size, random.Random(seed))
    pool = search.candidates(num_candidates)

    def over() -> float:
        return min(1.0, (time.monotonic() - start) / max(seconds, 1e-9))

    def say(what: str) -> None:
        if progress is not None:
            progress(what, over())

    count, finished, tried = min(FIRST_IMAGES, len(images)), True, len(pool)
    while True:
        losses: list[float] = []
        for number, candidate in enumerate(pool):
            # The first of all is judged even where there is no time, so that there is a result.
            if losses and over() >= 0.5:
                finished = False
                break
            losses.append(mean_angle(search.loss(candidate, slice(0, count))))
            say(f"{len(pool)} candidates on {count} images: {number + 1}")
        pool = [pool[rank] for rank in sorted(range(len(losses)), key=lambda rank: losses[rank])]
        plain = next((candidate for candidate in pool if len(set(candidate.weights)) == 1), None)
        if not finished or count == len(images):
            break
        pool = pool[: max(1, math.ceil(len(pool) / 2.5))]
        if plain is not None and plain not in pool:
            pool.append(plain)
        count = len(images) if len(pool) <= FINALISTS else min(2 * count, len(images))
    # A constant P is left only for what is better by more than chance, and of those for the surest.
    best, kept, steps = pool[0] if plain is None else plain, 0, 0
    loss = constant_loss = search.loss(best, slice(None))
    surest = 0.0
    for candidate in pool[:FINALISTS]:
        whole = search.loss(candidate, slice(None))
        if (surplus := _surplus(whole, constant_loss)) > surest:
            best, loss, surest = candidate, whole, surplus
    while over() < 1 and (max_steps is None or steps < max_steps):
        steps += 1
        say(f"step {steps}, {kept} kept, loss {mean_angle(loss):.5f}")
        other = search.changed(best)
        if other is None:
            continue
        # Half of the images say no to most changes.
        half = len(images) // 2
        first = search.loss(other, slice(0, half)) if half else loss[:0]
        if half and mean_angle(first) >= mean_angle(loss[:half]):
            continue
        whole = torch.cat((first, search.loss(other, slice(half, None))))
        if _surplus(whole, loss) > 0:
            best, loss, kept = other, whole, kept + 1
    return Result(_plain(best.options), mean_angle(loss), tried, (steps, kept), finished)


def _surplus(loss: Tensor, than: Tensor) -> float:
    """The mean gain over the images, in angles, less its standard error: a few images alone decide nothing."""
    gain = _angle(than) - _angle(loss)
    error = gain.std().item() / math.sqrt(len(gain)) if len(gain) > 1 else 0.0
    return gain.mean().item() - error


def constant(model: nn.Module, images: Tensor, gmacs: float) -> dict[str, Options]:
    """What needs no tuning, at the smallest constant P that brings the work to ``gmacs``; what cannot is left out.

    Args:
        images: [n, 3, H, W], for their size.
    """
    work = work_of(model, (images.shape[-2], images.shape[-1]))
    depth, found = len(work.blocks), {}
    selections = _selections(model)
    for name, options in BASELINES.items():
        if options.get("selection", selections[0]) not in selections:
            continue
        for num_prop in range(GTPConfig(**options).largest_num_prop(work.num_image_tokens, depth) + 1):
            fitted = _fitting(options, work.num_image_tokens)
            if _macs(work, fitted, (num_prop,) * depth) <= gmacs:
                found[f"{name}, P = {num_prop}"] = {**fitted, "num_prop": num_prop}
                break
    return found


def _selections(model: nn.Module) -> tuple[str, ...]:
    """Those of CHOICES that the model has: without a class token there is no attention of it."""
    found = []
    for name in CHOICES["selection"]:
        with contextlib.suppress(ValueError), patched(model, {"num_prop": 0, "selection": name}):
            found.append(name)
    if not found:
        # Says what is wrong with the model.
        with patched(model, {"num_prop": 0}):
            pass
    return tuple(found)


def _fitting(options: Options, num_image_tokens: int) -> Options:
    """With fewer neighbours where there are not enough tokens."""
    usual = min(8, num_image_tokens - 1)
    return options if options["graph_type"] in ("None", "Spatial") else {**options, "num_neighbours": usual}


def _plain(options: Options) -> Options:
    """As JSON has them."""
    return {**options, "num_prop": list(options["num_prop"])}


class _Search:
    """The candidates of one model, and how they do on its images."""

    def __init__(
        self, model: nn.Module, images: Tensor, gmacs: float, patches: bool, batch_size: int, draw: random.Random
    ) -> None:
        self.model, self.images, self.gmacs, self.draw = model, images, gmacs, draw
        self.patches, self.batch_size = patches, batch_size
        height, width = images.shape[-2:]
        self.work = _work(model, (height, width))
        unpatched = self.work.macs(GTPConfig(num_prop=0)) / 1e9
        if not 0 < gmacs <= unpatched:
            raise ValueError(
                f"gmacs must be above 0, and at most the {unpatched:.6g} of the unpatched model; got {gmacs}"
            )
        self.expected = outputs(model, images, patches=patches, batch_size=batch_size)
        n = self.work.num_image_tokens
        self.choices = dict(CHOICES)
        self.choices["num_neighbours"] = tuple(m for m in CHOICES["num_neighbours"] if m < n) or (0,)
        self.choices["selection"] = _selections(model)

    def loss(self, candidate: Candidate, part: slice) -> Tensor:
        """[images of ``part``]."""
        images = self.images[part]
        pooled, logits, patches = (None if tensor is None else tensor[part] for tensor in self.expected)
        assert pooled is not None
        expected = Outputs(pooled, logits, patches)
        with patched(self.model, candidate.options):
            found = outputs(self.model, images, patches=self.patches, batch_size=self.batch_size)
        return agreement(found, expected).loss

    def candidate(self, options: Options, weights: Sequence[float]) -> Candidate | None:
        """``None`` where the work cannot be reached, or an option does not fit."""
        selections = self.choices["selection"]
        if options.get("selection", selections[0]) not in selections:
            return None
        try:
            num_prop = fit(self.work, options, weights, self.gmacs)
        except ValueError:
            return None
        return Candidate({**options, "num_prop": num_prop}, tuple(weights))

    def candidates(self, count: int) -> list[Candidate]:
        """The baselines at a constant P, LiveGraph with other budgets, then drawn ones; no two alike."""
        depth = len(self.work.blocks)
        n = self.work.num_image_tokens
        found: dict[tuple[Any, ...], Candidate] = {}
        for options in reversed(BASELINES.values()):
            if (made := self.candidate(_fitting(options, n), (1.0,) * depth)) is not None:
                found[made.key()] = made
        if not found:
            # Says what is wrong with the target.
            fit(self.work, {**LIVE, "graph_type": "Spatial"}, (1.0,) * depth, self.gmacs)
        gentle, ramp = ([1 + slope * block / max(depth - 1, 1) for block in range(depth)] for slope in (0.4, 1.2))
        for live in (BASELINES[name] for name in BASELINES if name.startswith("LiveGraph")):
            options = _fitting(live, n)
            # The importance of the first block says little; after the attention of the last one a class token needs no
            # other any more.
            late = ([*budget[:-1], 6.0] for budget in ([1.0] * depth, gentle))
            for weights in (*late, ramp, gentle, [0.0] + [1.0] * (depth - 1), [0.0, *ramp[1:]]):
                if depth > 1 and (made := self.candidate(options, weights)) is not None:
                    found.setdefault(made.key(), made)
        for _ in range(20 * count):
            if len(found) >= count:
                break
            made = self.candidate(self._drawn_options(), self._drawn_weights(depth))
            if made is not None:
                found.setdefault(made.key(), made)
        return list(found.values())[: max(count, 1)]

    def _drawn_options(self) -> Options:
        propagation = self.draw.choices(("LiveGraph", "GraphProp", "None"), (8, 2, 1))[0]
        options: Options = {"propagation": propagation}
        for name in READ[propagation]:
            options[name] = self.draw.choice(self.choices[name])
        return _read_alone(options)

    def _drawn_weights(self, depth: int) -> list[float]:
        slope, spared = self.draw.uniform(-0.5, 1), self.draw.choice((0, 0, 1, 2))
        line = [1 + slope * (2 * block / max(depth - 1, 1) - 1) for block in range(depth)]
        weights = [0.0 if block < spared else weight for block, weight in enumerate(line)]
        return weights if any(weights) else [1.0] * depth

    def changed(self, candidate: Candidate) -> Candidate | None:
        """One small change; ``None`` where it leads nowhere."""
        weights = list(candidate.weights)
        options = {name: value for name, value in candidate.options.items() if name != "num_prop"}
        if self.draw.random() < 0.75:
            average = sum(weights) / len(weights)
            for block in self.draw.sample(range(len(weights)), min(self.draw.choice((1, 1, 2)), len(weights))):
                step = average * self.draw.choice((-1, -0.5, -0.25, 0.25, 0.5, 1))
                weights[block] = max(0.0, weights[block] + step)
            if not any(weights):
                return None
        else:
            name = self.draw.choice(READ[options["propagation"]])
            choices = self.choices[name]
            if name == "selection":
                options.setdefault(name, choices[0])
            if name in options:
                place = choices.index(options[name]) if options[name] in choices else 0
                options[name] = choices[min(max(place + self.draw.choice((-1, 1)), 0), len(choices) - 1)]
            if options.get("graph_type") in ("Mixed", "Semantic") and "num_neighbours" not in options:
                options["num_neighbours"] = self.draw.choice(self.choices["num_neighbours"])
        made = self.candidate(_read_alone(options), weights)
        return None if made is None or made.key() == candidate.key() else made


def _read_alone(options: Options) -> Options:
    """Without what nothing reads."""
    options = dict(options)
    if options["propagation"] == "None":
        options["graph_type"] = "None"
    if options.get("graph_type") in ("None", "Spatial"):
        options.pop("num_neighbours", None)
    return options
