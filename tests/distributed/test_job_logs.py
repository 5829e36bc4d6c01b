"""Files that a process writes for the script of its batch job: failures, and one log per rank."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from commands import python

from bigan.cli.main import main
from bigan.config import ConfigError
from bigan.data import DataError, OutageError
from bigan.distributed.job_logs import failures_written
from bigan.errors import JoinError, LostError, NonFiniteError, RunError, UserError
from bigan.run.lock import LockedError, TakenOverError


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for the files of a job, which does not exist yet."""
    monkeypatch.setenv("BIGAN_LOG_DIR", str(tmp_path / "logs" / "7-0"))
    for name in ("RANK", "SLURM_PROCID", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "logs" / "7-0"


def caused(error: Exception, cause: Exception) -> Exception:
    """`error`, raised while `cause` is handled, as by `raise error from None`."""
    error.__context__ = cause
    error.__suppress_context__ = True
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (UserError("a: b"), "input"),
        (ConfigError("a: b"), "input"),
        (LockedError("a: b"), "input"),
        (DataError("a: b"), "input"),
        (OSError(errno.ENOSPC, "No space left on device"), "input"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a"), "input"),
        (RunError("a: b"), "run"),
        (NonFiniteError("a: b"), "run"),
        (LostError("a: b"), "lost"),
        (JoinError("a: b"), "lost"),
        (OutageError("a: b"), "lost"),
        (caused(ConfigError("a: b"), OutageError("c")), "lost"),
        (OSError(errno.ESTALE, "Stale file handle", "a"), "lost"),
        (caused(DataError("a: b"), OSError(errno.EIO, "I/O error")), "lost"),
        (caused(DataError("a: b"), OSError(errno.ENOENT, "No such file")), "input"),
        (TakenOverError("a: b"), "taken_over"),
        (ValueError("a: b"), "bug"),
        (OSError("a: b"), "bug"),
    ],
)
def test_a_failure_has_a_kind(logs: Path, error: Exception, kind: str) -> None:
    with pytest.raises(type(error)), failures_written():
        raise error
    (path,) = logs.iterdir()
    lines = path.read_text().splitlines()
    assert lines[0] == kind
    assert str(error) in lines[1]
    assert (len(lines) > 2) == (kind == "bug")


def test_a_collective_that_fails_is_a_lost_rank(
    logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(RuntimeError), failures_written():
        raise RuntimeError("gloo: Connection closed by peer [127.0.0.1]:4242")
    (path,) = logs.iterdir()
    assert path.read_text().startswith("lost\n")
    assert path.name.endswith("-rank-1.txt")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(0), BrokenPipeError()])
def test_a_stop_is_no_failure(logs: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), failures_written():
        raise error
    assert not logs.exists()


def test_a_command_writes_its_failure_without_secrets(
    logs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = "https://user:secret@example.com/a.yaml"
    assert main(["train", config]) == 2
    printed = capsys.readouterr().err.strip().removeprefix("bigan: ")
    (path,) = logs.glob("failure-*-rank-0.txt")
    assert path.read_text() == f"input\n{printed}\n"
    assert "secret" not in printed
    path.unlink()
    with pytest.raises(SystemExit):
        main(["evaluate", str(tmp_path), "--unknown"])
    (path,) = logs.glob("failure-*-rank-0.txt")
    assert path.read_text().startswith("input\n")
    assert "--unknown" in path.read_text()


def test_a_folder_that_cannot_be_written_hides_no_error(
    logs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.parent.write_text("a file")
    assert main(["train", "missing.yaml"]) == 2
    assert "missing.yaml" in capsys.readouterr().err


RUN = """
import os, sys
from bigan.__main__ import run
import bigan.cli.main
def main():
    print("printed")
    os.write(1, b"library\\n")  # as a C++ library does
    os.system("echo child >&2")
    print("error", file=sys.stderr)
    os._exit(3)  # without a flush
bigan.cli.main.main = main
run()
"""


def started(logs: Path, *arguments: str, **variables: str) -> tuple[str, str]:
    """(stdout, stderr) of a command whose `main` prints and exits."""
    process = python(RUN, *arguments, BIGAN_LOG_DIR=str(logs), **variables)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 3, err
    return out, err


def test_each_rank_has_a_log(tmp_path: Path) -> None:
    """Of train and evaluate; a later process appends."""
    logs, lines = tmp_path / "logs" / "7-0", ["printed", "library", "child", "error"]
    assert started(logs, "train", "a.yaml") == ("", "")
    assert started(logs, "train", "a.yaml", RANK="0", SLURM_PROCID="5") == ("", "")
    assert started(logs, "evaluate", "run", SLURM_PROCID="1") == ("", "")
    assert {path.name: path.read_text().splitlines() for path in logs.iterdir()} == {
        "rank-0.log": lines * 2,
        "rank-1.log": lines,
    }
    assert "library" in started(logs, "describe", "a.yaml")[0]
    assert len(list(logs.iterdir())) == 2


def test_output_stays_where_the_log_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    out, err = started(tmp_path / "file" / "7-0", "train", "a.yaml")
    assert "library" in out
    first, *rest = err.splitlines()
    assert str(tmp_path / "file" / "7-0" / "rank-0.log") in first
    assert rest == ["child", "error"]
