"""Stop a run or a sweep: STOP for what trains, scancel for the jobs that wait."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bigan.atomic_files import write_atomic
from bigan.cluster import records, slurm
from bigan.cluster.discovery import require_run
from bigan.cluster.facts import Facts, read_facts
from bigan.cluster.job_states import Job, ask, join
from bigan.cluster.queue import QueuedJob
from bigan.cluster.records import FINAL, JobRecord
from bigan.cluster.slurm import SlurmError
from bigan.cluster.sweep_folder import SweepFolder, is_sweep
from bigan.errors import writing
from bigan.run_folder import RunFolder

COMMAND_SECONDS = 20.0
BEGIN_SECONDS = 5.0  # from environment.json until STOP has been deleted
MAX_IDS = 1000  # of a command
PASSES = 3  # a job that waited may have started meanwhile

Echo = Callable[[str], None]
Folders = Mapping[Path, Sequence[JobRecord]]  # the run, or a sweep and its trials


def cancel(run: Path, *, now: bool, echo: Echo) -> int:
    """Stop a run, or all trials of a sweep; prints a line per job with `echo`.

    A trainer saves a checkpoint at the next step boundary, and its job ends without a requeue;
    `now` cancels it at once. Jobs that wait are cancelled. Returns 0, or 1 if SLURM could not be
    asked or did not cancel a job. Raises `UserError` for a folder without a run.
    """
    require_run(run)
    paths = [run, *(SweepFolder(run).runs() if is_sweep(run) else [])]
    folders = {path: records.read_jobs(path) for path in paths}
    done: set[tuple[str, bool]] = set()
    ok, found = True, False
    for attempt in range(PASSES):
        queue, away = ask({job.id for known in folders.values() for job in known})
        facts = {path: read_facts(path) for path in folders}
        jobs = _live_jobs(folders, queue)
        if attempt == 0:  # before the jobs: a link that starts meanwhile finds STOP and ends
            found = _write_stops(folders, facts, jobs, away is not None, now, echo) or bool(jobs)
        new = {each: job for each, job in jobs.items() if (each, job[1].waits) not in done}
        trains = any(job.record.trains for _, job in jobs.values())
        done |= {(job.id, job.waits) for _, job in new.values()}
        cancelled = _cancel_waiting([job for _, job in new.values() if job.waits], echo)
        for path, job in new.values():
            if job.id not in cancelled:
                ok &= _cancel_job(job, facts[path], trains, now, echo)
        if away or not new:
            break
    if away:
        unknown = any(job.last not in FINAL for known in folders.values() for job in known)
        lost = "; jobs that wait cannot be cancelled, try again" if unknown else ""
        echo(f"SLURM is away ({away}){lost}")
        ok = not unknown
    elif not found:
        echo(f"{run}: nothing runs or waits")
    if found and not facts[run].done:
        echo(f"to continue later: {_again(run, folders[run])}")
    return 0 if ok else 1


def _live_jobs(folders: Folders, queue: Mapping[str, QueuedJob]) -> dict[str, tuple[Path, Job]]:
    """Job -> (its run folder, itself) of those that run or wait; none of another run."""
    found: dict[str, tuple[Path, Job]] = {}
    for path, known in folders.items():
        for job in join(known, queue):
            if job.is_live:
                element = job.id.partition("_")[2]
                trial = SweepFolder(path).run(int(element)).path if element.isdecimal() else path
                found[job.id] = (trial if trial in folders else path, job)
    return found


def _write_stops(
    folders: Folders,
    facts: Mapping[Path, Facts],
    jobs: Mapping[str, tuple[Path, Job]],
    away: bool,
    now: bool,
    echo: Echo,
) -> bool:
    """Make the file STOP of each run that trains, or may train; returns whether there is one.

    A run that has not begun gets none: its folder would not be that of a run. A sweep gets one
    if `bigan sweep` runs it.
    """
    trained = {path for path, job in jobs.values() if job.record.trains}
    begun = {path for path, job in jobs.values() if _has_begun(job.queued, facts[path])}
    any_trains = False
    for path, known in folders.items():
        may = away and any(job.trains and job.last not in FINAL for job in known)
        if facts[path].done or not (path in trained or facts[path].lives or may):
            continue
        any_trains = True
        if not RunFolder(path).config.exists() and not facts[path].lives:
            continue
        stop = facts[path].stop
        if stop is None or stop.startswith("SLURM job"):  # after which the job would be requeued
            with writing(RunFolder(path).stop):
                write_atomic(RunFolder(path).stop, "")
        is_local = facts[path].lives and facts[path].job is None
        if path in trained and not is_local and (now or path not in begun):
            continue  # its job is cancelled at once
        owner = facts[path].owner
        where = f" ({owner})" if owner and facts[path].lives else ""
        echo(f"{RunFolder(path).stop}: the trainer{where} saves at the next step boundary and ends")
    return any_trains


def _cancel_waiting(waiting: Sequence[Job], echo: Echo) -> set[str]:
    """Cancel jobs that wait, many with one command: an array may have thousands of elements.

    Returns the ids of those that were cancelled; prints a line for each array.
    """
    arrays: dict[str, list[Job]] = {}
    for job in waiting:
        arrays.setdefault(job.id.partition("_")[0], []).append(job)
    cancelled: set[str] = set()
    for array, elements in arrays.items():
        if len(elements) == 1:
            continue
        ids = [job.id for job in elements]
        with contextlib.suppress(SlurmError):
            for start in range(0, len(ids), MAX_IDS):
                _command("scancel", "--state=PENDING", *ids[start : start + MAX_IDS])
                cancelled.update(ids[start : start + MAX_IDS])
        if num := len(cancelled & set(ids)):
            echo(f"job {array} ({elements[0].record.kind}): {num} elements that waited cancelled")
    return cancelled


def _cancel_job(job: Job, facts: Facts, trains: bool, now: bool, echo: Echo) -> bool:
    """Cancel a job unless it ends by itself; returns whether that succeeded.

    trains: whether a job of the run trains, which an evaluator follows.
    """
    record, queued = job.record, job.queued
    assert queued is not None
    link = f", link {record.link} of {record.links}" if record.links > 1 else ""
    name = f"job {job.id} ({record.kind}{link})"
    if queued.state == "COMPLETING":
        echo(f"{name}: is ending")
        return True
    if not job.waits and not now:
        if not record.trains and trains:
            echo(f"{name}: ends after the training jobs")
            return True
        if record.trains and _has_begun(queued, facts):
            echo(f"{name}: ends after its checkpoint, without a requeue")
            return True
    try:
        if job.waits:
            _command("scancel", "--state=PENDING", job.id)
        else:  # a script that is told to end may requeue its job, unless that is disabled
            with contextlib.suppress(SlurmError):
                _command("scontrol", "update", f"JobId={job.id}", "Requeue=0")
            _command("scancel", job.id)
    except SlurmError as error:
        echo(f"{name}: not cancelled: {error}")
        return False
    echo(f"{name}: cancelled {'before its start' if job.waits else f'on {queued.nodes}'}")
    return True


def _has_begun(queued: QueuedJob | None, facts: Facts) -> bool:
    """Whether the trainer of this attempt has passed its checks; until then it deletes STOP.

    Before, it has nothing to save.
    """
    if queued is None or not queued.is_active:
        return False
    start = queued.start or 0.0
    if facts.tick_time is not None and facts.tick_time >= start:
        return True
    return facts.begun is not None and start <= facts.begun < time.time() - BEGIN_SECONDS


def _command(*command: str) -> None:
    """Run a command; a job that has ended meanwhile is no error."""
    try:
        slurm.run(*command, timeout_seconds=COMMAND_SECONDS)
    except SlurmError as error:
        ended = ("Invalid job id", "Job/step already")
        if not any(text in str(error) for text in ended):
            raise


def _again(run: Path, known: Sequence[JobRecord]) -> str:
    """The command that continues a run."""
    train = [job for job in known if job.trains]
    if train and train[-1].submission:
        return "the same bigan submit command"
    if train:
        return "sbatch with the same script and arguments"
    if is_sweep(run):
        return "the same bigan sweep command"
    return f"bigan train {RunFolder(run).config}"
