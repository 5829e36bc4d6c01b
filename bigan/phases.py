"""A training step is a list of phases; a phase trains one network.

A phase is an `nn.Module` that registers only the network it trains. It receives the other network
and the batch as forward arguments and returns (loss, detached scalars). It is pure: no random
draw, no host synchronisation, no change of a buffer, no rank. That one unit is what is compiled,
wrapped for DDP or handed to another engine.

Random inputs are described by `draws` (outside compiled code) for the *global* batch; the loop
hands each process its slice.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bigan import augment, rng
from bigan.layers.init import orthogonal_penalty
from bigan.losses import LOSSES
from bigan.penalties import PENALTIES
from bigan.recipe import RunConfig

Scalars = dict[str, Tensor]


class DiscriminatorBatch(NamedTuple):
    """What one discriminator micro-batch of m images consists of."""

    real: Tensor  # uint8 [m, H, W, C]
    labels: Tensor  # int64 [m]
    z: Tensor  # float32 [m, z_dim]
    fake_labels: Tensor  # int64 [m]
    mirror: Tensor | None = None  # bool [m]
    mix: Tensor | None = None  # float32 [m] in [0, 1), for WGAN-GP
    augment_real: Tensor | None = None  # float32 [m, K], see `augment.draws`
    augment_fake: Tensor | None = None
    strength: Tensor | None = None  # float32 [], ADA's p


class GeneratorBatch(NamedTuple):
    z: Tensor  # float32 [m, z_dim]
    fake_labels: Tensor  # int64 [m]
    augment_fake: Tensor | None = None  # float32 [m, K]
    strength: Tensor | None = None  # float32 [], ADA's p


def as_images(real: Tensor, mirror: Tensor | None) -> Tensor:
    """uint8 [m, H, W, C] -> float32 [m, C, H, W] in [-1, 1] (channels-last without a copy)."""
    images = real.permute(0, 3, 1, 2).to(torch.float32) * (1 / 127.5) - 1
    if mirror is not None:
        images = torch.where(mirror.view(-1, 1, 1, 1), images.flip(3), images)
    return images


def augmented(
    config: RunConfig, images: Tensor, draws: Tensor | None, strength: Tensor | None
) -> Tensor:
    """The images [m, C, H, W] as the discriminator is to see them, in float32 unless untouched."""
    if draws is None:
        return images
    seen = augment.apply(config.augment, images.float(), draws, strength)
    return seen.contiguous(memory_format=torch.channels_last)


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Autocast if the recipe asks for it; the meta device has none and needs none."""
    if precision in ("fp32", "tf32") or device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision])


