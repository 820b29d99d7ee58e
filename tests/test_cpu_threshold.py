"""csrc/cpu/threshold.h on its own: how it finds the threshold of a map, which the op does not show.

That the threshold is right, on every instruction set and for ties and NaN, is in test_native.py.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from emulated import CSRC, NATIVE
from torch import Tensor


class Threshold:
    """The threshold of a float32 map [N, N], and the number of sweeps over the map that it took."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.threshold.restype = ctypes.c_float

    def __call__(self, values: Tensor, rank: int) -> tuple[float, int]:
        sweeps = ctypes.c_int64()
        pointer, tokens = ctypes.c_void_p(values.data_ptr()), ctypes.c_int64(values.shape[0])
        found = self.library.threshold(pointer, tokens, ctypes.c_int64(rank), ctypes.byref(sweeps))
        return found, sweeps.value

    def sampled(self, tokens: int) -> Tensor:
        """Which values of a map are in its sample: [N, N], boolean."""
        step, width = self.library.step_of_sample(ctypes.c_int64(tokens)), self.library.sampled_of_row()
        rows = torch.arange(tokens)[:, None]
        mask = torch.zeros(tokens, tokens, dtype=torch.bool)
        mask[rows, (rows * step + torch.arange(width)) % tokens] = True
        return mask


@pytest.fixture(scope="module", params=["", "-march=native"], ids=["baseline", "native"])
def threshold(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Threshold:
    """For vectors of 4 values, and for those of this machine."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    target = tmp_path_factory.mktemp("cpu_threshold") / "shim.so"
    command = [compiler, "-std=c++17", "-O2", "-fPIC", "-shared", f"-I{CSRC}", f"-I{CSRC / 'cpu'}", "-o", str(target)]
    # GCC 12 warns of its own avx512fintrin.h.
    command += ["-w", str(NATIVE / "cpu_threshold_shim.cpp")]
    done = subprocess.run([*command, *request.param.split()], capture_output=True, text=True, check=False)
    if done.returncode and request.param and request.param in done.stderr:
        pytest.skip(f"{compiler} does not know {request.param}")
    assert done.returncode == 0, done.stderr
    return Threshold(target)


def column_map(tokens: int, seed: int) -> Tensor:
    """A softmax map whose columns differ more than its rows, and by neighbourhoods, as those of a trained model do."""
    generator = torch.Generator().manual_seed(seed)
    columns = 3 * torch.randn(tokens // 20 + 1, generator=generator).repeat_interleave(20)[:tokens]
    return torch.softmax(columns + torch.randn(tokens, tokens, generator=generator), -1)


def diagonal_map(tokens: int, seed: int) -> Tensor:
    """One whose tokens attend to their neighbours."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.arange(tokens)
    near = -(place - place[:, None]).abs() / (0.1 * tokens)
    return torch.softmax(near + 0.3 * torch.randn(tokens, tokens, generator=generator), -1)


@pytest.mark.parametrize("kind", [column_map, diagonal_map])
@pytest.mark.parametrize("tokens", [70, 109, 133, 165, 197, 257, 401, 577, 785, 1025, 1370])
def test_one_sweep_finds_the_threshold(threshold: Threshold, tokens: int, kind: Callable[[int, int], Tensor]) -> None:
    for seed in range(10 if tokens < 500 else 1):
        values = kind(tokens, seed)
        in_order = values.flatten().sort().values
        for share in (0.02, 0.1, 0.4, 0.7, 0.95):
            rank = int(share * tokens * tokens)
            assert threshold(values, rank) == (float(in_order[rank - 1]), 1)


@pytest.mark.parametrize("tokens", [65, 109, 197, 401])
def test_every_column_is_sampled_as_often(threshold: Threshold, tokens: int) -> None:
    assert set(threshold.sampled(tokens).sum(0).tolist()) == {threshold.library.sampled_of_row()}


@pytest.mark.parametrize(("deviations", "sweeps"), [(0, 1), (6, 4), (12, 9)])
@pytest.mark.parametrize("sign", [-1, 1])
def test_a_sample_that_misleads(threshold: Threshold, deviations: int, sweeps: int, sign: int) -> None:
    """One that is so many standard deviations off: one sweep; two brackets, ties with an end of
    each counted; then a search of the map in four."""
    tokens, share = 197, 0.4
    values, rank = torch.rand(tokens, tokens, generator=torch.Generator().manual_seed(0)), int(share * tokens**2)
    want = float(values.flatten().kthvalue(rank).values)
    sampled = threshold.sampled(tokens)
    count = int(deviations * (share * (1 - share) * int(sampled.sum())) ** 0.5)
    low = values < want
    inside = (sampled & (low if sign > 0 else ~low)).nonzero()[:count].T
    outside = (~sampled & (~low if sign > 0 else low) & (values != want)).nonzero()[:count].T
    assert inside.shape == outside.shape == (2, count)
    swapped = values.clone()
    swapped[tuple(inside)], swapped[tuple(outside)] = values[tuple(outside)], values[tuple(inside)]
    assert threshold(swapped, rank) == (want, sweeps)
