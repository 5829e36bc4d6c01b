"""What many tests need: the packed digits and a tiny recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import SMOKE

from bigan import config as configs
from bigan.run_config import RunConfig

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in digits, packed once."""
    from bigan.data.packing.pack import pack

    folder = tmp_path_factory.mktemp("data") / "digits"
    pack("digits", folder)
    return folder


@pytest.fixture
def recipe(digits: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """`recipe("train.seed=1")`: the smoke recipe on the packed digits, in a fresh run folder."""

    def make(*overrides: str) -> RunConfig:
        base = [f"data.path={digits}", f"run_dir={tmp_path / 'run'}"]
        return configs.load(RunConfig, SMOKE, [*base, *overrides])

    return make
