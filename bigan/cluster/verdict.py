"""The state of a run, from its jobs and what its files show: pure functions."""

from __future__ import annotations

import time
from collections.abc import Sequence

from bigan.cluster.facts import Facts
from bigan.cluster.job_states import Job
from bigan.cluster.records import CLOCK_SECONDS

# States. LOCAL: a trainer without SLURM holds the LOCK. IDLE: nothing trains or waits.
QUEUED, RUNNING, REQUEUED, LOCAL = "queued", "running", "requeued", "local"
COMPLETE, FAILED, STOPPED, IDLE, UNKNOWN = "complete", "failed", "stopped", "idle", "unknown"


def decide(
    facts: Facts, train: Sequence[Job], answered: bool, now: float
) -> tuple[str, str, Job | None]:
    """(state, detail, job that trains or waits) of a run with the training jobs `train`."""
    active = next((job for job in reversed(train) if job.is_active), None)
    waiting = next((job for job in train if job.waits), None)
    newest = _newest(train)
    if facts.done:
        return COMPLETE, "", active
    stop = "; STOP is set: it saves and stops" if facts.stop is not None else ""
    if active:
        return RUNNING, _where(active) + stop, active
    if facts.lives and facts.job is None and facts.owner:
        return LOCAL, f"without SLURM on {facts.owner.host}, pid {facts.owner.pid}{stop}", None
    if waiting and waiting.queued:
        return _waits(waiting, train, now)
    if facts.lives and facts.owner and not (newest and newest.has_ended):
        whose = f"job {facts.job}, which SLURM here does not know" if answered else facts.job
        where = f"on {facts.owner.host} by its LOCK (heartbeat {facts.beat_seconds:.0f} s ago)"
        return RUNNING, f"{where}, job {whose}{stop}" if not answered else f"{where}, {whose}", None
    if newest and not _trained_later(facts, newest):
        state, detail = _ended(newest, answered)
        return state, detail, None
    if facts.images_seen:
        return IDLE, "nothing trains or waits; the same command resumes it", None
    return IDLE, "not started", None


def _newest(train: Sequence[Job]) -> Job | None:
    """The last job; of a chain, the last link that has begun."""
    if not train:
        return None
    links = [job for job in train if job.record.batch == train[-1].record.batch]
    begun = [job for job in links if job.record.events] if train[-1].record.batch else []
    return begun[-1] if begun else train[-1]


def describe_job(job: Job, answered: bool) -> str:
    """The state of a job in a few words: "running on n1", "queued: waits for free nodes"."""
    if job.queued and job.queued.is_active:
        return f"running {_where(job, named=False)}"
    if job.queued and job.queued.waits:
        word = REQUEUED if job.record.num_starts else QUEUED
        return f"{word}: {job.queued.why}" if job.queued.why else word
    state, detail = _ended(job, answered)
    if job.record.last == "completed":
        return "complete"
    return f"{state}: {detail.removeprefix(f'job {job.id}').lstrip(', :') or state}"


def _where(job: Job, named: bool = True) -> str:
    queued = job.queued
    assert queued is not None
    place = f"on {queued.nodes}" if queued.nodes else ""
    words = {
        "CONFIGURING": "its nodes are starting",
        "COMPLETING": "is ending",
        "SUSPENDED": "is suspended",
        "STOPPED": "is suspended",
    }
    word = words.get(queued.state)
    return ", ".join(part for part in (place, f"job {job.id}" if named else "", word) if part)


def _waits(job: Job, train: Sequence[Job], now: float) -> tuple[str, str, Job]:
    queued = job.queued
    assert queued is not None
    chain = [each for each in train if each.record.batch == job.record.batch and job.record.batch]
    continues = job.record.num_starts or any(each.record.num_starts for each in chain)
    state = REQUEUED if continues or queued.state != "PENDING" else QUEUED
    detail = f"job {job.id} {queued.why}".rstrip()
    if queued.start and queued.start > now:
        clock = time.strftime("%Y-%m-%d %H:%M", time.localtime(queued.start))
        detail += f"; estimated start {clock}"
    return state, detail, job


def _ended(job: Job, answered: bool) -> tuple[str, str]:
    """(state, detail) by the last job, which neither runs nor waits as far as SLURM answers."""
    last = job.record.events[-1] if job.record.events else None
    event, reason = (last.event, last.reason) if last else ("", "")
    name = f"job {job.id}"
    if event == "failed":
        return FAILED, f"{name}: {reason}" if reason else name
    if event == "stopped":
        return STOPPED, f"{name}: {reason}" if reason else name
    if event == "completed":
        return IDLE, f"{name} was complete; DONE has been deleted since"
    if event == "limit":
        continued = not job.queued or job.queued.state == "COMPLETED"
        note = "no other job continues it" if continued else "it was not requeued"
        return (IDLE if continued else FAILED), f"{name} ended by its limit ({reason}); {note}"
    if job.queued:  # known to SLURM, and ended
        detail = f"{name} {job.queued.why}"
        if job.queued.state == "FAILED" and not last:
            detail += " before its first attempt: in `setup` of the profile, or in its script"
        if job.queued.state == "CANCELLED":
            return STOPPED, detail
        return (IDLE if job.queued.state == "COMPLETED" else FAILED), detail
    when = f" at {time.strftime('%Y-%m-%d %H:%M', time.localtime(last.time))}" if last else ""
    if not answered:
        if event == "requeued":
            return REQUEUED, f"{name} was requeued{when} ({reason})"
        if event == "started":
            return UNKNOWN, f"{name} started{when} on {reason or 'its nodes'}"
        return UNKNOWN, f"submitted as {name}, which has not begun to write"
    if last:
        return FAILED, f"{name} ended without a record after it was {event}{when}"
    return UNKNOWN, f"SLURM does not know {name}, which has left no record"


def _trained_later(facts: Facts, newest: Job) -> bool:
    """Whether the run was trained without SLURM after its last job had ended."""
    events = newest.record.events
    if facts.tick_time is None or not events or newest.record.last == "started":
        return False
    return facts.tick_time > events[-1].time + CLOCK_SECONDS
