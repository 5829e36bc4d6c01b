"""`bigan sweep` and `bigan sweep-report`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bigan.cli.arguments import OVERRIDE_HELP, count
from bigan.errors import UserError

if TYPE_CHECKING:
    from bigan.cli.main import Commands
    from bigan.cluster.sweep_folder import Trial


def add_sweep(commands: Commands) -> None:
    """Add both commands."""
    sweep = commands.add(
        "sweep",
        sweep_command,
        "run the trials of a sweep on this machine, or continue it",
        "The sweep file names the config, the parameters and the method: grid, random or optuna "
        "(docs/sweeps.md). On SLURM: bigan submit CONFIG --sweep FILE.",
    )
    sweep.add_argument(
        "file", type=Path, help="the sweep file, for example configs/sweeps/digits-lr.yaml"
    )
    sweep.add_argument("overrides", nargs="*", metavar="a.b=value", help=OVERRIDE_HELP)
    sweep.add_argument(
        "--jobs", type=count, metavar="N", help="trials at a time (default: parallel, else 1)"
    )
    report = commands.add(
        "sweep-report",
        report_command,
        "show the trials of a sweep and the best one; write a table and a plot",
        "Works at any time during a sweep. Writes report.md, report.csv and sweep.png. "
        "Example: bigan sweep-report runs/digits-lr",
    )
    report.add_argument("sweep_dir", type=Path, help="the folder of the sweep (its run_dir)")
    report.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where to write them (default: sweep_dir)"
    )


def sweep_command(arguments: argparse.Namespace) -> int:
    from bigan.cluster.sweep import load_sweep
    from bigan.cluster.sweep_check import freeze
    from bigan.cluster.sweep_local import check_here, run_sweep
    from bigan.run_config import load_config

    sweep = load_sweep(arguments.file)
    if sweep.config is None:
        raise UserError(f"{arguments.file}: config: is required here, the path of the base config")
    check_here(sweep, load_config(sweep.config, [*sweep.overrides, *arguments.overrides]))
    folder = freeze(sweep, sweep.config, arguments.overrides)
    progress = Progress(sweep.num_trials)
    try:
        code = run_sweep(
            folder, arguments.jobs or sweep.parallel or 1, progress.echo, progress.tick
        )
    finally:
        progress.close()
    if code < 2:
        print(_report(folder.path, None))
    return code


def report_command(arguments: argparse.Namespace) -> int:
    print(_report(arguments.sweep_dir, arguments.out))
    return 0


def _report(sweep_dir: Path, out: Path | None) -> str:
    from bigan.cluster.sweep_folder import SweepFolder
    from bigan.cluster.sweep_report import write_report

    text, files = write_report(SweepFolder(sweep_dir), out)
    return f"{text}\nwritten: {', '.join(map(str, files))}"


class Progress:
    """A bar of the trials that have ended, on a terminal; lines above it, or alone elsewhere."""

    def __init__(self, num_trials: int) -> None:
        from tqdm import tqdm

        from bigan.reporting.progress_bar import is_terminal

        self._bar = tqdm(
            total=num_trials,
            unit="trial",
            file=sys.stderr,
            dynamic_ncols=True,
            disable=not is_terminal(sys.stderr),
        )

    def echo(self, line: str) -> None:
        self._bar.write(line, file=sys.stderr)
        sys.stderr.flush()

    def tick(self, trials: list[Trial]) -> None:
        """Show the number of trials that have ended, and of those that run."""
        num_running = sum(trial.state == "running" for trial in trials)
        self._bar.set_postfix_str(f"{num_running} running", refresh=False)
        self._bar.update(len(trials) - num_running - self._bar.n)

    def close(self) -> None:
        self._bar.close()
