"""Adversarial losses: pure functions from logits [B] (float32) to a scalar, the batch mean.

`LOSSES[name]` has the discriminator's loss of (logits_real, logits_fake) and the generator's, which
is of (logits_real, logits_fake) if the loss is relativistic and of logits_fake alone otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class Loss(NamedTuple):
    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[..., Tensor]
    relativistic: bool = False  # the generator's loss also depends on logits of real images


def hinge_d(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """E[max(0, 1 - D(x))] + E[max(0, 1 + D(G(z)))] (Lim & Ye 2017, Miyato et al. 2018)."""
    return F.relu(1 - logits_real).mean() + F.relu(1 + logits_fake).mean()


def hinge_g(logits_fake: Tensor) -> Tensor:
    """-E[D(G(z))]."""
    return -logits_fake.mean()


def non_saturating_d(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """-E[log s(D(x))] - E[log(1 - s(D(G(z))))], s the sigmoid (Goodfellow et al. 2014, eq. 1)."""
    return F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean()


def non_saturating_g(logits_fake: Tensor) -> Tensor:
    """-E[log s(D(G(z)))] (Goodfellow et al. 2014, section 3)."""
    return F.softplus(-logits_fake).mean()


def least_squares_d(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """1/2 E[(D(x) - 1)^2] + 1/2 E[D(G(z))^2] (Mao et al. 2017, eq. 9)."""
    return 0.5 * (logits_real - 1).square().mean() + 0.5 * logits_fake.square().mean()


def least_squares_g(logits_fake: Tensor) -> Tensor:
    """1/2 E[(D(G(z)) - 1)^2] (Mao et al. 2017, eq. 9)."""
    return 0.5 * (logits_fake - 1).square().mean()


def wasserstein_d(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """E[D(G(z))] - E[D(x)] (Arjovsky et al. 2017, eq. 2)."""
    return logits_fake.mean() - logits_real.mean()


def relativistic_d(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """E[softplus(D(G(z)) - D(x))], with image i of the real and of the generated as a pair.

    Relativistic pairing GAN (Jolicoeur-Martineau 2019, arXiv:1807.00734; Huang et al. 2024,
    arXiv:2501.05441, equation 2).
    """
    return F.softplus(logits_fake - logits_real).mean()


def relativistic_g(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """E[softplus(D(x) - D(G(z)))]: the discriminator's loss with the roles exchanged."""
    return F.softplus(logits_real - logits_fake).mean()


LOSSES: dict[str, Loss] = {
    "hinge": Loss(hinge_d, hinge_g),
    "non_saturating": Loss(non_saturating_d, non_saturating_g),
    "least_squares": Loss(least_squares_d, least_squares_g),
    "wasserstein": Loss(wasserstein_d, hinge_g),
    "relativistic": Loss(relativistic_d, relativistic_g, relativistic=True),
}
