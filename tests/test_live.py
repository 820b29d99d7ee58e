"""Live edges: the walk on cases made by hand, every backend against the definition, and a patched model."""

import contextlib
import math

import pytest
import torch
from conftest import backend_params
from test_patch_timm import MODELS, OPTIONS, build, images, plain_attention

import gtp_kernels
import gtp_vit
from gtp_kernels import LiveGraph, LiveSelection, TokenGraph, backends, reference
from gtp_kernels.ops import _library
from gtp_kernels.reference import live as definition

DROPPED, STAYS = definition.DROPPED, definition.STAYS
# A test against the definition itself would find nothing in it.
KERNELS = pytest.mark.parametrize("backend", [name for name in backend_params() if name != "reference"], indirect=True)


def near(n, edges):
    matrix = [[-math.inf] * n for _ in range(n)]
    for a, b, weight in edges:
        matrix[a][b] = matrix[b][a] = weight
    return matrix


@pytest.mark.parametrize(
    ("scores", "edges", "num_prop", "expected"),
    [
        # The lowest goes to its most similar neighbour, which stays though it is next.
        ([0.1, 0.2, 0.3], [(0, 1, 0.9), (0, 2, 0.5), (1, 2, 0.5)], 1, [1, STAYS, STAYS]),
        ([0.1, 0.2, 0.3], [(0, 1, 0.9), (0, 2, 0.5), (1, 2, 0.5)], 2, [1, STAYS, 1]),
        # Of equal scores the higher index leaves; of equal targets the lower index takes it.
        ([0.1, 0.1, 0.5], [(0, 1, 0.5), (1, 2, 0.5), (0, 2, 0.5)], 1, [STAYS, 0, STAYS]),
        # A row all of whose neighbours have left stays for the walk, and is dropped where too few left.
        ([0.1, 0.2, 0.3, 0.4], [(0, 1, 0.9), (2, 3, 0.1)], 2, [1, STAYS, 3, STAYS]),
        ([0.3, 0.1, 0.2], [(1, 2, 0.9)], 2, [DROPPED, 2, STAYS]),
        # At most n - P targets: the second pair may not open another one.
        ([0.1, 0.2, 0.3, 0.4], [(0, 1, 0.9), (2, 3, 0.1)], 3, [1, STAYS, DROPPED, DROPPED]),
        # Then only an existing target takes a row: 2 is more like 3, and goes to 1.
        ([0.1, 0.5, 0.2, 0.4], [(0, 1, 0.9), (2, 3, 0.8), (1, 2, 0.1)], 3, [1, STAYS, 1, DROPPED]),
        # Nothing has an edge: the lowest are dropped, of equal ones the higher index first.
        ([math.inf, math.inf, math.inf], [], 2, [STAYS, DROPPED, DROPPED]),
        ([0.2], [], 0, [STAYS]),
    ],
)
def test_walk(scores, edges, num_prop, expected):
    assert definition.walk(scores, near(len(scores), edges), num_prop) == expected


def widest():
    """The widest type that the forced backend takes."""
    return torch.float32 if backends.forced() == "cuda" else torch.float64


def case(batch, heads, grid, d, channels, prefix, graph_type="Mixed", seed=0, dtype=None):
    dtype = dtype or widest()
    generator = torch.Generator().manual_seed(seed)
    n = grid[0] * grid[1]
    x = torch.randn(batch, prefix + n, channels, generator=generator, dtype=dtype)
    graph = gtp_kernels.build_graph(x, grid, graph_type, min(4, n - 1), prefix)
    k = torch.randn(batch, heads, prefix + n, d, generator=generator, dtype=dtype)
    return x, k, torch.rand(batch, n, generator=generator, dtype=dtype), graph


