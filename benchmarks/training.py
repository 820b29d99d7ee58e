"""``python -m benchmarks.training``: a fine-tuning step on the CPU, patched and unpatched, in turns.

A step is the forward in training mode, the cross entropy, and the backward to every parameter; no optimiser. ``ours``
is patched (θ = 0.6, token scales), ``timm`` is not, ``slicing`` cuts off the last P tokens of each block and does
nothing else: the floor of what token reduction can cost. All of them have the same weights and images.

Nothing is timed before the gradients of ours were found to be those of the definition, in double precision.

python -m benchmarks.training --model deit_small_patch16_224 --batch 8 --num-prop 8 --json result.json
"""

from __future__ import annotations

import copy
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

import gtp_kernels
import gtp_vit
from benchmarks.measure import measure, provenance
from benchmarks.registry import agree
from benchmarks.run import table_of
from gtp_vit.slicing import sliced

CPU = torch.device("cpu")


def step(model: Any, images: Tensor, labels: Tensor) -> None:
    """Forward, loss, backward; what the step before left behind is dropped."""
    model.zero_grad(set_to_none=True)
    F.cross_entropy(model(images), labels).backward()


def check_gradients(model: Any, images: Tensor, labels: Tensor) -> None:
    """Raises AssertionError unless the gradients of the patched model are the definition's, in float64."""
    wide = copy.deepcopy(model).double()
    found: list[dict[str, Tensor]] = []
    for backend in ("reference", "cpu"):
        with gtp_kernels.use_backend(backend):
            step(wide, images.double(), labels)
        found.append({name: parameter.grad for name, parameter in wide.named_parameters()})
    # Parts of the gradient vanish but for rounding: that of a key's bias, which shifts whole rows of logits.
    noise = 1e-12 * max(float(gradient.norm()) for gradient in found[0].values())
    for name, expected in found[0].items():
        if float((found[1][name] - expected).norm()) > noise:
            agree(f"the gradient of {name}", found[1][name], expected, 1e-6)


@click.command(help=__doc__)
@click.option("--model", "name", default="deit_small_patch16_224", show_default=True, help="Of timm.")
@click.option("--batch", default=8, show_default=True, help="Images.")
@click.option("--num-prop", default=8, show_default=True, help="P.")
@click.option("--dtype", default="float32", type=click.Choice(["float32", "bfloat16"]), show_default=True)
@click.option("--rounds", default=9, show_default=True, help="Samples of each candidate.")
@click.option("--threads", default=None, type=int, help="CPU threads; torch's own choice by default.")
@click.option("--json", "output", default=None, type=click.Path(path_type=Path), help="Also write JSON here.")
@click.option("--tiny", is_flag=True, help="A tiny model: tries the tool, measures nothing.")
def main(
    name: str, batch: int, num_prop: int, dtype: str, rounds: int, threads: int | None, output: Path | None, tiny: bool
) -> None:
    """Times the step and prints a table."""
    import timm

    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    create: dict[str, Any] = {"img_size": 64, "depth": 2} if tiny else {}
    dense: Any = timm.create_model(name, pretrained=False, **create).train()
    patched: Any = gtp_vit.patch(copy.deepcopy(dense), num_prop=num_prop, sparsity=0.6)
    images = torch.randn(batch, 3, *dense.patch_embed.img_size)
    labels = torch.randint(dense.num_classes, (batch,))
    console = Console(width=None if sys.stdout.isatty() else 120)
    result: dict[str, Any] = {
        "case": f"training {name}", "shape": f"B{batch} P{num_prop}", "dtype": dtype,
        "model": name, "batch": batch, "num_prop": num_prop, "sparsity": 0.6,
    }  # fmt: skip
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("checking the gradients", total=None)
        try:
            check_gradients(patched, images[:1], labels[:1])
        except AssertionError as error:
            result["error"] = str(error)
        else:
            modules = {"ours": patched, "timm": dense, "slicing": sliced(dense, num_prop)}
            images = images.to(getattr(torch, dtype))
            calls = {label: partial(step, module.to(images.dtype), images, labels) for label, module in modules.items()}
            bar.update(task, description="timing", total=len(calls) * (rounds + 2))
            spreads, _ = measure(calls, CPU, rounds=rounds, progress=partial(bar.advance, task))
            result["seconds"] = {label: spread.samples for label, spread in spreads.items()}
            result["median"] = {label: spread.median for label, spread in spreads.items()}
            result["quartiles"] = {label: [spread.low, spread.high] for label, spread in spreads.items()}
            result["ratio"] = {label: spreads["ours"].ratio(spreads[label]).median for label in ("timm", "slicing")}
            result["per_second"] = {label: batch / spread.median for label, spread in spreads.items()}
    console.print(table_of([result], f"CPU, {torch.get_num_threads()} threads, {dtype}"))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({**provenance(CPU), "dtype": dtype, "results": [result]}, indent=1) + "\n")
    if "error" in result:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
