"""The size of images: one number for squares, otherwise (height, width), in pixels.

Configs and manifests have it as `64` or as `[192, 320]`, height first, as arrays have it. Text has
it as 320x192, width first, as image viewers and `bigan pack --resolution` have it.

Networks double a *base*, their smallest map: a size is possible if both sides are 4 to 20 px times
the same power of two. Bases are as small as possible: that of 64 is 4, that of 96 is 6.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import BeforeValidator

ImageSize = int | tuple[int, int]

MIN_BASE, MAX_BASE = 4, 20  # pixels of a side


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


def halved(size: ImageSize) -> tuple[tuple[int, int], int]:
    """((height, width) of the base, number of doublings from it to `size`)."""
    height, width = sides(size)
    num = 0
    while height % 2 == 0 and width % 2 == 0 and min(height, width) >= 2 * MIN_BASE:
        height, width, num = height // 2, width // 2, num + 1
    return (height, width), num


def sizes_up_to(size: ImageSize) -> list[ImageSize]:
    """The base of `size`, twice the base, ..., `size`."""
    base, num = halved(size)
    return [scaled(image_size(*base), 2**i) for i in range(num + 1)]


def check_doublings(size: ImageSize, least: int, most: int) -> None:
    """ValueError, with the nearest sizes, unless `least` to `most` doublings of a base give it."""
    if _is_possible(size, least, most):
        return
    first, second = (plain(near) for near in _nearest(size, least, most))
    raise ValueError(
        f"expected sides of {MIN_BASE} to {MAX_BASE} px times the same power of two, 2^{least} to "
        f"2^{most}; the nearest sizes are {first} and {second}"
    )


def _is_possible(size: ImageSize, least: int, most: int) -> bool:
    base, num = halved(size)
    return min(base) >= MIN_BASE and max(base) <= MAX_BASE and least <= num <= most


def _nearest(size: ImageSize, least: int, most: int) -> list[ImageSize]:
    """The two possible sizes whose sides differ from `size` by the smallest factors."""
    height, width = sides(size)
    found = {
        image_size(*(side * 2**num for side in base))
        for num in range(least, most + 1)
        for base in _bases_near(height / 2**num, width / 2**num)
    }
    return sorted(
        (near for near in found if _is_possible(near, least, most)),
        key=lambda near: [
            sum(
                abs(math.log(new / old))
                for new, old in zip(sides(near), (height, width), strict=True)
            ),
            sides(near),
        ],
    )[:2]


def _bases_near(height: float, width: float) -> list[tuple[int, int]]:
    """Bases with sides next to these; squares if these are equal."""
    rows, columns = (
        {
            min(max(math.floor(min(max(x, MIN_BASE), MAX_BASE)) + i, MIN_BASE), MAX_BASE)
            for i in (-1, 0, 1, 2)
        }
        for x in (height, width)
    )
    if height == width:
        return [(side, side) for side in rows]
    return [(row, column) for row in rows for column in columns]


def parsed(value: Any) -> ImageSize:
    """The size of a number or a pair as users give it; ValueError unless positive integers."""
    pair = [value, value] if isinstance(value, int) else value
    if (
        not isinstance(pair, list | tuple)
        or len(pair) != 2
        or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in pair)
    ):
        raise ValueError("expected a positive number of pixels, or [height, width] of other shapes")
    return image_size(*pair)


# A field of a config or a manifest; [64, 64] becomes 64.
Resolution = Annotated[ImageSize, BeforeValidator(parsed)]
