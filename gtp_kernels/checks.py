"""Checks of arguments: every error names the argument, what came, and what may come.

A wrong kind of thing (not a tensor, a dtype, a device) is a ``TypeError`` where the type is at fault and a
``ValueError`` where the value is. Nothing here reads tensor data except :func:`index_range`, which does so on the
CPU only (on a GPU it would synchronise, so there it runs under ``GTP_KERNELS_DEBUG=1`` alone).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

SEMANTICS = ("official", "paper")
ORDERS = ("importance", "grid")
PROPAGATIONS = ("None", "Mean", "GraphProp")
GRAPH_TYPES = ("Spatial", "Semantic", "Mixed")
NORMS = ("layer", "rms", "none")
SCORE_STANDARDS = (
    "CLSAttnMean",
    "CLSAttnMax",
    "IMGAttnMean",
    "IMGAttnMax",
    "DiagAttnMean",
    "DiagAttnMax",
    "MixedAttnMean",
    "MixedAttnMax",
    "SumAttnMax",
)
MAP_STANDARDS = ("CosSimMean", "CosSimMax")
STANDARDS = (*SCORE_STANDARDS, *MAP_STANDARDS, "Random")
# The paper's names of what the authors' code calls IMGAttn.
ALIASES = {"BroadAttnMean": "IMGAttnMean", "BroadAttnMax": "IMGAttnMax"}
FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def choice(name: str, value: object, options: Iterable[str]) -> str:
    """``value`` if it is one of ``options``."""
    options = tuple(options)
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, one of {', '.join(options)}; got {type(value).__name__}")
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(options)}; got {value!r}")
    return value


def standard(name: str, value: object, options: Iterable[str]) -> str:
    """``value`` if it is one of ``options``, which name standards; an alias gives the name that it stands for."""
    if isinstance(value, str):
        value = ALIASES.get(value, value)
    return choice(name, value, options)


def integer(name: str, value: object, low: int = 0) -> int:
    """``value`` if it is an integer of at least ``low`` (a bool is not one; a symbolic size is)."""
    if isinstance(value, bool | Tensor):
        raise TypeError(f"{name} must be an int; got {type(value).__name__}")
    if not isinstance(value, int | torch.SymInt):  # both come first: a tracer knows them, and little else
        if not hasattr(value, "__index__"):
            raise TypeError(f"{name} must be an int; got {type(value).__name__}")
        value = int(value.__index__())
    if not low <= value < 2**31:
        limit = f"at least {low}" if value < low else f"below {2**31}"
        raise ValueError(f"{name} must be {limit}; got {value}")
    return value  # type: ignore[return-value]  # a symbolic size while tracing


def number(name: str, value: object) -> float:
    """``value`` as a finite float."""
    if isinstance(value, bool | Tensor | str):
        raise TypeError(f"{name} must be a number; got {type(value).__name__}")
    if not isinstance(value, int | float | torch.SymFloat | torch.SymInt):
        if not hasattr(value, "__float__"):
            raise TypeError(f"{name} must be a number; got {type(value).__name__}")
        value = float(value)
    if torch.compiler.is_compiling():
        return value  # type: ignore[return-value]  # may be symbolic: its value is not known while tracing
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        raise ValueError(f"{name} must be finite; got {result}")
    return result


def sparsity(value: object) -> float:
    """θ in (0, 1]."""
    result = number("sparsity", value) if not isinstance(value, float) else value
    if not 0.0 < result <= 1.0:
        raise ValueError(f"sparsity must be in (0, 1]; got {result}")
    return result


def floating(name: str, value: object, ndim: int, shape: str) -> Tensor:
    """``value`` if it is a floating-point tensor of ``ndim`` dimensions, described by ``shape``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor {shape}; got {type(value).__name__}")
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16; got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor; got layout {value.layout}")
    if value.ndim != ndim:
        raise ValueError(f"{name} must be {ndim}-dimensional {shape}; got shape {tuple(value.shape)}")
    return value


def same_device(**tensors: Tensor | None) -> None:
    """All tensors (``None`` aside) live on the device of the first."""
    first: tuple[str, torch.device] | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if first is None:
            first = (name, tensor.device)
        elif tensor.device != first[1]:
            raise ValueError(f"{name} must be on the device of {first[0]}, {first[1]}; got {tensor.device}")


