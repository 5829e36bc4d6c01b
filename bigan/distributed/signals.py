"""Preemption: stop requests by a signal or a file, and the marker for the scheduler.

A signal sets a flag; the ranks agree on it at a step boundary, so that all of them stop at the same
step. The file `STOP` in the run folder is a stop request as well. `REQUEUE` in the run folder marks
a run that was stopped before its end.
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
from bigan.distributed.launch_env import MPI

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
STOP, REQUEUE = "STOP", "REQUEUE"
ECHO_SECONDS = 2.0  # SLURM signals every process, and the launcher forwards the same signal
CLEANUP_SECONDS = 5.0  # for a line and the marker, on file systems and pipes that may hang

GRACE_SECONDS = 30.0  # from the first signal, or the last step boundary, to the next boundary

Echo = Callable[[str], None]


def print_line(line: str) -> None:
    """Write `bigan: LINE` to stderr without a lock that a hanging thread could hold."""
    with contextlib.suppress(OSError):
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"bigan: {line}\n".encode())


def launched_as_rank_0(environment: Mapping[str, str]) -> bool:
    """Whether this process is rank 0, which prints messages that are equal on all ranks."""
    return launched_rank(environment) == "0"


def launched_rank(environment: Mapping[str, str]) -> str:
    """The rank that a launcher gave this process, "0" without one."""
    names = ("RANK", "SLURM_PROCID", *MPI.values())
    return next((environment[name] for name in names if environment.get(name)), "0")


def exit_process(code: int, cleanup: Callable[[], None]) -> None:
    """Exit with `code` after `cleanup()`, without waiting for other threads.

    `cleanup` is interrupted after `CLEANUP_SECONDS`.
    """
    timer = threading.Timer(CLEANUP_SECONDS, os._exit, [code])
    timer.daemon = True
    timer.start()
    try:
        cleanup()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    finally:
        os._exit(code)


class StopFlag:
    """Stores the first of `SIGNALS` in `signal` (0: none) and guarantees that the process exits.

    A second signal, `ECHO_SECONDS` or more after the first, exits at once with 128 + its number.
    The process also exits with 128 + the first signal if the trainer reaches no `step_boundary`
    within `grace_seconds` and is not saving (`suspend_grace_time`): it hangs, for example on a
    server that does not answer. `before_exit(signal)` is called before such an exit, to write the
    marker; it may be assigned later. With `interruptible`, SIGINT before the first step boundary
    exits at once as well.

    Python runs a signal handler between two bytecodes of the main thread, never while that thread
    waits in C (a collective, a CUDA call). Therefore the C handler notifies a separate thread
    (`signal.set_wakeup_fd`), which only C code that holds the GIL can delay.

    A context manager for the main thread, which restores the previous handlers on exit. Inside,
    SIGINT raises no KeyboardInterrupt.
    """

    def __init__(
        self,
        grace_seconds: float = GRACE_SECONDS,
        echo: Echo = print_line,
        before_exit: Callable[[int], None] | None = None,
        interruptible: bool = False,
    ) -> None:
        self.signal: int = 0
        self.grace_seconds = grace_seconds
        self.before_exit = before_exit
        self._echo = echo
        self._interruptible = interruptible
        self._former: dict[int, object] = {}
        self._first = 0.0  # time of the first signal
        self._alive = 0.0  # time of the last step boundary
        self._saving = False

    def step_boundary(self) -> None:
        """Record a step boundary; call at each."""
        self._alive = time.monotonic()

    @contextlib.contextmanager
    def suspend_grace_time(self) -> Iterator[None]:
        """A context in which the grace time is suspended, for saving."""
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
        self.signal = self.signal or number  # `_watch` does the rest

    def _watch(self) -> None:
        """Read signal numbers and enforce the grace time until the pipe is closed."""
        while True:
            readable, _, _ = select.select([self._reader], [], [], self._patience())
            if not readable:
                if self._patience() == 0:
                    line = f"no step boundary for {self.grace_seconds:g} s; exiting without saving"
                    self._leave(self.signal, line)
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
            if number == signal.SIGINT and self._interruptible and not self._alive:
                line = "interrupted before the first training step"
                self._leave(number, line, launched_as_rank_0(os.environ))
            line = "saving at the next step boundary; a second signal exits without saving"
            if launched_as_rank_0(os.environ):
                self._echo(f"signal {number}: {line}")
        elif now - self._first >= ECHO_SECONDS:
            self._leave(number, "exiting without saving", launched_as_rank_0(os.environ))

    def _patience(self) -> float | None:
        """Seconds until the grace time ends; None without a signal."""
        if not self._first:
            return None
        if self._saving:
            return 1.0  # polled: saving ends without a signal
        return max(0.0, max(self._first, self._alive) + self.grace_seconds - time.monotonic())

    def _leave(self, number: int, line: str, verbose: bool = True) -> None:
        def cleanup() -> None:
            if verbose:
                self._echo(f"signal {number}: {line}")
            if self.before_exit is not None:
                self.before_exit(number)

        exit_process(128 + number, cleanup)


def stop_requested(run_dir: Path) -> bool:
    """Whether the file STOP exists in the run folder."""
    return (run_dir / STOP).exists()


def write_requeue(run_dir: Path, signal: int, images_seen: int) -> None:
    """Write REQUEUE, {"signal", "images_seen"}: the run was stopped and can be resumed."""
    content = {"signal": int(signal), "images_seen": images_seen}
    write_atomic(run_dir / REQUEUE, json.dumps(content) + "\n")


def clear_markers(run_dir: Path) -> None:
    """Delete the stop request and the marker of the previous attempt; call at the start."""
    for name in (STOP, REQUEUE):
        (run_dir / name).unlink(missing_ok=True)
