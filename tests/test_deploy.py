"""A patched model in the ways that models are served: compiled, in threads and processes, copied, in inference mode."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.data import DataLoader, Dataset

import gtp_kernels
import gtp_vit
from gtp_kernels import backends, native
from gtp_vit import export as exporting
from gtp_vit import linear

timm = pytest.importorskip("timm")

from test_patch_timm import OPTIONS, assert_same, build, images

PROPAGATIONS = ["GraphProp", "LiveGraph"]


@pytest.fixture(params=PROPAGATIONS)
def propagation(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def model(propagation: str) -> Any:
    return gtp_vit.patch(build(dtype=torch.float32, depth=2), **OPTIONS, propagation=propagation)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# torch.compile


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear layers in the operators of gtp_vit.linear, as in a model that is large enough for them."""
    monkeypatch.setattr(linear, "_WORTH", 0)


@pytest.mark.usefixtures("products")
def test_one_compilation_for_batches_of_one_shape(model: Any) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for seed in range(3):
            x = images(model, seed=seed)
            assert_same(compiled(x), model(x), 1e-4)
        assert counter.frame_count == 1
        # Nor does training the weights or another of equal shape compile anew.
        next(model.parameters()).mul_(1.1)
        assert_same(compiled(x), model(x), 1e-4)
    assert counter.frame_count == 1


@pytest.mark.usefixtures("products")
def test_one_compilation_for_batches_of_any_size(model: Any) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for batch in (3, 2, 7):
            x = images(model, batch=batch)
            torch._dynamo.mark_dynamic(x, 0)
            assert_same(compiled(x), model(x), 1e-4)
    assert counter.frame_count == 1


@pytest.mark.usefixtures("products")
def test_one_compilation_in_inference_mode(model: Any) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.inference_mode():
        for seed in range(2):
            x = images(model, seed=seed)
            assert_same(compiled(x), model(x), 1e-4)
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("cpp_wrapper", [False, True], ids=["Python wrapper", "C++ wrapper"])
@pytest.mark.parametrize(
    ("propagation", "mode"),
    [
        ("GraphProp", "default"),
        ("GraphProp", "max-autotune"),
        ("GraphProp", "reduce-overhead"),
        ("LiveGraph", "default"),
    ],
    indirect=["propagation"],
)
def test_modes_of_the_compiler(model: Any, mode: str, cpp_wrapper: bool) -> None:
    """Every mode of the compiler and both of its wrappers give what eager gives."""
    from torch._inductor import config

    with torch.no_grad(), config.patch(cpp_wrapper=cpp_wrapper), backends.record() as ran:
        compiled = torch.compile(model, fullgraph=True, mode=mode)
        for seed in range(2):
            x = images(model, seed=seed)
            assert_same(compiled(x), model(x), 1e-4)
    assert {name for _, name in ran} == {"cpu"}


@pytest.mark.skipif(native.missing is not None, reason="the native library is not there")
def test_one_exported_program_for_batches_of_any_size(model: Any) -> None:
    """torch.export with a batch of any size; test_cli_export.py compiles the program and serves it from C++."""
    with torch.no_grad():
        program = exporting._program(model, images(model), None)
        for batch in (1, 3, 7):
            x = images(model, batch=batch, seed=batch)
            assert_same(program.module()(x), model(x), 1e-4)


# Modes of torch


@pytest.mark.parametrize("key", ["vit", "dinov2 registers"])
def test_inference_mode(backend: str, key: str, propagation: str) -> None:
    model = gtp_vit.patch(build(key, dtype=torch.float32), **OPTIONS, propagation=propagation)
    x = images(model)
    with torch.no_grad():
        expected = model(x)
    with torch.inference_mode():
        result = model(x)
    assert result.is_inference()
    assert torch.equal(result, expected)
    # What a forward in inference mode leaves behind must not reach one with gradients.
    if torch.is_grad_enabled():
        model(x).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.blocks.parameters())


def test_a_model_made_in_inference_mode(backend: str, propagation: str) -> None:
    x = images(build(dtype=torch.float32))
    with torch.no_grad():
        expected = gtp_vit.patch(build(dtype=torch.float32), **OPTIONS, propagation=propagation)(x)
    with torch.inference_mode():
        model = gtp_vit.patch(build(dtype=torch.float32), **OPTIONS, propagation=propagation)
        assert torch.equal(model(x), expected)


def test_autocast_and_inference_mode(backend: str, propagation: str) -> None:
    model = gtp_vit.patch(build(dtype=torch.float32), **OPTIONS | dict(sparsity=1.0, propagation=propagation))
    x = images(model)
    with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16):
        expected = model(x)
    with torch.inference_mode(), torch.autocast(x.device.type, torch.bfloat16):
        assert torch.equal(model(x), expected)


def test_deterministic_algorithms(backend: str, propagation: str) -> None:
    """They are honoured: nothing raises, nothing warns, and the bits are the same again and without them."""
    model = gtp_vit.patch(build(dtype=torch.float32), **OPTIONS, propagation=propagation)
    x = images(model)
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    results, gradients = [], []
    for deterministic in (True, True, False):
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        model.zero_grad()
        result = model(x)
        if result.requires_grad:
            result.sum().backward()
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        results.append(result.detach())
    assert all(torch.equal(result, results[0]) for result in results)
    for found in gradients[:2]:
        assert all(torch.equal(a, b) for a, b in zip(found, gradients[0], strict=True))


