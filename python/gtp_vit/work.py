"""The multiply-accumulates of a patched model as a formula of its options, for those who ask for many of them.

    block:   a · N + p · N² + m · N'  with N tokens before the tokens leave and N' after,
             a, m of the linear layers in and after the attention, p = 2 · H · d of its two products
    leaving: C · E · P / n (GraphProp), C · P (Mean), 0 (None), E · d + C · P (LiveGraph, in both directions 2 E edges);
             CosSim*: n_l² · N of its similarities
    graph:   n² · C (Semantic, Mixed), once
    outside: embedding and head, as counted
    restore: C · P · n' in each block (GraphProp, with n' image tokens that stay), where a forward restores the grid

It equals what :func:`gtp_vit.gmacs` counts of a forward on any backend but ``reference``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from gtp_kernels import checks
from gtp_kernels.reference.graph import edge_capacity, num_semantic_neighbours
from gtp_vit import flops
from gtp_vit.config import GTPConfig


class BlockWork(NamedTuple):
    """What one block does, in multiply-accumulates of one image.

    Attributes:
        attention: of the linear layers of the attention, per token before the tokens leave.
        pairs: of the two products of the attention, per pair of tokens.
        feed_forward: of the other linear layers, per token that stays.
        head_size: d.
    """

    attention: int
    pairs: int
    feed_forward: int
    head_size: int


class ModelWork(NamedTuple):
    """What a model does, in multiply-accumulates of one image.

    Attributes:
        blocks: of each block.
        channels: C.
        grid_size: (height, width) of the image tokens.
        num_prefix: R.
        outside: of embedding and head with R final tokens.
        final_token: of the head per further final token.
        restores: whether every forward restores the grid under ``restore=True``.
    """

    blocks: tuple[BlockWork, ...]
    channels: int
    grid_size: tuple[int, int]
    num_prefix: int
    outside: int
    final_token: int
    restores: bool = False

    @property
    def num_image_tokens(self) -> int:
        """n."""
        return self.grid_size[0] * self.grid_size[1]

    def macs(self, config: GTPConfig) -> float:
        """Multiply-accumulates of one image under these options.

        Raises:
            ValueError: ``num_prop`` or ``num_neighbours`` does not fit the model.
        """
        depth, n, prefix = len(self.blocks), self.num_image_tokens, self.num_prefix
        config.check_fit(n, depth)
        counts = config.token_counts(n, depth)
        edges = self._edges(config) if config.uses_graph(depth) else 0
        total: float = self.outside + self.final_token * counts[-1]
        if edges and config.graph_type != "Spatial":
            total += n * n * self.channels
        for block, num_prop, before, after in zip(
            self.blocks, config.schedule(depth), counts, counts[1:], strict=False
        ):
            tokens = prefix + before
            total += tokens * (block.attention + tokens * block.pairs) + (prefix + after) * block.feed_forward
            if num_prop and config.selection in checks.MAP_STANDARDS:
                total += before * before * tokens
            if config.propagation == "GraphProp":
                total += 2 * self.channels * edges * num_prop // n / 2  # rounded as it is where it is counted
            elif config.propagation in ("Mean", "LiveGraph"):
                total += self.channels * num_prop
            if config.propagation == "LiveGraph" and num_prop:
                total += edges * block.head_size
            if self.restores and config.restore and config.propagation == "GraphProp":
                total += self.channels * num_prop * after
        return total

    def _edges(self, config: GTPConfig) -> int:
        height, width = self.grid_size
        neighbours = num_semantic_neighbours(
            self.num_image_tokens, config.num_neighbours, self.num_prefix, config.semantics
        )
        return edge_capacity(height, width, config.graph_type, neighbours)


def block_work(block: nn.Module, attention: nn.Module, width: int, heads: int) -> BlockWork:
    """What a block does that consists of linear layers and one attention of ``width`` H · d and so many heads."""
    attending = per_token(attention)
    return BlockWork(attending, 2 * width, per_token(block) - attending, width // heads)


def per_token(module: nn.Module) -> int:
    """What the linear layers of a module do for each token that goes through all of them."""
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))


def outside(
    model: nn.Module, embed: Callable[[], object], head: Callable[[int], object], num_prefix: int
) -> tuple[int, int]:
    """What embedding and head do: with R final tokens, and per further final token.

    Args:
        embed: embeds one image.
        head: the head, of one image of so many tokens. It is counted twice: pooling may take work per token.
    """

    def macs(run: Callable[[], object]) -> int:
        return flops.counted(model, run).get_total_flops() // 2

    one, two = (macs(partial(head, num_prefix + tokens)) for tokens in (1, 2))
    return macs(embed) + 2 * one - two, two - one


def features(model: Any, tokens: int, channels: int) -> Tensor:
    """Zeros [1, tokens, channels] in the type of the model and on its device."""
    parameter: Tensor = next(model.parameters())
    return parameter.new_zeros(1, tokens, channels)
