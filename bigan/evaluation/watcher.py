"""Takes each new snapshot of a run, measures its generator and writes the numbers down.

    <run_dir>/evaluation/<images_seen>.json   metrics and the full protocol they were measured by
    <run_dir>/metrics.jsonl, MLflow           the metrics as `eval/...`, through `tracking`

A separate job on any number of ranks: it meets the trainer only in the run folder. A snapshot is
done when its json carries the fingerprint of the protocol asked for now, so the same command again
measures nothing twice and a changed protocol measures everything anew.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bigan import config as configs
from bigan.checkpoint import snapshots
from bigan.distributed.world import World, on_rank_0
from bigan.errors import UserError
from bigan.evaluation.judge import Judge, Record
from bigan.evaluation.ledger import Ledger, as_content
from bigan.reporting.plots import curves
from bigan.reporting.tracker import Tracker
from bigan.run_config import RunConfig


def evaluate(
    run_dir: Path,
    world: World,
    *,
    overrides: Sequence[str] = (),
    watch: bool,
    device: torch.device | str | None = None,
    poll_seconds: float = 2.0,
    echo: Callable[[str], None],
) -> None:
    """Measure every complete snapshot of `run_dir` not yet measured, oldest first.

    All ranks call it. With `watch` it waits for the run folder and for new snapshots, and returns
    once `DONE` is there and every snapshot is measured. `echo` gets one line per snapshot, on
    rank 0. `device` defaults to the world's. `overrides` ("a.b=value") change the run's own recipe
    for this evaluation.

    Raises `UserError`: no run folder or no snapshot (without `watch`), missing or wrong extractor
    weights, a data folder that is missing, damaged or does not fit the model.
    """
    run_dir = Path(run_dir)
    config = run_config(run_dir, overrides, world, watch, poll_seconds, echo)
    truncation = config.evaluation.truncation
    judge = Judge(run_dir, config, world, torch.device(device or world.device))
    ledger = Ledger(run_dir, judge.protocol(truncation))
    tracker = Tracker(run_dir, config.tracking, role="evaluation") if world.is_rank_0 else None
    try:
        for remark in judge.remarks(truncation):
            if world.is_rank_0:
                echo(remark)
        for _, content in on_rank_0(world, ledger.measured):  # for the reader who comes back
            if world.is_rank_0:
                echo(line(content))
        num_measured = 0
        while True:
            task, finished = on_rank_0(world, ledger.next_task)
            if task is None:
                if finished or not watch:
                    break
                time.sleep(poll_seconds)
                continue
            record = judge.measure_unless_replaced(task, truncation)
            if record is not None:
                num_measured += 1
                on_rank_0(world, functools.partial(publish, record, ledger, tracker, echo))
        if world.is_rank_0 and not num_measured:
            echo(f"{run_dir}: every snapshot is already evaluated under this protocol")
    finally:
        note = tracker.close(None) if tracker is not None else None
        if note:
            echo(note)


def publish(
    record: Record, ledger: Ledger, tracker: Tracker | None, echo: Callable[[str], None]
) -> None:
    """Rank 0: say it, log it, and last of all mark it as done."""
    echo(line(as_content(record)))
    if tracker is not None:
        logged = {f"eval/{key}": value for key, value in record.metrics.items()}
        tracker.log(record.images_seen, logged)
    ledger.write(record)
    curves(ledger.run_dir, ledger.run_dir / "curves.png")


def run_config(
    run_dir: Path,
    overrides: Sequence[str],
    world: World,
    watch: bool,
    poll_seconds: float,
    echo: Callable[[str], None],
) -> RunConfig:
    """The recipe of the run, waited for if `watch`: its config.yaml."""
    path = run_dir / "config.yaml"

    def look() -> RunConfig | None:
        if path.is_file() and (watch or snapshots.find(run_dir)):
            return configs.load(RunConfig, path, overrides)
        if watch:
            return None
        if not run_dir.is_dir():
            raise UserError(f"{run_dir}: no such run folder; give the run_dir of a training run")
        if not path.is_file():
            raise UserError(f"{run_dir}: not a run folder (no config.yaml in it)")
        raise UserError(
            f"{run_dir}: holds no complete snapshot yet; train longer (train.snapshot_images says "
            "how often one is written) or wait for it with --watch"
        )

    waiting = False
    while (config := on_rank_0(world, look)) is None:
        if world.is_rank_0 and not waiting:
            echo(f"waiting for {path}")
        waiting = True
        time.sleep(poll_seconds)
    return config


def line(content: Mapping[str, Any]) -> str:
    """One record in one line."""
    protocol = content["protocol"]
    (distance_key, distance), (score_key, score) = content["metrics"].items()
    truncated = f"truncation {protocol['truncation']:g}, " if protocol["truncation"] else ""
    return (
        f"images_seen {content['images_seen']}  {distance_key} {distance:.3f}  {score_key} "
        f"{score:.2f}  ({protocol['num_samples']} samples, {truncated}{content['seconds']:.1f} s)"
    )
