"""select_residual_propagate_norm on every backend against the three ops that it stands for, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import backend_params
from test_propagate import DTYPES, GRIDS
from torch import Tensor

import gtp_kernels
from gtp_kernels import AttentionScores, TokenGraph, backends, checks, reference
from gtp_kernels.ops import _library
from gtp_kernels.ops.propagate import graph_parts
from gtp_kernels.ops.select_propagate import unchecked_select_residual

OPERATOR_BACKENDS = [name for name in backend_params() if name != "reference"]


def case(
    n: int, num_prefix: int, dtype: torch.dtype, channels: int = 24, batch: int = 2
) -> tuple[Tensor, Tensor, AttentionScores, TokenGraph, Tensor]:
    """x and branch [B, R+n, C], scores of 3 heads with ties and NaN, the Mixed graph of x, scales [B, R+n]."""
    generator = torch.Generator().manual_seed(n)
    x, branch = (torch.randn(batch, num_prefix + n, channels, generator=generator).to(dtype) for _ in range(2))
    graph = reference.build_graph(x, GRIDS[n], "Mixed", min(5, n - 1), num_prefix)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    parts = torch.randint(-4, 5, (3, batch, 3, num_prefix + n), generator=generator, device="cpu").to(wide) / 4
    parts[:, 0, 1, -1] = torch.nan
    scores = AttentionScores(*parts.to(x.device))
    return x, branch, scores, graph, 0.5 + torch.rand(batch, num_prefix + n, generator=generator)


def both(
    x: Tensor,
    branch: Tensor,
    scores: AttentionScores,
    graph: TokenGraph | None,
    num_prop: int,
    *,
    selection: str = "MixedAttnMax",
    order: str = "grid",
    semantics: str = "official",
    num_prefix: int = 1,
    **options: Any,
) -> tuple[list[Any], list[Any]]:
    """The results of the one operator and of the three."""
    importance = gtp_kernels.token_importance(scores, selection, num_prefix, semantics)
    kept, prop = gtp_kernels.select_tokens(importance, num_prop, num_prefix=num_prefix, order=order)
    theirs = gtp_kernels.residual_propagate_norm(
        x, branch, graph, kept, prop, num_prefix=num_prefix, norm_eps=1e-5, **options
    )
    ours = unchecked_select_residual(
        x,
        branch,
        scores,
        graph,
        selection,
        num_prop,
        order,
        semantics,
        options.get("layer_scale"),
        options.get("norm_weight"),
        options.get("norm_bias"),
        1e-5,
        options.get("norm", "layer"),
        options.get("standard", "GraphProp"),
        options.get("alpha", 0.1),
        options.get("token_scales"),
        num_prefix,
    )
    return flat(ours), [*flat(theirs), kept, prop]


def flat(results: tuple[Any, ...]) -> list[Any]:
    return [result.token if isinstance(result, TokenGraph) else result for result in results]


def assert_same_bits(results: tuple[list[Any], list[Any]]) -> None:
    for ours, theirs in zip(*results, strict=True):
        if theirs is None:
            assert ours is None
        else:
            assert ours.dtype == theirs.dtype
            assert ours.is_contiguous()
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("standard", checks.PROPAGATIONS)
@pytest.mark.parametrize("order", checks.ORDERS)
def test_the_same_bits(backend: str, dtype: torch.dtype, standard: str, order: str) -> None:
    for n, num_prop, num_prefix in ((1, 0, 1), (35, 0, 1), (35, 8, 5), (35, 34, 0), (62, 9, 1)):
        x, branch, scores, graph, scales = case(n, num_prefix, dtype)
        options: dict[str, Any] = dict(standard=standard, order=order, num_prefix=num_prefix, alpha=0.7)
        assert_same_bits(both(x, branch, scores, graph, num_prop, token_scales=scales, **options))
        vector = x[0, 0]
        options |= dict(layer_scale=vector, norm="rms", norm_weight=vector)
        assert_same_bits(both(x, branch, scores, graph, num_prop, **options))


@pytest.mark.parametrize("selection", checks.SCORE_STANDARDS)
@pytest.mark.parametrize("semantics", checks.SEMANTICS)
def test_every_selection(backend: str, selection: str, semantics: str) -> None:
    x, branch, scores, graph, scales = case(62, 1, torch.float32)
    for order in checks.ORDERS:
        options = dict(selection=selection, semantics=semantics, order=order)
        assert_same_bits(both(x, branch, scores, graph, 13, token_scales=scales, **options))


@pytest.mark.parametrize("norm", checks.NORMS)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)])
def test_two_types_and_every_norm(backend: str, dtypes: tuple[torch.dtype, torch.dtype], norm: str) -> None:
    x, branch, scores, graph, scales = case(35, 1, torch.float32)
    x, branch = x.to(dtypes[0]), branch.to(dtypes[1])
    vector = x[0, 0].to(dtypes[1])
    weight, bias = (None if norm == "none" else vector), (vector if norm == "layer" else None)
    options: dict[str, Any] = dict(norm=norm, layer_scale=vector, norm_weight=weight, norm_bias=bias)
    for given in (scales, scales.double(), scales.half(), None):
        assert_same_bits(both(x, branch, scores, graph, 8, token_scales=given, **options))


@pytest.mark.parametrize("channels", [1, 3, 384, 1540, 2052])
def test_channels(backend: str, channels: int) -> None:
    """Long rows of half types: their norm has an order of sums of its own on ``cuda``."""
    for dtype in (torch.float32, torch.bfloat16):
        x, branch, scores, graph, scales = case(9, 1, dtype, channels=channels)
        assert_same_bits(both(x, branch, scores, graph, 4, token_scales=scales))


@pytest.mark.parametrize(("n", "num_prop"), [(196, 14), (784, 100)])
def test_many_tokens(backend: str, n: int, num_prop: int) -> None:
    x, branch, scores, graph, scales = case(n, 1, torch.bfloat16, channels=8)
    for order in checks.ORDERS:
        assert_same_bits(both(x, branch, scores, graph, num_prop, token_scales=scales, order=order))


def test_views(backend: str) -> None:
    """Strided and offset inputs of every kind."""
    x, branch, scores, graph, scales = case(35, 1, torch.float32, channels=48)
    inputs = x[..., 1::2], branch.transpose(1, 2).contiguous().transpose(1, 2)[..., :24]
    strided = AttentionScores(*(torch.stack((part, part), -1)[..., 1] for part in scores))
    arrays = TokenGraph(*(torch.stack((part, part), -1)[..., 1] for part in graph_parts(graph, "GraphProp")))
    views = torch.stack((scales, scales), -1)[..., 0]
    assert_same_bits(both(*inputs, strided, arrays, 8, token_scales=views, layer_scale=x[0, 0, ::2]))
    contiguous = [tensor.contiguous() for tensor in inputs]
    expected = both(*contiguous, scores, graph, 8, token_scales=scales, layer_scale=x[0, 0, ::2].contiguous())[1]
    assert_same_bits((both(*inputs, strided, arrays, 8, token_scales=views, layer_scale=x[0, 0, ::2])[0], expected))


def arguments(
    standard: str = "GraphProp", n: int = 9, num_prop: int = 3, dtype: torch.dtype = torch.float32, num_prefix: int = 1
) -> tuple[Any, ...]:
    """Of the operator itself."""
    x, branch, scores, graph, scales = case(n, num_prefix, dtype)
    vector = x[0, 0].clone()
    return (
        *(x, branch, vector, *graph_parts(graph, standard), *scores, "MixedAttnMax", num_prop, "grid", "official"),
        *(scales, vector, vector, 1e-5, "layer", standard, 0.1, num_prefix),
    )


@pytest.mark.parametrize("backend", OPERATOR_BACKENDS, indirect=True)
@pytest.mark.parametrize("standard", checks.PROPAGATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(backend: str, standard: str, dtype: torch.dtype) -> None:
    ops = _library.operators(backends.choose("select", torch.zeros(1, 1, 1)))
    given = arguments(standard, dtype=dtype)
    for num_prop, norm in ((3, "layer"), (3, "none"), (0, "rms")):
        inputs = list(given)
        inputs[11], inputs[18] = num_prop, norm
        if norm != "layer":
            inputs[14:17] = None, None, None
        torch.library.opcheck(ops.select_residual_propagate_norm, tuple(inputs))


@pytest.mark.parametrize("backend", OPERATOR_BACKENDS, indirect=True)
def test_no_token_stays(backend: str) -> None:
    """The operator's own limit; blocks keep one."""
    ops = _library.operators(backends.choose("select", torch.zeros(1, 1, 1)))
    for standard in checks.PROPAGATIONS:
        for num_prefix in (0, 1):
            given = arguments(standard, num_prop=9, num_prefix=num_prefix)
            *step, kept, prop = ops.select_residual_propagate_norm(*given)
            assert step[0].shape[1] == num_prefix + (standard == "Mean")
            assert kept.shape == (2, 0)
            assert torch.equal(prop, (torch.arange(9, device=prop.device) + num_prefix).repeat(2, 1))


