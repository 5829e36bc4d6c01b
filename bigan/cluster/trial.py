"""One trial of a sweep: parameters at its start, pruning while it runs, the result at its end.

    python -m bigan.cluster.trial begin|watch|end SWEEP_DIR INDEX

A job script calls it around `bigan train` and `bigan evaluate`, and so does `bigan sweep`.

begin  chooses the parameters and writes the config; a trial that starts again, after a requeue,
       keeps both. Prints two lines: the run folder, and when to evaluate: `during` or `after` the
       training, or `ended` for a trial that has a result, so that there is nothing to do.
watch  reports every evaluated snapshot to the pruner, until it is killed; a trial that is to be
       pruned gets the file STOP with the text "pruned".
end    records the result: complete, pruned or failed. A result is recorded once.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NoReturn

import yaml

from bigan import atomic_files
from bigan import config as configs
from bigan.cluster import records
from bigan.cluster.sweep import Bayesian, Parameters, Sweep, as_overrides, point
from bigan.cluster.sweep_folder import SweepFolder, Trial
from bigan.errors import UserError, writing
from bigan.run_folder import RunFolder

PRUNED = "pruned"  # text of the file STOP
WATCH_SECONDS = 2.0  # between two reports to the pruner


def begin(folder: SweepFolder, index: int) -> Trial:
    """Start trial `index`, or return the record of its first start.

    Raises `UserError` for an index outside of the sweep.
    """
    sweep = folder.sweep()
    trial = folder.read(index)
    if trial is None:
        if not 0 <= index < sweep.num_trials:
            raise UserError(f"{folder.path}: has no trial {index}; it has {sweep.num_trials}")
        trial = Trial(index, _parameters(folder, sweep, index))
    elif trial.state == "running" and folder.pruned(index).exists():
        return end(folder, index)  # its job ended between the decision and the record
    if trial.state == "running":
        with writing(folder.trials):
            folder.trials.mkdir(parents=True, exist_ok=True)
            _write_config(folder, sweep, trial)
            folder.write(trial)  # last: its config is complete
    return trial


def observe(folder: SweepFolder, index: int) -> bool:
    """Report new values of a trial to the pruner; whether it is to be pruned, and has STOP."""
    trial = folder.read(index)
    if trial is None or trial.state != "running":
        return False
    run, decided = folder.run(index), folder.pruned(index)
    if not decided.exists():
        sweep = folder.sweep()
        from bigan.cluster import study

        finite = _finite(run, sweep)
        if not sweep.prunes or not study.report(folder, sweep, index, finite):
            return False
        atomic_files.write_atomic(decided, f"{max(finite)}\n")  # before STOP: `end` needs it
    if not run.done.exists() and not run.stop.exists():  # also after the start of another attempt
        atomic_files.write_atomic(run.stop, PRUNED)
    return True


def watch(folder: SweepFolder, index: int) -> NoReturn:
    """`observe` until the process is killed."""
    while True:
        try:
            observe(folder, index)
        except (OSError, ValueError) as error:  # of a shared file system, for a moment
            sys.stderr.write(f"bigan: trial {index}: {error}; trying again\n")
        time.sleep(WATCH_SECONDS)


def end(folder: SweepFolder, index: int, logs: Path | None = None, problem: str = "") -> Trial:
    """Record the result of a trial whose processes have ended, and return its record.

    `logs`: the folder with the failure files of the last attempt. `problem`: why it ended, if
    there are none. A run that was stopped and can be resumed (STOP, REQUEUE) stays `running`.
    """
    trial = folder.read(index)
    if trial is None:
        raise UserError(f"{folder.path}: trial {index} has not begun")
    if trial.state != "running":
        return trial
    sweep = folder.sweep()
    trial = _ended(folder, sweep, trial, _failure(folder.run(index), logs), problem)
    if trial.state != "running":
        if isinstance(sweep.method, Bayesian):
            from bigan.cluster import study

            study.report(folder, sweep, index, _finite(folder.run(index), sweep))
            study.tell(folder, sweep, index, trial.state, trial.value)
        folder.write(trial)
    return trial


def measured(run: RunFolder, metric: str) -> dict[int, float]:
    """images_seen -> value of a metric ("eval/fd/...") in the records of the evaluator."""
    found = {}
    for path in [*run.evaluation.glob("*.json"), *run.evaluation.glob("*/*.json")]:
        if not path.stem.isdecimal():
            continue
        try:
            value = json.loads(path.read_text(encoding="utf-8"))["metrics"].get(
                metric.removeprefix("eval/")
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # is being replaced
        if isinstance(value, int | float):
            found[int(path.stem)] = float(value)
    return dict(sorted(found.items()))


def _finite(run: RunFolder, sweep: Sweep) -> dict[int, float]:
    """The values of the sweep's metric that a study accepts."""
    found = measured(run, sweep.metric or "")
    return {images: value for images, value in found.items() if math.isfinite(value)}


