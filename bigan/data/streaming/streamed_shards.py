"""Encoded samples of shards that are read in large ranges, from a URL, without a copy on disk."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from bigan.data.format import tar
from bigan.data.streaming.ranges import READ_SHARE, ShardRanges, span, spans

Indices = NDArray[np.int64]

POLL_SECONDS = 0.2  # between two checks of `stop` while waiting


class StreamedShards:
    """Encoded samples in the order of `blocks`, from ranges of shards that are read ahead.

    `blocks` yields the (positions, samples) of one block after the other. The encoded samples of a
    block stay in memory until they are read. A block is loaded while the one before it is read:
    memory holds at most two blocks of this rank, more only if a batch needs more, and `connections`
    ranges while they arrive. `max_gap`: see `ranges.spans`.
    """

    def __init__(
        self,
        ranges: ShardRanges,
        blocks: Iterable[tuple[Indices, Indices]],
        stop: threading.Event,
        connections: int,
        max_gap: int,
    ) -> None:
        self.manifest = ranges.manifest
        self.index = ranges.index
        self._ranges = ranges
        self._max_gap = max_gap
        self._stop = stop
        self._ready: dict[int, bytes] = {}
        self._changed = threading.Condition()
        self._unread: dict[int, int] = {}  # block -> samples not yet read
        self._block_of: dict[int, int] = {}  # position -> block
        self._enough = 0  # unread samples of the latest block at which the next one is loaded
        self._wanted = -1  # largest position that has been requested
        self._error: Exception | None = None
        self._connections = connections
        self._thread = threading.Thread(
            target=self._load_all, args=(iter(blocks),), name="bigan-stream", daemon=True
        )
        self._started = False  # at the first read: an unused stream costs nothing

    def images(self, positions: Indices, samples: Indices) -> Iterator[bytes]:
        """The encoded bytes of each of `samples`; ends early once stopped."""
        with self._changed:
            if not self._started:
                self._started = True
                self._thread.start()
            if len(positions):
                self._wanted = max(self._wanted, int(positions.max()))
                self._changed.notify_all()
        for position in positions.tolist():
            data = self._take(position)
            if data is None:
                return
            yield data

    def member(self, sample: int) -> tuple[bytes, str, str]:
        """(encoded bytes, shard, member name) of one sample, which is read again."""
        shard = int(self.index.shards_of(sample))
        (data,) = self._ranges.read(shard, [span(self.index, sample, sample + 1)])
        name = tar.member_name(data[: tar.BLOCK])
        return data[tar.BLOCK :], self._ranges.location(shard), name

    def close(self) -> None:
        self._stop.set()
        self._ranges.close()
        with self._changed:
            self._changed.notify_all()
            started = self._started
        if started:
            self._thread.join()
        self._ready.clear()

    def _take(self, position: int) -> bytes | None:
        """Wait for the bytes at `position`; None once the stream is stopped."""
        with self._changed:
            while position not in self._ready:
                if self._stop.is_set():
                    return None
                if self._error is not None:
                    raise self._error
                self._changed.wait(POLL_SECONDS)
            block = self._block_of.pop(position)
            self._unread[block] -= 1
            if self._unread[block] in (0, self._enough):
                self._changed.notify_all()
            if self._unread[block] == 0:
                del self._unread[block]
            return self._ready.pop(position)

    def _load_all(self, blocks: Iterator[tuple[Indices, Indices]]) -> None:
        try:
            with ThreadPoolExecutor(self._connections, "bigan-shard") as executor:
                for number, (positions, samples) in enumerate(blocks):
                    self._wait_for_space(number, int(positions.min()))
                    if self._stop.is_set() or self._error is not None:
                        return
                    self._load(number, positions, samples, executor)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """Raise `error` in the threads that read, and cancel the other downloads."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()
        self._ranges.close()

    def _wait_for_space(self, number: int, first: int) -> None:
        """Wait until block `number`, from position `first` on, is to be loaded, or stopped."""

        def too_early() -> bool:
            latest = self._unread.get(number - 1, 0)
            return len(self._unread) > 1 or latest > self._enough

        with self._changed:
            while too_early() and first > self._wanted and not self._stop.is_set():
                self._changed.wait(POLL_SECONDS)

    def _load(
        self, number: int, positions: Indices, samples: Indices, executor: ThreadPoolExecutor
    ) -> None:
        with self._changed:
            self._unread[number] = len(positions)
            self._enough = len(positions) - len(positions) // READ_SHARE
            self._block_of |= dict.fromkeys(positions.tolist(), number)
        order = np.argsort(samples)
        borders = np.flatnonzero(np.diff(self.index.shards_of(samples[order]))) + 1

        def load(rows: Indices) -> None:
            if self._stop.is_set() or self._error is not None:
                return
            try:
                self._load_ranges(positions[rows], samples[rows])
            except InterruptedError:
                pass  # closed, or another one has failed
            except Exception as error:
                self._fail(error)

        list(executor.map(load, np.split(order, borders)))

    def _load_ranges(self, positions: Indices, samples: Indices) -> None:
        """Read increasing `samples`, all of one shard."""
        shard = int(self.index.shards_of(samples[0]))
        wanted = spans(self.index, samples, self._max_gap)
        for each, data in zip(wanted, self._ranges.read(shard, wanted), strict=True):
            rows = slice(*np.searchsorted(samples, [each.first, each.last]))
            images = self._ranges.images(each, data, samples[rows])
            found = dict(zip(positions[rows].tolist(), images, strict=True))
            with self._changed:
                self._ready |= found
                self._changed.notify_all()
