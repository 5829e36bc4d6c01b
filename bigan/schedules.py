"""What changes over a run, as pure functions of `images_seen`."""

from __future__ import annotations

import math


def due(before: int, after: int, every: int) -> bool:
    """Whether going from `before` to `after` images crosses a multiple of `every`."""
    return after // every > before // every


def warmup(images_seen: int, step_images: int, warmup_images: int) -> float:
    """Share of the learning rate in force at the step that begins at `images_seen`, in (0, 1].

    Adam's first steps divide by a second moment known from few gradients: every update is about
    the learning rate in size whatever the gradient's, so that rounding errors decide the sign of
    many (Liu et al. 2020, arXiv:1908.03265). Linear growth over the first images avoids that.
    """
    if warmup_images <= 0:
        return 1.0
    return min(1.0, (images_seen + step_images) / warmup_images)


def annealed(images_seen: int, start: float, end: float | None, anneal_images: int | None) -> float:
    """From `start` to `end` along half a cosine over the first `anneal_images`, then `end`.

    Without an `end` it stays at `start`. R3GAN's schedule of nearly everything (Huang et al. 2024).
    """
    if end is None or anneal_images is None:
        return start
    share = 0.5 * (1 - math.cos(math.pi * min(1.0, images_seen / anneal_images)))
    return start + (end - start) * share


def ema_decay(
    images_seen: int,
    step_images: int,
    halflife_images: float,
    rampup: float | None,
    start_images: int,
    born: int = 0,
) -> float:
    """How much of the old average is kept over a step of `step_images` images.

    The half-life is given in images, so it means the same at any batch size:
    decay = 0.5 ** (step_images / halflife). With `rampup` the half-life is at most
    rampup * (images_seen - born), which lets a young average follow (Karras et al. 2020); before
    `start_images` the average is a plain copy (BigGAN, Brock et al. 2019, appendix C).
    """
    if images_seen < start_images:
        return 0.0
    halflife = halflife_images
    if rampup is not None:
        halflife = min(halflife, (images_seen - born) * rampup)
    return 0.5 ** (step_images / halflife) if halflife > 0 else 0.0
