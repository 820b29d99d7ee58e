"""Which kernels the Triton launchers start, and how, found without a GPU.

The launchers run on fake CUDA tensors, over a table of shape classes, with ``gtp_kernels.triton.runtime.launch``
replaced by a recorder. What is recorded is what Triton would compile: the kernel, the types of its arguments and what
it specialises on (divisibility by 16, integers that are 1), the constants, warps and stages.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gtp_kernels.reference.graph import edge_capacity

MAX_GRID = (2**31 - 1, 65535, 65535)


@dataclass(frozen=True)
class Target:
    """One GPU architecture, with the limits that decide how many warps fit.

    Attributes:
        name: as on the command line, ``sm_90`` or ``gfx942``.
        warp_size: threads of a warp.
        max_warps: warps (waves) that a multiprocessor (compute unit) holds; ``max_blocks`` likewise.
        registers: 32-bit registers per multiprocessor (NVIDIA), or vector registers per lane of one SIMD (AMD).
        register_unit: registers are handed out in multiples of this, per warp (NVIDIA) or per lane (AMD).
        shared, max_shared: bytes per multiprocessor, and the most that one block may ask for.
    """

    name: str
    warp_size: int
    max_warps: int
    max_blocks: int
    registers: int
    register_unit: int
    shared: int
    max_shared: int
    core: bool = False

    @property
    def is_cuda(self) -> bool:
        """Whether this is an NVIDIA architecture."""
        return self.name.startswith("sm_")

    def gpu_target(self) -> Any:
        """Triton's name for it."""
        from triton.backends.compiler import GPUTarget

        if self.is_cuda:
            return GPUTarget("cuda", int(self.name.removeprefix("sm_")), self.warp_size)
        return GPUTarget("hip", self.name, self.warp_size)

    def occupancy(self, registers: int, shared: int, num_warps: int) -> float:
        """The share of the warps that a multiprocessor can hold which these registers and this shared memory leave."""
        if shared > self.max_shared:
            return 0.0
        registers = -(-max(registers, 1) // self.register_unit) * self.register_unit
        if self.is_cuda:
            # Four schedulers, each with a quarter of the registers, take warps in turn; 1 KB per block is reserved.
            per_warp = -(-registers * 32 // 256) * 256
            blocks = min(self.registers // 4 // per_warp * 4, self.max_warps) // num_warps
            if shared:
                blocks = min(blocks, self.shared // (shared + 1024))
        else:
            # Four SIMDs; a wave stays on one of them.
            blocks = min(self.registers // registers, self.max_warps // 4) * 4 // num_warps
            if shared:
                blocks = min(blocks, self.shared // shared)
        return min(blocks, self.max_blocks) * num_warps / self.max_warps


_KB = 1024
# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD's CDNA3 and RDNA3 ISA guides.
TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", 32, 64, 32, 65536, 8, 164 * _KB, 163 * _KB, core=True),
        Target("sm_86", 32, 48, 16, 65536, 8, 100 * _KB, 99 * _KB),
        Target("sm_89", 32, 48, 24, 65536, 8, 100 * _KB, 99 * _KB),
        Target("sm_90", 32, 64, 32, 65536, 8, 228 * _KB, 227 * _KB, core=True),
        Target("sm_100", 32, 64, 32, 65536, 8, 228 * _KB, 227 * _KB),
        Target("sm_120", 32, 48, 24, 65536, 8, 100 * _KB, 99 * _KB, core=True),
        Target("gfx942", 64, 32, 32, 512, 8, 64 * _KB, 64 * _KB, core=True),
        Target("gfx1100", 32, 64, 32, 1536, 24, 64 * _KB, 64 * _KB),
    )
}


@dataclass
class Launch:
    """What Triton compiles for one launch. ``labels`` are the shape classes that launch it."""

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    labels: list[str] = field(default_factory=list)
    may_spill: str | None = None

    @property
    def name(self) -> str:
        """The kernel's function name."""
        return str(self.kernel.fn.__name__)

    def key(self) -> str:
        """Equal for launches that compile to the same code: the kernel's source counts, and all that is fixed."""
        constants = {k: content_key(v) if hasattr(v, "cache_key") else repr(v) for k, v in self.constexprs.items()}
        parts = (content_key(self.kernel), self.signature, constants, self.attrs, sorted(self.options.items()))
        return repr(parts)

    def config_key(self) -> str:
        """Equal for launches of one configuration: what Triton specialises integers on is left out."""
        declared = [parameter.name for parameter in self.kernel.params if parameter.is_constexpr]
        constants = {k: v for k, v in self.constexprs.items() if self.kernel.arg_names[k[0]] in declared}
        pointers = [kind for kind in self.signature.values() if kind.startswith("*")]
        return repr((content_key(self.kernel), pointers, constants, sorted(self.options.items())))

    def config(self) -> str:
        """The constants as people read them, sizes first."""
        names = self.kernel.arg_names
        given = {names[path[0]]: value for path, value in self.constexprs.items() if names[path[0]].isupper()}
        return " ".join(f"{name}={_short(value)}" for name, value in given.items())


@functools.cache
def content_key(kernel: Any) -> str:
    """Triton's ``cache_key`` without the line on which a kernel, or one of ours that it calls, begins.

    The lines are in the debug information only: an edit above a kernel does not change its code.
    """
    from triton.runtime.jit import JITFunction

    names = {name for name in sys.modules if name.startswith("gtp_kernels.triton")} | {kernel.fn.__module__}
    found = {id(value): value for name in names for value in vars(sys.modules[name]).values()}
    functions = [value for value in (*found.values(), kernel) if isinstance(value, JITFunction)]
    before = [(function.hash, function.starting_line_number) for function in functions]
    try:
        for function in functions:
            function.hash, function.starting_line_number = None, 0
        return str(kernel.cache_key)
    finally:
        for function, (known, line) in zip(functions, before, strict=True):
            function.hash, function.starting_line_number = known, line


def _short(value: object) -> str:
    if isinstance(value, bool):
        return str(int(value))
    return str(getattr(value, "__name__", value))


def one_per_configuration(launches: Iterable[Launch]) -> list[Launch]:
    """The first launch of every configuration."""
    return list({launch.config_key(): launch for launch in reversed(list(launches))}.values())[::-1]


class Pointer:
    """What Triton asks of a tensor argument: its type, its address (for alignment), and how far it reaches."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        self._address = tensor.storage_offset() * tensor.element_size()
        self._bytes = tensor.untyped_storage().nbytes()

    def data_ptr(self) -> int:
        """The offset in the storage; storages are aligned."""
        return int(self._address)

    def ptr_range(self) -> int:
        """Bytes of the storage."""
        return int(self._bytes)


class Recorder:
    """Stands in for ``runtime.launch``: what would be launched is noted under ``label``."""

    def __init__(self, target: Target) -> None:
        from triton.compiler import make_backend

        self.backend = make_backend(target.gpu_target())
        self.launches: dict[str, Launch] = {}
        self.label = ""
        self.may_spill: str | None = None

    def __call__(self, kernel: Any) -> Any:
        """The kernel, as a launcher may subscript it with a grid."""
        if not hasattr(kernel, "arg_names") or not hasattr(kernel, "params"):
            raise TypeError(f"expected a function of triton.jit; got {type(kernel).__name__}")
        return _Recorded(self, kernel)

    def record(self, kernel: Any, grid: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Notes one launch, once per set of what is compiled."""
        from triton.runtime.jit import create_function_from_signature

        plain = tuple(Pointer(a) if isinstance(a, Tensor) else a for a in args)
        named = {k: Pointer(v) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        bound, specialization, options = create_function_from_signature(kernel.signature, kernel.params, self.backend)(
            *plain, **named
        )
        grid = grid(bound) if callable(grid) else grid
        grid = (grid,) if isinstance(grid, int) else tuple(grid)
        if not all(0 < size <= limit for size, limit in zip(grid, MAX_GRID, strict=False)):
            raise ValueError(f"{kernel.fn.__name__} with {self.label}: the grid {grid} is not within {MAX_GRID}")
        _, signature, constexprs, attrs = kernel._pack_args(self.backend, named, bound, specialization, options)
        launch = Launch(kernel, signature, constexprs, attrs, options, may_spill=self.may_spill)
        known = self.launches.setdefault(launch.key(), launch)
        known.labels.append(self.label)
        if self.may_spill is None:
            known.may_spill = None


class _Recorded:
    def __init__(self, recorder: Recorder, kernel: Any) -> None:
        self.recorder, self.kernel = recorder, kernel

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: self.recorder.record(self.kernel, grid, args, kwargs)


@dataclass(frozen=True)
class ShapeClass:
    """One call of a launcher; ``arguments`` makes them, inside a FakeTensorMode."""

    operator: str
    label: str
    arguments: Callable[[], tuple[Any, ...]]
    may_spill: str | None = None


def capture(target: Target, classes: Iterable[ShapeClass] | None = None) -> list[Launch]:
    """Every distinct launch of the launchers over the shape classes, as they would run on ``target``.

    Raises:
        RuntimeError: this process interprets Triton's kernels.
        ImportError, AttributeError: a launcher is missing.
        ValueError: a grid is too large.
    """
    from gtp_kernels.triton import runtime

    if runtime.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET=1 is set: interpreted kernels cannot be compiled")
    recorder = Recorder(target)
    launchers = importlib.import_module("gtp_kernels.triton").LAUNCHERS
    with recording(recorder, runtime.launch), pretend(target), FakeTensorMode(allow_non_fake_inputs=True):
        for case in shape_classes() if classes is None else classes:
            recorder.label, recorder.may_spill = f"{case.operator} {case.label}", case.may_spill
            launchers[case.operator](*case.arguments())
    return list(recorder.launches.values())


@contextlib.contextmanager
def recording(recorder: Callable[[Any], Any], launch: Callable[..., Any]) -> Iterator[None]:
    """Replaces ``launch`` by the recorder in every module of the Triton package that holds it."""
    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("gtp_kernels.triton"):
                for attribute, value in list(vars(module).items()):
                    if value is launch:
                        stack.enter_context(mock.patch.object(module, attribute, recorder))
        yield


@contextlib.contextmanager
def pretend(target: Target) -> Iterator[None]:
    """Whoever asks torch for the device's architecture is told that it is ``target``."""
    digits = target.name.removeprefix("sm_")
    capability = (int(digits[:-1]), int(digits[-1])) if target.is_cuda else (9, 4)
    properties = types.SimpleNamespace(
        name=target.name, major=capability[0], minor=capability[1], gcnArchName=target.name, multi_processor_count=108,
        warp_size=target.warp_size, total_memory=80 * 2**30, shared_memory_per_block_optin=target.max_shared,
        shared_memory_per_multiprocessor=target.shared, regs_per_multiprocessor=target.registers,
    )  # fmt: skip
    with (
        mock.patch.object(torch.cuda, "get_device_capability", return_value=capability),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
        mock.patch.object(torch.version, "hip", None if target.is_cuda else "6.0"),
    ):
        # A launcher may keep what it learnt of the device.
        for clear in _caches():
            clear()
        yield
    for clear in _caches():
        clear()


def _caches() -> list[Callable[[], None]]:
    modules = [module for name, module in sys.modules.items() if name.startswith("gtp_kernels.triton")]
    values = [value for module in modules for value in vars(module).values()]
    # Asked of the class, so that no attribute of torch's or Triton's objects is looked up by name.
    return [value.cache_clear for value in values if inspect.getattr_static(type(value), "cache_clear", None)]


def shape_classes() -> list[ShapeClass]:
    """The shape classes that ship: DeiT-S, ViT-B/8, head sizes 16 to 256, and every variant of a kernel."""
    return [*_attention_classes(), *_select_classes(), *_propagate_classes(), *_graph_classes(), *_live_classes()]


_NUM_PROP = 8
_DOUBLE = "float64 runs in gradient checks only"
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
_HEADS = (
    # label, B, H, N, d, dtypes
    ("DeiT-S", 128, 6, 197, 64, (torch.bfloat16, torch.float16, torch.float32)),
    ("DeiT-S late", 128, 6, 109, 64, (torch.bfloat16, torch.float32)),
    ("DeiT-S last", 128, 6, 61, 64, (torch.bfloat16,)),
    ("few tokens", 128, 6, 17, 64, (torch.bfloat16,)),
    ("ViT-B/8", 32, 12, 785, 64, (torch.bfloat16, torch.float32)),
    ("d16", 64, 12, 197, 16, (torch.bfloat16,)),
    ("d32", 64, 12, 197, 32, (torch.bfloat16, torch.float32)),
    ("ViT-H/14 d80", 32, 16, 257, 80, (torch.bfloat16, torch.float32)),
    ("d128", 32, 8, 197, 128, (torch.bfloat16, torch.float32)),
    ("d256", 32, 4, 197, 256, (torch.bfloat16, torch.float32)),
    ("d256 long", 32, 4, 785, 256, (torch.bfloat16,)),
    ("double", 2, 2, 17, 16, (torch.float64,)),
    ("double long", 2, 2, 263, 16, (torch.float64,)),
)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda:0")


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _attention_classes() -> Iterator[ShapeClass]:
    for label, batch, heads, num_tokens, size, dtypes in _HEADS:
        for dtype in dtypes:
            may_spill = _DOUBLE if dtype == torch.float64 else None
            # Scales are a flag of the kernels, not a configuration: every combination once, the usual ones everywhere.
            unusual = ((1.0, True), (0.6, False)) if label == "DeiT-S" and dtype == torch.bfloat16 else ()
            for theta, scaled in ((1.0, False), (0.6, True), *unusual):
                name = f"{label} N{num_tokens} d{size} {_NAMES[dtype]} θ={theta:g}{' scales' if scaled else ''}"
                arguments = partial(_attention, (batch, heads, num_tokens, size), dtype, theta, scaled)
                yield ShapeClass("attention_with_scores", name, arguments, may_spill)
                backward = partial(_attention_backward, (batch, heads, num_tokens, size), dtype, arguments)
                yield ShapeClass("attention_with_scores_backward", name, backward, may_spill)


def _attention(shape: tuple[int, int, int, int], dtype: torch.dtype, theta: float, scaled: bool) -> tuple[Any, ...]:
    """q, k and v are views of one projection, as in a block."""
    batch, heads, num_tokens, size = shape
    q, k, v = _empty(batch, num_tokens, 3, heads, size, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
    scales = _empty(batch, num_tokens, dtype=_wide(dtype)) if scaled else None
    return q, k, v, scales, theta, size**-0.5, "official"


def _attention_backward(
    shape: tuple[int, int, int, int], dtype: torch.dtype, forward: Callable[[], tuple[Any, ...]]
) -> tuple[Any, ...]:
    batch, heads, num_tokens, size = shape
    return (_empty(batch, num_tokens, heads, size, dtype=dtype).transpose(1, 2), *forward())


def _select_classes() -> Iterator[ShapeClass]:
    for batch, heads, num_tokens, dtype in (
        (128, 6, 197, torch.float32), (32, 12, 785, torch.float32), (2, 2, 17, torch.float64),
    ):  # fmt: skip
        name = f"N{num_tokens} {_NAMES[dtype]}"
        for standard in ("MixedAttnMax", "MixedAttnMean", "SumAttnMax", "DiagAttnMax", "IMGAttnMax", "CLSAttnMax"):
            for semantics in ("official", "paper"):
                arguments = partial(_importance, (batch, heads, num_tokens), dtype, standard, semantics)
                yield ShapeClass("token_importance", f"{name} {standard} {semantics}", arguments)
        for order in ("grid", "importance"):
            yield ShapeClass("select_tokens", f"{name} {order}", partial(_select, (batch, num_tokens), dtype, order))


def _importance(shape: tuple[int, ...], dtype: torch.dtype, standard: str, semantics: str) -> tuple[Any, ...]:
    return (*(_empty(*shape, dtype=dtype) for _ in range(3)), standard, 1, semantics)


def _select(shape: tuple[int, int], dtype: torch.dtype, order: str) -> tuple[Any, ...]:
    return _empty(shape[0], shape[1] - 1, dtype=dtype), _NUM_PROP, 1, order


_STREAMS = (
    # label, B, grid side, R, C, dtypes
    ("DeiT-S", 128, 14, 1, 384, (torch.bfloat16, torch.float16, torch.float32)),
    ("ViT-B/8", 32, 28, 1, 768, (torch.bfloat16, torch.float32)),
    ("ViT-L/16", 64, 14, 5, 1024, (torch.bfloat16,)),
    ("double", 2, 4, 1, 16, (torch.float64,)),
)


def _streams() -> Iterator[tuple[str, Stream]]:
    for label, batch, side, prefix, channels, dtypes in _STREAMS:
        for dtype in dtypes:
            name = f"{label} n{side * side} C{channels} {_NAMES[dtype]}"
            yield name, Stream(batch, side, prefix, channels, dtype)


class Stream(NamedTuple):
    """The residual stream [batch, prefix + side², channels] of one shape class."""

    batch: int
    side: int
    prefix: int
    channels: int
    dtype: torch.dtype

    @property
    def may_spill(self) -> str | None:
        """Why its kernels may spill, if they may."""
        return _DOUBLE if self.dtype == torch.float64 else None

    def x(self, rows: int | None = None) -> Tensor:
        """[batch, rows, channels]; all tokens by default."""
        return _empty(self.batch, self.prefix + self.side**2 if rows is None else rows, self.channels, dtype=self.dtype)

    def graph(self, standard: str) -> list[Any]:
        """indptr, indices, values, token; None each where the propagation reads no graph."""
        if standard != "GraphProp":
            return [None] * 4
        n, edges = self.side**2, edge_capacity(self.side, self.side, "Mixed", 8)
        integers = [_empty(self.batch, size, dtype=torch.int32) for size in (n + 1, edges, n)]
        return [*integers[:2], _empty(self.batch, edges), integers[2]]

    def indices(self) -> list[Any]:
        """index_kept and index_prop."""
        return [_empty(self.batch, size, dtype=torch.int64) for size in (self.side**2 - _NUM_PROP, _NUM_PROP)]

    def scales(self, scaled: bool) -> Tensor | None:
        """Token scales."""
        return _empty(self.batch, self.prefix + self.side**2) if scaled else None


def _propagate_classes() -> Iterator[ShapeClass]:
    for name, stream in _streams():
        # What the kernels are asked to leave out are flags, not configurations: every combination once.
        every = stream.channels == 384 and stream.dtype == torch.bfloat16
        for standard in ("GraphProp", "Mean", "None") if every else ("GraphProp",):
            for scaled in (True, False) if every else (True,):
                label = f"{name} {standard}{' scales' if scaled else ''}"
                arguments = partial(_propagate, stream, standard, scaled)
                yield ShapeClass("propagate", label, arguments, stream.may_spill)
                norms = ("layer", "rms", "none") if standard == "GraphProp" and every else ("layer",)
                for norm in norms:
                    for layer_scale in (False, True) if every else (True,):
                        arguments = partial(_residual, stream, standard, scaled, norm, layer_scale)
                        yield ShapeClass("residual_propagate_norm", f"{label} {norm}", arguments, stream.may_spill)
            backward = partial(_propagate_backward, stream, standard)
            yield ShapeClass("propagate_backward", f"{name} {standard}", backward, stream.may_spill)
        yield ShapeClass("propagate_dense", name, partial(_dense, stream), stream.may_spill)


def _propagate(stream: Stream, standard: str, scaled: bool) -> tuple[Any, ...]:
    inputs = (stream.x(), *stream.graph(standard), *stream.indices(), stream.scales(scaled))
    return (*inputs, standard, 0.1, stream.prefix)


def _propagate_backward(stream: Stream, standard: str) -> tuple[Any, ...]:
    rows = stream.prefix + stream.side**2 - _NUM_PROP + int(standard == "Mean")
    return (stream.x(rows), *stream.graph(standard), *stream.indices(), standard, 0.1, stream.prefix)


def _dense(stream: Stream) -> tuple[Any, ...]:
    weight = _empty(stream.batch, stream.side**2, stream.side**2, dtype=stream.dtype)
    return stream.x(), weight, *stream.indices(), stream.scales(True), 0.1, stream.prefix


def _residual(stream: Stream, standard: str, scaled: bool, norm: str, layer_scale: bool) -> tuple[Any, ...]:
    gamma, weight, bias = (_empty(stream.channels, dtype=stream.dtype) for _ in range(3))
    affine = (None if norm == "none" else weight, bias if norm == "layer" else None)
    inputs = (stream.x(), stream.x(), gamma if layer_scale else None, *stream.graph(standard), *stream.indices())
    return (*inputs, stream.scales(scaled), *affine, 1e-6, norm, standard, 0.1, stream.prefix)


def _graph_classes() -> Iterator[ShapeClass]:
    for name, stream in _streams():
        for graph_type in ("Mixed", "Semantic", "Spatial"):
            arguments = partial(_build, stream, graph_type)
            yield ShapeClass("build_graph", f"{name} {graph_type}", arguments, stream.may_spill)


def _build(stream: Stream, graph_type: str) -> tuple[Any, ...]:
    return stream.x(), stream.side, stream.side, graph_type, 8, stream.prefix, "official"


def _live_classes() -> Iterator[ShapeClass]:
    for name, stream in _streams():
        for size in (64, 16, 80, 128, 256) if stream.channels == 384 and stream.dtype != torch.float16 else (64,):
            arguments = partial(_live_select, stream, size)
            yield ShapeClass("live_select", f"{name} d{size}", arguments, stream.may_spill)
        every = stream.channels == 384 and stream.dtype == torch.bfloat16
        for norm in ("layer", "rms", "none") if every else ("layer",):
            for layer_scale in (False, True) if every else (True,):
                arguments = partial(_live_merge, stream, norm, layer_scale)
                yield ShapeClass("live_merge", f"{name} {norm}", arguments, stream.may_spill)


def _live_select(stream: Stream, size: int) -> tuple[Any, ...]:
    """k is a view of a projection, as in a block."""
    n, tokens = stream.side**2, stream.prefix + stream.side**2
    k = _empty(stream.batch, tokens, 3, max(stream.channels // size, 1), size, dtype=stream.dtype)
    indptr, indices, _, token = stream.graph("GraphProp")
    live = (indptr, torch.cat((indices, indices), 1), token)
    importance = _empty(stream.batch, n, dtype=_wide(stream.dtype))
    return k[:, :, 1].transpose(1, 2), importance, *live, _empty(stream.batch, tokens), _NUM_PROP, 0.25, stream.prefix


def _live_merge(stream: Stream, norm: str, layer_scale: bool) -> tuple[Any, ...]:
    gamma, weight, bias = (_empty(stream.channels, dtype=stream.dtype) for _ in range(3))
    kept, prop = stream.indices()
    selection = (kept, prop, torch.empty_like(prop), _empty(stream.batch, stream.side**2))
    affine = (None if norm == "none" else weight, bias if norm == "layer" else None)
    inputs = (stream.x(), stream.x(), gamma if layer_scale else None, *selection, *affine)
    return (*inputs, 1e-6, norm, stream.prefix)
