"""The destination folder of `bigan pack`: which pack it belongs to, and what is refused.

plan.json      the plan of this pack; written first, by exactly one process, and kept
source.stamp   hash of the modification times of the source's files, until the pack is complete:
               it keeps shards from before and after a change apart. It is not part of the plan,
               so copies of a source give the same data set.
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
FROM_FILES = {"identity", "listing", "shard_size"}  # keys of a plan that depend on the files


def plan_text(plan: Plan) -> str:
    """The content of plan.json."""
    return json.dumps(plan.description, indent=1) + "\n"


def claim_destination(destination: Path, plan: Plan) -> tuple[Manifest, ...]:
    """Write plan.json into `destination`, or check that an existing one describes the same plan.

    Returns the manifests if the data set is complete, else (). Safe to call from several processes
    at once. Raises `DataError` for a folder with other content.
    """
    refuse_file(destination)
    file = destination / PLAN
    if not file.is_file():
        destination.mkdir(parents=True, exist_ok=True)
        other = next((p for p in destination.iterdir() if not p.match(".*.tmp")), None)
        # Look again: plan.json is the first file that a process which started just now writes.
        if other is not None and not file.is_file():
            raise DataError(
                f"{destination}: is not empty ({other.name}) and was not packed by bigan; "
                "choose an empty or new folder"
            )
        atomic_files.create_atomic(file, plan_text(plan))
    try:
        existing = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        existing = None
    if not isinstance(existing, dict):
        raise DataError(f"{file}: is damaged; choose another folder or delete this one")
    wanted = plan.description
    manifests = _manifests(destination, plan)
    if manifests:  # complete: other library versions may have written it
        existing = {**existing, "software": wanted["software"]}
    changed = [key for key in wanted if existing.get(key) != wanted[key]]
    if changed:
        raise DataError(_difference(destination, existing, plan, changed, manifests))
    if manifests:
        remove_stamp(destination)  # the process that completed it may have been killed before this
    else:
        _check_stamp(destination, plan.source.stamp)
    return manifests


def _difference(
    destination: Path,
    existing: dict[str, Any],
    plan: Plan,
    changed: list[str],
    manifests: tuple[Manifest, ...],
) -> str:
    """The error message for a plan in `destination` that differs in the keys `changed`."""
    # The shard size depends on the number of images unless it is given.
    if "identity" in changed and set(changed) <= FROM_FILES:
        if not manifests:
            return (
                f"{destination}: the source files changed after this pack was started; delete "
                f"{destination} and run the same command again"
            )
        complete = manifests[0]
        before = sum(map(complete.num_samples, complete.splits)) + complete.num_bad
        return (
            f"{destination}: holds the source as it was before its files changed ({before:,} "
            f"images then, {len(plan.source.keys) + len(plan.source.bad):,} now); pack into a new "
            f"folder, or delete {destination} and run the same command again"
        )
    key = changed[0]
    if key == "listing":
        what = "the same images in other splits or classes"
    else:
        what = f"{key} is {existing.get(key)!r} there, {plan.description[key]!r} here"
    return f"{destination}: already holds another pack ({what}); choose another folder or delete it"


def _check_stamp(destination: Path, stamp: str) -> None:
    """Write the stamp, or compare it with that of the process which started this pack."""
    if not stamp:
        return
    file = destination / STAMP
    try:
        if not file.is_file():
            atomic_files.create_atomic(file, stamp + "\n")
        started = file.read_text(encoding="utf-8").strip()
    except FileNotFoundError:  # another process has completed the pack
        return
    if started != stamp:
        raise DataError(
            f"{destination}: the source files were modified after this pack was started; delete "
            f"{destination} and pack again"
        )


def remove_stamp(destination: Path) -> None:
    """Delete source.stamp, which a complete data set does not need."""
    if (destination / STAMP).is_file():  # unlink would fail on a read-only disk
        (destination / STAMP).unlink(missing_ok=True)


def _manifests(destination: Path, plan: Plan) -> tuple[Manifest, ...]:
    """The manifests of all levels, () unless all are complete."""
    if plan.levels[0].folder and not (destination / PYRAMID).is_file():
        return ()
    try:
        return tuple(Manifest.load(destination / level.folder) for level in plan.levels)
    except DataError:  # incomplete, or a shard was deleted
        return ()


def refuse_file(destination: Path) -> None:
    """Raise `DataError` if `destination` is a file."""
    if destination.exists() and not destination.is_dir():
        raise DataError(f"{destination}: is a file; give a new folder to pack into")


def refuse_inside_source(source: Path, destination: Path) -> None:
    """Raise `DataError` if the packed folder would become a class folder of its own source."""
    inner, outer = destination.resolve(), source.resolve()
    if source.is_dir() and (inner == outer or outer in inner.parents):
        raise DataError(f"{destination}: is inside the source {source}; choose another folder")
