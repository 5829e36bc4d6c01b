"""What happens to the others when one process dies, fails, drifts, dawdles or has no disk left.

Everything runs the real command. This file is also its program where a process has to be injured:
`test_faults.py RANK:WHAT@IMAGES_SEEN[,...] CONFIG ...` is `bigan train CONFIG ...` in which that
happens to that rank. Tests with several machines need root: see `namespaces.py`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from commands import ROOT, SMOKE, environment, free_port

from bigan import checkpoint
from bigan.checkpoint import Reader
from bigan.data.stream import Batch, ShardStream
from bigan.tracking import read_metrics
from bigan.training import Training

PORT = "29412"  # every machine has its own ports
LOST_AFTER_SECONDS = 10
PATIENCE_SECONDS = LOST_AFTER_SECONDS + 10  # until the last survivor has left
GO_ON = "the same command goes on from the last checkpoint"
SLOW_SECONDS = 0.05  # of each phase: a step of the others takes twice as long, or more
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
    from bigan.cli import main as bigan

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


def variables() -> dict[str, str]:
    return environment() | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}


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
        env=variables(),
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


@pytest.fixture(scope="module")
def hard_life(
    digits: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[tuple[int, list[str], int]]]:
    """One run with an accident in each life: (code, lines, newest checkpoint) of each.

    One run and not four, because a launch takes longer than all its steps.
    """
    run = tmp_path_factory.mktemp("hard") / "run"
    arguments = settings(digits, run, TOTAL)
    lives = []
    for injuries, options in (
        ("1:slow@0,1:drifted@360", []),
        ("1:failing@520", []),
        ("1:killed@720", ["--max_restarts", "1"]),
    ):
        code, lines = train(arguments, injuries, options=options)
        lives.append((code, lines, int(newest(run).name)))
        print(code, *lines, sep="\n")
    return run, lives


HardLife = tuple[Path, list[tuple[int, list[str], int]]]


def test_slow_process_is_named(hard_life: HardLife) -> None:
    run, lives = hard_life
    (line,) = with_words(lives[0][1], "is slow")
    assert line.startswith("rank 1 is slow: ")
    assert "all of them wait for it" in line
    ticks = [row for row in read_metrics(run) if row.get("rank/slowest") is not None][:9]
    own = [(row["rank/step_ms/0"], row["rank/step_ms/1"]) for row in ticks]
    assert sum(slow > 1.25 * other for other, slow in own) >= 6
    assert sum(row["rank/slowest"] == 1 for row in ticks) >= 6


def test_drifted_replica_stops_the_run_before_it_is_saved(hard_life: HardLife) -> None:
    code, lines, saved = hard_life[1][0]
    assert code == 1
    (line,) = with_words(lines, "bigan: ")
    expected = "the processes no longer hold the same weights at images_seen = 400: rank 1 (d) "
    assert line.startswith(f"bigan: {expected}differs from the others; ")
    assert saved == 200


def test_process_that_fails_is_named_with_its_reason(hard_life: HardLife) -> None:
    code, lines, saved = hard_life[1][1]
    assert with_words(lines, "resuming", "images_seen = 200"), "not the state that had drifted"
    assert code == 1
    (line,) = with_words(lines, "bigan: ")
    assert line.startswith("bigan: rank 1 (host ")
    assert "failed: RuntimeError: a reason of its own; " in line
    assert saved == 400


def test_killed_process_is_restarted_by_the_launcher(hard_life: HardLife) -> None:
    run, lives = hard_life
    code, lines, saved = lives[2]
    assert code == 0, lines[-20:]
    resumed = with_words(lines, "resuming")
    assert [line.rpartition(" ")[2] for line in resumed] == ["400", "600"]
    assert saved == TOTAL
    assert checkpoint.read_progress(newest(run)).attempt == 4


def test_the_weights_are_those_of_an_undisturbed_run(
    hard_life: HardLife, digits: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    code, lines = train(settings(digits, run, TOTAL))
    assert code == 0, lines[-20:]
    assert with_words(lines, "bigan:") == []
    assert final_weights(run, TOTAL) == final_weights(hard_life[0], TOTAL)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
