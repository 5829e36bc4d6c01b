"""`bigan submit`: freeze code and config of a run, render its scripts, hand them to sbatch."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigan import atomic_files
from bigan.cluster import freeze, jobs, slurm
from bigan.cluster.facts import read_facts
from bigan.cluster.job_states import live_jobs
from bigan.cluster.plan import (
    Job,
    Places,
    Request,
    check_options,
    check_places,
    check_times,
    jobs_of,
    remarks,
)
from bigan.cluster.profiles import Profile
from bigan.cluster.render import source
from bigan.config import ConfigError
from bigan.distributed.launch_env import chosen_engine
from bigan.errors import UserError, writing
from bigan.file_lock import locked
from bigan.run import folder as folders
from bigan.run.stages import stages
from bigan.run_config import RunConfig, accumulation_steps, check_groups, load_config
from bigan.run_folder import RunFolder
from bigan.urls import is_remote

if TYPE_CHECKING:
    from bigan.cluster.sweep import Sweep

Echo = Callable[[str], None]


@dataclass(frozen=True)
class _Checked:
    """A request that has been validated."""

    request: Request
    profile: Profile
    frozen_config: str
    sweep: Sweep | None
    code: freeze.Code
    run_dir: Path  # as in the config
    jobs: tuple[Job, ...]
    is_complete: bool = False  # and nothing is left to train or to evaluate
    base: Mapping[str, Any] | None = None  # content of the base config of a sweep

    @property
    def absolute(self) -> Path:
        return self.run_dir.absolute()

    def places(self, folder: Path) -> Places:
        code = self.code.folder(RunFolder(self.absolute).slurm)
        return Places(self.absolute, folder, code, Path.cwd())


def submit(request: Request, profile: Profile, echo: Echo) -> list[str]:
    """Submit the jobs of a request; returns their ids.

    Raises `UserError` before anything is submitted if request, config, profile and run folder do
    not fit together, and `SlurmError` if SLURM refuses a job; jobs that were submitted before it
    are cancelled then.
    """
    checked = _check(request, profile, echo)
    if checked.is_complete:
        key = "method.trials" if checked.sweep else "train.total_images=..."
        echo(f"{checked.run_dir}: is complete; a larger {key} continues it")
        return []
    with _alone(checked):
        _refuse_second(checked)
        folder = _write(checked)
        ids = _submit(checked, checked.places(folder), echo)
    run = shlex.quote(str(checked.run_dir))
    echo(f"bigan status {run}    # queue, progress, last error")
    echo(f"bigan logs {run}      # output of the jobs")
    echo(f"bigan cancel {run}    # end them")
    if checked.sweep:
        echo(f"bigan sweep-report {run}    # results so far")
    return ids


def dry_run(request: Request, profile: Profile, echo: Echo) -> None:
    """Print scripts and commands; writes nothing and needs no SLURM."""
    checked = _check(request, profile, echo)
    places = checked.places(_next_folder(checked.absolute))
    names = [f"JOB_{number}" for number, _ in enumerate(checked.jobs, 1)]
    for number, job in enumerate(checked.jobs):
        echo(f"# {'-' * 20} {places.folder / job.script}")
        echo(job.rendered(places, profile, names[:number]))
    if len(names) > 1:
        echo(f"# Commands; {', '.join(names[:-1])}: the id that the command of this number prints")
    else:
        echo("# Command")
    for number, job in enumerate(checked.jobs):
        echo(shlex.join(job.command(places, names[:number])))


def test_only(request: Request, profile: Profile, echo: Echo) -> None:
    """Print when and where SLURM would start each job; writes nothing. Raises `SlurmError`."""
    checked = _check(request, profile, echo)
    places = checked.places(_next_folder(checked.absolute))
    names = ["1"] * len(checked.jobs)
    for job in checked.jobs:
        script = job.rendered(places, profile, names)
        echo(f"{job}: {slurm.would_start(job.arguments(places), script)}")


def _check(request: Request, profile: Profile, echo: Echo) -> _Checked:
    check_options(request)
    sweep, base = None, None
    if request.sweep:
        sweep, base, config = _load_sweep(request.sweep, request)
        request = dataclasses.replace(request, parallel=request.parallel or sweep.parallel)
    else:
        config = load_config(request.config, request.overrides)
    run_dir = config.run_dir.absolute()
    check_places(run_dir, Path.cwd(), profile)
    times = [("--time", request.time), ("--evaluate-time", request.evaluate_time)]
    check_times(times, profile)
    if not sweep:
        folders.check(config)
        _check_processes(request, config)
    for line in (*remarks(request, profile), *_missing_data(config)):
        echo(line)
    return _Checked(
        request,
        profile,
        freeze.frozen_config(config),
        sweep,
        freeze.current_code(),
        config.run_dir,
        jobs_of(request, profile, run_dir, sweep.num_trials if sweep else 0),
        not request.evaluate and _is_complete(config, sweep),
        base,
    )


def _load_sweep(path: Path, request: Request) -> tuple[Sweep, dict[str, Any], RunConfig]:
    """The sweep in a file, with the content and the config of its base."""
    from bigan.cluster.sweep import load_sweep
    from bigan.cluster.sweep_check import require_same, resolved
    from bigan.cluster.sweep_folder import SweepFolder

    check = functools.partial(_check_processes, request)
    sweep, base, config = resolved(load_sweep(path), request.config, request.overrides, check)
    require_same(SweepFolder(config.run_dir), sweep, base)
    return sweep, base, config


def _is_complete(config: RunConfig, sweep: Sweep | None) -> bool:
    """Whether the run has seen all images, or all trials have ended."""
    if sweep:
        from bigan.cluster.sweep_folder import SweepFolder

        ended = [t for t in SweepFolder(config.run_dir).read_all() if t.state != "running"]
        return len(ended) >= sweep.num_trials
    try:
        return int(RunFolder(config.run_dir).done.read_text()) >= config.train.total_images
    except (OSError, ValueError):
        return False


def _missing_data(config: RunConfig) -> list[str]:
    """A line for each data set that is not on this machine; the nodes may have it."""
    paths = {str(stream.path) for stream in config.streams.values()}
    local = [path for path in sorted(paths) if not is_remote(path) and "{" not in path]
    return [f"{p}: no data here; the nodes need it" for p in local if not Path(p).exists()]


def _check_processes(request: Request, config: RunConfig) -> None:
    size = request.world_size
    try:
        accumulation_steps(config.train, size)
        for stage in stages(config):
            check_groups(stage.config, size)
        chosen_engine(config.engine, {}, size)
    except UserError as error:
        raise ConfigError(
            f"{request.nodes} node(s) of {request.processes_per_node} process(es): {error}"
        ) from None


@contextlib.contextmanager
def _alone(checked: _Checked) -> Iterator[None]:
    """Let other calls of `bigan submit` for this run wait."""
    folder = RunFolder(checked.absolute).slurm
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        with locked(descriptor):
            yield
    finally:
        os.close(descriptor)


def _refuse_second(checked: _Checked) -> None:
    """Raises `UserError` if something trains the run, or waits for it."""
    live = live_jobs(checked.absolute, slurm.TIMEOUT_SECONDS)
    facts = read_facts(checked.absolute)
    if live:
        what = f"job {', '.join(live)} of this run is in the queue"
    elif facts.lives and facts.job is None:
        what = f"{facts.owner} trains this run"
    else:
        return
    raise UserError(
        f"{checked.run_dir}: {what}; wait for its end, or end it: "
        f"bigan cancel {shlex.quote(str(checked.run_dir))}"
    )


def _next_folder(run_dir: Path) -> Path:
    """`<run_dir>/slurm/<n>` after the existing numbers."""
    slurm_folder = RunFolder(run_dir).slurm
    found = [int(path.name) for path in slurm_folder.glob("[0-9]*") if path.name.isdecimal()]
    return slurm_folder / f"{max(found, default=0) + 1:03d}"


def _write(checked: _Checked) -> Path:
    """Write the files of a submission but its scripts; returns its folder."""
    run = RunFolder(checked.absolute)
    if checked.sweep and checked.base is not None:
        from bigan.cluster.sweep_check import store
        from bigan.cluster.sweep_folder import SweepFolder

        store(SweepFolder(run.path), checked.sweep, checked.base)
    with writing(run.slurm):
        run.job_logs.mkdir(parents=True, exist_ok=True)  # or SLURM discards the output
        freeze.freeze_code(checked.code, run.slurm)
        while True:
            folder = _next_folder(checked.absolute)
            try:
                folder.mkdir()
                break
            except FileExistsError:  # of another `bigan submit`
                continue
        places = checked.places(folder)
        atomic_files.write_atomic(places.config(), checked.frozen_config)
        atomic_files.write_atomic(places.launch_file(), source("accelerate.yaml"))
    return folder


def _submit(checked: _Checked, places: Places, echo: Echo) -> list[str]:
    """Submit the jobs, all of them or none."""
    ids: list[str] = []
    try:
        for job in checked.jobs:
            script = places.folder / job.script
            with writing(script):
                text = job.rendered(places, checked.profile, ids)
                atomic_files.write_atomic(script, text)
            command = job.command(places, ids)
            ids.append(slurm.sbatch(command[2:]))
            with writing(RunFolder(places.run_dir).jobs):
                jobs.append(places.run_dir, _record(job, ids[-1], command, checked.code, places))
            echo(f"job {ids[-1]} submitted: {job}")
    except BaseException:
        _undo(ids, places.folder, echo)
        raise
    return ids


def _undo(ids: Sequence[str], folder: Path, echo: Echo) -> None:
    if not ids:
        shutil.rmtree(folder, ignore_errors=True)
        return
    try:
        slurm.run("scancel", *ids)
        echo(f"cancelled: {', '.join(ids)}, because a later job could not be submitted")
    except slurm.SlurmError as error:
        echo(f"{error}; these jobs are still in the queue, cancel them: scancel {' '.join(ids)}")


def _record(
    job: Job, number: str, command: list[str], code: freeze.Code, places: Places
) -> dict[str, Any]:
    """A line of jobs.jsonl."""
    return {
        "job": number,
        "kind": job.kind,
        "link": job.link,
        "links": job.links,
        "script": str((places.folder / job.script).relative_to(places.run_dir)),
        "command": command,
        "submitted": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "nodes": job.nodes,
        "gpus": job.gpus,
        "code": code.as_dict(),
    }
