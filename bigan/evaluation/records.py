"""Records of measured snapshots in the run folder, and the snapshots still to measure.

    <run_dir>/evaluation/<images_seen>.json   metrics, their protocol and its fingerprint, versions

A snapshot counts as measured if its record has the fingerprint of the requested protocol, which
includes the hash of the networks. Rank 0 alone reads and writes records.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigan import atomic_files
from bigan.checkpoint import snapshots
from bigan.errors import writing
from bigan.evaluation.metrics import Estimate
from bigan.hashes import fingerprint, sha256_of_file
from bigan.run_folder import RunFolder
from bigan.versions import versions


@dataclass(frozen=True)
class Task:
    """A snapshot to measure, identified by its networks."""

    folder: Path
    sha256: str  # of the network files
    stamp: tuple[int, int]  # their newest modification time (ns) and total size (bytes)

    @property
    def images_seen(self) -> int:
        return int(self.folder.name)

    def is_current(self) -> bool:
        """Whether the snapshot has not been replaced since the task was created."""
        try:
            return stamp(self.folder) == self.stamp
        except FileNotFoundError:
            return False


@dataclass(frozen=True)
class Record:
    """Metrics of a snapshot by key, and everything that they depend on as plain data."""

    images_seen: int
    metrics: dict[str, Estimate]
    protocol: dict[str, object]
    seconds: float

    @property
    def values(self) -> dict[str, float]:
        return {key: estimate.value for key, estimate in self.metrics.items()}

    def as_dict(self) -> dict[str, Any]:
        """The content of its JSON file, with the fingerprint and the installed versions."""
        stds = {key: e.std for key, e in self.metrics.items() if e.std is not None}
        return {
            "images_seen": self.images_seen,
            "metrics": self.values,
            "std_over_splits": stds,
            "seconds": round(self.seconds, 3),
            "fingerprint": fingerprint(self.protocol),
            "protocol": self.protocol,
            "versions": versions(("bigan", "torch", "torch-fidelity", "numpy")),
        }


_KEYS = {"images_seen", "metrics", "seconds", "fingerprint", "protocol"}


@dataclass
class Records:
    """The records of a run under one protocol."""

    run_dir: Path
    folder: Path  # of the records
    protocol: dict[str, object]  # without the hash of a snapshot
    _tasks: dict[Path, Task] = field(default_factory=dict)

    def next_task(self) -> tuple[Task | None, bool]:
        """(oldest snapshot not yet measured or None, whether the run has ended).

        `DONE` is read before the snapshots are listed, so a snapshot written in between is not
        missed.
        """
        finished = RunFolder(self.run_dir).done.exists()
        for folder in snapshots.find(self.run_dir):
            try:
                task = self.task(folder)
            except FileNotFoundError:  # is being replaced by a resumed run: found by the next call
                finished = False
                continue
            if self.read(task) is None:
                return task, finished
        return None, finished

    def measured(self) -> list[tuple[Task, dict[str, Any]]]:
        """Measured snapshots and the contents of their records, oldest first."""
        found = []
        for folder in snapshots.find(self.run_dir):
            try:
                task = self.task(folder)
            except FileNotFoundError:  # is being replaced
                continue
            content = self.read(task)
            if content is not None:
                found.append((task, content))
        return found

    def read(self, task: Task) -> dict[str, Any] | None:
        """The record of a snapshot; None if there is none for its networks and this protocol."""
        content = read_json(self._path(task.images_seen))
        return content if matches(content, self.protocol, task) else None

    def write(self, record: Record) -> None:
        """Write a record atomically; `UserError` if it cannot be written."""
        write_json(self._path(record.images_seen), record.as_dict())

    def task(self, folder: Path) -> Task:
        """The task of a snapshot. Its files are hashed only if their time or size has changed.

        Raises FileNotFoundError while the snapshot is being replaced.
        """
        now = stamp(folder)
        known = self._tasks.get(folder)
        if known is None or known.stamp != now:
            known = Task(folder, networks_sha256(folder), now)
            self._tasks[folder] = known
        return known

    def _path(self, images_seen: int) -> Path:
        return self.folder / f"{images_seen}.json"


def matches(content: object, protocol: Mapping[str, object], task: Task) -> bool:
    """Whether `content`, read from a file, is a complete record of `task` under `protocol`."""
    if not isinstance(content, dict) or not content.keys() >= _KEYS:
        return False
    expected = fingerprint({**protocol, "snapshot_sha256": task.sha256})
    return bool(content["fingerprint"] == expected)


def network_files(folder: Path) -> list[Path]:
    """The network files of a snapshot, sorted; FileNotFoundError if there are none."""
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise FileNotFoundError(f"{folder}: no network files")
    return found


def stamp(folder: Path) -> tuple[int, int]:
    """Newest modification time (ns) and total size (bytes) of the network files of a snapshot.

    Raises FileNotFoundError if there are none.
    """
    found = [path.stat() for path in network_files(folder)]
    return max(s.st_mtime_ns for s in found), sum(s.st_size for s in found)


def networks_sha256(folder: Path) -> str:
    """sha256 over the names and contents of the network files of a snapshot."""
    total = hashlib.sha256()
    for path in network_files(folder):
        total.update(f"{path.name} {sha256_of_file(path)}\n".encode())
    return total.hexdigest()


def read_json(path: Path) -> Any:
    """The content of a JSON file; None if it is missing, unreadable or incomplete."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically, creating its folder; `UserError` if it cannot be written."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_files.write_atomic(path, json.dumps(content, indent=2) + "\n")
