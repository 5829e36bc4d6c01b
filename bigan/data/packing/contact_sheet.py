"""The contact sheet of a data set: example images of its classes on one page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from bigan.data.format.codec import Pixels
from bigan.transparency import on_checkerboard

ROWS = 16  # classes at most
COLUMNS = 12  # images per line
MIN_LINES = 6  # with fewer classes, each has several lines
MIN_CELL, MAX_CELL = 64, 128  # pixels; smaller images are enlarged, larger ones reduced

_PAPER, _INK, _FAINT = (255, 255, 255), (40, 40, 40), (140, 140, 140)
_MARGIN, _GAP = 20, 3
_MAX_NAME = 28  # characters


@dataclass(frozen=True)
class Row:
    """A class: its name, its number of images, and some of them, uint8 [H, W, 1 to 4]."""

    name: str
    num_images: int
    images: Sequence[Pixels]


def contact_sheet(title: str, rows: Sequence[Row]) -> Image.Image:
    """A page with one row per class: name and number of images at the left, then the images.

    Images whose longer side is below 64 pixels are enlarged by an integer factor with the Lanczos
    filter, those above 128 pixels are reduced to 128. Transparent ones are on a checkerboard.
    """
    first = next((image.shape for row in rows for image in row.images), (MIN_CELL, MIN_CELL))
    longer = max(first[:2])
    cell = min(MAX_CELL, longer * max(1, math.ceil(MIN_CELL / longer)))
    cell_height, cell_width = (max(1, round(side * cell / longer)) for side in first[:2])
    large, small, heading = (ImageFont.load_default(size=pixels) for pixels in (15, 12, 18))
    names = [_shortened(row.name) for row in rows]
    counts = [f"{row.num_images:,} image{'' if row.num_images == 1 else 's'}" for row in rows]
    text = max(
        (max(large.getlength(name), small.getlength(count))
         for name, count in zip(names, counts, strict=True)), default=0,
    )  # fmt: skip
    left = _MARGIN + math.ceil(text) + 16
    top = _MARGIN + 18 + 16
    columns = min(COLUMNS, max((len(row.images) for row in rows), default=0))
    lines = [max(1, math.ceil(len(row.images) / COLUMNS)) for row in rows]
    title_width = _MARGIN + math.ceil(heading.getlength(title))
    width = max(left + columns * (cell_width + _GAP) - _GAP, title_width)
    height = top + sum(lines) * (cell_height + _GAP) - _GAP
    page = Image.new("RGB", (width + _MARGIN, height + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((_MARGIN, _MARGIN + 9), title, fill=_INK, font=heading, anchor="lm")
    y = top
    for row, name, count, num_lines in zip(rows, names, counts, lines, strict=True):
        right, middle = left - 16, y + cell_height // 2
        draw.text((right, middle - 9), name, fill=_INK, font=large, anchor="rm")
        draw.text((right, middle + 9), count, fill=_FAINT, font=small, anchor="rm")
        for number, image in enumerate(row.images):
            line, column = divmod(number, COLUMNS)
            pixels = image[..., 0] if image.shape[2] == 1 else image
            thumbnail = Image.fromarray(pixels).resize(
                (cell_width, cell_height), Image.Resampling.LANCZOS
            )
            place = left + column * (cell_width + _GAP), y + line * (cell_height + _GAP)
            page.paste(on_checkerboard(thumbnail), place)
        y += num_lines * (cell_height + _GAP)
    return page


def _shortened(name: str) -> str:
    plain = "".join(c if c.isprintable() else "?" for c in name)
    return plain if len(plain) <= _MAX_NAME else plain[: _MAX_NAME - 1] + "…"
