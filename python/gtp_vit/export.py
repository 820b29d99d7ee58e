"""Writes a model, patched or not, as an AOTInductor package or as an ONNX file, and reads both back.

Nothing is left behind that was not loaded and compared with the model first: :func:`export` writes beside the target,
checks, and moves the file into place.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import gtp_kernels
from gtp_kernels import backends, native
from gtp_vit.config import PROPAGATIONS, GTPConfig

SUFFIXES = {"aoti": ".pt2", "onnx": ".onnx"}
DTYPES = {
    "aoti": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    # onnxruntime has no convolution in bfloat16 or float64 on the CPU.
    "onnx": (torch.float32, torch.float16),
}
OPSET = 18
# What one image may differ by, relative to the largest of its logits.
TOLERANCE = 1e-4
_LARGEST_BATCH = 4096
_KEY = "gtp_vit"

Runner = Callable[[Tensor], Tensor]


class ExportError(RuntimeError):
    """A model that cannot be exported, a file that cannot be used, or an export that disagrees with its model."""


@dataclass(frozen=True)
class Parity:
    """How far an exported model is from its model: per image, the largest difference over the largest logit.

    Attributes:
        errors: one per image.
        tolerance: of an image.
    """

    errors: tuple[float, ...]
    tolerance: float

    @property
    def median(self) -> float:
        return float(torch.tensor(self.errors).quantile(0.5))

    @property
    def beyond(self) -> int:
        """The images beyond the tolerance: in them a value, or a token, is on the other side of a threshold."""
        return sum(not error <= self.tolerance for error in self.errors)

    @property
    def agrees(self) -> bool:
        """Whether the median image is within the tolerance, and at most a quarter of the images are beyond it."""
        return self.median <= self.tolerance and 4 * self.beyond <= len(self.errors)

    def __str__(self) -> str:
        return (
            f"median {self.median:.1e}, worst {max(self.errors):.1e}, "
            f"{self.beyond} of {len(self.errors)} images beyond {self.tolerance:.1e}"
        )


def errors_of(actual: Tensor, expected: Tensor) -> tuple[float, ...]:
    """Per image, the largest difference over the largest expected logit; infinite where only one of them is NaN."""
    actual, expected = (tensor.detach().double().flatten(1).cpu() for tensor in (actual, expected))
    if actual.shape != expected.shape:
        raise ExportError(f"the exported model gives {tuple(actual.shape)}, the model {tuple(expected.shape)}")
    same_nan = (actual.isnan() == expected.isnan()).all(1)
    scale = expected.nan_to_num(0.0).abs().amax(1).clamp(min=torch.finfo(torch.float64).tiny)
    error = (actual - expected).nan_to_num(0.0).abs().amax(1) / scale
    return tuple(torch.where(same_nan, error, torch.inf).tolist())


def export(
    model: nn.Module, path: Path | str, images: Tensor, *, kind: str = "aoti", batch: int | None = None
) -> Parity:
    """Writes ``model`` to ``path``, once what was written is seen to compute what the model computes.

    Args:
        model: in eval mode, patched or not; it takes images and returns one tensor. It is not changed.
        path: ends with ``.pt2`` for ``aoti`` and ``.onnx`` for ``onnx``; its folder exists. Replaced where it exists.
        images: [k, 3, H, W] on the model's device, in its dtype: what is traced, and what the check runs on.
        kind: ``aoti``, an AOTInductor package with a C++ wrapper, for the device of the model (and the instruction
            set of this machine); or ``onnx``, standard operators of opset 18, the step through the definitions of
            :mod:`gtp_vit.onnx`.
        batch: the size of a batch; None for any from 1 to 4,096.

    Returns:
        How far the file is from the model. In half precision an image may differ by twice what the model itself differs
        by from its copy in float32.

    Raises:
        ValueError: an unknown kind, another suffix, a dtype that the kind of file does not take, a model that trains or
            draws random numbers, live edges for ``onnx``, images that are not ``batch`` or do not fit the model.
        TypeError: ``model`` is not a module, or does not return one tensor.
        ImportError: a library that it needs is missing.
        RuntimeError: the forced backend cannot run the model, with the reason of every backend.
        ExportError: the native library is missing, torch cannot export or compile the model, or what was written
            disagrees with it.
    """
    target = _checked(model, path, images, kind, batch)
    with torch.no_grad(), _operators(kind):
        expected = model(images)
        if not isinstance(expected, Tensor):
            raise TypeError(f"model must return one tensor; got {type(expected).__name__}")
        tolerance = _tolerance(model, images, expected)
        program = _program(model, images, batch)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.stem}-") as folder:
            written = Path(folder) / target.name
            write = _write_aoti if kind == "aoti" else _write_onnx
            write(program, written, _metadata(model, images, batch))
            run = LOADERS[kind](written)
            parts = [run(part) for part in images.split(batch or len(images))]
            parity = Parity(errors_of(torch.cat(parts), expected), tolerance)
            if batch is None and len(images) > 1:
                one = errors_of(run(images[:1]), expected[:1])
                if parity.errors[0] <= tolerance < one[0]:
                    raise ExportError(f"{target.name}: a batch of one gives other logits ({one[0]:.1e} from the model)")
            if not parity.agrees:
                raise ExportError(f"{target.name} was not written: it disagrees with the model ({parity})")
            del run
            os.replace(written, target)
    return parity


def load(path: Path | str) -> Runner:
    """A file that :func:`export` wrote, as a function from images to logits.

    Raises:
        ValueError: another suffix than ``.pt2`` or ``.onnx``.
        FileNotFoundError, ImportError, ExportError: as :func:`load_aoti` and :func:`load_onnx`.
    """
    path = Path(path)
    for kind, suffix in SUFFIXES.items():
        if path.suffix == suffix:
            return LOADERS[kind](path)
    raise ValueError(f"path must end with {' or '.join(SUFFIXES.values())}; got {path.name!r}")


def load_aoti(path: Path | str) -> Runner:
    """An AOTInductor package of :func:`export`, as a function from images to logits.

    A package is machine code: loading one runs it. The archive is checked before that. Threads take turns.

    Raises:
        FileNotFoundError: no such file.
        ExportError: a corrupt file, an archive of another kind, a package that gtp-vit did not write or whose
            instruction set this machine lacks, the operators' library missing, or what torch refuses: what was found,
            what is needed, and the fix.
    """
    path = _existing(path)
    found = _package_metadata(path)
    about = _about(path, found)
    if native.missing is not None:
        raise ExportError(
            f"{path}: its operators are not there: {native.missing}. A package needs the native library of gtp_kernels"
        )
    device = found.get("AOTI_DEVICE_KEY", "cpu")
    needs, has = found.get("AOTI_CPU_ISA", ""), torch.backends.cpu.get_cpu_capability()
    if device == "cpu" and "AVX512" in needs and has != "AVX512":
        raise ExportError(
            f"{path}: compiled for {needs}, and this machine has {has}: export it again on a machine like this one"
        )
    try:
        run = torch._inductor.aoti_load_package(str(path))
    except Exception as error:  # the loader raises what its own C++ throws
        raise ExportError(
            f"{path}: torch {torch.__version__} with gtp-kernels {gtp_kernels.__version__} does not load it (written "
            f"with torch {about.get('torch', 'unknown')}, gtp-kernels {about.get('version', 'unknown')}): "
            f"{_first_line(error)}; export it again with these"
        ) from error

    # A package holds one model, and threads that call it at once would wait for it inside torch's runner.
    turn = threading.Lock()

    def runner(images: Tensor) -> Tensor:
        # The package itself looks at no shape: it would read beyond the images.
        _check_images(path, about, device, images)
        with turn, torch.no_grad():
            out = run(images)
        return out[0] if isinstance(out, list | tuple) else out

    return runner


def load_onnx(path: Path | str) -> Runner:
    """An ONNX file of :func:`export` in onnxruntime on the CPU, as a function from images to logits.

    It runs with as many threads as torch has now.

    Raises:
        FileNotFoundError: no such file.
        ImportError: onnxruntime is not installed.
        ExportError: not an ONNX model, or one that gtp-vit did not write: what was found, what is needed, and the fix.
    """
    path = _existing(path)
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(f'running ONNX files needs onnxruntime: pip install "gtp-kernels[onnx]" ({error})') from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # classes of a native module, one per status code
        raise ExportError(
            f"{path}: onnxruntime {onnxruntime.__version__} does not read it as an ONNX model ({_size_of(path)}): "
            f"{_first_line(error)}; write it again with gtp-vit export --format onnx"
        ) from error
    custom = session.get_modelmeta().custom_metadata_map
    inputs = [value.name for value in session.get_inputs()]
    if _KEY not in custom or inputs != ["images"]:
        raise ExportError(
            f"{path}: an ONNX model of another kind (inputs {', '.join(inputs) or 'none'}; producer "
            f"{session.get_modelmeta().producer_name or 'unknown'}); needed is one "
            "that gtp-vit export --format onnx wrote"
        )
    about = _about(path, custom)

    def runner(images: Tensor) -> Tensor:
        _check_images(path, about, "cpu", images)
        (out,) = session.run(None, {"images": images.detach().cpu().numpy()})
        return torch.from_numpy(out)

    return runner


LOADERS: dict[str, Callable[[Path | str], Runner]] = {"aoti": load_aoti, "onnx": load_onnx}


def _checked(model: object, path: Path | str, images: Tensor, kind: str, batch: int | None) -> Path:
    if kind not in SUFFIXES:
        raise ValueError(f"kind must be one of {', '.join(SUFFIXES)}; got {kind!r}")
    path = Path(path)
    if path.suffix != SUFFIXES[kind]:
        raise ValueError(f"path must end with {SUFFIXES[kind]} for {kind}; got {path.name!r}")
    if not path.resolve().parent.is_dir():
        raise ValueError(f"path: the folder {path.resolve().parent} does not exist")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    if model.training:
        raise ValueError("model must be in eval mode: call model.eval() first")
    for module in model.modules():
        _check_options(getattr(module, "gtp", None), kind)
    if not isinstance(images, Tensor) or images.ndim != 4 or not len(images):
        got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images must be a tensor [k, 3, H, W] with k ≥ 1; got {got}")
    if batch is not None and (
        isinstance(batch, bool) or not isinstance(batch, int) or batch < 1 or len(images) % batch
    ):
        raise ValueError(
            f"batch must be None or a number of which {len(images)} images make whole batches; got {batch!r}"
        )
    if batch is None and len(images) > _LARGEST_BATCH:
        raise ValueError(f"images must be at most {_LARGEST_BATCH} where any batch is allowed; got {len(images)}")
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and tensor.dtype not in DTYPES[kind]:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES[kind])
            raise ValueError(f"the dtype of the model must be one of {allowed} for {kind}; {name} is {tensor.dtype}")
        if tensor.is_floating_point() and tensor.dtype != images.dtype:
            raise ValueError(f"images must have the dtype of the model, {tensor.dtype}; got {images.dtype}")
        if tensor.device != images.device:
            raise ValueError(f"images must be on the device of the model, {tensor.device}; got {images.device}")
    if kind == "onnx" and images.device.type != "cpu":
        raise ValueError(f"model must be on the CPU for onnx; got {images.device}")
    return path.resolve()


def _check_options(config: object, kind: str) -> None:
    if not isinstance(config, GTPConfig):
        return
    if config.selection == "Random":
        raise ValueError(
            "selection must not be 'Random' at export: what draws random numbers cannot be compared with its model"
        )
    depth = 1 if isinstance(config.num_prop, int) else len(config.num_prop)
    if kind == "onnx" and config.propagation == "LiveGraph" and config.uses_graph(depth):
        allowed = ", ".join(name for name in PROPAGATIONS if name != "LiveGraph")
        raise ValueError(
            f"propagation must be one of {allowed} for onnx; got 'LiveGraph', whose tokens leave one after the other, "
            "each by where those before it went: a walk that the standard operators of ONNX do not have. Export it as "
            "aoti (--format aoti, kind='aoti'), or patch the model with one of the others"
        )


@contextlib.contextmanager
def _operators(kind: str) -> Iterator[None]:
    """The operators whose definitions :mod:`gtp_vit.onnx` knows; for AOTInductor, the device's own."""
    if native.missing is not None:
        raise ExportError(f"the export traces the operators of the native library, and {native.missing}")
    if kind != "onnx":
        if backends.forced() == "reference":
            raise ValueError("the backend must not be forced to 'reference' for aoti: a package calls kernels")
        yield
        return
    with backends.use_backend("cpu"):
        yield


