"""The jobs of one `bigan submit`: their options, scripts and commands. Nothing is written here.

A job's options are `#SBATCH` lines of its script, which is therefore complete, and are repeated on
the command line of sbatch, because the variables `SBATCH_...` of the user's environment override
the lines of a script. Paths are on the command line only.
"""

from __future__ import annotations

import re
import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from bigan.cluster import words
from bigan.cluster.profiles import Profile
from bigan.cluster.render import Trusted, render
from bigan.config import ConfigError
from bigan.run_folder import RunFolder

SIGNAL_SECONDS = 180  # a save, and the minute by which SLURM may signal earlier
Kind = Literal["train", "evaluate", "sweep"]
Wait = Literal["start", "success"]
# Of the containers: the option for the working folder, by which relative paths are resolved.
_WORKING = {"pyxis": "--container-workdir", "apptainer": "--pwd"}


@dataclass(frozen=True)
class Request:
    """What the user asked for; numbers of GPUs, CPUs and processes are per node."""

    config: Path
    overrides: tuple[str, ...] = ()
    nodes: int = 1
    gpus: int = 0
    time: str | None = None
    cpus: int | None = None
    memory: str | None = None
    processes: int | None = None
    name: str | None = None
    evaluate: Literal["during", "after"] | None = None
    evaluate_nodes: int | None = None
    evaluate_gpus: int | None = None
    evaluate_time: str | None = None
    chain: int | None = None
    sweep: Path | None = None
    parallel: int | None = None

    @property
    def processes_per_node(self) -> int:
        return self.processes or self.gpus or 1

    @property
    def world_size(self) -> int:
        return self.nodes * self.processes_per_node


@dataclass(frozen=True)
class Places:
    """Absolute paths of a submission."""

    run_dir: Path
    folder: Path  # <run_dir>/slurm/001: scripts and config
    code: Path  # <run_dir>/slurm/code/<hash>
    working: Path  # where `bigan submit` was called; relative paths of the config begin there

    def config(self) -> Path:
        return self.folder / "config.yaml"

    def launch_file(self) -> Path:
        return self.folder / "accelerate.yaml"


@dataclass(frozen=True)
class Job:
    """One call of sbatch."""

    kind: Kind
    script: str  # its name in `Places.folder`
    nodes: int
    gpus: int
    processes: int
    options: tuple[str, ...]
    chain: dict[str, str] = field(default_factory=dict)
    link: int = 1
    links: int = 1
    waits_for: Wait | None = None  # of an evaluator: of training

    def rendered(self, places: Places, profile: Profile, before: Sequence[str]) -> str:
        """The script; `before` are the ids of the jobs submitted earlier."""
        variables = {
            "BIGAN_RUN_DIR": places.run_dir,
            "BIGAN_LAUNCHER": profile.launcher,
            "BIGAN_PROCESSES": self.processes,
            "BIGAN_PYTHON": _python(profile),
            "BIGAN_LAUNCH_FILE": places.launch_file(),
            "BIGAN_MAX_REQUEUES": profile.max_requeues,
        }
        if profile.container.kind != "none":
            variables["BIGAN_CONTAINER"] = profile.container.kind
            variables["BIGAN_IMAGE"] = profile.container.image or ""
            variables["BIGAN_MOUNTS"] = ",".join(_mounts(profile, places))
        variables |= self.chain
        if self.waits_for == "start":
            variables["BIGAN_TRAINING_JOB"] = ",".join(before)
        values = {
            "options": self.options,
            "environment": profile.environment,
            "setup": Trusted(profile.setup.strip()),
            "code": places.code,
            "variables": variables,
            "container_options": _container_options(profile, places),
            "config": places.config(),
            "run_dir": places.run_dir,
        }
        return render(f"{self.kind}.sbatch.j2", values)

    def arguments(self, places: Places) -> list[str]:
        """Options of sbatch, without those that depend on other jobs."""
        log = "%A_%a.log" if self.kind == "sweep" else "%j.log"
        logs = str(RunFolder(places.run_dir).job_logs).replace("%", "%%")
        return [*self.options, f"--output={logs}/{log}", f"--chdir={places.working}"]

    def command(self, places: Places, before: Sequence[str]) -> list[str]:
        """argv of sbatch."""
        dependency = []
        if self.waits_for == "start":  # of the first link of a chain
            dependency = [f"--dependency=after:{before[0]}"]
        elif self.waits_for == "success":  # of the last one; a job that can never start ends
            dependency = [f"--dependency=afterok:{before[-1]}", "--kill-on-invalid-dep=yes"]
        elif self.link > 1:
            dependency = [f"--dependency=afterany:{before[-1]}"]
        script = str(places.folder / self.script)
        return ["sbatch", "--parsable", *self.arguments(places), *dependency, script]

    def __str__(self) -> str:
        each = f"{self.gpus} GPU(s)" if self.gpus else f"{self.processes} process(es) on CPUs"
        of_chain = f", link {self.link} of {self.links}" if self.links > 1 else ""
        return f"{self.kind}: {self.nodes} node(s) of {each}{of_chain}"


