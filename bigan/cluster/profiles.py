"""The profile of a cluster: all that `bigan submit` has to know about one (slurm/profiles/).

A profile is the user's own file. `setup` is shell code that the batch shell executes; every other
value reaches a shell quoted.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from bigan import config as configs
from bigan.cluster import words
from bigan.config import Frozen, Positive

VARIABLE = "BIGAN_SLURM_PROFILE"  # file of the profile where --profile is not given

Launcher = Literal["accelerate", "srun"]
Name = Annotated[str, AfterValidator(words.name)]
# Options of sbatch with a key of their own, or that `bigan submit` determines.
_KEYS = {"partition", "account", "qos", "constraint", "cpus-per-gpu"}
_DETERMINED = {
    "array", "begin", "chdir", "cpus-per-task", "dependency", "error", "gpus", "gpus-per-node",
    "help", "input", "job-name", "kill-on-invalid-dep", "mem", "no-requeue", "nodes", "ntasks",
    "ntasks-per-node", "open-mode", "output", "parsable", "requeue", "signal", "test-only", "time",
    "wait", "wrap",
}  # fmt: skip


def _option_name(text: str) -> str:
    if text in _KEYS:
        raise ValueError(f"{text!r} has a key of its own, {text.replace('-', '_')}")
    if text in _DETERMINED:
        raise ValueError(f"{text!r} is set by bigan submit")
    if not re.fullmatch(r"[a-z][a-z0-9-]+", text):
        raise ValueError(f"{text!r} is not the long name of an option of sbatch, like exclusive")
    return text


def _option_value(value: str | int | bool) -> str | int | bool:
    return words.value(value) if isinstance(value, str) else value


def _variable_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", text):
        raise ValueError(f"{text!r} is not the name of an environment variable")
    return text


def _text(value: str | int | float) -> str | int | float:
    if isinstance(value, str) and "\0" in value:
        raise ValueError("has a character with code 0")
    return value


def _mount(text: str) -> str:
    if not re.fullmatch(r"/[^,\s:]*:/[^,\s:]*(:[a-z+]+)?", text):
        raise ValueError(f"{text!r} is not a mount like /data:/data or /data:/data:ro")
    return text


class Container(Frozen):
    """The container in which the processes run; the batch script itself runs outside of it."""

    # pyxis: the plugin of enroot (srun --container-image); apptainer: `apptainer exec`
    kind: Literal["none", "pyxis", "apptainer"] = "none"
    image: Annotated[str, AfterValidator(_text)] | None = None  # a .sqsh or .sif file, or a URL
    # Run folder and working folder are mounted as well, unless one of these contains them.
    mounts: tuple[Annotated[str, AfterValidator(_mount)], ...] = ()
    options: tuple[Annotated[str, AfterValidator(_text)], ...] = ()  # of srun, or apptainer exec

    @model_validator(mode="after")
    def _complete(self) -> Container:
        if (self.kind == "none") != (self.image is None):
            raise ValueError("kind and image belong together; set both, or neither")
        return self


class Profile(Frozen):
    """Options of `sbatch` and the environment of a job. The command line replaces its values."""

    partition: Name | None = None
    account: Name | None = None
    qos: Name | None = None
    constraint: Annotated[str, AfterValidator(words.constraint)] | None = None
    # How GPUs are requested: --gpus-per-node=8 or --gres=gpu:8.
    gpus: Literal["gpus-per-node", "gres"] = "gpus-per-node"
    gpu_type: Name | None = None  # --gpus-per-node=a100:8
    # CPU cores requested per GPU where --cpus is not given. None: that of the cluster, often one
    # core for all processes of a node.
    cpus_per_gpu: Positive | None = None
    # Further options of sbatch by their long names: {exclusive: true, mem-per-gpu: 100G}.
    options: dict[
        Annotated[str, AfterValidator(_option_name)],
        Annotated[str | int | bool, AfterValidator(_option_value)],
    ] = Field(default_factory=dict)
    setup: Annotated[str, AfterValidator(_text)] = ""  # lines of bash, executed on the first node
    environment: dict[
        Annotated[str, AfterValidator(_variable_name)],
        Annotated[str | int | float, AfterValidator(_text)],
    ] = Field(default_factory=dict)
    container: Container = Container()
    # accelerate: a launcher per node; srun: a task per process
    launcher: Launcher = "accelerate"
    # None: `python` after `setup` or in a container, else the one that executes `bigan submit`
    python: Annotated[str, AfterValidator(_text)] | None = None
    # The run saves this long before the time limit. SLURM may signal up to 60 s earlier. None: 180,
    # or half of a shorter limit.
    signal_seconds: Positive | None = None
    max_requeues: Annotated[int, Field(ge=0)] = 50

    @model_validator(mode="after")
    def _one_gres(self) -> Profile:
        if self.gpus == "gres" and "gres" in self.options:
            raise ValueError("options.gres replaces that of gpus = gres; use gpus-per-node")
        return self


def load_profile(path: Path | None) -> Profile:
    """The profile in a file; None: that of `BIGAN_SLURM_PROFILE`, or the defaults.

    Raises `ConfigError`: file, key, what is expected.
    """
    path = path or Path(os.environ.get(VARIABLE, "")).expanduser()
    return Profile() if path == Path() else configs.load(Profile, path)
