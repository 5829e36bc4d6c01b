"""Whose folder it is: the first step of `bigan pack`, and what it refuses to write into.

plan.json      what is packed here; claims the folder, and stays
source.stamp   a hash of the times at which the source's files were changed; until the end, so
               that shards of before and after a change are not mixed. It is no part of the
               plan: copies of a source give the same data set.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bigan import atomic_files
from bigan.data import DataError
from bigan.data.format.manifest import PLAN, PYRAMID, Manifest
from bigan.data.packing.pack_plan import Plan

STAMP = "source.stamp"
FILES = {"identity", "listing", "shard_size"}  # keys of a plan that follow from the files


def plan_text(plan: Plan) -> str:
    return json.dumps(plan.description, indent=1) + "\n"


def claim(destination: Path, plan: Plan) -> tuple[Manifest, ...]:
    """Note the plan in `destination`, or check that it is the one noted there.

    Returns the manifests if everything is finished. Several processes may claim at once.
    """
    refuse_file(destination)
    note = destination / PLAN
    if not note.is_file():
        destination.mkdir(parents=True, exist_ok=True)
        stranger = next((p for p in destination.iterdir() if not p.match(".*.tmp")), None)
        # Another process may have begun meanwhile: the note is the first thing it writes.
        if stranger is not None and not note.is_file():
            raise DataError(
                f"{destination}: is not empty ({stranger.name}) and was not packed by bigan; "
                "choose an empty or new folder"
            )
        atomic_files.create_atomic(note, plan_text(plan))
    try:
        theirs = json.loads(note.read_text(encoding="utf-8"))
    except ValueError:
        theirs = None
    if not isinstance(theirs, dict):
        raise DataError(f"{note}: cannot be read; choose another folder or delete this one")
    mine = plan.description
    manifests = _manifests(destination, plan)
    if manifests:  # whichever versions have packed it, it is whole; early ones noted less
        theirs = {"channels": manifests[-1].channels, **theirs, "software": mine["software"]}
    changed = [key for key in mine if theirs.get(key) != mine[key]]
    if changed:
        raise DataError(_difference(destination, theirs, mine, changed, bool(manifests)))
    if manifests:
        release(destination)  # whoever wrote them may have been killed just before
    else:
        _check_stamp(destination, plan.source.stamp)
    return manifests


def _difference(
    destination: Path,
    theirs: dict[str, Any],
    mine: dict[str, Any],
    changed: list[str],
    complete: bool,
) -> str:
    """What to say if the plan in `destination` differs in the keys `changed`."""
    # The size of shards follows from the number of images, unless it is given.
    if not complete and "identity" in changed and set(changed) <= FILES:
        return (
            f"{destination}: was begun with other source files (they changed since); delete "
            f"{destination} and run the same command again"
        )
    key = changed[0]
    if key == "listing":
        what = "the same images in other splits or classes"
    else:
        what = f"{key} is {theirs.get(key)!r} there, {mine[key]!r} here"
    return f"{destination}: already holds another pack ({what}); choose another folder or delete it"


def _check_stamp(destination: Path, stamp: str) -> None:
    """Note the stamp, or check that it is the one with which this unfinished pack was begun."""
    if not stamp:
        return
    note = destination / STAMP
    try:
        if not note.is_file():
            atomic_files.create_atomic(note, stamp + "\n")
        begun = note.read_text(encoding="utf-8").strip()
    except FileNotFoundError:  # another process has just finished
        return
    if begun != stamp:
        raise DataError(
            f"{destination}: the source's files were changed since this pack was begun; delete "
            f"{destination} and pack again"
        )


def release(destination: Path) -> None:
    """Remove the stamp: what is finished does not change any more."""
    if (destination / STAMP).is_file():  # unlink would fail on a read-only disk
        (destination / STAMP).unlink(missing_ok=True)


def _manifests(destination: Path, plan: Plan) -> tuple[Manifest, ...]:
    """The manifests of all levels if everything is finished."""
    if plan.levels[0].folder and not (destination / PYRAMID).is_file():
        return ()
    try:
        return tuple(Manifest.load(destination / level.folder) for level in plan.levels)
    except DataError:  # not finished, or a shard was deleted
        return ()


def refuse_file(destination: Path) -> None:
    if destination.exists() and not destination.is_dir():
        raise DataError(f"{destination}: is a file; give a new folder to pack into")


def keep_apart(source: Path, destination: Path) -> None:
    """The packed folder must not become a class of its own source."""
    inner, outer = destination.resolve(), source.resolve()
    if source.is_dir() and (inner == outer or outer in inner.parents):
        raise DataError(f"{destination}: lies inside the images of {source}; pack to another place")
