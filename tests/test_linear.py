"""gtp_vit.linear: the fused products give what the modules give, and step aside where more than a product is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from timm.layers.mlp import GluMlp, Mlp
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import gtp_kernels
from gtp_vit import linear as module

pytestmark = pytest.mark.no_op_runs
# One product of at most 96 terms in another order, then one rounding.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7}


def mlp(dtype: torch.dtype = torch.float32, cls: type[nn.Module] = Mlp, **options: Any) -> Any:
    torch.manual_seed(0)
    return cls(24, 96, **options).eval().to(dtype)


def tokens(dtype: torch.dtype = torch.float32, *shape: int) -> Tensor:
    return torch.randn(shape or (2, 7, 24), generator=torch.Generator().manual_seed(1)).to(dtype)


def fused(call: Callable[[], object]) -> bool:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    return any("_linear_pointwise" in row.key for row in profiler.key_averages())


def close(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs().max()
    assert float(error) <= TOLERANCE[actual.dtype] * max(1.0, float(expected.double().abs().max()))


@pytest.fixture(autouse=True)
def inference(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "_WORTH", 0)
    with torch.no_grad():
        yield


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [True, False])
def test_linear(dtype: torch.dtype, bias: bool) -> None:
    layer, x = nn.Linear(24, 40, bias=bias).to(dtype), tokens(dtype)
    close(module.linear(layer, x), layer(x))
    assert fused(lambda: module.linear(layer, x))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("with_residual", [True, False])
def test_feed_forward(dtype: torch.dtype, approximate: str, with_residual: bool) -> None:
    m, x = mlp(dtype, act_layer=lambda: nn.GELU(approximate)), tokens(dtype)
    residual = tokens(dtype).flip(1) if with_residual else None
    before = None if residual is None else residual.clone()
    wide = mlp(torch.float64, act_layer=lambda: nn.GELU(approximate)).to(dtype).double()(x.double())
    expected = wide if residual is None else wide + residual.double()
    close(module.feed_forward(m, x, residual), expected.to(dtype))
    assert residual is None or torch.equal(residual, before)
    assert fused(lambda: module.feed_forward(m, x, residual))


def dropout(m: Any) -> None:
    m.drop1.p = 0.5
    m.train()


def parametrized(m: Any) -> None:
    torch.nn.utils.parametrizations.weight_norm(m.fc1)


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (lambda m: m.fc1.register_forward_hook(lambda *_: None), {}),
        (lambda m: m.act.register_forward_pre_hook(lambda *_: None), {}),
        (parametrized, {}),
        (dropout, {}),
        (lambda m: None, dict(act_layer=nn.SiLU)),
        (lambda m: None, dict(norm_layer=nn.LayerNorm)),
        (lambda m: None, dict(cls=GluMlp, act_layer=nn.GELU)),
    ],
    ids=["hook", "pre-hook", "parametrization", "dropout", "activation", "norm", "other class"],
)
def test_other_modules_are_called(change: Callable[[Any], object], options: dict[str, Any]) -> None:
    m, x = mlp(**options), tokens()
    change(m)
    assert not fused(lambda: module.feed_forward(m, x))
    torch.manual_seed(2)
    result = module.feed_forward(m, x, x)
    torch.manual_seed(2)
    assert torch.equal(result, x + m(x))


@pytest.mark.parametrize(
    "context",
    [
        torch.enable_grad,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: FlopCounterMode(display=False),
        lambda: gtp_kernels.use_backend("reference"),
        lambda: torch.backends.mkldnn.flags(enabled=False),
    ],
    ids=["gradients", "autocast", "dispatch mode", "reference", "oneDNN off"],
)
def test_other_circumstances(context: Callable[[], AbstractContextManager[Any]]) -> None:
    m, x = mlp(), tokens()
    with context():
        assert not fused(lambda: module.feed_forward(m, x))
        result, expected = module.feed_forward(m, x), m(x)
    assert torch.equal(result, expected)


@pytest.mark.parametrize(
    "x",
    [tokens(torch.float64), tokens(torch.float32, 2, 24, 7).transpose(1, 2), tokens(torch.float32, 0, 7, 24)],
    ids=["float64", "strided", "empty"],
)
def test_other_inputs(x: Tensor) -> None:
    m = mlp(x.dtype)
    assert torch.equal(module.feed_forward(m, x), m(x))
    assert not fused(lambda: module.feed_forward(m, x))


def test_compiled_code_keeps_the_modules() -> None:
    m, x = mlp(), tokens()
    seen: list[str] = []

    def backend(graph: Any, _: object) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    result = torch.compile(lambda x: module.feed_forward(m, x), backend=backend, fullgraph=True)(x)
    assert seen
    assert not any("_linear_pointwise" in name for name in seen)
    close(result, m(x))


def test_small_products_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WORTH", 2 * 14 * 24 * 96)
    m = mlp()
    assert fused(lambda: module.feed_forward(m, tokens()))
    assert not fused(lambda: module.feed_forward(m, tokens()[:, 1:].contiguous()))
