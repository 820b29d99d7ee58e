"""gtp_vit.schedule on models of transformers: its count is that of gtp_vit.gmacs, and of the same models of timm."""

import copy

import pytest
import test_patch_transformers
import torch
from test_patch_transformers import MODELS, SMALL, assert_unchanged, clip_config, siglip_config, snapshot, tower_of

import gtp_kernels
import gtp_vit
from gtp_vit import GTPConfig, patch_timm, patch_transformers, tuning
from gtp_vit.schedule import SHAPES

transformers = pytest.importorskip("transformers", minversion="5.18", reason="transformers is not installed")
timm = pytest.importorskip("timm")

OPTIONS = dict(num_prop=2, num_neighbours=3)
LARGEST = 5


def build(key, **changes):
    return test_patch_transformers.build(key, dtype=torch.float32, **changes)


def on_meta(make):
    """A model without weights, which is enough to count it."""
    with torch.device("meta"):
        return make().eval()


def counted(model, options, size=64, **forward):
    """What a forward of the patched model does, and what the formula says."""
    gtp_vit.patch(model, **options)
    try:
        with gtp_kernels.use_backend("cpu"):
            done = gtp_vit.gmacs(model, size, **forward)
        return done, patch_transformers.work(model, size).macs(model.gtp) / 1e9
    finally:
        gtp_vit.unpatch(model)


@pytest.mark.parametrize("key", MODELS)
def test_the_formula_is_the_count_at_every_num_prop(key):
    model = build(key)
    unpatched = patch_transformers.work(model)
    assert unpatched.macs(GTPConfig(num_prop=0)) / 1e9 == gtp_vit.gmacs(model, 64)
    for num_prop in range(LARGEST + 1):
        done, formula = counted(model, dict(OPTIONS, num_prop=num_prop))
        assert formula == pytest.approx(done, rel=1e-6)
    gtp_vit.patch(model, **OPTIONS)
    assert patch_transformers.work(model) == unpatched


@pytest.mark.filterwarnings("ignore:selection = 'CosSim:UserWarning")
@pytest.mark.parametrize(
    "options",
    [
        dict(propagation="Mean"),
        dict(propagation="LiveGraph"),
        dict(propagation="None", graph_type="None"),
        dict(graph_type="Spatial"),
        dict(graph_type="Semantic"),
        dict(semantics="paper"),
        dict(num_prop=(3, 0, 2)),
        dict(num_prop=(0, 4, 0), sparsity=1.0),
        dict(selection="CosSimMax"),
        dict(selection="None"),
        dict(restore=True),
        dict(restore=True, num_prop=(3, 0, 2), graph_type="Spatial"),
        dict(restore=True, num_prop=0),
        dict(restore=True, propagation="Mean"),
        dict(restore=True, propagation="LiveGraph"),
    ],
    ids=str,
)
@pytest.mark.parametrize("key", ["deit teacher", "dinov2 swiglu classifier", "registers", "clip projection", "siglip"])
def test_the_formula_is_the_count_with_options(key, options):
    done, formula = counted(build(key), OPTIONS | options)
    assert formula == pytest.approx(done, rel=1e-6)


@pytest.mark.parametrize("size", [(48, 96), (80, 80), 32, (70, 70)])
@pytest.mark.parametrize("key", ["deit classifier", "dinov2", "clip", "siglip"])
def test_the_formula_is_the_count_of_another_size(key, size):
    forward = {} if key == "dinov2" else dict(interpolate_pos_encoding=True)
    done, formula = counted(build(key), dict(num_prop=1, num_neighbours=3), size, **forward)
    assert formula == pytest.approx(done, rel=1e-6)


def test_a_model_that_is_not_square():
    model = build("vit classifier", image_size=[48, 80])
    assert patch_transformers.work(model).grid_size == (3, 5)
    done, formula = counted(model, OPTIONS, (48, 80))
    assert formula == pytest.approx(done, rel=1e-6)


