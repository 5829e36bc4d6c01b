"""`bigan status`: the queue of SLURM and what run folders show."""

from __future__ import annotations

import json
import math
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cluster.fake_slurm import (
    FORGOTTEN,
    NO_CONTROLLER,
    RECORDED,
    FakeSlurm,
    age,
    hold_lock,
    line,
    make_run,
    submission,
)
from commands import environment

from bigan.cli.main import main
from bigan.cluster import queue
from bigan.cluster.run_status import Status
from bigan.cluster.status import survey
from bigan.cluster.status_text import as_json, as_lines, duration
from bigan.cluster.sweep_folder import State, SweepFolder, Trial
from bigan.cluster.sweep_status import SweepStatus

TICK = {
    "images_seen": 12800,
    "train/images_per_second": 100.0,
    "train/attempt": 2.0,
    "train/generator/loss": 0.5,
    "train/discriminator/loss": 1.25,
}
MEASURED = {"images_seen": 8000, "eval/fd/digits8-cnn-v1": 44.75}
STARTED = "started train 7 0 n1"


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return FakeSlurm(tmp_path / "slurm", monkeypatch)


def status(run: Path) -> Status:
    found = survey([run]).found[0]
    assert isinstance(found, Status)
    return found


# (line of the queue, events, state, part of the detail)
CASES = [
    ("resources", [], "queued", "free nodes"),
    ("priority", [], "queued", "2100-01-01"),
    ("dependency", [], "queued", "another job (1)"),
    ("never", [], "queued", "never"),
    ("begin", [], "queued", "start time"),
    ("held", [], "queued", "scontrol release"),
    ("too large", [], "queued", "more nodes"),
    ("running", [], "running", "n[1-2]"),
    ("running", [STARTED], "running", "n[1-2]"),
    ("suspended", [STARTED], "running", "suspended"),
    ("completing", [STARTED], "running", "ending"),
    ("begin", [STARTED, "requeued train 7 0 signal USR1"], "requeued", "start time"),
    ("begin", [STARTED], "requeued", "start time"),  # by SLURM itself, after a lost node
    ("requeue hold", [STARTED], "requeued", "scontrol release"),
    ("failed", [STARTED, "failed train 7 0 a.yaml: batch = 30"], "failed", "a.yaml: batch = 30"),
    ("failed", [STARTED], "failed", "failed"),
    ("failed", [], "failed", "setup"),
    ("cancelled", [STARTED], "stopped", "cancelled"),
    ("cancelled", [], "stopped", "cancelled"),
    ("completed", [STARTED, "stopped train 7 0 STOP"], "stopped", "STOP"),
    (None, [STARTED, "failed train 7 0 non-finite"], "failed", "non-finite"),
    (None, [STARTED, "stopped train 7 0"], "stopped", ""),
    (None, [STARTED, "completed train 7 0"], "idle", "DONE"),
    (None, [STARTED, "limit train 7 0 signal USR1"], "idle", "signal USR1"),
    ("completed", [STARTED, "limit train 7 0 signal USR1"], "idle", "signal USR1"),
    ("failed", [STARTED, "limit train 7 0 raise --signal"], "failed", "raise --signal"),
    (None, [STARTED], "failed", "without a record"),
    (None, [STARTED, "requeued train 7 0 signal USR1"], "failed", "requeued"),
    (None, [], "unknown", "does not know"),
]


@pytest.mark.parametrize(("queued", "events", "state", "detail"), CASES)
def test_state_of_a_submitted_run(
    fake: FakeSlurm,
    tmp_path: Path,
    queued: str | None,
    events: list[str],
    state: str,
    detail: str,
) -> None:
    run = make_run(tmp_path / "run", jobs=[submission(tmp_path / "run", "7")], events=events)
    fake.set(*([line("7", queued, run)] if queued else []))
    found = status(run)
    assert (found.state, found.answered) == (state, True)
    assert detail in found.detail
    assert fake.num_queries == 1


