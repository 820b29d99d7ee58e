"""The Triton kernels, as operators of the namespace ``gtp_kernels_triton``; imported when the backend is first chosen.

Each module of this package has the kernels of one stem and, per operator, a launcher with the operator's signature.
Outside the interpreter an operator is a ``triton_op``, so that torch.compile and AOTInductor see through it to the
kernels; under ``TRITON_INTERPRET=1`` (set before this import) it launches the interpreted kernels, on CPU tensors.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton

from gtp_kernels.ops import _library
from gtp_kernels.triton import attention, attention_backward, graph, live, propagate, runtime, select

LAUNCHERS: dict[str, Callable[..., Any]] = {
    "attention_with_scores": attention.attention_with_scores,
    "attention_with_scores_backward": attention_backward.attention_with_scores_backward,
    "token_importance": select.token_importance,
    "select_tokens": select.select_tokens,
    "propagate": propagate.propagate,
    "propagate_backward": propagate.propagate_backward,
    "propagate_dense": propagate.propagate_dense,
    "residual_propagate_norm": propagate.residual_propagate_norm,
    "select_residual_propagate_norm": propagate.select_residual_propagate_norm,
    "build_graph": graph.build_graph,
    "live_graph": live.live_graph,
    "live_select": live.live_select,
    "live_merge": live.live_merge,
}


def _name_kernels(operator: str, launcher: Callable[..., Any]) -> None:
    """Tells torch which kernels an operator launches: their source is part of the key of torch.compile's caches.

    torch looks for calls of ``wrap_triton`` by name and does not find them behind ``runtime.launch``.
    """
    known = getattr(torch._library.triton, "triton_ops_to_kernels", None)
    if known is not None:
        # attention_backward launches kernels of attention too, and both call functions of attention_map.
        stem = launcher.__module__.partition("_backward")[0]
        modules = [module for name, module in sys.modules.items() if name.startswith(stem)]
        # A launcher may call those of modules that its own has imported.
        held = [value for module in modules for value in vars(module).values() if inspect.ismodule(value)]
        modules += [module for module in held if module.__name__.startswith(__name__)]
        values = [value for module in modules for value in vars(module).values()]
        known[operator] = list(dict.fromkeys(value for value in values if isinstance(value, triton.JITFunction)))


def _register(name: str, launcher: Callable[..., Any]) -> None:
    schema = next(line for line in _library.SCHEMAS if line.startswith(f"{name}("))
    full, signature = f"{_library.TRITON_NAMESPACE}::{name}", schema[len(name) :]
    if runtime.INTERPRETED:
        torch.library.custom_op(full, launcher, mutates_args=(), schema=signature)
    else:
        torch.library.triton_op(full, launcher, mutates_args=(), schema=signature)
        _name_kernels(full, launcher)
    _library.complete(_library.TRITON_NAMESPACE, name)


for _name, _launcher in LAUNCHERS.items():
    _register(_name, _launcher)
