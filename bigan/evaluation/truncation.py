"""What truncation buys: one snapshot measured at several truncations, as a table and a picture.

    <run_dir>/evaluation/truncation-<images_seen>.json   one record per truncation, as a snapshot's
                         truncation-<images_seen>.png    distance against score, and both over t
    <run_dir>/metrics.jsonl, MLflow                      `truncation/<t>/<metric>`

A truncation that is there under the fingerprint of the protocol asked for now is not measured
again, and the run's own (`evaluation.truncation`, as a rule none) is the snapshot's own record.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from bigan.checkpoint import snapshots
from bigan.distributed.world import World, on_rank_0, reported_by_rank_0
from bigan.errors import UserError
from bigan.evaluation.judge import FOLDER, Judge, Record, Task
from bigan.evaluation.ledger import Ledger, as_content, is_of, read_json, write_json
from bigan.evaluation.truncation_picture import draw
from bigan.evaluation.watcher import line, publish, run_config
from bigan.reporting.tracker import Tracker

Echo = Callable[[str], None]


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
    """Measure one snapshot of `run_dir` at each of `truncations` (None: without) that is missing.

    All ranks call it. `which` is a number of images, "latest", "best" (the lowest distance measured
    under this protocol), or None: the best if any has been measured, else the latest. `echo` gets
    a line per measurement and the table at the end, on rank 0.

    Raises `UserError` as `evaluate` does, for a snapshot that is not there, and for a truncation
    that means nothing for this generator.
    """
    run_dir = Path(run_dir)
    config = run_config(run_dir, overrides, world, watch=False, poll_seconds=0.0, echo=echo)
    own = config.evaluation.truncation
    judge = Judge(run_dir, config, world, torch.device(device or world.device))
    for truncation in truncations:
        judge.check(truncation)
    ledger = Ledger(run_dir, judge.protocol(own))
    distance_key = judge.extractor.distance_key
    task, why = on_rank_0(world, lambda: choose(ledger, which, distance_key))
    table = Table(run_dir, judge, task)
    tracker = Tracker(run_dir, config.tracking, role="evaluation") if world.is_rank_0 else None

    def deliver(truncation: float | None, record: Record) -> None:
        if truncation == own:
            publish(record, ledger, tracker, echo)
        else:
            echo(line(as_content(record)))
        if tracker is not None:
            name = _name(truncation)
            logged = {f"truncation/{name}/{key}": v for key, v in record.metrics.items()}
            tracker.log(record.images_seen, logged)
        table.add(truncation, as_content(record))

    try:
        on_rank_0(world, lambda: table.read(ledger))
        if world.is_rank_0:
            for remark in (*judge.remarks(*truncations), f"snapshot {task.images_seen}: {why}"):
                echo(remark)
        for truncation in on_rank_0(world, lambda: table.missing(truncations)):
            record = judge.measure_unless_replaced(task, truncation)
            if record is None:
                problem = UserError(
                    f"{task.folder}: was written again meanwhile; give the same command again"
                )
                raise reported_by_rank_0(world, problem)
            on_rank_0(world, functools.partial(deliver, truncation, record))
        on_rank_0(world, lambda: finish(table, tracker, echo))
    finally:
        note = tracker.close(None) if tracker is not None else None
        if note:
            echo(note)


def choose(ledger: Ledger, which: str | None, distance_key: str) -> tuple[Task, str]:
    """The snapshot to measure and why it is that one; `UserError` if there is none such."""
    folders = {folder.name: folder for folder in snapshots.find(ledger.run_dir)}
    if which not in (None, "best", "latest"):
        if which not in folders:
            raise UserError(
                f"{ledger.run_dir}: holds no complete snapshot {which}; there are "
                f"{', '.join(folders)}"
            )
        return _task(ledger, folders[which]), "as asked for"
    measured = [
        (content["metrics"][distance_key], task)
        for task, content in (ledger.measured() if which != "latest" else [])
        if math.isfinite(content["metrics"][distance_key])
    ]
    if measured:
        distance, task = min(measured, key=lambda pair: pair[0])
        num = f"of {len(measured)} measured" if len(measured) > 1 else "the one measured"
        return task, f"{num}, the one with the lowest {distance_key}, {distance:.3f}"
    if which == "best":
        raise UserError(
            f"{ledger.run_dir}: no snapshot has been measured under this protocol; `bigan evaluate "
            f"{ledger.run_dir}` does that, or use --snapshot latest"
        )
    *_, newest = folders.values()
    return _task(ledger, newest), "the newest"


def _task(ledger: Ledger, folder: Path) -> Task:
    try:
        return ledger.task(folder)
    except FileNotFoundError:
        raise UserError(f"{folder}: is being written again; give the same command again") from None


class Table:
    """The records of one snapshot by truncation, and their file: rank 0's view.

    Only what was measured under the present protocol counts; the rest is dropped from the file.
    """

    def __init__(self, run_dir: Path, judge: Judge, task: Task) -> None:
        self.judge, self.task = judge, task
        self.path = run_dir / FOLDER / f"truncation-{task.images_seen}.json"
        self.contents: dict[float | None, dict[str, Any]] = {}

    def read(self, ledger: Ledger) -> None:
        """Take up what was measured before: by a sweep, or as the snapshot's own record."""
        found = read_json(self.path)
        records = found.get("records") if isinstance(found, dict) else None
        known = records if isinstance(records, list) else []
        for content in (*known, ledger.read(self.task)):
            truncation = _truncation(content)
            if is_of(content, self.judge.protocol(truncation), self.task):
                self.contents[truncation] = content

    def missing(self, truncations: Iterable[float | None]) -> list[float | None]:
        """Those of `truncations` that are to be measured, the smallest first, each once."""
        return sorted(set(truncations) - self.contents.keys(), key=_order)

    def add(self, truncation: float | None, content: dict[str, Any]) -> None:
        """Take up a record and write the file; `UserError` if it cannot be written."""
        self.contents[truncation] = content
        self.write()

    def write(self) -> None:
        """Write the file anew, the smallest truncation first."""
        write_json(
            self.path,
            {"images_seen": self.task.images_seen, "records": list(self.rows().values())},
        )

    def rows(self) -> dict[float | None, dict[str, Any]]:
        """The records, the smallest truncation first, the one without last."""
        return {t: self.contents[t] for t in sorted(self.contents, key=_order)}

    def lines(self) -> list[str]:
        """The table for people."""
        rows = self.rows()
        keys = next(iter(rows.values()))["metrics"]
        lines = ["truncation  " + "  ".join(keys)]
        for truncation, content in rows.items():
            values = (f"{content['metrics'][key]:{len(key)}.3f}" for key in keys)
            lines.append(f"{_name(truncation):>10}  " + "  ".join(values))
        return lines


