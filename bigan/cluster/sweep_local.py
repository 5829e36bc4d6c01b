"""Runs the trials of a sweep on this machine, some at a time, each in its own processes.

A trial is `bigan train` and `bigan evaluate`, as in a job of SLURM. Each of the `jobs` places has
one GPU, if there are GPUs. SIGINT and SIGTERM stop the trainers, which save; the same command
continues.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from bigan.cluster import trial as trials
from bigan.cluster.job_states import live_jobs
from bigan.cluster.slurm import SlurmError
from bigan.cluster.sweep import Sweep, shown
from bigan.cluster.sweep_folder import SweepFolder, Trial
from bigan.cluster.sweep_report import publish
from bigan.errors import UserError, writing
from bigan.run.lock import RunLock
from bigan.run_config import RunConfig

POLL_SECONDS = 0.2
DELIVERY_SECONDS = 60.0  # to MLflow, at the end
_LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1  # of prctl(2)
COMMAND = (sys.executable, "-m", "bigan")
SIGNALS = (signal.SIGINT, signal.SIGTERM)

Echo = Callable[[str], None]
Tick = Callable[[list[Trial]], None]


def check_here(sweep: Sweep, config: RunConfig) -> None:
    """Raises `UserError` if the data or the weights of the extractor are not on this machine.

    `config` is the base config. Data that varies is checked by the trials.
    """
    from bigan.evaluation import extractors
    from bigan.run.streams import check_data

    settings = config.evaluation
    extractors.create(settings.extractor, settings.weights_path, torch.device("cpu"))
    if not any(key.partition(".")[0] in ("data", "model") for key in sweep.parameters):
        check_data(config)


def run_sweep(folder: SweepFolder, jobs: int, echo: Echo, tick: Tick) -> int:
    """Run every trial that has not ended, `jobs` at a time; call it in the main thread.

    `echo` prints a line; `tick` receives the records of the trials that have begun. Returns 0, 1 if
    no trial is complete, or 128 + the number of the signal that stopped the sweep; SIGTERM if it
    was the file STOP in its folder. Raises `UserError` if another process or jobs of SLURM run the
    sweep: its trials would fail here.
    """
    with contextlib.suppress(SlurmError):  # not on this machine
        if jobs_of_slurm := live_jobs(folder.path):
            raise UserError(
                f"{folder.path}: job {', '.join(jobs_of_slurm)} runs this sweep; wait for its end, "
                f"or end it: bigan cancel {shlex.quote(str(folder.path))}"
            )
    with writing(folder.path):
        lock = RunLock(folder.path)
    try:
        folder.stop.unlink(missing_ok=True)
        return _run_trials(folder, jobs, echo, tick)
    finally:
        lock.release()


def _run_trials(folder: SweepFolder, jobs: int, echo: Echo, tick: Tick) -> int:
    sweep = folder.sweep()
    waiting = _unfinished(folder, sweep)
    running: dict[int, LocalTrial] = {}  # by place
    with _Stop() as stop:
        tick(folder.read_all())
        while running or (waiting and not stop.number):
            changed = False
            if folder.stop.exists():
                stop.number = stop.number or signal.SIGTERM
            for place in range(jobs):
                if place not in running and waiting and not stop.number:
                    running[place] = LocalTrial(folder, sweep, waiting.pop(0), place, jobs, echo)
                    changed = True
            for place, trial in list(running.items()):
                if stop.number:
                    trial.stop(kill=stop.is_second)
                if trial.poll():
                    del running[place]
                    changed = True
            if changed:
                tick(folder.read_all())
            time.sleep(POLL_SECONDS)
        if stop.number:
            reason = "STOP" if folder.stop.exists() else f"signal {stop.number}"
            echo(f"stopped by {reason}; the same command continues")
            return 128 + stop.number
    if note := _published(folder):
        echo(note)
    complete = [t for t in folder.read_all() if t.state == "complete"]
    return 0 if complete else 1


class LocalTrial:
    """The processes of one trial; `poll` until it returns True."""

    def __init__(
        self, folder: SweepFolder, sweep: Sweep, index: int, place: int, jobs: int, echo: Echo
    ) -> None:
        self._folder, self._sweep, self._index, self._echo = folder, sweep, index, echo
        self._name = folder.name(index)
        self._trial = trials.begin(folder, index)
        self._run = folder.run(index)
        self._attempt = _new_attempt(folder.logs, f"local-{self._name}")
        self._environment = _environment(place, jobs) | {"BIGAN_LOG_DIR": str(self._attempt)}
        self._stopped = False
        self._observed = 0.0
        self._trainer: subprocess.Popen[bytes] | None = None
        self._evaluator: subprocess.Popen[bytes] | None = None
        if self._trial.state == "running":
            echo(f"trial {self._name}: {shown(self._trial.parameters)}")
            self._trainer = self._start("train", str(folder.trial_config(index)))
            if sweep.evaluates == "during":
                self._evaluator = self._start("evaluate", str(self._run.path), "--watch")

    def poll(self) -> bool:
        """Start and end processes as they are due; True once the trial has ended or stopped."""
        if self._trainer is not None:
            if self._sweep.prunes and time.monotonic() - self._observed > trials.WATCH_SECONDS:
                self._observed = time.monotonic()
                with contextlib.suppress(OSError, ValueError):  # of a shared file system
                    trials.observe(self._folder, self._index)
            if self._trainer.poll() is None:
                return False
            if self._stopped or not self._run.done.exists():  # nothing is left to evaluate
                self._end_evaluator()
            elif self._evaluator is None:
                self._evaluator = self._start("evaluate", str(self._run.path))
        if self._evaluator is not None and self._evaluator.poll() is None:
            return False
        return self._end()

    def stop(self, kill: bool) -> None:
        """Let the trainer save and end; the evaluator has nothing to save."""
        if self._stopped and not kill:
            return
        self._stopped = True
        if self._trainer is not None and self._trainer.poll() is None:
            self._trainer.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
        self._end_evaluator()

    def _end(self) -> bool:
        if self._stopped:
            return True
        codes = [
            f"{name} ended with exit code {process.returncode}"
            for name, process in (("train", self._trainer), ("evaluate", self._evaluator))
            if process is not None and process.returncode
        ]
        problem = "; ".join([*codes, _last_line(self._log)]) if codes else ""
        trial = trials.end(self._folder, self._index, self._attempt, problem)
        if trial.state == "running":
            self._echo(f"trial {self._name}: stopped; the same command continues it")
        else:
            self._echo(f"trial {self._name}: {trials.described(trial, self._sweep)}")
        return True

    @property
    def _log(self) -> Path:
        return self._folder.logs / f"local-{self._name}.log"

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [*COMMAND, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,  # Ctrl-C reaches this process only
                preexec_fn=functools.partial(_end_with_parent, os.getpid()),
            )

    def _end_evaluator(self) -> None:
        if self._evaluator is not None and self._evaluator.poll() is None:
            self._evaluator.kill()  # its records are atomic
            self._evaluator.wait()


class _Stop:
    """The first of `SIGNALS`, and whether there was a second one; restores the handlers."""

    def __init__(self) -> None:
        self.number = 0
        self.is_second = False

    def __enter__(self) -> _Stop:
        self._former = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: types.FrameType | None) -> None:
        self.is_second = bool(self.number)
        self.number = self.number or number


def _unfinished(folder: SweepFolder, sweep: Sweep) -> list[int]:
    """Indices of the trials without a result; those that have begun come first."""
    begun = {trial.index: trial.state for trial in folder.read_all()}
    todo = [i for i in range(sweep.num_trials) if begun.get(i, "running") == "running"]
    return sorted(todo, key=lambda index: (index not in begun, index))


def _new_attempt(logs: Path, job: str) -> Path:
    """A new folder for the logs and failure files of an attempt: local-003-0, local-003-1, ..."""
    number = 0
    while (folder := logs / f"{job}-{number}").exists():
        number += 1
    folder.mkdir(parents=True)
    return folder


def _environment(place: int, jobs: int) -> dict[str, str]:
    """Of the processes of a place: its GPU, and its share of the CPU cores."""
    environment = dict(os.environ)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (cores or 1) // jobs)))
    if gpus := _gpus(environment):
        environment["CUDA_VISIBLE_DEVICES"] = gpus[place % len(gpus)]
    return environment


def _gpus(environment: Mapping[str, str]) -> list[str]:
    """The names of the GPUs that this process may use."""
    given = environment.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name]
    return [str(number) for number in range(torch.cuda.device_count())]


def _end_with_parent(parent: int) -> None:
    """In a child process: SIGTERM when the parent is killed, so that no trial is left alone."""
    if sys.platform == "linux":
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it has ended before
            os._exit(1)


def _last_line(path: Path) -> str:
    """The last line of a log that is not empty."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _published(folder: SweepFolder) -> str:
    """`publish`, for at most `DELIVERY_SECONDS`: MLflow may not answer."""
    notes: list[str] = []
    thread = threading.Thread(target=lambda: notes.append(publish(folder)), daemon=True)
    thread.start()
    thread.join(DELIVERY_SECONDS)
    return notes[0] if notes else f"MLflow: no answer within {DELIVERY_SECONDS:g} s"
