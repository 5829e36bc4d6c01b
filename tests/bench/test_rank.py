"""One process of `bigan bench scaling`, and the variants of the step that it measures."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import SMOKE

from bigan.bench import rank
from bigan.bench.rank import Rank, without_exchange, without_penalties
from bigan.layers.batchnorm import BatchNorm2d
from bigan.objectives.base import Step
from bigan.run_config import load_config


def test_penalties_are_left_out_of_the_steps() -> None:
    steps = (
        Step("discriminator", ("adversarial", "r1", "r2"), 0, 8, fresh=True),
        Step("discriminator", ("wgan_gp",), 0, 8),
        Step("vae", ("reconstruction", "divergence"), 8, 8),
        Step("generator", ("path_length",), 8, 4),
    )
    assert without_penalties(steps) == (
        Step("discriminator", ("adversarial",), 0, 8, fresh=True),
        steps[2],
    )


@pytest.mark.parametrize(("engine", "reduces"), [("ddp", False), ("fsdp", True)])
def test_the_exchange_is_left_out_and_restored(
    engine: str, reduces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    layer, group = BatchNorm2d(3), SimpleNamespace(group_name="all")
    state = SimpleNamespace(
        engine=SimpleNamespace(name=engine, reduces_gradients=True, batchnorm_group=group),
        networks={"generator": layer},
    )
    with without_exchange(state):
        assert state.engine.reduces_gradients == reduces
        assert (layer.group_name, layer.group_size) == (None, 1)
    assert state.engine.reduces_gradients
    assert (layer.group_name, layer.group_size) == ("all", 2)


def test_a_rank_times_its_variants(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank, "MIN_STEPS", 2)
    penalties = "objective.penalties=[{name: r1, weight: 1.0, every: 3}]"
    changes = [f"data.path={digits}", f"run_dir={tmp_path}", "train.batch=8", penalties]
    found = Rank(load_config(SMOKE, changes), synthetic=False, seconds=1e-3)
    try:
        assert found.num_steps == 3  # complete periods of the lazy penalty
        seen = found.state.progress.images_seen
        results = found.measure()
        assert found.state.progress.images_seen == seen + 8 * (1 + 3 * 3)  # one step first
    finally:
        found.state.close()
    assert set(results) == {"plain", "full", "without_penalties", "save"}
    for name in ("full", "without_penalties"):
        assert set(results[name]["phases"]) == {"discriminator", "generator"}
        assert sum(results[name]["phases"].values()) < results[name]["step"]
        assert results[name]["data"] > 0
    assert results["save"] > 0
    assert list((tmp_path / "checkpoints").iterdir())
