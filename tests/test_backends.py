"""Which backend runs, what a refusal says, and what the information command prints."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import skips
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import gtp_kernels
from gtp_kernels import backends, info, native
from gtp_kernels.ops import _library

Q = torch.randn(1, 2, 9, 8, generator=torch.Generator().manual_seed(0))


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, check=False
    )


def test_the_native_library_is_loaded() -> None:
    assert native.missing is None, native.missing
    assert native.extension() is not None


def test_cpu_tensors_run_on_the_cpu_backend_without_being_asked() -> None:
    with backends.record() as ran:
        _, scores = gtp_kernels.attention_with_scores(Q, Q, Q, sparsity=0.6)
        kept, prop = gtp_kernels.select(scores, num_prop=3)
        x = torch.randn(1, 9, 16)
        graph = gtp_kernels.build_graph(x, (2, 4), num_neighbours=2)
        gtp_kernels.propagate(x, graph, kept, prop)
    assert ran == [("attention", "cpu"), ("select", "cpu"), ("select", "cpu"), ("graph", "cpu"), ("propagate", "cpu")]


def test_the_native_kernel_is_what_the_dispatcher_holds() -> None:
    """The operators' CPU kernels come from the library, not from Python."""
    for schema in _library.SCHEMAS:
        name = schema.split("(")[0]
        table = torch._C._dispatch_dump(f"gtp_kernels::{name}")
        native_kernel = any(line.startswith("CPU:") for line in table.splitlines())
        assert native_kernel, table


def test_cpp_and_python_read_one_schema_file() -> None:
    for schema in _library.SCHEMAS:
        name = schema.split("(")[0]
        defined = torch._C._get_schema(f"gtp_kernels::{name}", "")
        assert str(defined) == str(torch._C.parse_schema(f"gtp_kernels::{schema}"))


def test_forcing_is_nested_and_of_this_thread() -> None:
    seen = []
    with gtp_kernels.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(backends.forced()))
        thread.start()
        thread.join()
        with gtp_kernels.use_backend("cpu"):
            assert backends.forced() == "cpu"
        assert backends.forced() == "reference"
    assert backends.forced() is None
    assert seen == [None]


def test_unknown_names_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="the backend must be one of reference, cpu, triton, cuda; got 'gpu'"):
        gtp_kernels.use_backend("gpu")


def test_a_forced_backend_that_cannot_run_lists_every_reason() -> None:
    with gtp_kernels.use_backend("cuda"), pytest.raises(RuntimeError) as error:
        gtp_kernels.attention_with_scores(Q, Q, Q)
    for name in backends.NAMES:
        assert f"{name}: " in str(error.value)
    assert native.cuda_missing() is None or str(native.cuda_missing()) in str(error.value)


def test_a_device_without_a_backend_offers_the_reference() -> None:
    with pytest.raises(RuntimeError, match="use_backend\\('reference'\\)"):
        backends._automatic("attention", "mps")


def test_the_environment_variable_forces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GTP_KERNELS_BACKEND", "reference")
    with backends.record() as ran:
        gtp_kernels.attention_with_scores(Q, Q, Q)
    assert ran == [("attention", "reference")]
    monkeypatch.setenv("GTP_KERNELS_BACKEND", "fast")
    with pytest.raises(ValueError, match="GTP_KERNELS_BACKEND must be one of"):
        gtp_kernels.attention_with_scores(Q, Q, Q)


def test_gpu_tensors_run_triton_without_being_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for op in backends.OPS:
            assert backends._automatic(op, "cuda") == "triton"
    assert "takes GPU tensors" in str(backends.refusal("triton", "attention", "cpu"))


def test_gpu_tensors_without_triton_run_the_reference_and_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_has_triton", lambda: False)
    backends._warned.clear()
    with pytest.warns(gtp_kernels.BackendWarning, match="triton is not installed"):
        assert backends._automatic("attention", "cuda") == "reference"


