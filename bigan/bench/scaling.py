"""`bigan bench scaling`: a config on several processes of this machine, and predicted on more.

Weak scaling gives every process the same number of images (`train.micro_batch`, or the complete
batch if it is not set); strong scaling divides `train.batch`. Efficiency is the rate of n processes
over n times the rate of one.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from bigan import config as configs
from bigan.bench import prediction
from bigan.bench.measuring import environment, summary
from bigan.bench.prediction import Mode, Network, Prediction, Workload
from bigan.bench.processes import Processes
from bigan.bench.step import require_runs
from bigan.bench.workload import (
    Assumed,
    Runs,
    assumed_workload,
    device_batch,
    engine_name,
    measured_workload,
    median_of_means,
)
from bigan.engine import Echo
from bigan.errors import UserError
from bigan.run.stages import final_config
from bigan.run.streams import check_data
from bigan.run_config import RunConfig, accumulation_steps, load_config
from bigan.urls import redacted, redacted_text
from bigan.versions import num_cpus

EMA = "averages"  # gathering of sharded weights for the EMAs, beside the exchanges of the phases


@dataclass(frozen=True)
class Options:
    """What to measure, and what to assume for more devices than this machine has."""

    ranks: tuple[int, ...] = (1, 2)
    modes: tuple[Mode, ...] = ("weak", "strong")
    runs: int = 5
    run_seconds: float = 1.0
    synthetic: bool = False
    assumed: Assumed = field(default_factory=Assumed)


@dataclass(frozen=True)
class Point:
    """One measured setting; `batch` images per optimizer step over all `ranks`."""

    ranks: int
    batch: int
    micro_batch: int | None

    def config(self, config: RunConfig, run_dir: Path) -> RunConfig:
        train = config.train.model_copy(
            update={"batch": self.batch, "micro_batch": self.micro_batch}
        )
        plain = self.ranks == 1 and config.engine in ("auto", "ddp")
        update = {"train": train, "run_dir": run_dir}
        return config.model_copy(update=update | ({"engine": "single"} if plain else {}))


def point(config: RunConfig, mode: Mode, ranks: int) -> Point:
    """The point of `ranks` processes; raises `ConfigError` if the batch cannot be divided."""
    train = config.train
    if mode == "weak":
        return Point(ranks, device_batch(config) * ranks, train.micro_batch)
    share = max(1, train.batch // ranks)
    micro = None if train.micro_batch is None else min(train.micro_batch, share)
    found = Point(ranks, train.batch, micro)
    accumulation_steps(found.config(config, Path()).train, ranks)
    return found


def halved(point: Point) -> Point | None:
    """Half the images: a line through two batches gives the fixed time of a step."""
    if point.batch % 2:
        return None
    half = point.batch // 2
    return replace(
        point, batch=half, micro_batch=point.micro_batch and min(point.micro_batch, half)
    )


def bench_scaling(
    path: Path, overrides: Sequence[str], options: Options, echo: Echo
) -> dict[str, Any]:
    """Measure, unless the rate of a device is given, and predict; returns a JSON-ready record.

    Raises `UserError` for an unusable config or options, `RunError` if a process fails.
    """
    config = final_config(load_config(path, overrides))
    record: dict[str, Any] = {
        "benchmark": "scaling",
        "config": str(path),
        "overrides": [redacted_text(override) for override in overrides],
        "environment": environment(),
        "engine": engine_name(config),
    }
    if options.assumed.device_images_per_second is None:
        measured, workload = measure(config, options, echo)
        record |= measured
    else:
        workload = assumed_workload(config, options.assumed)
        record |= {"notes": ["nothing was measured: the rate of one device was given"]}
    return record | {"prediction": predicted(workload, options)}


def predicted(workload: Workload, options: Options) -> dict[str, Any]:
    """The prediction as part of the record."""
    network = options.assumed.network
    rows = prediction.sensitivity(workload, network, options.modes)
    points: list[Prediction] = [
        prediction.predict(workload, mode, ranks, network)
        for mode in options.modes
        for ranks in prediction.predictable(workload, mode, prediction.RANKS)
    ]
    return {
        "workload": asdict(workload),
        "network": asdict(network),
        "points": [asdict(p) | {"step_seconds": p.step_seconds} for p in points],
        "sensitivity": rows,
        "most_sensitive": prediction.most_sensitive(rows),
    }


def measure(config: RunConfig, options: Options, echo: Echo) -> tuple[dict[str, Any], Workload]:
    """(the measured part of the record, the workload of one device)."""
    ranks = sorted({1, *options.ranks})
    check(config, options, ranks)
    placed = {(mode, n): point(config, mode, n) for mode in options.modes for n in ranks}
    single = placed[options.modes[0], 1]
    half = halved(single)
    distinct = list(dict.fromkeys([*placed.values(), *([half] if half else [])]))
    threads = max(1, num_cpus() // ranks[-1])
    runs = measure_points(config, distinct, threads, options, echo)
    workload = measured_workload(
        config,
        median_of_means(runs[single]),
        median_of_means(runs[half]) if half else None,
        options.assumed,
    )
    points = []
    for (mode, n), place in placed.items():
        base = rates(config, placed[mode, 1], runs[placed[mode, 1]])
        row = describe(config, place, runs[place], workload) | {"mode": mode}
        row["efficiency"] = row["images_per_second"]["median"] / n / statistics.median(base)
        points.append(row | prediction_errors(workload, mode, row))
    record = {
        "runs": options.runs,
        "threads_per_process": threads,
        "images": "synthetic, in memory" if options.synthetic else image_paths(config),
        "notes": notes(ranks[-1], threads),
        "points": points,
    }
    return record, workload


def image_paths(config: RunConfig) -> str:
    """Paths of the data streams, for people."""
    return ", ".join(redacted(data.path) for data in config.streams.values())


def check(config: RunConfig, options: Options, ranks: Sequence[int]) -> None:
    """Raises `UserError` for what cannot be measured on this machine."""
    require_runs(options.runs)
    devices = torch.cuda.device_count()
    if devices and ranks[-1] > devices:
        raise UserError(
            f"--ranks {ranks[-1]}: this machine has {devices} GPU(s); measure at most {devices}, "
            "the prediction covers more"
        )
    if config.engine == "single" and ranks[-1] > 1:
        raise UserError("engine = single is limited to one process; use --engine ddp")
    if not options.synthetic:
        check_data(config)


def notes(ranks: int, threads: int) -> list[str]:
    """Limits of the measured efficiencies."""
    if torch.cuda.is_available():
        return []
    cores = num_cpus()
    found = [
        f"processes of {threads} thread(s) on one machine without a GPU share its memory and "
        "caches: efficiencies are not those of a cluster"
    ]
    if ranks > cores:
        found.append(f"{ranks} processes share {cores} core(s): the speedup is at most {cores}")
    return found


def measure_points(
    config: RunConfig, points: Sequence[Point], threads: int, options: Options, echo: Echo
) -> dict[Point, Runs]:
    """Start all points, then measure them in rotation."""
    found: dict[Point, list[list[dict[str, Any]]]] = {place: [] for place in points}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        started = {}
        for index, place in enumerate(points):
            own = place.config(config, Path(folder) / str(index))
            task = {
                "config": configs.dump(own, configs.CREDENTIALS),
                "engine": own.engine,
                "synthetic": options.synthetic,
                "seconds": options.run_seconds,
            }
            name = f"{place.ranks} process(es), batch {place.batch}"
            started[place] = Processes(name, task, place.ranks, threads)
            stack.enter_context(started[place])
            ready = started[place].responses()[0]
            echo(f"{name}: ready ({ready['engine']}, {ready['steps_per_run']} steps per run)")
        for run in range(options.runs):
            for place, processes in started.items():
                found[place].append(processes.measure())
            echo(f"run {run + 1} of {options.runs}")
    return dict(found)


def rates(config: RunConfig, place: Point, runs: Runs) -> list[float]:
    """images/s of each run, by its slowest process."""
    images = config.objective.images_per_step(place.batch)
    return [images / max(rank["plain"]["step"] for rank in ranks) for ranks in runs]


def breakdown(
    measured: Mapping[str, Any], save_seconds: float, exchange: Mapping[str, float]
) -> dict[str, float]:
    """Seconds of a training step by use: each phase, then everything else.

    They add up to the step and its share of a save. `measured`: the results of a run.
    `save_seconds`: per step. `exchange`: seconds of the collectives that could not be left out, by
    phase and `EMA`. Differences of two noisy times may be below 0.
    """
    full = measured["full"]["phases"]
    without_penalties = measured.get("without_penalties", measured["full"])["phases"]
    alone = measured.get("without_exchange", measured["full"])["phases"]
    penalty = {name: full[name] - without_penalties.get(name, 0.0) for name in full}
    left_out = {name: full[name] - alone[name] for name in full}
    found = {
        name: full[name] - penalty[name] - left_out[name] - exchange.get(name, 0.0) for name in full
    }
    found |= {
        "penalty": sum(penalty.values()),
        "data": measured["full"]["data"],
        "communication": sum(left_out.values()) + sum(exchange.values()),
        "waiting": measured["full"]["waiting"],
        "save": save_seconds,
    }
    return found | {"other": measured["full"]["step"] + save_seconds - sum(found.values())}


def exchange_seconds(place: Point, workload: Workload, network: Network) -> dict[str, float]:
    """Seconds per training step of the collectives of sharding engines, by phase and `EMA`."""
    images = place.batch / place.ranks
    phases = {
        name: phase.times
        * prediction.exchange_seconds(workload, phase, images, place.ranks, network)
        for name, phase in workload.phases.items()
    }
    return phases | {EMA: prediction.average_seconds(workload, place.ranks, network)}


def describe(config: RunConfig, place: Point, runs: Runs, workload: Workload) -> dict[str, Any]:
    """One point of the record."""
    results = median_of_means(runs)
    images = config.objective.images_per_step(place.batch)
    save = results["save"] * images / config.train.checkpoint_images
    network = measured_network(place.ranks, results)
    exchange: dict[str, float] = {}
    if network and workload.engine != "ddp":
        exchange = exchange_seconds(place, workload, network)
    seconds = breakdown(results, save, exchange)
    total = sum(seconds.values())
    own = _own_seconds(results.get("without_exchange"))
    step = statistics.median(max(r["plain"]["step"] for r in ranks) for ranks in runs)
    return {
        **asdict(place),
        "images_per_second": summary(rates(config, place, runs)),
        "step_seconds": step,
        "shares": {name: value / total for name, value in seconds.items()},
        "communication_measured": "by its bytes" if exchange else "by leaving it out",
        "save_stall_seconds": results["save"],
        "spread": results["full"]["spread"],
        "network": asdict(network) if network else None,
        # Everything but exchanging: the time of the same step on a network without limits.
        "step_seconds_without_exchange": own and own - sum(exchange.values()),
    }


def _own_seconds(variant: Mapping[str, Any] | None) -> float | None:
    return None if variant is None else variant["step"] - variant["waiting"] - variant["data"]


def measured_network(ranks: int, results: Mapping[str, Any]) -> Network | None:
    """The links within this machine, as one node."""
    if ranks == 1:
        return None
    latency = results["latency_us"] / prediction.latency_seconds(ranks, Network(latency_us=1e6))
    return Network(
        node_gb_per_second=results["bus_gb_per_second"], ranks_per_node=ranks, latency_us=latency
    )


def prediction_errors(workload: Workload, mode: Mode, row: Mapping[str, Any]) -> dict[str, Any]:
    """Predicted over measured step time, less 1; also with the measured compute time.

    The second is the error of the network model alone: on one machine processes slow each other
    down, which the first counts as an error.
    """
    if row["network"] is None:
        return {}
    network = Network(**row["network"])
    images = row["batch"] / row["ranks"]
    seconds = prediction.step_seconds(workload, images, row["ranks"], network)
    total, measured = sum(seconds.values()), row["step_seconds"]
    given = total - seconds["compute"] + row["step_seconds_without_exchange"]
    return {
        "predicted_step_seconds": total,
        "prediction_error": total / measured - 1,
        "prediction_error_given_compute": given / measured - 1,
    }
