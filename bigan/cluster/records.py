"""What a run folder records of its jobs, and which jobs of SLURM these are.

<run_dir>/slurm/jobs.jsonl      what `bigan submit` submitted (jobs.py)
                attempts.tsv    starts and ends of attempts, written by job.sh: time in UTC, event,
                                kind, job, restart, images_seen, reason
                logs/<job>-<restart>/failure-<time in ns>-rank-<rank>.txt
                                     evaluate/failure-...    of the evaluator of a trial

All of them may be missing, damaged or half written: what cannot be read is left out.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigan.cluster import jobs, queue
from bigan.cluster.queue import QueuedJob
from bigan.cluster.sweep_folder import is_trial
from bigan.errors import LOST, TAKEN_OVER
from bigan.run_folder import RunFolder

FINAL = {"completed", "stopped", "failed"}  # events after which the job makes no other attempt
LONGEST_SECONDS = 30 * 86400.0  # of an attempt, from its start to a requeue
CLOCK_SECONDS = 120.0  # tolerated difference between the clocks of nodes and controller
_CONSEQUENCES = {LOST, TAKEN_OVER}  # kinds of failures that another one causes


@dataclass(frozen=True)
class Event:
    """A line of attempts.tsv."""

    time: float  # unix time
    event: str  # started, requeued, completed, stopped, failed, limit
    kind: str  # train, evaluate, trial
    job: str  # 7, or 7_2 of an array
    restart: int
    images_seen: int
    reason: str = ""


@dataclass(frozen=True)
class Failure:
    """A failure file: why a rank failed."""

    time: float  # unix time
    kind: str
    message: str
    rank: str
    attempt: str  # <job>-<restart>


@dataclass(frozen=True)
class JobRecord:
    """A job as the run folder knows it."""

    id: str
    kind: str  # train, evaluate, trial, sweep
    run_dir: Path  # whose jobs.jsonl has the submission
    submission: Mapping[str, Any] = field(default_factory=dict)  # of jobs.jsonl, {} if unknown
    events: tuple[Event, ...] = ()

    @property
    def trains(self) -> bool:
        """Whether it is a training job, also one of a sweep, and no evaluator beside one."""
        return self.kind != "evaluate"

    @property
    def last(self) -> str:
        """Its last event, "" if none is recorded."""
        return self.events[-1].event if self.events else ""

    @property
    def num_starts(self) -> int:
        """Its attempts so far."""
        return sum(event.event == "started" for event in self.events)

    @property
    def link(self) -> int:
        """Its number in its chain, from 1."""
        return _whole(self.submission.get("link"), 1)

    @property
    def links(self) -> int:
        """The number of jobs of its chain, 1 without a chain."""
        return _whole(self.submission.get("links"), 1)

    @property
    def batch(self) -> str:
        """The folder of the script, equal for all jobs of one `bigan submit`; "" if unknown."""
        return os.path.dirname(str(self.submission.get("script") or ""))  # noqa: PTH120

    @property
    def command(self) -> tuple[str, ...]:
        """The arguments of sbatch, () if unknown."""
        found = self.submission.get("command")
        return tuple(map(str, found)) if isinstance(found, list) else ()

    def is_job(self, job: QueuedJob) -> bool:
        """Whether `job`, of the same id, is this job and not one of another cluster.

        The script decides. Where SLURM does not show it, or it was not recorded, the name and
        working folder, and last the time: a job that was submitted after this one had begun, and
        was not restarted, is another one. Of a job that was only submitted, nothing is known.
        """
        command = self.command
        script = str(self.submission.get("script") or "")
        if script and job.script:
            path = Path(job.workdir, job.script)
            return job.script in command or _same(path, self.run_dir / script)
        options = dict(part.partition("=")[::2] for part in command if part.startswith("--"))
        for option, shown in (("--job-name", job.name), ("--chdir", job.workdir)):
            if options.get(option) and shown and options[option] != shown:
                return False
        times = [event.time for event in self.events]
        submitted = queue.parse_time(str(self.submission.get("submitted")))
        times += [submitted] if submitted is not None else []
        if not times or job.submitted is None or job.submitted <= min(times) + CLOCK_SECONDS:
            return True
        if job.submitted > max(times) + LONGEST_SECONDS:
            return False
        return bool(queue.num_restarts(self.id))


def read_events(run_dir: Path) -> list[Event]:
    """The lines of attempts.tsv that are complete, oldest first."""
    try:
        text = RunFolder(run_dir).attempts.read_text("utf-8", errors="replace")
    except OSError:
        return []
    events = []
    for line in text.split("\n"):
        parts = line.split("\t")
        time = queue.parse_time(parts[0])
        if len(parts) < 6 or time is None or not parts[4].isdecimal() or not parts[3]:
            continue
        seen = int(parts[5]) if parts[5].isdecimal() else 0
        reason = " ".join(parts[6:]).strip()
        events.append(Event(time, parts[1], parts[2], parts[3], int(parts[4]), seen, reason))
    return events


def read_jobs(run_dir: Path) -> list[JobRecord]:
    """The jobs of a run or a trial, in the order of their submission."""
    found: dict[str, JobRecord] = {}
    for submission in jobs.read(run_dir):
        kind = str(submission.get("kind") or "train")
        found.pop(submission["job"], None)  # of another cluster, or before a reinstallation
        found[submission["job"]] = JobRecord(submission["job"], kind, run_dir, submission)
    arrays = {job["job"]: job for job in jobs.read(run_dir.parent)} if is_trial(run_dir) else {}
    events: dict[str, list[Event]] = {}
    for event in read_events(run_dir):
        events.setdefault(event.job, []).append(event)
    for job, of_job in events.items():
        array = arrays.get(job.partition("_")[0])
        record = found.get(job) or JobRecord(
            job, of_job[-1].kind, run_dir.parent if array else run_dir, array or {}
        )
        since = queue.parse_time(str(record.submission.get("submitted"))) or 0.0
        kept = tuple(event for event in of_job if event.time >= since - CLOCK_SECONDS)
        found[job] = JobRecord(job, record.kind, record.run_dir, record.submission, kept)
    return list(found.values())


def last_failure(run_dir: Path) -> Failure | None:
    """The failure of the newest attempt that has one; of several ranks, the cause of the others."""
    attempts = map(read_failures, RunFolder(run_dir).job_logs.glob("*-*"))
    newest = max(
        filter(None, attempts), key=lambda found: max(each.time for each in found), default=[]
    )
    return cause(newest)


def read_failures(attempt: Path) -> list[Failure]:
    """The failures in the logs of an attempt: of its ranks, and of its evaluator."""
    found = []
    paths: list[Path] = []
    with contextlib.suppress(OSError):  # of another user
        paths += [*attempt.glob("failure-*.txt"), *attempt.glob("evaluate/failure-*.txt")]
    for path in paths:
        match = re.fullmatch(r"failure-(\d+)-rank-(\d+)\.txt", path.name)
        if not match:
            continue
        with contextlib.suppress(OSError):
            with path.open(encoding="utf-8", errors="replace") as file:
                kind, message = (file.readline(1 << 16).strip() for _ in range(2))
            if message:
                time = int(match[1]) / 1e9
                found.append(Failure(time, kind, message, match[2], attempt.name))
    return found


def cause(failures: Iterable[Failure]) -> Failure | None:
    """The first failure that is not the consequence of another one; None if there is none."""
    return min(
        failures, key=lambda failure: (failure.kind in _CONSEQUENCES, failure.time), default=None
    )


def exists(path: Path) -> bool:
    """Whether a file can be seen; False also in a folder that only another user may read."""
    return os.path.exists(path)  # noqa: PTH110


def _same(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _whole(value: object, default: int) -> int:
    return value if type(value) is int else default
