"""Plots take half of the time of these tests: only those that use `drawn_plots` draw them."""

from __future__ import annotations

from pathlib import Path

import pytest

from bigan.evaluation import truncation, watcher


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
