"""gtp_vit.graphed: a model as one CUDA graph, and what it does where there can be none."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import gtp_kernels
import gtp_vit
from gtp_vit import graphs

timm = pytest.importorskip("timm")

from test_patch_timm import OPTIONS, build, images


@pytest.fixture(autouse=True)
def _not_warned() -> None:
    graphs._warned.clear()


def patched(key: str = "vit", propagation: str = "GraphProp") -> Any:
    return gtp_vit.patch(build(key, dtype=torch.float32), **OPTIONS, propagation=propagation)


@pytest.mark.parametrize("propagation", ["GraphProp", "LiveGraph"])
def test_on_a_cpu_it_is_the_model_and_says_so_once(propagation: str) -> None:
    model = patched(propagation=propagation)
    x = images(model)
    with pytest.warns(UserWarning, match="CUDA graphs need a GPU; the example is on cpu"):
        run = gtp_vit.graphed(model, x)
    assert run.fallback == "CUDA graphs need a GPU; the example is on cpu"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gtp_vit.graphed(model, x)
    other = images(model, seed=2)
    result = run(other)
    with torch.no_grad():
        assert torch.equal(result, model(other))
    assert not result.requires_grad


@pytest.mark.filterwarnings("ignore:gtp_vit.graphed")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:1], r"x must have the shape of the example, \(2, 3, 64, 64\); got \(1, 3, 64, 64\)"),
        (lambda x: x.double(), "the dtype of the example, torch.float32; got torch.float64"),
        (lambda x: x.to("meta"), "the device of the example, cpu; got meta"),
    ],
)
def test_another_input_is_refused(change: Any, message: str) -> None:
    model = patched()
    run = gtp_vit.graphed(model, images(model))
    with pytest.raises(ValueError, match=message):
        run(change(images(model)))
    with pytest.raises(TypeError, match="x must be a tensor; got list"):
        run([1])  # type: ignore[arg-type]  # that is the point


def test_wrong_arguments_are_named() -> None:
    model = patched()
    with pytest.raises(TypeError, match="model must be a module; got function"):
        gtp_vit.graphed(lambda x: x, images(model))  # type: ignore[arg-type]  # that is the point
    with pytest.raises(TypeError, match="example must be a tensor; got tuple"):
        gtp_vit.graphed(model, (2, 3, 64, 64))  # type: ignore[arg-type]  # as above
    with pytest.raises(ValueError, match=r"model must be in evaluation mode"):
        gtp_vit.graphed(model.train(), images(model))


if torch.cuda.is_available():

    @pytest.mark.gpu
    @pytest.mark.parametrize("propagation", ["GraphProp", "LiveGraph"])
    @pytest.mark.parametrize("key", ["vit", "dinov2 registers", "gap"])
    def test_the_graph_is_the_model(key: str, propagation: str) -> None:
        model = patched(key, propagation).to("cuda")
        inputs = [images(model, batch=1, seed=seed).to("cuda") for seed in range(3)]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run = gtp_vit.graphed(model, inputs[0])
        assert run.fallback is None
        results = [run(x) for x in inputs]  # each must outlive the next call
        with torch.no_grad():
            for x, result in zip(inputs, results, strict=True):
                assert torch.equal(result, model(x))
            next(model.parameters()).mul_(1.5)
            assert torch.equal(run(inputs[0]), model(inputs[0]))

    @pytest.mark.gpu
    def test_threads_take_turns() -> None:
        model = patched().to("cuda")
        inputs = [images(model, batch=1, seed=seed).to("cuda") for seed in range(4)]
        run = gtp_vit.graphed(model, inputs[0])
        with torch.no_grad():
            expected = [model(x) for x in inputs]
        torch.cuda.synchronize()
        wrong: list[int] = []

        def serve(index: int) -> None:
            with torch.cuda.stream(torch.cuda.Stream()):
                wrong.extend(index for _ in range(20) if not torch.equal(run(inputs[index]), expected[index]))

        threads = [threading.Thread(target=serve, args=(index,)) for index in range(len(inputs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []

    @pytest.mark.gpu
    def test_what_cannot_be_captured_runs_as_it_is() -> None:
        class Synchronises(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x * float(x.sum().item() > 0)

        x = torch.ones(2, device="cuda")
        with pytest.warns(UserWarning, match="the capture failed"):
            run = gtp_vit.graphed(Synchronises().eval(), x)
        assert torch.equal(run(x), x)
        assert torch.equal(run(-x), -x * 0)
        with gtp_kernels.use_backend("triton"):
            assert gtp_vit.graphed(patched().to("cuda"), images(patched()).to("cuda")).fallback is None
