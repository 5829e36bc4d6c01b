"""The size of images: one number for squares, otherwise (height, width), in pixels.

Configs and manifests have it as `64` or as `[192, 320]`, height first, as arrays have it. Text has
it as 320x192, width first, as image viewers and `bigan pack --resolution` have it.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator

ImageSize = int | tuple[int, int]


def sides(size: ImageSize) -> tuple[int, int]:
    """(height, width)."""
    return size if isinstance(size, tuple) else (size, size)


def image_size(height: int, width: int) -> ImageSize:
    """The size of these sides."""
    return height if height == width else (height, width)


def num_pixels(size: ImageSize) -> int:
    """Height times width."""
    height, width = sides(size)
    return height * width


def shown(size: ImageSize) -> str:
    """The size as text: 64, or 320x192 (width x height)."""
    return f"{size[1]}x{size[0]}" if isinstance(size, tuple) else str(size)


def plain(size: ImageSize) -> int | list[int]:
    """The size as JSON has it."""
    return list(size) if isinstance(size, tuple) else size


def scaled(size: ImageSize, factor: int) -> ImageSize:
    """Both sides times `factor`."""
    return image_size(*(side * factor for side in sides(size)))


def shrunk(size: ImageSize, divisor: int) -> ImageSize:
    """Both sides divided by `divisor`, rounded down."""
    return image_size(*(side // divisor for side in sides(size)))


def ratio(large: ImageSize, small: ImageSize) -> int:
    """Pixels of `large` per pixel of `small` along a side."""
    return sides(large)[0] // sides(small)[0]


def _parsed(value: Any) -> ImageSize:
    """ValueError unless `value` is a positive integer or two of them."""
    pair = [value, value] if isinstance(value, int) else value
    if (
        not isinstance(pair, list | tuple)
        or len(pair) != 2
        or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in pair)
    ):
        raise ValueError("expected a number of pixels, or [height, width] of images not square")
    return image_size(*pair)


# A field of a config or a manifest; [64, 64] becomes 64.
Resolution = Annotated[ImageSize, BeforeValidator(_parsed)]
