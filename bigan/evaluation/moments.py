"""Mean and covariance of features in one pass, in float64, merged over batches and ranks.

The accumulated quantity is the centered scatter matrix, not the sum of squares: the difference of
two large sums loses the small eigenvalues that the Frechet distance depends on. Merging follows
Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample
variances".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from bigan.distributed.world import World


@dataclass(frozen=True)
class Moments:
    """Of `num` feature vectors: mean [d] and scatter matrix [d, d] about it, both float64."""

    num: int
    mean: Tensor
    scatter: Tensor

    @property
    def covariance(self) -> Tensor:
        """Sample covariance [d, d] with divisor num - 1, as `np.cov`.

        Raises ValueError below two samples.
        """
        if self.num < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.num}")
        return self.scatter / (self.num - 1)


def empty(dim: int, device: torch.device | str = "cpu") -> Moments:
    """The moments of zero samples with `dim` features."""
    mean = torch.zeros(dim, dtype=torch.float64, device=device)
    return Moments(0, mean, torch.zeros(dim, dim, dtype=torch.float64, device=device))


def accumulation_device(device: torch.device) -> torch.device:
    """Device on which moments of features on `device` are summed: MPS has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def from_features(features: Tensor) -> Moments:
    """The moments of features [n, d], n >= 1, on their `accumulation_device`.

    Raises ValueError if they are not two-dimensional or not finite.
    """
    if features.ndim != 2 or len(features) == 0:
        raise ValueError(f"expected features [n, d] with n >= 1, got {tuple(features.shape)}")
    rows = features.to(accumulation_device(features.device)).double()
    mean = rows.mean(dim=0)
    if not bool(mean.isfinite().all()):
        raise ValueError("features are not finite")
    centered = rows - mean
    return Moments(len(rows), mean, centered.T @ centered)


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of the union of both sets."""
    if a.num == 0 or b.num == 0:
        return b if a.num == 0 else a
    num = a.num + b.num
    delta = b.mean - a.mean
    mean = a.mean + delta * (b.num / num)
    scatter = a.scatter + b.scatter + torch.outer(delta, delta) * (a.num * b.num / num)
    return Moments(num, mean, scatter)


def all_reduce(world: World, local: Moments) -> Moments:
    """The moments of the samples of all ranks, identical on every rank.

    Two all-reduces: of the mean, then of the scatter matrices, each shifted to that mean.
    """
    if world.size == 1:
        return local
    first = torch.cat([local.mean.new_tensor([local.num]), local.mean * local.num])
    dist.all_reduce(first)
    num = int(first[0].item())
    mean = first[1:] / max(num, 1)
    delta = local.mean - mean
    scatter = local.scatter + torch.outer(delta, delta) * local.num
    dist.all_reduce(scatter)
    return Moments(num, mean, scatter)
