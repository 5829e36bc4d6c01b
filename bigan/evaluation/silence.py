"""When the watch of a run ends: how long it has been silent, and a file that ends it."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable
from pathlib import Path

from bigan.errors import RunError
from bigan.run_folder import RunFolder

ABSENT_SECONDS = 60.0  # without a run in the folder, until the first line about it
SILENT_SECONDS = 600.0  # without a change by the trainer of a run

Echo = Callable[[str], None]


class Silence:
    """The time since a run folder last changed, on the clock of this process; for rank 0.

    Clocks of other hosts are not compared: the silence begins when a change is first seen.
    timeout_seconds: after which `check` raises; None: never.
    until: a file that exists once the trainer has ended, even if the run is not complete.
    """

    def __init__(
        self,
        run_dir: Path,
        timeout_seconds: float | None,
        echo: Echo,
        until: Path | None = None,
    ) -> None:
        self._run_dir, self._timeout, self._echo = run_dir, timeout_seconds, echo
        self._until = until
        self._last: tuple[int, str] | None = None
        self._since = self._next = 0.0

    def has_ended(self) -> bool:
        """Whether the file that ends the watch exists; read it before the snapshots are listed."""
        return self._until is not None and self._until.exists()

    def check(self) -> None:
        """Call while waiting. Prints a line at doubling intervals; `RunError` at the timeout."""
        last = last_written(self._run_dir)
        now = time.monotonic()
        if self._last is None or last != self._last:
            self._last, self._since = last, now
            self._next = SILENT_SECONDS if last[1] else ABSENT_SECONDS
        seconds = now - self._since
        if self._timeout is not None and seconds >= self._timeout:
            raise RunError(f"{self._describe(seconds)}; --timeout {self._timeout:g} has ended")
        if seconds >= self._next:
            self._next *= 2
            self._echo(f"{self._describe(seconds)}; still waiting (--timeout SECONDS sets a limit)")

    def _describe(self, seconds: float) -> str:
        name = self._last[1] if self._last else ""
        if not name:
            return f"{self._run_dir}: no run for {seconds:.0f} s{suggestion(self._run_dir)}"
        folder = RunFolder(self._run_dir)
        state = "was stopped (REQUEUE)" if folder.requeue.exists() else "hangs or has ended"
        return (
            f"{self._run_dir}: nothing written for {seconds:.0f} s (last: {name}), so the trainer "
            f"{state} before the end of the run; its command resumes it"
        )


def last_written(run_dir: Path) -> tuple[int, str]:
    """(modification time in ns, name) of what a trainer wrote last; (0, "") without a run."""
    folder = RunFolder(run_dir)
    if not folder.config.is_file():
        return 0, ""
    found = [(0, folder.config.name)]
    for path in (
        folder.config,
        folder.environment,
        folder.metrics,
        folder.checkpoints,
        folder.snapshots,
        folder.samples,
        folder.requeue,
    ):
        try:
            found.append((path.stat().st_mtime_ns, path.name))
        except OSError:  # not written yet
            continue
    return max(found)


def suggestion(run_dir: Path) -> str:
    """Runs that a path without a run may mean, as the end of a message."""
    if runs := _runs_in(run_dir):
        return f"; it contains {', '.join(runs[:8])}"
    parent = run_dir.absolute().parent
    if not parent.is_dir():
        return f"; there is no folder {run_dir.parent}"
    close = difflib.get_close_matches(run_dir.name, _runs_in(parent), 3)
    return f"; similar: {', '.join(str(run_dir.parent / name) for name in close)}" if close else ""


def _runs_in(folder: Path) -> list[str]:
    """Names of the run folders in `folder`."""
    try:
        return sorted(p.name for p in folder.iterdir() if RunFolder(p).config.is_file())
    except OSError:
        return []
