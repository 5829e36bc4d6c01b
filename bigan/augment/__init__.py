"""Augmentation, on the device, of all images that the discriminator receives.

Each kind is one file with a frozen `Config(name: Literal[...])` and the pure functions `draws` and
`apply`; `AugmentConfig` is the tagged union of the configs. All random numbers are in `draws`: they
are drawn on the host for the *global* batch from (seed, stream, images_seen) and sliced by rank, as
latents are, so augmentations do not depend on resumes or on the world size. `apply` is
differentiable to any order and has no graph break, host synchronisation or data-dependent shape, so
it works inside gradient penalties and under torch.compile.

Real and generated images are augmented alike, in the steps of both networks; otherwise the
generator would learn the augmentation (Zhao et al. 2020, arXiv:2006.10738; Karras et al. 2020,
arXiv:2006.06676).
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
    """Images are not augmented."""

    name: Literal["none"] = "none"


AugmentConfig = Annotated[NoAugment | diffaugment.Config | ada.Config, Field(discriminator="name")]


def adapts(config: AugmentConfig) -> bool:
    """Whether the strength is adapted to the signs of the discriminator's logits on real images."""
    return isinstance(config, ada.Config) and config.fixed is None


def needs_anneal_images(config: AugmentConfig) -> list[str]:
    """Keys whose value is reached after `anneal_images` of the config."""
    scheduled = isinstance(config, ada.Config) and config.fixed_end is not None
    return ["fixed_end"] if scheduled else []


def num_columns(config: AugmentConfig) -> int:
    """Random numbers per image; 0 without augmentation."""
    if isinstance(config, diffaugment.Config):
        return len(diffaugment.COLUMNS)
    return len(ada.columns(config.pipeline)) if isinstance(config, ada.Config) else 0


def draws(
    config: AugmentConfig, seed: int, stream: str, images_seen: int, num: int
) -> Tensor | None:
    """float32 [num, K] on the CPU for the `num` images from `images_seen` on.

    None without augmentation.
    """
    if isinstance(config, diffaugment.Config):
        return diffaugment.draws(seed, stream, images_seen, num)
    if isinstance(config, ada.Config):
        return ada.draws(seed, stream, images_seen, num, config.pipeline)
    return None


def apply(
    config: AugmentConfig, images: Tensor, draws: Tensor | None, strength: Tensor | None
) -> Tensor:
    """float32 images [m, C, H, W], nominally in [-1, 1] -> augmented images of the same shape.

    `draws` [m, K] come from `draws` with the same config; `strength` is ADA's p, a 0-d tensor in
    [0, 1].
    """
    if isinstance(config, diffaugment.Config):
        assert draws is not None
        return diffaugment.apply(images, draws, config.policy)
    if isinstance(config, ada.Config):
        assert draws is not None
        assert strength is not None
        return ada.apply(images, draws, strength, config.pipeline, config.color_share)
    return images