def test_compile_fullgraph(backend: str) -> None:
    def step(x: Tensor, branch: Tensor, scores: AttentionScores, graph: TokenGraph, scales: Tensor) -> list[Any]:
        return both(x, branch, scores, graph, 3, token_scales=scales)[0]

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for batch in (2, 3):
            given = case(9, 1, torch.float32, batch=batch)
            assert_same_bits((compiled(*given), step(*given)))


def test_gradients_are_those_of_the_three_ops(backend: str) -> None:
    x, branch, scores, graph, _ = case(9, 1, torch.float32)
    vector = x[0, 0].clone()
    leaves = [tensor.requires_grad_() for tensor in (x, branch, vector)]
    ours, theirs = both(x, branch, scores, graph, 3, layer_scale=vector)
    assert_same_bits((ours, theirs))
    grads = [torch.autograd.grad(results[0].sum() + results[1].square().sum(), leaves) for results in (ours, theirs)]
    assert_same_bits((list(grads[0]), list(grads[1])))


def test_one_operator_runs_where_no_gradient_is_needed() -> None:
    given = case(9, 1, torch.float32)
    for needed, expected in ((False, 1), (True, 3)):
        x = given[0].clone().requires_grad_(needed)
        with (
            backends.use_backend("cpu"),
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler,
        ):
            unchecked_select_residual(
                x, *given[1:4], "MixedAttnMax", 3, "grid", "official", None, None, None, 1e-5, "layer", "GraphProp",
                0.1, None, 1,
            )  # fmt: skip
        ran = {event.name for event in profiler.events() if event.name.startswith("gtp_kernels::")}
        assert len(ran) == expected, ran


