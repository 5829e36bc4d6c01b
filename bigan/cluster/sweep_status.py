"""The status of a sweep: its trials by state, and the best value so far."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigan.cluster import records
from bigan.cluster.facts import read_json, read_yaml
from bigan.cluster.job_states import Job
from bigan.cluster.run_status import Status
from bigan.cluster.verdict import UNKNOWN, describe_job
from bigan.run_folder import RunFolder


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


def trials_of(sweep: Path) -> list[Path]:
    """The run folders of the trials of a sweep, by index."""
    try:
        found = [p for p in sweep.iterdir() if p.name.isdecimal() and p.is_dir()]
    except OSError:
        return []
    return sorted(found, key=lambda path: int(path.name))


def sweep_status(
    sweep: Path, trials: Sequence[Status], elements: tuple[Job, ...], answered: bool
) -> SweepStatus:
    """The status of a sweep. `elements`: of its job arrays. `answered`: whether SLURM did.

    The record of a trial that has ended (slurm/trials/<trial>.json) precedes its run folder.
    """
    content = read_yaml(sweep / records.SWEEP)
    ended: dict[int, dict[str, Any]] = {}
    with contextlib.suppress(OSError):  # of another user
        for path in (RunFolder(sweep).slurm / "trials").glob("*.json"):
            if path.stem.isdecimal():
                ended[int(path.stem)] = read_json(path)
    states = {int(trial.run.name): trial.state for trial in trials}
    for job in elements:
        element = job.id.partition("_")[2]
        if element.isdecimal() and int(element) not in states:
            states[int(element)] = describe_job(job, answered).partition(":")[0].split()[0]
    for index, record in ended.items():
        if record.get("state") in ("complete", "pruned", "failed") or index not in states:
            states[index] = str(record.get("state", UNKNOWN))
    total = _num_trials(content)
    if total is not None and total > len(states):
        counts = Counter(states.values()) + Counter({"not started": total - len(states)})
    else:
        counts = Counter(states.values())
    errors = [trial.error for trial in trials if trial.error]
    errors += [_error(index, record) for index, record in ended.items() if record.get("error")]
    return SweepStatus(
        sweep,
        dict(counts),
        str(content.get("metric") or ""),
        _best(ended, content.get("goal") == "maximize"),
        tuple(trials),
        elements,
        max(errors, key=lambda error: error["time"], default=None),
    )


def _error(index: int, record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of a trial, also one without a job of SLURM."""
    when = record.get("ended")
    time = float(when) if isinstance(when, int | float) else 0.0
    return {"time": time, "job": None, "text": f"trial {index:03d}: {record['error']}"}


def _best(ended: Mapping[int, dict[str, Any]], maximize: bool) -> tuple[str, float] | None:
    values = {
        f"{index:03d}": float(record["value"])
        for index, record in sorted(ended.items())
        if record.get("state") == "complete" and isinstance(record.get("value"), int | float)
    }
    if not values:
        return None
    best = (max if maximize else min)(values, key=lambda trial: values[trial])
    return best, values[best]


def _num_trials(content: Mapping[str, Any]) -> int | None:
    """The number of trials of a sweep file; None if it cannot be read."""
    method, parameters = content.get("method"), content.get("parameters")
    if isinstance(method, dict) and type(method.get("trials")) is int:
        return int(method["trials"])
    if not isinstance(parameters, dict):
        return None
    return math.prod(len(v) if isinstance(v, list) else 1 for v in parameters.values())