@pytest.mark.parametrize("graph_type", ["Spatial", "Semantic", "Mixed"])
@pytest.mark.parametrize("grid", [(1, 2), (3, 4), (7, 5)])
def test_graph_has_both_directions_once(backend, graph_type, grid):
    graph = case(2, 1, grid, 4, 8, 1, graph_type)[3]
    live = gtp_kernels.live_graph(graph)
    dense = graph.to_dense() != 0
    edges = dense | dense.transpose(1, 2)
    assert torch.equal(live.adjacency(grid[0] * grid[1]), edges)
    assert torch.equal(live.indptr[:, -1].long(), edges.sum((1, 2)))
    for image in range(2):
        for row in range(grid[0] * grid[1]):
            columns = live.indices[image, live.indptr[image, row] : live.indptr[image, row + 1]].tolist()
            assert columns == edges[image, row].nonzero().flatten().tolist()


@KERNELS
def test_small_tiles(backend):
    """Many blocks of rows, of edges, of targets and of channels, as large grids have them."""
    configs = pytest.importorskip("gtp_kernels.triton.configs")
    with contextlib.ExitStack() as stack:
        for choice, tile in {
            "live_keys": dict(elements=32, num_warps=1),
            "live_edges": dict(elements=32, num_warps=1),
            "live_scores": dict(rows=4, num_warps=1),
            "live_walk": dict(edges=2, rows=4, num_warps=1),
            "live_merge": dict(leaving=2, channels=16, num_warps=1),
            "long_row": dict(channels=16, num_warps=1),
        }.items():
            stack.enter_context(configs.override(choice, tile))
        blocks_against_the_definition("Spatial", 1, 1, (3, 4), 20, 5, (5,))


