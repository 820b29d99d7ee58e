"""What a patched model did in a forward: which tokens stayed, which left, and where their content went.

A trace is looked up once per forward, in a context variable, so that it costs nothing when it is off and other
threads are not seen. While ``torch.compile`` traces a model nothing is recorded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

import gtp_kernels
from gtp_kernels import TokenGraph
from gtp_vit.config import GTPConfig


@dataclass(frozen=True, eq=False)
class LayerRecord:
    """One block of one forward, for B images.

    Attributes:
        index_kept: int64 [B, K], the rows of the block's input that stayed, prefix counted, in grid order.
        index_prop: int64 [B, P], the rows that left.
        kept_tokens: int64 [B, K], the image tokens (0 to n − 1) behind ``index_kept``; −1 for a row that ``Mean`` made.
        prop_tokens: int64 [B, P], the same for ``index_prop``.
        importance: [B, image rows] float32 (float64 in a float64 model), what the selection judged; ``None`` where no
            token left.
        token_scales: float32 [B, rows after the block], prefix counted: how many tokens each stands for
            (Equation 12); ``None`` where they are not tracked or all still one.
    """

    index_kept: Tensor
    index_prop: Tensor
    kept_tokens: Tensor
    prop_tokens: Tensor
    importance: Tensor | None
    token_scales: Tensor | None


class _Entry(NamedTuple):
    index_kept: Tensor
    index_prop: Tensor
    importance: Tensor | None
    target: Tensor | None = None
    share: Tensor | None = None


class Step(NamedTuple):
    """A block in which image rows left: their rows and the original tokens behind them, prefix not counted; with live
    edges also the place of the row that each was merged into (−1: dropped)."""

    block: int
    kept: Tensor
    prop: Tensor
    kept_tokens: Tensor
    prop_tokens: Tensor
    target: Tensor | None


class Recorder:
    """Collects the blocks of one forward, by index: a block that gradient checkpointing runs again says the same.

    ``traced`` says whether somebody will look at the importance; restoring the grid needs the rows alone.
    """

    def __init__(
        self,
        config: GTPConfig,
        depth: int,
        batch: int,
        grid_size: tuple[int, int],
        num_prefix: int,
        device: torch.device,
        traced: bool = True,
    ) -> None:
        self.config, self.depth, self.batch = config, depth, batch
        self.grid_size, self.num_prefix, self.device = grid_size, num_prefix, device
        self.traced = traced
        self.graph: TokenGraph | None = None
        self.entries: dict[int, _Entry] = {}
        self.token_scales: dict[int, Tensor | None] = {}

    def add(
        self,
        block: int,
        index_kept: Tensor,
        index_prop: Tensor,
        importance: Tensor | None,
        target: Tensor | None = None,
        share: Tensor | None = None,
    ) -> None:
        """The tokens of ``block`` that stay and leave; with live edges where they go, and with which share."""
        importance = None if importance is None else importance.detach()
        self.entries[block] = _Entry(index_kept, index_prop, importance, target, share)

    def finish(self, block: int, token_scales: Tensor | None) -> None:
        """The token scales after ``block``."""
        self.token_scales[block] = token_scales

    def first_tokens(self) -> Tensor:
        """int64 [B, n]: the image tokens before the first block."""
        height, width = self.grid_size
        return torch.arange(height * width, device=self.device).expand(self.batch, -1)

    def steps(self) -> list[Step]:
        """The blocks in which tokens left, in order; −1 is the token of a row that ``Mean`` made."""
        steps, token = [], self.first_tokens()
        for block in sorted(self.entries):
            entry = self.entries[block]
            kept, prop = entry.index_kept - self.num_prefix, entry.index_prop - self.num_prefix
            steps.append(Step(block, kept, prop, token.gather(1, kept), token.gather(1, prop), entry.target))
            token = steps[-1].kept_tokens
            if self.config.propagation == "Mean":
                token = torch.cat((token, token.new_full((self.batch, 1), -1)), 1)
        return steps

    def num_rows(self, after: int | None = None) -> int:
        """Image rows after block ``after``; after the last one by default."""
        height, width = self.grid_size
        rows = height * width
        for block, entry in self.entries.items():
            if after is None or block <= after:
                rows += int(self.config.propagation == "Mean") - entry.index_prop.shape[1]
        return rows


class Trace:
    """The most recent forward of the model under :func:`trace`.

    Attributes:
        grid_size: (height, width) of the image tokens of that forward.
        num_prefix: R, the rows before the image rows.
        layers: one :class:`LayerRecord` per block.

    Every attribute raises ``RuntimeError`` while no forward was recorded.
    """

    def __init__(self) -> None:
        self._recorder: Recorder | None = None

    def _recorded(self) -> Recorder:
        if self._recorder is None:
            raise RuntimeError(
                "no forward was recorded: run the patched model, uncompiled, inside `with gtp_vit.trace(model)`"
            )
        return self._recorder

    @property
    def grid_size(self) -> tuple[int, int]:
        return self._recorded().grid_size

    @property
    def num_prefix(self) -> int:
        return self._recorded().num_prefix

    @property
    def layers(self) -> tuple[LayerRecord, ...]:
        recorder = self._recorded()
        steps = {step.block: step for step in recorder.steps()}
        token = recorder.first_tokens()
        layers = []
        for block in range(recorder.depth):
            if block not in recorder.token_scales:
                break
            scales = recorder.token_scales[block]
            if block not in steps:
                index_kept = torch.arange(token.shape[1], device=recorder.device).expand(recorder.batch, -1)
                none = token[:, :0]
                layers.append(LayerRecord(index_kept + recorder.num_prefix, none, token, none, None, scales))
                continue
            entry, step = recorder.entries[block], steps[block]
            layers.append(LayerRecord(*entry[:2], step.kept_tokens, step.prop_tokens, entry.importance, scales))
            token = step.kept_tokens
            if recorder.config.propagation == "Mean":
                token = torch.cat((token, token.new_full((recorder.batch, 1), -1)), 1)
        return tuple(layers)

    def lineage(self) -> Tensor:
        """How much of each original patch every final image row carries: float32 [B, final image rows, n].

        The propagation of every block (x_i += α Σ_j Â_ij x_j; the others alike) is linear in x, so it is
        applied to the n × n identity: row i of the result holds the weights with which the n patches entered row i.
        """
        recorder = self._recorded()
        height, width = recorder.grid_size
        config, weight = recorder.config, recorder.graph
        x = torch.eye(height * width, device=recorder.device).repeat(recorder.batch, 1, 1)
        for block in sorted(recorder.entries):
            entry = recorder.entries[block]
            if entry.target is not None and entry.share is not None:  # live edges
                kept, prop = entry.index_kept - recorder.num_prefix, entry.index_prop - recorder.num_prefix
                x = _merged(x, kept, prop, entry.target, entry.share)
                continue
            x, after, _ = gtp_kernels.propagate(
                x,
                weight,
                entry.index_kept - recorder.num_prefix,
                entry.index_prop - recorder.num_prefix,
                config.propagation,
                config.alpha,
                num_prefix=0,
            )
            weight = after if isinstance(after, TokenGraph) else None
        return x


def _merged(x: Tensor, kept: Tensor, prop: Tensor, target: Tensor, share: Tensor) -> Tensor:
    """Image rows x [B, n, C] after a block of live edges: the weighted sums of the rows that became one."""
    place = torch.full(share.shape, -1, device=x.device).scatter(1, prop, target)
    place = place.scatter(1, kept, torch.arange(kept.shape[1], device=x.device).expand_as(kept))
    rows = (place % (kept.shape[1] + 1)).unsqueeze(2).expand_as(x)  # what was dropped goes to one row more
    total = x.new_zeros(x.shape[0], kept.shape[1] + 1, x.shape[2])
    return total.scatter_add_(1, rows, x * share.unsqueeze(2).to(x.dtype))[:, :-1]


_ACTIVE: ContextVar[tuple[tuple[nn.Module, Trace], ...]] = ContextVar("gtp_vit_traces", default=())


@contextmanager
def trace(model: nn.Module) -> Iterator[Trace]:
    """Records the forwards of ``model`` that run in this context (this thread); the latest one is kept.

    Args:
        model: a patched model (not a wrapper such as the result of ``torch.compile``); where its vision tower is what
            tokens leave from, the forwards of the tower.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``model`` is not patched.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a patched model; got {type(model).__name__}")
    if not isinstance(vars(model).get("gtp"), GTPConfig):
        raise ValueError(
            f"model must be patched by gtp_vit.patch, and not wrapped after that; got {type(model).__name__}"
        )
    # A model around a tower has the options too, and comes before it.
    traced = [module for module in model.modules() if isinstance(vars(module).get("gtp"), GTPConfig)][-1]
    result = Trace()
    token = _ACTIVE.set((*_ACTIVE.get(), (traced, result)))
    try:
        yield result
    finally:
        _ACTIVE.reset(token)


def start_recording(
    model: nn.Module,
    config: GTPConfig,
    depth: int,
    batch: int,
    grid_size: tuple[int, int],
    num_prefix: int,
    device: torch.device,
) -> Recorder | None:
    """The recorder of a forward of ``model`` that begins now; ``None`` where nothing reads it.

    A trace does, and ``config.restore``. While ``torch.compile`` traces the model no :func:`trace` is seen.
    """
    traces: list[Trace] = []
    if not torch.compiler.is_compiling():
        traces = [result for traced, result in _ACTIVE.get() if traced is model]
    if not traces and not config.restore:
        return None
    recorder = Recorder(config, depth, batch, grid_size, num_prefix, device, traced=bool(traces))
    for result in traces:
        result._recorder = recorder
    return recorder
