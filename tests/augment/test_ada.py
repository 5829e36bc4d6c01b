"""ADA: transformations against the paper's product of matrices, and the adaptive strength."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from bigan.augment import AdaptiveStrength, ada
from bigan.distributed.world import World

ONE = torch.tensor(1.0)


def noise(
    num: int = 4, channels: int = 3, size: int = 16, seed: int = 0, width: int | None = None
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num, channels, size, width or size, generator=generator) * 2 - 1


def ada_draws(num: int = 1, **given: float) -> Tensor:
    """[num, K] with all gates closed but those of the given columns: `flip=0.7` opens that of flip.

    A column with ~ in its name is written `scale_`; a gate of its own is opened by `rotate_last=0`.
    """
    draws = {name: 1.0 if name.endswith("?") else 0.5 for name in ada.COLUMNS}
    for name, value in given.items():
        column = name.removesuffix("_") + "~" if name.endswith("_") else name
        assert column in draws or f"{column}?" in draws
        if column in draws:
            draws[column] = value
        gate = column.removesuffix("~") + "?"
        if gate in draws:
            draws[gate] = 0.0
    return torch.tensor([list(draws.values())]).expand(num, -1).contiguous()


def homogeneous(a: float, b: float, c: float, d: float, x: float = 0, y: float = 0) -> np.ndarray:
    return np.array([[a, b, x], [c, d, y], [0, 0, 1.0]])


def rotation(angle: float) -> np.ndarray:
    return homogeneous(math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle))


def paper_matrix(d: dict[str, float], height: int, width: int) -> np.ndarray:
    """G of the paper's appendix B as a product of matrices, with all gates open."""
    steps = [
        homogeneous(1 - 2 * int(d["flip"] * 2), 0, 0, 1),
        rotation(math.pi / 2 * int(d["quarter"] * 4)),
        homogeneous(
            1, 0, 0, 1,
            round((d["blit_x"] * 2 - 1) * width / 8), round((d["blit_y"] * 2 - 1) * height / 8),
        ),
        homogeneous(2 ** (0.2 * d["scale~"]), 0, 0, 2 ** (0.2 * d["scale~"])),
        rotation((d["angle_first"] * 2 - 1) * math.pi),
        homogeneous(2 ** (0.2 * d["stretch~"]), 0, 0, 2 ** (-0.2 * d["stretch~"])),
        rotation((d["angle_last"] * 2 - 1) * math.pi),
        homogeneous(1, 0, 0, 1, d["shift_x~"] * width / 8, d["shift_y~"] * height / 8),
    ]  # fmt: skip
    total = np.eye(3)
    for step in steps:
        total = step @ total
    return total


def hills(x: np.ndarray, y: np.ndarray, size: int) -> np.ndarray:
    """A smooth image without symmetry, as a function of positions in pixels from the centre."""
    x, y = x / size, y / size
    a = np.exp(-((x - 0.1) ** 2 + (y + 0.05) ** 2) / 0.02)
    return a + 0.5 * np.cos(4 * x + 7 * y) - 0.3 * np.exp(-((x + 0.2) ** 2 + y**2) / 0.01)


def test_wavelet_is_orthogonal_and_smooth() -> None:
    """Orthonormal to its even shifts, with six vanishing moments, as sym6 and db6 are."""
    h = np.array(ada.SYM6)
    for shift in range(0, 12, 2):
        assert h[shift:] @ h[: 12 - shift] == pytest.approx(float(shift == 0), abs=1e-9)
    g = h[::-1] * (-1.0) ** np.arange(12)
    k = (np.arange(12) - 5.5) / 5.5
    assert all(abs((g * k**power).sum()) < 1e-8 for power in range(6))
    assert h.sum() == pytest.approx(math.sqrt(2))
    images = noise()
    torch.testing.assert_close(ada.halve(ada.double(images)), images, rtol=0, atol=2e-6)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("pipeline", ["b", "g", "c", "bg", "bgc", "o", "bgco"])
def test_strength_zero_changes_no_bit(channels: int, pipeline: str) -> None:
    images = noise(32, channels)
    draws = ada.draws(0, "x", 0, 32, pipeline)
    assert torch.equal(ada.apply(images, draws, torch.tensor(0.0), pipeline), images)
    changed = ada.apply(images, draws, ONE, pipeline) != images
    assert changed.flatten(1).any(1).float().mean() > 0.9


