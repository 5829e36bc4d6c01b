"""Encoded samples of shards that are read front to back: from a URL, with nothing on disk."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from bigan.data import DataError
from bigan.data.format import tar
from bigan.data.format.manifest import Manifest, Shard
from bigan.data.streaming import remote

Indices = NDArray[np.int64]

PATIENCE_SECONDS = 0.2  # between two looks at `stop` while waiting


class Streamed:
    """Encoded samples in the order of `blocks`, from shards that are read front to back.

    `blocks` yields (positions, samples) that belong together: of the shards they lie in, the
    encoded samples are kept in memory until they have been taken. A block is loaded while the one
    before it is read, so at most two blocks of this rank are held, and `connections` whole shards
    while they arrive. Every shard is verified by its sha256 before a sample of it is used.
    """

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        blocks: Iterable[tuple[Indices, Indices]],
        stop: threading.Event,
        connections: int,
        allow_pipe: bool,
    ) -> None:
        self.manifest = manifest
        self.shards = manifest.shards(split)
        self.index = manifest.load_index(split)
        self._allow_pipe = allow_pipe
        self._stop = stop
        self._ready: dict[int, bytes] = {}
        self._changed = threading.Condition()
        self._untaken: dict[int, int] = {}  # block -> samples not yet taken
        self._block_of: dict[int, int] = {}  # position -> block
        self._error: Exception | None = None
        self._connections = connections
        self._transfers = remote.Transfers()
        self._thread = threading.Thread(
            target=self._load_all, args=(iter(blocks),), name="bigan-stream", daemon=True
        )
        self._started = False  # by the first reader: a stream that is never read costs nothing

    def images(self, positions: Indices, samples: Indices) -> Iterator[bytes]:
        """The encoded bytes of `samples`, one after the other; ends early once stopped."""
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
        shard = self.shards[int(self.index.shard[sample])]
        offset, size = int(self.index.offset[sample]), int(self.index.size[sample])
        whole = self._whole(shard)
        header = whole[offset - tar.BLOCK : offset]
        name = tar.member_name(header)
        return whole[offset : offset + size], self.manifest.location(shard), name

    def close(self) -> None:
        self._stop.set()
        self._transfers.stop()
        with self._changed:
            self._changed.notify_all()
            started = self._started
        if started:
            self._thread.join()
        self._ready.clear()

    def _take(self, position: int) -> bytes | None:
        """The bytes at `position`, waiting for them; None once the stream is stopped."""
        with self._changed:
            while position not in self._ready:
                if self._stop.is_set():
                    return None
                if self._error is not None:
                    raise self._error
                self._changed.wait(PATIENCE_SECONDS)
            block = self._block_of.pop(position)
            self._untaken[block] -= 1
            if self._untaken[block] == 0:
                del self._untaken[block]
                self._changed.notify_all()
            return self._ready.pop(position)

    def _load_all(self, blocks: Iterator[tuple[Indices, Indices]]) -> None:
        try:
            with ThreadPoolExecutor(self._connections, "bigan-shard") as executor:
                for number, (positions, samples) in enumerate(blocks):
                    if not len(positions):  # no part of the block is this rank's
                        continue
                    with self._changed:
                        while len(self._untaken) > 1 and not self._stop.is_set():
                            self._changed.wait(PATIENCE_SECONDS)
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
            self._untaken[number] = len(positions)
            self._block_of |= dict.fromkeys(positions.tolist(), number)
        shard_of = self.index.shard[samples]

        def load_shard(shard: int) -> None:
            if self._stop.is_set():
                return
            whole = self._whole(self.shards[shard])
            mine = np.flatnonzero(shard_of == shard)
            offsets = self.index.offset[samples[mine]].tolist()
            sizes = self.index.size[samples[mine]].tolist()
            found = {
                position: whole[offset : offset + size]
                for position, offset, size in zip(
                    positions[mine].tolist(), offsets, sizes, strict=True
                )
            }
            with self._changed:
                self._ready |= found
                self._changed.notify_all()

        for _ in executor.map(load_shard, np.unique(shard_of).tolist()):
            pass  # raises what a download raised

    def _whole(self, shard: Shard) -> bytes:
        if self.manifest.remote is None:
            return _read_local(self.manifest, shard)
        return remote.read(
            self.manifest.location(shard),
            size=shard.filesize,
            sha256=shard.sha256,
            allow_pipe=self._allow_pipe,
            transfers=self._transfers,
        )


def _read_local(manifest: Manifest, shard: Shard) -> bytes:
    path = manifest.folder / shard.url
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        raise DataError(f"{path}: damaged (sha256 differs); `bigan verify` tells more")
    return data
