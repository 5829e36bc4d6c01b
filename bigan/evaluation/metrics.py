"""Numbers from features: Frechet distance and inception (classifier) score.

Both end in torch-fidelity's own functions, so that they are the published numbers; what is ours
is where their arguments come from (float64 moments, rows in global order over any ranks).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
from torch_fidelity.metric_isc import (
    KEY_METRIC_ISC_MEAN,
    KEY_METRIC_ISC_STD,
    isc_features_to_metric,
)

from bigan.distributed.world import World
from bigan.evaluation.moments import Moments

SPLITS_FROM = 2000  # fewer samples are not split: a split's marginal would be too coarse


@dataclass(frozen=True)
class Score:
    """exp(E KL(p(y|x) || p(y))): mean and standard deviation over the splits."""

    mean: float
    std: float
    splits: int


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (Heusel et al. 2017, eq. 6).

    Raises ValueError below two samples on either side.
    """
    statistics = [{"mu": m.mean.cpu().numpy(), "sigma": m.covariance.cpu().numpy()} for m in (a, b)]
    return float(fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID])


def classifier_score(logits: Tensor, splits: int) -> Score:
    """Salimans et al. 2016, on logits [n, num_classes] in global order.

    Fewer than 2,000 samples are taken as one split whatever `splits` says.
    """
    splits = splits if len(logits) >= SPLITS_FROM else 1
    result = isc_features_to_metric(logits.cpu(), splits=splits)
    return Score(result[KEY_METRIC_ISC_MEAN], result[KEY_METRIC_ISC_STD], splits)


class Rows:
    """Rows [num, width] that the ranks fill in parts, each row exactly once, joined at the end."""

    def __init__(self, num: int, width: int, device: torch.device | str = "cpu") -> None:
        self._values = torch.zeros(num, width, device=device)
        self._filled = torch.zeros(num, dtype=torch.int32, device=device)

    def fill(self, start: int, rows: Tensor) -> None:
        """Put rows [m, width] at positions start ... start + m."""
        self._values[start : start + len(rows)] = rows
        self._filled[start : start + len(rows)] += 1

    def gather(self, world: World) -> Tensor:
        """All rows in global order, on every rank; RuntimeError if one is missing or doubled."""
        if world.size > 1:
            dist.all_reduce(self._values)  # a row is zero on all ranks but one: the sum is exact
            dist.all_reduce(self._filled)
        wrong = int((self._filled != 1).sum())
        if wrong:
            raise RuntimeError(f"{wrong} of {len(self._filled)} samples are missing or doubled")
        return self._values
