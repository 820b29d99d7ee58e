"""Registration of the operators: schemas, and the helpers that the op files share.

With the native library, C++ has defined the operators already and holds their CPU kernels; without it they are
defined here from the same ``schemas.txt`` and run the reference. The Triton kernels are operators of the same names and
schemas in a namespace of their own, so that torch.compile sees through them to the kernels; they come into being when
``gtp_kernels.triton`` is first needed. The CUDA C++ kernels are those of GPU tensors in the namespace of C++; emulated,
for tests, they are operators of a third namespace, which a library of its own defines when they are first needed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gtp_kernels import native

NAMESPACE = "gtp_kernels"
TRITON_NAMESPACE = "gtp_kernels_triton"
EMULATED_NAMESPACE = "gtp_kernels_cuda_emulated"
SCHEMAS = [
    line
    for line in Path(__file__).with_name("schemas.txt").read_text().splitlines()
    if line.strip() and not line.startswith("#")
]

fakes: dict[str, Callable[..., Any]] = {}
backwards: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {}
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
if native.missing is not None:
    for _schema in SCHEMAS:
        _library.define(_schema)


def implement(name: str, kernel: Callable[..., Any]) -> None:
    """Registers a Python kernel for every device, where there is no native library."""
    if native.missing is not None:
        _library.impl(name, kernel, "CompositeExplicitAutograd")


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the fake (meta) kernel of an operator, in every namespace."""

    def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
        fakes[name] = kernel
        torch.library.register_fake(f"{NAMESPACE}::{name}", kernel, lib=_library)
        return kernel

    return register


def autograd(name: str, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
    """The backward of an operator, in every namespace: ``backward(ops, ctx, *grads)`` calls operators of ``ops``."""
    backwards[name] = (backward, setup_context)
    call = functools.partial(backward, getattr(torch.ops, NAMESPACE))
    torch.library.register_autograd(f"{NAMESPACE}::{name}", call, setup_context=setup_context, lib=_library)


def operators(backend: str) -> Any:
    """The namespace of operators that ``backend`` runs."""
    if backend == "triton":
        return getattr(torch.ops, TRITON_NAMESPACE)
    if backend == "cuda" and native.EMULATED:
        return getattr(torch.ops, EMULATED_NAMESPACE)
    return getattr(torch.ops, NAMESPACE)


def complete(namespace: str, name: str, library: torch.library.Library | None = None) -> None:
    """Gives an operator of another namespace the fake kernel and the autograd that it has here."""
    full = f"{namespace}::{name}"
    torch.library.register_fake(full, fakes[name], lib=library)
    if name in backwards:
        backward, setup_context = backwards[name]
        call = functools.partial(backward, getattr(torch.ops, namespace))
        torch.library.register_autograd(full, call, setup_context=setup_context, lib=library)


@functools.cache
def load_emulated() -> torch.library.Library:
    """Loads the emulated CUDA kernels and completes their operators, once; what holds the registrations."""
    torch.ops.load_library(str(native.emulated_library()))
    library = torch.library.Library(EMULATED_NAMESPACE, "FRAGMENT")
    for schema in SCHEMAS:
        name = schema.partition("(")[0]
        if hasattr(getattr(torch.ops, EMULATED_NAMESPACE), name):
            complete(EMULATED_NAMESPACE, name, library)
    return library


def refuse_forward_mode(*tensors: Tensor | None) -> None:
    """An error where a tensor carries a forward-mode tangent, which an operator would drop without a word."""
    if torch.autograd.forward_ad._current_level < 0:
        return
    for tensor in tensors:
        if tensor is not None and torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError(
                "the fused operators have reverse-mode gradients only; for forward mode (jvp) use the plain PyTorch "
                "definition: with gtp_kernels.use_backend('reference')"
            )


def absent(like: Tensor, dtype: torch.dtype) -> Tensor:
    """The empty tensor [0] that stands for a result that does not apply."""
    return like.new_empty(0, dtype=dtype)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where autocast is on for their device, as SDPA takes them; else as they are."""
    device_type = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        if all(isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 for t in tensors):
            return tuple(t.to(dtype) for t in tensors)
    return tensors
