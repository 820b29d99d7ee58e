"""Which backend runs, what a refusal says, and what the information command prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import skips
import torch

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
    code = (
        "import sys, gtp_kernels; assert 'triton' not in sys.modules; import gtp_vit; "
        "heavy = 'timm transformers torchvision torch._dynamo onnx skimage sklearn PIL rich click'.split(); "
        "print([m for m in heavy if m in sys.modules])"
    )
    done = run_python(code)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


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