@pytest.mark.parametrize("pipeline", ["b", "bg", "bgc"])
def test_blitting_is_exact(pipeline: str) -> None:
    images = noise(2)
    blit = {  # the draws, and the expected image
        (("flip", 0.7),): images.flip(3),
        (("flip", 0.2),): images,
        (("quarter", 0.3),): torch.rot90(images, -1, (2, 3)),
        (("quarter", 0.6),): images.flip(2, 3),
        (("quarter", 0.9),): torch.rot90(images, 1, (2, 3)),
        (("quarter", 0.3), ("flip", 0.7)): torch.rot90(images.flip(3), -1, (2, 3)),
    }
    for drawn, expected in blit.items():
        draws = ada_draws(2, **dict(drawn))
        assert torch.equal(ada.apply(images, draws, ONE, pipeline), expected), drawn
    draws = ada_draws(2, blit_y=0.75, blit_x=0.0, blit_shift=0)  # one pixel down, two to the left
    moved = ada.apply(images, draws, ONE, pipeline)
    assert torch.equal(moved[..., 1:, :-2], images[..., :-1, 2:])
    assert torch.equal(moved[..., 0, :-2], images[..., 1, 2:]), "the edge reflects"
    assert torch.equal(moved[..., 1:, -1], images[..., :-1, -3])


@pytest.mark.parametrize("pipeline", ["b", "bg", "bgc"])
@pytest.mark.parametrize(("height", "width"), [(24, 16), (16, 24), (12, 16)])
def test_blitting_keeps_the_shape_of_images_that_are_not_square(
    pipeline: str, height: int, width: int
) -> None:
    """A quarter turn is about the centre of the image and its reflections."""
    images = noise(2, size=height, width=width)
    far = [(0, 0), (0, 0), (12, 12), (12, 12)]
    wide = torch.from_numpy(np.pad(images.numpy(), far, mode="reflect"))

    def middle(turned: Tensor) -> Tensor:
        top, left = (turned.shape[2] - height) // 2, (turned.shape[3] - width) // 2
        return turned[..., top : top + height, left : left + width]

    blit = {
        (("flip", 0.7),): images.flip(3),
        (("quarter", 0.6),): images.flip(2, 3),
        (("quarter", 0.3),): middle(torch.rot90(wide, -1, (2, 3))),
        (("quarter", 0.9),): middle(torch.rot90(wide, 1, (2, 3))),
        (("quarter", 0.3), ("flip", 0.7)): middle(torch.rot90(wide.flip(3), -1, (2, 3))),
    }
    for drawn, expected in blit.items():
        draws = ada_draws(2, **dict(drawn))
        assert torch.equal(ada.apply(images, draws, ONE, pipeline), expected), drawn
    draws = ada_draws(2, blit_y=1 - 1e-6, blit_x=0.0, blit_shift=0)  # an eighth of each side
    moved, down, left = (
        ada.apply(images, draws, ONE, pipeline),
        round(0.999 * height / 8),
        width // 8,
    )
    assert torch.equal(moved[..., down:, :-left], images[..., :-down, left:])


def test_alpha_has_the_geometry_and_not_the_colors() -> None:
    for channels in (2, 4):
        images = noise(8, channels, 24, width=16)
        images[:, -1] = images[:, 0]
        draws = ada.draws(0, "alpha", 0, 8)
        geometry = ada.apply(images, draws, ONE, "bg")
        seen = ada.apply(images, draws, ONE, "bgc")
        assert torch.equal(seen[:, -1], geometry[:, -1])
        colors = ada.apply(images[:, :-1], draws, ONE, "bgc")
        torch.testing.assert_close(seen[:, :-1], colors)
        cut = ada.apply(images, ada.draws(0, "alpha", 0, 8, "o"), ONE, "o")
        assert torch.equal((cut == 0).all(1), cut[:, -1] == 0)


def test_cutout_is_last_and_has_the_same_probability() -> None:
    images, num = noise(1, size=8).expand(4000, -1, -1, -1), 4000
    draws, p = ada.draws(0, "x", 0, num, "bco"), torch.tensor(0.25)
    without = ada.apply(images, draws[:, : len(ada.COLUMNS)], p, "bc")
    assert torch.equal(draws[:, : len(ada.COLUMNS)], ada.draws(0, "x", 0, num)), "as without it"
    cut = ada.apply(images, draws, p, "bco")
    hole = (cut == 0).all(1)
    assert torch.equal(cut, torch.where(hole[:, None], 0.0, without))
    share = hole.flatten(1).any(1).float().mean().item()
    assert share == pytest.approx(0.25, abs=0.02)
    assert hole.flatten(1).sum(1).max() == 16, "half the width, half the height"
    assert (hole.float().mean(0) > 0).all(), "anywhere"