# What is in a model or not.
PARTS = {
    "no classes": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL | dict(num_labels=0))),
    "no pooler": lambda: transformers.ViTModel(transformers.ViTConfig(**SMALL), add_pooling_layer=False),
    "siglip without its head": lambda: transformers.SiglipVisionModel(
        siglip_config(vision_use_head=False).vision_config
    ),
    "siglip's head beside a classifier": lambda: transformers.SiglipForImageClassification(
        siglip_config(vision_use_head=True)
    ),
    "eager attention": lambda: transformers.CLIPVisionModel._from_config(
        clip_config().vision_config, attn_implementation="eager"
    ),
    "five registers": lambda: transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(**test_patch_transformers.DINO, num_register_tokens=5)
    ),
    "hidden states by default": lambda: transformers.ViTModel(
        transformers.ViTConfig(**SMALL, output_hidden_states=True)
    ),
}


@pytest.mark.parametrize("case", PARTS)
def test_parts_of_models(case):
    model = PARTS[case]().eval()
    assert patch_transformers.work(model).macs(GTPConfig(num_prop=0)) / 1e9 == gtp_vit.gmacs(model, 64)
    done, formula = counted(model, OPTIONS)
    assert formula == pytest.approx(done, rel=1e-6)


def test_the_pooling_head_is_counted_once_and_per_token():
    model = build("siglip")
    head = patch_transformers.work(model)
    without = patch_transformers.work(PARTS["siglip without its head"]())
    # One query: its projections 2·48², its feed-forward 2·48·80. Each token: keys and values 2·48², products 2·48.
    assert head.final_token - without.final_token == 2 * 48**2 + 2 * 48
    assert head.outside - without.outside == 2 * 48**2 + 2 * 48 * 80


# The same architecture in timm, at full size.


def vit(**changes):
    return transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=1000, **changes))


SAME = {
    "ViT-B/16": (vit, "vit_base_patch16_224", {}),
    "ViT-L/16 at 384": (
        lambda: vit(
            hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, image_size=384
        ),
        "vit_large_patch16_384",
        {},
    ),
    "DeiT-S, distilled": (
        lambda: transformers.DeiTForImageClassificationWithTeacher(
            transformers.DeiTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_labels=1000)
        ),
        "deit_small_distilled_patch16_224",
        {},
    ),
    "DINOv2-S": (
        lambda: transformers.Dinov2Model(
            transformers.Dinov2Config(hidden_size=384, num_attention_heads=6, patch_size=14, image_size=518)
        ),
        "vit_small_patch14_dinov2",
        {},
    ),
    "DINOv2-g": (
        lambda: transformers.Dinov2Model(
            transformers.Dinov2Config(
                hidden_size=1536,
                num_hidden_layers=40,
                num_attention_heads=24,
                use_swiglu_ffn=True,
                patch_size=14,
                image_size=224,
            )
        ),
        "vit_giant_patch14_dinov2",
        dict(img_size=224),
    ),
    "DINOv2-B with registers": (
        lambda: transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(patch_size=14, image_size=518)
        ),
        "vit_base_patch14_reg4_dinov2",
        {},
    ),
    "CLIP ViT-B/32": (
        lambda: transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig()),
        "vit_base_patch32_clip_224",
        dict(num_classes=512),
    ),
    "SigLIP-B/16": (
        lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig()),
        "vit_base_patch16_siglip_224",
        {},
    ),
}


@pytest.mark.parametrize("case", SAME)
def test_the_work_is_that_of_timm(case):
    make, name, changes = SAME[case]
    mine, theirs = on_meta(make), on_meta(lambda: timm.create_model(name, pretrained=False, **changes))
    of_mine, of_theirs = patch_transformers.work(mine), patch_timm.work(theirs)
    # A forward of timm restores no grid.
    assert of_mine._replace(restores=False) == of_theirs
    for num_prop in (0, 2):
        config = GTPConfig(num_prop=num_prop)
        assert of_mine.macs(config) == of_theirs.macs(config)


