"""Fixtures of many tests: the packed digits, and configs of small runs on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import SMOKE

from bigan.run_config import RunConfig, load_config

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in digits, packed once."""
    from bigan.data.packing.pack import pack

    folder = tmp_path_factory.mktemp("data") / "digits"
    pack("digits", folder)
    return folder


@pytest.fixture
def make_config(digits: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """`make_config("train.seed=1")`: the smoke config on the packed digits, in a new run folder."""

    def make(*overrides: str) -> RunConfig:
        base = [f"data.path={digits}", f"run_dir={tmp_path / 'run'}"]
        return load_config(SMOKE, [*base, *overrides])

    return make