def test_color_share_scales_the_strength_of_colors_alone() -> None:
    images, num = noise(1, channels=1, size=4).expand(8000, -1, -1, -1), 8000
    draws, p = ada.draws(0, "x", 0, num), torch.tensor(0.4)
    for share in (1.0, 0.5):
        changed = ada.apply(images, draws, p, "c", share) != images
        q = 0.4 * share  # brightness, contrast; half of the luma flips change an image
        expected = 1 - (1 - q) ** 2 * (1 - q / 2)
        assert changed.flatten(1).any(1).float().mean().item() == pytest.approx(expected, abs=0.02)
    moved = ada.apply(images, draws, p, "b", 0.0)
    assert torch.equal(moved, ada.apply(images, draws, p, "b"))  # "b" has no colors


@pytest.mark.parametrize(("height", "width"), [(48, 48), (56, 40), (40, 60)])
def test_geometry_is_the_papers_product_of_matrices(height: int, width: int) -> None:
    """A known smooth image transformed by G: all pixels with a source inside the image agree."""
    size, num = 48, 24
    middle = np.array([[width - 1], [height - 1]]) / 2
    y, x = np.mgrid[:height, :width] - middle[::-1, :, None]
    picture = torch.tensor(hills(x, y, size), dtype=torch.float32)
    draws = ada.draws(3, "geometry", 0, num)
    draws[:, : len(ada.GATES)] = 0.0
    seen = ada.apply(picture.expand(num, 1, -1, -1), draws, ONE, "bg").numpy()
    inside_total = 0
    for image, row in zip(seen[:, 0], draws.tolist(), strict=True):
        d = dict(zip(ada.COLUMNS, row, strict=True))
        source = np.linalg.inv(paper_matrix(d, height, width)) @ np.stack(
            [x.ravel(), y.ravel(), np.ones(x.size)]
        )
        # Blitting is part of the matrix: pixels that it alone would move out are still available.
        inside = (np.abs(source[:2]) < middle - 3).all(0)
        inside_total += inside.sum()
        error = np.abs(hills(source[0], source[1], size) - image.ravel())[inside]
        assert error.max() < 0.02, d
    assert inside_total > num * 500


def test_blit_shift_and_geometry_shift_add_up() -> None:
    images = noise(1, size=32)
    draws = ada_draws(blit_y=0.875, blit_x=0.5, blit_shift=0, shift_y_=-0.75, shift=0, shift_x_=0.0)
    back = ada.apply(images, draws, ONE, "bg")  # three pixels down, three up
    torch.testing.assert_close(back[..., 4:-4, 4:-4], images[..., 4:-4, 4:-4], rtol=0, atol=1e-5)


def test_the_resampler_is_exact_for_multiples_of_half_a_pixel() -> None:
    images = noise(2, size=32)
    draws = ada_draws(2, shift_y_=0.5, shift_x_=-0.75, shift=0)  # times 32 / 8: 2 down, 3 left
    moved = ada.apply(images, draws, ONE, "g")
    torch.testing.assert_close(
        moved[..., 10:-10, 10:-10], images[..., 8:-12, 13:-7], rtol=0, atol=1e-5
    )
    wave = torch.sin(torch.arange(32) * 0.7).expand(1, 1, 32, 32)
    half = ada.apply(wave, ada_draws(shift_y_=0.0, shift_x_=0.125, shift=0), ONE, "g")
    expected = torch.sin((torch.arange(32) - 0.5) * 0.7).expand(1, 1, 32, 32)
    torch.testing.assert_close(half[..., 8:-8], expected[..., 8:-8], rtol=0, atol=3e-3)


def test_geometry_does_not_alias() -> None:
    """Stripes that are too fine for a smaller scale become grey."""
    stripes = torch.tensor([1.0, -1.0]).repeat(16).expand(1, 1, 32, 32)
    smaller = ada.apply(stripes, ada_draws(scale_=-4.0), ONE, "g")  # 2 ** -0.8 times
    assert smaller[..., 8:-8, 8:-8].abs().max() < 0.35
    assert stripes.abs().min() == 1


