"""`bigan cancel`: what is stopped, what is cancelled, and what is left alone."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from cluster.fake_slurm import FakeSlurm, age, hold_lock, line, make_run, submission

from bigan.cli.main import main

STARTED = "started train 7 0 n1"
LONG_AGO = {"2026-": "2025-"}  # the start of a job, before the files of its run were written
TO_COME = {"2026-": "2100-"}


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return FakeSlurm(tmp_path / "slurm", monkeypatch)


def chain(path: Path) -> list[dict[str, object]]:
    links = [submission(path, str(6 + link), link=link, links=3) for link in (1, 2, 3)]
    return [*links, submission(path, "10", "evaluate")]


def test_running_job_saves_and_waiting_jobs_are_cancelled(
    fake: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", jobs=chain(tmp_path / "run"), events=[STARTED])
    (run / "STOP").write_text("SLURM job 7: signal USR1\n")  # after which it would be requeued
    fake.set(
        line("7", "running", run, **LONG_AGO),
        line("8", "dependency", run),
        line("9", "dependency", run),
        line("10", "running", run, "evaluate", **LONG_AGO),
    )
    for _ in range(2):  # again: the same
        assert main(["cancel", str(run)]) == 0
        assert (run / "STOP").read_text() == ""
        printed = capsys.readouterr().out
        assert all(f"job {job} " in printed for job in (7, 8, 9, 10))
        assert "bigan submit" in printed
    assert set(fake.calls) == {"scancel --state=PENDING 8", "scancel --state=PENDING 9"}


def test_now_cancels_running_jobs_without_a_requeue(fake: FakeSlurm, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", jobs=chain(tmp_path / "run"), events=[STARTED])
    fake.set(
        line("7", "running", run, **LONG_AGO), line("10", "running", run, "evaluate", **LONG_AGO)
    )
    assert main(["cancel", str(run), "--now"]) == 0
    assert (run / "STOP").read_text() == ""
    assert fake.calls == [
        "scontrol update JobId=7 Requeue=0",
        "scancel 7",
        "scontrol update JobId=10 Requeue=0",
        "scancel 10",
    ]


def test_job_that_has_nothing_to_save_is_cancelled(
    fake: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its trainer still starts, and would delete STOP."""
    path = tmp_path / "run"
    run = make_run(path, jobs=[submission(path, "7")], events=[STARTED])
    fake.set(line("7", "running", run, **TO_COME))
    assert main(["cancel", str(run)]) == 0
    assert fake.calls == ["scontrol update JobId=7 Requeue=0", "scancel 7"]
    assert "saves" not in capsys.readouterr().out
    path = tmp_path / "new"
    run = make_run(path, jobs=[submission(path, "8")], begun=False)
    fake.set(line("8", "running", run))
    assert main(["cancel", str(run)]) == 0
    assert fake.calls[-1] == "scancel 8"
    assert not (run / "STOP").exists(), "a folder without config.yaml would not be a new run"


def test_job_that_starts_meanwhile_is_treated_as_running(fake: FakeSlurm, tmp_path: Path) -> None:
    path = tmp_path / "run"
    run = make_run(path, jobs=[submission(path, "7")], events=[STARTED])
    fake.set(line("7", "begin", run))
    running = tmp_path / "running"
    running.write_text(line("7", "running", run, **TO_COME))
    # The first answer is that it waits, all later ones that it runs.
    fake.replace(
        f"#!/bin/sh\n/bin/cat {fake.folder}/queue\n/bin/mv {running} {fake.folder}/queue "
        "2>/dev/null\nexit 0\n"
    )
    assert main(["cancel", str(run)]) == 0
    assert fake.calls == [
        "scancel --state=PENDING 7",
        "scontrol update JobId=7 Requeue=0",
        "scancel 7",
    ]


