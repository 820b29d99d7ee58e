"""``python -m benchmarks.gpu --step tests|sanitize|ops|overhead|models|tune``: what to do on a machine with a GPU.

Each step is a list of pieces and writes one JSON file, ``benchmarks/results/<device>/<step>.json``, after every piece.
A step ends after ``--budget`` seconds; run again with the same sources, it goes on where it stopped. Every piece runs
in a process of its own: a kernel that breaks the device's context takes nothing with it. The native library is built
first, in place, with CUDA kernels for this device where nvcc is found; without it the ops are defined in Python, and
the Triton kernels are the same. The backend ``cuda`` is tested, watched and timed beside ``triton`` where it was built.
``--dry-run`` runs every step on tiny shapes on the CPU: Triton's kernels in its interpreter, those of ``cuda`` in
emulation where that was built.

Statuses: passed; failed; refused, where the machine does not let a tool run; absent, where something is not installed;
none, where there was nothing to run; pending, where time was up. Exits with 1 where something failed, 3 where something
is pending. Needs Python, torch and Triton; pytest, timm and compute-sanitizer for what is done with them.
``GTP_COMMIT`` names the commit where the tree came without its history. ``python -m benchmarks.readme`` makes the
README's tables of the results, ``python -m benchmarks.evidence`` the choice between ``triton`` and ``cuda``, and
``python -m benchmarks.tune --apply FILE`` the tiles of a tune.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DONE = ("passed", "none")
STEPS = ("tests", "sanitize", "ops", "overhead", "models", "tune")
# Timed beside the backend that is forced.
RIVALS = ("triton", "cuda")
MODELS = (
    # model, batch, P: the paper's Tables 1, 6 and 7, and Table 3 of its supplement
    ("deit_small_patch16_224", 128, 8),
    ("deit_small_patch16_224", 128, 14),
    ("deit_small_patch16_224", 128, 1),
    ("deit_base_patch16_224", 128, 8),
    ("vit_base_patch8_224", 32, 30),
    ("vit_large_patch16_224", 64, 8),
    ("vit_medium_patch16_gap_256", 128, 8),
    ("deit_base_patch16_224", 128, 14),
    ("deit_base_patch16_224", 128, 1),
    ("vit_base_patch8_224", 32, 50),
    ("vit_base_patch8_224", 32, 10),
    ("vit_large_patch16_224", 64, 4),
    ("vit_medium_patch16_gap_256", 128, 14),
)
LIVE_MODELS = (("deit_small_patch16_224", 128, 8), ("deit_small_patch16_224", 128, 14))
# The file and the tests of a dry run.
DRY_TESTS = ("test_select.py", "tie_rule or seeded or empty_batch")
Piece = Callable[[float], dict[str, Any]]


@dataclass(frozen=True)
class Context:
    """How the pieces run; ``budget`` are the seconds of a whole step."""

    dry_run: bool
    folder: Path
    budget: float = math.inf

    @property
    def device(self) -> str:
        """Where tensors live: ``cuda`` or, in a dry run, ``cpu``."""
        return "cpu" if self.dry_run else "cuda"


def pieces(step: str, context: Context) -> Iterator[tuple[str, Piece]]:
    """The pieces of a step by name; each takes the seconds that are left, and returns its status and what it found."""
    if step == "tests":
        files = sorted(path.name for path in (ROOT / "tests").glob("test_*.py"))
        for name in DRY_TESTS[:1] if context.dry_run else files:
            yield name, partial(_tests, context, name)
        if context.dry_run:
            yield f"{DRY_TESTS[0]} cuda", partial(_tests, context, DRY_TESTS[0], emulated=True)
    elif step == "sanitize":
        for backend in (None, "cuda"):
            suffix = "" if backend is None else f" {backend}"
            yield f"smoke{suffix}", partial(_smoke, context, backend=backend)
            for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
                yield f"{tool}{suffix}", partial(_sanitize, context, tool, backend=backend)
    elif step == "ops":
        for dtype in ("bfloat16", "float32"):
            for op in ("attention", "select", "propagate", "graph", "live"):
                yield f"{op} {dtype}", partial(_op, context, op, dtype)
    elif step == "overhead":
        yield "block", partial(_overhead, context)
    elif step == "models":
        for name, batch, num_prop in MODELS[:1] if context.dry_run else MODELS:
            yield f"{name} P{num_prop}", partial(_model, context, name, batch, num_prop)
        for name, batch, num_prop in LIVE_MODELS[:1] if context.dry_run else LIVE_MODELS:
            yield f"{name} LiveGraph P{num_prop}", partial(_model, context, name, batch, num_prop, live=True)
    elif step == "tune":
        yield "tune", partial(_tune, context)


def _run(command: list[str], seconds: float, **environment: str) -> tuple[int | None, str]:
    """The exit status (None: the time was up) and the end of the output."""
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH")]))
    variables = {**os.environ, "PYTHONPATH": path, **environment}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=variables, timeout=max(seconds, 1), text=True, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        return None, (output.decode(errors="replace") if isinstance(output, bytes) else output)[-4000:]
    return done.returncode, done.stdout[-4000:]


def _cuda_missing(context: Context) -> str | None:
    from gtp_kernels import native

    return native.emulation_missing() if context.dry_run else native.cuda_missing()


def _tests(context: Context, name: str, seconds: float, *, emulated: bool = False) -> dict[str, Any]:
    if importlib.util.find_spec("pytest") is None:
        return {"status": "absent", "output": "pytest is not installed"}
    if emulated and (missing := _cuda_missing(context)) is not None:
        return {"status": "absent", "output": missing}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        # The suite has its own run in the interpreter: here some tests show that the counts are read.
        which = ["-k", DRY_TESTS[1]] if context.dry_run else ["-m", "gpu"]
        command = [sys.executable, "-m", "pytest", f"tests/{name}", *which, "-p", "no:cacheprovider"]
        if not context.dry_run and importlib.util.find_spec("xdist") is not None:
            command += [
                "-n",
                "4",
                "--dist",
                "worksteal",
            ]  # kernels compile on the cores; one that crashes ends one worker
        # The tests choose their backends themselves.
        environment = {"GTP_KERNELS_BACKEND": "", "GTP_KERNELS_EMULATE_CUDA": "1" if emulated else ""}
        status, output = _run([*command, f"--junitxml={report}"], seconds, **environment)
        counts: dict[str, int] = {}
        if report.is_file():
            for suite in ElementTree.parse(report).getroot().iter("testsuite"):
                counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    if status == 5:
        return {"status": "none", **counts}
    if status is None:
        return _unfinished(context, seconds, output)
    if status == 0 and counts.get("tests", 0) == counts.get("skipped", 0):
        return {"status": "failed", **counts, "output": f"every test was skipped\n{output}"}
    return {"status": "failed" if status else "passed", **counts, **({"output": output} if status else {})}


def _unfinished(context: Context, seconds: float, output: str) -> dict[str, Any]:
    """Time was up: a failure where the piece had (nearly) all of the step's, else to be tried again first."""
    status = "failed" if seconds > 0.9 * context.budget else "pending"
    return {"status": status, "output": f"not done after {seconds:.0f} s\n{output}"}


