"""What can be timed: op → inputs, shapes, ours, baselines, the bytes and FLOPs that it must move, and the check.

Baselines: ``sdpa`` is torch's fused attention, which gives no scores (on a GPU also each of its backends);
``sdpa+bias`` the same with log token scales; ``definition`` is the plain PyTorch reference, and ``definition compiled``
the same under torch.compile. A baseline that cannot run on a machine is left out there, with the reason.
``plain`` is what one would write with torch's own functions; ``tome`` what ToMe does in the place of live edges. On a
GPU also: ``sdpa+sums``, where a kernel of its own computes the scores of the whole map; ``kthvalue`` and ``topk``,
which only find the threshold of a map that is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gtp_kernels
from benchmarks import tome
from gtp_kernels import reference

Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        op, shape: what it is.
        calls: ``calls["ours"]``, and the baselines by name; the same inputs.
        check: raises AssertionError where ours is wrong.
        num_bytes, flops: what any implementation of ``ours`` must at least read and write, and the products that it
            needs; 0 where the share of a ceiling says nothing.
        items: what one call handles (images, for models), or 0.
        parts: what is timed in the same turns and reported apart, by name: the candidate it is a part of, and the call.
        about: whatever else belongs into the report.
    """

    op: str
    shape: str
    calls: dict[str, Call]
    check: Call
    num_bytes: int = 0
    flops: int = 0
    items: int = 0
    parts: dict[str, tuple[str, Call]] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """Where and on what the cases run; ``tiny`` shapes are for trying the tools, not for numbers."""

    device: torch.device
    dtype: torch.dtype
    num_prop: int = 8
    tiny: bool = False

    @property
    def on_gpu(self) -> bool:
        """Whether this is not the CPU."""
        return self.device.type != "cpu"

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal draws, the same on every device."""
        drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
        return drawn.to(self.device, dtype or self.dtype)

    def rand(self, *shape: int) -> Tensor:
        """Uniform draws in float32, the same on every device."""
        return torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(self.device)


def attention_cases(setting: Setting) -> Iterator[Case]:
    """attention_with_scores: θ = 0.6 with token scales; on a GPU θ = 1 without, too."""
    if setting.tiny:
        shapes = [(1, 2, 17, 16)]
    elif setting.on_gpu:
        # 43 is what DeiT's last block has at P = 14.
        shapes = [(128, 6, n, 64) for n in (197, 189, 157, 109, 43)]
        shapes += [(128, 12, 197, 64), (32, 12, 785, 64), (64, 16, 197, 64), (128, 8, 256, 64)]
    else:
        shapes = [(16, 6, 197, 64), (16, 6, 133, 64), (4, 12, 785, 64)]
    for shape in shapes:
        for theta in (1.0, 0.6) if setting.on_gpu or setting.tiny else (0.6,):
            yield _attention_case(setting, shape, theta)


def _attention_case(setting: Setting, shape: tuple[int, int, int, int], theta: float) -> Case:
    batch, heads, num_tokens, size = shape
    q, k, v = setting.randn(batch, num_tokens, 3, heads, size).permute(2, 0, 3, 1, 4).unbind(0)
    scales = 1 + setting.rand(batch, num_tokens) if theta < 1 else None

    def ours() -> Tensor:
        return gtp_kernels.attention_with_scores(q, k, v, scales, sparsity=theta)[0]

    definition = partial(reference.attention_with_scores, q, k, v, scales, sparsity=theta)
    calls: dict[str, Call] = {"ours": ours, "sdpa": lambda: F.scaled_dot_product_attention(q, k, v)}
    if scales is not None:
        bias = scales.log()[:, None, None].to(q.dtype)
        calls["sdpa+bias"] = lambda: F.scaled_dot_product_attention(q, k, v, bias)
    if setting.on_gpu or setting.tiny:
        for name in ("flash", "cudnn", "efficient", "math"):
            calls[f"sdpa {name}"] = partial(_sdpa_by, name, q, k, v)
        calls["sdpa+sums"] = partial(_sdpa_with_scores, q, k, v)
    calls["definition"] = definition
    _add_compiled(setting, calls, definition)
    if theta < 1 and (setting.on_gpu or setting.tiny):
        values = reference.attention_map(q, k, scales).float().flatten(2)
        rank = reference.attention.threshold_rank(num_tokens, theta, "official")
        calls["kthvalue"] = lambda: values.kthvalue(rank, -1)
        # The values that stay are fewer than those that go.
        calls["topk"] = lambda: values.topk(values.shape[-1] - rank + 1, -1, sorted=False)

    def check() -> None:
        out, scores = gtp_kernels.attention_with_scores(q, k, v, scales, sparsity=theta)
        expected, expected_scores = definition()
        tolerance = 1e-3 if q.dtype == torch.float32 else 4e-2
        agree("out", out, expected, tolerance)
        for name in ("diag", "colsum", "cls_row"):
            agree(name, getattr(scores, name), getattr(expected_scores, name), tolerance)

    name = f"B{batch} H{heads} N{num_tokens} d{size}" + ("" if theta < 1 else " θ=1")
    moved = 4 * q.numel() * q.element_size() + 3 * 4 * batch * heads * num_tokens
    about = {"tokens": num_tokens, "head_size": size}
    return Case("attention", name, calls, check, moved, 4 * q.numel() * num_tokens, about=about)


def _sdpa_by(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }[name]
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v)


def _sdpa_with_scores(q: Tensor, k: Tensor, v: Tensor) -> object:
    from benchmarks.column_sums import sdpa_with_scores  # Triton is needed here alone

    return sdpa_with_scores(q, k, v)


def select_cases(setting: Setting) -> Iterator[Case]:
    """Importance and selection; the baseline is the same by torch.argsort and sort."""
    num_prop = min(setting.num_prop, 8) if setting.tiny else setting.num_prop
    if setting.tiny:
        shapes = [(2, 2, 17)]
    elif setting.on_gpu:
        shapes = [(128, 6, n) for n in (197, 109, 43)] + [(32, 12, 785)]
    else:
        shapes = [(16, 6, 197)]
    for batch, heads, num_tokens in shapes:
        scores = gtp_kernels.AttentionScores(*setting.rand(3, batch, heads, num_tokens).unbind(0))

        def ours(scores: gtp_kernels.AttentionScores = scores) -> tuple[Tensor, Tensor]:
            return gtp_kernels.select_tokens(gtp_kernels.token_importance(scores), num_prop)

        def plain(scores: gtp_kernels.AttentionScores = scores) -> tuple[Tensor, Tensor]:
            importance = scores.diag[:, :, 1:].amax(1) * scores.colsum[:, :, 1:].amax(1)
            rank = importance.argsort(1, descending=True)
            kept = rank.shape[1] - num_prop
            return rank[:, :kept].sort(1)[0] + 1, rank[:, kept:].sort(1)[0] + 1

        calls: dict[str, Call] = {"ours": ours, "plain": plain}
        moved = 2 * 4 * batch * heads * num_tokens + 8 * batch * (num_tokens - 1)
        shape = f"B{batch} H{heads} N{num_tokens} P{num_prop}"
        about = {"tokens": num_tokens, "channels": 0, "arithmetic": "float32"}
        yield Case("select", shape, calls, partial(_same, ours, plain), moved, about=about)


def _same(ours: Callable[[], Any], plain: Callable[[], Any]) -> None:
    if not all(torch.equal(a, b) for a, b in zip(ours(), plain(), strict=True)):
        raise AssertionError("the selections differ")


def propagate_cases(setting: Setting) -> Iterator[Case]:
    """The fused step; the baselines are the definition and the unfused parts of an unpatched block."""
    if setting.tiny:
        shapes = [(2, 4, 32)]
    elif setting.on_gpu:
        shapes = [(128, side, channels) for channels in (384, 768) for side in (14, 10, 6)] + [(32, 28, 768)]
    else:
        shapes = [(16, 14, 384)]
    for shape in shapes:
        yield _propagate_case(setting, *shape)


def _propagate_case(setting: Setting, batch: int, side: int, channels: int) -> Case:
    num_tokens, num_prop = 1 + side * side, setting.num_prop
    x, branch = (setting.randn(batch, num_tokens, channels) for _ in range(2))
    graph = gtp_kernels.build_graph(x, (side, side))
    kept, prop = gtp_kernels.select_tokens(setting.rand(batch, side * side), num_prop)
    scales = setting.rand(batch, num_tokens) + 1
    weight, bias = setting.randn(channels), setting.randn(channels)
    affine: dict[str, Any] = {"norm_weight": weight, "norm_bias": bias, "token_scales": scales}

    ours = partial(gtp_kernels.residual_propagate_norm, x, branch, graph, kept, prop, **affine)
    definition = partial(reference.residual_propagate_norm, x, branch, graph, kept, prop, **affine)

    def check() -> None:
        out, normed, _, out_scales = ours()
        expected, expected_normed, _, expected_scales = definition()
        tolerance = 16 * torch.finfo(setting.dtype).eps
        agree("x", out, expected, tolerance)
        agree("normed", normed, expected_normed, tolerance)
        agree("token_scales", out_scales, expected_scales, 1e-5)

    calls: dict[str, Call] = {"ours": ours, "definition": definition}
    return _step_case(setting, "propagate", "", (x, branch, weight, bias), num_prop, calls, check)


def _step_case(
    setting: Setting,
    op: str,
    what: str,
    rows: tuple[Tensor, Tensor, Tensor, Tensor],
    num_prop: int,
    calls: dict[str, Call],
    check: Call,
) -> Case:
    """A step between attention and MLP; ``rows``: x and branch [B, N, C], weight and bias [C] of the norm."""
    x, branch, weight, bias = rows
    batch, num_tokens, channels = x.shape
    calls["add+norm"] = lambda: F.layer_norm(x + branch, (channels,), weight, bias, 1e-6)
    _add_compiled(setting, calls, calls["definition"])
    row = batch * channels * x.element_size()
    moved = 2 * num_tokens * row + 2 * (num_tokens - num_prop) * row
    shape = f"{what}B{batch} N{num_tokens} C{channels} P{num_prop}"
    return Case(op, shape, calls, check, moved, about={"tokens": num_tokens, "channels": channels})


def graph_cases(setting: Setting) -> Iterator[Case]:
    """build_graph, Mixed, M = 8; the baseline is the definition."""
    if setting.tiny:
        shapes = [(1, 4, 16)]
    elif setting.on_gpu:
        shapes = [(128, 14, 384), (128, 14, 768), (32, 28, 768)]
    else:
        shapes = [(16, 14, 384), (4, 28, 768)]
    for batch, side, channels in shapes:
        x = setting.randn(batch, side * side + 1, channels)
        ours = partial(_edges, gtp_kernels.build_graph, x, side)
        definition = partial(_edges, reference.build_graph, x, side)
        calls: dict[str, Call] = {"ours": ours, "definition": definition}
        _add_compiled(setting, calls, definition)
        n, width = side * side, x.element_size()
        moved, flops = x.numel() * width + 8 * ours().numel(), 2 * batch * n * n * channels
        check, about = partial(_close_graphs, ours, definition), {"tokens": n + 1, "channels": channels}
        yield Case("graph", f"B{batch} n{n} C{channels}", calls, check, moved, flops, about=about)


def _edges(build: Callable[..., gtp_kernels.TokenGraph], x: Tensor, side: int) -> Tensor:
    return build(x, (side, side)).indices


def _close_graphs(ours: Callable[[], Tensor], definition: Callable[[], Tensor]) -> None:
    # Similarities within rounding of each other may take each other's place.
    if (ours() == definition()).float().mean() < 0.5:
        raise AssertionError("the graphs differ")


def live_cases(setting: Setting) -> Iterator[Case]:
    """Live edges: the graph, once per forward; the selection and the step, in every block."""
    if setting.tiny:
        shapes, graphs = [(2, 4, 2, 16, 0)], [(2, 4)]
    elif setting.on_gpu:
        # batch, side of the grid, heads, head size, rows that left before: 0, and what 10 blocks of 8 leave of 196
        shapes = [(128, 14, heads, 64, left) for heads in (6, 12) for left in (0, 80)] + [(32, 28, 12, 64, 0)]
        graphs = [(128, 14), (32, 28)]
    else:
        shapes, graphs = [(16, 14, 6, 64, 0), (16, 14, 6, 64, 80)], [(16, 14)]
    for batch, side in graphs:
        yield _live_graph_case(setting, batch, side)
    for shape in shapes:
        yield from _live_block_cases(setting, *shape)


def _live_graph_case(setting: Setting, batch: int, side: int) -> Case:
    graph = gtp_kernels.build_graph(setting.randn(batch, side * side + 1, 64), (side, side))
    ours, definition = partial(gtp_kernels.live_graph, graph), partial(reference.live_graph, graph)

    def check() -> None:
        found, expected = ours(), definition()
        if not (torch.equal(found.indptr, expected.indptr) and torch.equal(found.indices, expected.indices)):
            raise AssertionError("the edges differ")

    calls: dict[str, Call] = {"ours": ours, "definition": definition}
    _add_compiled(setting, calls, definition)
    moved = 4 * (2 * graph.indptr.numel() + graph.indices.numel() + ours().indices.numel())
    about = {"tokens": side * side + 1, "channels": 0, "arithmetic": "int32"}
    return Case("live", f"graph B{batch} n{side * side}", calls, check, moved, about=about)


def _live_block_cases(setting: Setting, batch: int, side: int, heads: int, size: int, left: int) -> Iterator[Case]:
    n, channels, num_prop = side * side, heads * size, min(setting.num_prop, side * side // 4)
    keys, x, branch = (setting.randn(batch, n + 1, channels) for _ in range(3))
    k = keys.unflatten(2, (heads, size)).transpose(1, 2)
    live, sizes = gtp_kernels.live_graph(gtp_kernels.build_graph(x, (side, side))), setting.rand(batch, n + 1) + 1
    importance, num_tokens = setting.rand(batch, n), n + 1 - left
    if left:
        earlier = gtp_kernels.live_select(k, importance, live, left, sizes)
        live, sizes, k = earlier.live, earlier.sizes, k[:, :, :num_tokens]
        x, branch = (t[:, :num_tokens].contiguous() for t in (x, branch))
        importance = importance[:, left:].contiguous()
    shape = f"B{batch} N{num_tokens} C{channels} P{num_prop}"

    select = partial(gtp_kernels.live_select, k, importance, live, num_prop, sizes)
    definition = partial(reference.live_select, k, importance, live, num_prop, sizes)
    matching = partial(_tome_matching, k, num_prop)

    def stays(found: gtp_kernels.LiveSelection) -> Tensor:
        return torch.zeros_like(importance).scatter_(1, found.index_kept - 1, 1.0)

    def check_select() -> None:
        # Scores within rounding of each other may take each other's place.
        if (stays(select()) != stays(definition())).float().mean() > 0.01:
            raise AssertionError("the selections differ")

    # The definition holds the matrix of all edges and decides row by row: too slow to be timed at full size.
    calls: dict[str, Call] = {"ours": select, "tome": matching}
    if setting.tiny:
        calls["definition"] = definition
    edges = int(live.indptr[:, -1].sum())
    moved = k.numel() * k.element_size() + 4 * (edges + 2 * live.rep.numel() + 3 * batch * num_tokens)
    about = {"tokens": num_tokens, "head_size": size}
    yield Case("live", f"select {shape}", calls, check_select, moved, 2 * edges * size, about=about)

    selection, matched = select(), matching()
    weight, bias = setting.randn(channels), setting.randn(channels)
    affine: dict[str, Any] = {"norm_weight": weight, "norm_bias": bias}
    merge = partial(gtp_kernels.live_merge, x, branch, selection, **affine)
    merged = partial(reference.live_merge, x, branch, selection, **affine)

    def tome_merge() -> Tensor:
        rows, _ = tome.merge(x + branch, sizes, matched, 1)
        return F.layer_norm(rows, (channels,), weight, bias, 1e-6)

    def check_merge() -> None:
        tolerance = 16 * torch.finfo(setting.dtype).eps
        for name, out, expected in zip(("x", "normed"), merge(), merged(), strict=True):
            agree(name, out, expected, tolerance)

    calls = {"ours": merge, "tome": tome_merge, "definition": merged}
    yield _step_case(setting, "live", "merge ", (x, branch, weight, bias), num_prop, calls, check_merge)


def _tome_matching(k: Tensor, r: int) -> tome.Matching:
    return tome.bipartite_soft_matching(k.mean(1)[:, 1:], r)


OPS: dict[str, Callable[[Setting], Iterator[Case]]] = {
    "attention": attention_cases,
    "select": select_cases,
    "propagate": propagate_cases,
    "graph": graph_cases,
    "live": live_cases,
}


def _add_compiled(setting: Setting, calls: dict[str, Call], definition: Callable[[], object]) -> None:
    if not setting.tiny:
        calls["definition compiled"] = torch.compile(definition, dynamic=False)


def agree(name: str, ours: Tensor | None, expected: Tensor | None, tolerance: float) -> None:
    """Raises AssertionError unless ‖ours − expected‖ < tolerance · ‖expected‖, shapes being equal."""
    if ours is None or expected is None:
        raise AssertionError(f"{name}: missing")
    if ours.shape != expected.shape:
        raise AssertionError(f"{name}: shapes differ: {tuple(ours.shape)}, {tuple(expected.shape)}")
    error = float((ours.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))
    if not error < tolerance:
        raise AssertionError(f"{name}: relative error {error:.1e}, above {tolerance:.1e}")
