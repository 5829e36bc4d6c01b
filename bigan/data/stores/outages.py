"""Waiting for a store that is unavailable: exponential backoff, jitter, and reports.

Each attempt of a transfer either succeeds, raises `TransientError` (an outage, too many
requests, a cut transfer), `WrongContentError` for a complete response that is not the expected
file, or `DataError` for a permanent failure.
"""

from __future__ import annotations

import datetime
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from bigan.data import DataError, OutageError

T = TypeVar("T")

FIRST_WAIT_SECONDS = 0.5  # upper limit of the first wait; doubles with each failure
LONGEST_WAIT_SECONDS = 15.0
REPORT_SECONDS = 30.0  # between two lines about an unavailable store
FIRST_REPORT_SECONDS = 5.0  # before the first line: the URL may be mistyped
WRONG_CONTENT_ATTEMPTS = 3  # a damaged transfer is transient, a wrong file is not
POLL_SECONDS = 1.0

# Not seeded: processes must differ, and the draws of training must not change.
_jitter = random.Random()


class TransientError(Exception):
    """A failure of a request that may succeed when it is repeated.

    `retry_after_seconds` is the least wait, from `Retry-After`; `progress`: a part of the response
    has arrived and is kept.
    """

    def __init__(self, reason: str, retry_after_seconds: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after_seconds = retry_after_seconds
        self.progress = False


class WrongContentError(Exception):
    """A complete response that is not the expected file."""

    progress = False


class Patience:
    """The waiting of one process for one store, from several threads.

    `shown` is the URL without secrets, `stopped` ends every wait with `InterruptedError`.
    """

    def __init__(self, shown: str, seconds: float, stopped: threading.Event) -> None:
        self._shown = shown
        self._seconds = seconds
        self._stopped = stopped
        self._lock = threading.Lock()
        self._down_since: float | None = None  # time.time()
        self._reason = ""
        self._reported: float | None = None  # time.monotonic() of the last line
        self._num_lines = 0

    def repeat(self, what: str, attempt: Callable[[], T]) -> T:
        """The result of `attempt`, repeated after transient failures; `what` names the file.

        Raises `OutageError` after `seconds` without success, `DataError` at once for a permanent
        failure, and `InterruptedError` once stopped.
        """
        num, wrong, began = 0, 0, 0.0
        while True:
            try:
                result = attempt()
            except WrongContentError as error:
                wrong += 1
                if wrong >= WRONG_CONTENT_ATTEMPTS:
                    raise DataError(
                        f"{what}: cannot be read ({error}, in {wrong} transfers); it is not the "
                        "file of the manifest: copy the data set to the store again"
                    ) from None
            except TransientError as error:
                now = time.monotonic()
                if error.progress or not began:
                    num, began = 0, now
                self._failed(str(error))
                left = began + self._seconds - now
                if left <= 0:
                    raise OutageError(
                        f"{what}: cannot be read ({error}; repeated for {now - began:.0f} s); "
                        "when the store answers again, run the same command again "
                        "(data.patience_seconds is how long to wait)"
                    ) from None
                self._sleep(min(wait_seconds(num, error.retry_after_seconds), left))
                num += 1
            else:
                self._answered()
                return result

    def report(self) -> None:
        """Print the line about an unavailable store if one is due; to be called while waiting."""
        with self._lock:
            if self._down_since is None or self._reported is None:
                return
            if time.monotonic() - self._reported < REPORT_SECONDS:
                return
            self._reported = time.monotonic()
            self._num_lines += 1
            line = (
                f"{self._shown}: unavailable since {_clock(self._down_since)} ({self._reason}); "
                f"repeating requests for up to {self._seconds:.0f} s (data.patience_seconds)"
            )
        _print(line)

    def is_down(self) -> bool:
        """Whether the last transfer failed."""
        return self._down_since is not None

    def _failed(self, reason: str) -> None:
        with self._lock:
            self._reason = reason
            if self._down_since is None:
                self._down_since = time.time()
                early = max(0.0, REPORT_SECONDS - FIRST_REPORT_SECONDS)
                self._reported = time.monotonic() - early
        self.report()

    def _answered(self) -> None:
        if self._down_since is None:
            return
        with self._lock:
            since, num_lines = self._down_since, self._num_lines
            self._down_since, self._num_lines = None, 0
        if since is not None and num_lines:
            _print(f"{self._shown}: available again, after {time.time() - since:.0f} s")

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if self._stopped.wait(min(left, POLL_SECONDS)):
                raise InterruptedError(f"{self._shown}: the stream was closed")
            self.report()


def wait_seconds(num_failures: int, retry_after_seconds: float) -> float:
    """Exponential backoff with full jitter, after `retry_after_seconds`."""
    limit = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2.0 ** min(num_failures, 16))
    return retry_after_seconds + _jitter.uniform(0, limit)


def _clock(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds).strftime("%H:%M:%S")


def _print(line: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # one process of each node
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
