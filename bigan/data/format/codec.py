"""Encoding and decoding of uint8 HWC images in tar members.

    npy   raw pixels after a short header; decoding is a copy
    png   lossless
    jpg   4:4:4, decoded by simplejpeg directly into the batch: the fastest strict decoder,
          bit-identical to PIL, which ignores some structural damage
    webp  lossless, or lossy with a quality
    any   image files of others in any format, for shards that are indexed in place; slower

Decoding is strict: a packed image has exactly the resolution and channels of its manifest; anything
else is damage and raises `BadImageError`. No decoder can detect single flipped bits in compressed
data, many of which decode to another image; the sha256 of the shards does. Nothing is unpickled.
"""

from __future__ import annotations

import functools
import io
import re
from typing import Literal

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from bigan.image_size import image_size
from bigan.transparency import has_alpha

Pixels = NDArray[np.uint8]

Encoding = Literal["npy", "png", "jpg", "webp"]  # suffix of the member
StoredEncoding = Encoding | Literal["any"]  # any: shards of others, decoded by `convert`
ENCODINGS: tuple[Encoding, ...] = ("npy", "png", "jpg", "webp")
JPEG_QUALITY = 95  # default

_PNG_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")  # in "<_io.BytesIO object at 0x7f12...>"
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"  # PIL accepts a truncated file without it


class BadImageError(ValueError):
    """Damaged or unexpected image bytes; the caller adds shard and member."""


def first_line(error: object) -> str:
    """The first line of an error message, without object addresses: equal in all processes."""
    lines = _ADDRESS.sub("", str(error)).splitlines()
    return lines[0] if lines else type(error).__name__


def encode(image: Pixels, encoding: Encoding, quality: int | None = None) -> bytes:
    """The bytes of a uint8 [H, W, C] image, C = 1 to 4; with alpha (C = 2 or 4) not jpg.

    `quality` in 1..100 is for jpg (None: `JPEG_QUALITY`) and webp (None: lossless).
    """
    file = io.BytesIO()
    pixels = image[..., 0] if image.shape[2] == 1 else image
    if encoding == "npy":
        file.write(npy_header(image.shape))
        file.write(np.ascontiguousarray(image).tobytes())
    elif encoding == "png":
        Image.fromarray(pixels).save(file, "PNG", compress_level=6)
    elif encoding == "jpg":
        space, subsampling = ("GRAY", "Gray") if image.shape[2] == 1 else ("RGB", "444")
        return simplejpeg.encode_jpeg(
            np.ascontiguousarray(image),
            quality=JPEG_QUALITY if quality is None else quality,
            colorspace=space,
            colorsubsampling=subsampling,
        )
    elif encoding == "webp":
        settings = {"lossless": True} if quality is None else {"quality": quality}
        if has_alpha(image.shape[2]):  # exact: colors are kept where alpha is 0
            Image.fromarray(pixels).convert("RGBA").save(file, "WEBP", exact=True, **settings)
        else:
            Image.fromarray(pixels).convert("RGB").save(file, "WEBP", **settings)
    else:
        raise ValueError(f"unknown encoding {encoding!r}")
    return file.getvalue()


def decode_into(out: Pixels, data: bytes, encoding: StoredEncoding) -> None:
    """Decode `data` into `out`, a C-contiguous uint8 [H, W, C] array of the expected shape.

    Raises `BadImageError` if the bytes are damaged or hold another shape or type; `out` may then
    be partially written.
    """
    _DECODERS[encoding](out, data)


@functools.lru_cache(maxsize=16)
def npy_header(shape: tuple[int, ...]) -> bytes:
    """The bytes before the pixels of a uint8 image of `shape` in .npy files that bigan writes."""
    file = io.BytesIO()
    description = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, description)
    return file.getvalue()


def _decode_npy(out: Pixels, data: bytes) -> None:
    header = npy_header(out.shape)
    start = len(header)
    if len(data) == start + out.size and data.startswith(header):  # written by bigan
        out[...] = np.frombuffer(data, np.uint8, out.size, start).reshape(out.shape)
        return
    try:
        image = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # NumPy raises many kinds for damaged files
        raise BadImageError(f"not an .npy image: {first_line(error)}") from error
    if image.dtype != np.uint8 or image.shape != out.shape:
        raise BadImageError(
            f"holds {image.dtype} {list(image.shape)}, expected uint8 {list(out.shape)}"
        )
    out[...] = image


def _decode_jpg(out: Pixels, data: bytes) -> None:
    try:
        space = "RGB" if out.shape[2] == 3 else "GRAY"
        image = simplejpeg.decode_jpeg(data, space, buffer=out)
    except Exception as error:  # ValueError, or MemoryError for a damaged size
        raise BadImageError(f"does not decode: {first_line(error)}") from error
    if image.shape != out.shape:
        raise BadImageError(f"is {list(image.shape)}, expected {list(out.shape)}")


def _decode_png(out: Pixels, data: bytes) -> None:
    if not data.endswith(PNG_END):
        raise BadImageError("is a truncated PNG file")
    _decode_with_pil(out, data, "PNG", (_PNG_MODES[out.shape[2]],))


def _decode_webp(out: Pixels, data: bytes) -> None:
    if len(data) < 12 or len(data) < 8 + int.from_bytes(data[4:8], "little"):
        raise BadImageError("is a truncated WebP file")
    # WebP has no grey, and no alpha where all pixels are opaque.
    _decode_with_pil(out, data, "WEBP", ("RGBA", "RGB") if has_alpha(out.shape[2]) else ("RGB",))


def _decode_with_pil(out: Pixels, data: bytes, kind: str, modes: tuple[str, ...]) -> None:
    height, width, channels = out.shape
    try:
        with Image.open(io.BytesIO(data), formats=[kind]) as image:
            if image.size != (width, height) or image.mode not in modes:  # from the header
                raise BadImageError(
                    f"is {image.mode} {image.width}x{image.height}, "
                    f"expected {modes[0]} {width}x{height}"
                )
            pixels = np.asarray(image).reshape(height, width, -1)
        if len(modes) > 1:
            out[..., :-1] = pixels[..., : channels - 1]
            out[..., -1] = pixels[..., 3] if pixels.shape[2] == 4 else 255
        else:
            out[...] = pixels[..., :channels]
    except BadImageError:
        raise
    except Exception as error:  # PIL raises many kinds for damaged files
        raise BadImageError(f"does not decode: {first_line(error)}") from error


def _decode_any(out: Pixels, data: bytes) -> None:
    from bigan.data.format import convert  # which imports this module

    image = convert.decode_any(data)
    if (image.height, image.width) != out.shape[:2]:
        expected = f"expected {out.shape[1]}x{out.shape[0]}"
        raise BadImageError(f"is {image.width}x{image.height}, {expected}")
    out[...] = convert.to_size(image, image_size(*out.shape[:2]), out.shape[2])


_DECODERS = {"npy": _decode_npy, "png": _decode_png, "jpg": _decode_jpg, "webp": _decode_webp,
             "any": _decode_any}  # fmt: skip
