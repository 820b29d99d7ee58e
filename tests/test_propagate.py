"""propagate and residual_propagate_norm on every backend against the definition."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import backend_params
from hypothesis import given
from hypothesis import strategies as st
from tolerances import close
from torch import Tensor

import gtp_kernels
from gtp_kernels import TokenGraph, backends, checks, reference
from gtp_kernels.ops import _library

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
GRIDS = {
    1: (1, 1),
    9: (3, 3),
    16: (4, 4),
    35: (5, 7),
    62: (2, 31),
    100: (10, 10),
    196: (14, 14),
    256: (16, 16),
    784: (28, 28),
}
# Those whose operators are registered with torch; the definition is not.
OPERATOR_BACKENDS = [name for name in backend_params() if name != "reference"]


def case(
    n: int = 35, num_prop: int = 8, num_prefix: int = 1, batch: int = 2, channels: int = 24, seed: int = 0
) -> tuple[Tensor, TokenGraph, Tensor, Tensor, Tensor]:
    """x [B,R+n,C] float64, its Mixed graph, kept, prop in an arbitrary order, scales float32."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, num_prefix + n, channels, generator=generator, dtype=torch.float64)
    graph = reference.build_graph(x.float(), GRIDS[n], "Mixed", min(5, n - 1), num_prefix)
    order = torch.rand(batch, n, generator=generator).argsort(1) + num_prefix
    scales = 0.5 + torch.rand(batch, num_prefix + n, generator=generator)
    return x, graph, order[:, : n - num_prop].contiguous(), order[:, n - num_prop :].contiguous(), scales


def fast(backend: str) -> bool:
    """Whether a gradient check compares random projections of the Jacobians: the interpreter is slow."""
    return backend == "triton"


def check_step(
    x: Tensor,
    weight: Tensor | TokenGraph,
    kept: Tensor,
    prop: Tensor,
    standard: str,
    alpha: float,
    scales: Tensor | None,
    num_prefix: int,
) -> tuple[Tensor, Tensor | TokenGraph, Tensor | None]:
    ours = gtp_kernels.propagate(x, weight, kept, prop, standard, alpha, scales, num_prefix=num_prefix)
    wide = weight if isinstance(weight, TokenGraph) else weight.double()
    theirs = reference.propagate(x.double(), wide, kept, prop, standard, alpha, scales, num_prefix=num_prefix)
    close(ours[0], theirs[0].to(x.dtype))
    if isinstance(weight, TokenGraph):
        assert isinstance(ours[1], TokenGraph)
        assert torch.equal(ours[1].token, theirs[1].token)
    else:
        close(ours[1], theirs[1].to(weight.dtype))
    if scales is None:
        assert ours[2] is None
    else:
        close(ours[2], theirs[2].to(scales.dtype))
    return ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("standard", checks.PROPAGATIONS)
@pytest.mark.parametrize("dense", [False, True])
def test_matches_definition(backend: str, dtype: torch.dtype, standard: str, dense: bool) -> None:
    for num_prefix in (0, 1, 5):
        x, graph, kept, prop, scales = case(num_prefix=num_prefix)
        weight = graph.to_dense() if dense else graph
        check_step(x.to(dtype), weight, kept, prop, standard, 0.2, scales, num_prefix)
        check_step(x.to(dtype), weight, kept, prop, standard, 0.2, None, num_prefix)


@pytest.mark.parametrize("num_prop", [0, 1, 34])
@pytest.mark.parametrize("standard", checks.PROPAGATIONS)
def test_numbers_of_propagated_tokens(backend: str, num_prop: int, standard: str) -> None:
    x, graph, kept, prop, scales = case(num_prop=num_prop)
    out, _, scales_out = check_step(x.float(), graph, kept, prop, standard, 0.5, scales, 1)
    assert out.shape[1] == 36 - num_prop + (standard == "Mean" and num_prop > 0)
    if num_prop == 0:
        close(out[:, 1:], x.float().gather(1, kept.unsqueeze(-1).expand(-1, -1, 24)))
    if standard == "Mean":
        assert scales_out is not None
        close(scales_out.sum(1), scales.sum(1))


