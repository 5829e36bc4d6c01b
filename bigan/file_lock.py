"""Advisory locks of open files (`flock`), which the kernel releases when their process ends."""

from __future__ import annotations

import contextlib
import fcntl
import threading
from collections.abc import Iterator

POLL_SECONDS = 0.05  # between two attempts to take a lock that is held elsewhere


@contextlib.contextmanager
def locked(descriptor: int, stopped: threading.Event | None = None) -> Iterator[bool]:
    """Hold the exclusive lock of an open file.

    Yields True, or False on a file system without locks (some Lustre mounts). Waits while another
    process or another open file holds the lock. With `stopped`, raises `InterruptedError` if that
    event is set while waiting.
    """
    try:
        _acquire(descriptor, stopped)
    except InterruptedError:
        raise
    except OSError:
        yield False
        return
    try:
        yield True
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def try_lock(descriptor: int) -> bool | None:
    """Take the exclusive lock of an open file until the file is closed, without waiting.

    Returns whether it was taken; None on a file system without locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _acquire(descriptor: int, stopped: threading.Event | None) -> None:
    if stopped is None:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return
    while True:  # poll: a blocking flock cannot be interrupted by an event
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        if stopped.wait(POLL_SECONDS):
            raise InterruptedError("stopped while waiting for a file lock")
