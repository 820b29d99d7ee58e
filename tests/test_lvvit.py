"""gtp_vit.lvvit: against the published formulas and key lists, and under gtp_vit.patch."""

import argparse
import copy
import io
import json
import pickle
from importlib import resources

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import gtp_kernels
import gtp_vit
from gtp_kernels import reference
from gtp_vit import GTPConfig
from gtp_vit.lvvit import MODELS, LVViT, load_checkpoint
from gtp_vit.weights import WeightsError

KEYS = json.loads(resources.files("gtp_vit").joinpath("lvvit_keys.json").read_text())
SMALL = dict(img_size=64, embed_dim=48, depth=3, num_heads=3, num_classes=10)
OPTIONS = dict(num_prop=2, sparsity=0.6, num_neighbours=3)
# Token scales are float32 in a model of any type: their last bit moves float64 results by some 1e-7.
WITH_SCALES = 1e-6


def randomised(make, seed=0):
    """The model that ``make`` gives, with random weights and running statistics that let every part matter."""
    torch.manual_seed(seed)
    with torch.device("cpu"), torch.no_grad():
        model = make()
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.3)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return model


def build(dtype=torch.float64, seed=0, **changes):
    model = randomised(lambda: LVViT(**SMALL | changes), seed)
    return model.to(torch.get_default_device(), dtype).eval()