@pytest.mark.parametrize(
    ("n", "num_prop", "dtype"),
    [
        (1, 0, torch.float32),
        (16, 1, torch.bfloat16),
        (16, 15, torch.float32),
        (62, 31, torch.float16),
        (62, 61, torch.bfloat16),
        (196, 40, torch.bfloat16),
        (196, 195, torch.float32),
        (256, 8, torch.bfloat16),
        (784, 1, torch.float32),
        (784, 700, torch.bfloat16),
    ],
)
def test_every_size(backend: str, n: int, num_prop: int, dtype: torch.dtype) -> None:
    x, graph, kept, prop, scales = case(n, num_prop, batch=2 if n < 196 else 1, channels=8)
    x = x.to(dtype)
    check_step(x, graph, kept, prop, "GraphProp", 0.3, scales, 1)
    ours = gtp_kernels.residual_propagate_norm(x, x, graph, kept, prop, alpha=0.3, norm="none", token_scales=scales)
    theirs = reference.residual_propagate_norm(x, x, graph, kept, prop, alpha=0.3, norm="none", token_scales=scales)
    close(ours[0], theirs[0])
    close(ours[3], theirs[3])


@pytest.mark.parametrize(("n", "num_prop"), [(1, 0), (16, 15), (62, 1), (196, 100)])
def test_dense_form_of_every_size(backend: str, n: int, num_prop: int) -> None:
    x, graph, kept, prop, scales = case(n, num_prop, channels=8)
    check_step(x.bfloat16(), graph.to_dense(), kept, prop, "GraphProp", 0.3, scales, 1)


