"""Fixtures of the whole suite: every backend on every op test, NaN in fresh memory, few threads.

One suite runs in four ways: on a CPU (backends ``reference`` and ``cpu``), under ``TRITON_INTERPRET=1`` (``triton`` in
the interpreter), under ``GTP_KERNELS_EMULATE_CUDA=1`` (``cuda`` in emulation), and on a GPU with ``-m gpu``
(``triton``, and ``cuda`` where it was built). ``skips.py`` lists what a way leaves out. A test that asks ``cuda`` for
what it refuses (``backends.refusal``) is skipped with that reason.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import skips
import torch
from hypothesis import settings
from torch import Tensor
from torch.utils import _pytree as pytree

from gtp_kernels import backends, native

settings.register_profile("suite", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("suite")

# cuBLAS reads it once; without it, deterministic algorithms warn at every product.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# torch lists its factories when it first puts one on a default device: before a test replaces any.
with torch.device("cpu"):
    torch.empty(0)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = "cuda"
REFUSED = pytest.StashKey[bool]()


def backend_params() -> list[Any]:
    """The backends that this machine and this process can test."""
    if native.EMULATED:
        return ["cuda"]
    if INTERPRETED:
        return ["triton"]
    gpu = []
    if torch.cuda.is_available():
        gpu = ["triton"] if native.cuda_missing() else ["triton", "cuda"]
    return ["reference", "cpu", *(pytest.param(name, marks=pytest.mark.gpu) for name in gpu)]


def on_gpu(item: pytest.Item | Any) -> bool:
    """Whether a test runs on GPU tensors."""
    return item.get_closest_marker("gpu") is not None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for way in ways_of(item):
            if (why := skips.reason(way, skips.without_folder(item.nodeid))) is not None:
                item.add_marker(pytest.mark.skip(reason=why))


def ways_of(item: pytest.Item) -> list[str]:
    """The lists of ``skips.py`` that a test is looked up in."""
    cuda = [skips.CUDA] if on_cuda(item) else []
    if native.EMULATED:
        return [*cuda, skips.EMULATION]
    return [*cuda, skips.INTERPRETER if INTERPRETED else skips.GPU if on_gpu(item) else skips.CPU]


def on_cuda(item: pytest.Item | Any) -> bool:
    """Whether a test runs on the backend ``cuda``."""
    return hasattr(item, "callspec") and item.callspec.params.get("backend") == "cuda"


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """What the backend ``cuda`` refuses is no failure of a test that every backend is put through."""
    try:
        return (yield)  # type: ignore[return-value]  # a wrapper
    except Exception as error:
        # Found by its text: torch.compile raises an error of its own that quotes it.
        refused = re.search(
            r"the forced backend 'cuda' cannot run .*?^  cuda: (.*?)$", str(error), re.DOTALL | re.MULTILINE
        )
        if refused is None or not on_cuda(pyfuncitem):
            raise
        pyfuncitem.stash[REFUSED] = True
        pytest.skip(f"refused: {refused[1]}")


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
    that their values are those of the other backends, and index values are checked, as they are on a CPU. ``cuda`` has
    no backward, and would refuse what asks for gradients: its tests run without.
    """
    name = request.param
    device: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if on_gpu(request.node):
        monkeypatch.setenv("GTP_KERNELS_DEBUG", "1")
        for draw in (torch.rand, torch.randn, torch.randint):
            monkeypatch.setattr(torch, draw.__name__, drawn_on_cpu(draw))
        device = torch.device(GPU)
    gradients = torch.set_grad_enabled(name != "cuda")
    with gradients, device, backends.use_backend(name), backends.record() as ran:
        yield name
        assert {chosen for _, chosen in ran} <= {name}
        if request.node.stash.get(REFUSED, False):
            return
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
