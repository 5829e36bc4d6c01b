"""Measures the snapshots of a run as they appear and logs the metrics.

    <run_dir>/evaluation/<images_seen>.json   the record of a snapshot (records.py)
    <run_dir>/metrics.jsonl, MLflow           the metrics as `eval/<metric>/<extractor>`

A separate job on any number of ranks; it shares only the run folder with the trainer. Snapshots
that have a record under the requested protocol are skipped, so the same command again continues,
and another protocol measures all snapshots again.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bigan.checkpoint import snapshots
from bigan.distributed.world import World, on_rank_0
from bigan.errors import UserError, writing
from bigan.evaluation.evaluator import Evaluator
from bigan.evaluation.records import Record, Records, Task
from bigan.evaluation.silence import Silence, suggestion
from bigan.reporting.plots import curves
from bigan.reporting.tracker import Tracker, read_metrics
from bigan.run_config import RunConfig, load_config
from bigan.run_folder import RunFolder

Echo = Callable[[str], None]


def evaluate(
    run_dir: Path,
    world: World,
    *,
    overrides: Sequence[str] = (),
    watch: bool,
    timeout_seconds: float | None = None,
    until: Path | None = None,
    device: torch.device | str | None = None,
    poll_seconds: float = 2.0,
    echo: Echo,
) -> dict[int, dict[str, float]]:
    """Measure every complete snapshot of `run_dir` that is not yet measured, oldest first.

    All ranks call it. With `watch` it waits for the run folder and for new snapshots, and returns
    once `DONE` or the file `until` exists and every snapshot is measured. While the run folder does
    not change, a line reports it at growing intervals. `echo` prints one line per snapshot, on
    rank 0. `device` defaults to that of `world`. `overrides` ("a.b=value") change the config of the
    run for this evaluation. Returns images_seen -> metrics of all snapshots, on every rank.

    Raises `UserError`: no run folder or no snapshot (without `watch`), missing or wrong extractor
    weights, data that is missing, damaged or does not match the model, a full disk. `RunError`:
    the folder has not changed for `timeout_seconds` of waiting.
    """
    run_dir = Path(run_dir)
    silence = Silence(run_dir, timeout_seconds, echo, until) if watch else None
    config = (
        wait_for_config(run_dir, overrides, world, silence, poll_seconds, echo)
        if silence
        else read_config(run_dir, overrides, world)
    )
    if config is None:
        return {}
    truncation = config.evaluation.truncation
    evaluator = Evaluator(run_dir, config, world, torch.device(device or world.device))
    records = Records(run_dir, evaluator.folder, evaluator.protocol(truncation))
    tracker = Tracker(run_dir, config.tracking, role="evaluation") if world.is_rank_0 else None
    try:
        measured = on_rank_0(world, records.measured)
        if world.is_rank_0:
            for text in (
                *evaluator.remarks(truncation),
                *(summary(found) for _, found in measured),
            ):
                echo(text)
        num_measured = measure_all(evaluator, records, tracker, silence, poll_seconds, echo)
        if world.is_rank_0 and not num_measured:
            echo(f"{run_dir}: every snapshot is already evaluated under this protocol")
        measured = on_rank_0(world, records.measured)
    finally:
        note = tracker.close(None) if tracker is not None else None
        if note:
            echo(note)
    return {task.images_seen: dict(found["metrics"]) for task, found in measured}


def measure_all(
    evaluator: Evaluator,
    records: Records,
    tracker: Tracker | None,
    silence: Silence | None,
    poll_seconds: float,
    echo: Echo,
) -> int:
    """Measure and publish what has no record, with `silence` until the run ends; a collective.

    Returns the number of measurements.
    """
    world, truncation = evaluator.world, evaluator.config.evaluation.truncation
    num_measured, waiting = 0, False
    while True:
        task, finished = on_rank_0(world, functools.partial(next_task, records, silence))
        if task is None:
            if finished or silence is None:
                return num_measured
            if world.is_rank_0 and not waiting:
                echo(f"waiting for snapshots of {records.run_dir}")
            waiting = True
            time.sleep(poll_seconds)
            continue
        record = evaluator.measure_unless_replaced(task, truncation)
        if record is not None:
            num_measured += 1
            on_rank_0(world, functools.partial(publish, record, records, tracker, echo))


def publish(record: Record, records: Records, tracker: Tracker | None, echo: Echo) -> None:
    """On rank 0: print, log and draw a record, then write it, which marks it as measured.

    Raises `UserError` on a full disk; the snapshot is then measured again.
    """
    echo(summary(record.as_dict()))
    run_dir = records.run_dir
    if tracker is not None:
        logged = {f"eval/{key}": value for key, value in record.values.items()}
        log_once(tracker, run_dir, record.images_seen, logged)
    with writing(RunFolder(run_dir).curves):
        curves(run_dir, RunFolder(run_dir).curves)
    records.write(record)
    if tracker is not None:
        tracker.pictures_changed()


def log_once(
    tracker: Tracker, run_dir: Path, images_seen: int, values: Mapping[str, float]
) -> None:
    """Append metrics to the metrics log, unless an evaluation that was cut off has done so."""
    wanted = {"images_seen": images_seen, **values}
    if any(wanted.items() <= found.items() for found in read_metrics(run_dir)):
        return
    with writing(RunFolder(run_dir).metrics):
        tracker.append(images_seen, values)


def next_task(records: Records, silence: Silence | None) -> tuple[Task | None, bool]:
    """As `Records.next_task`; raises `RunError` if a watched run has been silent for too long."""
    ended = silence is not None and silence.has_ended()
    task, finished = records.next_task()
    finished = finished or ended
    if silence is not None and task is None and not finished:
        silence.check()
    return task, finished


def read_config(run_dir: Path, overrides: Sequence[str], world: World) -> RunConfig:
    """The config of a run that has a snapshot, on every rank; else `UserError`."""
    path = RunFolder(run_dir).config

    def read() -> RunConfig:
        if path.is_file() and snapshots.find(run_dir):
            return load_config(path, overrides)
        hint = suggestion(run_dir)
        if not run_dir.is_dir():
            raise UserError(
                f"{run_dir}: no such run folder; give the run_dir of a training run{hint}"
            )
        if not path.is_file():
            raise UserError(
                f"{run_dir}: not a run folder, or its run has not started (no config.yaml in it)"
                f"{hint}"
            )
        raise UserError(
            f"{run_dir}: has no complete snapshot yet; train longer (train.snapshot_images is the "
            "interval between snapshots), or wait for one with --watch"
        )

    return on_rank_0(world, read)


def wait_for_config(
    run_dir: Path,
    overrides: Sequence[str],
    world: World,
    silence: Silence,
    poll_seconds: float,
    echo: Echo,
) -> RunConfig | None:
    """The config of the run once there is one, on every rank; None if the watch ends before."""
    path = RunFolder(run_dir).config

    def look() -> tuple[RunConfig | None, bool]:
        ended = silence.has_ended()
        if path.is_file():
            return load_config(path, overrides), True
        if not ended:
            silence.check()
        return None, ended

    waiting = False
    while True:
        config, ended = on_rank_0(world, look)
        if world.is_rank_0 and ended and config is None:
            echo(f"{run_dir}: the training has ended before it wrote {path.name}")
        if ended:
            return config
        if world.is_rank_0 and not waiting:
            echo(f"waiting for {path}: the run has not started{suggestion(run_dir)}")
        waiting = True
        time.sleep(poll_seconds)


def summary(content: Mapping[str, Any]) -> str:
    """The content of a record in one line."""
    protocol = content["protocol"]
    metrics = "  ".join(f"{key} {value:.3f}" for key, value in content["metrics"].items())
    truncated = f"truncation {protocol['truncation']:g}, " if protocol["truncation"] else ""
    return (
        f"images_seen {content['images_seen']}  {metrics}  "
        f"({protocol['num_samples']} samples, {truncated}{content['seconds']:.1f} s)"
    )