@pytest.mark.parametrize(
    ("op", "request_", "reason"),
    [
        ("attention", {"dtype": torch.bfloat16}, None),
        ("attention", {"dtype": torch.float32}, "its attention takes float16 and bfloat16; these are torch.float32"),
        ("attention", {"size_fits": False}, "its attention takes head sizes from 1 to 128"),
        ("attention", {"needs_grad": True}, "it has no backward kernels (triton has)"),
        ("select", {"dtype": torch.float32}, None),
        ("select", {"dtype": torch.float64}, "it takes no float64 in select (triton does)"),
        ("propagate", {"dense": True}, "it propagates along a TokenGraph and has no kernel for a dense weight"),
        ("graph", {"dtype": torch.float16}, None),
    ],
)
def test_what_cuda_refuses(
    op: str, request_: dict[str, Any], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "EMULATED", False)
    monkeypatch.setattr(native, "cuda_missing", lambda: None)
    assert "it takes GPU tensors" in str(backends.refusal("cuda", op, "cpu", **request_))
    answer = backends.refusal("cuda", op, "cuda", **request_)
    assert answer is None if reason is None else reason in str(answer)
    # What it refuses runs on triton, preferred or not.
    assert backends._automatic(op, "cuda", **request_) == "triton"
    assert backends._automatic(op, "cuda", **request_, measured=True) == ("triton" if reason else "cuda")


def test_cuda_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "EMULATED", False)
    monkeypatch.setattr(native, "cuda_missing", lambda: "no such kernels")
    assert backends.refusal("cuda", "graph", "cuda") == "no such kernels"


def test_cuda_needs_nvidia(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "it needs an NVIDIA GPU" in str(native.cuda_missing.__wrapped__())


@pytest.mark.parametrize(
    ("architecture", "runs", "does_not"),
    [
        ("80-real", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0)]),
        ("86-real", [(8, 6), (8, 9)], [(8, 0)]),
        ("90-virtual", [(9, 0), (10, 0), (12, 0)], [(8, 9)]),
        ("90", [(9, 0), (12, 0)], [(8, 9)]),
        ("90a-real", [(9, 0)], [(8, 0), (10, 0)]),
        ("100-real", [(10, 0), (10, 3)], [(12, 0)]),
        ("native", [], [(9, 0)]),
    ],
)
def test_which_devices_the_built_code_runs_on(
    architecture: str, runs: list[tuple[int, int]], does_not: list[tuple[int, int]]
) -> None:
    assert all(native._runs(architecture, capability) for capability in runs)
    assert not any(native._runs(architecture, capability) for capability in does_not)


def entry(op: str, tokens: list[int], dtype: str = "bfloat16", capability: str = "9.0", **width: int) -> dict[str, Any]:
    about = {"speedup": 1.5, "file": "benchmarks/results/nvidia-h200/ops.json", "commit": "abc1234"}
    return {"op": op, "capability": capability, "dtype": dtype, "tokens": tokens, **width, **about}


EVIDENCE = (
    entry("attention", [100, 197], head_size=64),
    entry("attention", [100, 197], head_size=32, capability="8.0"),
    entry("select", [197, 197], "float32", channels=0),
    entry("propagate", [37, 197], channels=384),
    entry("live", [100, 197], head_size=64),
    entry("live", [37, 197], channels=384),
    entry("live", [197, 197], "int32", channels=0),
)