def _tolerance(model: nn.Module, images: Tensor, expected: Tensor) -> float:
    if images.dtype.itemsize >= 4:
        return TOLERANCE
    wide = copy.deepcopy(model).float()(images.float())
    return max(TOLERANCE, 2 * Parity(errors_of(expected, wide), 0.0).median)


def _program(model: nn.Module, images: Tensor, batch: int | None) -> ExportedProgram:
    if batch is not None:
        example, shapes = images[:batch], None
    else:
        # Sizes 0 and 1 are constants to torch.export; two images make the batch a symbol, which then may be one.
        example = images[:2] if len(images) > 1 else images.repeat(2, 1, 1, 1)
        shapes = ({0: Dim("batch", min=1, max=_LARGEST_BATCH)},)
    try:
        return torch.export.export(model, (example,), dynamic_shapes=shapes)
    except Exception as error:  # many classes of torch._dynamo and torch.fx
        way_out = "" if batch is not None else " (a fixed batch may do: --batch N, batch=N)"
        raise ExportError(f"torch.export refuses {type(model).__name__}: {_first_line(error)}{way_out}") from error


def _metadata(model: nn.Module, images: Tensor, batch: int | None) -> dict[str, str]:
    config = getattr(model, "gtp", None)
    about: dict[str, Any] = {
        "version": gtp_kernels.__version__,
        "torch": torch.__version__,
        "model": type(model).__name__,
        "options": dataclasses.asdict(config) if isinstance(config, GTPConfig) else None,
        "images": ["batch" if batch is None else batch, *images.shape[1:]],
        "dtype": str(images.dtype).removeprefix("torch."),
    }
    # The shape once more, for a C++ host, which reads no JSON.
    return {_KEY: json.dumps(about), f"{_KEY}_images": " ".join(map(str, (*about["images"], about["dtype"])))}


