"""The MLflow run of a run folder: where it is stored, and how much of the folder was delivered.

    <run_dir>/mlflow.json  {"run_id", "uri", "local", "sent_bytes", "files"}

`sent_bytes` of the metrics log and the `files` (name: [modification time in ns, bytes]) are in the
run. A run in another store, or one that replaces a deleted one, begins with nothing delivered.

Only `MlflowClient` with the id of the run is used: exiting the context of `mlflow.start_run` would
end a run that another process is still training.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit, urlunsplit

import yaml

from bigan import atomic_files
from bigan.config import leaves
from bigan.file_lock import locked
from bigan.reporting import local_store
from bigan.run_folder import SWEEP_FILE, RunFolder

Role = Literal["train", "evaluation"]


@dataclass
class Record:
    """The content of `mlflow.json`."""

    run_id: str = ""
    uri: str = ""
    local: bool = False
    sent_bytes: int = 0
    files: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    def read(cls, run_dir: Path) -> Record:
        """The record of a run folder; an empty one if it is missing or invalid."""
        try:
            found = json.loads(RunFolder(run_dir).mlflow.read_text())
            return cls(
                run_id=str(found["run_id"]),
                uri=str(found["uri"]),
                local=found["local"] is True,
                sent_bytes=int(found.get("sent_bytes", 0)),
                files={str(name): list(stamp) for name, stamp in found.get("files", {}).items()},
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return cls()

    def write(self, run_dir: Path) -> None:
        text = json.dumps(asdict(self), indent=1) + "\n"
        atomic_files.write_atomic(RunFolder(run_dir).mlflow, text)


PARENT_TAG = "mlflow.parentRunId"  # of MLflow: the run is shown below its parent


def quiet_environment() -> None:
    """Set variables before MLflow is imported: no retries, no INFO lines, no telemetry."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


def open_run(
    run_dir: Path, experiment: str, role: Role, parent: Path | None = None
) -> tuple[Any, Record]:
    """(MlflowClient, record) of the run recorded in `run_dir`, created if there is none.

    Call it under the lock of the run folder (`exclusive`). Store: `MLFLOW_TRACKING_URI`, else the
    recorded one, else `mlflow.db` next to the run folder, shared by all runs there. A trainer with
    another store continues there in a new run; the evaluator uses the recorded store. With the
    folder `parent` of a sweep, the run is a child of the run of that folder, which is created if
    there is none, and the local store is that of the parent. Raises what MLflow raises.
    """
    record = Record.read(run_dir)
    uri, local = _store(parent or run_dir, record, role)
    database = _local_store(parent or run_dir)
    client = _connect(uri, database if local else None)
    if not _exists(client, record.run_id):
        artifacts = database.parent / local_store.ARTIFACTS if local else None
        name, tags = run_dir.resolve().name, {"run_dir": str(run_dir.resolve())}
        if parent is not None:
            name = f"{parent.resolve().name}/{name}"
            tags[PARENT_TAG] = open_parent(parent, experiment)[1].run_id
        created = client.create_run(
            _experiment_id(client, experiment, artifacts),
            run_name=name,
            tags={"mlflow.source.name": "bigan", **tags},
        )
        record = Record(created.info.run_id, _without_credentials(uri), local)
        try:
            record.write(run_dir)
        except OSError:  # the next attempt would create another run
            client.delete_run(created.info.run_id)
            raise
    elif (record.uri, record.local) != (_without_credentials(uri), local):  # the folder was moved
        record = replace(record, uri=_without_credentials(uri), local=local)
        record.write(run_dir)
    if role == "train":
        client.set_tag(record.run_id, "run_dir", str(run_dir.resolve()))
    return client, record


def open_parent(folder: Path, experiment: str) -> tuple[Any, Record]:
    """`open_run` of a sweep; a new run gets the content of its sweep.yaml as parameters.

    Takes the lock of the folder: the trials of a sweep may call it at once.
    """
    from mlflow.entities import Param

    with exclusive(folder):
        known = Record.read(folder).run_id
        client, record = open_run(folder, experiment, "train")
        if record.run_id != known:
            settings = yaml.safe_load((folder / SWEEP_FILE).read_text(encoding="utf-8"))
            params = [Param(key, str(value)[:500]) for key, value in leaves(settings)]
            client.log_batch(record.run_id, params=params[:100])
    return client, record


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Holds the lock of a run folder, or of the folder of a local store."""
    descriptor = os.open(folder / ".mlflow.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        with locked(descriptor):
            yield
    finally:
        os.close(descriptor)


def _store(folder: Path, record: Record, role: Role) -> tuple[str, bool]:
    """(tracking URI, whether it is the local file next to the folder of the run or its sweep)."""
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    recorded = record.uri
    follows = role == "evaluation" and recorded and recorded != _without_credentials(given)
    if given and not follows:
        return given, False
    if recorded and not record.local:
        return recorded, False
    return f"sqlite:///{_local_store(folder)}", True


def _local_store(folder: Path) -> Path:
    return folder.resolve().parent / local_store.DATABASE


def _connect(uri: str, local: Path | None) -> Any:
    """A client of the store `uri`, which is the file `local` or on a server."""
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):  # an earlier import of mlflow sets INFO
        logging.getLogger(name).setLevel(logging.WARNING)
    # Errors of the database: raised as well, and reported by us on one line.
    logging.getLogger("mlflow.store").setLevel(logging.CRITICAL)
    if local is not None:
        # If two processes create the tables of a new SQLite file at once, one of them fails.
        with exclusive(local.parent):
            if not local.exists():
                _create_store(local)
            local_store.relocate(local.parent)
    client = MlflowClient(tracking_uri=uri)
    client.search_experiments(max_results=1)
    return client


def _create_store(path: Path) -> None:
    """Create the tables of a new local store: all of them, or no file.

    MLflow cannot use a file whose migrations a full disk or a kill has cut off.
    """
    from mlflow import MlflowClient

    atomic_files.remove_leftovers(path.parent, path.name, shared=True)
    temporary = atomic_files.temporary_name(path)
    try:
        MlflowClient(tracking_uri=f"sqlite:///{temporary}").search_experiments(max_results=1)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _exists(client: Any, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return bool(run_id) and client.get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":  # the store was deleted
            return False
        raise


def _experiment_id(client: Any, name: str, artifacts: Path | None) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifacts.as_uri() if artifacts else None)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # created by another run meanwhile
    return found.experiment_id


def _without_credentials(uri: str) -> str:
    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
