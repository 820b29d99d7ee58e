"""GTPConfig: what it takes, what it refuses by name, and how many tokens it leaves."""

import dataclasses
import inspect
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import gtp_vit
from gtp_vit import GTPConfig


def test_defaults_are_those_of_patch():
    parameters = inspect.signature(gtp_vit.patch).parameters
    defaults = {name: p.default for name, p in parameters.items() if name != "model"}
    assert defaults == {field.name: field.default for field in dataclasses.fields(GTPConfig)}


def test_frozen_and_hashable():
    config = GTPConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_prop = 3
    assert hash(config) == hash(GTPConfig())


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, 3),
        (np.int64(3), 3),
        ([1, 2], (1, 2)),
        ((0, 0), (0, 0)),
        (np.array([1, 2]), (1, 2)),
        (torch.tensor([1, 2]), (1, 2)),
        (range(2), (0, 1)),
    ],
)
def test_num_prop_forms(value, expected):
    config = GTPConfig(num_prop=value)
    assert config.num_prop == expected
    assert config.schedule(2) == (expected if isinstance(expected, tuple) else (expected,) * 2)


def test_numbers_become_plain_floats():
    config = GTPConfig(sparsity=1, alpha=np.float32(0.5))
    assert (type(config.sparsity), type(config.alpha)) == (float, float)


def test_the_papers_name_of_a_selection():
    assert GTPConfig(selection="BroadAttnMean") == GTPConfig(selection="IMGAttnMean")
    assert GTPConfig(selection="BroadAttnMax").selection == "IMGAttnMax"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(num_prop=1.5), TypeError, "num_prop must be an int"),
        (dict(num_prop=True), TypeError, "num_prop must be an int"),
        (dict(num_prop="8"), TypeError, "num_prop must be an int"),
        (dict(num_prop=None), TypeError, "num_prop must be an int"),
        (dict(num_prop={1: 2}), TypeError, "num_prop must be an int"),
        (dict(num_prop=torch.tensor(3)), TypeError, "num_prop must be an int"),
        (dict(num_prop=-1), ValueError, "num_prop must be at least 0; got -1"),
        (dict(num_prop=[1, -2]), ValueError, r"num_prop\[1\] must be at least 0; got -2"),
        (dict(num_prop=[1, 2.0]), TypeError, r"num_prop\[1\] must be an int"),
        (dict(sparsity=0.0), ValueError, r"sparsity must be in \(0, 1\]; got 0.0"),
        (dict(sparsity=-0.5), ValueError, "sparsity"),
        (dict(sparsity=1.01), ValueError, "sparsity"),
        (dict(sparsity=float("nan")), ValueError, "sparsity"),
        (dict(sparsity="0.6"), TypeError, "sparsity"),
        (dict(sparsity=True), TypeError, "sparsity"),
        (dict(alpha=float("inf")), ValueError, "alpha must be finite"),
        (dict(alpha=float("nan")), ValueError, "alpha must be finite"),
        (dict(alpha=None), TypeError, "alpha must be a number"),
        (dict(selection="Mixed"), ValueError, "selection must be one of .*MixedAttnMax.*None; got 'Mixed'"),
        (dict(selection=None), TypeError, "selection must be a string"),
        (
            dict(propagation="DeadGraph"),
            ValueError,
            "propagation must be one of None, Mean, GraphProp, LiveGraph; got 'DeadGraph'",
        ),
        (dict(graph_type="Dense"), ValueError, "graph_type must be one of None, Spatial, Semantic, Mixed"),
        (dict(graph_type="None"), ValueError, "graph_type must be one of Spatial, Semantic, Mixed where propagation"),
        (dict(num_neighbours=-1), ValueError, "num_neighbours must be at least 0"),
        (dict(num_neighbours=2.0), TypeError, "num_neighbours must be an int"),
        (dict(token_scale=1), TypeError, "token_scale must be a bool"),
        (dict(semantics="authors"), ValueError, "semantics must be one of official, paper"),
        (dict(seed=-1), ValueError, "seed must be at least 0; got -1"),
        (dict(seed=2**31), ValueError, f"seed must be below {2**31}"),
        (dict(seed=1.0), TypeError, "seed must be an int; got float"),
        (dict(seed=True), TypeError, "seed must be an int; got bool"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        GTPConfig(**options)


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="delta"):
        gtp_vit.patch(torch.nn.Identity(), delta=0.25)


@pytest.mark.parametrize("propagation", ["None", "Mean"])
def test_no_graph_needed(propagation):
    config = GTPConfig(propagation=propagation, graph_type="None")
    assert not config.uses_graph(4)


def test_graph_is_needed_where_a_token_leaves():
    assert GTPConfig(num_prop=(0, 1)).uses_graph(2)
    assert not GTPConfig(num_prop=0).uses_graph(2)
    assert not GTPConfig(num_prop=3, selection="None").uses_graph(2)


def test_schedule_has_one_value_per_block():
    with pytest.raises(ValueError, match="num_prop must have one value per block; got 2 for 3 blocks"):
        GTPConfig(num_prop=(1, 2)).schedule(3)


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        (dict(num_prop=3), (16, 13, 10, 7)),
        (dict(num_prop=3, propagation="None"), (16, 13, 10, 7)),
        (dict(num_prop=3, propagation="Mean"), (16, 14, 12, 10)),
        (dict(num_prop=(0, 3, 0), propagation="Mean"), (16, 16, 14, 14)),
        (dict(num_prop=3, selection="None"), (16, 16, 16, 16)),
    ],
)
def test_token_counts(options, counts):
    assert GTPConfig(**options).token_counts(16, 3) == counts


@pytest.mark.parametrize("propagation", ["GraphProp", "Mean", "None"])
@pytest.mark.parametrize("depth", [1, 2, 3, 12])
@pytest.mark.parametrize("num_tokens", [1, 2, 5, 16, 63])
def test_largest_num_prop_is_the_largest(propagation, depth, num_tokens):
    largest = GTPConfig(propagation=propagation).largest_num_prop(num_tokens, depth)
    assert min(GTPConfig(num_prop=largest, propagation=propagation).token_counts(num_tokens, depth)) >= 1
    with pytest.raises(ValueError, match=f"largest constant num_prop .* is {largest}$"):
        GTPConfig(num_prop=largest + 1, propagation=propagation).token_counts(num_tokens, depth)


def test_a_token_too_few_names_the_block():
    with pytest.raises(ValueError, match=r"num_prop = 6 does not fit block 1: 6 of 12 image tokens are left"):
        GTPConfig(num_prop=(6, 6)).token_counts(12, 2)


def test_neighbours_must_be_fewer_than_tokens():
    with pytest.raises(ValueError, match=r"num_neighbours must be in \[0, 8\) for 8 image tokens; got 8"):
        GTPConfig(num_prop=1).check_fit(8, 2)
    GTPConfig(num_prop=1, graph_type="Spatial").check_fit(8, 2)
    GTPConfig(num_prop=0).check_fit(8, 2)
    GTPConfig(num_prop=1, num_neighbours=7).check_fit(8, 2)


def test_import_needs_no_model_library():
    code = (
        "import sys, gtp_vit; print(sorted({'timm', 'transformers', 'torchvision', 'onnx', 'PIL'} & set(sys.modules)))"
    )
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_public_names():
    assert set(gtp_vit.__all__) >= {"GTPConfig", "gmacs", "patch", "schedule", "trace", "unpatch"}
    for name in gtp_vit.__all__:
        assert hasattr(gtp_vit, name)
