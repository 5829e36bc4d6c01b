"""ADA's augmentations (Karras et al. 2020, "Training Generative Adversarial Networks with Limited
Data", appendix B), written from the paper.

    b  pixel blitting     x-flip, rotation by quarter turns, shift by up to 1/8 in whole pixels
    g  general geometry   isotropic scale, rotation, anisotropic scale, rotation, fractional shift
    c  color              brightness, contrast, luma flip, hue rotation, saturation
    o  cutout             a rectangle of half the image's height and width becomes zero

Each transformation is applied to each image independently with probability p (the strength), color
transformations with `color_share` * p. At p = 0 images are returned bitwise unchanged. Images are
padded by reflection. Positions are in pixels from the centre of the image, (y, x), and angles in
radians. Images that are not square keep their shape: a quarter turn rotates about the centre, and
what is then outside is padding, as in the authors' code. Alpha has the geometry of the colors and
no color transformations.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from bigan import rng
from bigan.augment import diffaugment
from bigan.augment.sampling import bilinear, integers, on_colors, reflect, take
from bigan.config import Fraction, Frozen, Positive

# The first 13 columns select transformations, the others are their parameters; the last 7 are
# standard normal, all others uniform in [0, 1).
GATES = (
    "flip", "quarter", "blit_shift",
    "scale", "rotate_first", "stretch", "rotate_last", "shift",
    "brightness", "contrast", "luma", "hue", "saturation",
)  # fmt: skip
UNIFORM = ("flip", "quarter", "blit_y", "blit_x", "angle_first", "angle_last", "luma", "hue")
NORMAL = ("scale", "stretch", "shift_y", "shift_x", "brightness", "contrast", "saturation")
COLUMNS = tuple(f"{name}?" for name in GATES) + UNIFORM + tuple(f"{n}~" for n in NORMAL)
CUTOUT = ("cutout?", "cutout_y", "cutout_x")  # additional uniform columns of a pipeline with "o"

# Low-pass of the orthogonal wavelet sym6 (Daubechies 1992, "least asymmetric"); sum sqrt(2).
SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
    0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
    -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip
# Centre of mass of the filter: the offset of the fine pixels from the coarse ones (see `double`).
CENTER = sum(k * h for k, h in enumerate(SYM6)) / sum(SYM6)
PAD = 3  # reflected pixels per side, so that the filter fits at every position that is read


class Config(Frozen):
    """The pipeline, and how its strength p is determined.

    p is adapted so that r_t, the mean sign of the discriminator's logits on real images, stays at
    `target`; or it is `fixed`; or it is annealed from `fixed` to `fixed_end`.
    """

    name: Literal["ada"]
    pipeline: Literal[
        "b", "g", "c", "bg", "bc", "gc", "bgc", "o", "bo", "go", "co", "bgo", "bco", "gco", "bgco"
    ] = "bgc"  # fmt: skip
    color_share: Fraction = 1.0  # color transformations have the probability color_share * p
    target: Annotated[float, Field(gt=0, lt=1)] = 0.6  # of r_t
    rampup_images: Positive = 500_000  # minimum number of images for p to go from 0 to 1
    every_images: Positive | None = None  # between two adaptations; none: 4 discriminator steps
    initial: Fraction = 0.0  # value of an adaptive p at the start
    fixed: Fraction | None = None  # p is not adapted and has this value at the start
    fixed_end: Fraction | None = None  # and this value after `anneal_images`; none: constant

    def images_between(self, batch: int) -> int:
        """Images between two adaptations."""
        return self.every_images or 4 * batch

    @model_validator(mode="after")
    def _one_strength(self) -> Config:
        if self.fixed is not None and self.initial:
            raise ValueError(
                f"fixed = {self.fixed} and initial = {self.initial} exclude each other: initial is "
                "the start of an adaptive strength; remove one of them"
            )
        if self.fixed_end is not None and self.fixed is None:
            raise ValueError(
                f"fixed_end = {self.fixed_end} needs fixed, the strength at the start; use fixed=0"
            )
        return self


def columns(pipeline: str) -> tuple[str, ...]:
    """Names of the random numbers of one image, in order."""
    return COLUMNS + CUTOUT if "o" in pipeline else COLUMNS


def draws(seed: int, stream: str, images_seen: int, num: int, pipeline: str = "bgc") -> Tensor:
    """float32 [num, K]: uniform columns, then standard normal ones, then those of the cutout."""
    uniform = (num, len(COLUMNS) - len(NORMAL))
    parts = [
        rng.uniform(seed, f"{stream}/uniform", images_seen, uniform),
        rng.normal(seed, f"{stream}/normal", images_seen, (num, len(NORMAL))),
    ]
    if "o" in pipeline:
        parts.append(rng.uniform(seed, f"{stream}/cutout", images_seen, (num, len(CUTOUT))))
    return torch.cat(parts, dim=1)


def apply(
    images: Tensor, draws: Tensor, strength: Tensor, pipeline: str, color_share: float = 1.0
) -> Tensor:
    """Augmented images [m, C, H, W], H and W at least 4; float32 or float64.

    `draws` [m, K] from `draws`, `strength` the probability p, 0-d, on the same device.
    """
    d = dict(zip(columns(pipeline), draws.unbind(1), strict=True))
    augmented = images
    size = (images.shape[2], images.shape[3])
    blit = blit_of(d, strength, size, enabled="b" in pipeline)
    if "b" in pipeline:
        augmented = exact_blit(images, *blit)
    if "g" in pipeline:
        matrix, shift, moved = geometry_of(d, strength, size)
        resampled = resample(images, matrix, shift, *blit)
        augmented = torch.where(moved.view(-1, 1, 1, 1), resampled, augmented)
    if "c" in pipeline:
        augmented = on_colors(augmented, lambda colors: color(colors, d, strength * color_share))
    if "o" in pipeline:
        cut = diffaugment.cutout(augmented, d["cutout_y"], d["cutout_x"])
        augmented = torch.where((d["cutout?"] < strength).view(-1, 1, 1, 1), cut, augmented)
    return augmented


def chosen(d: dict[str, Tensor], gate: str, p: Tensor, value: Tensor, neutral: float) -> Tensor:
    """`value` [m] where the transformation is applied (probability p), else `neutral`."""
    return torch.where(d[f"{gate}?"] < p, value, neutral)


def blit_of(
    d: dict[str, Tensor], p: Tensor, size: tuple[int, int], enabled: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(sine and cosine of the quarter turn, -1 or 1 for the flip, shift [m, 2] in whole pixels).

    The first is [m, 2]; `size` is (height, width). All values are exact, as these transformations
    permute pixels.
    """
    p = p if enabled else torch.zeros_like(p)
    turns = integers(chosen(d, "quarter", p, d["quarter"], 0.0), 4)
    sine = (turns == 1).to(p.dtype) - (turns == 3).to(p.dtype)
    cosine = (turns == 0).to(p.dtype) - (turns == 2).to(p.dtype)
    flip = chosen(d, "flip", p, 1.0 - 2.0 * integers(d["flip"], 2), 1.0)
    pairs = zip(("blit_y", "blit_x"), size, strict=True)
    shift = torch.stack([(d[name] * 2 - 1) * (side / 8) for name, side in pairs], 1)
    shift = torch.where((d["blit_shift?"] < p)[:, None], shift.round(), 0.0)
    return torch.stack([sine, cosine], 1), flip, shift


