"""gtp_vit.patch on timm's Eva: EVA, EVA-02, DINOv3 and other models with rotary position embedding."""

import copy
import pickle

import pytest
import timm
import timm.models.eva as timm_eva
import torch
from test_patch_timm import assert_same, assert_unchanged, images, snapshot
from timm.layers import apply_rot_embed_cat

import gtp_vit
from gtp_kernels import reference
from gtp_vit import GTPConfig

SMALL = dict(embed_dim=48, num_heads=3, depth=3)
MODELS = {
    "eva": ("eva_giant_patch14_224", dict(SMALL, img_size=70), 1),
    "eva 02": ("eva02_tiny_patch14_224", dict(SMALL, img_size=70), 1),
    "eva 02 separate projections": ("eva02_base_patch14_224", dict(SMALL, img_size=70), 1),
    "eva clip, post-norm": ("eva02_enormous_patch14_clip_224", dict(SMALL, img_size=70), 1),
    "dinov3": ("vit_small_patch16_dinov3", dict(SMALL, img_size=64), 5),
    "dinov3 with bias": ("vit_small_patch16_dinov3_qkvb", dict(SMALL, img_size=64), 5),
    "dinov3 plus": ("vit_small_plus_patch16_dinov3", dict(SMALL, img_size=64), 5),
    "rope, registers, no class token": ("vit_medium_patch16_rope_reg1_gap_256", dict(SMALL, img_size=64), 1),
    "rope of each block": ("vit_small_patch16_rope_mixed_224", dict(SMALL, img_size=64), 1),
    "perception encoder": ("vit_pe_core_base_patch16_224", dict(SMALL, img_size=64), 1),
    "not square": ("vit_small_patch16_rope_224", dict(SMALL, img_size=(48, 80)), 1),
    "dynamic size": ("vit_small_patch16_dinov3", dict(SMALL, img_size=64, dynamic_img_size=True), 5),
}
if hasattr(timm.models.eva, "vit_base_patch16_sapiens2"):
    # Grouped queries, q and k norms, layer scale on the attention alone.
    MODELS["grouped queries"] = (
        "vit_base_patch16_sapiens2",
        dict(SMALL, num_heads=4, num_kv_heads=2, img_size=64),
        None,
    )
OPTIONS = dict(num_prop=2, sparsity=0.6, num_neighbours=3)


def build(key="dinov3", dtype=torch.float64, seed=0, **changes):
    """A small model with random weights that let every part matter, the same on every device, in evaluation mode."""
    name, options, _ = MODELS[key]
    torch.manual_seed(seed)
    with torch.device("cpu"), torch.no_grad():
        model = timm.create_model(name, pretrained=False, **dict(options, num_classes=10, **changes))
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model.to(torch.get_default_device(), dtype).eval()


