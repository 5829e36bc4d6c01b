"""Streaming from a store: bigan against mosaicml-streaming, litdata and webdataset.

    python benchmarks/peers_data.py                      all tables; takes about half an hour
    python benchmarks/peers_data.py --quick              approximate numbers, with fewer images
    python benchmarks/peers_data.py --out result.json

All libraries read the same JPEG images from one server on loopback that counts requests and bytes
(counting_server.py): bigan and webdataset over HTTP, the others, which do not read HTTP, over S3.
Each library reads its own format, with the same number of images per shard, and all use the same
decoder. The other libraries are installed into a separate environment (`--environment`), with the
versions of peers_data_requirements.txt.

The benchmark measures for an epoch with empty caches:

- traffic: bytes and requests at the server, of all ranks together, with one rank per machine (each
  has its own cache) and with all ranks on one machine (one cache);
- cost: images per second and CPU time per image of one rank, including the opening of the data
  set, without imports;
- samples repeated and lost in an epoch, without a stop, and with a stop of 8 ranks after 40 % of
  the epoch that 4 ranks resume from the state that the library saves. Samples are identified by
  their pixels.

Ranks are processes with the variables of a launcher. Machines are simulated: their ranks exchange
nothing, so they run one after the other. peers_worker.py has the options of each library.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from peers_setup import (  # noqa: E402
    Images,
    environment_python,
    peer_versions,
    server,
    take_counts,
    write_shards,
)

from bigan.bench.measuring import summary  # noqa: E402
from bigan.bench.script import argument_parser, spread, write_record  # noqa: E402
from bigan.versions import cpu_name, num_cpus  # noqa: E402

LIBRARIES = (
    "bigan", "mosaicml-streaming", "litdata", "webdataset, split by node", "webdataset, resampled",
)  # fmt: skip
BATCH = 64  # per rank, with 8 ranks; fewer ranks of a resumed run have the same global batch
STOP = 0.4  # share of the epoch after which the run stops
TIMEOUT_SECONDS = 600


# --- running ranks --------------------------------------------------------------------------------


class Runner:
    """Starts the ranks of one epoch as processes, and collects their results."""

    def __init__(
        self, images: Images, python: Path | None, scratch: Path, lanes: int | None
    ) -> None:
        self.images, self._python, self._scratch, self._lanes = images, python, scratch, lanes
        self._numbers = itertools.count()

    def convert(self, each: int) -> list[str]:
        """Write the formats of the other libraries, if there are any; the images' digests."""
        library = "bigan" if self._python is None else None
        task = {"convert": str(self.images.root / "set"), "each": each, "library": library}
        return self._task(task, self._scratch / "convert", {})["digests"]

    def epoch(
        self,
        library: str,
        world: int,
        *,
        machines: bool = True,
        workers: int = 0,
        digests: bool = True,
        batch: int | None = None,
        epochs: int = 1,
        stop_after: int | None = None,
        state: Any = None,
    ) -> tuple[list[dict[str, Any]], dict[str, int]]:
        """(the result of each rank, the counts of the server) of the rest of an epoch.

        `machines`: one rank per machine, else all ranks on one machine. `batch` is that of a
        rank, None: `BATCH`.
        """
        folder = self._scratch / f"run-{next(self._numbers)}"
        common = {
            "library": library, "world": world, "machines": machines, "workers": workers,
            "digests": digests, "batch": batch or BATCH, "epochs": epochs,
            "stop_after": stop_after, "state": state,
            "seed": 0, "num": self.images.num, "endpoint": self.images.endpoint,
            "shards": self.images.names, "block": self.images.block, "lanes": self._lanes,
        }  # fmt: skip
        take_counts(self.images.endpoint)

        def run(rank: int) -> dict[str, Any]:
            cache = folder / (f"cache-{rank}" if machines else "cache")
            cache.mkdir(parents=True, exist_ok=True)
            task = common | {"rank": rank, "cache": str(cache)}
            found = self._task(task, folder / f"{rank}", launcher_variables(rank, world, machines))
            on_disk = [file for file in cache.rglob("*") if file.is_file()]
            return found | {"cache_bytes": sum(file.stat().st_size for file in on_disk)}

        # mosaicml-streaming keeps its state in the memory that all processes of a computer share.
        at_once = world if not machines else 1 if library == "mosaicml-streaming" else num_cpus()
        with ThreadPoolExecutor(at_once) as executor:
            results = list(executor.map(run, range(world)))
        counts = take_counts(self.images.endpoint)
        shutil.rmtree(folder)
        return results, counts

    def _task(self, task: dict[str, Any], name: Path, variables: dict[str, str]) -> dict[str, Any]:
        """The result of a process of peers_worker.py."""
        name.parent.mkdir(parents=True, exist_ok=True)
        file, out = name.with_suffix(".task"), name.with_suffix(".out")
        file.write_text(json.dumps(task | {"out": str(out)}))
        own = task.get("library") == "bigan"
        kept = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
        variables = kept | variables | {
            "AWS_ACCESS_KEY_ID": "benchmark", "AWS_SECRET_ACCESS_KEY": "benchmark",
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
            "S3_ENDPOINT_URL": self.images.endpoint, "AWS_ALLOW_HTTP": "true",
            "LITDATA_DISABLE_VERSION_CHECK": "1", "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(HERE.parent) if own else "", "NO_PROXY": "127.0.0.1",
        }  # fmt: skip
        python = sys.executable if own else str(self._python)
        done = subprocess.run(
            [python, str(HERE / "peers_worker.py"), str(file)],
            env=variables, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{task['library']}: {done.stderr[-3000:].strip()}")
        return json.loads(out.read_text())


def launcher_variables(rank: int, world: int, machines: bool) -> dict[str, str]:
    """What torchrun sets for a rank, and NNODES and GLOBAL_RANK, which litdata reads."""
    local_rank, local_size = (0, 1) if machines else (rank, world)
    values = {
        "RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": local_size,
        "GLOBAL_RANK": rank, "NNODES": world // local_size, "NODE_RANK": rank // local_size,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29_541,
    }  # fmt: skip
    return {key: str(value) for key, value in values.items()}


# --- measuring ------------------------------------------------------------------------------------


def samples(images: Images, results: Sequence[dict[str, Any]]) -> dict[str, int]:
    """How many samples `results` contain repeatedly, how many not at all."""
    seen = collections.Counter(itertools.chain(*(result["digests"] for result in results)))
    assert seen.keys() <= images.digests
    return {"repeated": seen.total() - len(seen), "lost": images.num - len(seen)}


def traffic(
    runner: Runner, library: str, world: int, *, machines: bool = True, later: bool = False
) -> dict[str, Any]:
    """Bytes, requests, and the samples of an epoch without a stop.

    `later`: also the bytes of a second epoch, with the caches that the first one left.
    """
    results, counts = runner.epoch(library, world, machines=machines)
    per_rank = [result["images"] for result in results]
    size = runner.images.set_bytes(library)
    found = {
        "bytes": counts["bytes"],
        "bytes_over_set": counts["bytes"] / size,
        "requests": counts["requests"],
        "cache_bytes_per_rank": max(result["cache_bytes"] for result in results),
        "images_per_rank": [min(per_rank), max(per_rank)],
        **samples(runner.images, results),
    }
    if later:
        _, both = runner.epoch(library, world, machines=machines, epochs=2, digests=False)
        found["second_epoch_bytes_over_set"] = (both["bytes"] - counts["bytes"]) / size
    return found


def all_traffic(runner: Runner, library: str, worlds: Sequence[int]) -> dict[str, Any]:
    """`traffic` with one rank per machine, and with the most ranks on one machine."""
    most = max(worlds)
    found = {
        f"{world} machine{'s' * (world > 1)}": traffic(runner, library, world, later=world == most)
        for world in sorted(worlds)
    }
    return found | {f"1 machine, {most} ranks": traffic(runner, library, most, machines=False)}


def elastic(runner: Runner, library: str, before: int = 8, after: int = 4) -> dict[str, Any]:
    """The samples of an epoch that `before` ranks begin and `after` ranks resume."""
    steps = max(1, round(STOP * runner.images.num / (BATCH * before)))
    first, _ = runner.epoch(library, before, stop_after=steps)
    seen = sum(result["images"] for result in first)
    state = first[0]["state"]  # of rank 0, as the libraries document
    resumes = state is not None
    if library == "webdataset, resampled":
        state = seen  # how much is left; the draws are independent
    try:
        rest, _ = runner.epoch(library, after, batch=BATCH * before // after, state=state)
    except RuntimeError as error:
        return {"stopped_after": seen, "error": str(error).splitlines()[-1]}
    return {
        "stopped_after": seen,
        "has_state": resumes,
        **samples(runner.images, [*first, *rest]),
    }


def cost(runner: Runner, library: str, workers: int) -> dict[str, float]:
    """CPU time and rate of one rank that reads an epoch."""
    (result,), _ = runner.epoch(library, 1, workers=workers, digests=False)
    return {
        "cpu_us_per_image": result["cpu_seconds"] / result["images"] * 1e6,
        "images_per_second": result["images"] / result["seconds"],
        "first_batch_seconds": result["first_batch_seconds"],
    }


def costs(runner: Runner, libraries: Sequence[str], runs: int) -> dict[str, Any]:
    """Interleaved runs of one rank; the other libraries without and with worker processes."""
    variants = {
        library if library == "bigan" else f"{library}, {workers} workers": (library, workers)
        for library in libraries
        for workers in ((0,) if library == "bigan" else (0, num_cpus()))
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    for _ in tqdm(range(runs), desc="cost", unit="run", disable=None):
        for name, (library, workers) in variants.items():
            found[name].append(cost(runner, library, workers))
    return {
        name: {key: summary([value[key] for value in values]) for key in values[0]}
        for name, values in found.items()
    }


def measure(
    root: Path,
    python: Path | None,
    *,
    num: int,
    each: int,
    size: int,
    worlds: Sequence[int],
    runs: int,
    block: int,
    lanes: int | None = None,
    libraries: Sequence[str] = LIBRARIES,
) -> dict[str, Any]:
    """All measurements of `libraries`; `python` of the other libraries, None: only bigan."""
    write_shards(root / "set" / "shards", num, each, size)
    names = tuple(file.name for file in sorted((root / "set" / "shards").glob("*.tar")))
    with server(root) as endpoint:
        images = Images(root, num, names, endpoint, block)
        runner = Runner(images, python, root / "runs", lanes)
        images.digests.update(runner.convert(each))
        assert len(images.digests) == num
        result: dict[str, Any] = {
            "images": {
                "num": num, "size": size, "per_shard": each, "shards": len(names),
                "block": block, "bytes": {name: images.set_bytes(name) for name in libraries},
            }
        }  # fmt: skip
        result["traffic"] = {
            name: all_traffic(runner, name, worlds)
            for name in tqdm(libraries, desc="traffic", unit="library", disable=None)
        }
        result["elastic"] = {
            name: elastic(runner, name)
            for name in tqdm(libraries, desc="elastic", unit="library", disable=None)
        }
        result["cost"] = costs(runner, libraries, runs)
    return result


# --- the tables -----------------------------------------------------------------------------------


def as_table(result: dict[str, Any]) -> str:
    """The tables of docs/benchmarks.md."""
    images = result["images"]
    lines = [
        f"{cpu_name()}, {num_cpus()} cores; {images['num']:,} JPEG images of {images['size']} px "
        f"in {images['shards']} shards",
        "",
    ]
    columns = list(next(iter(result["traffic"].values())))
    machines = [column for column in columns if "ranks" not in column][-1]
    later = f"second epoch, {machines}"
    lines += _header("bytes of an epoch / bytes of the set", "set, MB", *columns, later)
    for name, row in result["traffic"].items():
        ratios = [row[column]["bytes_over_set"] for column in columns]
        ratios.append(row[machines]["second_epoch_bytes_over_set"])
        megabytes = f"{images['bytes'][name] / 1e6:.1f}"
        lines += _row(name, megabytes, *(f"{ratio:.2f}" for ratio in ratios))
    lines += ["", *_header(
        f"samples of an epoch, {machines}", "repeated", "lost", "images per rank",
        "8 become 4: repeated", "lost",
    )]  # fmt: skip
    for name, row in result["traffic"].items():
        epoch, resumed = row[machines], result["elastic"][name]
        low, high = epoch["images_per_rank"]
        lines += _row(
            name, epoch["repeated"], epoch["lost"], low if low == high else f"{low} to {high}",
            resumed.get("repeated", resumed.get("error")), resumed.get("lost", ""),
        )  # fmt: skip
    lines += ["", *_header("one rank", "CPU us/image", "images/s", "s to the first batch")]
    for name, row in result["cost"].items():
        lines += _row(
            name, spread(row["cpu_us_per_image"], digits=0),
            spread(row["images_per_second"], digits=0), spread(row["first_batch_seconds"]),
        )  # fmt: skip
    return "\n".join(lines)


def _header(*names: str) -> list[str]:
    return [*_row(*names), *_row(*["---"] * len(names))]


def _row(*cells: object) -> list[str]:
    return ["| " + " | ".join(map(str, cells)) + " |"]


def parsed() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer images and runs")
    parser.add_argument(
        "--environment", type=Path, default=Path.home() / ".cache" / "bigan" / "peers-data",
        help="virtual environment of the other libraries, made if missing (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--images", type=int, help="number of images (default 12,007)")
    parser.add_argument("--runs", type=int, help="timed runs (default 5)")
    parser.add_argument("--block", type=int, default=1024, help="block of bigan's order")
    parser.add_argument("--lanes", type=int, help="lanes of bigan's order (default: for a URL)")
    parser.add_argument(
        "--libraries", nargs="+", default=LIBRARIES, choices=LIBRARIES, help="default: all"
    )
    return parser.parse_args()


def main() -> int:
    given = parsed()
    python = environment_python(given.environment)
    num = given.images or (3_001 if given.quick else 12_007)
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(
            Path(scratch), python, num=num, each=num // 96, size=128, worlds=(1, 4, 8),
            runs=given.runs or (1 if given.quick else 5), block=given.block, lanes=given.lanes,
            libraries=given.libraries,
        )  # fmt: skip
    print(as_table(result))
    write_record("peers_data", given, result, batch=BATCH, peers=peer_versions(python), seed=0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
