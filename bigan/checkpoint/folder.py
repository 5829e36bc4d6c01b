"""The folder of a checkpoint: a draft that all processes write into, then complete at once."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from bigan import atomic_files
from bigan.checkpoint.part import part_name
from bigan.checkpoint.progress import PartSum, Progress, to_json
from bigan.checkpoint.reader import Reader
from bigan.run_folder import RunFolder


def draft_folder(run_dir: Path, progress: Progress, token: str) -> Path:
    """Where the parts are written: the same on all processes, another one in each life.

    A new life of the run deletes what a killed one left (`files.remove_leftovers`).
    """
    return RunFolder(run_dir).checkpoints / f".{progress.images_seen}.{token}.tmp"


def complete(
    draft: Path, progress: Progress, parts: Sequence[PartSum], *, check: bool = True
) -> Path:
    """Make a draft whose parts are all written the checkpoint it is of; call on rank 0.

    `check` that it can be read, from the headers of all parts. Raises OSError, or
    `CheckpointError` if the parts do not make up whole tensors.
    """
    for index in range(len(parts)):
        if not (draft / part_name(index, len(parts))).exists():
            raise FileNotFoundError(
                f"{part_name(index, len(parts))} of rank {index} cannot be seen on rank 0: "
                "run_dir must be on a file system that all nodes share"
            )
    atomic_files.write_atomic(draft / "progress.json", to_json(progress, parts))
    if check:
        Reader(draft, verify=False)
    (draft / atomic_files.COMPLETE).write_text("")
    atomic_files.sync(draft)
    folder, former = draft.with_name(str(progress.images_seen)), atomic_files.temporary_name(draft)
    if folder.exists():  # an incomplete one, or the same state saved again
        folder.replace(former)  # at once: a folder being deleted must not look complete
    draft.replace(folder)
    atomic_files.sync(folder.parent)
    shutil.rmtree(former, ignore_errors=True)
    return folder
