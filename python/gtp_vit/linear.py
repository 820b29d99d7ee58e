"""Linear layers of a patched block at inference on a CPU: bias, GELU and residual in the epilogue of the product.

``nn.Linear`` writes the bias into its output, adds the product to it, and leaves the activation and the residual to
passes of their own. torch's oneDNN operators do all of it in one. Its compiler emits and takes them for frozen weights
only: in a compiled model they stand behind operators of ours, ``gtp_vit::linear`` and ``gtp_vit::linear_add``. Where
they do not apply (gradients, export, tracing, autocast, hooks, other types of module) the module is called as ever.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from gtp_kernels import backends

# FLOPs of a product from which on it is worth the dispatch of these operators, which costs more than nn.Linear's.
_WORTH = 30_000_000
_AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
# nn.Linear has a product of its own in bfloat16 where oneDNN has none: on a processor without AVX-512.
_DTYPES = frozenset(
    (torch.float32, torch.bfloat16) if _AVAILABLE and torch.ops.mkldnn._is_mkldnn_bf16_supported() else (torch.float32,)
)
# Feed-forwards of two linear layers, fc1 and fc2, by name: neither library is imported for the other's sake.
_TIMM = "timm.layers.mlp.Mlp"
_TRANSFORMERS = frozenset(
    f"transformers.models.{module}.modeling_{module}.{name}MLP"
    for module, name in (
        ("clip", "CLIP"),
        ("deit", "DeiT"),
        ("dinov2", "Dinov2"),
        ("dinov2_with_registers", "Dinov2WithRegisters"),
        ("siglip", "Siglip"),
        ("vit", "ViT"),
    )
)

_LIBRARY = torch.library.Library("gtp_vit", "DEF")
_LIBRARY.define("linear(Tensor x, Tensor weight, Tensor? bias, str activation, str algorithm) -> Tensor")
_LIBRARY.define("linear_add(Tensor x, Tensor residual, Tensor weight, Tensor? bias) -> Tensor")


@torch.library.impl(_LIBRARY, "linear", "CPU")
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, algorithm: str) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], algorithm)
    return out


@torch.library.impl(_LIBRARY, "linear_add", "CPU")
def _linear_add(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, bias, "add")
    return out


@torch.library.register_fake("gtp_vit::linear", lib=_LIBRARY)
def _(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, algorithm: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("gtp_vit::linear_add", lib=_LIBRARY)
def _(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.empty_like(residual)


def linear(layer: Any, x: Tensor) -> Tensor:
    """``layer(x)`` of [..., C_in]: [..., C_out]; fused for [B, N, C_in]."""
    if _takes(x) and _is_plain(layer, x) and _is_inference():
        return _product(x, layer)
    out: Tensor = layer(x)
    return out


def feed_forward(mlp: Any, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """``mlp(x)``, or ``residual + mlp(x)``.

    Args:
        mlp: any module; timm's ``Mlp`` with GELU, and neither dropout nor a norm inside, and the ones of the same
            form in transformers are fused.
        x, residual: [B, N, C].
    """
    gelu = None
    if _takes(x) and (kind := _gelu_of(mlp)) and _is_plain(mlp.fc1, x) and _is_plain(mlp.fc2, x) and _is_inference():
        gelu = kind(mlp)
    if gelu is None:
        out: Tensor = mlp(x)
        return out if residual is None else residual + out
    hidden = _product(x, mlp.fc1, "gelu", gelu)
    if residual is not None and _takes(residual) and residual.dtype == x.dtype and not _wants_gradient(residual):
        # No function of ours around torch's operator: the compiler may meet it as a frame, and cannot trace it.
        if torch.compiler.is_compiling():
            out = torch.ops.gtp_vit.linear_add(hidden, residual, mlp.fc2.weight, mlp.fc2.bias)
        else:
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
    out: Tensor
    if torch.compiler.is_compiling():
        out = torch.ops.gtp_vit.linear(x, layer.weight, layer.bias, activation, algorithm)
    else:
        out = torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, activation, [], algorithm)
    return out


def _takes(x: Tensor) -> bool:
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and x.dtype in _DTYPES
        and x.ndim == 3
        and x.numel() > 0
        and x.is_contiguous()
    )


def _is_plain(layer: Any, x: Tensor) -> bool:
    """Whether calling the layer would run one product in the type of x, without a gradient."""
    if type(layer) is not nn.Linear or has_hooks(layer):
        return False
    weight, bias = layer.weight, layer.bias
    return (
        type(weight) is nn.Parameter
        and weight.dtype == x.dtype
        and weight.is_contiguous()
        and (bias is None or bias.dtype == x.dtype)
        and 2 * _rows(x) * weight.numel() >= _WORTH
        and not _wants_gradient(x, weight, bias)
    )


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _rows(x: Tensor) -> int:
    """Rows of the product; in a compiled model those of one image, so that nothing is asked of the batch."""
    return x.shape[-2] if torch.compiler.is_compiling() else x.numel() // x.shape[-1]


def _is_inference() -> bool:
    """Whether nobody looks on who expects to see a linear layer, and the operators are there."""
    if torch.compiler.is_compiling():
        seen = _compiles_otherwise()
    else:
        seen = (
            torch.jit.is_tracing()  # type: ignore[attr-defined]  # not in its __all__
            or is_in_torch_dispatch_mode()
            or not torch._C._get_mkldnn_enabled()
            or _has_any_global_hook()
        )
    return (
        not seen
        and _AVAILABLE
        and forward_ad._current_level < 0
        and not torch.is_autocast_enabled("cpu")
        and backends.forced() in (None, "cpu")
    )


def _compiles_otherwise() -> bool:
    """Whether torch exports, packs the weights of linear layers itself (freezing), is to leave oneDNN alone, or calls
    hooks of every module. Later changes of these need ``torch.compiler.reset()``."""
    config = sys.modules.get("torch._inductor.config")
    freezes = config is not None and bool(config.freezing)
    return (
        torch.compiler.is_exporting() or freezes or not torch._C._get_mkldnn_enabled() or bool(_has_any_global_hook())
    )


# Called once, when torch.compile compiles, and not traced: is_exporting() would always be true.
_compiles_otherwise._dynamo_marked_constant = True  # type: ignore[attr-defined]  # an attribute of a function


def _gelu_of(mlp: Any) -> Callable[[Any], str | None] | None:
    """What reads the algorithm of the GELU between fc1 and fc2; None for a feed-forward that has no such form."""
    name = _name(mlp)
    return _timm_gelu if name == _TIMM else _transformers_gelu if name in _TRANSFORMERS else None


def _timm_gelu(mlp: Any) -> str | None:
    """The algorithm, where the feed-forward consists of two linear layers and the GELU; None for another one."""
    if type(mlp.act) is not nn.GELU or type(mlp.norm) is not nn.Identity:
        return None
    parts = (mlp, mlp.act, mlp.drop1, mlp.norm, mlp.drop2)
    if any(has_hooks(part) for part in parts) or any(_drops(part) for part in (mlp.drop1, mlp.drop2)):
        return None
    return str(mlp.act.approximate)


def _transformers_gelu(mlp: Any) -> str | None:
    """The same for transformers, whose activations are modules around a function."""
    activation = mlp.activation_fn
    if has_hooks(mlp) or has_hooks(activation):
        return None
    if type(activation) is nn.GELU:
        return str(activation.approximate)
    if _name(activation) not in ("transformers.activations.GELUActivation", "transformers.activations.GELUTanh"):
        return None
    act = activation.act
    if act is nn.functional.gelu:
        return "none"
    if type(act) is functools.partial and act.func is nn.functional.gelu and not act.args:
        return "tanh" if act.keywords == {"approximate": "tanh"} else None
    return None


def _name(module: Any) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _drops(module: Any) -> bool:
    if type(module) is nn.Identity:
        return False
    return not (type(module) is nn.Dropout and (module.p == 0.0 or not module.training))
