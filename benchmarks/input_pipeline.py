"""The input pipeline against WebDataset's README pipeline and ImageFolder, side by side.

    python benchmarks/input_pipeline.py                  the table, in about five minutes
    python benchmarks/input_pipeline.py --quick          in one minute, with rough numbers
    python benchmarks/input_pipeline.py --out result.json

All pipelines read the same images on the same cores: JPEG files with the statistics of photographs,
the same bytes in class folders (ImageFolder) and in tar files (WebDataset; bigan indexes those tar
files at first use). Each yields shuffled batches of 64. The other pipelines yield normalized
float32, as in their READMEs; bigan yields uint8 and normalizes on the device, so one row normalizes
on the host for comparison. The measure is CPU time, user and system, of all processes: it hardly
depends on the load of the machine. The targets compare with pipelines that use the same cores as
bigan: a DataLoader with one worker per core. Without workers they use one core only and less CPU
time; these rows are shown, too. The exit code is 1 if a target is missed.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
import torchvision
import webdataset
from torch.utils.data import DataLoader
from torchvision import transforms
from tqdm import tqdm

from bigan.augment.discriminator_inputs import as_images
from bigan.bench.measuring import cpu_seconds, summary
from bigan.bench.script import argument_parser, met, spread, write_record
from bigan.data.packing import sources
from bigan.data.packing.pack import pack, pack_source
from bigan.data.settings import Fetch
from bigan.data.streaming.stream import Batch, ShardStream
from bigan.distributed.world import World
from bigan.versions import cpu_name, num_cpus

BATCH = 64
WORKERS = num_cpus()
NUM_CLASSES = 10
TO_FLOAT = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)])


def picture(generator: np.random.Generator, size: int) -> np.ndarray:
    """uint8 [size, size, 3] with the 1/f spectrum and the edges of photographs."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = 1
    channels = []
    shared = generator.standard_normal((size, size))
    for _ in range(3):
        noise = 0.8 * shared + 0.2 * generator.standard_normal((size, size))
        channels.append(np.fft.irfft2(np.fft.rfft2(noise) / frequency, (size, size)))
    image = np.stack(channels, -1)
    image = image / image.std() * 45 + 120
    for _ in range(6):
        y, x = generator.integers(0, size, 2)
        h, w = generator.integers(size // 8, size // 2, 2)
        image[y : y + h, x : x + w] += generator.normal(0, 40, 3)
    return image.clip(0, 255).astype(np.uint8)


def write_images(root: Path, size: int, num: int) -> None:
    """`root`/files/<class>/*.jpg and the same bytes in `root`/tars, written by WebDataset."""
    generator = np.random.default_rng(size)
    originals = [picture(generator, size) for _ in range(64)]
    (root / "tars").mkdir(parents=True)
    pattern = str(root / "tars" / "train-%06d.tar")
    with webdataset.ShardWriter(pattern, maxcount=max(64, num // 16), verbose=0) as writer:
        for i in range(num):
            shift = tuple(generator.integers(0, size, 2))
            image = np.roll(originals[i % len(originals)], shift, (0, 1))
            data = simplejpeg.encode_jpeg(image, quality=90, colorsubsampling="420")
            label = i % NUM_CLASSES
            file = root / "files" / f"{label:02d}" / f"{i:07d}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
            writer.write({"__key__": f"{i:07d}", "jpg": data, "cls": str(label).encode()})


# --- the pipelines: each yields batches of one epoch, about `num` images --------------------------


def readme(root: Path, num: int, workers: int) -> Iterable[object]:
    """The pipeline of WebDataset's README: shuffle, decode by PIL, tuples, DataLoader."""
    urls = sorted(str(path) for path in (root / "tars").glob("*.tar"))
    dataset = (
        webdataset.WebDataset(urls, shardshuffle=100)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(TO_FLOAT, int)
    )
    return DataLoader(dataset, batch_size=BATCH, num_workers=workers)


def image_folder(root: Path, num: int, workers: int) -> Iterable[object]:
    dataset = torchvision.datasets.ImageFolder(str(root / "files"), TO_FLOAT)
    return DataLoader(dataset, batch_size=BATCH, shuffle=True, num_workers=workers)


def random_access(folder: Path, num: int, threads: int | None) -> Iterable[Batch]:
    """The default of bigan: index, pread, decoding threads; each pass starts at new positions."""
    fetch = Fetch(threads=threads)
    start = next(EPOCHS) * num // BATCH * BATCH
    with ShardStream(
        folder, seed=0, world=World(), batch=BATCH, images_seen=start, fetch=fetch
    ) as stream:
        yield from itertools.islice(stream, num // BATCH)


def normalized(folder: Path, num: int, threads: int | None) -> Iterable[torch.Tensor]:
    for batch in random_access(folder, num, threads):
        yield as_images(batch.pixels, None)


EPOCHS = itertools.count()


# --- measuring ------------------------------------------------------------------------------------


def cost(make: Callable[[], Iterable[object]], num: int) -> tuple[float, float]:
    """(CPU microseconds per image, images per second) of one pass over about `num` images.

    The pass is timed from its second batch on: opening (bigan hashes the data set, a DataLoader
    starts its workers) is not part of the steady state.
    """
    batches = iter(make())
    next(batches)
    before, began = cpu_seconds(), time.perf_counter()
    num_batches = sum(1 for _ in batches)
    seconds = time.perf_counter() - began
    images = min(num - BATCH, num_batches * BATCH)
    return (cpu_seconds() - before) / images * 1e6, images / seconds


def decode_only(root: Path, num: int, threads: int) -> float:
    """Images per second of the bare decoder: the same bytes in memory, one buffer per thread."""
    files = sorted((root / "files").rglob("*.jpg"))[: min(num, 2048)]
    data = [file.read_bytes() for file in files]
    size = simplejpeg.decode_jpeg_header(data[0])[0]
    rounds = max(1, num // len(data))

    def work(part: int) -> int:
        out = np.empty((size, size, 3), np.uint8)
        mine = data[part::threads] * rounds
        for jpeg in mine:
            simplejpeg.decode_jpeg(jpeg, "RGB", buffer=out)
        return len(mine)

    with ThreadPoolExecutor(threads) as executor:
        began = time.perf_counter()
        done = sum(executor.map(work, range(threads)))
        return done / (time.perf_counter() - began)


def compare(root: Path, size: int, num: int, runs: int) -> dict[str, dict[str, dict[str, float]]]:
    """Interleaved runs of all pipelines at one size."""
    write_images(root, size, num)
    pack(str(root / "files"), root / "raw", resolution=size, encoding="npy", test_fraction=0.0)
    tars, raw = root / "tars", root / "raw"
    # By default one thread decodes small images: several cost more CPU time than they save.
    threads = None if Fetch().num_threads(size) == 1 else WORKERS
    many, more = 4 * num, 16 * num  # several epochs: one is too short to time
    pipelines: dict[str, tuple[int, Callable[[], Iterable[object]]]] = {
        "WebDataset README, 0 workers": (num, lambda: readme(root, num, 0)),
        f"WebDataset README, {WORKERS} workers": (num, lambda: readme(root, num, WORKERS)),
        "ImageFolder, 0 workers": (num, lambda: image_folder(root, num, 0)),
        f"ImageFolder, {WORKERS} workers": (num, lambda: image_folder(root, num, WORKERS)),
        "bigan, JPEG": (many, lambda: random_access(tars, many, threads)),
        "bigan, JPEG, normalized on the host": (
            num,
            lambda: normalized(tars, num, threads),
        ),
        "bigan, raw uint8": (more, lambda: random_access(raw, more, threads)),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in pipelines}
    rates: list[float] = []
    for _, make in pipelines.values():
        next(iter(make()))  # imports, page cache, index of the tars
    bar = tqdm(total=runs * (len(pipelines) + 1), desc=f"{size} px", unit="run", disable=None)
    for _ in range(runs):
        for name, (images, make) in pipelines.items():
            found[name].append(cost(make, images))
            bar.update()
        rates.append(decode_only(root, many, WORKERS))
        bar.update()
    bar.close()
    result = {
        name: {
            "cpu_us_per_image": summary([cpu for cpu, _ in values]),
            "images_per_second": summary([rate for _, rate in values]),
        }
        for name, values in found.items()
    }
    result["bare decoder"] = {"images_per_second": summary(rates)}
    return result


RESUME = """
import json, sys, time
from bigan.data.streaming.stream import ShardStream
from bigan.distributed.world import World
folder, images_seen = sys.argv[1], int(sys.argv[2])
began = time.perf_counter()
with ShardStream(folder, seed=0, world=World(), batch=64, images_seen=images_seen) as stream:
    next(stream)
    print(time.perf_counter() - began)
"""

MEMORY = """
import itertools, os, sys
from pathlib import Path
from bigan.data.settings import Fetch
from bigan.data.streaming.stream import ShardStream
from bigan.distributed.world import World
folder, num = sys.argv[1], int(sys.argv[2])
def resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
before = resident()
with ShardStream(folder, seed=0, world=World(), batch=64, fetch=Fetch(threads=2)) as stream:
    for _ in itertools.islice(stream, num // 10 // 64):
        pass
    warm = resident()
    for _ in itertools.islice(stream, num * 9 // 10 // 64):
        pass
    print(before, warm, resident())
"""


def many_shards(folder: Path, num_shards: int, each: int = 64) -> int:
    """Pack `num_shards` shards of small random images; returns the number of images."""
    num = num_shards * each
    pixels = np.random.default_rng(0).integers(0, 256, (num, 8, 8, 3), dtype=np.uint8)
    source = sources.Source(
        name="noise", transform="none", identity="noise", resolution=8, channels=3,
        classes=("all",), keys=tuple(f"{i:07d}" for i in range(num)), labels=(0,) * num,
        splits=("train",) * num, read=lambda i: pixels[i],
    )  # fmt: skip
    pack_source(source, folder, shard_size=each)
    return num


def measure(code: str, *arguments: object) -> list[float]:
    """The numbers a fresh process prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [float(word) for word in printed.split()]


def run(quick: bool) -> dict[str, Any]:
    """All measurements; `quick`: fewer images and runs."""
    runs = 2 if quick else 5
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        sizes = {
            size: compare(root / f"{size}", size, num // (4 if quick else 1), runs)
            for size, num in ((32, 12_800), (256, 2_560))
        }
        num = many_shards(root / "many", 100 if quick else 1000)
        resume = [measure(RESUME, root / "many", num * 9 // 10)[0] for _ in range(runs)]
        images = 20_000 if quick else 200_000
        before, warm, after = measure(MEMORY, root / "32" / "tars", images)
    return {
        "runs": runs,
        "batch": BATCH,
        "workers": WORKERS,
        "sizes": sizes,
        "resume": {
            "shards": num // 64,
            "images": num,
            "first_batch_seconds": summary(resume),
        },
        "memory": {
            "images": images,
            "mib_before": before,
            "mib_after_a_tenth": warm,
            "mib_at_the_end": after,
        },
    }


# --- targets --------------------------------------------------------------------------------------


def targets(result: dict[str, Any]) -> list[tuple[str, float, str, float, bool]]:
    """(name, measured, relation, bound, whether it is met) of every target."""

    def cpu(size: int, name: str) -> float:
        return result["sizes"][size][name]["cpu_us_per_image"]["median"]

    rows = []
    for other in ("WebDataset README", "ImageFolder"):
        for size, name, bound in (
            (32, "bigan, JPEG", 10.0),
            (256, "bigan, JPEG", 3.0),
            (32, "bigan, raw uint8", 40.0),
        ):
            ratio = cpu(size, f"{other}, {result['workers']} workers") / cpu(size, name)
            what = f"{size} px: {other} / {name}"
            rows.append((what, ratio, ">=", bound, ratio >= bound))
    sizes = result["sizes"][256]
    share = (
        sizes["bigan, JPEG"]["images_per_second"]["median"]
        / sizes["bare decoder"]["images_per_second"]["median"]
    )
    rows.append(("256 px: share of the bare decoder's rate", share, ">=", 0.9, share >= 0.9))
    seconds = result["resume"]["first_batch_seconds"]["median"]
    shards = result["resume"]["shards"]
    what = f"seconds to the first batch at 90 % of {shards:,} shards"
    rows.append((what, seconds, "<", 2.0, seconds < 2))
    memory = result["memory"]
    growth = memory["mib_at_the_end"] - memory["mib_after_a_tenth"]
    what = f"MiB more after {memory['images']:,} images than after a tenth"
    rows.append((what, growth, "<", 16.0, growth < 16))
    return rows


def as_table(result: dict[str, Any]) -> str:
    lines = [
        f"{cpu_name()}, {result['workers']} cores, {result['runs']} runs, medians (lowest to "
        "highest)",
        "",
    ]
    for size, rows in result["sizes"].items():
        lines += [f"{size} px", f"  {'pipeline':<44}{'CPU us/image':>24}{'images/s':>12}"]
        for name, row in rows.items():
            cpu = ""
            if "cpu_us_per_image" in row:
                cpu = spread(row["cpu_us_per_image"], digits=1)
            lines.append(f"  {name:<44}{cpu:>24}{row['images_per_second']['median']:>12,.0f}")
        lines.append("")
    lines.append(f"{'target':<62}{'measured':>10}{'bound':>12}")
    for name, value, relation, bound, reached in targets(result):
        lines.append(f"{name:<62}{value:>10.2f}{relation:>5} {bound:<6g} {met(reached)}")
    lines.append("")
    for size, rows in result["sizes"].items():
        for other in ("WebDataset README", "ImageFolder"):
            for name in ("bigan, JPEG", "bigan, raw uint8"):
                theirs, ours = (rows[n]["cpu_us_per_image"] for n in (f"{other}, 0 workers", name))
                ratio = theirs["median"] / ours["median"]
                lines.append(f"{f'{size} px: {other} on one core / {name}':<62}{ratio:>10.2f}")
    return "\n".join(lines)


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer images and runs")
    given = parser.parse_args()
    torch.set_num_threads(1)
    result = run(given.quick)
    print(as_table(result))
    rows = [
        {"name": name, "measured": value, "bound": f"{relation} {bound}", "met": reached}
        for name, value, relation, bound, reached in targets(result)
    ]
    write_record("input_pipeline", given, result, targets=rows)
    return 0 if all(row["met"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