def _smoke(context: Context, seconds: float, *, backend: str | None = None) -> dict[str, Any]:
    if backend == "cuda" and (missing := _cuda_missing(context)) is not None:
        return {"status": "absent", "output": missing}
    status, output = _run(_smoke_command(context), seconds, **_forcing(backend))
    if status is None:
        return _unfinished(context, seconds, output)
    return {"status": "passed" if status == 0 else "failed", "output": output[-2000:]}


def _forcing(backend: str | None) -> dict[str, str]:
    return {} if backend is None else {"GTP_KERNELS_BACKEND": backend}


def _smoke_command(context: Context) -> list[str]:
    return [sys.executable, "-m", "benchmarks.smoke", context.device, *(["--tiny"] if context.dry_run else [])]


def _sanitize(context: Context, tool: str, seconds: float, *, backend: str | None = None) -> dict[str, Any]:
    if backend == "cuda" and (missing := _cuda_missing(context)) is not None:
        return {"status": "absent", "output": missing}
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    folders = [str(Path(home) / "bin") for home in homes if home]
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
    if program is None:
        return {"status": "absent", "output": "compute-sanitizer is not installed"}
    command = [program, "--tool", tool, "--error-exitcode", "99", *_smoke_command(context)]
    # torch's allocator would hide reads beyond a tensor.
    status, output = _run(command, seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1", **_forcing(backend))
    if status is None:
        return _unfinished(context, seconds, output)
    clean = re.search(r"(ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards)", output) is not None
    found = status == 99 or re.search(r"SUMMARY: [1-9]", output) is not None
    # Without a summary the tool did not watch: that it ran to an end says nothing.
    verdict = "failed" if found else "passed" if clean and status == 0 else "refused"
    return {"status": verdict, "output": output[-2000:]}


def _op(context: Context, op: str, dtype: str, seconds: float) -> dict[str, Any]:
    import torch

    from benchmarks import registry
    from benchmarks.runner import run_cases

    setting = registry.Setting(torch.device(context.device), getattr(torch, dtype), 8, context.dry_run)
    results = run_cases(
        registry.OPS[op](setting), setting.device, _ceilings(context, dtype), **_effort(context), dtype=dtype,
        rivals=RIVALS,
    )  # fmt: skip
    return _timed(context, dtype, results)


def _overhead(context: Context, seconds: float) -> dict[str, Any]:
    import torch

    from benchmarks import overhead, registry

    setting = registry.Setting(torch.device(context.device), torch.bfloat16, 8, context.dry_run)
    found = overhead.measure(setting, RIVALS, 1 if context.dry_run else 15)
    return {"status": "passed", "host": found, "output": "\n".join(overhead.lines(found))}


def _model(
    context: Context, name: str, batch: int, num_prop: int, seconds: float, *, live: bool = False
) -> dict[str, Any]:
    import torch

    from benchmarks import registry
    from benchmarks.models import live_case, model_case
    from benchmarks.runner import run_cases

    dtype = "bfloat16"
    setting = registry.Setting(torch.device(context.device), getattr(torch, dtype), num_prop, context.dry_run)
    create = live_case if live else model_case
    if context.dry_run:
        tiny: dict[str, Any] = {"img_size": 64, "depth": 1, "embed_dim": 32, "num_heads": 2}
        case = create("vit_tiny_patch16_224", 1, setting, **tiny)
    else:
        case = create(name, batch, setting, compile_mode="max-autotune")
    results = run_cases(
        [case], setting.device, _ceilings(context, dtype), **_effort(context), dtype=dtype, rivals=RIVALS
    )
    return _timed(context, dtype, results)


def _effort(context: Context) -> dict[str, Any]:
    return {"rounds": 1, "warmup": 0} if context.dry_run else {"rounds": 21}


def _timed(context: Context, dtype: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    import torch

    from benchmarks.measure import as_json

    ran = {backend for result in results for backend in result.get("backends", [])}
    wrong = [f"{result['shape']}: {result['error']}" for result in results if "error" in result]
    for result in results:
        wrong += [f"{result['shape']}: {name}: {why}" for name, why in result.get("wrong", {}).items()]
    if not context.dry_run and ran - {"triton", "cuda"}:
        wrong.append(f"ran on {', '.join(sorted(ran))}")
    verdict = {"status": "failed", "output": "\n".join(wrong)} if wrong else {"status": "passed"}
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {**verdict, "ceilings": as_json(_ceilings(context, dtype)), "results": results}


_measured: dict[str, Any] = {}


def _ceilings(context: Context, dtype: str) -> Any:
    import torch

    from benchmarks.measure import measure_ceilings

    if dtype not in _measured:
        _measured[dtype] = measure_ceilings(torch.device(context.device), getattr(torch, dtype), tiny=context.dry_run)
    return _measured[dtype]


def _tune(context: Context, seconds: float) -> dict[str, Any]:
    # Kept outside of the results, so that the next attempt goes on from it: the tuner writes after every candidate.
    report = ROOT / "build" / "tune" / f"{context.folder.name}.json"
    if context.dry_run:
        report.unlink(missing_ok=True)
    options = ["--tiny"] if context.dry_run else ["--budget", str(0.85 * seconds)]
    status, output = _run([sys.executable, "-m", "benchmarks.tune", "--json", str(report), *options], seconds)
    try:
        found = json.loads(report.read_text())
    except (OSError, ValueError):
        found = {}
    verdict = {0: "passed", 3: "pending", None: "pending"}.get(status, "failed")
    return {"status": verdict, "found": found, **({} if verdict == "passed" else {"output": output})}


def _isolated(step: str, name: str, context: Context, seconds: float) -> dict[str, Any]:
    """The piece, run by a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.gpu", "--step", step, "--only", name, "--output", folder]
        command += ["--budget", str(seconds), "--backend", os.environ["GTP_KERNELS_BACKEND"] or "auto"]
        status, output = _run(command, seconds)
        if status is None:
            # What was compiled stays in the caches, so that the next attempt gets further.
            return {"status": "pending", "output": f"not done after {seconds:.0f} s\n{output}"}
        path = Path(folder) / f"{step}.json"
        if not path.is_file():
            return {"status": "failed", "output": output}
        return dict(json.loads(path.read_text())["pieces"][name])


def _build(seconds: float) -> str:
    """Builds the native library in place, for this device's architecture alone; what came of it."""
    import torch

    architecture = {} if torch.version.hip else {"TORCH_CUDA_ARCH_LIST": _architecture()}
    status, output = _run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], seconds, **architecture)
    if status != 0:
        return f"not built, exit status {status}\n{output[-1000:]}"
    last = output.strip().splitlines()[-1:] or ["as the sources are"]
    # This process may hold an older library.
    asks = "from gtp_kernels import native; print(native.cuda_missing() or 'CUDA kernels built')"
    return f"built ({last[0]}); {_run([sys.executable, '-c', asks], 120)[1].strip()}"


