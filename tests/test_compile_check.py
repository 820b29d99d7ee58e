"""The ahead-of-time compile check: what it records, what it reads off the compilers, and what it calls a failure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
pytest.importorskip("click")
from benchmarks import compile_check
from benchmarks.compile_check import Resources, Result
from benchmarks.launches import TARGETS, Launch

ROOT = Path(__file__).resolve().parents[1]

# A kernel of its own, in a process of its own: the suite may be interpreting Triton's kernels.
TOY = """
import json, sys
from pathlib import Path
import torch, triton, triton.language as tl
from torch._subclasses.fake_tensor import FakeTensorMode
from benchmarks import compile_check
from benchmarks.launches import TARGETS, Recorder, one_per_configuration, pretend, recording
from gtp_kernels.triton import runtime

@triton.jit
def _double(x):
    return x * 2

@triton.jit
def toy(p, q, n, flag, BLOCK: tl.constexpr, BROKEN: tl.constexpr):
    o = tl.arange(0, BLOCK)
    x = tl.load(p + o, mask=o < n, other=0.0)
    if BROKEN:
        x = tl.dot(x, x)
    y = _double(x)
    tl.store(q + o, y, mask=o < n)

def launcher(x, block, broken=False):
    q = torch.empty_like(x)
    runtime.launch(toy)[(1,)](x, q, x.numel(), None, BLOCK=block, BROKEN=broken, num_warps=1)
    return q

launches = {}
for name in ("sm_80", "gfx942"):
    recorder = Recorder(TARGETS[name])
    with recording(recorder, runtime.launch), pretend(TARGETS[name]), FakeTensorMode():
        for label, size, block, broken in (
            ("a", 64, 64, False), ("b", 64, 64, False), ("odd", 63, 64, False), ("broken", 64, 64, True),
        ):
            recorder.label = label
            launcher(torch.empty(size, device="cuda:0"), block, broken)
        if name == "sm_80":
            capability = torch.cuda.get_device_capability()
    launches[name] = list(recorder.launches.values())
cache = Path(sys.argv[1])
results = compile_check.check(launches, jobs=2, cache=cache)
again = compile_check.check(launches, jobs=2, cache=cache)
print(json.dumps({
    "results": [result.as_json() for result in results],
    "cached": [result.cached for result in again],
    "configurations": len(one_per_configuration(launches["sm_80"])),
    "capability": capability,
}))
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_apart(TOY, tmp_path_factory.mktemp("toy"))


