"""The command line: `bigan pack | verify | describe | train | ...`.

Exit codes: 0 done, 1 the run had to stop or a data set is damaged, 2 bad input (one line, nothing
written), 128 + n stopped by signal n with a checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from bigan.cli.arguments import CONFIG_HELP, OVERRIDE_HELP, count, positive
from bigan.cli.bench import add_benchmarks
from bigan.cli.pack import (
    add_pack_arguments,
    add_verify_arguments,
    pack_command,
    stage_command,
    verify_command,
)
from bigan.cli.status import add_job_commands
from bigan.cli.submit import EPILOG, add_submit_arguments, submit_command
from bigan.cli.sweep import add_sweep
from bigan.distributed.job_logs import failures_written, write_failure
from bigan.distributed.signals import launched_as_rank_0
from bigan.errors import (
    INPUT,
    REPORTED_ELSEWHERE,
    RunError,
    UserError,
    disk_is_full,
    unusable_file,
)
from bigan.urls import redacted_text

if TYPE_CHECKING:
    from bigan.run_config import RunConfig


def describe_command(arguments: argparse.Namespace) -> int:
    from bigan.run.describe import as_text, describe

    description = describe(_load(arguments), arguments.world_size, arguments.ranks_per_node)
    print(json.dumps(description, indent=2) if arguments.json else as_text(description))
    return 0


def train_command(arguments: argparse.Namespace) -> int:
    from bigan.distributed.signals import StopFlag

    # Signals during the slow imports below are remembered, not lost. After SIGINT before the first
    # step there is nothing to save.
    with StopFlag(interruptible=True) as stop:
        named = [change.partition("=")[0].strip() for change in arguments.allow_change]
        arguments.overrides = [*arguments.overrides, *arguments.allow_change]
        config = _load(arguments)
        from bigan.reporting.progress_bar import ProgressBar
        from bigan.run.trainer import train

        bar = ProgressBar(config.train.total_images)
        try:
            code = train(config, bar.echo, bar.tick, stop, named)
        finally:
            bar.close()
    if code == 0 and launched_as_rank_0(os.environ):
        _print_error(f"{config.run_dir}: samples/, timeline.png, curves.png, snapshots/")
    return code


def evaluate_command(arguments: argparse.Namespace) -> int:
    from bigan.distributed.launch import connect, disconnect
    from bigan.evaluation.truncation import sweep
    from bigan.evaluation.watcher import evaluate

    if arguments.snapshot and not arguments.truncations:
        raise UserError("--snapshot selects the snapshot for --truncations; give both")
    if arguments.timeout and not arguments.watch:
        raise UserError("--timeout limits the time that --watch waits; give both")
    if arguments.until and not arguments.watch:
        raise UserError("--until ends the wait of --watch; give both")
    # A watcher's ranks wait for rank 0 to find work.
    _, world = connect(timeout_seconds=24 * 3600, join_seconds=600)
    echo = functools.partial(print, flush=True)
    if arguments.truncations:
        sweep(
            arguments.run,
            world,
            arguments.truncations,
            which=arguments.snapshot,
            overrides=arguments.overrides,
            echo=echo,
        )
    else:
        evaluate(
            arguments.run,
            world,
            overrides=arguments.overrides,
            watch=arguments.watch,
            timeout_seconds=arguments.timeout,
            until=arguments.until,
            poll_seconds=arguments.poll_seconds,
            echo=echo,
        )
    disconnect(world)
    return 0


def _truncations(text: str) -> list[float | None]:
    return [None if part == "none" else positive(part) for part in text.split(",")]


def _snapshot(text: str) -> str:
    if text not in ("latest", "best") and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of images, latest or best")
    return text


def _load(arguments: argparse.Namespace) -> RunConfig:
    from bigan.run_config import load_config

    return load_config(arguments.config, arguments.overrides)


class _Parser(argparse.ArgumentParser):
    """Its messages about arguments have no secrets."""

    def error(self, message: str) -> NoReturn:
        write_failure(INPUT, message)
        super().error(redacted_text(message))


class Commands:
    """Adds commands to the parser; every one has a --help and the option --debug."""

    def __init__(self, top: argparse.ArgumentParser) -> None:
        self.common = argparse.ArgumentParser(add_help=False)
        self.common.add_argument(
            "--debug", action="store_true", help="show the traceback of an error"
        )
        self._commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(self, name: str, handler: object, text: str, epilog: str) -> argparse.ArgumentParser:
        command = self._commands.add_parser(
            name,
            help=text,
            description=text[:1].upper() + text[1:] + ".",
            epilog=epilog,
            parents=[self.common],
        )
        command.set_defaults(handler=handler)
        return command


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = _Parser(
        prog="bigan",
        description="Train GANs and related generative models on one process or a cluster, from "
        "sharded WebDataset streams.",
        epilog="Start here: bigan pack digits data/digits && bigan train configs/digits.yaml",
    )
    commands = Commands(top)
    _add_data_commands(commands)
    _add_run_commands(commands)
    _add_evaluate(commands)
    add_submit_arguments(
        commands.add("submit", submit_command, "train a config in jobs of SLURM", EPILOG)
    )
    add_sweep(commands)
    add_job_commands(commands)
    bench = commands.add(
        "bench", None, "measure speed, memory and data traffic, as JSON", "See docs/benchmarks.md."
    )
    add_benchmarks(bench, commands.common)
    return top


def _add_data_commands(commands: Commands) -> None:
    add_pack_arguments(
        commands.add(
            "pack",
            pack_command,
            "pack images into WebDataset shards with a manifest",
            "Examples: bigan pack digits data/digits; bigan pack photos/ data/photos --resolution "
            "128 (one subfolder per class); bigan pack photos/ s3://bucket/photos --resolution "
            "128. After an interruption, run the same command again.",
        )
    )
    add_verify_arguments(
        commands.add(
            "verify",
            verify_command,
            "check a packed data set, including every image",
            "Prints one line per problem: wrong checksums or counts, missing or unlisted shards, "
            "images that do not decode. Exit code 1 if there is a problem, 2 if the data set "
            "cannot be read.",
        )
    )


def _add_run_commands(commands: Commands) -> None:
    _add_config(
        commands.add(
            "stage",
            stage_command,
            "copy the shards that a config reads to data.cache on this node",
            "For shards in a slow shared folder; once per node, before training: "
            "bigan stage CONFIG data.cache=/local/bigan",
        )
    )
    describe = commands.add(
        "describe",
        describe_command,
        "show the networks, schedule, memory, data traffic and every resolved value of a config",
        "Networks are built on the meta device, so a laptop can describe the largest config.",
    )
    _add_config(describe)
    describe.add_argument("--json", action="store_true", help="print JSON")
    describe.add_argument(
        "--world-size", type=count, default=1, metavar="N", help="processes (default 1)"
    )
    describe.add_argument(
        "--ranks-per-node",
        type=count,
        default=8,
        metavar="N",
        help="processes that share a node and its data.cache (default 8)",
    )
    train = commands.add(
        "train",
        train_command,
        "train a config, or resume its run",
        "The same command starts a run and resumes it. Several processes: accelerate launch "
        "--config_file launch/cpu.yaml -m bigan train CONFIG ...",
    )
    _add_config(train)
    train.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting of the training method in a run that has begun, for example "
        "optimizer.discriminator.lr=1e-4, and record the change; may be repeated",
    )


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", type=Path, help=CONFIG_HELP)
    command.add_argument("overrides", nargs="*", metavar="a.b=value", help=OVERRIDE_HELP)


def _add_evaluate(commands: Commands) -> None:
    evaluate = commands.add(
        "evaluate",
        evaluate_command,
        "measure every snapshot of a run that has not been measured yet",
        "Runs in parallel with training, in its own process: bigan evaluate runs/digits --watch",
    )
    evaluate.add_argument("run", type=Path, help="the run folder, for example runs/digits")
    evaluate.add_argument(
        "overrides",
        nargs="*",
        metavar="a.b=value",
        help="settings to change for this evaluation, for example evaluation.num_samples=10000",
    )
    mode = evaluate.add_mutually_exclusive_group()
    mode.add_argument("--watch", action="store_true", help="wait for snapshots until the run ends")
    mode.add_argument(
        "--truncations",
        type=_truncations,
        metavar="T,T,...",
        help="measure one snapshot at several truncations, for example 0.2,0.5,1.0,none: a table "
        "and a plot",
    )
    evaluate.add_argument(
        "--snapshot",
        type=_snapshot,
        metavar="IMAGES_SEEN",
        help="the snapshot for --truncations, or latest, or best: the lowest distance measured "
        "(default: best, or latest if none was measured)",
    )
    evaluate.add_argument(
        "--poll-seconds", type=positive, default=1.0, help="interval of --watch (default 1)"
    )
    evaluate.add_argument(
        "--timeout",
        type=positive,
        metavar="SECONDS",
        help="with --watch: exit with code 1 after this time without a change in the run folder "
        "(default: wait forever)",
    )
    evaluate.add_argument(
        "--until",
        type=Path,
        metavar="FILE",
        help="with --watch: end with code 0 once FILE exists and every snapshot is measured, even "
        "if the run is not complete; for a job beside training",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    try:
        arguments = _parse(argv)
    except KeyboardInterrupt:
        return _interrupted()
    try:
        with failures_written():
            code: int = arguments.handler(arguments)
            sys.stdout.flush()  # here, where an error is reported
        return code
    except (UserError, RunError) as error:
        if arguments.debug:
            _print_error(traceback.format_exc().rstrip())
        elif not _printed_by_another_rank(error):
            notes = getattr(error, "__notes__", [])
            _print_error("\n".join([f"bigan: {' '.join(str(error).split())}", *notes]))
        return 2 if isinstance(error, UserError) else 1
    except BrokenPipeError:  # the reader of the pipe, such as `head`, has ended
        _discard_output()
        return 0
    except OSError as error:  # a file or folder that cannot be used: no bug of ours
        problem = unusable_file(error)
        if arguments.debug or problem is None:
            raise
        if disk_is_full(error):
            _discard_output()
        _print_error(f"bigan: {problem}")
        return 2
    except KeyboardInterrupt:
        return _interrupted()


def _interrupted() -> int:
    """The exit code after Ctrl-C; prints one line on rank 0."""
    if launched_as_rank_0(os.environ):
        _print_error("bigan: interrupted")
    return 130


def _print_error(line: str) -> None:
    """Print a line to stderr without secrets of URLs; its file may be on a full disk."""
    with contextlib.suppress(OSError):
        print(redacted_text(line), file=sys.stderr, flush=True)


def _discard_output() -> None:
    """Write what stdout still buffers to nowhere: its file is full, or its reader has ended."""
    with contextlib.suppress(OSError, ValueError):  # a stream without a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """As parse_args, but overrides may also follow options."""
    top = parser()
    arguments, rest = top.parse_known_args(argv)
    if rest and (not hasattr(arguments, "overrides") or any(a.startswith("-") for a in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _printed_by_another_rank(error: Exception) -> bool:
    """Whether another process prints the same line, so that one problem is one line."""
    reported = REPORTED_ELSEWHERE in getattr(error, "__notes__", [])
    everywhere = getattr(error, "everywhere", False) and not launched_as_rank_0(os.environ)
    return reported or everywhere


if __name__ == "__main__":
    sys.exit(main())
