"""``python -m benchmarks.overhead``: what a block costs the host at batch 1, where launches take longer than kernels.

For each backend and each of the patched block's steps: the kernels that it launches, and the time until the host has
queued them, while the device runs behind. The unpatched block is beside it. On a CPU (``--tiny`` tries the tool there)
there are no launches, and the time is that of the computation.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import gtp_kernels
from benchmarks.measure import provenance
from benchmarks.registry import Setting
from gtp_kernels import backends
from gtp_kernels.ops.live import unchecked_live_merge, unchecked_live_select
from gtp_kernels.ops.select_propagate import unchecked_select_residual
from gtp_vit.timing import Spread

Call = Callable[[], object]
# Calls that are queued before the device is waited for: fewer than its queue holds.
BURST = 20


def steps(setting: Setting) -> dict[str, Call]:
    """The steps of a block of DeiT-S at batch 1; ``block`` is the attention and the rest in one call, as in gtp_vit.

    ``live block`` is that with live edges, of ``attention``, ``importance``, ``live selection`` and ``live step``.
    """
    heads, size, side = (2, 16, 4) if setting.tiny else (6, 64, 14)
    channels, num_tokens, num_prop = heads * size, side * side + 1, setting.num_prop
    q, k, v = setting.randn(1, num_tokens, 3, heads, size).permute(2, 0, 3, 1, 4).unbind(0)
    x, branch = (setting.randn(1, num_tokens, channels) for _ in range(2))
    scales = 1 + setting.rand(1, num_tokens)
    weight, bias = setting.randn(channels), setting.randn(channels)
    graph = gtp_kernels.build_graph(x, (side, side))
    attend = partial(gtp_kernels.attention_with_scores, q, k, v, scales, sparsity=0.6)
    scores = attend()[1]
    importance = gtp_kernels.token_importance(scores)
    kept, prop = gtp_kernels.select_tokens(importance, num_prop)
    affine: dict[str, Any] = {"norm_weight": weight, "norm_bias": bias, "token_scales": scales}

    def residual() -> object:
        return gtp_kernels.residual_propagate_norm(x, branch, graph, kept, prop, **affine)

    def choose_and_step(scores: gtp_kernels.AttentionScores = scores) -> object:
        options = ("MixedAttnMax", num_prop, "grid", "official", None, weight, bias, 1e-6, "layer", "GraphProp", 0.2)
        return unchecked_select_residual(x, branch, scores, graph, *options, scales, 1)

    def block() -> object:
        return choose_and_step(attend()[1])

    live, sizes = gtp_kernels.live_graph(graph), torch.ones(1, num_tokens, device=x.device)

    def live_selection() -> gtp_kernels.LiveSelection:
        return unchecked_live_select(k, importance, live, num_prop, sizes, 0.25, 1)

    found = live_selection()

    def live_step(found: gtp_kernels.LiveSelection = found) -> object:
        return unchecked_live_merge(x, branch, found, None, weight, bias, 1e-6, "layer", 1)

    def live_block() -> object:
        weighed = gtp_kernels.token_importance(attend()[1])
        return live_step(unchecked_live_select(k, weighed, live, num_prop, sizes, 0.25, 1))

    return {
        "attention": attend,
        "importance": lambda: gtp_kernels.token_importance(scores),
        "selection": lambda: gtp_kernels.select_tokens(importance, num_prop),
        "residual step": residual,
        "importance to residual step": choose_and_step,
        "block": block,
        "live selection": live_selection,
        "live step": live_step,
        "live block": live_block,
        "graph, once": lambda: gtp_kernels.build_graph(x, (side, side)),
    }


def unpatched(setting: Setting) -> dict[str, Call]:
    """What stands in an unpatched block in their place."""
    heads, size, side = (2, 16, 4) if setting.tiny else (6, 64, 14)
    channels, num_tokens = heads * size, side * side + 1
    q, k, v = setting.randn(1, num_tokens, 3, heads, size).permute(2, 0, 3, 1, 4).unbind(0)
    x, branch = (setting.randn(1, num_tokens, channels) for _ in range(2))
    weight, bias = setting.randn(channels), setting.randn(channels)

    def block() -> object:
        F.scaled_dot_product_attention(q, k, v)
        return F.layer_norm(x + branch, (channels,), weight, bias, 1e-6)

    return {"block": block}


def host_seconds(call: Call, device: torch.device, rounds: int, burst: int = BURST) -> Spread:
    """Seconds of the host per call, the device having nothing else to do."""
    samples = []
    for _ in range(rounds + 1):
        _wait(device)
        start = time.perf_counter()
        for _ in range(burst):
            call()
        samples.append((time.perf_counter() - start) / burst)
    _wait(device)
    return Spread(tuple(samples[1:]))


def launches(call: Call, device: torch.device) -> int | None:
    """The kernels, copies and fills that one call starts; None where they cannot be counted."""
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    call()
    _wait(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        _wait(device)
    return sum(str(event.device_type) == "DeviceType.CUDA" for event in profiler.events()) or None


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(setting: Setting, names: Iterable[str], rounds: int = 15) -> dict[str, Any]:
    """By backend and step: ``launches``, ``median`` and ``quartiles`` in seconds.

    The unpatched block is under ``unpatched``; ``left_out`` says why a backend did not run.
    """
    found: dict[str, Any] = {"unpatched": _each(unpatched(setting), setting, rounds)}
    for name in names:
        with backends.use_backend(name):
            try:
                found[name] = _each(steps(setting), setting, rounds)
            except backends.BackendError as error:
                found.setdefault("left_out", {})[name] = error.reason
    return found


def _each(calls: dict[str, Call], setting: Setting, rounds: int) -> dict[str, Any]:
    found = {}
    with torch.inference_mode():
        for name, call in calls.items():
            call()
            spread = host_seconds(call, setting.device, rounds, 1 if setting.tiny else BURST)
            count = launches(call, setting.device)
            found[name] = {"launches": count, "median": spread.median, "quartiles": [spread.low, spread.high]}
    return found


def lines(found: dict[str, Any]) -> Iterable[str]:
    """What people read."""
    for backend, each in found.items():
        for step, one in each.items():
            if isinstance(one, str):
                yield f"{step}: left out: {one}"
                continue
            count = "" if one["launches"] is None else f"{one['launches']} launches, "
            yield f"{backend}: {step}: {count}{one['median'] * 1e6:.1f} µs of the host"


def main(arguments: list[str] | None = None) -> int:
    """Measures and prints; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--backend", action="append", choices=backends.NAMES, help="triton and cuda by default")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: tries the tool, measures nothing")
    parser.add_argument("--json", type=Path, help="also write JSON here")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    setting = Setting(device, getattr(torch, options.dtype), 8, options.tiny)
    found = measure(setting, options.backend or ("triton", "cuda"))
    print(*lines(found), sep="\n")
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**provenance(device), "host": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
