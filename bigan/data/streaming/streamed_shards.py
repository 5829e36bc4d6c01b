"""Encoded samples of shards that are read sequentially, from a URL, without a copy on disk."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from bigan.data import DataError
from bigan.data.format import tar
from bigan.data.format.manifest import Manifest, Shard
from bigan.data.streaming.stores import Store
from bigan.hashes import sha256

Indices = NDArray[np.int64]

POLL_SECONDS = 0.2  # between two checks of `stop` while waiting


class StreamedShards:
    """Encoded samples in the order of `blocks`, from shards that are read sequentially.

    `blocks` yields the (positions, samples) of one block after the other. The encoded samples of a
    block stay in memory until they are read. A block is loaded while the one before it is read:
    memory holds at most two blocks of this rank, and `connections` shards while they arrive. The
    sha256 of every shard is verified before a sample of it is used.
    """

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        blocks: Iterable[tuple[Indices, Indices]],
        stop: threading.Event,
        connections: int,
        store: Store | None,
    ) -> None:
        self.manifest = manifest
        self.shards = manifest.shards(split)
        self.index = manifest.load_index(split)
        self._store = store
        self._stop = stop
        self._ready: dict[int, bytes] = {}
        self._changed = threading.Condition()
        self._unread: dict[int, int] = {}  # block -> samples not yet read
        self._block_of: dict[int, int] = {}  # position -> block
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
        for position in positions.tolist():
            data = self._take(position)
            if data is None:
                return
            yield data

    def member(self, sample: int) -> tuple[bytes, str, str]:
        """(encoded bytes, shard, member name) of one sample; reads its whole shard again."""
        shard = self.shards[int(self.index.shards_of(sample))]
        offset, size = int(self.index.offset[sample]), int(self.index.size[sample])
        data = self._read(shard)
        header = data[offset - tar.BLOCK : offset]
        name = tar.member_name(header)
        return data[offset : offset + size], self.manifest.location(shard), name

    def close(self) -> None:
        self._stop.set()
        if self._store is not None:
            self._store.close()
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
            if self._unread[block] == 0:
                del self._unread[block]
                self._changed.notify_all()
            return self._ready.pop(position)

    def _load_all(self, blocks: Iterator[tuple[Indices, Indices]]) -> None:
        try:
            with ThreadPoolExecutor(self._connections, "bigan-shard") as executor:
                for number, (positions, samples) in enumerate(blocks):
                    if not len(positions):  # this rank reads nothing of the block
                        continue
                    with self._changed:
                        while len(self._unread) > 1 and not self._stop.is_set():
                            self._changed.wait(POLL_SECONDS)
                    if self._stop.is_set():
                        return
                    self._load(number, positions, samples, executor)
        except Exception as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _load(
        self, number: int, positions: Indices, samples: Indices, executor: ThreadPoolExecutor
    ) -> None:
        with self._changed:
            self._unread[number] = len(positions)
            self._block_of |= dict.fromkeys(positions.tolist(), number)
        shard_of = self.index.shards_of(samples)

        def load_shard(shard: int) -> None:
            if self._stop.is_set():
                return
            data = self._read(self.shards[shard])
            mine = np.flatnonzero(shard_of == shard)
            offsets = self.index.offset[samples[mine]].tolist()
            sizes = self.index.size[samples[mine]].tolist()
            found = {
                position: data[offset : offset + size]
                for position, offset, size in zip(
                    positions[mine].tolist(), offsets, sizes, strict=True
                )
            }
            with self._changed:
                self._ready |= found
                self._changed.notify_all()

        for _ in executor.map(load_shard, np.unique(shard_of).tolist()):
            pass  # raises the error of a download

    def _read(self, shard: Shard) -> bytes:
        if self._store is None:
            return _read_local(self.manifest, shard)
        return self._store.read(shard.url, size=shard.filesize, sha256=shard.sha256)


def _read_local(manifest: Manifest, shard: Shard) -> bytes:
    path = manifest.folder / shard.url
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if sha256(data) != shard.sha256:
        raise DataError(f"{path}: damaged (sha256 differs); `bigan verify` lists the damage")
    return data
