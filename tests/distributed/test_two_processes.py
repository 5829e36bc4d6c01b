"""`accelerate launch` with two real gloo processes trains as one process does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import ROOT, SMOKE, launch
from safetensors.torch import load_file

from bigan.run.trainer import train
from bigan.run_config import load_config

LAUNCH = ROOT / "launch" / "cpu.yaml"
WEIGHTS = "snapshots/{}/generator_ema.safetensors"
WGAN_GP = "objective.penalties=[{name: wgan_gp, weight: 1.0}]"
LOSSES = ("train/discriminator/loss", "train/generator/loss")


def losses(run: Path) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        line["images_seen"]: {key: line[key] for key in LOSSES}
        for line in lines
        if LOSSES[0] in line
    }


def alone(run: Path, *arguments: object) -> None:
    """The same training in this process."""
    config, *overrides = map(str, arguments)
    settings = load_config(config, [*overrides, f"run_dir={run}"])
    assert train(settings, lambda _: None, lambda *_: None) == 0


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        pytest.param("eager", [WGAN_GP], marks=pytest.mark.slow),
        pytest.param(
            "compiled", [WGAN_GP], marks=[pytest.mark.full, pytest.mark.slow]
        ),  # tests/parity has three steps of it
        pytest.param(
            "accumulate",
            ["train.micro_batch=10", "objective.discriminator_steps=2"],
            marks=[pytest.mark.full, pytest.mark.slow],  # tests/parity has three steps of it
        ),
    ],
)
def test_same_losses_for_twenty_steps(
    digits: Path, tmp_path: Path, name: str, overrides: list[str]
) -> None:
    """Losses to 1e-4 at every step: the same images, latents, BatchNorm and mean gradients."""
    common = [SMOKE, f"data.path={digits}", "train.tick_images=40", "train.total_images=800"]
    common += overrides
    backend = "aot_eager" if name == "compiled" else "eager"
    two_processes = [*common, f"compile={backend}", f"run_dir={tmp_path / 'two'}"]
    together = launch(*two_processes, options=["--config_file", LAUNCH])
    assert together.returncode == 0, together.stderr[-2000:]
    if name == "accumulate":  # the joined micro-batch of two processes is that of one with twice
        common += ["train.micro_batch=20"]
    alone(tmp_path / "one", *common)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert list(one) == list(two)
    assert len(one) == (20 if name != "accumulate" else 10)
    for seen, values in one.items():
        for key, value in values.items():
            assert two[seen][key] == pytest.approx(value, abs=1e-4), (seen, key)
    a, b = (load_file(tmp_path / name / WEIGHTS.format(800)) for name in ("one", "two"))
    assert max((a[k] - b[k]).abs().max().item() for k in a) < 2e-3


@pytest.mark.full
@pytest.mark.slow  # tests/parity has three steps of it on every engine
def test_a_growing_run_is_the_same_on_two_processes(digits: Path, tmp_path: Path) -> None:
    """Through two fade-ins; the run of two processes is resumed in the middle of one of them.

    Every stage has new wrappers and optimizers. (A resume is bitwise: test_growth.py.)
    """
    grown = ROOT / "configs" / "smoke" / "progan-digits.yaml"
    common = [grown, f"data.path={digits}", "train.total_images=400"]
    warmup = [
        "optimizer.generator.warmup_images=400",
        "optimizer.discriminator.warmup_images=400",
    ]
    alone(tmp_path / "one", *common, *warmup)
    two = [*common, *warmup, f"run_dir={tmp_path / 'two'}"]
    for part in ([*two, "train.total_images=256"], two):
        together = launch(*part, options=["--config_file", LAUNCH])
        assert together.returncode == 0, together.stderr[-2000:]
    assert "resuming" in together.stderr
    a, b = (load_file(tmp_path / n / WEIGHTS.format(400)) for n in ("one", "two"))
    assert a.keys() == b.keys()
    assert max((a[k] - b[k]).abs().max().item() for k in a) < 1e-4


@pytest.mark.full
def test_local_batchnorm_is_the_same_when_resumed_at_another_world_size(
    digits: Path, tmp_path: Path
) -> None:
    """Begun by one process and continued by two with the same micro-batch, without a remark."""
    common = [SMOKE, f"data.path={digits}", "train.micro_batch=10", "train.batchnorm=local"]
    alone(tmp_path / "one", *common)
    alone(tmp_path / "two", *common, "train.total_images=200")
    together = launch(*common, f"run_dir={tmp_path / 'two'}", options=["--config_file", LAUNCH])
    assert together.returncode == 0, together.stderr[-2000:]
    assert "resuming" in together.stderr
    assert "BatchNorm saw" not in together.stderr
    a, b = (load_file(tmp_path / name / WEIGHTS.format(400)) for name in ("one", "two"))
    assert any("standing_var" in key for key in a)
    assert max((a[k] - b[k]).abs().max().item() for k in a) < 1e-4


@pytest.mark.full
@pytest.mark.slow  # tests/launch/test_chaos.py resumes after kills
def test_resume_is_bitwise_on_two_processes(digits: Path, tmp_path: Path) -> None:
    """Stopped after a checkpoint and started again by the same command: the same bytes."""
    options = ["--config_file", LAUNCH]
    common = [SMOKE, f"data.path={digits}"]
    whole = [*common, f"run_dir={tmp_path / 'whole'}"]
    parts = [*common, f"run_dir={tmp_path / 'parts'}"]
    for arguments in (whole, [*parts, "train.total_images=200"], parts):
        done = launch(*arguments, options=options)
        assert done.returncode == 0, done.stderr[-2000:]
    name = WEIGHTS.format(400)
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


@pytest.mark.full
def test_bad_input_is_one_line_and_touches_nothing(digits: Path, tmp_path: Path) -> None:
    """Every rank exits, one of them prints the reason."""
    run = tmp_path / "run"
    done = launch(
        SMOKE,
        f"data.path={digits}",
        f"run_dir={run}",
        "model.num_classes=9",
        options=["--config_file", LAUNCH],
    )
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("bigan:")]
    assert "model.num_classes = 9" in line
    assert not run.exists()
