"""A truncation sweep: one snapshot measured at several truncations, as a table and a plot.

    <run_dir>/evaluation/truncation-<images_seen>.json   one record per truncation
                         truncation-<images_seen>.png    the metrics over the truncation
    <run_dir>/metrics.jsonl, MLflow                      `truncation/<t>/<metric>/<extractor>`

Truncations that have a record under the requested protocol are not measured again. The record at
`evaluation.truncation` (usually none) is that of the snapshot itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from bigan.checkpoint import snapshots
from bigan.distributed.world import World, on_rank_0, reported_by_rank_0
from bigan.errors import UserError, writing
from bigan.evaluation import metrics
from bigan.evaluation.evaluator import Evaluator
from bigan.evaluation.records import Record, Records, Task, matches, read_json, write_json
from bigan.evaluation.truncation_plot import draw
from bigan.evaluation.watcher import Echo, log_once, publish, read_config, summary
from bigan.reporting.tracker import Tracker


def sweep(
    run_dir: Path,
    world: World,
    truncations: Sequence[float | None],
    *,
    which: str | None = None,
    overrides: Sequence[str] = (),
    device: torch.device | str | None = None,
    echo: Echo,
) -> None:
    """Measure one snapshot of `run_dir` at each of `truncations` (None: without) not yet measured.

    All ranks call it. `which` is a number of images, "latest", "best" (lowest Frechet distance
    measured under this protocol), or None: the best if any is measured, else the latest. `echo`
    prints a line per measurement and the table at the end, on rank 0.

    Raises `UserError` as `evaluate` does, for a snapshot that does not exist, and for a truncation
    that the sampler does not support.
    """
    run_dir = Path(run_dir)
    config = read_config(run_dir, overrides, world)
    evaluator = Evaluator(run_dir, config, world, torch.device(device or world.device))
    for truncation in truncations:
        evaluator.check_truncation(truncation)
    protocol = evaluator.protocol(config.evaluation.truncation)
    records = Records(run_dir, evaluator.folder, protocol)
    ranking = metrics.metric_key(metrics.RANKING, evaluator.extractor, evaluator.named_sampler)
    task, reason = on_rank_0(world, lambda: choose_snapshot(records, which, ranking))
    table = TruncationTable(run_dir, evaluator, task)
    tracker = Tracker(run_dir, config.tracking, role="evaluation") if world.is_rank_0 else None
    try:
        on_rank_0(world, lambda: table.read(records))
        if world.is_rank_0:
            for text in (
                *evaluator.remarks(*truncations),
                f"snapshot {task.images_seen}: {reason}",
            ):
                echo(text)
        for truncation in on_rank_0(world, lambda: table.missing(truncations)):
            record = evaluator.measure_unless_replaced(task, truncation)
            if record is None:
                problem = UserError(
                    f"{task.folder}: was replaced during the measurement; run the command again"
                )
                raise reported_by_rank_0(world, problem)
            on_rank_0(world, functools.partial(_publish, record, table, records, tracker, echo))
        on_rank_0(world, lambda: finish(table, tracker, echo))
    finally:
        note = tracker.close(None) if tracker is not None else None
        if note:
            echo(note)


def choose_snapshot(records: Records, which: str | None, ranking: str) -> tuple[Task, str]:
    """The snapshot to measure and the reason; `UserError` if it does not exist.

    The best one has the lowest value of the metric `ranking`.
    """
    folders = {folder.name: folder for folder in snapshots.find(records.run_dir)}
    if which not in (None, "best", "latest"):
        if which not in folders:
            raise UserError(
                f"{records.run_dir}: has no complete snapshot {which}; there are "
                f"{', '.join(folders)}"
            )
        return _task(records, folders[which]), "as requested"
    measured = [
        (content["metrics"][ranking], task)
        for task, content in (records.measured() if which != "latest" else [])
        if math.isfinite(content["metrics"][ranking])
    ]
    if measured:
        value, task = min(measured, key=lambda pair: pair[0])
        return task, f"the lowest {ranking} of {len(measured)} measured, {value:.3f}"
    if which == "best":
        raise UserError(
            f"{records.run_dir}: no snapshot is measured under this protocol; run `bigan evaluate "
            f"{records.run_dir}` first, or use --snapshot latest"
        )
    *_, newest = folders.values()
    return _task(records, newest), "the latest"


def _task(records: Records, folder: Path) -> Task:
    try:
        return records.task(folder)
    except FileNotFoundError:
        raise UserError(f"{folder}: is being replaced; run the command again") from None


class TruncationTable:
    """The records of one snapshot by truncation, and their file; used on rank 0.

    Only records under the current protocol are kept; others are dropped from the file.
    """

    def __init__(self, run_dir: Path, evaluator: Evaluator, task: Task) -> None:
        self.evaluator, self.task = evaluator, task
        self.path = evaluator.folder / f"truncation-{task.images_seen}.json"
        self._contents: dict[float | None, dict[str, Any]] = {}

    def read(self, records: Records) -> None:
        """Read the records of former sweeps and that of the snapshot."""
        found = read_json(self.path)
        listed = found.get("records") if isinstance(found, dict) else None
        known = listed if isinstance(listed, list) else []
        for content in (*known, records.read(self.task)):
            truncation = _truncation_of(content)
            if matches(content, self.evaluator.protocol(truncation), self.task):
                self._contents[truncation] = content

    def missing(self, truncations: Iterable[float | None]) -> list[float | None]:
        """Those of `truncations` without a record, ascending and distinct, None last."""
        return sorted(set(truncations) - self._contents.keys(), key=_order)

    def add(self, record: Record) -> None:
        """Add a record and write the file; `UserError` if it cannot be written."""
        content = record.as_dict()
        self._contents[_truncation_of(content)] = content
        self.write()

    def write(self) -> None:
        """Write the file; `UserError` if it cannot be written."""
        rows = list(self.rows().values())
        write_json(self.path, {"images_seen": self.task.images_seen, "records": rows})

    def rows(self) -> dict[float | None, dict[str, Any]]:
        """The contents of the records by truncation, ascending, None last."""
        return {t: self._contents[t] for t in sorted(self._contents, key=_order)}

    def lines(self) -> list[str]:
        """The table as text, a line per truncation below the header."""
        keys = list(self.evaluator.titles)
        lines = ["truncation  " + "  ".join(keys)]
        for truncation, content in self.rows().items():
            values = (f"{content['metrics'][key]:{len(key)}.3f}" for key in keys)
            lines.append(f"{_label(truncation):>10}  " + "  ".join(values))
        return lines


def _publish(
    record: Record, table: TruncationTable, records: Records, tracker: Tracker | None, echo: Echo
) -> None:
    """On rank 0: print, log and write the record of one truncation."""
    truncation = record.protocol["truncation"]
    if truncation == records.protocol["truncation"]:
        publish(record, records, tracker, echo)
    else:
        echo(summary(record.as_dict()))
    if tracker is not None:
        prefix = f"truncation/{_label(_truncation_of(record.as_dict()))}"
        logged = {f"{prefix}/{key}": value for key, value in record.values.items()}
        log_once(tracker, records.run_dir, record.images_seen, logged)
    table.add(record)


def finish(table: TruncationTable, tracker: Tracker | None, echo: Echo) -> None:
    """On rank 0: write the table and its plot, log both and print the table."""
    table.write()
    evaluator, plot = table.evaluator, table.path.with_suffix(".png")
    symbol = "psi" if evaluator.truncates_mean else "t"
    values = {t: content["metrics"] for t, content in table.rows().items()}
    title = f"{table.path.resolve().parents[1].name}, images_seen {table.task.images_seen}"
    with writing(plot):
        draw(plot, values, evaluator.titles, symbol, title)
    if tracker is not None:
        tracker.pictures_changed()
    for text in table.lines():
        echo(text)
    echo(f"{table.path}, {plot.name}")


def _truncation_of(content: object) -> float | None:
    """The truncation in the protocol of a record; None if there is none."""
    protocol = content.get("protocol") if isinstance(content, dict) else None
    found = protocol.get("truncation") if isinstance(protocol, dict) else None
    return float(found) if isinstance(found, int | float) else None


def _order(truncation: float | None) -> float:
    return math.inf if truncation is None else truncation


def _label(truncation: float | None) -> str:
    return "none" if truncation is None else f"{truncation:g}"
