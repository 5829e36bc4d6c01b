"""The recorded jobs of runs, joined with the queue of SLURM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bigan.cluster.queue import QueuedJob, query
from bigan.cluster.records import Event, JobRecord, read_jobs
from bigan.cluster.slurm import SlurmError


@dataclass(frozen=True)
class Job:
    """A job of a run; `queued` is None if SLURM has forgotten it, or does not answer."""

    record: JobRecord
    queued: QueuedJob | None = None

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def waits(self) -> bool:
        return self.queued is not None and self.queued.waits

    @property
    def is_active(self) -> bool:
        return self.queued is not None and self.queued.is_active

    @property
    def is_live(self) -> bool:
        """Whether it runs or waits."""
        return self.queued is not None and self.queued.is_live

    @property
    def has_ended(self) -> bool:
        """Whether SLURM still knows the job, which has ended."""
        return self.queued is not None and not self.queued.is_live


def ask(ids: set[str]) -> tuple[dict[str, QueuedJob], str | None]:
    """(jobs that SLURM knows among `ids`, why it does not answer or None)."""
    try:
        return query(ids), None
    except SlurmError as error:
        command, _, reason = str(error).partition(": ")
        # The last of several messages: "squeue: error: a squeue: fatal: b".
        reason = reason.rpartition(f"{command}: ")[2]
        return {}, f"{command}: {reason.partition('; ')[0]}"


def live_jobs(run_dir: Path, timeout_seconds: float | None = None) -> list[str]:
    """The ids of the jobs of a run that run or wait, of arrays one id; raises `SlurmError`."""
    known = read_jobs(run_dir)
    queue = query({job.id for job in known}, timeout_seconds)
    live = {job.id.partition("_")[0] for job in join(known, queue) if job.is_live}
    return sorted(live, key=int)


def join(
    known: Sequence[JobRecord],
    queue: Mapping[str, QueuedJob],
    trial: Path | None = None,
    arrays: Sequence[JobRecord] = (),
) -> tuple[Job, ...]:
    """The recorded jobs with what SLURM knows of them, a job array as its elements.

    `trial`: a run folder, to which its elements of the job arrays `arrays` belong.
    """
    found: dict[str, Job] = {}
    for record in known:
        own = {
            each: job
            for each, job in queue.items()
            if (each == record.id or each.startswith(f"{record.id}_")) and record.is_job(job)
        }
        elements = {each: job for each, job in own.items() if each != record.id}
        if not elements:
            found[record.id] = Job(record, own.get(record.id))
        for each, job in elements.items():
            events = tuple(event for event in record.events if event.job == each)
            found[each] = Job(_element(record, each, events), job)
    if trial is not None:
        for record in arrays:
            each = f"{record.id}_{int(trial.name)}"
            if each not in found and each in queue and record.is_job(queue[each]):
                found[each] = Job(_element(record, each, ()), queue[each])
    return tuple(found.values())


def _element(record: JobRecord, job: str, events: tuple[Event, ...]) -> JobRecord:
    return JobRecord(job, record.kind, record.run_dir, record.submission, events)
