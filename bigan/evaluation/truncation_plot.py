"""The plot of a truncation sweep as a PNG. No pyplot: no display and no global state."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigan import atomic_files
from bigan.reporting.plots import style_axes

_BLUE, _GRAY = "#0072B2", "#707070"
_MAX_COLUMNS = 3

Values = Mapping[float | None, Mapping[str, float]]  # truncation -> metrics


def draw(path: Path, values: Values, titles: Mapping[str, str], symbol: str, title: str) -> None:
    """Write a panel of the first metric against the second, and one of each over the truncation.

    `values` are in ascending order, None (no truncation) last. `titles` maps the key of each metric
    to its title; `symbol` is that of the truncation (t, psi). Raises OSError if the file cannot be
    written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    pairs = list(itertools.pairwise(titles))[:1]
    num_panels = len(pairs) + len(titles)
    columns = min(num_panels, _MAX_COLUMNS)
    num_rows = math.ceil(num_panels / columns)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    figure = Figure(figsize=(14 * columns / _MAX_COLUMNS, 4.2 * num_rows), layout=layout)
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.012, ha="left", fontsize=14, fontweight="bold")
    panels = (figure.add_subplot(num_rows, columns, i + 1) for i in range(num_panels))
    for y, x in pairs:
        _against(next(panels), values, y, x, titles, symbol)
    for key in titles:
        _over_truncation(next(panels), values, key, titles[key], symbol)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    atomic_files.write_atomic(path, buffer.getvalue())


def _against(
    axes: Any, values: Values, y: str, x: str, titles: Mapping[str, str], symbol: str
) -> None:
    """Metric `y` against metric `x`, a point per truncation."""
    style_axes(axes, f"{titles[y]} against {titles[x].lower()}")
    points = [(metrics[x], metrics[y]) for metrics in values.values()]
    axes.plot(*zip(*points, strict=True), "o-", color=_BLUE, linewidth=1.5, markersize=5)
    for truncation, point in zip(values, points, strict=True):
        text = "none" if truncation is None else f"{symbol} = {truncation:g}"
        axes.annotate(
            text, point, xytext=(7, -11), textcoords="offset points", fontsize=9, color="#404040"
        )
    axes.margins(x=0.18, y=0.12)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def _over_truncation(axes: Any, values: Values, key: str, title: str, symbol: str) -> None:
    """One metric over the truncation; a dashed line is its value without truncation."""
    style_axes(axes, title)
    points = [(t, metrics[key]) for t, metrics in values.items() if t is not None]
    if points:
        axes.plot(*zip(*points, strict=True), "o-", color=_BLUE, linewidth=1.5, markersize=5)
    if None in values:
        level = values[None][key]
        axes.axhline(level, color=_GRAY, linewidth=1.1, linestyle=(0, (4, 3)))
        axes.annotate(
            f"none {level:.3g}", (0, level), xycoords=("axes fraction", "data"),
            xytext=(4, 3), textcoords="offset points", fontsize=9, color=_GRAY,
        )  # fmt: skip
    axes.set_xlim(left=0)
    axes.set_xlabel(f"truncation {symbol}")
    axes.set_ylabel(key)
