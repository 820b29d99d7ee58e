"""gtp_vit.patch on timm models: against a plain PyTorch forward, and the promises around it."""

import copy
import io
import pickle
import sys
import threading

import pytest
import timm
import timm.models.vision_transformer as timm_vit
import torch
from torch import nn
from torch.nn.utils import prune

import gtp_kernels
import gtp_vit
import gtp_vit.block
from gtp_kernels import reference
from gtp_vit import GTPConfig

SMALL = dict(embed_dim=48, num_heads=3, depth=3)
MODELS = {
    "vit": ("vit_tiny_patch16_224", dict(SMALL, img_size=64), 1),
    "deit": ("deit_tiny_patch16_224", dict(SMALL, img_size=64), 1),
    "deit distilled": ("deit_tiny_distilled_patch16_224", dict(SMALL, img_size=64), 2),
    "deit 3": ("deit3_small_patch16_224", dict(SMALL, img_size=64), 1),
    "dinov2": ("vit_small_patch14_dinov2", dict(SMALL, img_size=70), 1),
    "dinov2 registers": ("vit_small_patch14_reg4_dinov2", dict(SMALL, img_size=70), 5),
    "clip": ("vit_base_patch16_clip_224", dict(SMALL, img_size=64), 1),
    "clip quickgelu": ("vit_base_patch16_clip_quickgelu_224", dict(SMALL, img_size=64), 1),
    "siglip": ("vit_base_patch16_siglip_224", dict(SMALL, img_size=64), 0),
    "mae": ("vit_base_patch16_224", dict(SMALL, img_size=64, global_pool="avg"), 1),
    "gap": ("vit_medium_patch16_gap_256", dict(SMALL, img_size=64), 0),
    "registers without class token": ("vit_little_patch16_reg4_gap_256", dict(SMALL, img_size=64), 4),
    "eva": ("eva_large_patch14_196", dict(SMALL, img_size=70), 1),
    "res-post norm": ("vit_base_patch16_rpn_224", dict(SMALL, img_size=64), 0),
    "rms norm, swiglu": ("aimv2_large_patch14_224", dict(SMALL, img_size=70), 0),
    "convolutional stem": ("vitamin_small_224", dict(depth=3, img_size=64), 0),
    "q/k norm, attention norm": (
        "vit_tiny_patch16_224",
        dict(SMALL, img_size=64, qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True),
        1,
    ),
    "not square": ("vit_tiny_patch16_224", dict(SMALL, img_size=(48, 80)), 1),
    "dynamic size": ("vit_tiny_patch16_224", dict(SMALL, img_size=64, dynamic_img_size=True), 1),
}
OPTIONS = dict(num_prop=2, sparsity=0.6, num_neighbours=3)


def build(key="vit", dtype=torch.float64, seed=0, **changes):
    """A small model with random weights that let every part matter, the same on every device, in evaluation mode."""
    name, options, _ = MODELS[key]
    torch.manual_seed(seed)
    with torch.device("cpu"), torch.no_grad():
        model = timm.create_model(name, pretrained=False, **dict(options, num_classes=10, **changes))
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model.to(torch.get_default_device(), dtype).eval()