def finish(table: Table, tracker: Tracker | None, echo: Echo) -> None:
    """Rank 0: the table as file, picture, artifacts and lines."""
    table.write()
    judge, picture = table.judge, table.path.with_suffix(".png")
    symbol = "psi" if judge.has_mean_latent else "t"
    values = {t: content["metrics"] for t, content in table.rows().items()}
    keys = (judge.extractor.distance_key, judge.extractor.score_key)
    title = f"{table.path.resolve().parents[1].name}, images_seen {table.task.images_seen}"
    try:
        draw(picture, values, keys, symbol, title)
    except OSError as error:
        raise UserError(f"{picture}: cannot be written: {error.strerror or error}") from None
    if tracker is not None:
        tracker.log_artifact(table.path)
        tracker.log_artifact(picture)
    for text in table.lines():
        echo(text)
    echo(f"{table.path}, {picture.name}")


def _truncation(content: object) -> float | None:
    """The truncation that a record claims; None also for what is no record."""
    protocol = content.get("protocol") if isinstance(content, dict) else None
    found = protocol.get("truncation") if isinstance(protocol, dict) else None
    return float(found) if isinstance(found, int | float) else None


def _order(truncation: float | None) -> float:
    return math.inf if truncation is None else truncation


def _name(truncation: float | None) -> str:
    return "none" if truncation is None else f"{truncation:g}"
