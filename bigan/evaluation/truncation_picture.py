"""Distance and score over truncation as one PNG; no pyplot, so no display and no shared state."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigan import atomic_files

_BLUE, _GREY = "#0072B2", "#707070"
_NAMES = {"fd": "Frechet distance", "cs": "Classifier score", "fid": "FID", "is": "Inception score"}


def draw(
    path: Path,
    values: Mapping[float | None, Mapping[str, float]],
    keys: tuple[str, str],
    symbol: str,
    title: str,
) -> None:
    """Write three panels: distance against score, and each over truncation.

    `values` is truncation -> metrics, in order, None (without) last; `keys` names distance and
    score among them, `symbol` the truncation (t, psi). Raises OSError if it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(14, 4.2), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.012, ha="left", fontsize=14, fontweight="bold")
    distance, score = keys
    _trade(figure.add_subplot(1, 3, 1), values, distance, score, symbol)
    for position, key in ((2, distance), (3, score)):
        _over_truncation(figure.add_subplot(1, 3, position), values, key, symbol)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    atomic_files.write_atomic(path, buffer.getvalue())


def _trade(
    axes: Any,
    values: Mapping[float | None, Mapping[str, float]],
    distance: str,
    score: str,
    symbol: str,
) -> None:
    """A point per truncation; the best are at the lower right."""
    _plain(axes, f"{_title(distance)} against {_title(score).lower()}")
    points = [(metrics[score], metrics[distance]) for metrics in values.values()]
    axes.plot(*zip(*points, strict=True), "o-", color=_BLUE, linewidth=1.5, markersize=5)
    for truncation, point in zip(values, points, strict=True):
        text = "none" if truncation is None else f"{symbol} = {truncation:g}"
        axes.annotate(
            text, point, xytext=(7, -11), textcoords="offset points", fontsize=9, color="#404040"
        )
    axes.margins(x=0.18, y=0.12)
    axes.set_xlabel(score)
    axes.set_ylabel(distance)


def _over_truncation(
    axes: Any, values: Mapping[float | None, Mapping[str, float]], key: str, symbol: str
) -> None:
    """One metric over the truncation; the value without any is a dashed line."""
    _plain(axes, _title(key))
    points = [(t, metrics[key]) for t, metrics in values.items() if t is not None]
    if points:
        axes.plot(*zip(*points, strict=True), "o-", color=_BLUE, linewidth=1.5, markersize=5)
    if None in values:
        level = values[None][key]
        axes.axhline(level, color=_GREY, linewidth=1.1, linestyle=(0, (4, 3)))
        axes.annotate(
            f"none {level:.3g}", (0, level), xycoords=("axes fraction", "data"),
            xytext=(4, 3), textcoords="offset points", fontsize=9, color=_GREY,
        )  # fmt: skip
    axes.set_xlim(left=0)
    axes.set_xlabel(f"truncation {symbol}")
    axes.set_ylabel(key)


def _plain(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#808080")
    axes.tick_params(color="#808080", labelcolor="#404040", labelsize=9)
    axes.grid(color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)


def _title(key: str) -> str:
    metric = key.partition("/")[0]
    return _NAMES.get(metric, metric)