@pytest.mark.parametrize("case", ["ViT-B/16", "DINOv2-S", "CLIP ViT-B/32", "SigLIP-B/16"])
def test_the_formula_is_the_count_at_full_size(case):
    model = on_meta(SAME[case][0])
    size = 518 if case == "DINOv2-S" else 224
    assert patch_transformers.work(model).macs(GTPConfig(num_prop=0)) / 1e9 == gtp_vit.gmacs(model, size)
    done, formula = counted(model, dict(num_prop=3), size)
    assert formula == pytest.approx(done, rel=1e-6)


# Schedules


def deit():
    return on_meta(
        lambda: transformers.DeiTForImageClassification(
            transformers.DeiTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_labels=1000)
        )
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("target", [4.4, 3.4, 2.6])
def test_the_target_is_reached(shape, target):
    model = deit()
    if (shape, target) == ("increasing", 2.6):
        with pytest.raises(ValueError, match=rf"gmacs must be in \[\d.*deepest 'increasing' schedule.*got {target}"):
            gtp_vit.schedule(model, target, shape)
        return
    values = gtp_vit.schedule(model, target, shape)
    assert len(values) == 12
    done = gtp_vit.gmacs(gtp_vit.patch(model, values), 224)
    # One more token in the first layer is a step of 0.01 GMACs, one more in each layer one of 0.15.
    assert abs(done - target) < (0.08 if shape == "constant" else 0.01)


def test_the_unpatched_work_is_a_target():
    model = deit()
    assert gtp_vit.schedule(model, gtp_vit.gmacs(model, 224)) == (0,) * 12


def test_of_another_size():
    model = deit()
    values = gtp_vit.schedule(model, 6.0, "decreasing", size=(256, 320))
    done = gtp_vit.gmacs(gtp_vit.patch(model, values), (256, 320), interpolate_pos_encoding=True)
    assert done == pytest.approx(6.0, abs=0.02)


@pytest.mark.parametrize("key", ["vit", "vit classifier", "clip projection", "siglip classifier"])
def test_options_of_a_patched_model(key):
    """Whether the model was patched, or its tower by itself."""
    for part in ("the model", "its tower"):
        model = build(key)
        most = gtp_vit.gmacs(model, 64)
        expected = gtp_vit.schedule(model, 0.9 * most, "decreasing", propagation="Mean", num_neighbours=3)
        other = gtp_vit.schedule(model, 0.9 * most, "decreasing", num_neighbours=3)
        assert expected != other
        gtp_vit.patch(model if part == "the model" else tower_of(key, model), 1, propagation="Mean", num_neighbours=3)
        before = snapshot(model)
        assert gtp_vit.schedule(model, 0.9 * most, "decreasing") == expected
        assert gtp_vit.schedule(model, 0.9 * most, "decreasing", propagation="GraphProp") == other
        assert_unchanged(model, before)


@pytest.mark.parametrize("key", ["vit classifier", "siglip", "dinov2"])
def test_the_model_stays_as_it_is(key):
    model = build(key).train()
    before, other = snapshot(model), copy.deepcopy(model)
    seen = []
    model.register_forward_hook(lambda *_: seen.append(1))
    gtp_vit.schedule(model, gtp_vit.gmacs(other, 64), num_neighbours=3)
    assert_unchanged(model, before)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not seen


def test_every_constant_schedule_fits():
    model = build("clip")
    with pytest.raises(ValueError, match=rf"num_prop must be in \[0, {LARGEST}\] for a 'constant' schedule"):
        gtp_vit.schedule(model, num_prop=LARGEST + 1, num_neighbours=3)
    gtp_vit.patch(model, gtp_vit.schedule(model, num_prop=LARGEST, num_neighbours=3), num_neighbours=3)


