"""The commands `bigan pack`, `bigan verify` and `bigan stage`."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

from bigan.cli.arguments import count, fraction, part, size
from bigan.urls import is_remote


def pack_command(arguments: argparse.Namespace) -> int:
    """Pack a source; prints the splits of each manifest. Returns the exit code."""
    from bigan.data.packing.options import PackOptions
    from bigan.data.packing.pack import pack
    from bigan.data.packing.summary import summary
    from bigan.data.places import shown_place

    destination = shown_place(arguments.destination)
    given = {n: v for n, v in vars(arguments).items() if n in PackOptions.__dataclass_fields__}
    given["exclude"] = tuple(given.get("exclude", ()))
    if given.get("encoding") == "jpeg":
        given["encoding"] = "jpg"
    with _bar(f"packing {destination}", unit="image") as progress:
        packed = pack(
            arguments.source, arguments.destination, PackOptions(**given), progress=progress
        )
    if not packed.complete:
        print(f"{destination}: this part is finished; the last part to finish writes the manifest")
    if packed.manifests:
        print(summary(packed))
    return 0


def verify_command(arguments: argparse.Namespace) -> int:
    """Verify a packed folder; prints the report. Returns 1 if there is a problem."""
    from bigan.data.packing.verify import verify
    from bigan.data.places import shown_place

    with _bar(f"verifying {shown_place(arguments.folder)}", unit="B", unit_scale=True) as progress:
        report = verify(
            arguments.folder, deep=arguments.deep, jobs=arguments.jobs, progress=progress
        )
    print(json.dumps(report.as_dict(), indent=2) if arguments.json else report.as_text())
    return 0 if report.ok else 1


def stage_command(arguments: argparse.Namespace) -> int:
    """Copy the shards of a config to a disk of this node; at once if there is nothing to copy."""
    from bigan import config as configs

    content, _ = configs.read(arguments.config, arguments.overrides)
    if not _has_cached_folder(content.get("data")):
        print("nothing to stage: data.cache is not set, or data.path is a URL")
        return 0
    from bigan.data.streaming.staging import stage
    from bigan.run.streams import staged_splits
    from bigan.run_config import load_config

    for manifest, data in staged_splits(load_config(arguments.config, arguments.overrides)):
        stage(manifest, data.split, data, functools.partial(print, flush=True))
    return 0


def _has_cached_folder(data: Any) -> bool:
    """Whether the `data` section of a config, or a stream in it, has a folder and a cache."""
    sections = [data, *data.values()] if isinstance(data, dict) else []
    return any(
        isinstance(section, dict) and section.get("cache") and not is_remote(str(section["path"]))
        for section in sections
        if isinstance(section, dict) and "path" in section
    )


@contextlib.contextmanager
def _bar(title: str, **options: Any) -> Iterator[Callable[[int, int], None]]:
    """A progress bar of tqdm on the terminal, as a function of (number done, total)."""
    from tqdm import tqdm

    with tqdm(disable=None, desc=title, **options) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


def add_pack_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `bigan pack`; omitted options have the defaults of `PackOptions`."""
    command.add_argument(
        "source",
        help="'digits' (built in); a folder, zip or tar of images (class folders, splits, "
        "labels.csv, metadata.csv, metadata.jsonl or dataset.json); CIFAR-10/100 or MNIST as "
        "downloaded; WebDataset tars",
    )
    command.add_argument(
        "destination",
        help="folder to write, or its URL (s3://bucket/folder, gs://..., az://...)",
    )
    _add_image_options(command.add_argument_group("images", argument_default=argparse.SUPPRESS))
    _add_storage_options(command.add_argument_group("storage", argument_default=argparse.SUPPRESS))
    _add_label_options(command.add_argument_group("labels", argument_default=argparse.SUPPRESS))
    splits = command.add_argument_group(
        "splits, by the hash of the image's name", argument_default=argparse.SUPPRESS
    )
    splits.add_argument(
        "--test-fraction",
        type=fraction,
        help="share of test images (default 0.1; the test set of a source is kept)",
    )
    splits.add_argument(
        "--val-fraction", type=fraction, help="share of validation images (default 0)"
    )
    work = command.add_argument_group("parallelism", argument_default=argparse.SUPPRESS)
    work.add_argument("--jobs", type=count, help="threads (default: one per core, at most 16)")
    work.add_argument(
        "--part",
        type=part,
        metavar="I/N",
        help="pack every N-th shard only, to divide a pack among N processes, machines or SLURM "
        "array tasks, which write to the same destination",
    )


def _add_image_options(images: argparse._ArgumentGroup) -> None:
    images.add_argument(
        "--resolution",
        type=size,
        metavar="PX",
        help="side of squares, or WIDTHxHEIGHT, in pixels (digits: 16)",
    )
    images.add_argument(
        "--fit",
        choices=("crop", "pad", "stretch"),
        help="crop: the largest centered part (default); pad: all of the image within a black or "
        "transparent border; stretch: all of it in another shape",
    )
    images.add_argument(
        "--resize",
        choices=("lanczos", "area"),
        help="filter that resizes it (default lanczos)",
    )
    images.add_argument(
        "--allow-upscale",
        action="store_true",
        help="enlarge smaller images (default: they count as unusable, or get a wider border with "
        "--fit pad)",
    )
    images.add_argument(
        "--channels",
        type=int,
        choices=(1, 2, 3, 4),
        help="1: gray, 2: gray and alpha, 3: RGB, 4: RGBA (default: that of the source, or 3, with "
        "transparency on white)",
    )
    images.add_argument(
        "--max-pixels", type=count, help="largest originals that are used (default 134,217,728)"
    )
    images.add_argument(
        "--pyramid",
        type=count,
        nargs="?",
        const=4,
        metavar="MIN",
        help="pack also half the resolution, a quarter, ..., with at least MIN (4) px per side, "
        "each as a data set, for progressive growing",
    )
    images.add_argument(
        "--max-bad",
        type=int,
        metavar="N",
        help="succeed with up to N unusable images, which are left out (default 0)",
    )


def _add_label_options(labels: argparse._ArgumentGroup) -> None:
    labels.add_argument(
        "--labels",
        choices=("auto", "folders", "none"),
        help="auto (default): from label files if there are any, else from folders; folders: not "
        "from label files; none: one class",
    )
    labels.add_argument(
        "--exclude",
        action="append",
        metavar="PATTERN",
        help="leave out files and folders with this name or path, such as masks or '*_small.png'; "
        "may be repeated",
    )


def _add_storage_options(storage: argparse._ArgumentGroup) -> None:
    storage.add_argument(
        "--encoding",
        choices=("npy", "png", "jpg", "jpeg", "webp"),
        help="npy: raw pixels (default up to 128 px); png: lossless (default above); jpg: 4:4:4",
    )
    storage.add_argument(
        "--quality", type=int, help="1 to 100, of jpg (default 95) or webp (default: lossless)"
    )
    storage.add_argument(
        "--shard-size", type=int, metavar="N", help="images per shard (default: up to 128 MiB)"
    )
    storage.add_argument("--seed", type=int, help="seed of the global shuffle (default 0)")


def add_verify_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `bigan verify`."""
    command.add_argument(
        "folder", help="folder that `bigan pack` wrote, or its URL (s3://, gs://, az://, https://)"
    )
    command.add_argument(
        "--deep",
        action="store_true",
        help="also report duplicates, constant images and class balance, and draw a contact sheet",
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--jobs", type=count, help="threads (default: one per core, at most 16)")
