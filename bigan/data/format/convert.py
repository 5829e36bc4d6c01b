"""Conversion of image files and arrays to the uint8 pixels that are packed.

The format is detected from the content, not from the suffix. Steps: strict decoding, EXIF
orientation, transparency kept (2 or 4 channels) or composited on white, conversion to grey or RGB,
then `to_size` fits the image to the size. An image that already has the size is not resampled.
Unusable images raise `BadImageError` with a short reason; the caller adds the name of the image.
"""

from __future__ import annotations

import io
from typing import Any, Literal

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError, features

from bigan.data.format.codec import PNG_END, BadImageError, Pixels, first_line
from bigan.image_size import ImageSize, shown, sides
from bigan.transparency import has_alpha

Resize = Literal["lanczos", "area"]
# crop: the largest centred part of the shape. pad: all of the image, within a border. stretch: all
# of the image, both sides resized.
Fit = Literal["crop", "pad", "stretch"]

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
TRANSFORMS: dict[tuple[Fit, Resize], str] = {
    ("crop", "lanczos"): "center-lanczos-v1",
    ("crop", "area"): "center-area-v1",
    ("pad", "lanczos"): "pad-lanczos-v1",
    ("pad", "area"): "pad-area-v1",
    ("stretch", "lanczos"): "stretch-lanczos-v1",
    ("stretch", "area"): "stretch-area-v1",
}
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # of PIL, by number of channels

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


def load(
    data: bytes,
    resolution: ImageSize,
    channels: int = 3,
    resize: Resize = "lanczos",
    allow_upscale: bool = False,
    fit: Fit = "crop",
    *,
    max_pixels: int | None = None,
) -> Pixels:
    """The image file `data` as uint8 [height, width, channels], channels 1 to 4.

    Conversion: see `decode_any` and `to_size`. Raises `BadImageError` for a damaged file and
    like `to_size`.
    """
    image = decode_any(data, has_alpha(channels), max_pixels)
    return to_size(image, resolution, channels, resize, allow_upscale, fit, max_pixels=max_pixels)


def decode_any(data: bytes, keep_alpha: bool = False, max_pixels: int | None = None) -> Image.Image:
    """Decode the bytes of an image of `FORMATS` or .npy; the mode is one of `plain`.

    JPEG is decoded by simplejpeg in strict mode, which gives the pixels of PIL but raises for
    structural damage that PIL accepts; CMYK and YCCK, which simplejpeg lacks, are decoded by PIL.
    Animations give their first frame. Raises `BadImageError` for truncated or damaged files, other
    formats, and more than `max_pixels` (None: `MAX_PIXELS`), before decoding. A flipped bit in a
    format without checksums (JPEG, BMP) often decodes to another image and cannot be detected.
    """
    if not data:
        raise BadImageError("is empty (0 bytes)")
    if data.startswith(np.lib.format.MAGIC_PREFIX):
        return plain(read_npy(data, max_pixels), keep_alpha, max_pixels)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:  # reads the header only
            _check_size(image.width, image.height, max_pixels)
            if image.format == "TGA" and data[2] & 7 == 1 and not data[1]:  # no palette: not a TGA
                raise BadImageError("has an unknown image format")
            if data.startswith(b"\xff\xd8") and image.mode in ("L", "RGB"):
                decoded = simplejpeg.decode_jpeg(data, "GRAY" if image.mode == "L" else "RGB")
                strict = Image.fromarray(decoded[..., 0] if image.mode == "L" else decoded)
                strict.info = image.info  # its EXIF
                return plain(strict, keep_alpha, max_pixels)
            if image.format == "PNG" and PNG_END not in data:
                raise BadImageError("is truncated")
            image.load()
            return plain(image, keep_alpha, max_pixels)
    except BadImageError:
        raise
    except Image.DecompressionBombError as error:  # PIL's own limit, which is larger
        raise BadImageError(_too_large("has", max_pixels)) from error
    except UnidentifiedImageError as error:
        raise BadImageError("has an unknown image format") from error
    except Exception as error:  # PIL raises many kinds for damaged files
        raise BadImageError(f"cannot be read as an image ({first_line(error)})") from error


