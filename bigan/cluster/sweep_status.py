"""The status of a sweep: its trials by state, and the best value so far."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigan.cluster.job_states import Job
from bigan.cluster.run_status import Status
from bigan.cluster.sweep_folder import SweepFolder, Trial, best
from bigan.cluster.verdict import describe_job
from bigan.errors import UserError


@dataclass(frozen=True)
class SweepStatus:
    """The status of a sweep: the number of its trials by state."""

    run: Path
    counts: Mapping[str, int] = field(default_factory=dict)
    metric: str = ""
    best: tuple[str, float] | None = None  # (trial, value)
    trials: tuple[Status, ...] = ()  # that have a run folder
    elements: tuple[Job, ...] = ()  # of the job array
    error: Mapping[str, Any] | None = None


def sweep_status(
    sweep: Path, trials: Sequence[Status], elements: tuple[Job, ...], answered: bool
) -> SweepStatus:
    """The status of a sweep. `elements`: of its job arrays. `answered`: whether SLURM did.

    The record of a trial that has ended (slurm/trials/<trial>.json) precedes its run folder.
    """
    folder = SweepFolder(sweep)
    states = {int(trial.run.name): trial.state for trial in trials}
    for job in elements:
        element = job.id.partition("_")[2]
        if element.isdecimal() and int(element) not in states:
            states[int(element)] = describe_job(job, answered).partition(":")[0].split()[0]
    records = _records(folder)
    for record in records:
        if record.state != "running" or record.index not in states:
            states[record.index] = record.state
    found = None
    with contextlib.suppress(UserError):
        found = folder.sweep()
    counts = Counter(states.values())
    if found and found.num_trials > len(states):
        counts["not started"] = found.num_trials - len(states)
    first = best(records, found.goal) if found else None
    errors = [trial.error for trial in trials if trial.error]
    errors += [_error(record) for record in records if record.error]
    return SweepStatus(
        sweep,
        dict(counts),
        (found.metric if found else None) or "",
        (folder.name(first.index), first.value) if first and first.value is not None else None,
        tuple(trials),
        elements,
        max(errors, key=lambda error: error["time"], default=None),
    )


def _records(folder: SweepFolder) -> list[Trial]:
    """The records of the trials that have begun, without damaged ones."""
    found = []
    for index in folder.recorded():
        with contextlib.suppress(UserError, OSError):
            found.append(folder.read(index))
    return [record for record in found if record is not None]


def _error(record: Trial) -> Mapping[str, Any]:
    """Of a trial, also one without a job of SLURM."""
    text = f"trial {record.index:03d}: {record.error}"
    return {"time": record.ended or 0.0, "job": None, "text": text}