def _architecture() -> str:
    """``TORCH_CUDA_ARCH_LIST`` for the device that is here, unless it is given."""
    import torch

    return os.environ.get("TORCH_CUDA_ARCH_LIST") or "{}.{}".format(*torch.cuda.get_device_capability())


def run_step(
    step: str, context: Context, budget: float, *, fresh: bool = False, only: str | None = None
) -> dict[str, Any]:
    """Runs one step, or one piece of it, writes its file after every piece, and returns what the file holds."""
    import torch

    from benchmarks.measure import provenance

    path = context.folder / f"{step}.json"
    origin = provenance(torch.device(context.device))
    report: dict[str, Any] = {**origin, "step": step, "dry_run": context.dry_run, "pieces": {}}
    if not fresh and not context.dry_run:
        report["pieces"] = _earlier(path, origin)
    end = time.monotonic() + budget
    for name, piece in pieces(step, context):
        if only not in (None, name):
            continue
        if report["pieces"].get(name, {}).get("status") in DONE:
            print(f"{step}: {name}: done before", flush=True)
            continue
        left, start = end - time.monotonic(), time.monotonic()
        if left <= 0:
            report["pieces"][name] = {"status": "pending"}
        else:
            # The other steps start processes themselves; a dry run has no context to break.
            if step in ("ops", "overhead", "models") and only is None and not context.dry_run:
                piece = partial(_isolated, step, name, context)
            report["pieces"][name] = {**_guarded(piece, left), "took": round(time.monotonic() - start, 1)}
        found = report["pieces"][name]
        print(f"{step}: {name}: {found['status']}", *_numbers(found), sep="\n    ", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
    return report


def _guarded(piece: Piece, left: float) -> dict[str, Any]:
    try:
        return piece(left)
    except ModuleNotFoundError as error:
        return {"status": "absent", "output": str(error)}
    except Exception:
        # One piece must not take the others with it.
        return {"status": "failed", "output": traceback.format_exc()[-4000:]}


def _numbers(found: dict[str, Any]) -> Iterator[str]:
    for result in found.get("results", []):
        medians = result.get("median", {})
        yield f"{result['shape']}: " + ", ".join(f"{name} {value * 1e3:.3f} ms" for name, value in medians.items())
    for name in sorted({name for result in found.get("results", []) for name in RIVALS if name in left_out(result)}):
        reasons = {left_out(result).get(name) for result in found["results"]} - {None}
        yield f"{name} left out: {'; '.join(sorted(map(str, reasons)))}"
    if "host" in found or (found["status"] not in ("passed", "none") and "output" in found):
        yield from found["output"].strip().splitlines()[-16:]


def left_out(result: dict[str, Any]) -> dict[str, str]:
    """Why some candidates of a case did not run."""
    return dict(result.get("left_out", {}))


def _earlier(path: Path, origin: dict[str, object]) -> dict[str, Any]:
    """The pieces of an earlier run of the same code on the same device."""
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    same = all(report.get(key) == origin[key] for key in ("source", "device", "torch", "triton"))
    return dict(report.get("pieces", {})) if same else {}


def main(arguments: list[str] | None = None) -> int:
    """Runs steps; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--step", choices=STEPS, action="append", help="all of them by default")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes in the interpreter, on the CPU")
    parser.add_argument("--budget", type=float, default=480, help="seconds for each step (default: %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier run of this commit found")
    parser.add_argument("--only", metavar="PIECE", help="this piece of the step alone, in this process")
    parser.add_argument("--output", type=Path, help="folder of the JSON files")
    parser.add_argument(
        "--backend", default="triton",
        help="which kernels are ours; auto: what is chosen when nothing is forced (default: %(default)s)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    # All are read when the package is imported, below.
    os.environ["GTP_KERNELS_BACKEND"] = "" if options.backend == "auto" else options.backend
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = os.environ["GTP_KERNELS_EMULATE_CUDA"] = "1"

    import torch

    if not options.dry_run and not torch.cuda.is_available():
        print("torch sees no CUDA device here; --dry-run tries every step without one", file=sys.stderr)
        return 2
    if not options.dry_run and options.only is None:
        print(f"native library: {_build(options.budget)}", flush=True)

    from benchmarks.measure import device_name, slug  # loads the library

    folder = options.output
    if folder is None:
        name = "dry-run" if options.dry_run else slug(device_name(torch.device("cuda")))
        folder = ROOT / "build" / name if options.dry_run else ROOT / "benchmarks" / "results" / name
    context = Context(options.dry_run, folder, options.budget)
    reports = [
        run_step(step, context, options.budget, fresh=options.fresh, only=options.only)
        for step in options.step or STEPS
    ]
    statuses = [piece["status"] for report in reports for piece in report["pieces"].values()]
    for status in sorted(set(statuses)):
        print(f"{status}: {statuses.count(status)}")
    return 1 if "failed" in statuses else 3 if "pending" in statuses else 0


if __name__ == "__main__":
    sys.exit(main())
