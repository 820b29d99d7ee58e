"""Fixtures of the whole suite: every backend on every op test, NaN in fresh memory, few threads."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from gtp_kernels import backends

settings.register_profile("suite", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def nan_in_fresh_memory() -> Iterator[None]:
    """Fills every fresh allocation with NaN (the largest integer for integers), so that an unwritten output shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


# Under TRITON_INTERPRET=1 the suite runs the Triton kernels, in the interpreter, and nothing else.
BACKENDS = ["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else ["reference", "cpu"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on each backend, and asserts that this backend, and no other, was chosen."""
    name = request.param
    with backends.use_backend(name), backends.record() as ran:
        yield name
        assert {chosen for _, chosen in ran} <= {name}
        assert ran or request.node.get_closest_marker("no_op_runs"), "the test ran no op"


@pytest.fixture
def cpu_backend() -> Iterator[str]:
    """Runs the test on the native CPU backend."""
    with backends.use_backend("cpu"), backends.record() as ran:
        yield "cpu"
        assert ran, "the test ran no op"
