"""Variational autoencoder (Kingma & Welling 2014, arXiv:1312.6114): one phase, two networks.

The loss is the negative evidence lower bound of their equation 10 with one sample per image, a
normal p(x | z) of fixed standard deviation, and `kl_weight` on the divergence (1: the bound itself;
beta-VAE, Higgins et al. 2017: more):

    |x - decoder(z)|^2 / (2 sigma^2) + kl_weight * KL(q(z | x) || N(0, 1)),  z = mean + std * noise

summed over pixels and latent dimensions, averaged over images. New images are decoded from the
prior; reconstructions from the mean of q(z | x).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from bigan import models, rng
from bigan.augment.discriminator_inputs import as_images
from bigan.config import NonNegative, PositiveFloat
from bigan.layers.precision import autocast
from bigan.objectives.base import ObjectiveConfig, Phase, Result, Setup, Step, Tensors, Terms
from bigan.objectives.samplers import LatentSampler, Sampler, Truncates

ELBO = "elbo"


class Config(ObjectiveConfig):
    """Settings of the `vae` objective."""

    phases: ClassVar[tuple[str, ...]] = ("vae",)
    networks: ClassVar[tuple[str, ...]] = ("encoder", "decoder")

    name: Literal["vae"]
    kl_weight: NonNegative = 1.0
    sigma: PositiveFloat = 0.5  # standard deviation of a pixel, of a range from -1 to 1

    def build(self, setup: Setup) -> VAE:
        return VAE(self, setup)


class VAEPhase(Phase):
    """Trains encoder and decoder to minimize the negative evidence lower bound."""

    streams = ("images",)

    def __init__(
        self, encoder: nn.Module, decoder: nn.Module, config: Config, setup: Setup
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.config, self.setup = config, setup

    def draws(self, at: int, num: int, terms: Terms) -> Tensors:
        shape = (num, self.setup.model.z_dim)
        return {"noise": rng.normal(self.setup.seed, "vae/noise", at, shape)}

    def forward(self, networks: Mapping[str, nn.Module], inputs: Tensors, terms: Terms) -> Result:
        images = as_images(inputs["images.pixels"], inputs.get("images.mirror"))
        labels = inputs["images.labels"]
        with autocast(self.setup.precision, images.device):
            mean, log_variance = self.encoder(images, labels)
        mean, log_variance = mean.float(), log_variance.float()
        z = mean + (0.5 * log_variance).exp() * inputs["noise"]
        with autocast(self.setup.precision, images.device):
            decoded = self.decoder(z, labels)
        error = (decoded.float() - images).square().flatten(1).sum(1).mean()
        # Appendix B: -KL = 1/2 sum(1 + log sigma^2 - mu^2 - sigma^2).
        kl = 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).sum(1).mean()
        loss = error / (2 * self.config.sigma**2) + self.config.kl_weight * kl
        scalars = {"loss": loss, "squared_error": error, "kl": kl}
        return Result(loss, {name: value.detach() for name, value in scalars.items()}, {})


@dataclass(frozen=True)
class Reconstructor:
    """Images of the stream, encoded to the mean of q(z | x) and decoded."""

    networks: tuple[str, ...] = ("encoder", "decoder")
    inputs: str | None = "images"
    reference: str = "images"
    truncates: Truncates = ""
    labeled: bool = False

    def draws(self, seed: int, stream: str, at: int, num: int, truncation: float | None) -> Tensors:
        return {}

    def __call__(self, networks: Mapping[str, nn.Module], inputs: Tensors) -> Tensor:
        images, labels = as_images(inputs["images.pixels"]), inputs["images.labels"]
        mean, _ = networks["encoder"](images, labels)
        decoded: Tensor = networks["decoder"](mean, labels)
        return decoded


class VAE:
    """The objective `vae`: see the module."""

    averaged: tuple[str, ...] = ("encoder", "decoder")
    period = 1

    def __init__(self, config: Config, setup: Setup) -> None:
        self._batch = setup.batch
        self.networks = models.build(setup.model, "meta")
        phase = VAEPhase(self.networks["encoder"], self.networks["decoder"], config, setup)
        self.phases: dict[str, Phase] = {"vae": phase}
        self.frozen: dict[str, nn.Module] = {}
        self.state: dict[str, nn.Module] = {}
        self.separate_steps: dict[str, int] = {}
        z_dim, labeled = setup.model.z_dim, setup.model.is_conditional
        self.samplers: dict[str, Sampler] = {
            "prior": LatentSampler("decoder", z_dim, setup.class_counts, labeled=labeled),
            "reconstruction": Reconstructor(),
        }

    def begin(self, images_seen: int) -> None:
        """No buffer depends on the counter."""

    def remarks(self) -> list[str]:
        return []

    def steps(self, images_seen: int) -> tuple[Step, ...]:
        return (Step("vae", (ELBO,), images_seen, self._batch, fresh=True),)
