"""``python -m benchmarks.breakdown``: where a patched model spends its time, operator by operator, on this CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import timm
import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

import gtp_vit
from benchmarks.measure import provenance


@click.command(help=__doc__)
@click.option("--model", default="deit_small_patch16_224", show_default=True, help="A timm model.")
@click.option("--batch", default=8, show_default=True, help="Images.")
@click.option("--num-prop", default=8, show_default=True, help="P.")
@click.option("--json", "output", default=None, type=click.Path(path_type=Path), help="Also write the shares here.")
def main(model: str, batch: int, num_prop: int, output: Path | None) -> None:
    """Profiles three forwards and prints each operator's share."""
    patched: Any = gtp_vit.patch(timm.create_model(model).eval(), num_prop=num_prop)
    images = torch.randn(batch, 3, *patched.patch_embed.img_size)
    with torch.inference_mode():
        patched(images)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(3):
                patched(images)
    rows = sorted(profiler.key_averages(), key=lambda row: row.self_cpu_time_total, reverse=True)
    total = sum(row.self_cpu_time_total for row in rows)
    table = Table("operator", "share", "ms per forward", title=f"{model}, batch {batch}, P = {num_prop}")
    for row in rows[:14]:
        share, milliseconds = row.self_cpu_time_total / total, row.self_cpu_time_total / 3000
        table.add_row(row.key, f"{share:.1%}", f"{milliseconds:.2f}")
    Console().print(table)
    if output is not None:
        shares = {row.key: row.self_cpu_time_total / total for row in rows[:14]}
        about = {"model": model, "batch": batch, "num_prop": num_prop}
        output.write_text(json.dumps({**provenance(), **about, "shares": shares}, indent=1) + "\n")


if __name__ == "__main__":
    main()