def images(model, batch=2, seed=1, size=None):
    height, width = size or model.patch_embed.img_size
    dtype = next(model.parameters()).dtype
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def published(state, x, num_heads, skip=2.0, config=None):
    """Logits of the LV-ViT with these weights by the published formulas, from images x; and under GTP with a config.

    The definition: nothing of the model or of timm, dense map, dense graph, nothing fused.
    """
    for stage, stride in ((1, 2), (2, 1), (3, 1)):
        weight = state[f"patch_embed.conv{stage}.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        mean, var, gain, bias = (
            state[f"patch_embed.bn{stage}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")
        )
        x = F.batch_norm(x, mean, var, gain, bias, eps=1e-5).relu()
    weight = state["patch_embed.proj.weight"]
    x = F.conv2d(x, weight, state["patch_embed.proj.bias"], stride=weight.shape[-1])
    grid_size = tuple(x.shape[2:])
    x = torch.cat((state["cls_token"].expand(x.shape[0], -1, -1), x.flatten(2).transpose(1, 2)), 1)
    x = x + state["pos_embed"]

    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    config = config or GTPConfig(num_prop=0, sparsity=1.0, token_scale=False)
    # The authors' LV-ViT never thresholded its map.
    sparsity = 1.0 if config.semantics == "official" else config.sparsity
    graph, scales = None, None
    if config.uses_graph(depth):
        graph = reference.build_graph(
            x, grid_size, config.graph_type, config.num_neighbours, 1, config.semantics
        ).to_dense()
    if config.token_scale:
        scales = torch.ones(x.shape[:2], device=x.device)
    for index, num_prop in enumerate(config.schedule(depth)):
        block = {
            name.removeprefix(f"blocks.{index}."): value
            for name, value in state.items()
            if name.startswith(f"blocks.{index}.")
        }
        normed = F.layer_norm(x, x.shape[2:], block["norm1.weight"], block["norm1.bias"], 1e-5)
        qkv = F.linear(normed, block["attn.qkv.weight"]).unflatten(2, (3, num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights = reference.attention_map(
            q, k, scales, sparsity=sparsity, scale=q.shape[-1] ** -0.5, semantics=config.semantics
        )
        out = (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)
        x = x + F.linear(out, block["attn.proj.weight"], block["attn.proj.bias"]) / skip
        if num_prop:
            index_kept, index_prop = reference.select(
                weights.detach(), config.selection, num_prop, num_prefix=1, semantics=config.semantics
            )
            # In grid order, as importances that tie (at zero, below the threshold) are judged by the current order.
            index_kept = index_kept.sort(1).values
            x, graph, scales = reference.propagate(
                x, graph, index_kept, index_prop, config.propagation, config.alpha, scales, num_prefix=1
            )
        normed = F.layer_norm(x, x.shape[2:], block["norm2.weight"], block["norm2.bias"], 1e-5)
        hidden = F.gelu(F.linear(normed, block["mlp.fc1.weight"], block["mlp.fc1.bias"]))
        x = x + F.linear(hidden, block["mlp.fc2.weight"], block["mlp.fc2.bias"]) / skip
    x = F.layer_norm(x, x.shape[2:], state["norm.weight"], state["norm.bias"], 1e-5)
    tokens = F.linear(x[:, 1:], state["aux_head.weight"], state["aux_head.bias"])
    return F.linear(x[:, 0], state["head.weight"], state["head.bias"]) + 0.5 * tokens.max(1)[0]


def assert_same(result, expected, tolerance=WITH_SCALES):
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


def shapes(model):
    return {name: list(value.shape) for name, value in model.state_dict().items()}


# The published model


@pytest.mark.parametrize(
    ("name", "img_size", "millions"),
    # As printed beside the released checkpoints.
    [
        ("lvvit_s", 224, 26.15),
        ("lvvit_s", 384, 26.30),
        ("lvvit_m", 224, 55.83),
        ("lvvit_m", 384, 56.03),
        ("lvvit_m", 448, 56.13),
    ],
)
def test_keys_and_shapes_of_the_released_checkpoints(name, img_size, millions):
    with torch.device("meta"):
        model = MODELS[name](img_size=img_size)
    expected = dict(KEYS[name])
    expected["pos_embed"] = [1, 1 + (img_size // 16) ** 2, expected["cls_token"][2]]
    assert shapes(model) == expected
    assert f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f}" == f"{millions:.2f}"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(img_size=(48, 80)),
        dict(patch_size=8, img_size=32, num_heads=4, embed_dim=32),
        dict(skip_lam=1.0),
        dict(skip_lam=3.0),
    ],
    ids=str,
)
def test_against_the_published_formulas(changes):
    model = build(**changes)
    x = images(model)
    with torch.no_grad():
        expected = published(model.state_dict(), x, model.blocks[0].attn.num_heads, changes.get("skip_lam", 2.0))
        # 1 / λ is kept in float32, in which 1 / 3 is rounded.
        assert_same(model(x), expected, 1e-6 if changes.get("skip_lam") == 3.0 else 1e-12)


def test_dividing_by_two_is_exact():
    model = build(torch.float32)
    block, x = model.blocks[0], torch.randn(2, 17, 48)
    with torch.no_grad():
        middle = x + block.attn(block.norm1(x)) / 2
        assert torch.equal(block(x), middle + block.mlp(block.norm2(middle)) / 2)


def test_the_divisor_is_a_constant_of_the_model():
    model = LVViT(**SMALL)
    assert not any("ls1" in name or "ls2" in name for name, _ in model.named_parameters())
    for weight_init in (lambda: None, model.init_weights):
        weight_init()
        assert all((scale.gamma == 0.5).all() for block in model.blocks for scale in (block.ls1, block.ls2))
    assert {scale.gamma.dtype for block in model.half().blocks for scale in (block.ls1, block.ls2)} == {torch.float16}


def test_initial_weights():
    torch.manual_seed(0)
    model = LVViT(**SMALL | dict(embed_dim=384, num_heads=6))
    for parameter in (model.cls_token, model.pos_embed, model.head.weight, model.aux_head.weight):
        assert 0.017 < float(parameter.detach().std()) < 0.023
    assert float(model.head.bias.detach().abs().max()) == float(model.aux_head.bias.detach().abs().max()) == 0


@pytest.mark.parametrize("size", [(64, 64), (48, 96)])
def test_dynamic_sizes(size):
    model = build(dynamic_img_size=True)
    fixed = build(img_size=size)
    state = dict(model.state_dict())
    if size != (64, 64):
        state["pos_embed"] = timm.layers.resample_abs_pos_embed(model.pos_embed.detach(), (3, 6), (4, 4))
    fixed.load_state_dict(state)
    x = images(model, size=size)
    with torch.no_grad():
        assert_same(model(x), fixed(x), 1e-12)
        gtp_vit.patch(model, **OPTIONS)
        gtp_vit.patch(fixed, **OPTIONS)
        assert_same(model(x), fixed(x), 1e-12)


def test_another_nominal_size():
    model = build()
    model.set_input_size((48, 80))
    assert model.patch_embed.grid_size == (3, 5)
    x = images(model, size=(48, 80))
    with torch.no_grad():
        assert_same(model(x), published(model.state_dict(), x, 3), 1e-12)
    with pytest.raises(ValueError, match=r"patch_size of LV-ViT cannot be changed from \(16, 16\); got 8"):
        model.set_input_size(patch_size=8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LVViT(**SMALL | dict(patch_size=15, img_size=60)), "patch_size must be even and positive.*got 15"),
        (lambda: LVViT(**SMALL | dict(img_size=70)), "img_size must be a multiple of patch_size = 16; got 70"),
        (lambda: LVViT(**SMALL, skip_lam=0.0), r"skip_lam must be positive; got 0\.0"),
        (lambda: LVViT(**SMALL, skip_lam=float("nan")), "skip_lam must be positive; got nan"),
        (lambda: LVViT(**SMALL)(torch.zeros(1, 3, 64, 80)), "images must be 64 x 64; got 64 x 80"),
        (
            lambda: LVViT(**SMALL, dynamic_img_size=True)(torch.zeros(1, 3, 64, 72)),
            "images must consist of whole patches of 16 x 16; got 64 x 72",
        ),
    ],
)
def test_sizes_that_do_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# What timm's tools expect


