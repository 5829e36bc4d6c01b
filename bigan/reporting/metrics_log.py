"""The metrics log of a run, `<run_dir>/metrics.jsonl`: one JSON object per line.

    {"images_seen": 20000, "time": 1760000000.123, "train/generator/loss": 1.93, ...}

Trainer and evaluator append concurrently: a line is one write(2) in append mode under the lock of
the file. A killed process can leave an incomplete last line, which the next writer repairs. JSON
has no NaN or infinity: they are written as "NaN", "Infinity" and "-Infinity" and read as floats.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigan.file_lock import locked

if TYPE_CHECKING:
    import numpy as np

FILENAME = "metrics.jsonl"

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_LINE_BYTES = 1 << 16  # an upper bound of the length of a line


def append(path: Path, images_seen: int, seconds: float, values: Mapping[str, float]) -> None:
    """Append one line to the metrics log `path`. seconds: unix time. Raises OSError (full disk)."""
    record: dict[str, float | str] = {"images_seen": images_seen, "time": seconds}
    record |= {key: plain(value) for key, value in values.items()}
    line = json.dumps(record, allow_nan=False).encode() + b"\n"
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        with locked(descriptor) as alone:
            data = _mend_tail(descriptor, alone) + line
            num_written = os.write(descriptor, data)
            if num_written < len(data):
                if alone:
                    os.ftruncate(descriptor, os.fstat(descriptor).st_size - num_written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(descriptor)


def parse(line: bytes) -> dict[str, Any] | None:
    """The record of one line, or None if the line is incomplete."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("images_seen"), int):
        return None
    return {
        key: _NON_FINITE.get(value, value) if isinstance(value, str) else value
        for key, value in record.items()
    }


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of a run in the order written; [] if it has no metrics log yet.

    Each record has `images_seen` (int), `time` (unix seconds) and flat keys with float values.
    Incomplete lines are skipped.
    """
    try:
        lines = (run_dir / FILENAME).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    return [record for line in lines if (record := parse(line)) is not None]


def read_tail(run_dir: Path, num_bytes: int = 4 * _LINE_BYTES) -> list[dict[str, Any]]:
    """As `read_metrics`, but only the records in the last `num_bytes` of the file.

    A file that cannot be read has none.
    """
    try:
        with (run_dir / FILENAME).open("rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - num_bytes)
            file.seek(start)
            lines = file.read(num_bytes).splitlines()
    except OSError:
        return []
    if start > 0:  # the first line is incomplete, although its end may look like a record
        del lines[:1]
    return [record for line in lines if (record := parse(line)) is not None]


def series(records: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(images_seen int64 [n], values float64 [n]) of one key, in order of images_seen.

    A resumed run repeats the ticks after its checkpoint: the last value of each is returned.
    """
    import numpy as np  # here: the status of a run needs no arrays

    last = {record["images_seen"]: record[key] for record in records if key in record}
    steps = sorted(last)
    return np.array(steps, dtype=np.int64), np.array([last[s] for s in steps], dtype=np.float64)


def plain(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _mend_tail(descriptor: int, alone: bool) -> bytes:
    """Repair an incomplete last line; returns the bytes that must precede the next line.

    A record without its newline is terminated. A fragment is truncated, so that the file remains
    valid JSON lines. Without the lock (`alone` is False) a fragment is only terminated, because
    another process may be writing it.
    """
    size = os.fstat(descriptor).st_size
    if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n":
        return b""
    start = max(0, size - _LINE_BYTES)
    fragment = os.pread(descriptor, size - start, start).rpartition(b"\n")[2]
    if alone and parse(fragment) is None:
        os.ftruncate(descriptor, size - len(fragment))
        return b""
    return b"\n"
