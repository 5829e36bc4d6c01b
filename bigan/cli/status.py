"""`bigan status`, `bigan logs` and `bigan cancel`: runs on a SLURM cluster, and without one."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from bigan.cli.arguments import count, positive

if TYPE_CHECKING:
    from bigan.cli.main import Commands

_ALTERNATE_SCREEN, _NORMAL_SCREEN = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_HOME, _REST_OF_LINE, _REST_OF_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"


def add_job_commands(commands: Commands) -> None:
    """Add the commands that observe and end the jobs of runs."""
    status = commands.add(
        "status",
        status_command,
        "show state, progress, speed and last error of runs and sweeps",
        "Reads run folders and asks squeue; without SLURM it shows what the run folders have.",
    )
    status.add_argument(
        "runs",
        nargs="*",
        type=Path,
        metavar="RUN",
        help="run folders, sweeps, or folders that contain them (default: all below runs/)",
    )
    status.add_argument(
        "--interval",
        type=positive,
        default=10.0,
        metavar="S",
        help="seconds between two displays of --watch (default 10)",
    )
    mode = status.add_mutually_exclusive_group()
    mode.add_argument("--watch", action="store_true", help="show it again until Ctrl-C")
    mode.add_argument("--json", action="store_true", help="print JSON")
    logs = commands.add(
        "logs",
        logs_command,
        "show the log of a run's newest job",
        "Examples: bigan logs runs/digits -f; bigan logs runs/digits --rank 3; "
        "bigan logs runs/digits --job 7",
    )
    logs.add_argument("run", type=Path, metavar="RUN", help="a run folder or a sweep")
    logs.add_argument(
        "--rank", type=_rank, metavar="N", help="the log of one rank in the newest attempt"
    )
    logs.add_argument("--job", type=_job, metavar="ID", help="the log of a job, like 7 or 7_2")
    logs.add_argument(
        "-f",
        "--follow",
        action="store_true",
        help="wait for the log and show what is appended, also by the next attempts",
    )
    logs.add_argument(
        "--lines", type=count, default=100, metavar="N", help="lines shown at first (default 100)"
    )
    cancel = commands.add(
        "cancel",
        cancel_command,
        "stop a run: its trainer saves a checkpoint, and its waiting jobs are cancelled",
        "The run is not requeued; submit it again to continue.",
    )
    cancel.add_argument("run", type=Path, metavar="RUN", help="a run folder or a sweep")
    cancel.add_argument(
        "--now", action="store_true", help="cancel running jobs as well, without waiting for a step"
    )


def status_command(arguments: argparse.Namespace) -> int:
    from bigan.cluster.discovery import find_runs
    from bigan.cluster.status import survey
    from bigan.cluster.status_text import as_json, as_lines

    if arguments.json:
        print(json.dumps(as_json(survey(find_runs(arguments.runs))), indent=2))
        return 0
    if not arguments.watch:
        terminal = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        print("\n".join(as_lines(survey(find_runs(arguments.runs)), terminal)))
        return 0

    def lines(width: int | None) -> list[str]:
        return as_lines(survey(find_runs(arguments.runs)), width)

    lines(None)  # an error appears before the screen changes
    with contextlib.suppress(KeyboardInterrupt), _display() as show:
        while True:
            show(lines)
            time.sleep(arguments.interval)
    return 0


def logs_command(arguments: argparse.Namespace) -> int:
    from bigan.cluster.logs import Choice, follow, show

    choice = Choice(arguments.run, arguments.rank, arguments.job)
    if not arguments.follow:
        show(choice, arguments.lines, _write, _note)
        return 0
    with contextlib.suppress(KeyboardInterrupt):
        follow(choice, arguments.lines, _write, _note)
    return 0


def cancel_command(arguments: argparse.Namespace) -> int:
    from bigan.cluster.cancel import cancel

    return cancel(arguments.run, now=arguments.now, echo=print)


class _Show:
    """Shows lines again and again: in place on a terminal, else below each other."""

    def __init__(self, on_terminal: bool) -> None:
        self._on_terminal = on_terminal
        self.last = ""

    def __call__(self, lines: Callable[[int | None], list[str]]) -> None:
        clock = time.strftime("%H:%M:%S")
        if not self._on_terminal:
            print("\n".join([f"--- {clock}", *lines(None)]), flush=True)
            return
        size = shutil.get_terminal_size()
        shown = [*lines(size.columns), "", f"{clock}, Ctrl-C ends"[: size.columns]]
        self.last = "\n".join(shown[:-2])
        # Each line replaces that of the last display: the screen is never empty.
        rows = f"{_REST_OF_LINE}\n".join(shown[: size.lines - 1])
        sys.stdout.write(f"{_HOME}{rows}{_REST_OF_LINE}{_REST_OF_SCREEN}")
        sys.stdout.flush()


@contextlib.contextmanager
def _display() -> Iterator[_Show]:
    """On a terminal, a screen of its own; what was shown last remains after it."""
    on_terminal = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    show = _Show(on_terminal)
    if on_terminal:
        sys.stdout.write(_ALTERNATE_SCREEN)
    try:
        yield show
    finally:
        if on_terminal:
            print(_NORMAL_SCREEN + show.last, flush=True)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _rank(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a rank (0, 1, ...)")
    return int(text)


def _job(text: str) -> str:
    job, _, element = text.partition("_")
    if not job.isdecimal() or (element and not element.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a job like 7 or 7_2")
    return text
