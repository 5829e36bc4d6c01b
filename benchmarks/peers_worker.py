"""One rank of `peers_data.py`: reads one epoch with one library and reports its samples and costs.

    python benchmarks/peers_worker.py TASK.json

It runs in the environment of the library that it measures, so it imports bigan for bigan only. All
libraries decode with the same decoder, to uint8 [H, W, 3]. The result is written as JSON to the
path `out` of the task. A task with `convert` writes the images of packed shards in the formats of
the other libraries instead.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import resource
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

Task = dict[str, Any]
Reader = tuple[Iterable[Any], Callable[[], Any]]  # batches of pixels; the state to save


def decode(data: bytes) -> np.ndarray:
    return simplejpeg.decode_jpeg(data, "RGB")


# --- the libraries: each reads the rest of an epoch as its documentation recommends --------------


def bigan(task: Task) -> Reader:
    """ShardStream with its defaults for a URL. The endless stream is cut at the epoch's end."""
    import inspect

    from bigan.data.settings import Fetch
    from bigan.data.streaming.stream import ShardStream
    from bigan.distributed.world import World

    seen = task["state"] or 0
    batch, num = task["batch"] * task["world"], task["num"] * task["epochs"]
    options = {"lanes": task["lanes"]}
    known = inspect.signature(ShardStream).parameters
    stream = ShardStream(
        f"{task['endpoint']}/set/shards", "train", seed=task["seed"],
        world=World(task["rank"], task["world"]), batch=batch, images_seen=seen,
        block=task["block"], fetch=Fetch(threads=task["workers"] or None),
        **{key: value for key, value in options.items() if key in known},
    )  # fmt: skip
    steps = 0

    def batches() -> Iterator[Any]:
        nonlocal steps
        with stream:
            for _ in range(-(-(num - seen) // batch)):
                found = next(stream)
                steps += 1
                yield found.pixels.numpy()[found.positions < num]

    return batches(), lambda: seen + steps * batch


def mosaicml(task: Task) -> Reader:
    """StreamingDataset(shuffle=True, batch_size=...) in a StreamingDataLoader."""
    import streaming
    from streaming.base import dataset as dataset_module

    class Images(streaming.StreamingDataset):
        def __getitem__(self, at: int) -> np.ndarray:
            return decode(super().__getitem__(at)["jpg"])

    if task["machines"]:  # machines run one after the other here; they only meet in a barrier
        dataset_module.maybe_init_dist = lambda: False
    dataset = Images(
        remote="s3://set/mds", local=task["cache"], shuffle=True, batch_size=task["batch"],
        shuffle_seed=task["seed"],
    )  # fmt: skip
    loader = streaming.StreamingDataLoader(
        dataset, batch_size=task["batch"], num_workers=task["workers"]
    )
    if task["state"] is not None:
        loader.load_state_dict(task["state"])
    return epochs(loader, task), loader.state_dict


def litdata(task: Task) -> Reader:
    """StreamingDataset(shuffle=True, drop_last=True) in a StreamingDataLoader."""
    import litdata as library
    from litdata.streaming import downloader

    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # the server has no TLS
    dataset = library.StreamingDataset(
        "s3://set/litdata", cache_dir=task["cache"], shuffle=True, seed=task["seed"],
        drop_last=task["world"] > 1, transform=jpg_of,
        storage_options={
            "endpoint_url": task["endpoint"], "region_name": "us-east-1",
            "aws_access_key_id": "benchmark", "aws_secret_access_key": "benchmark",
        },
    )  # fmt: skip
    loader = library.StreamingDataLoader(
        dataset, batch_size=task["batch"], num_workers=task["workers"]
    )
    if task["state"] is not None:
        # The state is refused with another cache folder; machines would have the same path.
        own = {"input_dir_path": dataset.input_dir.path, "cache_dir_path": dataset.cache_dir.path}
        loader.load_state_dict(task["state"] | {"dataset": task["state"]["dataset"] | own})
    return epochs(loader, task), loader.state_dict


def jpg_of(sample: dict[str, Any]) -> np.ndarray:
    return decode(sample["jpg"])


def webdataset(task: Task, *, resampled: bool) -> Reader:
    """The README's pipeline: split by node, or shards resampled for several nodes; no state."""
    import webdataset as library

    urls = [f"{task['endpoint']}/set/shards/{name}" for name in task["shards"]]
    if resampled:
        dataset = library.WebDataset(urls, resampled=True, nodesplitter=library.split_by_node)
    else:
        dataset = library.WebDataset(
            urls, shardshuffle=100, seed=task["seed"], nodesplitter=library.split_by_node
        )
    dataset = dataset.shuffle(1000).to_tuple("jpg").map_tuple(decode).batched(task["batch"])
    loader = library.WebLoader(dataset, batch_size=None, num_workers=task["workers"])
    if resampled:
        rest = task["num"] - (task["state"] or 0)
        loader = loader.with_epoch(-(-rest // (task["batch"] * task["world"])))
    return (batch for (batch,) in epochs(loader, task)), lambda: None


def epochs(loader: Iterable[Any], task: Task) -> Iterator[Any]:
    return itertools.chain.from_iterable(itertools.repeat(loader, task["epochs"]))


READERS: dict[str, Callable[[Task], Reader]] = {
    "bigan": bigan,
    "mosaicml-streaming": mosaicml,
    "litdata": litdata,
    "webdataset, split by node": partial(webdataset, resampled=False),
    "webdataset, resampled": partial(webdataset, resampled=True),
}


# --- measuring ------------------------------------------------------------------------------------


def cpu_seconds() -> float:
    """User and system time of this process and of its children that have ended."""
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, who))


def warm_up(library: str) -> None:
    """Import what `library` imports: that is not part of its time."""
    import torch

    torch.set_num_threads(1)
    modules = {"bigan": "bigan.data.streaming.stream", "mosaicml-streaming": "streaming"}
    importlib.import_module(modules.get(library, library.split(",")[0]))


def read(task: Task) -> dict[str, Any]:
    """Read the epoch, or `stop_after` batches of it; see the keys of the result."""
    warm_up(task["library"])
    digests: list[str] = []
    images = 0
    first = state = None
    cpu, began = cpu_seconds(), time.perf_counter()
    batches, state_of = READERS[task["library"]](task)
    iterator = iter(batches)
    for count, pixels in enumerate(iterator, 1):
        first = first or time.perf_counter() - began
        images += len(pixels)
        if task["digests"]:
            digests += [digest(np.asarray(image)) for image in pixels]
        if count == task["stop_after"]:
            state = state_of()
            break
    seconds = time.perf_counter() - began
    if hasattr(iterator, "close"):
        iterator.close()
    del batches, state_of, iterator  # ends worker processes, whose time then counts
    return {
        "images": images,
        "seconds": seconds,
        "first_batch_seconds": first,
        "cpu_seconds": cpu_seconds() - cpu,
        "digests": digests,
        "state": state,
    }


def digest(pixels: np.ndarray) -> str:
    """A hash of an image's pixels, which identifies it in every format."""
    return hashlib.blake2b(np.ascontiguousarray(pixels).tobytes(), digest_size=8).hexdigest()


# --- conversion -----------------------------------------------------------------------------------


def members(shards: Path) -> Iterator[bytes]:
    """The JPEG files in the tar files of `shards`, in order."""
    for file in sorted(shards.rglob("*.tar")):
        with tarfile.open(file) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    opened = tar.extractfile(member)
                    assert opened is not None
                    yield opened.read()


def as_sample(data: bytes) -> dict[str, bytes]:
    return {"jpg": data}


def convert(task: Task) -> dict[str, Any]:
    """Write the same images, `each` per shard, as MDS and as chunks of litdata; their digests."""
    root = Path(task["convert"])
    data = list(members(root / "shards"))
    if task["library"] != "bigan":
        write_formats(root, data, task["each"])
    return {"digests": [digest(decode(each)) for each in data]}


def write_formats(root: Path, data: list[bytes], each: int) -> None:
    import litdata as library
    import streaming

    limit = each * (sum(map(len, data)) // len(data) + 8)
    columns = {"jpg": "bytes"}
    with streaming.MDSWriter(out=str(root / "mds"), columns=columns, size_limit=limit) as writer:
        for image in data:
            writer.write(as_sample(image))
    library.optimize(
        fn=as_sample, inputs=data, output_dir=str(root / "litdata"), chunk_size=each,
        num_workers=1, keep_data_ordered=True, verbose=False,
    )  # fmt: skip


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    result = convert(task) if "convert" in task else read(task)
    Path(task["out"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
