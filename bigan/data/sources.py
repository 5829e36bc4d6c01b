"""Where images come from before they are packed: each source is a list of readable images.

    digits(resolution)             scikit-learn's handwritten digits, nothing to download
    image_folder(path, resolution) a folder of image files; each subfolder is a class

A `Source` is random access (`read(i)`), so that any shard can be packed without the others.
Which split an image belongs to depends on its key alone, not on seed or resolution.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from bigan.data import DataError
from bigan.data.decode import Pixels
from bigan.data.plan import permutation

SUFFIXES = (
    ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # EPS would run a program
MAX_PIXELS = 2**27  # a larger picture is taken for a decompression bomb
NUM_TEST_DIGITS = 500  # 50 of each class; the other 1,297 are for training


@dataclass(frozen=True)
class Source:
    """A list of images: image i has keys[i], labels[i], splits[i] and pixels read(i).

    `read(i)` returns uint8 [resolution, resolution, channels] and may be called from several
    threads. `transform` names the way from the original to these pixels: reference statistics
    are comparable only under the same one. `identity` is a hash of the originals as far as
    they are known without decoding: another identity means another data set.
    """

    name: str
    transform: str
    identity: str
    resolution: int
    channels: int
    classes: tuple[str, ...]
    keys: tuple[str, ...]
    labels: tuple[int, ...]
    splits: tuple[str, ...]
    read: Callable[[int], Pixels]

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[tuple[str, int, Pixels]]:
        """(key, label, image uint8 HWC) of every image in order."""
        for i in range(len(self)):
            yield self.keys[i], self.labels[i], self.read(i)


def digits(resolution: int = 16) -> Source:
    """The 1,797 handwritten digits of scikit-learn (8x8, 0..16) at 8, 16 or 32 px, one channel.

    Values become 0..255; larger sizes are interpolated so that the area mean of every f x f cell
    is exactly the original pixel (`enlarge`): averaging back to 8x8 gives the same numbers at
    every resolution. Split: 50 images of each class for test, the rest for training.
    Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998.
    """
    if resolution not in (8, 16, 32):
        raise DataError(f"digits: resolution {resolution} is not available; use 8, 16 or 32")
    from sklearn.datasets import load_digits  # slow to import and needed nowhere else

    bundle = load_digits()
    small = np.rint(bundle.images * (255 / 16)).astype(np.uint8)
    labels = tuple(int(label) for label in bundle.target)
    images = enlarge(small, resolution // 8)[..., None]
    test = np.zeros(len(labels), dtype=bool)
    for digit in range(10):
        members = np.flatnonzero(np.asarray(labels) == digit)
        shuffled = members[permutation(len(members), 0, "digits/split", digit)]
        test[shuffled[: NUM_TEST_DIGITS // 10]] = True
    return Source(
        name="digits",
        transform="none" if resolution == 8 else "mean-exact-bilinear-v1",
        identity=hashlib.sha256(small.tobytes() + bytes(labels)).hexdigest(),
        resolution=resolution,
        channels=1,
        classes=tuple(str(digit) for digit in range(10)),
        keys=tuple(f"{i:04d}" for i in range(len(labels))),
        labels=labels,
        splits=tuple("test" if t else "train" for t in test),
        read=lambda i: images[i],
    )


def enlarge(images: Pixels, factor: int) -> Pixels:
    """Bilinear enlargement of uint8 [N, H, W] by `factor`, whose cell means are the originals.

    Plain bilinear (or bicubic) enlargement changes the area mean of a cell by up to 101 (63) of
    255 grey levels on the digits; repeating pixels keeps it but looks like bricks. So every cell
    of f x f bilinear values is shifted by one constant, under clipping to 0..255, until its sum is
    f * f times the original: the projection onto the images that average back exactly. Integers
    throughout, hence the same bytes everywhere.
    """
    if factor == 1:
        return images.copy()
    rows, columns = (_bilinear(size, factor) for size in images.shape[1:])
    smooth = rows @ images.astype(np.int64) @ columns.T // (2 * factor) ** 2
    num, height, width = images.shape
    cells = smooth.reshape(num, height, factor, width, factor).transpose(0, 1, 3, 2, 4)
    cells = cells.reshape(num, height, width, factor * factor)
    target = images.astype(np.int64) * factor * factor
    # Bisection for the largest shift with a sum <= target (clipped sums grow with the shift).
    low, high = np.full_like(target, -256), np.full_like(target, 256)
    while (high - low).max() > 1:
        middle = (low + high) // 2
        fits = (cells + middle[..., None]).clip(0, 255).sum(-1) <= target
        low, high = np.where(fits, middle, low), np.where(fits, high, middle)
    shifted = (cells + low[..., None]).clip(0, 255)
    # The last few units: one more grey level for the first pixels of the cell that can rise.
    can_rise = (cells + low[..., None] + 1).clip(0, 255) - shifted
    missing = target - shifted.sum(-1)
    shifted += can_rise * (np.cumsum(can_rise, -1) <= missing[..., None])
    shifted = shifted.reshape(num, height, width, factor, factor).transpose(0, 1, 3, 2, 4)
    return shifted.reshape(num, height * factor, width * factor).astype(np.uint8)


def _bilinear(size: int, factor: int) -> NDArray[np.int64]:
    """Weights [size * factor, size] of linear interpolation between pixel centres, times 2f."""
    weights = np.zeros((size * factor, size), np.int64)
    for i in range(size * factor):
        left, part = divmod(2 * i + 1 - factor, 2 * factor)  # centre in units of 1 / 2f
        weights[i, max(left, 0)] += 2 * factor - part
        weights[i, min(left + 1, size - 1)] += part
    return weights


def image_folder(path: Path, resolution: int, test_fraction: float = 0.1) -> Source:
    """Image files below `path` as RGB: square centre crop, then Lanczos to `resolution`.

    Each subfolder is a class, in sorted order; without subfolders all images are one class.
    Hidden files and other kinds of file are passed over. `read_rgb` says how each kind of picture
    becomes RGB. An image goes to the test split if the hash of its path below `path` says so,
    about `test_fraction` of them.

    Raises `DataError` for a folder without images, an empty class or images beside class folders;
    `read(i)` raises it for a damaged file, naming it.
    """
    root = Path(path)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give a folder of images, or `digits`")
    if resolution <= 0:
        raise DataError(f"resolution {resolution}: must be a positive number of pixels")
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    loose = _images_in(root)
    if loose and folders:
        raise DataError(
            f"{root}: holds images ({loose[0].name}) beside folders ({folders[0].name}); "
            "put every image into a class folder, or all of them directly here"
        )
    groups = [(f.name, _images_below(f)) for f in folders] or [("all", loose)]
    for name, found in groups:
        if not name.isprintable():  # control characters, or bytes that are no UTF-8
            raise DataError(f"{root}: class folder {name!r} has an unreadable name; rename it")
        if not found:
            where = root / name if folders else root
            raise DataError(f"{where}: no images here (known: {' '.join(SUFFIXES)})")
    files = tuple(file for _, found in groups for file in found)
    keys = tuple(file.relative_to(root).as_posix() for file in files)
    listing = hashlib.sha256()
    for key, file in zip(keys, files, strict=True):
        listing.update(os.fsencode(key) + b"\0%d\0" % file.stat().st_size)

    return Source(
        name=root.resolve().name,
        transform="center-lanczos-v1",
        identity=listing.hexdigest(),
        resolution=resolution,
        channels=3,
        classes=tuple(name for name, _ in groups),
        keys=keys,
        labels=tuple(label for label, (_, found) in enumerate(groups) for _ in found),
        splits=tuple("test" if _unit_hash(key) < test_fraction else "train" for key in keys),
        read=lambda i: read_rgb(files[i], resolution),
    )


def read_rgb(file: Path, resolution: int) -> Pixels:
    """The picture in `file` as uint8 [resolution, resolution, 3]: centre crop, Lanczos.

    EXIF rotation is applied; alpha and transparent palettes are laid on white; grey, palette and
    CMYK are converted; 16-bit grey is scaled (x / 257), not clipped; of an animation the first
    frame is taken; smaller pictures are enlarged. Raises `DataError` naming the file if it is
    damaged, empty, not a picture, of floating-point pixels or larger than `MAX_PIXELS`.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(
                    f"{file}: {image.width}x{image.height} is more than {MAX_PIXELS} pixels; "
                    "remove or shrink it"
                )
            rgb = _to_rgb(ImageOps.exif_transpose(image))
    except DataError:
        raise
    except Exception as error:  # PIL raises a dozen kinds for damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{file}: cannot be read as an image ({reason}); repair or remove it"
        ) from error
    side = min(rgb.size)
    left, top = (rgb.width - side) // 2, (rgb.height - side) // 2
    square = rgb.crop((left, top, left + side, top + side))
    return np.asarray(square.resize((resolution, resolution), Image.Resampling.LANCZOS))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if image.mode.startswith("I"):  # "I;16", "I;16B" or "I": PIL's own convert("RGB") would clip
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65_535:
            raise ValueError("32-bit pixels have no agreed range")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _images_in(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.iterdir()) if _is_image(file)]


def _images_below(folder: Path) -> list[Path]:
    visible = (
        file
        for file in folder.rglob("*")
        if not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    return sorted(file for file in visible if _is_image(file))


def _is_image(file: Path) -> bool:
    known = file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
    return known and file.is_file()


def _unit_hash(key: str) -> float:
    """A number in [0, 1) from the hash of `key`."""
    digest = hashlib.blake2b(os.fsencode(key), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64
