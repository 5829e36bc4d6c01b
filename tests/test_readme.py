"""Every command and example of the README runs: here on small data, or in the test listed below."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import yaml
from commands import ROOT, environment, free_port
from PIL import Image

import bigan
from bigan.cli.main import parser

README = (ROOT / "README.md").read_text()

# Commands that cannot run unchanged inside of a test -> what runs them instead.
ELSEWHERE = {
    "make demo": "test_demo_from_a_clean_clone below (slow)",
    "make test": ".ci/run",
    ".venv/bin/python benchmarks/input_pipeline.py --quick": "tests/bench/test_input_benchmark.py",
    ".venv/bin/bigan bench scaling configs/digits.yaml --ranks 1,2": "tests/bench/",
    ".venv/bin/bigan submit configs/biggan-128.yaml --nodes 4 --gpus 8 --time 24:00:00 "
    "--evaluate during": "tests/slurm/",
    ".venv/bin/bigan status runs/biggan-128": "tests/slurm/",
    ".venv/bin/bigan sweep configs/sweeps/digits-lr.yaml --jobs 2": "tests/cluster/",
    ".venv/bin/bigan sweep-report runs/digits-lr": "tests/cluster/",
}
SMALL = (
    "train.total_images=80 train.batch=40 train.micro_batch=20 train.snapshot_images=40 "
    "train.standing_batches=1 train.tick_images=40 objective.orthogonal_weight=0 compile=eager "
    "tracking.mlflow=false"
)
PHOTOS = (
    "model.channels=1 model.attention_resolutions=[] model.z_dim=20 precision=fp32 train.batch=10 "
    "train.total_images=20 train.micro_batch=5 train.snapshot_images=20"
)
PARTS = (
    "bigan pack photos",
    "bigan verify data/photos",
    "bigan describe configs/photos",
    "bigan train configs/photos",
    "bigan evaluate runs/photos",
    "bin/bigan train configs/biggan-128",
    "launch/cpu.yaml -m bigan train",
    "launch/node.yaml",
    "launch/cluster.yaml",
    "-m bigan evaluate",
    "bigan bench step",
    "mlflow ui",
)


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README, re.S)
    lines = [line.partition(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def example(language: str) -> str:
    """The only code block of the README in that language."""
    (block,) = re.findall(rf"```{language}\n(.*?)```", README, re.S)
    return block


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """A folder like that of a reader: configs, launch files, digits, some photos."""
    place = tmp_path_factory.mktemp("reader")
    for name in ("configs", "launch", "bigan"):
        (place / name).symlink_to(ROOT / name)
    (place / "data").mkdir()
    (place / "data" / "digits").symlink_to(digits)
    pixels = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (place / "photos" / name).mkdir(parents=True)
        for i in range(30):
            image = pixels.integers(0, 256, (80, 100, 3), dtype=np.uint8)
            Image.fromarray(image).save(place / "photos" / name / f"{i}.jpg")
    return place


def adapted(command: str) -> str:
    """The command with settings small enough for a test."""
    command = command.replace(".venv/bin/", str(Path(sys.executable).parent) + "/")
    command = command.replace("configs/biggan-128.yaml", "configs/smoke/biggan-128.yaml")
    command = command.replace("configs/digits.yaml", "configs/smoke/digits.yaml")
    command = command.replace("launch/node.yaml", "launch/node.yaml --num_processes 2")
    command = command.replace("launch/cluster.yaml", "launch/cluster.yaml --num_processes 2")
    if "configs/photos.yaml" in command and "train" in command:
        return f"{command} {SMALL} {PHOTOS}"
    if "bigan train" in command:
        return f"{command} {SMALL} run_dir=runs/{len(command)}"
    return command


def run(command: str, place: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", command],
        cwd=place,
        env=environment() | {"PATH": path, "MASTER_PORT": str(free_port())} | variables,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


def command_with(part: str) -> str:
    """The only command of the README that contains `part`."""
    (found,) = [command for command in commands() if part in command]
    return found


def test_every_command_is_known() -> None:
    """A command that is added to the README must be added here."""
    assert len(commands()) == len(set(commands()))
    unknown = [c for c in commands() if c not in ELSEWHERE and not any(p in c for p in PARTS)]
    assert not unknown


def test_commands_of_the_cluster_page_are_accepted() -> None:
    """By the parser, with all their options; tests/slurm/ executes such commands."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "cluster.md").read_text(), re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    found = [shlex.split(line, comments=True) for line in lines if line.startswith("bigan ")]
    assert {command[1] for command in found} >= {"submit", "status", "logs"}
    for command in found:
        _, rest = parser().parse_known_args(command[1:])
        assert all("=" in word and not word.startswith("-") for word in rest), command


