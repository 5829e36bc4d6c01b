"""Start bigan as users do: the command line and `accelerate launch`, in child processes."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent
SMOKE = ROOT / "configs" / "smoke" / "digits.yaml"
TEN_CLASSES = {str(digit): 1 for digit in range(10)}


def environment(threads: int = 1) -> dict[str, str]:
    """Of a child process: this checkout on the path, few threads, no variables of a launcher."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("ACCELERATE_", "SLURM_", "MLFLOW_"))
        and key not in {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    }
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}


def run_bigan(
    *arguments: str | Path, cwd: Path | None = None, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """`python -m bigan ARGUMENTS` in a child process."""
    return _run([sys.executable, "-m", "bigan", *map(str, arguments)], cwd, timeout)


def launch(
    *arguments: str | Path,
    cwd: Path | None = None,
    options: Sequence[str | Path] = (),
    command: str = "train",
    timeout: float = 180,
) -> subprocess.CompletedProcess[str]:
    """`accelerate launch OPTIONS -m bigan COMMAND ARGUMENTS` on a free port."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *map(str, options)]
    launcher += ["--main_process_port", str(free_port()), "-m", "bigan", command]
    return _run([*launcher, *map(str, arguments)], cwd, timeout)


def _run(command: list[str], cwd: Path | None, timeout: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=cwd or ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def python(code: str, *arguments: object, **variables: str) -> subprocess.Popen[str]:
    """A child process that runs `code` with `arguments`; `finish` waits for it."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment() | variables,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], text: str = "", timeout: float = 120) -> tuple[str, str]:
    """(stdout, stderr) of a child process that must succeed; `text` is sent to its stdin."""
    out, err = process.communicate(text, timeout=timeout)
    assert process.returncode == 0, err
    return out, err


def free_port() -> int:
    """A TCP port that is unused at the moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def script(name: str) -> ModuleType:
    """The module of a script in benchmarks/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module