def shape_is(name: str, tensor: Tensor, expected: Sequence[int], meaning: str) -> None:
    """The shape of ``tensor`` is ``expected``, described by ``meaning``."""
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{name} must have shape {meaning} = {tuple(expected)}; got {tuple(tensor.shape)}")


def prefix(num_prefix: object, cls_token: object, num_tokens: int, name: str = "x") -> int:
    """The number of prefix tokens R: ``num_prefix`` where given, else 1 or 0 by ``cls_token``."""
    if cls_token is not None and not isinstance(cls_token, bool):
        raise TypeError(f"cls_token must be a bool; got {type(cls_token).__name__}")
    if num_prefix is None and cls_token is not None:
        result = int(cls_token)
    else:
        result = integer("num_prefix", num_prefix)
    if result > num_tokens:
        raise ValueError(f"num_prefix must be at most the {num_tokens} tokens of {name}; got {result}")
    return result


def num_prop(value: object, num_image_tokens: int) -> int:
    """P: 0 ≤ P < n (P = 0 also where n = 0)."""
    result = integer("num_prop", value)
    if result and result >= num_image_tokens:
        raise ValueError(
            f"num_prop must be in [0, {max(num_image_tokens, 1)}) for {num_image_tokens} image tokens; got {result}"
        )
    return result


def index(name: str, value: object, batch: int) -> Tensor:
    """An int64 tensor [B, any]."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be an int64 tensor [B, tokens]; got {type(value).__name__}")
    if value.dtype != torch.int64:
        raise TypeError(f"{name} must be int64; got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor; got layout {value.layout}")
    if value.ndim != 2 or value.shape[0] != batch:
        raise ValueError(f"{name} must have shape [B, tokens] with B = {batch}; got {tuple(value.shape)}")
    return value


def index_range(name: str, value: Tensor, low: int, high: int) -> None:
    """Every value of ``value`` is in [low, high); looked at on the CPU, or where GTP_KERNELS_DEBUG=1."""
    if torch.compiler.is_compiling() or value.numel() == 0 or type(value) not in (Tensor, torch.nn.Parameter):
        return
    if value.device.type == "meta" or (value.device.type != "cpu" and os.environ.get("GTP_KERNELS_DEBUG") != "1"):
        return
    least, most = (int(bound) for bound in value.aminmax())
    if least < low or most >= high:
        raise ValueError(f"{name} must hold indices in [{low}, {high}); got values from {least} to {most}")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_scales: Tensor | None,
    theta: object,
    scale: object,
    semantics: object,
) -> tuple[float, float]:
    """Arguments of the attention; returns (sparsity, scale)."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        floating(name, tensor, 4, "[B, H, N, d]")
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype, {q.dtype}; got {tensor.dtype}")
        shape_is(name, tensor, q.shape, "that of q")
    if q.shape[2] == 0 or q.shape[3] == 0:
        raise ValueError(f"q must have at least one token and a head size of at least 1; got shape {tuple(q.shape)}")
    if token_scales is not None:
        floating("token_scales", token_scales, 2, "[B, N]")
        shape_is("token_scales", token_scales, (q.shape[0], q.shape[2]), "[B, N]")
    same_device(q=q, k=k, v=v, token_scales=token_scales)
    choice("semantics", semantics, SEMANTICS)
    return sparsity(theta), q.shape[-1] ** -0.5 if scale is None else number("scale", scale)


def scores(diag: Tensor, colsum: Tensor, cls_row: Tensor) -> None:
    """Three tensors [B, H, N] of one dtype, float32 or float64."""
    for name, tensor in (("diag", diag), ("colsum", colsum), ("cls_row", cls_row)):
        floating(f"scores.{name}", tensor, 3, "[B, H, N]")
        if tensor.dtype not in (torch.float32, torch.float64) or tensor.dtype != diag.dtype:
            raise TypeError(f"scores.{name} must be float32 or float64, like scores.diag; got {tensor.dtype}")
        shape_is(f"scores.{name}", tensor, diag.shape, "that of scores.diag")
    if diag.shape[1] == 0:
        raise ValueError(f"scores must have at least one head; got shape {tuple(diag.shape)}")
    same_device(diag=diag, colsum=colsum, cls_row=cls_row)