def _write_aoti(program: ExportedProgram, path: Path, metadata: dict[str, str]) -> None:
    options: dict[str, Any] = {"aot_inductor.metadata": metadata}
    try:
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)
    except Exception as error:  # inductor's own classes, and those of the C++ compiler that it runs
        raise ExportError(f"AOTInductor cannot compile the model: {_first_line(error)}") from error


def _write_onnx(program: ExportedProgram, path: Path, metadata: dict[str, str]) -> None:
    try:
        import onnx
        import onnxscript  # noqa: F401  # torch.onnx needs it, and says so late
    except ImportError as error:
        raise ImportError(f'--format onnx needs {error.name}: pip install "gtp-kernels[onnx]"') from error
    from gtp_vit.onnx import lower, refused

    try:
        result = torch.onnx.export(
            lower(program),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["logits"],
            verbose=False,
        )
    except Exception as error:  # torch.onnx's own classes, and onnxscript's
        raise ExportError(f"torch.onnx cannot translate the model: {_first_line(error)}") from error
    assert result is not None
    model = result.model_proto
    _rename_batch(model)
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    if (found := refused(model)) is not None:
        raise ExportError(f"the ONNX model is not of standard operators without scatter: it has {found}")
    if model.ByteSize() >= 2**31 - 1:
        raise ExportError(f"an ONNX file holds at most 2 GiB; this model takes {model.ByteSize()} bytes")
    onnx.save_model(model, str(path))
    onnx.checker.check_model(str(path))


