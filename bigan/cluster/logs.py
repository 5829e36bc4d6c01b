"""The logs of a run's jobs: which one is the newest, its last lines, and what is appended to it.

<run_dir>/slurm/logs/<job>.log                       output of a job; of all its attempts
                     <job>-<restart>/rank-<rank>.log of a process of one attempt
<sweep_dir>/slurm/logs/<job>_<trial>.log             output of a trial
                       local-<trial>.log             without SLURM
"""

from __future__ import annotations

import codecs
import contextlib
import itertools
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from bigan.cluster import queue, records
from bigan.cluster.discovery import require_run
from bigan.cluster.job_states import ask
from bigan.cluster.records import FINAL, JobRecord
from bigan.cluster.sweep_folder import is_sweep, is_trial
from bigan.errors import UserError
from bigan.run_folder import RunFolder

POLL_SECONDS = 0.5  # between two reads of a log
ASK_POLLS = 20  # without a log, after which SLURM is asked where it is
QUIET_POLLS = 4  # without growth, after which the log of an ended job is complete
BLOCK = 1 << 16

Echo = Callable[[str], None]


@dataclass(frozen=True)
class Choice:
    """Which log of a run: of a job, or with `rank` of a process in its newest attempt."""

    run: Path
    rank: int | None = None
    job: str | None = None  # None: the newest job that trains


@dataclass(frozen=True, order=True)
class Log:
    """A log file; the newest one is the largest."""

    order: int  # of its job among the recorded ones, -1 if it is not recorded
    restart: int
    time: float  # of the last modification
    job: str
    path: Path

    def continues(self, other: Log) -> bool:
        """Whether it is that of a later attempt or job; not of another element of an array."""
        return (self.order, self.restart) > (other.order, other.restart)


def show(choice: Choice, num_lines: int, echo: Echo, note: Echo) -> None:
    """Print the last lines of the newest log with `echo`; `note` receives its path.

    Raises `UserError` if there is no such log.
    """
    require_run(choice.run)
    log = max(_chosen(choice), default=None) or _elsewhere(choice)
    if log is None:
        raise UserError(f"{choice.run}: {_missing(choice)}")
    note(f"==> {log.path} <==")
    try:
        with log.path.open("rb") as file:
            file.seek(_start_of_last_lines(file, num_lines))
            decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
            for block in iter(lambda: file.read(BLOCK), b""):
                echo(decoder.decode(block))
    except FileNotFoundError:
        raise UserError(f"{log.path}: was deleted meanwhile") from None


def follow(
    choice: Choice, num_lines: int, echo: Echo, note: Echo, poll_seconds: float = POLL_SECONDS
) -> None:
    """Print the last lines of the newest log, and what is appended, until its job has ended.

    As `show`, but waits for a log that does not exist yet, and continues with that of the next
    attempt or of the next job of a chain.
    """
    require_run(choice.run)
    log = _newest_submitted(choice) or _elsewhere(choice)
    if log is None:
        note(f"waiting: {_missing(choice)}")
    for poll in itertools.count(1):
        if log is not None:
            break
        time.sleep(poll_seconds)
        log = _newest_submitted(choice)
        if log is None and poll % ASK_POLLS == 0:
            log = _elsewhere(choice)
    start: int | None = num_lines
    while log is not None:
        note(f"==> {log.path} <==")
        log = _follow_one(choice, log, start, echo, poll_seconds)
        start = None


