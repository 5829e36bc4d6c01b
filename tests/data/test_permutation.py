"""The permutation behind the order and the packs: exact on every platform."""

from __future__ import annotations

import numpy as np
import pytest

from bigan import rng
from bigan.data.permutation import permutation, stable_argsort


@pytest.mark.parametrize("num", [0, 1, 2, 3, 17, 1000, 4097, 100_000])
def test_it_is_the_stable_argsort_of_the_words(num: int) -> None:
    words = rng.numpy_generator(3, "stream", 5).bit_generator.random_raw(num)
    assert np.array_equal(permutation(num, 3, "stream", 5), np.argsort(words, kind="stable"))


@pytest.mark.parametrize("num", [2, 3, 17, 1000, 4097])
@pytest.mark.parametrize("values", [1, 2, 100, 2**12, 2**40])
@pytest.mark.parametrize("shift", [0, 5, 10, 12, 24])
def test_equal_words_and_equal_high_bits(num: int, values: int, shift: int) -> None:
    words = np.random.default_rng(num).integers(0, values, num, dtype=np.uint64)
    for each in (words << np.uint64(shift), ~(words << np.uint64(shift))):
        assert np.array_equal(stable_argsort(each), np.argsort(each, kind="stable"))