def assert_same_selection(found, expected):
    for name in ("index_kept", "index_prop", "target"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert torch.equal(found.live.rep, expected.live.rep)
    torch.testing.assert_close(found.share, expected.share, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.sizes, expected.sizes, rtol=1e-6, atol=0)


SHAPES = [
    # B, H, grid, d, R, P of one block after the other
    (2, 3, (4, 5), 16, 1, (3, 3, 3)),
    (1, 2, (14, 14), 64, 1, (8, 20, 90, 77)),
    (3, 1, (6, 6), 17, 0, (20, 10, 5)),
    (2, 2, (3, 3), 1, 5, (0, 8)),
    (1, 4, (2, 9), 80, 2, (9, 8)),
]


@pytest.mark.parametrize(
    ("graph_type", "batch", "heads", "grid", "d", "prefix", "props"),
    [
        *((kind, *shape) for kind in ("Spatial", "Semantic", "Mixed") for shape in SHAPES),
        ("Spatial", 1, 1, (1, 1), 8, 1, (0,)),
    ],
)
@KERNELS
def test_against_the_definition(backend, graph_type, batch, heads, grid, d, prefix, props):
    """Block after block, down to one token: no two scores are so close that rounding could swap them."""
    blocks_against_the_definition(graph_type, batch, heads, grid, d, prefix, props)


def blocks_against_the_definition(graph_type, batch, heads, grid, d, prefix, props):
    x, k, importance, graph = case(batch, heads, grid, d, 24, prefix, graph_type)
    live = gtp_kernels.live_graph(graph)
    sizes = torch.ones(x.shape[:2])
    for num_prop in props:
        n = importance.shape[1]
        found = gtp_kernels.live_select(k, importance, live, num_prop, sizes, num_prefix=prefix)
        expected = reference.live_select(k.double(), importance.double(), live, num_prop, sizes, num_prefix=prefix)
        assert_same_selection(found, expected)
        branch, weight = torch.randn_like(x), torch.randn(24, dtype=x.dtype)
        options = dict(layer_scale=weight, norm_weight=weight, norm_bias=weight, num_prefix=prefix)
        for norm in ("layer", "rms", "none"):
            options["norm_bias"] = None if norm == "rms" else weight
            merged = gtp_kernels.live_merge(x, branch, found, norm=norm, **options)
            torch.testing.assert_close(merged, reference.live_merge(x, branch, found, norm=norm, **options))
        x = merged[0]
        k = k[:, :, : prefix + n - num_prop] * 1.1 + 0.1 * torch.randn(batch, heads, 1, d, dtype=k.dtype)
        importance, live, sizes = torch.rand(batch, n - num_prop, dtype=x.dtype), found.live, found.sizes
        assert torch.all(sizes[:, prefix:].sum(1) <= grid[0] * grid[1] + 1e-4)


@pytest.mark.parametrize("size", [32, 41])
@pytest.mark.parametrize("contiguous", [True, False], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@KERNELS
def test_types_and_strides(backend, dtype, contiguous, size):
    """Keys of a qkv projection, in every type: as the same keys in float64 and contiguous; and with a row's elements
    apart."""
    x, k, importance, graph = case(2, 3, (8, 8), size, 24, 1)
    qkv = torch.stack((k, k, k)).permute(1, 3, 0, 2, 4).contiguous().to(dtype)
    strided = qkv.permute(2, 0, 3, 1, 4)[1]
    if not contiguous:
        strided = strided.mT.contiguous().mT
    sizes = torch.ones(2, 65)
    live = gtp_kernels.live_graph(graph)
    found = gtp_kernels.live_select(strided, importance.float(), live, 9, sizes)
    expected = reference.live_select(strided.double(), importance.float().double(), live, 9, sizes)
    assert_same_selection(found, expected)
    branch = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    out, normed = gtp_kernels.live_merge(x.to(dtype), branch, found)
    expected_out, expected_normed = reference.live_merge(x.to(dtype), branch, found)
    assert out.dtype == normed.dtype == dtype
    # x is rounded once, to either side of a tie; the norm, of values around one, reads it and is rounded too.
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(out, expected_out, rtol=tolerance, atol=1e-6)
    torch.testing.assert_close(normed, expected_normed, rtol=tolerance, atol=tolerance)


def test_exact_ties(backend):
    """All keys and importances equal: every score is equal, so the highest indices leave, into the lowest neighbour."""
    graph = case(1, 1, (4, 4), 4, 8, 0, "Spatial")[3]
    live = gtp_kernels.live_graph(graph)
    k = torch.zeros(1, 1, 16, 4, dtype=widest())
    k[..., 0] = 1
    found = gtp_kernels.live_select(k, torch.ones(1, 16), live, 3, torch.ones(1, 16), num_prefix=0)
    assert found.index_prop.tolist() == [[13, 14, 15]]
    assert found.target.tolist() == [[8, 9, 10]]  # 15 -> 10, 14 -> 9, 13 -> 8


@pytest.mark.parametrize("what", ["keys", "one key", "importance", "infinite importance", "infinite key", "zero key"])
@KERNELS
def test_what_is_no_number(backend, what):
    _, k, importance, graph = case(2, 2, (5, 5), 8, 16, 1)
    if what == "keys":
        k[:] = math.nan
    elif "key" in what:
        k[:, :, 7] = {"one key": math.nan, "infinite key": math.inf, "zero key": 0.0}[what]
    elif what == "importance":
        importance[:, 3] = math.nan
    else:
        importance[:, 3] = math.inf
    live = gtp_kernels.live_graph(graph)
    found = gtp_kernels.live_select(k, importance, live, 6, torch.ones(2, 26))
    assert_same_selection(found, reference.live_select(k, importance, live, 6, torch.ones(2, 26)))
    assert found.share.isfinite().all()


def test_scores_that_are_no_number_are_the_highest(backend):
    """A mean importance of 0, and cosines of 1: ∞ · 0. Rows 0 and 2 have it, 1 and 3 the least importance."""
    dense = torch.zeros(1, 4, 4)
    for i, j in ((0, 1), (2, 3)):
        dense[0, i, j] = dense[0, j, i] = 1
    live = gtp_kernels.live_graph(TokenGraph.from_dense(dense))
    k, importance = torch.ones(1, 1, 4, 1, dtype=widest()), torch.tensor([[1.0, -1.0, 1.0, -1.0]], dtype=widest())
    for num_prop in range(4):
        found = gtp_kernels.live_select(k, importance, live, num_prop, torch.ones(1, 4), num_prefix=0)
        assert_same_selection(
            found, reference.live_select(k, importance, live, num_prop, torch.ones(1, 4), num_prefix=0)
        )
        if num_prop == 2:
            assert found.index_prop.tolist() == [[1, 3]]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s: tuple(s), TypeError, "selection must be a LiveSelection; got tuple"),
        (lambda s: s._replace(index_kept=s.index_kept[:, 1:]), ValueError, "must divide the image tokens of x"),
        (lambda s: s._replace(index_prop=s.index_prop.int()), TypeError, "index_prop must be int64"),
        (lambda s: s._replace(index_prop=s.index_prop + 100), ValueError, r"index_prop must hold indices in \[1, 26\)"),
        (lambda s: s._replace(index_kept=s.index_kept - 1), ValueError, r"index_kept must hold indices in \[1, 26\)"),
        (lambda s: s._replace(target=s.target[:, 1:]), ValueError, "target"),
        (lambda s: s._replace(share=s.share[:, 1:]), ValueError, "share"),
    ],
)
def test_a_selection_that_is_none(backend, change, error, message):
    x, k, importance, graph = case(1, 2, (5, 5), 8, 16, 1)
    found = gtp_kernels.live_select(k, importance, gtp_kernels.live_graph(graph), 6, torch.ones(1, 26))
    with pytest.raises(error, match=message):
        gtp_kernels.live_merge(x, torch.zeros_like(x), change(found))


