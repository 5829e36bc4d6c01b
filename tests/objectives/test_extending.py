"""The method of docs/extending.md is trained, resumed and sampled from, as the page says."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Annotated

import pytest
from commands import ROOT
from pydantic import Discriminator, Tag, create_model

import bigan
from bigan import objectives, run_config
from bigan.data.streaming.dataset import open_manifest
from bigan.data.streaming.stream import sequential
from bigan.distributed.world import World
from bigan.objectives import gan, vae

PAGE = (ROOT / "docs" / "extending.md").read_text()


def block(language: str, index: int = 0) -> str:
    """The `index`-th code block of a language."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)[index]


@pytest.fixture
def denoising(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The page's module, registered by the page's union."""
    module = types.ModuleType("bigan.objectives.denoising")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(block("python", 0), "docs/extending.md", "exec"), module.__dict__)
    names = {
        "Annotated": Annotated, "Tag": Tag, "Discriminator": Discriminator, "gan": gan, "vae": vae,
        "denoising": module, "_name": objectives._name,
    }  # fmt: skip
    exec(block("python", 1), names)

    schema = create_model(
        "RunConfig", __base__=run_config.RunConfig, objective=(names["AnyObjective"], ...)
    )
    monkeypatch.setattr(run_config, "RunConfig", schema)
    return module


def test_the_page_trains(denoising: types.ModuleType, digits: Path, tmp_path: Path) -> None:
    path = tmp_path / "denoising-digits.yaml"
    path.write_text(block("yaml"))
    overrides = [f"run_dir={tmp_path / 'run'}", f"data.path={digits}", "compile=eager"]
    config = bigan.load_config(path, [*overrides, "tracking.mlflow=false"])
    assert (config.model.resolution, config.model.num_classes) == (16, 10)
    reports: list[dict[str, float]] = []
    assert bigan.train(config, on_tick=lambda seen, metrics: reports.append(dict(metrics))) == 0
    assert 0 < reports[-1]["train/autoencoder/loss"] < 2
    snapshot = bigan.load_snapshot(config.run_dir)
    assert set(snapshot.networks) == {"encoder", "decoder"}
    batch = next(iter(sequential(open_manifest(digits), "train", World(), 4)))
    images = batch.pixels.permute(0, 3, 1, 2)
    assert bigan.sample(snapshot, 4, images=images).shape == (4, 1, 16, 16)
    assert bigan.train(config) == 0  # complete: the same command changes nothing
