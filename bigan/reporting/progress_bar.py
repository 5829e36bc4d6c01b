"""Progress of a run: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Mapping
from typing import TextIO

from tqdm import tqdm

from bigan.errors import disk_is_full

LINE_SECONDS = 5.0  # between two lines where there is no terminal


def is_terminal(stream: TextIO) -> bool:
    """Whether `stream` is a terminal of known width; tqdm shows nothing on one of width 0."""
    return stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0


class ProgressBar:
    """Shows images seen, images/s, time left and the loss of every phase.

    Call `tick` at every tick; other lines are printed with `echo`, which keeps the bar intact.
    """

    def __init__(self, total_images: int, stream: TextIO | None = None) -> None:
        self._total = total_images
        self._stream = stream or sys.stderr
        self._is_terminal = is_terminal(self._stream)
        self._bar: tqdm | None = None
        self._last_line = -LINE_SECONDS

    def echo(self, text: str) -> None:
        """Print a line above the bar. A full disk that takes no log does not end the run."""
        try:
            tqdm.write(text, file=self._stream)
            self._stream.flush()
        except OSError as error:
            if not disk_is_full(error):
                raise

    def tick(self, images_seen: int, report: Mapping[str, float]) -> None:
        """Show a tick. `report`: its metrics under flat keys, such as "train/generator/loss"."""
        if self._is_terminal:
            if self._bar is None:
                self._bar = tqdm(
                    total=self._total,
                    initial=images_seen,
                    unit="image",
                    unit_scale=True,
                    file=self._stream,
                    dynamic_ncols=True,
                    smoothing=0.1,
                )
            self._bar.set_postfix_str(_summary(report), refresh=False)
            self._bar.update(images_seen - self._bar.n)
            return
        now = time.monotonic()
        if now - self._last_line < LINE_SECONDS and images_seen < self._total:
            return
        self._last_line = now
        rate = report.get("train/images_per_second", 0.0)
        left = max(self._total - images_seen, 0) / rate if rate else 0.0
        self.echo(
            f"images_seen {images_seen:>9,} of {self._total:,}  {rate:7,.0f} images/s  "
            f"{tqdm.format_interval(left)} left  {_summary(report)}"
        )

    def close(self) -> None:
        """Close the bar; later ticks must not follow."""
        if self._bar is not None:
            self._bar.close()


def _summary(report: Mapping[str, float]) -> str:
    """The resolution of a growing run, then the loss of every phase: "generator 0.495"."""
    parts = []
    if "train/resolution" in report:
        alpha = report["train/alpha"]
        fading = f" ({alpha:.0%} faded in)" if alpha < 1 else ""
        parts.append(f"{report['train/resolution']:.0f} px{fading}")
    for key, value in report.items():
        if match := re.fullmatch(r"train/([^/]+)/loss", key):
            parts.append(f"{match[1]} {value:.3f}")
    return "  ".join(parts)
