"""The GTP step of one transformer block, for any library.

    attend      A = softmax(q kᵀ · scale + log s), thresholded at θ; A v, and the scores of A          (Equation 11)
    summarise   the P least important image tokens leave: X^s = X^k + α Â^p X^p, s^s = s^k + α Â^p s^p  (10, 12)

Nothing is kept on a module: what a block hands to the next one is a :class:`State`, and what it is asked for comes
as :class:`LayerOptions`. Both are right by construction, so the ops are called without the checks of their arguments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor

import gtp_kernels
from gtp_kernels import AttentionScores, LiveGraph, TokenGraph, checks, reference
from gtp_kernels.ops.attention import unchecked_attention
from gtp_kernels.ops.live import unchecked_live_merge, unchecked_live_select
from gtp_kernels.ops.propagate import unchecked_residual
from gtp_kernels.ops.select import unchecked_importance, unchecked_select
from gtp_kernels.ops.select_propagate import unchecked_select_residual
from gtp_kernels.reference.select import map_rows
from gtp_vit.config import GTPConfig

if TYPE_CHECKING:
    from gtp_vit.tracing import Recorder


class LayerOptions(NamedTuple):
    """What one block is asked for: the options of :class:`GTPConfig`, its own P, and R prefix tokens."""

    block: int
    num_prop: int
    num_prefix: int
    sparsity: float
    alpha: float
    selection: str
    propagation: str
    semantics: str
    track_scales: bool
    gamma: float
    seed: int | None = None


class Rotary(NamedTuple):
    """Rotary position embedding: a token that stays keeps the position that it had.

    Attributes:
        embed: sine and cosine of every original image token, [n, D], or [depth, H, n, D] where blocks have their own.
        tokens: int64 [B, m], the original token behind each current image row; ``None`` while none has left.
    """

    embed: Tensor
    tokens: Tensor | None = None

    def rows(self, block: int) -> Tensor:
        """The embedding of the current rows of ``block``, which broadcasts with [B, H, m, d]."""
        embed = self.embed[block] if self.embed.ndim == 4 else self.embed
        if self.tokens is None:
            return embed
        if embed.ndim == 2:
            return embed[self.tokens].unsqueeze(1)
        return embed[:, self.tokens].transpose(0, 1)

    def kept(self, index: Tensor) -> Rotary:
        """That of the rows ``index`` [B, K], counted without the prefix."""
        return Rotary(self.embed, index if self.tokens is None else self.tokens.gather(1, index))


class State(NamedTuple):
    """What one block hands to the next.

    Attributes:
        graph: the token graph seen through the current rows, live edges or not; ``None`` where nothing reads it.
        token_scales: float32 [B, N], prefix counted; ``None`` while every scale is one, whose logarithm adds nothing.
            With live edges they are also the sizes that weigh a mean, and are kept where the attention ignores them.
        recorder: where the forward is traced, or its grid restored.
        rotary: the rotary position embedding of the rows, in a model that has one.
    """

    graph: TokenGraph | LiveGraph | None
    token_scales: Tensor | None
    recorder: Recorder | None
    rotary: Rotary | None = None

    def finished(self, options: LayerOptions) -> State:
        """This state, noted as the one that the block of ``options`` leaves behind."""
        if self.recorder is not None:
            self.recorder.finish(options.block, self.token_scales)
        return self


class Keyed(NamedTuple):
    """What the selection reads where edges are live: scores or a map, and the keys [B, H, N, d] of the attention."""

    scores: AttentionScores | Tensor
    keys: Tensor


Judged: TypeAlias = "AttentionScores | Tensor | Keyed"


class Norm(NamedTuple):
    """The normalisation after the step: ``kind`` is "layer", "rms", or "none" for one that is not fused."""

    kind: str = "none"
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-6


def layer_options(config: GTPConfig, depth: int, num_prefix: int) -> tuple[LayerOptions, ...]:
    """The options of each of ``depth`` blocks."""
    # Dropping tokens leaves every scale at one.
    track_scales = config.token_scale and config.propagation != "None"
    return tuple(
        LayerOptions(
            block,
            num_prop,
            num_prefix,
            config.sparsity,
            config.alpha,
            config.selection,
            config.propagation,
            config.semantics,
            track_scales,
            config.gamma,
            config.seed,
        )
        for block, num_prop in enumerate(config.schedule(depth))
    )


def first_state(
    x: Tensor,
    grid_size: tuple[int, int],
    config: GTPConfig,
    depth: int,
    num_prefix: int,
    recorder: Recorder | None,
    rope: Tensor | None = None,
) -> State:
    """The state before the first block: the graph of the embedded tokens x [B, R+n, C], where one is needed.

    ``rope`` is the rotary position embedding, as in :class:`Rotary`.
    """
    graph = None
    if config.uses_graph(depth):
        graph = gtp_kernels.build_graph(
            x.detach(), grid_size, config.graph_type, config.num_neighbours, num_prefix, config.semantics
        )
    if recorder is not None:
        recorder.graph = graph
    rotary = None if rope is None else Rotary(rope)
    if graph is not None and config.propagation == "LiveGraph":
        return State(gtp_kernels.live_graph(graph), None, recorder, rotary)
    return State(graph, None, recorder, rotary)


def changes_nothing(state: State, options: LayerOptions) -> bool:
    """Whether the block is the unpatched one: no token leaves, the map is whole, and every token counts one."""
    return options.num_prop == 0 and options.sparsity == 1 and _attention_scales(state, options) is None


def _attention_scales(state: State, options: LayerOptions) -> Tensor | None:
    return state.token_scales if options.track_scales else None


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, state: State, options: LayerOptions) -> tuple[Tensor, Judged]:
    """Attention of q, k, v [B, H, N, d], and what the selection reads: scores, or the map where it needs the map.

    Returns:
        out [B, H, N, d] in q's dtype, with ``out.transpose(1, 2).reshape(B, N, H * d)`` a view where the map is not
        written; :class:`AttentionScores` each [B, H, N], or for ``CosSim*`` the map [B, H, N, N]; with live edges the
        keys too, in :class:`Keyed`.
    """
    scales = _attention_scales(state, options)
    judged: AttentionScores | Tensor
    if options.num_prop and options.selection in checks.MAP_STANDARDS:
        attn = reference.attention_map(
            q, k, scales, sparsity=options.sparsity, scale=scale, semantics=options.semantics
        )
        out, judged = (attn @ v.to(attn.dtype)).to(v.dtype), attn.detach()
    else:
        out, judged = unchecked_attention(q, k, v, scales, float(options.sparsity), float(scale), options.semantics)
    return out, Keyed(judged, k.detach()) if options.propagation == "LiveGraph" else judged


def importance_of(scores: AttentionScores | Tensor, options: LayerOptions) -> Tensor:
    """Importance [B, n] of the image tokens, from what :func:`attend` returned."""
    if isinstance(scores, Tensor):
        rows = map_rows(scores, options.selection, options.num_prefix)
        return -(rows @ rows.transpose(-1, -2)).sum(-1)
    if options.selection == "Random":
        like = scores.diag[:, 0, options.num_prefix :]
        if options.seed is None or like.is_meta:
            return torch.randn_like(like)
        generator = torch.Generator(like.device).manual_seed((options.seed << 16) + options.block)
        return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
    return unchecked_importance(scores, options.selection, options.num_prefix, options.semantics)


def summarise(
    x: Tensor,
    branch: Tensor,
    scores: Judged,
    state: State,
    options: LayerOptions,
    layer_scale: Tensor | None,
    norm: Norm,
) -> tuple[Tensor, Tensor | None, State]:
    """Adds the attention branch to the residual stream, then lets the P least important image tokens leave.

    Args:
        x, branch: [B, N, C]; the stream, and what the attention adds to it.
        scores: from :func:`attend`.
        layer_scale: [C], multiplied into ``branch``, or ``None``.
        norm: the normalisation of the result.

    Returns:
        x [B, N', C]; its normalisation, or ``None`` where it is left to the caller; the state for the next block.
    """
    if options.num_prop == 0:
        return x + (branch if layer_scale is None else branch * layer_scale), None, state.finished(options)
    token_scales = state.token_scales
    if (options.track_scales or options.propagation == "LiveGraph") and token_scales is None:
        token_scales = torch.ones(x.shape[:2], dtype=torch.float32, device=x.device)
    if isinstance(scores, Keyed):
        return _merge(x, branch, scores, state._replace(token_scales=token_scales), options, layer_scale, norm)
    recorder = state.recorder
    # A trace keeps the importance, which the one call does not give.
    quiet = recorder is None or not recorder.traced
    if isinstance(scores, AttentionScores) and options.selection in checks.SCORE_STANDARDS and quiet:
        assert not isinstance(state.graph, LiveGraph)
        x, normed, graph, token_scales, index_kept, index_prop = unchecked_select_residual(
            x,
            branch,
            scores,
            state.graph,
            options.selection,
            options.num_prop,
            "grid",
            options.semantics,
            layer_scale,
            norm.weight,
            norm.bias,
            float(norm.eps),
            norm.kind,
            options.propagation,
            float(options.alpha),
            token_scales,
            options.num_prefix,
        )
        if recorder is not None:
            recorder.add(options.block, index_kept, index_prop, None)
        return x, normed, _next_state(state, graph, token_scales, index_kept, options)
    assert not isinstance(state.graph, LiveGraph)
    importance = importance_of(scores, options)
    index_kept, index_prop = unchecked_select(importance, options.num_prop, options.num_prefix, "grid")
    x, normed, graph, token_scales = unchecked_residual(
        x,
        branch,
        state.graph,
        index_kept,
        index_prop,
        layer_scale,
        norm.weight,
        norm.bias,
        float(norm.eps),
        norm.kind,
        options.propagation,
        float(options.alpha),
        token_scales,
        options.num_prefix,
    )
    if recorder is not None:
        recorder.add(options.block, index_kept, index_prop, importance)
    return x, normed, _next_state(state, graph, token_scales, index_kept, options)


def _merge(
    x: Tensor,
    branch: Tensor,
    judged: Keyed,
    state: State,
    options: LayerOptions,
    layer_scale: Tensor | None,
    norm: Norm,
) -> tuple[Tensor, Tensor | None, State]:
    """:func:`summarise` with live edges."""
    assert isinstance(state.graph, LiveGraph)
    assert state.token_scales is not None
    importance = importance_of(judged.scores, options)
    found = unchecked_live_select(
        judged.keys, importance, state.graph, options.num_prop, state.token_scales, options.gamma, options.num_prefix
    )
    x, normed = unchecked_live_merge(
        x, branch, found, layer_scale, norm.weight, norm.bias, float(norm.eps), norm.kind, options.num_prefix
    )
    if state.recorder is not None:
        state.recorder.add(options.block, found.index_kept, found.index_prop, importance, found.target, found.share)
    return x, normed, _next_state(state, found.live, found.sizes, found.index_kept, options)


def _next_state(
    state: State,
    graph: TokenGraph | LiveGraph | None,
    token_scales: Tensor | None,
    index_kept: Tensor,
    options: LayerOptions,
) -> State:
    rotary = None if state.rotary is None else state.rotary.kept(index_kept - options.num_prefix)
    return State(graph, token_scales, state.recorder, rotary).finished(options)
