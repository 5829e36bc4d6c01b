"""Every recipe has a CPU twin, every twin trains, every paper recipe can be described."""

import json
from pathlib import Path

import pytest
from commands import ROOT

from bigan import config as configs
from bigan.checkpoint import snapshots as snapshot
from bigan.run.describe import describe
from bigan.run.trainer import train
from bigan.run_config import RunConfig

RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
TWINS = sorted((ROOT / "configs" / "smoke").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_is_valid_and_has_a_twin(path: Path) -> None:
    assert path.name in {twin.name for twin in TWINS}
    described = describe(configs.load(RunConfig, path))
    assert described["schedule"]["total_images"] >= described["config"]["train"]["total_images"]
    json.dumps(described)


@pytest.mark.parametrize("path", TWINS, ids=lambda p: p.stem)
def test_twin_trains(path: Path, digits: Path, tmp_path: Path) -> None:
    config = configs.load(RunConfig, path, [f"data.path={digits}", f"run_dir={tmp_path / 'run'}"])
    reports: list[dict[str, float]] = []
    assert train(config, print, lambda _, report: reports.append(report)) == 0
    assert reports
    assert all(abs(value) < float("inf") for report in reports for value in report.values())
    run = config.run_dir
    assert (run / "DONE").read_text() == f"{config.train.total_images}\n"
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "timeline.png", "curves.png"):
        assert (run / name).stat().st_size > 0, name
    snapshots = snapshot.find(run)
    assert [int(p.name) for p in snapshots] == list(
        range(
            config.train.snapshot_images,
            config.train.total_images + 1,
            config.train.snapshot_images,
        )
    )
    assert {p.name for p in snapshots[-1].iterdir()} == {
        "weights.safetensors",
        "config.yaml",
        "COMPLETE",
    }
    assert (run / "samples" / "0.png").exists()