def test_what_the_operator_refuses(cpu_backend: str) -> None:
    operator = torch.ops.gtp_kernels.select_residual_propagate_norm
    gtp_kernels.build_graph(torch.zeros(1, 4, 2), (2, 2), "Spatial", num_prefix=0)  # the fixture wants an op
    good = arguments()
    operator(*good)
    for at, bad, message in (
        (7, good[7][:, :, 1:], "colsum has shape"),
        (7, good[7].half(), "diag has dtype"),
        (8, good[8].double(), "colsum has dtype"),
        (10, "CosSimMax", "standard is 'CosSimMax'"),
        (11, -1, "num_prop is -1"),
        (11, 10, "num_prop is 10"),
        (12, "up", "order is 'up'"),
        (13, "other", "semantics is 'other'"),
        (21, 11, "num_prefix is 11"),
        (0, good[0][:1], "diag has shape"),
        (1, good[1][:, 1:], "branch has shape"),
        (3, None, "must all be given"),
    ):
        with pytest.raises(RuntimeError, match=message):
            operator(*good[:at], bad, *good[at + 1 :])
    graph = TokenGraph(*good[3:7])
    graph.indptr[0, 1] = 1 << 20
    with pytest.raises(ValueError, match="indptr"):
        unchecked_select_residual(
            good[0], good[1], AttentionScores(*good[7:10]), graph, "MixedAttnMax", 3, "grid", "official", None, None,
            None, 1e-5, "layer", "GraphProp", 0.1, None, 1,
        )  # fmt: skip
