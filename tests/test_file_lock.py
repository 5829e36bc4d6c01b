"""File locks: exclusive, and interruptible while waiting."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from bigan.file_lock import locked


def test_a_held_lock_is_waited_for_until_stopped(tmp_path: Path) -> None:
    stopped = threading.Event()
    with (tmp_path / "lock").open("w") as first, (tmp_path / "lock").open("w") as second:
        with locked(first.fileno(), stopped) as held:
            assert held
            threading.Timer(0.1, stopped.set).start()
            with pytest.raises(InterruptedError), locked(second.fileno(), stopped):
                pass
        with locked(second.fileno()) as held:
            assert held


def test_without_locks_the_body_runs_unlocked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr("bigan.file_lock.fcntl.flock", refuse)
    with (tmp_path / "lock").open("w") as file, locked(file.fileno()) as held:
        assert not held
