"""Mean and covariance of features in one pass, in float64, merged over batches and ranks.

Kept is the centred scatter, not the sum of squares: the difference of two large sums loses the
small eigenvalues the Frechet distance depends on. Merging follows Chan, Golub and LeVeque 1979,
"Updating formulae and a pairwise algorithm for computing sample variances".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from bigan.distributed.world import World


@dataclass(frozen=True)
class Moments:
    """`num` feature vectors summed up: mean [d] and scatter [d, d] about it, both float64."""

    num: int
    mean: Tensor
    scatter: Tensor

    @property
    def covariance(self) -> Tensor:
        """Sample covariance [d, d] with divisor num - 1, as `np.cov`; needs two samples."""
        if self.num < 2:
            raise ValueError(f"a covariance needs at least 2 samples, there are {self.num}")
        return self.scatter / (self.num - 1)


def empty(dim: int, device: torch.device | str = "cpu") -> Moments:
    """The moments of no sample of `dim` features."""
    mean = torch.zeros(dim, dtype=torch.float64, device=device)
    return Moments(0, mean, torch.zeros(dim, dim, dtype=torch.float64, device=device))


def home(device: torch.device) -> torch.device:
    """Where moments of features on `device` are summed: Apple's GPUs know no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def of(features: Tensor) -> Moments:
    """The moments of features [n, d], n >= 1, on their device (see `home`).

    Raises ValueError if they are not two-dimensional or not finite.
    """
    if features.ndim != 2 or len(features) == 0:
        raise ValueError(f"expected features [n, d] with n >= 1, got {tuple(features.shape)}")
    rows = features.to(home(features.device)).double()
    mean = rows.mean(dim=0)
    if not bool(mean.isfinite().all()):
        raise ValueError("features are not finite")
    centred = rows - mean
    return Moments(len(rows), mean, centred.T @ centred)


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of both sets together."""
    if a.num == 0 or b.num == 0:
        return b if a.num == 0 else a
    num = a.num + b.num
    delta = b.mean - a.mean
    mean = a.mean + delta * (b.num / num)
    scatter = a.scatter + b.scatter + torch.outer(delta, delta) * (a.num * b.num / num)
    return Moments(num, mean, scatter)


def all_reduce(world: World, own: Moments) -> Moments:
    """The moments of all ranks' samples together, the same on every rank.

    Two sums: first the joint mean, then the scatters, each moved to that mean.
    """
    if world.size == 1:
        return own
    first = torch.cat([own.mean.new_tensor([own.num]), own.mean * own.num])
    dist.all_reduce(first)
    num = int(first[0].item())
    mean = first[1:] / max(num, 1)
    delta = own.mean - mean
    scatter = own.scatter + torch.outer(delta, delta) * own.num
    dist.all_reduce(scatter)
    return Moments(num, mean, scatter)
