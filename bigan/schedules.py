"""Schedules as pure functions of `images_seen`."""

from __future__ import annotations

import math


def due(before: int, after: int, every: int) -> bool:
    """Whether a multiple of `every` is in (before, after]; all in images."""
    return after // every > before // every


def warmup(images_seen: int, step_images: int, warmup_images: int) -> float:
    """Factor of the learning rate in (0, 1] at the step that begins at `images_seen`.

    Grows linearly over the first `warmup_images`. Adam's first steps divide by a second moment
    estimated from few gradients: the size of every update is about the learning rate, and rounding
    errors determine the sign of many (Liu et al. 2020, arXiv:1908.03265).
    """
    if warmup_images <= 0:
        return 1.0
    return min(1.0, (images_seen + step_images) / warmup_images)


def annealed(images_seen: int, start: float, end: float | None, anneal_images: int | None) -> float:
    """From `start` to `end` along half a cosine over `anneal_images`, then constant at `end`.

    Constant at `start` if `end` is None. The schedule of R3GAN's learning rates, penalty weights,
    EMA half-life and augmentation strength (Huang et al. 2024, arXiv:2501.05441).
    """
    if end is None or anneal_images is None:
        return start
    fraction = 0.5 * (1 - math.cos(math.pi * min(1.0, images_seen / anneal_images)))
    return start + (end - start) * fraction


def ema_decay(
    images_seen: int,
    step_images: int,
    halflife_images: float,
    rampup: float | None,
    start_images: int,
    born: int = 0,
) -> float:
    """Decay of the exponential moving average over a step of `step_images` images.

    decay = 0.5 ** (step_images / halflife): a half-life in images is independent of the batch size.
    With `rampup` the half-life is at most rampup * (images_seen - born), where `born` is the
    images_seen at which the newest layers began to train (Karras et al. 2020, arXiv:2006.06676).
    Before `start_images` the decay is 0: the average is a copy (Brock et al. 2019, appendix C).
    """
    if images_seen < start_images:
        return 0.0
    halflife = halflife_images
    if rampup is not None:
        halflife = min(halflife, (images_seen - born) * rampup)
    return 0.5 ** (step_images / halflife) if halflife > 0 else 0.0
