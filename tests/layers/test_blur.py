"""The low-pass filter against its definition: zeros, padding, [1, 3, 3, 1], every second pixel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bigan.layers import binomial
from bigan.layers.blur import blur

TAPS = (1, 3, 3, 1)


def resampled(x: Tensor, up: int = 1, down: int = 1, padding: tuple[int, int] = (0, 0)) -> Tensor:
    """float64 [B, C, H, W]: zeros between pixels, padding (before, after), filter, decimation.

    The filter has sum 1, times up * up.
    """
    height, width = x.shape[2] * up, x.shape[3] * up
    before, after = padding
    wide = x.new_zeros(*x.shape[:2], height + before + after, width + before + after)
    for i in range(x.shape[2]):
        for j in range(x.shape[3]):
            wide[:, :, before + i * up, before + j * up] = x[:, :, i, j]
    rows, columns = wide.shape[2] - 3, wide.shape[3] - 3
    result = x.new_zeros(*x.shape[:2], rows, columns)
    for i in range(4):
        for j in range(4):
            weight = TAPS[i] * TAPS[j] / 64 * up * up
            result += weight * wide[:, :, i : i + rows, j : j + columns]
    return result[:, :, ::down, ::down]


def maps(*shape: int) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize("size", [(5, 5), (8, 6)])
@pytest.mark.parametrize("padding", [0, 1, 2, 3])
def test_blur_equals_its_definition(padding: int, size: tuple[int, int]) -> None:
    x = maps(2, 3, *size)
    expected = resampled(x, padding=(padding, padding))
    assert expected.shape[2:] == (size[0] + 2 * padding - 3, size[1] + 2 * padding - 3)
    torch.testing.assert_close(blur(x, padding), expected)


def test_blur_keeps_a_constant_inside() -> None:
    torch.testing.assert_close(
        blur(torch.ones(1, 1, 9, 9), 1)[..., 1:-1, 1:-1], torch.ones(1, 1, 6, 6)
    )


def test_images_are_resampled_by_the_same_filter() -> None:
    """StyleGAN2's image path and shortcuts, with the published padding."""
    x = maps(2, 3, 6, 8)
    torch.testing.assert_close(binomial.upsample(x), resampled(x, up=2, padding=(2, 1)))
    torch.testing.assert_close(binomial.downsample(x), resampled(x, down=2, padding=(1, 1)))


def test_derivatives() -> None:
    x = maps(1, 2, 4, 5).requires_grad_()

    def curved(x: Tensor) -> Tensor:
        return blur(x, 2).pow(3)

    assert torch.autograd.gradcheck(curved, x)
    assert torch.autograd.gradgradcheck(curved, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_memory_format(dtype: torch.dtype) -> None:
    x = maps(2, 4, 8, 8).to(dtype).to(memory_format=torch.channels_last)
    y = blur(x, 1)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y.double(), blur(x.double(), 1), rtol=0, atol=0.02)
    # A sum over the window of the filter would overflow before the division.
    assert blur(torch.full((1, 1, 8, 8), 3e4, dtype=torch.float16), 1).isfinite().all()


def test_one_full_graph_equals_eager() -> None:
    def slope(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: blur(x, 2).pow(3).sum())(x).square().sum()

    compiled = torch.compile(slope, backend="aot_eager", fullgraph=True, dynamic=False)
    x = maps(1, 2, 4, 4).requires_grad_()
    results = [torch.autograd.grad(call(x), x)[0] for call in (slope, compiled)]
    torch.testing.assert_close(results[0], results[1])
