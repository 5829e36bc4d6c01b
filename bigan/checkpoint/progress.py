"""The counters of a run and the file that holds them: progress.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bigan import atomic_files
from bigan.errors import UserError

FORMAT = 2


@dataclass
class Progress:
    """The counters of a run; everything else that changes is in the networks and optimisers."""

    images_seen: int = 0
    seconds: float = 0.0  # spent training, over all lives of the run
    attempt: int = 1  # lives of the run: 1 + number of resumes
    data_fingerprint: str = ""  # of the images trained on
    bad_images: int = 0  # did not decode; the next sample took their place (data.on_bad=skip)
    forward_images: int = 0  # over all processes, of one forward: what BatchNorm sees; 0: unknown
    stage: int = 0  # of growth: whose networks these are
    collapse_began: int = -1  # images_seen from which on training seems to collapse; -1: it is well
    rollbacks: int = 0  # from a collapse to the checkpoint before it
    lr_factor: float = 1.0  # of all learning rates, lowered at each of them


@dataclass(frozen=True)
class PartSum:
    """What a part file must be: its size and its CRC-32."""

    bytes: int
    crc32: int


class CheckpointError(UserError):
    """A checkpoint that cannot be used, in one line."""


def go_back(folder: Path) -> str:
    """The way out of a damaged checkpoint."""
    return f"delete {folder} to resume from the checkpoint before it"


def to_json(progress: Progress, parts: Sequence[PartSum]) -> str:
    """The content of progress.json."""
    record = {"format": FORMAT, **vars(progress), "parts": [vars(part) for part in parts]}
    return json.dumps(record, indent=2) + "\n"


def amend(folder: Path, **changes: float) -> None:
    """Replace counters of a complete checkpoint, all or none at once; on rank 0. Raises OSError."""
    path = folder / "progress.json"
    record = json.loads(path.read_text()) | changes
    atomic_files.write_atomic(path, json.dumps(record, indent=2) + "\n")


def read_progress(folder: Path) -> Progress:
    """The counters of a checkpoint; raises `CheckpointError` if it is of another format."""
    return read_record(folder)[0]


def read_record(folder: Path) -> tuple[Progress, list[PartSum] | None]:
    """The counters, and the parts in order, or None in format 1; raises `CheckpointError`."""
    path = folder / "progress.json"
    try:
        record = json.loads(path.read_text())
        version = record.pop("format")
        if version in (1, FORMAT):
            parts = [PartSum(**part) for part in record.pop("parts")] if version > 1 else None
            progress = Progress(**record)
            if any(type(getattr(progress, k)) is not type(v) for k, v in vars(Progress()).items()):
                raise TypeError("a counter is not a number")
            if parts == [] or any(
                type(value) is not int for part in parts or () for value in vars(part).values()
            ):
                raise TypeError("the list of parts is not one")
            # The name of a draft is .<images_seen>.<attempt>.tmp.
            if str(progress.images_seen) != folder.name.removeprefix(".").partition(".")[0]:
                raise ValueError(f"it is of images_seen = {progress.images_seen}")
            return progress, parts
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); {go_back(folder)}") from None
    raise CheckpointError(
        f"{path}: checkpoint format {version}, this bigan reads formats 1 to {FORMAT}; "
        "use the bigan that wrote it"
    )
