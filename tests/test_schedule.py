"""gtp_vit.schedule: its count is that of gtp_vit.gmacs, and its schedules do the work that was asked for."""

import copy
import itertools

import pytest
import test_patch_timm
import test_patch_timm_eva
import timm
import torch
from test_patch_timm import assert_unchanged, snapshot
from torch import nn

import gtp_kernels
import gtp_vit
from gtp_vit import GTPConfig, patch_timm
from gtp_vit.schedule import SHAPES

VIT = [(test_patch_timm.build, key) for key in test_patch_timm.MODELS]
EVA = [(test_patch_timm_eva.build, key) for key in test_patch_timm_eva.MODELS]
OPTIONS = dict(num_prop=2, num_neighbours=3)


def on_meta(name, **options):
    """A model of timm without weights, which is enough to count it."""
    with torch.device("meta"):
        return timm.create_model(name, pretrained=False, **options).eval()


def deit():
    return on_meta("deit_small_patch16_224")


def counted(model, options, size=None):
    """What a forward of the patched model does, and what the formula says."""
    model = gtp_vit.patch(model, **options)
    try:
        work = patch_timm.work(model, size).macs(model.gtp) / 1e9
        with gtp_kernels.use_backend("cpu"):
            return gtp_vit.gmacs(model, size or model.patch_embed.img_size), work
    finally:
        gtp_vit.unpatch(model)


@pytest.mark.parametrize(("build", "key"), VIT + EVA, ids=lambda value: value if isinstance(value, str) else "")
def test_the_formula_is_the_count(build, key):
    model = build(key, dtype=torch.float32)
    for options in (OPTIONS, dict(OPTIONS, num_prop=0)):
        done, formula = counted(model, options)
        assert formula == pytest.approx(done, rel=1e-6)


