"""Copies a run folder to MLflow in the background: parameters, metrics, pictures and status.

The run folder has everything: `config.yaml`, the metrics log, sample grids and plots, and after the
end `.mlflow-status`. `mlflow.json` records what was delivered (mlflow_run.py). A copy sends the
rest, so a server that was away gets what it missed as soon as a trainer or an evaluator reaches it,
in the same run or at the next start. Both send everything, one at a time.

MLflow is imported (1 to 16 s) and called on a daemon thread only, and errors are handled there:
with an unreachable server a single call blocks for up to four minutes, which must not delay
training. Metrics keep the time stamp of the metrics log. MLflow identifies a metric by (name,
value, time, step), so that a batch that is sent twice, because the process was killed before the
delivery was recorded, adds nothing.
"""

from __future__ import annotations

import contextlib
import logging
import posixpath
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import yaml

from bigan import atomic_files
from bigan.config import leaves
from bigan.reporting import metrics_log
from bigan.reporting.mlflow_run import Record, Role, exclusive, open_run, quiet_environment
from bigan.run_folder import RunFolder

_logger = logging.getLogger(__name__)

Status = Literal["FINISHED", "KILLED", "FAILED"]

STATUS_FILE = ".mlflow-status"  # of an attempt that has ended, until it is delivered
PICTURES = ("samples/**/*.png", "timeline.png", "curves.png", "evaluation/**/truncation-*")

_BATCH = 1_000  # MLflow's limit of metrics per log_batch
_TEXTS = 100  # of parameters and tags
_CHARACTERS = 6_000  # of the length of a parameter
_ERROR_CHARACTERS = 2_000  # the remedy can be the last of several sentences
_BACKOFF_SECONDS = (1.0, 60.0)  # first and longest wait before a retry
_LAST_ATTEMPTS = 3  # consecutive failures after which close() returns
_LAST_WAIT_SECONDS = 0.5
_GATHER_SECONDS = 1.0  # metrics of this interval are sent in one call

_Point = tuple[str, float, int, int]  # key, value, unix milliseconds, images_seen


