"""The one tolerance table of the suite: (rtol, atol) by dtype, each with its reason."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = {
    # Sums of up to about 1,000 products in another order: some 1e-6 relative, and 1e-6 absolute near zero.
    torch.float32: (2e-5, 5e-6),
    # The same in double precision.
    torch.float64: (1e-11, 1e-12),
    # Computed in float32 and rounded once: one unit in the last of 8 bits, next to a rounding boundary.
    torch.bfloat16: (2**-7, 1e-4),
    # Likewise, 11 bits.
    torch.float16: (2**-10, 2e-5),
}

# The share of the error of eager PyTorch in the same half type that a kernel may make which rounds the weights to that
# type before they multiply v, as FlashAttention does.
OF_EAGER = 2.0


def rounds_weights(backend: str | None, dtype: torch.dtype) -> bool:
    """Whether the backend's attention of this type may: where its products take two half operands."""
    return (backend in ("triton", "cuda") and dtype.itemsize == 2) or (backend == "cpu" and dtype == torch.bfloat16)


def close(actual: Tensor, expected: Tensor, slack: Tensor | float = 0.0) -> None:
    """Asserts |actual − expected| ≤ atol + rtol·|expected| + slack; the same shape, dtype and places of NaN.

    ``slack`` is what the computation itself leaves open, per element: each caller says what.
    """
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert actual.dtype == expected.dtype, (actual.dtype, expected.dtype)
    assert torch.equal(actual.isnan(), expected.isnan()), "NaN in other places"
    rtol, atol = TOLERANCE[actual.dtype]
    bound = atol + rtol * expected.double().abs() + slack
    excess = (actual.double() - expected.double()).abs().nan_to_num(0.0) - bound.nan_to_num(0.0, posinf=0.0)
    assert excess.numel() == 0 or float(excess.max()) <= 0, f"exceeds the tolerance by {float(excess.max())}"
