"""One trainer at a time in a run folder: refusals, dead owners, other machines, takeovers."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from commands import ROOT, SMOKE, environment, free_port, run_bigan

from bigan import checkpoint
from bigan.cli.main import main
from bigan.errors import RunError
from bigan.reporting.metrics_log import read_metrics
from bigan.run import lock as lock_module
from bigan.run.lock import STALE_SECONDS, LockedError, Owner, RunLock
from bigan.run.trainer import train
from bigan.run_config import RunConfig

MakeConfig = Callable[..., RunConfig]
HOLD = """
import os, sys, time
from pathlib import Path
from bigan.run.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
if sys.argv[2:] == ["child"] and os.fork() == 0:
    os.close(1)  # or the pipe stays open
    time.sleep(300)
print(os.getpid(), flush=True)
time.sleep(300)
"""


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a process that holds the lock of `tmp_path/run`; returns once it does."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path / "run"), *arguments],
            env=environment(),
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline().strip() == str(process.pid)
        return process

    yield start
    for process in started:
        os.killpg(process.pid, signal.SIGKILL)  # also a child that survived it
        process.communicate()


def elsewhere(**changes: object) -> Owner:
    """The process of another machine."""
    other = replace(Owner.this_process(), host="node7", pid=11, scope="other", boot="other")
    return replace(other, **changes)  # type: ignore[arg-type]


def chain(token: str, link: str) -> dict[str, str]:
    """The variables of a link of a chain of jobs."""
    return {"BIGAN_CHAIN": token, "BIGAN_CHAIN_LINK": link}


def write_lock(run: Path, owner: Owner, silent_seconds: float = 0.0) -> Path:
    run.mkdir(exist_ok=True)
    path = run / "LOCK"
    path.write_text(json.dumps(asdict(owner)))
    beat = time.time() - silent_seconds
    os.utime(path, (beat, beat))
    return path


def test_a_living_owner_is_named_and_a_killed_one_is_replaced_at_once(
    hold: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """Also if a child that it forked still has the lock; two killed owners leave nothing."""
    for arguments in ((), ("child",)):
        process = hold(*arguments)
        with pytest.raises(LockedError) as refused:
            RunLock(tmp_path / "run")
        assert f"host {socket.gethostname()}, pid {process.pid} (since 2" in str(refused.value)
        process.kill()  # and is not reaped: it stays a zombie
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        lock = RunLock(tmp_path / "run")
        assert json.loads((tmp_path / "run" / "LOCK").read_text())["pid"] == os.getpid()
        lock.release()
        assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    ("silent_seconds", "variables", "owner", "free"),
    [
        (0, {}, {}, False),
        (STALE_SECONDS - 60, {}, {}, False),
        (STALE_SECONDS + 1, {}, {}, True),
        # A later attempt of the same job or elastic launch; not an earlier one, not another job.
        (0, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, {"SLURM job 7": 0}, True),
        (0, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, {"SLURM job 7": 2}, False),
        (0, {"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "1"}, {"SLURM job 7": 0}, False),
        # A later link of the same chain of jobs; not an earlier one, not another chain.
        (0, {"SLURM_JOB_ID": "8", **chain("c", "2")}, {"SLURM job 7": 3, "SLURM chain c": 1}, True),
        (
            0,
            {"SLURM_JOB_ID": "8", **chain("c", "2")},
            {"SLURM job 9": 0, "SLURM chain c": 3},
            False,
        ),
        (
            0,
            {"SLURM_JOB_ID": "8", **chain("c", "2")},
            {"SLURM job 7": 0, "SLURM chain d": 1},
            False,
        ),
        (
            0,
            {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "2"},
            {"launch x": 1},
            True,
        ),
        # "none" is the id of every launch with static rendezvous.
        (0, {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "2"}, {}, False),
    ],
)
def test_the_owner_on_another_machine_is_judged_by_its_heartbeat(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    silent_seconds: float,
    variables: dict[str, str],
    owner: dict[str, int],
    free: bool,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(lock_module, "BEAT_SECONDS", 0.1)  # of an elastic launch, three are awaited
    path = write_lock(tmp_path / "run", elsewhere(attempts=owner), silent_seconds)
    content = path.read_text()
    if free:
        lock = RunLock(tmp_path / "run")
        assert lock.taken_by() is None
        assert any("node7" in line for line in lock.remarks())
        lock.release()
        assert not path.exists()
        return
    with pytest.raises(LockedError) as refused:
        RunLock(tmp_path / "run")
    found = re.search(r"host node7, pid 11 .* starts in (\d+) s", str(refused.value))
    assert found, refused.value
    assert int(found[1]) == pytest.approx(STALE_SECONDS - silent_seconds, abs=30)
    assert str(path) in str(refused.value)
    assert path.read_text() == content
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["LOCK"]


def test_a_requeued_job_takes_over_from_a_task_that_survived_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon of the node had died; the task has lost its lock and stops writing."""
    for name in ("SLURM_RESTART_COUNT", "BIGAN_CHAIN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    lost = RunLock(tmp_path / "run")
    with pytest.raises(LockedError, match=f"pid {os.getpid()} "):
        RunLock(tmp_path / "run")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    lock = RunLock(tmp_path / "run")
    assert lost.taken_by() is not None
    assert any(f"pid {os.getpid()} " in line for line in lock.remarks())
    lost.release()
    assert lock.taken_by() is None
    assert (tmp_path / "run" / "LOCK").exists()
    lock.release()


@pytest.mark.parametrize("text", ["x", "", "-1", "1.5"])
def test_a_number_of_restarts_that_is_none_counts_as_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    variables = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": text}
    variables |= {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": text}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert Owner.this_process().attempts == {"SLURM job 7": 0, "launch x": 0}


@pytest.mark.parametrize("beats", [True, False])
def test_the_same_attempt_on_another_machine_is_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beats: bool
) -> None:
    """An elastic launch that lost a machine restarts without counting it."""
    monkeypatch.setattr("bigan.run.lock.BEAT_SECONDS", 0.2)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    path = write_lock(tmp_path / "run", elsewhere(attempts={"launch x": 0}))
    beat = threading.Timer(0.2, os.utime, [path])
    if not beats:
        lock = RunLock(tmp_path / "run")
        assert lock.remarks()
        lock.release()
        return
    beat.start()
    with pytest.raises(LockedError, match="node7"):
        RunLock(tmp_path / "run")
    beat.join()


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", '{"pid": 1}', "[]", "3"),
        *(
            json.dumps(asdict(Owner.this_process()) | wrong)
            for wrong in (
                *({"attempts": None}, {"attempts": {"launch x": "1"}}, {"attempts": []}),
                *({"pid": "7"}, {"born": None}, {"host": 3}),
            )
        ),
    ],
)
def test_a_lock_without_an_owner_is_taken(tmp_path: Path, content: str) -> None:
    """A process that was killed while it wrote its lock."""
    (tmp_path / "LOCK").write_text(content)
    lock = RunLock(tmp_path)
    assert lock.remarks() == []
    lock.release()


