"""What happens to the others when one process dies, fails, drifts, dawdles or has no disk left.

Everything runs the real command. This file is also its program where a process has to be injured:
`test_faults.py RANK:WHAT@IMAGES_SEEN[,...] CONFIG ...` is `bigan train CONFIG ...` in which that
happens to that rank. Tests with several machines need root: see `namespaces.py`.
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
from namespaces import NEEDED, Node, machines

from bigan import checkpoint
from bigan.checkpoint import Reader
from bigan.cli.main import main as bigan
from bigan.data.stream import Batch, ShardStream
from bigan.reporting.tracker import read_metrics
from bigan.run.state import Training

PORT = "29412"  # every machine has its own ports
LOST_AFTER_SECONDS = 10
PATIENCE_SECONDS = LOST_AFTER_SECONDS + 10  # until the last survivor has left
RESUME_HINT = "the same command resumes from the last checkpoint"
SLOW_SECONDS = 0.05  # of each phase: a step of the others takes twice as long, or more
VARIABLES = environment() | {
    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}
LENGTHS = ["train.checkpoint_images=200", "train.snapshot_images=1000", "train.tick_images=40"]


# ---- the injured process -----------------------------------------------------------------------


def injure(what: str, images_seen: int) -> None:
    """Let something happen to this process, at (or from) a point of its training."""
    original = Training.phase_step
    if what == "starved":
        deliver = ShardStream.__next__

        def delayed(stream: ShardStream) -> Batch:
            time.sleep(SLOW_SECONDS)
            return deliver(stream)

        ShardStream.__next__ = delayed  # type: ignore[method-assign]

    def injured(training: Training, name: str, stream: Iterator[Batch]) -> None:
        if what == "slow":
            time.sleep(SLOW_SECONDS)
        if name == "d" and training.progress.images_seen == images_seen:
            once(what, training)
        original(training, name, stream)

    Training.phase_step = injured  # type: ignore[method-assign]


def once(what: str, training: Training) -> None:
    if what == "drifted":
        next(training.discriminator.parameters()).detach().view(-1)[0] += 1e-3
    elif what == "failing":
        raise RuntimeError("a reason of its own")
    elif what == "killed" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "full":
        fill(training.config.run_dir / "somebody-elses")


def fill(path: Path) -> None:
    """Take all the room on a disk."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        for size in (65_536, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)) == size:
                    pass


def main(injuries: str, *arguments: str) -> int:
    """`bigan train ARGUMENTS` with the injuries that are meant for this rank."""
    for injury in injuries.split(","):
        rank, what, images_seen = injury.replace("@", ":").split(":")
        if rank == os.environ.get("RANK", "0"):
            injure(what, int(images_seen))
    return bigan(["train", *arguments])


# ---- what starts it ----------------------------------------------------------------------------


def program(injuries: str, arguments: Sequence[str]) -> list[str]:
    head = [str(Path(__file__)), injuries] if injuries else ["-m", "bigan.train"]
    return [*head, str(SMOKE), *arguments]


def settings(digits: Path, run: Path, total_images: int, *more: str) -> list[str]:
    limits = [f"train.lost_after_seconds={LOST_AFTER_SECONDS}"]
    total = f"train.total_images={total_images}"
    return [f"data.path={digits}", f"run_dir={run}", total, *LENGTHS, *limits, *more]