@pytest.mark.no_op_runs
def test_rows_that_are_not_there(backend):
    """Indices of a token where x holds prefix tokens alone."""
    none, one = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.int64)
    selection = LiveSelection(
        one, one, none, torch.ones(1, 0), torch.ones(1, 2), LiveGraph(one.int(), none.int(), none.int())
    )
    x = torch.ones(1, 1, 4)
    with pytest.raises(ValueError, match="must divide the image tokens of x"):
        gtp_kernels.live_merge(x, torch.zeros_like(x), selection)


def test_what_is_not_finite_stays_with_the_row_that_takes_it(backend):
    x, k, importance, graph = case(1, 2, (5, 5), 8, 16, 1)
    found = gtp_kernels.live_select(k, importance, gtp_kernels.live_graph(graph), 6, torch.ones(1, 26))
    x[0, found.index_prop[0, 2]] = math.nan
    out, _ = gtp_kernels.live_merge(x, torch.zeros_like(x), found)
    assert out.isnan().any(2).nonzero()[:, 1].tolist() == [1 + int(found.target[0, 2])]


def test_a_kept_row_has_the_edges_of_what_it_absorbed(backend):
    """A line 0 - 1 - 2 - 3: once 1 has gone into 0, 0 and 2 are neighbours."""
    dense = torch.zeros(1, 4, 4)
    for i in range(3):
        dense[0, i, i + 1] = dense[0, i + 1, i] = 1
    live = gtp_kernels.live_graph(TokenGraph.from_dense(dense))
    k = torch.tensor([[1.0, 0.0], [0.99, 0.1], [0.0, 1.0], [-0.5, 1.0]], dtype=widest())[None, None]
    importance = torch.tensor([[1.0, 1e-9, 1.0, 1.0]], dtype=widest())
    found = gtp_kernels.live_select(k, importance, live, 1, torch.ones(1, 4), num_prefix=0)
    assert found.index_prop.tolist() == [[1]]
    assert found.target.tolist() == [[0]]
    assert found.live.rep.tolist() == [[0, 0, 1, 2]]
    assert found.sizes.tolist() == [[2, 1, 1]]
    assert found.live.adjacency(3)[0].int().tolist() == [[0, 1, 0], [1, 0, 1], [0, 1, 0]]
    again = gtp_kernels.live_select(
        k[:, :, [0, 2, 3]],
        torch.tensor([[1.0, 1e-9, 1.0]], dtype=widest()),
        found.live,
        1,
        found.sizes,
        num_prefix=0,
    )
    assert again.live.rep.tolist() == [[0, 0, 1, 1]]


