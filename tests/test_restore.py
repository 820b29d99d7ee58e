"""The full grid from what remains, and the features of inner blocks: against a loop over tokens."""

import pytest
import torch
from test_patch_timm import MODELS, OPTIONS, build, images

import gtp_vit
from gtp_vit import restore

KEYS = ["vit", "dinov2 registers", "gap", "not square"]


def traced(model, x):
    with gtp_vit.trace(model) as trace, torch.no_grad():
        return model.forward_features(x), trace


def restored_by_hand(rows, trace):
    """[B, n, C] row by row: what stayed is itself, what left is the weighted mean of the neighbours it went to."""
    standard = trace._recorder.config.propagation
    dense = trace._recorder.graph.to_dense() if standard == "GraphProp" else None
    width = trace.grid_size[1]
    images = []
    for image, x in enumerate(rows):
        after = list(x)
        for layer in reversed(trace.layers):
            kept = (layer.index_kept[image] - trace.num_prefix).tolist()
            prop = (layer.index_prop[image] - trace.num_prefix).tolist()
            kept_tokens, prop_tokens = layer.kept_tokens[image].tolist(), layer.prop_tokens[image].tolist()
            before = dict(zip(kept, after[: len(kept)], strict=True))
            for row, j in zip(prop, prop_tokens, strict=True):
                if standard == "Mean":
                    before[row] = after[-1]
                    continue
                weights = torch.tensor([0.0 if dense is None else float(dense[image, i, j]) for i in kept_tokens])
                if weights.sum() > 0:
                    before[row] = sum(w * y for w, y in zip(weights, after, strict=True)) / weights.sum()
                else:
                    distance = [(i // width - j // width) ** 2 + (i % width - j % width) ** 2 for i in kept_tokens]
                    before[row] = after[distance.index(min(distance))]
            after = [before[row] for row in range(len(before))]
        images.append(torch.stack(after))
    return torch.stack(images)


@pytest.mark.parametrize("propagation", ["GraphProp", "Mean", "None"])
@pytest.mark.parametrize("key", KEYS)
def test_against_a_loop(key, propagation):
    model = gtp_vit.patch(build(key), **OPTIONS, propagation=propagation)
    features, trace = traced(model, images(model))
    grid = gtp_vit.restore_grid(features, trace)
    assert grid.shape == (2, *trace.grid_size, 48)
    assert grid.dtype == features.dtype
    expected = restored_by_hand(features[:, trace.num_prefix :], trace)
    torch.testing.assert_close(grid.flatten(1, 2), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gtp_vit.restore_grid(features[:, trace.num_prefix :], trace), grid, rtol=0, atol=0)


def test_what_stayed_is_given_back_as_it_is():
    model = gtp_vit.patch(build("vit"), **OPTIONS)
    features, trace = traced(model, images(model))
    grid = gtp_vit.restore_grid(features, trace).flatten(1, 2)
    kept = trace.layers[-1].kept_tokens
    assert torch.equal(grid.gather(1, kept.unsqueeze(-1).expand(-1, -1, 48)), features[:, 1:])


def test_a_token_whose_neighbours_all_left_comes_from_the_nearest_one_that_stayed():
    """15 of 16 tokens leave a spatial graph: those that are not next to the last one have nowhere to go."""
    model = gtp_vit.patch(build("vit"), num_prop=(15, 0, 0), graph_type="Spatial")
    features, trace = traced(model, images(model))
    grid = gtp_vit.restore_grid(features, trace)
    assert torch.equal(grid, features[:, None, 1:].expand_as(grid))


def test_alpha_has_no_part_in_it():
    model = build("vit")
    found = []
    for alpha in (0.0, 0.7):
        gtp_vit.patch(model, num_prop=(3, 0, 0), num_neighbours=3, alpha=alpha)
        features, trace = traced(model, images(model))
        found.append(gtp_vit.restore_grid(torch.ones_like(features).cumsum(1), trace))
        gtp_vit.unpatch(model)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(norm=True),
        dict(return_prefix_tokens=True),
        dict(output_dict=True),
        dict(indices=[0, 2], intermediates_only=True),
        dict(indices=2, stop_early=True),
        dict(output_fmt="NLC"),
        dict(output_dict=True, return_prefix_tokens=True, intermediates_only=True),
    ],
)
@pytest.mark.parametrize("key", KEYS)
def test_without_propagation_intermediates_are_those_of_timm(key, options):
    model = build(key)
    x = images(model)
    with torch.no_grad():
        expected = model.forward_intermediates(x, **options)
        gtp_vit.patch(model, num_prop=0, sparsity=1, restore=True)
        found = model.forward_intermediates(x, **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("propagation", ["GraphProp", "Mean", "None"])
@pytest.mark.parametrize("key", KEYS)
def test_intermediates(key, propagation):
    """With restore what restore_grid makes of the rows without; those are the rows that the trace names."""
    reduced = gtp_vit.patch(build(key), **OPTIONS, propagation=propagation)
    full = gtp_vit.patch(build(key), **OPTIONS, propagation=propagation, restore=True)
    x, prefix = images(reduced), MODELS[key][2]
    with torch.no_grad():
        features, pairs = reduced.forward_intermediates(x, output_fmt="NLC", return_prefix_tokens=True)
        whole, grids = full.forward_intermediates(x, return_prefix_tokens=True)
    expected, trace = traced(reduced, x)
    assert torch.equal(features, expected)
    assert whole.shape[1] == prefix + trace.grid_size[0] * trace.grid_size[1]
    torch.testing.assert_close(whole[:, prefix:].unflatten(1, trace.grid_size), gtp_vit.restore_grid(features, trace))
    for block, (pair, grid) in enumerate(zip(pairs, grids, strict=True)):
        rows, grid_prefix = (pair[0], grid[1]) if prefix else (pair, None)
        grid = grid[0] if prefix else grid
        torch.testing.assert_close(grid.permute(0, 2, 3, 1), gtp_vit.restore_grid(rows, trace, after=block))
        mean = int(propagation == "Mean" and block < len(trace.layers))
        assert rows.shape[1] == trace.layers[block].kept_tokens.shape[1] + mean
        if prefix:
            assert torch.equal(pair[1], grid_prefix)


def test_the_head_sees_the_same_with_and_without_restore(backend):
    x = images(build())
    with torch.no_grad():
        reduced = gtp_vit.patch(build(), **OPTIONS)(x)
        full = gtp_vit.patch(build(), **OPTIONS, restore=True)(x)
    assert torch.equal(reduced, full)


def test_get_intermediate_layers():
    model = gtp_vit.patch(build("dinov2 registers"), **OPTIONS, restore=True)
    x = images(model)
    with torch.no_grad():
        expected = model.forward_intermediates(x, 2, norm=True, return_prefix_tokens=True, intermediates_only=True)
        found = model.get_intermediate_layers(x, 2, reshape=True, norm=True, return_prefix_tokens=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_grid_needs_restore():
    model = gtp_vit.patch(build(), **OPTIONS)
    with pytest.raises(ValueError, match=r"output_fmt must be 'NLC' here.*patch with restore=True"):
        model.forward_intermediates(images(model))
    with pytest.raises(ValueError, match=r"output_fmt must be 'NLC' here"):
        model.get_intermediate_layers(images(model), reshape=True)
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW' or 'NLC'; got 'NHWC'"):
        model.forward_intermediates(images(model), output_fmt="NHWC")


def test_stopping_early_runs_no_further_block():
    model = gtp_vit.patch(build(), **OPTIONS, restore=True)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        features, grids = model.forward_intermediates(images(model), [1], stop_early=True)
    assert len(seen) == 2
    assert len(grids) == 1
    assert features.shape == (2, 17, 48)


def test_gradients_reach_the_images():
    model = gtp_vit.patch(build(), **OPTIONS, restore=True)
    x = images(model).requires_grad_()
    _, grids = model.forward_intermediates(x)
    sum(grid.square().sum() for grid in grids).backward()
    assert x.grad.abs().sum() > 0


def test_compiles_without_a_break():
    torch._dynamo.reset()
    model = gtp_vit.patch(build(), **OPTIONS, restore=True)
    x = images(model)
    with torch.no_grad():
        expected = model.forward_intermediates(x)
        compiled = torch.compile(model.forward_intermediates, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)


def test_a_trace_of_a_restoring_model_has_the_importance():
    model = gtp_vit.patch(build(), **OPTIONS, restore=True)
    _, trace = traced(model, images(model))
    assert all(layer.importance is not None for layer in trace.layers)


def test_half_types_keep_their_type():
    model = gtp_vit.patch(build(dtype=torch.bfloat16), **OPTIONS)
    features, trace = traced(model, images(model))
    assert gtp_vit.restore_grid(features, trace).dtype == torch.bfloat16


def test_bad_arguments():
    model = gtp_vit.patch(build(), **OPTIONS)
    with gtp_vit.trace(model) as nothing:
        pass
    with pytest.raises(RuntimeError, match="no forward was recorded"):
        gtp_vit.restore_grid(torch.zeros(2, 10, 48), nothing)
    features, trace = traced(model, images(model))
    with pytest.raises(
        ValueError, match=r"tokens must be \[2, 10, C\], or \[2, 11, C\] with prefix rows: what block 2"
    ):
        gtp_vit.restore_grid(features[:, 2:], trace)
    with pytest.raises(ValueError, match=r"tokens must be \[2, 14, C\].*what block 0 left"):
        gtp_vit.restore_grid(features, trace, after=0)
    with pytest.raises(ValueError, match="after must be a recorded block, 0 to 2; got 3"):
        gtp_vit.restore_grid(features, trace, after=3)
    with pytest.raises(TypeError, match="tokens must be a floating-point tensor"):
        gtp_vit.restore_grid(features.long(), trace)
    with pytest.raises(TypeError, match="restore must be a bool; got int"):
        gtp_vit.patch(build(), restore=1)
    assert restore.restore_grid is gtp_vit.restore_grid
