"""First values of all weights from one explicit generator, and orthogonal regularisation."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigan.layers.attention import SelfAttention
from bigan.layers.batchnorm import BatchNorm2d, normalisation_layers
from bigan.layers.equalised import Equalised
from bigan.layers.precision import without_autocast
from bigan.layers.spectral import SpectralNorm

# torch's own spectral norm begins with as many; random vectors would give a sigma near 0.
FIRST_POWER_ITERATIONS = 15


@torch.no_grad()
def initialise(
    network: nn.Module, scheme: Literal["orthogonal", "normal"], generator: torch.Generator
) -> None:
    """Fill every parameter and buffer of the layers of `bigan.layers` and of nn.Embedding.

    `scheme` "orthogonal" is BigGAN's (Saxe et al. 2014) for convolutions, linear maps and
    embeddings; "normal" is N(0, 0.02). Biases start at 0. Layers with an equalised learning rate
    have first values of their own, whatever the scheme. Weights are drawn on the CPU: they
    depend on `generator` (a CPU generator) and the network's structure alone, not on its device.
    """
    for module in network.modules():
        if isinstance(module, SpectralNorm | nn.Embedding):
            module.weight.copy_(_draw(module.weight.shape, scheme, generator))
        if isinstance(module, Equalised):
            module.initialise(generator)
        if isinstance(module, SpectralNorm):
            v = torch.empty(module.v.shape).normal_(generator=generator)
            module.v.copy_(F.normalize(v, dim=0))
            for _ in range(FIRST_POWER_ITERATIONS):
                module.iterate()
            bias = getattr(module, "bias", None)
            if bias is not None:
                bias.zero_()
        if isinstance(module, BatchNorm2d) and module.weight is not None:
            module.weight.fill_(1)
            if module.bias is not None:
                module.bias.zero_()
        if isinstance(module, SelfAttention):
            module.gamma.zero_()
    for layer in normalisation_layers(network):
        layer.reset_statistics()


def orthogonal_penalty(network: nn.Module, skip: Collection[str] = ("shared",)) -> Tensor:
    """BigGAN's off-diagonal orthogonal regularisation, unweighted: a scalar in float32.

    The sum over weights of || W^T W o (1 - I) ||_F^2 (Brock et al. 2019, equation 3), the columns
    of their W being the filters: with PyTorch's layout, one filter per row, the products of
    different rows. Raw weights are meant, before spectral normalisation. Parameters with a name
    part in `skip` are left out, by default the shared class embedding, as are vectors and scalars.
    (The gradient their PyTorch code adds by hand is half of this one's.)
    """
    terms = [
        _off_diagonal_energy(weight)
        for name, weight in network.named_parameters()
        if weight.ndim >= 2 and not any(part in skip for part in name.split("."))
    ]
    if not terms:
        raise ValueError("orthogonal_penalty: the network has no weight matrix to regularise")
    return torch.stack(terms).sum()


def _off_diagonal_energy(weight: Tensor) -> Tensor:
    with without_autocast(weight):
        rows = weight.flatten(1)
        if rows.shape[0] <= rows.shape[1]:
            gram = rows @ rows.t()
            return (gram - torch.diag(gram.diagonal())).square().sum()
        # More filters than entries: ||W W^T||_F = ||W^T W||_F, and the smaller product keeps
        # BigGAN's first layer (24576 x 20) from making a matrix of 2.4 GB.
        return (rows.t() @ rows).square().sum() - rows.square().sum(1).square().sum()


def _draw(shape: torch.Size, scheme: str, generator: torch.Generator) -> Tensor:
    weight = torch.empty(shape)
    if scheme == "normal":
        return weight.normal_(0, 0.02, generator=generator)
    return nn.init.orthogonal_(weight, generator=generator)
