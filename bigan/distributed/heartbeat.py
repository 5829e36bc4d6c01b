"""Detection of lost processes: a lost rank is named, and the other ranks exit even if they hang.

A thread of each rank increments a counter (its heartbeat) in the key-value store of the launch once
a second. Rank 0 reads the counters of all ranks; the other ranks read rank 0's counter and its
report, so that at a world size of 1,024 every rank but 0 reads two values. A reader measures on its
own clock for how long a counter has not changed, and does not count time in which it was suspended
itself: clocks need not be synchronised.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from types import TracebackType

import torch.distributed as dist

from bigan.distributed.job_logs import write_failure
from bigan.distributed.signals import exit_process, print_line
from bigan.distributed.world import World, gather, on_all_ranks
from bigan.errors import LOST, REPORTED_ELSEWHERE, LostError, PeerError

BEAT_SECONDS = 1.0
SILENT_BEATS = 2.5  # without a change, after which a rank is reported as silent
EXPLAIN_BEATS = 5  # time limit of `explain`
FAILED_BEATS = 15  # after a rank reported a failure: the other ranks exit, if they hang
GONE_BEATS = 5  # after the store closed its connections: the ranks exit
NUM_NAMED = 8
RESUME_HINT = "the same command resumes from the last checkpoint"
BYE, LEFT, FAILED = "bye", "left", "failed: "  # final values of a counter

# In messages of gloo, NCCL and the store after the loss of a peer; mostly plain RuntimeErrors.
SIGNS = ("gloo", "nccl", "closed by peer", "reset by peer", "timed out", "timeout", "broken pipe")


def is_communication_error(error: BaseException) -> bool:
    """Whether `error` is an error that a collective raises after the loss of a peer."""
    if isinstance(error, dist.DistError):
        return True
    if isinstance(error, PeerError) or not isinstance(error, RuntimeError):
        return False
    text = str(error).lower()
    return any(sign in text for sign in SIGNS)


@dataclass(frozen=True)
class Member:
    """One process of the launch."""

    host: str
    pid: int
    token: str  # rank 0's token is the key prefix: a restart does not read old counters


@dataclass(frozen=True)
class Report:
    """Lost ranks: rank -> seconds without a heartbeat, and rank -> failure message.

    `over`: rank 0 has decided to end the run.
    """

    silent: Mapping[int, float] = field(default_factory=dict)
    failed: Mapping[int, str] = field(default_factory=dict)
    over: bool = False

    def __bool__(self) -> bool:
        return bool(self.silent or self.failed)

    def dump(self) -> str:
        """The report as JSON."""
        return json.dumps({"silent": self.silent, "failed": self.failed, "over": self.over})

    @classmethod
    def parse(cls, text: str | bytes) -> Report:
        """The inverse of `dump`; an empty text gives an empty report."""
        if not text:
            return cls()
        found = json.loads(text)
        for key in ("silent", "failed"):
            found[key] = {int(rank): value for rank, value in found[key].items()}
        return cls(**found)

    def merged(self, other: Report) -> Report:
        """The union of two reports; `other` takes precedence."""
        return Report(
            {**self.silent, **other.silent},
            {**self.failed, **other.failed},
            self.over or other.over,
        )


class Watch:
    """The counters of some ranks as read by one reader. Elapsed time is passed in."""

    def __init__(self, ranks: Sequence[int], beat_seconds: float) -> None:
        self.beat_seconds = beat_seconds
        self._values = dict.fromkeys(ranks, "")
        self.silence = dict.fromkeys(ranks, 0.0)  # seconds since the last change

    def note(self, values: Sequence[str], elapsed: float) -> None:
        """Record the values of all ranks, in order, `elapsed` seconds after the previous call."""
        step = min(elapsed, 2 * self.beat_seconds)  # if longer, the reader itself was suspended
        for rank, value in zip(self._values, values, strict=True):
            changed = value != self._values[rank]
            self._values[rank] = value
            self.silence[rank] = 0.0 if changed else self.silence[rank] + step

    def report(self) -> Report:
        """Ranks that failed or are silent for `SILENT_BEATS`; not those that exited in order."""
        failed = {r: v for r, v in self._values.items() if v.startswith(FAILED)}
        least = SILENT_BEATS * self.beat_seconds
        silent = {r: s for r, s in self.silence.items() if s >= least and not self._ended(r)}
        return Report(silent, failed)

    def all_ended(self, but: Collection[int] = ()) -> bool:
        """Whether all ranks except the lost ones (`but`) have exited."""
        return all(rank in but or self._ended(rank) for rank in self._values)

    def _ended(self, rank: int) -> bool:
        value = self._values[rank]
        return value in (BYE, LEFT) or value.startswith(FAILED)


def describe(report: Report, members: Sequence[Member]) -> str:
    """`rank 3 (host n2, pid 77): no heartbeat for 60 s`, on one line; "" for an empty report."""
    groups: dict[tuple[str, str], list[int]] = {}  # one entry per host: a node is lost as a whole
    for rank, end in sorted(report.failed.items()):
        groups.setdefault((members[rank].host, end), []).append(rank)
    for rank, seconds in sorted(report.silent.items()):
        reason = f"no heartbeat for {seconds:.0f} s"
        groups.setdefault((members[rank].host, reason), []).append(rank)
    parts = []
    for (host, reason), ranks in list(groups.items())[:NUM_NAMED]:
        if len(ranks) == 1:
            who = f"rank {ranks[0]} (host {host}, pid {members[ranks[0]].pid})"
        else:
            more = f" and {len(ranks) - NUM_NAMED} more" if len(ranks) > NUM_NAMED else ""
            who = f"ranks {', '.join(map(str, ranks[:NUM_NAMED]))}{more} (host {host})"
        parts.append(f"{who}: {reason}")
    rest = len(groups) - NUM_NAMED
    return "; ".join(parts) + (f"; and {rest} more" if rest > 0 else "")


def reporting_ranks(report: Report, members: Sequence[Member]) -> set[int]:
    """The ranks that print: rank 0 or, if it is lost, the lowest remaining rank of each host."""
    alive = [r for r in range(len(members)) if r not in report.silent and r not in report.failed]
    if 0 in alive:
        return {0}
    first: dict[str, int] = {}
    for rank in alive:
        first.setdefault(members[rank].host, rank)
    return set(first.values())


def connect_to_store(timeout_seconds: float) -> dist.Store:
    """A new client of the store at MASTER_ADDR:MASTER_PORT, which the launcher or rank 0 hosts."""
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_seconds),
    )


class Heartbeat:
    """Monitors the ranks of a run. A context manager that all ranks enter (a collective).

    If a rank sends no heartbeat for `lost_after_seconds` (its node is down, it was killed or
    stopped), it is named on one line and all other ranks exit with code 1, wherever their main
    threads hang. A busy rank keeps sending, unless C code holds the GIL for that long. A rank that
    exits the context by an exception publishes the exception. Does nothing at a world size of 1.

    At a regular end, exit the context before destroying the process group: without a launcher rank
    0 hosts the store, which ends with its process group.
    """

    def __init__(
        self,
        world: World,
        lost_after_seconds: float = 60.0,
        echo: Callable[[str], None] = print_line,
        connect: Callable[[float], dist.Store] = connect_to_store,
    ) -> None:
        self.world = world
        self.lost_after_seconds = lost_after_seconds
        self.beat_seconds = min(BEAT_SECONDS, lost_after_seconds / 10)
        self._echo = echo
        self._connect = connect
        self._end = ""  # BYE, LEFT or FAILED: the main thread is exiting
        self._end_published = False
        self._over = False  # rank 0 has decided to end the run
        self._gone = False  # the store no longer answers
        self._report = Report()  # of the last exchange
        self._named = Report()  # reported by `explain`
        self._num_exchanges = 0
        self._closed = threading.Event()
        self._wake = threading.Event()
        self._leaving = threading.Lock()  # either the main thread exits, or `_check` ends it
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Heartbeat:
        size, rank = self.world.size, self.world.rank
        if size == 1:
            return self
        store = on_all_ranks(self.world, lambda: self._connect(self.lost_after_seconds))
        own = Member(socket.gethostname(), os.getpid(), secrets.token_hex(8))
        keys = [str(rank) for rank in range(size)]
        if rank == 0:  # before any rank can read, so that no read waits for a key
            for key in (*keys, "report"):
                dist.PrefixStore(own.token, store).set(key, "")
        self._members = gather(self.world, own)
        self._store = dist.PrefixStore(self._members[0].token, store)
        self._keys = keys[1:] if rank == 0 else [keys[0], "report"]
        self._watch = Watch(range(1, size) if rank == 0 else [0], self.beat_seconds)
        for work in (self._exchange, self._check):
            thread = threading.Thread(target=work, name=f"heartbeat{work.__name__}", daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._threads:
            return
        if error is None:
            self._leave_as(BYE)
        else:
            self.fail(f"{type(error).__name__}: {error}")
        self._wait_for_end(self.lost_after_seconds if error is None else 3 * self.beat_seconds)
        self._closed.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(2 * self.beat_seconds)  # reached only if the store hangs

    def fail(self, message: str) -> None:
        """Publish `message` as the reason why this rank exits."""
        self._leave_as(FAILED + " ".join(message.split())[:500])

    def explain(self, error: BaseException) -> str:
        """One line on why a collective raised `error`: the lost ranks, their hosts and messages.

        Call on the main thread, which must then exit. Waits for `EXPLAIN_BEATS` at most.
        """
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        if not self._threads:
            return first_line
        self._leave_as(LEFT)
        deadline = time.monotonic() + EXPLAIN_BEATS * self.beat_seconds
        while time.monotonic() < deadline and not self._known():
            time.sleep(self.beat_seconds / 10)
        known = self._named = self._known()
        self._over = self.world.is_rank_0  # ranks that still hang in the collective exit as well
        self._wake.set()
        if not known:
            return f"a collective failed, but no rank is lost ({first_line}); {RESUME_HINT}"
        return f"{describe(known, self._members)}; {RESUME_HINT}"

    def lost_rank_error(self, error: BaseException) -> LostError:
        """`explain(error)` as an error to raise, with a note if another rank prints it."""
        problem = LostError(self.explain(error))
        if self._threads and self.world.rank not in reporting_ranks(self._known(), self._members):
            problem.add_note(REPORTED_ELSEWHERE)
        return problem

    def _leave_as(self, end: str) -> None:
        with self._leaving:
            self._end = self._end or end
        self._wake.set()

    def _wait_for_end(self, seconds: float) -> None:
        """Wait until the end is published; on rank 0, which may host the store, on all ranks."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self._gone:
            if self._end_published and (
                not self.world.is_rank_0 or self._watch.all_ended(self._named.silent)
            ):
                return
            self._wake.set()
            time.sleep(0.05)

    def _known(self) -> Report:
        """The lost ranks known to this rank."""
        if not self._gone or 0 in self._report.failed:
            return self._report
        failed = {**self._report.failed, 0: "the store of the launch is gone"}
        return replace(self._report, failed=failed)

    def _exchange(self) -> None:
        """Increment and read counters until closed or the store is gone; runs in a thread."""
        num_beats, before, published = 0, time.monotonic(), Report()
        try:
            while not self._closed.is_set():
                num_beats += 1
                end, over = self._end, self._over
                self._store.set(str(self.world.rank), end or str(num_beats))
                values = [value.decode() for value in self._store.multi_get(self._keys)]
                now = time.monotonic()
                received = Report() if self.world.is_rank_0 else Report.parse(values.pop())
                self._watch.note(values, now - before)
                report = replace(self._watch.report(), over=over)
                if self.world.is_rank_0 and report != published:
                    self._store.set("report", report.dump())
                    published = report
                before, self._report = now, received.merged(report)
                self._num_exchanges += 1
                self._end_published = bool(end)
                self._wake.wait(self.beat_seconds / 4 if end else self.beat_seconds)
                self._wake.clear()
        except Exception:  # the store raises various types; any of them means that it is gone
            self._gone = True

    def _check(self) -> None:
        """End the process if ranks are lost, unless the main thread is already exiting.

        Runs in a thread of its own, because `_exchange` hangs with the store of a stopped rank 0.
        """
        before, num_exchanges = time.monotonic(), 0
        unanswered = failing = 0.0  # seconds
        while not self._closed.wait(self.beat_seconds / 2):
            now = time.monotonic()
            step, before = min(now - before, 2 * self.beat_seconds), now
            unanswered = 0.0 if self._num_exchanges > num_exchanges else unanswered + step
            num_exchanges = self._num_exchanges
            known = self._known()
            failing = failing + step if known.failed else 0.0
            if unanswered >= self.lost_after_seconds and not self.world.is_rank_0:
                known = known.merged(Report({0: unanswered}))
            limit = self.beat_seconds * (GONE_BEATS if self._gone else FAILED_BEATS)
            if (
                known.over
                or failing >= limit
                or any(s >= self.lost_after_seconds for s in known.silent.values())
            ):
                with self._leaving:
                    if not self._end:
                        exit_process(1, partial(self._report_and_stop, known))

    def _report_and_stop(self, known: Report) -> None:
        line = f"{describe(known, self._members)}; stopping; {RESUME_HINT}"
        if self.world.rank in reporting_ranks(known, self._members):
            self._echo(line)
        write_failure(LOST, line)
        if self.world.is_rank_0 and not self._gone:
            self._over = True
            self._wake.set()
            time.sleep(3 * self.beat_seconds)  # rank 0 may host the store that the others read