def test_merge_is_the_mean_by_sizes(backend):
    x, k, importance, graph = case(1, 2, (4, 4), 8, 16, 1)
    sizes = torch.arange(1.0, 18.0)[None]
    found = gtp_kernels.live_select(k, importance, gtp_kernels.live_graph(graph), 5, sizes)
    out, _ = gtp_kernels.live_merge(x, torch.zeros_like(x), found, norm="none")
    for place, row in enumerate(found.index_kept[0].tolist()):
        members = [row, *found.index_prop[0, found.target[0] == place].tolist()]
        weights = sizes[0, members].to(x.dtype)
        expected = (weights[:, None] * x[0, members]).sum(0) / weights.sum()
        torch.testing.assert_close(out[0, 1 + place], expected, rtol=1e-6, atol=1e-6)
        assert float(found.sizes[0, 1 + place]) == float(weights.sum())
    assert torch.equal(out[:, 0], x[:, 0])


def test_gradients(backend):
    x, k, importance, graph = case(2, 2, (3, 3), 8, 6, 1)
    found = gtp_kernels.live_select(k, importance, gtp_kernels.live_graph(graph), 4, torch.ones(2, 10))
    assert (found.target >= 0).any()
    tensors = [x, torch.randn_like(x), *(torch.randn(6, dtype=x.dtype) for _ in range(3))]
    tensors = [t.clone().requires_grad_() for t in tensors]

    def step(x, branch, scale, weight, bias):
        return gtp_kernels.live_merge(x, branch, found, layer_scale=scale, norm_weight=weight, norm_bias=bias)

    assert torch.autograd.gradcheck(step, tensors)


@KERNELS
def test_gradients_are_those_of_the_definition(backend):
    x, k, importance, graph = case(2, 2, (4, 4), 8, 40, 1)
    found = gtp_kernels.live_select(k, importance, gtp_kernels.live_graph(graph), 6, torch.ones(2, 17))
    tensors = [x, torch.randn_like(x), *(torch.randn(40, dtype=x.dtype) for _ in range(3))]
    upstream = torch.randn(2, 11, 40, dtype=x.dtype)
    with torch.enable_grad():
        gradients = []
        for merge in (gtp_kernels.live_merge, reference.live_merge):
            leaves = [t.clone().requires_grad_() for t in tensors]
            options = dict(zip(("layer_scale", "norm_weight", "norm_bias"), leaves[2:], strict=True))
            out, normed = merge(leaves[0], leaves[1], found, **options)
            gradients.append(torch.autograd.grad((out * upstream).sum() + normed.square().sum(), leaves))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@KERNELS
