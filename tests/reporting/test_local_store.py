"""Locations of artifacts after the folder of all runs was moved or copied."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest

from bigan.reporting.local_store import relocate


def store(folder: Path, experiment: str, run: str) -> None:
    """A database with the columns that `relocate` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as database, database:
        database.execute("CREATE TABLE experiments (experiment_id, artifact_location)")
        database.execute("CREATE TABLE runs (run_uuid, artifact_uri)")
        database.execute("INSERT INTO experiments VALUES (1, ?)", (experiment,))
        database.execute("INSERT INTO runs VALUES ('r', ?)", (run,))


def locations(folder: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as database:
        query = "SELECT artifact_location FROM experiments UNION ALL SELECT artifact_uri FROM runs"
        return [uri for (uri,) in database.execute(query)]


@pytest.mark.parametrize(
    ("former", "exists", "copied", "changes"),
    [
        ("runs", False, False, True),  # moved
        ("runs", True, True, True),  # copied: each store has its own files
        ("runs", True, False, False),  # the files are there only
        ("two words/100%", False, False, True),
        ("mlartifacts/x", False, False, True),
    ],
)
def test_locations_follow_the_folder(
    tmp_path: Path, former: str, exists: bool, copied: bool, changes: bool
) -> None:
    old, new = tmp_path / former / "mlartifacts", tmp_path / "new runs" / "mlartifacts"
    before = [old.as_uri(), (old / "r" / "artifacts").as_uri()]
    store(new.parent, *before)
    for folder, there in ((old, exists), (new, copied)):
        if there:
            (folder / "r" / "artifacts").mkdir(parents=True)
    relocate(new.parent)
    after = [new.as_uri(), (new / "r" / "artifacts").as_uri()]
    assert locations(new.parent) == (after if changes else before)
    relocate(new.parent)
    assert locations(new.parent) == (after if changes else before)


@pytest.mark.parametrize("uri", ["", "s3://bucket/mlartifacts", "mlflow-artifacts:/1", "file:///x"])
def test_other_locations_stay(tmp_path: Path, uri: str) -> None:
    store(tmp_path, uri, uri)
    relocate(tmp_path)
    assert locations(tmp_path) == [uri, uri]
