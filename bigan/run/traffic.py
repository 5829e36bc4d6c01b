"""The traffic of a config's data streams: what its ranks read, from manifest and index only."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bigan.config import ConfigError
from bigan.data import DataError
from bigan.data.format.manifest import MANIFEST, PYRAMID, Manifest
from bigan.data.settings import DataConfig
from bigan.data.stores.store import store_of
from bigan.data.streaming import traffic
from bigan.data.streaming.dataset import open_level
from bigan.data.streaming.fetchers import resolve_mode
from bigan.data.streaming.order import MAX_LANES, Order
from bigan.data.streaming.ranges import ShardRanges
from bigan.data.streaming.stream import lanes_of
from bigan.data.streaming.traffic import MAX_SAMPLES, Block, Kind, Readers, Traffic
from bigan.run.stages import stages
from bigan.run.streams import order_seed, resolve_lanes
from bigan.run_config import RunConfig, accumulation_steps
from bigan.urls import is_remote, redacted

PATIENCE_SECONDS = 5  # for a store that does not answer: nothing depends on it
NOTABLE = 1.3  # bytes read, relative to the set
MANY_REQUESTS = 3.0  # relative to those of one process


@dataclass(frozen=True)
class Source:
    """A stream of a config at its last stage, and the order of its samples.

    reason: why the order has its lanes. has_ranges: whether parts of shards can be read.
    """

    name: str
    config: RunConfig
    data: ShardRanges
    order: Order
    kind: Kind
    reason: str
    has_ranges: bool = True
    max_samples: int = MAX_SAMPLES

    @functools.cached_property
    def blocks(self) -> list[Block]:
        return traffic.blocks_of_epoch(self.order, max_samples=self.max_samples)

    @property
    def settings(self) -> DataConfig:
        return self.config.streams[self.name]

    def readers(self, world_size: int, ranks_per_node: int) -> Readers:
        """Raises `ConfigError` if the config cannot run on `world_size` processes."""
        train = stages(self.config)[-1].config.train
        accumulation = accumulation_steps(train, world_size)
        cache_bytes = self.settings.cache_bytes
        return Readers(
            world_size,
            train.batch,
            accumulation,
            ranks_per_node,
            self.kind,
            self.has_ranges,
            cache_bytes,
        )

    def traffic(self, world_size: int, ranks_per_node: int) -> Traffic:
        """Raises `ConfigError` as `readers` does."""
        readers = self.readers(world_size, ranks_per_node)
        return traffic.simulate(self.data, self.order, self.blocks, readers)


def open_source(config: RunConfig, name: str, max_samples: int = MAX_SAMPLES) -> Source:
    """Read the manifest and the index of a stream; nothing is written into a local data folder.

    Raises `DataError`, one line, if they are not available, or the mode has no traffic per epoch.
    """
    data = config.streams[name]
    if data.mode in ("resampled", "resident"):
        what = "at its own pace" if data.mode == "resampled" else "once, at the start"
        raise DataError(f"data.mode={data.mode}: each process reads the whole split {what}")
    remote = is_remote(data.path)
    if not remote and not any((Path(data.path) / file).is_file() for file in (MANIFEST, PYRAMID)):
        raise DataError(f"{data.path}: is not packed, or not indexed yet; run `bigan pack`")
    patience = min(PATIENCE_SECONDS, data.patience_seconds)
    quick = data.model_copy(update={"patience_seconds": patience})
    manifest = open_level(data.path, stages(config)[-1].config.model.resolution, quick)
    kind: Kind = "stream"
    if resolve_mode(manifest, data) == "random_access":
        kind = "cache" if remote else "files"
    has_ranges = True
    if remote:
        with store_of(data.path, quick) as store:
            has_ranges = store.has_ranges
    lanes = resolve_lanes(config)[name] or 1
    reason = _reason(config, lanes, lanes_of(manifest, data.split, _batches(config)), remote)
    shards = ShardRanges(manifest, data.split, manifest.load_index(data.split), None, False)
    order = _order(config, name, manifest, lanes)
    return Source(name, config, shards, order, kind, reason, has_ranges, max_samples)


def _order(config: RunConfig, name: str, manifest: Manifest, lanes: int) -> Order:
    data = config.streams[name]
    sizes = [shard.nsamples for shard in manifest.shards(data.split)]
    return Order(sizes, order_seed(config.train.seed, name), data.block, lanes)


def _batches(config: RunConfig) -> list[int]:
    return [stage.config.train.batch for stage in stages(config)]


def _reason(config: RunConfig, lanes: int, default: int, remote: bool) -> str:
    if lanes != default:
        return "from the config or the existing run, not the default"
    if not remote or default == 1:
        return "the default of a folder" if not remote else "the default of this URL"
    batches = ", ".join(f"{batch:,}" for batch in dict.fromkeys(_batches(config)))
    return f"the divisor of train.batch = {batches}, up to {MAX_LANES}, with most divisors itself"


def warnings(source: Source, found: Traffic, world_size: int) -> list[str]:
    """What makes the ranks read more than needed, and what to change; one line each."""
    if source.kind == "files":
        return []
    lines = []
    if not source.has_ranges:
        lines.append("the server does not answer range requests: whole shards are read")
    lanes, readers = source.order.lanes, source.readers(world_size, 1)
    cost = f"{found.ratio:.2f} times the data set in an epoch, in {found.requests:,} requests"
    if found.ranks_per_lane > 1:
        micro_batches = [
            stage.config.train.batch // accumulation_steps(stage.config.train, world_size)
            for stage in stages(source.config)
        ]
        why = f"data.lanes = {lanes} is not divisible by {world_size} processes"
        if lanes % world_size == 0:
            micro = f"micro-batches of {readers.micro_batch} images"
            why = f"of data.lanes = {lanes} and {micro}, neither divides the other"
        fitting = traffic.fitting_lanes(micro_batches, world_size)
        lines.append(
            f"{why}: up to {found.ranks_per_lane} processes read the same part of the shards, "
            f"{cost}; use data.lanes={fitting} in a new run{_fewer(source, world_size)}"
        )
    elif found.ratio > NOTABLE and source.kind == "cache":
        lines.append(f"data.cache_bytes is small: {cost}; increase it")
    elif found.ratio > NOTABLE:
        lines.append(f"the processes read {cost}")
    return lines


def _fewer(source: Source, world_size: int) -> str:
    """The largest smaller number of processes with which each lane is read by one, as text."""
    for size in range(world_size - 1, 1, -1):
        if source.order.lanes % size == 0:
            with contextlib.suppress(ConfigError):
                if traffic.ranks_per_lane(source.readers(size, 1), source.order.lanes) == 1:
                    return f", or {size} processes"
    return ""


def remarks(config: RunConfig, world_size: int, ranks_per_node: int) -> list[str]:
    """The lanes of each stream at a URL with their reason, and warnings that matter for a run."""
    lines = []
    for name, data in config.streams.items():
        if not is_remote(data.path) or data.mode == "resampled":
            continue
        try:
            source = open_source(config, name, max_samples=2 * data.block)
            readers = source.readers(world_size, ranks_per_node)
        except DataError:
            continue  # the run itself waits for the store and reports it
        lines.append(f"{_key(config, name)}.lanes = {source.order.lanes}: {source.reason}")
        if traffic.ranks_per_lane(readers, source.order.lanes) == 1 and source.has_ranges:
            continue  # every byte is read once
        found = source.traffic(world_size, ranks_per_node)
        least = source.traffic(1, 1).requests
        if found.ratio > NOTABLE or found.requests > MANY_REQUESTS * least:
            lines += warnings(source, found, world_size)
    return lines


def _key(config: RunConfig, name: str) -> str:
    return f"data.{name}" if isinstance(config.data, dict) else "data"


def describe_traffic(
    config: RunConfig, world_size: int, ranks_per_node: int
) -> dict[str, dict[str, Any]]:
    """The traffic of each stream, JSON values; {"error": one line} where it cannot be counted."""
    found: dict[str, dict[str, Any]] = {}
    for name in config.streams:
        try:
            source = open_source(config, name)
        except DataError as error:
            found[name] = {"error": " ".join(str(error).split())}
        else:
            found[name] = facts(source) | record(source, world_size, ranks_per_node)
    return found


def facts(source: Source) -> dict[str, Any]:
    """The data set and the order of a source, JSON values."""
    return {
        "path": redacted(source.settings.path),
        "images": source.order.num_samples,
        "shards": len(source.data.shards),
        "set_bytes": sum(shard.filesize for shard in source.data.shards),
        "lanes": source.order.lanes,
        "lanes_reason": source.reason,
        "block": source.order.block,
        "reads": source.kind,
        "has_ranges": source.has_ranges,
    }


def record(source: Source, world_size: int, ranks_per_node: int) -> dict[str, Any]:
    """The traffic of a number of ranks, JSON values."""
    found = source.traffic(world_size, ranks_per_node)
    return {
        "world_size": world_size,
        "nodes": -(-world_size // ranks_per_node),
        "times_the_set": round(found.ratio, 4),
        **{key: value for key, value in asdict(found).items() if key != "set_bytes"},
        "warnings": warnings(source, found, world_size),
    }


def as_lines(found: dict[str, dict[str, Any]]) -> list[str]:
    """`describe_traffic` as lines of text."""
    lines: list[str] = []
    for name, stream in found.items():
        head = "data" if len(found) == 1 else f"data.{name}"
        if "error" in stream:
            lines.append(f"{head:10} not counted: {stream['error']}")
            continue
        lines += [
            f"{head:10} {stream['path']}: {stream['images']:,} images in {stream['shards']:,} "
            f"shards, {size(stream['set_bytes'])}; lanes {stream['lanes']} "
            f"({stream['lanes_reason']})",
            f"{'':10} an epoch reads {size(stream['num_bytes'])} from {SOURCES[stream['reads']]}, "
            f"{stream['times_the_set']:.2f} times the set, in {stream['requests']:,} requests; "
            f"a node {size(stream['node_bytes'])}",
            f"{'':10} per process {size(stream['memory_bytes'])} of encoded images, "
            f"{size(stream['first_batch_bytes'])} before the first batch; "
            f"{stream['shards_per_batch']:.0f} shards in a batch",
            *(f"{'':10} {line}" for line in stream["warnings"]),
        ]
    return lines


SOURCES = {"stream": "the store", "cache": "the store into the caches", "files": "the disk"}


def size(num_bytes: float) -> str:
    """A number of bytes with three digits and a decimal unit, such as 12.3 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 999.5 or unit == "TB":
            break
        num_bytes /= 1000
    return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.3g} {unit}"
