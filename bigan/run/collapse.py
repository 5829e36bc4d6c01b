"""Detects a collapse of training from the reports of the ticks.

When a GAN collapses, the largest singular values of the generator's weights explode, and the
discriminator separates real from generated images perfectly (Brock et al. 2019, arXiv:1809.11096,
section 4) or not at all. Two kinds of values are watched if a report contains them:

- the gap |D(real) - D(fake)| of the mean logits of each phase that logs `logits_real` and
  `logits_fake`; it may explode or vanish;
- the largest singular value of every spectrally normalized layer, before its normalization.

The median of each value over the last window is compared with its median over a longer period that
ended two windows ago. The earlier median follows a slow rise, and a single outlier does not change
a median. A value that has changed too far begins an episode. During an episode the earlier medians
are fixed; it ends once every value is back within half of its limit. The module has no side
effects: it reads no clock and no files; rollback.py acts on it.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from bigan.run_config import CollapseConfig

NEVER = -1  # the images_seen at which an episode began, if there is none
MIN_TICKS = 3  # minimum number of ticks in an earlier median
TINY = 1e-9  # replaces a gap of 0
WINDOW_BATCHES, WINDOW_TICKS = 50, 4  # minimum length of a window in batches and in ticks
BASELINE_WINDOWS = 10
SPECTRAL = "spectral/"
GAP = "|D(real) - D(fake)|"
PEAK = "largest "  # before the name of a gap: its largest value in a window


class Spans(NamedTuple):
    """Lengths in images."""

    window: int
    baseline: int  # of the earlier median
    minimum: int  # without detection at the start and after growth

    @property
    def lag(self) -> int:
        """Assumed length from the beginning of an episode to its detection."""
        return 2 * self.window


def spans(config: CollapseConfig, batch: int, tick_images: int) -> Spans:
    """The lengths of the config, with its defaults for batches and ticks of these sizes."""
    window = config.window_images or max(WINDOW_BATCHES * batch, WINDOW_TICKS * tick_images)
    default = BASELINE_WINDOWS * window
    return Spans(window, config.baseline_images or default, config.min_images or default)


class Tick(NamedTuple):
    """The watched values of one tick."""

    images_seen: int
    resolution: float  # of a growing model: values of different resolutions are not compared
    values: dict[str, float]

    @classmethod
    def of(cls, images_seen: int, report: Mapping[str, Any]) -> Tick | None:
        """Read a tick from its report or its line in metrics.jsonl; None without watched values.

        Names: "|D(real) - D(fake)| of <phase>", and "<network>.<layer>" for singular values.
        """
        values: dict[str, float] = {}
        for key, value in report.items():
            group, _, name = key.partition("/")
            phase, _, scalar = name.rpartition("/")
            if group == "train" and scalar == "logits_real":
                fake = report.get(f"train/{phase}/logits_fake")
                if fake is not None:
                    values[gap_of(phase)] = abs(value - fake)
            elif key.startswith(SPECTRAL):
                values[name.replace("/", ".", 1)] = value
        if not values:
            return None
        return cls(images_seen, report.get("train/resolution", 0.0), values)


def gap_of(phase: str) -> str:
    """Name of the gap of the logits of a phase."""
    return f"{GAP} of {phase}"


def is_gap(name: str) -> bool:
    return name.startswith(GAP)


def history(records: Iterable[Mapping[str, Any]], images_seen: int) -> list[Tick]:
    """The ticks in metrics.jsonl that led to the state at `images_seen`, in order.

    Lines that were logged after a checkpoint from which the run was later resumed are left out.
    """
    ticks: list[Tick] = []
    for record in records:
        tick = Tick.of(record["images_seen"], record)
        if tick is None:
            continue
        while ticks and ticks[-1].images_seen >= tick.images_seen:
            ticks.pop()
        ticks.append(tick)
    while ticks and ticks[-1].images_seen > images_seen:
        ticks.pop()
    return ticks


@dataclass(frozen=True)
class Sign:
    """A value that has changed too far: its earlier and its current median."""

    name: str
    before: float
    now: float
    excess: float  # current value / limit, or limit / current value

    def __str__(self) -> str:
        what = self.name if is_gap(self.name) else f"the largest singular value of {self.name}"
        verb = "rose" if self.now > self.before else "fell"
        return f"{what} {verb} from {self.before:.3g} to {self.now:.3g}"


class Detector:
    """Watches the ticks of one run. Its state is a function of the ticks and of `began`.

    `began` is the images_seen at which the current episode began, or `NEVER`.
    """

    def __init__(self, config: CollapseConfig, lengths: Spans) -> None:
        self.began = NEVER
        self._config, self._lengths = config, lengths
        self._ticks: deque[Tick] = deque()  # no older than the baseline
        self._since = 0  # images_seen of the first tick at this resolution
        self._reference: dict[str, float] = {}  # the earlier medians during an episode

    def restore(self, ticks: Iterable[Tick], began: int) -> None:
        """Set the state after `ticks` of a run whose episode began at `began`, if any."""
        detected = began + self._lengths.lag
        for tick in ticks:
            self._append(tick)
            if began != NEVER and not self._reference and tick.images_seen >= detected:
                self._reference = self._medians(began - self._lengths.baseline, began)
        self.began = began if self._reference else NEVER

    def update(self, tick: Tick) -> list[Sign]:
        """Add a tick; returns the values that have changed too far, the worst first.

        Begins an episode (sets `began`) if there are any, and ends the current one if all values
        are back within half of their limits.
        """
        self._append(tick)
        seen, lengths = tick.images_seen, self._lengths
        recent = self._recent(seen)
        if self.began != NEVER:
            if not self._signs(self._reference, recent, share=0.5):
                self.began, self._reference = NEVER, {}
            return self._signs(self._reference, recent)
        if seen - self._since < lengths.minimum:
            return []
        start = seen - lengths.lag
        reference = self._medians(start - lengths.baseline, start)
        signs = self._signs(reference, recent)
        if signs:
            self.began, self._reference = start, reference
        return signs

    def _append(self, tick: Tick) -> None:
        if not self._ticks or tick.resolution != self._ticks[-1].resolution:
            self._ticks.clear()
            self._since = tick.images_seen
            self.began, self._reference = NEVER, {}
        self._ticks.append(tick)
        oldest = tick.images_seen - self._lengths.lag - self._lengths.baseline
        while self._ticks[0].images_seen <= oldest:
            self._ticks.popleft()

    def _medians(self, after: int, until: int, min_ticks: int = MIN_TICKS) -> dict[str, float]:
        """The median of each value over the ticks in (after, until]; empty if too few ticks."""
        chosen = [tick.values for tick in self._ticks if after < tick.images_seen <= until]
        if len(chosen) < min_ticks:
            return {}
        known = chosen[-1].keys()
        return {k: statistics.median(v[k] for v in chosen if k in v) for k in known}

    def _recent(self, seen: int) -> dict[str, float]:
        """The medians over the last window, and the largest of each gap in it."""
        start = seen - self._lengths.window
        chosen = [tick.values for tick in self._ticks if tick.images_seen > start]
        medians = self._medians(start, seen, min_ticks=1)
        peaks = {
            f"{PEAK}{name}": max(values[name] for values in chosen if name in values)
            for name in medians
            if is_gap(name)
        }
        return medians | peaks

    def _signs(
        self, before: Mapping[str, float], now: Mapping[str, float], share: float = 1.0
    ) -> list[Sign]:
        """The values beyond `share` of the way to their limits; never a NaN."""
        config, signs = self._config, []
        for name in before.keys() & now.keys():
            floor, ratio = config.singular_floor, config.singular_ratio
            if is_gap(name):
                floor, ratio = config.gap_floor, config.gap_ratio
                # The peak, not the median: a gap with a changing sign is often close to 0.
                low, peak = before[name] / config.vanished_ratio, now[f"{PEAK}{name}"]
                signs.append(Sign(name, before[name], peak, low / max(peak, TINY) / share))
            excess = now[name] / (ratio * max(before[name], floor))
            signs.append(Sign(name, before[name], now[name], excess / share))
        found = [sign for sign in signs if sign.excess > 1]
        return sorted(found, key=lambda sign: (-sign.excess, sign.name))
