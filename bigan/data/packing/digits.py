"""scikit-learn's handwritten digits: a real data set with nothing to download."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bigan.data import DataError
from bigan.data.format.codec import Pixels
from bigan.data.packing.listing import Source
from bigan.data.permutation import permutation
from bigan.hashes import sha256
from bigan.image_size import ImageSize, shown

NUM_TEST_DIGITS = 500  # 50 of each class; the other 1,297 are for training


def digits(resolution: ImageSize = 16) -> Source:
    """The 1,797 handwritten digits of scikit-learn (8x8, 0..16) at 8, 16 or 32 px, one channel.

    Values are scaled to 0..255. Larger sizes are interpolated such that the mean of every f x f
    cell is exactly the original pixel (`enlarge`), so the area mean at 8x8 is the same for every
    resolution. Split: 50 images of each class for test, the others for training.
    Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998.
    """
    if isinstance(resolution, tuple) or resolution not in (8, 16, 32):
        raise DataError(f"digits: resolution {shown(resolution)} is not available; use 8, 16 or 32")
    from sklearn.datasets import load_digits  # slow to import

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
        identity=sha256(small.tobytes() + bytes(labels)),
        resolution=resolution,
        channels=1,
        classes=tuple(str(digit) for digit in range(10)),
        keys=tuple(f"{i:04d}" for i in range(len(labels))),
        labels=labels,
        splits=tuple("test" if t else "train" for t in test),
        read=lambda i: images[i],
    )


def enlarge(images: Pixels, factor: int) -> Pixels:
    """Bilinear enlargement of uint8 [N, H, W] by `factor` that preserves the mean of every cell.

    Plain bilinear (bicubic) enlargement changes the mean of an f x f cell by up to 101 (63) of 255
    grey levels on the digits, and nearest-neighbour enlargement looks blocky. Every cell of
    bilinear values is therefore shifted by one constant, with clipping to 0..255, such that its sum
    is f * f times the original. Integer arithmetic: the same bytes on every platform.
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
    # The remainder: one grey level more for the first pixels of the cell that are below 255.
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
