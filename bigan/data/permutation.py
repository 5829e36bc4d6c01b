"""Random permutations that are equal on all platforms and NumPy versions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bigan import rng


def permutation(num: int, seed: int, stream: str, counter: int = 0) -> NDArray[np.int64]:
    """A random permutation of range(num), a function of (num, seed, stream, counter).

    It is the stable argsort of raw 64-bit words of Philox: NumPy guarantees these words, while
    `Generator.permutation` may change between versions.
    """
    words = rng.numpy_generator(seed, stream, counter).bit_generator.random_raw(num)
    return np.argsort(words, kind="stable")
