"""The queue of SLURM: jobs, their states and reasons, read with `squeue` and `scontrol`.

The fields of `squeue --format` have been the same for many versions of SLURM; the output of
`scontrol show job` is parsed only where they do not suffice. No accounting database is needed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from bigan.cluster import slurm
from bigan.cluster.slurm import SlurmError

QUERY_SECONDS = 5.0  # of a person who waits for `bigan status`

WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
ACTIVE = {
    "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING",
    "STAGE_OUT",
}  # fmt: skip

_SEPARATOR = "\x1f"  # the unit separator occurs in no path and no reason
# Job or element, state, reason, nodes, start (estimated, if it waits), submission, time left,
# dependency, working folder, script; the name is last because it may contain anything.
_FIELDS = _SEPARATOR.join(("%i", "%T", "%r", "%N", "%S", "%V", "%L", "%E", "%Z", "%o", "%j"))

# Reasons of waiting by their beginning, in plain words.
_REASONS = {
    "None": "",
    "Priority": "waits behind jobs of higher priority",
    "Resources": "waits for free nodes",
    "DependencyNeverSatisfied": "can never start, because the job it depends on failed",
    "Dependency": "waits for another job",
    "BeginTime": "waits for its start time",
    "Cleaning": "waits until its former attempt has ended",
    "JobHeldUser": "is held by its user; scontrol release lets it start",
    "JobHeldAdmin": "is held by an administrator",
    "JobArrayTaskLimit": "waits for other elements of its array",
    "PartitionNodeLimit": "can never start: more nodes than its partition permits",
    "PartitionTimeLimit": "can never start: a longer time limit than its partition permits",
    "PartitionDown": "waits for its partition, which is down",
    "PartitionInactive": "waits for its partition, which is inactive",
    "ReqNodeNotAvail": "waits for nodes that are down, drained or reserved",
    "NodeDown": "waits for a node that is down",
    "Reservation": "waits for its reservation",
    "Licenses": "waits for a license",
    "BadConstraints": "can never start: no node has what it requests",
    "InvalidAccount": "can never start: its account is not valid",
    "InvalidQOS": "can never start: its QOS is not valid",
    "QOS": "waits for a limit of its QOS",
    "Assoc": "waits for a limit of its account",
    "AccountNotAllowed": "can never start: its partition does not permit the account",
    "job requeued in held state": "is held after a requeue; scontrol release lets it start",
    "launch failed requeued held": "is held after a failed launch; scontrol release lets it start",
}
# Final states in plain words.
_ENDINGS = {
    "TIMEOUT": "ended by its time limit",
    "OUT_OF_MEMORY": "ended because a node ran out of memory; request more with --mem",
    "NODE_FAIL": "ended because a node failed",
    "BOOT_FAIL": "ended because a node did not boot",
    "DEADLINE": "ended by its deadline",
    "PREEMPTED": "preempted and not requeued",
    "CANCELLED": "cancelled",
    "FAILED": "failed",
    "COMPLETED": "ended",
}


@dataclass(frozen=True)
class QueuedJob:
    """A job, or an element of a job array, as SLURM knows it. Times are unix times."""

    id: str  # 7, or 7_2 of an array
    state: str  # RUNNING, PENDING, ...
    reason: str = ""
    nodes: str = ""  # n[1-2]
    start: float | None = None  # of a waiting job: an estimate
    submitted: float | None = None  # or requeued
    seconds_left: float | None = None  # until the time limit
    dependency: str = ""
    workdir: str = ""
    script: str = ""
    name: str = ""

    @property
    def waits(self) -> bool:
        """Whether it is in the queue, also for another attempt."""
        return self.state in WAITING

    @property
    def is_active(self) -> bool:
        """Whether it has nodes."""
        return self.state in ACTIVE

    @property
    def is_live(self) -> bool:
        return self.waits or self.is_active

    @property
    def why(self) -> str:
        """Why it waits, or how it ended, in plain words; SLURM's own word if it is unknown."""
        if not self.is_live:
            return _ENDINGS.get(self.state, f"ended ({self.state})")
        if not self.waits:
            return ""
        if self.state in ("REQUEUE_HOLD", "SPECIAL_EXIT"):
            return _REASONS["job requeued in held state"]
        found = next((text for key, text in _REASONS.items() if self.reason.startswith(key)), None)
        if found is None:
            return f"waits ({self.reason})" if self.reason else ""
        if self.reason.startswith(("QOS", "Assoc")):
            return f"{found} ({self.reason})"
        jobs = ", ".join(dict.fromkeys(re.findall(r"\d+(?:_\d+)?", self.dependency)))
        return f"{found} ({jobs})" if self.reason == "Dependency" and jobs else found


