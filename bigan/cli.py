"""The command line: `bigan pack | describe | train | evaluate | bench`.

Exit codes: 0 done, 1 the run had to stop, 2 bad input (one line, nothing written), 128 + n stopped
by signal n with a checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bigan.errors import RunError, UserError
from bigan.world import TOLD

if TYPE_CHECKING:
    from bigan.recipe import RunConfig

CONFIG_HELP = "a recipe, for example configs/digits.yaml"
OVERRIDE_HELP = "settings to change, for example train.seed=1 (bigan describe CONFIG lists all)"


def pack_command(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from bigan.data.pack import pack

    with tqdm(unit="image", disable=None, desc=f"packing {arguments.destination}") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        manifest = pack(
            arguments.source,
            arguments.destination,
            resolution=arguments.resolution,
            seed=arguments.seed,
            test_fraction=arguments.test_fraction,
            progress=progress,
        )
    counts = ", ".join(f"{manifest.num_samples(s):,} {s}" for s in manifest.splits)
    print(
        f"{arguments.destination}: {counts} images, {manifest.resolution} px, "
        f"{manifest.channels} channel(s), {manifest.num_classes} classes"
    )
    return 0


def describe_command(arguments: argparse.Namespace) -> int:
    from bigan.describe import as_text, describe

    description = describe(_load(arguments), arguments.world_size)
    print(json.dumps(description, indent=2) if arguments.json else as_text(description))
    return 0


def train_command(arguments: argparse.Namespace) -> int:
    config = _load(arguments)
    from bigan.progress import ProgressBar
    from bigan.trainer import train

    bar = ProgressBar(config.train.total_images)
    try:
        code = train(config, bar.echo, bar.tick)
    finally:
        bar.close()
    if code == 0 and os.environ.get("RANK", "0") == "0":
        print(f"{config.run_dir}: samples/, timeline.png, curves.png, snapshots/", file=sys.stderr)
    return code


def evaluate_command(arguments: argparse.Namespace) -> int:
    from bigan.engine import connect, disconnect
    from bigan.evaluation.watcher import evaluate

    _, world = connect(timeout_seconds=24 * 3600)  # a watcher's ranks wait for rank 0 to find work
    evaluate(
        arguments.run,
        world,
        overrides=arguments.overrides,
        watch=arguments.watch,
        device=world.device,
        poll_seconds=arguments.poll_seconds,
        echo=lambda line: print(line, flush=True),
    )
    disconnect(world)
    return 0


def bench_step_command(arguments: argparse.Namespace) -> int:
    from bigan.bench import bench_step

    result = bench_step(
        arguments.config,
        arguments.overrides,
        arguments.runs,
        lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(json.dumps(result, indent=2))
    return 0


def _load(arguments: argparse.Namespace) -> RunConfig:
    from bigan import config as configs
    from bigan.recipe import RunConfig

    return configs.load(RunConfig, arguments.config, arguments.overrides)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def parser() -> argparse.ArgumentParser:
    """All commands; every one explains itself with --help."""
    top = argparse.ArgumentParser(
        prog="bigan",
        description="Train large GANs on one process or a cluster, from sharded streams.",
        epilog="Start here: bigan pack digits data/digits && bigan train configs/digits.yaml",
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, handler: object, text: str, epilog: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=text,
            description=text[:1].upper() + text[1:] + ".",
            epilog=epilog,
            parents=[common],
        )
        command.set_defaults(handler=handler)
        return command

    def add_recipe(command: argparse.ArgumentParser) -> None:
        command.add_argument("config", type=Path, help=CONFIG_HELP)
        command.add_argument("overrides", nargs="*", metavar="a.b=value", help=OVERRIDE_HELP)

    pack = add(
        "pack",
        pack_command,
        "turn images into WebDataset shards with a manifest",
        "Examples: bigan pack digits data/digits; bigan pack photos/ data/photos --resolution 128 "
        "(one subfolder per class). A killed pack is continued by the same command.",
    )
    pack.add_argument("source", help="'digits' (built in), or a folder of images")
    pack.add_argument("destination", type=Path, help="folder to write")
    pack.add_argument("--resolution", type=int, help="width and height in pixels (digits: 16)")
    pack.add_argument("--seed", type=int, default=0, help="of the global shuffle (default 0)")
    pack.add_argument(
        "--test-fraction",
        type=float,
        default=0.1,
        help="held out by hash of the file name (default 0.1; the digits have a fixed split)",
    )

    describe = add(
        "describe",
        describe_command,
        "show a recipe's networks, schedule, memory and every resolved value",
        "Builds on the meta device: the largest recipe is described on a laptop.",
    )
    add_recipe(describe)
    describe.add_argument("--json", action="store_true", help="print JSON")
    describe.add_argument("--world-size", type=_count, default=1, help="processes (default 1)")

    train = add(
        "train",
        train_command,
        "train a recipe, or go on where it was stopped",
        "The same command starts a run and resumes it. Several processes: accelerate launch "
        "--config_file launch/cpu.yaml -m bigan.train CONFIG ...",
    )
    add_recipe(train)

    evaluate = add(
        "evaluate",
        evaluate_command,
        "measure every snapshot of a run that has not been measured yet",
        "Runs beside training, in its own process: bigan evaluate runs/digits --watch",
    )
    evaluate.add_argument("run", type=Path, help="the run folder, for example runs/digits")
    evaluate.add_argument(
        "overrides",
        nargs="*",
        metavar="a.b=value",
        help="other settings than the run's, for example evaluation.num_samples=10000",
    )
    evaluate.add_argument("--watch", action="store_true", help="wait for snapshots until the end")
    evaluate.add_argument("--poll-seconds", type=_positive, default=1.0, help="between two looks")

    bench = add("bench", None, "measure speed and memory, as JSON", "See docs and benchmarks/.")
    kinds = bench.add_subparsers(dest="kind", required=True, metavar="KIND")
    step = kinds.add_parser(
        "step",
        help="training step: eager and compiled, with and without R1",
        description="Measure the training step side by side: eager and compiled, with and "
        "without R1. Prints JSON: images/s, ms per phase, peak memory.",
        parents=[common],
    )
    step.add_argument(
        "config", type=Path, nargs="?", default=Path("configs/digits.yaml"), help=CONFIG_HELP
    )
    step.add_argument("overrides", nargs="*", metavar="a.b=value", help=OVERRIDE_HELP)
    step.add_argument("--runs", type=int, default=7, help="timed runs, at least 5 (default 7)")
    step.set_defaults(handler=bench_step_command)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    arguments = _parse(argv)
    try:
        return arguments.handler(arguments)
    except (UserError, RunError) as error:
        if arguments.debug:
            traceback.print_exc()
        elif not _said_by_rank_0(error):
            print(f"bigan: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a file or folder that cannot be used: the user's, not a bug
        if arguments.debug or not error.filename:
            raise
        print(f"bigan: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Like parse_args, but overrides may also stand behind options."""
    top = parser()
    arguments, rest = top.parse_known_args(argv)
    if rest and (not hasattr(arguments, "overrides") or any(a.startswith("-") for a in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _said_by_rank_0(error: Exception) -> bool:
    """Whether another process prints the same line: one problem, one line."""
    told = TOLD in getattr(error, "__notes__", [])
    everywhere = getattr(error, "everywhere", False) and os.environ.get("RANK", "0") != "0"
    return told or everywhere


if __name__ == "__main__":
    sys.exit(main())
