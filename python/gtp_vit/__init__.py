"""GTP, graph-based token propagation, for pre-trained Vision Transformers.

    model = gtp_vit.patch(model, num_prop=8)    # in place: tokens leave in every block, the weights stay
    gtp_vit.unpatch(model)                      # the model is as it was

Importing this package needs torch and numpy; the library of a model is imported when such a model is patched. It also
registers FLOP formulas, so that any ``torch.utils.flop_counter`` counts a patched model.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from torch import nn

from gtp_kernels import checks
from gtp_vit.config import GTPConfig
from gtp_vit.flops import gmacs, register_formulas
from gtp_vit.graphs import Graphed, graphed
from gtp_vit.restore import restore_grid
from gtp_vit.schedule import schedule
from gtp_vit.tracing import LayerRecord, Trace, trace

if TYPE_CHECKING:
    from types import ModuleType

__all__ = [
    "GTPConfig",
    "Graphed",
    "LayerRecord",
    "Trace",
    "gmacs",
    "graphed",
    "patch",
    "restore_grid",
    "schedule",
    "trace",
    "unpatch",
]

Model = TypeVar("Model", bound=nn.Module)

register_formulas()


def patch(
    model: Model,
    num_prop: int | Sequence[int] = 8,
    sparsity: float = 0.6,
    alpha: float = 0.2,
    selection: str = "MixedAttnMax",
    propagation: str = "GraphProp",
    graph_type: str = "Mixed",
    num_neighbours: int = 8,
    token_scale: bool = True,
    semantics: str = "official",
    restore: bool = False,
    gamma: float = 0.25,
    seed: int | None = None,
) -> Model:
    """Makes ``model`` shrink its token sequence inside every block (paper, Section 3.2); in place.

    Everything is checked first, so a model for which this raises is untouched. Weights, state_dict keys, dtype and
    device stay. What one forward knows travels in arguments, never on a module: one patched model serves several
    threads, and it can be copied, pickled, compiled and moved. The layer scale and second norm of a block run inside
    the fused step, unless they carry hooks. With P = 0 everywhere and θ = 1 the model computes what it did before,
    bit for bit. Hooks on a block see the tuple (x, state) that it hands on, those on its attention (out, scores).

    Args:
        model: a model built on ``timm.models.vision_transformer.VisionTransformer`` (:mod:`gtp_vit.lvvit` has one) or
            ``timm.models.eva.Eva``; or one of transformers: ``ViTModel``, ``DeiTModel``, ``Dinov2Model``,
            ``Dinov2WithRegistersModel``, ``CLIPVisionModel``, ``SiglipVisionModel``, or one of their classifiers,
            ``CLIPVisionModelWithProjection``, ``CLIPModel`` or ``SiglipModel``, whose tower is patched. Of another
            model around such a tower, patch the tower.
        num_prop: P, the image tokens that leave in each block: an int, or one per block; :func:`schedule` makes some.
        sparsity: θ in (0, 1], the share of the attention map that is kept. LV-ViT keeps all of it under ``official``
            semantics, whatever is given here, as the authors' LV-ViT does; ``paper`` semantics apply θ there too.
        alpha: α of Equations 10 and 12.
        selection: how importance is judged: ``{CLSAttn,IMGAttn,DiagAttn,MixedAttn,CosSim}{Mean,Max}``, ``SumAttnMax``,
            ``Random``, or ``None``, by which no token leaves. ``BroadAttn*`` is ``IMGAttn*``. ``CosSim*`` needs the
            N × N map: patching says so once, in a warning.
        propagation: ``GraphProp``, ``Mean`` (not with a rotary position embedding), ``None``, or ours, ``LiveGraph``:
            see :class:`GTPConfig`.
        graph_type: ``Spatial``, ``Semantic`` or ``Mixed``; ``None`` fits ``Mean`` and ``None``.
        num_neighbours: M, 0 ≤ M < n, the semantic neighbours of a token.
        token_scale: whether attention counts how many tokens each one stands for (Equation 11).
        semantics: ``official`` or ``paper``.
        restore: what ``forward_intermediates`` and ``get_intermediate_layers`` of timm, and ``last_hidden_state`` and
            ``hidden_states`` of transformers give: the full grid, in which tokens that left are filled through the
            propagation weights (:func:`restore_grid`), or, with False, the image tokens that remain, in grid order,
            for which ``output_fmt`` must be "NLC".
        gamma: γ ≥ 0 of ``LiveGraph``.
        seed: of ``Random``: with one, every forward draws the same numbers; ``None`` takes torch's generator.

    Returns:
        ``model``, with the options that it runs with as the :class:`GTPConfig` ``model.gtp``.

    Raises:
        TypeError: a model, block or attention of a class that is not supported, or an option of the wrong kind.
        ValueError: a model that is patched already; active patch or attention dropout; an option out of range or
            unknown; P or M that does not fit the model's nominal input size; CLS selection without a class token;
            ``Mean`` with a rotary position embedding. The forward raises it for an input size at which P or M does not
            fit, for a mask, for causal attention, and where attention maps are asked for.
        ImportError: a timm or transformers that is too old.
    """
    config = GTPConfig(
        num_prop,  # type: ignore[arg-type]  # the config makes a tuple of a sequence
        sparsity,
        alpha,
        selection,
        propagation,
        graph_type,
        num_neighbours,
        token_scale,
        semantics,
        restore,
        gamma,
        seed,
    )
    patched: Model = _library_of(model).patch(model, config)
    if config.selection in checks.MAP_STANDARDS:
        warnings.warn(
            f"selection = {config.selection!r} needs the N x N attention map: it runs without the fused attention",
            stacklevel=2,
        )
    return patched


def unpatch(model: Model) -> Model:
    """Undoes :func:`patch` in place: classes, attributes and results are those of before, bit for bit.

    Raises:
        TypeError: a model of a library that cannot be patched.
        ValueError: ``model`` is not patched.
    """
    unpatched: Model = _library_of(model).unpatch(model)
    return unpatched


_NEEDED = {"timm": "1.0.17", "transformers": "5.18"}


def _library_of(model: object) -> ModuleType:
    """The module that patches the library of ``model``, imported here and not before."""
    packages = {base.__module__.partition(".")[0] for base in type(model).__mro__}
    for package, needed in _NEEDED.items():
        if isinstance(model, nn.Module) and package in packages:
            try:
                return importlib.import_module(f"gtp_vit.patch_{package}")
            except ImportError as error:
                found = sys.modules[package].__version__
                raise ImportError(
                    f"gtp_vit needs {package} >= {needed}; found {found}: pip install -U {package} ({error})"
                ) from error
    raise TypeError(
        "model must be built on timm.models.vision_transformer.VisionTransformer or timm.models.eva.Eva, or come from "
        "transformers; "
        f"got {type(model).__module__}.{type(model).__qualname__}"
    )
