"""gtp_vit.patch on models of transformers: against a plain PyTorch forward, and the promises around it."""

import copy
import io
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

import gtp_kernels
import gtp_vit
from gtp_kernels import reference
from gtp_vit import GTPConfig

transformers = pytest.importorskip("transformers", minversion="5.0", reason="transformers is not installed")

SMALL = dict(
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=3,
    intermediate_size=80,
    image_size=64,
    patch_size=16,
    num_labels=10,
)
DINO = dict({key: value for key, value in SMALL.items() if key != "intermediate_size"}, mlp_ratio=2)
TEXT = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, vocab_size=60)
OPTIONS = dict(num_prop=2, sparsity=0.6, num_neighbours=3)


def clip_config(**vision):
    text = dict(TEXT, max_position_embeddings=12, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    return transformers.CLIPConfig(
        text_config=text, vision_config=dict(SMALL, projection_dim=24, **vision), projection_dim=24, num_labels=10
    )


def siglip_config(**vision):
    text = dict(TEXT, max_position_embeddings=12, bos_token_id=0, eos_token_id=1, pad_token_id=2, projection_size=48)
    return transformers.SiglipConfig(text_config=text, vision_config=dict(SMALL, **vision), num_labels=10)


def first(tokens):
    return tokens[:, 0]


# How each is built, where its tower is, its prefix tokens, and what the model makes of the tower's tokens.
MODELS = {
    "vit": (lambda **o: transformers.ViTModel(transformers.ViTConfig(**SMALL | o)), "", 1),
    "vit classifier": (
        lambda **o: transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL | o)),
        "vit",
        1,
    ),
    "deit": (lambda **o: transformers.DeiTModel(transformers.DeiTConfig(**SMALL | o)), "", 2),
    "deit classifier": (
        lambda **o: transformers.DeiTForImageClassification(transformers.DeiTConfig(**SMALL | o)),
        "deit",
        2,
    ),
    "deit teacher": (
        lambda **o: transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**SMALL | o)),
        "deit",
        2,
    ),
    "dinov2": (lambda **o: transformers.Dinov2Model(transformers.Dinov2Config(**DINO | o)), "", 1),
    "dinov2 swiglu classifier": (
        lambda **o: transformers.Dinov2ForImageClassification(
            transformers.Dinov2Config(**DINO | dict(use_swiglu_ffn=True) | o)
        ),
        "dinov2",
        1,
    ),
    "registers": (
        lambda **o: transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**DINO | o)),
        "",
        5,
    ),
    "registers classifier": (
        lambda **o: transformers.Dinov2WithRegistersForImageClassification(
            transformers.Dinov2WithRegistersConfig(**DINO | o)
        ),
        "dinov2_with_registers",
        5,
    ),
    "clip": (lambda **o: transformers.CLIPVisionModel(clip_config(**o).vision_config), "", 1),
    "clip projection": (
        lambda **o: transformers.CLIPVisionModelWithProjection(clip_config(**o).vision_config),
        "vision_model",
        1,
    ),
    "clip classifier": (lambda **o: transformers.CLIPForImageClassification(clip_config(**o)), "vision_model", 1),
    "siglip": (lambda **o: transformers.SiglipVisionModel(siglip_config(**o).vision_config), "", 0),
    "siglip classifier": (
        lambda **o: transformers.SiglipForImageClassification(siglip_config(**o)),
        "vision_model",
        0,
    ),
}
TOWERS = ("vit", "deit", "dinov2", "registers", "clip", "siglip")


def result_of(key, model, tokens):
    """What the model makes of its tower's last hidden state: by its head, or the pooled output of a bare tower."""
    if key == "vit" or key == "deit":
        return model.pooler(tokens)
    if key == "clip":
        return model.post_layernorm(first(tokens))
    if key == "siglip":
        return model.head(tokens)
    if key in ("dinov2", "registers"):
        return first(tokens)
    if key in ("vit classifier", "deit classifier"):
        return model.classifier(first(tokens))
    if key == "deit teacher":
        return (model.cls_classifier(tokens[:, 0]) + model.distillation_classifier(tokens[:, 1])) / 2
    if key in ("dinov2 swiglu classifier", "registers classifier"):
        return model.classifier(torch.cat((first(tokens), tokens[:, MODELS[key][2] :].mean(1)), 1))
    if key == "clip projection":
        return model.visual_projection(model.vision_model.post_layernorm(first(tokens)))
    if key == "clip classifier":
        return model.classifier(tokens[:, 1:].mean(1))
    assert key == "siglip classifier"
    return model.classifier(tokens.mean(1))


def given_result(output):
    """The same of a model's output."""
    for name in ("logits", "image_embeds", "pooler_output"):
        if output.get(name) is not None:
            return output[name]
    raise AssertionError(f"no result in {list(output)}")


