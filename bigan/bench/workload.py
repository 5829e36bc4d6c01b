"""A config as input of the prediction: from measured runs, or from the rate of one device."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from bigan.bench.prediction import Network, PhaseWork, Workload
from bigan.layers.batchnorm import normalization_layers
from bigan.objectives.base import Objective, Phase
from bigan.run.trainable import is_trainable
from bigan.run_config import RunConfig, setup_of

EAGER_DDP_OVERLAP = 0.4  # of a phase's time: most of its backward, and not the first bucket
ASSUMED_SPREAD = 0.01
ASSUMED_FIXED_MS = 10.0  # per training step: optimizers, power iterations, EMAs, kernel launches

Runs = Sequence[Sequence[Mapping[str, Any]]]  # results of each rank in each timed run


@dataclass(frozen=True)
class Assumed:
    """Inputs of the prediction; None: as measured, or the constants above."""

    network: Network = field(default_factory=Network)
    overlap: float | None = None
    spread: float | None = None
    fixed_ms: float | None = None
    device_images_per_second: float | None = None  # with it, nothing is measured


def engine_name(config: RunConfig) -> str:
    """Engine of several processes started by `torchrun`."""
    return "ddp" if config.engine == "auto" else config.engine


def device_batch(config: RunConfig) -> int:
    """Images per process and optimizer step in weak scaling."""
    return config.train.micro_batch or config.train.batch


def median_of_means(runs: Runs) -> dict[str, Any]:
    """Of every number: the median over the runs of the mean over the ranks."""
    return _median_of_means([[dict(rank) for rank in ranks] for ranks in runs])


def _median_of_means(runs: list[list[Any]]) -> Any:
    first = runs[0][0]
    if isinstance(first, Mapping):
        return {key: _median_of_means([[r[key] for r in ranks] for ranks in runs]) for key in first}
    return statistics.median(statistics.mean(ranks) for ranks in runs)


def measured_workload(
    config: RunConfig,
    results: Mapping[str, Any],
    at_half: Mapping[str, Any] | None,
    assumed: Assumed,
) -> Workload:
    """One device: a line through its step times at a batch, `device_batch`, and at half of it."""
    step = results["plain"]["step"] - results["plain"]["data"]
    fixed = 0.0
    if at_half:
        half = at_half["plain"]["step"] - at_half["plain"]["data"]
        fixed = min(max(0.0, 2 * half - step), step)
    if assumed.fixed_ms is not None:
        fixed = min(assumed.fixed_ms / 1000, step)
    work = results["full"]["phases"]
    share = {name: seconds / sum(work.values()) for name, seconds in work.items()}
    # Lazy penalties make steps longer at regular intervals: that is not spread.
    steps = results.get("without_penalties", results["full"])
    spread = steps["spread"] if assumed.spread is None else assumed.spread
    per_image = {name: share[name] * (step - fixed) / device_batch(config) for name in work}
    return workload(config, per_image, fixed, spread, assumed)


def assumed_workload(config: RunConfig, assumed: Assumed) -> Workload:
    """One device of known rate: all optimizer steps are assumed to take the same time."""
    assert assumed.device_images_per_second is not None
    fixed = (ASSUMED_FIXED_MS if assumed.fixed_ms is None else assumed.fixed_ms) / 1000
    batch = device_batch(config)
    step = config.objective.images_per_step(batch) / assumed.device_images_per_second
    times = steps_per_training_step(config, _objective(config))
    each = max(step - fixed, 0.0) / batch / sum(times.values())
    spread = ASSUMED_SPREAD if assumed.spread is None else assumed.spread
    per_image = {name: num * each for name, num in times.items()}
    return workload(config, per_image, min(fixed, step), spread, assumed)


def _objective(config: RunConfig) -> Objective:
    return config.objective.build(setup_of(config, (1,) * config.model.num_classes))


def steps_per_training_step(config: RunConfig, objective: Objective) -> dict[str, float]:
    """Optimizer steps of each phase in a training step, as a mean over the objective's period."""
    starts = range(0, objective.period * config.images_per_step, config.images_per_step)
    num = Counter(step.phase for start in starts for step in objective.steps(start))
    return {name: num[name] / objective.period for name in objective.phases}


def workload(
    config: RunConfig,
    seconds_per_image: Mapping[str, float],
    fixed_seconds: float,
    spread: float,
    assumed: Assumed,
) -> Workload:
    """Input of the prediction; `seconds_per_image`: of a training step, by phase."""
    objective = _objective(config)
    phases, times = objective.phases, steps_per_training_step(config, objective)
    num_bytes = {name: _trained_bytes(config, phase) for name, phase in phases.items()}
    owners = {network: name for name, phase in phases.items() for network in phase.trains}
    engine = engine_name(config)
    overlap = EAGER_DDP_OVERLAP if engine == "ddp" and config.compile == "eager" else 0.0
    return Workload(
        phases={
            name: PhaseWork(
                seconds_per_image=seconds_per_image[name] / times[name],
                parameter_bytes=num_bytes[name],
                batchnorm_collectives=(
                    batchnorm_collectives(objective, phase)
                    if config.train.batchnorm == "global"
                    else 0
                ),
                times=times[name],
                read_bytes=sum(num_bytes[o] for o in {owners.get(n) for n in phase.reads} if o),
                gathers=2 if phase.after_step_uses_networks else 1,
            )
            for name, phase in phases.items()
        },
        batch=config.train.batch,
        device_batch=device_batch(config),
        micro_batch=device_batch(config),
        batches=config.images_per_step // config.train.batch,
        averaged_bytes=sum(num_bytes[owners[name]] for name in objective.averaged),
        engine=engine,
        fixed_seconds=fixed_seconds,
        spread=spread,
        overlap=overlap if assumed.overlap is None else assumed.overlap,
    )


def batchnorm_collectives(objective: Objective, phase: Phase) -> int:
    """Collectives of shared batch statistics per micro-batch.

    Each layer has one in its forward and one in its backward. Networks that the phase reads are
    counted with the forward only.
    """
    read = [objective.networks[name] for name in phase.reads if name in objective.networks]
    num_read, num_trained = (sum(map(_num_layers, group)) for group in (read, phase.children()))
    return num_read + 2 * num_trained


def _num_layers(network: nn.Module) -> int:
    return len(normalization_layers(network))


def _trained_bytes(config: RunConfig, phase: Phase) -> int:
    return 4 * sum(
        parameter.numel()
        for name, parameter in phase.named_parameters()
        if is_trainable(config.trainable, name)
    )
