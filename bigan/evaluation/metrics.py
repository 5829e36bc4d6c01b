"""Metrics of generated images; adding one is one function and one entry of `METRICS`.

The Frechet distance and the inception (classifier) score are computed by functions of
torch-fidelity, so they are the published metrics. Their arguments are computed here: float64
moments, and logits in global order for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

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
from bigan.evaluation.extractors import Extractor
from bigan.evaluation.moments import Moments

MIN_SPLIT_SAMPLES = 2000  # fewer are not split: the marginal p(y) of a split would be too coarse


@dataclass(frozen=True)
class Features:
    """What metrics are computed from."""

    generated: Moments
    reference: Moments
    logits: Tensor  # [n, num_classes], of the generated images in global order
    splits: int  # of the score


class Estimate(NamedTuple):
    """The value of a metric and its standard deviation over splits, if it has splits."""

    value: float
    std: float | None = None


class Name(NamedTuple):
    """The first part of a metric's key ("fid/inception-v3-compat") and the title of its plot."""

    key: str
    title: str


@dataclass(frozen=True)
class Metric:
    """A function of features, and its names by kind of extractor."""

    compute: Callable[[Features], Estimate]
    name: Name
    published: Name  # with the Inception network, as papers call it

    def name_for(self, extractor: Extractor) -> Name:
        return self.published if extractor.is_published else self.name


def frechet_distance(generated: Moments, reference: Moments) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (Heusel et al. 2017, eq. 6).

    Raises ValueError below two samples on either side.
    """
    statistics = [
        {"mu": m.mean.cpu().numpy(), "sigma": m.covariance.cpu().numpy()}
        for m in (generated, reference)
    ]
    return float(fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID])


def num_splits(num_samples: int, splits: int) -> int:
    """Splits of the score of `num_samples` images: 1 below `MIN_SPLIT_SAMPLES`."""
    return splits if num_samples >= MIN_SPLIT_SAMPLES else 1


def classifier_score(logits: Tensor, splits: int) -> Estimate:
    """exp(E_x KL(p(y|x) || p(y))) (Salimans et al. 2016, section 4), mean and std over splits.

    `logits` [n, num_classes] are in global order.
    """
    result = isc_features_to_metric(logits.cpu(), splits=num_splits(len(logits), splits))
    return Estimate(result[KEY_METRIC_ISC_MEAN], result[KEY_METRIC_ISC_STD])


RANKING = "frechet_distance"  # the snapshot with its lowest value is the best one

METRICS: dict[str, Metric] = {
    RANKING: Metric(
        lambda f: Estimate(frechet_distance(f.generated, f.reference)),
        Name("fd", "Frechet distance"),
        Name("fid", "FID"),
    ),
    "classifier_score": Metric(
        lambda f: classifier_score(f.logits, f.splits),
        Name("cs", "Classifier score"),
        Name("is", "Inception score"),
    ),
}


def metric_key(metric: str, extractor: Extractor, sampler: str | None = None) -> str:
    """Key of a metric in records and logs: "fd/digits8-cnn-v1".

    `sampler`: None for the first sampler of the objective; others are named in the key.
    """
    key = f"{METRICS[metric].name_for(extractor).key}/{extractor.name}"
    return key if sampler is None else f"{key}/{sampler}"


def titles(extractor: Extractor, sampler: str | None = None) -> dict[str, str]:
    """Key -> title of all metrics, in the order of `METRICS`."""
    return {
        metric_key(name, extractor, sampler): metric.name_for(extractor).title
        for name, metric in METRICS.items()
    }


def compute(
    features: Features, extractor: Extractor, sampler: str | None = None
) -> dict[str, Estimate]:
    """All metrics by key."""
    return {metric_key(n, extractor, sampler): m.compute(features) for n, m in METRICS.items()}


class Rows:
    """Rows [num, width] in global order; each rank fills in some, `gather` joins them."""

    def __init__(self, num: int, width: int, device: torch.device | str = "cpu") -> None:
        self._values = torch.zeros(num, width, device=device)
        self._filled = torch.zeros(num, dtype=torch.int32, device=device)

    def fill(self, start: int, rows: Tensor) -> None:
        """Set positions start ... start + m to rows [m, width]."""
        self._values[start : start + len(rows)] = rows
        self._filled[start : start + len(rows)] += 1

    def gather(self, world: World) -> Tensor:
        """All rows, on every rank. Raises RuntimeError unless each was filled exactly once."""
        if world.size > 1:
            dist.all_reduce(self._values)  # exact: a row is zero on all ranks but one
            dist.all_reduce(self._filled)
        wrong = int((self._filled != 1).sum())
        if wrong:
            raise RuntimeError(f"{wrong} of {len(self._filled)} samples are missing or duplicated")
        return self._values
