"""What the rest of `bigan` may ask of the config of any model family."""

from __future__ import annotations

from typing import ClassVar, Literal

from bigan.config import Frozen


class ModelConfig(Frozen):
    """Base of the `Config` of every family: the capabilities that it declares.

    Code outside of a family reads these and never tests whether a config has an attribute:
    torch.compile cannot trace a missing attribute of a pydantic model. Each family also has the
    fields `name`, `resolution`, `num_classes`, `image_channels` and `z_dim`.
    """

    # Names of the networks; the family's module defines each class under the capitalised name.
    networks: ClassVar[tuple[str, ...]] = ("generator", "discriminator")
    # Whether networks of increasing resolution share parameters by name (progressive growing).
    can_grow: ClassVar[bool] = False
    # "w": the generator has `latents()`, `synthesis()` and a mean latent, and truncation is psi.
    latent_space: ClassVar[Literal["z", "w"]] = "z"

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
