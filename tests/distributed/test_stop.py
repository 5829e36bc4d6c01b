"""Stop signals set a flag, hanging processes exit, loader workers exit with their parent."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from commands import environment, free_port

from bigan.distributed import signals
from bigan.distributed.signals import StopFlag

LIMIT_SECONDS = 60.0

# `hang()` waits in C without the GIL, as a collective does: no Python signal handler runs.
PREAMBLE = """
import ctypes, os, signal, sys, time
from bigan.distributed.signals import StopFlag, write_requeue

def hang():
    lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
    print("ready", flush=True)
    lock(mutex)
    lock(mutex)
"""


class Script:
    """A Python process; its stdout and stderr are lines, in order."""

    def __init__(self, code: str, arguments: Sequence[object]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PREAMBLE + code, *map(str, arguments)],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.limit = threading.Timer(LIMIT_SECONDS, self.kill)  # ends a pending `line()`
        self.limit.start()

    def kill(self) -> None:
        self.limit.cancel()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def finish(self, timeout: float = 20) -> tuple[int, str]:
        """(exit code, rest of the output)."""
        output, _ = self.process.communicate(timeout=timeout)
        return self.process.returncode, output


@pytest.fixture
def script() -> Iterator[Callable[..., Script]]:
    started: list[Script] = []

    def start(code: str, *arguments: object) -> Script:
        started.append(Script(code, arguments))
        return started[-1]

    yield start
    for one in started:
        one.kill()
        one.process.communicate()


def gone(pid: int) -> bool:
    """Whether the process has exited or is a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def within(seconds: float, holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_first_signal_is_stored_and_handlers_are_restored() -> None:
    former = [signal.getsignal(number) for number in signals.SIGNALS]
    former_fd = signal.set_wakeup_fd(-1)
    said: list[str] = []
    with StopFlag(echo=said.append) as flag:
        assert flag.signal == 0
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR2)  # an echo, not a second request
        assert within(5, lambda: bool(said))
        assert flag.signal == signal.SIGTERM
    assert len(said) == 1
    assert said[0].startswith("signal 15: saving at the next step boundary")
    assert [signal.getsignal(number) for number in signals.SIGNALS] == former
    assert signal.set_wakeup_fd(former_fd) == -1


def test_second_signal_exits_at_once(script: Callable[..., Script]) -> None:
    """Even while the main thread hangs in C; a repetition within `ECHO_SECONDS` is ignored."""
    run = script("with StopFlag():\n    hang()")
    assert run.line() == "ready"
    run.send(signal.SIGUSR2)
    assert run.line().startswith("bigan: signal 12: saving at the next step boundary")
    run.send(signal.SIGUSR2)
    time.sleep(signals.ECHO_SECONDS + 0.1)
    assert run.process.poll() is None
    run.send(signal.SIGINT)
    code, output = run.finish()
    assert code == 130
    assert output.startswith("bigan: signal 2: ")


def test_hanging_process_exits_after_the_grace_time(
    script: Callable[..., Script], tmp_path: Path
) -> None:
    code = """
with StopFlag(grace_seconds=0.5) as stop:
    stop.before_exit = lambda n: write_requeue(__import__("pathlib").Path(sys.argv[1]), n, 40)
    hang()
"""
    run = script(code, tmp_path)
    assert run.line() == "ready"
    time.sleep(0.6)  # without a signal there is no limit
    run.send(signal.SIGTERM)
    said = run.finish()
    assert said[0] == 143
    assert said[1].splitlines()[1].startswith("bigan: signal 15: no step boundary for 0.5 s")
    assert json.loads((tmp_path / signals.REQUEUE).read_text()) == {"signal": 15, "images_seen": 40}


def test_grace_time_restarts_at_a_boundary_and_is_suspended_while_saving(
    script: Callable[..., Script],
) -> None:
    code = """
with StopFlag(grace_seconds=0.6) as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(5):
        time.sleep(0.3)
        stop.step_boundary()
    with stop.suspend_grace_time():
        time.sleep(1)  # saving
print("saved")
"""
    code, output = script(code).finish()
    assert (code, output.splitlines()[-1]) == (0, "saved")


def test_grace_time_restarts_after_saving(script: Callable[..., Script]) -> None:
    code = """
with StopFlag(grace_seconds=0.5) as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    with stop.suspend_grace_time():
        time.sleep(1)
    print("saved", flush=True)
    time.sleep(100)  # never comes
"""
    code, output = script(code).finish()
    assert code == 143
    assert output.splitlines()[1] == "saved"


