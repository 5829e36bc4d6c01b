"""Conversion of image files and arrays to the uint8 squares that are packed.

The format is detected from the content, not from the suffix. Steps: strict decoding, EXIF
orientation, transparency composited on white, conversion to grey or RGB, square centre crop,
resize. An image that already has the size is not resampled. Unusable images raise `BadImageError`
with a short reason; the caller adds the name of the image.
"""

from __future__ import annotations

import io
from typing import Any, Literal

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError, features

from bigan.data.format.codec import BadImageError, Pixels, first_line

Resize = Literal["lanczos", "area"]

SUFFIXES = (
    ".avif", ".bmp", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".jpx", ".npy",
    ".pgm", ".png", ".ppm", ".tga", ".tif", ".tiff", ".webp",
)  # fmt: skip
FORMATS = (  # EPS would execute a program
    "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP",
    *(["AVIF"] if "avif" in features.modules and features.check("avif") else []),
    *(["JPEG2000"] if features.check("jpg_2000") else []),
    "TGA",  # the last one: it has no signature
)  # fmt: skip
MAX_PIXELS = 2**27  # larger images are refused as decompression bombs
TRANSFORMS: dict[Resize, str] = {"lanczos": "center-lanczos-v1", "area": "center-area-v1"}

_FILTERS = {"lanczos": Image.Resampling.LANCZOS, "area": Image.Resampling.BOX}
_TURNS = {  # EXIF 2.32, tag 0x0112
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"  # PIL accepts a truncated file without it


def square(
    data: bytes,
    resolution: int,
    channels: int = 3,
    resize: Resize = "lanczos",
    allow_upscale: bool = False,
    *,
    max_pixels: int | None = None,
) -> Pixels:
    """The image file `data` as uint8 [resolution, resolution, channels], channels 1 or 3.

    Conversion: see `decode_any` and `to_square`. Raises `BadImageError` for a damaged file and for
    an image whose short side is below `resolution` (unless `allow_upscale`).
    """
    image = decode_any(data, max_pixels)
    return to_square(image, resolution, channels, resize, allow_upscale, max_pixels=max_pixels)


def decode_any(data: bytes, max_pixels: int | None = None) -> Image.Image:
    """Decode the bytes of an image of `FORMATS` or .npy; the mode is "L" or "RGB".

    JPEG is decoded by simplejpeg in strict mode, which gives the pixels of PIL but raises for
    structural damage that PIL accepts; CMYK and YCCK, which simplejpeg lacks, are decoded by PIL.
    Animations give their first frame. Raises `BadImageError` for truncated or damaged files, other
    formats, and more than `max_pixels` (None: `MAX_PIXELS`), before decoding. A flipped bit in a
    format without checksums (JPEG, BMP) often decodes to another image and cannot be detected.
    """
    if not data:
        raise BadImageError("is empty (0 bytes)")
    if data.startswith(np.lib.format.MAGIC_PREFIX):
        return plain(read_npy(data, max_pixels), max_pixels)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:  # reads the header only
            _check_size(image.width, image.height, max_pixels)
            if image.format == "TGA" and data[2] & 7 == 1 and not data[1]:  # no palette: not a TGA
                raise BadImageError("has an unknown image format")
            if data.startswith(b"\xff\xd8") and image.mode in ("L", "RGB"):
                decoded = simplejpeg.decode_jpeg(data, "GRAY" if image.mode == "L" else "RGB")
                strict = Image.fromarray(decoded[..., 0] if image.mode == "L" else decoded)
                strict.info = image.info  # its EXIF
                return plain(strict, max_pixels)
            if image.format == "PNG" and _PNG_END not in data:
                raise BadImageError("is truncated")
            image.load()
            return plain(image, max_pixels)
    except BadImageError:
        raise
    except Image.DecompressionBombError as error:  # PIL's own limit, which is larger
        raise BadImageError(_too_large("has", max_pixels)) from error
    except UnidentifiedImageError as error:
        raise BadImageError("has an unknown image format") from error
    except Exception as error:  # PIL raises many kinds for damaged files
        raise BadImageError(f"cannot be read as an image ({first_line(error)})") from error


def plain(image: Image.Image | np.ndarray[Any, Any], max_pixels: int | None = None) -> Image.Image:
    """A PIL image, or an array uint8 [H, W] or [H, W, 1, 3 or 4], as an upright "L" or "RGB" image.

    EXIF orientation is applied. Alpha and transparent palettes are composited on white; palette,
    1-bit and CMYK are converted; 16-bit grey is scaled, (x + 128) // 257, where PIL would clip (PIL
    drops the low byte of 16-bit RGB). Raises `BadImageError` for floating-point or 32-bit pixels,
    whose range is unknown, and for other arrays.
    """
    if isinstance(image, np.ndarray):
        image = _from_array(image, max_pixels)
    _check_size(image.width, image.height, max_pixels)
    deep = image.mode == "I" and image.format != "PPM"  # PIL reads a 16-bit PGM as "I", too
    image = _upright(image)
    if image.mode == "F" or deep:
        kind = "floating-point" if image.mode == "F" else "32-bit"
        raise BadImageError(f"{kind} pixels have an unknown range; convert to 8 or 16 bits")
    if image.mode.startswith("I"):  # "I;16", "I;16B" or a PGM's "I"
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray(((values + 128) // 257).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def to_square(
    image: Image.Image | np.ndarray[Any, Any],
    resolution: int,
    channels: int = 3,
    resize: Resize = "lanczos",
    allow_upscale: bool = False,
    *,
    max_pixels: int | None = None,
) -> Pixels:
    """Resized square centre crop of an image: uint8 [resolution, resolution, channels].

    Accepts what `plain` accepts. One channel is rounded Rec. 601 luma (PIL's "L"). "lanczos" is the
    antialiased Lanczos-3 of PIL, "area" the mean over the source area (PIL's BOX). Raises
    `BadImageError` if the short side is below `resolution` (unless `allow_upscale`), and like
    `plain`.
    """
    full = plain(image, max_pixels)
    side = min(full.size)
    if side < resolution and not allow_upscale:
        raise BadImageError(
            f"is {full.width}x{full.height}, smaller than {resolution} px; "
            "use --allow-upscale to enlarge it"
        )
    left, top = (full.width - side) // 2, (full.height - side) // 2
    cut = full.crop((left, top, left + side, top + side)).convert("L" if channels == 1 else "RGB")
    fitted = cut.resize((resolution, resolution), _FILTERS[resize])  # a copy if the size is equal
    return np.asarray(fitted).reshape(resolution, resolution, channels)


def read_npy(data: bytes, max_pixels: int | None = None) -> Pixels:
    """The uint8 [H, W], [H, W, 1] or [H, W, 3] array of a .npy file; `BadImageError` otherwise.

    The size in the header is checked before allocation.
    """
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        else:
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
    except Exception as error:  # NumPy raises many kinds for damaged files
        raise BadImageError(f"is not an .npy image ({first_line(error)})") from error
    if dtype != np.uint8 or not (len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3))):
        raise BadImageError(
            f"holds {dtype} {list(shape)}, not uint8 [H, W], [H, W, 1] or [H, W, 3]"
        )
    _check_size(shape[1], shape[0], max_pixels)
    pixels = np.frombuffer(data, np.uint8, offset=file.tell())
    if pixels.size != np.prod(shape):
        raise BadImageError(f"holds {pixels.size} bytes of pixels, expected {np.prod(shape)}")
    return pixels.reshape(shape, order="F" if fortran else "C")