def images_seen(run: RunFolder) -> int:
    """images_seen of the newest checkpoint or snapshot; 0 without."""
    folders = [run.checkpoints, run.snapshots]
    found = [int(p.name) for f in folders for p in atomic_files.numbered_folders(f)[-1:]]
    return max(found, default=0)


def _parameters(folder: SweepFolder, sweep: Sweep, index: int) -> Parameters:
    if isinstance(sweep.method, Bayesian):
        from bigan.cluster import study

        return study.ask(folder, sweep, index)
    return point(sweep, index)


def _write_config(folder: SweepFolder, sweep: Sweep, trial: Trial) -> None:
    """Write the config of a trial: the base config, its parameters, and its folders."""
    own = {
        "run_dir": str(folder.run(trial.index).path),
        "tracking.experiment": sweep.experiment,
        "tracking.parent": "..",
    }
    overrides = as_overrides({**trial.parameters, **own})
    content, _ = configs.read(folder.base, overrides)
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    atomic_files.write_atomic(folder.trial_config(trial.index), text)


def _ended(folder: SweepFolder, sweep: Sweep, trial: Trial, error: str, problem: str) -> Trial:
    """The record of a trial from what its run folder has; `error`: of a failure that is known."""
    run = folder.run(trial.index)
    values = measured(run, sweep.metric or "")
    seen = images_seen(run)
    last = next(reversed(values.values()), None)
    if not run.done.exists():
        if folder.pruned(trial.index).exists():
            return trial.end("pruned", value=last, images_seen=seen)
        if not error and (run.stop.exists() or run.requeue.exists()):
            return trial
        error = error or problem or "ended before the end of the run, without a message"
        return trial.end("failed", images_seen=seen, error=error)
    snapshots = atomic_files.numbered_folders(run.snapshots)
    newest = int(snapshots[-1].name) if snapshots else seen
    if newest not in values:
        reason = error or problem or f"no {sweep.metric} of the snapshot {newest}"
        return trial.end("failed", images_seen=seen, error=f"evaluation: {reason}")
    better = max if sweep.goal == "maximize" else min
    finite = [value for value in values.values() if math.isfinite(value)]
    if not finite or (sweep.value == "last" and not math.isfinite(values[newest])):
        return trial.end("failed", images_seen=seen, error=f"{sweep.metric} = {last}: not finite")
    value = values[newest] if sweep.value == "last" else better(finite)
    return trial.end("complete", value=value, images_seen=seen)


def _failure(run: RunFolder, logs: Path | None) -> str:
    """The reason why the last attempt failed, in one line; "" if it is not known.

    From the failure files in `logs`, else from the verdict of the job script in attempts.tsv.
    """
    found = records.cause(records.read_failures(logs)) if logs else None
    if found:
        return found.message
    events = records.read_events(run.path)
    return events[-1].reason if events and events[-1].event == "failed" else ""


def when_to_evaluate(sweep: Sweep, trial: Trial) -> Literal["during", "after", "ended"]:
    """When the job of a trial has to evaluate it; "ended": it has a result."""
    return sweep.evaluates if trial.state == "running" else "ended"


def main(argv: Sequence[str] | None = None) -> int:
    """The command of the module docstring; exit code 2 for a `UserError`, one line."""
    parser = argparse.ArgumentParser(prog="python -m bigan.cluster.trial")
    parser.add_argument("action", choices=("begin", "watch", "end"))
    parser.add_argument("sweep_dir", type=Path)
    parser.add_argument("index", type=int)
    arguments = parser.parse_args(argv)
    folder, index = SweepFolder(arguments.sweep_dir), arguments.index
    try:
        if arguments.action == "begin":
            trial = begin(folder, index)
            lines = (str(folder.run(index).path), when_to_evaluate(folder.sweep(), trial))
            sys.stdout.write("".join(f"{line}\n" for line in lines))
        elif arguments.action == "end":
            logs = os.environ.get("BIGAN_LOG_DIR")
            trial = end(folder, index, Path(logs) if logs else None)
            sys.stdout.write(f"trial {index}: {described(trial, folder.sweep())}\n")
            from bigan.cluster.sweep_report import publish

            if note := publish(folder):
                sys.stdout.write(f"{note}\n")
        else:
            watch(folder, index)
    except UserError as error:
        sys.stderr.write(f"bigan: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def described(trial: Trial, sweep: Sweep) -> str:
    """State and value of a trial in a line."""
    value = "" if trial.value is None else f", {sweep.metric} = {trial.value:.5g}"
    error = f": {trial.error}" if trial.error else ""
    return f"{trial.state}{value} at {trial.images_seen} images{error}"


if __name__ == "__main__":
    sys.exit(main())
