"""gtp_vit.linear: the fused products give what the modules give, and step aside where more than a product is asked."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import timm
import torch
import torch._dynamo.testing
import torch._inductor.config
from timm.layers.mlp import GluMlp, Mlp
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import gtp_kernels
import gtp_vit
from gtp_vit import linear as module

pytestmark = pytest.mark.no_op_runs
# One product of at most 96 terms in another order, then one rounding.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7}
# All that torch can test of an operator that has no gradient.
TESTED = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


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


def targets(call: Callable[[Tensor], Tensor], x: Tensor, **options: Any) -> tuple[list[str], Tensor]:
    """What the graph of a compiled function calls, and what the function gives."""
    seen: list[str] = []

    def backend(graph: Any, _: object) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    result = torch.compile(call, backend=backend, fullgraph=True, **options)(x)
    assert seen
    return seen, result


@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_compiled_code_calls_operators_of_its_own(dtype: torch.dtype, with_residual: bool) -> None:
    m, x = mlp(dtype), tokens(dtype)
    residual = tokens(dtype).flip(1) if with_residual else None
    seen, result = targets(lambda x: module.feed_forward(m, x, residual), x)
    assert [name for name in seen if "gtp_vit" in name] == [
        "gtp_vit.linear",
        "gtp_vit.linear_add" if with_residual else "gtp_vit.linear",
    ]
    assert not any("gelu" in name or "_linear_pointwise" in name for name in seen)
    close(result, module.feed_forward(m, x, residual))
    compiled = torch.compile(lambda x: module.feed_forward(m, x, residual), fullgraph=True)
    close(compiled(x), result)
    assert fused(lambda: compiled(x))


@pytest.mark.parametrize("bias", [True, False])
def test_operators_of_compiled_code(bias: bool) -> None:
    layer, x = nn.Linear(24, 40, bias=bias), tokens()
    torch.library.opcheck(
        torch.ops.gtp_vit.linear, (x, layer.weight.detach(), layer.bias, "gelu", "tanh"), test_utils=TESTED
    )
    arguments = (x, torch.randn(2, 7, 40), layer.weight.detach(), layer.bias)
    torch.library.opcheck(torch.ops.gtp_vit.linear_add, arguments, test_utils=TESTED)


def test_one_compilation_for_any_batch() -> None:
    """How much work there is is asked of one image: of the batch, the answer would be another one for each size."""
    m = mlp()
    compilations = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(lambda x: module.feed_forward(m, x), backend=compilations, fullgraph=True, dynamic=True)
    for batch in (2, 5, 64):
        x = tokens(torch.float32, batch, 7, 24)
        close(compiled(x), m(x))
    assert compilations.frame_count == 1
    seen, _ = targets(lambda x: module.feed_forward(m, x), tokens(), dynamic=True)
    assert sum("gtp_vit" in name for name in seen) == 2


@pytest.mark.parametrize(
    "context",
    [
        torch.enable_grad,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.backends.mkldnn.flags(enabled=False),
        lambda: torch._inductor.config.patch(freezing=True),
    ],
    ids=["gradients", "autocast", "oneDNN off", "weights that the compiler packs"],
)
def test_compiled_code_keeps_the_modules(context: Callable[[], AbstractContextManager[Any]]) -> None:
    m = mlp()
    with context():
        seen, _ = targets(lambda x: module.feed_forward(m, x), tokens())
    assert not any("gtp_vit" in name for name in seen)
    assert any("gelu" in name for name in seen)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_counting_between_two_calls_of_compiled_code(backend: str) -> None:
    """A dispatch mode makes the compiler meet our functions one by one, as frames of their own."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, pretrained=False).eval()
    gtp_vit.patch(model, 1, num_neighbours=2)
    x = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    expected = compiled(x)
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 15):
        assert gtp_vit.gmacs(compiled, x) == gtp_vit.gmacs(model, x)
    else:  # of any model: nothing is compiled under a dispatch mode
        with pytest.raises(RuntimeError, match="found no compiled frames"):
            gtp_vit.gmacs(compiled, x)
    torch.testing.assert_close(compiled(x), expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_bias_alone_has_a_gradient(compiled: bool) -> None:
    m, x = mlp(), tokens()
    for name, parameter in m.named_parameters():
        parameter.requires_grad_("bias" in name)
    call = lambda: module.feed_forward(m, x, x)  # noqa: E731  # what is compiled, or not
    with torch.enable_grad():
        (torch.compile(call, backend="aot_eager") if compiled else call)().sum().backward()
    assert all((parameter.grad is not None) == ("bias" in name) for name, parameter in m.named_parameters())


def test_forward_mode_derivatives() -> None:
    m, x, tangent = mlp().requires_grad_(False), tokens(), tokens().flip(0)
    found = torch.func.jvp(lambda x: module.feed_forward(m, x, x), (x,), (tangent,))
    for mine, theirs in zip(found, torch.func.jvp(lambda x: x + m(x), (x,), (tangent,)), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_hooks_of_every_module() -> None:
    m, x, seen = mlp(), tokens(), []
    handle = nn.modules.module.register_module_forward_hook(lambda layer, *_: seen.append(type(layer).__name__))
    try:
        module.feed_forward(m, x)
    finally:
        handle.remove()
    assert seen.count("Linear") == 2


def test_bfloat16_where_onednn_has_none() -> None:
    """nn.Linear multiplies in bfloat16 on any processor, oneDNN's operators do not."""
    script = """
import torch
from timm.layers.mlp import Mlp
from gtp_vit import linear
linear._WORTH = 0
m, x = Mlp(24, 96).eval().bfloat16(), torch.randn(2, 7, 24).bfloat16()
with torch.no_grad():
    assert torch.equal(linear.feed_forward(m, x, x), x + m(x))
assert linear._DTYPES == {torch.float32}
"""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


def test_exported_code_keeps_the_modules() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return module.feed_forward(self.mlp, x, x)

    holder, x = Holder(), tokens()
    program = torch.export.export(holder, (x,))
    assert not any("gtp_vit" in str(node.target) for node in program.graph.nodes)
    close(program.module()(x), holder(x))


def test_small_products_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WORTH", 2 * 14 * 24 * 96)
    m = mlp()
    assert fused(lambda: module.feed_forward(m, tokens()))
    assert not fused(lambda: module.feed_forward(m, tokens()[:, 1:].contiguous()))
