"""The ranks of a launch meet at the key-value store at MASTER_ADDR:MASTER_PORT.

Each rank registers there and waits until all have. While it waits, a line states at intervals which
ranks are missing: torch's own rendezvous is silent for its whole timeout. The store is hosted by
the launcher if it has one (`TORCHELASTIC_USE_AGENT_STORE`), else by rank 0.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from bigan.distributed.signals import print_line
from bigan.errors import REPORTED_ELSEWHERE, JoinError

LINE_SECONDS = 60.0  # between two lines about missing ranks
POLL_SECONDS = 0.5  # between two reads of the store, at most
NUM_NAMED = 16  # missing ranks in a line
PORTS_TRIED = 100  # for a free one after the one in use


@dataclass(frozen=True)
class Place:
    """The place of this process in the launch, from complete launcher variables."""

    rank: int
    size: int
    local_rank: int
    address: str
    port: int
    has_agent: bool  # the launcher hosts the store
    attempt: str  # of the launcher, which may keep its store for the next one

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Place:
        return cls(
            rank=int(environment["RANK"]),
            size=int(environment["WORLD_SIZE"]),
            local_rank=int(environment["LOCAL_RANK"]),
            address=environment["MASTER_ADDR"],
            port=int(environment["MASTER_PORT"]),
            has_agent=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            attempt=environment.get("TORCHELASTIC_RESTART_COUNT", "0"),
        )

    @property
    def hosts_store(self) -> bool:
        return self.rank == 0 and not self.has_agent

    @property
    def reports(self) -> bool:
        """Whether this rank prints while no store exists: all of the first host, else one."""
        return self.local_rank in (0, self.rank)

    @property
    def where(self) -> str:
        return f"{self.address}:{self.port}"


class Wait:
    """A time limit, and the interval of the lines until then."""

    def __init__(self, seconds: float, line_seconds: float, echo: Callable[[str], None]) -> None:
        self.seconds = seconds
        self._began = time.monotonic()
        self._line_seconds, self._next = line_seconds, line_seconds
        self._echo = echo

    @property
    def passed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._began

    @property
    def left(self) -> float:
        """Seconds until the limit, at least 0."""
        return max(0.0, self.seconds - self.passed)

    def note(self, describe: Callable[[], str]) -> None:
        """Print `describe()` if a line is due and the text is not empty."""
        if self.passed >= self._next:
            self._next += self._line_seconds
            text = describe()
            if text:
                self._echo(f"{text} ({self.passed:.0f} of at most {self.seconds:.0f} s)")


def meet(
    place: Place,
    timeout_seconds: float,
    echo: Callable[[str], None] = print_line,
    line_seconds: float = LINE_SECONDS,
) -> dist.Store:
    """The store of the launch, once all ranks have registered in it; a collective.

    Raises `JoinError`: the port is in use, ranks do not come within `timeout_seconds`, two
    processes have the same rank, or the world sizes differ.
    """
    wait = Wait(timeout_seconds, line_seconds, echo)
    store = dist.PrefixStore(f"bigan/{place.attempt}", _connected(place, wait))
    try:
        _register(place, store)
        _wait_for_all(place, store, wait)
    except RuntimeError as error:  # the store has gone: its host reports why it ended
        problem = JoinError(
            f"launch environment: rank {place.rank} of {place.size} on {socket.gethostname()} lost "
            f"the store at {place.where}, whose process has ended ({_first_line(error)})"
        )
        raise _printed_if(place.reports, problem) from error
    return store


def free_port(after: int) -> int:
    """A TCP port of this machine that is unused at the moment, `after` + 1 or a little more."""
    for port in range(after + 1, min(after + PORTS_TRIED, 65_535)):
        if not port_problem(port):
            return port
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def port_problem(port: int) -> str:
    """Why this process cannot listen on `port`, or ""."""
    with socket.socket() as listener:
        try:
            listener.bind(("", port))
            listener.listen()
        except OSError as error:
            return os.strerror(error.errno or 0).lower()
    return ""


def _connected(place: Place, wait: Wait) -> dist.Store:
    """A client of the store; rank 0 hosts it first unless the launcher does."""
    reason = "" if place.hosts_store else _unreachable(place, wait)

    def describe() -> str:
        if not place.reports:
            return ""
        return (
            f"rank {place.rank} of {place.size} on {socket.gethostname()} waits for "
            f"{'the launcher' if place.has_agent else 'rank 0'} at {place.where}: {reason}"
        )

    while reason and wait.left:
        time.sleep(min(POLL_SECONDS, wait.left))
        wait.note(describe)
        reason = _unreachable(place, wait)
    if not reason:
        # torch waits without a limit for a foreign program that listens and does not answer.
        reason = "the program that listens there does not answer"
        try:
            store = _in_time(lambda: _store(place, wait.left), wait, describe)
        except dist.DistError as error:
            store, reason = None, _first_line(error)
        if store is not None:
            return store
    problem = JoinError(
        f"launch environment: rank {place.rank} of {place.size} on {socket.gethostname()} could "
        f"not connect to {place.where} in {wait.passed:.0f} s ({reason}); start rank 0 on the "
        "host MASTER_ADDR, with the same MASTER_PORT as all others, and let that host accept "
        "connections on this port"
    )
    raise _printed_if(place.reports, problem)


def _unreachable(place: Place, wait: Wait) -> str:
    """Why no connection to the store is possible at the moment, or ""."""
    try:
        seconds = min(5.0, max(wait.left, 0.1))
        socket.create_connection((place.address, place.port), timeout=seconds).close()
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return ""


def _store(place: Place, timeout_seconds: float) -> dist.Store:
    try:
        return dist.TCPStore(
            "localhost" if place.hosts_store else place.address,  # it listens on all addresses
            place.port,
            place.size,
            is_master=place.hosts_store,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_seconds),
            multi_tenant=True,
        )
    except dist.DistNetworkError as error:
        why = port_problem(place.port) if place.hosts_store else ""
        if not why:
            raise
        problem = JoinError(
            f"launch environment: MASTER_PORT = {place.port}: {why} on {socket.gethostname()}; "
            f"export MASTER_PORT={free_port(place.port)}, which is free there, for all ranks"
        )
        raise problem from error


def _in_time(
    work: Callable[[], dist.Store], wait: Wait, describe: Callable[[], str]
) -> dist.Store | None:
    """The result of `work`, run in a thread, or None if it has none at the limit of `wait`."""
    results: list[dist.Store] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="rendezvous", daemon=True)
    thread.start()
    while thread.is_alive() and wait.left:
        thread.join(min(POLL_SECONDS, wait.left))
        wait.note(describe)
    if errors:
        raise errors[0]
    return results[0] if results else None


def _register(place: Place, store: dist.Store) -> None:
    """Enter this rank into the store; raises `JoinError` if another process has its rank."""
    own = f"{socket.gethostname()}, pid {os.getpid()}"
    first = store.compare_set(f"rank/{place.rank}", "", own).decode()
    size = store.compare_set("size", "", str(place.size)).decode()
    what = ""
    if first != own:
        what = f"RANK = {place.rank} is also the rank of another process ({first})"
    elif size != str(place.size):
        what = f"WORLD_SIZE = {place.size}, but another rank has WORLD_SIZE = {size}"
    if what:
        problem = JoinError(
            f"launch environment: {what}; give each process ({own}) a RANK of its own from 0 to "
            "WORLD_SIZE - 1, and all the same WORLD_SIZE"
        )
        raise problem
    store.add("num_joined", 1)


def _wait_for_all(place: Place, store: dist.Store, wait: Wait) -> None:
    def has_joined(rank: int) -> bool:
        return store.check([f"rank/{rank}"])

    def describe() -> str:
        """Printed by the lowest rank that has joined."""
        if any(map(has_joined, range(place.rank))):
            return ""
        missing = [rank for rank in range(place.size) if not has_joined(rank)]
        named = ", ".join(map(str, missing[:NUM_NAMED]))
        return (
            f"{place.size - len(missing)} of {place.size} ranks have joined at {place.where}; "
            f"missing: rank {named}{', ...' if len(missing) > NUM_NAMED else ''}"
        )

    seconds = POLL_SECONDS / 50
    while store.add("num_joined", 0) < place.size:
        if not wait.left:
            text = describe()
            problem = JoinError(
                f"launch environment: {text} after {wait.seconds:.0f} s; start a process for each "
                "rank, with the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE"
            )
            raise _printed_if(bool(text), problem)
        wait.note(describe)
        time.sleep(min(seconds, wait.left))
        seconds = min(2 * seconds, POLL_SECONDS)


def _printed_if(prints: bool, problem: JoinError) -> JoinError:
    if not prints:
        problem.add_note(REPORTED_ELSEWHERE)
    return problem


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