@pytest.fixture
def measured_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """A mode in which tensors on a GPU of capability 9.0 can be made, for which there is evidence."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(native, "EMULATED", False)
    monkeypatch.setattr(native, "has_cuda_code", lambda capability: True)
    monkeypatch.setattr(native, "cuda_missing", lambda: None)
    monkeypatch.setattr(backends, "evidence", lambda: EVIDENCE)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    pytest.importorskip("triton")
    backends._classes.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()) as mode:
        yield mode
    backends._classes.cache_clear()


def test_evidence_decides_by_shape_class(measured_gpu: FakeTensorMode) -> None:
    def chosen(op: str, *shape: int, dtype: torch.dtype = torch.bfloat16, **more: Any) -> str:
        return backends.choose(op, torch.empty(shape, device="cuda", dtype=dtype), **more)

    assert [chosen("attention", 2, 6, n, 64) for n in (99, 100, 150, 197, 198)] == [
        "triton", "cuda", "cuda", "cuda", "triton",
    ]  # fmt: skip
    assert chosen("attention", 2, 6, 150, 32) == "triton"  # measured on another device
    assert chosen("attention", 2, 6, 150, 64, dtype=torch.float16) == "triton"
    assert chosen("select", 2, 6, 197, dtype=torch.float32) == "cuda"
    assert chosen("select", 2, 196, dtype=torch.float32, num_prefix=1) == "cuda"
    assert chosen("select", 2, 197, dtype=torch.float32, num_prefix=1) == "triton"
    assert chosen("propagate", 2, 197, 384) == "cuda"
    assert chosen("propagate", 2, 197, 384, dense=True) == "triton"
    assert chosen("propagate", 2, 197, 768) == "triton"
    assert chosen("graph", 2, 197, 384) == "triton"
    assert chosen("live", 2, 6, 150, 64) == "cuda"  # keys
    assert chosen("live", 2, 6, 99, 64) == "triton"
    assert chosen("live", 2, 99, 384) == "cuda"  # tokens
    assert [chosen("live", 2, n, dtype=torch.int32) for n in (197, 198)] == ["cuda", "triton"]  # indptr, n + 1
    with gtp_kernels.use_backend("reference"):
        assert chosen("attention", 2, 6, 150, 64) == "reference"
    leaf = torch.empty(2, 6, 150, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    assert backends.choose("attention", leaf.detach(), leaf) == "triton"
    with torch.no_grad():
        assert backends.choose("attention", leaf) == "cuda"


@pytest.mark.parametrize("strict", [False, True])
def test_evidence_in_exported_code(measured_gpu: FakeTensorMode, strict: bool) -> None:
    """A size that is not known when code is compiled is in no shape class, and is not pinned by asking."""

    class Attend(torch.nn.Module):
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            return gtp_kernels.attention_with_scores(q, q, q, sparsity=0.6)[0]

    def chosen(tokens: int, dynamic: int | None) -> str:
        q = torch.empty(2, 6, tokens, 64, device="cuda", dtype=torch.bfloat16)
        shapes = None if dynamic is None else ({dynamic: torch.export.Dim.DYNAMIC},)
        torch._dynamo.reset()
        with torch.no_grad(), backends.record() as ran:
            torch.export.export(Attend(), (q,), dynamic_shapes=shapes, strict=strict)
        ((_, name),) = set(ran)
        return name

    assert chosen(150, None) == "cuda"
    assert chosen(99, None) == "triton"
    assert chosen(150, 0) == "cuda"
    assert chosen(150, 2) == "triton"


def test_without_evidence_no_device_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(device: object = None) -> tuple[int, int]:
        raise AssertionError("a device was asked")

    monkeypatch.setattr(torch.cuda, "get_device_capability", never)
    monkeypatch.setattr(backends, "evidence", lambda: ())
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert backends.choose("graph", torch.empty(2, 9, 4, device="cuda")) in ("triton", "reference")


def test_the_packaged_evidence_is_well_formed() -> None:
    for found in backends.evidence():
        assert found["op"] in backends.OPS
        assert ("head_size" in found) != ("channels" in found)
        assert found["tokens"][0] <= found["tokens"][1]
        assert found["speedup"] > 1
        assert isinstance(getattr(torch, found["dtype"]), torch.dtype)
        assert found["file"].startswith("benchmarks/results/")


def test_info_says_which_file_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "evidence", lambda: EVIDENCE)
    assert info.choice("graph") == ["triton: no result file prefers cuda"]
    assert info.choice("attention")[0] == (
        "cuda on sm_90 for bfloat16, head size 64, 100 to 197 tokens: 1.50 times as fast as triton "
        "(benchmarks/results/nvidia-h200/ops.json, commit abc1234)"
    )
    assert info.choice("attention")[-1] == "triton otherwise"
    assert "384 channels, 37 to 197 tokens" in info.text(info.report())


def test_the_emulation_takes_cpu_tensors_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "EMULATED", True)
    monkeypatch.setattr(native, "emulation_missing", lambda: None)
    assert backends.refusal("cuda", "graph", "cpu") is None
    assert "its emulation takes CPU tensors" in str(backends.refusal("cuda", "graph", "cuda"))
    assert backends._automatic("graph", "cpu") == "cpu"
    assert _library.operators("cpu") is torch.ops.gtp_kernels
    assert _library.operators("cuda") is torch.ops.gtp_kernels_cuda_emulated
    monkeypatch.setattr(native, "EMULATED", False)
    assert _library.operators("cuda") is torch.ops.gtp_kernels


def test_an_emulation_that_was_not_built_is_refused(tmp_path: Path) -> None:
    code = """