def test_operators(backend):
    x, k, importance, graph = case(2, 2, (3, 3), 8, 6, 1)
    live = gtp_kernels.live_graph(graph)
    ops = _library.operators(backend)
    torch.library.opcheck(ops.live_graph, (graph.indptr, graph.indices))
    sizes = torch.ones(2, 10)
    arguments = (k, importance, live.indptr, live.indices, live.rep, sizes, 4, 0.25, 1)
    torch.library.opcheck(ops.live_select, arguments)
    found = ops.live_select(*arguments)
    x, branch = x.requires_grad_(), torch.randn_like(x).requires_grad_()
    torch.library.opcheck(ops.live_merge, (x, branch, None, *found[:4], None, None, 1e-6, "layer", 1))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda live: LiveGraph(live.indptr, live.indices + 100, live.rep), "columns in"),
        (lambda live: LiveGraph(live.indptr.flip(1), live.indices, live.rep), "each row must be a range"),
        (lambda live: LiveGraph(live.indptr, live.indices, live.rep + 1), "rep must"),
    ],
)
@KERNELS
def test_a_graph_that_lies(backend, spoil, message):
    """A GPU does not look before it runs: there, what is out of range is no edge and no row."""
    _, k, importance, graph = case(2, 2, (3, 3), 8, 6, 1)
    live = spoil(gtp_kernels.live_graph(graph))
    if backend == "cpu":
        with pytest.raises(RuntimeError, match=message):
            gtp_kernels.live_select(k, importance, live, 4, torch.ones(2, 10))
        return
    found = gtp_kernels.live_select(k, importance, live, 4, torch.ones(2, 10))
    rows = torch.cat((found.index_kept, found.index_prop), 1).sort(1).values
    assert rows.tolist() == [list(range(1, 10))] * 2
    assert found.target.min() >= -1
    assert found.target.max() < 5
    assert found.live.rep.min() >= -1
    assert found.live.rep.max() < 5


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(num_prop=9), ValueError, "num_prop"),
        (dict(gamma=-1.0), ValueError, "gamma must be at least 0; got -1.0"),
        (dict(importance=torch.ones(1, 8)), ValueError, "importance"),
        (dict(sizes=torch.ones(1, 9)), ValueError, "sizes"),
        (dict(k=torch.ones(1, 10, 8)), ValueError, "k must"),
        (dict(live=None), TypeError, "live must be a LiveGraph; got NoneType"),
        (dict(num_prefix=11), ValueError, "num_prefix"),
    ],
)
def test_bad_arguments(change, error, message):
    _, k, importance, graph = case(1, 2, (3, 3), 8, 6, 1)
    arguments = dict(
        k=k, importance=importance, live=gtp_kernels.live_graph(graph), num_prop=2, sizes=torch.ones(1, 10)
    )
    with pytest.raises(error, match=message):
        gtp_kernels.live_select(**{**arguments, **change})
    with pytest.raises(TypeError, match="graph must be a TokenGraph"):
        gtp_kernels.live_graph(None)


LIVE = {**OPTIONS, "propagation": "LiveGraph"}


def of_models():
    """The type of a model that the forced backend runs whole: the attention of ``cuda`` takes half types."""
    return torch.bfloat16 if backends.forced() == "cuda" else torch.float64


def plain_features(model, x, config):
    """The features of an unpatched ``model`` with live edges, by the definition."""
    x = model.patch_embed(x)
    grid_size = x.shape[1:3] if x.ndim == 4 else model.patch_embed.grid_size
    x = model.norm_pre(model._pos_embed(x))
    prefix = model.num_prefix_tokens
    live = reference.live_graph(
        reference.build_graph(x, grid_size, config.graph_type, config.num_neighbours, prefix, config.semantics)
    )
    sizes = torch.ones(x.shape[:2])
    for block, num_prop in zip(model.blocks, config.schedule(len(model.blocks)), strict=True):
        y = block.norm1(x)
        branch, weights = plain_attention(block.attn, y, sizes if config.token_scale else None, config)
        attn = block.attn
        k = attn.k_norm(attn.qkv(y).unflatten(2, (3, attn.num_heads, attn.head_dim))[:, :, 1].transpose(1, 2))
        importance = reference.token_importance(
            reference.scores_of_map(weights), config.selection, prefix, config.semantics
        )
        found = reference.live_select(k, importance, live, num_prop, sizes, gamma=config.gamma, num_prefix=prefix)
        x, _ = reference.live_merge(x, block.ls1(branch), found, norm="none", num_prefix=prefix)
        live, sizes = found.live, found.sizes
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return model.norm(x)


