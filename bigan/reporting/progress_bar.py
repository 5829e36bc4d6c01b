"""What a person sees while a run goes on: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import os
import sys
import time
from typing import TextIO

from tqdm import tqdm

from bigan.checkpoint import Progress

LINE_SECONDS = 5.0  # between two lines where there is no terminal


def is_terminal(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that says how wide it is; on one of no width nothing shows."""
    return stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0


class ProgressBar:
    """Images seen, images/s, time left and losses; `tick` at every tick, `echo` for other lines."""

    def __init__(self, total_images: int, stream: TextIO | None = None) -> None:
        self._total = total_images
        self._stream = stream or sys.stderr
        self._is_terminal = is_terminal(self._stream)
        self._bar: tqdm | None = None
        self._last_line = -LINE_SECONDS

    def echo(self, text: str) -> None:
        """Print a line without tearing the bar."""
        tqdm.write(text, file=self._stream)
        self._stream.flush()

    def tick(self, progress: Progress, report: dict[str, float]) -> None:
        """Show a tick's means; `report` holds flat keys such as "train/loss_d"."""
        shown = {
            key: f"{report[f'train/{key}']:.3f}"
            for key in ("loss_d", "loss_g")
            if f"train/{key}" in report
        }
        if "train/resolution" in report:
            alpha = report["train/alpha"]
            share = f" {alpha:.0%} in" if alpha < 1 else ""
            shown = {"stage": f"{report['train/resolution']:.0f} px{share}", **shown}
        if self._is_terminal:
            if self._bar is None:
                self._bar = tqdm(
                    total=self._total,
                    initial=progress.images_seen,
                    unit="image",
                    unit_scale=True,
                    file=self._stream,
                    dynamic_ncols=True,
                    smoothing=0.1,
                )
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(progress.images_seen - self._bar.n)
            return
        now = time.monotonic()
        done = progress.images_seen >= self._total
        if now - self._last_line < LINE_SECONDS and not done:
            return
        self._last_line = now
        rate = report.get("train/images_per_second", 0.0)
        left = max(self._total - progress.images_seen, 0) / rate if rate else 0.0
        losses = "  ".join(f"{name} {value}" for name, value in shown.items())
        self.echo(
            f"images_seen {progress.images_seen:>9,} of {self._total:,}  {rate:7,.0f} images/s  "
            f"{tqdm.format_interval(left)} left  {losses}"
        )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