def exact_blit(images: Tensor, turn: Tensor, flip: Tensor, shift: Tensor) -> Tensor:
    """Flip, quarter turn and shift without interpolation, with different values for each image.

    The source of the pixel at (y, x) is (y, x) - shift with the turn and the flip inverted, as in
    `resample`.
    """
    sine, cosine = turn.unbind(1)
    sideways = cosine == 0  # rows of the source become columns of the result
    height, width = images.shape[2:]
    upright, turned = (cosine, flip * cosine), (flip * sine, -sine)

    def read(source: Tensor, signs: tuple[Tensor, Tensor]) -> Tensor:
        places = []
        for sign, along, side, source_side in zip(
            signs, shift.unbind(1), (height, width), source.shape[2:], strict=True
        ):
            to = torch.arange(side, device=images.device) - (side - 1) / 2 - along[:, None]
            place = sign[:, None] * to + (source_side - 1) / 2
            # Turned images of an even and an odd side lie half a pixel off.
            places.append(reflect((place + 0.25).floor().long(), source_side))
        return take(source, *places)

    is_turned = sideways.view(-1, 1, 1, 1)
    if height == width:  # one read with the signs of each image
        source = torch.where(is_turned, images.transpose(2, 3), images)
        first, second = (torch.where(sideways, t, u) for t, u in zip(turned, upright, strict=True))
        return read(source, (first, second))
    return torch.where(is_turned, read(images.transpose(2, 3), turned), read(images, upright))


