"""One process dies, fails, drifts, is slow or has a full disk: what the others and the run do.

All tests run the real command. To inject a fault, this file is the program:
`test_faults.py RANK:WHAT@IMAGES_SEEN[,...] CONFIG ...` is `bigan train CONFIG ...` with that fault
in that rank. Tests with several machines need root: see `namespaces.py`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from commands import ROOT, SMOKE, environment, free_port
from disks import fill, small_disk
from namespaces import Node, machines

from bigan import checkpoint
from bigan.checkpoint import Reader
from bigan.cli.main import main as bigan
from bigan.data.streaming.stream import Batch, ShardStream
from bigan.reporting.metrics_log import read_metrics
from bigan.run.state import Streams, TrainState

pytestmark = pytest.mark.full
PORT = "29412"  # every machine has its own ports
LOST_AFTER_SECONDS = 10
PATIENCE_SECONDS = LOST_AFTER_SECONDS + 10  # until the last survivor has exited
RESUME_HINT = "the same command resumes from the last checkpoint"
SLOW_SECONDS = 0.05  # of each phase: at least doubles the time of a step
VARIABLES = environment() | {
    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}
LENGTHS = ["train.checkpoint_images=200", "train.snapshot_images=1000", "train.tick_images=40"]


# ---- the process with a fault ------------------------------------------------------------------


def inject(what: str, images_seen: int) -> None:
    """Apply a fault to this process, at (or from) a point of its training."""
    original = TrainState.advance
    if what == "starved":
        deliver = ShardStream.__next__

        def delayed(stream: ShardStream) -> Batch:
            time.sleep(SLOW_SECONDS)
            return deliver(stream)

        ShardStream.__next__ = delayed  # type: ignore[method-assign]

    def faulty(state: TrainState, streams: Streams) -> None:
        if what == "slow":
            time.sleep(2 * SLOW_SECONDS)
        if state.progress.images_seen == images_seen:
            once(what, state)
        original(state, streams)

    TrainState.advance = faulty  # type: ignore[method-assign, assignment]


def once(what: str, state: TrainState) -> None:
    if what == "drifted":
        next(state.networks["discriminator"].parameters()).detach().view(-1)[0] += 1e-3
    elif what == "failing":
        raise RuntimeError("an error of its own")
    elif what == "killed" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "full":
        fill(state.config.run_dir)


def main(faults: str, *arguments: str) -> int:
    """`bigan train ARGUMENTS` with the faults of this rank."""
    for fault in faults.split(","):
        rank, what, images_seen = fault.replace("@", ":").split(":")
        if rank == os.environ.get("RANK", "0"):
            inject(what, int(images_seen))
    return bigan(["train", *arguments])


# ---- what starts it ----------------------------------------------------------------------------


def program(faults: str, arguments: Sequence[str]) -> list[str]:
    head = [str(Path(__file__)), faults] if faults else ["-m", "bigan", "train"]
    return [*head, str(SMOKE), *arguments]


def settings(digits: Path, run: Path, total_images: int, *more: str) -> list[str]:
    limits = [f"train.lost_after_seconds={LOST_AFTER_SECONDS}"]
    total = f"train.total_images={total_images}"
    return [f"data.path={digits}", f"run_dir={run}", total, *LENGTHS, *limits, *more]


def train(
    arguments: Sequence[str],
    faults: str = "",
    *,
    num_processes: int = 2,
    options: Sequence[str] = (),
    logs: Path | None = None,
    timeout: float = 120,
) -> tuple[int, list[str]]:
    """One attempt of a run; returns the exit code and the lines on stderr."""
    command = [sys.executable]
    if num_processes > 1:
        command += ["-m", "accelerate.commands.launch", "--config_file"]
        command += [str(ROOT / "launch" / "cpu.yaml"), "--num_processes", str(num_processes)]
        command += ["--main_process_port", str(free_port()), *options]
    process = subprocess.Popen(
        [*command, *program(faults, arguments)],
        env=VARIABLES | ({"BIGAN_LOG_DIR": str(logs)} if logs else {}),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, errors = process.communicate(timeout=timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return process.returncode, errors.splitlines()


def resume_here(arguments: Sequence[str]) -> None:
    """The same command in this process, which has imported everything already."""
    assert bigan(["train", str(SMOKE), *arguments]) == 0


def with_words(lines: Sequence[str], *words: str) -> list[str]:
    return [line for line in lines if all(word in line for word in words)]


def newest(run: Path) -> Path:
    found = checkpoint.latest(run)
    assert found is not None
    reader = Reader(found)
    for name in reader.shapes():
        reader.read(name)  # compares checksums
    return found


def final_weights(run: Path, images_seen: int) -> bytes:
    assert (run / "DONE").read_text() == f"{images_seen}\n"
    return (run / "snapshots" / str(images_seen) / "generator_ema.safetensors").read_bytes()


# ---- several attempts of one run on one machine -------------------------------------------------

TOTAL = 1000
# A new store in each attempt: torch 2.13 would read addresses of ended processes from the old one.
RESTARTS = ["--rdzv_backend", "c10d", "--max_restarts", "1"]
FAULTS = [("1:slow@0,1:drifted@360", []), ("1:failing@520", []), ("1:killed@720", RESTARTS)]


@dataclass(frozen=True)
class Attempt:
    """How one start of the command ended."""

    code: int
    lines: list[str]  # on stderr
    saved: int  # images_seen of the newest checkpoint
    failures: list[tuple[str, str]]  # (rank, kind) of each failure file, in the order of writing


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults") / "run"


@pytest.fixture(scope="module")
def attempts(digits: Path, run: Path) -> list[Attempt]:
    """One run with a fault in each attempt: a launch takes longer than all its steps."""
    found = []
    for number, (faults, options) in enumerate(FAULTS):
        logs = run.parent / f"logs-{number}"
        code, lines = train(settings(digits, run, TOTAL), faults, options=options, logs=logs)
        files = sorted(logs.glob("failure-*-rank-*.txt"))
        failures = [(f.stem.rpartition("-")[2], f.read_text().split("\n")[0]) for f in files]
        found.append(Attempt(code, lines, int(newest(run).name), failures))
    return found


def test_slow_process_is_named(attempts: list[Attempt], run: Path) -> None:
    (line,) = with_words(attempts[0].lines, "is slow: ")
    assert line.startswith("rank 1 is slow: ")
    assert "waiting for images" not in line
    ticks = [row for row in read_metrics(run) if row.get("train/attempt") == 1]
    ratios = [row["rank/step_ms/1"] / row["rank/step_ms/0"] for row in ticks]
    assert statistics.median(ratios) > 1.25
    assert statistics.median(row["rank/slowest"] for row in ticks) == 1


def test_drifted_replica_stops_the_run_before_it_is_saved(attempts: list[Attempt]) -> None:
    assert attempts[0].code == 1
    (line,) = with_words(attempts[0].lines, "bigan: the ranks no longer hold the same weights")
    assert "images_seen = 400: rank 1 (discriminator) differs" in line
    assert attempts[0].saved == 200
    assert sorted(attempts[0].failures) == [("0", "lost"), ("1", "lost")]


def test_process_that_fails_is_named_with_its_reason(attempts: list[Attempt]) -> None:
    assert with_words(attempts[1].lines, "resuming", "images_seen = 200"), "from before the drift"
    assert attempts[1].code == 1
    (line,) = with_words(attempts[1].lines, "bigan: rank")
    assert line.startswith(f"bigan: rank 1 (host {socket.gethostname()}, pid ")
    assert line.endswith(f"failed: RuntimeError: an error of its own; {RESUME_HINT}")
    assert attempts[1].saved == 400
    assert attempts[1].failures == [("1", "bug"), ("0", "lost")]


def test_killed_process_is_restarted_by_the_launcher(attempts: list[Attempt], run: Path) -> None:
    attempt = attempts[2]
    assert attempt.code == 0, attempt.lines[-20:]
    resumed = with_words(attempt.lines, "resuming")
    assert [line.rpartition(" ")[2] for line in resumed] == ["400", "600"]
    assert attempt.saved == TOTAL
    assert attempt.failures == [("0", "lost")]
    assert checkpoint.read_progress(newest(run)).attempt == len(FAULTS) + 1


@pytest.mark.slow  # test_chaos.py compares the same
def test_the_final_weights_equal_those_of_an_uninterrupted_run(
    attempts: list[Attempt], run: Path, digits: Path, tmp_path: Path
) -> None:
    expected = tmp_path / "expected"
    code, lines = train(settings(digits, expected, TOTAL))
    assert code == 0, lines[-20:]
    assert with_words(lines, "bigan:") == []
    assert final_weights(expected, TOTAL) == final_weights(run, TOTAL)


@pytest.mark.slow
def test_drifted_rank_0_is_named_by_majority(digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = settings(digits, run, TOTAL, "train.batch=60", "train.checkpoint_images=180")
    code, lines = train(arguments, "0:drifted@300", num_processes=3)
    assert code == 1
    (line,) = with_words(lines, "no longer hold the same weights")
    assert "images_seen = 360: rank 0 (discriminator) differs" in line
    assert newest(run).name == "180"


@pytest.mark.slow
def test_process_that_waits_for_images_is_named_and_equal_ones_are_not(
    digits: Path, tmp_path: Path
) -> None:
    """Ticks of many steps: delays of a busy machine average out between equal processes."""
    ticks = ["train.tick_images=800", "train.checkpoint_images=8000"]
    code, lines = train(settings(digits, tmp_path / "starved", 3200, *ticks), "1:starved@0")
    assert code == 0, lines[-20:]
    (line,) = with_words(lines, "is slow: ")
    assert line.startswith("rank 1 is slow: ")
    waited = int(line.partition(" ms of them waiting for images")[0].rpartition(" ")[2])
    assert 1000 * SLOW_SECONDS <= waited < 1200 * SLOW_SECONDS
    code, lines = train(settings(digits, tmp_path / "equal", 3200, *ticks))
    assert code == 0, lines[-20:]
    assert with_words(lines, "is slow") == []


# ---- full disk ----------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "16m") as folder:
        yield folder


@pytest.mark.parametrize("num_processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_training_continues_while_the_disk_is_full(
    num_processes: int, digits: Path, disk: Path
) -> None:
    """To the end, which names what is missing; with free space the same command completes it."""
    run, total = disk / "run", 600
    arguments = settings(digits, run, total, f"train.snapshot_images={total}")
    code, lines = train(arguments, "0:full@320", num_processes=num_processes)
    assert code == 1
    assert with_words(lines, "images_seen", f"{total} of {total}"), lines[-20:]
    for seen in (400, 600):
        (line,) = with_words(lines, f"images_seen = {seen} was not saved", "training continues")
        assert "No space left on device" in line
    (verdict,) = with_words(lines, "bigan: training ended")
    assert "2 failed in all; free some space or raise the quota" in verdict
    assert len(with_words(lines, f"snapshot {total} could not be written")) == 1
    assert newest(run).name == "200"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["200"]
    assert not (run / "DONE").exists()
    (run / "other-files").unlink()
    resume_here(arguments)
    assert newest(run).name == (run / "DONE").read_text().strip() == str(total)


# ---- two machines -------------------------------------------------------------------------------


def train_on(nodes: Sequence[Node], arguments: Sequence[str], folder: Path) -> list[Path]:
    """Start the command on every machine; returns the file of each one's output."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [str(ROOT / "launch" / "cluster.yaml"), "--num_processes", str(len(nodes))]
    command += ["--main_process_ip", nodes[0].name, "--main_process_port", PORT]
    logs = [folder / f"{node.name}.log" for node in nodes]
    for rank, (node, log) in enumerate(zip(nodes, logs, strict=True)):
        node.start([*command, "--machine_rank", str(rank), *program("", arguments)], VARIABLES, log)
    return logs


