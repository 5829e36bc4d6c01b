"""`bigan bench data`: the input pipeline of one process, or the traffic of many, simulated."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bigan.bench.measuring import cpu_seconds, environment, summary
from bigan.bench.step import require_runs
from bigan.config import ConfigError
from bigan.data.format import tar
from bigan.data.format.manifest import Index, Manifest, Shard
from bigan.data.streaming.dataset import open_level
from bigan.data.streaming.order import Order, default_lanes
from bigan.data.streaming.ranges import ShardRanges
from bigan.data.streaming.stream import ShardStream
from bigan.distributed.world import World
from bigan.engine import Echo
from bigan.run.stages import final_config, stages
from bigan.run.streams import order_seed
from bigan.run.traffic import Source, facts, open_source, record, size
from bigan.run_config import IMAGES, RunConfig, load_config
from bigan.urls import is_remote, redacted, redacted_text

SHARD_BYTES = 128 * 10**6  # of an assumed data set


@dataclass(frozen=True)
class Assumed:
    """A data set that does not exist yet, of images of one size in bytes."""

    images: int
    image_bytes: int


def simulate_data(
    path: Path,
    overrides: Sequence[str],
    ranks: Sequence[int],
    ranks_per_node: int,
    images_per_second: float,
    assumed: Assumed | None = None,
) -> dict[str, Any]:
    """The traffic of a config's images for several numbers of ranks; a JSON-ready record.

    Requests per second are means, at `images_per_second` of all ranks. Raises `UserError` if the
    config is unusable or its data not available.
    """
    config = load_config(path, overrides)
    name = _stream(config)
    source = _assumed_source(config, name, assumed) if assumed else open_source(config, name)
    found = []
    for world_size in ranks:
        try:
            result = record(source, world_size, ranks_per_node)
        except ConfigError as error:
            found.append({"world_size": world_size, "error": str(error)})
            continue
        rate = images_per_second * result["requests"] / source.order.num_samples
        found.append(result | {"requests_per_second": round(rate, 2)})
    return {
        "benchmark": "data",
        "simulated": True,
        "config": str(path),
        "overrides": [redacted_text(override) for override in overrides],
        "images_per_second": images_per_second,
        "ranks_per_node": ranks_per_node,
        "data": facts(source) | ({"path": "an assumed data set"} if assumed else {}),
        "ranks": found,
    }


def as_table(result: dict[str, Any]) -> str:
    """The record of `simulate_data` as text."""
    data = result["data"]
    lines = [
        f"{data['path']}: {data['images']:,} images in {data['shards']:,} shards, "
        f"{size(data['set_bytes'])}",
        f"data.lanes = {data['lanes']}: {data['lanes_reason']}",
        f"{'ranks':>6}{'bytes/epoch':>13}{'x set':>8}{'per node':>10}{'requests':>11}{'per s':>9}"
        f"{'memory/rank':>13}{'1st batch':>11}{'shards/batch':>14}",
    ]
    for row in result["ranks"]:
        if "error" in row:
            lines.append(f"{row['world_size']:>6}  {row['error']}")
            continue
        lines.append(
            f"{row['world_size']:>6}{size(row['num_bytes']):>13}{row['times_the_set']:>8.2f}"
            f"{size(row['node_bytes']):>10}{row['requests']:>11,}"
            f"{row['requests_per_second']:>9,.1f}{size(row['memory_bytes']):>13}"
            f"{size(row['first_batch_bytes']):>11}{row['shards_per_batch']:>14.0f}"
        )
    notes = [note for row in result["ranks"] for note in row.get("warnings", ())]
    return "\n".join([*lines, *dict.fromkeys(notes)])


def measure_data(
    path: Path, overrides: Sequence[str], runs: int, run_seconds: float, echo: Echo
) -> dict[str, Any]:
    """Images/s and CPU time per image of the input pipeline of one process.

    `received_bytes_per_image`, for a URL, counts all network interfaces of the machine, so other
    transfers at the same time are included. Raises `UserError` for fewer than five runs, an
    unusable config or data.
    """
    require_runs(runs)
    run_config = load_config(path, overrides)
    name, config = _stream(run_config), final_config(run_config)
    data, batch = config.streams[name], config.train.batch
    manifest = open_level(data.path, config.model.resolution, data)
    seed = order_seed(config.train.seed, name)
    rates, costs, received = [], [], []
    began = time.perf_counter()
    with ShardStream(
        manifest, data.split, seed=seed, world=World(), batch=batch, block=data.block,
        lanes=data.lanes, fetch=data,
    ) as stream:  # fmt: skip
        next(stream)
        first_seconds = time.perf_counter() - began
        for _ in itertools.islice(stream, data.prefetch):
            pass  # what was read ahead
        for _ in range(runs):
            start, cpu, network = time.perf_counter(), cpu_seconds(), _received()
            num = 0
            while time.perf_counter() - start < run_seconds:
                num += len(next(stream).positions)
            seconds = time.perf_counter() - start
            rates.append(num / seconds)
            costs.append((cpu_seconds() - cpu) / num * 1e6)
            received.append((_received() - network) / num)
    result = {
        "benchmark": "data",
        "simulated": False,
        "config": str(path),
        "overrides": [redacted_text(override) for override in overrides],
        "environment": environment(),
        "path": redacted(data.path),
        "batch": batch,
        "runs": runs,
        "first_batch_seconds": first_seconds,
        "images_per_second": summary(rates),
        "cpu_us_per_image": summary(costs),
    }
    if is_remote(data.path):
        result["received_bytes_per_image"] = summary(received)
    echo(
        f"{redacted(data.path)}: {summary(rates)['median']:,.0f} images/s, "
        f"{summary(costs)['median']:,.0f} us of CPU time per image"
    )
    return result


def _stream(config: RunConfig) -> str:
    return IMAGES if IMAGES in config.streams else next(iter(config.streams))


def _received() -> int:
    """Bytes that this machine has received; 0 if the system does not count them."""
    file = Path("/proc/net/dev")
    if not file.is_file():
        return 0
    return sum(int(line.split(":")[1].split()[0]) for line in file.read_text().splitlines()[2:])


def _assumed_source(config: RunConfig, name: str, assumed: Assumed) -> Source:
    """A data set at a URL, as `bigan pack` would write it."""
    data = config.streams[name]
    per_sample = tar.BLOCK * (3 - -assumed.image_bytes // tar.BLOCK)  # two headers, image, label
    per_shard = max(1, SHARD_BYTES // per_sample)
    num = assumed.images
    first = np.arange(0, num, per_shard)
    sizes = np.diff(np.append(first, num))
    numbers = np.arange(num)
    offsets = (numbers % per_shard * per_sample + tar.BLOCK).astype(np.uint64)
    zeros = np.broadcast_to(np.uint32(0), num)
    index = Index(
        offsets, zeros + np.uint32(assumed.image_bytes), zeros.astype(np.int32), zeros, first
    )
    shards = tuple(
        Shard(
            url=f"{i}.tar", nsamples=n, filesize=n * per_sample + 1024, sha256="", split=data.split
        )
        for i, n in enumerate(sizes.tolist())
    )
    manifest = Manifest.model_construct(folder=Path(), shardlist=shards)
    batches = [stage.config.train.batch for stage in stages(config)]
    lanes = data.lanes or default_lanes(batches, num)
    order = Order(sizes, order_seed(config.train.seed, name), data.block, lanes)
    return Source(
        name,
        config,
        ShardRanges(manifest, data.split, index, None, False),
        order,
        "cache" if data.cache else "stream",
        "from the config" if data.lanes else "the default of this number of images at a URL",
    )
