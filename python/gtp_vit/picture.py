"""The picture of what GTP did to photographs, after the paper's Figure 4: who remained, and who carries the others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

FOOTNOTE = (
    "A dot marks a patch that took others in; a line leads to it from each patch of which it carries most. "
    "A cross marks a patch that nobody carries."
)
MEAN_FOOTNOTE = "Grey patches left: each block appends the mean of those that leave it as a token of its own."

_SCALE = 2  # drawn this much larger, then reduced: Pillow does not antialias lines
_PANEL = 288  # longer side of a panel, in pixels of the result
_GAP, _WIDE_GAP, _MARGIN = 10, 44, 36
# Round the colour circle, so that the distance between two indices is a distance in hue.
_PALETTE = (
    (239, 83, 80),
    (255, 138, 76),
    (255, 179, 64),
    (250, 215, 80),
    (190, 208, 72),
    (110, 190, 96),
    (56, 178, 140),
    (64, 188, 204),
    (76, 156, 232),
    (98, 118, 222),
    (146, 104, 212),
    (196, 100, 196),
    (236, 104, 156),
)
_INK, _SOFT_INK, _PAPER = (28, 30, 34), (112, 116, 124), (255, 255, 255)


def carriers(kept: Tensor, lineage: Tensor, threshold: float = 1e-6) -> Tensor:
    """The original patch whose final row carries most of every original patch.

    Args:
        kept: int64 [n], the original patch behind each final row; negative for a row that is no patch (`Mean` makes
            such rows).
        lineage: float [m, tokens] with m >= n, how much of each original patch each final row carries. Rows beyond n
            are no patches either.
        threshold: a smaller share counts as none.

    Returns:
        int64 [tokens]: the patch itself for one that remained, -1 for one that nobody carries, -2 for one that a row
        that is no patch carries.

    Raises:
        ValueError: sizes that do not go together.
    """
    if kept.ndim != 1 or lineage.ndim != 2 or lineage.shape[0] < kept.shape[0]:
        raise ValueError(
            f"kept, lineage: expected [n] and [m, tokens] with m >= n, got {list(kept.shape)}, {list(lineage.shape)}"
        )
    tokens = lineage.shape[1]
    if lineage.shape[0] == 0:
        return kept.new_full((tokens,), -1)
    shares, rows = lineage.max(dim=0)
    owners = kept.new_full((lineage.shape[0],), -2)
    owners[: kept.shape[0]] = torch.where(kept >= 0, kept, -2)
    carrier = torch.where(shares > threshold, owners[rows], torch.full_like(rows, -1))
    own = kept[kept >= 0]
    carrier[own] = own
    return carrier


def draw_propagation(
    images: Tensor,
    names: Sequence[str],
    grid_size: tuple[int, int],
    kept: Sequence[Tensor] | Tensor,
    lineage: Sequence[Tensor] | Tensor,
    *,
    title: str = "Graph-based token propagation",
    subtitle: str = "",
    footnote: str = FOOTNOTE,
) -> Image.Image:
    """One row of three panels per photograph: the photograph, the patches that remained, where the others went.

    In the last panel every patch that left has the colour of the patch whose final row carries most of it, and a line
    to it; a patch that nobody carries is crossed out.

    Args:
        images: float [B, 3, H, W] in [0, 1], any resolution.
        names: B captions.
        grid_size: patches (down, across).
        kept: per image int64 [n], the original patches that remained, as `carriers` takes it.
        lineage: per image float [m, tokens], as `carriers` takes it.

    Raises:
        ValueError: sizes that do not go together.
    """
    from PIL import Image, ImageDraw, ImageFont

    tokens = grid_size[0] * grid_size[1]
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images: expected [B, 3, H, W], got {tuple(images.shape)}")
    if not len(images) == len(names) == len(kept) == len(lineage) or len(images) == 0:
        raise ValueError(
            "images, names, kept, lineage: expected the same number of each, at least one, "
            f"got {len(images)}, {len(names)}, {len(kept)}, {len(lineage)}"
        )
    if lineage[0].shape[-1] != tokens:
        raise ValueError(f"lineage: expected {tokens} patches for a grid of {grid_size}, got {lineage[0].shape[-1]}")

    cell = max(1, _PANEL // max(grid_size))
    width, height = cell * grid_size[1], cell * grid_size[0]
    columns = 1 if len(images) < 3 else 2
    rows = -(-len(images) // columns)
    caption = 26
    triple = 3 * width + 2 * _GAP
    head = 118 if subtitle else 92
    foot = 56 if footnote else _MARGIN // 2
    canvas = Image.new(
        "RGB",
        (
            2 * _MARGIN + columns * triple + (columns - 1) * _WIDE_GAP,
            head + rows * (height + caption + _GAP) + foot,
        ),
        _PAPER,
    )
    pen = ImageDraw.Draw(canvas)
    fonts = {size: ImageFont.load_default(size) for size in (15, 17, 30)}
    pen.text((_MARGIN, 24), title, fill=_INK, font=fonts[30])
    if subtitle:
        pen.text((_MARGIN, 66), subtitle, fill=_SOFT_INK, font=fonts[17])
    for index, (image, name) in enumerate(zip(images, names, strict=True)):
        left = _MARGIN + (index % columns) * (triple + _WIDE_GAP)
        top = head + (index // columns) * (height + caption + _GAP)
        carrier = carriers(torch.as_tensor(kept[index]).cpu(), torch.as_tensor(lineage[index]).cpu())
        remaining = torch.as_tensor(kept[index]).cpu()
        remaining = remaining[remaining >= 0]
        gone = tokens - len(remaining)
        panels = _panels(image, grid_size, cell, remaining, carrier)
        went = f"where the {gone} others went" if gone else "none left"
        headings = (name, f"{len(remaining)} of {tokens} patches remain", went)
        for column, (panel, heading) in enumerate(zip(panels, headings, strict=True)):
            x = left + column * (width + _GAP)
            _caption(pen, x, top, width, heading, fonts[15], _INK if column == 0 else _SOFT_INK)
            canvas.paste(panel, (x, top + caption))
    if footnote:
        _caption(pen, _MARGIN, canvas.height - foot + 8, canvas.width - 2 * _MARGIN, footnote, fonts[15], _SOFT_INK)
    return canvas


def save_propagation(path: Path | str, image: Image.Image) -> None:
    """Writes the picture as a PNG.

    Raises:
        OSError: the file cannot be written.
    """
    image.save(path, format="PNG", optimize=True)


def _caption(
    pen: ImageDraw.ImageDraw,
    x: int,
    y: int,
    width: int,
    text: str,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    fill: tuple[int, int, int],
) -> None:
    while len(text) > 4 and pen.textlength(text, font=font) > width:
        text = text[:-2].rstrip(".") + "."
    pen.text((x, y + 4), text, fill=fill, font=font)


def _panels(
    image: Tensor, grid_size: tuple[int, int], cell: int, kept: Tensor, carrier: Tensor
) -> tuple[Image.Image, Image.Image, Image.Image]:
    """The three panels of one photograph, `cell` pixels per patch."""
    from PIL import Image

    across = grid_size[1]
    big = cell * _SCALE
    size = (across * big, grid_size[0] * big)
    pixels = (image.detach().float().cpu().clamp(0, 1).permute(1, 2, 0) * 255).round().byte().numpy()
    photo = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    remains = np.zeros(grid_size, dtype=bool)
    remains.reshape(-1)[kept.numpy()] = True

    veil = _fade(photo, 0.86)
    mask = Image.fromarray(remains.astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST)
    summary = Image.composite(photo, veil, mask)
    _boundaries(summary, remains.astype(np.int64), big, _SOFT_INK)
    flow = _flow(photo, remains, carrier.numpy(), big)
    small = (across * cell, grid_size[0] * cell)
    resize = Image.Resampling.LANCZOS
    return photo.resize(small, resize), summary.resize(small, resize), flow.resize(small, resize)


def _fade(photo: Image.Image, amount: float) -> Image.Image:
    """Greyed and mixed with white."""
    from PIL import Image

    return Image.blend(photo.convert("L").convert("RGB"), Image.new("RGB", photo.size, (255, 255, 255)), amount)


def _boundaries(panel: Image.Image, groups: np.ndarray, cell: int, fill: tuple[int, int, int]) -> None:
    """Lines between neighbouring patches of different groups."""
    from PIL import ImageDraw

    pen = ImageDraw.Draw(panel)
    for row, column in np.argwhere(groups[:, 1:] != groups[:, :-1]):
        x = (column + 1) * cell
        pen.line((x, row * cell, x, (row + 1) * cell), fill=fill, width=_SCALE)
    for row, column in np.argwhere(groups[1:] != groups[:-1]):
        y = (row + 1) * cell
        pen.line((column * cell, y, (column + 1) * cell, y), fill=fill, width=_SCALE)


def _flow(photo: Image.Image, remains: np.ndarray, carrier: np.ndarray, cell: int) -> Image.Image:
    """Groups in their carriers' colours, with a line from every patch that left to the one that carries it."""
    from PIL import Image, ImageDraw

    down, across = remains.shape
    panel = _fade(photo, 0.62)
    layer = Image.new("RGBA", panel.size, (0, 0, 0, 0))
    pen = ImageDraw.Draw(layer)
    gone = np.flatnonzero(~remains.reshape(-1))
    sources = gone[carrier[gone] >= 0]
    receivers = np.unique(carrier[sources])
    colours = _colours(receivers, across)

    def box(patch: int, inset: int = 0) -> tuple[int, int, int, int]:
        row, column = divmod(int(patch), across)
        left, top = column * cell + inset, row * cell + inset
        return left, top, (column + 1) * cell - 1 - inset, (row + 1) * cell - 1 - inset

    for patch in sources:
        pen.rectangle(box(patch), fill=(*colours[int(carrier[patch])], 130))
    for patch in receivers:
        pen.rectangle(box(patch), fill=(*colours[int(patch)], 255))
    for patch in gone[carrier[gone] == -2]:
        pen.rectangle(box(patch), fill=(120, 124, 132, 130))
    panel = Image.alpha_composite(panel.convert("RGBA"), layer).convert("RGB")
    # What stayed and took nothing in is one group: no lines inside it.
    groups = np.where(remains.reshape(-1) & ~np.isin(np.arange(carrier.size), receivers), -3, carrier)
    _boundaries(panel, groups.reshape(down, across), cell, _PAPER)

    layer = Image.new("RGBA", panel.size, (0, 0, 0, 0))
    pen = ImageDraw.Draw(layer)
    dot = max(2, cell // 6)
    for patch in sources:
        start, end = _centre(patch, across, cell), _centre(carrier[patch], across, cell)
        far = max(abs(start[0] - end[0]), abs(start[1] - end[1])) > 3 * cell
        shade = tuple(part * 55 // 100 for part in colours[int(carrier[patch])])
        pen.line((*start, *end), fill=(*shade, 150 if far else 255), width=_SCALE if far else 2 * _SCALE)
    for patch in receivers:
        x, y = _centre(patch, across, cell)
        pen.ellipse((x - dot, y - dot, x + dot, y + dot), fill=(*_PAPER, 255), outline=(*_INK, 255), width=_SCALE)
    for patch in gone[carrier[gone] == -1]:
        left, top, right, bottom = box(patch, cell // 3)
        pen.line((left, top, right, bottom), fill=(*_INK, 200), width=_SCALE)
        pen.line((left, bottom, right, top), fill=(*_INK, 200), width=_SCALE)
    return Image.alpha_composite(panel.convert("RGBA"), layer).convert("RGB")


def _centre(patch: int, across: int, cell: int) -> tuple[int, int]:
    row, column = divmod(int(patch), across)
    return column * cell + cell // 2, row * cell + cell // 2


def _colours(patches: np.ndarray, across: int) -> dict[int, tuple[int, int, int]]:
    """A colour per patch, far in hue from those of the patches near it."""
    chosen: dict[int, int] = {}
    for patch in map(int, patches):
        row, column = divmod(patch, across)
        crowding = np.zeros(len(_PALETTE))
        for other, index in chosen.items():
            distance = max(abs(row - other // across), abs(column - other % across))
            hues = np.abs(np.arange(len(_PALETTE)) - index)
            hues = np.minimum(hues, len(_PALETTE) - hues)
            crowding += np.exp(-hues) / distance**2
        chosen[patch] = int(crowding.argmin())
    return {patch: _PALETTE[index] for patch, index in chosen.items()}