@pytest.mark.parametrize(
    ("word", "state"),
    [
        ("CONFIGURING", "running"),
        ("SIGNALING", "running"),
        ("REQUEUED", "requeued"),
        ("REQUEUE_HOLD", "requeued"),
        ("SPECIAL_EXIT", "requeued"),
        ("PREEMPTED", "failed"),
        ("NODE_FAIL", "failed"),
        ("TIMEOUT", "failed"),
        ("OUT_OF_MEMORY", "failed"),
        ("DEADLINE", "failed"),
        ("BOOT_FAIL", "failed"),
        ("COMPLETED", "idle"),
        ("A_NEW_WORD", "failed"),
    ],
)
def test_words_of_slurm(fake: FakeSlurm, tmp_path: Path, word: str, state: str) -> None:
    run = make_run(tmp_path / "run", jobs=[submission(tmp_path / "run", "7")], events=[STARTED])
    fake.set(line("7", "running", run, RUNNING=word))
    assert status(run).state == state
    text = "\n".join(as_lines(survey([run])))
    assert state in text


def test_unknown_reason_is_shown_as_it_is(fake: FakeSlurm, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", jobs=[submission(tmp_path / "run", "7")])
    for reason in ("ANewReason", "QOSMaxJobsPerUserLimit", "AssocGrpGRES"):
        fake.set(line("7", "resources", run, Resources=reason))
        assert reason in status(run).detail


def test_one_query_for_all_runs_with_forgotten_jobs(fake: FakeSlurm, tmp_path: Path) -> None:
    """Some versions refuse a list of jobs with an unknown one."""
    runs = [
        make_run(
            tmp_path / job,
            jobs=[submission(tmp_path / job, job)],
            events=[f"started train {job} 0"],
        )
        for job in ("7", "8", "9")
    ]
    fake.set(line("7", "running", runs[0]), line("9", "failed", runs[2]), line("99", "running"))
    states = ["running", "failed", "failed"]
    assert [found.state for found in survey(runs).found] == states
    assert fake.num_queries == 1
    fake.fail(FORGOTTEN)
    assert [found.state for found in survey(runs).found] == states
    assert fake.num_queries == 3
    found = status(runs[1])  # a single one: the answer is known
    assert (found.state, found.answered, fake.num_queries) == ("failed", True, 4)


@pytest.mark.parametrize("how", ["missing", "no controller", "silent"])
def test_slurm_away(
    fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    if how == "missing":
        monkeypatch.setenv("PATH", str(tmp_path))
    elif how == "no controller":
        fake.fail(NO_CONTROLLER)
    else:
        monkeypatch.setattr(queue, "QUERY_SECONDS", 0.2)
        fake.replace("#!/bin/sh\nexec /bin/sleep 30\n")

    def run(name: str, *events: str, **files: Any) -> Path:
        path = tmp_path / name
        return make_run(path, jobs=[submission(path, "7")], events=events, **files)

    cases = {
        "started": (run("a", STARTED), "unknown"),
        "requeued": (run("b", STARTED, "requeued train 7 0 signal USR1"), "requeued"),
        "failed": (run("c", STARTED, "failed train 7 0 reason"), "failed"),
        "stopped": (run("d", STARTED, "stopped train 7 0"), "stopped"),
        "complete": (run("e", STARTED, "completed train 7 0", done=True), "complete"),
        "submitted": (run("f"), "unknown"),
        "trains": (run("g", STARTED), "running"),
    }
    trains = cases["trains"][0]
    hold_lock(trains, host="n1", boot="another", attempts={"SLURM job 7": 0})
    begun = time.monotonic()
    found = survey([path for path, _ in cases.values()])
    assert time.monotonic() - begun < 4
    assert found.away is not None
    assert "squeue" in found.away
    assert [each.state for each in found.found] == [state for _, state in cases.values()]
    lines = as_lines(found)
    assert found.away in lines[0]
    assert len(lines) == 2 + len(cases)
    assert as_json(found)["slurm"] == found.away


@pytest.mark.parametrize(
    ("script", "submitted", "restarts", "ours"),
    [
        ("own", "20:55:34", 0, True),
        ("other", "20:55:34", 0, False),  # the same id on another cluster
        ("hidden", "20:55:34", 0, True),
        ("hidden", "22:55:34", 1, True),  # requeued
        ("hidden", "22:55:34", 0, False),
    ],
)
def test_job_of_another_cluster_with_the_same_id(
    fake: FakeSlurm, tmp_path: Path, script: str, submitted: str, restarts: int, ours: bool
) -> None:
    run = make_run(tmp_path / "run", jobs=[submission(tmp_path / "run", "7")], events=[STARTED])
    shown = {"own": run, "other": tmp_path / "elsewhere", "hidden": None}[script]
    fake.set(line("7", "running", shown, **{"20:55:34": submitted}))
    fake.details(f"JobId=7 JobName=x\n   Requeue=1 Restarts={restarts} BatchFlag=1\n")
    assert status(run).state == ("running" if ours else "failed")


def test_job_of_a_plain_script(fake: FakeSlurm, tmp_path: Path) -> None:
    """Without jobs.jsonl, attempts.tsv names the job; a much younger one is another."""
    run = make_run(tmp_path / "run", events=[STARTED])
    fake.set(line("7", "running", tmp_path / "scripts"))
    assert status(run).state == "running"
    fake.set(line("7", "running", tmp_path / "scripts", **{"2026-11": "2027-11"}))
    fake.details("JobId=7\n   Restarts=3\n")
    assert status(run).state == "failed"


def test_moved_run_is_still_the_one_of_its_job(fake: FakeSlurm, tmp_path: Path) -> None:
    old = tmp_path / "old"
    run = make_run(tmp_path / "new", jobs=[submission(old, "7")], events=[STARTED])
    fake.set(line("7", "running", old))
    assert status(run).state == "running"


def test_training_without_slurm(fake: FakeSlurm, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ticks=[TICK], checkpoint=8000)
    assert status(run).state == "idle"
    hold_lock(run)
    assert status(run).state == "local"
    assert str(os.getpid()) in status(run).detail
    hold_lock(run, host="other", boot="another")
    assert status(run).state == "local"
    assert "other" in status(run).detail
    age(run / "LOCK", 600)  # no heartbeat for ten minutes
    assert status(run).state == "idle"
    hold_lock(run, born="1")  # a process of this machine that has ended
    assert status(run).state == "idle"
    assert fake.num_queries == 0, "no job is known"


def test_local_training_after_a_failed_job(fake: FakeSlurm, tmp_path: Path) -> None:
    events = [STARTED, "failed train 7 0 reason"]
    run = make_run(tmp_path / "run", events=events, ticks=[TICK], checkpoint=8000)
    assert status(run).state == "idle", "it trained after the job had failed"
    hold_lock(run)
    assert status(run).state == "local"


def test_progress_of_a_running_job(
    fake: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    jobs = [submission(path, "7"), submission(path, "8", "evaluate")]
    events = [STARTED, "requeued train 7 0 signal USR1", "started train 7 1 n1"]
    run = make_run(path, jobs=jobs, events=events, ticks=[TICK, MEASURED], checkpoint=8000)
    fake.set(line("7", "running", run), line("8", "dependency", run, "evaluate"))
    assert main(["status", "--json", str(run)]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["slurm"] is None
    found = content["runs"][0]
    assert found["state"] == "running"
    assert (found["images_seen"], found["total_images"], found["checkpoint"]) == (
        12800,
        48000,
        8000,
    )
    assert found["images_per_second"] == 100
    assert found["seconds_left"] == (48000 - 12800) / 100
    assert found["limit_seconds_left"] == 86400 + 9 * 3600 + 57 * 60
    assert found["attempts"] == 2
    assert found["train"]["generator/loss"] == 0.5
    assert (found["eval"], found["evaluated"]) == ({"fd/digits8-cnn-v1": 44.75}, 8000)
    assert found["evaluator"].startswith("queued")
    assert [job["slurm"] for job in found["jobs"]] == ["RUNNING", "PENDING"]
    assert found["jobs"][0]["state"] == "running on n[1-2]"
    assert main(["status", str(run)]) == 0
    text = capsys.readouterr().out
    for fact in ("n[1-2]", "12,800 of 48,000", "100 images/s", "5 min", "1 d 9 h", "0.5", "44.75"):
        assert fact in text


def test_newest_measured_snapshot_is_shown(fake: FakeSlurm, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ticks=[TICK, MEASURED])
    (run / "evaluation").mkdir()
    (run / "evaluation" / "16000.json").write_text('{"metrics": {"fd/x": 3.5}}')
    (run / "evaluation" / "24000.json").write_text('{"metr')  # half written
    assert status(run).facts.evaluation == {"fd/x": 3.5}
    assert status(run).facts.evaluated == 16000


def test_non_finite_values_are_valid_json(
    fake: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", ticks=[TICK | {"train/generator/loss": "NaN"}])
    assert math.isnan(status(run).facts.train["generator/loss"])
    assert main(["status", "--json", str(run)]) == 0
    loss = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert loss["runs"][0]["train"]["generator/loss"] == "NaN"


def test_last_error_is_that_of_the_rank_that_caused_the_others(
    fake: FakeSlurm, tmp_path: Path
) -> None:
    events = [STARTED, "failed train 7 0 an older reason"]
    run = make_run(tmp_path / "run", events=events)
    assert (status(run).error or {})["text"] == "an older reason"
    now = time.time_ns()
    for job, rank, kind, message, later in (
        ("7-0", 1, "run", "of an older attempt", -1000),
        ("7-1", 0, "lost", "rank 3 was lost", 0),
        ("7-1", 3, "bug", "KeyError: 'x'", 5),
        ("7-1", 2, "lost", "rank 3 was lost", 10),
        ("7-1", 4, "", "", 20),  # half written
    ):
        folder = run / "slurm" / "logs" / job
        folder.mkdir(exist_ok=True)
        path = folder / f"failure-{now + later * 10**9}-rank-{rank}.txt"
        path.write_text(f"{kind}\n{message}\n")
    folder = run / "slurm" / "logs" / "7-1" / "evaluate"  # of the evaluator of a trial
    folder.mkdir()
    (folder / f"failure-{now}-rank-0.txt").write_text("lost\nno answer\n")
    error = status(run).error or {}
    assert error["job"] == "7-1"
    assert "rank 3" in error["text"]
    assert "KeyError" in error["text"]


def test_links_of_a_chain(fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run"
    jobs = [submission(path, str(6 + link), link=link, links=4) for link in (1, 2, 3, 4)]
    events = [STARTED, "limit train 7 0 signal USR1", "started train 8 0 n1"]
    run = make_run(path, jobs=jobs, events=events)
    waiting = [line(job, "dependency", run) for job in ("9", "10")]
    fake.set(line("7", "completed", run), line("8", "running", run), *waiting)
    assert (status(run).state, status(run).links_left) == ("running", 2)
    fake.set(line("8", "completed", run), *waiting)  # between two links
    assert (status(run).state, status(run).links_left) == ("requeued", 2)
    monkeypatch.setenv("PATH", "/nowhere")
    assert status(run).links_left == 2


def test_stopped_chain_has_the_state_of_the_link_that_ran(
    fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    jobs = [submission(path, str(6 + link), link=link, links=2) for link in (1, 2)]
    run = make_run(path, jobs=jobs, events=[STARTED, "stopped train 7 0 STOP"])
    fake.set(line("7", "completed", run), line("8", "cancelled", run))
    assert (status(run).state, status(run).detail) == ("stopped", "job 7: STOP")
    monkeypatch.setenv("PATH", "/nowhere")
    assert status(run).state == "stopped"


def test_complete_while_its_job_ends(fake: FakeSlurm, tmp_path: Path) -> None:
    path = tmp_path / "run"
    run = make_run(path, jobs=[submission(path, "7")], events=[STARTED], done=True)
    fake.set(line("7", "running", run))
    assert status(run).state == "complete"


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00{", b'{"job": 7}\n[1]\nnull\n', None])
@pytest.mark.parametrize(
    "name",
    [
        *("slurm/jobs.jsonl", "slurm/attempts.tsv", "config.yaml", "metrics.jsonl", "LOCK", "STOP"),
        *("checkpoints", "evaluation", "slurm/logs", "DONE", "environment.json"),
    ],
)
def test_damaged_files_are_no_error(
    fake: FakeSlurm, tmp_path: Path, name: str, content: bytes | None
) -> None:
    """Empty, not text, of another form, or a folder in place of a file and a file of a folder."""
    path = tmp_path / "run"
    run = make_run(path, jobs=[submission(path, "7")], events=[STARTED], ticks=[TICK])
    hold_lock(run)
    for folder in (run / "slurm" / "logs", run / name):
        if folder.is_dir():
            folder.rmdir()
    (run / name).unlink(missing_ok=True)
    if content is not None:
        (run / name).write_bytes(content)
    else:
        (run / name).mkdir()
    fake.set(line("7", "running", run))
    found = survey([run])
    assert as_lines(found)
    assert json.dumps(as_json(found))


def test_config_of_another_form(fake: FakeSlurm, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ticks=[TICK])
    for text in ("train: 3\n", "[1, 2]\n", "train: {total_images: many}\n", "a: [\n", "*x\n"):
        (run / "config.yaml").write_text(text)
        assert status(run).facts.total_images is None
    (run / "config.yaml").unlink()
    submitted = run / "slurm" / "002" / "config.yaml"
    submitted.parent.mkdir()
    submitted.write_text("train: {total_images: 64}\n")
    assert status(run).facts.total_images == 64, "that of the submission"


def test_attempts_with_damaged_lines(fake: FakeSlurm, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", events=[STARTED, "failed train 7 0 reason"])
    path = run / "slurm" / "attempts.tsv"
    path.write_text(f"a\tb\n\n\t\t\t\t\t\n{path.read_text()}2026-11-28T20:59:00Z\tstart")
    assert (status(run).state, status(run).num_attempts) == ("failed", 1)


def test_runs_are_found_below_runs(
    fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["status"]) == 2
    assert "runs/" in capsys.readouterr().err
    (tmp_path / "runs").mkdir()
    assert main(["status"]) == 2
    make_run(tmp_path / "runs" / "one", done=True)
    path = tmp_path / "runs" / "group" / "two"
    make_run(path, jobs=[submission(path, "7")], begun=False)
    (tmp_path / "runs" / "mlflow").mkdir()
    capsys.readouterr()
    assert main(["status", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["runs"]
    assert [run["run"] for run in found] == ["runs/group/two", "runs/one"]
    assert main(["status", "runs/onne"]) == 2
    assert "one" in capsys.readouterr().err
    assert main(["status", "runs/one", "runs"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3, "the header, and each run once"


def test_runs_that_only_another_user_may_read_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, private, half = (make_run(tmp_path / name) for name in ("a", "b", "c"))
    closed = (private, half / "slurm")
    for folder in closed:
        folder.chmod(0)
    try:
        assert main(["status", str(tmp_path)]) == 0
        out = capsys.readouterr().out
        assert str(run) in out
        assert str(half) in out
        if os.geteuid() != 0:
            assert str(private) not in out
            assert main(["status", str(private)]) == 2
            assert "permission" in capsys.readouterr().err
    finally:
        for folder in closed:
            folder.chmod(0o755)


def test_sweep_counts_trials_by_state(
    fake: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = tmp_path / "sweep"
    make_run(sweep, jobs=[submission(sweep, "7", "sweep")], begun=False)
    text = (
        "method: {name: random, trials: 8}\nparameters: {train.seed: [1, 2]}\n"
        "metric: eval/fd/x\ngoal: minimize\n"
    )
    folder = SweepFolder(sweep)
    folder.sweep_file.write_text(text)
    values: list[tuple[State, float | None]] = [
        ("complete", 3.5),
        ("complete", 2.5),
        ("pruned", 1.0),
        ("running", None),
        ("running", None),
    ]
    for index, (state, value) in enumerate(values):
        folder.write(Trial(index, {"train.seed": 1}, state, value))
        make_run(sweep / f"{index:03d}", events=[f"started trial 7_{index} 0 n1"])
    fake.set(
        line("7_3", "running", sweep, "sweep"),
        line("7_4", "begin", sweep, "sweep"),
        line("7_5", "element", sweep, "sweep"),
        line("7_6", "element", tmp_path / "other", "sweep"),
    )
    found = survey([sweep]).found[0]
    assert isinstance(found, SweepStatus)
    assert found.counts == {
        "complete": 2,
        "pruned": 1,
        "running": 1,
        "requeued": 1,
        "queued": 1,
        "not started": 2,
    }
    assert found.best == ("001", 2.5)
    assert fake.num_queries == 1
    assert main(["status", str(sweep), str(sweep / "003")]) == 0
    assert "2.5" in capsys.readouterr().out
    assert status(sweep / "003").state == "running"
    failed = Trial(5, {}, state="failed", error="out of memory", ended=time.time())
    folder.write(failed)  # without a job, as of `bigan sweep`
    assert any("005: out of memory" in text for text in as_lines(survey([sweep])))
    folder.sweep_file.write_text("{")
    (folder.trials / "000.json").write_text("")
    damaged = survey([sweep]).found[0]
    assert isinstance(damaged, SweepStatus)
    assert (damaged.counts["complete"], damaged.best) == (1, None)
    assert as_lines(survey([sweep]))


def test_recorded_output_is_understood() -> None:
    jobs = queue.parse_queue("\n".join(line(str(i), name) for i, name in enumerate(RECORDED)))
    assert len(jobs) == len(RECORDED), "a line break in a job name is no other job"
    assert all(
        job.is_live or job.state in ("FAILED", "CANCELLED", "COMPLETED") for job in jobs.values()
    )
    assert jobs["0"].start == 1795899335
    assert jobs["0"].nodes == "n[1-2]"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("9:57", 597), ("1:02:03", 3723), ("2-01:00:00", 176400), ("UNLIMITED", None), ("", None)],
)
def test_times_left(text: str, seconds: float | None) -> None:
    assert queue.parse_duration(text) == seconds


def test_durations() -> None:
    times = (0, 59, 60, 3725, 86400, 90061)
    assert [duration(t) for t in times] == ["0 s", "59 s", "1 min", "1 h 2 min", "1 d", "1 d 1 h"]


def test_watch_without_a_terminal_prints_blocks(
    fake: FakeSlurm,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = make_run(tmp_path / "run", ticks=[TICK])
    times: list[float] = []

    def sleep(seconds: float) -> None:
        times.append(seconds)
        if len(times) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", sleep)
    assert main(["status", str(run), "--watch", "--interval", "7"]) == 0
    assert times == [7, 7, 7]
    printed = capsys.readouterr().out
    assert printed.count("12,800") == 3
    assert "\x1b" not in printed


def test_watch_on_a_terminal_draws_in_place_and_ends_with_ctrl_c(
    fake: FakeSlurm, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", ticks=[TICK])
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "bigan", "status", str(run), "--watch", "--interval", "0.05"],
        env=environment() | {"TERM": "xterm", "COLUMNS": "80", "LINES": "24"},
        stdin=follower,
        stdout=follower,
        stderr=follower,
    )
    os.close(follower)
    printed = b""
    deadline = time.monotonic() + 30
    while printed.count(b"12,800") < 3:
        assert time.monotonic() < deadline
        printed += os.read(leader, 4096)
    process.send_signal(signal.SIGINT)
    try:
        while block := os.read(leader, 4096):
            printed += block
    except OSError:  # Linux reports the closed end in this way
        pass
    assert process.wait(30) in (0, 130)
    assert printed.startswith(b"\x1b[?1049h")
    assert b"Traceback" not in printed
    assert b"12,800" in printed.rpartition(b"\x1b[?1049l")[2], "the last display remains"
    assert b"\x1b[2J" not in printed, "the screen is never cleared"


def test_text_of_a_log_cannot_control_the_terminal(fake: FakeSlurm, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", events=[STARTED, "failed train 7 0 red \x1b[31m\x07"])
    text = "".join(as_lines(survey([run])))
    assert "red" in text
    assert text.isprintable()


def test_lines_fit_the_terminal(fake: FakeSlurm, tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / name, events=[STARTED, f"failed train 7 0 {'x' * 200}"])
        for name in "ab"
    ]
    assert all(len(text) <= 60 for text in as_lines(survey(runs), 60))


def test_commands_import_nothing_heavy(fake: FakeSlurm, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", events=[STARTED], ticks=[TICK])
    (run / "slurm" / "logs" / "7.log").write_text("a\n")
    code = f"""
import sys
from bigan.cli.main import main
for command in ("status", "logs", "cancel"):
    main([command, {str(run)!r}])
heavy = {{"torch", "numpy", "mlflow", "optuna", "bigan.run_config"}} & sys.modules.keys()
assert not heavy, heavy
"""
    variables = environment() | {"PATH": str(fake.folder / "bin")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
