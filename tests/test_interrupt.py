"""Ctrl-C while a command starts: one line and exit code 130, never a traceback."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import SMOKE, environment

SCRIPT = "import sys; from bigan.__main__ import run; sys.exit(run())"  # as the installed script


def is_mapped(pid: int, library: str) -> bool:
    """Whether a process has loaded a library."""
    try:
        return library in Path(f"/proc/{pid}/maps").read_text()
    except OSError:  # has ended
        return False


def interrupted(
    entry: list[str], arguments: list[str], ready: Callable[[int], bool]
) -> tuple[int, list[str]]:
    """(exit code, stderr) after SIGINT as soon as `ready(pid)` is true."""
    process = subprocess.Popen(
        [sys.executable, *entry, *arguments],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts background jobs with SIGINT ignored, and so would be this process.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        until = time.monotonic() + 60
        while process.poll() is None and not ready(process.pid):
            assert time.monotonic() < until
            time.sleep(0.002)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, errors.splitlines()


@pytest.mark.parametrize(
    ("command", "loaded"),
    [
        ("train", "pydantic_core"),
        pytest.param("train", "_multiarray_umath", marks=pytest.mark.full),
        ("train", "libtorch_cpu"),
        ("evaluate", "libtorch_cpu"),
        ("describe", "pydantic_core"),
        pytest.param("pack", "_multiarray_umath", marks=pytest.mark.full),
        pytest.param("bench", "libtorch_cpu", marks=pytest.mark.full),
    ],
)
def test_ctrl_c_during_imports(command: str, loaded: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = {
        "train": [str(SMOKE), f"run_dir={run}"],
        "evaluate": [str(run)],
        "describe": [str(SMOKE)],
        "pack": ["digits", str(run)],
        "bench": ["step", str(SMOKE)],
    }[command]
    entry = ["-c", SCRIPT] if command == "evaluate" else ["-m", "bigan"]
    code, lines = interrupted(entry, [command, *arguments], lambda pid: is_mapped(pid, loaded))
    assert code == 130, lines
    assert len(lines) == 1, lines
    assert lines[0].startswith("bigan: ")
    assert not run.exists()


def test_ctrl_c_before_the_first_step_leaves_nothing(digits: Path, tmp_path: Path) -> None:
    """After the imports, while the networks are built and warmed up."""
    run = tmp_path / "run"
    arguments = ["train", str(SMOKE), f"data.path={digits}", f"run_dir={run}"]
    code, lines = interrupted(["-m", "bigan"], arguments, lambda _: (run / "LOCK").exists())
    assert code == 130, lines
    assert len(lines) == 1, lines
    assert lines[0].startswith("bigan: signal 2: ")
    # At most a lock, whose owner has ended: if it was still being taken.
    assert not run.exists() or [path.name for path in run.iterdir()] == ["LOCK"]


def test_the_command_line_imports_nothing_heavy() -> None:
    code = "import bigan.cli.main, sys; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment()).returncode == 0


def test_little_is_imported_before_ctrl_c_is_handled() -> None:
    """`python -m bigan` imports the package first."""
    script = "import sys; old = set(sys.modules); import bigan; print(*set(sys.modules) - old)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert not {"importlib.metadata", "email", "pydantic", "yaml"} & set(done.stdout.split())