def jobs_of(
    request: Request, profile: Profile, run_dir: Path, num_trials: int = 0
) -> tuple[Job, ...]:
    """The jobs of a request, in the order in which they are submitted."""
    name = request.name or job_name(run_dir)
    links = request.chain or 1
    size = (request.nodes, request.gpus, request.processes_per_node)
    cpus = training_cpus(request, profile)
    resources = _resources(profile, request.nodes, request.gpus, cpus, request.memory, request.time)
    common = _common(profile, request.time, requeue=request.chain is None)
    options = (f"--job-name={name}", *resources, *common)
    if request.sweep:
        limit = f"%{request.parallel}" if request.parallel else ""
        options = (*options, f"--array=0-{num_trials - 1}{limit}")
        return (Job("sweep", "sweep.sbatch", *size, options),)
    if request.chain is None:
        jobs = [Job("train", "train.sbatch", *size, options)]
    else:
        token = secrets.token_hex(8)
        jobs = [
            Job(
                "train",
                f"train-{link}.sbatch",
                *size,
                options,
                {
                    "BIGAN_CHAIN": token,
                    "BIGAN_CHAIN_LINK": str(link),
                    "BIGAN_CHAIN_LENGTH": str(links),
                },
                link,
                links,
            )
            for link in range(1, links + 1)
        ]
    return (*jobs, *_evaluator(request, profile, name))


