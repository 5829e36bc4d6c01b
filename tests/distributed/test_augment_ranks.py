"""ADA on two gloo processes: draws, strength and adaptation are those of one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import ROOT, SMOKE, launch

from bigan.checkpoint import Reader
from bigan.run.trainer import train
from bigan.run_config import RunConfig

# Adapted at 120, 240, ...: the checkpoint at 200 lies within an interval.
ADA = "augment={name: ada, initial: 0.4, rampup_images: 1000, every_images: 120}"
LOSSES = ("train/discriminator/loss", "train/generator/loss")
P, SIGN = "train/discriminator/augment_p", "train/discriminator/sign_real"
R1 = "objective.penalties=[{name: r1, weight: 1.0}]"


def ticks(run: Path) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["images_seen"]: line for line in lines if LOSSES[0] in line}


@pytest.mark.full
def test_two_processes_then_one_train_as_one_does(
    make_config: Callable[..., RunConfig], digits: Path, tmp_path: Path
) -> None:
    """To the middle of an interval, where the states are equal; then one process resumes."""
    common = [ADA, R1, "train.tick_images=40"]
    started = launch(
        SMOKE, f"data.path={digits}", *common, "train.total_images=200",
        f"run_dir={tmp_path / 'two'}", options=["--config_file", ROOT / "launch" / "cpu.yaml"],
    )  # fmt: skip
    assert started.returncode == 0, started.stderr[-2000:]
    for run, total in (("one", 200), ("two", 400), ("one", 400)):
        config = make_config(*common, f"run_dir={tmp_path / run}", f"train.total_images={total}")
        assert train(config, lambda _: None, lambda *_: None) == 0
    states = [Reader(tmp_path / run / "checkpoints" / "200") for run in ("two", "one")]
    for name in ("p", "signs", "num"):
        two, one = (state.read(f"state/augment.{name}").item() for state in states)
        assert two == one, name
    assert states[0].read("state/augment.num").item() == 80
    assert states[0].read("state/augment.signs").item() != 0
    two, one = ticks(tmp_path / "two"), ticks(tmp_path / "one")
    assert list(two) == list(one) == list(range(40, 401, 40))
    for seen, values in one.items():
        assert two[seen][P] == values[P], seen
        assert two[seen][SIGN] == pytest.approx(values[SIGN], abs=1e-6)
        for key in (*LOSSES, "train/discriminator/r1"):
            assert two[seen][key] == pytest.approx(values[key], abs=1e-4), (seen, key)
    assert len({values[P] for values in one.values()}) == 4