def test_heads():
    model = build()
    x = images(model)
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape == (2, 17, 48)
        assert torch.equal(model.forward_head(features), model(x))
        assert torch.equal(model.forward_head(features, pre_logits=True), features[:, 0])
        assert model.num_prefix_tokens == 1
        model.reset_classifier(4)
        assert (model.num_classes, model.head.out_features, model.aux_head.out_features) == (4, 4, 4)
        assert model.aux_head.weight.dtype == torch.float64
        assert not model.aux_head.training
        assert model(x).shape == (2, 4)
        model.reset_classifier(0)
        assert torch.equal(model(x), features[:, 0])
        assert not any("head" in name for name in model.state_dict())
        assert torch.equal(build(num_classes=0).double()(x).isnan(), torch.zeros(2, 48, dtype=torch.bool))


@pytest.mark.parametrize(
    ("name", "crop", "size"), [("lvvit_s", 0.9, 224), ("lvvit_m", 1.0, 224), ("lvvit_m", 1.0, 384)]
)
def test_data_config(name, crop, size):
    with torch.device("meta"):
        config = timm.data.resolve_model_data_config(MODELS[name](img_size=size))
    assert config["input_size"] == (3, size, size)
    assert config["crop_pct"] == crop
    assert config["interpolation"] == "bicubic"
    assert config["mean"] == (0.485, 0.456, 0.406)
    assert config["std"] == (0.229, 0.224, 0.225)


def test_intermediates_of_the_unpatched_model():
    model = build()
    with torch.no_grad():
        features, maps = model.forward_intermediates(images(model), indices=[0, 2])
    assert features.shape == (2, 17, 48)
    assert [tuple(each.shape) for each in maps] == [(2, 48, 4, 4)] * 2


# Checkpoints


def saved(tmp_path, content):
    path = tmp_path / "lvvit.pth.tar"
    torch.save(content, path)
    return path


WRAPPERS = {
    "alone": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3, "arch": "lvvit_s"},
    "model": lambda state: {"model": state},
    "module.": lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}},
    "with the arguments of the run": lambda state: {"state_dict": state, "args": argparse.Namespace(lr=1e-3)},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("patched", [False, True])
def test_load_checkpoint(tmp_path, wrapper, patched):
    source, model = build(seed=3), build()
    x = images(model)
    path = saved(tmp_path, WRAPPERS[wrapper](source.state_dict()))
    if patched:
        for each in (source, model):
            gtp_vit.patch(each, **OPTIONS)
    assert load_checkpoint(model, path) is model
    with torch.no_grad():
        assert torch.equal(model(x), source(x))


@pytest.mark.parametrize(
    ("size", "img_size"),
    # The last has as many patches as the model would have of half the size.
    [(96, 64), (96, (32, 96)), (128, (32, 128))],
)
def test_a_checkpoint_of_another_size_is_resampled(tmp_path, size, img_size):
    source, model = build(img_size=size), build(seed=1, img_size=img_size)
    load_checkpoint(model, saved(tmp_path, source.state_dict()))
    expected = timm.layers.resample_abs_pos_embed(
        source.pos_embed.detach(), model.patch_embed.grid_size, source.patch_embed.grid_size
    )
    assert torch.equal(model.pos_embed.detach(), expected)
    assert torch.equal(model.blocks[2].mlp.fc2.weight, source.blocks[2].mlp.fc2.weight)


