"""Real gloo processes, one of which is lost: the others exit in time and name it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import environment, free_port

from bigan.distributed.heartbeat import RESUME_HINT

pytestmark = pytest.mark.full

LOST_AFTER_SECONDS = 4.0

# Reads lines "WHAT FOLDER LOST_AFTER PORT" and forks three processes for each, without a launcher:
# rank 0 hosts the store. Forking saves the import of torch.
NURSERY = """
import ctypes, os, sys, time, traceback
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as dist
from bigan.errors import RunError
from bigan.distributed.heartbeat import Heartbeat, is_communication_error
from bigan.distributed.world import REPORTED_ELSEWHERE, World

SIZE = 3

def steps(what, rank, folder, lost_after):
    for step in range(40 if what == "busy" else 100_000):
        if step == 5:
            (folder / f"{rank}.trains").touch()
            if (what, rank) == ("raises", 1):
                raise ValueError("the reason of rank 1")
            if (what, rank) == ("busy", 1):
                ctypes.PyDLL(None).usleep(int(lost_after * 0.7e6))  # keeps the GIL
        dist.all_reduce(torch.ones(()))
        time.sleep(0.01)

def train(what, rank, folder, lost_after):
    dist.init_process_group("gloo", timeout=timedelta(seconds=100))
    with Heartbeat(World(rank, SIZE), lost_after) as beat:
        try:
            steps(what, rank, folder, lost_after)
        except Exception as error:
            if not is_communication_error(error):
                raise
            raise beat.lost_rank_error(error) from error
        if (what, rank) == ("busy", 1):
            time.sleep(lost_after * 0.8)  # rank 0 waits with its store
    dist.destroy_process_group()

def run(what, rank, folder, lost_after, port):
    output = os.open(folder / f"{rank}.stderr", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {"RANK": str(rank), "MASTER_PORT": port}
    try:
        train(what, rank, folder, lost_after)
    except RunError as error:
        if REPORTED_ELSEWHERE not in getattr(error, "__notes__", []):
            print(f"bigan: {error}", file=sys.stderr)
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0

def launch(what, folder, lost_after, port):
    pids = {}
    for rank in range(SIZE):
        pid = os.fork()
        if pid == 0:
            os._exit(run(what, rank, folder, lost_after, port))
        pids[pid] = rank
        (folder / f"{rank}.pid").write_text(str(pid))
    while pids:
        pid, status = os.wait()
        code = os.waitstatus_to_exitcode(status)
        temporary = folder / f"{pids.pop(pid)}.tmp"
        temporary.write_text(str(code))
        temporary.rename(temporary.with_suffix(".code"))

torch.set_num_threads(1)
os.environ |= {"WORLD_SIZE": str(SIZE), "MASTER_ADDR": "127.0.0.1"}
for line in sys.stdin:
    what, folder, lost_after, port = line.split()
    if os.fork() == 0:
        launch(what, Path(folder), float(lost_after), port)
        os._exit(0)
"""


class Ranks:
    """Three connected processes, observed by the files that they write to `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def pid(self, rank: int) -> int:
        return int((self.folder / f"{rank}.pid").read_text())

    def wait_until_training(self) -> None:
        wait_for([self.folder / f"{rank}.trains" for rank in range(3)], 60)
        time.sleep(0.3)

    def finish(self, rank: int, timeout: float) -> int:
        """The exit code of a rank that exits within `timeout` seconds."""
        code = self.folder / f"{rank}.code"
        wait_for([code], timeout)
        return int(code.read_text())

    def said(self) -> list[str]:
        """The lines of bigan on stderr, of all ranks."""
        texts = [(self.folder / f"{rank}.stderr").read_text() for rank in range(3)]
        return [line for text in texts for line in text.splitlines() if line.startswith("bigan:")]


def wait_for(paths: list[Path], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"still waiting for {paths}"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def nursery() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", NURSERY],
        env=environment() | {"TORCH_CPP_LOG_LEVEL": "ERROR"},
        stdin=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    yield process
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # remaining processes, also stopped ones
    process.communicate()


@pytest.fixture
def start(nursery: subprocess.Popen[str], tmp_path: Path) -> Callable[[str], Ranks]:
    def begin(what: str) -> Ranks:
        assert nursery.stdin
        print(what, tmp_path, LOST_AFTER_SECONDS, free_port(), file=nursery.stdin, flush=True)
        return Ranks(tmp_path)

    return begin


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("victim", [0, 2])
def test_lost_rank_is_named_and_the_others_exit(
    start: Callable[[str], Ranks], number: signal.Signals, victim: int
) -> None:
    ranks = start("trains")
    ranks.wait_until_training()
    os.kill(ranks.pid(victim), number)
    others = [rank for rank in range(3) if rank != victim]
    assert [ranks.finish(rank, 4 * LOST_AFTER_SECONDS) for rank in others] == [1, 1]
    (line,) = ranks.said()
    who = f"bigan: rank {victim} (host {socket.gethostname()}, pid {ranks.pid(victim)})"
    assert line.startswith((f"{who}: no heartbeat for ", f"{who}: the store of the launch is gone"))
    assert line.endswith(RESUME_HINT)


def test_exception_of_a_rank_reaches_the_others(
    start: Callable[[str], Ranks],
) -> None:
    ranks = start("raises")
    assert [ranks.finish(rank, 60) for rank in range(3)] == [1, 1, 1]
    (line,) = ranks.said()
    who = f"rank 1 (host {socket.gethostname()}, pid {ranks.pid(1)})"
    assert line.startswith(f"bigan: {who}: failed: ValueError: the reason of rank 1; ")


def test_busy_rank_is_not_lost(start: Callable[[str], Ranks]) -> None:
    """A rank that holds the GIL for most of the time limit, and exits after rank 0."""
    ranks = start("busy")
    assert [ranks.finish(rank, 60) for rank in range(3)] == [0, 0, 0]
    assert ranks.said() == []