def _rename_batch(model: Any) -> None:
    """The symbol of the batch, which torch names s0, s77, …, is "batch" in inputs and outputs."""
    for value in (*model.graph.input, *model.graph.output):
        size = value.type.tensor_type.shape.dim[0]
        if size.dim_param:
            size.dim_param = "batch"


def _existing(path: Path | str) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    return path


def _package_metadata(path: Path) -> dict[str, str]:
    """What an AOTInductor package of gtp-vit says of itself, read without running it."""
    needed = "needed is a package that gtp-vit export --format aoti wrote; export it again"
    if not zipfile.is_zipfile(path):
        raise ExportError(f"{path}: not a package, which is a zip archive ({_size_of(path)}); {needed}")
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
            if broken is not None:
                raise ExportError(f"{path}: corrupt, {broken} does not have its checksum; {needed}")
            names = archive.namelist()
            about = [
                name for name in names if "/data/aotinductor/model/" in name and name.endswith("wrapper_metadata.json")
            ]
            if not about:
                raise ExportError(
                    f"{path}: an archive without an AOTInductor model ({len(names)} files: {', '.join(names[:3])}…; "
                    f"torch.export.save and torch.jit.save write such ones); {needed}"
                )
            # Where it is missing, torch's loader ends the process.
            if not any(name.startswith(about[0].rpartition("/")[0]) and name.endswith(".so") for name in names):
                raise ExportError(f"{path}: corrupt, its machine code is missing; {needed}")
            found = json.loads(archive.read(about[0]))
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, OSError) as error:
        raise ExportError(f"{path}: corrupt ({_first_line(error)}); {needed}") from error
    if not isinstance(found, dict) or _KEY not in found:
        raise ExportError(
            f"{path}: an AOTInductor package of another program, for which gtp-vit does not speak; {needed}"
        )
    return found


