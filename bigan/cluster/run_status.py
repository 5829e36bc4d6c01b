"""The status of a run: its state, its jobs, how far it is and why it failed last."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigan.cluster import records
from bigan.cluster.facts import Facts, read_facts
from bigan.cluster.job_states import Job
from bigan.cluster.verdict import LOCAL, RUNNING, decide

TRAINS = {RUNNING, LOCAL}


@dataclass(frozen=True)
class Status:
    """The status of a run; times are unix times."""

    run: Path
    state: str
    detail: str
    facts: Facts
    jobs: tuple[Job, ...] = ()
    current: Job | None = None  # the training job that runs or waits
    answered: bool = True  # whether SLURM did
    error: Mapping[str, Any] | None = None  # {"time", "job", "text"} of the last failure

    @property
    def num_attempts(self) -> int:
        starts = sum(job.record.num_starts for job in self.jobs if job.record.trains)
        return max(starts, self.facts.attempt)

    @property
    def rate(self) -> float | None:
        """images/s of a run that trains."""
        found = self.facts.images_per_second
        return found if self.state in TRAINS and found and 0 < found < math.inf else None

    @property
    def seconds_left(self) -> float | None:
        """Of training, at the speed of the last tick."""
        if not self.rate or self.facts.total_images is None:
            return None
        return max(0, self.facts.total_images - self.facts.images_seen) / self.rate

    @property
    def limit_seconds_left(self) -> float | None:
        """Until the time limit of the job that trains."""
        current = self.current.queued if self.current else None
        return current.seconds_left if current and current.is_active else None

    @property
    def evaluator(self) -> Job | None:
        return next((job for job in reversed(self.jobs) if not job.record.trains), None)

    @property
    def links_left(self) -> int | None:
        """Jobs of the newest chain that have not begun; None without a chain."""
        train = [job for job in self.jobs if job.record.trains]
        if not train or train[-1].record.links < 2:
            return None
        chain = [job for job in train if job.record.batch == train[-1].record.batch]
        if self.answered:
            return sum(job.waits and job.record.num_starts == 0 for job in chain)
        return sum(job.record.num_starts == 0 for job in chain)


def status_of(run: Path, jobs: tuple[Job, ...], answered: bool, now: float) -> Status:
    """The status of a run with the jobs `jobs`. `answered`: whether SLURM did."""
    try:
        facts = read_facts(run)
    except OSError:  # deleted meanwhile
        facts = Facts()
    train = [job for job in jobs if job.record.trains]
    state, detail, current = decide(facts, train, answered, now)
    error = _last_error(run, jobs)
    return Status(run, state, detail, facts, jobs, current, answered, error)


def _last_error(run: Path, jobs: Sequence[Job]) -> Mapping[str, Any] | None:
    """{"time", "job", "text"} of the newest failure file or failed attempt."""
    failed = [e for job in jobs for e in job.record.events if e.event == "failed" and e.reason]
    found: list[dict[str, Any]] = [
        {"time": e.time, "job": f"{e.job}-{e.restart}", "text": e.reason} for e in failed
    ]
    failure = records.last_failure(run)
    if failure:
        text = f"rank {failure.rank}: {failure.message}"
        found.append({"time": failure.time, "job": failure.attempt, "text": text})
    return max(found, key=lambda error: float(error["time"]), default=None)
