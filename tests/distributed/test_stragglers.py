"""Detection of stragglers; the other ranks are simulated."""

from __future__ import annotations

import pytest

from bigan.distributed import stragglers
from bigan.distributed.stragglers import PATIENCE_TICKS, SlowRanks, slowest
from bigan.distributed.world import World


def test_slowest_is_compared_with_the_median_of_the_others() -> None:
    assert slowest([0.1, 0.3]) == (1, pytest.approx(3))
    assert slowest([0.05, 0.1, 0.4, 0.2]) == (2, pytest.approx(4))
    assert slowest([0.1, 0.1]) == (0, pytest.approx(1))


def said(monkeypatch: pytest.MonkeyPatch, *ticks: list[list[float]]) -> list[str]:
    """The lines after these ticks, each with (own seconds, waiting for images) of every rank."""
    slow_ranks, lines = SlowRanks(World(0, len(ticks[0]))), []
    for rows in ticks:
        monkeypatch.setattr(stragglers, "gather_numbers", lambda *_, e=rows: e)
        values, line = slow_ranks.report(*rows[0])
        assert values["rank/step_ms/1"] == pytest.approx(1000 * rows[1][0])
        lines.append(line)
    return lines


SLOW, EQUAL = [[0.1, 0.0], [0.15, 0.0]], [[0.1, 0.0], [0.12, 0.0]]


def test_slow_rank_is_reported_once_after_several_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = said(monkeypatch, *[SLOW] * (3 * PATIENCE_TICKS))
    assert [i for i, line in enumerate(lines) if line] == [PATIENCE_TICKS - 1]
    assert lines[PATIENCE_TICKS - 1].startswith("rank 1 is slow: 150 ms ")
    assert "100 ms" in lines[PATIENCE_TICKS - 1]


def test_occasional_slow_ticks_are_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a slow tick once in a while, nor alternating slow ranks."""
    assert not any(said(monkeypatch, *[SLOW, SLOW, EQUAL] * 4))
    assert not any(said(monkeypatch, *[SLOW, SLOW[::-1]] * 6))
    assert not any(said(monkeypatch, *[EQUAL] * 12))


def test_rank_that_is_slow_again_is_reported_again(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = said(monkeypatch, *[SLOW] * 4, EQUAL, *[SLOW] * 4)
    assert len([line for line in lines if line]) == 2


def test_waiting_for_images_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = said(monkeypatch, *[[[0.1, 0.001], [0.2, 0.09]]] * PATIENCE_TICKS)
    assert "200 ms " in lines[-1]
    assert "90 ms of them waiting for images" in lines[-1]


def test_world_size_1_is_not_compared() -> None:
    assert SlowRanks(World()).report(0.1, 0.0) == ({}, "")
