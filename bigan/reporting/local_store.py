"""The local MLflow store beside the run folders, where the folder of all of them was moved.

    <folder>/mlflow.db  mlartifacts/<run id>/artifacts/

MLflow stores the absolute location of artifacts in its database. After `mv runs elsewhere`, it
would write to, and create, the former folder.
"""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from urllib.parse import unquote, urlsplit

DATABASE, ARTIFACTS = "mlflow.db", "mlartifacts"
# Table, its key, and the column with the location: of new runs, and of each run.
LOCATIONS = (
    ("experiments", "experiment_id", "artifact_location"),
    ("runs", "run_uuid", "artifact_uri"),
)


def relocate(folder: Path) -> None:
    """Change locations below a former `mlartifacts` to the one in `folder`.

    One that exists, while its counterpart in `folder` does not, stays. Raises sqlite3.Error.
    """
    with contextlib.closing(sqlite3.connect(folder / DATABASE)) as database, database:
        for table, key, column in LOCATIONS:
            for name, uri in database.execute(f"SELECT {key}, {column} FROM {table}").fetchall():
                moved = _moved(uri or "", folder)
                if moved is not None:
                    change = f"UPDATE {table} SET {column} = ? WHERE {key} = ?"
                    database.execute(change, (moved, name))


def _moved(uri: str, folder: Path) -> str | None:
    """The location in `folder` of artifacts that were below another folder; None: no change."""
    head, found, tail = f"{uri}/".rpartition(f"/{ARTIFACTS}/")
    former = Path(unquote(urlsplit(uri).path))
    if not found or not uri.startswith("file://") or Path(unquote(urlsplit(head).path)) == folder:
        return None
    present = (folder / ARTIFACTS / unquote(tail)).absolute()
    return None if former.exists() and not present.exists() else present.as_uri()
