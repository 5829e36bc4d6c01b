"""`bigan bench step`: its variants, and the times of one of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import ROOT, SMOKE

from bigan import config as configs
from bigan.bench import step
from bigan.bench.measuring import PhaseTimer, prepared_state, synthetic_streams
from bigan.errors import UserError
from bigan.run.stages import final_config
from bigan.run_config import load_config


def test_a_growing_config_is_measured_at_its_last_stage(
    digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the YAML that the process of a variant receives."""
    path = ROOT / "configs" / "smoke" / "progan-digits.yaml"
    config = final_config(load_config(path, [f"data.path={digits}"]))
    assert (config.model.resolution, config.growth) == (16, None)
    monkeypatch.setattr(step, "RUN_SECONDS", 0.1)
    result = step.measure_step(configs.dump(config), runs=1)
    assert result["images_per_second"]["median"] > 0
    assert set(result["ms_per_phase"]) == {"discriminator", "generator"}


def test_variants_without_and_with_r1() -> None:
    config = load_config(SMOKE, ["objective.penalties=[{name: wgan_gp}]"])
    found = list(step.variants(config, ("eager", "inductor"), print))
    assert [name for name, *_ in found] == ["eager", "eager+r1", "inductor", "inductor+r1"]
    for name, variant, r1 in found:
        assert r1 == name.endswith("+r1")
        assert [p.name for p in variant.objective.penalties] == ["r1"] * r1
        assert variant.compile == name.removesuffix("+r1")


@pytest.mark.full
def test_the_process_of_a_variant_reports_its_error() -> None:
    config = load_config(SMOKE)
    unusable = config.model_copy(update={"optimizer": {}})
    with pytest.raises(UserError, match=r"variant eager: .*optimizer"):
        step._in_process("eager", unusable, 1)


def test_too_few_runs_are_refused() -> None:
    with pytest.raises(UserError, match="--runs 4"):
        step.bench_step(SMOKE, [], 4, print)


def test_a_phase_is_timed_once_per_main_step(tmp_path: Path) -> None:
    """Separate regularization steps add to the main step before them."""
    path = ROOT / "configs" / "smoke" / "stylegan2-digits.yaml"
    config = load_config(path, [f"run_dir={tmp_path}", "objective.discriminator_steps=2"])
    state = prepared_state(config, print)
    ticks = iter(range(1000))
    timer = PhaseTimer(state, clock=lambda: float(next(ticks)))
    for _ in range(2):
        timer.advance(synthetic_streams(state))
    state.close()
    assert state.progress.images_seen == 2 * 2 * 32
    # The clock ticks once per call: an optimizer step lasts 1 s. R1 follows every fourth step of
    # the discriminator, path lengths follow every second one of the generator.
    assert timer.seconds["discriminator"] == pytest.approx([2, 1, 1, 1], abs=0.1)
    assert timer.seconds["generator"] == pytest.approx([1, 2], abs=0.1)
