"""``python -m gtp_kernels.info``: versions, the native library, and which backend can run each op, or why not.

It is what a report of a fault should quote, so that it fails for nothing that is missing, broken or misspelt. It
compiles nothing, imports nothing beyond torch and this package, and no op runs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gtp_kernels
from gtp_kernels import backends, native

VARIABLES = {
    "GTP_KERNELS_BACKEND": "forces a backend: reference, cpu, triton, cuda",
    "GTP_KERNELS_EMULATE_CUDA": "1 runs the CUDA C++ kernels in emulation, on CPU tensors (tests)",
    "GTP_KERNELS_EMULATED_LIBRARY": "the library of that emulation, where it is not beside the native one",
    "GTP_KERNELS_DEBUG": "1 checks index values on GPUs too (synchronises)",
    "GTP_KERNELS_ISA": "forces the instruction set of the CPU kernels, one of isas",
    "GTP_KERNELS_NATIVE": "0 leaves the native library out",
    "TRITON_INTERPRET": "1 runs the Triton kernels in Triton's interpreter, on CPU tensors",
}

REMARKS = {
    "triton": "compiled ahead of time and run in Triton's interpreter, not yet on a GPU",
}

PACKAGES = ("triton", "timm", "transformers", "torchvision", "onnx", "onnxruntime")
"""What is used where it is installed."""


def report() -> dict[str, Any]:
    """Everything that the command prints, as plain data."""
    found = devices()
    build, fault = _build_info()
    return {
        "gtp_kernels": gtp_kernels.__version__,
        "package": str(Path(gtp_kernels.__file__).parent),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "torch_hip": torch.version.hip,
        "numpy": np.__version__,
        **{name: _version(name) for name in PACKAGES},
        "devices": found,
        "native": {
            "missing": native.missing,
            "path": str(native.LIBRARY),
            "build": build,
            "fault": fault,
        },
        "cuda_missing": native.cuda_missing(),
        "ops": {
            op: {d: {name: backends.refusal(name, op, d) for name in backends.NAMES} for d in found}
            for op in backends.OPS
        },
        "runs": {op: {d: runs(op, d) for d in found} for op in backends.OPS},
        "choice": {op: choice(op) for op in backends.OPS},
        "remarks": REMARKS,
        "environment": {name: os.environ.get(name) for name in VARIABLES},
        "unknown_environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith("GTP_KERNELS_") and name not in VARIABLES
        },
    }


def devices() -> dict[str, Any]:
    """The kinds of device that torch has here: the threads of the CPU, the names of the others."""
    found: dict[str, Any] = {"cpu": torch.get_num_threads()}
    if torch.cuda.is_available():
        try:
            found["cuda"] = [_gpu(index) for index in range(torch.cuda.device_count())]
        except (RuntimeError, AssertionError) as error:  # a driver that is there and does not work
            found["cuda"] = [f"not usable: {error}"]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and accelerator.type not in found:
        found[accelerator.type] = [f"{accelerator.type}, {torch.accelerator.device_count()} of them"]
    return found


def _gpu(index: int) -> str:
    if torch.version.hip is not None:
        return f"{torch.cuda.get_device_name(index)}, {torch.cuda.get_device_properties(index).gcnArchName}"
    capability = torch.cuda.get_device_capability(index)
    name = f"{torch.cuda.get_device_name(index)}, sm_{capability[0]}{capability[1]}"
    if native.cuda_missing() is None and _build_info()[0] and not native.has_cuda_code(capability):
        name += ", for which the native library has no CUDA kernels"
    return name


def runs(op: str, device: str) -> str:
    """The backend that the op runs on tensors of a device, as far as the shape does not decide; or why none does."""
    try:
        forced = backends.forced()
    except ValueError as error:
        return f"none: {error}"
    if forced is not None:
        reason = backends.refusal(forced, op, device)
        return forced if reason is None else f"none: {forced} is forced, and {reason}"
    order = backends._ORDER.get(device)
    if order is None:
        return (
            "none: there is no backend for this device; inside gtp_kernels.use_backend('reference') plain PyTorch runs"
        )
    return next(name for name in order if backends.refusal(name, op, device) is None)


def _build_info() -> tuple[dict[str, Any] | None, str | None]:
    """What ``_C`` says of the build, or None and why it says nothing."""
    if native.missing is not None:
        return None, None
    extension = native.extension()
    if extension is None:
        return None, "the module _C (build information) was not built, or not for this Python"
    try:
        return extension.build_info(), None
    except RuntimeError as error:  # GTP_KERNELS_ISA names what this machine does not run
        return None, str(error)


def choice(op: str) -> list[str]:
    """What decides between ``triton`` and ``cuda`` for an op on GPU tensors, in sentences."""
    found = [
        f"cuda on sm_{entry['capability'].replace('.', '')} for {entry['dtype']}, {_width(entry)}"
        f"{entry['tokens'][0]} to {entry['tokens'][1]} tokens: {entry['speedup']:.2f} times as fast as triton "
        f"({entry['file']}, commit {entry['commit']})"
        for entry in backends.evidence()
        if entry["op"] == op
    ]
    return [*found, "triton otherwise"] if found else ["triton: no result file prefers cuda"]


def _width(entry: dict[str, Any]) -> str:
    if "head_size" in entry:
        return f"head size {entry['head_size']}, "
    return f"{entry['channels']} channels, " if entry["channels"] else ""


def _version(package: str) -> str | None:
    try:
        if importlib.util.find_spec(package) is None:
            return None
        return metadata.version(package)
    except (metadata.PackageNotFoundError, ValueError, KeyError):  # without metadata, or put in place by hand
        return "present, version unknown"


def text(data: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"gtp-kernels {data['gtp_kernels']}, Python {data['python']}, {data['machine']}, in {data['package']}"]
    built_for = f"CUDA {data['torch_cuda']}" if data["torch_cuda"] else f"ROCm {data['torch_hip']}"
    built_for = built_for if data["torch_cuda"] or data["torch_hip"] else "CUDA none"
    lines += [f"torch        {data['torch']} ({built_for})"]
    lines += [f"{name:<12} {data[name] or 'not installed'}" for name in ("numpy", *PACKAGES)]
    for device, detail in data["devices"].items():
        described = [f"{detail} threads"] if device == "cpu" else detail
        lines += [f"{device:<12} {line}" for line in described]
    if data["native"]["missing"]:
        lines.append(f"native       missing: {data['native']['missing']}")
    else:
        lines.append("native       loaded")
        for key, value in (data["native"]["build"] or {}).items():
            lines.append(f"  {key}: {', '.join(map(str, value)) if isinstance(value, list | tuple) else value}")
        if data["native"]["fault"]:
            lines.append(f"  {data['native']['fault']}")
    if data["cuda_missing"] not in (None, data["native"]["missing"]):
        lines.append(f"cuda kernels missing: {data['cuda_missing']}")
    lines.append("")
    lines.append("op           device  backend    can it run?")
    for op, by_device in data["ops"].items():
        for device, answers in by_device.items():
            for backend, reason in answers.items():
                if reason is not None and reason == data["native"]["missing"]:
                    reason = "the native library is missing (see above)"
                elif reason is not None and reason == data["cuda_missing"]:
                    reason = "its kernels are missing (see above)"
                lines.append(f"{op:<12} {device:<7} {backend:<10} {reason or 'yes'}")
    lines.append("")
    lines.append("op           device  runs")
    for op, by_device in data["runs"].items():
        lines += [f"{op:<12} {device:<7} {answer}" for device, answer in by_device.items()]
    lines.append("")
    lines.append("op           the default on GPU tensors")
    lines += [f"{op:<12} {sentence}" for op, sentences in data["choice"].items() for sentence in sentences]
    lines.append("")
    lines += [f"{backend}: {remark}" for backend, remark in data["remarks"].items()]
    lines.append("")
    for name, meaning in VARIABLES.items():
        lines.append(f"{name}={data['environment'][name] or ''}  ({meaning})")
    lines += [f"{name}={value}  (unknown: nothing reads it)" for name, value in data["unknown_environment"].items()]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Prints the report; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m gtp_kernels.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    data = report()
    print(json.dumps(data, indent=2) if parser.parse_args(arguments).json else text(data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
