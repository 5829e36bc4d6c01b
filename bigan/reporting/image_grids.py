"""Grids of sample images, and contact sheets of samples over the course of training.

Grids are PNG files with their geometry in the text chunk `bigan:grid`, so that single cells can be
cropped exactly. All files are written atomically.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from bigan import atomic_files
from bigan.transparency import on_checkerboard

CELL_PIXELS = 64  # smaller images are enlarged to at least this
MAX_SNAPSHOTS = 12  # columns of a contact sheet
MAX_SHEET_CELL = 128  # larger images are reduced on a contact sheet
MIN_SHEET_ROWS = 8  # reached with several cells of each row, if a grid has fewer rows

_TEXT_KEY = "bigan:grid"
_PAPER, _INK = (255, 255, 255), (70, 70, 70)
_GAP = 2  # pixels between cells


# --- grids ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Geometry:
    """Position of the cells of a grid, in pixels.

    Cell (row, column) begins at x = left + column * (width + gap), y = top + row * (height + gap).
    Without row labels the geometry is that of `torchvision.utils.make_grid(..., padding=gap)`.
    """

    rows: int
    columns: int
    width: int
    height: int
    left: int
    top: int
    gap: int
    labels: tuple[str, ...] = ()  # of the rows

    def box(self, row: int, column: int) -> tuple[int, int, int, int]:
        x = self.left + column * (self.width + self.gap)
        y = self.top + row * (self.height + self.gap)
        return x, y, x + self.width, y + self.height


def grid(images: Tensor, columns: int, row_labels: Sequence[str] = ()) -> Image.Image:
    """A grid of images in row-major order with `columns` columns.

    images: uint8 [N, C, H, W] or [N, H, W, C] with C = 1 to 4; those with alpha (C = 2 or 4) are on
    a checkerboard. Images whose longer side is below 64 pixels are enlarged by an integer factor
    with a Lanczos filter, which keeps 16 x 16 digits readable.
    row_labels: text at the left of each row, the name of its class.
    Raises ValueError for other shapes, dtypes or column counts.
    """
    return _grid(images, columns, row_labels)[0]


def save_grid(path: Path, images: Tensor, columns: int, row_labels: Sequence[str] = ()) -> None:
    """Write `grid(...)` and its geometry as PNG; creates the folder of `path`."""
    picture, geometry = _grid(images, columns, row_labels)
    _save(path, picture, {_TEXT_KEY: json.dumps(asdict(geometry))})


def read_geometry(picture: Image.Image) -> Geometry | None:
    """The geometry of a grid opened by PIL, or None if `save_grid` did not write it."""
    try:
        values = json.loads(picture.info[_TEXT_KEY])
        found = Geometry(**values | {"labels": tuple(map(str, values["labels"]))})
        right, bottom = found.box(found.rows - 1, found.columns - 1)[2:]
        positive = found.rows > 0 and found.columns > 0 and found.width > 0 and found.height > 0
    except (KeyError, TypeError, ValueError):
        return None
    return found if positive and right <= picture.width and bottom <= picture.height else None


def _grid(images: Tensor, columns: int, row_labels: Sequence[str]) -> tuple[Image.Image, Geometry]:
    pixels = _channels_last(images)
    num, height, width, _ = pixels.shape
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    scale = max(1, math.ceil(CELL_PIXELS / max(height, width)))
    rows = math.ceil(num / columns)
    font = _font(max(13, min(height * scale // 3, 26)))
    left = _GAP + (max(_text_width(font, label) for label in row_labels) + 12 if row_labels else 0)
    geometry = Geometry(
        rows, columns, width * scale, height * scale, left, _GAP, _GAP, tuple(row_labels)
    )
    right, bottom = geometry.box(rows - 1, columns - 1)[2:]
    page = Image.new("RGB", (right + _GAP, bottom + _GAP), _PAPER)
    for index in range(num):
        box = geometry.box(index // columns, index % columns)
        cell = Image.fromarray(pixels[index])
        page.paste(on_checkerboard(_resized(cell, geometry.width, geometry.height)), box[:2])
    _write_row_labels(page, geometry, font)
    return page, geometry


def _channels_last(images: Tensor) -> np.ndarray:
    """uint8 [N, H, W, 2, 3 or 4] of images in either layout."""
    if images.dtype != torch.uint8 or images.ndim != 4 or 0 in images.shape:
        found = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
        raise ValueError(f"expected uint8 images [N, C, H, W] or [N, H, W, C], got {found}")
    if images.shape[1] <= 4:
        images = images.permute(0, 2, 3, 1)
    elif images.shape[3] > 4:
        raise ValueError(f"expected 1 to 4 channels, got shape {list(images.shape)}")
    num_channels = 3 if images.shape[3] == 1 else images.shape[3]
    return images.cpu().expand(-1, -1, -1, num_channels).contiguous().numpy()


# --- contact sheets ---------------------------------------------------------------------------


def contact_sheet(sample_pngs: Sequence[tuple[int, Path]], out_path: Path) -> Path | None:
    """The same latents over the course of training: one row per class, time from left to right.

    sample_pngs: (images_seen, file written by `save_grid`). Of a long run, 12 evenly spaced
    snapshots are shown, including the first and the last. Missing and invalid files are skipped.
    Returns `out_path`, or None if no file is valid (then nothing is written).
    """
    readable = [
        (seen, path, geometry)
        for seen, path in sorted(sample_pngs)
        if (geometry := _geometry_of(path)) is not None
    ]
    if not readable:
        return None
    chosen = [readable[i] for i in _evenly(len(readable), MAX_SNAPSHOTS)]
    last = chosen[-1][2]
    cells = _sheet_cells(last)
    width, height = max((g.width, g.height) for _, _, g in chosen)
    shrink = min(1.0, MAX_SHEET_CELL / max(width, height))
    width, height = max(1, round(width * shrink)), max(1, round(height * shrink))

    names = [short_count(seen) for seen, _, _ in chosen]
    labels = [last.labels[row] if column == 0 and row < len(last.labels) else ""
              for row, column in cells]  # fmt: skip
    font = _font(max(13, min(width // 4, 20)))
    line = int(font.size * 1.6)
    label_width = max(_text_width(font, label) for label in labels)
    left = _GAP + (label_width + 12 if label_width else 0)
    sheet = Geometry(len(cells), len(chosen), width, height, left, 2 * line, _GAP, tuple(labels))
    right, bottom = sheet.box(len(cells) - 1, len(chosen) - 1)[2:]
    title = "images seen"
    page = Image.new(
        "RGB", (max(right, left + _text_width(font, title)) + _GAP, bottom + _GAP), _PAPER
    )
    draw = ImageDraw.Draw(page)
    draw.text((left, line // 2), title, fill=_INK, font=font, anchor="lm")
    for column, (name, (_, path, geometry)) in enumerate(zip(names, chosen, strict=True)):
        x0, y0, x1, _ = sheet.box(0, column)
        draw.text(((x0 + x1) / 2, y0 - line // 2), name, fill=_INK, font=font, anchor="mm")
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
        for row, (cell_row, cell_column) in enumerate(cells):
            if cell_row < geometry.rows and cell_column < geometry.columns:
                cell = picture.crop(geometry.box(cell_row, cell_column))
                page.paste(_resized(cell, width, height), sheet.box(row, column)[:2])
    _write_row_labels(page, sheet, font)
    _save(out_path, page, {_TEXT_KEY: json.dumps(asdict(sheet))})
    return out_path


def short_count(num: int) -> str:
    """A number of images as short text: 950, 1.5k, 12k, 2.4M."""
    for size, unit in ((1_000_000_000, "G"), (1_000_000, "M"), (1_000, "k")):
        if num >= size:
            value = num / size
            return f"{value:.1f}".removesuffix(".0") + unit if value < 10 else f"{value:.0f}{unit}"
    return str(num)


def _geometry_of(path: Path) -> Geometry | None:
    try:
        with Image.open(path) as picture:
            picture.load()  # text chunks may follow the pixels; raises for a truncated file
            return read_geometry(picture)
    except (OSError, SyntaxError, ValueError):  # raised by PIL for invalid files
        return None


def _evenly(num: int, most: int) -> list[int]:
    if num <= most:
        return list(range(num))
    return [round(i * (num - 1) / (most - 1)) for i in range(most)]


def _sheet_cells(geometry: Geometry) -> list[tuple[int, int]]:
    """The first cell of every row (class); for grids with few rows several cells of each."""
    each = min(geometry.columns, math.ceil(MIN_SHEET_ROWS / geometry.rows))
    return [(row, column) for row in range(geometry.rows) for column in range(each)]


def _resized(cell: Image.Image, width: int, height: int) -> Image.Image:
    if cell.size == (width, height):
        return cell
    return cell.resize((width, height), Image.Resampling.LANCZOS)


def _write_row_labels(page: Image.Image, geometry: Geometry, font: Any) -> None:
    draw = ImageDraw.Draw(page)
    for row, label in enumerate(geometry.labels[: geometry.rows]):
        x, y0, _, y1 = geometry.box(row, 0)
        draw.text((x - 8, (y0 + y1) / 2), label, fill=_INK, font=font, anchor="rm")


def _font(pixels: int) -> Any:
    return ImageFont.load_default(size=pixels)


def _text_width(font: Any, text: str) -> int:
    return math.ceil(font.getlength(text))


def _save(path: Path, picture: Image.Image, texts: Mapping[str, str]) -> None:
    grey = picture.convert("L")
    if grey.convert("RGB").tobytes() == picture.tobytes():
        picture = grey  # about half the file size
    info = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=info, optimize=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_files.write_atomic(path, buffer.getvalue())
