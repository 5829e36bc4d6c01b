"""Every config has a CPU twin; every config can be described, and every twin trains."""

import json
from pathlib import Path

import pytest
import yaml
from commands import ROOT

from bigan.checkpoint import snapshots
from bigan.run.describe import describe
from bigan.run.trainer import train
from bigan.run_config import load_config
from bigan.run_folder import RunFolder

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
TWINS = sorted((ROOT / "configs" / "smoke").glob("*.yaml"))
# One of each method in the quick tier, all in the full one.
QUICK = {"digits", "progan-digits", "stylegan2-digits", "r3gan-digits", "vae-digits", "wgan-digits"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config_is_valid_and_has_a_twin(path: Path, digits: Path) -> None:
    assert path.name in {twin.name for twin in TWINS}
    model = yaml.safe_load(path.read_text())["model"]
    from_data = not {"resolution", "image_channels", "num_classes"} <= model.keys()
    config = load_config(path, [f"data.path={digits}"] if from_data else [])
    described = describe(config)
    assert described["schedule"]["total_images"] >= config.train.total_images
    assert set(described["parameters"]) == set(config.objective.networks)
    assert {phase["name"] for phase in described["phases"]} == set(config.optimizer)
    json.dumps(described)


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=() if p.stem in QUICK else pytest.mark.full) for p in TWINS],
    ids=lambda p: p.stem,
)
def test_twin_trains(path: Path, digits: Path, tmp_path: Path) -> None:
    config = load_config(path, [f"data.path={digits}", f"run_dir={tmp_path / 'run'}"])
    reports: list[dict[str, float]] = []
    assert train(config, print, lambda _, report: reports.append(report)) == 0
    assert reports
    assert all(abs(value) < float("inf") for report in reports for value in report.values())
    run, length = RunFolder(config.run_dir), config.train
    assert run.done.read_text() == f"{length.total_images}\n"
    for file in (run.config, run.environment, run.metrics, run.timeline, run.curves):
        assert file.stat().st_size > 0, file.name
    found = snapshots.find(run.path)
    expected = range(length.snapshot_images, length.total_images + 1, length.snapshot_images)
    assert [int(folder.name) for folder in found] == list(expected)
    snapshot = snapshots.load(found[-1])
    assert snapshot.networks
    assert {file.name for file in found[-1].iterdir()} == {
        "config.yaml",
        "snapshot.json",
        "COMPLETE",
        *(f"{name}_ema.safetensors" for name in snapshot.networks),
    }
    names = list(snapshot.samplers)
    for seen in (0, length.total_images):
        assert run.sample_grid(seen).exists()
        for name in names[1:]:
            assert run.sample_grid(seen, name).exists()
