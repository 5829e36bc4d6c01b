"""Ranks that meet, do not come, or come twice: real sockets, and a thread for each rank."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from commands import SMOKE, free_port

from bigan.cli.main import main
from bigan.distributed.rendezvous import Place, meet
from bigan.distributed.rendezvous import free_port as suggested_port
from bigan.distributed.world import REPORTED_ELSEWHERE
from bigan.errors import LaunchError

LIMIT_SECONDS = 1.4


def place(rank: int, size: int, port: int, local_rank: int | None = None) -> Place:
    local = rank if local_rank is None else local_rank
    return Place(rank, size, local, "127.0.0.1", port, has_agent=False, attempt="0")


class Rank(threading.Thread):
    """One rank that calls `meet`."""

    def __init__(self, here: Place, seconds: float = LIMIT_SECONDS) -> None:
        super().__init__(daemon=True)
        self.here, self.seconds = here, seconds
        self.lines: list[str] = []
        self.store: dist.Store | None = None
        self.error: BaseException = AssertionError("no error")
        self.took = 0.0
        self.start()

    def run(self) -> None:
        began = time.monotonic()
        try:
            self.store = meet(self.here, self.seconds, self.lines.append, line_seconds=0.2)
        except LaunchError as error:
            self.error = error
        self.took = time.monotonic() - began

    def ended(self) -> Rank:
        self.join(60)
        assert not self.is_alive()
        return self

    @property
    def prints(self) -> bool:
        return REPORTED_ELSEWHERE not in getattr(self.error, "__notes__", [])


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which another program listens; it never answers."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_ranks_meet_in_one_store() -> None:
    port = free_port()
    late = [place(2, 3, port), place(1, 3, port), place(0, 3, port)]  # rank 0 comes last
    ranks = []
    for here in late:
        ranks.append(Rank(here, 60))
        time.sleep(0.1)
    stores = [rank.ended().store for rank in ranks]
    assert all(stores), [rank.error for rank in ranks]
    stores[0].set("key", "value")
    assert stores[2].get("key") == b"value"


def test_missing_ranks_are_named_until_the_time_limit() -> None:
    port = free_port()
    ranks = [Rank(place(rank, 4, port, local_rank=0)) for rank in (0, 2)]
    zero, two = (rank.ended() for rank in ranks)
    for text in (zero.lines[-1], str(zero.error)):  # rank 2 may join after the first line
        assert f"2 of 4 ranks have joined at 127.0.0.1:{port}; missing: rank 1, 3" in text
    assert "of at most 1 s" in zero.lines[0]
    assert LIMIT_SECONDS <= zero.took < LIMIT_SECONDS + 10
    assert isinstance(two.error, LaunchError)
    assert zero.prints
    assert not [line for line in two.lines if "joined" in line]  # one rank reports


def test_rank_0_that_does_not_come_is_named() -> None:
    port = free_port()
    first = Rank(place(1, 4, port, local_rank=1))  # on the first host
    other = Rank(place(3, 4, port, local_rank=1))  # not the first process of its host
    first.ended(), other.ended()
    assert f"rank 0 at 127.0.0.1:{port}: connection refused" in first.lines[0]
    assert f"127.0.0.1:{port}" in str(first.error)
    assert LIMIT_SECONDS <= first.took < LIMIT_SECONDS + 10
    assert (first.prints, other.prints, other.lines) == (True, False, [])


def test_address_that_is_not_that_of_rank_0_is_reported_by_both_sides() -> None:
    port = free_port()
    wrong = "no-such-host.invalid"
    zero, one = (
        Rank(Place(rank, 2, rank, wrong, port, has_agent=False, attempt="0")) for rank in (0, 1)
    )
    assert "1 of 2 ranks have joined" in zero.ended().lines[0]
    assert f"rank 0 at {wrong}:{port}: " in one.ended().lines[0]
    assert isinstance(one.error, LaunchError)


def test_another_program_on_the_port_does_not_hang_the_ranks(taken: int) -> None:
    rank = Rank(place(1, 2, taken)).ended()
    assert f"127.0.0.1:{taken}" in str(rank.error)
    assert "does not answer" in str(rank.error)
    assert rank.lines


def test_port_in_use_names_a_free_one(taken: int) -> None:
    rank = Rank(place(0, 2, taken), 60).ended()
    assert rank.took < 30
    assert f"MASTER_PORT = {taken}: address already in use" in str(rank.error)
    suggestion = int(str(rank.error).partition("export MASTER_PORT=")[2].partition(",")[0])
    assert suggestion != taken
    with socket.socket() as listener:
        listener.bind(("", suggestion))


def test_suggested_port_is_valid_at_the_upper_end() -> None:
    assert 1024 < suggested_port(65_535) < 65_536


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("rank/1", "n7, pid 12", r"RANK = 1 .*\(n7, pid 12\)"),
        ("size", "4", "WORLD_SIZE = 2, but another rank has WORLD_SIZE = 4"),
    ],
)
def test_contradicting_processes_are_refused(key: str, value: str, expected: str) -> None:
    port = free_port()
    host = dist.TCPStore(
        "127.0.0.1",
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=30),
    )
    dist.PrefixStore("bigan/0", host).set(key, value)
    with pytest.raises(LaunchError, match=expected):
        meet(place(1, 2, port), 60)


def test_next_attempt_of_a_launcher_does_not_see_the_ranks_of_the_last() -> None:
    """The launcher may keep its store."""
    port = free_port()
    host = dist.TCPStore(
        "127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30)
    )
    for key in ("rank/0", "rank/1"):
        dist.PrefixStore("bigan/0", host).set(key, "an ended process")
    agent = {"has_agent": True, "attempt": "1"}
    ranks = [
        Rank(Place(rank, 2, rank, "127.0.0.1", port, **agent), 60)  # type: ignore[arg-type]
        for rank in (0, 1)
    ]
    assert all(rank.ended().store for rank in ranks)


# --- the command ------------------------------------------------------------------------------

COMPLETE = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


def without(*names: str) -> dict[str, str]:
    return {name: value for name, value in COMPLETE.items() if name not in names}


def refused(
    command: str,
    variables: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    run: Path,
    data: Path,
    *settings: str,
) -> str:
    """The one line of a command that does not start."""
    for name in (*COMPLETE, "LOCAL_WORLD_SIZE", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    train = [str(SMOKE), f"data.path={data}", f"run_dir={run}", *settings]
    assert main([command, *(train if command == "train" else [str(run)])]) == 2
    captured = capsys.readouterr().err
    assert captured.count("\n") == 1
    assert not run.exists()
    return captured


@pytest.mark.parametrize("command", ["train", "evaluate"])
@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE = 4"),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, "PMI_SIZE = 2"),
        ({"MV2_COMM_WORLD_SIZE": "2", "MV2_COMM_WORLD_RANK": "0"}, "MV2_COMM_WORLD_SIZE = 2"),
        ({"PMI_SIZE": "2", "MASTER_ADDR": "n1"}, "PMI_SIZE = 2"),
        # accelerate's own mpirun
        ({"OMPI_COMM_WORLD_SIZE": "2", "ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "n1"},
         "OMPI_COMM_WORLD_SIZE = 2"),
        (without("MASTER_ADDR", "MASTER_PORT"), "MASTER_ADDR, MASTER_PORT are not set"),
        (without("MASTER_PORT"), "MASTER_PORT is not set"),
        (without("LOCAL_RANK"), "LOCAL_RANK is not set"),
        (without("WORLD_SIZE"), "WORLD_SIZE is not set"),
        ({"RANK": "1"}, "RANK = 1, but WORLD_SIZE, LOCAL_RANK, MASTER_ADDR"),
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "1"}, "RANK, MASTER_ADDR, MASTER_PORT are not set"),
        ({"MASTER_ADDR": "n1", "MASTER_PORT": "1"}, "MASTER_ADDR = n1, but RANK, WORLD_SIZE"),
        (COMPLETE | {"MASTER_PORT": ""}, "MASTER_PORT is not set"),
        (COMPLETE | {"MASTER_PORT": "http"}, "MASTER_PORT = 'http' is not a number"),
        (COMPLETE | {"MASTER_PORT": "70000"}, "MASTER_PORT = '70000'"),
        (COMPLETE | {"RANK": "2"}, "RANK = '2' is not a number from 0 to 1"),
        (COMPLETE | {"RANK": "-1"}, "RANK = '-1'"),
        (COMPLETE | {"WORLD_SIZE": "two"}, "WORLD_SIZE = 'two'"),
        (COMPLETE | {"LOCAL_WORLD_SIZE": "x"}, "LOCAL_WORLD_SIZE = 'x'"),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "3"}, "SLURM_NTASKS = 8"),
    ],
)  # fmt: skip
def test_incomplete_variables_are_one_line_that_names_them(
    command: str,
    variables: dict[str, str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    digits: Path,
    tmp_path: Path,
) -> None:
    line = refused(command, variables, monkeypatch, capsys, tmp_path / "run", digits)
    assert expected in line


def test_port_in_use_is_one_line_of_the_command(
    taken: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    digits: Path,
    tmp_path: Path,
) -> None:
    variables = COMPLETE | {"MASTER_PORT": str(taken)}
    line = refused("train", variables, monkeypatch, capsys, tmp_path / "run", digits)
    assert f"MASTER_PORT = {taken}: address already in use on {os.uname().nodename}" in line


def test_configured_timeout_limits_the_wait_for_other_ranks(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    digits: Path,
    tmp_path: Path,
) -> None:
    port = str(free_port())
    began = time.monotonic()
    settings = ("train.collective_timeout_seconds=1",)
    variables = COMPLETE | {"MASTER_PORT": port}
    line = refused("train", variables, monkeypatch, capsys, tmp_path / "run", digits, *settings)
    assert f"1 of 2 ranks have joined at 127.0.0.1:{port}; missing: rank 1" in line
    assert 1 <= time.monotonic() - began < 30
