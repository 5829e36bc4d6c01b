"""Shards without a manifest, sampled with replacement.

For existing data sets that cannot be copied: shard names are a pattern such as
`https://host/cc-{00000..01242}.tar`, and WebDataset reads the tars sequentially. This mode gives no
guarantees: the number of samples is unknown, in one epoch some images are seen twice and some
never, and a resumed run or another world size draws other shards. All other modes are exact and
need a data set from `bigan pack`.
"""

from __future__ import annotations

import collections
import itertools
import random
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

import numpy as np

from bigan import rng
from bigan.data import DataError
from bigan.data.format import compression
from bigan.data.format.codec import BadImageError, Pixels
from bigan.data.format.convert import load
from bigan.data.format.tar import nested_tar_files
from bigan.data.packing.shard_files import below, refuse_compressed, splits
from bigan.data.packing.split_names import split_of
from bigan.data.packing.tar_samples import (
    TEXT,
    UnsuitableError,
    declared_split,
    image_suffix,
    not_adjacent,
    only_labels,
    read_label,
)
from bigan.data.settings import Fetch
from bigan.data.stores.store import Store, store_of
from bigan.data.stores.urls import check_url, split_name
from bigan.data.streaming.device import HostBatch, Reading, Transfer, transfer_to
from bigan.data.streaming.fetchers import MAX_REPLACEMENTS, BadSample
from bigan.data.streaming.order import rank_positions
from bigan.data.streaming.stream import Endless, delivered
from bigan.distributed.world import World
from bigan.hashes import sha256
from bigan.image_size import image_size
from bigan.urls import is_remote, redacted

SHUFFLE = 1_000  # samples in the shuffle buffer
MAX_EMPTY = 20  # consecutive shards without a sample, at least, that are accepted

ADJACENT = "the members of a sample must be adjacent, as `tar --sort=name` writes them"
NOTE = (
    "data.mode=resampled: shards are sampled with replacement; an epoch contains each image once "
    "only on average, and a resumed run reads other images (data from `bigan pack` is exact)"
)


def expand(pattern: str, allow_pipe: bool, split: str = "train") -> tuple[str, ...]:
    """The shards of `split` in a folder, or of a pattern such as "https://host/cc-{000..124}.tar".

    The split of a shard is the one that its name or a folder declares (`shard_files.splits`), else
    "train". Raises `DataError` for a missing local file, an unsupported or disallowed URL, and if
    no shard is left.
    """
    import webdataset  # slow to import

    folder = Path(pattern)
    if not is_remote(pattern) and folder.is_dir():
        found = nested_tar_files(folder, (".tar", *compression.SUFFIXES))
        urls, root = [str(file) for file in found], folder
    else:
        urls, root = list(webdataset.shardlists.expand_urls(pattern)), None
    for url in urls:
        kind = compression.by_name(_place(url))
        if kind and not kind.open:
            refuse_compressed(_place(url))
        if is_remote(url):
            check_url(url, allow_pipe)
        elif not Path(url).is_file():
            raise DataError(f"{url}: no such shard; set data.path to a pattern of .tar files")
    declared = splits(below([_place(url) for url in urls], root), redacted(pattern))
    chosen = [url for url, of in zip(urls, declared, strict=True) if (of or "train") == split]
    if not chosen:
        others = ", ".join(sorted({of or "train" for of in declared})) or "none"
        raise DataError(
            f"{redacted(pattern)}: no shard is of data.split = {split}; their splits: {others}"
        )
    return tuple(chosen)


def _place(url: str) -> str:
    """The path of a shard in a URL, without credentials, or in a command."""
    if not is_remote(url):
        return url
    words = url.split() if url.startswith("pipe:") else [url]
    word = next((word for word in words if ".tar" in word), url)
    return redacted(word).partition("?")[0]


