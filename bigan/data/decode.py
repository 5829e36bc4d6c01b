"""Bytes of one tar member <-> a uint8 HWC image.

Decoding is strict: a packed image has exactly the resolution and channels of its manifest, so
anything else is damage and raises `BadImageError`. Nothing is ever unpickled.
"""

from __future__ import annotations

import functools
import io
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]

Encoding = Literal["npy", "png"]  # the member's extension; both are lossless
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"  # PIL does not miss it in a file that was cut off


class BadImageError(ValueError):
    """Bytes that are not the image they should be; the caller names shard and member."""


def encode(image: Pixels, encoding: Encoding) -> bytes:
    """The bytes of a uint8 [H, W, C] image (C = 1 or 3) as "npy" or "png"."""
    file = io.BytesIO()
    if encoding == "npy":
        file.write(_npy_header(image.shape))
        file.write(np.ascontiguousarray(image).tobytes())
    elif encoding == "png":
        pixels = image[..., 0] if image.shape[2] == 1 else image
        Image.fromarray(pixels).save(file, "PNG", compress_level=6)
    else:
        raise ValueError(f"unknown encoding {encoding!r}")
    return file.getvalue()


def decode_into(out: Pixels, data: bytes, encoding: Encoding) -> None:
    """Decode `data` into `out`, a uint8 [H, W, C] array that says which shape is expected.

    Raises `BadImageError` if the bytes are damaged or hold another shape or type.
    """
    if encoding == "npy":
        _decode_npy(out, data)
    elif encoding == "png":
        _decode_png(out, data)
    else:
        raise ValueError(f"unknown encoding {encoding!r}")


@functools.lru_cache(maxsize=16)
def _npy_header(shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    description = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, description)
    return file.getvalue()


def _decode_npy(out: Pixels, data: bytes) -> None:
    header = _npy_header(out.shape)
    start = len(header)
    if len(data) == start + out.size and data.startswith(header):  # our own files: just a copy
        out[...] = np.frombuffer(data, np.uint8, out.size, start).reshape(out.shape)
        return
    try:
        image = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # NumPy raises many kinds; all mean the same here
        raise BadImageError(f"not an .npy image: {_first_line(error)}") from error
    if image.dtype != np.uint8 or image.shape != out.shape:
        raise BadImageError(
            f"holds {image.dtype} {list(image.shape)}, expected uint8 {list(out.shape)}"
        )
    out[...] = image


def _decode_png(out: Pixels, data: bytes) -> None:
    height, width, channels = out.shape
    mode = {1: "L", 3: "RGB"}[channels]
    if not data.endswith(_PNG_END):
        raise BadImageError("is not a whole PNG file")
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if image.size != (width, height) or image.mode != mode:  # known before any decoding
                raise BadImageError(
                    f"is {image.mode} {image.width}x{image.height}, "
                    f"expected {mode} {width}x{height}"
                )
            out[...] = np.asarray(image).reshape(out.shape)
    except BadImageError:
        raise
    except Exception as error:  # PIL raises a dozen kinds for damaged files
        raise BadImageError(f"does not decode: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
