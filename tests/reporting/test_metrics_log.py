"""The metrics log with concurrent writers, incomplete lines and non-finite numbers."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

import numpy as np
import pytest
from commands import finish, python

from bigan.reporting import metrics_log
from bigan.reporting.tracker import Tracker, read_metrics, series
from bigan.run_config import TrackingConfig

OFF = TrackingConfig(mlflow=False)


def test_line_has_flat_keys_and_is_read_back(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path / "run", OFF, role="train")
    before = time.time()
    tracker.log(1000, {"train/discriminator/loss": 1.25, "eval/fd/digits8-cnn-v1": np.float32(0.5)})
    assert tracker.close("FINISHED") is None
    (line,) = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record == read_metrics(tmp_path / "run")[0]
    assert list(record)[:2] == ["images_seen", "time"]
    assert record["images_seen"] == 1000
    assert record["train/discriminator/loss"] == 1.25
    assert record["eval/fd/digits8-cnn-v1"] == 0.5
    assert before - 0.01 <= record["time"] <= time.time() + 0.01


def test_non_finite_numbers_are_valid_json_and_are_read_back(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, OFF, role="train")
    tracker.log(1, {"a": math.nan, "b": math.inf, "c": -math.inf})

    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is not JSON")

    line = (tmp_path / "metrics.jsonl").read_text()
    record = json.loads(line, parse_constant=refuse)
    assert (record["a"], record["b"], record["c"]) == ("NaN", "Infinity", "-Infinity")
    (read,) = read_metrics(tmp_path)
    assert math.isnan(read["a"])
    assert (read["b"], read["c"]) == (math.inf, -math.inf)


@pytest.mark.parametrize(
    ("tail", "kept"),
    [
        ('{"images_seen": 2, "time": 1.0, "train/lo', []),  # truncated within a record
        ('{"images_seen": 2, "time": 1.0, "a": 3.0}', [2]),  # only the newline is missing
    ],
)
def test_incomplete_last_line_is_repaired(tmp_path: Path, tail: str, kept: list[int]) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"images_seen": 1, "time": 1.0, "a": 2.0}\n' + tail)
    assert [r["images_seen"] for r in read_metrics(tmp_path)] == [1, *kept]  # without repair
    Tracker(tmp_path, OFF, role="train").log(3, {"a": 4.0})
    records = [json.loads(line) for line in path.read_text().splitlines()]  # every line is valid
    assert [r["images_seen"] for r in records] == [1, *kept, 3]
    assert read_metrics(tmp_path) == records


def test_run_without_metrics_log_is_empty(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


def test_tail_of_a_large_log_is_read_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with path.open("wb") as file:
        file.truncate(100 << 20)  # zeros, which take no space
        file.seek(0, os.SEEK_END)
        file.writelines(b'{"images_seen": %d, "time": 0.0}\n' % number for number in range(5000))
    tail = metrics_log.read_tail(tmp_path, 1000)
    assert [record["images_seen"] for record in tail] == list(range(5000 - len(tail), 5000))
    assert 20 < len(tail) < 40
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        metrics_log.read_tail(tmp_path)
        times.append(time.perf_counter() - begun)
    assert min(times) < 0.1
    assert metrics_log.read_tail(tmp_path / "nowhere") == []


def test_tail_of_a_short_log_is_all_of_it(tmp_path: Path) -> None:
    for number in range(3):
        metrics_log.append(tmp_path / "metrics.jsonl", number, 0.0, {"a": 1.0})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"images_seen": 3, "ti')
    assert metrics_log.read_tail(tmp_path) == read_metrics(tmp_path)


def test_last_line_of_a_repeated_tick_is_returned() -> None:
    records = [
        {"images_seen": 10, "a": 1.0},
        {"images_seen": 20, "a": 2.0, "b": 7.0},
        {"images_seen": 30, "a": 3.0},
        {"images_seen": 20, "a": 5.0},  # resumed from 10
    ]
    x, y = series(records, "a")
    np.testing.assert_array_equal(x, [10, 20, 30])
    np.testing.assert_array_equal(y, [1, 5, 3])
    assert [len(v) for v in series(records, "missing")] == [0, 0]


def test_lines_of_two_processes_do_not_interleave(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from bigan.reporting import metrics_log
sys.stdout.write("ready\\n"); sys.stdout.flush(); sys.stdin.readline()
for i in range(500):
    values = {f"{sys.argv[2]}/{'k' * (i % 300)}": i, "padding" * 50: 0.1}
    metrics_log.append(Path(sys.argv[1]) / "metrics.jsonl", i, 0.0, values)
"""
    both = [python(code, tmp_path, role) for role in ("train", "evaluation")]
    for process in both:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in both:  # both write before one of them is awaited
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in both:
        finish(process)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for role in ("train", "evaluation"):
        own = [r["images_seen"] for r in records if any(k.startswith(f"{role}/") for k in r)]
        assert own == list(range(500))
    assert len(records) == 1000


def test_writer_waits_for_the_lock(tmp_path: Path) -> None:
    """The lock separates lines where a write is not atomic, and protects them from the repair."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("")
    descriptor = os.open(path, os.O_RDWR)
    code = """
import sys
from pathlib import Path
from bigan.reporting import metrics_log
sys.stdout.write("ready\\n"); sys.stdout.flush()
metrics_log.append(Path(sys.argv[1]), 1, 0.0, {"a": 1.0})
"""
    with metrics_log.locked(descriptor) as alone:
        assert alone
        process = python(code, path)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.3)
        assert path.read_text() == ""
    finish(process)
    assert len(read_metrics(tmp_path)) == 1
    os.close(descriptor)
