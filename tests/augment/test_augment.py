"""Augmentation: operations against slow references or properties, derivatives, draws."""

from __future__ import annotations

import pytest
import torch
from commands import SMOKE
from torch import Tensor

from bigan import augment
from bigan import config as configs
from bigan.augment import ada, diffaugment
from bigan.augment.sampling import bilinear, integers, reflect
from bigan.config import ConfigError
from bigan.distributed.world import World
from bigan.objectives.penalties import PENALTIES, PenaltyBatch
from bigan.run_config import RunConfig

ONE = torch.tensor(1.0)
EVERYTHING = (
    diffaugment.Config(name="diffaugment"),
    ada.Config(name="ada"),
    ada.Config(name="ada", pipeline="bgco", color_share=0.5),
)


def noise(num: int = 4, channels: int = 3, size: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num, channels, size, size, generator=generator) * 2 - 1


def test_reflection_and_integers() -> None:
    there_and_back = [0, 1, 2, 3, 2, 1]
    assert reflect(torch.arange(-6, 12), 4).tolist() == 3 * there_and_back
    assert reflect(torch.tensor([-0.25, 3.5]), 4).tolist() == [0.25, 2.5]
    almost_one = torch.tensor(1 - 2**-24)
    assert all(integers(almost_one, num).item() == num - 1 for num in range(1, 2000))
    counts = torch.bincount(integers(torch.arange(0, 1, 1e-3), 5), minlength=5)
    assert counts.tolist() == [200] * 5


def test_bilinear_reads_between_pixels() -> None:
    image = torch.tensor([[0.0, 1, 2], [10, 11, 12], [20, 21, 22]])[None, None]
    y, x = torch.tensor([[[0.0, 0.5, 1.25]]]), torch.tensor([[[0.0, 0.5, 1.5]]])
    assert bilinear(image, y, x).flatten().tolist() == [0, 5.5, 14]


def test_diffaugment_color() -> None:
    images = noise(3)
    low, half = torch.zeros(3), torch.full((3,), 0.5)
    torch.testing.assert_close(diffaugment.color(images, half, half, half), images)
    torch.testing.assert_close(diffaugment.color(images, low, half, half), images - 0.5)
    greyed = diffaugment.color(images, half, low, half)
    torch.testing.assert_close(greyed, images.mean(1, keepdim=True).expand(-1, 3, -1, -1))
    mean = images.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(diffaugment.color(images, half, half, low), (images + mean) / 2)
    doubled = diffaugment.color(images, half, torch.ones(3), half)
    torch.testing.assert_close(doubled, 2 * images - images.mean(1, keepdim=True))
    grey = images[:, :1]
    torch.testing.assert_close(diffaugment.color(grey, half, low, half), grey)


def test_diffaugment_translation_pads_with_zeros() -> None:
    images = noise(200)
    draws = diffaugment.draws(0, "x", 0, 200)
    moved = diffaugment.apply(images, draws, ("translation",))
    seen = set()
    for before, after in zip(images, moved, strict=True):
        fits = []
        for dy in range(-2, 3):
            for dx in range(-2, 3):
                padded = torch.nn.functional.pad(before, (2, 2, 2, 2))
                window = padded[:, 2 - dy : 18 - dy, 2 - dx : 18 - dx]
                fits += [(dy, dx)] if torch.equal(window, after) else []
        assert len(fits) == 1
        seen.add(fits[0])
    assert len(seen) == 25


@pytest.mark.parametrize("size", [16, 15])
def test_diffaugment_cutout_is_a_square_of_half_the_size(size: int) -> None:
    images = torch.ones(400, 1, size, size)
    cut = diffaugment.apply(images, diffaugment.draws(0, "x", 0, 400), ("cutout",))
    hole = (cut == 0)[:, 0]
    assert torch.equal(cut[cut != 0], torch.ones_like(cut[cut != 0]))
    rows, columns = hole.any(2).sum(1), hole.any(1).sum(1)
    assert torch.equal(hole.flatten(1).sum(1), rows * columns), "a rectangle"
    assert rows.max() == columns.max() == 8
    assert rows.min() == columns.min() == 4, "a centre on the edge leaves half of it"
    centred = diffaugment.cutout(images[:1], torch.tensor([0.5]), torch.tensor([0.5]))
    assert (centred == 0).sum() == 64
    assert (centred[0, 0, 4:12, 4:12] == 0).all() or size == 15


def setting(text: str) -> augment.AugmentConfig:
    return configs.load(RunConfig, SMOKE, [f"augment={text}"]).augment


@pytest.mark.parametrize("channels", [2, 4])
def test_diffaugment_of_images_that_are_not_square_and_have_alpha(channels: int) -> None:
    images = torch.rand(64, channels, 24, 16, generator=torch.Generator().manual_seed(0)) + 0.5
    images[:, -1] = 3.0
    draws = diffaugment.draws(0, "x", 0, 64)
    seen = diffaugment.apply(images, draws, ("color",))
    assert torch.equal(seen[:, -1], images[:, -1])
    expected = diffaugment.apply(images[:, :-1], draws, ("color",))
    assert torch.equal(seen[:, :-1], expected)
    whole = diffaugment.apply(images, draws, ("translation", "cutout"))
    assert torch.equal((whole == 0).all(1), (whole == 0).any(1))
    moved = diffaugment.apply(images, draws, ("translation",))[:, -1] != 0
    lost = 24 - moved.any(2).sum(1).min(), 16 - moved.any(1).sum(1).min()
    assert lost == (3, 2)  # an eighth of each side
    cut = diffaugment.apply(images, draws, ("cutout",))[:, -1] == 0
    assert (cut.any(2).sum(1).max(), cut.any(1).sum(1).max()) == (12, 8)


