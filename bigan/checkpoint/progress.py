"""The counters of a run and the file that stores them: progress.json."""

from __future__ import annotations

import errno
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bigan import atomic_files
from bigan.errors import UserError

FORMAT = 1


@dataclass
class Progress:
    """The counters of a run; all other state is in networks, optimizers and `Objective.state`."""

    images_seen: int = 0
    seconds: float = 0.0  # spent training, over all attempts of the run
    attempt: int = 1  # 1 + number of resumes
    data_fingerprint: str = ""  # of the images trained on
    bad_images: int = 0  # not decodable, replaced by the next sample (data.on_bad=skip)
    forward_images: int = 0  # images that share BatchNorm statistics; 0: unknown
    stage: int = 0  # growth stage of the networks
    collapse_began: int = -1  # images_seen at which a collapse was detected; -1: no collapse
    rollbacks: int = 0  # number of rollbacks to the checkpoint before a collapse
    lr_factor: float = 1.0  # factor of all learning rates, lowered at each rollback


@dataclass(frozen=True)
class PartChecksum:
    """Expected size and CRC-32 of a part file."""

    bytes: int
    crc32: int


class CheckpointError(UserError):
    """A checkpoint that cannot be used; the message is one line."""


class DamagedError(CheckpointError):
    """A checkpoint whose files are missing, incomplete or changed: an older one may be intact."""


# Errors of the process, not of the file.
ACCESS = {errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM}


def unreadable(path: Path, what: str, error: Exception) -> CheckpointError:
    """The error for a file that cannot be read; `DamagedError` unless access is the problem."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, OSError) and error.errno in ACCESS:
        return CheckpointError(
            f"{path}: cannot be read ({reason}); permit it and run the same command again"
        )
    return DamagedError(f"{path}: {what} ({reason})")


def to_json(progress: Progress, parts: Sequence[PartChecksum]) -> str:
    """The content of progress.json."""
    record = {"format": FORMAT, **vars(progress), "parts": [vars(part) for part in parts]}
    return json.dumps(record, indent=2) + "\n"


def update_progress(folder: Path, **changes: float) -> None:
    """Replace counters of a complete checkpoint atomically. Call on rank 0; raises OSError."""
    path = folder / "progress.json"
    record = json.loads(path.read_text()) | changes
    atomic_files.write_atomic(path, json.dumps(record, indent=2) + "\n")


def read_progress(folder: Path) -> Progress:
    """The counters of a checkpoint; raises `CheckpointError` if they cannot be read."""
    return read_record(folder)[0]


def read_record(folder: Path) -> tuple[Progress, list[PartChecksum]]:
    """The counters, and the parts by rank; raises `CheckpointError` if they cannot be read."""
    path = folder / "progress.json"
    try:
        record = json.loads(path.read_text())
        version = record.pop("format")
        if type(version) is not int:
            raise TypeError(f"format = {version!r} is not a number")
        if version == FORMAT:
            parts = [PartChecksum(**part) for part in record.pop("parts")]
            progress = Progress(**record)
            if any(type(getattr(progress, k)) is not type(v) for k, v in vars(Progress()).items()):
                raise TypeError("a counter is not a number")
            if not parts or any(
                type(value) is not int for part in parts for value in vars(part).values()
            ):
                raise TypeError("invalid list of parts")
            # The name of a staging folder is .<images_seen>.<token>.tmp.
            if str(progress.images_seen) != folder.name.removeprefix(".").partition(".")[0]:
                raise ValueError(f"images_seen = {progress.images_seen} is not the folder's name")
            return progress, parts
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise unreadable(path, "cannot be read", error) from None
    raise CheckpointError(
        f"{path}: checkpoint format {version}, this version of bigan reads format {FORMAT}; "
        "resume with the version that wrote it"
    )
