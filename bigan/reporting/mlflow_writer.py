"""Asynchronous logging to MLflow: a queue, and a daemon thread that sends it to one run.

MLflow is imported (1 to 16 s) and called on that thread only, and errors are handled there: with an
unreachable server a single call blocks for up to four minutes, which must not delay training.
Metrics keep the time stamp of the metrics log. MLflow identifies a metric by (name, value, time,
step), so sending one twice adds nothing. A resumed trainer therefore sends the whole metrics log
again, which delivers what a killed process or an unreachable server left undelivered.

Only `MlflowClient` with the id of the run is used: exiting the context of `mlflow.start_run` would
end a run that another process is still training.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import posixpath
import re
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit, urlunsplit

from bigan import atomic_files
from bigan.config import leaves
from bigan.file_lock import locked
from bigan.reporting import local_store, metrics_log

_logger = logging.getLogger(__name__)

Role = Literal["train", "evaluation"]
Status = Literal["FINISHED", "KILLED", "FAILED"]

RUN_FILE = "mlflow.json"

_BATCH = 1_000  # MLflow's limit of metrics per log_batch
_TEXTS = 100  # of parameters and tags
_CHARACTERS = 6_000  # of the length of a parameter
_BACKOFF_SECONDS = (1.0, 60.0)  # first and longest wait before a retry
_LAST_ATTEMPTS = 3  # consecutive failures after which close() returns
_LAST_WAIT_SECONDS = 0.5
_GATHER_SECONDS = 1.0  # metrics of this interval are sent in one call


# --- queue items; each kind sends itself ------------------------------------------------------

_Point = tuple[str, float, int, int]  # key, value, unix milliseconds, images_seen


def _points(images_seen: int, seconds: float, values: Mapping[str, Any]) -> list[_Point]:
    return [
        (_name(key), float(value), round(seconds * 1000), images_seen)
        for key, value in values.items()
        if isinstance(value, int | float)
    ]


def _name(key: str) -> str:
    """`key` as a valid MLflow name; MLflow refuses a whole batch for one `@` or `//`."""
    return posixpath.normpath(re.sub(r"[^\w./: -]", "_", key)).lstrip("./")[:250] or "_"


@dataclass
class _Metrics:
    points: list[_Point]

    def send(self, client: Any, run_id: str) -> None:
        from mlflow.entities import Metric

        for start in range(0, len(self.points), _BATCH):
            part = self.points[start : start + _BATCH]
            client.log_batch(run_id, metrics=[Metric(*point) for point in part])


@dataclass
class _Replay:
    """The first `end` bytes of the metrics log; a retry continues at byte `sent`."""

    path: Path
    end: int
    prefix: str  # the evaluator sends its own keys only
    sent: int = 0

    def send(self, client: Any, run_id: str) -> None:
        points: list[_Point] = []
        with self.path.open("rb") as file:
            file.seek(self.sent)
            while file.tell() < self.end:
                record = metrics_log.parse(file.readline()) or {"images_seen": 0, "time": 0}
                images_seen, seconds = record.pop("images_seen"), record.pop("time", 0)
                chosen = {key: v for key, v in record.items() if key.startswith(self.prefix)}
                points += _points(images_seen, seconds, chosen)
                if len(points) >= _BATCH or file.tell() >= self.end:
                    _Metrics(points).send(client, run_id)
                    points, self.sent = [], file.tell()


@dataclass
class _Artifact:
    path: Path
    folder: str | None

    def send(self, client: Any, run_id: str) -> None:
        client.log_artifact(run_id, str(self.path), self.folder)


@dataclass
class _Params:
    """MLflow parameters are immutable: a changed one is sent as the tag `resumed.<key>`."""

    values: dict[str, str]

    def send(self, client: Any, run_id: str) -> None:
        from mlflow.entities import Param, RunTag

        known = client.get_run(run_id).data.params
        new = [Param(k, v) for k, v in self.values.items() if k not in known]
        differing = {k: v for k, v in self.values.items() if v != known.get(k, v)}
        changed = [RunTag(f"resumed.{k}", v) for k, v in differing.items()]
        for start in range(0, max(len(new), len(changed)), _TEXTS):
            part = slice(start, start + _TEXTS)
            client.log_batch(run_id, params=new[part], tags=changed[part])


@dataclass
class _Tags:
    values: dict[str, str]

    def send(self, client: Any, run_id: str) -> None:
        for key, value in self.values.items():
            client.set_tag(run_id, key, value)


@dataclass
class _Terminate:
    status: Status

    def send(self, client: Any, run_id: str) -> None:
        client.set_terminated(run_id, self.status)


_Item = _Metrics | _Replay | _Artifact | _Params | _Tags | _Terminate


# --- the queue --------------------------------------------------------------------------------


class MlflowWriter:
    """Sends the metrics and files of one process. Every method except `close` returns at once."""

    def __init__(self, run_dir: Path, experiment: str, role: Role) -> None:
        # Retries are made here, not by MLflow; no INFO lines; no telemetry.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        self._run_dir, self._experiment, self._role = run_dir, experiment, role
        self._queue: deque[_Item] = deque()
        path = run_dir / metrics_log.FILENAME
        if path.is_file():
            prefix = "" if role == "train" else "eval/"
            self._queue.append(_Replay(path, path.stat().st_size, prefix))
        self._changed = threading.Condition()
        self._closing = False
        self._num_refused = 0
        self._problem = ""
        self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True)
        self._thread.start()

    def metrics(self, images_seen: int, seconds: float, values: Mapping[str, float]) -> None:
        points = _points(images_seen, seconds, values)
        with self._changed:
            last = self._queue[-1] if self._queue else None
            if isinstance(last, _Metrics) and len(last.points) + len(points) <= _BATCH:
                last.points += points  # an item that is being sent is not in the queue
            else:
                self._queue.append(_Metrics(points))
            self._changed.notify()

    def artifact(self, path: Path, folder: str | None) -> None:
        self._put(_Artifact(path, folder))

    def params(self, values: Mapping[str, Any]) -> None:
        self._put(_Params({key: str(value)[:_CHARACTERS] for key, value in leaves(values)}))

    def tags(self, values: Mapping[str, str]) -> None:
        self._put(_Tags({_name(key): value[-_CHARACTERS:] for key, value in values.items()}))

    def close(self, status: Status | None, timeout_seconds: float) -> str | None:
        """Send what is queued and, for the trainer, set `status`.

        Returns one line if something was not delivered within `timeout_seconds`, else None.
        """
        with self._changed:
            if status and self._role == "train":
                self._queue.append(_Terminate(status))
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout_seconds)
        if not self._thread.is_alive() and not self._queue and not self._num_refused:
            return None
        why = self._problem or f"not done after {timeout_seconds:g} s"
        return (
            f"MLflow: not everything was delivered ({why}); all metrics are in "
            f"{self._run_dir / metrics_log.FILENAME} and are sent again when the run is resumed"
        )

    def _put(self, item: _Item) -> None:
        with self._changed:
            self._queue.append(item)
            self._changed.notify()

    def _run(self) -> None:
        client_and_id: tuple[Any, str] | None = None
        item: _Item | None = None
        wait = _BACKOFF_SECONDS[0]
        num_last_failures = 0
        while True:
            try:
                client_and_id = client_and_id or open_run(
                    self._run_dir, self._experiment, self._role
                )
                item = self._next()
                if item is None:
                    return
                item.send(*client_and_id)
                item, wait, num_last_failures = None, _BACKOFF_SECONDS[0], 0
                continue
            except Exception as error:  # MLflow, its database and the network raise various types
                self._note(error)
                if item is not None and _is_refused(error):
                    self._num_refused += 1
                    item = None
                    continue
            with self._changed:
                if item is not None:
                    self._queue.appendleft(item)
                    item = None
                num_last_failures += self._closing
                if num_last_failures >= _LAST_ATTEMPTS:
                    return
                self._changed.wait_for(lambda: self._closing, wait)
            if self._closing:
                threading.Event().wait(_LAST_WAIT_SECONDS)
            wait = min(2 * wait, _BACKOFF_SECONDS[1])

    def _next(self) -> _Item | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing)
            if not self._closing and isinstance(self._queue[0], _Metrics):
                self._changed.wait_for(lambda: self._closing, _GATHER_SECONDS)
            return self._queue.popleft() if self._queue else None

    def _note(self, error: Exception) -> None:
        first = not self._problem
        text = re.sub(r"//[^/@\s]+@", "//", f"{type(error).__name__}: {error}")  # no passwords
        self._problem = " ".join(text.split())[:120]
        if first:
            _logger.warning("MLflow: %s; training continues, delivery is retried", self._problem)


def _is_refused(error: Exception) -> bool:
    """Whether a retry is pointless: a missing file, or a value that MLflow refuses."""
    code = getattr(error, "error_code", None)
    return isinstance(error, FileNotFoundError) or code == "INVALID_PARAMETER_VALUE"


# --- the run ----------------------------------------------------------------------------------


def open_run(run_dir: Path, experiment: str, role: Role) -> tuple[Any, str]:
    """(MlflowClient, run id) of the run recorded in `run_dir`, created if there is none.

    Store: `MLFLOW_TRACKING_URI`, else the recorded one, else `mlflow.db` next to the run folder,
    shared by all runs there. A trainer with another store continues there in a new run; the
    evaluator uses the recorded store. Raises what MLflow raises.
    """
    with _lock(run_dir / ".mlflow.lock"):  # trainer and evaluator may both find none
        record = _read_run(run_dir)
        uri, local = _store(run_dir, record, role)
        client = _connect(uri, run_dir.resolve().parent if local else None)
        run_id = record["run_id"]
        if not _exists(client, run_id):
            artifacts = run_dir.resolve().parent / local_store.ARTIFACTS if local else None
            tags = {"mlflow.source.name": "bigan", "run_dir": str(run_dir.resolve())}
            created = client.create_run(
                _experiment_id(client, experiment, artifacts),
                run_name=run_dir.resolve().name,
                tags=tags,
            )
            run_id = created.info.run_id
        known = {"run_id": run_id, "uri": _without_credentials(uri), "local": local}
        if known != record:  # a new run, or the folder was moved
            atomic_files.write_atomic(run_dir / RUN_FILE, json.dumps(known, indent=1) + "\n")
    if role == "train":
        client.update_run(run_id, status="RUNNING")
        client.set_tag(run_id, "run_dir", str(run_dir.resolve()))
    return client, run_id


def _store(run_dir: Path, record: Mapping[str, Any], role: Role) -> tuple[str, bool]:
    """(tracking URI, whether it is the local file next to the run folder)."""
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    recorded = record["uri"]
    follows = role == "evaluation" and recorded and recorded != _without_credentials(given)
    if given and not follows:
        return given, False
    if recorded and not record["local"]:
        return recorded, False
    return f"sqlite:///{run_dir.resolve().parent / local_store.DATABASE}", True


def _connect(uri: str, lock_dir: Path | None) -> Any:
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):  # an earlier import of mlflow sets INFO
        logging.getLogger(name).setLevel(logging.WARNING)
    # If two processes create the tables of a new SQLite file at once, one of them fails.
    with _lock(lock_dir / ".mlflow.lock") if lock_dir else contextlib.nullcontext():
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
        if lock_dir:
            local_store.relocate(lock_dir)
    return client


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


def _read_run(run_dir: Path) -> dict[str, Any]:
    try:
        record = json.loads((run_dir / RUN_FILE).read_text())
        return {
            "run_id": str(record["run_id"]),
            "uri": str(record["uri"]),
            "local": record["local"] is True,
        }
    except (OSError, ValueError, KeyError, TypeError):  # missing or invalid
        return {"run_id": "", "uri": "", "local": False}


def _without_credentials(uri: str) -> str:
    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        with locked(descriptor):
            yield
    finally:
        os.close(descriptor)
