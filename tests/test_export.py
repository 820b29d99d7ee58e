"""The Triton operators as torch.export and torch.compile see them: on fake GPU tensors, without a GPU.

Every operator and a patched model export with a batch of any size, decompose into their kernels, and read no data.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import timm.models.vision_transformer as timm_vit
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import gtp_kernels
import gtp_vit
from benchmarks import launches
from gtp_kernels import AttentionScores, LiveGraph, LiveSelection, TokenGraph, checks

triton = pytest.importorskip("triton")
HEADS, TOKENS, SIZE, CHANNELS, GRID, NUM_PROP = 2, 17, 16, 24, (4, 4), 3
SMALLEST, LARGEST = 2, 512


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """A mode in which tensors on ``cuda`` can be made: fake ones, of an sm_90 that is not there."""
    driver = types.SimpleNamespace(get_current_target=launches.TARGETS["sm_90"].gpu_target)
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    with (
        launches.pretend(launches.TARGETS["sm_90"]),
        FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True) as mode,
        gtp_kernels.use_backend("triton"),
    ):
        yield mode


def gpu(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def graph_parts(batch: int = 4) -> tuple[Tensor, ...]:
    n, edges = GRID[0] * GRID[1], 150
    integers = [gpu(batch, size, dtype=torch.int32) for size in (n + 1, edges, n)]
    return integers[0], integers[1], gpu(batch, edges), integers[2]


def indices(batch: int = 4) -> tuple[Tensor, Tensor]:
    n = GRID[0] * GRID[1]
    return gpu(batch, n - NUM_PROP, dtype=torch.int64), gpu(batch, NUM_PROP, dtype=torch.int64)


def attention(dtype: torch.dtype, sparsity: float, scaled: bool) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    def step(qkv: Tensor, scales: Tensor) -> tuple[Tensor, ...]:
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out, scores = gtp_kernels.attention_with_scores(q, k, v, scales if scaled else None, sparsity=sparsity)
        return out, *scores

    return step, (gpu(4, TOKENS, 3, HEADS, SIZE, dtype=dtype), gpu(4, TOKENS))


def attention_backward(dtype: torch.dtype, sparsity: float) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    def step(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scales: Tensor) -> Any:
        operator = torch.ops.gtp_kernels_triton.attention_with_scores_backward
        return operator(grad, q, k, v, scales, sparsity, 0.25, "official")

    return step, (*(gpu(4, HEADS, TOKENS, SIZE, dtype=dtype) for _ in range(4)), gpu(4, TOKENS))


def importance(standard: str, semantics: str) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    def step(*scores: Tensor) -> Tensor:
        return gtp_kernels.token_importance(AttentionScores(*scores), standard, 1, semantics)

    return step, tuple(gpu(4, HEADS, TOKENS) for _ in range(3))


def selection(order: str, tokens: int) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    def step(importance: Tensor) -> tuple[Tensor, Tensor]:
        return gtp_kernels.select_tokens(importance, NUM_PROP, order=order)

    return step, (gpu(4, tokens),)


def propagation(standard: str, dtype: torch.dtype) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    def step(x: Tensor, kept: Tensor, prop: Tensor, scales: Tensor, *parts: Tensor) -> Any:
        out, graph, scales_out = gtp_kernels.propagate(x, TokenGraph(*parts), kept, prop, standard, 0.2, scales)
        return out, graph.token, scales_out

    return step, (gpu(4, TOKENS, CHANNELS, dtype=dtype), *indices(), gpu(4, TOKENS), *graph_parts())


def propagation_backward(standard: str) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    def step(grad: Tensor, kept: Tensor, prop: Tensor, *parts: Tensor) -> Tensor:
        given = parts if standard == "GraphProp" else (None,) * 4
        return torch.ops.gtp_kernels_triton.propagate_backward(grad, *given, kept, prop, standard, 0.2, 1)

    rows = TOKENS - NUM_PROP + (standard == "Mean")
    return step, (gpu(4, rows, CHANNELS), *indices(), *graph_parts())


def dense_propagation() -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    def step(x: Tensor, weight: Tensor, kept: Tensor, prop: Tensor, scales: Tensor) -> Any:
        return gtp_kernels.propagate(x, weight, kept, prop, "GraphProp", 0.2, scales)

    n = GRID[0] * GRID[1]
    return step, (gpu(4, TOKENS, CHANNELS), gpu(4, n, n), *indices(), gpu(4, TOKENS))


def residual(norm: str, standard: str, dtype: torch.dtype) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    def step(x: Tensor, branch: Tensor, kept: Tensor, prop: Tensor, scales: Tensor, *parts: Tensor) -> Any:
        out, normed, graph, scales_out = gtp_kernels.residual_propagate_norm(
            x, branch, TokenGraph(*parts), kept, prop, norm=norm, standard=standard, token_scales=scales
        )
        return out, *(() if normed is None else (normed,)), graph.token, scales_out

    streams = (gpu(4, TOKENS, CHANNELS, dtype=dtype) for _ in range(2))
    return step, (*streams, *indices(), gpu(4, TOKENS), *graph_parts())


def graph_of(graph_type: str, dtype: torch.dtype) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    def step(x: Tensor) -> tuple[Tensor, ...]:
        graph = gtp_kernels.build_graph(x, GRID, graph_type, 3)
        return graph.indptr, graph.indices, graph.values, graph.token

    return step, (gpu(4, TOKENS, CHANNELS, dtype=dtype),)


def live_parts(batch: int = 4) -> tuple[Tensor, ...]:
    n, edges = GRID[0] * GRID[1], 300
    return tuple(gpu(batch, size, dtype=torch.int32) for size in (n + 1, edges, n))


def live_selection(dtype: torch.dtype) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    def step(k: Tensor, importance: Tensor, sizes: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
        found = gtp_kernels.live_select(k, importance, LiveGraph(*parts), NUM_PROP, sizes)
        return *found[:5], found.live.rep

    importance = gpu(4, GRID[0] * GRID[1], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return step, (gpu(4, HEADS, TOKENS, SIZE, dtype=dtype), importance, gpu(4, TOKENS), *live_parts())


def live_merging(norm: str, dtype: torch.dtype) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    def step(
        x: Tensor, branch: Tensor, kept: Tensor, prop: Tensor, target: Tensor, share: Tensor, *parts: Tensor
    ) -> Any:
        selection = LiveSelection(kept, prop, target, share, share, LiveGraph(*parts))
        out, normed = gtp_kernels.live_merge(x, branch, selection, norm=norm)
        return out if normed is None else (out, normed)

    streams = (gpu(4, TOKENS, CHANNELS, dtype=dtype) for _ in range(2))
    kept, prop = indices()
    return step, (*streams, kept, prop, torch.empty_like(prop), gpu(4, TOKENS - 1), *live_parts())


BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
CASES: dict[str, tuple[str, Callable[[], tuple[Callable[..., Any], tuple[Tensor, ...]]]]] = {
    **{
        f"attention {dtype} {sparsity:g}{' scales' * scaled}": (
            "attention_with_scores",
            lambda dtype=dtype, sparsity=sparsity, scaled=scaled: attention(dtype, sparsity, scaled),
        )
        for dtype, sparsity, scaled in ((BF16, 0.6, True), (BF16, 1.0, False), (FP32, 0.6, True), (FP64, 0.6, True))
    },
    **{
        f"attention backward {dtype} {sparsity:g}": (
            "attention_with_scores_backward",
            lambda dtype=dtype, sparsity=sparsity: attention_backward(dtype, sparsity),
        )
        for dtype, sparsity in ((BF16, 0.6), (FP32, 1.0))
    },
    **{
        f"importance {standard} {semantics}": (
            "token_importance",
            lambda standard=standard, semantics=semantics: importance(standard, semantics),
        )
        for standard, semantics in (("MixedAttnMax", "paper"), ("CLSAttnMean", "official"))
    },
    **{
        f"selection {order} {tokens}": ("select_tokens", lambda order=order, tokens=tokens: selection(order, tokens))
        for order, tokens in (("grid", 16), ("grid", 784), ("importance", 16))
    },
    **{
        f"propagation {standard}": ("propagate", lambda standard=standard: propagation(standard, BF16))
        for standard in checks.PROPAGATIONS
    },
    **{
        f"propagation backward {standard}": (
            "propagate_backward",
            lambda standard=standard: propagation_backward(standard),
        )
        for standard in checks.PROPAGATIONS
    },
    "dense propagation": ("propagate_dense", dense_propagation),
    **{
        f"residual {norm} {standard}": (
            "residual_propagate_norm",
            lambda norm=norm, standard=standard: residual(norm, standard, BF16),
        )
        for norm, standard in (("layer", "GraphProp"), ("rms", "Mean"), ("none", "None"))
    },
    **{
        f"graph {graph_type}": ("build_graph", lambda graph_type=graph_type: graph_of(graph_type, FP32))
        for graph_type in ("Mixed", "Semantic", "Spatial")
    },
    **{f"live selection {dtype}": ("live_select", lambda dtype=dtype: live_selection(dtype)) for dtype in (BF16, FP64)},
    **{f"live merge {norm}": ("live_merge", lambda norm=norm: live_merging(norm, BF16)) for norm in ("layer", "none")},
}


class Step(nn.Module):
    def __init__(self, step: Callable[..., Any]) -> None:
        super().__init__()
        self.step = step

    def forward(self, *inputs: Tensor) -> Any:
        return self.step(*inputs)


def export(module: nn.Module, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    """The module for any batch from SMALLEST to LARGEST."""
    batch = Dim("batch", min=SMALLEST, max=LARGEST)
    shapes = [{0: batch}] * len(inputs)
    return torch.export.export(
        module, inputs, dynamic_shapes=(tuple(shapes),) if isinstance(module, Step) else tuple(shapes)
    )


def called(program: ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def assert_any_batch_and_no_data(program: ExportedProgram) -> None:
    """The batch is one symbol with the bounds that were asked for, and nothing waits for the device."""
    bounds = [(int(bound.lower), int(bound.upper)) for bound in program.range_constraints.values()]
    assert bounds == [(SMALLEST, LARGEST)], program.range_constraints
    for node in program.graph.nodes:
        # What reads data back gives a number (unbacked), a tensor on the host, or a size that depends on data.
        for value in torch.utils._pytree.tree_leaves(node.meta.get("val")):
            if isinstance(value, Tensor):
                assert value.device.type == "cuda", node.format_node()
            if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
                assert not torch.fx.experimental.symbolic_shapes.free_unbacked_symbols(value), node.format_node()
        assert "_local_scalar_dense" not in str(node.target), node.format_node()
        assert "nonzero" not in str(node.target), node.format_node()


def assert_kernels_show(program: ExportedProgram) -> None:
    kernels = program.run_decompositions(decompose_custom_triton_ops=True)
    names = called(kernels)
    assert "triton_kernel_wrapper_functional" in names, names
    assert not [name for name in names if "gtp_kernels" in name]
    # What torch takes to be written it may copy before the kernel, and a view of it ties the batch to one size.
    assert not kernels.graph_signature.user_inputs_to_mutate
    assert_any_batch_and_no_data(kernels)


@pytest.mark.parametrize("case", CASES)
def test_operator(fake_gpu: FakeTensorMode, case: str) -> None:
    operator, make = CASES[case]
    step, inputs = make()
    program = export(Step(step), inputs)
    ours = [name for name in called(program) if name.startswith("gtp_kernels")]
    assert ours == [f"gtp_kernels_triton.{operator}.default"]
    assert_any_batch_and_no_data(program)
    assert_kernels_show(program)


MODELS = {
    "vit": ("vit_tiny_patch16_224", dict(img_size=64)),
    "dinov2 registers": ("vit_small_patch14_reg4_dinov2", dict(img_size=70)),
    "siglip": ("vit_base_patch16_siglip_224", dict(img_size=64)),
}


@pytest.mark.parametrize(
    ("key", "options", "operators"),
    [
        *((key, {}, {"attention_with_scores", "select_residual_propagate_norm", "build_graph"}) for key in MODELS),
        (
            "vit",
            dict(propagation="LiveGraph"),
            {"attention_with_scores", "token_importance", "build_graph", "live_graph", "live_select", "live_merge"},
        ),
    ],
)
def test_patched_model(
    fake_gpu: FakeTensorMode, key: str, options: dict[str, Any], operators: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, size = MODELS[key]
    # timm reads its rates of drop path from a tensor, which is fake here.
    monkeypatch.setattr(timm_vit, "calculate_drop_path_rates", lambda rate, depth, *_: [0.0] * depth)
    with torch.device("cuda"):
        model = timm.create_model(name, pretrained=False, **size, embed_dim=48, num_heads=3, depth=2, num_classes=10)
        gtp_vit.patch(model.eval(), num_prop=2, sparsity=0.6, num_neighbours=3, **options)
    with torch.no_grad():
        program = export(model, (gpu(4, 3, size["img_size"], size["img_size"]),))
    ours = {name.split(".")[1] for name in called(program) if name.startswith("gtp_kernels_triton")}
    assert ours == operators
    assert_any_batch_and_no_data(program)
    assert_kernels_show(program)


def test_torch_knows_the_kernels_of_every_operator() -> None:
    """Their source is part of the key under which torch.compile caches."""
    import gtp_kernels.triton

    for name, launcher in gtp_kernels.triton.LAUNCHERS.items():
        kernels = torch._library.triton.get_triton_kernels_for_op(f"gtp_kernels_triton::{name}")
        assert kernels
        assert all(isinstance(kernel, triton.JITFunction) for kernel in kernels)
        assert any(kernel.fn.__module__ == launcher.__module__ for kernel in kernels)
