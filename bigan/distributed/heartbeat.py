"""Who is still there: names a lost process and ends the others, also when they hang.

A thread of each process counts up a value of its own (a beat) in the launch's key-value store, once
a second. Rank 0 reads all of them, the others read rank 0's and its report: of 1,024 processes none
but rank 0 reads more than two values. Beats are compared by whether they change, on the reader's
clock, and what the reader itself slept counts for nobody: no clocks need to agree.
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

from bigan.distributed.signals import leave, say
from bigan.distributed.world import TOLD, World, gather, together
from bigan.errors import PeerError, RunError

BEAT_SECONDS = 1.0
SILENT_BEATS = 2.5  # after which a process is named, if there is an error to explain
EXPLAIN_BEATS = 5  # that an explanation may take
FAILED_BEATS = 15  # after which a process that said why it failed ends the others, if they hang
GONE_BEATS = 5  # the same for a store that has closed its connections
NUM_NAMED = 8
GO_ON = "the same command goes on from the last checkpoint"
BYE, LEFT, FAILED = "bye", "left", "failed: "  # what stands for a beat at the end

# What gloo, NCCL and the store say when another process is gone: plain RuntimeErrors, mostly.
SIGNS = ("gloo", "nccl", "closed by peer", "reset by peer", "timed out", "timeout", "broken pipe")


def is_communication_error(error: BaseException) -> bool:
    """Whether `error` is what a collective raises when another process has gone."""
    if isinstance(error, dist.DistError):
        return True
    if isinstance(error, PeerError) or not isinstance(error, RuntimeError):
        return False
    text = str(error).lower()
    return any(sign in text for sign in SIGNS)


@dataclass(frozen=True)
class Member:
    """One process of the run."""

    host: str
    pid: int
    token: str  # rank 0's names this life of the run: a restart reads no former beats


@dataclass(frozen=True)
class Report:
    """What is known of the missing: seconds of silence, and what became of those that failed.

    `over`: the run is given up.
    """

    silent: Mapping[int, float] = field(default_factory=dict)
    failed: Mapping[int, str] = field(default_factory=dict)
    over: bool = False

    def __bool__(self) -> bool:
        return bool(self.silent or self.failed)

    def dump(self) -> str:
        """As JSON."""
        return json.dumps({"silent": self.silent, "failed": self.failed, "over": self.over})

    @classmethod
    def parse(cls, text: str | bytes) -> Report:
        """The inverse of `dump`; nothing is an empty report."""
        if not text:
            return cls()
        found = json.loads(text)
        for key in ("silent", "failed"):
            found[key] = {int(rank): value for rank, value in found[key].items()}
        return cls(**found)

    def merged(self, other: Report) -> Report:
        """Both together, `other` preferred."""
        return Report(
            {**self.silent, **other.silent},
            {**self.failed, **other.failed},
            self.over or other.over,
        )


class Watch:
    """The beats of some ranks as one reader sees them; time is what it is told."""

    def __init__(self, ranks: Sequence[int], beat_seconds: float) -> None:
        self.beat_seconds = beat_seconds
        self._values = dict.fromkeys(ranks, "")
        self.silence = dict.fromkeys(ranks, 0.0)  # seconds since the last change

    def note(self, values: Sequence[str], elapsed: float) -> None:
        """One look at all values, in order of the ranks, `elapsed` seconds after the former."""
        step = min(elapsed, 2 * self.beat_seconds)  # more, and it was the reader that was away
        for rank, value in zip(self._values, values, strict=True):
            changed = value != self._values[rank]
            self._values[rank] = value
            self.silence[rank] = 0.0 if changed else self.silence[rank] + step

    def report(self) -> Report:
        """Who has been silent for `SILENT_BEATS`, and who failed; not those that left in order."""
        failed = {r: v for r, v in self._values.items() if v.startswith(FAILED)}
        least = SILENT_BEATS * self.beat_seconds
        silent = {r: s for r, s in self.silence.items() if s >= least and not self._ended(r)}
        return Report(silent, failed)

    def all_ended(self, but: Collection[int] = ()) -> bool:
        """Whether everybody has left, the lost ones (`but`) aside."""
        return all(rank in but or self._ended(rank) for rank in self._values)

    def _ended(self, rank: int) -> bool:
        value = self._values[rank]
        return value in (BYE, LEFT) or value.startswith(FAILED)


def describe(report: Report, members: Sequence[Member]) -> str:
    """`rank 3 (host n2, pid 77) has not been heard of for 60 s`, on one line; "" for nobody."""
    groups: dict[tuple[str, str], list[int]] = {}  # a lost node is one story
    for rank, end in sorted(report.failed.items()):
        groups.setdefault((members[rank].host, end), []).append(rank)
    for rank, seconds in sorted(report.silent.items()):
        story = f"not been heard of for {seconds:.0f} s"
        groups.setdefault((members[rank].host, story), []).append(rank)
    parts = []
    for (host, story), ranks in list(groups.items())[:NUM_NAMED]:
        if len(ranks) == 1:
            who = f"rank {ranks[0]} (host {host}, pid {members[ranks[0]].pid})"
        else:
            more = f" and {len(ranks) - NUM_NAMED} more" if len(ranks) > NUM_NAMED else ""
            who = f"ranks {', '.join(map(str, ranks[:NUM_NAMED]))}{more} (host {host})"
        verb = {True: "has ", False: "have "}[len(ranks) == 1] if story.startswith("not") else ""
        parts.append(f"{who} {verb}{story}")
    rest = len(groups) - NUM_NAMED
    return "; ".join(parts) + (f"; and {rest} more" if rest > 0 else "")


def speakers(report: Report, members: Sequence[Member]) -> set[int]:
    """Who prints: rank 0, or, if it is missing, the first of the others on each host."""
    here = [r for r in range(len(members)) if r not in report.silent and r not in report.failed]
    if 0 in here:
        return {0}
    first: dict[str, int] = {}
    for rank in here:
        first.setdefault(members[rank].host, rank)
    return set(first.values())


def connect_to_store(timeout_seconds: float) -> dist.Store:
    """A client of its own of the store at MASTER_ADDR:MASTER_PORT, the launcher's or rank 0's."""
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_seconds),
    )


class Heartbeat:
    """Watch over the processes of a run; a context manager that all ranks enter together.

    A process that is silent for `lost_after_seconds` (a dead node; a process killed or stopped; a
    busy one goes on beating, unless C code keeps the GIL for so long) is named on one line, and
    all others leave with code 1, wherever their main threads hang. A process that leaves the
    context by an exception leaves its reason to the others. Does nothing for a world of one.

    At a regular end all ranks leave the context, and only then the process group: without a
    launcher the store is rank 0's and ends with its group.
    """

    def __init__(
        self,
        world: World,
        lost_after_seconds: float = 60.0,
        echo: Callable[[str], None] = say,
        connect: Callable[[float], dist.Store] = connect_to_store,
    ) -> None:
        self.world = world
        self.lost_after_seconds = lost_after_seconds
        self.beat_seconds = min(BEAT_SECONDS, lost_after_seconds / 10)
        self._echo = echo
        self._connect = connect
        self._end = ""  # bye, left or failed: the main thread is leaving
        self._said = False  # and the others can read it
        self._over = False  # rank 0 has given the run up
        self._gone = False  # the store does not answer any more
        self._report = Report()  # of the last look
        self._named = Report()  # what the explanation said
        self._num_looks = 0
        self._closed = threading.Event()
        self._wake = threading.Event()
        self._leaving = threading.Lock()  # the main thread leaves by itself, or is not asked
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Heartbeat:
        size, rank = self.world.size, self.world.rank
        if size == 1:
            return self
        store = together(self.world, lambda: self._connect(self.lost_after_seconds))
        own = Member(socket.gethostname(), os.getpid(), secrets.token_hex(8))
        keys = [str(rank) for rank in range(size)]
        if rank == 0:  # before anybody can look, so that no look has to wait for a key
            for key in (*keys, "report"):
                dist.PrefixStore(own.token, store).set(key, "")
        self._members = gather(self.world, own)
        self._store = dist.PrefixStore(self._members[0].token, store)
        self._keys = keys[1:] if rank == 0 else [keys[0], "report"]
        self._watch = Watch(range(1, size) if rank == 0 else [0], self.beat_seconds)
        for work in (self._talk, self._judge):
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
        self._see_off(self.lost_after_seconds if error is None else 3 * self.beat_seconds)
        self._closed.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(2 * self.beat_seconds)  # longer only if the store hangs

    def fail(self, message: str) -> None:
        """Leave this process's reason to the others: it ends now, for one of its own."""
        self._leave_as(FAILED + " ".join(message.split())[:500])

    def explain(self, error: BaseException) -> str:
        """One line on why a collective raised `error`: who is missing, where, and what they said.

        Called by the main thread, which then ends the process. Takes `EXPLAIN_BEATS` at most.
        """
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        if not self._threads:
            return first_line
        self._leave_as(LEFT)
        deadline = time.monotonic() + EXPLAIN_BEATS * self.beat_seconds
        while time.monotonic() < deadline and not self._known():
            time.sleep(self.beat_seconds / 10)
        known = self._named = self._known()
        self._over = self.world.is_main  # those that still hang in the collective leave as well
        self._wake.set()
        if not known:
            return f"a collective failed, though every process answers ({first_line}); {GO_ON}"
        return f"{describe(known, self._members)}; {GO_ON}"

    def lost(self, error: BaseException) -> RunError:
        """`explain(error)`, for every rank to raise; noted `TOLD` where another one prints it."""
        problem = RunError(self.explain(error))
        if self._threads and self.world.rank not in speakers(self._known(), self._members):
            problem.add_note(TOLD)
        return problem

    def _leave_as(self, end: str) -> None:
        with self._leaving:
            self._end = self._end or end
        self._wake.set()

    def _see_off(self, seconds: float) -> None:
        """Wait until the end has been said; rank 0, whose store it may be, until everyone's has."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self._gone:
            if self._said and (not self.world.is_main or self._watch.all_ended(self._named.silent)):
                return
            self._wake.set()
            time.sleep(0.05)

    def _known(self) -> Report:
        """The missing, as far as this process knows."""
        if not self._gone or 0 in self._report.failed:
            return self._report
        what = "has lost" if self.world.is_main else "is gone, and with it"
        return replace(
            self._report, failed={**self._report.failed, 0: f"{what} the launch's store"}
        )

    def _talk(self) -> None:
        """Beat and look, until closed or the store is gone."""
        num_beats, before, published = 0, time.monotonic(), Report()
        try:
            while not self._closed.is_set():
                num_beats += 1
                end, over = self._end, self._over
                self._store.set(str(self.world.rank), end or str(num_beats))
                values = [value.decode() for value in self._store.multi_get(self._keys)]
                now = time.monotonic()
                told = Report() if self.world.is_main else Report.parse(values.pop())
                self._watch.note(values, now - before)
                report = replace(self._watch.report(), over=over)
                if self.world.is_main and report != published:
                    self._store.set("report", report.dump())
                    published = report
                before, self._report = now, told.merged(report)
                self._num_looks += 1
                self._said = bool(end)
                self._wake.wait(self.beat_seconds / 4 if end else self.beat_seconds)
                self._wake.clear()
        except Exception:  # of the store's kinds: whatever it says, there is nobody to talk to
            self._gone = True

    def _judge(self) -> None:
        """Give the run up; a thread apart, since `_talk` hangs with the store of a stopped rank 0.

        While the main thread is leaving, it is left to it.
        """
        before, num_looks = time.monotonic(), 0
        unanswered = troubled = 0.0  # seconds
        while not self._closed.wait(self.beat_seconds / 2):
            now = time.monotonic()
            step, before = min(now - before, 2 * self.beat_seconds), now
            unanswered = 0.0 if self._num_looks > num_looks else unanswered + step
            num_looks = self._num_looks
            known = self._known()
            troubled = troubled + step if known.failed else 0.0
            if unanswered >= self.lost_after_seconds and not self.world.is_main:
                known = known.merged(Report({0: unanswered}))
            patience = self.beat_seconds * (GONE_BEATS if self._gone else FAILED_BEATS)
            if (
                known.over
                or troubled >= patience
                or any(s >= self.lost_after_seconds for s in known.silent.values())
            ):
                with self._leaving:
                    if not self._end:
                        leave(1, partial(self._last_words, known))

    def _last_words(self, known: Report) -> None:
        if self.world.rank in speakers(known, self._members):
            self._echo(f"{describe(known, self._members)}; stopping; {GO_ON}")
        if self.world.is_main and not self._gone:
            self._over = True
            self._wake.set()
            time.sleep(3 * self.beat_seconds)  # the others read it in a store that may be ours
