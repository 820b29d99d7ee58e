"""Which backend runs an op, and why the others do not.

A backend answers "can you run this?" with a reason. The choice is made in one place, :func:`choose`; a forced backend
(:func:`use_backend`, or the variable ``GTP_KERNELS_BACKEND``) that cannot run is an error that lists every answer.

On GPU tensors ``triton`` is the default. ``cuda`` comes before it for the shape classes that ``evidence.json`` lists:
those for which a committed result file shows it correct, and faster than ``triton`` in the same run.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import threading
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from gtp_kernels import native

NAMES = ("reference", "cpu", "triton", "cuda")
OPS = ("attention", "select", "propagate", "graph", "live")
EVIDENCE = Path(__file__).with_name("evidence.json")
_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}
_DIFFERENTIABLE = ("attention", "propagate")
# What the CUDA kernels of the attention are built for.
_CUDA_MAX_HEAD_SIZE = 128


class BackendWarning(UserWarning):
    """An automatic choice left the fast path."""


class BackendError(RuntimeError):
    """A forced backend cannot run an op; ``reason`` says why."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class _State(threading.local):
    forced: tuple[str, ...] = ()
    recording: list[tuple[str, str]] | None = None


_state = _State()
_warned: set[str] = set()
_lock = threading.Lock()
_active: list[str] = []
# What compiled code guards on: the names forced in any thread now. The choice itself reads the thread's own.
_guard = ""


def _check_name(name: object, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source} must be one of {', '.join(NAMES)}; got {name!r}")
    return str(name)


class use_backend:  # noqa: N801  # a context manager named like a function, as torch.no_grad is
    """Context manager that forces a backend in this thread.

    Args:
        name: ``reference``, ``cpu``, ``triton`` or ``cuda``.

    Raises:
        ValueError: an unknown name, at once.
        RuntimeError: at the first op that the backend cannot run, with the reason of every backend.

    Code under ``torch.compile`` keeps the backend that was forced when it was compiled, and is compiled anew when
    another one is forced. Enter the context outside of the compiled function; inside of it this raises. Threads that
    force different backends at the same time should not share one compiled function.
    """

    def __init__(self, name: str) -> None:
        self.name = _check_name(name, "the backend")

    def __enter__(self) -> use_backend:
        global _guard
        if torch.compiler.is_compiling():
            raise RuntimeError("use_backend must be entered outside of the function that torch.compile traces")
        _state.forced = (*_state.forced, self.name)
        with _lock:
            _active.append(self.name)
            _guard = ",".join(sorted(_active))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _guard
        _state.forced = _state.forced[:-1]
        with _lock:
            _active.remove(self.name)
            _guard = ",".join(sorted(_active))


class record:  # noqa: N801  # as above
    """Context manager; its value is the list of (op, backend) chosen in this thread while it is open.

    Compiled code chooses when it is compiled, not when it runs.
    """

    def __enter__(self) -> list[tuple[str, str]]:
        self._outer, _state.recording = _state.recording, []
        return _state.recording

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _state.recording = self._outer


def forced() -> str | None:
    """The backend forced in this thread by :func:`use_backend`, else by ``GTP_KERNELS_BACKEND``, else None."""
    if _state.forced:
        return _state.forced[-1]
    variable = os.environ.get("GTP_KERNELS_BACKEND")
    return _check_name(variable, "GTP_KERNELS_BACKEND") if variable else None


def refusal(
    backend: str,
    op: str,
    device_type: str,
    dtype: torch.dtype | None = None,
    needs_grad: bool = False,
    dense: bool = False,
    size_fits: bool = True,
) -> str | None:
    """Why ``backend`` cannot run ``op``; None where it can.

    Args:
        backend, op: one of NAMES, one of OPS.
        device_type: of the tensors.
        dtype: theirs; None leaves it open, as each of the following does by default.
        needs_grad: whether a gradient will be asked for.
        dense: whether the weight of ``propagate`` is dense.
        size_fits: whether the attention's head size is one that the CUDA kernels are built for.
    """
    if backend == "reference":
        return None
    if backend == "cpu":
        if native.missing is not None:
            return native.missing
        # Meta tensors carry no data: the operator's fake kernel answers for every backend.
        return None if device_type in ("cpu", "meta") else f"it takes CPU tensors; these are on {device_type}"
    if backend == "triton":
        return _triton_refusal(device_type)
    missing = native.emulation_missing() if native.EMULATED else native.cuda_missing()
    return missing or _cuda_refusal(op, device_type, dtype, needs_grad, dense, size_fits)


