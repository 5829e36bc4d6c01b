"""Binomial resampling against its matrices, bilinear interpolation and its defining properties."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bigan.layers.binomial import blur, downsample, upsample

Resample = Callable[[Tensor], Tensor]
FUNCTIONS: dict[str, Resample] = {"blur": blur, "upsample": upsample, "downsample": downsample}


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def matrix(name: str, size: int) -> Tensor:
    """[out, size]: the matrix of the function on one row, from the definition of each entry."""
    num = {"blur": size, "upsample": 2 * size, "downsample": size // 2}[name]
    rows = torch.zeros(num, size, dtype=torch.float64)
    for i in range(num):
        if name == "blur":
            taps = {i - 1: 1 / 4, i: 2 / 4, i + 1: 1 / 4}
        elif name == "downsample":
            taps = {2 * i - 1: 1 / 8, 2 * i: 3 / 8, 2 * i + 1: 3 / 8, 2 * i + 2: 1 / 8}
        else:
            neighbour = i // 2 - 1 if i % 2 == 0 else i // 2 + 1
            taps = {i // 2: 3 / 4, neighbour: 1 / 4}
        for j, tap in taps.items():
            if 0 <= j < size:  # zero padding
                rows[i, j] = tap
    return rows


@pytest.mark.parametrize("name", list(FUNCTIONS))
@pytest.mark.parametrize("size", [(8, 6), (2, 4)])
def test_equals_its_matrices(name: str, size: tuple[int, int]) -> None:
    x = draw(2, 3, *size)
    expected = torch.einsum("ih,bchw,jw->bcij", matrix(name, size[0]), x, matrix(name, size[1]))
    torch.testing.assert_close(FUNCTIONS[name](x), expected)


def test_odd_sizes_and_single_pixels() -> None:
    for size in (1, 3, 5):
        x = draw(1, 1, size, size)
        for name in ("blur", "upsample"):
            rows = matrix(name, size)
            torch.testing.assert_close(FUNCTIONS[name](x)[0, 0], rows @ x[0, 0] @ rows.T)


@pytest.mark.parametrize(
    ("name", "edge"), [("blur", 3 / 4), ("upsample", 3 / 4), ("downsample", 7 / 8)]
)
def test_a_constant_stays_constant_except_at_the_border(name: str, edge: float) -> None:
    y = FUNCTIONS[name](torch.full((1, 2, 8, 8), 5.0))
    assert (y[:, :, 1:-1, 1:-1] == 5).all()
    for side in (y[:, :, 0, 1:-1], y[:, :, -1, 1:-1], y[:, :, 1:-1, 0], y[:, :, 1:-1, -1]):
        assert (side == 5 * edge).all()
    assert (y[:, :, [0, 0, -1, -1], [0, -1, 0, -1]] == 5 * edge**2).all()


def test_upsampling_is_bilinear_interpolation_inside() -> None:
    x = draw(2, 3, 6, 5)
    expected = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
    torch.testing.assert_close(upsample(x)[:, :, 1:-1, 1:-1], expected[:, :, 1:-1, 1:-1])


def test_downsampling_is_the_transpose_of_upsampling() -> None:
    x, y = draw(2, 3, 4, 6), draw(2, 3, 8, 12).flip(0)
    torch.testing.assert_close((upsample(x) * y).sum(), 4 * (x * downsample(y)).sum())


def test_up_then_down_is_a_centred_low_pass_filter() -> None:
    """[3, 10, 3] / 16 along each axis: gain 1, no shift."""
    x = torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    x[0, 0, 4, 4] = 1
    taps = torch.tensor([0, 0, 0, 3, 10, 3, 0, 0, 0], dtype=torch.float64) / 16
    torch.testing.assert_close(downsample(upsample(x))[0, 0], torch.outer(taps, taps))


def test_energy_and_the_highest_frequency() -> None:
    """The variance of white noise is scaled by the sum of squared taps; a checkerboard vanishes."""
    x = draw(64, 16, 32, 32)
    for name, share in (("blur", 6 / 16), ("upsample", 10 / 16), ("downsample", 20 / 64)):
        inside = FUNCTIONS[name](x)[:, :, 1:-1, 1:-1]
        torch.testing.assert_close(inside.var().item(), share**2, rtol=0.02, atol=0)
    signs = torch.tensor([1.0, -1.0]).repeat(4)
    checkerboard = torch.outer(signs, signs)[None, None]
    assert (blur(checkerboard)[:, :, 1:-1, 1:-1] == 0).all()
    assert (downsample(checkerboard)[:, :, 1:-1, 1:-1] == 0).all()


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_commutes_with_flips_and_transposition(name: str) -> None:
    resample, x = FUNCTIONS[name], draw(1, 2, 6, 6)
    torch.testing.assert_close(resample(x.flip(3)), resample(x).flip(3))
    torch.testing.assert_close(resample(x.flip(2)), resample(x).flip(2))
    torch.testing.assert_close(resample(x.mT), resample(x).mT)


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_first_and_second_derivatives(name: str) -> None:
    resample, x = FUNCTIONS[name], draw(1, 2, 4, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: resample(x.sin()), x)
    assert torch.autograd.gradgradcheck(lambda x: resample(x.sin()), x)


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_memory_format_precision_and_meta(name: str) -> None:
    resample, x = FUNCTIONS[name], draw(2, 3, 8, 8, dtype=torch.float32)
    original = x.clone()
    expected = resample(x)
    assert torch.equal(x, original)
    assert expected.is_contiguous()
    last = resample(x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, expected, rtol=1e-6, atol=1e-6)
    for dtype in (torch.bfloat16, torch.float16):
        low = resample(x.to(dtype))
        assert low.dtype == dtype
        torch.testing.assert_close(low.float(), expected, rtol=0.02, atol=0.02)
    assert resample(x.to("meta")).shape == expected.shape
    with torch.autocast("cpu", torch.bfloat16):  # has no effect here
        assert torch.equal(resample(x), expected)