def test_each_transformation_happens_with_probability_p() -> None:
    draws = ada.draws(0, "x", 0, 8000)
    d, p = dict(zip(ada.COLUMNS, draws.unbind(1), strict=True)), torch.tensor(0.3)
    _, _, moved = ada.geometry_of(d, p, (16, 16))
    # Scale, stretch, shift, and at least one of two rotations: each has probability p.
    assert moved.float().mean().item() == pytest.approx(1 - 0.7**4, abs=0.02)
    (turn, flip, shift) = ada.blit_of(d, p, (16, 16), enabled=True)
    assert (flip < 0).float().mean().item() == pytest.approx(0.15, abs=0.015)
    assert (turn[:, 1] != 1).float().mean().item() == pytest.approx(0.3 * 0.75, abs=0.015)
    assert (shift != 0).any(1).float().mean().item() == pytest.approx(0.3 * (1 - 1 / 16), abs=0.02)
    assert shift.abs().max() == 2
    spread = d["scale~"].std().item(), d["shift_x~"].std().item()
    assert spread == pytest.approx((1, 1), abs=0.03)


def paper_color(d: dict[str, float]) -> np.ndarray:
    """C of the paper's appendix B as a product of 4x4 matrices, all gates open."""
    v = np.array([1.0, 1, 1]) / math.sqrt(3)
    vv, cross = np.outer(v, v), np.array([[0, -v[2], v[1]], [v[2], 0, -v[0]], [-v[1], v[0], 0]])
    angle = (d["hue"] * 2 - 1) * math.pi
    hue = vv + (np.eye(3) - vv) * math.cos(angle) + cross * math.sin(angle)  # Rodrigues
    total = np.eye(4)
    total[:3, 3] = 0.2 * d["brightness~"]
    for three in (
        np.eye(3) * 2 ** (0.5 * d["contrast~"]),
        np.eye(3) - 2 * vv * int(d["luma"] * 2),
        hue,
        vv + (np.eye(3) - vv) * 2 ** d["saturation~"],
    ):
        step = np.eye(4)
        step[:3, :3] = three
        total = step @ total
    return total


def test_color_is_the_papers_product_of_matrices() -> None:
    images = noise(16, size=4)
    draws = ada.draws(0, "color", 0, 16)
    draws[:, : len(ada.GATES)] = 0.0
    seen = ada.apply(images, draws, ONE, "c")
    for image, before, row in zip(seen, images, draws.tolist(), strict=True):
        matrix = paper_color(dict(zip(ada.COLUMNS, row, strict=True)))
        ones = np.ones((1, 16))
        expected = (matrix @ np.concatenate([before.flatten(1).numpy(), ones]))[:3]
        np.testing.assert_allclose(image.flatten(1).numpy(), expected, atol=1e-5)
    grey = images[:, :1]
    alone = ada.apply(grey, draws, ONE, "c")
    torch.testing.assert_close(
        ada.apply(grey.expand(-1, 3, -1, -1), draws, ONE, "c")[:, 1:2], alone
    )
    assert (draws[:, list(ada.COLUMNS).index("luma")] > 0.5).sum() in range(3, 14)


def strength(p: float = 0.5) -> AdaptiveStrength:
    return AdaptiveStrength(torch.tensor(p), target=0.6, rampup_images=1000)


@pytest.mark.parametrize(
    ("signs", "expected"),
    [((1.0, 1.0), 0.58), ((0.65, 0.6), 0.58), ((0.5, 0.65), 0.42), ((-1.0, 1.0), 0.42)],
)
def test_strength_adapts_to_the_mean_sign(signs: tuple[float, float], expected: float) -> None:
    adaptive = strength()
    for sign in signs:
        adaptive.observe(torch.tensor(sign), 40, World())
    assert adaptive.p.item() == 0.5, "only at the end of an interval"
    adaptive.adapt()
    assert adaptive.p.item() == pytest.approx(expected)
    assert (adaptive.signs.item(), adaptive.num.item()) == (0, 0)


def test_strength_stays_between_zero_and_one() -> None:
    for start, sign, end in ((0.99, 1.0, 1.0), (0.01, -1.0, 0.0)):
        adaptive = strength(start)
        adaptive.observe(torch.tensor(sign), 40, World())
        adaptive.adapt()
        assert adaptive.p.item() == end


def test_strength_is_constant_exactly_on_target() -> None:
    """0.6 is not a float32; the sums are integers, so rounding does not matter."""
    adaptive = strength()
    for _ in range(7):
        adaptive.observe(torch.tensor(24.0) / 40, 40, World())
    adaptive.adapt()
    assert adaptive.p.item() == 0.5
