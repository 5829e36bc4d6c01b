"""Schedules as functions of images, and the half-life of an EMA."""

import pytest
import torch
from torch import nn

from bigan.objectives import ema
from bigan.objectives.ema import EmaConfig
from bigan.schedules import due, ema_decay, warmup


def test_due_at_each_crossing() -> None:
    crossings = [n for n in range(0, 400, 40) if due(n, n + 40, 100)]
    assert crossings == [80, 160, 280, 360]


def test_warmup_is_linear_in_images() -> None:
    assert [warmup(n, 50, 200) for n in (0, 50, 100, 150, 200, 10**6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert warmup(0, 50, 0) == 1.0


def test_halflife_does_not_depend_on_the_batch() -> None:
    for batch in (10, 50, 500):
        kept = 1.0
        for _ in range(1000 // batch):
            kept *= ema_decay(10**9, batch, 1000, None, 0)
        assert kept == pytest.approx(0.5)


def test_rampup_and_start() -> None:
    assert ema_decay(100, 10, 1000, 0.5, 0) == pytest.approx(0.5 ** (10 / 50))
    assert ema_decay(10**6, 10, 1000, 0.5, 0) == pytest.approx(0.5 ** (10 / 1000))
    assert ema_decay(99, 10, 1000, None, 100) == 0.0
    assert ema_decay(100, 10, 1000, None, 100) > 0.9
    assert ema_decay(0, 10, 1000, 0.5, 0) == 0.0
    assert ema_decay(700, 10, 1000, 0.5, 0, born=600) == pytest.approx(0.5 ** (10 / 50))


def test_update_averages_parameters_and_copies_buffers() -> None:
    live = nn.BatchNorm1d(2)
    average = ema.ema_copy(live)
    with torch.no_grad():
        live.weight.fill_(3.0)
        live.running_mean.fill_(7.0)
    ema.update(average, live, EmaConfig(halflife_images=100.0), 1000, 100)
    assert torch.equal(average.weight, torch.full((2,), 2.0))
    assert torch.equal(average.running_mean, torch.full((2,), 7.0))
    assert not any(p.requires_grad for p in average.parameters())


def test_the_ema_is_a_copy_until_its_start() -> None:
    live = nn.Linear(2, 2)
    average = ema.ema_copy(live)
    with torch.no_grad():
        live.weight.add_(1)
    ema.update(average, live, EmaConfig(halflife_images=1e9, start_images=500), 400, 100)
    assert torch.equal(average.weight, live.weight)


def test_halflife_is_annealed() -> None:
    """Half a cosine from `halflife_images` to `halflife_end_images`: 200 images in the middle."""
    config = EmaConfig(halflife_images=100.0, halflife_end_images=300.0)
    live = nn.Linear(2, 2)
    average = ema.ema_copy(live)
    with torch.no_grad():
        live.weight.add_(1)
    before = average.weight.clone()
    ema.update(average, live, config, 500, 200, anneal_images=1000)
    torch.testing.assert_close(average.weight, before + 0.5)
