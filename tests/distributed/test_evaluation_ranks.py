"""Two real gloo processes give the metrics of one, and fail together."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT
from parts import add_inverter, evaluated, start_run, write_snapshot

from bigan.data.packing.pack import pack
from bigan.distributed.world import World
from bigan.evaluation.truncation import sweep
from bigan.evaluation.watcher import evaluate

RANK = """
import errno, os, sys
from datetime import timedelta
from functools import partial
from pathlib import Path
import torch
import torch.distributed as dist
import pytest
from parts import add_inverter
from bigan.errors import RunError, UserError
from bigan.distributed.world import on_all_ranks
from bigan.evaluation.truncation import sweep
from bigan.evaluation.watcher import evaluate
from bigan.distributed.world import World

rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
torch.set_num_threads(1)
add_inverter(pytest.MonkeyPatch())
dist.init_process_group("gloo", timeout=timedelta(seconds=100))

def fail_on_rank_1(error):
    if rank == 1:
        raise error

for problem in (UserError("only here"), OSError(errno.ENOSPC, "No space", "metrics.jsonl")):
    try:
        on_all_ranks(World(rank, size), partial(fail_on_rank_1, problem))
    except UserError as error:
        print(f"together: {error}", flush=True)
try:
    evaluate(
        Path("no-run"), World(rank, size), watch=True, timeout_seconds=0.2, poll_seconds=0.05,
        echo=lambda line: None,
    )
except RunError as error:
    print(f"RunError: {error}", flush=True)
for folder in sys.argv[1:]:
    try:
        evaluate(
            Path(folder), World(rank, size), watch=True, poll_seconds=0.05,
            echo=lambda line: print(line, flush=True),
        )
    except UserError as error:
        print(f"UserError: {error}", flush=True)
sweep(
    Path(sys.argv[1]), World(rank, size), [0.3, None], which="100",
    echo=lambda line: print(line, flush=True),
)
dist.destroy_process_group()
"""


def launch(size: int, *run_dirs: Path) -> list[str]:
    """The output of each rank of `size` processes that evaluate the runs one after the other.

    Then they measure snapshot 100 of the first run at truncation 0.3.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(size)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, *map(str, run_dirs)],
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(size)
    ]  # fmt: skip
    try:
        return [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def make_run(run_dir: Path, data: Path, images_seen: tuple[int, ...], **evaluation: object) -> None:
    config = evaluated(run_dir, data, **{"num_samples": 203} | evaluation)
    start_run(config)
    for images in images_seen:
        write_snapshot(config, images, seed=0)
    (run_dir / "DONE").write_text("")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "digits"
    pack("digits", folder)
    return folder


def test_two_processes_give_the_metrics_of_one_and_fail_together(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A good run, one of a sampler with inputs, and one with a damaged snapshot.

    Every rank reports the damage; none waits forever.
    """
    add_inverter(monkeypatch)
    single, double, damaged = tmp_path / "single", tmp_path / "double", tmp_path / "damaged"
    for run_dir in (single, double, damaged):
        make_run(run_dir, data, (100, 200))
    inverted = [tmp_path / f"inverted-{size}" for size in (1, 2)]
    for run_dir in inverted:
        make_run(run_dir, data, (100,), sampler="inverted", split="test", num_samples=300)
    weights = damaged / "snapshots" / "200" / "generator_ema.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])

    evaluate(single, World(), watch=True, echo=lambda line: None)
    sweep(single, World(), [0.3, None], which="100", echo=lambda line: None)
    evaluate(inverted[0], World(), watch=False, echo=lambda line: None)
    outputs = launch(2, double, inverted[1], damaged)

    assert "images_seen 200 " in outputs[0]
    assert len(outputs[1].splitlines()) == 4, outputs  # rank 1 prints its errors only
    for output in outputs:
        assert "together: only here" in output
        assert "together: metrics.jsonl: No space" in output  # a full disk is no bug of ours
        assert "RunError: no-run: no run for" in output
        assert "UserError" in output
        assert "generator_ema.safetensors: cannot be read" in output
    assert _steps(double) == [100, 200, 100]
    assert _steps(damaged) == [100]
    for images_seen, runs in ((100, (single, double)), (200, (single, double)), (100, inverted)):
        one, two = (
            json.loads(next((run_dir / "evaluation").rglob(f"{images_seen}.json")).read_text())
            for run_dir in runs
        )
        assert one["protocol"] == two["protocol"]
        for key, value in one["metrics"].items():
            assert two["metrics"][key] == pytest.approx(value, rel=1e-7)
    # Each rank accumulated its share of the batches behind the truncated statistics.
    one, two = (
        json.loads((run_dir / "evaluation" / "truncation-100.json").read_text())["records"]
        for run_dir in (single, double)
    )
    assert [record["protocol"]["truncation"] for record in two] == [0.3, None]
    for truncated, expected in zip(two, one, strict=True):
        assert truncated["fingerprint"] == expected["fingerprint"]
        assert truncated["metrics"] == pytest.approx(expected["metrics"], rel=1e-6)


def _steps(run_dir: Path) -> list[int]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["images_seen"] for line in lines]
