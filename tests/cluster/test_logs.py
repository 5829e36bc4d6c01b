"""`bigan logs`: the newest log of a run, its last lines and what is appended."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster.fake_slurm import FakeSlurm, age, line, make_run, submission

from bigan.cli.main import main
from bigan.cluster import logs
from bigan.cluster.logs import Choice

STARTED = "started train 7 0 n1"


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return FakeSlurm(tmp_path / "slurm", monkeypatch)


def write(run: Path, name: str, text: str, seconds_ago: float = 0) -> None:
    path = run / "slurm" / "logs" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    age(path, seconds_ago)


def test_log_of_the_newest_training_job(
    fake: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    jobs = [submission(path, "9"), submission(path, "10"), submission(path, "11", "evaluate")]
    run = make_run(path, jobs=jobs, events=["started train 9 0", "started train 10 0"])
    write(run, "9.log", "nine\n")
    write(run, "10.log", "ten\n", seconds_ago=60)
    write(run, "11.log", "eleven\n")
    write(run, "10-0/rank-0.log", "first attempt\n")
    write(run, "10-1/rank-0.log", "rank 0\n", seconds_ago=60)
    write(run, "10-1/rank-3.log", "rank 3\n")
    write(run, "9-2/rank-3.log", "of an older job\n")
    for options, expected in (
        ([], "ten\n"),
        (["--job", "9"], "nine\n"),
        (["--job", "11"], "eleven\n"),
        (["--rank", "0"], "rank 0\n"),
        (["--rank", "3"], "rank 3\n"),
        (["--rank", "3", "--job", "9"], "of an older job\n"),
    ):
        assert main(["logs", str(run), *options]) == 0
        printed = capsys.readouterr()
        assert printed.out == expected
        assert str(run / "slurm" / "logs") in printed.err, "the path"


@pytest.mark.parametrize(
    ("text", "num", "expected"),
    [
        ("a\nb\nc\n", 2, "b\nc\n"),
        ("a\nb\nc", 2, "b\nc"),
        ("a\n", 5, "a\n"),
        ("", 5, ""),
        ("\n\n\n", 2, "\n\n"),
        ("x" * 300_000 + "\nlast\n", 1, "last\n"),
        ("first\n" + "x" * 300_000, 1, "x" * 300_000),
        ("a\n" * 100_000, 70_000, "a\n" * 70_000),
        ("a" + "\u00e9" * 100_000, 1, "a" + "\u00e9" * 100_000),
    ],
)
def test_last_lines(
    fake: FakeSlurm,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    text: str,
    num: int,
    expected: str,
) -> None:
    run = make_run(tmp_path / "run", events=[STARTED])
    write(run, "7.log", text)
    assert main(["logs", str(run), "--lines", str(num)]) == 0
    assert capsys.readouterr().out == expected


def test_log_that_does_not_exist(
    fake: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*arguments: object) -> str:
        assert main(["logs", *map(str, arguments)]) == 2
        text = capsys.readouterr().err
        assert len(text.splitlines()) == 1
        return text

    assert "nowhere" in error(tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    assert "not a run" in error(tmp_path / "other")
    run = make_run(tmp_path / "local")
    assert "no job" in error(run)
    path = tmp_path / "run"
    run = make_run(path, jobs=[submission(path, "7")])
    assert "submitted jobs: 7" in error(run)
    write(run, "7.log", "a\n")
    write(run, "7-0/rank-0.log", "a\n")
    write(run, "7-0/rank-1.log", "a\n")
    assert "jobs with a log: 7" in error(run, "--job", "8")
    assert "0, 1" in error(run, "--rank", "5")
    for wrong in (["--rank", "-1"], ["--rank", "x"], ["--job", "../7"], ["--lines", "0"]):
        with pytest.raises(SystemExit):
            main(["logs", str(run), *wrong])


def test_output_of_a_plain_script_is_found_through_slurm(
    fake: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", events=[STARTED])
    (tmp_path / "slurm-7.out").write_text("output\n")
    fake.set(line("7", "running", tmp_path / "scripts"))
    fake.details(f"JobId=7\n   StdOut={tmp_path}/slurm-7.out\n   Power=\n")
    assert main(["logs", str(run)]) == 0
    assert capsys.readouterr().out == "output\n"


def test_logs_of_a_sweep(
    fake: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = make_run(tmp_path / "sweep", jobs=[submission(tmp_path / "sweep", "7", "sweep")])
    (sweep / "sweep.yaml").write_text("{}")
    trial = make_run(sweep / "003", events=["started trial 7_3 0 n1"])
    write(sweep, "7_3.log", "three\n", seconds_ago=60)
    write(sweep, "7_13.log", "thirteen\n")
    write(trial, "7_3-0/rank-0.log", "rank of three\n")
    for arguments, expected in (
        ([trial], "three\n"),
        ([sweep], "thirteen\n"),
        ([sweep, "--job", "7_3"], "three\n"),
        ([trial, "--rank", "0"], "rank of three\n"),
    ):
        assert main(["logs", *map(str, arguments)]) == 0
        assert capsys.readouterr().out == expected


class Follower:
    """`follow` in a thread, and what it has printed."""

    def __init__(self, choice: Choice, num_lines: int = 100) -> None:
        self.text, self.notes = "", ""
        arguments = (choice, num_lines, self._echo, self._note, 0.01)
        self.thread = threading.Thread(target=logs.follow, args=arguments, daemon=True)
        self.thread.start()

    def _echo(self, text: str) -> None:
        self.text += text

    def _note(self, text: str) -> None:
        self.notes += text

    def wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline, (self.text, self.notes)
            time.sleep(0.005)


def record(run: Path, event: str, job: str = "7", restart: int = 0) -> None:
    with (run / "slurm" / "attempts.tsv").open("a") as file:
        file.write(f"2026-11-28T21:00:00Z\t{event}\ttrain\t{job}\t{restart}\t0\t\n")


def test_follow_from_before_the_start_to_the_end(fake: FakeSlurm, tmp_path: Path) -> None:
    path = tmp_path / "run"
    jobs = [submission(path, "6"), submission(path, "7", script="slurm/002/train.sbatch")]
    run = make_run(path, jobs=jobs)
    write(run, "6.log", "of the submission before\n")
    follower = Follower(Choice(run), num_lines=1)
    follower.wait(lambda: "waiting" in follower.notes)
    log = run / "slurm" / "logs" / "7.log"
    written = tmp_path / "7.log"
    written.write_bytes("a\nb\nh\u00e9".encode()[:-1])  # ends within a character
    written.rename(log)
    follower.wait(lambda: "h" in follower.text)
    with log.open("ab") as file:
        file.write("\u00e9\n".encode()[1:])
    record(run, "started")
    record(run, "requeued")  # the log continues in the same file
    time.sleep(0.2)
    with log.open("a") as file:
        file.write("second attempt\n")
    record(run, "completed", restart=1)
    follower.thread.join(20)
    assert not follower.thread.is_alive()
    assert follower.text == "h\u00e9\nsecond attempt\n"


def test_follow_a_rank_into_the_next_attempt_and_link(fake: FakeSlurm, tmp_path: Path) -> None:
    path = tmp_path / "run"
    jobs = [submission(path, str(6 + link), link=link, links=2) for link in (1, 2)]
    run = make_run(path, jobs=jobs)
    write(run, "7-0/rank-1.log", "zero\n")
    follower = Follower(Choice(run, rank=1))
    follower.wait(lambda: "zero" in follower.text)
    write(run, "7-1/rank-1.log", "one\n")
    follower.wait(lambda: "one" in follower.text)
    record(run, "limit")
    write(run, "8-0/rank-1.log", "two\n")
    follower.wait(lambda: "two" in follower.text)
    record(run, "failed", job="8")
    follower.thread.join(20)
    assert not follower.thread.is_alive()
    assert follower.text == "zero\none\ntwo\n"


def test_follow_a_file_that_is_replaced(fake: FakeSlurm, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", events=[STARTED])
    write(run, "7.log", "a long first content\n")
    follower = Follower(Choice(run))
    follower.wait(lambda: "first" in follower.text)
    write(run, "7.log", "new\n")
    follower.wait(lambda: follower.text.endswith("new\n"))
    record(run, "stopped")
    follower.thread.join(20)
    assert not follower.thread.is_alive()
