"""How a run is asked to stop: by a signal, or by a file; and what it leaves for its scheduler.

A signal becomes a flag, on which the ranks agree at a step boundary, so that none leaves alone.
`STOP` in the run folder asks for the same, `REQUEUE` says that a run was stopped before its end.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from bigan.atomic_files import write_atomic

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
STOP, REQUEUE = "STOP", "REQUEUE"
ECHO_SECONDS = 2.0  # SLURM signals every process and the launcher forwards the same once more
LAST_WORDS_SECONDS = 5.0  # for a line and the marker, on file systems and pipes that may hang

GRACE_SECONDS = 30.0  # from the first signal, or the last step, to the next one

Say = Callable[[str], None]


def say(line: str) -> None:
    """Write `bigan: LINE` to stderr without a lock that a hanging thread could hold."""
    with contextlib.suppress(OSError):
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"bigan: {line}\n".encode())


def speaks(environment: Mapping[str, str]) -> bool:
    """Whether this process says what all processes of a launch are told alike: on rank 0."""
    return environment.get("RANK", environment.get("SLURM_PROCID", "0")) == "0"


def leave(code: int, last_words: Callable[[], None]) -> None:
    """End this process with `code` after `last_words()`, whatever its other threads do."""
    timer = threading.Timer(LAST_WORDS_SECONDS, os._exit, [code])
    timer.daemon = True
    timer.start()
    try:
        last_words()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    finally:
        os._exit(code)


class StopFlag:
    """Remembers the first of `SIGNALS` as `signal` (0: none) and sees that the process ends.

    A second signal, `ECHO_SECONDS` or more after the first, leaves at once with 128 + its number.
    So does the first if within `grace_seconds` of it the loop neither comes back (`alive`) nor says
    that it is saving (`patient`): it hangs, say on a silent server, and the last checkpoint counts.
    `before_leaving(signal)` is called first, to leave a marker; it may be set later.

    Python runs a signal's handler between two bytecodes of the main thread, never while that thread
    waits in C (a collective, a lock of CUDA's). Therefore a thread of its own is told of signals by
    the C handler (`signal.set_wakeup_fd`). Only C code that holds the GIL keeps it waiting.

    Use as a context manager around everything, in the main thread; the former handlers come back
    afterwards. While it is entered, SIGINT raises no KeyboardInterrupt.
    """

    def __init__(
        self,
        grace_seconds: float = GRACE_SECONDS,
        echo: Say = say,
        before_leaving: Callable[[int], None] | None = None,
    ) -> None:
        self.signal: int = 0
        self.grace_seconds = grace_seconds
        self.before_leaving = before_leaving
        self._echo = echo
        self._former: dict[int, object] = {}
        self._first = 0.0  # time of the first signal
        self._alive = 0.0  # time of the last step boundary
        self._saving = False

    def alive(self) -> None:
        """The loop has reached a step boundary; call it at each."""
        self._alive = time.monotonic()

    @contextlib.contextmanager
    def patient(self) -> Iterator[None]:
        """Inside, the grace time does not run: saving may take longer."""
        self._saving = True
        try:
            yield
        finally:
            self._alive = time.monotonic()
            self._saving = False

    def __enter__(self) -> StopFlag:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._former_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in SIGNALS:
            self._former[number] = signal.signal(number, self._receive)
        self._thread = threading.Thread(target=self._watch, name="stop signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._former_fd)
        os.close(self._writer)  # ends the thread
        self._thread.join()
        os.close(self._reader)

    def _receive(self, number: int, _: types.FrameType | None) -> None:
        self.signal = self.signal or number  # the thread does the rest

    def _watch(self) -> None:
        """Until the pipe is closed: read the signals' numbers, keep the grace time."""
        while True:
            readable, _, _ = select.select([self._reader], [], [], self._patience())
            if not readable:
                if self._patience() == 0:
                    line = f"no step boundary for {self.grace_seconds:g} s; leaving, the last "
                    self._leave(self.signal, line + "checkpoint counts")
                continue
            numbers = os.read(self._reader, 4096)
            if not numbers:
                return
            for number in numbers:
                if number in SIGNALS:
                    self._count(number)

    def _count(self, number: int) -> None:
        now = time.monotonic()
        if not self._first:
            self._first = now
            self.signal = self.signal or number
            line = "saving at the next step boundary; a second signal leaves at once"
            if speaks(os.environ):
                self._echo(f"signal {number}: {line}")
        elif now - self._first >= ECHO_SECONDS:
            self._leave(number, "leaving at once, the last checkpoint counts", speaks(os.environ))

    def _patience(self) -> float | None:
        """Seconds until the loop counts as hanging; None: it does not."""
        if not self._first:
            return None
        if self._saving:
            return 1.0  # and look again: it ends
        return max(0.0, max(self._first, self._alive) + self.grace_seconds - time.monotonic())

    def _leave(self, number: int, line: str, aloud: bool = True) -> None:
        def last_words() -> None:
            if aloud:
                self._echo(f"signal {number}: {line}")
            if self.before_leaving is not None:
                self.before_leaving(number)

        leave(128 + number, last_words)


def asked(run_dir: Path) -> bool:
    """Whether somebody has created the file STOP in the run folder."""
    return (run_dir / STOP).exists()


def write_requeue(run_dir: Path, signal: int, images_seen: int) -> None:
    """Leave REQUEUE (JSON): stopped by `signal` at `images_seen`, the same command goes on."""
    content = {"signal": int(signal), "images_seen": images_seen}
    write_atomic(run_dir / REQUEUE, json.dumps(content) + "\n")


def clear(run_dir: Path) -> None:
    """At a start: forget that the former attempt was asked to stop, and that it did."""
    for name in (STOP, REQUEUE):
        (run_dir / name).unlink(missing_ok=True)
