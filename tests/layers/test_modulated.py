"""Modulated convolution against one convolution per image, and its activation."""

from __future__ import annotations

import pytest
import torch
from stylegan2_reference import modulated

from bigan.layers.mapping import leaky_relu
from bigan.layers.modulated import ModulatedConv2d, modulated_conv2d


@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("demodulate", [False, True])
def test_scaled_inputs_and_outputs_equal_grouped_convolutions(demodulate: bool, up: bool) -> None:
    """In value and in first and second derivatives, for styles of any magnitude and sign."""
    draw = torch.Generator().manual_seed(0)
    x, weight, styles = (
        torch.randn(size, generator=draw, dtype=torch.float64).requires_grad_()
        for size in ((3, 4, 5, 6), (2, 4, 3, 3), (3, 4))
    )
    powers = torch.tensor([[1e-2], [1.0], [1e3]], dtype=torch.float64)
    results = []
    for form in (modulated_conv2d, modulated):
        y = form(x, weight, styles * powers, demodulate, up)
        first = torch.autograd.grad(y.pow(2).sum(), [x, weight, styles], create_graph=True)
        energy = sum((gradient / 100).pow(2).sum() for gradient in first)
        results.append([y, *first, *torch.autograd.grad(energy, [x, weight, styles])])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)
    assert results[0][0].shape == ((3, 2, 10, 12) if up else (3, 2, 5, 6))


def test_demodulated_convolutions_keep_the_mean_square() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(4, 32, 16, 16, generator=draw)
    for up in (False, True):
        layer = ModulatedConv2d(32, 64, 3, 8, up=up)
        layer.reset_parameters(draw)
        layer.style.reset_parameters(draw)
        y = layer(x, 10 * torch.randn(4, 8, generator=draw))[..., 2:-2, 2:-2]
        # Doubled white noise is (a + 3 b) / 4 along each axis: 10/16 of the power.
        expected = (10 / 16) ** 2 if up else 1.0
        assert y.square().mean().item() == pytest.approx(expected, rel=0.1)
        assert layer(torch.zeros_like(x), torch.zeros(4, 8)).abs().max() == 0


def test_activation_keeps_the_mean_square_and_clamps() -> None:
    x = torch.randn(100000, generator=torch.Generator().manual_seed(0))
    assert leaky_relu(x).square().mean().item() == pytest.approx(1.04, rel=0.02)
    y = leaky_relu(torch.tensor([-1e3, -1.0, 1.0, 1e3]), clamp=3.0)
    torch.testing.assert_close(y, torch.tensor([-3.0, -0.2 * 2**0.5, 2**0.5, 3.0]))


@pytest.mark.parametrize("up", [False, True])
def test_large_styles_do_not_overflow_in_float16(up: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    x = 200 * torch.randn(2, 8, 6, 6, generator=draw)
    weight = torch.randn(4, 8, 3, 3, generator=draw) / 72**0.5
    styles = 5000 * torch.randn(2, 8, generator=draw)
    styles[1] = -styles[1].abs()
    expected = modulated_conv2d(x, weight, styles, up=up)
    for given in (styles, styles.half()):
        found = modulated_conv2d(x.half(), weight.half(), given, up=up)
        assert found.dtype == torch.float16
        torch.testing.assert_close(found.float(), expected, rtol=0.01, atol=1.0)


def test_styles_of_zero_stay_finite() -> None:
    x, weight = torch.ones(1, 2, 4, 4), torch.ones(3, 2, 3, 3)
    styles = torch.zeros(1, 2, requires_grad=True)
    y = modulated_conv2d(x, weight, styles)
    assert torch.equal(y, torch.zeros(1, 3, 4, 4))
    assert torch.autograd.grad(y.sum(), styles)[0].isfinite().all()
