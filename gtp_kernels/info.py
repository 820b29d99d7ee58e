"""``python -m gtp_kernels.info``: versions, the native library, and which backend can run each op, or why not."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import sys
from importlib import metadata
from typing import Any

import torch

import gtp_kernels
from gtp_kernels import backends, native

VARIABLES = {
    "GTP_KERNELS_BACKEND": "forces a backend: reference, cpu, triton, cuda",
    "GTP_KERNELS_EMULATE_CUDA": "1 runs the CUDA C++ kernels in emulation, on CPU tensors (tests)",
    "GTP_KERNELS_EMULATED_LIBRARY": "the library of that emulation, where it is not beside the native one",
    "GTP_KERNELS_DEBUG": "1 checks index values on GPUs too (synchronises)",
    "GTP_KERNELS_ISA": "forces the instruction set of the CPU kernels: baseline, avx2, avx512",
    "GTP_KERNELS_NATIVE": "0 leaves the native library out",
    "TRITON_INTERPRET": "1 runs the Triton kernels in Triton's interpreter, on CPU tensors",
}

REMARKS = {
    "triton": "compiled ahead of time and run in Triton's interpreter, not yet on a GPU",
}


def report() -> dict[str, Any]:
    """Everything that the command prints, as plain data."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    extension = native.extension()
    return {
        "gtp_kernels": gtp_kernels.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "triton": _version("triton"),
        "timm": _version("timm"),
        "transformers": _version("transformers"),
        "devices": {d: torch.cuda.get_device_name() if d == "cuda" else torch.get_num_threads() for d in devices},
        "native": {"missing": native.missing, "build": None if extension is None else extension.build_info()},
        "cuda_missing": native.cuda_missing(),
        "ops": {
            op: {d: {name: backends.refusal(name, op, d) for name in backends.NAMES} for d in devices}
            for op in backends.OPS
        },
        "choice": {op: choice(op) for op in backends.OPS},
        "remarks": REMARKS,
        "environment": {name: os.environ.get(name) for name in VARIABLES},
    }


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
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "present, version unknown"


def text(data: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"gtp-kernels {data['gtp_kernels']}, Python {data['python']}, {data['machine']}"]
    lines += [f"torch        {data['torch']} (CUDA {data['torch_cuda'] or 'none'})"]
    lines += [f"{name:<12} {data[name] or 'not installed'}" for name in ("triton", "timm", "transformers")]
    for device, detail in data["devices"].items():
        lines.append(f"{device:<12} " + (f"{detail} threads" if device == "cpu" else str(detail)))
    if data["native"]["missing"]:
        lines.append(f"native       missing: {data['native']['missing']}")
    else:
        build = data["native"]["build"]
        lines.append("native       loaded")
        for key, value in (build or {}).items():
            lines.append(f"  {key}: {', '.join(map(str, value)) if isinstance(value, list | tuple) else value}")
        if build is None:
            lines.append("  the module _C (build information) was not built")
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
    lines.append("op           the default on GPU tensors")
    lines += [f"{op:<12} {sentence}" for op, sentences in data["choice"].items() for sentence in sentences]
    lines.append("")
    lines += [f"{backend}: {remark}" for backend, remark in data["remarks"].items()]
    lines.append("")
    for name, meaning in VARIABLES.items():
        lines.append(f"{name}={data['environment'][name] or ''}  ({meaning})")
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
