"""``python -m benchmarks.gmacs``: the work of patched models beside the GMACs that the paper prints.

It counts a forward of each model at every P of the paper's tables (no weights, no images: shapes are enough), adds what
the authors' code does beyond it, and writes ``benchmarks/results/gmacs.json``. ``docs/gmacs.md`` explains the numbers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gtp_vit
from gtp_vit import GTPConfig, flops, lvvit

PATH = Path(__file__).resolve().parent / "results" / "gmacs.json"


@dataclass(frozen=True)
class Row:
    """One row of a table of the paper: GMACs for P = 0, 1, 2, …, printed with one decimal.

    Attributes:
        name: the paper's.
        table: where it stands.
        build: makes the model; its blocks, ``embed_dim`` and ``patch_embed.grid_size`` are read.
        size: of the images.
        gmacs: what is printed.
    """

    name: str
    table: str
    build: Callable[[], nn.Module]
    size: int
    gmacs: tuple[float, ...]


def _timm(name: str) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, pretrained=False)
    return model


# fmt: off
ROWS = (
    Row("DeiT-S", "Table 1", partial(_timm, "deit_small_patch16_224"), 224,
        (4.6, 4.5, 4.3, 4.2, 4.0, 3.9, 3.7, 3.6, 3.4, 3.3, 3.2, 3.0, 2.9, 2.7, 2.6)),
    Row("DeiT-B", "Table 1", partial(_timm, "deit_base_patch16_224"), 224,
        (17.6, 17.0, 16.5, 15.9, 15.4, 14.8, 14.2, 13.7, 13.1, 12.6, 12.1, 11.6, 11.0, 10.4, 9.8)),
    Row("LV-ViT-S", "Table 1", lvvit.lvvit_s, 224,
        (6.6, 6.4, 6.1, 5.9, 5.7, 5.4, 5.2, 5.0, 4.8, 4.6, 4.4, 4.1, 3.9)),
    Row("LV-ViT-M", "Table 1", lvvit.lvvit_m, 224,
        (12.7, 12.1, 11.5, 10.9, 10.3, 9.7, 9.1, 8.5, 8.0, 7.4)),
    Row("ViT-Medium-GAP", "Table 7", partial(_timm, "vit_medium_patch16_gap_256"), 256,
        (10.6, 10.4, 10.1, 9.9, 9.6, 9.3, 9.0, 8.8, 8.5, 8.3, 8.0, 7.8, 7.5, 7.2, 7.0)),
)
# fmt: on


@dataclass(frozen=True)
class Point:
    """One P of one row, in GMACs.

    Attributes:
        num_prop: P.
        paper: what is printed.
        counted: what :func:`gtp_vit.gmacs` counts.
        normalising: of the two dense products D^-1/2 · A · D^-1/2, which the authors' code does once.
        propagating: of a dense propagation in every block, beyond the sparse one, which is in ``counted``.
    """

    num_prop: int
    paper: float
    counted: float
    normalising: float
    propagating: float

    @property
    def authors(self) -> float:
        """The work as the authors' code does it."""
        return self.counted + self.normalising + self.propagating


def points(row: Row) -> Iterator[Point]:
    """Every P of a row."""
    with torch.device("meta"):
        model: Any = row.build()
    height, width = model.patch_embed.grid_size
    n, channels, depth = height * width, model.embed_dim, len(model.blocks)
    for num_prop, paper in enumerate(row.gmacs):
        config = GTPConfig(num_prop=num_prop)
        gtp_vit.patch(model, num_prop)
        total, sparse = count(model, row.size)
        gtp_vit.unpatch(model)
        normalising, dense = authors_extra(config, n, channels, depth)
        yield Point(num_prop, paper, total, normalising, dense - sparse)


def authors_extra(config: GTPConfig, num_image_tokens: int, channels: int, depth: int) -> tuple[float, float]:
    """GMACs of the dense normalisation of the graph, n³ twice, and of dense propagation, (n_l − P) · P · C a block."""
    if not config.uses_graph(depth):
        return 0.0, 0.0
    counts = config.token_counts(num_image_tokens, depth)
    dense = sum(after * (before - after) * channels for before, after in itertools.pairwise(counts))
    return 2 * num_image_tokens**3 / 1e9, dense / 1e9


def count(model: nn.Module, size: int) -> tuple[float, float]:
    """GMACs of a patched model, as :func:`gtp_vit.gmacs` counts them, and those of the sparse propagation therein."""
    image = flops.noise(model, size)
    counter = flops.counted(model, lambda: model(image))
    by_operator = counter.get_flop_counts()["Global"].items()
    sparse = sum(value for operator, value in by_operator if "propagate" in str(operator))
    return counter.get_total_flops() / 2e9, sparse / 2e9


def line(name: str, found: list[Point]) -> str:
    """How far a row is off, as printed and as the authors' code works."""
    parts = []
    for what, errors in (
        ("counted", [point.counted - point.paper for point in found]),
        ("with the authors' dense products", [point.authors - point.paper for point in found]),
    ):
        mean, largest = sum(errors) / len(errors), max(map(abs, errors))
        parts.append(f"{what}: mean {mean:+.3f}, at most {largest:.3f} off")
    return f"{name}: {'; '.join(parts)}"


def table(name: str, found: list[Point]) -> Iterator[str]:
    """A row as a Markdown table."""
    yield f"| {name}: P | paper | counted | + normalising | + dense propagation | sum | sum − paper |"
    yield "|---|---|---|---|---|---|---|"
    for point in found:
        yield (
            f"| {point.num_prop} | {point.paper:.1f} | {point.counted:.3f} | {point.normalising:.3f} | "
            f"{point.propagating:.3f} | {point.authors:.3f} | {point.authors - point.paper:+.3f} |"
        )


def main(arguments: list[str] | None = None) -> int:
    """Counts, prints and writes; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gmacs", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", action="append", choices=[row.name for row in ROWS], help="not all; writes nothing")
    options = parser.parse_args(arguments)
    rows = {row.name: list(points(row)) for row in ROWS if options.only is None or row.name in options.only}
    for name, found in rows.items():
        print(*table(name, found), "", line(name, found), "", sep="\n")
    if options.only is None:
        report = {
            name: [{key: round(value, 6) for key, value in vars(point).items()} for point in found]
            for name, found in rows.items()
        }
        PATH.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
