"""The commands of SLURM, called without a shell, and what they print."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from bigan.errors import UserError

TIMEOUT_SECONDS = 60.0  # a busy controller answers late


class SlurmError(UserError):
    """A command of SLURM that failed, is missing or does not answer."""


class SlurmTimeoutError(SlurmError):
    """A command of SLURM that does not answer."""


def run(
    *command: str | os.PathLike[str],
    timeout_seconds: float = TIMEOUT_SECONDS,
    environment: Mapping[str, str] | None = None,
) -> str:
    """stdout of a command; raises `SlurmError`, one line. environment: None for that of here."""
    return _finished([str(part) for part in command], timeout_seconds, env=environment).stdout


def sbatch(arguments: Sequence[str]) -> str:
    """Submit a job; returns its id. `arguments`: options and script.

    The job does not inherit the variables of a job in which this process runs: SLURM does not set
    all of them, and a job with the restart count or the array index of another one goes wrong.
    """
    command = ["sbatch", "--parsable", *arguments]
    try:
        answer = _finished(command, TIMEOUT_SECONDS, env=_outside_of_jobs(os.environ)).stdout
    except SlurmTimeoutError as error:
        raise SlurmTimeoutError(
            f"{error}, unless squeue --me shows the job: then cancel it before (scancel)"
        ) from None
    # A site may print messages around it; in a federation, the name of the cluster follows.
    found = re.findall(r"^(\d+)(?:;\S*)?$", answer, re.ASCII | re.MULTILINE) or re.findall(
        r"^Submitted batch job (\d+)", answer, re.ASCII | re.MULTILINE
    )
    if not found:
        raise SlurmError(f"sbatch: printed {answer.strip()!r}, not the id of a job")
    return str(found[-1])


def would_start(options: Sequence[str], script: str) -> str:
    """SLURM's answer to `sbatch --test-only`: when and where the job would start.

    `script` is the text of the script. Raises `SlurmError` if SLURM would refuse the job.
    """
    command = ["sbatch", "--test-only", *options]
    environment = _outside_of_jobs(os.environ)
    done = _finished(command, TIMEOUT_SECONDS, env=environment, input=script)
    return " ".join(f"{done.stdout} {done.stderr}".split()).removeprefix("sbatch: ")


_SETTINGS = {"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT"}


def _outside_of_jobs(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in environment.items()
        if name in _SETTINGS or not name.startswith(("SLURM_", "SRUN_"))
    }


def _finished(
    command: list[str], timeout_seconds: float, **options: Any
) -> subprocess.CompletedProcess[str]:
    name = command[0]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",  # messages of a site, names of jobs
            timeout=timeout_seconds,
            check=False,
            **options,
        )
    except FileNotFoundError:
        raise SlurmError(
            f"{name}: not found; run this command on a login node of a SLURM cluster"
        ) from None
    except subprocess.TimeoutExpired:
        raise SlurmTimeoutError(
            f"{name}: no answer within {timeout_seconds:g} s; try again"
        ) from None
    except OSError as error:
        raise SlurmError(f"{name}: cannot be run: {error.strerror}") from None
    if done.returncode != 0:
        said = " ".join(done.stderr.split()).removeprefix(f"{name}: ")
        raise SlurmError(f"{name}: {said or f'exit code {done.returncode}'}")
    return done
