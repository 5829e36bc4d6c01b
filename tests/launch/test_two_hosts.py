"""Training on two machines (network namespaces) equals training on one: bits, each image once.

Needs root: see `namespaces.py`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from commands import ROOT, SMOKE, environment, launch
from namespaces import Node, machines

from bigan.data.format.manifest import Manifest

pytestmark = pytest.mark.full
PORT = "29411"  # every machine has its own ports
BATCH = 40  # of the smoke config
SPLIT = "test"  # the smaller part of the digits

# `bigan train`, which records the positions that this process reads.
RECORDING_TRAINER = """
import json, os, socket, sys
from pathlib import Path

def main(folder, *arguments):
    from bigan.cli.main import main as bigan
    from bigan.data.streaming.stream import ShardStream

    read, deliver = [], ShardStream.__next__

    def record(stream):
        batch = deliver(stream)
        read.append(batch.positions.tolist())
        return batch

    ShardStream.__next__ = record
    code = bigan(["train", *arguments])
    note = {"host": socket.gethostname(), "positions": sum(read, [])}
    Path(folder, os.environ["RANK"] + ".json").write_text(json.dumps(note))
    return code

if __name__ == "__main__":  # decoding processes import this file
    sys.exit(main(*sys.argv[1:]))
"""


def run_on(
    nodes: Sequence[Node],
    *program: str | Path,
    file: str,
    num_processes: int,
    logs: Path,
    options: Sequence[str] = (),
    timeout: float = 240,
) -> None:
    """`accelerate launch ... PROGRAM` on every machine, by the command in the launch file.

    Waits for the end; fails with their output if one fails or the time is over.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [str(ROOT / "launch" / file), "--num_processes", str(num_processes), *options]
    command += ["--main_process_ip", nodes[0].name, "--main_process_port", PORT]
    paths = [logs / f"{node.name}.log" for node in nodes]
    processes = [
        node.start([*command, "--machine_rank", str(rank), *program], environment(), path)
        for rank, (node, path) in enumerate(zip(nodes, paths, strict=True))
    ]
    until = time.monotonic() + timeout
    while any(p.poll() is None for p in processes) and time.monotonic() < until:
        time.sleep(0.05)
    codes = [process.poll() for process in processes]
    assert codes == [0] * len(nodes), "\n====\n".join(path.read_text()[-3000:] for path in paths)


def config_arguments(digits: Path, run: Path) -> list[str]:
    """The smoke config for one epoch, with one snapshot at its end."""
    steps = -(-Manifest.load(digits).num_samples(SPLIT) // BATCH)
    every = ("total_images", "tick_images", "checkpoint_images", "snapshot_images")
    lengths = [f"train.{name}={steps * BATCH}" for name in every]
    return [str(SMOKE), f"data.path={digits}", f"data.split={SPLIT}", f"run_dir={run}", *lengths]


def weights_hash(run: Path) -> str:
    (weights,) = (run / "snapshots").glob("*/generator_ema.safetensors")
    return hashlib.sha256(weights.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def on_one_host(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], str]:
    """num_processes -> hash of the weights after training on one machine."""

    @functools.cache
    def train(num_processes: int) -> str:
        run = tmp_path_factory.mktemp("one") / "run"
        options = ["--config_file", ROOT / "launch" / "cpu.yaml"]
        options += ["--num_processes", str(num_processes)]
        done = launch(*config_arguments(digits, run), options=options)
        assert done.returncode == 0, done.stderr[-3000:]
        return weights_hash(run)

    return train


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("file", "num_processes", "options"),
    [
        ("cluster.yaml", 2, []),
        pytest.param("cluster.yaml", 4, [], marks=pytest.mark.slow),
        pytest.param(
            "cluster-c10d.yaml",
            2,
            ["--rdzv_backend", "c10d", "--max_restarts", "3"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_two_machines_train_as_one(
    file: str,
    num_processes: int,
    options: list[str],
    digits: Path,
    tmp_path: Path,
    on_one_host: Callable[[int], str],
) -> None:
    """The same weights; over nodes, ranks and decoding threads every image exactly once.

    Dividing by the local rank, for example, would leave half of the images unread.
    """
    trainer = tmp_path / "trainer.py"
    trainer.write_text(RECORDING_TRAINER)
    arguments = config_arguments(digits, tmp_path / "run")
    decoding = ["data.threads=2"]
    with machines(2) as nodes:
        run_on(
            nodes,
            *(trainer, tmp_path, *arguments, *decoding),
            file=file,
            num_processes=num_processes,
            logs=tmp_path,
            options=options,
        )
    notes = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(num_processes)]
    hosts = [note["host"] for note in notes]
    assert sorted(hosts) == sorted(["node0", "node1"] * (num_processes // 2))
    if file == "cluster.yaml":  # machines have the ranks of the command line
        assert hosts == sorted(hosts)
    positions = sorted(position for note in notes for position in note["positions"])
    assert positions == list(range(int((tmp_path / "run" / "DONE").read_text())))
    assert len(positions) >= Manifest.load(digits).num_samples(SPLIT)
    assert weights_hash(tmp_path / "run") == on_one_host(num_processes)


def test_a_machine_can_be_disconnected_and_switched_off(tmp_path: Path) -> None:
    """The harness itself: names, cables, and no process left."""
    log, listening = tmp_path / "log", tmp_path / "listening"
    with machines(2) as (first, second):

        def output_of(script: str) -> list[str]:
            first.start(["bash", "-c", script], environment(), log).wait(timeout=10)
            return log.read_text().split()

        server = "import socket, time; s = socket.create_server(('', 7001)); print(0)"
        program = [sys.executable, "-uc", f"{server}; time.sleep(60)"]
        listener = second.start(program, environment(), listening)
        until = time.monotonic() + 10
        while not listening.read_text() and time.monotonic() < until:
            time.sleep(0.02)
        reach = f"timeout 2 bash -c '</dev/tcp/{second.name}/7001' && echo reached"
        expected = [first.name, second.address, second.name, "reached"]
        assert output_of(f"hostname; getent hosts {second.name}; {reach}") == expected
        second.link_down()
        assert output_of(reach) == []
        second.link_up()
        assert output_of(reach) == ["reached"]
        second.kill()
        assert listener.wait(timeout=5) != 0
        first.start(["sleep", "60"], environment(), log)
    assert [process.poll() is None for process in first.running] == [False] * 4
    assert not Path("/run/netns", first.namespace).exists()
