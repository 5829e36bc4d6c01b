"""Which checkpoints there are, and which are kept."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from bigan import files


def latest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint, or None; call on rank 0 and tell the others."""
    found = files.numbered_folders(run_dir / "checkpoints")
    return found[-1] if found else None


def kept(seen: Sequence[int], keep: int, milestone_images: int | None = None) -> set[int]:
    """Which of the checkpoints `seen` (images, ascending) stay: the newest `keep`, and milestones.

    The milestones are the smallest ones at or beyond each multiple of `milestone_images`.
    """
    newest = set(seen[-keep:])
    if milestone_images is None:
        return newest
    before = [0, *seen]
    crossed = (b // milestone_images > a // milestone_images for a, b in zip(before, seen))  # noqa: B905
    return newest | {images for images, milestone in zip(seen, crossed, strict=True) if milestone}


def prune(run_dir: Path, keep: int, milestone_images: int | None = None) -> None:
    """Delete the complete checkpoints that are not `kept`; call after a save, never before.

    Raises OSError.
    """
    folders = files.numbered_folders(run_dir / "checkpoints")
    stay = kept([int(folder.name) for folder in folders], keep, milestone_images)
    for folder in folders:
        if int(folder.name) not in stay:
            doomed = files.temporary_name(folder)
            folder.replace(doomed)  # at once: from here on it is no checkpoint
            shutil.rmtree(doomed)
