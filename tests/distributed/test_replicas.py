"""What counts as a replica that has drifted and as a slow process; the others are made up."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bigan.distributed import replica_check
from bigan.distributed.replica_check import (
    PATIENCE_TICKS,
    SlowRanks,
    check_replicas,
    fingerprint,
    slowest,
)
from bigan.distributed.world import TOLD, World
from bigan.errors import RunError


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(
        memory_format=torch.channels_last
    )


def disturbed(network: nn.Module, amount: float) -> nn.Module:
    with torch.no_grad():
        next(network.parameters())[1, 2, 0, 1] += amount
    return network


def test_fingerprint_is_that_of_the_bits() -> None:
    expected = fingerprint(network())
    assert expected.dtype == torch.int64
    assert fingerprint(network()) == expected
    assert fingerprint(network().to(memory_format=torch.contiguous_format)) == expected
    assert fingerprint(disturbed(network(), 1e-7)) != expected


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
)
def test_fingerprint_sees_every_number_of_every_type(dtype: torch.dtype) -> None:
    for index in range(3):
        holder = nn.Module()
        holder.register_buffer("numbers", torch.zeros(3, dtype=dtype))
        before = fingerprint(holder)
        holder.numbers[index] = 1
        assert fingerprint(holder) != before


def test_fingerprint_tells_tensors_apart() -> None:
    """Two that have changed places, or against each other."""
    first, second = nn.Module(), nn.Module()
    for name, one, other in (("a", 1, 2), ("b", 2, 1)):
        first.register_buffer(name, torch.tensor(one))
        second.register_buffer(name, torch.tensor(other))
    assert fingerprint(first) != fingerprint(second)


def checked(monkeypatch: pytest.MonkeyPatch, everyone: list[list[int]], rank: int = 0) -> None:
    """`check_replicas` of two networks, where the processes have these fingerprints."""
    monkeypatch.setattr(replica_check, "gather", lambda *_: everyone)
    check_replicas(World(rank, len(everyone)), {"g": network(), "d": network()}, 400)


@pytest.mark.parametrize(
    ("everyone", "who"),
    [
        ([[1, 1], [1, 2]], "rank 1 (d) differs from"),  # among equals rank 0 is right
        ([[3, 4], [1, 2], [1, 2]], "rank 0 (g, d) differs from"),
        ([[1, 2], [1, 2], [1, 9], [1, 2], [8, 2]], "rank 2 (d), rank 4 (g) differ from"),
    ],
)
def test_those_that_differ_from_most_are_named(
    monkeypatch: pytest.MonkeyPatch, everyone: list[list[int]], who: str
) -> None:
    with pytest.raises(RunError) as caught:
        checked(monkeypatch, everyone)
    assert f"images_seen = 400: {who} the others" in str(caught.value)


def test_one_process_prints_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in (0, 1, 2):
        with pytest.raises(RunError) as caught:
            checked(monkeypatch, [[1, 1], [1, 1], [2, 1]], rank)
        assert (TOLD in getattr(caught.value, "__notes__", [])) == (rank != 0)


def test_equal_replicas_and_a_single_process_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    checked(monkeypatch, [[1, 2], [1, 2]])
    monkeypatch.undo()
    check_replicas(World(), {"g": network()}, 400)


def test_slowest_is_compared_with_the_median_of_the_others() -> None:
    assert slowest([0.1, 0.3]) == (1, pytest.approx(3))
    assert slowest([0.05, 0.1, 0.4, 0.2]) == (2, pytest.approx(4))
    assert slowest([0.1, 0.1]) == (0, pytest.approx(1))


def said(monkeypatch: pytest.MonkeyPatch, *ticks: list[list[float]]) -> list[str]:
    """The lines after these ticks, of which each holds (own seconds, waiting for images)."""
    slow_ranks, lines = SlowRanks(World(0, len(ticks[0]))), []
    for everyone in ticks:
        monkeypatch.setattr(replica_check, "gather_numbers", lambda *_, e=everyone: e)
        values, line = slow_ranks.report(*everyone[0])
        assert values["rank/step_ms/1"] == pytest.approx(1000 * everyone[1][0])
        lines.append(line)
    return lines


SLOW, EQUAL = [[0.1, 0.0], [0.15, 0.0]], [[0.1, 0.0], [0.12, 0.0]]


def test_slow_process_is_named_once_after_some_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = said(monkeypatch, *[SLOW] * (3 * PATIENCE_TICKS))
    assert [i for i, line in enumerate(lines) if line] == [PATIENCE_TICKS - 1]
    assert lines[PATIENCE_TICKS - 1] == (
        "rank 1 is slow: 150 ms of its own work per step, the others 100 ms; "
        "all of them wait for it"
    )


def test_chance_names_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a slow tick now and then, nor one process after the other."""
    assert not any(said(monkeypatch, *[SLOW, SLOW, EQUAL] * 4))
    assert not any(said(monkeypatch, *[SLOW, SLOW[::-1]] * 6))
    assert not any(said(monkeypatch, *[EQUAL] * 12))


def test_slow_again_is_named_again(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = said(monkeypatch, *[SLOW] * 4, EQUAL, *[SLOW] * 4)
    assert len([line for line in lines if line]) == 2


def test_waiting_for_images_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = said(monkeypatch, *[[[0.1, 0.001], [0.2, 0.09]]] * PATIENCE_TICKS)
    assert "200 ms of its own work per step, 90 ms of them waiting for images, " in lines[-1]


def test_one_process_is_not_compared() -> None:
    assert SlowRanks(World()).report(0.1, 0.0) == ({}, "")
