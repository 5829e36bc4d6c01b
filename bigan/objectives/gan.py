"""Generative adversarial networks (Goodfellow et al. 2014, arXiv:1406.2661): one objective.

The 2014 GAN, LSGAN, WGAN, WGAN-GP, SAGAN, ProGAN, BigGAN, StyleGAN2 and R3GAN are this objective
with other networks, losses, penalties and optimizers. One training step: `discriminator_steps`
steps of the discriminator, each on new images, then one of the generator. Lazy penalties are terms
of some steps only; those with a separate step (StyleGAN2) are the only terms of an optimizer step
that follows the main one.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from bigan import augment, models
from bigan.augment import AugmentConfig, ada
from bigan.augment.strength import AdaptiveStrength
from bigan.config import Frozen, NonNegative, Positive, PositiveFloat
from bigan.models import AnyModel
from bigan.objectives.base import ObjectiveConfig, Phase, RunningMean, Setup, Step
from bigan.objectives.gan_phases import (
    ADVERSARIAL,
    PATH_LENGTH,
    DiscriminatorPhase,
    GeneratorPhase,
)
from bigan.objectives.growth import set_alpha
from bigan.objectives.losses import LOSSES
from bigan.objectives.penalties import PenaltyConfig, refuse_batchnorm
from bigan.objectives.samplers import LatentSampler, Sampler


class PathLengthConfig(Frozen):
    """Path length regularization of StyleGAN2, in a separate step after every k-th one."""

    weight: NonNegative = 2.0
    every: Positive = 4
    decay: Annotated[float, Field(gt=0, le=1)] = 0.01  # weight of a step in the mean length
    batch_shrink: Positive = 2  # the batch is divided by it, to save memory


class Config(ObjectiveConfig):
    """Settings of the `gan` objective."""

    phases: ClassVar = ("discriminator", "generator")
    networks: ClassVar = ("generator", "discriminator")
    supports_growth: ClassVar = True
    supports_augment: ClassVar = True

    name: Literal["gan"] = "gan"
    loss: Literal["hinge", "non_saturating", "least_squares", "wasserstein", "relativistic"] = (
        "hinge"
    )
    discriminator_steps: Positive = 1  # per generator step, each on new images
    penalties: tuple[PenaltyConfig, ...] = ()
    drift_weight: NonNegative = 0.0  # of E[D(x)^2] on real images (ProGAN: 0.001)
    # Weights of the discriminator are clipped to [-c, c] after each update (WGAN: 0.01).
    weight_clip: PositiveFloat | None = None
    orthogonal_weight: NonNegative = 0.0  # orthogonal regularization of the generator (BigGAN)
    path_length: PathLengthConfig | None = None  # needs a generator with intermediate latents

    def build(self, setup: Setup) -> GAN:
        return GAN(self, setup)

    def images_per_step(self, batch: int) -> int:
        return batch * self.discriminator_steps

    @property
    def needs_anneal_images(self) -> list[str]:
        return [
            f"penalties: {p.name}.weight_end" for p in self.penalties if p.weight_end is not None
        ]

    @property
    def micro_batch_divisor(self) -> int:
        return self.path_length.batch_shrink if self.path_length else 1

    def check(self, model: AnyModel, settings: AugmentConfig) -> None:
        super().check(model, settings)
        if self.path_length and model.latent_space != "w":
            raise ValueError(
                f"objective.path_length: model.name = {model.name} has no intermediate latents; "
                "use model.name=stylegan2, or leave path_length out"
            )
        if LOSSES[self.loss].relativistic and augment.adapts(settings):
            # The loss determines differences of logits only: their common offset drifts, so the
            # sign of a logit is no measure of overfitting.
            raise ValueError(
                "augment: an adaptive strength needs logits with an absolute zero, which "
                "objective.loss=relativistic does not give them; use augment.fixed and "
                "augment.fixed_end"
            )

    @model_validator(mode="after")
    def _penalties(self) -> Config:
        names = [penalty.name for penalty in self.penalties]
        if len(set(names)) != len(names):
            raise ValueError("penalties: each penalty may be given once")
        if len({penalty.every for penalty in self.penalties if penalty.separate_step}) > 1:
            raise ValueError(
                "penalties: those with separate_step share one optimizer step, give them the "
                "same every"
            )
        return self


class GAN:
    """The objective `gan`: see the module."""

    averaged: tuple[str, ...] = ("generator",)

    def __init__(self, config: Config, setup: Setup) -> None:
        self._config, self._setup = config, setup
        self.networks = models.build(setup.model, "meta")
        generator, discriminator = self.networks["generator"], self.networks["discriminator"]
        for penalty in config.penalties:
            refuse_batchnorm(f"objective.penalties: {penalty.name}", discriminator)
        if config.path_length:
            refuse_batchnorm("objective.path_length", generator)
        self.frozen: dict[str, nn.Module] = {}
        self.state: dict[str, nn.Module] = {}
        settings = setup.augment
        if isinstance(settings, ada.Config) and settings.fixed is None:
            start = torch.tensor(settings.initial)
            self.state["augment"] = AdaptiveStrength(start, settings.target, settings.rampup_images)
        if config.path_length:
            self.state["path_length"] = RunningMean(config.path_length.decay)
        self._discriminator = DiscriminatorPhase(discriminator, config, setup, self.state)
        self._generator = GeneratorPhase(generator, config, setup, self.state)
        self.phases: dict[str, Phase] = {
            "discriminator": self._discriminator,
            "generator": self._generator,
        }
        self.samplers: dict[str, Sampler] = {
            "latent": LatentSampler(
                "generator",
                setup.model.z_dim,
                setup.class_counts,
                truncates=setup.model.latent_space,
                labeled=setup.model.is_conditional,
            )
        }

    @property
    def period(self) -> int:
        """Training steps after which all lazy terms have occurred in all combinations."""
        num_steps, path = self._config.discriminator_steps, self._config.path_length
        every = math.lcm(*(penalty.every for penalty in self._config.penalties))
        return math.lcm(every // math.gcd(every, num_steps), path.every if path else 1)

    @property
    def separate_steps(self) -> dict[str, int]:
        penalties, path = self._config.penalties, self._config.path_length
        separate = [p.every for p in penalties if p.separate_step]
        found = {"discriminator": separate[0]} if separate else {}
        return found | ({"generator": path.every} if path else {})

    def remarks(self) -> list[str]:
        lines = []
        for penalty in self._config.penalties:
            if penalty.weight is None:
                weight = self._discriminator.weights[penalty.name]
                why = "" if penalty.name == "wgan_gp" else " = 0.0002 * height * width / batch"
                lines.append(f"weight of {penalty.name}: {weight:.6g}{why}")
        return lines

    def begin(self, images_seen: int) -> None:
        """Set alpha, the weight of the resolution that fades in."""
        if self._setup.model.is_fading:
            for network in self.networks.values():
                set_alpha(network, self._setup.alpha(images_seen))

    def steps(self, images_seen: int) -> tuple[Step, ...]:
        batch, at = self._setup.batch, images_seen
        steps = []
        for _ in range(self._config.discriminator_steps):
            main = self._discriminator.main_terms(at)
            steps.append(Step("discriminator", main, at, batch, fresh=True))
            separate = self._discriminator.separate_terms(at)
            if separate:
                steps.append(Step("discriminator", separate, at, batch))
            at += batch
        steps.append(Step("generator", (ADVERSARIAL,), at, batch))
        if self._config.path_length and self._generator.path_length_due(at):
            num = batch // self._config.path_length.batch_shrink
            steps.append(Step("generator", (PATH_LENGTH,), at, num))
        return tuple(steps)