@pytest.mark.filterwarnings("ignore:selection = 'CosSim:UserWarning")
@pytest.mark.parametrize(
    "options",
    [
        dict(propagation="Mean"),
        dict(propagation="LiveGraph"),
        dict(propagation="LiveGraph", graph_type="Spatial"),
        dict(propagation="None"),
        dict(propagation="None", graph_type="None"),
        dict(graph_type="Spatial"),
        dict(graph_type="Semantic"),
        dict(num_neighbours=0),
        dict(semantics="paper"),
        dict(num_prop=(3, 0, 2)),
        dict(num_prop=(0, 4, 0), sparsity=1.0),
        dict(num_prop=4),
        dict(selection="CosSimMax"),
        dict(selection="CosSimMean", num_prop=(0, 3, 1)),
        dict(selection="Random"),
        dict(selection="None"),
        dict(token_scale=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("key", ["vit", "gap", "dinov2 registers", "not square", "siglip"])
def test_the_formula_is_the_count_with_options(key, options):
    done, formula = counted(test_patch_timm.build(key, dtype=torch.float32), OPTIONS | options)
    assert formula == pytest.approx(done, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deit_small_patch16_224", {}),
        ("vit_large_patch16_224", dict(num_prop=8)),
        ("vit_base_patch16_siglip_224", {}),
        ("vit_medium_patch16_gap_384", dict(num_prop=20)),
        ("vit_small_patch16_dinov3", {}),
        ("eva02_base_patch14_224", {}),
    ],
)
def test_the_formula_is_the_count_at_full_size(name, options):
    done, formula = counted(on_meta(name), options)
    assert formula == pytest.approx(done, rel=1e-3)


def test_the_formula_is_the_count_of_another_size():
    model = test_patch_timm.build("dynamic size", dtype=torch.float32)
    for size in ((48, 96), (80, 80), 64):
        done, formula = counted(model, OPTIONS, size)
        assert formula == pytest.approx(done, rel=1e-6)


# What a schedule is


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("target", [4.4, 3.4, 2.6, 2.0])
def test_the_target_is_reached(shape, target):
    model = deit()
    if (shape, target) in {("constant", 2.0), ("increasing", 2.0), ("increasing", 2.6)}:
        with pytest.raises(
            ValueError, match=rf"gmacs must be in \[\d.*from the deepest '{shape}' schedule.*got {target}"
        ):
            gtp_vit.schedule(model, target, shape)
        return
    values = gtp_vit.schedule(model, target, shape)
    assert len(values) == 12
    assert all(type(value) is int for value in values)
    done = gtp_vit.gmacs(gtp_vit.patch(model, values), 224)
    # One more token in the first block is a step of 0.01 GMACs, one more in each block one of 0.15.
    assert abs(done - target) < (0.08 if shape == "constant" else 0.01)


def test_shapes():
    model = deit()
    constant, increasing, decreasing, keep_rate = (gtp_vit.schedule(model, 3.4, shape) for shape in SHAPES)
    assert constant == (8,) * 12
    assert list(increasing) == sorted(increasing)
    assert increasing[0] <= 2 < 15 < increasing[-1]
    assert list(decreasing) == sorted(decreasing, reverse=True)
    assert decreasing[0] > 8 > 1 >= decreasing[-1]
    counts = GTPConfig(num_prop=keep_rate).token_counts(196, 12)
    rates = [after / before for before, after in itertools.pairwise(counts)]
    assert max(rates) - min(rates) < 0.02
    # For the same work, who lets tokens leave late has to let more of them leave.
    assert sum(increasing) > sum(constant) > sum(decreasing)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("propagation", ["GraphProp", "Mean", "None"])
def test_every_schedule_fits(shape, propagation):
    """From no token to the deepest: the model takes it, and rounding leaves no schedule out."""
    model = test_patch_timm.build("vit", dtype=torch.float32)
    with pytest.raises(ValueError, match=r"num_prop must be in \[0, ") as error:
        gtp_vit.schedule(model, num_prop=99, shape=shape, propagation=propagation, num_neighbours=3)
    largest = float(str(error.value).partition("[0, ")[2].partition("]")[0])
    seen = set()
    for total in range(int(largest * 3) + 1):
        values = gtp_vit.schedule(model, num_prop=total / 3, shape=shape, propagation=propagation, num_neighbours=3)
        assert sum(values) <= total
        if shape == "constant" or (shape == "keep-rate" and propagation == "Mean"):
            assert total - sum(values) < 3
        else:
            assert sum(values) == total
        seen.add(values)
        gtp_vit.patch(model, values, propagation=propagation, num_neighbours=3)
        gtp_vit.unpatch(model)
    assert (0, 0, 0) in seen
    deepest = gtp_vit.schedule(model, num_prop=largest, shape=shape, propagation=propagation, num_neighbours=3)
    assert sum(deepest) == pytest.approx(3 * largest, abs=1e-3)
    left = GTPConfig(num_prop=deepest, propagation=propagation).token_counts(16, 3)[-1]
    # Less than one more in every block: 16 → 12 → 8 → 4 is the deepest constant one where Mean gives one back.
    assert left <= (3 + (propagation == "Mean") if shape == "constant" else 2)


def test_equally_many_tokens_leave():
    model = deit()
    assert [sum(gtp_vit.schedule(model, num_prop=8, shape=shape)) for shape in SHAPES] == [96] * 4
    assert gtp_vit.schedule(model, num_prop=7.9) == (7,) * 12
    assert gtp_vit.schedule(model, num_prop=0, shape="keep-rate") == (0,) * 12


def test_options_change_the_schedule():
    model = deit()
    # Mean gives a token back in each block, so that one more has to leave.
    assert gtp_vit.schedule(model, 3.4, propagation="Mean") == (9,) * 12
    gap = on_meta("vit_medium_patch16_gap_256")
    with_map, without = (
        gtp_vit.schedule(gap, 8.5, "decreasing", selection=name) for name in ("CosSimMax", "MixedAttnMax")
    )
    assert sum(with_map) > sum(without)


def test_options_of_a_patched_model():
    model = gtp_vit.patch(deit(), 3, propagation="Mean")
    before = model.gtp
    assert gtp_vit.schedule(model, 3.4) == (9,) * 12
    assert gtp_vit.schedule(model, 3.4, propagation="GraphProp") == (8,) * 12
    assert model.gtp is before


def test_other_sizes():
    model = on_meta("deit_small_patch16_224", dynamic_img_size=True)
    values = gtp_vit.schedule(model, 6.0, "decreasing", size=(256, 320))
    assert gtp_vit.gmacs(gtp_vit.patch(model, values), (256, 320)) == pytest.approx(6.0, abs=0.02)


def test_the_model_stays_as_it_is():
    model = test_patch_timm.build("dinov2", dtype=torch.float32).train()
    before, other = snapshot(model), copy.deepcopy(model)
    gtp_vit.schedule(model, gtp_vit.gmacs(other, 70), num_neighbours=3)
    assert_unchanged(model, before)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_unpatched_work_is_a_target():
    model = deit()
    assert gtp_vit.schedule(model, gtp_vit.gmacs(model, 224)) == (0,) * 12


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            dict(gmacs=5.0),
            ValueError,
            r"gmacs must be in \[2\.\d+, 4\.5\d+\], from the deepest 'constant' schedule to the",
        ),
        (dict(gmacs=0.1), ValueError, r"gmacs must be in \[2\.\d+, 4\.5\d+\].*got 0\.1"),
        (dict(gmacs=float("nan")), ValueError, "gmacs must be finite"),
        (dict(gmacs="3.4"), TypeError, "gmacs must be a number; got str"),
        (dict(), ValueError, "one of gmacs and num_prop must be given, and not both; got gmacs = None"),
        (dict(gmacs=3.4, num_prop=8), ValueError, "one of gmacs and num_prop must be given, and not both"),
        (
            dict(num_prop=17),
            ValueError,
            r"num_prop must be in \[0, 16\] for a 'constant' schedule of this model; got 17",
        ),
        (dict(num_prop=-1), ValueError, r"num_prop must be in \[0, 16\]"),
        (dict(num_prop=17, shape="decreasing"), ValueError, r"num_prop must be in \[0, 16\.25\] for a 'decreasing'"),
        (dict(num_prop=True), TypeError, "num_prop must be a number; got bool"),
        (
            dict(gmacs=3.4, shape="linear"),
            ValueError,
            "shape must be one of constant, increasing, decreasing, keep-rate; got 'linear'",
        ),
        (dict(gmacs=3.4, shape=2), TypeError, "shape must be a string"),
        (dict(gmacs=3.4, delta=1), TypeError, "schedule takes the options of gtp_vit.patch; got delta"),
        (dict(gmacs=3.4, graph_type="None"), ValueError, "graph_type must be one of Spatial, Semantic, Mixed"),
        (dict(gmacs=3.4, num_neighbours=196), ValueError, r"num_neighbours must be in \[0, 196\)"),
        (dict(gmacs=3.4, selection="None"), ValueError, "selection must not be 'None'"),
        (dict(gmacs=3.4, size=0), ValueError, "size: sizes start at 1"),
        (dict(gmacs=3.4, size="224"), TypeError, r"size: expected an int or \(height, width\)"),
    ],
    ids=str,
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        gtp_vit.schedule(deit(), **arguments)


def test_models_that_cannot_be_patched():
    with pytest.raises(TypeError, match="model must be built on timm.*got torch.nn.modules.linear.Identity"):
        gtp_vit.schedule(nn.Identity(), 3.4)
    with pytest.raises(TypeError, match="got ResNet"):
        gtp_vit.schedule(timm.create_model("resnet10t"), 3.4)
