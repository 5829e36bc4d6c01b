"""The commands `bigan pack` and `bigan verify`."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from bigan.cli.arguments import count, fraction, part


def pack_command(arguments: argparse.Namespace) -> int:
    """Pack a source; prints the splits of each manifest. Returns the exit code."""
    from bigan.data.packing.options import PackOptions
    from bigan.data.packing.pack import BAD, pack

    destination = arguments.destination
    given = {n: v for n, v in vars(arguments).items() if n in PackOptions.__dataclass_fields__}
    if given.get("encoding") == "jpeg":
        given["encoding"] = "jpg"
    with _image_bar(f"packing {destination}") as progress:
        packed = pack(arguments.source, destination, PackOptions(**given), progress=progress)
    if not packed.complete:
        print(f"{destination}: this part is finished; the last part to finish writes the manifest")
    for manifest in packed.manifests:
        counts = ", ".join(f"{manifest.num_samples(s):,} {s}" for s in manifest.splits)
        print(
            f"{manifest.folder}: {counts} images, {manifest.resolution} px, "
            f"{manifest.channels} channel(s), {manifest.num_classes} classes"
        )
    if packed.num_ignored:
        print(f"{packed.num_ignored:,} files without an image suffix were ignored")
    if packed.bad:
        print(f"{len(packed.bad):,} unusable images were left out; see {destination / BAD}")
    return 0


def verify_command(arguments: argparse.Namespace) -> int:
    """Verify a packed folder; prints the report. Returns 1 if there is a problem."""
    from bigan.data.packing.verify import verify

    with _image_bar(f"verifying {arguments.folder}") as progress:
        report = verify(
            arguments.folder, deep=arguments.deep, jobs=arguments.jobs, progress=progress
        )
    print(json.dumps(report.as_dict(), indent=2) if arguments.json else report.as_text())
    return 0 if report.ok else 1


@contextlib.contextmanager
def _image_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on the terminal, as a function of (images done, total images)."""
    from tqdm import tqdm

    with tqdm(unit="image", disable=None, desc=title) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


def add_pack_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `bigan pack`; omitted options have the defaults of `PackOptions`."""
    command.add_argument(
        "source",
        help="'digits' (built in); a folder or zip of images (class = subfolder, or labels.csv, or "
        "dataset.json); CIFAR-10/100 or MNIST as downloaded; a folder of WebDataset tars",
    )
    command.add_argument("destination", type=Path, help="folder to write")
    _add_image_options(command.add_argument_group("images", argument_default=argparse.SUPPRESS))
    _add_storage_options(command.add_argument_group("storage", argument_default=argparse.SUPPRESS))
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
        help="pack every N-th shard only, to divide a pack among N processes or SLURM array tasks",
    )


def _add_image_options(images: argparse._ArgumentGroup) -> None:
    images.add_argument("--resolution", type=int, help="width and height in pixels (digits: 16)")
    images.add_argument(
        "--resize",
        choices=("lanczos", "area"),
        help="filter that shrinks the square center crop (default lanczos)",
    )
    images.add_argument(
        "--allow-upscale",
        action="store_true",
        help="enlarge smaller images (default: they count as unusable)",
    )
    images.add_argument(
        "--max-pixels", type=count, help="largest originals that are used (default 134,217,728)"
    )
    images.add_argument("--channels", type=int, choices=(1, 3), help="1: gray, 3: RGB")
    images.add_argument(
        "--pyramid",
        type=count,
        nargs="?",
        const=4,
        metavar="MIN",
        help="pack all powers of two from MIN (4) px up, each as a data set, for progressive "
        "growing",
    )
    images.add_argument(
        "--max-bad",
        type=int,
        metavar="N",
        help="succeed with up to N unusable images, which are left out (default 0)",
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
    command.add_argument("folder", type=Path, help="folder that `bigan pack` wrote")
    command.add_argument(
        "--deep",
        action="store_true",
        help="also report duplicates, constant images and class balance, and draw a contact sheet",
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--jobs", type=count, help="threads (default: one per core, at most 16)")
