"""`bigan bench scaling`: a recipe on several processes of this machine, and on more by prediction.

Weak scaling gives every process the same number of images (`train.micro_batch`, or the whole batch
if it is not set); strong scaling divides `train.batch`. Efficiency is images/s over as many times
those of one process.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from bigan import config as configs
from bigan.bench import prediction
from bigan.bench.measuring import hardware, summary
from bigan.bench.prediction import Mode, Network, Prediction, Workload
from bigan.bench.turns import Processes
from bigan.bench.workload import (
    Assumed,
    Turns,
    assumed_workload,
    device_batch,
    engine_name,
    measured_workload,
    middle,
)
from bigan.engine import Echo
from bigan.errors import UserError
from bigan.objectives.growth import grown
from bigan.run.streams import check_data
from bigan.run_config import RunConfig, accumulation_steps


@dataclass(frozen=True)
class Options:
    """What to measure, and what to assume for more devices than are at hand."""

    ranks: tuple[int, ...] = (1, 2)
    modes: tuple[Mode, ...] = ("weak", "strong")
    runs: int = 5
    run_seconds: float = 1.0
    synthetic: bool = False
    assumed: Assumed = field(default_factory=Assumed)


@dataclass(frozen=True)
class Point:
    """One measured setting; `batch` images per optimiser step over all `ranks`."""

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
    """Where `mode` puts `ranks` processes; raises `ConfigError` if the batch cannot be divided."""
    train = config.train
    if mode == "weak":
        return Point(ranks, device_batch(config) * ranks, train.micro_batch)
    share = max(1, train.batch // ranks)
    micro = None if train.micro_batch is None else min(train.micro_batch, share)
    found = Point(ranks, train.batch, micro)
    accumulation_steps(found.config(config, Path()).train, ranks)
    return found


def halved(point: Point) -> Point | None:
    """Half the images: two points on a line say what a step costs whatever the batch."""
    if point.batch % 2:
        return None
    half = point.batch // 2
    return replace(
        point, batch=half, micro_batch=point.micro_batch and min(point.micro_batch, half)
    )


def bench_scaling(
    path: Path, overrides: Sequence[str], options: Options, echo: Echo
) -> dict[str, Any]:
    """Measure, unless told the rate of a device, and predict; returns a JSON-ready record.

    Raises `UserError` for an unusable recipe or options, `RunError` if a process fails.
    """
    config = grown(configs.load(RunConfig, path, overrides))
    record: dict[str, Any] = {
        "benchmark": "scaling",
        "config": str(path),
        "overrides": list(overrides),
        "environment": hardware(),
        "engine": engine_name(config),
    }
    if options.assumed.device_images_per_second is None:
        measured, workload = measure(config, options, echo)
        record |= measured
    else:
        workload = assumed_workload(config, options.assumed)
        record |= {"notes": ["nothing was measured: images/s of one device as given"]}
    return record | {"prediction": predicted(workload, options)}


def predicted(workload: Workload, options: Options) -> dict[str, Any]:
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
        "verdict": prediction.verdict(rows),
    }


def measure(config: RunConfig, options: Options, echo: Echo) -> tuple[dict[str, Any], Workload]:
    """(the measured part of the record, what it says about one device)."""
    ranks = sorted({1, *options.ranks})
    check(config, options, ranks)
    placed = {(mode, n): point(config, mode, n) for mode in options.modes for n in ranks}
    single = placed[options.modes[0], 1]
    half = halved(single)
    distinct = list(dict.fromkeys([*placed.values(), *([half] if half else [])]))
    threads = max(1, (os.cpu_count() or 1) // ranks[-1])
    turns = take_turns(config, distinct, threads, options, echo)
    workload = measured_workload(
        config, middle(turns[single]), middle(turns[half]) if half else None, options.assumed
    )
    points = []
    for (mode, n), place in placed.items():
        base = rates(config, placed[mode, 1], turns)
        row = describe(config, place, turns[place], workload) | {"mode": mode}
        row["efficiency"] = row["images_per_second"]["median"] / n / statistics.median(base)
        points.append(row | prediction_errors(workload, mode, row))
    record = {
        "runs": options.runs,
        "threads_per_process": threads,
        "images": "synthetic, in memory" if options.synthetic else str(config.data.path),
        "notes": notes(ranks[-1], threads),
        "points": points,
    }
    return record, workload


def check(config: RunConfig, options: Options, ranks: Sequence[int]) -> None:
    """Raise `UserError` for what cannot be measured here."""
    if options.runs < 5:
        raise UserError(f"--runs {options.runs}: fewer than 5 runs say nothing about the spread")
    devices = torch.cuda.device_count()
    if devices and ranks[-1] > devices:
        raise UserError(
            f"--ranks {ranks[-1]}: this machine has {devices} GPU(s); measure up to {devices}, the "
            "prediction goes on from there"
        )
    if config.engine == "single" and ranks[-1] > 1:
        raise UserError("engine = single cannot use several processes; try --engine ddp")
    if not options.synthetic:
        check_data(config)


def notes(ranks: int, threads: int) -> list[str]:
    """What a reader must know before believing an efficiency."""
    if torch.cuda.is_available():
        return []
    cores = os.cpu_count() or 1
    said = [
        f"processes of {threads} thread(s) on one machine without a GPU share its memory and "
        "caches: efficiencies are not those of a cluster"
    ]
    if ranks > cores:
        said.append(f"{ranks} processes share {cores} core(s): they cannot be faster than {cores}")
    return said


def take_turns(
    config: RunConfig, points: Sequence[Point], threads: int, options: Options, echo: Echo
) -> dict[Point, Turns]:
    """Start all points, then measure them in rotation."""
    found: dict[Point, list[list[dict[str, Any]]]] = {place: [] for place in points}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        started = {}
        for index, place in enumerate(points):
            own = place.config(config, Path(folder) / str(index))
            task = {
                "config": configs.dump(own),
                "engine": own.engine,
                "synthetic": options.synthetic,
                "seconds": options.run_seconds,
            }
            name = f"{place.ranks} process(es), batch {place.batch}"
            started[place] = Processes(name, task, place.ranks, threads)
            stack.enter_context(started[place])
            answer = started[place].answers()[0]
            echo(f"{name}: ready ({answer['engine']}, {answer['steps_per_run']} steps per run)")
        for run in range(options.runs):
            for place, processes in started.items():
                found[place].append(processes.turn())
            echo(f"run {run + 1} of {options.runs}")
    return dict(found)


def rates(config: RunConfig, place: Point, turns: Mapping[Point, Turns]) -> list[float]:
    """images/s at each turn; the slowest process counts."""
    images = place.batch * config.train.num_d_steps
    return [images / max(rank["plain"]["step"] for rank in ranks) for ranks in turns[place]]


def breakdown(
    measured: Mapping[str, Any], save_seconds: float, exchange: Mapping[str, float]
) -> dict[str, float]:
    """Seconds of a training step by what they are spent on; they add up to the step with its save.

    `measured`: a turn's answer. `save_seconds`: per step. `exchange`: seconds per phase of
    collectives that could not be left out. Differences of two noisy times may come out below 0.
    """
    full = measured["full"]
    without_penalties = measured.get("without_penalties", full)["phases"]
    alone = measured.get("without_exchange", full)["phases"]
    communication = {
        name: seconds - alone[name] + exchange.get(name, 0.0)
        for name, seconds in full["phases"].items()
    }
    penalty = full["phases"]["d"] - without_penalties["d"]
    found = {
        "data": full["data"],
        "d": full["phases"]["d"] - penalty - communication["d"],
        "g": full["phases"]["g"] - communication["g"],
        "penalty": penalty,
        "communication": sum(communication.values()),
        "waiting": full["waiting"],
        "save": save_seconds,
    }
    return found | {"other": full["step"] + save_seconds - sum(found.values())}


def describe(config: RunConfig, place: Point, turns: Turns, workload: Workload) -> dict[str, Any]:
    """One point of the record."""
    figures = middle(turns)
    images = place.batch * config.train.num_d_steps
    save = figures["save"] * images / config.train.checkpoint_images
    exchange: dict[str, float] = {}
    network = measured_network(place.ranks, figures)
    if network and workload.engine != "ddp":
        each = place.batch / place.ranks
        exchange = {
            name: phase.times
            * prediction.exchange_seconds(workload, phase, each, place.ranks, network)
            for name, phase in zip(("d", "g"), workload.phases, strict=True)
        }
    seconds = breakdown(figures, save, exchange)
    total = sum(seconds.values())
    own = _own_seconds(figures.get("without_exchange"))
    step = statistics.median(max(r["plain"]["step"] for r in ranks) for ranks in turns)
    return {
        **asdict(place),
        "images_per_second": summary(rates(config, place, {place: turns})),
        "step_seconds": step,
        "shares": {name: value / total for name, value in seconds.items()},
        "communication_measured": "by its bytes" if exchange else "by leaving it out",
        "save_stall_seconds": figures["save"],
        "spread": figures["full"]["spread"],
        "network": asdict(network) if network else None,
        # Everything but exchanging: what the same step would take with an endless network.
        "step_seconds_without_exchange": own and own - sum(exchange.values()),
    }


def _own_seconds(variant: Mapping[str, Any] | None) -> float | None:
    return None if variant is None else variant["step"] - variant["waiting"] - variant["data"]


def measured_network(ranks: int, figures: Mapping[str, Any]) -> Network | None:
    """The machine's own: one node."""
    if ranks == 1:
        return None
    latency = figures["latency_us"] / prediction.latency_seconds(ranks, Network(latency_us=1e6))
    return Network(
        node_gb_per_second=figures["bus_gb_per_second"], ranks_per_node=ranks, latency_us=latency
    )


def prediction_errors(workload: Workload, mode: Mode, row: Mapping[str, Any]) -> dict[str, Any]:
    """Predicted over measured step time, less 1; once more given the measured compute.

    The second judges the model of the network alone: on one machine processes slow each other
    down, which the first takes for an error.
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
