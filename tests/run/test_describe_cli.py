"""The command line: descriptions, one-line errors, exit codes, help."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import ROOT, SMOKE, run_bigan

from bigan import config as configs
from bigan.cli.main import main
from bigan.run.describe import describe
from bigan.run_config import RunConfig

RECIPE = ROOT / "configs" / "biggan-128.yaml"


def test_paper_recipe_has_the_papers_counts() -> None:
    description = describe(configs.load(RunConfig, RECIPE), world_size=8)
    assert description["parameters"] == {"G": 70_433_988, "D": 87_982_370}
    assert [phase["name"] for phase in description["phases"]] == ["d", "d", "g"]
    schedule = description["schedule"]
    assert (schedule["steps"], schedule["accumulation_steps"]) == (200_000, 4)
    memory = description["memory_bytes"]
    assert memory["weights"] == 4 * (2 * 70_433_988 + 87_982_370)
    assert 10e9 < memory["total"] < 80e9
    assert memory["total"] == sum(v for k, v in memory.items() if k != "total")


def test_largest_paper_recipe_is_described_in_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    overrides = ["model.resolution=512", "model.z_dim=160", "train.micro_batch=4", "precision=fp32"]
    assert main(["describe", str(RECIPE), *overrides, "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["parameters"]["G"] > 80_000_000
    assert time.monotonic() - began < 30


def test_estimated_activations_grow_with_the_batch() -> None:
    """What autograd keeps on the meta device, proportional to the batch."""
    config = configs.load(RunConfig, SMOKE)
    small = describe(config)["memory_bytes"]["activations"]
    double = describe(config.model_copy(update={"train": config.train.model_copy(
        update={"batch": 80})}))["memory_bytes"]["activations"]  # fmt: skip
    assert 1.8 < double / small < 2.1
    assert 1e6 < small < 1e8


def test_describe_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", str(SMOKE)]) == 0
    text = capsys.readouterr().out
    for part in ("G 60,769 parameters", "d -> g", "train.total_images = 400", "GiB per process"):
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
    recipe: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str], overrides: list[str],
    part: str,
) -> None:  # fmt: skip
    config = recipe()
    base = [f"data.path={config.data.path}", f"run_dir={config.run_dir}"]
    assert main(["train", str(SMOKE), *base, *overrides]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    assert said[0].startswith("bigan: ")
    assert part in said[0]
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
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    assert (shard.name if damage != "empty" else str(data)) in said[0]
    assert not run.exists()


def test_overrides_may_stand_anywhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", str(SMOKE), "train.seed=1", "--json", "train.batch=80"]) == 0
    train = json.loads(capsys.readouterr().out)["config"]["train"]
    assert (train["seed"], train["batch"]) == (1, 80)
    with pytest.raises(SystemExit):
        main(["describe", str(SMOKE), "--jsno"])


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", "nowhere.yaml", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("pack", "describe", "train", "evaluate", "bench", "bench step"):
        with pytest.raises(SystemExit) as left:
            main([*command.split(), "--help"])
        assert left.value.code == 0
        assert len(capsys.readouterr().out.splitlines()) > 5


def test_output_may_be_cut_by_head() -> None:
    import subprocess
    import sys

    from commands import environment

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
        assert set(variant["ms_per_phase"]) == {"d", "g"}
        assert variant["peak_memory_bytes"] > 1e8
    assert result["environment"]["torch"]
