"""Training, sampling and evaluation of every family on RGBA images that are not square."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from commands import ROOT
from PIL import Image

import bigan
from bigan.data.packing.pack import pack
from bigan.evaluation.extractors import create, on_white
from bigan.reporting import image_grids
from bigan.run.describe import as_text, describe
from bigan.run.trainer import train
from bigan.run_config import RunConfig, load_config
from bigan.run_folder import RunFolder

HEIGHT, WIDTH = 24, 16


@pytest.fixture(scope="module")
def sprites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """128 RGBA images of 16 x 24 pixels: colored boxes and discs on transparent pixels."""
    draw = np.random.default_rng(0)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    images = []
    for i in range(128):
        image = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
        cy, cx, size = draw.uniform(9, 15), draw.uniform(6, 10), draw.uniform(3, 6)
        dy, dx = np.abs(y - cy), np.abs(x - cx)
        inside = np.maximum(dy, dx) < size if i % 2 else dy**2 + dx**2 < size**2
        image[inside] = (*draw.integers(60, 256, 3), 255)
        images.append((image, i % 2))
    folder = tmp_path_factory.mktemp("data") / "sprites"
    pack(images, folder, resolution=(HEIGHT, WIDTH), channels=4, test_fraction=0.0, pyramid=None)
    return folder


def config_of(name: str, data: Path, folder: Path, **changes: Any) -> RunConfig:
    """A smoke config whose resolution, channels and classes are those of the data."""
    content = yaml.safe_load((ROOT / "configs" / "smoke" / f"{name}.yaml").read_text())
    for key in ("resolution", "image_channels", "num_classes"):
        content["model"].pop(key, None)
    content["train"] |= {"checkpoint_images": 10_000, "tick_images": 40}
    content["evaluation"] |= {"num_samples": 64}
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(content))
    settings = [f"data.path={data}", f"run_dir={folder / 'run'}", "precision=fp32"]
    return load_config(file, [*settings, *(f"{key}={value}" for key, value in changes.items())])


RUNS = [
    pytest.param(
        "digits", {"augment": "{name: diffaugment}", "model.attention_resolutions": "[8]"},
        id="biggan-diffaugment", marks=pytest.mark.full,
    ),
    pytest.param("biggan-deep-128", {}, id="biggan-deep", marks=pytest.mark.full),
    pytest.param(
        "stylegan2-digits",
        {"augment": "{name: ada, pipeline: bgco, fixed: 0.8}", "model.conditional": "true"},
        id="stylegan2-ada",
    ),
    pytest.param("r3gan-digits", {}, id="r3gan", marks=pytest.mark.full),
    pytest.param("vae-digits", {}, id="autoencoder", marks=pytest.mark.full),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes"), RUNS)
def test_a_run_trains_samples_and_is_evaluated(
    name: str, changes: dict[str, str], sprites: Path, tmp_path: Path
) -> None:
    images = {"stylegan2-digits": 128, "r3gan-digits": 96}.get(name, 80)
    config = config_of(
        name, sprites, tmp_path, **{"train.total_images": images, "train.snapshot_images": images},
        **changes,
    )  # fmt: skip
    model = config.model
    assert (model.resolution, model.image_channels, model.num_classes) == ((HEIGHT, WIDTH), 4, 2)
    assert "16x24 px" in as_text(describe(config))
    reports: list[dict[str, float]] = []
    assert train(config, print, lambda _, report: reports.append(report)) == 0
    assert all(np.isfinite(value) for report in reports for value in report.values())
    run = RunFolder(config.run_dir)
    with Image.open(run.sample_grid(images)) as grid:
        geometry = image_grids.read_geometry(grid)
        colors = {color for _, color in grid.convert("RGB").getcolors(1 << 20) or []}
    assert geometry is not None
    assert geometry.height * WIDTH == geometry.width * HEIGHT
    assert colors
    snapshot = bigan.load_snapshot(config.run_dir)
    taken = {"images": None, "labels": None}
    if next(iter(snapshot.samplers.values())).inputs:
        taken = {"images": torch.zeros(3, 4, HEIGHT, WIDTH, dtype=torch.uint8), "labels": [0, 1, 1]}
    assert bigan.sample(snapshot, 3, **taken).shape == (3, 4, HEIGHT, WIDTH)  # type: ignore[arg-type]
    (metrics,) = bigan.evaluate(config.run_dir, echo=lambda _: None).values()
    assert metrics["fd/digits8-cnn-v1"] > 0
    (record,) = run.evaluation.glob("**/*.json")
    protocol = json.loads(record.read_text())["protocol"]
    assert protocol["transparency"] == "composited on white"
    assert protocol["data_transform"] == "center-lanczos-v1"


@pytest.mark.full
def test_a_growing_run_of_such_images(sprites: Path, tmp_path: Path) -> None:
    config = config_of(
        "progan-digits", sprites, tmp_path,
        **{
            "growth.levels": "[{resolution: [6, 4], batch: 40}, {resolution: [12, 8], batch: 16}]",
            "growth.stable_images": 40, "growth.fade_images": 32, "train.total_images": 200,
            "train.snapshot_images": 100, "evaluation.num_samples": 16,
        },
    )  # fmt: skip
    printed: list[str] = []
    assert train(config, printed.append, lambda *_: None) == 0
    assert [line.split(",")[0] for line in printed if line.startswith("stage")] == [
        "stage 1 of 5: 4x6 px", "stage 2 of 5: 8x12 px", "stage 3 of 5: 8x12 px",
        "stage 4 of 5: 16x24 px", "stage 5 of 5: 16x24 px",
    ]  # fmt: skip
    found = bigan.evaluate(config.run_dir, echo=lambda _: None)
    assert max(found) == 200
    with Image.open(RunFolder(config.run_dir).sample_grid(0)) as grid:
        geometry = image_grids.read_geometry(grid)
    assert geometry is not None
    assert geometry.height * WIDTH == geometry.width * HEIGHT


@pytest.mark.parametrize("channels", [2, 4])
def test_metrics_of_transparent_images_are_those_on_white(channels: int) -> None:
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, channels, 16, 24), dtype=torch.uint8, generator=draw)
    white = on_white(images)
    expected = [
        np.asarray(
            Image.alpha_composite(
                Image.new("RGBA", (24, 16), (255, 255, 255, 255)),
                Image.fromarray(image.permute(1, 2, 0).numpy()).convert("RGBA"),
            ).convert("L" if channels == 2 else "RGB")
        ).reshape(16, 24, -1)
        for image in images
    ]
    difference = white.permute(0, 2, 3, 1).numpy().astype(int) - np.stack(expected)
    assert np.abs(difference).max() <= 1  # PIL rounds twice
    extractor = create("digits8-cnn-v1")
    for one, other in zip(extractor(images), extractor(white), strict=True):
        assert torch.equal(one, other)
    opaque = torch.cat([white, torch.full_like(white[:, :1], 255)], dim=1)
    assert torch.equal(on_white(opaque), white)