@pytest.mark.parametrize("channels", [1, 3, 384, 1024])
def test_channels(backend: str, channels: int) -> None:
    x, graph, kept, prop, scales = case(n=35, num_prop=5, channels=channels)
    check_step(x.float(), graph, kept, prop, "GraphProp", 0.1, scales, 1)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_rows_longer_than_a_block(backend: str, norm: str) -> None:
    x, graph, kept, prop, scales = case(n=9, num_prop=2, batch=1, channels=9000)
    x = x.float()
    vector = torch.linspace(0.5, 1.5, 9000)
    options = {"norm": norm, "norm_weight": vector, "token_scales": scales, "layer_scale": vector}
    ours = gtp_kernels.residual_propagate_norm(x, x, graph, kept, prop, **options)
    theirs = reference.residual_propagate_norm(x, x, graph, kept, prop, **options)
    close(ours[0], theirs[0])
    close(ours[1], theirs[1])
    if backend == "cuda":
        return  # it has no backward
    grad = torch.randn(ours[0].shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = (
        torch.autograd.grad(module.propagate(leaf, graph, kept, prop)[0], leaf, grad)[0]
        for module, leaf in ((gtp_kernels, x.requires_grad_()), (reference, x.requires_grad_()))
    )
    close(ours, theirs)


def test_offsets_beyond_32_bits(backend: str) -> None:
    # Two images 2**31 elements apart. Memory that nobody touches costs nothing, unless it is filled.
    torch.utils.deterministic.fill_uninitialized_memory = False
    x, graph, kept, prop, scales = case(n=9, num_prop=3, channels=8)
    far = torch.empty(2**31 + 10 * 8, dtype=torch.bfloat16).as_strided((2, 10, 8), (2**31, 8, 1))
    far.copy_(x)
    near = far.contiguous()
    for one, other in zip(
        gtp_kernels.residual_propagate_norm(far, far, graph, kept, prop, token_scales=scales)[:2],
        gtp_kernels.residual_propagate_norm(near, near, graph, kept, prop, token_scales=scales)[:2],
        strict=True,
    ):
        assert torch.equal(one, other)
    for weight in (graph, graph.to_dense()):
        assert torch.equal(
            gtp_kernels.propagate(far, weight, kept, prop)[0], gtp_kernels.propagate(near, weight, kept, prop)[0]
        )
    one, other = (gtp_kernels.build_graph(t, (3, 3), num_neighbours=3).indices for t in (far, near))
    assert torch.equal(one, other)


def test_the_law_of_the_graph_over_layers(backend: str) -> None:
    """propagate(x, G)[1].to_dense() == propagate(x, G.to_dense())[1], layer after layer."""
    x, graph, _, _, scales = case(n=100, num_prop=0, channels=8)
    sparse, dense, x_sparse, x_dense = graph, graph.to_dense(), x.float(), x.float()
    scales_dense = scales
    for layer in range(5):
        n = x_sparse.shape[1] - 1
        importance = torch.rand(2, n, generator=torch.Generator().manual_seed(layer))
        kept, prop = gtp_kernels.select_tokens(importance, 13, order=checks.ORDERS[layer % 2])
        x_sparse, sparse, scales = gtp_kernels.propagate(x_sparse, sparse, kept, prop, "GraphProp", 0.3, scales)
        x_dense, dense, scales_dense = gtp_kernels.propagate(x_dense, dense, kept, prop, "GraphProp", 0.3, scales_dense)
        assert torch.equal(sparse.to_dense(), dense)
        close(x_sparse, x_dense)
        close(scales, scales_dense)
    assert sparse.indices is graph.indices


def test_propagation_is_the_authors_function_by_position(backend: str) -> None:
    # propagate(x, weight, index_kept, index_prop, standard, alpha, token_scales, cls_token) with their arithmetic.
    x, graph, kept, prop, scales = case(n=16, num_prop=4)
    x, weight = x.float(), graph.to_dense()
    out, weight_out, scales_out = gtp_kernels.propagate(x, weight, kept, prop, "GraphProp", 0.1, scales, True)
    batch = torch.arange(2)[:, None]
    to_kept = weight[batch[..., None], kept[:, :, None] - 1, prop[:, None] - 1]
    close(out, torch.cat((x[:, :1], x[batch, kept] + 0.1 * (to_kept @ x[batch, prop])), 1))
    close(weight_out, weight[batch[..., None], kept[:, :, None] - 1, kept[:, None] - 1])
    moved = (to_kept @ scales[batch, prop].unsqueeze(-1)).squeeze(-1)
    close(scales_out, torch.cat((scales[:, :1], scales[batch, kept] + 0.1 * moved), 1))
    dropped = gtp_kernels.propagate(x[:, 1:], None, kept - 1, prop - 1, "None", 0.1, None, False)
    close(dropped[0], x[batch, kept])
    assert dropped[1:] == (None, None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_scales_come_back_in_their_dtype(backend: str, dtype: torch.dtype) -> None:
    x, graph, kept, prop, scales = case()
    for weight in (graph, graph.to_dense()):
        check_step(x.float(), weight, kept, prop, "GraphProp", 0.2, scales.to(dtype), 1)


def test_strided_input(backend: str) -> None:
    x, graph, kept, prop, scales = case()
    base = torch.full((2, 40, 50), math.nan)
    view = base[:, 2:38, 1:25]
    view.copy_(x)
    check_step(view, graph, kept, prop, "GraphProp", 0.2, scales, 1)
    transposed = x.float().transpose(1, 2).contiguous().transpose(1, 2)
    check_step(transposed, graph, kept, prop, "GraphProp", 0.2, scales, 1)
    every_second = x.float().repeat_interleave(2, 2)[:, :, ::2]
    check_step(every_second, graph, kept.t().contiguous().t(), prop, "Mean", 0.2, None, 1)
    wide = graph.to_dense().repeat_interleave(2, 2)[:, :, ::2]
    check_step(x.float(), wide, kept, prop, "GraphProp", 0.2, scales, 1)


@given(
    n=st.sampled_from([9, 16, 35]),
    share=st.floats(0, 1),
    num_prefix=st.integers(0, 3),
    standard=st.sampled_from(checks.PROPAGATIONS),
    seed=st.integers(0, 99),
)
def test_properties(n: int, share: float, num_prefix: int, standard: str, seed: int) -> None:
    num_prop = int(share * (n - 1))
    x, graph, kept, prop, scales = case(n, num_prop, num_prefix, seed=seed)
    with gtp_kernels.use_backend("cpu"):
        check_step(x.float(), graph, kept, prop, standard, 0.3, scales, num_prefix)


@pytest.mark.parametrize("standard", checks.PROPAGATIONS)
@pytest.mark.parametrize("dense", [False, True])
def test_gradcheck(backend: str, standard: str, dense: bool) -> None:
    x, graph, kept, prop, scales = case(n=9, num_prop=3, num_prefix=2, channels=3)
    weight = graph.to_dense() if dense else graph

    def out_only(x: Tensor) -> Tensor:
        return gtp_kernels.propagate(x, weight, kept, prop, standard, 0.3, scales, num_prefix=2)[0]

    assert torch.autograd.gradcheck(out_only, [x.requires_grad_()], fast_mode=fast(backend))


def test_only_x_gets_a_gradient(backend: str) -> None:
    x, graph, kept, prop, scales = case()
    weight = graph.to_dense().requires_grad_()
    scales.requires_grad_()
    out, weight_out, scales_out = gtp_kernels.propagate(
        x.requires_grad_(), weight, kept, prop, "GraphProp", 0.1, scales
    )
    assert out.requires_grad
    assert not weight_out.requires_grad
    assert not scales_out.requires_grad


def slack_of_norm(x: Tensor) -> Tensor | float:
    """The norm reads the rounded x: where that rounds the other way, the norm moves with it."""
    return 4 * torch.finfo(x.dtype).eps * x.double().abs().amax() if x.dtype.itemsize == 2 else 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", checks.NORMS)
@pytest.mark.parametrize("standard", checks.PROPAGATIONS)
def test_residual_step_matches_definition(backend: str, dtype: torch.dtype, norm: str, standard: str) -> None:
    x, graph, kept, prop, scales = case()
    generator = torch.Generator().manual_seed(3)
    branch = torch.randn(x.shape, generator=generator).to(dtype)
    scale, weight, bias = (torch.randn(24, generator=generator).to(dtype) for _ in range(3))
    for part in ("all", "none"):
        options = {"norm": norm, "standard": standard, "alpha": 0.2, "token_scales": scales}
        if part == "all":
            options |= {"layer_scale": scale}
            if norm != "none":
                options |= {"norm_weight": weight}
            if norm == "layer":
                options |= {"norm_bias": bias}
        ours = gtp_kernels.residual_propagate_norm(x.to(dtype), branch, graph, kept, prop, **options)
        theirs = reference.residual_propagate_norm(x.to(dtype), branch, graph, kept, prop, **options)
        close(ours[0], theirs[0])
        assert (ours[1] is None) == (norm == "none")
        if norm != "none":
            close(ours[1], theirs[1], slack_of_norm(theirs[0]))
        assert torch.equal(ours[2].token, theirs[2].token)
        close(ours[3], theirs[3])


@pytest.mark.parametrize(
    ("x_dtype", "branch_dtype"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
def test_residual_step_promotes_mixed_dtypes(backend: str, x_dtype: torch.dtype, branch_dtype: torch.dtype) -> None:
    x, graph, kept, prop, _ = case()
    branch = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).to(branch_dtype)
    ours = gtp_kernels.residual_propagate_norm(x.to(x_dtype), branch, graph, kept, prop)
    theirs = reference.residual_propagate_norm(x.to(x_dtype), branch, graph, kept, prop)
    close(ours[0], theirs[0])
    close(ours[1], theirs[1])
    assert ours[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("x_dtype", "branch_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)],
)
@pytest.mark.parametrize(("n", "degree", "num_prop"), [(20, 19, 17), (100, 99, 90), (1100, 70, 1050)])
def test_residual_step_with_many_edges_in_a_row(
    backend: str, n: int, degree: int, num_prop: int, x_dtype: torch.dtype, branch_dtype: torch.dtype
) -> None:
    """Rows whose edges are more than any list in registers, most of them to tokens that leave."""
    generator = torch.Generator().manual_seed(n)
    x, branch = torch.randn(2, 2, n + 1, 40, generator=generator)
    indices = torch.rand(2, n, n, generator=generator).argsort(-1)[..., :degree].sort(-1).values.to(torch.int32)
    indptr = torch.arange(0, n * degree + 1, degree, dtype=torch.int32).expand(2, -1).contiguous()
    values = torch.rand(2, n * degree, generator=generator) / degree
    token = torch.arange(n, dtype=torch.int32).expand(2, -1).contiguous()
    graph = TokenGraph(indptr, indices.flatten(1), values, token)
    order = torch.rand(2, n, generator=generator).argsort(1) + 1
    kept, prop = order[:, num_prop:].contiguous(), order[:, :num_prop].contiguous()
    scales = 0.5 + torch.rand(2, n + 1, generator=generator)
    arguments = (x.to(x_dtype), branch.to(branch_dtype), graph, kept, prop)
    ours = gtp_kernels.residual_propagate_norm(*arguments, token_scales=scales, alpha=0.7)
    theirs = reference.residual_propagate_norm(*arguments, token_scales=scales, alpha=0.7)
    close(ours[0], theirs[0])
    close(ours[1], theirs[1], slack_of_norm(theirs[0]))
    close(ours[3], theirs[3])


@pytest.mark.parametrize("num_prop", [0, 34])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_residual_step_sizes(backend: str, num_prop: int, batch: int) -> None:
    x, graph, kept, prop, scales = case(num_prop=num_prop, batch=batch, num_prefix=5)
    x = x.float()
    ours = gtp_kernels.residual_propagate_norm(x, x, graph, kept, prop, token_scales=scales, num_prefix=5)
    theirs = reference.residual_propagate_norm(x, x, graph, kept, prop, token_scales=scales, num_prefix=5)
    for a, b in ((ours[0], theirs[0]), (ours[1], theirs[1]), (ours[3], theirs[3])):
        close(a, b)


@pytest.mark.parametrize("norm", checks.NORMS)
@pytest.mark.parametrize("standard", checks.PROPAGATIONS)
def test_residual_gradcheck(backend: str, norm: str, standard: str) -> None:
    x, graph, kept, prop, _ = case(n=9, num_prop=3, channels=4)
    generator = torch.Generator().manual_seed(5)
    branch, *vectors = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in (x.shape, (4,), (4,), (4,))
    )
    leaves = [t.requires_grad_() for t in (x, branch, *vectors)]
    used = {"layer": 5, "rms": 4, "none": 3}[norm]

    def step(x: Tensor, branch: Tensor, scale: Tensor, *affine: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(("norm_weight", "norm_bias"), affine, strict=False))
        out, normed, _, _ = gtp_kernels.residual_propagate_norm(
            x, branch, graph, kept, prop, layer_scale=scale, norm=norm, standard=standard, alpha=0.3, **named
        )
        return (out,) if normed is None else (out, normed)

    assert torch.autograd.gradcheck(step, leaves[:used], fast_mode=fast(backend))


def test_results_do_not_depend_on_threads(cpu_backend: str) -> None:
    x, graph, kept, prop, scales = case(n=196, num_prop=14, channels=96)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            out, normed, _, new = gtp_kernels.residual_propagate_norm(
                x.float(), x.float(), graph, kept, prop, token_scales=scales
            )
            results.append(torch.cat((out.flatten(), normed.flatten(), new.flatten())))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("backend", OPERATOR_BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("standard", checks.PROPAGATIONS)
def test_opcheck(backend: str, dtype: torch.dtype, standard: str) -> None:
    x, graph, kept, prop, scales = case(n=9, num_prop=3)
    # ``cuda`` has neither a backward nor a dense form.
    differentiable = backend != "cuda"
    x = x.to(dtype).requires_grad_(differentiable)
    parts = (graph.indptr, graph.indices, graph.values, graph.token) if standard == "GraphProp" else (None,) * 4
    ops = _library.operators(backends.choose("propagate", x))
    torch.library.opcheck(ops.propagate, (x, *parts, kept, prop, scales, standard, 0.1, 1))
    torch.library.opcheck(ops.propagate, (x, *parts, kept, prop, None, standard, 0.1, 1))
    grad = ops.propagate(x.detach(), *parts, kept, prop, None, standard, 0.1, 1)[0]
    if differentiable:
        torch.library.opcheck(ops.propagate_backward, (grad, *parts, kept, prop, standard, 0.1, 1))
    if differentiable and standard == "GraphProp":
        torch.library.opcheck(ops.propagate_dense, (x, graph.to_dense(), kept, prop, scales, 0.1, 1))
    vector = torch.ones(24, dtype=dtype, requires_grad=differentiable)
    for norm in checks.NORMS:
        affine = {"layer": (vector, vector), "rms": (vector, None), "none": (None, None)}[norm]
        torch.library.opcheck(
            ops.residual_propagate_norm,
            (x, x, vector, *parts, kept, prop, scales, *affine, 1e-6, norm, standard, 0.1, 1),
            # One unit in the last place of a 16-bit gradient: sums in another order.
            rtol=2 * torch.finfo(dtype).eps,
            atol=2 * torch.finfo(dtype).eps,
        )


def test_compile_fullgraph(backend: str) -> None:
    def step(x: Tensor, graph: TokenGraph, kept: Tensor, prop: Tensor, scales: Tensor) -> tuple[Tensor, ...]:
        out, normed, graph, scales = gtp_kernels.residual_propagate_norm(x, x, graph, kept, prop, token_scales=scales)
        again, graph, scales = gtp_kernels.propagate(
            out, graph, kept[:, :-8].clamp(max=20), prop, "GraphProp", 0.1, scales
        )
        return normed, again, graph.token, scales

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):
        x, graph, kept, prop, scales = case(batch=batch)
        prop = prop.clamp(max=20)
        arguments = (x.float(), graph, kept, prop, scales)
        for ours, eager in zip(compiled(*arguments), step(*arguments), strict=True):
            if ours.is_floating_point():
                close(ours, eager)
            else:
                assert torch.equal(ours, eager)


@pytest.mark.no_op_runs
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(1, 17)}, ValueError, "x must be 3-dimensional"),
        ({"x": torch.zeros(1, 17, 4, dtype=torch.int32)}, TypeError, "x must be float32"),
        ({"weight": None}, TypeError, "weight must be a TokenGraph or a tensor"),
        ({"weight": torch.zeros(1, 15, 15)}, ValueError, "weight must have shape"),
        ({"weight": torch.zeros(1, 16, 16, device="meta")}, ValueError, "weight must be on the device of x"),
        ({"index_kept": torch.zeros(1, 12)}, TypeError, "index_kept must be int64"),
        ({"index_kept": torch.zeros(1, 11, dtype=torch.int64)}, ValueError, "must divide the image tokens"),
        ({"index_kept": torch.zeros(2, 12, dtype=torch.int64)}, ValueError, "index_kept must have shape"),
        (
            {"index_kept": torch.zeros(1, 12, dtype=torch.int64)},
            ValueError,
            "index_kept must hold indices in \\[1, 17\\)",
        ),
        ({"index_prop": torch.full((1, 4), 17)}, ValueError, "index_prop must hold indices in \\[1, 17\\)"),
        ({"index_prop": [[1, 2, 3, 4]]}, TypeError, "index_prop must be an int64 tensor"),
        ({"standard": "Sum"}, ValueError, "standard must be one of None, Mean, GraphProp"),
        ({"alpha": math.nan}, ValueError, "alpha must be finite"),
        ({"alpha": "0.1"}, TypeError, "alpha must be a number"),
        ({"token_scales": torch.ones(1, 16)}, ValueError, "token_scales must have shape"),
        ({"num_prefix": -1}, ValueError, "num_prefix must be at least 0"),
        ({"num_prefix": 18}, ValueError, "num_prefix must be at most"),
    ],
)
def test_bad_input(backend: str, change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments: dict[str, object] = {
        "x": torch.zeros(1, 17, 4),
        "weight": torch.zeros(1, 16, 16),
        "index_kept": torch.arange(1, 13)[None],
        "index_prop": torch.arange(13, 17)[None],
    }
    for module in (gtp_kernels, reference):
        with pytest.raises(error, match=message):
            module.propagate(**(arguments | change))


def test_bad_index_values_in_the_residual_step(backend: str) -> None:
    x, graph, kept, prop, _ = case(n=16, num_prop=4)
    for bad in (0, 17, -1):
        with pytest.raises(ValueError, match="index_prop must hold indices in \\[1, 17\\)"):
            gtp_kernels.residual_propagate_norm(x, x, graph, kept, torch.full_like(prop, bad))
        with pytest.raises(ValueError, match="index_kept must hold indices in \\[1, 17\\)"):
            gtp_kernels.residual_propagate_norm(x, x, graph, torch.full_like(kept, bad), prop)


@pytest.mark.no_op_runs
def test_bad_graph_and_residual_input(backend: str) -> None:
    x, graph, kept, prop, _ = case(n=16, num_prop=4)
    x = x.float()
    with pytest.raises(TypeError, match="weight.values must be torch.float32"):
        gtp_kernels.propagate(
            x, TokenGraph(graph.indptr, graph.indices, graph.values.double(), graph.token), kept, prop
        )
    with pytest.raises(ValueError, match="weight.token must have shape"):
        gtp_kernels.propagate(x, graph.with_token(graph.token[:, :5]), kept, prop)
    with pytest.raises(ValueError, match="weight.token must hold indices"):
        gtp_kernels.propagate(x, graph.with_token(graph.token + 9), kept, prop)
    with pytest.raises(ValueError, match="branch must have shape"):
        gtp_kernels.residual_propagate_norm(x, x[:, 1:], graph, kept, prop)
    with pytest.raises(ValueError, match="layer_scale must have shape"):
        gtp_kernels.residual_propagate_norm(x, x, graph, kept, prop, layer_scale=torch.ones(3))
    with pytest.raises(ValueError, match="norm must be one of layer, rms, none"):
        gtp_kernels.residual_propagate_norm(x, x, graph, kept, prop, norm="batch")
    with pytest.raises(TypeError, match="graph must be a TokenGraph or None"):
        gtp_kernels.residual_propagate_norm(x, x, graph.to_dense(), kept, prop)
    with pytest.raises(TypeError, match="graph must be a TokenGraph where"):
        gtp_kernels.residual_propagate_norm(x, x, None, kept, prop)
    with pytest.raises(ValueError, match="norm_eps must be at least 0"):
        gtp_kernels.residual_propagate_norm(x, x, graph, kept, prop, norm_eps=-1.0)
    with pytest.raises(TypeError, match="num_prefix must be an int; got NoneType"):
        gtp_kernels.residual_propagate_norm(x, x, graph, kept, prop, num_prefix=None)
    with pytest.raises(TypeError, match="index_kept must be a dense"):
        gtp_kernels.propagate(x, graph, kept.to_sparse(), prop)


def test_a_corrupt_graph_is_refused_and_reads_nothing_outside(backend: str) -> None:
    x, graph, kept, prop, _ = case(n=16, num_prop=4)
    x = x.float()
    for corrupt in (
        TokenGraph(graph.indptr, graph.indices + 1000, graph.values, graph.token),
        TokenGraph(graph.indptr, graph.indices - 1000, graph.values, graph.token),
        TokenGraph(graph.indptr + 100000, graph.indices, graph.values, graph.token),
        TokenGraph(graph.indptr.flip(1), graph.indices, graph.values, graph.token),
    ):
        with pytest.raises(ValueError, match="weight.ind|differences of weight.indptr"):
            gtp_kernels.propagate(x, corrupt, kept, prop)


@pytest.mark.parametrize("dense", [False, True])
def test_second_order_gradients(backend: str, dense: bool) -> None:
    x, graph, kept, prop, _ = case(n=9, num_prop=3, channels=3)
    weight = graph.to_dense() if dense else graph

    def squared(x: Tensor) -> Tensor:
        return gtp_kernels.propagate(x, weight, kept, prop)[0] ** 2

    assert torch.autograd.gradgradcheck(squared, [x.requires_grad_()], fast_mode=fast(backend))


def test_second_order_gradients_of_the_residual_step(backend: str) -> None:
    x, graph, kept, prop, _ = case(n=9, num_prop=3, channels=3)
    weight = torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def step(x: Tensor, weight: Tensor) -> Tensor:
        out, normed, _, _ = gtp_kernels.residual_propagate_norm(x, x, graph, kept, prop, norm_weight=weight)
        return out * normed

    leaves = [x.requires_grad_(), weight.requires_grad_()]
    assert torch.autograd.gradgradcheck(step, leaves, fast_mode=fast(backend))


def test_forward_mode_is_refused_not_dropped(cpu_backend: str) -> None:
    x, graph, kept, prop, _ = case()
    with pytest.raises(RuntimeError, match="reverse-mode gradients only"):
        torch.func.jvp(lambda x: gtp_kernels.propagate(x, graph, kept, prop)[0], (x,), (torch.ones_like(x),))
    with pytest.raises(RuntimeError, match="reverse-mode gradients only"):
        torch.func.jvp(
            lambda x: gtp_kernels.residual_propagate_norm(x, x, graph, kept, prop)[0], (x,), (torch.ones_like(x),)
        )


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_reaches_neighbours_only(backend: str, dense: bool, value: float) -> None:
    x, graph, kept, prop, scales = case()
    x, leaver = x.float(), int(prop[0, 0])
    x[0, leaver] = value
    scales[0, leaver] = value
    weight = graph.to_dense() if dense else graph
    out, _, new_scales = gtp_kernels.propagate(x, weight, kept, prop, "GraphProp", 0.2, scales)
    touched = graph.to_dense()[0][kept[0] - 1, leaver - 1] != 0
    assert torch.equal(~out[0, 1:].isfinite().any(1), touched)
    assert torch.equal(~new_scales[0, 1:].isfinite(), touched)
    assert out[1].isfinite().all()


def test_compile_with_symbolic_sizes_and_alpha(backend: str) -> None:
    x, graph, kept, prop, _ = case()

    def step(x: Tensor, alpha: float) -> Tensor:
        return gtp_kernels.propagate(x, graph, kept, prop, alpha=alpha)[0]

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for alpha in (0.1, 0.2, 0.3):
        close(compiled(x, alpha), step(x, alpha))