def plain(
    image: Image.Image | np.ndarray[Any, Any],
    keep_alpha: bool = False,
    max_pixels: int | None = None,
) -> Image.Image:
    """A PIL image, or an array uint8 [H, W] or [H, W, 1 to 4], as an upright "L" or "RGB" image.

    EXIF orientation is applied. Alpha and transparent palettes are composited on white, or kept in
    an "RGBA" image with `keep_alpha`; palette, 1-bit and CMYK are converted; 16-bit grey is scaled,
    (x + 128) // 257, where PIL would clip (PIL drops the low byte of 16-bit RGB). Raises
    `BadImageError` for floating-point or 32-bit pixels, whose range is unknown, and for other
    arrays.
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
        if keep_alpha:
            return rgba
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def to_size(
    image: Image.Image | np.ndarray[Any, Any],
    resolution: ImageSize,
    channels: int = 3,
    resize: Resize = "lanczos",
    allow_upscale: bool = False,
    fit: Fit = "crop",
    *,
    max_pixels: int | None = None,
) -> Pixels:
    """An image at the size `resolution`: uint8 [height, width, channels].

    Accepts what `plain` accepts. One channel is rounded Rec. 601 luma (PIL's "L"). "lanczos" is the
    antialiased Lanczos-3 of PIL, "area" the mean over the source area (PIL's BOX).

    `fit`: "crop" resizes the largest centred part of the wanted shape. "pad" resizes all of the
    image, unless it is smaller, and centres it on black, transparent where there is alpha.
    "stretch" resizes both sides. Raises `BadImageError`, unless `allow_upscale`, if crop or stretch
    would enlarge a side; pad then adds a wider border. Also raises like `plain`.

    With 2 or 4 channels the last one is alpha, 255 where the original has none. Colors are resized
    as their products with alpha (8 bits, by PIL), so that colors of transparent pixels do not
    appear in their neighbours, and are 0 where alpha is 0.
    """
    full = plain(image, has_alpha(channels), max_pixels)
    height, width = sides(resolution)
    whole = full.size
    if fit == "crop":
        full = full.crop(_crop_box(full.width, full.height, width, height))
    full = full.convert(MODES[channels])  # alpha that is added is 255
    wanted = (width, height)
    if fit == "pad":
        wanted = _size_within(full.width, full.height, width, height, allow_upscale)
    elif (full.width < width or full.height < height) and not allow_upscale:
        raise BadImageError(
            f"is {whole[0]}x{whole[1]}, smaller than {shown(resolution)} px; use --allow-upscale "
            "to enlarge it, or --fit pad for a border"
        )
    fitted = full.resize(wanted, _FILTERS[resize])  # a copy if the size is equal
    if wanted != (width, height):
        page = Image.new(full.mode, (width, height))
        page.paste(fitted, ((width - wanted[0]) // 2, (height - wanted[1]) // 2))
        fitted = page
    pixels = np.asarray(fitted).reshape(height, width, channels)
    if has_alpha(channels):
        pixels = pixels.copy()
        pixels[pixels[..., -1] == 0] = 0
    return pixels


def changes(size: tuple[int, int], resolution: ImageSize, fit: Fit) -> tuple[str, ...]:
    """What `to_size` does to an image of this (width, height), besides shrinking it.

    Of "cropped", "padded", "stretched" and "enlarged".
    """
    width, height = size
    to_height, to_width = sides(resolution)
    done = []
    if width * to_height != height * to_width:
        done.append({"crop": "cropped", "pad": "padded", "stretch": "stretched"}[fit])
    elif fit == "pad" and width < to_width:
        done.append("padded")
    if fit != "pad" and (width < to_width or height < to_height):
        done.append("enlarged")
    return tuple(done)


def _crop_box(width: int, height: int, to_width: int, to_height: int) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the largest centred part of the shape to_width:to_height."""
    if width * to_height > height * to_width:
        cut_width, cut_height = max(1, height * to_width // to_height), height
    else:
        cut_width, cut_height = width, max(1, width * to_height // to_width)
    left, top = (width - cut_width) // 2, (height - cut_height) // 2
    return left, top, left + cut_width, top + cut_height


def _size_within(
    width: int, height: int, to_width: int, to_height: int, enlarge: bool
) -> tuple[int, int]:
    """(width, height) of the whole image within to_width x to_height, its shape kept."""
    if width <= to_width and height <= to_height and not enlarge:
        return width, height
    if width * to_height > height * to_width:
        return to_width, max(1, round(height * to_width / width))
    return max(1, round(width * to_height / height)), to_height


def read_npy(data: bytes, max_pixels: int | None = None) -> Pixels:
    """The uint8 [H, W] or [H, W, 1 to 4] array of a .npy file; `BadImageError` otherwise.

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
    if dtype != np.uint8 or not (len(shape) == 2 or (len(shape) == 3 and shape[2] in MODES)):
        raise BadImageError(f"holds {dtype} {list(shape)}, not uint8 [H, W] or [H, W, 1 to 4]")
    _check_size(shape[1], shape[0], max_pixels)
    pixels = np.frombuffer(data, np.uint8, offset=file.tell())
    if pixels.size != np.prod(shape):
        raise BadImageError(f"holds {pixels.size} bytes of pixels, expected {np.prod(shape)}")
    return pixels.reshape(shape, order="F" if fortran else "C")


def _from_array(array: np.ndarray[Any, Any], max_pixels: int | None) -> Image.Image:
    grey = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 1)
    if array.dtype != np.uint8 or not (grey or (array.ndim == 3 and array.shape[2] in MODES)):
        raise BadImageError(
            f"holds {array.dtype} {list(array.shape)}, not uint8 [H, W] or [H, W, 1 to 4]"
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