def test_policy_selects_operations_in_a_fixed_order() -> None:
    config = setting("{name: diffaugment, policy: [cutout, color]}")
    assert isinstance(config, diffaugment.Config)
    assert config.policy == ("color", "cutout")
    images, draws = noise(), diffaugment.draws(0, "x", 0, 4)
    brightness, saturation, contrast, _, _, cut_y, cut_x = draws.unbind(1)
    expected = diffaugment.cutout(
        diffaugment.color(images, brightness, saturation, contrast), cut_y, cut_x
    )
    assert torch.equal(augment.apply(config, images, draws, None), expected)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{name: diffaugment, policy: []}", "augment.policy = []"),
        ("{name: diffaugment, policy: [color, color]}", "augment.policy = ['color', 'color']"),
        ("{name: diffaugment, policy: [colour]}", "did you mean 'color'"),
        ("{name: adda}", "did you mean 'ada'"),
        ("{name: ada, taget: 0.5}", "did you mean 'augment.target'"),
        ("{name: ada, pipeline: cb}", "expected one of"),
        ("{name: ada, fixed: 0.3, initial: 0.2}", "exclude each other"),
        ("{name: ada, fixed_end: 0.3}", "needs fixed"),
        ("{name: ada, fixed: 0, fixed_end: 0.3}", "augment.fixed_end needs anneal_images"),
        ("{name: ada, fixed: 1.5}", "less than or equal to 1"),
    ],
)
def test_wrong_settings_are_one_line(text: str, part: str) -> None:
    with pytest.raises(ConfigError) as failure:
        setting(text)
    assert part in str(failure.value)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("config", EVERYTHING, ids=lambda c: c.name)
def test_draws_are_functions_of_the_counter(config: augment.AugmentConfig) -> None:
    draws = augment.draws(config, 0, "d/augment/real", 80, 40)
    assert draws is not None
    assert draws.shape == (40, augment.num_columns(config))
    again = augment.draws(config, 0, "d/augment/real", 80, 40)
    assert again is not None
    assert torch.equal(draws, again)
    for other in ((1, "d/augment/real", 80), (0, "d/augment/fake", 80), (0, "g/augment", 120)):
        different = augment.draws(config, *other, 40)
        assert different is not None
        assert (draws != different).any(0).all(), "every column"
    images = noise(40)
    batch = augment.apply(config, images, draws, ONE)
    for rank in (0, 1):
        rows = World(rank, 2).share(40)
        part = augment.apply(config, images[rows], draws[rows], ONE)
        torch.testing.assert_close(part, batch[rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", EVERYTHING, ids=lambda c: c.name)
def test_gradients_of_a_gradient_penalty_are_those_of_finite_differences(
    config: augment.AugmentConfig,
) -> None:
    """Derivatives of R1 through the augmentation, of the weights of a small network, in float64."""
    images = noise(6, size=8).double()
    draws = augment.draws(config, 5, "x", 0, 6)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(5, 192, generator=generator, dtype=torch.float64) / 14
    direction = torch.randn(5, 192, generator=generator, dtype=torch.float64)

    def r1(weight: Tensor) -> Tensor:
        def network(x: Tensor, labels: Tensor) -> Tensor:
            seen = augment.apply(config, x, draws, torch.tensor(0.8))
            return (seen.flatten(1) @ weight.T).tanh().sum(1)

        labels = torch.zeros(6, dtype=torch.int64)
        return PENALTIES["r1"](network, PenaltyBatch(images, labels, images, labels))

    leaf = weight.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(r1(leaf), leaf)
    step = 1e-5
    slope = (r1(weight + step * direction) - r1(weight - step * direction)) / (2 * step)
    assert (gradient * direction).sum().item() == pytest.approx(slope.item(), rel=1e-6)
    plain = weight.clone().requires_grad_()
    by_image = images.clone().requires_grad_()
    logits = (by_image.flatten(1) @ plain.T).tanh().sum()
    (unaugmented,) = torch.autograd.grad(logits, by_image)
    assert 0.5 * unaugmented.square().sum().item() / 6 != pytest.approx(r1(weight).item(), rel=1e-3)


@pytest.mark.parametrize("config", EVERYTHING, ids=lambda c: c.name)
def test_images_have_all_derivatives(config: augment.AugmentConfig) -> None:
    images = noise(2, channels=1, size=4).double().requires_grad_()
    draws = augment.draws(config, 5, "x", 0, 2)

    def function(x: Tensor) -> Tensor:
        return augment.apply(config, x, draws, torch.tensor(0.8))

    assert torch.autograd.gradcheck(function, (images,))
    assert torch.autograd.gradgradcheck(function, (images,))