def tokens_and_indices(
    x: Tensor, index_kept: Tensor, index_prop: Tensor, token_scales: Tensor | None, num_prefix: int
) -> None:
    """What every form of the propagation takes: x [B,N,C], the two index tensors, token scales [B,N]."""
    batch, num_tokens = x.shape[:2]
    index("index_kept", index_kept, batch)
    index("index_prop", index_prop, batch)
    count = num_prefix + index_kept.shape[1] + index_prop.shape[1]
    if count != num_tokens:
        raise ValueError(
            "index_kept and index_prop must divide the image tokens of x: "
            f"{num_prefix} prefix + {index_kept.shape[1]} kept + {index_prop.shape[1]} propagated "
            f"of {num_tokens} tokens"
        )
    if token_scales is not None:
        floating("token_scales", token_scales, 2, "[B, N]")
        shape_is("token_scales", token_scales, (batch, num_tokens), "[B, N]")
    same_device(x=x, index_kept=index_kept, index_prop=index_prop, token_scales=token_scales)


def graph(
    indptr: Tensor,
    indices: Tensor,
    values: Tensor,
    token: Tensor,
    batch: int,
    num_image_tokens: int,
    device: object,
    owner: str,
) -> None:
    """The parts of the TokenGraph ``owner``, for ``batch`` images of ``num_image_tokens`` current rows."""
    for name, tensor, dtype in (
        ("indptr", indptr, torch.int32),
        ("indices", indices, torch.int32),
        ("values", values, torch.float32),
        ("token", token, torch.int32),
    ):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{owner}.{name} must be a tensor; got {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{owner}.{name} must be a dense (strided) tensor; got layout {tensor.layout}")
        if tensor.dtype != dtype:
            raise TypeError(f"{owner}.{name} must be {dtype}; got {tensor.dtype}")
        if tensor.ndim != 2 or tensor.shape[0] != batch:
            raise ValueError(f"{owner}.{name} must be [B, any] with B = {batch}; got shape {tuple(tensor.shape)}")
        if tensor.device != device:
            raise ValueError(f"{owner}.{name} must be on the device of x, {device}; got {tensor.device}")
    shape_is(f"{owner}.values", values, indices.shape, f"that of {owner}.indices")
    shape_is(f"{owner}.token", token, (batch, num_image_tokens), "[B, n]")
    if indptr.shape[1] < num_image_tokens + 1:
        raise ValueError(
            f"{owner}.indptr must be [B, original tokens + 1] for at least {num_image_tokens} tokens; "
            f"got shape {tuple(indptr.shape)}"
        )


def dense_graph(weight: Tensor, batch: int, num_image_tokens: int) -> None:
    """A dense weight [B, n, n]."""
    floating("weight", weight, 3, "[B, n, n]")
    shape_is("weight", weight, (batch, num_image_tokens, num_image_tokens), "[B, n, n]")


def embedded_tokens(
    x: Tensor, grid_size: object, graph_type: object, num_neighbours: object, num_prefix: object, semantics: object
) -> tuple[int, int, int, int]:
    """Arguments of build_graph; returns (height, width, num_neighbours, num_prefix)."""
    floating("x", x, 3, "[B, N, C]")
    if x.shape[2] == 0:
        raise ValueError(f"x must have at least one channel; got shape {tuple(x.shape)}")
    if not isinstance(grid_size, Sequence) or isinstance(grid_size, str) or len(grid_size) != 2:
        raise TypeError(f"grid_size must be a pair (height, width); got {grid_size!r}")
    height, width = (integer(f"grid_size[{i}]", side, 1) for i, side in enumerate(grid_size))
    choice("graph_type", graph_type, GRAPH_TYPES)
    choice("semantics", semantics, SEMANTICS)
    count = prefix(num_prefix, None, x.shape[1])
    num_image_tokens = x.shape[1] - count
    if height * width != num_image_tokens:
        raise ValueError(
            f"grid_size must cover the {num_image_tokens} image tokens of x ({x.shape[1]} tokens, {count} prefix); "
            f"got {height} x {width} = {height * width}"
        )
    neighbours = integer("num_neighbours", num_neighbours)
    if graph_type == "Spatial":
        return height, width, 0, count
    if neighbours >= num_image_tokens:
        raise ValueError(
            f"num_neighbours must be in [0, {num_image_tokens}) for {num_image_tokens} image tokens; got {neighbours}"
        )
    return height, width, neighbours, count
