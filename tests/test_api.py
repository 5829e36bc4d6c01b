"""The public Python API: load_config, train, evaluate, load_snapshot, sample."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import SMOKE

import bigan


@pytest.fixture(scope="module")
def run_dir(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of the smoke config, trained through the API."""
    folder = tmp_path_factory.mktemp("api") / "run"
    config = bigan.load_config(SMOKE, [f"data.path={digits}", f"run_dir={folder}"])
    ticks: list[int] = []
    assert bigan.train(config, on_tick=lambda seen, metrics: ticks.append(seen)) == 0
    assert ticks[-1] == config.train.total_images
    return folder


def test_version_is_that_of_the_package() -> None:
    assert bigan.__version__ == importlib.metadata.version("bigan")


def test_import_is_light() -> None:
    code = "import bigan, sys; assert not {'torch', 'mlflow', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_evaluate_returns_the_metrics_of_every_snapshot(run_dir: Path) -> None:
    lines: list[str] = []
    found = bigan.evaluate(run_dir, echo=lines.append)
    assert sorted(found) == [200, 400]
    assert all(metrics["fd/digits8-cnn-v1"] > 0 for metrics in found.values())
    assert bigan.evaluate(run_dir, echo=lines.append) == found


def test_samples_are_functions_of_seed_and_index(run_dir: Path) -> None:
    snapshot = bigan.load_snapshot(run_dir)
    assert snapshot.images_seen == 400
    assert len(snapshot.classes) == 10
    images = bigan.sample(snapshot, 6, batch=4)
    assert images.shape == (6, 1, 16, 16)
    assert images.dtype == torch.uint8
    assert torch.equal(bigan.sample(snapshot, 3), images[:3])
    assert not torch.equal(bigan.sample(snapshot, 6, seed=1), images)
    sevens = bigan.sample(snapshot, 6, labels=[7] * 6)
    assert not torch.equal(sevens, images)
    older = bigan.load_snapshot(run_dir / "snapshots" / "200")
    assert not torch.equal(bigan.sample(older, 6), images)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"sampler": "prior"}, "latent"),
        ({"labels": [1, 2]}, "labels"),
        ({"labels": [10, 0, 0]}, r"\[0, 10\)"),
        ({"truncation": 0.0}, "0.02 or more"),
        ({"images": torch.zeros(3, 1, 16, 16, dtype=torch.uint8)}, "images"),
    ],
)
def test_wrong_arguments_are_one_line_errors(
    run_dir: Path, arguments: dict[str, object], said: str
) -> None:
    with pytest.raises(bigan.UserError, match=said):
        bigan.sample(bigan.load_snapshot(run_dir), 3, **arguments)  # type: ignore[arg-type]


def test_a_folder_without_snapshot_is_refused(tmp_path: Path) -> None:
    with pytest.raises(bigan.UserError, match="snapshot"):
        bigan.load_snapshot(tmp_path)