def images(model, batch=2, seed=1, size=None):
    height, width = size or model.patch_embed.img_size
    dtype = next(model.parameters()).dtype
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def plain_attention(attn, x, scales, config):
    """timm's attention with a thresholded map, and that map."""
    batch, num_tokens, _ = x.shape
    qkv = attn.qkv(x).reshape(batch, num_tokens, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    q, k = attn.q_norm(q), attn.k_norm(k)
    weights = reference.attention_map(
        q, k, scales, sparsity=config.sparsity, scale=attn.scale, semantics=config.semantics
    )
    out = attn.norm((weights.to(v.dtype) @ v).transpose(1, 2).reshape(batch, num_tokens, -1))
    if getattr(attn, "gate", None) is not None:
        out = out * attn.gate(x).sigmoid()
    return attn.proj_drop(attn.proj(out)), weights


def plain_features(model, x, config):
    """The features of an unpatched ``model`` under GTP, by its definition: dense map, dense graph, nothing fused."""
    x = model.patch_embed(x)
    grid_size = x.shape[1:3] if x.ndim == 4 else model.patch_embed.grid_size
    x = model.norm_pre(model._pos_embed(x))
    prefix = model.num_prefix_tokens
    graph = None
    if config.propagation == "GraphProp":
        graph = reference.build_graph(
            x, grid_size, config.graph_type, config.num_neighbours, prefix, config.semantics
        ).to_dense()
    scales = torch.ones(x.shape[:2], device=x.device) if config.token_scale else None
    for block, num_prop in zip(model.blocks, config.schedule(len(model.blocks)), strict=True):
        post_norm = isinstance(block, timm_vit.ResPostBlock)
        branch, weights = plain_attention(block.attn, x if post_norm else block.norm1(x), scales, config)
        x = x + block.drop_path1(block.norm1(branch) if post_norm else block.ls1(branch))
        if num_prop:
            index_kept, index_prop = reference.select(
                weights.detach(), config.selection, num_prop, num_prefix=prefix, semantics=config.semantics
            )
            # In grid order, as importances that tie (at zero, below the threshold) are judged by the current order.
            index_kept = index_kept.sort(1).values
            x, graph, scales = reference.propagate(
                x, graph, index_kept, index_prop, config.propagation, config.alpha, scales, num_prefix=prefix
            )
        branch = block.norm2(block.mlp(x)) if post_norm else block.ls2(block.mlp(block.norm2(x)))
        x = x + block.drop_path2(branch)
    return model.norm(x)


# Token scales are float32 in a model of any type: their last bit moves float64 results by some 1e-7.
WITH_SCALES = 1e-6


def assert_same(result, expected, tolerance=WITH_SCALES):
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


def snapshot(model):
    """Classes, attributes and bits of a model."""
    return (
        [(name, type(module)) for name, module in model.named_modules()],
        [sorted(vars(module)) for module in model.modules()],
        {name: value.clone() for name, value in model.state_dict().items()},
    )


def assert_unchanged(model, before):
    classes, attributes, state = snapshot(model)
    assert classes == before[0]
    assert attributes == before[1]
    assert state.keys() == before[2].keys()
    assert all(torch.equal(state[name], before[2][name]) for name in state)


# What a patched model computes


@pytest.mark.parametrize("key", MODELS)
def test_against_plain_forward(backend, key):
    model = build(key)
    assert model.num_prefix_tokens == MODELS[key][2]
    x, config = images(model), GTPConfig(**OPTIONS)
    with torch.no_grad():
        expected = model.forward_head(plain_features(model, x, config))
        unpatched = model(x)
        gtp_vit.patch(model, **OPTIONS)
        features = model.forward_features(x)
        result = model(x)
    num_image_tokens = model.patch_embed.num_patches
    assert features.shape[1] == model.num_prefix_tokens + num_image_tokens - 2 * len(model.blocks)
    assert_same(result, expected)
    assert (result - unpatched).abs().max() > 1e-3


CHANGES = [
    dict(semantics="paper"),
    dict(token_scale=False),
    dict(sparsity=1.0),
    dict(alpha=-0.3),
    dict(propagation="Mean"),
    dict(propagation="Mean", num_prop=1),
    dict(propagation="None"),
    dict(propagation="None", graph_type="None"),
    dict(graph_type="Spatial"),
    dict(graph_type="Semantic"),
    dict(num_neighbours=0),
    dict(num_prop=(3, 0, 2)),
    dict(num_prop=0),
    dict(num_prop=(0, 4, 0), sparsity=1.0),
    dict(num_prop=5),
    dict(selection="None"),
    *(dict(selection=name) for name in gtp_kernels.checks.SCORE_STANDARDS),
]


@pytest.mark.parametrize(
    ("key", "options"),
    [
        pytest.param(key, options, id=f"{key}-{options}")
        for key in ("vit", "res-post norm")
        for options in CHANGES
        if MODELS[key][2] or not options.get("selection", "").startswith("CLS")
    ],
)
def test_options_against_plain_forward(backend, key, options):
    model = build(key)
    options = OPTIONS | options
    x, config = images(model), GTPConfig(**options)
    with torch.no_grad():
        expected = model.forward_head(plain_features(model, x, config))
        assert_same(gtp_vit.patch(model, **options)(x), expected, WITH_SCALES if config.token_scale else 1e-9)


@pytest.mark.parametrize("selection", ["CosSimMean", "CosSimMax"])
def test_cosine_selection_uses_the_map_and_says_so(backend, selection):
    model = build()
    x, config = images(model), GTPConfig(**OPTIONS, selection=selection)
    with torch.no_grad():
        expected = model.forward_head(plain_features(model, x, config))
        with pytest.warns(UserWarning, match=f"{selection}.*needs the N x N attention map"):
            gtp_vit.patch(model, **OPTIONS, selection=selection)
        assert_same(model(x), expected)


def test_random_selection_follows_the_seed(backend):
    model = gtp_vit.patch(build(), **OPTIONS, selection="Random")
    x, left = images(model), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        with torch.no_grad(), gtp_vit.trace(model) as trace:
            model(x)
        left.append(torch.cat([layer.prop_tokens for layer in trace.layers], 1))
    assert torch.equal(left[0], left[1])
    assert not torch.equal(left[0], left[2])


def test_random_selection_of_a_seed(backend):
    """With a seed a forward depends on nothing but its input: not on draws before it, and every block draws its own."""
    model = gtp_vit.patch(build(), **OPTIONS | dict(num_prop=5), selection="Random", seed=7)
    x = images(model)

    def left(model):
        with torch.no_grad(), gtp_vit.trace(model) as trace:
            result = model(x)
        return result, torch.stack([layer.prop_tokens for layer in trace.layers], 1)

    state = torch.get_rng_state()
    expected, tokens = left(model)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    for other in (model, copy.deepcopy(model)):
        again, same = left(other)
        assert torch.equal(again, expected)
        assert torch.equal(same, tokens)
    other = gtp_vit.patch(gtp_vit.unpatch(model), **OPTIONS | dict(num_prop=5), selection="Random", seed=8)
    assert not torch.equal(left(other)[1], tokens)
    # The draws of a block, and not the tokens that were left: the second block may draw what the first one drew.
    draws = [
        gtp_vit.block.importance_of(
            gtp_kernels.AttentionScores(*3 * (torch.zeros(2, 3, 17),)),
            gtp_vit.block.layer_options(GTPConfig(selection="Random", seed=seed), 2, 1)[block],
        )
        for seed, block in ((7, 0), (7, 1), (8, 0))
    ]
    assert all(draw.shape == (2, 16) for draw in draws)
    assert not torch.equal(draws[0][0], draws[0][1])
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_broadcasting_attention_is_image_attention(backend):
    model = build()
    x = images(model)
    with torch.no_grad():
        expected = gtp_vit.patch(model, **OPTIONS, selection="IMGAttnMax")(x)
        gtp_vit.unpatch(model)
        assert torch.equal(gtp_vit.patch(model, **OPTIONS, selection="BroadAttnMax")(x), expected)
    assert model.gtp.selection == "IMGAttnMax"


@pytest.mark.parametrize("key", ["vit", "dinov2 registers", "gap"])
def test_float32_agrees_with_the_definition(backend, key):
    model = build(key, dtype=torch.float32)
    gtp_vit.patch(model, **OPTIONS | dict(sparsity=1.0))
    x = images(model)
    with torch.no_grad():
        result = model(x)
        with gtp_kernels.use_backend("reference"), gtp_kernels.backends.record():
            expected = model(x)
    assert_same(result, expected, 1e-4)


def test_gate_and_head_size(backend):
    """Head sizes other than C / H, and a gate on the attention, which no registered model combines."""
    model = build()
    for block in model.blocks:
        attn = timm.layers.Attention(48, 3, attn_head_dim=8, qkv_bias=True, gated=True).double()
        nn.init.normal_(attn.gate.weight)
        block.attn = attn
    model.eval()
    x, config = images(model), GTPConfig(**OPTIONS)
    with torch.no_grad():
        expected = model.forward_head(plain_features(model, x, config))
        assert_same(gtp_vit.patch(model, **OPTIONS)(x), expected)


@pytest.mark.parametrize("size", [(64, 64), (48, 96), (80, 64), (48, 48)])
def test_dynamic_sizes(backend, size):
    model = build("dynamic size")
    x, config = images(model, size=size), GTPConfig(**OPTIONS)
    with torch.no_grad():
        expected = model.forward_head(plain_features(model, x, config))
        assert_same(gtp_vit.patch(model, **OPTIONS)(x), expected)


@pytest.mark.parametrize(
    "key", ["deit distilled", "dinov2 registers", "gap", "registers without class token", "siglip"]
)
def test_dynamic_sizes_with_any_prefix(backend, key):
    model = build(key, dynamic_img_size=True)
    side = model.patch_embed.patch_size[0]
    x, config = images(model, size=(3 * side, 6 * side)), GTPConfig(**OPTIONS)
    with torch.no_grad():
        expected = model.forward_head(plain_features(model, x, config))
        with gtp_vit.trace(gtp_vit.patch(model, **OPTIONS)) as trace:
            assert_same(model(x), expected)
    assert trace.grid_size == (3, 6)
    assert trace.num_prefix == MODELS[key][2]


def test_padded_sizes(backend):
    model = build("dynamic size", dynamic_img_pad=True)
    x, config = images(model, size=(50, 70)), GTPConfig(**OPTIONS)
    with torch.no_grad():
        expected = model.forward_head(plain_features(model, x, config))
        with gtp_vit.trace(gtp_vit.patch(model, **OPTIONS)) as trace:
            assert_same(model(x), expected)
    assert trace.grid_size == (4, 5)


def test_input_size_set_after_patching(backend):
    model = gtp_vit.patch(build(), **OPTIONS)
    model.set_input_size((48, 96))
    x = images(model, size=(48, 96))
    with torch.no_grad():
        result = model(x)
        assert_same(result, model.forward_head(plain_features(gtp_vit.unpatch(model), x, GTPConfig(**OPTIONS))))


def test_the_two_heads_of_a_distilled_model(backend):
    model = build("deit distilled").train()
    model.set_distilled_training()
    x, config = images(model), GTPConfig(**OPTIONS)
    expected = model.forward_head(plain_features(model, x, config))
    result = gtp_vit.patch(model, **OPTIONS)(x)
    assert len(result) == len(expected) == 2
    for head, plain in zip(result, expected, strict=True):
        assert_same(head, plain)


def test_empty_batch(backend):
    model = gtp_vit.patch(build(), **OPTIONS)
    with torch.no_grad():
        assert model(images(model, batch=0)).shape == (0, 10)


@pytest.mark.parametrize("norm", ["layernorm", "layernormfp32", "rmsnorm", "rmsnormfp32", "simplenorm", "no affine"])
def test_norms(backend, norm):
    layer = norm
    if norm == "no affine":

        def layer(channels, **kwargs):
            return timm.layers.LayerNorm(channels, affine=False, **kwargs)

    model = build(norm_layer=layer, qk_norm=True)
    x, config = images(model), GTPConfig(**OPTIONS)
    # The norms of type …Fp32 round to float32 inside, also in a float64 model.
    tolerance = 1e-5 if norm.endswith("fp32") else WITH_SCALES
    with torch.no_grad():
        expected = model.forward_head(plain_features(model, x, config))
        assert_same(gtp_vit.patch(model, **OPTIONS)(x), expected, tolerance)


# Nothing changes where nothing is asked for


@pytest.mark.parametrize("key", MODELS)
def test_nothing_propagated_is_the_unpatched_model(key):
    model = build(key, dtype=torch.float32)
    x = images(model)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(gtp_vit.patch(model, num_prop=0, sparsity=1.0)(x), expected)
        gtp_vit.unpatch(model)
        assert torch.equal(gtp_vit.patch(model, num_prop=2, sparsity=1.0, selection="None")(x), expected)


def test_first_blocks_without_propagation_are_the_unpatched_ones(monkeypatch):
    model = gtp_vit.patch(build(), num_prop=(0, 0, 2), sparsity=1.0)
    calls = []
    original = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    with torch.no_grad():
        model(images(model))
    assert len(calls) == 2


def test_no_graph_where_none_is_read(monkeypatch):
    monkeypatch.setattr(gtp_kernels, "build_graph", lambda *a, **k: pytest.fail("a graph was built"))
    for options in (dict(num_prop=0), dict(propagation="Mean"), dict(propagation="None"), dict(selection="None")):
        model = gtp_vit.patch(build(), **OPTIONS | options)
        with torch.no_grad():
            model(images(model))


@pytest.mark.parametrize("key", MODELS)
def test_unpatch_is_bit_for_bit(key):
    model = build(key, dtype=torch.float32)
    x = images(model)
    with torch.no_grad():
        before, expected = snapshot(model), model(x)
        gtp_vit.patch(model, **OPTIONS)
        assert list(model.state_dict()) == list(before[2])
        model(x)
        assert gtp_vit.unpatch(model) is model
        assert_unchanged(model, before)
        assert torch.equal(model(x), expected)


def test_patch_is_in_place_and_keeps_the_config():
    model = build()
    assert gtp_vit.patch(model, **OPTIONS) is model
    assert model.gtp == GTPConfig(**OPTIONS)
    assert isinstance(model, timm_vit.VisionTransformer)
    assert isinstance(model.blocks[0], timm_vit.Block)


def test_a_forward_leaves_nothing_on_the_modules(backend):
    model = gtp_vit.patch(build(), **OPTIONS)
    before = snapshot(model)
    with gtp_vit.trace(model):
        model(images(model)).sum().backward()
    assert_unchanged(model, before)


# Living with a patched model


@pytest.mark.parametrize("how", ["deepcopy", "torch.save", "pickle protocol 2"])
def test_copies_and_pickles(backend, how):
    model = gtp_vit.patch(build("deit distilled"), **OPTIONS)
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
    assert type(other) is type(model)
    assert other.gtp == model.gtp
    with torch.no_grad():
        assert torch.equal(other(x), model(x))
        gtp_vit.unpatch(other)
        assert isinstance(model.blocks[0], gtp_vit.patch_timm.GTPBlock)
        assert torch.equal(gtp_vit.patch(other, **OPTIONS)(x), model(x))


def test_load_state_dict_before_and_after():
    source, x = build(seed=3), images(build())
    with torch.no_grad():
        expected = gtp_vit.patch(copy.deepcopy(source), **OPTIONS)(x)
        model = gtp_vit.patch(build(), **OPTIONS)
        model.load_state_dict(source.state_dict())
        assert torch.equal(model(x), expected)
        plain = build()
        plain.load_state_dict(model.state_dict())
        assert torch.equal(gtp_vit.patch(plain, **OPTIONS)(x), expected)


def test_load_state_dict_names_wrong_keys():
    model, state = gtp_vit.patch(build(), **OPTIONS), build().state_dict()
    state["blocks.0.attn.gtp"] = state.pop("blocks.0.attn.qkv.weight")
    with pytest.raises(
        RuntimeError, match=r'Missing key.*"blocks.0.attn.qkv.weight".*\n.*Unexpected.*"blocks.0.attn.gtp"'
    ):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"size mismatch for blocks.0.mlp.fc1.weight"):
        model.load_state_dict(build(mlp_ratio=2).state_dict())


