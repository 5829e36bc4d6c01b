"""StyleGAN's mapping network (Karras et al. 2019, arXiv:1812.04948) and its mean output.

    w = f(z, label): both normalized to a root mean square of 1, concatenated, then linear layers

The mean of w, towards which samples are truncated, is a buffer that no forward writes: the trainer
calls `mean_latent` and `follow_latents` between two steps.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigan.layers.equalized import EqualizedLinear
from bigan.layers.init import Layer, Scheme
from bigan.layers.pixelnorm import pixel_norm
from bigan.layers.precision import at_least_float32, without_autocast


def leaky_relu(x: Tensor, clamp: float | None = None) -> Tensor:
    """sqrt(2) * leaky ReLU of slope 0.2, which roughly preserves the mean square of its input.

    `clamp` bounds the absolute value of the result, so that float16 does not overflow.
    """
    x = F.leaky_relu(x, 0.2) * math.sqrt(2)
    return x if clamp is None else x.clamp(-clamp, clamp)


class LabelEmbedding(EqualizedLinear):
    """Labels int64 [B] -> [B, dim]: a linear layer of one-hot labels.

    As published, rows are scaled by 1 / sqrt(num_classes); the caller normalizes them.
    """

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__(num_classes, dim)

    def forward(self, labels: Tensor) -> Tensor:
        x = F.embedding(labels, self.effective_weight().t())
        return x if self.bias is None else x + self.bias


class Mapping(nn.Module):
    """z [B, z_dim], labels int64 [B] -> w [B, w_dim], in float32 at least.

    Labels have an effect if `num_classes` is given. With z_dim = 0, w depends on the label alone
    and z may be None: the discriminator's embedding of labels.
    """

    def __init__(
        self,
        z_dim: int,
        w_dim: int,
        num_layers: int,
        lr_multiplier: float,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        self.z_dim = z_dim
        self.embedding = LabelEmbedding(num_classes, w_dim) if num_classes else None
        width = z_dim + (w_dim if num_classes else 0)
        self.layers = nn.ModuleList(
            EqualizedLinear(w_dim if i else width, w_dim, lr_multiplier=lr_multiplier)
            for i in range(num_layers)
        )

    def forward(self, z: Tensor | None, labels: Tensor) -> Tensor:
        parts = []
        # In float32, as published: it costs next to nothing, and w determines the entire image.
        with without_autocast(labels):
            if z is not None and self.z_dim:
                parts.append(pixel_norm(at_least_float32(z)))
            if self.embedding is not None:
                parts.append(pixel_norm(self.embedding(labels)))
            x = torch.cat(parts, dim=1)
            for layer in self.layers:
                x = leaky_relu(layer(x))
        return x


class AveragedMapping(Layer):
    """z [B, z_dim], labels int64 [B] -> ws [B, num_ws, w_dim]: w once per layer that uses it.

    `truncation_psi` < 1 moves w towards its mean over z and labels: mean + psi (w - mean) (Karras
    et al. 2019, appendix B). It is one number, or a tensor [B] with one psi per image.
    """

    w_average: Tensor

    def __init__(self, network: Mapping, w_dim: int, num_ws: int, beta: float) -> None:
        super().__init__()
        self.network = network
        self.num_ws = num_ws
        self.beta = beta
        self.register_buffer("w_average", torch.zeros(w_dim))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator, scheme: Scheme = "orthogonal") -> None:
        """Mean latent 0; nothing is drawn."""
        self.w_average.zero_()

    def forward(self, z: Tensor, labels: Tensor, truncation_psi: float | Tensor = 1.0) -> Tensor:
        w = self.network(z, labels)
        if isinstance(truncation_psi, Tensor):
            w = torch.lerp(self.w_average, w, truncation_psi.to(w.dtype)[:, None])
        elif truncation_psi != 1:
            w = torch.lerp(self.w_average, w, truncation_psi)
        return w[:, None].expand(-1, self.num_ws, -1)


def has_latent_average(network: nn.Module) -> bool:
    """Whether `network` has a mean latent, which must be updated at every training step."""
    return any(isinstance(module, AveragedMapping) for module in network.modules())


@torch.no_grad()
def mean_latent(generator: nn.Module, z: Tensor, labels: Tensor) -> Tensor:
    """The mean of w [w_dim] over a batch; average it over the ranks before `follow_latents`.

    Raises ValueError for a network without a mean latent, as `follow_latents` does.
    """
    return _averaged_mapping(generator).network(z, labels).mean(dim=0)


@torch.no_grad()
def follow_latents(generator: nn.Module, w_mean: Tensor) -> None:
    """Update the generator's mean latent by the batch mean `w_mean` [w_dim], once per step.

    In place: w_average <- beta * w_average + (1 - beta) * w_mean.
    """
    mapping = _averaged_mapping(generator)
    mapping.w_average.lerp_(w_mean.to(mapping.w_average), 1 - mapping.beta)


def _averaged_mapping(generator: nn.Module) -> AveragedMapping:
    for module in generator.modules():
        if isinstance(module, AveragedMapping):
            return module
    raise ValueError(
        f"{type(generator).__name__} has no mean latent; check with has_latent_average"
    )
