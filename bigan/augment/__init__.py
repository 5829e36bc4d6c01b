"""Augmentation of the images a discriminator sees, on the device: a tagged union of its kinds.

A kind is one file with a frozen `Config(name: Literal[...])`, `draws` and `apply`; both are pure.
All randomness comes in as `draws`, made on the host for the *global* batch from (seed, stream,
images_seen) and sliced by rank like a latent, so that a resume or another number of processes
sees the same augmentations. Everything is linear in the images but for contrast and saturation
(also differentiable to any order), without a graph break, a host synchronisation or a shape that
depends on values: penalties and torch.compile go through it.

Real images, fake images and the generator's are augmented alike (Zhao et al. 2020,
arXiv:2006.10738; Karras et al. 2020, arXiv:2006.06676), else the generator learns the augmentation.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from bigan.augment import ada, diffaugment
from bigan.augment.strength import AdaptiveStrength
from bigan.config import Frozen

__all__ = [
    "AdaptiveStrength", "AugmentConfig", "NoAugment", "adapts", "apply", "draws",
    "needs_anneal_images", "num_columns",
]  # fmt: skip


class NoAugment(Frozen):
    name: Literal["none"] = "none"


AugmentConfig = Annotated[NoAugment | diffaugment.Config | ada.Config, Field(discriminator="name")]


def adapts(config: AugmentConfig) -> bool:
    """Whether the strength is steered by the discriminator's signs on real images."""
    return isinstance(config, ada.Config) and config.fixed is None


def needs_anneal_images(config: AugmentConfig) -> list[str]:
    """Keys whose value is reached after `anneal_images` of the config."""
    scheduled = isinstance(config, ada.Config) and config.fixed_end is not None
    return ["fixed_end"] if scheduled else []


def num_columns(config: AugmentConfig) -> int:
    """Random numbers that one image takes; 0 without augmentation."""
    if isinstance(config, diffaugment.Config):
        return len(diffaugment.COLUMNS)
    return len(ada.columns(config.pipeline)) if isinstance(config, ada.Config) else 0


def draws(
    config: AugmentConfig, seed: int, stream: str, images_seen: int, num: int
) -> Tensor | None:
    """float32 [num, K] on the CPU for the `num` images from `images_seen` on, or None."""
    if isinstance(config, diffaugment.Config):
        return diffaugment.draws(seed, stream, images_seen, num)
    if isinstance(config, ada.Config):
        return ada.draws(seed, stream, images_seen, num, config.pipeline)
    return None


def apply(
    config: AugmentConfig, images: Tensor, draws: Tensor | None, strength: Tensor | None
) -> Tensor:
    """Augmented images [m, C, R, R], about [-1, 1], from float32 images of the same shape.

    `draws` [m, K] are this kind's; `strength` is ADA's p, a 0-d tensor in [0, 1].
    """
    if isinstance(config, diffaugment.Config):
        assert draws is not None
        return diffaugment.apply(images, draws, config.policy)
    if isinstance(config, ada.Config):
        assert draws is not None
        assert strength is not None
        return ada.apply(images, draws, strength, config.pipeline, config.color_share)
    return images