class MlflowWriter:
    """Copies the folder of a run. Every method except `close` returns at once."""

    def __init__(
        self, run_dir: Path, experiment: str, role: Role, parent: Path | None = None
    ) -> None:
        quiet_environment()  # retries are made here, not by MLflow
        self._run_dir, self._experiment, self._role = run_dir, experiment, role
        self._parent = parent
        self._client: Any = None
        self._record = Record()
        self._has_params = False
        self._tags: dict[str, str] = {}  # to be set
        self._unwritten: list[_Point] = []  # metrics that the full disk did not take
        self._status: Status | None = None
        self._changed = threading.Condition()
        self._has_news = self._has_pictures = True
        self._closing = False
        self._refused = ""  # the first thing that MLflow does not accept, and why
        self._problem = ""  # why nothing is delivered at the moment
        if role == "train":
            with contextlib.suppress(OSError):
                (run_dir / STATUS_FILE).unlink(missing_ok=True)  # of the previous attempt
        self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True)
        self._thread.start()

    def changed(self, *, pictures: bool = False) -> None:
        """Copy what was added to the metrics log, and with `pictures` new or changed pictures."""
        with self._changed:
            self._has_news = True
            self._has_pictures |= pictures
            self._changed.notify()

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags of the MLflow run; an existing one is replaced."""
        with self._changed:
            self._tags |= {_name(key): value[-_CHARACTERS:] for key, value in values.items()}
        self.changed()

    def unwritten(self, images_seen: int, seconds: float, values: Mapping[str, float]) -> None:
        """Send metrics that could not be appended to the metrics log."""
        with self._changed:
            self._unwritten += _points(images_seen, seconds, values)
        self.changed()

    def close(self, status: Status | None, timeout_seconds: float) -> str | None:
        """Copy the rest and, for the trainer, set `status`.

        Returns one line if something was not delivered within `timeout_seconds`, else None.
        """
        if status and self._role == "train":
            self._status = status
            with contextlib.suppress(OSError):
                atomic_files.write_atomic(self._run_dir / STATUS_FILE, status)
        with self._changed:
            self._has_news = self._has_pictures = self._closing = True
            self._changed.notify()
        self._thread.join(timeout_seconds)
        if not self._thread.is_alive() and not self._has_news:
            return f"MLflow: not accepted: {self._refused}" if self._refused else None
        why = self._problem or f"not done after {timeout_seconds:g} s"
        return (
            f"MLflow: not everything was delivered ({why}); everything is in {self._run_dir}, and "
            "the next `bigan train` or `bigan evaluate` of this run sends what is missing"
        )

    def _run(self) -> None:
        wait = _BACKOFF_SECONDS[0]
        num_last_failures = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._has_news or self._closing)
                if not self._has_news:
                    return
                self._changed.wait_for(lambda: self._closing, _GATHER_SECONDS)
                self._has_news = False
            try:
                import mlflow  # noqa: F401 - before the lock: it can take long

                with exclusive(self._run_dir):
                    self._copy()
                self._problem, wait, num_last_failures = "", _BACKOFF_SECONDS[0], 0
                continue
            except Exception as error:  # MLflow, its database and the network raise various types
                self._note(error)
                self._client = None  # the server may return with another store
            with self._changed:
                self._has_news = True
                num_last_failures += self._closing
                if num_last_failures >= _LAST_ATTEMPTS:
                    return
                self._changed.wait_for(lambda: self._closing, wait)
            if self._closing:
                threading.Event().wait(_LAST_WAIT_SECONDS)
            wait = min(2 * wait, _BACKOFF_SECONDS[1])

    def _note(self, error: Exception) -> None:
        text = _one_line(error)
        if not self._problem:
            _logger.warning("MLflow: %s; the run continues, delivery is retried", text)
        self._problem = text

    def _try(self, send: Callable[[], object]) -> None:
        """`send()`; what MLflow does not accept is noted and not sent again."""
        try:
            send()
        except Exception as error:
            if getattr(error, "error_code", None) != "INVALID_PARAMETER_VALUE":
                raise
            self._refused = self._refused or _one_line(error)

    def _copy(self) -> None:
        """Send what is not yet delivered; under the lock of the run folder."""
        # Another process may have delivered more, or have created the run in another store.
        record = Record.read(self._run_dir)
        if self._client is None or record.run_id != self._record.run_id:
            self._client, record = open_run(
                self._run_dir, self._experiment, self._role, self._parent
            )
            self._has_params = False
            if self._role == "train":
                self._client.update_run(record.run_id, status="RUNNING")
        self._record = record
        if not self._has_params:
            self._try(self._copy_params)
            self._has_params = True
        self._copy_tags()
        self._copy_metrics()
        self._copy_status()
        if self._has_pictures:
            self._copy_pictures()

    def _copy_params(self) -> None:
        """The config; MLflow parameters are immutable: a changed one is the tag `resumed.<key>`."""
        from mlflow.entities import Param, RunTag

        path = RunFolder(self._run_dir).config
        if not path.is_file():
            return
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        values = {key: str(value)[:_CHARACTERS] for key, value in leaves(config)}
        known = self._client.get_run(self._record.run_id).data.params
        new = [Param(k, v) for k, v in values.items() if k not in known]
        differing = {k: v for k, v in values.items() if v != known.get(k, v)}
        changed = [RunTag(f"resumed.{k}", v) for k, v in differing.items()]
        for start in range(0, max(len(new), len(changed)), _TEXTS):
            part = slice(start, start + _TEXTS)
            self._client.log_batch(self._record.run_id, params=new[part], tags=changed[part])

    def _copy_tags(self) -> None:
        for key, value in list(self._tags.items()):
            self._try(partial(self._client.set_tag, self._record.run_id, key, value))
            with self._changed:
                if self._tags[key] == value:
                    del self._tags[key]

    def _copy_metrics(self) -> None:
        with self._changed:
            points, self._unwritten = self._unwritten, []
        try:
            self._send_points(points)
        except Exception:
            with self._changed:
                self._unwritten = points + self._unwritten
            raise
        record = self._record
        for end, points in _batches(RunFolder(self._run_dir).metrics, record.sent_bytes):
            self._send_points(points)
            record.sent_bytes = end
            record.write(self._run_dir)  # raises on the full disk that the first ones met

    def _send_points(self, points: list[_Point]) -> None:
        from mlflow.entities import Metric

        for start in range(0, len(points), _BATCH):
            part = [Metric(*point) for point in points[start : start + _BATCH]]
            self._try(partial(self._client.log_batch, self._record.run_id, metrics=part))

    def _copy_status(self) -> None:
        path = self._run_dir / STATUS_FILE
        status = self._status or (path.read_text() if path.is_file() else "")
        if status:
            self._try(lambda: self._client.set_terminated(self._record.run_id, status))
            self._status = None
            path.unlink(missing_ok=True)

    def _copy_pictures(self) -> None:
        record, sent = self._record, dict(self._record.files)
        self._has_pictures = False  # before they are listed: more may be written meanwhile
        try:
            for name, path in _pictures(self._run_dir).items():
                with contextlib.suppress(FileNotFoundError):  # deleted or replaced meanwhile
                    found = path.stat()
                    stamp = [found.st_mtime_ns, found.st_size]
                    if record.files.get(name) != stamp:
                        self._send_file(path, posixpath.dirname(name) or None)
                        record.files[name] = stamp
        except Exception:
            self._has_pictures = True
            raise
        finally:
            if record.files != sent:
                record.write(self._run_dir)

    def _send_file(self, path: Path, folder: str | None) -> None:
        self._try(lambda: self._client.log_artifact(self._record.run_id, str(path), folder))


def _pictures(run_dir: Path) -> dict[str, Path]:
    """Name in the run folder -> path of the files to copy, oldest snapshot first."""
    found = {path for pattern in PICTURES for path in run_dir.glob(pattern) if path.is_file()}
    names = {path.relative_to(run_dir).as_posix(): path for path in found}
    return dict(sorted(names.items(), key=lambda item: (len(item[0]), item[0])))


def _batches(path: Path, start: int) -> Iterator[tuple[int, list[_Point]]]:
    """(end in bytes, points) of parts of the metrics log from `start`; only complete lines."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        # A log that is shorter was deleted and started again.
        end = file.seek(start if start <= path.stat().st_size else 0)
        points: list[_Point] = []
        first = end
        while (line := file.readline()).endswith(b"\n"):
            end += len(line)
            record = metrics_log.parse(line)
            if record is not None:
                points += _points(record.pop("images_seen"), record.pop("time", 0.0), record)
            if len(points) >= _BATCH:
                yield end, points
                points, first = [], end
        if end > first:
            yield end, points


def _points(images_seen: int, seconds: float, values: Mapping[str, Any]) -> list[_Point]:
    return [
        (_name(key), float(value), round(seconds * 1000), images_seen)
        for key, value in values.items()
        if isinstance(value, int | float)
    ]


def _name(key: str) -> str:
    """`key` as a valid MLflow name; MLflow refuses a whole batch for one `@` or `//`."""
    return posixpath.normpath(re.sub(r"[^\w./: -]", "_", key)).lstrip("./")[:250] or "_"


def _one_line(error: Exception) -> str:
    """Type and message of an error without passwords and SQL statements."""
    text = re.sub(r"//[^/@\s]+@", "//", f"{type(error).__name__}: {error}")
    return " ".join(text.partition("[SQL:")[0].split())[:_ERROR_CHARACTERS]
