"""A model as one CUDA graph: for small batches, where a forward is bound by the launches of its kernels."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_WARMUP = 3
_warned: set[str] = set()


class Graphed:
    """What :func:`graphed` returns: a callable on inputs of one shape, dtype and device.

    Attributes:
        model: that was given.
        fallback: why each call runs the model operator by operator; None where a graph is replayed.
    """

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        self.model = model
        self._shape, self._dtype, self._device = example.shape, example.dtype, example.device
        self._lock = threading.Lock()
        self.fallback = _unfit(example)
        if self.fallback is None:
            try:
                self._capture(example)
            except RuntimeError as error:
                lines = str(error).strip().splitlines() or [type(error).__name__]
                self.fallback = f"the capture failed: {lines[0]}"
        if self.fallback is not None and self.fallback not in _warned:
            _warned.add(self.fallback)
            warnings.warn(
                f"gtp_vit.graphed runs {type(model).__name__} operator by operator: {self.fallback}", stacklevel=3
            )

    def _capture(self, example: Tensor) -> None:
        with torch.no_grad(), torch.cuda.device(self._device):
            self._input = example.detach().clone()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            # What is compiled, tuned or allocated by the first calls must not be part of the graph.
            with torch.cuda.stream(stream):
                for _ in range(_WARMUP):
                    self.model(self._input)
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._output = self.model(self._input)
            self._done = torch.cuda.Event()
            self._done.record()

    def __call__(self, x: Tensor) -> Any:
        """``model(x)`` without gradients.

        Raises:
            TypeError: ``x`` is no tensor.
            ValueError: its shape, dtype or device is not that of the example.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor; got {type(x).__name__}")
        for name, got, needed in (
            ("shape", tuple(x.shape), tuple(self._shape)),
            ("dtype", x.dtype, self._dtype),
            ("device", x.device, self._device),
        ):
            if got != needed:
                raise ValueError(
                    f"x must have the {name} of the example, {needed}; got {got} (call gtp_vit.graphed for each)"
                )
        with torch.no_grad():
            if self.fallback is not None:
                return self.model(x)
            with self._lock, torch.cuda.device(self._device):
                stream = torch.cuda.current_stream()
                # Another call may be under way on another stream, with the same buffers.
                stream.wait_event(self._done)
                self._input.copy_(x)
                self._graph.replay()
                out = pytree.tree_map_only(Tensor, torch.clone, self._output)
                self._done.record(stream)
                return out


def graphed(model: nn.Module, example: Tensor) -> Graphed:
    """A callable that computes ``model(x)`` as one CUDA graph, for inputs like ``example``.

    A forward at batch 1 launches hundreds of small kernels, and on a GPU the launches take longer than the kernels; a
    graph launches once. Any model does, patched or not: the shapes of a patched one are fixed by its schedule of P.
    On other devices, and where the capture fails (an operator that synchronises, as the backend ``reference`` does),
    the callable runs the model as it is; a warning says why, once, and ``fallback`` keeps it.

    Args:
        model: in evaluation mode. Values of its weights may change afterwards; which tensors hold them may not, nor may
            it be patched or unpatched. Its hooks run while it is captured, not afterwards. Autocast and a forced
            backend are those of now.
        example: a batch [B, 3, H, W] on the model's device. Its values do not matter.

    Returns:
        A callable that takes a tensor and returns what the model returns, in memory of its own. It may be called from
        several threads; the calls take turns.

    Raises:
        TypeError: not a module, or not a tensor.
        ValueError: a model in training mode. The callable raises it for an input of another shape, dtype or device.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module; got {type(model).__name__}")
    if not isinstance(example, Tensor):
        raise TypeError(f"example must be a tensor; got {type(example).__name__}")
    if model.training:
        raise ValueError("model must be in evaluation mode (model.eval()); got one in training mode")
    return Graphed(model, example)


def _unfit(example: Tensor) -> str | None:
    """Why there can be no graph for such an input."""
    if example.device.type != "cuda":
        return f"CUDA graphs need a GPU; the example is on {example.device.type}"
    if example.numel() == 0:
        return "the example is empty"
    return None
