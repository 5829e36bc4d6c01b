"""Commands of SLURM that print what a real one printed, and run folders built by hand."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

# Recorded on SLURM 22.05 (tests/slurm/minislurm.py) with the fields of `queue.query`, "|" for the
# separator: job, state, reason, nodes, start, submission, time left, dependency, folder, script.
RECORDED = {
    "running": "RUNNING|None|n[1-2]|2026-11-28T20:55:35|2026-11-28T20:55:34|1-09:57:00|(null)",
    "completing": "COMPLETING|None|n2|2026-11-28T20:55:35|2026-11-28T20:55:34|9:59|(null)",
    "suspended": "SUSPENDED|None|n2|2026-11-28T20:55:35|2026-11-28T20:55:34|9:59|(null)",
    "failed": "FAILED|NonZeroExitCode|n1|2026-11-28T20:55:35|2026-11-28T20:55:34|10:00|(null)",
    "cancelled": "CANCELLED|None|n1|2026-11-28T20:55:36|2026-11-28T20:55:34|10:00|(null)",
    "completed": "COMPLETED|None|n1|2026-11-28T20:55:36|2026-11-28T20:55:34|10:00|(null)",
    "dependency": "PENDING|Dependency||N/A|2026-11-28T20:55:34|10:00|afterok:1(unfulfilled)",
    "never": "PENDING|DependencyNeverSatisfied||N/A|2026-11-28T20:55:34|10:00|afterok:3(failed)",
    "begin": "PENDING|BeginTime||2100-01-01T00:00:00|2026-11-28T20:55:34|10:00|(null)",
    "held": "PENDING|JobHeldUser||N/A|2026-11-28T20:55:34|10:00|(null)",
    "too large": "PENDING|PartitionNodeLimit||N/A|2026-11-28T20:55:34|10:00|(null)",
    "element": "PENDING|JobArrayTaskLimit||N/A|2026-11-28T20:55:34|10:00|(null)",
    "resources": "PENDING|Resources||2100-01-01T21:05:35|2026-11-28T20:55:34|10:00|(null)",
    "priority": "PENDING|Priority||2100-01-01T21:15:00|2026-11-28T20:55:34|10:00|(null)",
    "requeue hold": "PENDING|job requeued in held state||2026-11-28T20:55:42|2026-11-28T20:55:36"
    "|10:00|(null)",
}
NAME = "two\nlines | x"  # a job name that was accepted
FORGOTTEN = "slurm_load_jobs error: Invalid job id specified"
NO_CONTROLLER = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
SUBMITTED = "2026-11-28T20:55:34Z"

SQUEUE = """#!/bin/sh
echo squeue "$@" >>"{folder}/calls"
case "$*" in
*--jobs=*) if [ -e "{folder}/error" ]; then /bin/cat "{folder}/error" >&2; exit 1; fi ;;
esac
/bin/cat "{folder}/queue"
"""
OTHER = """#!/bin/sh
echo {name} "$@" >>"{folder}/calls"
if [ -e "{folder}/{name}" ]; then /bin/cat "{folder}/{name}"; fi
"""


class FakeSlurm:
    """The commands of a SLURM whose answers a test sets, in a folder that is PATH."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        commands = folder / "bin"
        commands.mkdir(parents=True)
        self.set()
        self._write("squeue", SQUEUE.format(folder=folder))
        for name in ("scontrol", "scancel", "sbatch"):
            self._write(name, OTHER.format(folder=folder, name=name))
        monkeypatch.setenv("PATH", str(commands))

    def set(self, *lines: str) -> None:
        """The lines of the queue."""
        (self.folder / "queue").write_text("".join(f"{line}\n" for line in lines))

    def fail(self, error: str) -> None:
        """Let squeue fail where it is asked for certain jobs."""
        (self.folder / "error").write_text(error)

    def details(self, text: str) -> None:
        """What `scontrol show job` prints."""
        (self.folder / "scontrol").write_text(text)

    def replace(self, script: str) -> None:
        self._write("squeue", script)

    @property
    def calls(self) -> list[str]:
        """The commands that were run, without squeue."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if not line.startswith("squeue")]

    @property
    def num_queries(self) -> int:
        path = self.folder / "calls"
        text = path.read_text() if path.exists() else ""
        return sum(line.startswith("squeue ") for line in text.splitlines())

    def _write(self, name: str, script: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(script)
        path.chmod(0o755)


def line(job: str, name: str, run: Path | None = None, script: str = "train", **of: str) -> str:
    """A recorded line for a job of `run`; `of` replaces texts in it."""
    text = RECORDED[name]
    for old, new in of.items():
        text = text.replace(old, new)
    path = "(null)" if run is None else f"{run}/slurm/001/{script}.sbatch"
    return f"{job}|{text}|/home/user|{path}|{NAME}".replace("|", "\x1f", 10)


def submission(run: Path, job: str, kind: str = "train", **others: object) -> dict[str, object]:
    """A line of jobs.jsonl."""
    script = f"slurm/001/{kind}.sbatch"
    command = ["sbatch", "--parsable", f"--output={run}/slurm/logs/%j.log", str(run / script)]
    record = {"job": job, "kind": kind, "link": 1, "links": 1, "script": script}
    return record | {"command": command, "submitted": SUBMITTED} | others


def make_run(
    run: Path,
    *,
    jobs: Sequence[Mapping[str, object]] = (),
    events: Sequence[str] = (),
    ticks: Sequence[Mapping[str, object]] = (),
    checkpoint: int = 0,
    begun: bool = True,
    done: bool = False,
) -> Path:
    """A run folder. events: "started train 7 0 [reason]"; ticks: records of metrics.jsonl."""
    (run / "slurm" / "logs").mkdir(parents=True)
    if jobs:
        text = "".join(json.dumps(job) + "\n" for job in jobs)
        (run / "slurm" / "jobs.jsonl").write_text(text)
    if events:
        rows = [event.split(" ", 4) for event in events]
        times = [f"2026-11-28T20:5{5 + i // 60}:{i % 60:02d}Z" for i in range(40, 40 + len(rows))]
        lines = [
            "\t".join([when, event, kind, job, restart, str(checkpoint), *reason])
            for when, (event, kind, job, restart, *reason) in zip(times, rows, strict=True)
        ]
        (run / "slurm" / "attempts.tsv").write_text("".join(f"{each}\n" for each in lines))
    if begun:
        (run / "config.yaml").write_text("train:\n  total_images: 48000\n")
        (run / "environment.json").write_text("{}")
        age(run / "environment.json", 60)
    if ticks:
        text = "".join(json.dumps({"time": time.time()} | dict(tick)) + "\n" for tick in ticks)
        (run / "metrics.jsonl").write_text(text)
    if checkpoint:
        folder = run / "checkpoints" / str(checkpoint)
        folder.mkdir(parents=True)
        (folder / "COMPLETE").touch()
    if done:
        (run / "DONE").write_text("48000\n")
    return run


def hold_lock(run: Path, **changes: object) -> None:
    """A LOCK whose owner is this process."""
    from dataclasses import asdict

    from bigan.run.lock import Owner

    (run / "LOCK").write_text(json.dumps(asdict(Owner.this_process()) | changes))


def age(path: Path, seconds: float) -> None:
    """Set the modification time of a file to `seconds` ago."""
    then = time.time() - seconds
    os.utime(path, (then, then))
