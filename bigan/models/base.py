"""What the rest of `bigan` may ask of the config of any model family."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import field_validator

from bigan.config import Frozen
from bigan.image_size import ImageSize, Resolution, check_doublings, halved, sides


class ModelConfig(Frozen):
    """Base of the `Config` of every family: the capabilities that it declares.

    Code outside of a family reads these and never tests whether a config has an attribute:
    torch.compile cannot trace a missing attribute of a pydantic model. Each family also has the
    fields `num_classes`, `z_dim` and `image_channels` (1: grey, 2: and alpha, 3: RGB, 4: RGBA).

    The first map of a generator is the `base`, 4 to 20 px high and wide, which is doubled up to
    `resolution`. A published network has the base 4 x 4; one with another base has the same layers
    as the published one with as many doublings, whose resolution is `nominal_resolution`. Layers
    and maps are therefore named by nominal resolutions: 4, 8, 16, ...
    """

    # Names of the networks; the family's module defines each class under the capitalized name.
    networks: ClassVar[tuple[str, ...]] = ("generator", "discriminator")
    # Whether networks of increasing resolution share parameters by name (progressive growing).
    can_grow: ClassVar[bool] = False
    # "w": the generator has `latents()`, `synthesis()` and a mean latent, and truncation is psi.
    latent_space: ClassVar[Literal["z", "w"]] = "z"

    # Smallest and largest number of doublings from the base to the resolution.
    doublings: ClassVar[tuple[int, int]]

    name: str
    resolution: Resolution  # of squares, or [height, width]

    @field_validator("resolution")
    @classmethod
    def _has_base(cls, resolution: ImageSize) -> ImageSize:
        check_doublings(resolution, *cls.doublings)
        return resolution

    @property
    def height(self) -> int:
        return sides(self.resolution)[0]

    @property
    def width(self) -> int:
        return sides(self.resolution)[1]

    @property
    def base(self) -> tuple[int, int]:
        """(height, width) of the smallest maps."""
        return halved(self.resolution)[0]

    @property
    def num_doublings(self) -> int:
        """How often the base is doubled."""
        return halved(self.resolution)[1]

    @property
    def nominal_resolution(self) -> int:
        """4 * 2^`num_doublings`: the resolution with the base 4 x 4."""
        return int(4 * 2**self.num_doublings)

    @property
    def is_fading(self) -> bool:
        """Whether the highest resolution is being faded in, at the networks' buffer `alpha`."""
        return False

    @property
    def is_conditional(self) -> bool:
        """Whether the labels have an effect."""
        return True

    @property
    def group(self) -> int:
        """Consecutive images that the discriminator compares with one another; 1: none."""
        return 1