def plain_attention(attn, x, rope, scales, config):
    """timm's attention with a thresholded map, and that map; ``rope`` [B, 1 or H, n, D], of the rows of x."""
    batch, num_tokens, _ = x.shape
    heads = attn.num_heads
    if attn.qkv is None:
        q, k, v = attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)
    else:
        qkv = attn.qkv(x)
        if getattr(attn, "q_bias", None) is not None:
            qkv = qkv + torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        q, k, v = qkv.chunk(3, 2)
    size = q.shape[2] // heads
    q, k, v = (t.reshape(batch, num_tokens, t.shape[2] // size, size).transpose(1, 2) for t in (q, k, v))
    q, k = attn.q_norm(q), attn.k_norm(k)
    if rope is not None:
        prefix, half = attn.num_prefix_tokens, attn.rotate_half
        q, k = (
            torch.cat((t[:, :, :prefix], apply_rot_embed_cat(t[:, :, prefix:], rope, half=half)), 2) for t in (q, k)
        )
    k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (k, v))
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
    x, rope = model._pos_embed(x)
    x = model.norm_pre(x)
    prefix, (batch, num_tokens, _) = model.num_prefix_tokens, x.shape
    token = torch.arange(num_tokens - prefix, device=x.device).repeat(batch, 1)
    graph = None
    if config.propagation == "GraphProp":
        graph = reference.build_graph(
            x, grid_size, config.graph_type, config.num_neighbours, prefix, config.semantics
        ).to_dense()
    scales = torch.ones(x.shape[:2], device=x.device) if config.token_scale else None
    for index, (block, num_prop) in enumerate(zip(model.blocks, config.schedule(len(model.blocks)), strict=True)):
        post_norm = isinstance(block, timm_eva.EvaBlockPostNorm)
        here = None
        if rope is not None:
            own = rope[index] if rope.ndim == 4 else rope
            own = own.expand(1, -1, -1) if own.ndim == 2 else own
            here = torch.stack([own[:, rows] for rows in token])  # [B, 1 or H, rows, D]
        branch, weights = plain_attention(block.attn, x if post_norm else block.norm1(x), here, scales, config)
        if post_norm:
            branch = block.norm1(branch)
        elif block.gamma_1 is not None:
            branch = block.gamma_1 * branch
        x = x + block.drop_path1(branch)
        if num_prop:
            index_kept, index_prop = reference.select(
                weights.detach(), config.selection, num_prop, num_prefix=prefix, semantics=config.semantics
            )
            # In grid order, as importances that tie (at zero, below the threshold) are judged by the current order.
            index_kept = index_kept.sort(1).values
            if rope is not None:
                token = token.gather(1, index_kept - prefix)
            x, graph, scales = reference.propagate(
                x, graph, index_kept, index_prop, config.propagation, config.alpha, scales, num_prefix=prefix
            )
        branch = block.norm2(block.mlp(x)) if post_norm else block.mlp(block.norm2(x))
        if not post_norm and block.gamma_2 is not None:
            branch = block.gamma_2 * branch
        x = x + block.drop_path2(branch)
    return model.norm(x)


@pytest.mark.parametrize("key", MODELS)
def test_against_plain_forward(backend, key):
    model = build(key)
    assert MODELS[key][2] in (None, model.num_prefix_tokens)
    x, config = images(model), GTPConfig(**OPTIONS)
    with torch.no_grad():
        expected = model.forward_head(plain_features(model, x, config))
        unpatched = model(x)
        gtp_vit.patch(model, **OPTIONS)
        features, result = model.forward_features(x), model(x)
    assert features.shape[1] == model.num_prefix_tokens + model.patch_embed.num_patches - 2 * len(model.blocks)
    assert_same(result, expected)
    assert (result - unpatched).abs().max() > 1e-3


def test_the_plain_forward_is_timm():
    for key in MODELS:
        model = build(key)
        x, config = images(model), GTPConfig(num_prop=0, sparsity=1.0)
        with torch.no_grad():
            assert_same(model.forward_head(plain_features(model, x, config)), model(x), 1e-6)


@pytest.mark.parametrize(
    "options",
    [
        dict(semantics="paper"),
        dict(token_scale=False),
        dict(sparsity=1.0),
        dict(propagation="None"),
        dict(propagation="None", graph_type="None", token_scale=False, sparsity=1.0, num_prop=(3, 0, 2)),
        dict(graph_type="Spatial"),
        dict(num_prop=(3, 0, 2)),
        dict(num_prop=0),
        dict(num_prop=(0, 4, 0), sparsity=1.0),
        dict(selection="CLSAttnMax"),
    ],
    ids=str,
)
@pytest.mark.parametrize("key", ["dinov3", "rope of each block"])
def test_options_against_plain_forward(backend, key, options):
    model = build(key)
    options = OPTIONS | options
    x, config = images(model), GTPConfig(**options)
    with torch.no_grad():
        expected = model.forward_head(plain_features(model, x, config))
        assert_same(gtp_vit.patch(model, **options)(x), expected)


def test_positions_matter(monkeypatch):
    """Turned by the positions of the rows that are left instead of their own, the result is another one."""
    model = gtp_vit.patch(build(), **OPTIONS)
    x = images(model)
    with torch.no_grad():
        result = model(x)
        monkeypatch.setattr(
            gtp_vit.block.Rotary, "kept", lambda self, index: self._replace(embed=self.embed[: index.shape[1]])
        )
        assert (model(x) - result).abs().max() > 1e-3


@pytest.mark.parametrize("size", [(64, 64), (48, 96), (80, 64)])
def test_dynamic_sizes(backend, size):
    model = build("dynamic size")
    x, config = images(model, size=size), GTPConfig(**OPTIONS)
    with torch.no_grad():
        expected = model.forward_head(plain_features(model, x, config))
        with gtp_vit.trace(gtp_vit.patch(model, **OPTIONS)) as trace:
            assert_same(model(x), expected)
    assert trace.grid_size == (size[0] // 16, size[1] // 16)


@pytest.mark.parametrize("key", MODELS)
def test_nothing_propagated_is_the_unpatched_model(key):
    model = build(key, dtype=torch.float32)
    x = images(model)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(gtp_vit.patch(model, num_prop=0, sparsity=1.0)(x), expected)
        gtp_vit.unpatch(model)
        assert torch.equal(gtp_vit.patch(model, num_prop=2, sparsity=1.0, selection="None")(x), expected)


@pytest.mark.parametrize("key", MODELS)
def test_unpatch_is_bit_for_bit(key):
    model = build(key, dtype=torch.float32)
    x = images(model)
    with torch.no_grad():
        before, expected = snapshot(model), model(x)
        gtp_vit.patch(model, **OPTIONS)
        assert isinstance(model, timm_eva.Eva)
        assert list(model.state_dict()) == list(before[2])
        model(x)
        assert gtp_vit.unpatch(model) is model
        assert_unchanged(model, before)
        assert torch.equal(model(x), expected)


def test_copies_pickles_and_state(backend):
    model = gtp_vit.patch(build(), **OPTIONS)
    x = images(model)
    with torch.no_grad():
        expected = model(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(other) is type(model)
            assert other.gtp == model.gtp
            assert torch.equal(other(x), expected)
            assert type(gtp_vit.unpatch(other)) is timm_eva.Eva
        another = gtp_vit.patch(build(seed=3), **OPTIONS)
        another.load_state_dict(model.state_dict())
        assert torch.equal(another(x), expected)
    with pytest.raises(ValueError, match="patched already"):
        gtp_vit.patch(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("key", ["dinov3", "eva 02", "eva clip, post-norm"])
def test_low_precision_weights(backend, key, dtype):
    model = build(key, dtype=torch.float32)
    x, options = images(model), OPTIONS | dict(sparsity=1.0)
    with torch.no_grad():
        expected = gtp_vit.patch(model, **options)(x)
        result = model.to(dtype)(x.to(dtype))
    assert result.dtype == dtype
    assert torch.nn.functional.cosine_similarity(result.float(), expected).min() > 0.98


def test_autocast(backend):
    model = build(dtype=torch.float32)
    x, options = images(model), OPTIONS | dict(sparsity=1.0)
    with torch.no_grad():
        with torch.autocast(x.device.type, torch.bfloat16):
            unpatched = model.forward_features(x)
        expected = gtp_vit.patch(model, **options)(x)
        with torch.autocast(x.device.type, torch.bfloat16):
            features, result = model.forward_features(x), model(x)
    assert features.dtype == unpatched.dtype
    assert torch.nn.functional.cosine_similarity(result.float(), expected).min() > 0.98


@pytest.mark.parametrize("key", ["dinov3", "eva 02 separate projections", "rope of each block", "eva clip, post-norm"])
def test_gradients(backend, key):
    model = build(key)
    x, config = images(model), GTPConfig(**OPTIONS)
    target = torch.randn(2, 10, dtype=torch.float64)
    (model.forward_head(plain_features(model, x, config)) * target).sum().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    (gtp_vit.patch(model, **OPTIONS)(x) * target).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (expected[name] is None), name
        if parameter.grad is not None:
            assert_same(parameter.grad, expected[name])


def test_gradient_checkpointing_and_dropout(backend):
    model = gtp_vit.patch(build(drop_path_rate=0.3, proj_drop_rate=0.2).train(), **OPTIONS)
    x = images(model)
    torch.manual_seed(5)
    model(x).square().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    model.set_grad_checkpointing()
    torch.manual_seed(5)
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert_same(parameter.grad, expected[name], 1e-10)


@pytest.mark.parametrize("key", ["dinov3", "rope of each block"])
def test_compile_full_graph(backend, key):
    model = gtp_vit.patch(build(key, dtype=torch.float32, depth=2), **OPTIONS | dict(sparsity=1.0))
    x = images(model)
    torch._dynamo.reset()
    with torch.no_grad():
        assert_same(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x), 1e-4)


def test_trace_changes_no_bit(backend):
    model = gtp_vit.patch(build(), **OPTIONS | dict(num_prop=(2, 0, 3)))
    x = images(model)
    with torch.no_grad():
        result = model(x)
        with gtp_vit.trace(model) as trace:
            assert torch.equal(model(x), result)
    assert trace.num_prefix == 5
    assert [layer.index_prop.shape[1] for layer in trace.layers] == [2, 0, 3]


class OwnFeatures(timm_eva.Eva):
    def forward_features(self, x, attn_mask=None, is_causal=False):
        return super().forward_features(x) * 2


def with_another_block():
    model = build()
    model.blocks[1] = timm.models.vision_transformer.Block(48, 3)
    return model


def with_another_attention():
    model = build()
    model.blocks[1].attn = timm.layers.Attention(48, 3)
    return model


REFUSED = {
    "mean": (
        build,
        dict(propagation="Mean"),
        ValueError,
        "propagation = 'Mean' makes tokens that have no position.*Eva",
    ),
    "own forward_features": (
        lambda: OwnFeatures(img_size=64, **SMALL),
        {},
        TypeError,
        "OwnFeatures is not supported.*overrides forward_features; subclasses of Eva may",
    ),
    "another block": (
        with_another_block,
        {},
        TypeError,
        "block 1 is Block; supported are EvaBlock and EvaBlockPostNorm",
    ),
    "another attention": (
        with_another_attention,
        {},
        TypeError,
        r"block 1 \(EvaBlock\) has Attention; supported: EvaAttention and AttentionRope of timm",
    ),
    "patch dropout": (lambda: build(patch_drop_rate=0.25), {}, ValueError, "got patch_drop_rate = 0.25"),
    "attention dropout": (lambda: build(attn_drop_rate=0.1), {}, ValueError, "got attn_drop = 0.1 in block 0"),
    "too many": (build, dict(num_prop=6), ValueError, "num_prop that fits 16 image tokens and 3 blocks is 5"),
    "class token": (
        lambda: build("rope, registers, no class token"),
        dict(num_prop=1, selection="CLSAttnMax"),
        ValueError,
        "'CLSAttnMax' .*class token",
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


def test_mean_where_nothing_is_rotated(backend):
    model = build("eva")
    x, options = images(model), OPTIONS | dict(propagation="Mean")
    with torch.no_grad():
        expected = model.forward_head(plain_features(model, x, GTPConfig(**options)))
        assert_same(gtp_vit.patch(model, **options)(x), expected)


def test_masks():
    model = gtp_vit.patch(build(), **OPTIONS)
    with pytest.raises(ValueError, match="attn_mask must be None"):
        model(images(model), attn_mask=torch.zeros(21, 21))