def _about(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """What :func:`_metadata` wrote: the images of a file, and by what it was written."""
    try:
        about = json.loads(metadata[_KEY])
        count, *sizes = about["images"]
        fine = isinstance(about["dtype"], str) and len(sizes) == 3 and all(isinstance(size, int) for size in sizes)
        fine = fine and (count == "batch" or isinstance(count, int))
    except (ValueError, TypeError, KeyError):
        fine = False
    if not fine:
        raise ExportError(
            f"{path}: corrupt, its metadata {_KEY!r} is {str(metadata[_KEY])[:80]!r}; needed is the shape and the type "
            "of the images; export it again"
        )
    return dict(about)


def _check_images(path: Path, about: dict[str, Any], device_name: str, images: Tensor) -> None:
    count, *sizes = about["images"]
    fits = images.ndim == 4 and list(images.shape[1:]) == sizes
    fits = fits and (1 <= len(images) <= _LARGEST_BATCH if count == "batch" else len(images) == count)
    device = torch.device(device_name).type
    dtype = str(images.dtype).removeprefix("torch.")
    if not fits or dtype != about["dtype"] or images.device.type != device:
        raise ValueError(
            f"{path.name}: images must be {about['dtype']} [{', '.join(map(str, about['images']))}] on {device}; "
            f"got {dtype} {list(images.shape)} on {images.device.type}"
        )


def _size_of(path: Path) -> str:
    with path.open("rb") as file:
        return f"{path.stat().st_size} bytes, beginning with {file.read(8)!r}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