import torch, gtp_kernels
q = torch.zeros(1, 1, 3, 8, dtype=torch.float16)
gtp_kernels.attention_with_scores(q, q, q)
"""
    path = tmp_path / "none.so"
    done = run_python(
        code, GTP_KERNELS_BACKEND="cuda", GTP_KERNELS_EMULATE_CUDA="1", GTP_KERNELS_EMULATED_LIBRARY=str(path)
    )
    assert f"cuda: its emulation was not built: {path} is not there" in done.stderr


@pytest.mark.skipif(not native.emulated_library().is_file(), reason="the emulated CUDA kernels were not built")
def test_the_emulated_operators_are_complete() -> None:
    """Schemas, fake kernels and compilation of the emulated operators."""
    code = """
import torch, gtp_kernels
from gtp_kernels import backends
from gtp_kernels.ops import _library
q = torch.randn(1, 2, 9, 8).half()
step = lambda q: gtp_kernels.attention_with_scores(q, q, q, sparsity=0.6)[0]
with backends.record() as ran, torch.no_grad():
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q), step(q))
assert {name for _, name in ran} == {"cuda"}, ran
for schema in _library.SCHEMAS:
    name = schema.split("(")[0]
    full = f"gtp_kernels_cuda_emulated::{name}"
    if hasattr(torch.ops.gtp_kernels_cuda_emulated, name):
        assert str(torch._C._get_schema(full, "")) == str(torch._C.parse_schema(f"gtp_kernels_cuda_emulated::{schema}"))
print("fine")
"""
    done = run_python(code, GTP_KERNELS_BACKEND="cuda", GTP_KERNELS_EMULATE_CUDA="1")
    assert done.stdout.strip() == "fine", done.stderr


def test_the_interpreter_takes_cpu_tensors_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends.refusal("triton", "attention", "cpu") is None
    assert "its interpreter takes CPU tensors" in str(backends.refusal("triton", "attention", "cuda"))
    assert backends._automatic("attention", "cpu") == "cpu"


def test_no_op_relies_on_the_default_device(backend: str) -> None:
    """What an op makes is on the device of its arguments: a tensor that followed the default would carry no data."""
    x = torch.randn(1, 9, 16, generator=torch.Generator().manual_seed(1))
    q, leaf, scales = Q.to(x.device), x.clone().requires_grad_(), torch.ones(1, 9)
    with torch.device("meta"):
        for sparsity in (1.0, 0.6):
            attended = q.clone().requires_grad_()
            out, scores = gtp_kernels.attention_with_scores(attended, q, q, scales, sparsity=sparsity)
            out.sum().backward()
        graph = gtp_kernels.build_graph(x, (2, 4), num_neighbours=2)
        results = [attended.grad, out, *scores, graph.indptr, graph.indices, graph.values, graph.token]
        weight = torch.zeros(1, 2, 9, 9, device=x.device)
        results += [graph.to_dense()]
        results += [t for name in ("Random", "CosSimMax") for t in gtp_kernels.select(weight, name, 3)]
        for standard in ("GraphProp", "Mean", "None"):
            kept, prop = gtp_kernels.select(scores, num_prop=3)
            y, normed, view, new = gtp_kernels.residual_propagate_norm(
                leaf, x, graph, kept, prop, standard=standard, token_scales=scales
            )
            (y.sum() + normed.sum()).backward()
            results += [kept, prop, y, normed, view.token, new, leaf.grad]
        results += list(gtp_kernels.propagate(x, graph.to_dense(), kept, prop, token_scales=scales))
    assert {t.device for t in results} == {x.device}


def test_meta_tensors_take_the_fake_kernel() -> None:
    out, scores = gtp_kernels.attention_with_scores(*(Q.to("meta"),) * 3)
    assert out.shape == Q.shape
    assert scores.diag.shape == (1, 2, 9)


def test_compiled_code_follows_the_forced_backend() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q: gtp_kernels.attention_with_scores(q, q, q)[0], fullgraph=True, backend="aot_eager"
    )
    for name in ("cpu", "reference", "cpu"):
        with gtp_kernels.use_backend(name), backends.record() as ran:
            compiled(Q)
            torch.testing.assert_close(compiled(Q), gtp_kernels.attention_with_scores(Q, Q, Q)[0])
        assert {backend for _, backend in ran} == {name}


def test_without_the_native_library_the_ops_work_warn_once_and_say_why() -> None:
    code = """