def test_the_heartbeat_is_refreshed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after the run folder was moved."""
    monkeypatch.setattr("bigan.run.lock.BEAT_SECONDS", 0.05)
    lock = RunLock(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    path = tmp_path / "moved" / "LOCK"
    os.utime(path, (0, 0))
    until = time.monotonic() + 30
    while path.stat().st_mtime == 0:
        assert time.monotonic() < until
        time.sleep(0.02)
    lock.release()


@pytest.mark.parametrize("flock", [True, False])
def test_without_flock_the_process_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flock: bool
) -> None:
    """On a file system without locks: by the number and the start of the owner's process."""
    if not flock:
        monkeypatch.setattr("bigan.run.lock.try_lock", lambda _: None)
    lock = RunLock(tmp_path / "run")
    with pytest.raises(LockedError, match=f"pid {os.getpid()} "):
        RunLock(tmp_path / "run")
    lock.release()
    write_lock(tmp_path / "run", replace(Owner.this_process(), born="1"))  # a reused number
    lock = RunLock(tmp_path / "run")
    lock.release()


def test_a_second_start_writes_nothing(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a new run and of one that has a checkpoint."""
    config = make_config("train.total_images=200")
    command = ["train", str(SMOKE), f"data.path={config.streams['images'].path}"]
    command += [f"run_dir={config.run_dir}"]

    def content() -> dict[str, float]:
        found = config.run_dir.rglob("*")
        return {str(p): p.stat().st_mtime for p in found if p.is_file()}

    for _ in range(2):
        lock = RunLock(config.run_dir)
        before = content()
        assert main(command) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert f"host {socket.gethostname()}, pid {os.getpid()} " in line
        assert content() == before
        lock.release()
        assert train(config, print, lambda *_: None) == 0
        assert not (config.run_dir / "LOCK").exists()


def test_a_stale_lock_of_another_machine_is_taken_over_by_a_run(make_config: MakeConfig) -> None:
    """And the run is refused as long as it is fresh."""
    config = make_config("train.total_images=80", "train.snapshot_images=80")
    write_lock(config.run_dir, elsewhere())
    with pytest.raises(LockedError, match="node7"):
        train(config, print, lambda *_: None)
    write_lock(config.run_dir, elsewhere(), STALE_SECONDS + 1)
    lines: list[str] = []
    assert train(config, lines.append, lambda *_: None) == 0
    assert [line for line in lines if "node7" in line]
    assert not (config.run_dir / "LOCK").exists()


def test_unusable_input_leaves_no_lock(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(f"run_dir={tmp_path / 'new' / 'run'}", "data.path=/nowhere")
    assert main(["train", str(SMOKE), "data.path=/nowhere", f"run_dir={config.run_dir}"]) == 2
    assert not (tmp_path / "new").exists()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").touch()
    assert main(["train", str(SMOKE), f"run_dir={tmp_path / 'photos'}"]) == 2
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["a.png"]


@pytest.mark.parametrize("at", [200, pytest.param(360, marks=pytest.mark.full)])
def test_a_trainer_whose_lock_was_taken_stops_writing(make_config: MakeConfig, at: int) -> None:
    """At the next tick: no metrics, no snapshot, no checkpoint; the status stays the other's."""
    config = make_config(
        "train.tick_images=40", "train.checkpoint_images=80", "train.snapshot_images=80"
    )
    path = config.run_dir / "LOCK"

    def on_tick(images_seen: int, _: object) -> None:
        if images_seen == at:
            path.unlink()
            write_lock(config.run_dir, elsewhere())

    with pytest.raises(RunError, match=f"node7, pid 11 .*images_seen = {at + 40} "):
        train(config, print, on_tick)
    assert read_metrics(config.run_dir)[-1]["images_seen"] == at
    newest = checkpoint.latest(config.run_dir)
    assert newest is not None
    assert int(newest.name) < at
    assert not (config.run_dir / "DONE").exists()
    assert Owner.read(path.read_bytes()) is not None, "the lock of the other trainer is kept"
    assert not list((config.run_dir / "checkpoints").glob(".*"))


# ---- real trainers ------------------------------------------------------------------------------


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 120
    while not happened():
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.full
@pytest.mark.parametrize("num_processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_two_trainers_and_kill_9(digits: Path, tmp_path: Path, num_processes: int) -> None:
    """The second is refused with one line; after kill -9 of the first, a start resumes at once.

    With two processes, the launcher itself starts the next attempt once.
    """
    run = tmp_path / "run"
    settings = [str(SMOKE), f"data.path={digits}", f"run_dir={run}"]
    forever = [*settings, "train.total_images=100000000"]
    command = [sys.executable]
    if num_processes > 1:
        command += ["-m", "accelerate.commands.launch", "--config_file"]
        command += [str(ROOT / "launch" / "cpu.yaml"), "--main_process_port", str(free_port())]
        command += ["--rdzv_backend", "c10d", "--max_restarts", "1"]
    process = subprocess.Popen(
        [*command, "-m", "bigan", "train", *forever],
        env=environment() | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )

    def owner() -> int:
        found = Owner.read((run / "LOCK").read_bytes())
        return found.pid if found else 0

    try:
        wait_for(lambda: checkpoint.latest(run) is not None, process)
        first = owner()
        done = run_bigan("train", *forever)
        assert done.returncode == 2
        (line,) = done.stderr.strip().splitlines()
        assert f"pid {first} " in line
        assert process.poll() is None, "the first one trains on"
        os.kill(first, signal.SIGKILL)
        if num_processes > 1:
            wait_for(lambda: owner() not in (0, first), process)
            seen = checkpoint.latest(run)
            wait_for(lambda: checkpoint.latest(run) != seen, process)
            os.kill(owner(), signal.SIGKILL)
        assert process.wait(120) != 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    newest = checkpoint.latest(run)
    assert newest is not None
    done = run_bigan("train", *settings, f"train.total_images={int(newest.name) + 400}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (run / "DONE").exists()
    assert not (run / "LOCK").exists()


@pytest.mark.full
def test_two_simultaneous_starts(digits: Path, tmp_path: Path) -> None:
    """Of several starts at the same instant, exactly one trains."""
    settings = [str(SMOKE), f"data.path={digits}", f"run_dir={tmp_path / 'run'}"]
    command = [sys.executable, "-m", "bigan", "train", *settings, "train.total_images=4000"]
    processes = [
        subprocess.Popen(command, env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    ended = [(p.communicate(timeout=180)[1], p.returncode) for p in processes]
    assert sorted(code for _, code in ended) == [0, 2, 2], ended
    rows = [row["images_seen"] for row in read_metrics(tmp_path / "run")]
    assert rows == sorted(set(rows))