def randomised(model, dtype=torch.float64):
    """Weights that let every part matter, the same on every device; in evaluation mode."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, device="cpu"))
    return model.to(torch.get_default_device(), dtype).eval()


def build(key="vit classifier", dtype=torch.float64, seed=0, **changes):
    torch.manual_seed(seed)
    with torch.device("cpu"):
        return randomised(MODELS[key][0](**changes), dtype)


def tower_of(key, model):
    return model.get_submodule(MODELS[key][1])


def images(model, batch=2, seed=1, size=(64, 64)):
    dtype = next(model.parameters()).dtype
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layers_of(tower):
    if hasattr(tower, "layers"):
        return tower.layers
    return tower.encoder.layer if hasattr(tower.encoder, "layer") else tower.encoder.layers


def plain_attention(attn, x, scales, config):
    """The attention of a layer with a thresholded map, and that map."""
    batch, num_tokens, _ = x.shape
    heads = attn.config.num_attention_heads
    q, k, v = (
        project(x).unflatten(-1, (heads, -1)).transpose(1, 2) for project in (attn.q_proj, attn.k_proj, attn.v_proj)
    )
    weights = reference.attention_map(
        q, k, scales, sparsity=config.sparsity, scale=q.shape[-1] ** -0.5, semantics=config.semantics
    )
    out = (weights.to(v.dtype) @ v).transpose(1, 2).reshape(batch, num_tokens, -1)
    return (attn.o_proj if hasattr(attn, "o_proj") else attn.out_proj)(out), weights


def plain_tokens(tower, prefix, pixel_values, config, depth=3, **embedding):
    """Last hidden state and hidden states of an unpatched ``tower`` under GTP, by its definition: nothing fused."""
    patch = tower.config.patch_size
    grid_size = (pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch)
    x = tower.embeddings(pixel_values, **embedding)
    if hasattr(tower, "pre_layrnorm"):
        x = tower.pre_layrnorm(x)
    graph = None
    if config.propagation == "GraphProp":
        graph = reference.build_graph(
            x, grid_size, config.graph_type, config.num_neighbours, prefix, config.semantics
        ).to_dense()
    scales = torch.ones(x.shape[:2], device=x.device) if config.token_scale else None
    hidden = [x]
    for layer, num_prop in zip(layers_of(tower), config.schedule(depth), strict=True):
        if hasattr(layer, "layernorm_before"):
            norm1, attn, norm2 = layer.layernorm_before, layer.attention, layer.layernorm_after
        elif hasattr(layer, "layer_norm1"):
            norm1, attn, norm2 = layer.layer_norm1, layer.self_attn, layer.layer_norm2
        else:
            norm1, attn, norm2 = layer.norm1, layer.attention, layer.norm2
        scale1, scale2 = getattr(layer, "layer_scale1", nn.Identity()), getattr(layer, "layer_scale2", nn.Identity())
        drop = getattr(layer, "dropout", getattr(layer, "drop_path", nn.Identity()))
        branch, weights = plain_attention(attn, norm1(x), scales, config)
        x = x + drop(scale1(branch))
        if num_prop:
            index_kept, index_prop = reference.select(
                weights.detach(), config.selection, num_prop, num_prefix=prefix, semantics=config.semantics
            )
            # In grid order, as importances that tie (at zero, below the threshold) are judged by the current order.
            index_kept = index_kept.sort(1).values
            x, graph, scales = reference.propagate(
                x, graph, index_kept, index_prop, config.propagation, config.alpha, scales, num_prefix=prefix
            )
        x = x + drop(scale2(layer.mlp(norm2(x))))
        hidden.append(x)
    for name in ("layernorm", "post_layernorm"):
        if hasattr(tower, name) and not hasattr(tower, "pre_layrnorm"):
            return getattr(tower, name)(x), hidden
    return x, hidden


# Token scales are float32 in a model of any type: their last bit moves float64 results by some 1e-7.
WITH_SCALES = 1e-6


def assert_same(result, expected, tolerance=WITH_SCALES):
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


def snapshot(model):
    """Classes, attributes, configuration and bits of a model."""
    return (
        [(name, type(module)) for name, module in model.named_modules()],
        [sorted(vars(module)) for module in model.modules()],
        model.config.to_dict() if hasattr(model, "config") else None,
        {name: value.clone() for name, value in model.state_dict().items()},
    )


def assert_unchanged(model, before):
    *structure, state = snapshot(model)
    assert structure == list(before[:3])
    assert list(state) == list(before[3])
    assert all(torch.equal(state[name], before[3][name]) for name in state)


# What a patched model computes


@pytest.mark.parametrize("key", MODELS)
def test_against_plain_forward(backend, key):
    model = build(key)
    tower, prefix = tower_of(key, model), MODELS[key][2]
    x, config = images(model), GTPConfig(**OPTIONS)
    with torch.no_grad():
        tokens, hidden = plain_tokens(tower, prefix, x, config)
        expected, unpatched = result_of(key, model, tokens), given_result(model(x))
        assert gtp_vit.patch(model, **OPTIONS) is model
        output = model(x, output_hidden_states=True)
        bare = tower(x)
    assert_same(given_result(output), expected)
    assert (given_result(output) - unpatched).abs().max() > 1e-3
    assert bare.last_hidden_state.shape == (2, prefix + 16 - 6, 48)
    assert_same(bare.last_hidden_state, tokens)
    assert bare.hidden_states is None
    assert [each.shape[1] - prefix for each in output.hidden_states] == [16, 14, 12, 10]
    for each, plain in zip(output.hidden_states, hidden, strict=True):
        assert_same(each, plain)


CHANGES = [
    dict(semantics="paper"),
    dict(token_scale=False),
    dict(propagation="Mean"),
    dict(propagation="None", graph_type="None"),
    dict(graph_type="Spatial"),
    dict(num_prop=(3, 0, 2)),
    dict(num_prop=0),
    dict(num_prop=(0, 4, 0), sparsity=1.0),
    dict(selection="DiagAttnMean"),
]


@pytest.mark.parametrize("options", CHANGES, ids=str)
@pytest.mark.parametrize("key", ["dinov2", "siglip"])
def test_options_against_plain_forward(backend, key, options):
    model = build(key)
    options = OPTIONS | options
    x, config = images(model), GTPConfig(**options)
    with torch.no_grad():
        expected, _ = plain_tokens(model, MODELS[key][2], x, config)
        result = gtp_vit.patch(model, **options)(x).last_hidden_state
    assert_same(result, expected, WITH_SCALES if config.token_scale else 1e-9)


def test_cosine_selection_uses_the_map_and_says_so(backend):
    model = build("clip")
    x, config = images(model), GTPConfig(**OPTIONS, selection="CosSimMax")
    with torch.no_grad():
        expected, _ = plain_tokens(model, 1, x, config)
        with pytest.warns(UserWarning, match="CosSimMax.*needs the N x N attention map"):
            gtp_vit.patch(model, **OPTIONS, selection="CosSimMax")
        assert_same(model(x).last_hidden_state, expected)


@pytest.mark.parametrize("key", ["vit", "clip", "siglip"])
def test_float32_agrees_with_the_definition(backend, key):
    model = build(key, dtype=torch.float32)
    gtp_vit.patch(model, **OPTIONS | dict(sparsity=1.0))
    x = images(model)
    with torch.no_grad():
        result = model(x).last_hidden_state
        with gtp_kernels.use_backend("reference"), gtp_kernels.backends.record():
            expected = model(x).last_hidden_state
    assert_same(result, expected, 1e-4)


@pytest.mark.parametrize("propagation", ["GraphProp", "LiveGraph"])
def test_the_same_as_the_patched_model_of_timm(backend, propagation):
    """One set of weights in both libraries; timm keeps q, k and v in one layer."""
    timm = pytest.importorskip("timm")
    options = OPTIONS | dict(propagation=propagation)
    model = build("vit classifier")
    other = timm.models.vision_transformer.VisionTransformer(
        img_size=64, patch_size=16, embed_dim=48, depth=3, num_heads=3, mlp_ratio=80 / 48, num_classes=10
    )
    tower = model.vit
    weights = {
        "cls_token": tower.embeddings.cls_token,
        "pos_embed": tower.embeddings.position_embeddings,
        **{f"patch_embed.proj.{name}": value for name, value in parts(tower.embeddings.patch_embeddings.projection)},
        **{f"norm.{name}": value for name, value in parts(tower.layernorm)},
        **{f"head.{name}": value for name, value in parts(model.classifier)},
    }
    for index, layer in enumerate(tower.layers):
        attn = layer.attention
        for name in ("weight", "bias"):
            projections = [getattr(project, name) for project in (attn.q_proj, attn.k_proj, attn.v_proj)]
            weights[f"blocks.{index}.attn.qkv.{name}"] = torch.cat(projections)
        for part, module in {
            "attn.proj": attn.o_proj,
            "norm1": layer.layernorm_before,
            "norm2": layer.layernorm_after,
            "mlp.fc1": layer.mlp.fc1,
            "mlp.fc2": layer.mlp.fc2,
        }.items():
            weights |= {f"blocks.{index}.{part}.{name}": value for name, value in parts(module)}
    other.load_state_dict(weights)
    other = other.to(torch.get_default_device(), torch.float64).eval()
    for norm in (module for module in other.modules() if isinstance(module, nn.LayerNorm)):
        norm.eps = model.config.layer_norm_eps
    x = images(model)
    with torch.no_grad():
        assert_same(other(x), model(x).logits, 1e-10)
        expected = gtp_vit.patch(other, **options)(x)
        assert gtp_vit.gmacs(model, x) == gtp_vit.gmacs(gtp_vit.unpatch(other), x)
        assert gtp_vit.gmacs(gtp_vit.patch(model, **options), x) == gtp_vit.gmacs(gtp_vit.patch(other, **options), x)
        assert_same(model(x).logits, expected, 1e-10)
        assert_same(model.vit(x).last_hidden_state, other.forward_features(x), 1e-10)


def parts(module):
    return module.named_parameters()


@pytest.mark.parametrize("size", [(64, 64), (48, 96), (80, 64)])
@pytest.mark.parametrize("key", TOWERS)
def test_sizes_that_interpolate_the_positions(backend, key, size):
    model = build(key)
    x, config = images(model, size=size), GTPConfig(**OPTIONS)
    # DINOv2 does so by itself.
    option = {} if key in ("dinov2", "registers") else dict(interpolate_pos_encoding=True)
    with torch.no_grad():
        expected, _ = plain_tokens(model, MODELS[key][2], x, config, **option)
        assert_same(gtp_vit.patch(model, **OPTIONS)(x, **option).last_hidden_state, expected)


def test_a_model_that_is_not_square(backend):
    model = build("vit", image_size=[48, 80])
    x, config = images(model, size=(48, 80)), GTPConfig(**OPTIONS)
    with torch.no_grad():
        expected, _ = plain_tokens(model, 1, x, config)
        assert_same(gtp_vit.patch(model, **OPTIONS)(x).last_hidden_state, expected)


@pytest.mark.parametrize("key", ["vit", "dinov2", "registers"])
def test_masked_patches(backend, key):
    torch.manual_seed(0)
    model = {
        "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**SMALL), use_mask_token=True),
        "dinov2": MODELS["dinov2"][0],
        "registers": MODELS["registers"][0],
    }[key]()
    randomised(model)
    x, config = images(model), GTPConfig(**OPTIONS)
    masked = torch.zeros(2, 16, dtype=torch.bool, device=x.device)
    masked[:, ::3] = True
    with torch.no_grad():
        expected, _ = plain_tokens(model, MODELS[key][2], x, config, bool_masked_pos=masked)
        gtp_vit.patch(model, **OPTIONS)
        assert_same(model(x, bool_masked_pos=masked).last_hidden_state, expected)
        assert (model(x).last_hidden_state - expected).abs().max() > 1e-3


def test_siglip_without_its_head(backend):
    model = build("siglip", vision_use_head=False)
    x, config = images(model), GTPConfig(**OPTIONS)
    with torch.no_grad():
        expected, _ = plain_tokens(model, 0, x, config)
        output = gtp_vit.patch(model, **OPTIONS)(x)
    assert output.pooler_output is None
    assert_same(output.last_hidden_state, expected)


def test_empty_batch(backend):
    model = gtp_vit.patch(build("dinov2"), **OPTIONS)
    with torch.no_grad():
        assert model(images(model, batch=0)).last_hidden_state.shape == (0, 11, 48)


# Nothing changes where nothing is asked for


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("key", MODELS)
def test_nothing_propagated_is_the_unpatched_model(key, attention):
    model = build(key, dtype=torch.float32)
    model.set_attn_implementation(attention)
    x = images(model)
    with torch.no_grad():
        expected = model(x, output_hidden_states=True)
        for options in (dict(num_prop=0, sparsity=1.0), dict(num_prop=2, sparsity=1.0, selection="None")):
            output = gtp_vit.patch(model, **options)(x, output_hidden_states=True)
            gtp_vit.unpatch(model)
            assert list(output) == list(expected)
            for name, value in expected.items():
                pairs = zip(output[name], value, strict=True) if isinstance(value, tuple) else [(output[name], value)]
                assert all(torch.equal(*pair) for pair in pairs), name


@pytest.mark.parametrize("key", MODELS)
def test_unpatch_is_bit_for_bit(key):
    model = build(key, dtype=torch.float32)
    x = images(model)
    with torch.no_grad():
        expected = model(x, output_hidden_states=True)
        before = snapshot(model)
        gtp_vit.patch(model, **OPTIONS)
        assert list(model.state_dict()) == list(before[3])
        model(x)
        assert gtp_vit.unpatch(model) is model
        assert_unchanged(model, before)
        output = model(x, output_hidden_states=True)
    assert torch.equal(given_result(output), given_result(expected))
    assert all(map(torch.equal, output.hidden_states, expected.hidden_states))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_unchanged_layers_go_through_the_attention_interface(attention, monkeypatch):
    from transformers.models.siglip import modeling_siglip

    model = build("siglip", dtype=torch.float32)
    model.set_attn_implementation(attention)
    gtp_vit.patch(model, num_prop=(0, 0, 2), sparsity=1.0, num_neighbours=3)
    asked = []
    original = modeling_siglip.ALL_ATTENTION_FUNCTIONS.get_interface

    def get_interface(name, default):
        asked.append(name)
        return original(name, default)

    monkeypatch.setattr(modeling_siglip.ALL_ATTENTION_FUNCTIONS, "get_interface", get_interface)
    with torch.no_grad():
        model(images(model))
    assert asked == [attention] * 2


def test_a_forward_leaves_nothing_on_the_modules(backend):
    model = gtp_vit.patch(build("clip projection"), **OPTIONS)
    before = snapshot(model)
    with gtp_vit.trace(model):
        model(images(model), output_hidden_states=True).image_embeds.sum().backward()
    assert_unchanged(model, before)


# Outputs


def test_hidden_states_by_number():
    model = gtp_vit.patch(build("clip"), **OPTIONS)
    x = images(model)
    with torch.no_grad():
        every = model(x, output_hidden_states=True).hidden_states
        for chosen, kept in ((-2, {2}), (1, {1}), ([-1, 0], {0, 3}), ([9, 2], {2}), ([9], set())):
            some = model(x, output_hidden_states=chosen).hidden_states
            assert [index for index, each in enumerate(some) if each is not None] == sorted(kept)
            assert all(each is None or torch.equal(each, full) for each, full in zip(some, every, strict=True))
        for none in (False, None):
            assert model(x, output_hidden_states=none).hidden_states is None
        model.config.output_hidden_states = True
        assert len(model(x).hidden_states) == 4


@pytest.mark.parametrize("key", ["vit", "dinov2", "clip", "siglip"])
def test_tuples(key):
    model = gtp_vit.patch(build(key), **OPTIONS)
    x = images(model)
    with torch.no_grad():
        expected, given = model(x), model(x, return_dict=False)
        assert type(given) is tuple
        assert torch.equal(given[0], expected.last_hidden_state)
        assert torch.equal(given[1], expected.pooler_output)
        model.config.return_dict = False
        assert type(model(x)) is tuple


def test_a_model_around_the_tower_that_collects_hidden_states():
    """Hooks that collect for an outer model, put on the layers before, see nothing of a patched tower."""
    from transformers.utils.output_capturing import _active_collector

    model = build("clip")
    x = images(model)
    with torch.no_grad():
        model(x, output_hidden_states=True)
        gtp_vit.patch(model, **OPTIONS)
        outer = {"hidden_states": []}
        token = _active_collector.set(outer)
        try:
            model(x)
        finally:
            _active_collector.reset(token)
    assert outer == {"hidden_states": []}


@pytest.mark.parametrize("key", ["clip", "siglip"])
def test_towers_beside_a_text_model(backend, key):
    torch.manual_seed(0)
    with torch.device("cpu"):
        model = transformers.CLIPModel(clip_config()) if key == "clip" else transformers.SiglipModel(siglip_config())
    randomised(model)
    x = images(model)
    text = torch.tensor([[5, 6, 7, 1], [8, 9, 1, 2]], device=x.device)
    with torch.no_grad():
        unpatched = model(input_ids=text, pixel_values=x)
        tokens, _ = plain_tokens(model.vision_model, int(key == "clip"), x, GTPConfig(**OPTIONS))
        embeds = result_of("clip projection", model, tokens) if key == "clip" else model.vision_model.head(tokens)
        gtp_vit.patch(model, **OPTIONS)
        output = model(input_ids=text, pixel_values=x)
        features = model.get_image_features(x).pooler_output
        gtp_vit.unpatch(model)
        again = model(input_ids=text, pixel_values=x)
    assert_same(output.image_embeds, embeds / embeds.norm(dim=-1, keepdim=True))
    assert_same(features, embeds)
    assert torch.equal(output.text_embeds, unpatched.text_embeds)
    assert torch.equal(again.logits_per_image, unpatched.logits_per_image)


# The full grid in the outputs


@pytest.mark.parametrize("key", MODELS)
def test_restored_outputs(backend, key):
    """Every hidden state has the full grid, as gtp_vit.restore_grid gives it; pooled outputs are those without it."""
    model = build(key)
    tower, prefix = tower_of(key, model), MODELS[key][2]
    x = images(model)
    with torch.no_grad():
        with gtp_vit.trace(gtp_vit.patch(model, **OPTIONS)) as trace:
            reduced = tower(x, output_hidden_states=True)
        gtp_vit.unpatch(model)
        gtp_vit.patch(model, **OPTIONS, restore=True)
        full = tower(x, output_hidden_states=True)
        with gtp_vit.trace(model):
            traced = tower(x, output_hidden_states=[2])
        result = model(x)
    assert full.pooler_output is reduced.pooler_output is None or torch.equal(full.pooler_output, reduced.pooler_output)
    pairs = [(full.last_hidden_state, reduced.last_hidden_state, None)]
    pairs += [(full.hidden_states[i + 1], reduced.hidden_states[i + 1], i) for i in range(3)]
    for grid, left, after in pairs:
        assert grid.shape == (2, prefix + 16, 48)
        assert torch.equal(grid[:, :prefix], left[:, :prefix])
        assert torch.equal(grid[:, prefix:].unflatten(1, (4, 4)), gtp_vit.restore_grid(left, trace, after))
        kept = trace.layers[-1 if after is None else after].kept_tokens
        assert torch.equal(grid[:, prefix:].gather(1, kept.unsqueeze(-1).expand(-1, -1, 48)), left[:, prefix:])
    assert torch.equal(full.hidden_states[0], reduced.hidden_states[0])
    assert torch.equal(traced.hidden_states[2], full.hidden_states[2])
    if "logits" in result:
        assert_same(result.logits, result_of(key, model, full.last_hidden_state), 1e-12)


@pytest.mark.parametrize("key", ["vit", "dinov2", "clip", "siglip"])
def test_restored_outputs_of_which_no_token_left(key):
    model = build(key, dtype=torch.float32)
    x = images(model)
    with torch.no_grad():
        expected = model(x, output_hidden_states=True)
        output = gtp_vit.patch(model, num_prop=0, sparsity=1.0, restore=True)(x, output_hidden_states=True)
    assert torch.equal(output.last_hidden_state, expected.last_hidden_state)
    assert all(map(torch.equal, output.hidden_states, expected.hidden_states))


def test_a_head_that_needs_the_grid(backend):
    torch.manual_seed(0)
    with torch.device("cpu"):
        model = transformers.ViTForMaskedImageModeling(transformers.ViTConfig(**SMALL, encoder_stride=16))
    randomised(model)
    x = images(model)
    with torch.no_grad():
        expected = model(x).reconstruction
        output = gtp_vit.patch(model, **OPTIONS, restore=True)(x).reconstruction
        assert output.shape == expected.shape == x.shape
        assert (output - expected).abs().max() > 1e-3
        gtp_vit.unpatch(model)
        assert torch.equal(model(x).reconstruction, expected)


IMAGE_TOKEN = 50


def llava(vision="clip", **options):
    """A LLaVA of small random models, and its inputs: two prompts with an image each."""
    torch.manual_seed(0)
    text = transformers.LlamaConfig(**TEXT, num_key_value_heads=2, pad_token_id=0)
    config = dict(clip=clip_config, siglip=siglip_config)[vision]().vision_config
    strategy = "default" if vision == "clip" else "full"
    with torch.device("cpu"):
        model = transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(
                vision_config=config,
                text_config=text,
                image_token_id=IMAGE_TOKEN,
                vision_feature_select_strategy=strategy,
                **options,
            )
        )
    randomised(model, torch.float32)
    x = images(model)
    prompt = torch.tensor([[3, *[IMAGE_TOKEN] * 16, 7, 8], [4, *[IMAGE_TOKEN] * 16, 9, 5]], device=x.device)
    return model, dict(input_ids=prompt, pixel_values=x)


@pytest.mark.parametrize("layers", [-2, [-2, 1]], ids=str)
@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_a_tower_inside_llava(backend, vision, layers):
    model, inputs = llava(vision, vision_feature_layer=layers)
    tower = model.model.vision_tower
    with torch.no_grad():
        expected = model(**inputs)
        gtp_vit.patch(tower, num_prop=0, sparsity=1.0, restore=True)
        assert torch.equal(model(**inputs).logits, expected.logits)
        gtp_vit.unpatch(tower)
        gtp_vit.patch(tower, **OPTIONS, restore=True)
        output = model(**inputs)
        features = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
        chosen = [features[layer][:, int(vision == "clip") :] for layer in ([layers] if layers == -2 else layers)]
        projected = model.model.multi_modal_projector(torch.cat(chosen, -1))
    assert output.logits.shape == expected.logits.shape
    assert torch.equal(output.image_hidden_states, projected.flatten(0, 1).view_as(output.image_hidden_states))
    assert (output.logits - expected.logits).abs().max() > 1e-3
    # Both models at once, by the model around the tower.
    gtp_vit.unpatch(model)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected.logits)
        assert torch.equal(gtp_vit.patch(model, **OPTIONS, restore=True)(**inputs).logits, output.logits)
        with gtp_vit.trace(model) as trace:
            model(**inputs)
    assert len(trace.layers) == 3


def test_a_tower_inside_llava_that_gives_fewer_tokens():
    model, inputs = llava()
    with pytest.raises(ValueError, match=r"restore must be True for a LlavaForConditionalGeneration.*vision_tower"):
        gtp_vit.patch(model, **OPTIONS)
    gtp_vit.patch(model.model.vision_tower, **OPTIONS)
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        model(**inputs)


@pytest.mark.parametrize("key", ["dinov2", "siglip"])
def test_a_merger_of_2_by_2_patches(key):
    model = gtp_vit.patch(build(key), **OPTIONS, restore=True)
    prefix = MODELS[key][2]
    with torch.no_grad():
        tokens = model(images(model)).last_hidden_state[:, prefix:]
    merged = nn.functional.pixel_unshuffle(tokens.transpose(1, 2).unflatten(2, (4, 4)), 2)
    assert merged.shape == (2, 4 * 48, 2, 2)
    assert merged.isfinite().all()


# Living with a patched model


@pytest.mark.parametrize("key", ["vit classifier", "registers"])
@pytest.mark.parametrize("how", ["deepcopy", "torch.save", "pickle protocol 2"])
def test_copies_and_pickles(backend, how, key):
    model = gtp_vit.patch(build(key), **OPTIONS)
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
    assert other is not model
    assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
    assert other.gtp == model.gtp
    with torch.no_grad():
        expected = given_result(model(x))
        assert torch.equal(given_result(other(x)), expected)
        gtp_vit.unpatch(other)
        assert torch.equal(given_result(model(x)), expected)
        assert torch.equal(given_result(gtp_vit.patch(other, **OPTIONS)(x)), expected)


@pytest.mark.parametrize("key", ["vit", "vit classifier", "dinov2", "clip projection", "llava"])
def test_checkpoints_are_those_of_the_unpatched_model(tmp_path, key):
    model, inputs = llava() if key == "llava" else (build(key, dtype=torch.float32), None)
    inputs = inputs or dict(pixel_values=images(model))
    options = OPTIONS | dict(restore=key == "llava")
    model.save_pretrained(tmp_path / "unpatched")
    gtp_vit.patch(model, **options).save_pretrained(tmp_path / "patched")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "unpatched" / name).read_bytes() == (tmp_path / "patched" / name).read_bytes()
    loaded = getattr(transformers, type(model).__name__).from_pretrained(tmp_path / "patched").eval()
    with torch.no_grad():
        expected = given_result(model(**inputs))
        assert torch.equal(given_result(gtp_vit.patch(loaded, **options)(**inputs)), expected)


def test_load_state_dict_before_and_after():
    source, x = build(seed=3), images(build())
    with torch.no_grad():
        expected = gtp_vit.patch(copy.deepcopy(source), **OPTIONS)(x).logits
        model = gtp_vit.patch(build(), **OPTIONS)
        model.load_state_dict(source.state_dict())
        assert torch.equal(model(x).logits, expected)
        plain = build()
        plain.load_state_dict(model.state_dict())
        assert torch.equal(gtp_vit.patch(plain, **OPTIONS)(x).logits, expected)


@pytest.mark.parametrize("key", ["vit", "registers classifier", "siglip"])
def test_load_state_dict_names_wrong_keys(key):
    model, state = gtp_vit.patch(build(key), **OPTIONS), build(key).state_dict()
    right = next(name for name in state if name.endswith("q_proj.weight"))
    state["embeddings.gtp"] = state.pop(right)
    with pytest.raises(RuntimeError, match=rf'Missing key.*"{right}".*\n.*Unexpected.*"embeddings.gtp"'):
        model.load_state_dict(state)
    wider = build(key, **({"mlp_ratio": 3} if key == "registers classifier" else {"intermediate_size": 96}))
    with pytest.raises(RuntimeError, match=r"size mismatch for .*mlp.fc1.weight"):
        model.load_state_dict(wider.state_dict())


def test_moved_after_patching(backend):
    """Nothing of a patched model stays behind when it moves."""
    model = build("registers classifier", dtype=torch.float32)
    x = images(model)
    with torch.no_grad():
        expected = gtp_vit.patch(model, **OPTIONS)(x).logits
        assert model.half().to(torch.float64)(x.double()).logits.dtype == torch.float64
        model = model.float()
        model.load_state_dict(build("registers classifier", dtype=torch.float32).state_dict())
        assert torch.equal(model(x).logits, expected)
        logits = model.to("meta")(x.to("meta")).logits
    assert logits.shape == expected.shape
    assert logits.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("key", ["vit", "dinov2", "clip", "siglip"])
def test_low_precision_weights(backend, key, dtype):
    model = build(key, dtype=torch.float32)
    x, options = images(model), OPTIONS | dict(sparsity=1.0)
    with torch.no_grad():
        expected = gtp_vit.patch(model, **options)(x).pooler_output
        # ViT, DINOv2, CLIP and SigLIP all cast their input.
        result = (model.half() if dtype == torch.float16 else model.to(dtype))(x).pooler_output
    assert result.dtype == dtype
    assert nn.functional.cosine_similarity(result.float(), expected).min() > 0.98


@pytest.mark.parametrize("key", ["vit", "dinov2", "clip"])
def test_autocast(backend, key):
    model = build(key, dtype=torch.float32)
    x, options = images(model), OPTIONS | dict(sparsity=1.0)
    with torch.no_grad():
        with torch.autocast(x.device.type, torch.bfloat16):
            unpatched = model(x)
        expected = gtp_vit.patch(model, **options)(x).pooler_output
        with torch.autocast(x.device.type, torch.bfloat16):
            output = model(x)
    assert output.last_hidden_state.dtype == unpatched.last_hidden_state.dtype
    assert nn.functional.cosine_similarity(output.pooler_output.float(), expected.float()).min() > 0.98


def test_hooks_fire():
    model = build("dinov2")
    seen = []
    names = ("", "encoder", "encoder.layer.0", "encoder.layer.1.attention", "encoder.layer.1.attention.q_proj",
             "encoder.layer.1.layer_scale1", "encoder.layer.1.norm2", "encoder.layer.1.mlp")  # fmt: skip
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    with torch.no_grad():
        gtp_vit.patch(model, **OPTIONS)(images(model))
    assert seen == [names[2], names[4], names[3], *names[5:], "encoder", ""]


def test_hooks_that_change_a_weight_are_honoured(backend):
    from torch.nn.utils import prune

    model = build("dinov2")
    for index, (part, name) in enumerate(
        (("norm2", "weight"), ("layer_scale1", "lambda1"), ("attention.q_proj", "weight"))
    ):
        module = model.encoder.layer[index].get_submodule(part)
        prune.random_unstructured(module, name, 0.5)
        with torch.no_grad():
            getattr(module, f"{name}_orig").mul_(2)
    x, config = images(model), GTPConfig(**OPTIONS)
    with torch.no_grad():
        expected, _ = plain_tokens(model, 1, x, config)
        assert_same(gtp_vit.patch(model, **OPTIONS)(x).last_hidden_state, expected)


def test_threads_share_one_model(backend):
    model = gtp_vit.patch(build(dtype=torch.float32), **OPTIONS)
    inputs = [images(model, seed=seed) for seed in range(4)]
    with torch.no_grad():
        expected = [model(x, output_hidden_states=True) for x in inputs]
    results = [[] for _ in inputs]
    start = threading.Barrier(len(inputs))

    def serve(index):
        start.wait()
        with torch.no_grad(), gtp_kernels.use_backend(backend):
            results[index].extend(model(inputs[index], output_hidden_states=True) for _ in range(10))

    threads = [threading.Thread(target=serve, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, wanted in zip(results, expected, strict=True):
        assert len(got) == 10
        for output in got:
            assert torch.equal(output.logits, wanted.logits)
            assert all(map(torch.equal, output.hidden_states, wanted.hidden_states))


@pytest.mark.parametrize(("key", "restore"), [("vit", False), ("registers", True), ("clip", True), ("siglip", False)])
def test_compile_full_graph(key, restore):
    model = gtp_vit.patch(build(key, dtype=torch.float32), **OPTIONS | dict(sparsity=1.0, restore=restore))
    x = images(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected = model(x, output_hidden_states=True)
        output = compiled(x, output_hidden_states=True)
    assert_same(output.last_hidden_state, expected.last_hidden_state, 1e-5)
    for each, wanted in zip(output.hidden_states, expected.hidden_states, strict=True):
        assert_same(each, wanted, 1e-5)


@pytest.mark.parametrize("key", ["dinov2", "siglip"])
def test_export(key):
    model = gtp_vit.patch(build(key, dtype=torch.float32), **OPTIONS)
    batch = torch.export.Dim("batch", min=2, max=8)
    with torch.no_grad():
        program = torch.export.export(model, (images(model),), dynamic_shapes={"pixel_values": {0: batch}})
        x = images(model, batch=3, seed=2)
        assert_same(program.module()(x).last_hidden_state, model(x).last_hidden_state, 1e-5)


@pytest.mark.parametrize(("activation", "fuses"), [("gelu", 1), ("gelu_pytorch_tanh", 1), ("quick_gelu", 0)])
@pytest.mark.parametrize("key", ["vit", "siglip"])
def test_layers_run_the_fused_products_of_a_cpu(key, activation, fuses, monkeypatch):
    """Inference on a CPU: three projections and the output, then the feed-forward, in each of the layers."""
    from gtp_vit import linear

    model = gtp_vit.patch(build(key, dtype=torch.float32, hidden_act=activation), **OPTIONS | dict(sparsity=1.0))
    x, calls = images(model), []
    with torch.no_grad():
        expected = model(x).last_hidden_state
        monkeypatch.setattr(linear, "_WORTH", 0)
        product = linear._product
        monkeypatch.setattr(linear, "_product", lambda *args: calls.append(args[2:]) or product(*args))
        assert_same(model(x).last_hidden_state, expected, 1e-4)
    algorithm = {"gelu": "none", "gelu_pytorch_tanh": "tanh"}.get(activation)
    assert calls == 3 * ([()] * 4 + fuses * [("gelu", algorithm)])


def test_gmacs():
    model = build("vit classifier", dtype=torch.float32)
    unpatched = gtp_vit.gmacs(model, 64)
    # 17 tokens: embedding 16·768·48, per layer 17·(4·48² + 2·48·80) and 2·17²·48 of the attention, head 480.
    assert unpatched * 1e9 == 16 * 768 * 48 + 3 * (17 * (4 * 48**2 + 2 * 48 * 80) + 2 * 17**2 * 48) + 480
    patched = gtp_vit.gmacs(gtp_vit.patch(model, **OPTIONS), 64)
    assert 0.8 * unpatched < patched < unpatched
    for key in MODELS:
        model = gtp_vit.patch(build(key, dtype=torch.float32), **OPTIONS)
        assert gtp_vit.gmacs(model, 64) == gtp_vit.gmacs(model, images(model)) > 0


# Training


@pytest.mark.parametrize("key", ["vit classifier", "deit teacher", "registers classifier", "clip projection", "siglip"])
def test_gradients(backend, key):
    model = build(key)
    x, config = images(model), GTPConfig(**OPTIONS)
    tokens, _ = plain_tokens(tower_of(key, model), MODELS[key][2], x, config)
    expected = result_of(key, model, tokens)
    target = torch.randn(expected.shape, dtype=torch.float64)
    (expected * target).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    (given_result(gtp_vit.patch(model, **OPTIONS)(x)) * target).sum().backward()
    for name, parameter in model.named_parameters():
        if gradients[name] is None:
            assert parameter.grad is None, name
            continue
        assert_same(parameter.grad, gradients[name])


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("key", ["vit classifier", "dinov2"])
def test_gradient_checkpointing(backend, key, reentrant):
    model = gtp_vit.patch(build(key).train(), **OPTIONS)
    x = images(model).requires_grad_()
    given_result(model(x)).square().sum().backward()
    expected = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad(set_to_none=True)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    attention = layers_of(tower_of(key, model))[0].attention
    attention.register_forward_pre_hook(lambda *_: calls.append(1))
    with gtp_vit.trace(model) as trace:
        given_result(model(x)).square().sum().backward()
    assert len(calls) == 2
    assert len(trace.layers) == 3
    for name, gradient in expected.items():
        assert_same(model.get_parameter(name).grad, gradient, 1e-10)


@pytest.mark.parametrize(
    ("key", "changes"), [("vit", dict(hidden_dropout_prob=0.3)), ("dinov2", dict(drop_path_rate=0.5))]
)
def test_training_mode_with_dropout(backend, key, changes):
    """Dropout and stochastic depth act on the branch before the fused step: same draws, same result."""
    model = build(key, **changes).train()
    x, config = images(model, batch=4), GTPConfig(**OPTIONS)
    torch.manual_seed(5)
    expected, _ = plain_tokens(model, 1, x, config)
    gtp_vit.patch(model, **OPTIONS)
    torch.manual_seed(5)
    result = model(x).last_hidden_state
    assert_same(result, expected)
    result.sum().backward()


# Full size


FULL_SIZE = {
    "ViT-B/16": (lambda: transformers.ViTModel(transformers.ViTConfig()), 1, 8),
    "DeiT-S": (
        lambda: transformers.DeiTModel(
            transformers.DeiTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536)
        ),
        2,
        8,
    ),
    "DINOv2-S": (
        lambda: transformers.Dinov2Model(
            transformers.Dinov2Config(hidden_size=384, num_attention_heads=6, patch_size=14, image_size=518)
        ),
        1,
        8,
    ),
    "DINOv2-S with registers": (
        lambda: transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(
                hidden_size=384, num_attention_heads=6, patch_size=14, image_size=518
            )
        ),
        5,
        8,
    ),
    "CLIP ViT-B/32": (lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig()), 1, 3),
    "SigLIP-B/16": (lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig()), 0, 8),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size(backend, name):
    make, prefix, num_prop = FULL_SIZE[name]
    torch.manual_seed(0)
    with torch.device("cpu"):
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_((0.02 if parameter.ndim > 1 else 0.1) * torch.randn(parameter.shape))
    model = model.to(torch.get_default_device(), torch.float64).eval()
    x, config = images(model, batch=1, size=(224, 224)), GTPConfig(num_prop=num_prop)
    with torch.no_grad():
        expected, _ = plain_tokens(model, prefix, x, config, depth=12)
        result = gtp_vit.patch(model, num_prop=num_prop)(x).last_hidden_state
    assert result.shape[1] == prefix + (224 // model.config.patch_size) ** 2 - 12 * num_prop
    assert_same(result, expected)


# Trace


@pytest.mark.parametrize("key", ["vit classifier", "registers", "siglip classifier"])
def test_trace(backend, key):
    model = gtp_vit.patch(build(key), **OPTIONS)
    tower, prefix = tower_of(key, model), MODELS[key][2]
    x = images(model)
    with torch.no_grad():
        expected = given_result(model(x))
        with gtp_vit.trace(model) as trace, gtp_vit.trace(tower) as same:
            assert torch.equal(given_result(model(x)), expected)
    assert trace.grid_size == (4, 4)
    assert trace.num_prefix == prefix
    assert [layer.kept_tokens.shape[1] for layer in trace.layers] == [14, 12, 10]
    assert torch.equal(trace.layers[2].kept_tokens, same.layers[2].kept_tokens)
    assert trace.lineage().shape == (2, 10, 16)


def test_trace_of_what_cannot_be_traced():
    model = build("clip projection")
    with pytest.raises(ValueError, match="must be patched by gtp_vit.patch"), gtp_vit.trace(model):
        pass
    gtp_vit.unpatch(gtp_vit.patch(model, **OPTIONS))
    with pytest.raises(ValueError, match="must be patched by gtp_vit.patch"), gtp_vit.trace(model):
        pass


# What is refused, by name, with nothing changed


class OwnTower(transformers.ViTModel):
    pass


def replaced(key, path, module):
    model = build(key)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module(model.get_submodule(path)))
    return model


class OwnLayer(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.attention = layer


class OwnEncoder(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.layers = encoder.layers


def with_attribute(model, path):
    model.get_submodule(path).gtp = 3
    return model


def with_instance_forward(model, path):
    module = model.get_submodule(path)
    module.forward = module.forward
    return model


def beit():
    return transformers.BeitModel(transformers.BeitConfig(**SMALL))


def two_towers():
    model = build("clip projection")
    model.other = build("clip")
    return model


REFUSED = {
    "beit": (beit, {}, TypeError, "one of ViTModel, .*SiglipVisionModel.*got BeitModel: .*relative position bias"),
    "data2vec": (
        lambda: transformers.Data2VecVisionModel(transformers.Data2VecVisionConfig(**SMALL)),
        {},
        TypeError,
        "got Data2VecVisionModel: .*relative position bias",
    ),
    "swin": (
        lambda: transformers.SwinModel(
            transformers.SwinConfig(image_size=32, embed_dim=8, depths=[1], num_heads=[1], window_size=2)
        ),
        {},
        TypeError,
        "got SwinModel: .*windows",
    ),
    "a text model": (
        lambda: transformers.BertModel(transformers.BertConfig(**TEXT)),
        {},
        TypeError,
        "one of ViTModel.*got BertModel",
    ),
    "a backbone": (
        lambda: transformers.Dinov2Backbone(transformers.Dinov2Config(**DINO)),
        {},
        TypeError,
        "got Dinov2Backbone",
    ),
    "masked image modelling": (
        lambda: transformers.ViTForMaskedImageModeling(transformers.ViTConfig(**SMALL, encoder_stride=16)),
        {},
        ValueError,
        r"restore must be True for a ViTForMaskedImageModeling, .*every token.*got False .*model\.vit",
    ),
    "subclass of a tower": (lambda: OwnTower(transformers.ViTConfig(**SMALL)), {}, TypeError, "got OwnTower"),
    "two towers": (two_towers, {}, TypeError, "holds 2: patch each by itself .vision_model, other."),
    "another layer": (
        lambda: replaced("vit", "layers.1", OwnLayer),
        {},
        TypeError,
        "layer 1 of ViTModel is OwnLayer; supported layers are ViTLayer",
    ),
    "another attention": (
        lambda: replaced("clip", "encoder.layers.2.self_attn", lambda attn: nn.Identity()),
        {},
        TypeError,
        "layer 2 of CLIPVisionModel has Identity; supported attentions are ViTAttention",
    ),
    "another encoder": (
        lambda: replaced("siglip", "encoder", OwnEncoder),
        {},
        TypeError,
        "SiglipVisionModel has an encoder of class OwnEncoder",
    ),
    "an attribute gtp": (
        lambda: with_attribute(build("vit classifier"), "vit"),
        {},
        ValueError,
        r"ViTModel has an attribute gtp \(int\)",
    ),
    "an attribute gtp around the tower": (
        lambda: with_attribute(build("vit classifier"), ""),
        {},
        ValueError,
        r"ViTForImageClassification has an attribute gtp \(int\)",
    ),
    "instance forward of a tower": (
        lambda: with_instance_forward(build("vit"), ""),
        {},
        TypeError,
        "ViTModel: a ViTModel has its own forward",
    ),
    "instance forward of a layer": (
        lambda: with_instance_forward(build("siglip"), "encoder.layers.0"),
        {},
        TypeError,
        "a SiglipEncoderLayer has its own forward",
    ),
    "attention dropout": (
        lambda: build("vit", attention_probs_dropout_prob=0.1),
        {},
        ValueError,
        "attention dropout must be off; got 0.1 in layer 0",
    ),
    "attention dropout of clip": (
        lambda: build("clip", attention_dropout=0.2),
        {},
        ValueError,
        "attention dropout must be off; got 0.2 in layer 0",
    ),
    "too many propagated": (build, dict(num_prop=6), ValueError, "num_prop = 6 does not fit block 2.* is 5"),
    "too many neighbours": (build, dict(num_neighbours=16), ValueError, r"num_neighbours must be in \[0, 16\)"),
    "one value too few": (build, dict(num_prop=(1, 2)), ValueError, "one value per block; got 2 for 3"),
    "class selection without class token": (
        lambda: build("siglip"),
        dict(selection="CLSAttnMax"),
        ValueError,
        "'CLSAttnMax' .*class token, and SiglipVisionModel has none",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_untouched(case):
    make, options, error, message = REFUSED[case]
    model = make()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        gtp_vit.patch(model, **OPTIONS | options)
    assert_unchanged(model, before)


@pytest.mark.parametrize("key", ["vit", "vit classifier"])
def test_patched_twice_and_unpatched_twice(key):
    model = build(key)
    with pytest.raises(ValueError, match="must be patched by gtp_vit.patch; got an unpatched ViT"):
        gtp_vit.unpatch(model)
    gtp_vit.patch(model, **OPTIONS)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"patched already .*gtp_vit.unpatch\(model\) first"):
        gtp_vit.patch(model, num_prop=1)
    assert_unchanged(model, before)
    assert model.gtp == GTPConfig(**OPTIONS)
    gtp_vit.unpatch(model)
    with pytest.raises(ValueError, match="must be patched"):
        gtp_vit.unpatch(model)


def test_tower_and_holder_may_be_patched_and_unpatched_by_either():
    model = build("vit classifier")
    gtp_vit.patch(model.vit, **OPTIONS)
    assert not hasattr(model, "gtp")
    gtp_vit.unpatch(model)
    gtp_vit.patch(model, **OPTIONS)
    gtp_vit.unpatch(model.vit)
    gtp_vit.patch(model, num_prop=1, num_neighbours=3)
    assert model.gtp.num_prop == model.vit.gtp.num_prop == 1


@pytest.mark.parametrize("key", ["vit", "dinov2", "clip", "siglip", "deit classifier"])
def test_what_a_forward_refuses(key):
    model = gtp_vit.patch(build(key), **OPTIONS)
    x = images(model)
    for name in ("attention_mask", "head_mask"):
        with pytest.raises(ValueError, match=f"{name} must be None in a patched model"):
            model(x, **{name: torch.ones(2, 17)})
    with pytest.raises(ValueError, match="is_causal must be False"):
        model(x, is_causal=True)
    with pytest.raises(ValueError, match="output_attentions must be False.*map is never written"):
        model(x, output_attentions=True)
    with pytest.raises(ValueError, match=r"pixel_values must be a tensor \[B, 3, H, W\]; got None"):
        model(None)
    tower = tower_of(key, model)
    tower.set_attn_implementation("eager")
    tower.config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions must be False"):
        model(x)


def test_dropout_switched_on_after_patching():
    model = gtp_vit.patch(build("vit"), **OPTIONS)
    model.layers[1].attention.attention_dropout = 0.5
    with torch.no_grad():
        model(images(model))
    model.train()
    with pytest.raises(ValueError, match=r"attention dropout must be off; got 0.5 in layer 1"):
        model(images(model))


def test_input_too_small_for_num_prop():
    model = gtp_vit.patch(build("dinov2"), num_prop=5, num_neighbours=3)
    with pytest.raises(ValueError, match=r"num_prop = 5 does not fit block 1: 4 of 9 image tokens.* is 2"):
        model(images(model, size=(48, 48)))


def test_layers_changed_after_patching():
    model = gtp_vit.patch(build("clip"), num_prop=(1, 1, 1))
    model.encoder.layers = model.encoder.layers[:2]
    with pytest.raises(ValueError, match="num_prop must have one value per block; got 3 for 2 blocks"):
        model(images(model))


# Imports


@pytest.mark.parametrize(("module", "other"), [("patch_transformers", "timm"), ("patch_timm", "transformers")])
def test_the_patches_of_one_library_leave_the_other_alone(module, other):
    code = f"import sys, gtp_vit.{module}; assert {other!r} not in sys.modules; print('ok')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert run.stdout.strip() == "ok", run.stderr


def test_a_transformers_that_is_too_old(monkeypatch):
    monkeypatch.setitem(sys.modules, "gtp_vit.patch_transformers", None)
    with pytest.raises(ImportError, match=r"needs transformers >= 5.18; found .*pip install"):
        gtp_vit.patch(build(), **OPTIONS)