class ResampledStream(Endless):
    """A training stream like `ShardStream` for shards without a manifest, without its guarantees.

    Images are centre-cropped and resized to `shape` [H, W, C]. A sample needs an image and, with
    more than one class, an integer label below `num_classes` (with `fetch.labels` "none" all are of
    class 0): without a list of all samples, class names cannot be numbered. Raises `DataError` on
    construction for shards that cannot be read; during iteration for such a label, for samples
    whose members are not adjacent, for another unusable sample or shard (`on_bad=stop`) or too many
    consecutive ones.
    """

    def __init__(
        self,
        pattern: str,
        split: str = "train",
        *,
        shape: tuple[int, int, int],
        num_classes: int,
        seed: int,
        world: World,
        batch: int,
        accumulation: int = 1,
        images_seen: int = 0,
        fetch: Fetch | None = None,
    ) -> None:
        self._fetch = fetch or Fetch()
        self._size, self._channels = image_size(*shape[:2]), shape[2]
        self._urls = expand(pattern, self._fetch.allow_pipe, split)
        self._split = split
        self._num_classes = num_classes
        self._draws = rng.numpy_generator(seed, f"resampled/{world.rank}", images_seen)
        self._stop = threading.Event()
        self._stores: dict[str, Store] = {}
        names = tuple(map(redacted, self._urls))
        inputs = f"{names}/{seed}/{batch}/{accumulation}/{images_seen}/{world.size}"
        self.fingerprint = sha256(inputs.encode())[:32]

        def places() -> Iterator[np.ndarray]:
            for start in itertools.count(images_seen, batch):
                yield from rank_positions(start, batch, accumulation, world)

        transfer = transfer_to(world.device, shape, self._fetch.prefetch)
        self._batches = delivered(self._reading(places(), transfer), transfer)

    def close(self) -> None:
        self._stop.set()
        for store in list(self._stores.values()):
            store.close()
        super().close()

    def _reading(self, places: Iterator[np.ndarray], transfer: Transfer) -> Reading:
        """One thread reads the tars and `fetch.num_threads` decode, `prefetch` batches ahead."""
        samples = self._samples()
        waiting: collections.deque[tuple[np.ndarray, HostBatch, Future[list[BadSample]]]]
        waiting = collections.deque()
        with (
            ThreadPoolExecutor(1, "bigan-tar") as reader,
            ThreadPoolExecutor(self._fetch.num_threads(self._size), "bigan-data") as decoders,
        ):
            try:
                for positions in places:
                    host = transfer.take(len(positions))
                    future = reader.submit(self._fill, host, positions, samples, decoders)
                    waiting.append((positions, host, future))
                    if len(waiting) >= self._fetch.prefetch:
                        positions, host, future = waiting.popleft()
                        bad = future.result()
                        if self._stop.is_set():
                            return
                        yield positions, host, bad
            finally:
                self._stop.set()
                for _, _, future in waiting:
                    future.cancel()

    def _fill(
        self,
        host: HostBatch,
        positions: np.ndarray,
        samples: Iterator[dict[str, Any]],
        decoders: ThreadPoolExecutor,
    ) -> list[BadSample]:
        pixels, labels = host.pixels.numpy(), host.labels.numpy()
        replaced: list[BadSample] = []
        row = 0
        while row < len(positions) and not self._stop.is_set():
            wanted = list(itertools.islice(samples, len(positions) - row))
            for sample, outcome in zip(wanted, decoders.map(self._decode, wanted), strict=True):
                if isinstance(outcome, str):
                    url, key = sample["__url__"], sample["__key__"]
                    bad = BadSample(int(positions[row]), url, key, outcome)
                    if self._fetch.on_bad == "stop" or len(replaced) >= MAX_REPLACEMENTS:
                        raise DataError(f"{bad}; data.on_bad=skip skips single ones")
                    replaced.append(bad)
                    continue
                pixels[row], labels[row] = outcome
                row += 1
        return replaced

    def _decode(self, sample: dict[str, Any]) -> tuple[Pixels, int] | str:
        """(pixels, label), or the reason the sample is unusable."""
        if "__damaged__" in sample:
            return str(sample["__damaged__"])
        suffixes = _suffixes(sample)
        suffix = image_suffix(suffixes)
        if suffix is None:
            return f"has no image ({' '.join(suffixes)}); {ADJACENT}"
        split = declared_split(sample, f"{sample['__url__']}: {sample['__key__']}")
        if split not in (None, self._split):
            raise self._other_split(sample["__url__"], sample["__key__"])
        image = sample.pop(suffix)
        label = 0
        if self._fetch.labels == "given":
            try:
                found = self._label(sample)
            except ValueError as error:  # not `UnsuitableError`: it concerns the whole data set
                return str(error)
            if found is None and self._num_classes > 1:
                return f"has no label ({' '.join(suffixes)}); {ADJACENT}"
            label = found or 0
        try:
            return load(image, self._size, self._channels, "lanczos", False), label
        except BadImageError as error:
            return str(error)

    def _label(self, sample: dict[str, Any]) -> int | None:
        """The class number of a sample; raises ValueError for an unreadable one."""
        where = f"{sample['__url__']}: {sample['__key__']}"
        members = {suffix: sample[suffix] for suffix in _suffixes(sample)}
        label, place, _ = read_label(members, where)
        if place == TEXT:  # a caption
            return None
        if isinstance(label, str):
            raise DataError(
                f"{where} has the class name {label!r} as its label, but data.mode=resampled knows "
                "only class numbers; use the folder of the shards without this mode, or pack it"
            )
        if label is not None and label >= self._num_classes:
            raise DataError(
                f"{where} has label {label}, which is not below model.num_classes = "
                f"{self._num_classes}; classes are numbered from 0; data.labels=none ignores labels"
            )
        return label

    def _check_split(self, url: str, key: str) -> None:
        """Raise `UnsuitableError` for a sample in a folder of another split, such as "test/"."""
        parts = [part for part in key.split("/")[:-1] if part.isalpha()]
        if not {split_of(part) for part in parts} <= {None, self._split}:
            raise self._other_split(url, key)

    def _other_split(self, url: str, key: str) -> UnsuitableError:
        return UnsuitableError(
            f"{url}: {key} is not of data.split = {self._split}; data.mode=resampled selects "
            "whole shards; pack the data"
        )

    def _opened(self, url: str) -> AbstractContextManager[IO[bytes]]:
        if not is_remote(url):
            return Path(url).open("rb")
        base, name = split_name(url)
        if base not in self._stores:
            self._stores[base] = store_of(base, self._fetch)
        return self._stores[base].open(name)

    def _samples(self) -> Iterator[dict[str, Any]]:
        """An endless sequence of encoded samples from a shuffle buffer over sampled shards."""
        import webdataset

        shuffle = random.Random(self._draws.bit_generator.random_raw())
        return iter(webdataset.shuffle(SHUFFLE, initial=SHUFFLE, rng=shuffle)(self._in_shards()))

    def _in_shards(self) -> Iterator[dict[str, Any]]:
        from webdataset.tariterators import group_by_keys, tar_file_expander

        empty, damaged = 0, set()
        while not self._stop.is_set():
            if empty >= max(MAX_EMPTY, 2 * len(self._urls)):
                raise DataError(
                    f"{redacted(self._urls[0])} and {empty} more shards contain no sample"
                )
            empty += 1
            url = self._urls[int(self._draws.bit_generator.random_raw() % len(self._urls))]
            where = redacted(url)
            try:
                with self._opened(url) as stream:
                    members = tar_file_expander([{"url": where, "stream": stream}])
                    seen: dict[str, tuple[str, ...]] = {}  # the suffixes of each key
                    for sample in group_by_keys(members):
                        empty = 0
                        key, suffixes = sample["__key__"], _suffixes(sample)
                        if self._fetch.labels == "none" and only_labels(suffixes):
                            continue
                        self._check_split(where, key)
                        if not set(suffixes) & set(seen.setdefault(key, suffixes)):
                            raise not_adjacent(where, key, seen[key][0], suffixes[0])
                        yield sample
                        if self._stop.is_set():
                            return
            except (UnsuitableError, DataError) as error:  # of a store: no other shard is better
                error.args = error.args[:1]  # webdataset appends the stream and its address
                raise
            except InterruptedError:  # closed
                return
            except Exception as error:  # tarfile and gopen raise many kinds
                reason = f"the tar cannot be read to its end ({type(error).__name__})"
                if self._fetch.on_bad == "stop":
                    raise DataError(f"{where}: {reason}; data.on_bad=skip uses the rest") from None
                if where not in damaged:  # report once; the samples before the damage are used
                    damaged.add(where)
                    yield {"__url__": where, "__key__": "(the tar)", "__damaged__": reason}


def _suffixes(sample: dict[str, Any]) -> tuple[str, ...]:
    return tuple(name for name in sample if not name.startswith("__"))