@pytest.mark.full
def test_own_images(workplace: Path) -> None:
    """pack, verify, describe, train, evaluate, in the order of the README."""
    for part in PARTS[:4]:
        done = run(adapted(command_with(part)), workplace)
        assert done.returncode == 0, (part, done.stderr)
    assert (workplace / "runs/photos/timeline.png").exists()
    done = run(adapted(command_with("bigan evaluate runs/photos")), workplace)
    # The weights are not part of bigan: without them, one line names the missing file.
    assert done.returncode == 2
    assert "weights-inception-2015-12-05-6726825d.pth" in done.stderr


@pytest.mark.full
@pytest.mark.parametrize(
    "part",
    ["bin/bigan train configs/biggan-128", "launch/cpu.yaml -m bigan train", "launch/node.yaml"],
)
def test_launch(workplace: Path, part: str) -> None:
    done = run(adapted(command_with(part)), workplace)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.full
def test_two_nodes(workplace: Path) -> None:
    """The command for two nodes, with both ranks on this machine."""
    command = adapted(command_with("launch/cluster.yaml")).replace("29500", str(free_port()))
    with ThreadPoolExecutor(2) as pool:
        ends = [
            pool.submit(run, command, workplace, RANK=rank, HEAD="127.0.0.1") for rank in ("0", "1")
        ]
    for end in ends:
        assert end.result().returncode == 0, end.result().stderr[-2000:]


@pytest.mark.full
def test_evaluator_on_two_processes(workplace: Path) -> None:
    overrides = f"{SMALL} run_dir=runs/digits evaluation.num_samples=100"
    trained = run(f"python -m bigan train configs/smoke/digits.yaml {overrides}", workplace)
    assert trained.returncode == 0, trained.stderr
    done = run(adapted(command_with("-m bigan evaluate")), workplace)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("fd/digits8-cnn-v1") == 2


@pytest.mark.slow
def test_bench(workplace: Path) -> None:
    done = run(adapted(command_with("bigan bench step")), workplace)
    assert done.returncode == 0, done.stderr
    assert '"speedup_compiled"' in done.stdout


@pytest.mark.full
def test_mlflow_ui(workplace: Path) -> None:
    """The viewer starts on the store of the runs and answers over HTTP."""
    (workplace / "runs").mkdir(exist_ok=True)
    port = free_port()
    command = [*adapted(command_with("mlflow ui")).split(), "--port", str(port)]
    viewer = subprocess.Popen(
        command, cwd=workplace, env=environment(), stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        until = time.monotonic() + 120
        while True:
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer,
            ):
                assert answer.status == 200
                break
            assert viewer.poll() is None
            assert time.monotonic() < until
            time.sleep(0.5)
    finally:
        os.killpg(viewer.pid, signal.SIGKILL)
        viewer.wait()


@pytest.mark.full
def test_python_example(workplace: Path) -> None:
    """The example trains, evaluates and samples as its comments state, on the smoke config."""
    code = example("python").replace("configs/digits.yaml", "configs/smoke/digits.yaml")
    checks = (
        "assert images.dtype.itemsize == 1 and images.shape == (16, 1, 16, 16), images.shape",
        "assert metrics[snapshot.images_seen]['fd/digits8-cnn-v1'] > 0, metrics",
    )
    (workplace / "example.py").write_text("\n".join((code, *checks)))
    done = run("python example.py", workplace)
    assert done.returncode == 0, done.stderr[-2000:]


def test_config_example(digits: Path, tmp_path: Path) -> None:
    """The sections of the example form a valid config, completed from the data."""
    sections = yaml.safe_load(example("yaml"))
    remaining = {
        "run_dir": str(tmp_path / "run"),
        "ema": {"halflife_images": 1000},
        "train": {"total_images": 400, "batch": 40},
    }
    path = tmp_path / "example.yaml"
    path.write_text(yaml.safe_dump(sections | remaining))
    config = bigan.load_config(path, [f"data.path={digits}"])
    model = config.model
    assert (model.resolution, model.image_channels, model.num_classes) == (16, 1, 10)
    assert set(config.optimizer) == {"generator", "discriminator"}


def test_linked_files_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_demo_from_a_clean_clone(tmp_path: Path) -> None:
    """`make demo` on the committed files: several distances, a good last one, within 8 minutes."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    began = time.monotonic()
    done = subprocess.run(
        ["make", "demo"], cwd=clone, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert time.monotonic() - began < 480
    found = re.findall(r"images_seen (\d+)  fd/digits8-cnn-v1 (\S+)", done.stdout)
    assert len(found) >= 5
    assert float(found[-1][1]) <= 1.2
