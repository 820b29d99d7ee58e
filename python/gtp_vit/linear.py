"""Linear layers of a patched block at inference on a CPU: bias, GELU and residual in the epilogue of the product.

``nn.Linear`` writes the bias into its output, adds the product to it, and leaves the activation and the residual to
passes of their own. torch's oneDNN operators (the ones that its compiler emits) do all of it in one. Where they do not
apply (gradients, tracing, autocast, hooks, other types of module) the module is called as ever.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.mlp import Mlp
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from gtp_kernels import backends


def linear(layer: Any, x: Tensor) -> Tensor:
    """``layer(x)`` of [..., C_in]: [..., C_out]."""
    if not _applies(layer, x):
        out: Tensor = layer(x)
        return out
    return _product(x, layer)


def feed_forward(mlp: Any, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """``mlp(x)``, or ``residual + mlp(x)``.

    Args:
        mlp: any module; timm's ``Mlp`` with GELU, and neither dropout nor a norm inside, is fused.
        x, residual: [B, N, C].
    """
    gelu = _gelu(mlp)
    if gelu is None or not (_applies(mlp.fc1, x) and _applies(mlp.fc2, x)):
        out: Tensor = mlp(x)
        return out if residual is None else residual + out
    hidden = _product(x, mlp.fc1, "gelu", gelu)
    if residual is not None and residual.dtype == x.dtype and residual.is_contiguous():
        out = torch.ops.mkldnn._linear_pointwise.binary(hidden, residual, mlp.fc2.weight, mlp.fc2.bias, "add")
        return out
    out = _product(hidden, mlp.fc2)
    return out if residual is None else residual + out


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module would run more than its forward: such a module is called, never folded away."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )


def _product(x: Tensor, layer: nn.Linear, activation: str = "none", algorithm: str = "") -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, activation, [], algorithm)
    return out


def _applies(layer: Any, x: Tensor) -> bool:
    return (
        type(layer) is nn.Linear
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and layer.weight.dtype == x.dtype
        and (layer.bias is None or layer.bias.dtype == x.dtype)
        and x.numel() > 0
        and x.is_contiguous()
        and layer.weight.is_contiguous()
        and not has_hooks(layer)
        and not (torch.is_grad_enabled() and (x.requires_grad or layer.weight.requires_grad))
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]  # not in its __all__
        and not torch.is_autocast_enabled("cpu")
        and not is_in_torch_dispatch_mode()
        and type(x) is Tensor
        and type(layer.weight) is nn.Parameter
        and _available()
        and backends.forced() in (None, "cpu")
    )


def _available() -> bool:
    return bool(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled) and hasattr(
        torch.ops.mkldnn, "_linear_pointwise"
    )


def _gelu(mlp: Any) -> str | None:
    """The algorithm of the GELU of a feed-forward that consists of two linear layers and it; None for another one."""
    if type(mlp) is not Mlp or type(mlp.act) is not nn.GELU or type(mlp.norm) is not nn.Identity:
        return None
    parts = (mlp, mlp.act, mlp.drop1, mlp.norm, mlp.drop2)
    if any(has_hooks(part) for part in parts) or any(_drops(part) for part in (mlp.drop1, mlp.drop2)):
        return None
    return str(mlp.act.approximate)


def _drops(module: Any) -> bool:
    if type(module) is nn.Identity:
        return False
    return not (type(module) is nn.Dropout and (module.p == 0.0 or not module.training))