def _follow_one(
    choice: Choice, log: Log, num_lines: int | None, echo: Echo, poll_seconds: float
) -> Log | None:
    """Print a log until it is complete, from its last lines on (None: all of it).

    Returns the log that continues it, None at the end.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    offset, quiet = None if num_lines else 0, 0
    while True:
        data = b""
        with contextlib.suppress(OSError), log.path.open("rb") as file:
            if offset is None:
                offset = _start_of_last_lines(file, num_lines or 1)
            if file.seek(0, os.SEEK_END) < offset:  # truncated, or another file in its place
                offset = 0
            file.seek(offset)
            data = file.read()
        if data:
            offset, quiet = (offset or 0) + len(data), 0
            echo(decoder.decode(data))
        else:
            quiet += 1
        if quiet > 1:  # twice: it may have grown until a newer one appeared
            newest = _newest_submitted(choice)
            if newest is not None and newest.continues(log):
                return newest
            if quiet > QUIET_POLLS and _has_ended(choice.run, log):
                return None
        time.sleep(poll_seconds)


def _has_ended(run: Path, log: Log) -> bool:
    """Whether the job of a log has recorded that it makes no other attempt."""
    events = [event for event in records.read_events(run) if event.job == log.job]
    return bool(events) and events[-1].event in FINAL


def _newest_submitted(choice: Choice) -> Log | None:
    """The newest log of the newest submission, which may not have begun."""
    known = records.read_jobs(choice.run)
    train = [record for record in known if record.trains]
    first = -1
    if choice.job is None and train and train[-1].batch:
        first = next(i for i, record in enumerate(known) if record.batch == train[-1].batch)
    return max((log for log in _chosen(choice) if log.order >= first), default=None)


def _chosen(choice: Choice) -> list[Log]:
    known = records.read_jobs(choice.run)
    others = {record.id for record in known if not record.trains}
    return [log for log in _logs(choice, known) if _is_chosen(log, choice.job, others)]


def _is_chosen(log: Log, job: str | None, others: set[str]) -> bool:
    """Whether a log is of `job` (also of its elements); None: of a job that is not in `others`."""
    if job is None:
        return log.job not in others
    return job in (log.job, log.job.partition("_")[0])


def _logs(choice: Choice, known: Sequence[JobRecord]) -> list[Log]:
    """The logs of all jobs, or of one rank in all attempts."""
    run, rank = choice.run, choice.rank
    order = {record.id: index for index, record in enumerate(known)}
    folders = [RunFolder(run).job_logs]
    if is_trial(run):
        folders.append(RunFolder(run.parent).job_logs)
    if is_sweep(run) and rank is not None:
        folders += run.glob("[0-9]*/slurm/logs")
    found = []
    for folder in folders:
        for path in folder.glob("*.log" if rank is None else f"*/rank-{rank}.log"):
            name = path.name if rank is None else path.parent.name
            match = re.fullmatch(r"(\d+(?:_\d+)?|local-\d+)(?:-(\d+)|\.log)", name)
            if not match or (folder != folders[0] and not _is_of_trial(match[1], run)):
                continue
            index = order.get(match[1], order.get(match[1].partition("_")[0], -1))
            with contextlib.suppress(OSError):  # deleted meanwhile
                time = path.stat().st_mtime
                found.append(Log(index, int(match[2] or 0), time, match[1], path))
    return found


def _is_of_trial(job: str, run: Path) -> bool:
    """Whether a job of a sweep is that of the trial `run`; all are of a sweep `run`."""
    return not run.name.isdecimal() or job.endswith((f"_{int(run.name)}", f"local-{run.name}"))


def _elsewhere(choice: Choice) -> Log | None:
    """The output of the newest job where the script of a user, not `bigan submit`, has put it."""
    if choice.rank is not None:
        return None
    for record in reversed(records.read_jobs(choice.run)):
        wanted = record.trains if choice.job is None else record.id == choice.job
        if not wanted or record.submission:
            continue
        job = ask({record.id})[0].get(record.id)
        path = queue.output(record.id) if job is not None and record.is_job(job) else None
        if path is not None and path.is_file():
            return Log(0, 0, 0.0, record.id, path)
    return None


def _missing(choice: Choice) -> str:
    """Which log does not exist, and which do."""
    run, known = choice.run, records.read_jobs(choice.run)
    what = f"no log of {f'job {choice.job}' if choice.job else 'a training job'}"
    jobs = sorted({log.job for log in _logs(Choice(run), known)})
    has = f"jobs with a log: {', '.join(jobs)}" if jobs else ""
    if choice.rank is not None:
        what = f"no log of rank {choice.rank}"
        logs = RunFolder(run).job_logs.glob("*/rank-*.log")
        ranks = {path.stem.removeprefix("rank-") for path in logs}
        has = f"ranks with a log: {', '.join(sorted(ranks))}" if ranks else ""
    if not has and known:
        submitted = ", ".join(record.id for record in known)
        has = f"submitted jobs: {submitted}; bigan status {run} shows whether they have begun"
    alone = "the run has no job of SLURM, and bigan train writes to its terminal"
    return f"{what}; {has or alone}"


def _start_of_last_lines(file: BinaryIO, num_lines: int) -> int:
    """The position of the last `num_lines` lines of a file."""
    position = file.seek(0, os.SEEK_END)
    missing = num_lines
    size = 1  # the line break at the end of the file ends the last line
    while position > 0:
        position -= size
        file.seek(position)
        block = file.read(size)
        end = len(block) - 1 if size == 1 else len(block)
        while (end := block.rfind(b"\n", 0, end)) >= 0:
            missing -= 1
            if missing == 0:
                return position + end + 1
        size = min(BLOCK, position)
    return 0
