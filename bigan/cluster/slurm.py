"""The commands of SLURM, called without a shell, and what they print."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence

from bigan.errors import UserError

TIMEOUT_SECONDS = 60.0  # a busy controller answers late


class SlurmError(UserError):
    """A command of SLURM that failed, is missing or does not answer."""


def is_available() -> bool:
    """Whether the commands of SLURM are installed here."""
    return shutil.which("sbatch") is not None


def run(*command: str | os.PathLike[str], timeout_seconds: float = TIMEOUT_SECONDS) -> str:
    """stdout of a command; raises `SlurmError`, one line."""
    name = str(command[0])
    try:
        done = subprocess.run(
            [str(part) for part in command],
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=False,
        )
    except FileNotFoundError:
        raise SlurmError(
            f"{name}: not found; run this command on a login node of a SLURM cluster"
        ) from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{name}: no answer within {timeout_seconds:g} s; try again") from None
    if done.returncode != 0:
        raise SlurmError(f"{name}: {' '.join(done.stderr.split()) or done.returncode}")
    return done.stdout


def sbatch(arguments: Sequence[str]) -> str:
    """Submit a job; returns its id. `arguments`: options and script."""
    return run("sbatch", "--parsable", *arguments).strip().partition(";")[0]