import warnings, torch, gtp_kernels
q = torch.randn(1, 2, 9, 8, requires_grad=True)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    out, scores = gtp_kernels.attention_with_scores(q, q, q, sparsity=0.6)
    kept, prop = gtp_kernels.select(scores, num_prop=3)
    x = torch.randn(1, 9, 16)
    graph = gtp_kernels.build_graph(x, (2, 4), num_neighbours=2)
    gtp_kernels.residual_propagate_norm(x, x, graph, kept, prop)
ours = [w for w in caught if issubclass(w.category, gtp_kernels.BackendWarning)]
assert len(ours) == 1 and "GTP_KERNELS_NATIVE=0" in str(ours[0].message), caught
parts = (graph.indptr, graph.indices, graph.values, graph.token)
ops = torch.ops.gtp_kernels
direct = ops.attention_with_scores(q, q, q, None, 0.6, 8 ** -0.5, "official")
torch.testing.assert_close(direct[0], out)
direct[0].sum().backward()
assert q.grad is not None
new = ops.propagate(x, *parts, kept, prop, None, "GraphProp", 0.1, 1)
torch.testing.assert_close(new[0], gtp_kernels.propagate(x, graph, kept, prop)[0])
torch.library.opcheck(ops.propagate, (x.requires_grad_(), *parts, kept, prop, None, "GraphProp", 0.1, 1))
print("fine")
"""
    done = run_python(code, GTP_KERNELS_NATIVE="0")
    assert done.stdout.strip() == "fine", done.stderr


def test_import_is_light() -> None:
    """Beyond torch and numpy: their own modules, and what torch's FLOP counter loads for ``gtp_vit``."""
    code = """
import sys, torch, numpy
def loaded(package):
    before = set(sys.modules)
    __import__(package)
    names = {name.partition(".")[0] for name in set(sys.modules) - before}
    return sorted(names - set(sys.stdlib_module_names) - {package})
import importlib
print(loaded("gtp_kernels"))
import torch.utils.flop_counter
print(loaded("gtp_vit"), loaded("gtp_kernels.info"))
assert "torch._dynamo" not in sys.modules and "torch._inductor" not in sys.modules
"""
    done = run_python(code)
    assert done.stdout.splitlines() == ["[]", "[] ['gtp_kernels']"], done.stdout + done.stderr


def test_modules_of_the_kernels() -> None:
    """The list of what ``import gtp_kernels`` adds; no kernel of Triton, no command, no ``_C``."""
    code = """
import sys, torch, numpy
before = set(sys.modules)
import gtp_kernels
print(*sorted(set(sys.modules) - before))
"""
    ops = ("_library", "attention", "graph", "live", "propagate", "select", "select_propagate")
    expected = {"gtp_kernels", "gtp_kernels.ops", "gtp_kernels.reference"}
    expected |= {f"gtp_kernels.{name}" for name in ("backends", "checks", "graph", "native")}
    expected |= {f"gtp_kernels.ops.{name}" for name in ops}
    expected |= {f"gtp_kernels.reference.{name}" for name in ("attention", "graph", "live", "propagate", "select")}
    done = run_python(code)
    assert set(done.stdout.split()) == expected, done.stderr


