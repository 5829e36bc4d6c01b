"""The two phases of the `gan` objective (gan.py): discriminator and generator."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bigan import augment, rng
from bigan.augment import ada
from bigan.augment.discriminator_inputs import augmented, real_images
from bigan.augment.strength import AdaptiveStrength
from bigan.distributed.world import World, mean_over_ranks
from bigan.layers.hashing import keys, normal_field
from bigan.layers.init import orthogonal_penalty
from bigan.layers.mapping import follow_latents, mean_latent
from bigan.layers.precision import autocast
from bigan.objectives.base import (
    Phase,
    Result,
    RunningMean,
    Setup,
    Step,
    StepResult,
    Tensors,
    Terms,
)
from bigan.objectives.losses import LOSSES
from bigan.objectives.penalties import (
    PENALTIES,
    PenaltyBatch,
    path_length_penalty,
    path_lengths,
)
from bigan.schedules import annealed, due

if TYPE_CHECKING:
    from bigan.objectives.gan import Config

ADVERSARIAL = "adversarial"
PATH_LENGTH = "path_length"
NEEDS_FAKE = {ADVERSARIAL, "r2", "wgan_gp"}
PATH_NOISE_STREAM = 2**16  # of the random fields of a latent; the layers of a generator use 0, 1...


class _GANPhase(Phase):
    """Code of both phases: settings, random inputs and the augmentation's strength."""

    def __init__(self, config: Config, setup: Setup, state: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.config, self.setup = config, setup
        self.fading = setup.model.is_fading
        self.paired = LOSSES[config.loss].relativistic  # real and generated images form pairs
        self._state = dict(state)  # a plain dict: not registered as modules of the phase

    def values(self, at: int) -> Tensors:
        settings = self.setup.augment
        if not isinstance(settings, ada.Config):
            return {}
        adaptive = self._state.get("augment")
        if isinstance(adaptive, AdaptiveStrength):
            return {"strength": adaptive.p}
        assert settings.fixed is not None
        anneal = self.setup.anneal_images
        return {"strength": torch.tensor(annealed(at, settings.fixed, settings.fixed_end, anneal))}

    def _augment_draws(self, stream: str, at: int, num: int, names: Iterable[str]) -> Tensors:
        draws = {}
        for name in names:
            found = augment.draws(self.setup.augment, self.setup.seed, stream.format(name), at, num)
            if found is not None:
                draws[f"augment_{name}"] = found
        return draws

    def _augmented(self, images: Tensor, draws: Tensor | None, inputs: Tensors) -> Tensor:
        return augmented(self.setup.augment, images, draws, inputs.get("strength"))

    def _real(self, discriminator: nn.Module, inputs: Tensors) -> Tensor:
        alpha = discriminator.get_buffer("alpha") if self.fading else None
        return real_images(inputs["images.pixels"], inputs.get("images.mirror"), alpha)


class DiscriminatorPhase(_GANPhase):
    """Minimizes the loss of the discriminator and its penalties."""

    reads = ("generator",)
    streams = ("images",)

    def __init__(
        self,
        discriminator: nn.Module,
        config: Config,
        setup: Setup,
        state: Mapping[str, nn.Module],
    ) -> None:
        super().__init__(config, setup, state)
        self.discriminator = discriminator
        self.penalties = {penalty.name: penalty for penalty in config.penalties}
        self.weights = {
            name: penalty.initial_weight(setup.model.resolution, setup.batch)
            for name, penalty in self.penalties.items()
        }
        self.annealing = any(penalty.weight_end is not None for penalty in config.penalties)
        self._adversarial_scalars: Tensors = {}

    def draws(self, at: int, num: int, terms: Terms) -> Tensors:
        seed = self.setup.seed
        draws = {
            "z": rng.normal(seed, "d/z", at, (num, self.setup.model.z_dim)),
            "labels": rng.labels(seed, "d/labels", at, num, self.setup.class_counts),
        }
        if "wgan_gp" in self.penalties:
            draws["mix"] = rng.uniform(seed, "d/mix", at, (num,))
        return draws | self._augment_draws("d/augment/{}", at, num, ("real", "fake"))

    def values(self, at: int) -> Tensors:
        values = super().values(at)
        if self.annealing:
            anneal = self.setup.anneal_images
            weights = [
                annealed(at, self.weights[name], penalty.weight_end, anneal)
                for name, penalty in self.penalties.items()
            ]
            values["penalty_weights"] = torch.tensor(weights)
        return values

    def main_terms(self, at: int) -> Terms:
        """Terms of the main step that begins at `at`, with the lazy penalties that are due."""
        return (ADVERSARIAL, *self._due(at, separate=False))

    def separate_terms(self, at: int) -> Terms:
        """Terms of the separate step that follows it; empty if none is due."""
        return self._due(at, separate=True)

    def _due(self, at: int, separate: bool) -> Terms:
        step = at // self.setup.batch
        return tuple(
            penalty.name
            for penalty in self.config.penalties
            if penalty.separate_step == separate and step % penalty.every == 0
        )

    def forward(self, networks: Mapping[str, nn.Module], inputs: Tensors, terms: Terms) -> Result:
        real = self._real(self.discriminator, inputs)
        labels = inputs["images.labels"]
        fake_labels = labels if self.paired else inputs["labels"]
        fake = None
        if not NEEDS_FAKE.isdisjoint(terms):
            with autocast(self.setup.precision, real.device), torch.no_grad():
                fake = networks["generator"](inputs["z"], fake_labels)
        scalars: Tensors = {}
        losses: list[Tensor] = []
        if ADVERSARIAL in terms:
            assert fake is not None
            losses.append(self._adversarial(real, fake, fake_labels, inputs, scalars))
        for index, (name, penalty) in enumerate(self.penalties.items()):
            if name in terms:
                value = PENALTIES[name](
                    self.penalized(name, inputs),
                    PenaltyBatch(
                        real,
                        labels,
                        real if fake is None else fake.float(),
                        fake_labels,
                        inputs.get("mix"),
                        penalty.target,
                    ),
                )
                weights = inputs.get("penalty_weights")
                weight = self.weights[name] if weights is None else weights[index]
                losses.append(weight * penalty.every * value)
                scalars[name] = value.detach()
        if ADVERSARIAL not in terms:
            # Every parameter must have a gradient, even if it is zero: DDP would wait for those
            # that no penalty depends on (the last bias).
            losses.append(0 * self.discriminator(real[:1], labels[:1]).sum())
        loss = losses[0]
        for further in losses[1:]:
            loss = loss + further
        return Result(loss, scalars, {})

    def _adversarial(
        self, real: Tensor, fake: Tensor, fake_labels: Tensor, inputs: Tensors, scalars: Tensors
    ) -> Tensor:
        shown = [  # outside of autocast: positions and colors are computed in float32
            self._augmented(real, inputs.get("augment_real"), inputs),
            self._augmented(fake, inputs.get("augment_fake"), inputs),
        ]
        with autocast(self.setup.precision, real.device):
            logits = self.discriminator(
                torch.cat([images.to(fake.dtype) for images in shown]),
                torch.cat([inputs["images.labels"], fake_labels]),
            )
        logits_real, logits_fake = logits.float().chunk(2)
        loss = LOSSES[self.config.loss].discriminator(logits_real, logits_fake)
        scalars["loss"] = loss.detach()
        scalars["logits_real"] = logits_real.detach().mean()
        scalars["logits_fake"] = logits_fake.detach().mean()
        if augment.adapts(self.setup.augment):
            scalars["sign_real"] = logits_real.detach().sign().mean()
        if self.config.drift_weight > 0:
            drift = logits_real.square().mean()  # Karras et al. 2018, appendix A.1
            loss = loss + self.config.drift_weight * drift
            scalars["drift"] = drift.detach()
        return loss

    def penalized(self, penalty: str, inputs: Tensors) -> Callable[[Tensor, Tensor], Tensor]:
        """The function that a penalty differentiates: logits of images before augmentation.

        The augmentation has the same draws as in the loss; mixtures of WGAN-GP have those of their
        real images.
        """
        draws = inputs.get("augment_fake" if penalty == "r2" else "augment_real")
        if draws is None:
            return self.discriminator

        def logits(images: Tensor, labels: Tensor) -> Tensor:
            found: Tensor = self.discriminator(self._augmented(images, draws, inputs), labels)
            return found

        return logits

    def constrain(self, parameters: Iterable[Tensor]) -> None:
        """Weight clipping (Arjovsky et al. 2017, arXiv:1701.07875, algorithm 1, line 7)."""
        clip = self.config.weight_clip
        if clip is not None:
            for parameter in parameters:
                parameter.clamp_(-clip, clip)

    def after_step(self, step: Step, result: StepResult, world: World) -> Tensors:
        """Adapt the strength of ADA, after the last optimizer step on these images."""
        settings, batch = self.setup.augment, self.setup.batch
        if ADVERSARIAL in step.terms:
            self._adversarial_scalars = result.scalars
            if self.separate_terms(step.at):
                return {}
        if not isinstance(settings, ada.Config):
            return {}
        adaptive = self._state.get("augment")
        if not isinstance(adaptive, AdaptiveStrength):
            return (
                {}
                if settings.fixed_end is None
                else {"augment_p": self.values(step.at)["strength"]}
            )
        used = {"augment_p": adaptive.p.clone()}
        adaptive.observe(self._adversarial_scalars["sign_real"], batch, world)
        if due(step.at, step.at + batch, settings.images_between(batch)):
            adaptive.adapt()
        return used


class GeneratorPhase(_GANPhase):
    """Minimizes the loss of the generator; penalizes path lengths in a separate step."""

    reads = ("discriminator",)

    def __init__(
        self, generator: nn.Module, config: Config, setup: Setup, state: Mapping[str, nn.Module]
    ) -> None:
        super().__init__(config, setup, state)
        self.generator = generator
        if self.paired:  # the loss also needs the real images of the last discriminator step
            self.streams = ("images",)
        self.after_step_uses_networks = setup.model.latent_space == "w"  # for the mean latent
        self._inputs: list[Tensors] = []  # of the last main step

    def draws(self, at: int, num: int, terms: Terms) -> Tensors:
        seed, stream = self.setup.seed, "g/" if ADVERSARIAL in terms else "g/path/"
        draws = {
            "z": rng.normal(seed, f"{stream}z", at, (num, self.setup.model.z_dim)),
            "labels": rng.labels(seed, f"{stream}labels", at, num, self.setup.class_counts),
        }
        if ADVERSARIAL not in terms:
            return draws
        draws |= self._augment_draws("g/augment", at, num, ("fake",))
        if self.paired:
            draws |= self._augment_draws("g/augment/{}", at, num, ("real",))
        return draws

    def values(self, at: int) -> Tensors:
        values = super().values(at)
        mean = self._state.get("path_length")
        if isinstance(mean, RunningMean):
            values["path_mean"] = mean.mean
        return values

    def path_length_due(self, at: int) -> bool:
        """Whether a separate path-length step follows the main step that begins at `at`."""
        path = self.config.path_length
        if path is None:
            return False
        return at // self.config.images_per_step(self.setup.batch) % path.every == 0

    def forward(self, networks: Mapping[str, nn.Module], inputs: Tensors, terms: Terms) -> Result:
        if PATH_LENGTH in terms:
            return self._path_length(inputs)
        discriminator, precision = networks["discriminator"], self.setup.precision
        labels = inputs["images.labels"] if self.paired else inputs["labels"]
        with autocast(precision, inputs["z"].device):
            fake = self.generator(inputs["z"], labels)
        shown = self._augmented(fake, inputs.get("augment_fake"), inputs)
        with autocast(precision, inputs["z"].device):
            logits_fake = discriminator(shown.to(fake.dtype), labels)
        loss_of = LOSSES[self.config.loss].generator
        if self.paired:
            logits_real = self._logits_real(discriminator, inputs, fake.dtype)
            loss = loss_of(logits_real.float(), logits_fake.float())
        else:
            loss = loss_of(logits_fake.float())
        scalars = {"loss": loss.detach()}
        if self.config.orthogonal_weight > 0:
            penalty = orthogonal_penalty(self.generator)
            loss = loss + self.config.orthogonal_weight * penalty
            scalars["orthogonal"] = penalty.detach()
        return Result(loss, scalars, {})

    @torch.no_grad()
    def _logits_real(self, discriminator: nn.Module, inputs: Tensors, dtype: torch.dtype) -> Tensor:
        real = self._real(discriminator, inputs)
        shown = self._augmented(real, inputs.get("augment_real"), inputs)
        with autocast(self.setup.precision, real.device):
            logits: Tensor = discriminator(shown.to(dtype), inputs["images.labels"])
        return logits

    def _path_length(self, inputs: Tensors) -> Result:
        """Computed in float32, as all penalties. The random direction is a hash of the latent."""
        settings, model, network = self.config.path_length, self.setup.model, self.generator
        assert settings is not None
        z, labels = inputs["z"], inputs["labels"]
        of = keys(z)
        ws = network.latents(z, labels, of)  # type: ignore[operator]
        shape = (model.image_channels, model.height, model.width)
        noise = normal_field(of, PATH_NOISE_STREAM, shape) / math.sqrt(model.height * model.width)
        lengths = path_lengths(lambda w: network.synthesis(w, of), ws, noise)  # type: ignore[operator]
        penalty = path_length_penalty(lengths, inputs["path_mean"])
        touched = 0 * network(z[:1], labels[:1]).sum()  # a gradient for every parameter, for DDP
        scalars = {"path_length": lengths.detach().mean(), "path_penalty": penalty.detach()}
        return Result(settings.weight * settings.every * penalty + touched, scalars, {})

    def after_step(self, step: Step, result: StepResult, world: World) -> Tensors:
        """Update the mean path length, and after the last step the mean latent."""
        if PATH_LENGTH in step.terms:
            mean = self._state["path_length"]
            assert isinstance(mean, RunningMean)
            mean.update(result.scalars["path_length"], world)
        else:
            self._inputs = result.inputs
            if self.path_length_due(step.at):
                return {}
        if self.setup.model.latent_space == "w":
            key = "images.labels" if self.paired else "labels"
            means = [mean_latent(self.generator, i["z"], i[key]) for i in self._inputs]
            follow_latents(self.generator, mean_over_ranks(world, torch.stack(means).mean(0)))
        return {}
