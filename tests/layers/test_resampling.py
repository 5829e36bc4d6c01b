"""What growing networks are made of, against loops, torch and finite differences.

Doubling, halving and blending of images; minibatch standard deviation; pixelwise normalization.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bigan.layers.minibatch_stddev import MinibatchStdDev
from bigan.layers.pixelnorm import pixel_norm
from bigan.layers.resampling import coarsened, enlarge, fade, shrink


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_enlarge_repeats_every_pixel_twice_in_both_directions() -> None:
    x = draw(2, 3, 4, 6)
    y = enlarge(x)
    assert y.shape == (2, 3, 8, 12)
    for row in range(8):
        for column in range(12):
            assert torch.equal(y[:, :, row, column], x[:, :, row // 2, column // 2])


def test_shrink_averages_every_two_by_two_pixels() -> None:
    x = draw(2, 3, 4, 6)
    y = shrink(x)
    assert y.shape == (2, 3, 2, 3)
    for row in range(2):
        for column in range(3):
            four = x[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            expected = four.sum((2, 3)) / 4
            torch.testing.assert_close(y[:, :, row, column], expected)


def test_shrinking_undoes_enlarging() -> None:
    x = draw(2, 3, 4, 4)
    assert torch.equal(shrink(enlarge(x)), x)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_memory_format_is_kept(memory_format: torch.memory_format) -> None:
    x = draw(2, 3, 4, 4).contiguous(memory_format=memory_format)
    alpha = torch.tensor(0.5)
    for y in (enlarge(x), shrink(x), fade(x, x + 1, alpha), coarsened(x, alpha)):
        assert y.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.75, 1.0])
def test_coarsened_images_go_from_half_the_resolution_to_all_of_it(alpha: float) -> None:
    images = draw(2, 3, 4, 4)
    expected = images.clone()
    for row in range(4):
        for column in range(4):
            top, left = row // 2 * 2, column // 2 * 2
            mean = images[:, :, top : top + 2, left : left + 2].mean((2, 3))
            expected[:, :, row, column] = (1 - alpha) * mean + alpha * images[:, :, row, column]
    torch.testing.assert_close(coarsened(images, torch.tensor(alpha)), expected)


def test_the_ends_of_a_fade_are_exact() -> None:
    coarse, fine = draw(2, 3, 4, 4), draw(2, 3, 4, 4, seed=1) * 1e4
    assert torch.equal(fade(coarse, fine, torch.tensor(0.0)), coarse)
    assert torch.equal(fade(coarse, fine, torch.tensor(1.0)), fine)
    assert torch.equal(coarsened(fine, torch.tensor(1.0)), fine)
    assert torch.equal(coarsened(fine, torch.tensor(0.0)), enlarge(shrink(fine)))


def test_half_precision_does_not_round_alpha() -> None:
    """bfloat16 would round 0.999 to 1 and lose the last step of the fade: 1.024 would become 0."""
    coarse, fine = torch.full((1,), 1024.0).bfloat16(), torch.zeros(1).bfloat16()
    mixed = fade(coarse, fine, torch.tensor(0.999))
    assert mixed.dtype == torch.bfloat16
    assert mixed.item() == torch.tensor(1.024).bfloat16().item()


def test_a_double_network_accepts_a_float32_alpha() -> None:
    coarse, fine = draw(2, 2, dtype=torch.float64), draw(2, 2, seed=1, dtype=torch.float64)
    found = fade(coarse, fine, torch.tensor(0.25))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, 0.75 * coarse + 0.25 * fine, rtol=1e-15, atol=1e-15)


def test_first_and_second_derivatives_equal_finite_differences() -> None:
    x = draw(1, 2, 4, 4, dtype=torch.float64).requires_grad_()
    fine = draw(1, 2, 8, 8, seed=1, dtype=torch.float64).requires_grad_()
    alpha = torch.tensor(0.3, dtype=torch.float64)

    def function(x: Tensor, fine: Tensor) -> Tensor:
        return (
            coarsened(fade(enlarge(x), fine, alpha), alpha).pow(3)
            + enlarge(shrink(x)).pow(3)[:, :, :1, :1]
        )

    assert torch.autograd.gradcheck(function, (x, fine))
    assert torch.autograd.gradgradcheck(function, (x, fine))


def test_everything_runs_on_the_meta_device() -> None:
    x = torch.empty(2, 3, 8, 8, device="meta")
    alpha = torch.empty((), device="meta")
    assert enlarge(x).shape == (2, 3, 16, 16)
    assert shrink(x).shape == (2, 3, 4, 4)
    assert coarsened(x, alpha).shape == x.shape


# --- minibatch standard deviation and pixel norm -------------------------------------------------


@pytest.mark.parametrize(
    ("batch_size", "group", "num_channels"), [(8, 4, 1), (8, 2, 3), (3, 4, 2), (1, 4, 1)]
)
def test_minibatch_stddev_equals_a_loop(batch_size: int, group: int, num_channels: int) -> None:
    x = draw(batch_size, 6, 2, 3)
    found = MinibatchStdDev(group, num_channels)(x)
    assert torch.equal(found[:, :6], x)
    size = min(group, batch_size)
    run = 6 // num_channels
    for image in range(batch_size):
        members = x[image // size * size : image // size * size + size]
        for extra in range(num_channels):
            deviations = []
            for channel in range(extra * run, extra * run + run):
                for at in range(6):
                    values = members[:, channel, at // 3, at % 3]
                    variance = sum((v - values.mean()) ** 2 for v in values) / size
                    deviations.append((variance + 1e-8) ** 0.5)
            expected = (sum(deviations) / len(deviations)).expand(2, 3)
            torch.testing.assert_close(found[image, 6 + extra], expected)


def test_a_slice_of_the_batch_has_the_groups_of_the_batch() -> None:
    layer = MinibatchStdDev(4)
    x = draw(16, 3, 4, 4)
    torch.testing.assert_close(torch.cat([layer(part) for part in x.split(8)]), layer(x))
    assert not torch.allclose(layer(x.roll(1, 0)).roll(-1, 0), layer(x))


@pytest.mark.parametrize(
    ("size", "num_channels", "message"),
    [((6, 4, 4, 4), 1, "groups of 4"), ((4, 5, 4, 4), 2, "5 channels cannot be split into 2")],
)
def test_minibatch_stddev_refuses_sizes_that_it_cannot_split(
    size: tuple[int, ...], num_channels: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        MinibatchStdDev(4, num_channels)(torch.zeros(size))


def test_normalizations_in_half_precision_and_their_dtypes() -> None:
    """300^2 overflows in float16; both are computed in float32."""
    x = 300 * draw(4, 6, 2, 2)
    stddev = MinibatchStdDev(4)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        for layer in (pixel_norm, stddev):
            found = layer(x.to(dtype))
            assert found.dtype == dtype
            torch.testing.assert_close(found.float(), layer(x), rtol=1e-2, atol=1e-2)


def test_pixel_norm_gives_every_position_a_unit_rms() -> None:
    x = 50 * draw(3, 5, 2, 2)
    y = pixel_norm(x)
    torch.testing.assert_close(y.square().mean(1), torch.ones(3, 2, 2))
    torch.testing.assert_close(F.cosine_similarity(x, y, dim=1), torch.ones(3, 2, 2))
    z = draw(3, 5)
    torch.testing.assert_close(pixel_norm(z), z * (5**0.5 / z.norm(dim=1, keepdim=True)))
    # The epsilon 1e-8 equals the mean square here, so it is half of the divisor.
    torch.testing.assert_close(pixel_norm(torch.full((1, 5), 1e-4)), torch.full((1, 5), 0.5**0.5))


def test_normalizations_twice_differentiated() -> None:
    x = draw(4, 4, 1, 2).double().requires_grad_()
    for layer in (pixel_norm, MinibatchStdDev(2, 2)):
        assert torch.autograd.gradcheck(layer, (x,))
        assert torch.autograd.gradgradcheck(layer, (x,))
    same = torch.zeros(4, 4, 2, 2, requires_grad=True)  # equal images, and zero vectors
    for layer in (pixel_norm, MinibatchStdDev(4)):
        (first,) = torch.autograd.grad(layer(same).pow(2).sum(), same, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum() + first.sum(), same)
        assert first.isfinite().all()
        assert second.isfinite().all()
