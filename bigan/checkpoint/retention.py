"""Find, keep and delete checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from bigan import atomic_files
from bigan.run_folder import RunFolder


def latest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint, or None. Call on rank 0 and broadcast the result."""
    return next(iter(newest_first(run_dir)), None)


def newest_first(run_dir: Path) -> list[Path]:
    """All complete checkpoints. Call on rank 0 and broadcast the result."""
    return atomic_files.numbered_folders(RunFolder(run_dir).checkpoints)[::-1]


def latest_until(run_dir: Path, images_seen: int) -> Path | None:
    """The newest complete checkpoint of at most `images_seen`, or None. Call on rank 0."""
    return next((f for f in newest_first(run_dir) if int(f.name) <= images_seen), None)


def kept(
    seen: Sequence[int], keep: int, milestone_images: int | None = None, trusted_until: int = 0
) -> set[int]:
    """The subset of the checkpoints `seen` (images_seen, ascending) that is kept.

    Kept are the newest `keep`; the milestones, which are the first at or beyond each multiple of
    `milestone_images`; and, if there was no collapse up to `trusted_until`, the newest one up to
    there and the oldest one after it, which replaces the former when `trusted_until` passes it.
    """
    stay = set(seen[-keep:])
    if trusted_until > 0:
        num_before = sum(images <= trusted_until for images in seen)
        stay |= {*seen[:num_before][-1:], *seen[num_before:][:1]}
    if milestone_images is None:
        return stay
    before = [0, *seen]
    crossed = (b // milestone_images > a // milestone_images for a, b in zip(before, seen))  # noqa: B905
    return stay | {images for images, milestone in zip(seen, crossed, strict=True) if milestone}


def prune(
    run_dir: Path, keep: int, milestone_images: int | None = None, trusted_until: int = 0
) -> None:
    """Delete the complete checkpoints that are not `kept`. Call after a save; raises OSError."""
    folders = atomic_files.numbered_folders(RunFolder(run_dir).checkpoints)
    stay = kept([int(f.name) for f in folders], keep, milestone_images, trusted_until)
    for folder in folders:
        if int(folder.name) not in stay:
            _delete(folder)


def discard_after(run_dir: Path, images_seen: int) -> None:
    """Delete every checkpoint beyond `images_seen`, newest first; on rank 0. Raises OSError."""
    for folder in newest_first(run_dir):
        if int(folder.name) > images_seen:
            _delete(folder)


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint to <images_seen>.damaged, which is never read or deleted.

    Call on rank 0; returns its new path. Raises OSError.
    """
    aside = folder.with_name(f"{folder.name}.damaged")
    num = 2
    while aside.exists():
        aside, num = folder.with_name(f"{folder.name}.damaged-{num}"), num + 1
    return folder.replace(aside)


def _delete(folder: Path) -> None:
    doomed = atomic_files.temporary_name(folder)
    folder.replace(doomed)  # atomic: a partly deleted folder is never taken for a checkpoint
    shutil.rmtree(doomed)