# Several users of one model


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_with_live_edges_is_the_model(backend: str, how: str) -> None:
    """What a forward leaves of its graph is on no module: a copy made after one is as good as the model."""
    model = gtp_vit.patch(build(dtype=torch.float32), **OPTIONS, propagation="LiveGraph", gamma=0.5)
    with torch.no_grad():
        expected = model(images(model))
        other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
        assert other.gtp == model.gtp
        assert other.blocks[0].attn.qkv.weight.data_ptr() != model.blocks[0].attn.qkv.weight.data_ptr()
        assert torch.equal(other(images(model)), expected)
        next(model.blocks.parameters()).mul_(2.0)
        assert torch.equal(other(images(model)), expected)


def test_threads_share_one_model_in_inference_mode(backend: str, propagation: str) -> None:
    """Batches of different sizes at once, beside a thread that copies the model and one that traces its own forward."""
    model = gtp_vit.patch(build(dtype=torch.float32), **OPTIONS, propagation=propagation)
    inputs = [images(model, batch=1 + seed, seed=seed) for seed in range(3)]
    with torch.inference_mode():
        expected = [model(x) for x in inputs]
    wrong: list[str] = []
    start = threading.Barrier(len(inputs) + 2)

    def serve(index: int) -> None:
        start.wait()
        with torch.inference_mode(), gtp_kernels.use_backend(backend):
            for _ in range(8):
                if not torch.equal(model(inputs[index]), expected[index]):
                    wrong.append(f"thread {index}")  # noqa: PERF401  # a thread that fails must say so at once

    def copy_it() -> None:
        start.wait()
        with torch.inference_mode(), gtp_kernels.use_backend(backend):
            for _ in range(3):
                if not torch.equal(copy.deepcopy(model)(inputs[0]), expected[0]):
                    wrong.append("copy")  # noqa: PERF401  # as above

    def trace_it() -> None:
        start.wait()
        with torch.inference_mode(), gtp_kernels.use_backend(backend):
            for _ in range(3):
                with gtp_vit.trace(model) as trace:
                    model(inputs[1])
                if [len(layer.kept_tokens) for layer in trace.layers] != [2] * len(model.blocks):
                    wrong.append("trace")

    targets = [lambda index=index: serve(index) for index in range(len(inputs))]
    threads = [threading.Thread(target=target) for target in (*targets, copy_it, trace_it)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


class Features(Dataset[Tensor]):
    """What a model makes of noise, computed by whoever asks."""

    def __init__(self, model: nn.Module, count: int) -> None:
        self.model, self.count = model, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        with torch.inference_mode(), backends.record() as ran:
            result: Tensor = self.model(images(self.model, batch=1, seed=index))[0]
        assert {name for _, name in ran} == {"cpu"}
        return result.clone()


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers(model: Any, method: str) -> None:
    """Workers that inherit a model whose kernels have run here already, on several threads, or that unpickle it."""
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system does not {method}")
    data = Features(model, 4)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        expected = torch.stack([data[index] for index in range(len(data))])
    finally:
        torch.set_num_threads(threads)
    loader = DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context=method, timeout=120)
    assert torch.equal(torch.cat(list(loader)), expected)


# Devices without a backend


def test_a_device_without_a_backend_says_what_runs_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on mps and xpu: the error names every backend's reason and offers the definition, which then runs."""
    q = torch.randn(1, 2, 9, 8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(backends, "_ORDER", {})  # no device has a backend now, the CPU included
    with pytest.raises(RuntimeError, match="no backend runs attention on cpu") as error:
        gtp_kernels.attention_with_scores(q, q, q)
    assert "with gtp_kernels.use_backend('reference')" in str(error.value)
    assert all(f"  {name}: " in str(error.value) for name in backends.NAMES)
    with gtp_kernels.use_backend("reference"):
        out, _ = gtp_kernels.attention_with_scores(q, q, q)
    assert out.shape == q.shape


@pytest.mark.parametrize("device", ["mps", "xpu", "hpu"])
@pytest.mark.parametrize("op", backends.OPS)
def test_every_op_offers_the_reference_on_other_devices(op: str, device: str) -> None:
    with pytest.raises(RuntimeError, match=rf"no backend runs {op} on {device}; .*use_backend\('reference'\)"):
        backends._automatic(op, device)


def test_the_page_on_bad_input_names_tests_that_exist() -> None:
    here = Path(__file__).resolve().parent
    page = (here.parent / "docs" / "architecture.md").read_text()
    section = page.partition("## When something is missing or foreign")[2].partition("\n## ")[0]
    rows = [line.split("|")[3] for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 7
    defined = set(re.findall(r"^def (test_\w+)", "".join(path.read_text() for path in here.glob("*.py")), re.MULTILINE))
    for row in rows:
        names = re.findall(r"`(\w+)`", row)
        assert names
        assert set(names) <= defined, set(names) - defined
