"""The detector of a collapse on synthetic curves."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from bigan.checkpoint.retention import kept
from bigan.run.collapse import NEVER, Detector, Spans, Tick, gap_of, history, spans
from bigan.run_config import CollapseConfig, RunConfig

MakeConfig = Callable[..., RunConfig]

LENGTHS = Spans(window=4_000, baseline=40_000, minimum=40_000)
TICK = 1_000
GAP = gap_of("discriminator")


def curve(
    num: int, gap: Callable[[int], float] = lambda _: 0.5, sigma: Callable[[int], float] = math.log
) -> list[Tick]:
    """`num` noisy ticks: a gap that changes its sign now and then, and two layers."""
    noise = random.Random(3)
    ticks = []
    for seen in range(TICK, (num + 1) * TICK, TICK):
        wide, narrow = noise.gauss(0, 0.3), noise.gauss(1, 0.05)
        report = {
            "train/discriminator/logits_real": 0.2 + gap(seen) + wide * gap(seen),
            "train/discriminator/logits_fake": 0.2,
            "spectral/generator/blocks.0.conv1": sigma(seen) * narrow,
            "spectral/discriminator/linear": 2.0 * narrow,
            "train/seconds": 1.0,
        }
        tick = Tick.of(seen, report)
        assert tick is not None
        ticks.append(tick)
    return ticks


def alarms(ticks: list[Tick], detector: Detector | None = None) -> list[tuple[int, str]]:
    """(images_seen, worst sign) of every tick at which an episode begins."""
    detector = detector or Detector(CollapseConfig(), LENGTHS)
    found = []
    for tick in ticks:
        before = detector.began
        signs = detector.update(tick)
        if signs and before == NEVER:
            found.append((tick.images_seen, str(signs[0])))
    return found


def test_a_healthy_run_gives_no_alarm() -> None:
    """The gap falls from 3 to 0.3, singular values grow twentyfold, and there are outliers."""
    ticks = curve(300, gap=lambda seen: 0.3 + 2.7 * 0.5 ** (seen / 30_000), sigma=lambda s: s / 1e4)
    ticks[90] = ticks[90]._replace(values=ticks[90].values | {GAP: 100.0})
    ticks[200] = ticks[200]._replace(values=ticks[200].values | {"discriminator.linear": 100.0})
    ticks[250] = ticks[250]._replace(values=ticks[250].values | {GAP: math.nan})
    assert alarms(ticks) == []


def test_an_alarm_within_a_window_and_one_per_episode() -> None:
    ticks = curve(150, sigma=lambda seen: 2.0 if seen <= 100_000 else 40.0)
    ((seen, sign),) = alarms(ticks)
    assert 100_000 < seen <= 100_000 + LENGTHS.window
    assert sign.startswith("the largest singular value of generator.blocks.0.conv1 rose from")


def test_the_gap_may_explode_or_vanish() -> None:
    ((seen, sign),) = alarms(curve(150, gap=lambda s: 1.0 if s <= 100_000 else 30.0))
    assert 100_000 < seen <= 104_000
    assert sign.startswith(f"{GAP} rose from")
    ((seen, sign),) = alarms(curve(150, gap=lambda s: 1.0 if s <= 100_000 else 1e-3))
    assert 100_000 < seen <= 104_000
    assert sign.startswith(f"{GAP} fell from")


def test_values_are_watched_as_far_as_they_are_logged() -> None:
    """Singular values alone, logits alone, the logits of every phase; nothing without either."""
    assert Tick.of(100, {"train/generator/loss": 1.0, "eval/fd/x": 3.0}) is None
    assert Tick.of(100, {"train/discriminator/logits_real": 1.0}) is None
    layers = [
        tick._replace(values={k: v for k, v in tick.values.items() if k != GAP})
        for tick in curve(150, sigma=lambda seen: 2.0 if seen <= 100_000 else 40.0)
    ]
    assert all(len(tick.values) == 2 for tick in layers)
    ((seen, sign),) = alarms(layers)
    assert 100_000 < seen <= 104_000
    assert "generator.blocks.0.conv1" in sign

    ticks = []
    for seen in range(TICK, 151 * TICK, TICK):
        report = {
            f"train/{phase}/logits_{kind}": value
            for phase, gap in (("d_a", 1.0), ("d_b", 1.0 if seen <= 100_000 else 30.0))
            for kind, value in (("real", gap), ("fake", 0.0))
        }
        tick = Tick.of(seen, report)
        assert tick is not None
        ticks.append(tick)
    assert ticks[0].values == {gap_of("d_a"): 1.0, gap_of("d_b"): 1.0}
    ((seen, sign),) = alarms(ticks)
    assert 100_000 < seen <= 104_000
    assert sign.startswith(f"{gap_of('d_b')} rose from")


def test_recovery_ends_an_episode_and_another_may_follow() -> None:
    def gap(seen: int) -> float:
        return 30.0 if 100_000 < seen <= 120_000 or seen > 200_000 else 1.0

    assert [seen // 10_000 for seen, _ in alarms(curve(230, gap=gap))] == [10, 20]


def test_nothing_at_the_start_nor_after_a_growth() -> None:
    def sigma(seen: int) -> float:
        return 2.0 if seen % 100_000 <= 30_000 else 40.0

    early = curve(39, sigma=sigma)
    assert alarms(early) == []
    grown = [tick._replace(resolution=4.0 if i < 60 else 8.0) for i, tick in enumerate(curve(150))]
    for i, tick in enumerate(grown):
        tick.values[GAP] = 1.0 if i < 75 else 30.0  # it settles some time after the growth
    assert alarms(grown) == []
    assert alarms([tick._replace(resolution=8.0) for tick in grown])


def test_what_an_interrupted_detector_knows_is_the_same() -> None:
    """Interrupted anywhere, also in an episode that lasts longer than the baseline."""
    ticks = curve(240, gap=lambda s: 30.0 if 100_000 < s <= 180_000 else 1.0)
    uninterrupted = Detector(CollapseConfig(), LENGTHS)
    for cut, tick in enumerate(ticks):
        if cut % 7 == 0:
            again = Detector(CollapseConfig(), LENGTHS)
            again.restore(ticks[:cut], uninterrupted.began)
            assert vars(again) == vars(uninterrupted)
        uninterrupted.update(tick)


def test_lines_beyond_a_checkpoint_are_void() -> None:
    logits = "train/discriminator/logits"

    def line(seen: int, value: float) -> dict[str, float]:
        return {"images_seen": seen, f"{logits}_real": value, f"{logits}_fake": 0.0}

    records = [line(10, 1), line(20, 2), line(30, 3), {"images_seen": 5, "eval/fid/x": 9.0}]
    assert [t.values[GAP] for t in history(records, 20)] == [1, 2]
    records += [line(20, 7)]  # it continued from 10
    assert [t.values[GAP] for t in history(records, 40)] == [1, 7]
    assert history(records, 5) == []


def test_lengths_follow_the_batch_and_the_ticks() -> None:
    assert spans(CollapseConfig(), batch=2048, tick_images=1_000).window == 50 * 2048
    assert spans(CollapseConfig(), batch=50, tick_images=20_000).window == 80_000
    given = CollapseConfig(window_images=7, baseline_images=70, min_images=700)
    assert spans(given, 40, 1_000) == Spans(7, 70, 700)


def test_a_checkpoint_from_before_is_always_there() -> None:
    """However often one is saved; and no more than four are kept."""
    lag = LENGTHS.lag
    for every in (1_000, 3_000, 10_000):
        there: list[int] = []
        for seen in range(every, 200_000, every):
            there = sorted(kept([*there, seen], 2, None, seen - lag))
            assert len(there) <= 4
            if seen >= LENGTHS.minimum:
                healthy = max(s for s in there if s <= seen - lag)
                assert seen - healthy <= 2 * (lag + every)