def _cuda_refusal(
    op: str, device_type: str, dtype: torch.dtype | None, needs_grad: bool, dense: bool, size_fits: bool
) -> str | None:
    if native.EMULATED:
        if device_type != "cpu":
            return f"its emulation takes CPU tensors; these are on {device_type}"
    elif device_type != "cuda":
        return f"it takes GPU tensors; these are on {device_type}"
    if op == "attention" and dtype not in (None, torch.float16, torch.bfloat16):
        return f"its attention takes float16 and bfloat16; these are {dtype}"
    if dtype == torch.float64:
        return f"it takes no float64 in {op} (triton does)"
    if not size_fits:
        return f"its attention takes head sizes from 1 to {_CUDA_MAX_HEAD_SIZE}"
    if dense:
        return "it propagates along a TokenGraph and has no kernel for a dense weight (triton has)"
    return "it has no backward kernels (triton has)" if needs_grad else None


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _triton_refusal(device_type: str) -> str | None:
    if not _has_triton():
        return "triton is not installed (pip install triton)"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None if device_type == "cpu" else f"its interpreter takes CPU tensors; these are on {device_type}"
    return None if device_type == "cuda" else f"it takes GPU tensors; these are on {device_type}"


def choose(
    op: str,
    tensor: Tensor,
    *others: Tensor | None,
    dtype: torch.dtype | None = None,
    dense: bool = False,
    num_prefix: int = 0,
) -> str:
    """The backend that runs ``op`` on tensors like ``tensor``.

    Args:
        op: one of OPS.
        tensor: q, [B, N, C] of the residual stream, or scores or importance, whose last size is N.
        others: what else of the call a gradient may be asked for.
        dtype: of the arithmetic, where that is not the tensor's.
        dense: whether the weight of ``propagate`` is dense.
        num_prefix: what N lacks in ``tensor``.

    Raises:
        RuntimeError: the forced backend cannot run it, or the device has no backend; every reason is listed.
    """
    device = tensor.device
    # What follows is for ``cuda`` alone.
    if device.type != "cuda" and not native.EMULATED:
        return _choose(_guard, op, device.type)
    dtype = tensor.dtype if dtype is None else dtype
    needs_grad = op in _DIFFERENTIABLE and torch.is_grad_enabled() and any_requires_grad(tensor, *others)
    fits, measured = True, False
    # Sizes may be symbols: torch.compile sees the branches on them here.
    if op == "attention":
        size = tensor.shape[-1]
        if size < 1 or size > _CUDA_MAX_HEAD_SIZE:
            fits = False
    if device.type == "cuda" and (classes := _measured_classes(op, dtype, device.index)):
        measured = _covered(classes, *_sizes(op, tensor, num_prefix))
    return _choose(_guard, op, device.type, dtype, needs_grad, dense, fits, measured)


def any_requires_grad(*tensors: Tensor | None) -> bool:
    """Whether one of the tensors does."""
    for tensor in tensors:  # noqa: SIM110  # a loop costs half of what any() over a generator does
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def _sizes(op: str, tensor: Tensor, num_prefix: int) -> tuple[int, int]:
    """N, and the head size or the channels, whichever the tensor has; 0 for importance and for a graph's ``indptr``."""
    if op == "select":
        return tensor.shape[-1] + num_prefix, 0
    if not tensor.is_floating_point():
        return tensor.shape[-1], 0
    return tensor.shape[-2], tensor.shape[-1]


def _covered(classes: tuple[tuple[int, int, int], ...], tokens: int, width: int) -> bool:
    """Whether one of the classes (lowest N, highest N, width) has these sizes; a size that is not known is in none."""
    if not torch.compiler.is_compiling():
        return any(low <= tokens <= high and width == size for low, high, size in classes)
    from torch.fx.experimental.symbolic_shapes import statically_known_true as known

    for low, high, size in classes:  # noqa: SIM110  # torch.compile takes no generator here
        if known(low <= tokens) and known(tokens <= high) and known(width == size):
            return True
    return False


