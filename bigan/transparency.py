"""Images with alpha as their last channel: grey and alpha (2 channels), or RGBA (4)."""

from __future__ import annotations

from PIL import Image

_SQUARE = 8  # pixels of a field of the checkerboard
_LIGHT, _DARK = 255, 204  # grey levels of its fields


def has_alpha(channels: int) -> bool:
    """Whether images with this number of channels have alpha."""
    return channels in (2, 4)


def on_checkerboard(image: Image.Image) -> Image.Image:
    """An "LA" or "RGBA" image as RGB over a grey checkerboard; other images unchanged."""
    if image.mode not in ("LA", "RGBA"):
        return image
    fields = Image.new("L", (2, 2), _LIGHT)
    fields.putpixel((1, 0), _DARK)
    fields.putpixel((0, 1), _DARK)
    tile = fields.resize((2 * _SQUARE, 2 * _SQUARE), Image.Resampling.NEAREST)
    board = Image.new("RGBA", image.size)
    for top in range(0, image.height, tile.height):
        for left in range(0, image.width, tile.width):
            board.paste(tile, (left, top))
    return Image.alpha_composite(board, image.convert("RGBA")).convert("RGB")
