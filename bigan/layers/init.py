"""Initial values of all weights from one explicit generator, and orthogonal regularization."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor, nn

from bigan.layers.precision import without_autocast

Scheme = Literal["orthogonal", "normal"]


class Layer(nn.Module):
    """A module that owns parameters or buffers and sets their initial values itself."""

    def reset_parameters(self, generator: torch.Generator, scheme: Scheme = "orthogonal") -> None:
        """Set, in place, the initial values of what this module owns, not of its children.

        Random values come from `generator`, a CPU generator, and are drawn on the CPU, so that they
        do not depend on the device of the layer. `scheme` applies to layers that have no
        initialization of their own.
        """
        raise NotImplementedError


@torch.no_grad()
def init_weights(
    network: nn.Module, generator: torch.Generator, scheme: Scheme = "orthogonal"
) -> None:
    """Set the initial values of all layers in `network`, in registration order.

    These are every `Layer` and torch's own nn.Embedding, nn.Linear, nn.Conv2d (weights by `scheme`,
    biases 0) and nn.GroupNorm (1 and 0).

    `scheme` "orthogonal" is BigGAN's (Saxe et al. 2014, arXiv:1312.6120); "normal" is N(0, 0.02^2).
    The values depend on `generator` and on the structure of the network alone.
    """
    for module in network.modules():
        if isinstance(module, Layer):
            module.reset_parameters(generator, scheme)
        elif isinstance(module, nn.Embedding | nn.Linear | nn.Conv2d):
            module.weight.copy_(initial_weight(module.weight.shape, generator, scheme))
            if not isinstance(module, nn.Embedding) and module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.GroupNorm):
            module.weight.fill_(1)
            module.bias.zero_()


def initial_weight(shape: torch.Size, generator: torch.Generator, scheme: Scheme) -> Tensor:
    """A float32 weight of `shape`, on the CPU."""
    weight = torch.empty(shape)
    if scheme == "normal":
        return weight.normal_(0, 0.02, generator=generator)
    return nn.init.orthogonal_(weight, generator=generator)


def orthogonal_penalty(network: nn.Module, skip: Collection[str] = ("shared",)) -> Tensor:
    """BigGAN's off-diagonal orthogonal regularization, unweighted: a scalar in float32.

    The sum over all weights of || W^T W o (1 - I) ||_F^2 (Brock et al. 2019, equation 3), where the
    columns of W are the filters. PyTorch stores one filter per row, so these are the products of
    different rows. W is the raw weight, before spectral normalization. Parameters with a name part
    in `skip` are left out (by default the shared class embedding), and so are vectors and scalars.
    The gradient that the authors' PyTorch code adds by hand is half of the gradient of this.

    Raises ValueError if no weight matrix is left.
    """
    terms = [
        _off_diagonal_energy(weight)
        for name, weight in network.named_parameters()
        if weight.ndim >= 2 and not any(part in skip for part in name.split("."))
    ]
    if not terms:
        raise ValueError(
            f"orthogonal_penalty: {type(network).__name__} has no weight matrix to regularize"
        )
    return torch.stack(terms).sum()


def _off_diagonal_energy(weight: Tensor) -> Tensor:
    with without_autocast(weight):
        rows = weight.flatten(1)
        if rows.shape[0] <= rows.shape[1]:
            gram = rows @ rows.t()
            return (gram - torch.diag(gram.diagonal())).square().sum()
        # More filters than entries: ||W W^T||_F = ||W^T W||_F, and the smaller product avoids a
        # matrix of 2.4 GB for BigGAN's first layer (24576 x 20).
        return (rows.t() @ rows).square().sum() - rows.square().sum(1).square().sum()
