"""The status of runs and sweeps: the queue of SLURM and what the run folders show, as one answer.

SLURM is asked once for the jobs of all runs. A job that it does not know any more, or all jobs
while it does not answer, have the state that the run folder records.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bigan.cluster import records
from bigan.cluster.job_states import ask, join
from bigan.cluster.records import JobRecord
from bigan.cluster.run_status import Status, status_of
from bigan.cluster.sweep_folder import SweepFolder, is_sweep
from bigan.cluster.sweep_status import SweepStatus, sweep_status


@dataclass(frozen=True)
class Survey:
    """The status of several runs. `away`: why SLURM did not answer, None if it did."""

    found: tuple[Status | SweepStatus, ...]
    away: str | None = None
    time: float = 0.0


def survey(folders: Sequence[Path]) -> Survey:
    """The status of each run or sweep of `folders`; reads files and asks SLURM once."""
    now = time.time()
    known = {folder: records.read_jobs(folder) for folder in folders}
    trials = {folder: SweepFolder(folder).runs() for folder in folders if is_sweep(folder)}
    for folder in [trial for found in trials.values() for trial in found]:
        known[folder] = records.read_jobs(folder)
    queue, away = ask({job.id for jobs in known.values() for job in jobs})

    def status(folder: Path, arrays: Sequence[JobRecord] = ()) -> Status:
        return status_of(folder, join(known[folder], queue, folder, arrays), away is None, now)

    found: list[Status | SweepStatus] = []
    for folder in folders:
        if folder in trials:
            states = [status(trial, known[folder]) for trial in trials[folder]]
            found.append(sweep_status(folder, states, join(known[folder], queue), away is None))
        else:
            found.append(status(folder))
    return Survey(tuple(found), away, now)
