"""The status of runs as text for a terminal, and as JSON values."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from bigan.cluster.job_states import Job
from bigan.cluster.run_status import TRAINS, Status
from bigan.cluster.status import Survey
from bigan.cluster.sweep_status import SweepStatus
from bigan.cluster.verdict import FAILED, REQUEUED, describe_job
from bigan.reporting.metrics_log import plain

_COLUMNS = ("run", "state", "job", "images", "%", "images/s", "left", "limit", "attempts", "")
_RIGHT = {3, 4, 5, 6, 7, 8}  # columns of numbers
_UNITS = {"{} d": 86400, "{} h": 3600, "{} min": 60, "{} s": 1}  # seconds
LATE_SECONDS = 600.0  # without a tick, after which a run that trains may hang


def as_lines(survey: Survey, width: int | None = None) -> list[str]:
    """A block for a single run, else a table with one line per run.

    width: of the terminal, to which the lines are cut; None: not cut.
    """
    lines = [f"SLURM is away ({survey.away}): this is what the run folders show"]
    lines = lines if survey.away else []
    if len(survey.found) == 1:
        only = survey.found[0]
        lines += _sweep(only) if isinstance(only, SweepStatus) else _block(only, survey.time)
    else:
        lines += _table(survey)
    lines = ["".join(c if c.isprintable() else "?" for c in line) for line in lines]
    return lines if width is None else [_cut(line, width) for line in lines]


def as_json(survey: Survey) -> dict[str, Any]:
    """{"slurm": why it is away or None, "runs": [...]}; times are unix times."""
    return {
        "slurm": survey.away,
        "runs": [
            _sweep_json(found) if isinstance(found, SweepStatus) else _run_json(found)
            for found in survey.found
        ],
    }


def duration(seconds: float) -> str:
    """Two units of a time: "2 d 3 h", "4 h 5 min", "35 s"."""
    rest = int(seconds)
    parts: list[str] = []
    for unit, size in _UNITS.items():
        number, rest = divmod(rest, size)
        if number:
            parts.append(unit.format(number))
        elif parts:
            break
    return " ".join(parts[:2]) or "0 s"


def _block(status: Status, now: float) -> list[str]:
    facts = status.facts
    rows = [("state", f"{status.state} {status.detail}".rstrip()), ("images", _progress(status))]
    if status.state in TRAINS:
        rows.append(("speed", _speed(status, now)))
    elif facts.tick_time is not None:
        rows.append(("last tick", _ago(facts.tick_time, now)))
    if status.num_attempts:
        rows.append(("attempts", str(status.num_attempts)))
    if status.links_left is not None:
        rows.append(("chain", f"{status.links_left} links left"))
    if status.evaluator:
        evaluator = status.evaluator
        text = f"job {evaluator.id} {describe_job(evaluator, status.answered)}"
        rows.append(("evaluator", text))
    if facts.train:
        rows.append(("train", _numbers(facts.train)))
    if facts.evaluation:
        where = f"  (snapshot {facts.evaluated:,})"
        rows.append(("eval", _numbers(facts.evaluation, every=True) + where))
    if status.error:
        rows.append(("last error", _error(status.error, now)))
    return [str(status.run), *(f"  {name:<11}{text}" for name, text in rows)]


def _sweep(status: SweepStatus) -> list[str]:
    rows = [("trials", _counts(status.counts))]
    if status.best:
        trial, value = status.best
        rows.append(("best", f"trial {trial}: {status.metric or 'value'} = {value:.6g}"))
    lines = [f"{status.run} (sweep)", *(f"  {name:<11}{text}" for name, text in rows)]
    live = [trial for trial in status.trials if trial.state in (*TRAINS, REQUEUED, FAILED)]
    for each in live:
        text = f"{each.state} {each.detail}, {_progress(each)}"
        lines.append(f"  {each.run.name:<11}{text}")
    if status.error:
        lines.append(f"  {'last error':<11}{_error(status.error, time.time())}")
    return lines


def _table(survey: Survey) -> list[str]:
    rows: list[tuple[str, ...]] = [_COLUMNS]
    for status in survey.found:
        if isinstance(status, SweepStatus):
            best = f", best {status.best[1]:.6g} ({status.best[0]})" if status.best else ""
            note = f"{_counts(status.counts)}{best}"
            rows.append((str(status.run), "sweep", "", "", "", "", "", "", "", note))
        else:
            rows.append(_row(status))
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    return [
        "  ".join(
            cell.rjust(width) if i in _RIGHT else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _row(status: Status) -> tuple[str, ...]:
    facts = status.facts
    total = facts.total_images
    newest = next((job for job in reversed(status.jobs) if job.record.trains), None)
    job = status.current or newest
    left, limit = status.seconds_left, status.limit_seconds_left
    note = status.detail
    if job is not None:  # the job has a column
        note = note.removeprefix(f"job {job.id}").lstrip(":, ").replace(f", job {job.id}", "")
    return (
        str(status.run),
        status.state,
        job.id if job else "",
        f"{facts.images_seen:,}",
        f"{100 * facts.images_seen / total:.1f}" if total else "",
        f"{status.rate:,.0f}" if status.rate else "",
        "" if left is None else duration(left),
        "" if limit is None else duration(limit),
        str(status.num_attempts or ""),
        note,
    )


def _progress(status: Status) -> str:
    facts = status.facts
    text = f"{facts.images_seen:,}"
    if facts.total_images:
        share = 100 * facts.images_seen / facts.total_images
        text += f" of {facts.total_images:,} ({share:.1f} %)"
    if facts.checkpoint != facts.images_seen:
        text += (
            f", newest checkpoint {facts.checkpoint:,}"
            if facts.checkpoint
            else (", no checkpoint yet")
        )
    return text


def _speed(status: Status, now: float) -> str:
    parts = []
    if status.rate:
        parts.append(f"{status.rate:,.0f} images/s")
    if status.seconds_left is not None:
        parts.append(f"{duration(status.seconds_left)} of training left")
    if status.limit_seconds_left is not None:
        parts.append(f"{duration(status.limit_seconds_left)} until the job's time limit")
    tick = status.facts.tick_time
    if tick is not None:
        late = now - tick > LATE_SECONDS
        parts.append(f"last tick {_ago(tick, now)}{' (it may hang)' if late else ''}")
    return ", ".join(parts) or "no tick yet"


def _numbers(values: Mapping[str, float], every: bool = False) -> str:
    """Losses, or with `every` all values: "generator/loss 0.495  discriminator/loss 1.2"."""
    shown = {key: value for key, value in values.items() if every or key.endswith("loss")}
    return "  ".join(f"{key} {value:.4g}" for key, value in (shown or dict(values)).items())


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{num} {state}" for state, num in sorted(counts.items())) or "none begun"


def _error(error: Mapping[str, Any], now: float) -> str:
    job = f"job {error['job']}: " if error["job"] else ""
    return f"{_ago(error['time'], now)}, {job}{error['text']}"


def _ago(then: float, now: float) -> str:
    return f"{duration(max(0.0, now - then))} ago"


def _cut(line: str, width: int) -> str:
    return line if len(line) <= width else f"{line[: max(0, width - 1)]}…"


def _run_json(status: Status) -> dict[str, Any]:
    facts, evaluator = status.facts, status.evaluator
    return {
        "run": str(status.run),
        "state": status.state,
        "detail": status.detail,
        "images_seen": facts.images_seen,
        "total_images": facts.total_images,
        "checkpoint": facts.checkpoint,
        "images_per_second": status.rate,
        "seconds_left": status.seconds_left,
        "limit_seconds_left": status.limit_seconds_left,
        "tick_time": facts.tick_time,
        "attempts": status.num_attempts,
        "train": {key: plain(value) for key, value in facts.train.items()},
        "eval": {key: plain(value) for key, value in facts.evaluation.items()},
        "evaluated": facts.evaluated,
        "last_error": dict(status.error) if status.error else None,
        "job": status.current.id if status.current else None,
        "jobs": _jobs_json(status.jobs, status.answered),
        "evaluator": describe_job(evaluator, status.answered) if evaluator else None,
        "links_left": status.links_left,
    }


def _sweep_json(status: SweepStatus) -> dict[str, Any]:
    best = {"trial": status.best[0], "value": plain(status.best[1])} if status.best else None
    return {
        "run": str(status.run),
        "state": "sweep",
        "counts": dict(status.counts),
        "metric": status.metric or None,
        "best": best,
        "last_error": dict(status.error) if status.error else None,
        "trials": [_run_json(trial) for trial in status.trials],
    }


def _jobs_json(jobs: Sequence[Job], answered: bool) -> list[dict[str, Any]]:
    return [
        {
            "job": job.id,
            "kind": job.record.kind,
            "link": job.record.link,
            "links": job.record.links,
            "slurm": job.queued.state if job.queued else None,
            "nodes": job.queued.nodes if job.queued else None,
            "start": job.queued.start if job.queued else None,
            "state": describe_job(job, answered),
        }
        for job in jobs
    ]
