"""A recipe as the prediction sees it: from measured turns, or from the rate of a device."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bigan import models
from bigan.bench.prediction import Network, PhaseWork, Workload
from bigan.layers.batchnorm import normalisation_layers
from bigan.objectives import gan
from bigan.run_config import RunConfig

EAGER_DDP_OVERLAP = 0.4  # of a phase's time: most of its backward, and not the first bucket
ASSUMED_SPREAD = 0.01
ASSUMED_FIXED_MS = 10.0  # per training step: Adam, power iterations, the average, launches

Turns = Sequence[Sequence[Mapping[str, Any]]]  # what each rank answered at each turn


@dataclass(frozen=True)
class Assumed:
    """What the prediction is told; None: as measured, or the constants above."""

    network: Network = field(default_factory=Network)
    overlap: float | None = None
    spread: float | None = None
    fixed_ms: float | None = None
    device_images_per_second: float | None = None  # then nothing is measured


def engine_name(config: RunConfig) -> str:
    """What several processes of `torchrun` would train with."""
    return "ddp" if config.engine == "auto" else config.engine


def device_batch(config: RunConfig) -> int:
    """Images per process and optimiser step in weak scaling."""
    return config.train.micro_batch or config.train.batch


def middle(turns: Turns) -> dict[str, Any]:
    """The median over the turns of the mean over the ranks, of every figure."""
    return _middle([[dict(rank) for rank in ranks] for ranks in turns])


def _middle(turns: list[list[Any]]) -> Any:
    first = turns[0][0]
    if isinstance(first, Mapping):
        return {key: _middle([[r[key] for r in ranks] for ranks in turns]) for key in first}
    return statistics.median(statistics.mean(ranks) for ranks in turns)


def measured_workload(
    config: RunConfig,
    figures: Mapping[str, Any],
    at_half: Mapping[str, Any] | None,
    told: Assumed,
) -> Workload:
    """One device: a line through its step times at a batch, `device_batch`, and at half of it."""
    step = figures["plain"]["step"] - figures["plain"]["data"]
    fixed = 0.0
    if at_half:
        half = at_half["plain"]["step"] - at_half["plain"]["data"]
        fixed = min(max(0.0, 2 * half - step), step)
    if told.fixed_ms is not None:
        fixed = min(told.fixed_ms / 1000, step)
    work = figures["full"]["phases"]
    share = {name: seconds / sum(work.values()) for name, seconds in work.items()}
    steps = figures.get("without_penalties", figures["full"])  # lazy penalties are no noise
    spread = steps["spread"] if told.spread is None else told.spread
    per_image = {name: share[name] * (step - fixed) / device_batch(config) for name in work}
    return workload(config, per_image, fixed, spread, told)


def assumed_workload(config: RunConfig, told: Assumed) -> Workload:
    """One device of which the rate is known: all optimiser steps are taken to cost the same."""
    assert told.device_images_per_second is not None
    fixed = (ASSUMED_FIXED_MS if told.fixed_ms is None else told.fixed_ms) / 1000
    batch, num_d = device_batch(config), config.train.num_d_steps
    step = batch * num_d / told.device_images_per_second
    each = max(step - fixed, 0.0) / batch / (num_d + 1)
    spread = ASSUMED_SPREAD if told.spread is None else told.spread
    return workload(config, {"d": num_d * each, "g": each}, min(fixed, step), spread, told)


def workload(
    config: RunConfig,
    seconds_per_image: Mapping[str, float],
    fixed_seconds: float,
    spread: float,
    told: Assumed,
) -> Workload:
    """The recipe as the prediction sees it; `seconds_per_image`: of a training step, per phase."""
    networks = dict(zip(("g", "d"), models.build(config.model, "meta"), strict=True))
    layers = {name: len(normalisation_layers(network)) for name, network in networks.items()}
    # A forward shares each layer's statistics once, a backward once more. The discriminator's
    # phase runs the generator forward only; the generator's runs both both ways.
    collectives = {
        "d": layers["g"] + 2 * layers["d"],
        "g": 2 * layers["g"] + 2 * layers["d"],
    }
    engine = engine_name(config)
    overlap = EAGER_DDP_OVERLAP if engine == "ddp" and config.compile == "eager" else 0.0
    order = gan.order(config)
    return Workload(
        phases=tuple(
            PhaseWork(
                seconds_per_image=seconds_per_image[name] / order.count(name),
                parameter_bytes=4 * sum(p.numel() for p in networks[name].parameters()),
                batchnorm_collectives=collectives[name],
                times=order.count(name),
            )
            for name in dict.fromkeys(order)
        ),
        batch=config.train.batch,
        device_batch=device_batch(config),
        micro_batch=device_batch(config),
        engine=engine,
        fixed_seconds=fixed_seconds,
        spread=spread,
        overlap=overlap if told.overlap is None else told.overlap,
    )