@pytest.mark.parametrize("key", ["vit", "dinov2 registers"])
def test_moved_after_patching(backend, key):
    """Nothing of a patched model stays behind when it moves."""
    model = build(key, dtype=torch.float32)
    x = images(model)
    with torch.no_grad():
        expected = gtp_vit.patch(model, **OPTIONS)(x)
        assert model.half().to(torch.float64)(x.double()).dtype == torch.float64
        model = model.float()
        model.load_state_dict(build(key, dtype=torch.float32).state_dict())
        assert torch.equal(model(x), expected)
        if backend == "triton":
            return  # it takes no tensors without data
        logits = model.to("meta")(x.to("meta"))
    assert logits.shape == expected.shape
    assert logits.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("key", ["vit", "dinov2 registers", "res-post norm", "rms norm, swiglu"])
def test_low_precision_weights(backend, key, dtype):
    model = build(key, dtype=torch.float32)
    x, options = images(model), OPTIONS | dict(sparsity=1.0)
    with torch.no_grad():
        expected = gtp_vit.patch(model, **options)(x)
        result = model.to(dtype)(x.to(dtype))
    assert result.dtype == dtype
    assert torch.nn.functional.cosine_similarity(result.float(), expected).min() > 0.98


@pytest.mark.parametrize("key", ["vit", "dinov2 registers", "clip", "rms norm, swiglu", "q/k norm, attention norm"])
def test_autocast(backend, key):
    model = build(key, dtype=torch.float32)
    x, options = images(model), OPTIONS | dict(sparsity=1.0)
    with torch.no_grad():
        with torch.autocast(x.device.type, torch.bfloat16):
            unpatched = model.forward_features(x)
        expected = gtp_vit.patch(model, **options)(x)
        with torch.autocast(x.device.type, torch.bfloat16):
            features, result = model.forward_features(x), model(x)
    assert features.dtype == unpatched.dtype
    assert torch.nn.functional.cosine_similarity(result.float(), expected).min() > 0.98


