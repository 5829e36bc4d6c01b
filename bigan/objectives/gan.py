"""A training step is a list of phases; a phase trains one network.

A phase is an `nn.Module` that registers only the network it trains. It receives the other network
and the batch as forward arguments and returns (loss, detached scalars). It is pure: no random
draw, no host synchronisation, no change of a buffer, no rank. That one unit is what is compiled,
wrapped for DDP or handed to another engine.

What a forward's loss consists of are its terms: "adversarial", and penalties by name. Lazy ones are
among the terms of some steps only; those with a step of their own (StyleGAN2) are the only terms of
an optimiser step that follows the main one.

Random inputs are described by `draws` (outside compiled code) for the *global* batch; the loop
hands each process its slice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bigan import augment, rng
from bigan.augment.discriminator_inputs import augmented, real_images
from bigan.layers.hashing import keys, normal_field
from bigan.layers.init import orthogonal_penalty
from bigan.layers.precision import autocast
from bigan.objectives.losses import LOSSES
from bigan.objectives.penalties import (
    PENALTIES,
    path_length_penalty,
    path_lengths,
    refuse_batchnorm,
)
from bigan.run_config import PenaltyConfig, RunConfig, fades, penalty_weight
from bigan.schedules import annealed

Scalars = dict[str, Tensor]
Terms = tuple[str, ...]

ADVERSARIAL = "adversarial"
PATH_LENGTH = "path_length"
NEEDS_FAKE = {ADVERSARIAL, "r2", "wgan_gp"}
PATH_NOISE_STREAM = 2**16  # of the random fields of a latent; a generator's layers count from 0


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
    weights: Tensor | None = None  # float32 [penalties], where they change during the run


class GeneratorBatch(NamedTuple):
    """What one generator micro-batch of m images consists of."""

    z: Tensor  # float32 [m, z_dim]
    fake_labels: Tensor  # int64 [m]
    augment_fake: Tensor | None = None  # float32 [m, K]
    strength: Tensor | None = None  # float32 [], ADA's p
    # The real images of the last discriminator step, for relativistic losses.
    real: Tensor | None = None  # uint8 [m, H, W, C]
    labels: Tensor | None = None  # int64 [m]
    mirror: Tensor | None = None  # bool [m]
    augment_real: Tensor | None = None  # float32 [m, K]
    path_mean: Tensor | None = None  # float32 [], running mean of path lengths


class DiscriminatorPhase(nn.Module):
    """Minimises the discriminator's loss and its penalties; the generator only looks on."""

    name = "d"
    uses_data = True
    shows_real = True
    batch_type = DiscriminatorBatch

    def __init__(
        self, discriminator: nn.Module, config: RunConfig, class_counts: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.network = discriminator
        self.config = config
        self.class_counts = class_counts
        self.fading = fades(config)
        self.penalties: dict[str, PenaltyConfig] = {p.name: p for p in config.penalties}
        self.anneals = any(penalty.weight_end is not None for penalty in config.penalties)

    def num_images(self, terms: Terms) -> int:
        """Images of an optimiser step with these terms, over all processes."""
        return self.config.train.batch

    def draws(self, images_seen: int, num: int, terms: Terms = (ADVERSARIAL,)) -> dict[str, Tensor]:
        """Counter-based inputs of the `num` images from `images_seen` on."""
        seed = self.config.train.seed
        draws = {
            "z": rng.normal(seed, "d/z", images_seen, (num, self.config.model.z_dim)),
            "fake_labels": rng.labels(seed, "d/labels", images_seen, num, self.class_counts),
        }
        if self.config.data.mirror:
            draws["mirror"] = rng.uniform(seed, "d/mirror", images_seen, (num,)) < 0.5
        if "wgan_gp" in self.penalties:
            draws["mix"] = rng.uniform(seed, "d/mix", images_seen, (num,))
        for name in ("real", "fake"):
            of = augment.draws(self.config.augment, seed, f"d/augment/{name}", images_seen, num)
            if of is not None:
                draws[f"augment_{name}"] = of
        return draws

    def penalty_weights(self, images_seen: int) -> Tensor | None:
        """float32 [penalties] at `images_seen`, if any of them changes during the run."""
        if not self.anneals:
            return None
        return torch.tensor(
            [
                annealed(
                    images_seen, self._weight(name), penalty.weight_end, self.config.anneal_images
                )
                for name, penalty in self.penalties.items()
            ]
        )

    def terms(self, images_seen: int) -> Terms:
        """Those of the main step that begins at `images_seen`: lazy penalties rest at most."""
        step = images_seen // self.config.train.batch
        due = (p.name for p in self.config.penalties if not p.own_step and step % p.every == 0)
        return (ADVERSARIAL, *due)

    def own_terms(self, images_seen: int) -> Terms:
        """Those of the step of their own after the main one; none: there is no such step now."""
        step = images_seen // self.config.train.batch
        return tuple(p.name for p in self.config.penalties if p.own_step and step % p.every == 0)

    def variants(self) -> list[Terms]:
        """Every combination of terms that a step of this run may have, each once."""
        batch = self.config.train.batch
        period = math.lcm(*(penalty.every for penalty in self.config.penalties))
        starts = range(0, period * batch, batch)
        found = dict.fromkeys(of(seen) for of in (self.terms, self.own_terms) for seen in starts)
        return [terms for terms in found if terms]

    def forward(
        self, generator: nn.Module, batch: DiscriminatorBatch, terms: Terms
    ) -> tuple[Tensor, Scalars]:
        real = real_images(self.fading, self.network, batch.real, batch.mirror)
        fake_labels = batch.labels if self._paired else batch.fake_labels
        fake = None
        if not NEEDS_FAKE.isdisjoint(terms):
            with autocast(self.config.precision, real.device), torch.no_grad():
                fake = generator(batch.z, fake_labels)
        scalars: Scalars = {}
        losses: list[Tensor] = []
        if ADVERSARIAL in terms:
            assert fake is not None
            losses.append(self._adversarial(real, fake, fake_labels, batch, scalars))
        for index, (name, penalty) in enumerate(self.penalties.items()):
            if name in terms:
                value = PENALTIES[name](
                    self.penalised(name, batch),
                    real,
                    batch.labels,
                    real if fake is None else fake.float(),
                    fake_labels,
                    batch.mix,
                    penalty.target,
                )
                weight = self._weight(name) if batch.weights is None else batch.weights[index]
                losses.append(weight * penalty.every * value)
                scalars[name] = value.detach()
        if ADVERSARIAL not in terms:
            # Every parameter must have a gradient, if only zero, or DDP would wait for those that
            # no penalty depends on (the last bias).
            losses.append(0 * self.network(real[:1], batch.labels[:1]).sum())
        loss = losses[0]
        for further in losses[1:]:
            loss = loss + further
        return loss, scalars

    @property
    def _paired(self) -> bool:
        """Whether an image is compared with its partner, which must be of the same class then."""
        return LOSSES[self.config.loss].relativistic

    def _weight(self, name: str) -> float:
        return penalty_weight(self.penalties[name], self.config)

    def _adversarial(
        self,
        real: Tensor,
        fake: Tensor,
        fake_labels: Tensor,
        batch: DiscriminatorBatch,
        scalars: Scalars,
    ) -> Tensor:
        shown = [  # outside autocast: positions and colors are computed in float32
            augmented(self.config, real, batch.augment_real, batch.strength),
            augmented(self.config, fake, batch.augment_fake, batch.strength),
        ]
        with autocast(self.config.precision, real.device):
            logits = self.network(
                torch.cat([images.to(fake.dtype) for images in shown]),
                torch.cat([batch.labels, fake_labels]),
            )
        logits_real, logits_fake = logits.float().chunk(2)
        loss = LOSSES[self.config.loss].discriminator(logits_real, logits_fake)
        scalars["loss_d"] = loss.detach()
        scalars["logits_real"] = logits_real.detach().mean()
        scalars["logits_fake"] = logits_fake.detach().mean()
        if augment.adapts(self.config.augment):
            scalars["sign_real"] = logits_real.detach().sign().mean()
        if self.config.drift_weight > 0:
            drift = logits_real.square().mean()  # Karras et al. 2018, appendix A.1
            loss = loss + self.config.drift_weight * drift
            scalars["drift"] = drift.detach()
        return loss

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
        self.fading = fades(config)
        self.shows_real = LOSSES[config.loss].relativistic  # those of the last discriminator step

    def num_images(self, terms: Terms) -> int:
        """Images of an optimiser step with these terms, over all processes."""
        batch = self.config.train.batch
        if PATH_LENGTH in terms and self.config.path_length:
            return batch // self.config.path_length.batch_shrink
        return batch

    def draws(self, images_seen: int, num: int, terms: Terms = (ADVERSARIAL,)) -> dict[str, Tensor]:
        """Counter-based inputs of a generator step taken after `images_seen` images."""
        seed, stream = self.config.train.seed, "g" if ADVERSARIAL in terms else "g/path"
        draws = {
            "z": rng.normal(seed, f"{stream}/z", images_seen, (num, self.config.model.z_dim)),
            "fake_labels": rng.labels(
                seed, f"{stream}/labels", images_seen, num, self.class_counts
            ),
        }
        if ADVERSARIAL not in terms:
            return draws
        for name in ("fake", "real") if self.shows_real else ("fake",):
            where = "g/augment" if name == "fake" else "g/augment/real"
            of = augment.draws(self.config.augment, seed, where, images_seen, num)
            if of is not None:
                draws[f"augment_{name}"] = of
        return draws

    def terms(self, images_seen: int) -> Terms:
        """Those of the main step."""
        return (ADVERSARIAL,)

    def own_terms(self, images_seen: int) -> Terms:
        """Those of the step of their own after the main one, at `images_seen` or none."""
        path = self.config.path_length
        step = images_seen // (self.config.train.batch * self.config.train.num_d_steps)
        return (PATH_LENGTH,) if path and step % path.every == 0 else ()

    def variants(self) -> list[Terms]:
        """Every combination of terms that a step of this run may have, each once."""
        return [(ADVERSARIAL,), (PATH_LENGTH,)] if self.config.path_length else [(ADVERSARIAL,)]

    def forward(
        self, discriminator: nn.Module, batch: GeneratorBatch, terms: Terms
    ) -> tuple[Tensor, Scalars]:
        if PATH_LENGTH in terms:
            return self._path_length(batch)
        labels = batch.fake_labels if batch.labels is None else batch.labels
        with autocast(self.config.precision, batch.z.device):
            fake = self.network(batch.z, labels)
        shown = augmented(self.config, fake, batch.augment_fake, batch.strength)
        with autocast(self.config.precision, batch.z.device):
            logits_fake = discriminator(shown.to(fake.dtype), labels)
        loss_of = LOSSES[self.config.loss].generator
        if batch.real is None:
            loss = loss_of(logits_fake.float())
        else:
            logits_real = self._logits_real(discriminator, batch, fake.dtype)
            loss = loss_of(logits_real.float(), logits_fake.float())
        scalars = {"loss_g": loss.detach()}
        if self.config.train.orthogonal_weight > 0:
            penalty = orthogonal_penalty(self.network)
            loss = loss + self.config.train.orthogonal_weight * penalty
            scalars["orthogonal_g"] = penalty.detach()
        return loss, scalars

    @torch.no_grad()
    def _logits_real(
        self, discriminator: nn.Module, batch: GeneratorBatch, dtype: torch.dtype
    ) -> Tensor:
        assert batch.real is not None
        real = real_images(self.fading, discriminator, batch.real, batch.mirror)
        shown = augmented(self.config, real, batch.augment_real, batch.strength)
        with autocast(self.config.precision, real.device):
            return discriminator(shown.to(dtype), batch.labels)

    def _path_length(self, batch: GeneratorBatch) -> tuple[Tensor, Scalars]:
        """In float32, as all penalties. The random direction follows from the latent's own bits."""
        settings, model, network = self.config.path_length, self.config.model, self.network
        assert settings is not None
        assert batch.path_mean is not None
        of = keys(batch.z)
        ws = network.latents(batch.z, batch.fake_labels, of)  # type: ignore[operator]
        shape = (model.image_channels, model.resolution, model.resolution)
        noise = normal_field(of, PATH_NOISE_STREAM, shape) / model.resolution
        lengths = path_lengths(lambda w: network.synthesis(w, of), ws, noise)  # type: ignore[operator]
        penalty = path_length_penalty(lengths, batch.path_mean)
        touched = 0 * network(batch.z[:1], batch.fake_labels[:1]).sum()  # as in the discriminator's
        scalars = {"path_length": lengths.detach().mean(), "path_penalty": penalty.detach()}
        return settings.weight * settings.every * penalty + touched, scalars


Phase = DiscriminatorPhase | GeneratorPhase


def build_phases(
    config: RunConfig,
    generator: nn.Module,
    discriminator: nn.Module,
    class_counts: tuple[int, ...],
) -> dict[str, Phase]:
    """The phases of a recipe by name, for `order`; `ConfigError` if a penalty makes no sense."""
    for penalty in config.penalties:
        refuse_batchnorm(f"penalties: {penalty.name}", discriminator)
    if config.path_length:
        refuse_batchnorm("path_length", generator)
    return {
        "d": DiscriminatorPhase(discriminator, config, class_counts),
        "g": GeneratorPhase(generator, config, class_counts),
    }


def order(config: RunConfig) -> tuple[str, ...]:
    """One training step: `num_d_steps` discriminator steps, then one of the generator."""
    return ("d",) * config.train.num_d_steps + ("g",)