@pytest.mark.parametrize("name", KEYS)
def test_every_key_of_the_list_is_needed(tmp_path, name):
    with torch.device("meta"):
        model = MODELS[name]()
    state = {key: torch.empty(shape, device="meta") for key, shape in KEYS[name].items()}
    model.load_state_dict(state)
    for key in ("cls_token", "patch_embed.bn2.running_var", "blocks.15.mlp.fc1.bias", "aux_head.weight"):
        less = {each: value for each, value in state.items() if each != key}
        with pytest.raises(WeightsError, match=rf"missing 1: {key}$"):
            gtp_vit.weights.load_weights(model, less)
        with pytest.raises(RuntimeError, match=f'Missing key.*"{key}"'):
            model.load_state_dict(less)
    more = dict(state) | {"blocks.0.attn.qkv.bias": torch.empty(3 * model.embed_dim, device="meta")}
    with pytest.raises(WeightsError, match=r"unexpected 1: blocks\.0\.attn\.qkv\.bias$"):
        gtp_vit.weights.load_weights(model, more)


class Rude:
    """Pickles to a call that fails the test when it runs."""

    def __reduce__(self):
        return (pytest.fail, ("code in a checkpoint ran",))


WRONG = {
    "a plain Vision Transformer": (
        lambda: timm.create_model("vit_tiny_patch16_224", **SMALL).state_dict(),
        r"does not fit LVViT: missing 20: patch_embed\.conv1\.weight, .* and 14 more; unexpected 3: blocks\.0\.attn\.",
    ),
    "more blocks": (lambda: build(depth=4).state_dict(), r"unexpected 11: blocks\.3\.norm1\.weight"),
    "fewer blocks": (lambda: build(depth=2).state_dict(), r"missing 11: blocks\.2\.norm1\.weight"),
    "other classes": (
        lambda: build(num_classes=7).state_dict(),
        r"other shapes: 4: head\.weight \[7, 48\] instead of \[10, 48\]",
    ),
    "other width": (lambda: build(embed_dim=96).state_dict(), r"other shapes: .*cls_token \[1, 1, 96\]"),
    "no auxiliary head": (
        lambda: {name: value for name, value in build().state_dict().items() if "aux" not in name},
        r"missing 2: aux_head\.weight, aux_head\.bias$",
    ),
    "nothing": (dict, "holds no state dict"),
    "code": (lambda: {"state_dict": Rude()}, "not a PyTorch checkpoint that loads without running code in it"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_checkpoints_change_nothing(tmp_path, case):
    make, message = WRONG[case]
    path = saved(tmp_path, make())
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(WeightsError, match=message) as raised:
        load_checkpoint(model, path)
    assert str(path) in str(raised.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_load_checkpoint_refuses(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file: .*nowhere\.pth"):
        load_checkpoint(build(), tmp_path / "nowhere.pth")
    path = saved(tmp_path, build().state_dict())
    with pytest.raises(TypeError, match="model must be an LVViT; got Linear"):
        load_checkpoint(nn.Linear(2, 2), path)


# Under GTP


CHANGES = [
    {},
    dict(semantics="paper"),
    dict(semantics="paper", sparsity=0.3),
    dict(token_scale=False),
    dict(propagation="Mean"),
    dict(propagation="None"),
    dict(graph_type="Spatial"),
    dict(num_prop=(3, 0, 2)),
    dict(num_prop=5),
    dict(num_prop=0, semantics="paper"),
    dict(selection="CLSAttnMax"),
    dict(selection="IMGAttnMean", semantics="paper"),
]


@pytest.mark.parametrize("options", CHANGES, ids=str)
def test_patched_against_the_definition(backend, options):
    model = build()
    options = OPTIONS | options
    x, config = images(model), GTPConfig(**options)
    with torch.no_grad():
        unpatched = model(x)
        expected = published(model.state_dict(), x, 3, config=config)
        result = gtp_vit.patch(model, **options)(x)
    assert_same(result, expected)
    assert (result - unpatched).abs().max() > 1e-3


@pytest.mark.parametrize("changes", [dict(img_size=(48, 80)), dict(skip_lam=3.0)], ids=str)
def test_other_models_patched(backend, changes):
    model = build(**changes)
    x = images(model)
    with torch.no_grad():
        expected = published(
            model.state_dict(), x, 3, changes.get("skip_lam", 2.0), GTPConfig(**OPTIONS, semantics="paper")
        )
        assert_same(gtp_vit.patch(model, **OPTIONS, semantics="paper")(x), expected)


def test_float32_agrees_with_the_reference_backend(backend):
    model = gtp_vit.patch(build(torch.float32), **OPTIONS)
    x = images(model)
    with torch.no_grad():
        result = model(x)
        with gtp_kernels.use_backend("reference"), gtp_kernels.backends.record():
            expected = model(x)
    assert_same(result, expected, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lvvit_s", dict(num_prop=8)),
        ("lvvit_s", dict(num_prop=12, semantics="paper")),
        ("lvvit_m", dict(num_prop=8)),
        ("lvvit_m", dict(num_prop=9, semantics="paper")),
    ],
)
def test_full_size_against_the_definition(cpu_backend, name, options):
    model = randomised(MODELS[name], seed=4).double().eval()
    # Weights of this size would make maps of nothing but zeros and ones.
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(0.1)
    x = images(model, batch=1)
    with torch.no_grad():
        expected = published(model.state_dict(), x, model.blocks[0].attn.num_heads, config=GTPConfig(**options))
        features = gtp_vit.patch(model, **options).forward_features(x)
        result = model.forward_head(features)
    assert features.shape[1] == 197 - options["num_prop"] * len(model.blocks)
    assert_same(result, expected)


def test_the_official_model_keeps_its_whole_map():
    model = build()
    x = images(model)
    results = {}
    for semantics in ("official", "paper"):
        for sparsity in (0.3, 1.0):
            gtp_vit.patch(model, **OPTIONS | dict(sparsity=sparsity, semantics=semantics))
            assert model.gtp.sparsity == (1.0 if semantics == "official" else sparsity)
            assert model.gtp.semantics == semantics
            with torch.no_grad():
                results[semantics, sparsity] = model(x)
            gtp_vit.unpatch(model)
    assert torch.equal(results["official", 0.3], results["official", 1.0])
    assert (results["paper", 0.3] - results["paper", 1.0]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        dict(num_prop=0, sparsity=1.0, semantics="paper"),
        dict(num_prop=0, sparsity=0.6),
        dict(num_prop=2, selection="None"),
    ],
)
def test_nothing_propagated_is_the_unpatched_model(options):
    model = build(torch.float32)
    x = images(model)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(gtp_vit.patch(model, **options)(x), expected)


def test_the_heads_see_the_tokens_that_remain():
    model = gtp_vit.patch(build(), **OPTIONS)
    x = images(model)
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape == (2, 17 - 6, 48)
        expected = model.head(features[:, 0]) + 0.5 * model.aux_head(features[:, 1:]).max(1).values
        assert_same(model(x), expected, 1e-12)


def everything(model):
    """Classes, attributes, parameters and all buffers of a model."""
    values = dict(model.named_parameters()) | dict(model.named_buffers())
    return (
        [(name, type(module)) for name, module in model.named_modules()],
        [sorted(vars(module)) for module in model.modules()],
        {name: value.detach().clone() for name, value in values.items()},
    )


def test_unpatch_is_bit_for_bit():
    model = build(torch.float32)
    x = images(model)
    with torch.no_grad():
        before, expected = everything(model), model(x)
        keys = list(model.state_dict())
        gtp_vit.patch(model, **OPTIONS)
        assert list(model.state_dict()) == keys
        assert (model(x) - expected).abs().max() > 1e-3
        assert type(gtp_vit.unpatch(model)) is LVViT
        after = everything(model)
        assert after[:2] == before[:2]
        assert after[2].keys() == before[2].keys()
        assert all(torch.equal(value, before[2][name]) for name, value in after[2].items())
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("how", ["deepcopy", "torch.save", "pickle protocol 2"])
@pytest.mark.parametrize("patched", [False, True])
def test_copies_and_pickles(how, patched):
    model = build()
    if patched:
        gtp_vit.patch(model, **OPTIONS)
    x = images(model)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "torch.save":
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    else:
        other = pickle.loads(pickle.dumps(model, protocol=2))
    assert type(other) is type(model)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(other(x), expected)
        if patched:
            assert torch.equal(gtp_vit.patch(gtp_vit.unpatch(other), **OPTIONS)(x), expected)


def test_load_state_dict_before_and_after():
    source, x = build(), images(build())
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.mul_(1.1)
        expected = gtp_vit.patch(copy.deepcopy(source), **OPTIONS)(x)
        model = gtp_vit.patch(build(), **OPTIONS)
        assert not torch.equal(model(x), expected)
        model.load_state_dict(source.state_dict())
        assert torch.equal(model(x), expected)


def test_patched_twice():
    model = gtp_vit.patch(build(), **OPTIONS)
    config = model.gtp
    with pytest.raises(ValueError, match=r"patched already .*gtp_vit.unpatch\(model\) first"):
        gtp_vit.patch(model, num_prop=1)
    assert model.gtp is config


def test_trace():
    model = gtp_vit.patch(build(), **OPTIONS)
    x = images(model)
    with torch.no_grad(), gtp_vit.trace(model) as trace:
        features = model.forward_features(x)
    assert trace.grid_size == (4, 4)
    assert trace.num_prefix == 1
    assert [layer.index_prop.shape[1] for layer in trace.layers] == [2, 2, 2]
    assert trace.lineage().shape == (2, features.shape[1] - 1, 16)
    left = torch.cat([layer.prop_tokens for layer in trace.layers] + [trace.layers[-1].kept_tokens], 1)
    assert torch.equal(left.sort(1).values, torch.arange(16).expand(2, -1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(backend, dtype):
    model = build(torch.float32)
    x = images(model)
    with torch.no_grad():
        expected = gtp_vit.patch(model, **OPTIONS)(x)
        with torch.autocast(x.device.type, torch.bfloat16):
            mixed = model(x)
        result = model.to(dtype)(x.to(dtype))
    assert result.dtype == dtype
    for each in (result, mixed):
        assert F.cosine_similarity(each.float(), expected).min() > 0.98


def test_compile_full_graph(cpu_backend):
    model = gtp_vit.patch(build(torch.float32, depth=2), **OPTIONS)
    x = images(model)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(x)
        assert_same(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected, 1e-4)


@pytest.mark.parametrize(("name", "largest"), [("lvvit_s", 12), ("lvvit_m", 9)])
def test_the_largest_number_of_propagated_tokens(name, largest):
    with torch.device("meta"):
        model = MODELS[name]()
    with pytest.raises(ValueError, match=rf"num_prop = {largest + 1} does not fit block .* is {largest}$"):
        gtp_vit.patch(model, num_prop=largest + 1)
    gtp_vit.patch(model, num_prop=largest)


# Training


def test_gradients(backend):
    model = build()
    x, config = images(model), GTPConfig(**OPTIONS, semantics="paper")
    target = torch.randn(2, 10, dtype=torch.float64)
    state = model.state_dict(keep_vars=True)
    (published(state, x, 3, config=config) * target).sum().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    (gtp_vit.patch(model, **OPTIONS, semantics="paper")(x) * target).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
        assert_same(parameter.grad, expected[name])


@pytest.mark.parametrize("patched", [False, True])
def test_training_mode(patched):
    model, dense = build(), build(return_dense=True)
    x = images(model)
    if patched:
        for each in (model, dense):
            gtp_vit.patch(each, **OPTIONS)
    with torch.no_grad():
        assert torch.equal(model(x), dense(x))
    logits = model.train()(x)
    classes, tokens = dense.train()(x)
    assert classes.shape == (2, 10)
    assert tokens.shape == (2, 10 if patched else 16, 10)
    assert_same(classes + 0.5 * tokens.max(1).values, logits, 1e-12)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# GMACs (paper, Table 1)

TABLE = {
    "lvvit_s": (6.6, 6.4, 6.1, 5.9, 5.7, 5.4, 5.2, 5.0, 4.8, 4.6, 4.4, 4.1, 3.9),
    "lvvit_m": (12.7, 12.1, 11.5, 10.9, 10.3, 9.7, 9.1, 8.5, 8.0, 7.4),
}


@pytest.mark.parametrize("name", TABLE)
def test_gmacs_are_those_of_the_paper(name):
    with torch.device("meta"):
        model = MODELS[name]()
    for num_prop, expected in enumerate(TABLE[name]):
        gtp_vit.patch(model, num_prop=num_prop)
        assert abs(gtp_vit.gmacs(model, 224) - expected) < 0.15, f"P = {num_prop}"
        gtp_vit.unpatch(model)
        if num_prop == 0:
            assert abs(gtp_vit.gmacs(model, 224) - expected) < 0.15, "unpatched"


def test_gmacs_by_hand():
    """Stem, blocks, and both heads on the tokens that reach them."""
    model = gtp_vit.patch(build(torch.float32), num_prop=2, graph_type="None", propagation="None")
    stem = 32 * 32 * 64 * (3 * 49 + 2 * 64 * 9) + 4 * 4 * 48 * 64 * 64
    rows, blocks = 17, 0
    for _ in range(3):
        blocks += rows * 4 * 48 * 48 + 2 * rows * rows * 48
        rows -= 2
        blocks += rows * 2 * 3 * 48 * 48
    heads = rows * 48 * 10
    assert gtp_vit.gmacs(model, 64) * 1e9 == stem + blocks + heads
