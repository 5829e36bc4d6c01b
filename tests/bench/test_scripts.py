"""The scripts in benchmarks/ measure what their tables state."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from commands import ROOT, SMOKE, script

from bigan.bench.script import config_parser, scratch_config, write_record
from bigan.run_config import RunConfig, load_config


def smoke(name: str, *overrides: str) -> RunConfig:
    return load_config(ROOT / "configs" / "smoke" / f"{name}.yaml", overrides)


def test_a_grown_step_is_compared_with_a_fixed_one(digits: Path, tmp_path: Path) -> None:
    config = smoke("progan-digits", f"data.path={digits}", f"run_dir={tmp_path / 'run'}")
    result = script("growth").measure(config, runs=2, steps=1)
    assert len(result["switches"]) == 4  # of five stages
    assert all(0 < switch["seconds"] < 60 for switch in result["switches"])
    assert 0.2 < result["grown_over_fixed"]["median"] < 5
    assert set(result["ms_per_step"]) == {"grown", "fixed"}


def test_separate_regularization_has_its_share_of_the_step(tmp_path: Path) -> None:
    config = smoke("stylegan2-digits", f"run_dir={tmp_path / 'run'}")
    result = script("lazy").measure(config, runs=1)
    ms = {kind: values["median"] for kind, values in result["ms"].items()}
    r1, path_length = "discriminator: r1", "generator: path_length"
    assert set(ms) == {"discriminator: adversarial", "generator: adversarial", r1, path_length}
    step = ms["discriminator: adversarial"] + ms["generator: adversarial"]
    shares = {kind: share["median"] for kind, share in result["share_of_step"].items()}
    assert shares == pytest.approx({r1: ms[r1] / 4 / step, path_length: ms[path_length] / 2 / step})


def test_a_penalty_of_the_main_step_counts_by_the_time_it_adds(tmp_path: Path) -> None:
    changes = ["objective.penalties=[{name: r1, weight: 1.0, every: 3}]", "train.batch=4"]
    config = smoke("digits", f"run_dir={tmp_path / 'run'}", *changes)
    result = script("lazy").measure(config, runs=1)
    ms = {kind: values["median"] for kind, values in result["ms"].items()}
    with_r1 = "discriminator: adversarial + r1"
    step = ms["discriminator: adversarial"] + ms["generator: adversarial"]
    shares = {kind: share["median"] for kind, share in result["share_of_step"].items()}
    added = ms[with_r1] - ms["discriminator: adversarial"]
    assert shares == pytest.approx({with_r1: added / 3 / step})


def test_overhead_is_measured_and_compared_with_its_target(digits: Path, tmp_path: Path) -> None:
    overhead = script("overhead")
    changes = [f"data.path={digits}", f"run_dir={tmp_path / 'run'}"]
    config = smoke("digits", *changes, "objective.discriminator_steps=2")
    result = overhead.measure(config, runs=2, run_seconds=0.1)
    assert result["judged_by"] == "cpu"
    for clock in ("wall", "cpu"):
        assert all(ms["min"] > 0 for ms in result[clock]["ms_per_step"].values())
    assert (tmp_path / "run" / "metrics.jsonl").exists()  # ticks are part of the loop
    slow = overhead.compare({"phases": [1.0], "algorithm": [1.5], "loop": [1.6]})
    assert slow["algorithm_over_phases"]["median"] == pytest.approx(0.5)
    assert slow["overhead_over_phases"]["median"] == pytest.approx(0.1)
    quick = overhead.compare({"phases": [1.0], "algorithm": [1.5], "loop": [1.51]})
    for judged_by, reached in (("wall", "MISSED"), ("cpu", "met")):
        both = {"steps_per_run": 1, "judged_by": judged_by, "wall": slow, "cpu": quick}
        assert reached in overhead.as_table("x", both)


def test_save_stall_is_measured(tmp_path: Path) -> None:
    stall = script("save_stall")
    result = stall.measure(smoke("digits", f"run_dir={tmp_path}"), runs=2, steps=3)
    assert result["checkpoint_bytes"] > 1_000_000
    assert 0 < result["stall_seconds"]["min"] <= result["written_after_seconds"]["max"]
    assert result["first_stall_seconds"] > 0
    assert f"{result['checkpoint_bytes'] / 1e6:.1f} MB" in stall.as_text(result)


def test_a_record_names_its_config_and_its_environment(tmp_path: Path) -> None:
    out = tmp_path / "new" / "result.json"
    arguments = [str(SMOKE), "train.seed=3", "--out", str(out)]
    given = config_parser("One line.\nMore.", runs=7).parse_intermixed_args(arguments)
    with scratch_config(given) as config:
        assert config.train.seed == 3
        assert not config.run_dir.is_relative_to(ROOT)
    write_record("a benchmark", given, {"result": 1.5}, steps=4)
    record = json.loads(out.read_text())
    assert {"date", "versions", "hardware", "threads"} == set(record.pop("environment"))
    assert record == {
        "benchmark": "a benchmark",
        "config": str(SMOKE),
        "overrides": ["train.seed=3"],
        "runs": 7,
        "steps": 4,
        "result": 1.5,
    }
    write_record("a benchmark", argparse.Namespace(out=None), {})  # nothing is written