def _from_array(array: np.ndarray[Any, Any], max_pixels: int | None) -> Image.Image:
    grey = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 1)
    if array.dtype != np.uint8 or not (grey or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise BadImageError(
            f"holds {array.dtype} {list(array.shape)}, not uint8 [H, W] or [H, W, 1, 3 or 4]"
        )
    _check_size(array.shape[1], array.shape[0], max_pixels)
    return Image.fromarray(
        np.ascontiguousarray(array[..., 0] if grey and array.ndim == 3 else array)
    )


def allow_pixels(max_pixels: int) -> None:
    """Raise PIL's limit to `max_pixels`: above it PIL warns, and refuses images of twice as many.

    PIL's limit is one for the process.
    """
    if Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)


def _check_size(width: int, height: int, max_pixels: int | None) -> None:
    if width <= 0 or height <= 0:
        raise BadImageError(f"is {width}x{height}, without pixels")
    if width * height > (max_pixels or MAX_PIXELS):
        raise BadImageError(_too_large(f"is {width}x{height},", max_pixels))


def _too_large(size: str, max_pixels: int | None) -> str:
    return f"{size} more than {max_pixels or MAX_PIXELS:,} pixels; use --max-pixels to accept it"


def orientation_of(image: Image.Image) -> int:
    """The EXIF or XMP orientation of an image, 1 (upright) to 8; 1 if it is damaged."""
    try:
        orientation: Any = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # a damaged EXIF block is ignored
        return 1
    return orientation if orientation in _TURNS else 1


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF or XMP orientation and remove both, so that it is not applied twice.

    `ImageOps.exif_transpose` also rewrites the EXIF block, which fails for damaged ones.
    """
    if (orientation := orientation_of(image)) == 1:
        return image
    turned = image.transpose(_TURNS[orientation])
    turned.info = {key: value for key, value in image.info.items() if key == "transparency"}
    return turned
