"""GMACs of a model, and the FLOP formulas that make ``torch.utils.flop_counter`` see the operators of gtp_kernels.

One multiply-accumulate is two FLOPs, as in torch's own counter. Only products are counted: softmax, norms, top-k and
gathers are not, neither here nor there.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import flop_counter

Shape = Sequence[int]
Formula = Callable[..., int]


def _attention(q: Shape, k: Shape, v: Shape, *args: Any, **kwargs: Any) -> int:
    """q, k, v [B, H, N, d]: the two products of attention; the scores are read off the map and add none."""
    return int(flop_counter.sdpa_flop_count(q, k, v))


def _attention_backward(grad_out: Shape, q: Shape, k: Shape, v: Shape, *args: Any, **kwargs: Any) -> int:
    """Five products: the map is computed again, then the gradients of it, of v, q and k."""
    return int(flop_counter.sdpa_backward_flop_count(grad_out, q, k, v))


def _propagation(channels: int, indptr: Shape | None, indices: Shape | None, index_prop: Shape, standard: str) -> int:
    """Edges that leave a propagated token, times the channels: 2 * C * (E / n0) * P per image.

    The count is that of the average token, because a formula sees shapes only; edges between two propagated tokens,
    which carry nothing, are counted too.
    """
    batch, propagated = index_prop
    if standard == "Mean":
        return 2 * batch * propagated * channels
    if standard == "None" or indptr is None or indices is None:
        return 0
    tokens = indptr[-1] - 1
    return 2 * batch * channels * indices[-1] * propagated // max(tokens, 1)


def _propagate(
    x: Shape,
    indptr: Shape | None,
    indices: Shape | None,
    values: Shape | None,
    token: Shape | None,
    index_kept: Shape,
    index_prop: Shape,
    token_scales: Shape | None,
    standard: str,
    *args: Any,
    **kwargs: Any,
) -> int:
    return _propagation(x[-1], indptr, indices, index_prop, standard)


def _propagate_backward(
    grad: Shape,
    indptr: Shape | None,
    indices: Shape | None,
    values: Shape | None,
    token: Shape | None,
    index_kept: Shape,
    index_prop: Shape,
    standard: str,
    *args: Any,
    **kwargs: Any,
) -> int:
    return _propagation(grad[-1], indptr, indices, index_prop, standard)


def _propagate_dense(x: Shape, weight: Shape, index_kept: Shape, index_prop: Shape, *args: Any, **kwargs: Any) -> int:
    """A dense product of the kept-by-propagated block of the weights with the propagated rows."""
    batch, kept = index_kept
    return 2 * batch * kept * index_prop[-1] * x[-1]


def _residual_propagate_norm(
    x: Shape,
    branch: Shape,
    layer_scale: Shape | None,
    indptr: Shape | None,
    indices: Shape | None,
    values: Shape | None,
    token: Shape | None,
    index_kept: Shape,
    index_prop: Shape,
    token_scales: Shape | None,
    norm_weight: Shape | None,
    norm_bias: Shape | None,
    norm_eps: float,
    norm: str,
    standard: str,
    *args: Any,
    **kwargs: Any,
) -> int:
    return _propagation(x[-1], indptr, indices, index_prop, standard)


def _select_residual_propagate_norm(
    x: Shape,
    branch: Shape,
    layer_scale: Shape | None,
    indptr: Shape | None,
    indices: Shape | None,
    values: Shape | None,
    token: Shape | None,
    diag: Shape,
    colsum: Shape,
    cls_row: Shape,
    selection: str,
    num_prop: int,
    order: str,
    semantics: str,
    token_scales: Shape | None,
    norm_weight: Shape | None,
    norm_bias: Shape | None,
    norm_eps: float,
    norm: str,
    standard: str,
    *args: Any,
    **kwargs: Any,
) -> int:
    return _propagation(x[-1], indptr, indices, (x[0], num_prop), standard)


def _build_graph(x: Shape, height: int, width: int, graph_type: str, *args: Any, **kwargs: Any) -> int:
    """The cosine similarities of all pairs of image tokens; the spatial graph needs no product."""
    if graph_type not in ("Semantic", "Mixed"):
        return 0
    return 2 * x[0] * (height * width) ** 2 * x[-1]


def _live_graph(indptr: Shape, indices: Shape, *args: Any, **kwargs: Any) -> int:
    return 0


def _live_select(
    k: Shape, importance: Shape, indptr: Shape, indices: Shape, rep: Shape, *args: Any, **kwargs: Any
) -> int:
    """One cosine for each pair of neighbours: E / 2 products of d (not those that the choice computes again)."""
    return k[0] * indices[1] * k[-1]


def _live_merge(
    x: Shape, branch: Shape, layer_scale: Shape | None, index_kept: Shape, index_prop: Shape, *args: Any, **kwargs: Any
) -> int:
    """Every row that leaves, times its share."""
    return 2 * index_prop[0] * index_prop[1] * x[-1]


FORMULAS: dict[str, Formula] = {
    "attention_with_scores": _attention,
    "attention_with_scores_backward": _attention_backward,
    "propagate": _propagate,
    "propagate_backward": _propagate_backward,
    "propagate_dense": _propagate_dense,
    "residual_propagate_norm": _residual_propagate_norm,
    "select_residual_propagate_norm": _select_residual_propagate_norm,
    "build_graph": _build_graph,
    "live_graph": _live_graph,
    "live_select": _live_select,
    "live_merge": _live_merge,
}


def register_formulas() -> None:
    """Registers the formulas with ``torch.utils.flop_counter``; any counter made afterwards uses them.

    Also registers the attention that PyTorch runs on CPUs, where torch's own table lacks it (2.11 does): without it the
    unpatched model would seem to do less work than it does. A formula that is already there stays; calling this again
    changes nothing.
    """
    import gtp_kernels  # noqa: F401  (defines the operators)

    targets: list[tuple[Any, str, Formula]] = [
        (torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", _attention),
        (torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", _attention_backward),
    ]
    targets += [(torch.ops.gtp_kernels, name, formula) for name, formula in FORMULAS.items()]
    for namespace, name, formula in targets:
        target = getattr(namespace, name, None)
        if target is not None and target not in flop_counter.flop_registry:
            flop_counter.register_flop_formula(target)(formula)


def gmacs(model: nn.Module, example_or_size: Tensor | int | tuple[int, int], **options: Any) -> float:
    """Multiply-accumulates of one image, in units of 1e9.

    Args:
        model: a vision model; it is run once, in evaluation mode and without gradients, and is as before afterwards.
            No other thread may use it meanwhile.
        example_or_size: a batch [B, 3, H, W], or the image size as one number or (H, W), for which one image of noise
            in the model's dtype and on its device is made.
        options: of the forward: ``interpolate_pos_encoding=True`` for a model of transformers at another size.

    Returns:
        GMACs of one image, as the backend that runs does them: the reference counts a little more than a fused kernel.

    Raises:
        ValueError: a size below 1, or an empty batch.
        TypeError: not a module, or one of transformers that takes text; neither a tensor nor a size.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, got {type(model).__name__}")
    if isinstance(example_or_size, Tensor):
        example = example_or_size
    else:
        example = noise(model, example_or_size)
    if example.ndim == 0 or example.shape[0] == 0:
        raise ValueError(f"example_or_size: expected at least one image, got shape {tuple(example.shape)}")
    takes = getattr(model, "main_input_name", "pixel_values")
    if takes != "pixel_values" and example.is_floating_point():
        raise TypeError(f"model: {type(model).__name__} takes {takes}, not images: count its vision tower")
    return float(counted(model, lambda: model(example, **options)).get_total_flops()) / 2 / example.shape[0] / 1e9