def geometry_of(
    d: dict[str, Tensor], p: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """(inverse matrix [m, 2, 2] on (x, y), shift [m, 2] as (y, x) in pixels, moved bool [m]).

    The inverse scale^-1 rotate_first^-1 stretch^-1 rotate_last^-1 maps pixels of the result to
    their sources; `size` is (height, width). Each of the two rotations has probability
    1 - sqrt(1 - p), so that at least one is applied with probability p.
    """
    p_rotate = 1 - (1 - p).sqrt()
    scale = chosen(d, "scale", p, torch.exp2(0.2 * d["scale~"]), 1.0)
    stretch = chosen(d, "stretch", p, torch.exp2(0.2 * d["stretch~"]), 1.0)
    first = chosen(d, "rotate_first", p_rotate, (d["angle_first"] * 2 - 1) * math.pi, 0.0)
    last = chosen(d, "rotate_last", p_rotate, (d["angle_last"] * 2 - 1) * math.pi, 0.0)
    pairs = zip(("shift_y~", "shift_x~"), size, strict=True)
    shift = torch.stack([d[name] * (side / 8) for name, side in pairs], 1)
    shift = torch.where((d["shift?"] < p)[:, None], shift, 0.0)
    s1, c1, s2, c2 = first.sin(), first.cos(), last.sin(), last.cos()
    wide, high = 1 / (scale * stretch), stretch / scale
    entries = [
        c1 * c2 * wide - s1 * s2 * high, c1 * s2 * wide + s1 * c2 * high,
        -s1 * c2 * wide - c1 * s2 * high, c1 * c2 * high - s1 * s2 * wide,
    ]  # fmt: skip
    opened = [d[f"{name}?"] < p for name in ("scale", "stretch", "shift")]
    opened += [d[f"{name}?"] < p_rotate for name in ("rotate_first", "rotate_last")]
    moved = torch.stack(opened).any(0)
    return torch.stack(entries, 1).view(-1, 2, 2), shift, moved


def resample(
    images: Tensor, matrix: Tensor, shift: Tensor, turn: Tensor, blit_flip: Tensor, blit: Tensor
) -> Tensor:
    """All geometry, blitting included, as one resampling of [m, C, H, W].

    The image is doubled, read bilinearly at the positions of the doubled result, and halved, with
    one wavelet low-pass filter (doubling is the adjoint of halving). The wavelet is orthogonal, so
    shifts by multiples of half a pixel are exact.
    """
    size = images.shape[2:]
    positions = []  # of the fine pixels of the result
    for axis, side, along in zip((2, 1), size, shift.unbind(1), strict=True):
        fine = torch.arange(2 * side + len(SYM6) - 2, device=images.device, dtype=shift.dtype)
        places = (fine - CENTER) / 2 - (side - 1) / 2
        positions.append((places - along[:, None]).unsqueeze(axis))
    y, x = positions
    m = matrix[..., None, None]
    x, y = m[:, 0, 0] * x + m[:, 0, 1] * y, m[:, 1, 0] * x + m[:, 1, 1] * y
    y, x = y - blit[:, 0, None, None], x - blit[:, 1, None, None]
    sine, cosine = turn[:, 0, None, None], turn[:, 1, None, None]
    x, y = blit_flip[:, None, None] * (cosine * x + sine * y), cosine * y - sine * x
    y, x = (
        2 * (reflect(source + (side - 1) / 2, side) + PAD) + CENTER
        for source, side in zip((y, x), size, strict=True)
    )
    return halve(bilinear(double(_padded(images)), y, x))


def double(images: Tensor) -> Tensor:
    """[m, C, H, W] -> [m, C, 2H + 10, 2W + 10]; fine pixel j lies at (j - CENTER) / 2."""
    # Even and odd fine pixels are computed separately: several times as fast as conv_transpose2d.
    phases = (_taps(images) * math.sqrt(2)).flip(0).view(-1, 2).T.flip(0)
    flat = images.flatten(0, 1)[:, None]
    flat = F.conv2d(flat, phases[:, None, :, None], padding=(5, 0)).transpose(1, 2)
    flat = flat.flatten(1, 2)[:, None]
    flat = F.conv2d(flat, phases[:, None, None, :], padding=(0, 5)).permute(0, 2, 3, 1)
    return flat.flatten(2).unflatten(0, images.shape[:2])


def halve(images: Tensor) -> Tensor:
    """[m, C, 2H + 10, 2W + 10] -> [m, C, H, W]: inverse and scaled adjoint of `double`."""
    taps = _taps(images) / math.sqrt(2)
    flat = images.flatten(0, 1)[:, None]
    flat = F.conv2d(flat, taps.view(1, 1, -1, 1), stride=(2, 1))
    flat = F.conv2d(flat, taps.view(1, 1, 1, -1), stride=(1, 2))
    return flat.view(*images.shape[:2], *flat.shape[2:])


def color(images: Tensor, d: dict[str, Tensor], p: Tensor) -> Tensor:
    """All color transformations as one affine map of the channels (1 or 3, without alpha).

    With v the unit vector of grey, they are x + b (brightness), multiplication by c (contrast),
    1 - 2 v v^T (luma flip), a rotation about v (hue), and a scaling orthogonal to v (saturation).
    The last four commute: they change the component along v by a factor, and rotate and scale the
    orthogonal component.
    """
    brightness = chosen(d, "brightness", p, 0.2 * d["brightness~"], 0.0).view(-1, 1, 1, 1)
    contrast = chosen(d, "contrast", p, torch.exp2(0.5 * d["contrast~"]), 1.0)
    luma = contrast * chosen(d, "luma", p, 1.0 - 2.0 * integers(d["luma"], 2), 1.0)
    luma = luma.view(-1, 1, 1, 1)
    images = images + brightness
    if images.shape[1] == 1:  # grey has neither hue nor saturation
        return luma * images
    angle = chosen(d, "hue", p, (d["hue"] * 2 - 1) * math.pi, 0.0)
    chroma = contrast * chosen(d, "saturation", p, torch.exp2(d["saturation~"]), 1.0)
    along = (chroma * angle.cos()).view(-1, 1, 1, 1)
    across = (chroma * angle.sin() / math.sqrt(3)).view(-1, 1, 1, 1)
    turned = images.roll(1, 1) - images.roll(-1, 1)  # (1, 1, 1) x images, the cross product
    return along * images + (luma - along) * images.mean(1, keepdim=True) + across * turned


def _taps(like: Tensor) -> Tensor:
    # Filled on the device: a tensor made from a list would be copied from the host synchronously.
    return torch.stack([torch.full((), h, dtype=like.dtype, device=like.device) for h in SYM6])


def _padded(images: Tensor) -> Tensor:
    """Add `PAD` reflected pixels per side; the gradient of F.pad is not deterministic on CUDA."""
    for axis in (2, 3):
        size = images.shape[axis]
        before = images.narrow(axis, 1, PAD).flip(axis)
        after = images.narrow(axis, size - 1 - PAD, PAD).flip(axis)
        images = torch.cat([before, images, after], axis)
    return images
