"""Extractors and images. Plots are drawn only for `drawn_plots`: they took half of the time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from bigan.evaluation import extractors, truncation, watcher
from bigan.evaluation.train_digits8_cnn import load_split


@pytest.fixture
def drawn_plots() -> None:
    """The test draws its plots."""


@pytest.fixture(autouse=True)
def _empty_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def empty_curves(run_dir: Path, path: Path) -> None:
        path.touch()

    def empty_draw(path: Path, *_: object) -> None:
        path.touch()

    if "drawn_plots" not in request.fixturenames:
        monkeypatch.setattr(watcher, "curves", empty_curves)
        monkeypatch.setattr(truncation, "draw", empty_draw)


@pytest.fixture(scope="session")
def extractor() -> extractors.Extractor:
    return extractors.create(extractors.DIGITS8)


@pytest.fixture(scope="session")
def digit_images() -> dict[str, Tensor]:
    """Split -> uint8 images [n, 1, 8, 8]."""
    return {split: load_split(split)[0] for split in ("train", "test")}


@pytest.fixture(scope="session")
def random_inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights file of the right shape, randomly initialized: tests have no network access."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    empty = FeatureExtractorInceptionV3.__new__(FeatureExtractorInceptionV3)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        module = "torch_fidelity.feature_extractor_inceptionv3"
        patch.setattr(f"{module}.load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(nn.Module, "load_state_dict", lambda *_, **__: None)
        empty.__init__(extractors.INCEPTION, ["2048"])
    torch.save(empty.state_dict(), path)
    return path
