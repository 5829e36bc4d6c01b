"""The benchmarks of growth and of lazy regularisers measure what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import ROOT, script

from bigan import config as configs
from bigan.bench import step
from bigan.bench.step import measure_step
from bigan.objectives import growth
from bigan.run_config import RunConfig


def smoke(name: str, *overrides: str) -> RunConfig:
    return configs.load(RunConfig, ROOT / "configs" / "smoke" / f"{name}.yaml", overrides)


def test_a_grown_step_is_compared_with_a_fixed_one(digits: Path, tmp_path: Path) -> None:
    config = smoke("progan-digits", f"data.path={digits}", f"run_dir={tmp_path / 'run'}")
    result = script("growth").measure(config, runs=2, steps=1)
    assert len(result["switches"]) == 4  # of five stages
    assert all(0 < switch["seconds"] < 60 for switch in result["switches"])
    assert 0.2 < result["grown_over_fixed"]["median"] < 5
    assert set(result["ms_per_step"]) == {"grown", "fixed"}


def test_a_growing_recipe_is_measured_at_its_last_stage(
    digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process of its own, from the recipe that is handed over."""
    config = growth.grown(smoke("progan-digits", f"data.path={digits}"))
    assert (config.model.resolution, config.growth) == (16, None)
    monkeypatch.setattr(step, "RUN_SECONDS", 0.1)
    result = measure_step(configs.dump(config), runs=1)
    assert result["images_per_second"]["median"] > 0


def test_a_lazy_regulariser_has_its_share_of_the_step(tmp_path: Path) -> None:
    config = smoke("stylegan2-digits", f"run_dir={tmp_path / 'run'}")
    result = script("lazy").measure(config, runs=1)
    ms = {kind: values["median"] for kind, values in result["ms"].items()}
    assert set(ms) == {"d: adversarial", "d: r1", "g: adversarial", "g: path_length"}
    step = ms["d: adversarial"] + ms["g: adversarial"]
    shares = {kind: share["median"] for kind, share in result["share_of_step"].items()}
    assert shares == pytest.approx(
        {"d: r1": ms["d: r1"] / 4 / step, "g: path_length": ms["g: path_length"] / 2 / step}
    )