@pytest.mark.parametrize(
    "options", [{}, dict(graph_type="Spatial", gamma=0.0), dict(token_scale=False), dict(sparsity=1)]
)
@pytest.mark.parametrize("key", ["vit", "dinov2 registers", "gap", "not square"])
def test_patched_model(backend, key, options):
    model = build(key)
    x = images(model)
    config = gtp_vit.GTPConfig(**{**LIVE, **options})
    with torch.no_grad():
        expected = plain_features(model, x, config)
        found = gtp_vit.patch(model, **{**LIVE, **options}).forward_features(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("key", ["vit", "dinov2 registers"])
@KERNELS
def test_low_precision_weights(backend, key, dtype):
    model = gtp_vit.patch(build(key, torch.float32), **LIVE | dict(sparsity=1.0))
    x = images(model)
    with torch.no_grad():
        with backends.record(), gtp_kernels.use_backend("reference"):
            expected = model(x)
        result = model.to(dtype)(x.to(dtype))
    assert result.dtype == dtype
    assert torch.nn.functional.cosine_similarity(result.float(), expected).min() > 0.98


def test_down_to_one_token(backend):
    model = gtp_vit.patch(build("vit", of_models()), num_prop=(5, 5, 5), propagation="LiveGraph", num_neighbours=3)
    with torch.no_grad():
        assert model.forward_features(images(model)).shape == (2, 2, 48)


def test_restored_grid_and_lineage(backend):
    """What left has the row that it was merged into; the lineage of a row is the mean of the patches in it."""
    model = gtp_vit.patch(build("vit", of_models()), **LIVE, restore=True)
    x = images(model)
    with gtp_vit.trace(model) as trace, torch.no_grad():
        features = model.forward_features(x)
    rep = torch.arange(16).expand(2, -1)
    for layer, entry in zip(trace.layers, trace._recorder.entries.values(), strict=True):
        place = torch.full((2, layer.index_kept.shape[1] + layer.index_prop.shape[1]), -1)
        place.scatter_(1, layer.index_prop - 1, entry.target)
        place.scatter_(1, layer.index_kept - 1, torch.arange(layer.index_kept.shape[1]).expand_as(layer.index_kept))
        rep = place.gather(1, rep)
    assert (rep >= 0).all()
    grid = gtp_vit.restore_grid(features, trace).flatten(1, 2)
    assert torch.equal(grid, features[:, 1:].gather(1, rep.unsqueeze(2).expand_as(grid)))
    members = torch.nn.functional.one_hot(rep, features.shape[1] - 1).transpose(1, 2).float()
    torch.testing.assert_close(trace.lineage(), members / members.sum(2, keepdim=True))
    with torch.no_grad():
        _, grids = model.forward_intermediates(x)
    assert grids[-1].shape == (2, 48, 4, 4)


@pytest.mark.parametrize("key", ["vit", "dinov2 registers"])
def test_gradients_of_a_model(backend, key):
    model = gtp_vit.patch(build(key), **LIVE)
    x = images(model).requires_grad_()
    model(x).square().sum().backward()
    found = x.grad.clone()
    with backends.record(), gtp_kernels.use_backend("reference"):
        x.grad = None
        model(x).square().sum().backward()
    torch.testing.assert_close(found, x.grad, rtol=1e-5, atol=1e-6)


@KERNELS
def test_compiles_without_a_break(backend):
    torch._dynamo.reset()
    model = gtp_vit.patch(build(dtype=of_models()), **LIVE)
    x = images(model)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)


def test_options():
    with pytest.raises(ValueError, match="graph_type must be one of .* where propagation is 'LiveGraph'"):
        gtp_vit.patch(build(), propagation="LiveGraph", graph_type="None")
    with pytest.raises(ValueError, match="gamma must be at least 0; got -0.5"):
        gtp_vit.patch(build(), gamma=-0.5)
    model = gtp_vit.patch(build(), num_prop=0, sparsity=1, propagation="LiveGraph")
    x = images(model)
    with torch.no_grad():
        found = model(x)
        assert torch.equal(found, gtp_vit.unpatch(model)(x))
    assert "vit" in MODELS
