"""Lost ranks are detected, described and reported; time and the store are simulated."""

from __future__ import annotations

import threading
import time

import pytest
import torch.distributed as dist

from bigan.distributed import heartbeat
from bigan.distributed.heartbeat import (
    Heartbeat,
    Member,
    Report,
    Watch,
    describe,
    is_communication_error,
)
from bigan.distributed.world import REPORTED_ELSEWHERE, World

MEMBERS = [Member(f"n{rank // 4}", 70 + rank, "") for rank in range(16)]


def watch(*looks: tuple[list[str], float]) -> Watch:
    found = Watch([1, 2], beat_seconds=1.0)
    for values, elapsed in looks:
        found.note(values, elapsed)
    return found


def test_rank_whose_counter_does_not_change_is_silent() -> None:
    found = watch((["1", "1"], 1), (["2", "1"], 1), (["3", "1"], 1))
    assert not found.report(), "two beats are below the limit"
    found.note(["4", "1"], 1)
    assert found.report() == Report(silent={2: 3.0})
    found.note(["4", "2"], 1)
    assert not found.report()


def test_time_in_which_the_reader_was_suspended_is_not_counted() -> None:
    """A suspended machine, or a process after SIGSTOP and SIGCONT."""
    assert not watch((["1", "1"], 1), (["1", "1"], 3600)).report()
    found = watch((["1", "1"], 1), (["1", "1"], 3600), (["1", "1"], 1))
    assert found.report().silent == {1: 3.0, 2: 3.0}


def test_rank_that_exits_in_order_is_not_lost() -> None:
    found = watch((["bye", "left"], 1), (["bye", "left"], 100), (["bye", "left"], 100))
    assert not found.report()
    assert found.all_ended()
    found = watch((["failed: no memory", "7"], 1))
    assert found.report() == Report(failed={1: "failed: no memory"})
    assert not found.all_ended()
    assert found.all_ended(but=[2]), "a lost rank does not exit"


def test_report_is_serialised_without_loss() -> None:
    report = Report({3: 61.5}, {12: "failed: no memory"}, over=True)
    assert Report.parse(report.dump()) == report
    assert Report.parse(b"") == Report()
    assert report.merged(Report({0: 3.0})) == Report({0: 3.0, 3: 61.5}, report.failed, over=True)


@pytest.mark.parametrize(
    ("report", "line"),
    [
        (Report({3: 60.2}), "rank 3 (host n0, pid 73): no heartbeat for 60 s"),
        (
            Report({5: 60, 6: 60}, {1: "failed: no memory"}),
            "rank 1 (host n0, pid 71): failed: no memory; "
            "ranks 5, 6 (host n1): no heartbeat for 60 s",
        ),
        (Report(), ""),
    ],
)
def test_one_line_names_the_lost_ranks(report: Report, line: str) -> None:
    assert describe(report, MEMBERS) == line


def test_a_thousand_lost_ranks_are_one_line() -> None:
    members = [Member(f"n{rank // 16}", rank, "") for rank in range(1024)]
    line = describe(Report(dict.fromkeys(range(1, 1024), 60.0)), members)
    assert line.startswith("ranks 1, 2, 3, 4, 5, 6, 7, 8 and 7 more (host n0): ")
    assert line.endswith("; and 56 more")
    assert len(line) < 800


def test_rank_0_prints_or_else_one_rank_of_each_host() -> None:
    assert heartbeat.reporting_ranks(Report({3: 60}), MEMBERS) == {0}
    assert heartbeat.reporting_ranks(Report({0: 60, 4: 60}), MEMBERS) == {1, 5, 8, 12}


def test_communication_errors_are_distinguished_from_bugs() -> None:
    for text in (
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [n1]:5",
        "NCCL error: remote process exited or there was a network error",
        "Timed out waiting 20000ms for recv operation to complete",
    ):
        assert is_communication_error(RuntimeError(text))
    assert is_communication_error(dist.DistBackendError("anything"))
    assert not is_communication_error(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_communication_error(ValueError("gloo"))


def test_world_size_1_needs_no_heartbeat() -> None:
    before = threading.active_count()
    with Heartbeat(World()) as beat:
        assert threading.active_count() == before
        assert beat.explain(RuntimeError("first\nsecond")) == "first"


class Exited(BaseException):
    """Raised in place of exiting the process."""


def members_of(monkeypatch: pytest.MonkeyPatch, beats: int) -> dist.Store:
    """The store of two ranks; rank 1, on host n1, is a thread that sends `beats` heartbeats."""
    store = dist.HashStore()
    other = Member("n1", 77, "")

    def gather(_: World, own: Member) -> list[Member]:
        def beat() -> None:
            for number in range(beats):
                dist.PrefixStore(own.token, store).set("1", str(number))
                time.sleep(0.05)

        threading.Thread(target=beat, daemon=True).start()
        return [own, other]

    monkeypatch.setattr(heartbeat, "gather", gather)
    monkeypatch.setattr(heartbeat, "on_all_ranks", lambda _, work: work())
    return store


def test_silent_rank_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    store = members_of(monkeypatch, beats=3)
    said: list[str] = []
    ended = threading.Event()

    def exit_process(code: int, cleanup: object) -> None:
        cleanup()  # type: ignore[operator]
        said.append(f"exit {code}")
        ended.set()
        raise Exited

    monkeypatch.setattr(heartbeat, "exit_process", exit_process)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    beat = Heartbeat(World(0, 2), 1.0, said.append, connect=lambda _: store)
    beat.__enter__()
    assert ended.wait(10)
    assert len(said) == 2
    assert said[0].startswith("rank 1 (host n1, pid 77): no heartbeat for 1 s; ")
    assert said[0].endswith(heartbeat.RESUME_HINT)
    assert said[1] == "exit 1"
    beat._closed.set()


def test_explain_waits_until_the_lost_rank_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    store = members_of(monkeypatch, beats=3)
    with Heartbeat(World(0, 2), 3.0, connect=lambda _: store) as beat:
        error = beat.lost_rank_error(RuntimeError("Connection closed by peer"))
    assert str(error).startswith("rank 1 (host n1, pid 77): no heartbeat for 1 s; ")
    assert REPORTED_ELSEWHERE not in getattr(error, "__notes__", [])


def test_no_rank_is_named_while_all_send_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    store = members_of(monkeypatch, beats=60)
    with Heartbeat(World(0, 2), 1.0, connect=lambda _: store) as beat:
        line = beat.explain(RuntimeError("Connection closed by peer"))
        assert "no rank is lost (Connection closed by peer)" in line
        beat._closed.set()
        beat._gone = True  # otherwise the exit waits for rank 1


def test_report_is_withdrawn_when_a_rank_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    store = members_of(monkeypatch, beats=1)
    with Heartbeat(World(0, 2), 2.0, connect=lambda _: store) as beat:

        def published() -> Report:
            return Report.parse(beat._store.get("report"))

        deadline = time.monotonic() + 5
        while not published() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert published().silent.keys() == {1}
        beat._store.set("1", "again")
        while published() and time.monotonic() < deadline:
            time.sleep(0.02)
            beat._store.set("1", str(time.monotonic()))
        assert not published()
        beat._store.set("1", "bye")