def code_of(node: Node, timeout: float) -> int:
    """The exit code of what was started last on a machine; raises TimeoutExpired."""
    return node.running[-1].wait(timeout)


def wait_for_checkpoint(run: Path, nodes: Sequence[Node], logs: Sequence[Path]) -> None:
    until = time.monotonic() + 120
    while checkpoint.latest(run) is None:
        output = "\n====\n".join(log.read_text()[-3000:] for log in logs)
        assert all(node.running[-1].poll() is None for node in nodes), output
        assert time.monotonic() < until, output
        time.sleep(0.05)


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_machine_that_dies_is_named_by_the_survivor(
    victim: int, digits: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with machines(2) as nodes:
        logs = train_on(nodes, settings(digits, run, 10**6), tmp_path)
        wait_for_checkpoint(run, nodes, logs)
        nodes[victim].kill()
        assert code_of(nodes[1 - victim], PATIENCE_SECONDS) == 1
        lines = logs[1 - victim].read_text().splitlines()
        (line,) = with_words(lines, "bigan: rank ")
        assert line.startswith(f"bigan: rank {victim} (host node{victim}, pid "), line
        assert line.endswith(RESUME_HINT)
    resume_here(settings(digits, run, int(newest(run).name) + 80))
    assert checkpoint.read_progress(newest(run)).attempt == 2


@pytest.mark.slow
def test_machine_that_is_cut_off_is_named_by_both_sides(digits: Path, tmp_path: Path) -> None:
    """No connection is reset or closed: only the heartbeat detects it."""
    run = tmp_path / "run"
    with machines(2) as nodes:
        logs = train_on(nodes, settings(digits, run, 10**6), tmp_path)
        wait_for_checkpoint(run, nodes, logs)
        nodes[1].link_down()
        until = time.monotonic() + PATIENCE_SECONDS
        codes = [code_of(node, until - time.monotonic()) for node in nodes]
        assert codes == [1, 1]
        for other, log in ((1, logs[0]), (0, logs[1])):
            (line,) = with_words(log.read_text().splitlines(), "bigan: rank ")
            assert line.startswith(f"bigan: rank {other} (host node{other}, pid "), line
            assert "no heartbeat for" in line
        nodes[1].link_up()
        saved = int(newest(run).name)
        logs = train_on(nodes, settings(digits, run, saved + 80), tmp_path)
        assert [code_of(node, 120) for node in nodes] == [0, 0], [log.read_text() for log in logs]
        assert f"resuming {run} at images_seen = {saved}\n" in logs[0].read_text()
        assert (run / "DONE").exists()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
