"""Fixtures of the data tests that more than one file uses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from verify_folders import CLASSES, picture, samples, write
from web import Web, serving

from bigan.data.packing.pack import pack
from bigan.data.stores import outages


@pytest.fixture(autouse=True, scope="module")
def no_fsync() -> Iterator[None]:
    """Skip fsync: these tests kill processes, not the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 JPEG files in two classes."""
    root = tmp_path_factory.mktemp("photos") / "photos"
    random = np.random.default_rng(0)
    for i in range(60):
        file = root / f"class{i % 2}" / f"image.{i:02d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (20, 30, 3), np.uint8)).save(file)
    return root


@pytest.fixture(scope="session")
def digits8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in digits at 8 px, in shards of 100."""
    folder = tmp_path_factory.mktemp("data") / "digits"
    pack("digits", folder, resolution=8, shard_size=100)
    return folder


@pytest.fixture
def web(digits8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """A server of `digits8`; downloads are repeated at once, manifests cached by the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    monkeypatch.setattr(outages, "FIRST_WAIT_SECONDS", 0.0)
    with serving(digits8) as server:
        yield server


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """The output of `bigan pack` for 12 images and one unusable image."""
    for number in range(12):
        file = tmp_path / "photos" / CLASSES[number % 3] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(number)).save(file)
    (tmp_path / "photos" / "cat" / "bad.png").write_bytes(b"no image")
    folder = tmp_path / "packed"
    pack(tmp_path / "photos", folder, resolution=8, shard_size=8, test_fraction=0, max_bad=1)
    return folder


@pytest.fixture
def pngs(tmp_path: Path) -> Path:
    return write(tmp_path / "animals", samples("png"), "png")
