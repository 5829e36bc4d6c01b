"""Detection of diverged replicas; the other ranks are simulated."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bigan.distributed import replica_check
from bigan.distributed.replica_check import check_replicas, fingerprint
from bigan.distributed.world import REPORTED_ELSEWHERE, World
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


def test_fingerprint_depends_on_bits_not_on_memory_format() -> None:
    expected = fingerprint(network())
    assert expected.dtype == torch.int64
    assert fingerprint(network()) == expected
    assert fingerprint(network().to(memory_format=torch.contiguous_format)) == expected
    assert fingerprint(disturbed(network(), 1e-7)) != expected


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
)
def test_fingerprint_depends_on_every_number_of_every_type(dtype: torch.dtype) -> None:
    for index in range(3):
        holder = nn.Module()
        holder.register_buffer("numbers", torch.zeros(3, dtype=dtype))
        before = fingerprint(holder)
        holder.numbers[index] = 1
        assert fingerprint(holder) != before


def test_fingerprint_depends_on_the_order_of_tensors() -> None:
    """Two tensors are exchanged."""
    first, second = nn.Module(), nn.Module()
    for name, one, other in (("a", 1, 2), ("b", 2, 1)):
        first.register_buffer(name, torch.tensor(one))
        second.register_buffer(name, torch.tensor(other))
    assert fingerprint(first) != fingerprint(second)


def checked(monkeypatch: pytest.MonkeyPatch, prints: list[list[int]], rank: int = 0) -> None:
    """`check_replicas` of two networks, whose fingerprints on the ranks are `prints`."""
    monkeypatch.setattr(replica_check, "gather", lambda *_: prints)
    check_replicas(World(rank, len(prints)), {"g": network(), "d": network()}, 400)


@pytest.mark.parametrize(
    ("prints", "who"),
    [
        ([[1, 1], [1, 2]], "rank 1 (d) differs from"),  # in a tie rank 0 is correct
        ([[3, 4], [1, 2], [1, 2]], "rank 0 (g, d) differs from"),
        ([[1, 2], [1, 2], [1, 9], [1, 2], [8, 2]], "rank 2 (d), rank 4 (g) differ from"),
    ],
)
def test_ranks_that_differ_from_most_are_named(
    monkeypatch: pytest.MonkeyPatch, prints: list[list[int]], who: str
) -> None:
    with pytest.raises(RunError) as caught:
        checked(monkeypatch, prints)
    assert f"images_seen = 400: {who} the others" in str(caught.value)


def test_error_is_printed_on_rank_0_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in (0, 1, 2):
        with pytest.raises(RunError) as caught:
            checked(monkeypatch, [[1, 1], [1, 1], [2, 1]], rank)
        assert (REPORTED_ELSEWHERE in getattr(caught.value, "__notes__", [])) == (rank != 0)


def test_equal_replicas_and_a_single_process_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    checked(monkeypatch, [[1, 2], [1, 2]])
    monkeypatch.undo()
    check_replicas(World(), {"g": network()}, 400)
