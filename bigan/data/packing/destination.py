"""The destination of `bigan pack`: which pack it belongs to, and what is refused.

plan.json      the plan of this pack; written first, by exactly one process, and kept
source.stamp   hash of the modification times of the source's files, until the pack is complete:
               it keeps shards from before and after a change apart. It is not part of the plan,
               so copies of a source give the same data set.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bigan.data import DataError
from bigan.data.format.manifest import PLAN, PYRAMID, Manifest
from bigan.data.packing.pack_plan import Plan
from bigan.data.places import Place

STAMP = "source.stamp"
FROM_FILES = {"identity", "listing", "shard_size"}  # keys of a plan that depend on the files


def plan_text(plan: Plan) -> str:
    """The content of plan.json."""
    return json.dumps(plan.description, indent=1) + "\n"


def claim_destination(place: Place, plan: Plan) -> tuple[Manifest, ...]:
    """Write plan.json into `place`, or check that an existing one describes the same plan.

    Returns the manifests if the data set is complete, else (). Safe to call from several processes
    at once. Raises `DataError` for a folder with other content.
    """
    refuse_unwritable(place)
    content = place.read_if_exists(PLAN)
    if content is None:
        place.make_folder()
        other = next((name for name in place.entries() if not _is_temporary(name)), None)
        # Look again: plan.json is the first file that a process which started just now writes.
        if other is not None and not place.exists(PLAN):
            raise DataError(
                f"{place.shown}: is not empty ({other.rstrip('/')}) and was not packed by bigan; "
                "choose an empty or new folder"
            )
        place.create(PLAN, plan_text(plan))
        content = place.read(PLAN)
    try:
        existing = json.loads(content)
    except ValueError:
        existing = None
    if not isinstance(existing, dict):
        raise DataError(
            f"{place.where(PLAN)}: is damaged; choose another folder or delete this one"
        )
    wanted = plan.description
    manifests = _manifests(place, plan)
    if manifests:  # complete: other library versions may have written it
        existing = {**existing, "software": wanted["software"]}
    changed = [key for key in wanted if existing.get(key) != wanted[key]]
    if changed:
        raise DataError(_difference(place.shown, existing, plan, changed, manifests))
    if manifests:
        place.delete(STAMP)  # the process that completed it may have been killed before this
    else:
        _check_stamp(place, plan.source.stamp)
    return manifests


def _is_temporary(name: str) -> bool:
    return name.startswith(".") and name.rstrip("/").endswith(".tmp")


def _difference(
    destination: str,
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


def _check_stamp(place: Place, stamp: str) -> None:
    """Write the stamp, or compare it with that of the process which started this pack."""
    if not stamp:
        return
    started = place.read_if_exists(STAMP)
    if started is None:
        place.create(STAMP, stamp + "\n")
        started = place.read_if_exists(STAMP)
    # None: another process has completed the pack
    if started is not None and started.decode(errors="replace").strip() != stamp:
        raise DataError(
            f"{place.shown}: the source files were modified after this pack was started; delete "
            f"{place.shown} and pack again"
        )


def _manifests(place: Place, plan: Plan) -> tuple[Manifest, ...]:
    """The manifests of all levels, () unless all are complete."""
    if plan.levels[0].folder and not place.exists(PYRAMID):
        return ()
    try:
        return tuple(place.folder(level.folder).load_manifest() for level in plan.levels)
    except DataError:  # incomplete, or a shard was deleted
        return ()


def refuse_unwritable(place: Place) -> None:
    """Raise `DataError` if the destination is a file, or a URL that can only be read."""
    if place.path is None and not place.can_list:
        raise DataError(
            f"{place.shown}: can only be read; give a folder, or s3://bucket/folder, gs://... or "
            "az://..."
        )
    if place.path and place.path.exists() and not place.path.is_dir():
        raise DataError(f"{place.shown}: is a file; give a new folder to pack into")


def refuse_inside_source(source: Path, destination: Path) -> None:
    """Raise `DataError` if the packed folder would become a class folder of its own source."""
    inner, outer = destination.resolve(), source.resolve()
    if source.is_dir() and (inner == outer or outer in inner.parents):
        raise DataError(f"{destination}: is inside the source {source}; choose another folder")