def test_hooks_fire():
    model = build("dinov2")
    x, seen = images(model), []
    for name in (
        "",
        "blocks.0",
        "blocks.1.attn",
        "blocks.1.attn.qkv",
        "blocks.1.ls1",
        "blocks.1.norm2",
        "blocks.1.mlp",
    ):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    with torch.no_grad():
        gtp_vit.patch(model, **OPTIONS)(x)
    order = ["blocks.0", "blocks.1.attn.qkv", "blocks.1.attn", "blocks.1.ls1", "blocks.1.norm2", "blocks.1.mlp", ""]
    assert seen == order


def test_hooks_that_change_a_weight_are_honoured(backend):
    model = build("dinov2")
    prune.random_unstructured(model.blocks[0].norm2, "weight", 0.5)
    prune.random_unstructured(model.blocks[1].ls1, "gamma", 0.5)
    x, config = images(model), GTPConfig(**OPTIONS)
    with torch.no_grad():
        for block in model.blocks[:2]:
            for name, parameter in block.named_parameters():
                if name.endswith("_orig"):
                    parameter.mul_(2)
        expected = model.forward_head(plain_features(model, x, config))
        assert_same(gtp_vit.patch(model, **OPTIONS)(x), expected)


@pytest.mark.parametrize("options", [{}, dict(selection="Random", seed=3)], ids=["scores", "seeded"])
def test_threads_share_one_model(backend, options):
    model = gtp_vit.patch(build(dtype=torch.float32), **OPTIONS | options)
    inputs = [images(model, seed=seed) for seed in range(4)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    results = [[] for _ in inputs]
    start = threading.Barrier(len(inputs))

    def serve(index):
        start.wait()
        with torch.no_grad(), gtp_kernels.use_backend(backend):
            results[index].extend(model(inputs[index]) for _ in range(10))

    threads = [threading.Thread(target=serve, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, got in enumerate(results):
        assert len(got) == 10
        assert all(torch.equal(result, expected[index]) for result in got)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_full_graph(backend, compiler):
    model = gtp_vit.patch(build("dinov2", dtype=torch.float32, depth=2), **OPTIONS | dict(sparsity=1.0))
    x = images(model)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(x)
        result = torch.compile(model, fullgraph=True, backend=compiler)(x)
    assert_same(result, expected, 1e-4)


def test_compile_with_symbolic_sizes(backend):
    model = gtp_vit.patch(build("dinov2", dtype=torch.float32, depth=2), **OPTIONS)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for batch in (2, 3):
            x = images(model, batch=batch)
            assert_same(compiled(x), model(x), 1e-4)


if torch.cuda.is_available():

    @pytest.mark.gpu
    @pytest.mark.parametrize("key", ["vit", "dinov2 registers", "gap"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_one_cuda_graph_without_synchronisation(key, dtype):
        model = gtp_vit.patch(build(key, dtype=dtype), **OPTIONS).to("cuda")
        first, second = (images(model, seed=seed).to("cuda") for seed in (1, 2))
        x, graph, stream = first.clone(), torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.no_grad(), gtp_kernels.backends.record() as ran:
            with torch.cuda.stream(stream):
                expected = [model(each) for each in (first, second)]
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                model(x)
                with torch.cuda.graph(graph):
                    result = model(x)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            for each, features in zip((first, second), expected, strict=True):
                x.copy_(each)
                graph.replay()
                assert torch.equal(result, features)
        assert {name for _, name in ran} == {"triton"}

    @pytest.mark.gpu
    @pytest.mark.slow
    def test_ahead_of_time_compilation(tmp_path):
        model = gtp_vit.patch(build("dinov2", dtype=torch.float32, depth=2), **OPTIONS).to("cuda")
        batch = torch.export.Dim("batch", min=2, max=64)
        with torch.no_grad():
            program = torch.export.export(model, (images(model).to("cuda"),), dynamic_shapes=({0: batch},))
            package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
            compiled = torch._inductor.aoti_load_package(package)
            for size in (2, 3):
                x = images(model, batch=size).to("cuda")
                assert_same(compiled(x), model(x), 1e-4)


# Training


@pytest.mark.parametrize(
    "key", ["vit", "deit distilled", "dinov2 registers", "clip", "res-post norm", "rms norm, swiglu"]
)
def test_gradients(backend, key):
    model = build(key)
    x, config = images(model), GTPConfig(**OPTIONS)
    target = torch.randn(2, 10, dtype=torch.float64)
    (model.forward_head(plain_features(model, x, config)) * target).sum().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    (gtp_vit.patch(model, **OPTIONS)(x) * target).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
        assert_same(parameter.grad, expected[name])


def test_training_mode_with_dropout(backend):
    """Drop path and projection dropout act on the branch before the fused step: same draws, same result."""
    model = build("deit 3", drop_path_rate=0.5, proj_drop_rate=0.2).train()
    x, config = images(model, batch=4), GTPConfig(**OPTIONS)
    torch.manual_seed(5)
    expected = model.forward_head(plain_features(model, x, config))
    gtp_vit.patch(model, **OPTIONS)
    torch.manual_seed(5)
    result = model(x)
    assert_same(result, expected)
    result.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_gradient_checkpointing(backend):
    model = gtp_vit.patch(build("dinov2").train(), **OPTIONS)
    x = images(model)
    model(x).square().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    model.set_grad_checkpointing()
    calls = []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    with gtp_vit.trace(model) as trace:
        model(x).square().sum().backward()
    assert len(calls) == 2
    assert len(trace.layers) == 3
    for name, parameter in model.named_parameters():
        assert_same(parameter.grad, expected[name], 1e-10)


# Trace


@pytest.mark.parametrize("propagation", ["GraphProp", "Mean", "None"])
@pytest.mark.parametrize("key", ["vit", "dinov2 registers", "gap"])
def test_trace(backend, key, propagation):
    model = gtp_vit.patch(build(key), **OPTIONS | dict(num_prop=(2, 0, 3), propagation=propagation))
    x = images(model)
    with torch.no_grad(), gtp_vit.trace(model) as trace:
        model(x)
    n, prefix = model.patch_embed.num_patches, model.num_prefix_tokens
    assert trace.grid_size == model.patch_embed.grid_size
    assert trace.num_prefix == prefix
    first, second, third = trace.layers
    assert first.index_prop.shape == (2, 2)
    assert first.importance.shape == (2, n)
    everything = torch.cat((first.index_kept, first.index_prop), 1).sort(1).values
    assert torch.equal(everything, torch.arange(prefix, prefix + n).expand(2, -1))
    assert torch.equal(first.kept_tokens, first.index_kept - prefix)
    rows = n - 2 + (propagation == "Mean")
    assert second.importance is None
    assert second.index_prop.shape == (2, 0)
    assert torch.equal(second.index_kept, torch.arange(prefix, prefix + rows).expand(2, -1))
    assert third.index_prop.shape == third.prop_tokens.shape == (2, 3)
    tokens = torch.cat((first.prop_tokens, third.kept_tokens, third.prop_tokens), 1).sort(1).values
    if propagation == "Mean":
        assert (tokens[:, 0] == -1).all()
        tokens = tokens[:, 1:]
    assert torch.equal(tokens, torch.arange(n).expand(2, -1))
    for tokens, importance in zip(first.prop_tokens, first.importance, strict=True):
        left = torch.zeros_like(importance, dtype=torch.bool).index_fill(0, tokens, True)
        assert importance[left].max() <= importance[~left].min()
    lineage = trace.lineage()
    assert lineage.dtype == torch.float32
    assert lineage.shape == (2, model.forward_features(x).shape[1] - prefix, n)
    if propagation == "None":
        assert third.token_scales is None
        assert torch.equal(lineage.sum(2), torch.ones_like(lineage[..., 0]))
        return
    assert third.token_scales.shape == (2, prefix + lineage.shape[1])
    if propagation == "GraphProp":
        # A row's scale is what it carries of all patches: the same linear rule, applied to ones.
        assert_same(third.token_scales[:, prefix:], lineage.sum(2), 1e-5)
        kept = lineage.gather(2, third.kept_tokens.unsqueeze(1).expand(-1, lineage.shape[1], -1))
        assert torch.equal(kept.diagonal(dim1=1, dim2=2), torch.ones(2, lineage.shape[1]))
    else:
        assert_same(lineage.sum(2), torch.ones_like(lineage[..., 0]), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("propagation", ["GraphProp", "Mean", "None"])
@pytest.mark.parametrize("key", ["vit", "dinov2 registers", "gap", "res-post norm"])
def test_a_trace_changes_no_bit(backend, key, propagation, dtype, monkeypatch):
    """A traced forward runs importance, selection and step one after the other, others in one operator."""
    calls = []
    fused = gtp_vit.block.unchecked_select_residual
    monkeypatch.setattr(gtp_vit.block, "unchecked_select_residual", lambda *args: calls.append(args) or fused(*args))
    model = gtp_vit.patch(build(key, dtype), **OPTIONS | dict(num_prop=(2, 0, 3), propagation=propagation))
    x = images(model)
    with torch.no_grad():
        result = model(x)
        assert len(calls) == 2
        with gtp_vit.trace(model):
            assert torch.equal(model(x), result)
    assert len(calls) == 2


def test_trace_keeps_the_latest_forward_and_ends():
    model = gtp_vit.patch(build(), **OPTIONS)
    other = gtp_vit.patch(build(seed=2), **OPTIONS)
    first, second = images(model, seed=1), images(model, seed=2)
    with torch.no_grad(), gtp_vit.trace(model) as trace:
        model(first)
        left = trace.layers[0].prop_tokens
        model(second)
        latest = trace.layers[0].importance
        assert latest.shape == (2, 16)
        other(first)
        assert trace.layers[0].importance is latest
    with torch.no_grad():
        model(first)
        assert trace.layers[0].importance is latest
        with gtp_vit.trace(model) as outer, gtp_vit.trace(model) as inner:
            model(first)
    assert torch.equal(outer.layers[0].prop_tokens, left)
    assert torch.equal(inner.layers[0].prop_tokens, left)


def test_trace_does_not_see_other_threads():
    model = gtp_vit.patch(build(), **OPTIONS)
    with gtp_vit.trace(model) as trace:
        thread = threading.Thread(target=lambda: model(images(model)))
        thread.start()
        thread.join()
        with pytest.raises(RuntimeError, match="no forward was recorded"):
            _ = trace.layers


def test_trace_of_what_cannot_be_traced():
    model = build()
    with (
        pytest.raises(ValueError, match=r"model must be patched by gtp_vit.patch.*VisionTransformer"),
        gtp_vit.trace(model),
    ):
        pass
    with pytest.raises(TypeError, match="model must be a patched model; got int"), gtp_vit.trace(3):
        pass
    wrapped = torch.compile(gtp_vit.patch(model, **OPTIONS))
    with pytest.raises(ValueError, match="OptimizedModule"), gtp_vit.trace(wrapped):
        pass


# What is refused, by name, with nothing changed


class OwnFeatures(timm_vit.VisionTransformer):
    def forward_features(self, x, attn_mask=None, is_causal=False):
        return super().forward_features(x) * 2


class OwnForward(timm_vit.VisionTransformer):
    def forward(self, x):
        return super().forward(x) * 2


class OwnEmbedding(timm_vit.VisionTransformer):
    def _pos_embed(self, x):
        return super()._pos_embed(x) * 2

    def forward_head(self, x, pre_logits=False):
        return super().forward_head(x, pre_logits) * 2


class OwnBlock(timm_vit.Block):
    pass


class OwnAttention(timm.layers.Attention):
    pass


def vision_transformer(cls=timm_vit.VisionTransformer, **options):
    torch.manual_seed(0)
    return cls(**dict(SMALL, img_size=64, num_classes=10, **options)).eval()


def with_instance_forward(module):
    module.forward = module.forward
    return module


def own_forward_in(name):
    model = build()
    with_instance_forward(model.get_submodule(name))
    return model


REFUSED = {
    "subclass with its own forward_features": (
        lambda: vision_transformer(OwnFeatures),
        {},
        TypeError,
        "OwnFeatures is not supported.*overrides forward_features",
    ),
    "subclass with its own forward": (
        lambda: vision_transformer(OwnForward),
        {},
        TypeError,
        "OwnForward is not supported.*overrides forward",
    ),
    "model with an instance forward": (lambda: own_forward_in(""), {}, TypeError, "model has its own forward"),
    "block with an instance forward": (lambda: own_forward_in("blocks.1"), {}, TypeError, "block 1: Block has its own"),
    "attention with an instance forward": (
        lambda: own_forward_in("blocks.2.attn"),
        {},
        TypeError,
        "block 2: the attention of Block has its own forward",
    ),
    "parallel scaling block": (
        lambda: vision_transformer(block_fn=timm_vit.ParallelScalingBlock),
        {},
        TypeError,
        "block 0 is ParallelScalingBlock",
    ),
    "parallel things block": (
        lambda: vision_transformer(block_fn=timm_vit.ParallelThingsBlock),
        {},
        TypeError,
        "block 0 is ParallelThingsBlock",
    ),
    "subclass of a block": (lambda: vision_transformer(block_fn=OwnBlock), {}, TypeError, "block 0 is OwnBlock"),
    "differential attention": (
        lambda: vision_transformer(attn_layer="diff", num_heads=2),
        {},
        TypeError,
        r"block 0 \(Block\) has DiffAttention",
    ),
    "subclass of the attention": (
        lambda: vision_transformer(attn_layer=OwnAttention),
        {},
        TypeError,
        r"block 0 \(Block\) has OwnAttention",
    ),
    "patch dropout": (
        lambda: build(patch_drop_rate=0.25),
        {},
        ValueError,
        "patch dropout must be off; got patch_drop_rate = 0.25",
    ),
    "attention dropout": (
        lambda: build(attn_drop_rate=0.1),
        {},
        ValueError,
        "attention dropout must be off; got attn_drop = 0.1 in block 0",
    ),
    "too many propagated": (
        build,
        dict(num_prop=6),
        ValueError,
        "num_prop = 6 does not fit block 2.*num_prop that fits 16 .* 3 blocks is 5",
    ),
    "too many propagated, mean": (
        build,
        dict(num_prop=6, propagation="Mean"),
        ValueError,
        "does not fit block 2: 6 of 16.* is 5",
    ),
    "too many in one block": (build, dict(num_prop=(0, 16, 0)), ValueError, "num_prop = 16 does not fit block 1"),
    "one value too few": (
        build,
        dict(num_prop=(1, 2)),
        ValueError,
        "num_prop must have one value per block; got 2 for 3",
    ),
    "too many neighbours": (
        build,
        dict(num_prop=1, num_neighbours=16),
        ValueError,
        r"num_neighbours must be in \[0, 16\)",
    ),
    "theta": (build, dict(sparsity=0.0), ValueError, "sparsity"),
    "graph": (build, dict(graph_type="None"), ValueError, "graph_type"),
    "class selection without class token": (
        lambda: build("gap"),
        dict(num_prop=1, selection="CLSAttnMax"),
        ValueError,
        "'CLSAttnMax' .*class token",
    ),
    "class selection with registers only": (
        lambda: build("registers without class token"),
        dict(num_prop=1, selection="CLSAttnMean"),
        ValueError,
        r"selection = 'CLSAttnMean' .*class token.*prefix tokens: 4",
    ),
    "another timm model": (lambda: timm.create_model("resnet10t"), {}, TypeError, "got ResNet"),
    "another vision transformer": (
        lambda: timm.create_model("beit_base_patch16_224", img_size=64, depth=1, embed_dim=48, num_heads=3),
        {},
        TypeError,
        "VisionTransformer or timm.models.eva.Eva; got Beit",
    ),
    "another library": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3, 2)), {}, TypeError, "Sequential"),
    "a wrapper": (lambda: nn.DataParallel(build()), {}, TypeError, "DataParallel"),
    "a compiled model": (lambda: torch.compile(build(), backend="eager"), {}, TypeError, "OptimizedModule"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_untouched(case):
    make, options, error, message = REFUSED[case]
    model = make()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        gtp_vit.patch(model, **dict(OPTIONS, **options) if options else dict(num_prop=1))
    assert_unchanged(model, before)


def test_not_a_module():
    for patch in (gtp_vit.patch, gtp_vit.unpatch):
        with pytest.raises(TypeError, match=r"got builtins.int"):
            patch(3)


def test_a_timm_that_is_too_old(monkeypatch):
    monkeypatch.setitem(sys.modules, "gtp_vit.patch_timm", None)
    with pytest.raises(ImportError, match=r"needs timm >= 1.0.17; found .*pip install"):
        gtp_vit.patch(build(), **OPTIONS)


def test_subclass_with_its_own_embedding_and_head():
    model = vision_transformer(OwnEmbedding).double()
    x, config = images(model), GTPConfig(**OPTIONS)
    with torch.no_grad():
        expected = model.forward_head(plain_features(model, x, config))
        assert_same(gtp_vit.patch(model, **OPTIONS)(x), expected)
    assert type(gtp_vit.unpatch(model)) is OwnEmbedding


def test_patched_twice_and_unpatched_twice():
    model = build()
    with pytest.raises(ValueError, match=r"model must be patched by gtp_vit.patch; got an unpatched VisionTransformer"):
        gtp_vit.unpatch(model)
    gtp_vit.patch(model, **OPTIONS)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"patched already .*gtp_vit.unpatch\(model\) first"):
        gtp_vit.patch(model, num_prop=1)
    assert_unchanged(model, before)
    assert model.gtp == GTPConfig(**OPTIONS)


def test_masks_and_causal_attention():
    model = gtp_vit.patch(build(), **OPTIONS)
    x = images(model)
    with pytest.raises(ValueError, match="attn_mask must be None"):
        model(x, attn_mask=torch.zeros(17, 17))
    with pytest.raises(ValueError, match="is_causal must be False"):
        model(x, is_causal=True)


def test_input_too_small_for_num_prop():
    model = gtp_vit.patch(build("dynamic size"), num_prop=5, num_neighbours=3)
    with pytest.raises(ValueError, match=r"num_prop = 5 does not fit block 1: 4 of 9 image tokens.* is 2"):
        model(images(model, size=(48, 48)))
    gtp_vit.unpatch(model)
    gtp_vit.patch(model, num_prop=1, num_neighbours=9)
    with pytest.raises(ValueError, match=r"num_neighbours must be in \[0, 9\)"):
        model(images(model, size=(48, 48)))


def test_dropout_switched_on_after_patching():
    model = gtp_vit.patch(build(), **OPTIONS)
    model.blocks[1].attn.attn_drop.p = 0.5
    with torch.no_grad():
        model(images(model))
    model.train()
    with pytest.raises(ValueError, match=r"attention dropout must be off; got attn_drop = 0.5 in block 1"):
        model(images(model))


def test_patch_dropout_switched_on_after_patching():
    model = gtp_vit.patch(build(), **OPTIONS).train()
    model.patch_drop = timm.layers.PatchDropout(0.5, num_prefix_tokens=1)
    with pytest.raises(ValueError, match="8 image tokens after the embedding are not the 4 x 4 patches"):
        model(images(model))


def test_blocks_changed_after_patching():
    model = gtp_vit.patch(build(), num_prop=(1, 1, 1))
    model.blocks = model.blocks[:2]
    with pytest.raises(ValueError, match="num_prop must have one value per block; got 3 for 2 blocks"):
        model(images(model))
