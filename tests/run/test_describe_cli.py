"""The command line: descriptions, one-line errors, exit codes, help."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import ROOT, SMOKE, environment, run_bigan

from bigan.cli.main import main
from bigan.run.describe import describe
from bigan.run_config import RunConfig, load_config

PAPER = ROOT / "configs" / "biggan-128.yaml"


def test_config_of_the_paper_has_its_parameter_counts() -> None:
    description = describe(load_config(PAPER), world_size=8)
    assert description["parameters"] == {"generator": 70_433_988, "discriminator": 87_982_370}
    names = ["discriminator", "discriminator", "generator"]
    assert [phase["name"] for phase in description["phases"]] == names
    assert [phase["trains"] for phase in description["phases"]] == [[name] for name in names]
    schedule = description["schedule"]
    assert (schedule["steps"], schedule["accumulation_steps"]) == (200_000, 4)
    memory = description["memory_bytes"]
    assert memory["weights"] == 4 * (2 * 70_433_988 + 87_982_370)
    assert 10e9 < memory["total"] < 80e9
    assert memory["total"] == sum(v for k, v in memory.items() if k != "total")


def test_largest_config_is_described_in_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    overrides = ["model.resolution=512", "model.z_dim=160", "train.micro_batch=4", "precision=fp32"]
    assert main(["describe", str(PAPER), *overrides, "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["parameters"]["generator"] > 80_000_000
    assert time.monotonic() - began < 30


def test_estimated_activations_grow_with_the_batch() -> None:
    """What autograd keeps on the meta device is proportional to the batch."""
    config = load_config(SMOKE)
    small = describe(config)["memory_bytes"]["activations"]
    double = describe(config.model_copy(update={"train": config.train.model_copy(
        update={"batch": 80})}))["memory_bytes"]["activations"]  # fmt: skip
    assert 1.8 < double / small < 2.1
    assert 1e6 < small < 1e8


def test_describe_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", str(SMOKE)]) == 0
    text = capsys.readouterr().out
    parts = ("generator 60,769", "discriminator -> generator", "train.total_images = 400", "GiB")
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["train.total_image=5"], "did you mean 'train.total_images'"),
        (["data.path=nowhere"], "nowhere"),
        (["model.resolution=32", "model.z_dim=64"], "resolution 16 but model.resolution = 32"),
        (["model.image_channels=3"], "channels 1 but model.image_channels = 3"),
        (["train.micro_batch=7"], "train.micro_batch = 7 does not divide"),
        (["data.split=validation"], "validation"),
    ],
)
def test_bad_input_is_one_line_exit_2_and_nothing_written(
    make_config: Callable[..., RunConfig],
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    part: str,
) -> None:
    config = make_config()
    base = [f"data.path={config.data.path}", f"run_dir={config.run_dir}"]
    assert main(["train", str(SMOKE), *base, *overrides]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("bigan: ")
    assert part in line
    assert not config.run_dir.exists()


@pytest.mark.parametrize("damage", ["flip", "truncate", "missing", "empty"])
def test_corrupt_shards_stop_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    data, run = tmp_path / "digits", tmp_path / "run"
    assert main(["pack", "digits", str(data)]) == 0
    shard = sorted(data.glob("train-*.tar"))[1]
    content = bytearray(shard.read_bytes())
    if damage == "flip":
        content[5000] ^= 1
        shard.write_bytes(content)
    elif damage == "truncate":
        shard.write_bytes(content[:-512])
    elif damage == "missing":
        shard.unlink()
    else:
        for path in data.rglob("*"):
            if path.is_file():
                path.unlink()
    capsys.readouterr()
    assert main(["train", str(SMOKE), f"data.path={data}", f"run_dir={run}"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert (shard.name if damage != "empty" else str(data)) in line
    assert not run.exists()


def test_overrides_may_follow_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", str(SMOKE), "train.seed=1", "--json", "train.batch=80"]) == 0
    train = json.loads(capsys.readouterr().out)["config"]["train"]
    assert (train["seed"], train["batch"]) == (1, 80)
    with pytest.raises(SystemExit):
        main(["describe", str(SMOKE), "--jsno"])


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", "nowhere.yaml", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("pack", "describe", "train", "evaluate", "bench", "bench step", "bench data"):
        with pytest.raises(SystemExit) as left:
            main([*command.split(), "--help"])
        assert left.value.code == 0
        assert len(capsys.readouterr().out.splitlines()) > 5


def test_output_may_be_cut_by_head() -> None:
    pipe = f"{sys.executable} -m bigan describe {SMOKE} --json | head -1"
    done = subprocess.run(
        ["bash", "-c", pipe], env=environment(), capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("{\n", "")


@pytest.mark.slow
def test_bench_step_prints_json() -> None:
    done = run_bigan("bench", "step", SMOKE, "--runs", "5", "compile=aot_eager", timeout=280)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [v["name"] for v in result["variants"]] == [
        "eager", "eager+r1", "aot_eager", "aot_eager+r1",
    ]  # fmt: skip
    assert done.stderr.splitlines()[-1].startswith("aot_eager+r1: ")
    for variant in result["variants"]:
        assert variant["images_per_second"]["median"] > 0
        assert set(variant["ms_per_phase"]) == {"discriminator", "generator"}
        assert variant["peak_memory_bytes"] > 1e8
    assert result["environment"]["versions"]["torch"]