def query(ids: Iterable[str], timeout_seconds: float | None = None) -> dict[str, QueuedJob]:
    """The jobs that SLURM knows among `ids`, by id; of an array, its elements.

    Ended jobs are included for as long as the controller remembers them (MinJobAge). Raises
    `SlurmError` if SLURM is not installed or does not answer.
    """
    wanted = sorted({each.partition("_")[0] for each in ids if re.fullmatch(r"\d+(_\d+)?", each)})
    if not wanted:
        return {}
    command = ["squeue", "--noheader", "--all", "--array", "--states=all", f"--format={_FIELDS}"]
    try:
        printed = _ask(*command, f"--jobs={','.join(wanted)}", timeout_seconds=timeout_seconds)
    except SlurmError as error:
        if "Invalid job id" not in str(error):
            raise
        if len(wanted) == 1:  # SLURM has forgotten it
            return {}
        printed = _ask(*command, timeout_seconds=timeout_seconds)
    jobs = parse_queue(printed)
    return {each: job for each, job in jobs.items() if each.partition("_")[0] in wanted}


def parse_queue(printed: str) -> dict[str, QueuedJob]:
    """The jobs in the output of squeue, by id; lines of another form are left out."""
    jobs = {}
    for line in printed.split("\n"):
        parts = line.split(_SEPARATOR, 10)
        if len(parts) != 11:  # the rest of a job name with a line break
            continue
        values = [part.strip() for part in parts]
        job, state, reason, nodes, start, submitted, left = values[:7]
        dependency, workdir, script, name = ("" if v == "(null)" else v for v in values[7:])
        jobs[job] = QueuedJob(
            id=job,
            state=state.partition(" ")[0],
            reason=reason,
            nodes="" if nodes == "(null)" else nodes,
            start=parse_time(start),
            submitted=parse_time(submitted),
            seconds_left=parse_duration(left),
            dependency=dependency,
            workdir=workdir,
            script=script,
            name=name,
        )
    return jobs


def num_restarts(job: str) -> int | None:
    """How often SLURM has started a job again; None if that is unknown."""
    found = re.search(r"\bRestarts=(\d+)", _details(job))
    return int(found[1]) if found else None


def output(job: str) -> Path | None:
    """The file of a job's output; None if it is unknown."""
    found = re.search(r"^\s*StdOut=(/.*)$", _details(job), re.MULTILINE)
    return Path(found[1]) if found else None


def _details(job: str) -> str:
    try:
        return _ask("scontrol", "show", "job", job)
    except SlurmError:
        return ""


def parse_time(text: str) -> float | None:
    """Unix time of an ISO 8601 time in UTC ("2026-11-28T20:36:59", also with Z or an offset)."""
    try:
        found = datetime.fromisoformat(text)
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None


def parse_duration(text: str) -> float | None:
    """Seconds of "1-02:03:04", "02:03:04" or "03:04"; None for UNLIMITED, INVALID, ..."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if not found:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def _ask(*command: str, timeout_seconds: float | None = None) -> str:
    """`run` without the user's defaults of output (SQUEUE_STATES, ...), and with times in UTC."""
    formats = ("SQUEUE_", "SLURM_TIME_FORMAT")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(formats)}
    seconds = timeout_seconds or QUERY_SECONDS
    return slurm.run(*command, timeout_seconds=seconds, environment=kept | {"TZ": "UTC"})