def test_hanging_marker_does_not_keep_the_process(script: Callable[..., Script]) -> None:
    """A file system that does not answer; the cleanup has its own time limit."""
    code = """
from bigan.distributed import signals
signals.CLEANUP_SECONDS = 0.3
with StopFlag(grace_seconds=0.1, before_exit=lambda _: hang()):
    os.kill(os.getpid(), signal.SIGTERM)
    hang()
"""
    assert script(code).finish()[0] == 143


def test_signals_reach_a_process_that_hangs_in_a_collective(
    script: Callable[..., Script],
) -> None:
    code = """
import torch.distributed as dist, torch
torch.set_num_threads(1)
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[1], "WORLD_SIZE": "2"}
other = os.fork()
os.environ["RANK"] = "1" if other == 0 else "0"
with StopFlag(grace_seconds=60):
    dist.init_process_group("gloo")
    if other == 0:
        time.sleep(100)  # never comes
    print("ready", flush=True)
    dist.all_reduce(torch.ones(()))
"""
    run = script(code, free_port())
    assert run.line() == "ready"
    time.sleep(0.3)
    run.send(signal.SIGTERM)
    assert run.line().startswith("bigan: signal 15: saving")
    time.sleep(signals.ECHO_SECONDS + 0.1)
    run.send(signal.SIGTERM)
    assert run.line().startswith("bigan: signal 15: ")
    assert run.process.wait(5) == 143


def test_files_of_a_stopped_run(tmp_path: Path) -> None:
    assert not signals.stop_requested(tmp_path)
    (tmp_path / "STOP").touch()
    assert signals.stop_requested(tmp_path)
    signals.write_requeue(tmp_path, signal.SIGUSR2, 1200)
    content = json.loads((tmp_path / "REQUEUE").read_text())
    assert content == {"signal": 12, "images_seen": 1200}
    signals.clear_markers(tmp_path)
    signals.clear_markers(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_worker_exits_with_its_parent_and_ignores_stop_signals(
    script: Callable[..., Script],
) -> None:
    code = """
from bigan.data import workers
parent = os.getpid()

def worker():
    pid = os.fork()
    if pid == 0:
        workers._listen_to(parent, 0)
        sys.stdout = open(os.devnull, "w")
        hang()  # in a read, say
    return pid

with workers._signals_blocked():
    first, second = worker(), worker()
os.kill(first, signal.SIGTERM)
print(os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]), second, flush=True)
hang()
"""
    run = script(code)
    code, worker = map(int, run.line().split())
    assert code == 1
    for number in signals.SIGNALS:
        os.kill(worker, number)
    time.sleep(0.5)
    assert not gone(worker)
    run.send(signal.SIGKILL)
    assert within(5, lambda: gone(worker))


def test_loader_workers_ignore_stop_signals(digits: Path, script: Callable[..., Script]) -> None:
    """A scheduler signals every process of a job, including those that are still importing."""
    code = """
if __name__ == "__main__":
    import itertools
    from pathlib import Path
    from bigan.data.settings import Fetch
    from bigan.data.stream import ShardStream
    from bigan.distributed.world import World
    settings = dict(seed=0, world=World(), batch=32, block=400)
    fetch = Fetch(backend="processes", threads=1)
    with ShardStream(Path(sys.argv[1]), "train", fetch=fetch, **settings) as stream:
        print("ready", flush=True)
        print(len(list(itertools.islice(stream, 60))), flush=True)
"""
    run = script(code, digits)
    assert run.line() == "ready"
    children = Path(f"/proc/{run.process.pid}/task/{run.process.pid}/children")

    def workers() -> list[int]:
        tasks = children.parent.parent.glob("*/children")
        return [int(pid) for task in tasks for pid in task.read_text().split()]

    signalled: set[int] = set()
    until = time.monotonic() + 60
    while run.process.poll() is None and time.monotonic() < until:
        found = set(workers())
        if len(found) >= 2 > len(signalled):
            until = time.monotonic() + 0.5
        signalled |= found
        for worker in found:
            for number in signals.SIGNALS:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker, number)
        time.sleep(0.05)
    assert len(signalled) >= 2, "the resource tracker and a worker"
    assert run.finish(60) == (0, "60\n")
