"""The folder of a sweep: the one place that knows its layout.

<sweep_dir>/sweep.yaml    the sweep, every default filled in; the last file of `freeze`
            base.yaml     the config that the trials vary
            study.journal of Optuna
            mlflow.json   the parent run
            LOCK STOP     of `bigan sweep`, as in a run folder
            report.md  report.csv  sweep.png    written by `bigan sweep-report`
            000/          the run folder of trial 0
            slurm/trials/000.yaml   its config
                         000.json   its record: parameters, state, value
                         000.pruned images_seen at which the pruner decided to end it
            slurm/logs/local-000.log    its output, if `bigan sweep` ran it

Imports nothing heavy: `bigan status` reads the records.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from bigan import atomic_files
from bigan.errors import UserError
from bigan.run_folder import SWEEP_FILE, RunFolder

if TYPE_CHECKING:
    from bigan.cluster.sweep import Parameters, Sweep

# running: begun and not ended, also while its job waits for a requeue
State = Literal["running", "complete", "pruned", "failed"]


@dataclass(frozen=True)
class Trial:
    """The record of a trial that has begun."""

    index: int
    parameters: Parameters
    state: State = "running"
    value: float | None = None  # of the metric; of a pruned trial, the last one
    images_seen: int = 0
    error: str = ""
    begun: float = field(default_factory=time.time)  # unix time
    ended: float | None = None

    @property
    def seconds(self) -> float | None:
        """From its first start to its end, including the wait for a requeue."""
        return None if self.ended is None else self.ended - self.begun

    def end(self, state: State, **values: Any) -> Trial:
        """The record of the trial after its end, which is now."""
        return replace(self, state=state, ended=time.time(), **values)


@dataclass(frozen=True)
class SweepFolder:
    """Paths and records below the folder `path`."""

    path: Path

    @property
    def sweep_file(self) -> Path:
        return self.path / SWEEP_FILE

    @property
    def base(self) -> Path:
        return self.path / "base.yaml"

    @property
    def journal(self) -> Path:
        return self.path / "study.journal"

    @property
    def stop(self) -> Path:
        return RunFolder(self.path).stop

    @property
    def trials(self) -> Path:
        return RunFolder(self.path).slurm / "trials"

    @property
    def logs(self) -> Path:
        return RunFolder(self.path).job_logs

    def name(self, index: int) -> str:
        """The name of a trial's run folder: "003"."""
        return f"{index:03d}"

    def run(self, index: int) -> RunFolder:
        return RunFolder(self.path / self.name(index))

    def trial_config(self, index: int) -> Path:
        return self.trials / f"{self.name(index)}.yaml"

    def pruned(self, index: int) -> Path:
        """A file beside the record, which only the start and the end of a trial write."""
        return self.trials / f"{self.name(index)}.pruned"

    def sweep(self) -> Sweep:
        """The frozen sweep; `UserError` if the folder is not that of a sweep."""
        if not self.sweep_file.is_file():
            raise UserError(f"{self.path}: not the folder of a sweep (no {SWEEP_FILE} in it)")
        from bigan.cluster.sweep import load_sweep

        return load_sweep(self.sweep_file)

    def runs(self) -> list[Path]:
        """The run folders of the trials that exist, by index."""
        try:
            found = [p for p in self.path.iterdir() if p.name.isdecimal() and p.is_dir()]
        except OSError:
            return []
        return sorted(found, key=lambda path: int(path.name))

    def read(self, index: int) -> Trial | None:
        """The record of a trial; None if it has not begun, `UserError` if it is damaged."""
        try:
            found = Trial(**json.loads(self._record(index).read_text(encoding="utf-8")))
            if not isinstance(found.parameters, dict) or found.state not in get_args(State):
                raise ValueError("parameters or state")
            return found
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise UserError(f"{self._record(index)}: damaged ({error}); delete it") from None

    def read_all(self) -> list[Trial]:
        """The records of all trials that have begun, by index; `UserError` for a damaged one."""
        found = [self.read(index) for index in self.recorded()]
        return [trial for trial in found if trial is not None]

    def recorded(self) -> list[int]:
        """The indices of the trials that have a record."""
        names = (re.fullmatch(r"(\d{3,})\.json", p.name) for p in self.trials.glob("*.json"))
        return sorted(int(name[1]) for name in names if name)

    def write(self, trial: Trial) -> None:
        """Write or replace the record of a trial, atomically. Raises OSError."""
        self.trials.mkdir(parents=True, exist_ok=True)
        atomic_files.write_atomic(
            self._record(trial.index), json.dumps(asdict(trial), indent=1) + "\n"
        )

    def _record(self, index: int) -> Path:
        return self.trials / f"{self.name(index)}.json"


def is_sweep(folder: Path) -> bool:
    """Whether a folder is that of a sweep; False also for one that only another user may read."""
    return os.path.isfile(SweepFolder(folder).sweep_file)  # noqa: PTH113


def is_trial(run_dir: Path) -> bool:
    """Whether a run folder is that of a trial of a sweep."""
    return run_dir.name.isdecimal() and is_sweep(run_dir.parent)


def best(trials: Sequence[Trial], goal: str | None) -> Trial | None:
    """The complete trial with the best value; the first of equal ones."""
    complete = [t for t in trials if t.state == "complete" and t.value is not None]
    sign = -1.0 if goal == "maximize" else 1.0
    return min(complete, key=lambda t: sign * (t.value or 0.0), default=None)
