"""Which backend runs an op, and why the others do not.

A backend answers "can you run this?" with a reason. The choice is made in one place, :func:`choose`; a forced backend
(:func:`use_backend`, or the variable ``GTP_KERNELS_BACKEND``) that cannot run is an error that lists every answer.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import threading
import warnings
from types import TracebackType

import torch
from torch import Tensor

from gtp_kernels import native

NAMES = ("reference", "cpu", "triton", "cuda")
OPS = ("attention", "select", "propagate", "graph")
_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}


class BackendWarning(UserWarning):
    """An automatic choice left the fast path."""


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


def refusal(backend: str, op: str, device_type: str) -> str | None:
    """Why ``backend`` cannot run ``op`` on tensors of ``device_type``; None where it can."""
    if backend == "reference":
        return None
    if backend == "cpu":
        if native.missing is not None:
            return native.missing
        # Meta tensors carry no data: the operator's fake kernel answers for every backend.
        return None if device_type in ("cpu", "meta") else f"it takes CPU tensors; these are on {device_type}"
    if backend == "triton":
        return _triton_refusal(device_type)
    return f"this version has no CUDA C++ kernel for {op}"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _triton_refusal(device_type: str) -> str | None:
    if not _has_triton():
        return "triton is not installed (pip install triton)"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None if device_type == "cpu" else f"its interpreter takes CPU tensors; these are on {device_type}"
    return None if device_type == "cuda" else f"it takes GPU tensors; these are on {device_type}"


def choose(op: str, tensor: Tensor) -> str:
    """The backend that runs ``op`` on tensors like ``tensor``.

    Raises:
        RuntimeError: the forced backend cannot run it, or the device has no backend; every reason is listed.
    """
    return _choose(_guard, op, tensor.device.type)


def _choose(guard: str, op: str, device_type: str) -> str:
    backend = forced()
    if backend is not None:
        if refusal(backend, op, device_type) is not None:
            raise RuntimeError(f"the forced backend {backend!r} cannot run {op}:\n{_reasons(op, device_type)}")
    else:
        backend = _automatic(op, device_type)
    if backend == "triton":
        importlib.import_module("gtp_kernels.triton")  # defines the operators
    if _state.recording is not None:
        _state.recording.append((op, backend))
    return backend


# What torch.compiler.assume_constant_result sets: the decorator itself would import all of torch._dynamo here.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]  # an attribute of a function


def _automatic(op: str, device_type: str) -> str:
    if device_type == "meta":
        return "cpu"
    order = _ORDER.get(device_type)
    if order is None:
        raise RuntimeError(
            f"no backend runs {op} on {device_type}; the plain PyTorch definition does: "
            f"with gtp_kernels.use_backend('reference')\n{_reasons(op, device_type)}"
        )
    for backend in order:
        if refusal(backend, op, device_type) is None:
            if backend == "reference":
                _warn_once(op, device_type, order[:-1])
            return backend
    raise AssertionError("the reference refuses nothing")


def _warn_once(op: str, device_type: str, refused: tuple[str, ...]) -> None:
    reasons = "; ".join(f"{name}: {refusal(name, op, device_type)}" for name in refused)
    if reasons in _warned:
        return
    _warned.add(reasons)
    warnings.warn(
        f"gtp_kernels runs {op} on {device_type} in plain PyTorch, which is slow and writes the N x N map: {reasons}",
        BackendWarning,
        stacklevel=6,
    )


def _reasons(op: str, device_type: str) -> str:
    return "\n".join(f"  {name}: {refusal(name, op, device_type) or 'can run'}" for name in NAMES)