def counted(model: nn.Module, run: Callable[[], object]) -> flop_counter.FlopCounterMode:
    """Counts ``run``, which calls ``model`` or parts of it, in evaluation mode and without gradients."""
    register_formulas()
    # The counter's module tracker fails where a module receives a parameter that requires gradients and gradients are
    # off (attention pooling: torch 2.11).
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    modes = [(module, module.training) for module in model.modules()]
    model.eval().requires_grad_(False)
    try:
        with torch.no_grad(), flop_counter.FlopCounterMode(display=False) as counter:
            run()
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module, training in modes:
            module.training = training
    return counter


def noise(model: nn.Module, size: int | tuple[int, int], name: str = "example_or_size") -> Tensor:
    """One image of noise in the model's dtype and on its device; ``size``, called ``name``, as in :func:`gmacs`."""
    height, width = _pair(size, name)
    if height < 1 or width < 1:
        raise ValueError(f"{name}: sizes start at 1, got {(height, width)}")
    parameter = next(model.parameters(), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, height, width, generator=generator, device="cpu")
    return image.to(device=parameter.device, dtype=parameter.dtype)


def _pair(size: object, name: str) -> tuple[int, int]:
    sides = size if isinstance(size, (tuple, list)) else (size, size)
    if len(sides) != 2 or any(isinstance(side, (bool, Tensor)) or not hasattr(side, "__index__") for side in sides):
        expected = "a tensor, an int" if name == "example_or_size" else "an int"
        raise TypeError(f"{name}: expected {expected} or (height, width), got {size!r}")
    return operator.index(sides[0]), operator.index(sides[1])
