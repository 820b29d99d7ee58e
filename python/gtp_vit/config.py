"""The options of a patched model, checked once and never changed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from gtp_kernels import checks

SELECTIONS = (*checks.STANDARDS, "None")
PROPAGATIONS = (*checks.PROPAGATIONS, "LiveGraph")
GRAPH_PROPAGATIONS = ("GraphProp", "LiveGraph")
GRAPH_TYPES = ("None", *checks.GRAPH_TYPES)


@dataclass(frozen=True)
class GTPConfig:
    """What :func:`gtp_vit.patch` was asked for.

    Attributes:
        num_prop: P, the image tokens that leave in each block: an int for all blocks, or one per block.
        sparsity: θ in (0, 1], the share of the attention map that is kept (paper, Section 3.2.4); 1 keeps all.
        alpha: α of Equations 10 and 12, finite: how much of a propagated token its neighbours receive.
        selection: how the importance of a token is judged; ``"None"`` lets no token leave. ``BroadAttn*`` becomes
            ``IMGAttn*``, the other name of the same.
        propagation: ``"GraphProp"`` (Equation 10), ``"Mean"`` (the tokens that leave become one, appended), or
            ``"None"`` (they are dropped); or ours, ``"LiveGraph"`` (each is merged into the neighbour in the graph
            whose key is most like its own, :func:`gtp_kernels.live_select`; ``alpha`` has no part in it).
        graph_type: ``"Spatial"`` (Equation 5), ``"Semantic"`` (Equation 7) or ``"Mixed"`` (Equation 8); ``"None"``
            fits ``"Mean"`` and ``"None"``, which read no graph.
        num_neighbours: M, the semantic neighbours of a token: 0 ≤ M < n.
        token_scale: whether the attention counts how many tokens each one stands for (Equations 11 and 12).
        semantics: ``"official"`` (the authors' code) or ``"paper"`` (the formulas as printed).
        gamma: γ ≥ 0 of ``"LiveGraph"``: how much the importance counts beside the similarity.
        restore: whether intermediate features come as the full grid (:mod:`gtp_vit.restore`), or as the tokens
            that remain.
        seed: of ``"Random"``, 0 ≤ seed < 2³¹: block i of every forward draws the same numbers, from a generator of its
            own that is made of (seed, i), so that neither earlier forwards nor other threads change them; ``None``
            draws from torch's generator. ``torch.compile`` cannot trace a generator: its graph breaks there.

    Raises:
        TypeError: an option of the wrong kind.
        ValueError: an option out of range, an unknown name, or ``"GraphProp"`` without a graph.
    """

    num_prop: int | tuple[int, ...] = 8
    sparsity: float = 0.6
    alpha: float = 0.2
    selection: str = "MixedAttnMax"
    propagation: str = "GraphProp"
    graph_type: str = "Mixed"
    num_neighbours: int = 8
    token_scale: bool = True
    semantics: str = "official"
    restore: bool = False
    gamma: float = 0.25
    seed: int | None = None

    def __post_init__(self) -> None:
        checked = {
            "num_prop": _num_prop(self.num_prop),
            "sparsity": checks.sparsity(self.sparsity),
            "alpha": checks.number("alpha", self.alpha),
            "selection": checks.standard("selection", self.selection, SELECTIONS),
            "propagation": checks.choice("propagation", self.propagation, PROPAGATIONS),
            "graph_type": checks.choice("graph_type", self.graph_type, GRAPH_TYPES),
            "num_neighbours": checks.integer("num_neighbours", self.num_neighbours),
            "semantics": checks.choice("semantics", self.semantics, checks.SEMANTICS),
            "gamma": checks.number("gamma", self.gamma),
            "seed": None if self.seed is None else checks.integer("seed", self.seed),
        }
        if checked["gamma"] < 0:  # type: ignore[operator]  # a number
            raise ValueError(f"gamma must be at least 0; got {self.gamma}")
        for name in ("token_scale", "restore"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool; got {type(getattr(self, name)).__name__}")
        if self.propagation in GRAPH_PROPAGATIONS and self.graph_type == "None":
            raise ValueError(
                f"graph_type must be one of Spatial, Semantic, Mixed where propagation is {self.propagation!r}; "
                "got 'None' (propagation='None' drops tokens without a graph)"
            )
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def schedule(self, depth: int) -> tuple[int, ...]:
        """P of each of ``depth`` blocks; all zero where ``selection`` is ``"None"``.

        Raises:
            ValueError: ``num_prop`` has one value per block, and ``depth`` is another number of blocks.
        """
        if isinstance(self.num_prop, int):
            values = (self.num_prop,) * depth
        elif len(self.num_prop) != depth:
            raise ValueError(f"num_prop must have one value per block; got {len(self.num_prop)} for {depth} blocks")
        else:
            values = self.num_prop
        return (0,) * depth if self.selection == "None" else values

    def uses_graph(self, depth: int) -> bool:
        """Whether a model of ``depth`` blocks needs the token graph."""
        return self.propagation in GRAPH_PROPAGATIONS and any(self.schedule(depth))

    def token_counts(self, num_image_tokens: int, depth: int) -> tuple[int, ...]:
        """Image tokens before the first block and after each block: ``depth + 1`` values.

        ``Mean`` gives one token back in each block where some leave.

        Raises:
            ValueError: in some block no image token would stay; names the block and the largest constant P that fits.
        """
        counts = [num_image_tokens]
        for block, num_prop in enumerate(self.schedule(depth)):
            left = counts[-1]
            if num_prop and num_prop >= left:
                largest = self.largest_num_prop(num_image_tokens, depth)
                raise ValueError(
                    f"num_prop = {num_prop} does not fit block {block}: {left} of {num_image_tokens} image tokens are "
                    "left there, and at least one must stay; the largest constant num_prop that fits "
                    f"{num_image_tokens} image tokens and {depth} blocks is {largest}"
                )
            counts.append(left - num_prop + int(self.propagation == "Mean" and num_prop > 0))
        return tuple(counts)

    def largest_num_prop(self, num_image_tokens: int, depth: int) -> int:
        """The largest P that every one of ``depth`` blocks can take."""
        if depth == 0 or num_image_tokens == 0:
            return max(num_image_tokens - 1, 0)
        given_back = depth - 1 if self.propagation == "Mean" else 0
        return (num_image_tokens - 1 + given_back) // depth

    def check_fit(self, num_image_tokens: int, depth: int) -> None:
        """These options fit an input of ``num_image_tokens`` image tokens.

        Raises:
            ValueError: ``num_prop`` or ``num_neighbours`` does not fit.
        """
        self.token_counts(num_image_tokens, depth)
        semantic = self.graph_type in ("Semantic", "Mixed") and self.uses_graph(depth)
        if semantic and self.num_neighbours >= num_image_tokens:
            raise ValueError(
                f"num_neighbours must be in [0, {num_image_tokens}) for {num_image_tokens} image tokens; "
                f"got {self.num_neighbours}"
            )


def _num_prop(value: object) -> int | tuple[int, ...]:
    if isinstance(value, str) or (isinstance(value, Iterable) and not _is_scalar(value)):
        if isinstance(value, str | bytes | bytearray | dict | set | frozenset):
            raise TypeError(f"num_prop must be an int, or a sequence of one int per block; got {type(value).__name__}")
        entries = value.tolist() if hasattr(value, "tolist") else value
        return tuple(checks.integer(f"num_prop[{block}]", entry) for block, entry in enumerate(entries))
    if isinstance(value, bool | Tensor) or not hasattr(value, "__index__"):
        raise TypeError(f"num_prop must be an int, or a sequence of one int per block; got {type(value).__name__}")
    return checks.integer("num_prop", value)


def _is_scalar(value: object) -> bool:
    """A tensor or array without dimensions is not a sequence, though its class says so."""
    return getattr(value, "ndim", None) == 0
