"""What of a run has been measured under one protocol, and what is to do: rank 0's view.

A snapshot is done when its json carries the fingerprint of the protocol asked for now.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigan import atomic_files
from bigan.checkpoint import snapshots
from bigan.errors import UserError
from bigan.evaluation.judge import Record, Task, stamp, weights
from bigan.hashes import fingerprint, sha256_of_file
from bigan.run_folder import RunFolder


@dataclass
class Ledger:
    """The records `<images_seen>.json` of a run."""

    run_dir: Path
    protocol: dict[str, object]
    _tasks: dict[Path, Task] = field(default_factory=dict)

    def next_task(self) -> tuple[Task | None, bool]:
        """(oldest snapshot not yet measured or None, whether the run has ended).

        `DONE` is looked at before the snapshots: one written in between is then never missed.
        """
        finished = RunFolder(self.run_dir).done.exists()
        for folder in snapshots.find(self.run_dir):
            try:
                task = self.task(folder)
            except FileNotFoundError:  # being replaced by a resumed run: seen at the next look
                finished = False
                continue
            if self.read(task) is None:
                return task, finished
        return None, finished

    def measured(self) -> list[tuple[Task, dict[str, Any]]]:
        """The snapshots measured under this protocol with what was found, oldest first."""
        found = []
        for folder in snapshots.find(self.run_dir):
            try:
                task = self.task(folder)
            except FileNotFoundError:  # being replaced
                continue
            content = self.read(task)
            if content is not None:
                found.append((task, content))
        return found

    def read(self, task: Task) -> dict[str, Any] | None:
        """What was found of this very snapshot under this protocol, or None."""
        content = read_json(self._path(task.images_seen))
        return content if is_of(content, self.protocol, task) else None

    def write(self, record: Record) -> None:
        """Write `<images_seen>.json`, whole or not at all; `UserError` if it cannot be written."""
        write_json(self._path(record.images_seen), as_content(record))

    def task(self, folder: Path) -> Task:
        """The task of a snapshot; its file is read again only if its time or size has changed.

        Raises FileNotFoundError while the snapshot is being replaced.
        """
        now = stamp(folder)
        known = self._tasks.get(folder)
        if known is None or known.stamp != now:
            known = Task(folder, weights_sha256(folder), now)
            self._tasks[folder] = known
        return known

    def _path(self, images_seen: int) -> Path:
        return RunFolder(self.run_dir).evaluation / f"{images_seen}.json"


def weights_sha256(folder: Path) -> str:
    """Hash of the networks of a snapshot: names and contents of their files."""
    total = hashlib.sha256()
    for path in weights(folder):
        total.update(f"{path.name} {sha256_of_file(path)}\n".encode())
    return total.hexdigest()


def as_content(record: Record) -> dict[str, Any]:
    """A record as plain data, with its fingerprint and the versions of now."""
    return {
        "images_seen": record.images_seen,
        "metrics": record.metrics,
        "score_std": record.score_std,
        "seconds": round(record.seconds, 3),
        "fingerprint": fingerprint(record.protocol),
        "protocol": record.protocol,
        "versions": _versions(),
    }


_KEYS = {"images_seen", "metrics", "score_std", "seconds", "fingerprint", "protocol"}


def is_of(content: object, protocol: Mapping[str, object], task: Task) -> bool:
    """Whether `content`, read from a file, is a whole record of `task` under `protocol`."""
    if not isinstance(content, dict) or not content.keys() >= _KEYS:
        return False
    wanted = fingerprint({**protocol, "snapshot_sha256": task.sha256})
    return bool(content["fingerprint"] == wanted)


def read_json(path: Path) -> Any:
    """The content of a file, or None if it is not there or not whole."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_json(path: Path, content: Any) -> None:
    """Write a file whole or not at all, with its folder; `UserError` if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_files.write_atomic(path, json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None


def _versions() -> dict[str, str]:
    names = ("bigan", "torch", "torch-fidelity", "numpy")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a source tree
            found[name] = "unknown"
    return found