@functools.cache
def evidence() -> tuple[dict[str, Any], ...]:
    """The shape classes for which ``cuda`` was measured to be right and faster than ``triton``.

    Each says ``op``, ``capability`` of the device ("9.0"), ``dtype``, ``head_size`` or ``channels`` (of what decides; 0
    where it has neither), ``tokens`` (the lowest and the highest N), ``speedup`` over triton, and the ``file`` and
    ``commit`` of the measurement. Written by ``python -m benchmarks.evidence``.
    """
    return tuple(json.loads(EVIDENCE.read_text()))


def _measured_classes(op: str, dtype: torch.dtype, device_index: int | None) -> tuple[tuple[int, int, int], ...]:
    """(lowest N, highest N, width) of the evidence for this device."""
    return _classes(op, dtype, device_index) if evidence() else ()


@functools.cache
def _classes(op: str, dtype: torch.dtype, device_index: int | None) -> tuple[tuple[int, int, int], ...]:
    capability = torch.cuda.get_device_capability(device_index)
    if not native.has_cuda_code(capability):
        return ()
    about = {"op": op, "capability": "{}.{}".format(*capability), "dtype": str(dtype).removeprefix("torch.")}
    found = [entry for entry in evidence() if about.items() <= entry.items()]
    return tuple((*entry["tokens"], entry["head_size" if "head_size" in entry else "channels"]) for entry in found)


def _choose(
    guard: str,
    op: str,
    device_type: str,
    dtype: torch.dtype | None = None,
    needs_grad: bool = False,
    dense: bool = False,
    size_fits: bool = True,
    measured: bool = False,
) -> str:
    backend = forced()
    if backend is None:
        backend = _automatic(op, device_type, dtype, needs_grad, dense, size_fits, measured=measured)
    elif (reason := refusal(backend, op, device_type, dtype, needs_grad, dense, size_fits)) is not None:
        reasons = _reasons(op, device_type, dtype, needs_grad, dense, size_fits)
        raise BackendError(f"the forced backend {backend!r} cannot run {op}:\n{reasons}", reason)
    if backend == "triton":
        importlib.import_module("gtp_kernels.triton")  # defines the operators
    elif backend == "cuda" and native.EMULATED:
        importlib.import_module("gtp_kernels.ops._library").load_emulated()
    if _state.recording is not None:
        _state.recording.append((op, backend))
    return backend


# What torch.compiler.assume_constant_result sets: the decorator itself would import all of torch._dynamo here.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]  # an attribute of a function
_measured_classes._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as above


def _automatic(
    op: str,
    device_type: str,
    dtype: torch.dtype | None = None,
    needs_grad: bool = False,
    dense: bool = False,
    size_fits: bool = True,
    *,
    measured: bool = False,
) -> str:
    if device_type == "meta":
        return "cpu"
    request = (op, device_type, dtype, needs_grad, dense, size_fits)
    order = _ORDER.get(device_type)
    if order is None:
        raise RuntimeError(
            f"no backend runs {op} on {device_type}; the plain PyTorch definition does: "
            f"with gtp_kernels.use_backend('reference')\n{_reasons(*request)}"
        )
    if measured and device_type == "cuda":
        order = ("cuda", "triton", "reference")
    for backend in order:
        if refusal(backend, *request) is None:
            if backend == "reference":
                reasons = "; ".join(f"{name}: {refusal(name, *request)}" for name in order[:-1])
                _warn_once(op, device_type, reasons)
            return backend
    raise AssertionError("the reference refuses nothing")


def _warn_once(op: str, device_type: str, reasons: str) -> None:
    if reasons in _warned:
        return
    _warned.add(reasons)
    warnings.warn(
        f"gtp_kernels runs {op} on {device_type} in plain PyTorch, which is slow and writes the N x N map: {reasons}",
        BackendWarning,
        stacklevel=6,
    )


def _reasons(
    op: str, device_type: str, dtype: torch.dtype | None, needs_grad: bool, dense: bool, size_fits: bool
) -> str:
    request = (op, device_type, dtype, needs_grad, dense, size_fits)
    return "\n".join(f"  {name}: {refusal(name, *request) or 'can run'}" for name in NAMES)
