"""Fixtures of the whole suite: every backend on every op test, NaN in fresh memory, few threads.

One suite runs in three ways: on a CPU (backends ``reference`` and ``cpu``), under ``TRITON_INTERPRET=1`` (``triton`` in
the interpreter), and on a GPU with ``-m gpu`` (``triton`` on GPU tensors). ``skips.py`` lists what a way leaves out.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import skips
import torch
from hypothesis import settings
from torch import Tensor
from torch.utils import _pytree as pytree

from gtp_kernels import backends

settings.register_profile("suite", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("suite")

# cuBLAS reads it once; without it, deterministic algorithms warn at every product.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# torch lists its factories when it first puts one on a default device: before a test replaces any.
with torch.device("cpu"):
    torch.empty(0)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = "cuda"


def backend_params() -> list[Any]:
    """The backends that this machine and this process can test."""
    if INTERPRETED:
        return ["triton"]
    gpu = [pytest.param("triton", marks=pytest.mark.gpu)] if torch.cuda.is_available() else []
    return ["reference", "cpu", *gpu]


def on_gpu(item: pytest.Item | Any) -> bool:
    """Whether a test runs on GPU tensors."""
    return item.get_closest_marker("gpu") is not None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        way = skips.INTERPRETER if INTERPRETED else skips.GPU if on_gpu(item) else skips.CPU
        if (why := skips.reason(way, skips.without_folder(item.nodeid))) is not None:
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """The tensors among the parameters of a test on a GPU, made when it was collected, go there."""
    if on_gpu(item) and hasattr(item, "callspec"):
        item.callspec.params.update(
            pytree.tree_map_only(Tensor, lambda t: t.to(GPU) if t.device.type == "cpu" else t, item.callspec.params)
        )


@pytest.fixture(autouse=True)
def nan_in_fresh_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fills every fresh allocation with NaN (the largest integer for integers), so that an unwritten output shows."""
    # The definition needs kthvalue, which has no deterministic form on a GPU.
    torch.use_deterministic_algorithms(True, warn_only=on_gpu(request.node))
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=backend_params())
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs the test on each backend, and asserts that this backend, and no other, was chosen.

    Where that is on a GPU, the test's tensors are made there. Random ones of a given generator are drawn on the CPU, so
    that their values are those of the other backends, and index values are checked, as they are on a CPU.
    """
    name = request.param
    device: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if on_gpu(request.node):
        monkeypatch.setenv("GTP_KERNELS_DEBUG", "1")
        for draw in (torch.rand, torch.randn, torch.randint):
            monkeypatch.setattr(torch, draw.__name__, drawn_on_cpu(draw))
        device = torch.device(GPU)
    with device, backends.use_backend(name), backends.record() as ran:
        yield name
        assert {chosen for _, chosen in ran} <= {name}
        assert ran or request.node.get_closest_marker("no_op_runs"), "the test ran no op"


def drawn_on_cpu(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``draw``, with the numbers of a CPU generator put on the default device where no other is asked for."""

    @functools.wraps(draw)
    def wrapped(*size: Any, **options: Any) -> Tensor:
        generator = options.get("generator")
        if generator is None or generator.device.type != "cpu" or options.get("device") is not None:
            return draw(*size, **options)
        return draw(*size, **options | {"device": "cpu"}).to(torch.get_default_device())

    return wrapped


@pytest.fixture
def cpu_backend() -> Iterator[str]:
    """Runs the test on the native CPU backend."""
    with backends.use_backend("cpu"), backends.record() as ran:
        yield "cpu"
        assert ran, "the test ran no op"