def test_info_prints_reasons_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main([]) == 0
    printed = capsys.readouterr().out
    assert "attention    cpu     cuda" in printed
    assert native.cuda_missing() is None or f"cuda kernels missing: {native.cuda_missing()}" in printed
    assert "triton: compiled ahead of time" in printed
    assert info.main(["--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["ops"]["attention"]["cpu"]["cpu"] is None
    assert data["native"]["build"]


def test_info_says_how_to_get_the_native_library() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gtp_kernels.info"],
        capture_output=True,
        text=True,
        env=os.environ | {"GTP_KERNELS_NATIVE": "0"},
        check=True,
    )
    assert "missing: switched off by GTP_KERNELS_NATIVE=0" in done.stdout
    assert "g++" in native.HOW_TO_BUILD


ISOLATED_INFO = """
import importlib.machinery, sys, torch
class Without:
    @staticmethod
    def find_spec(name, path=None, target=None):
        absent = name.partition(".")[0] in sys.argv[1:]
        return None if absent else importlib.machinery.PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Without
def refuse(event, arguments):
    # A compiler is a process, and so is a git that is asked for a commit.
    if event in ("subprocess.Popen", "os.system", "os.posix_spawn", "os.exec"):
        raise AssertionError(f"{event}: {arguments}")
sys.addaudithook(refuse)
from gtp_kernels import info
assert info.main([]) == 0
assert "triton.compiler" not in sys.modules and "torch._inductor" not in sys.modules
"""


@pytest.mark.parametrize(
    "environment",
    [{}, {"GTP_KERNELS_NATIVE": "0"}, {"GTP_KERNELS_ISA": "avx9"}, {"GTP_KERNELS_BACKEND": "fast"}],
    ids=lambda environment: "-".join(environment) or "plain",
)
def test_info_never_fails_and_starts_no_process(environment: dict[str, str]) -> None:
    without = ["triton", "timm", "transformers", "torchvision", "onnx", "onnxruntime"]
    done = subprocess.run(
        [sys.executable, "-c", ISOLATED_INFO, *without],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name in without:
        assert f"{name:<12} not installed" in done.stdout
    for name, value in environment.items():
        assert f"{name}={value} " in done.stdout
    if "GTP_KERNELS_ISA" in environment:
        assert "GTP_KERNELS_ISA is 'avx9'; this build has 'baseline'" in done.stdout
    if "GTP_KERNELS_BACKEND" in environment:
        assert "none: GTP_KERNELS_BACKEND must be one of reference, cpu, triton, cuda; got 'fast'" in done.stdout


def test_info_says_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert {info.runs(op, "cpu") for op in backends.OPS} == {"cpu"}
    assert "use_backend('reference')" in info.runs("graph", "mps")
    with gtp_kernels.use_backend("triton"):
        assert info.runs("graph", "cpu") == "none: triton is forced, and it takes GPU tensors; these are on cpu"
    monkeypatch.setattr(native, "missing", "not here")
    assert info.runs("graph", "cpu") == "reference"


def test_info_names_variables_that_nothing_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GTP_KERNELS_BACKENT", "cpu")
    assert "GTP_KERNELS_BACKENT=cpu  (unknown: nothing reads it)" in info.text(info.report())


def test_info_knows_every_variable() -> None:
    package = Path(gtp_kernels.__file__).parent
    sources = [
        *package.rglob("*.py"),
        *(package.parent / "csrc").rglob("*.cpp"),
        *(package.parent / "python").rglob("*.py"),
    ]
    read = {name for path in sources for name in re.findall(r"GTP_KERNELS_[A-Z_]+", path.read_text())}
    assert read == {name for name in info.VARIABLES if name.startswith("GTP_KERNELS_")}


def test_info_of_an_accelerator_without_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("xpu"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    printed = info.text(info.report())
    assert "xpu          xpu, 2 of them" in printed
    assert "attention    xpu     cpu        it takes CPU tensors; these are on xpu" in printed
    assert "attention    xpu     reference  yes" in printed


@pytest.fixture
def package_without_library(tmp_path: Path) -> Path:
    """A folder to put on the path, with the package as a wheel without native files has it."""
    source = Path(gtp_kernels.__file__).parent
    shutil.copytree(source, tmp_path / "gtp_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def info_of(folder: Path, *, runs: str = "from gtp_kernels import info; info.main([])") -> str:
    """What a process prints that imports the package from this folder."""
    code = f"import sys; sys.path.insert(0, {str(folder)!r}); {runs}"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code] if sys.version_info >= (3, 11) else [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")},
        check=False,
    )
    return done.stdout + done.stderr


FORCED = """
import torch, gtp_kernels
q = torch.randn(1, 1, 4, 8)
with gtp_kernels.use_backend("cpu"):
    gtp_kernels.attention_with_scores(q, q, q)
"""


def test_a_wheel_without_its_native_library_says_what_is_missing_and_how_to_get_it(
    package_without_library: Path,
) -> None:
    printed = info_of(package_without_library)
    assert f"in {package_without_library}" in printed
    assert "missing: libgtp_kernels.so was not built; install a C++17 compiler" in printed
    assert "attention    cpu     reference" in printed.partition("runs")[0]
    forced = info_of(package_without_library, runs=f"exec({FORCED!r})")
    assert "the forced backend 'cpu' cannot run attention" in forced
    assert "cpu: libgtp_kernels.so was not built; install a C++17 compiler" in forced


def test_a_library_of_another_torch_says_what_was_found_and_what_is_needed(package_without_library: Path) -> None:
    """One that needs a symbol that this torch lacks, and one that is no library at all."""
    library = package_without_library / "gtp_kernels" / "libgtp_kernels.so"
    library.write_bytes(b"not a library")
    printed = info_of(package_without_library)
    assert f"libgtp_kernels.so does not load with torch {torch.__version__} (it needs torch 2.11 or later)" in printed
    assert "GTP_NATIVE=1 pip install" in printed
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler for a library with a missing symbol")
    source = package_without_library / "other.cpp"
    source.write_text("void made_by_another_torch(); namespace { struct S { S() { made_by_another_torch(); } } s; }")
    subprocess.run([compiler, "-shared", "-fPIC", "-Wl,-z,now", "-o", str(library), str(source)], check=True)
    printed = info_of(package_without_library)
    assert "does not load with torch" in printed
    assert "made_by_another_torch" in printed
    forced = info_of(package_without_library, runs=f"exec({FORCED!r})")
    assert "the forced backend 'cpu' cannot run attention" in forced
    assert "undefined symbol" in forced


def test_the_public_names_are_a_promise() -> None:
    assert set(gtp_kernels.__all__) <= set(dir(gtp_kernels))
    for name in gtp_kernels.__all__:
        assert getattr(gtp_kernels, name).__doc__, name
    assert (Path(gtp_kernels.__file__).parent / "py.typed").exists()


def test_forcing_inside_compiled_code_is_an_error_not_ignored() -> None:
    def step(q: torch.Tensor) -> torch.Tensor:
        with gtp_kernels.use_backend("reference"):
            return gtp_kernels.attention_with_scores(q, q, q)[0]

    torch._dynamo.reset()
    with pytest.raises(Exception, match="outside of the function that torch.compile traces"):
        torch.compile(step, fullgraph=True, backend="aot_eager")(Q)


def test_another_thread_does_not_undo_the_guard_of_compiled_code() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q: gtp_kernels.attention_with_scores(q, q, q)[0], fullgraph=True, backend="aot_eager"
    )
    compiled(Q)

    def other() -> None:
        with gtp_kernels.use_backend("cpu"):
            pass

    with gtp_kernels.use_backend("reference"), backends.record() as ran:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        compiled(Q)
    assert {name for _, name in ran} == {"reference"}


def test_no_skip_is_stale() -> None:
    """Every pattern of the list of skipped tests matches a test that its way of running collects."""
    for way, listed in skips.SKIPS.items():
        if not listed:
            continue
        files = sorted({pattern.split("::")[0] for pattern, _ in listed})
        # On a GPU the tests have the names that they have in the interpreter.
        environment = os.environ | {
            "TRITON_INTERPRET": "1" if way in (skips.INTERPRETER, skips.GPU) else "0",
            "GTP_KERNELS_EMULATE_CUDA": "1" if way in (skips.EMULATION, skips.CUDA) else "0",
        }
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", *files],
            capture_output=True,
            text=True,
            env=environment,
            cwd=Path(__file__).parent,
            check=False,
        )
        collected = [skips.without_folder(line) for line in done.stdout.splitlines() if "::" in line]
        assert collected, done.stdout + done.stderr
        for pattern, why in listed:
            assert why
            assert any(skips.matches(pattern, test) for test in collected), f"{way}: {pattern} matches no test"


def test_a_pattern_matches_whole_ids() -> None:
    assert skips.matches("test_a.py::test_b[triton-*]", "test_a.py::test_b[triton-x-1.0]")
    assert not skips.matches("test_a.py::test_b", "test_a.py::test_b[triton]")
    assert not skips.matches("test_a.py::test_b[t?iton]", "test_a.py::test_b[triton]")