def test_evaluator_without_training_is_cancelled(fake: FakeSlurm, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", jobs=chain(tmp_path / "run"), events=[STARTED], done=True)
    fake.set(line("10", "running", run, "evaluate"))
    assert main(["cancel", str(run)]) == 0
    assert fake.calls[-1] == "scancel 10"
    assert not (run / "STOP").exists()


def test_job_of_another_run_is_never_cancelled(
    fake: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", jobs=chain(tmp_path / "run"), events=[STARTED])
    other = tmp_path / "other"
    fake.set(line("7", "running", other), line("8", "begin", other), line("99", "begin", run))
    assert main(["cancel", str(run), "--now"]) == 0
    assert fake.calls == []
    assert not (run / "STOP").exists()
    assert "nothing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("events", "lock", "code", "stop"),
    [
        ([STARTED], False, 1, True),  # it may train, and links may wait
        ([STARTED], True, 1, True),
        ([STARTED, "failed train 7 0"], False, 0, False),
        ([], True, 0, True),  # without SLURM
        ([], False, 0, False),
    ],
)
def test_slurm_away(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    events: list[str],
    lock: bool,
    code: int,
    stop: bool,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    run = make_run(tmp_path / "run", events=events)
    if lock:
        hold_lock(run)
    assert main(["cancel", str(run)]) == code
    assert (run / "STOP").exists() == stop
    assert ("squeue" in capsys.readouterr().out) == bool(events)


def test_local_training_is_stopped(
    fake: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    assert main(["cancel", str(run)]) == 0
    assert "nothing" in capsys.readouterr().out
    assert not (run / "STOP").exists()
    hold_lock(run)
    assert main(["cancel", str(run)]) == 0
    assert (run / "STOP").read_text() == ""
    assert "bigan train" in capsys.readouterr().out
    assert main(["cancel", str(tmp_path / "nowhere")]) == 2


def test_all_elements_of_a_sweep(
    fake: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = tmp_path / "sweep"
    make_run(sweep, jobs=[submission(sweep, "7", "sweep")], begun=False)
    (sweep / "sweep.yaml").write_text("{}")
    trains = make_run(sweep / "000", events=["started trial 7_0 0 n1"])
    starts = make_run(sweep / "001", events=["started trial 7_1 0 n1"], begun=False)
    pruned = make_run(sweep / "002", events=["started trial 7_2 0 n1"])
    (pruned / "STOP").write_text("pruned\n")
    fake.set(
        line("7_0", "running", sweep, "sweep", **LONG_AGO),
        line("7_1", "running", sweep, "sweep"),
        line("7_2", "running", sweep, "sweep", **LONG_AGO),
        *(line(f"7_{number}", "element", sweep, "sweep") for number in range(3, 1500)),
    )
    assert main(["cancel", str(sweep)]) == 0
    assert "1497 elements" in capsys.readouterr().out
    assert (trains / "STOP").read_text() == ""
    assert (pruned / "STOP").read_text() == "pruned\n"
    assert not (starts / "STOP").exists()
    assert not (sweep / "STOP").exists()
    *waiting, update, cancelled = fake.calls
    assert (update, cancelled) == ("scontrol update JobId=7_1 Requeue=0", "scancel 7_1")
    assert len(waiting) < 5, "a command for many elements"
    ids = [job for call in waiting for job in call.removeprefix("scancel --state=PENDING").split()]
    assert ids == [f"7_{number}" for number in range(3, 1500)]


def test_failed_scancel_is_reported(
    fake: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    run = make_run(path, jobs=[submission(path, "7")])
    fake.set(line("7", "begin", run))
    command = fake.folder / "bin" / "scancel"
    for text, code in (("Access/permission denied", 1), ("Invalid job id specified", 0)):
        command.write_text(f"#!/bin/sh\necho 'scancel: error: {text}' >&2\nexit 1\n")
        assert main(["cancel", str(run)]) == code
        assert ("permission" in capsys.readouterr().out) == bool(code)


def test_age_of_files_decides_whether_the_trainer_has_begun(
    fake: FakeSlurm, tmp_path: Path
) -> None:
    """After a requeue, the files of the attempt before do not count."""
    path = tmp_path / "run"
    run = make_run(path, jobs=[submission(path, "7")], events=[STARTED])
    now = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime())
    fake.set(line("7", "running", run, **{"2026-11-28T20:55:35": now}))
    assert main(["cancel", str(run)]) == 0
    assert fake.calls[-1] == "scancel 7"
    fake.set(line("7", "running", run, **LONG_AGO))
    num_calls = len(fake.calls)
    assert main(["cancel", str(run)]) == 0
    assert len(fake.calls) == num_calls
    age(run / "environment.json", 1)  # STOP has perhaps not been deleted yet
    assert main(["cancel", str(run)]) == 0
    assert fake.calls[-1] == "scancel 7"