class DiscriminatorPhase(nn.Module):
    """Minimises the discriminator's loss, gradient penalties included, on real and fake images."""

    name = "d"
    uses_data = True
    batch_type = DiscriminatorBatch

    def __init__(
        self, discriminator: nn.Module, config: RunConfig, class_counts: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.network = discriminator
        self.config = config
        self.class_counts = class_counts

    def draws(self, images_seen: int, num: int) -> dict[str, Tensor]:
        """Counter-based inputs of the `num` images from `images_seen` on."""
        seed = self.config.train.seed
        draws = {
            "z": rng.normal(seed, "d/z", images_seen, (num, self.config.model.z_dim)),
            "fake_labels": rng.labels(seed, "d/labels", images_seen, num, self.class_counts),
        }
        if self.config.data.mirror:
            draws["mirror"] = rng.uniform(seed, "d/mirror", images_seen, (num,)) < 0.5
        if any(penalty.name == "wgan_gp" for penalty in self.config.penalties):
            draws["mix"] = rng.uniform(seed, "d/mix", images_seen, (num,))
        for name in ("real", "fake"):
            of = augment.draws(self.config.augment, seed, f"d/augment/{name}", images_seen, num)
            if of is not None:
                draws[f"augment_{name}"] = of
        return draws

    def variant(self, images_seen: int) -> tuple[bool, ...]:
        """Which penalties are due at the step that begins at `images_seen` (lazy ones rest)."""
        step = images_seen // self.config.train.batch
        return tuple(step % penalty.every == 0 for penalty in self.config.penalties)

    def variants(self) -> list[tuple[bool, ...]]:
        """Every combination of penalties that a step of this run may have, each once."""
        batch = self.config.train.batch
        period = math.lcm(*(penalty.every for penalty in self.config.penalties))
        return list(dict.fromkeys(self.variant(step * batch) for step in range(period)))

    def forward(
        self, generator: nn.Module, batch: DiscriminatorBatch, variant: tuple[bool, ...]
    ) -> tuple[Tensor, Scalars]:
        real = as_images(batch.real, batch.mirror)
        with autocast(self.config.precision, real.device), torch.no_grad():
            fake = generator(batch.z, batch.fake_labels)
        shown = [  # outside autocast: positions and colors are computed in float32
            augmented(self.config, real, batch.augment_real, batch.strength),
            augmented(self.config, fake, batch.augment_fake, batch.strength),
        ]
        with autocast(self.config.precision, real.device):
            logits = self.network(
                torch.cat([images.to(fake.dtype) for images in shown]),
                torch.cat([batch.labels, batch.fake_labels]),
            )
        logits_real, logits_fake = logits.float().chunk(2)
        loss = LOSSES[self.config.loss].discriminator(logits_real, logits_fake)
        scalars = {
            "loss_d": loss.detach(),
            "logits_real": logits_real.detach().mean(),
            "logits_fake": logits_fake.detach().mean(),
        }
        if augment.adapts(self.config.augment):
            scalars["sign_real"] = logits_real.detach().sign().mean()
        for penalty, is_due in zip(self.config.penalties, variant, strict=True):
            if is_due:
                value = PENALTIES[penalty.name](
                    self.penalised(penalty.name, batch),
                    real,
                    batch.labels,
                    fake.float(),
                    batch.fake_labels,
                    batch.mix,
                )
                loss = loss + penalty.weight * penalty.every * value
                scalars[penalty.name] = value.detach()
        return loss, scalars

    def penalised(
        self, penalty: str, batch: DiscriminatorBatch
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """What a penalty differentiates: the network of images before their augmentation.

        With the same draws as in the loss; WGAN-GP's mixtures are augmented as their real images.
        """
        draws = batch.augment_fake if penalty == "r2" else batch.augment_real
        if draws is None:
            return self.network

        def network(images: Tensor, labels: Tensor) -> Tensor:
            seen = augmented(self.config, images, draws, batch.strength)
            return self.network(seen, labels)

        return network


class GeneratorPhase(nn.Module):
    """Minimises the generator's loss; the discriminator only looks on."""

    name = "g"
    uses_data = False
    batch_type = GeneratorBatch

    def __init__(
        self, generator: nn.Module, config: RunConfig, class_counts: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.network = generator
        self.config = config
        self.class_counts = class_counts

    def draws(self, images_seen: int, num: int) -> dict[str, Tensor]:
        """Counter-based inputs of a generator step taken after `images_seen` images."""
        seed = self.config.train.seed
        draws = {
            "z": rng.normal(seed, "g/z", images_seen, (num, self.config.model.z_dim)),
            "fake_labels": rng.labels(seed, "g/labels", images_seen, num, self.class_counts),
        }
        of = augment.draws(self.config.augment, seed, "g/augment", images_seen, num)
        return draws if of is None else draws | {"augment_fake": of}

    def variant(self, images_seen: int) -> tuple[bool, ...]:
        """The generator has no lazy terms."""
        return ()

    def variants(self) -> list[tuple[bool, ...]]:
        return [()]

    def forward(
        self, discriminator: nn.Module, batch: GeneratorBatch, variant: tuple[bool, ...]
    ) -> tuple[Tensor, Scalars]:
        with autocast(self.config.precision, batch.z.device):
            fake = self.network(batch.z, batch.fake_labels)
        shown = augmented(self.config, fake, batch.augment_fake, batch.strength)
        with autocast(self.config.precision, batch.z.device):
            logits_fake = discriminator(shown.to(fake.dtype), batch.fake_labels)
        loss = LOSSES[self.config.loss].generator(logits_fake.float())
        scalars = {"loss_g": loss.detach()}
        if self.config.train.orthogonal_weight > 0:
            penalty = orthogonal_penalty(self.network)
            loss = loss + self.config.train.orthogonal_weight * penalty
            scalars["orthogonal_g"] = penalty.detach()
        return loss, scalars


Phase = DiscriminatorPhase | GeneratorPhase


def build_phases(
    config: RunConfig,
    generator: nn.Module,
    discriminator: nn.Module,
    class_counts: tuple[int, ...],
) -> dict[str, Phase]:
    """The phases of a recipe by name; `order` says how they follow each other."""
    return {
        "d": DiscriminatorPhase(discriminator, config, class_counts),
        "g": GeneratorPhase(generator, config, class_counts),
    }


def order(config: RunConfig) -> tuple[str, ...]:
    """One training step: `num_d_steps` discriminator steps, then one of the generator."""
    return ("d",) * config.train.num_d_steps + ("g",)