def test_the_tuner_counts_them():
    model = build("vit classifier")
    options = {"propagation": "GraphProp", "num_neighbours": 3}
    work = tuning.work_of(model, (64, 64))
    assert work == patch_transformers.work(model)
    target = 0.85 * gtp_vit.gmacs(model, 64)
    num_prop = tuning.fit(work, options, (1, 1, 1), target)
    done = gtp_vit.gmacs(gtp_vit.patch(model, num_prop, **options), 64)
    assert 0.8 * target < done <= target * (1 + 1e-9)
    with pytest.raises(TypeError, match="model must be of timm, .*; got ViTForImageClassification"):
        tuning.tune(gtp_vit.unpatch(model), torch.zeros(2, 3, 64, 64), target)


# What is refused


def llava():
    return test_patch_transformers.llava()[0]


REFUSED = {
    "beit": (test_patch_transformers.beit, "got BeitModel: its attention adds a relative position bias"),
    "clip": (
        lambda: transformers.CLIPModel(clip_config()),
        r"alone or with a classifier or projection; got CLIPModel: give its tower, model\.vision_model",
    ),
    "siglip": (
        lambda: transformers.SiglipModel(siglip_config()),
        r"got SiglipModel: give its tower, model\.vision_model",
    ),
    "llava": (llava, r"got LlavaForConditionalGeneration: give its tower, model\.model\.vision_tower"),
    "masked image modelling": (
        lambda: transformers.ViTForMaskedImageModeling(transformers.ViTConfig(**SMALL, encoder_stride=16)),
        r"got ViTForMaskedImageModeling: give its tower, model\.vit",
    ),
    "two towers": (test_patch_transformers.two_towers, "holds 2: patch each by itself .vision_model, other."),
    "another layer": (
        lambda: test_patch_transformers.replaced("vit", "layers.1", test_patch_transformers.OwnLayer),
        "layer 1 of ViTModel is OwnLayer",
    ),
    "no model of images": (
        lambda: transformers.BertModel(transformers.BertConfig(**test_patch_transformers.TEXT)),
        "got BertModel: it holds none of them",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_are_refused(case):
    make, message = REFUSED[case]
    with pytest.raises(TypeError, match=message):
        gtp_vit.schedule(make(), 0.001, num_neighbours=3)


def test_a_tower_patched_beside_another():
    model = test_patch_transformers.two_towers()
    gtp_vit.patch(model.other, **OPTIONS)
    with pytest.raises(TypeError, match="holds 2"):
        gtp_vit.schedule(model, 0.001)
    assert gtp_vit.schedule(model.other, gtp_vit.gmacs(build("clip"), 64)) == (0, 0, 0)


def test_towers_of_models_that_are_refused():
    model = gtp_vit.patch(transformers.CLIPModel(clip_config()).eval(), **OPTIONS)
    tower = model.vision_model
    done = gtp_vit.gmacs(tower, 64)
    assert gtp_vit.schedule(tower, done) == (2, 2, 2)
    with pytest.raises(TypeError, match="give its tower"):
        gtp_vit.schedule(model, done)


@pytest.mark.parametrize(
    ("size", "error", "message"),
    [
        (8, ValueError, r"size must hold at least one patch; got \(8, 8\)"),
        (0, ValueError, "size: sizes start at 1"),
        ("64", TypeError, r"size: expected an int or \(height, width\)"),
        (32, ValueError, r"num_neighbours must be in \[0, 4\)"),
    ],
)
def test_sizes_that_are_refused(size, error, message):
    with pytest.raises(error, match=message):
        gtp_vit.schedule(build("vit"), 0.0001, size=size)


def test_gmacs_of_a_model_that_takes_text():
    with pytest.raises(TypeError, match="model: CLIPModel takes input_ids, not images: count its vision tower"):
        gtp_vit.gmacs(transformers.CLIPModel(clip_config()), 64)
    bert = transformers.BertModel(transformers.BertConfig(**test_patch_transformers.TEXT)).eval()
    assert gtp_vit.gmacs(bert, torch.zeros(1, 5, dtype=torch.long)) > 0
