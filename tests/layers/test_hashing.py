"""Random fields from keys: their distribution, and that they depend on the key alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bigan.layers import hashing
from bigan.layers.hashing import keys, normal_field, uniform

M32 = 0xFFFFFFFF


def latents(num: int, dim: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed))


def correlation(a: Tensor, b: Tensor) -> float:
    """In units of its standard deviation under independence."""
    a, b = a.double().flatten(), b.double().flatten()
    return float(((a - a.mean()) * (b - b.mean())).mean() / a.std() / b.std() * a.numel() ** 0.5)


# --- the words -----------------------------------------------------------------------------------


def mix(word: int) -> int:
    """lowbias32 in 32-bit unsigned arithmetic, by Python integers and a mask."""
    word ^= word >> 16
    word = word * 0x7FEB352D & M32
    word ^= word >> 15
    word = word * 0x846CA68B & M32
    return word ^ word >> 16


def words(key: int, stream: int, num: int) -> list[int]:
    low, high = key & M32, key >> 32
    first = mix(mix((low + 0x9E3779B9 * (2 * stream + 1)) & M32) ^ high)
    second = mix(mix((high + 0x9E3779B9 * (2 * stream + 2)) & M32) ^ low)
    return [mix(mix((i + first) & M32) ^ second) for i in range(num)]


def test_words_equal_unsigned_arithmetic() -> None:
    edge = [0, 1, M32, M32 - 1, 1 << 31, (1 << 31) - 1, 0x7FEB352D, 0xFFFF0000]
    assert hashing._mix(torch.tensor(edge)).tolist() == [mix(word) for word in edge]
    for key in (0, 1, M32, M32 << 31, 2**63 - 1, 0x123456789ABCDEF):
        for stream in (0, 1, 20):
            found = hashing._words(torch.tensor([key]), stream, 9)
            assert found.tolist() == [words(key, stream, 9)]


def test_numbers_are_box_mullers() -> None:
    key, stream = 0x123456789ABCDEF, 3
    drawn = words(key, stream, 8)  # for 7 numbers
    expected = [
        math.sqrt(-2 * math.log((u + 1) / 2**32)) * trigonometric(2 * math.pi * (v >> 8) / 2**24)
        for trigonometric in (math.cos, math.sin)
        for u, v in zip(drawn[:4], drawn[4:], strict=True)
    ]
    found = normal_field(torch.tensor([key]), stream, (7,))
    torch.testing.assert_close(found, torch.tensor([expected[:7]]), rtol=1e-4, atol=1e-5)
    assert uniform(torch.tensor([key]), stream).tolist() == [(drawn[0] >> 8) / 2**24]


def test_values_are_pinned() -> None:
    """A changed constant would change the images of every stored snapshot."""
    z = torch.tensor([[0.0, 1.0, -2.5], [1.0, 0.0, -2.5]])
    assert keys(z).tolist() == [6842975192726312983, 2101612963829563815]


# --- keys ----------------------------------------------------------------------------------------


def test_every_bit_of_a_latent_changes_half_of_its_key() -> None:
    bits = torch.randint(2**31, (64, 4), generator=torch.Generator().manual_seed(0))
    z = bits.to(torch.int32).view(torch.float32)
    original = keys(z)
    for entry in range(4):
        for bit in (0, 1, 15, 16, 30):
            flipped = bits.clone()
            flipped[:, entry] ^= 1 << bit
            changed = original ^ keys(flipped.to(torch.int32).view(torch.float32))
            share = torch.stack([changed >> i & 1 for i in range(63)]).double().mean(1)
            assert 0.45 < share.mean() < 0.55, (entry, bit)
            assert share.min() > 0.2, (entry, bit)
            assert share.max() < 0.8, (entry, bit)


def test_keys_are_distinct_and_depend_on_the_order() -> None:
    z = latents(10000, dim=2)
    both = torch.cat([keys(z), keys(z.flip(1)), keys(-z)])
    assert both.unique().numel() == 30000
    assert both.min() >= 0
    assert both.dtype == torch.int64
    low = both & M32
    assert low.unique().numel() > 29980  # each half is well distributed
    assert (both >> 32).unique().numel() > 29980
    assert keys(torch.zeros(1, 8)).item() != keys(torch.zeros(1, 9)).item()


def test_a_key_is_that_of_the_latent_in_float32() -> None:
    z = latents(5)
    expected = keys(z)
    assert torch.equal(keys(z.double()), expected)
    assert torch.equal(keys(z.t().contiguous().t()), expected)
    assert torch.equal(keys(z.clone().requires_grad_()), expected)
    assert not torch.equal(keys(z.bfloat16()), expected)
    assert torch.equal(keys(z.bfloat16()), keys(z.bfloat16().float()))
    assert torch.equal(torch.cat([keys(z[:2]), keys(z[2:])]), expected)


# --- distributions -------------------------------------------------------------------------------


def test_fields_are_standard_normal() -> None:
    x = normal_field(keys(latents(64)), 5, (1, 64, 64)).double()
    assert x.shape == (64, 1, 64, 64)
    n = x.numel()
    # Moments of N(0, 1) and their standard deviations over n numbers.
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(x.pow(power).mean() - moment) < 4 * (variance / n) ** 0.5, power
    ordered = x.flatten().sort().values
    law = torch.special.ndtr(ordered)
    distance = (law - (torch.arange(n) + 0.5) / n).abs().max()
    assert distance < 1.95 / n**0.5  # Kolmogorov & Smirnov: one in a thousand
    assert 4 < x.abs().max() < 6.67
    images = x.mean((1, 2, 3)) * 64  # of each image: mean 0, deviation 1
    assert images.abs().max() < 4
    assert 0.7 < images.std() < 1.3


def test_uniform_numbers_are_uniform() -> None:
    x = uniform(torch.arange(100000), 2).double()
    assert x.min() >= 0
    assert x.max() < 1
    counts = torch.histc(x, 100, 0, 1)
    chi2 = ((counts - 1000) ** 2 / 1000).sum()
    assert 50 < chi2 < 160  # of 99 degrees of freedom
    assert abs(correlation(x[1:], x[:-1])) < 4
    assert abs(correlation(x, uniform(torch.arange(100000), 3))) < 4


RELATED = {
    "hashed": (17, 4711),
    "next": (0, 1),
    "low word": (123, 123 + 64),
    "high word": (5, 5 + (1 << 32)),
    "swapped": (7 + (9 << 32), 9 + (7 << 32)),
}


@pytest.mark.parametrize("which", list(RELATED))
def test_fields_of_different_images_are_unrelated(which: str) -> None:
    a, b = normal_field(torch.tensor(RELATED[which]), 0, (64, 64))
    for function in (torch.Tensor.clone, torch.square, torch.sign):
        for rows in (-1, 0, 1):
            for columns in range(-3, 4):
                shifted = b.roll((rows, columns), (0, 1))
                assert abs(correlation(function(a), function(shifted))) < 4.5


def test_pixels_and_streams_are_unrelated() -> None:
    images = keys(latents(16))
    x = normal_field(images, 0, (64, 64))
    for function in (torch.Tensor.clone, torch.square):
        y = function(x)
        for rows, columns in ((0, 1), (1, 0), (1, 1), (1, -1), (0, 2), (0, 32), (32, 0), (16, 0)):
            assert abs(correlation(y, y.roll((rows, columns), (1, 2)))) < 4.5, (rows, columns)
        for stream in (1, 2, 16):
            other = function(normal_field(images, stream, (64, 64)))
            for shift in range(-2, 3):
                assert abs(correlation(y, other.roll(shift, 2))) < 4.5, (stream, shift)


# --- no dependence on anything else --------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1,), (7,), (1, 5, 5), (1, 8, 8)])
def test_an_image_does_not_depend_on_its_batch(shape: tuple[int, ...]) -> None:
    images = keys(latents(7))
    together = normal_field(images, 1, shape)
    assert together.shape == (7, *shape)
    apart = torch.cat([normal_field(part, 1, shape) for part in images.split([1, 4, 2])])
    assert torch.equal(together, apart)
    assert torch.equal(uniform(images, 1)[3:4], uniform(images[3:4], 1))


def test_no_state_of_torch_matters() -> None:
    images = keys(latents(3))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = normal_field(images, 0, (16,))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(normal_field(images, 0, (16,)), first)


def test_one_full_graph_equals_eager() -> None:
    def everything(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        images = keys(z)
        return images, uniform(images, 1), normal_field(images, 2, (1, 9, 9))

    z = latents(4)
    compiled = torch.compile(everything, backend="aot_eager", fullgraph=True, dynamic=False)
    for found, expected in zip(compiled(z), everything(z), strict=True):
        assert torch.equal(found, expected)


def test_meta_device() -> None:
    images = keys(torch.empty(3, 8, device="meta"))
    assert images.dtype == torch.int64
    assert normal_field(images, 0, (1, 5, 5)).shape == (3, 1, 5, 5)
    assert uniform(images, 0).shape == (3,)