def _evaluator(request: Request, profile: Profile, name: str) -> list[Job]:
    if not request.evaluate:
        return []
    nodes, gpus = request.evaluate_nodes or 1, evaluation_gpus(request)
    cpus, memory = request.cpus or _cpus_of(gpus, profile), request.memory
    if gpus and request.gpus:  # its share of what a training node has
        cpus = max(1, request.cpus * gpus // request.gpus) if request.cpus else cpus
        memory = memory and _share(memory, gpus, request.gpus)
    time = request.evaluate_time or request.time
    options = (
        f"--job-name={name}-evaluate",
        *_resources(profile, nodes, gpus, cpus, memory, time),
        *_common(profile, time, requeue=True),
    )
    wait: Wait = "start" if request.evaluate == "during" else "success"
    size = (nodes, gpus, gpus or 1)
    return [Job("evaluate", "evaluate.sbatch", *size, options, waits_for=wait)]


def training_cpus(request: Request, profile: Profile) -> int | None:
    """CPU cores per node that are requested for training; None: the default of the cluster."""
    if request.cpus or request.gpus:
        return request.cpus or _cpus_of(request.gpus, profile)
    return request.processes_per_node


def _cpus_of(gpus: int, profile: Profile) -> int | None:
    return gpus * profile.cpus_per_gpu if gpus and profile.cpus_per_gpu else None


def evaluation_gpus(request: Request) -> int:
    """GPUs per node of the evaluator."""
    if request.evaluate_gpus is not None:
        return request.evaluate_gpus
    return 1 if request.gpus else 0


def _share(memory: str, part: int, whole: int) -> str:
    number = int(memory.rstrip("KMGT"))
    return f"{max(1, number * part // whole)}{memory.lstrip('0123456789')}" if number else memory


def job_name(run_dir: Path) -> str:
    """The name of the run folder, as a name of a job."""
    text = re.sub(r"[^A-Za-z0-9_.-]+", "-", run_dir.name).strip("-.")[:60]
    return text or "bigan"


def _resources(
    profile: Profile,
    nodes: int,
    gpus: int,
    cpus: int | None,
    memory: str | None,
    time: str | None,
) -> list[str]:
    kind = f"{profile.gpu_type}:" if profile.gpu_type else ""
    prefix = "--gres=gpu:" if profile.gpus == "gres" else "--gpus-per-node="
    options = [f"--nodes={nodes}", "--ntasks-per-node=1"]
    options += [f"{prefix}{kind}{gpus}"] if gpus else []
    given = {"cpus-per-task": cpus, "mem": memory, "time": time}
    given |= {key: getattr(profile, key) for key in ("partition", "account", "qos", "constraint")}
    options += [f"--{key}={value}" for key, value in given.items() if value is not None]
    for key, value in profile.options.items():
        if value is not False:
            options.append(f"--{key}" if value is True else f"--{key}={value}")
    return options


def _common(profile: Profile, time: str | None, requeue: bool) -> list[str]:
    # A link of a chain is one allocation: however it ends, the next one continues. SLURM must not
    # restart it as well, for example after the loss of a node.
    return [
        f"--signal=B:USR1@{_signal_seconds(profile, time)}",
        "--requeue" if requeue else "--no-requeue",
        "--open-mode=append",
    ]


def _signal_seconds(profile: Profile, time: str | None) -> int:
    """How long before the time limit the run saves."""
    if profile.signal_seconds is not None:
        return profile.signal_seconds
    return SIGNAL_SECONDS if time is None else int(min(SIGNAL_SECONDS, words.seconds(time) / 2))


def _python(profile: Profile) -> str:
    own = bool(profile.setup.strip()) or profile.container.kind != "none"
    return profile.python or ("python" if own else sys.executable)


def _mounts(profile: Profile, places: Places) -> list[str]:
    mounts = list(profile.container.mounts)
    for path in (places.working, places.run_dir):
        if not any(_contains(mount, path) for mount in mounts):
            mounts.append(f"{path}:{path}")
    return mounts


def _contains(mount: str, path: Path) -> bool:
    """Whether a mount shows `path` under the same name."""
    source, target = mount.split(":")[:2]
    return Path(source) == Path(target) and path.is_relative_to(source)


def _container_options(profile: Profile, places: Places) -> list[str]:
    container = profile.container
    if container.kind == "none":
        return []
    name = _WORKING[container.kind]
    given = any(option.partition("=")[0] == name for option in container.options)
    return [*([] if given else [f"{name}={places.working}"]), *container.options]


def check_options(request: Request) -> None:
    """Raises `ConfigError` for options that do not fit together."""
    wrong = None
    options = ("evaluate_nodes", "evaluate_gpus", "evaluate_time")
    given = [name for name in options if getattr(request, name) is not None]
    if given and not request.evaluate:
        wrong = f"--{given[0].replace('_', '-')} belongs to --evaluate during|after"
    elif request.parallel and not request.sweep:
        wrong = "--parallel belongs to --sweep FILE"
    elif request.sweep and request.evaluate:
        wrong = "--sweep evaluates each trial itself; leave --evaluate out"
    elif request.sweep and request.chain:
        wrong = "--chain cannot be combined with --sweep, whose trials requeue themselves"
    elif request.gpus and request.processes_per_node > request.gpus:
        wrong = (
            f"--processes {request.processes} is more than the {request.gpus} GPU(s) of a node; "
            "use at most one process per GPU"
        )
    if wrong:
        raise ConfigError(f"command line: {wrong}")


def remarks(request: Request, profile: Profile) -> list[str]:
    """Lines about what the user may not expect."""
    if not request.gpus:
        return [
            f"no --gpus: trains on CPUs, {request.processes_per_node} process(es) on each of "
            f"{request.nodes} node(s)"
        ]
    if training_cpus(request, profile) is None:
        return [
            "no --cpus: each node has the cluster's default number of cores, often one for all "
            "processes; --cpus N sets it, or cpus_per_gpu in the profile"
        ]
    return []


def check_places(run_dir: Path, working: Path, profile: Profile) -> None:
    """Raises `ConfigError` for a path that SLURM, PYTHONPATH or a container cannot represent."""
    in_container = profile.container.kind != "none"
    for name, path, signs in (
        ("run_dir", run_dir, "\\:," if in_container else "\\:"),
        ("the working folder", working, ":," if in_container else ""),
    ):
        text = str(path)
        found = [sign for sign in signs if sign in text]
        if any(ord(sign) < 32 or ord(sign) == 127 for sign in text):
            found.append("a line break or another control character")
        if any(0xD800 <= ord(sign) < 0xE000 for sign in text):
            found.append("a byte that is not UTF-8")
        if found:
            raise ConfigError(
                f"{name} = {text!r}: contains {' and '.join(found)}, which a job of SLURM cannot "
                "use in this path; use another folder"
            )


def check_times(jobs_time: Sequence[tuple[str, str | None]], profile: Profile) -> None:
    """Raises `ConfigError` for a time limit (option, value) that is over before the signal."""
    for option, time in jobs_time:
        signal = profile.signal_seconds
        if time is not None and signal is not None and words.seconds(time) <= signal:
            raise ConfigError(
                f"command line: {option} {time}: must be longer than signal_seconds = {signal} of "
                "the profile, or the job stops as soon as it starts"
            )