def train(
    arguments: Sequence[str],
    injuries: str = "",
    *,
    num_processes: int = 2,
    options: Sequence[str] = (),
    timeout: float = 120,
) -> tuple[int, list[str]]:
    """One life of a run; returns the exit code and the lines on stderr."""
    command = [sys.executable]
    if num_processes > 1:
        command += ["-m", "accelerate.commands.launch", "--config_file"]
        command += [str(ROOT / "launch" / "cpu.yaml"), "--num_processes", str(num_processes)]
        command += ["--main_process_port", str(free_port()), *options]
    process = subprocess.Popen(
        [*command, *program(injuries, arguments)],
        env=VARIABLES,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, said = process.communicate(timeout=timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return process.returncode, said.splitlines()


def goes_on_here(arguments: Sequence[str]) -> None:
    """The same recipe, in this one process: it has been imported already."""
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
    return (run / "snapshots" / str(images_seen) / "weights.safetensors").read_bytes()


# ---- several lives of one run on one machine ----------------------------------------------------

TOTAL = 1000
# A new store in each life: torch 2.13 would read the addresses of the dead from the old one.
RESTARTS = ["--rdzv_backend", "c10d", "--max_restarts", "1"]
LIVES = [("1:slow@0,1:drifted@360", []), ("1:failing@520", []), ("1:killed@720", RESTARTS)]


@dataclass(frozen=True)
class Life:
    """How one start of the command ended."""

    code: int
    lines: list[str]  # on stderr
    saved: int  # images_seen of the newest checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults") / "run"


@pytest.fixture(scope="module")
def lives(digits: Path, run: Path) -> list[Life]:
    """One run with an accident in each life: a launch takes longer than all its steps."""
    found = []
    for injuries, options in LIVES:
        code, lines = train(settings(digits, run, TOTAL), injuries, options=options)
        found.append(Life(code, lines, int(newest(run).name)))
    return found


def test_slow_process_is_named(lives: list[Life], run: Path) -> None:
    (line,) = with_words(lives[0].lines, "is slow: ")
    assert line.startswith("rank 1 is slow: ")
    assert "waiting for images" not in line
    ticks = [row for row in read_metrics(run) if row.get("train/attempt") == 1]
    ratios = [row["rank/step_ms/1"] / row["rank/step_ms/0"] for row in ticks]
    assert statistics.median(ratios) > 1.25
    assert statistics.median(row["rank/slowest"] for row in ticks) == 1


def test_drifted_replica_stops_the_run_before_it_is_saved(lives: list[Life]) -> None:
    drifted = "the ranks no longer hold the same weights at images_seen = 400: rank 1 (d) "
    assert lives[0].code == 1
    (line,) = with_words(lives[0].lines, "bigan: the")
    assert line.startswith(f"bigan: {drifted}differs from the others; ")
    assert lives[0].saved == 200


def test_process_that_fails_is_named_with_its_reason(lives: list[Life]) -> None:
    assert with_words(lives[1].lines, "resuming", "images_seen = 200"), "as it was before the drift"
    assert lives[1].code == 1
    (line,) = with_words(lives[1].lines, "bigan: rank")
    assert line.startswith(f"bigan: rank 1 (host {socket.gethostname()}, pid ")
    assert line.endswith(f"failed: RuntimeError: a reason of its own; {RESUME_HINT}")
    assert lives[1].saved == 400


def test_killed_process_is_restarted_by_the_launcher(lives: list[Life], run: Path) -> None:
    life = lives[2]
    assert life.code == 0, life.lines[-20:]
    resumed = with_words(life.lines, "resuming")
    assert [line.rpartition(" ")[2] for line in resumed] == ["400", "600"]
    assert life.saved == TOTAL
    assert checkpoint.read_progress(newest(run)).attempt == len(LIVES) + 1


@pytest.mark.slow  # test_chaos.py does the like
def test_after_all_that_the_weights_are_those_of_an_undisturbed_run(
    lives: list[Life], run: Path, digits: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    code, lines = train(settings(digits, whole, TOTAL))
    assert code == 0, lines[-20:]
    assert with_words(lines, "bigan:") == []
    assert final_weights(whole, TOTAL) == final_weights(run, TOTAL)


@pytest.mark.slow
def test_drifted_rank_0_is_named_by_majority(digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = settings(digits, run, TOTAL, "train.batch=60", "train.checkpoint_images=180")
    code, lines = train(arguments, "0:drifted@300", num_processes=3)
    assert code == 1
    (line,) = with_words(lines, "no longer hold the same weights")
    assert "images_seen = 360: rank 0 (d) differs" in line
    assert newest(run).name == "180"


@pytest.mark.slow
def test_process_that_waits_for_images_is_named_and_equal_ones_are_not(
    digits: Path, tmp_path: Path
) -> None:
    """Ticks of many steps: what a busy machine does to one of two equal processes evens out."""
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


# ---- no room on the disk ------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise PermissionError(f"{NEEDED}: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("num_processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_training_goes_on_while_the_disk_is_full(
    num_processes: int, digits: Path, small_disk: Path
) -> None:
    """To the end, which says what is missing; with some room the same command makes up for it."""
    run, total = small_disk / "run", 600
    arguments = settings(digits, run, total, f"train.snapshot_images={total}")
    code, lines = train(arguments, "0:full@320", num_processes=num_processes)
    assert code == 1
    assert with_words(lines, "images_seen", f"{total} of {total}"), lines[-20:]
    for seen in (400, 600):
        (line,) = with_words(lines, f"images_seen = {seen} was not saved", "training continues")
        assert "No space left on device" in line
    (verdict,) = with_words(lines, "bigan: trained to the end of this life, but not all")
    assert "2 failed in all; free some space or raise the quota" in verdict
    assert len(with_words(lines, f"snapshot {total} could not be written")) == 1
    assert newest(run).name == "200"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["200"]
    assert not (run / "DONE").exists()
    (run / "somebody-elses").unlink()
    goes_on_here(arguments)
    assert newest(run).name == (run / "DONE").read_text().strip() == str(total)


# ---- two machines -------------------------------------------------------------------------------


def train_on(nodes: Sequence[Node], arguments: Sequence[str], folder: Path) -> list[Path]:
    """Start the command on every machine; returns where each one's lines go."""
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
        said = "\n====\n".join(log.read_text()[-3000:] for log in logs)
        assert all(node.running[-1].poll() is None for node in nodes), said
        assert time.monotonic() < until, said
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
    goes_on_here(settings(digits, run, int(newest(run).name) + 80))
    assert checkpoint.read_progress(newest(run)).attempt == 2


@pytest.mark.slow
def test_machine_that_is_cut_off_is_named_by_both_sides(digits: Path, tmp_path: Path) -> None:
    """No reset, no end of a connection: only the heartbeat notices."""
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