def run_apart(program: str, folder: Path) -> dict[str, Any]:
    """What a program prints last, as JSON."""
    (folder / "program.py").write_text(program)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    command = [sys.executable, str(folder / "program.py"), str(folder / "cache")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


TUNED = """
import json
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from benchmarks import tune
from benchmarks.launches import TARGETS, pretend

found = {}
with pretend(TARGETS["sm_90"]), FakeTensorMode():
    x = torch.empty(2, 17, 256, device="cuda:0")
    kept, prop = (torch.empty(2, size, dtype=torch.int64, device="cuda:0") for size in (13, 3))
    weight = torch.empty(2, 16, 16, device="cuda:0")
    bench = object.__new__(tune.Bench)  # its own start would run the op
    bench.job, bench.device = tune.Job("dense", "float32", ()), x.device
    bench.calls = {"dense": (None, lambda: tune._operators().propagate_dense(x, weight, kept, prop, None, 0.1, 1))}
    for name, rows, channels, warps in (("good", 16, 64, 4), ("bad", 64, 128, 1)):
        found[name] = bench.spills({"rows": rows, "channels": channels, "num_warps": warps})
print(json.dumps(found))
"""


def test_the_tuner_refuses_what_spills(tmp_path: Path) -> None:
    found = run_apart(TUNED, tmp_path)
    assert found["good"] is None
    assert found["bad"].startswith("spills: ")


def test_launches_are_recorded_once_and_compiled(toy: dict[str, Any]) -> None:
    good = [result for result in toy["results"] if "broken" not in result["shape_classes"]]
    assert [(r["arch"], r["shape_classes"]) for r in good] == [
        ("sm_80", ["a", "b"]), ("sm_80", ["odd"]), ("gfx942", ["a", "b"]), ("gfx942", ["odd"]),
    ]  # fmt: skip
    for result in good:
        assert result["failure"] is None
        assert result["registers"] > 0
        assert result["spills"] == 0
        assert 0 < result["occupancy"] <= 1
        assert result["config"] == "BLOCK=64 BROKEN=0"
    assert toy["configurations"] == 2
    assert toy["capability"] == [8, 0]


def test_a_kernel_that_does_not_compile_fails_and_is_not_cached(toy: dict[str, Any]) -> None:
    broken = [result["shape_classes"] == ["broken"] for result in toy["results"]]
    assert sum(broken) == 2
    assert all((result["failure"] is not None) == bad for result, bad in zip(toy["results"], broken, strict=True))
    assert toy["cached"] == [not bad for bad in broken]


def result_of(resources: Resources, arch: str = "sm_80", may_spill: str | None = None) -> Result:
    return Result(TARGETS[arch], Launch(None, {}, {}, {}, {"num_warps": 4}, may_spill=may_spill), resources)


def test_spills_and_too_much_shared_memory_fail() -> None:
    assert result_of(Resources(40, 0, 1024)).failure is None
    assert result_of(Resources(255, 8, 1024)).failure == "spills: 8"
    assert result_of(Resources(255, 8, 1024), may_spill="a reason").failure is None
    assert "shared memory" in str(result_of(Resources(40, 0, 120 * 1024), "sm_120").failure)
    assert result_of(Resources(40, 0, 120 * 1024), "sm_80").failure is None
    assert result_of(Resources(error="no")).failure == "no"


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "expected"),
    [
        ("sm_80", 32, 0, 4, 1.0),
        ("sm_90", 20, 0, 2, 1.0),  # more would fit than a multiprocessor takes
        ("sm_80", 64, 0, 4, 0.5),  # 65,536 / (64 · 32) = 32 of 64 warps
        ("sm_80", 255, 0, 8, 0.125),
        ("sm_80", 32, 81 * 1024, 4, 8 / 64),  # two blocks of 82 KB in 164 KB
        ("sm_120", 40, 0, 4, 1.0),  # 48 warps
        ("gfx942", 128, 0, 4, 0.5),
        ("gfx942", 64, 32 * 1024, 4, 8 / 32),
        ("gfx942", 300, 0, 4, 4 / 32),
        ("gfx1100", 96, 0, 4, 1.0),
    ],
)
def test_occupancy(arch: str, registers: int, shared: int, warps: int, expected: float) -> None:
    assert TARGETS[arch].occupancy(registers, shared, warps) == pytest.approx(expected)


def test_reports_of_the_compilers_are_read() -> None:
    log = (
        "0 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\nptxas info : Used 168 registers, used 1 barr"
    )
    assert compile_check._from_ptxas(log) == Resources(168, 28)
    assert compile_check._from_ptxas("").error is not None
    assert compile_check._from_amdgcn(".vgpr_count: 88\n.vgpr_spill_count: 3\n") == Resources(88, 3)


def test_the_cache_outlives_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert compile_check.cache_folder() == tmp_path / "cache" / "gtp-kernels" / "compile-check"
    assert compile_check.cache_folder().is_dir()
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert compile_check.cache_folder() == ROOT / "build" / "compile-check"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compile_check.cache_folder() == tmp_path / ".cache" / "gtp-kernels" / "compile-check"


KERNEL = """
import triton
@triton.jit
def inner(x):
    return x * 2
@triton.jit
def outer(p):
    triton.language.store(p, inner(triton.language.load(p)))
"""
KEYS = """
import importlib, json
from benchmarks.launches import content_key

found = {}
for name in ("one", "moved", "changed"):
    kernel = importlib.import_module(name).outer
    found[name] = [content_key(kernel), kernel.starting_line_number]
print(json.dumps(found))
"""


def test_the_cache_is_by_content_not_by_line(tmp_path: Path) -> None:
    for name, text in (("one", KERNEL), ("moved", "\n\n" + KERNEL), ("changed", KERNEL.replace("* 2", "* 3"))):
        (tmp_path / f"{name}.py").write_text(text)
    found = run_apart(KEYS, tmp_path)
    assert found["one"][1] + 2 == found["moved"][1]
    assert found["one"][0] == found["moved"][0] != found["changed"][0]


def test_a_damaged_cache_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("{")
    assert compile_check._load(path) is None
    path.write_text('{"unknown": 1}')
    assert compile_check._load(path) is None
