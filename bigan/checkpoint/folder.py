"""The folder of a checkpoint: a staging folder that all ranks write to, completed by a rename."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from bigan import atomic_files
from bigan.checkpoint.part import part_name
from bigan.checkpoint.progress import PartChecksum, Progress, to_json
from bigan.checkpoint.reader import Reader
from bigan.run_folder import RunFolder


def staging_folder(run_dir: Path, progress: Progress, token: str) -> Path:
    """The staging folder of a save. `token` is equal on all ranks and new for each attempt.

    An attempt deletes the staging folders that a killed attempt left
    (`atomic_files.remove_leftovers`).
    """
    return RunFolder(run_dir).checkpoints / f".{progress.images_seen}.{token}.tmp"


def complete(
    staging: Path, progress: Progress, parts: Sequence[PartChecksum], *, check: bool = True
) -> Path:
    """Turn a staging folder that contains all parts into a complete checkpoint. Call on rank 0.

    staging: the staging folder. parts: checksum of the part of each rank.
    `check`: read the headers of all parts first. Returns the checkpoint's folder. Raises OSError,
    or `CheckpointError` if the parts do not cover every tensor.
    """
    for index in range(len(parts)):
        if not (staging / part_name(index, len(parts))).exists():
            raise FileNotFoundError(
                f"{part_name(index, len(parts))} of rank {index} is not visible on rank 0: "
                "run_dir must be on a file system that all nodes share"
            )
    atomic_files.write_atomic(staging / "progress.json", to_json(progress, parts))
    if check:
        Reader(staging, verify=False)
    (staging / atomic_files.COMPLETE).write_text("")
    atomic_files.sync(staging)
    folder = staging.with_name(str(progress.images_seen))
    old = atomic_files.temporary_name(staging)
    if folder.exists():  # incomplete, or the same state saved again
        folder.replace(old)  # atomic: a folder that is being deleted must not look complete
    staging.replace(folder)
    atomic_files.sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
    return folder
