"""What every launcher needs: whether the interpreter runs, how a kernel is launched, small integers."""

from __future__ import annotations

import os
from typing import Any

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether the kernels run in Triton's interpreter, on CPU tensors. Fixed when the kernels are defined."""


def launch(kernel: Any) -> Any:
    """The kernel, as a launcher may call it inside an operator: visible to torch.compile outside the interpreter."""
    return kernel if INTERPRETED else torch.library.wrap_triton(kernel)


def any_zero(*sizes: Any) -> bool:
    """Whether one of the sizes is 0, as far as is known: a symbolic batch is not looked at, and not 0."""
    return any(isinstance(size, int) and size == 0 for size in sizes)


def next_power_of_2(value: int) -> int:
    """The smallest power of two that is at least ``value`` (1 for 0)."""
    return 1 << max(value - 1, 0).bit_length()
