"""Signals become a flag; the ranks agree on it at a tick, so that none leaves alone."""

from __future__ import annotations

import os
import signal
import types

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class StopFlag:
    """Remembers the first stop signal. A second Ctrl-C (SIGINT) leaves at once.

    Use as a context manager around the loop; the former handlers come back afterwards. Only the
    main thread may install handlers.
    """

    def __init__(self) -> None:
        self.signal: int = 0
        self._former: dict[int, object] = {}

    def __enter__(self) -> StopFlag:
        for number in SIGNALS:
            self._former[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, _: types.FrameType | None) -> None:
        # A launcher answers Ctrl-C with a SIGTERM of its own to each worker: only a repeated
        # SIGINT means that the user is tired of waiting.
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            os._exit(128 + number)
        self.signal = self.signal or number
