"""Does training collapse? What the last ticks report, against what the ticks before them did.

When a GAN collapses, largest singular values of the generator's weights explode and the
discriminator tells its images from real ones at a glance (Brock et al. 2019, arXiv:1809.11096,
section 4), or says the same of all images. So two kinds of numbers are watched:

- the gap |D(real) - D(fake)| between the mean logits, of any recipe: it may explode or vanish;
- the largest singular value of every spectrally normalised layer, before its normalisation.

The median of each over the last window is compared with its median over a longer time that ended
two windows ago: a curve that rises slowly takes its reference with it, and one odd tick is no
median. What changes too far begins an episode, which lasts until all have come half-way down again;
its reference stays what it was. Pure: no clock, no files; `recovery` acts on it.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from bigan.run_config import CollapseConfig

NEVER = -1  # in place of the beginning of an episode: there is none
MIN_TICKS = 3  # behind a reference
TINY = 1e-9  # a gap that is none
WINDOW_BATCHES, WINDOW_TICKS = 50, 4  # a window has at least so many of both
BASELINE_WINDOWS = 10
SPECTRAL = "spectral/"
LOGITS = "train/discriminator/logits"
GAP = "|D(real) - D(fake)|"
PEAK = "largest |D(real) - D(fake)|"


class Spans(NamedTuple):
    """Lengths in images."""

    window: int
    baseline: int
    minimum: int

    @property
    def hindsight(self) -> int:
        """How long before an alarm its episode is taken to have begun."""
        return 2 * self.window


def spans(config: CollapseConfig, batch: int, tick_images: int) -> Spans:
    """Those that the config leaves open follow from the recipe."""
    window = config.window_images or max(WINDOW_BATCHES * batch, WINDOW_TICKS * tick_images)
    several = BASELINE_WINDOWS * window
    return Spans(window, config.baseline_images or several, config.min_images or several)


class Tick(NamedTuple):
    """What is watched of one tick."""

    images_seen: int
    resolution: float  # of a growing model: another one's numbers say nothing about this one's
    values: dict[str, float]

    @classmethod
    def of(cls, images_seen: int, report: Mapping[str, Any]) -> Tick | None:
        """From the report of a tick, or its line in the journal; None if it is not the trainer's.

        Keys: `GAP`, and "g.<layer>" and "d.<layer>" of singular values.
        """
        if f"{LOGITS}_real" not in report:
            return None
        values = {GAP: abs(report[f"{LOGITS}_real"] - report[f"{LOGITS}_fake"])}
        for key, value in report.items():
            if key.startswith(SPECTRAL):
                values[key.removeprefix(SPECTRAL).replace("/", ".", 1)] = value
        return cls(images_seen, report.get("train/resolution", 0.0), values)


def history(records: Iterable[Mapping[str, Any]], images_seen: int) -> list[Tick]:
    """The ticks of a journal that lead to the state at `images_seen`, in order.

    Where the run went back, to a checkpoint, the lines it had written beyond are void.
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
    """One number that has changed too far: its medians before and now."""

    name: str
    before: float
    now: float
    excess: float  # how far beyond the limit, as a factor

    def __str__(self) -> str:
        what = self.name if self.name == GAP else f"the largest singular value of {self.name}"
        verb = "rose" if self.now > self.before else "fell"
        return f"{what} {verb} from {self.before:.3g} to {self.now:.3g}"


class Detector:
    """Follows the ticks of one run. What it knows is a function of them, and of `began`.

    `began` is the images_seen from which on nothing is trusted any more, `NEVER` in good health.
    """

    def __init__(self, config: CollapseConfig, lengths: Spans) -> None:
        self.began = NEVER
        self._config, self._lengths = config, lengths
        self._ticks: deque[Tick] = deque()  # as far back as they are needed
        self._since = 0  # the first tick at this resolution
        self._reference: dict[str, float] = {}  # the medians before, while an episode lasts

    def restore(self, ticks: Iterable[Tick], began: int) -> None:
        """Take up the state after `ticks`, of a run whose episode, if any, had begun at `began`."""
        noticed = began + self._lengths.hindsight
        for tick in ticks:
            self._note(tick)
            if began != NEVER and not self._reference and tick.images_seen >= noticed:
                self._reference = self._medians(began - self._lengths.baseline, began)
        self.began = began if self._reference else NEVER

    def look(self, tick: Tick) -> list[Sign]:
        """What has changed too far by this tick, the worst first; nothing in good health.

        It begins an episode (`began` is set) or, in the course of one, still holds.
        """
        self._note(tick)
        seen, lengths = tick.images_seen, self._lengths
        recent = self._recent(seen)
        if self.began != NEVER:
            if not self._signs(self._reference, recent, share=0.5):
                self.began, self._reference = NEVER, {}
            return self._signs(self._reference, recent)
        if seen - self._since < lengths.minimum:
            return []
        start = seen - lengths.hindsight
        reference = self._medians(start - lengths.baseline, start)
        signs = self._signs(reference, recent)
        if signs:
            self.began, self._reference = start, reference
        return signs

    def _note(self, tick: Tick) -> None:
        if not self._ticks or tick.resolution != self._ticks[-1].resolution:
            self._ticks.clear()
            self._since = tick.images_seen
            self.began, self._reference = NEVER, {}
        self._ticks.append(tick)
        oldest = tick.images_seen - self._lengths.hindsight - self._lengths.baseline
        while self._ticks[0].images_seen <= oldest:
            self._ticks.popleft()

    def _medians(self, after: int, until: int, least: int = MIN_TICKS) -> dict[str, float]:
        """Of every number, over the ticks in (after, until]; none if there are too few."""
        chosen = [tick.values for tick in self._ticks if after < tick.images_seen <= until]
        if len(chosen) < least:
            return {}
        known = chosen[-1].keys()
        return {k: statistics.median(v[k] for v in chosen if k in v) for k in known}

    def _recent(self, seen: int) -> dict[str, float]:
        """The medians of the last window, and the largest gap in it."""
        start = seen - self._lengths.window
        peak = max(tick.values[GAP] for tick in self._ticks if tick.images_seen > start)
        return self._medians(start, seen, least=1) | {PEAK: peak}

    def _signs(
        self, before: Mapping[str, float], now: Mapping[str, float], share: float = 1.0
    ) -> list[Sign]:
        """The numbers beyond `share` of the way to their limits; a NaN is never beyond."""
        config, signs = self._config, []
        for name in before.keys() & now.keys():
            floor, ratio = config.singular_floor, config.singular_ratio
            if name == GAP:
                floor, ratio = config.gap_floor, config.gap_ratio
                low = before[name] / config.vanished_ratio
                excess = low / max(now[PEAK], TINY)  # a gap around zero is often close to it
                signs.append(Sign(name, before[name], now[PEAK], excess / share))
            excess = now[name] / (ratio * max(before[name], floor))
            signs.append(Sign(name, before[name], now[name], excess / share))
        found = [sign for sign in signs if sign.excess > 1]
        return sorted(found, key=lambda sign: (-sign.excess, sign.name))
