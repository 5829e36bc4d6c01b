"""The plot of a sweep: value per trial, best value so far, importance, value per parameter."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bigan import atomic_files
from bigan.cluster.sweep import Range, Sweep, shown_value
from bigan.cluster.sweep_folder import Trial, best
from bigan.reporting.plots import style_axes

# The palette of Okabe and Ito: distinguishable with colour blindness and in grey.
_BLUE, _VERMILION, _GREEN, _GRAY = "#0072B2", "#D55E00", "#009E73", "#808080"
_MAX_PANELS = 9  # parameters that are drawn, the most important ones first
_MAX_CHARACTERS = 34  # of a key in a label
_LOG_RATIO = 30.0  # largest / smallest value from which an axis is logarithmic


def draw(
    title: str,
    sweep: Sweep,
    trials: Sequence[Trial],
    shares: Mapping[str, float],
    path: Path,
) -> None:
    """Write the plot to `path` atomically; without complete trials it states that.

    `shares`: parameter -> importance, empty for too few trials.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    keys = [*shares, *(key for key in sweep.parameters if key not in shares)][:_MAX_PANELS]
    rows = math.ceil((len(keys) + 3) / 3)
    figure = Figure(
        figsize=(15.6, 3.6 * rows + 0.3), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    )
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.012, ha="left", fontsize=14, fontweight="bold")
    grid = figure.add_gridspec(rows, 3)
    _over_trials(figure.add_subplot(grid[0, :2]), sweep, trials)
    _importances(figure.add_subplot(grid[0, 2]), shares)
    for position, key in enumerate(keys):
        axes = figure.add_subplot(grid[1 + position // 3, position % 3])
        _over_parameter(axes, sweep, trials, key)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    atomic_files.write_atomic(path, buffer.getvalue())


def _over_trials(axes: Any, sweep: Sweep, trials: Sequence[Trial]) -> None:
    """The value of each trial, and the best one so far."""
    from matplotlib.ticker import MaxNLocator

    style_axes(axes, f"Value of each trial ({sweep.value} snapshot)")
    shown = _with_value(trials)
    if not shown:
        axes.text(
            0.5, 0.5, "no trial is complete yet", ha="center", va="center", color="#707070",
            transform=axes.transAxes,
        )  # fmt: skip
    styles = {"complete": ("o", _BLUE, "complete"), "pruned": ("x", _GRAY, "pruned, last value")}
    for state, (marker, color, label) in styles.items():
        found = [(t.index, t.value) for t in shown if t.state == state]
        if found:
            axes.plot(*zip(*found, strict=True), marker, color=color, label=label, markersize=6)
    failed = [t.index for t in trials if t.state == "failed"]
    complete = [t for t in shown if t.state == "complete"]
    if complete:
        so_far = [best(complete[: n + 1], sweep.goal) for n in range(len(complete))]
        values = [t.value for t in so_far if t is not None]
        places = [t.index for t in complete]
        last = max(t.index for t in trials)
        axes.step(
            [*places, last], [*values, values[-1]], where="post", color=_VERMILION, linewidth=1.6,
            label="best so far", zorder=1,
        )  # fmt: skip
        _value_axis(axes, [t.value for t in shown])
        _mark_best(axes, sweep, complete)
    if failed:
        axes.plot(
            failed, [0.02] * len(failed), "^", color="black", markersize=6, label="failed",
            transform=axes.get_xaxis_transform(),
        )  # fmt: skip
    axes.set_xlim(-0.6, max(sweep.num_trials, 1) - 0.4)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    axes.set_xlabel("trial")
    axes.set_ylabel(sweep.metric)
    if shown or failed:
        axes.legend(
            frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1.01, 1.0), ncols=4,
            borderaxespad=0.2, columnspacing=1.2, handletextpad=0.4,
        )  # fmt: skip


def _mark_best(axes: Any, sweep: Sweep, complete: Sequence[Trial]) -> None:
    found = best(complete, sweep.goal)
    if found is None or found.value is None:
        return
    above = sweep.goal == "maximize"
    axes.plot([found.index], [found.value], "o", color=_VERMILION, markersize=8)
    axes.annotate(
        f"{found.value:.4g}", (found.index, found.value), xytext=(0, 8 if above else -15),
        textcoords="offset points", ha="center", fontsize=10, fontweight="bold", color=_VERMILION,
    )  # fmt: skip


def _importances(axes: Any, shares: Mapping[str, float]) -> None:
    style_axes(axes, "Importance of the parameters (fANOVA)")
    if not shares:
        axes.text(
            0.5, 0.5, "needs 4 complete trials\nwith different values", ha="center", va="center",
            color="#707070", transform=axes.transAxes,
        )  # fmt: skip
        axes.set_axis_off()
        return
    items = list(shares.items())[:12]
    places = range(len(items))
    axes.barh(places, [100 * share for _, share in items], color=_GREEN, height=0.6)
    axes.set_yticks(places, [_short(key) for key, _ in items])
    axes.set_ylim(max(len(items), 3) - 0.4, -0.6)
    axes.set_xlim(0, 112)
    for place, (_, share) in zip(places, items, strict=True):
        axes.annotate(
            f"{share:.0%}", (100 * share, place), xytext=(4, 0), textcoords="offset points",
            va="center", fontsize=9, color="#404040",
        )  # fmt: skip
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("share of the variance (%)")


def _over_parameter(axes: Any, sweep: Sweep, trials: Sequence[Trial], key: str) -> None:
    """The value of the trials over one parameter: positions for values, numbers for ranges."""
    parameter = sweep.parameters[key]
    style_axes(axes, key)
    shown = [t for t in _with_value(trials) if key in t.parameters]
    if isinstance(parameter, Range):
        places = [float(t.parameters[key]) for t in shown]
        if parameter.log:
            axes.set_xscale("log")
            margin = (parameter.max / parameter.min) ** 0.04
            axes.set_xlim(parameter.min / margin, parameter.max * margin)
        else:
            margin = 0.04 * (parameter.max - parameter.min)
            axes.set_xlim(parameter.min - margin, parameter.max + margin)
    else:
        names = [json.dumps(value) for value in parameter]
        places = [float(names.index(json.dumps(t.parameters[key]))) for t in shown]
        labels = [shown_value(value)[:16] for value in parameter]
        axes.set_xticks(range(len(labels)), labels)
        axes.set_xlim(-0.6, len(labels) - 0.4)
    found = best(trials, sweep.goal)
    for state, marker, color in (("complete", "o", _BLUE), ("pruned", "x", _GRAY)):
        points = [(x, t.value) for x, t in zip(places, shown, strict=True) if t.state == state]
        if points:
            axes.plot(*zip(*points, strict=True), marker, color=color, markersize=6, alpha=0.8)
    for x, trial in zip(places, shown, strict=True):
        if trial is found:
            axes.plot([x], [trial.value], "o", color=_VERMILION, markersize=8)
    _value_axis(axes, [t.value for t in shown])
    axes.set_ylabel(sweep.metric)


def _with_value(trials: Sequence[Trial]) -> list[Trial]:
    return [t for t in trials if t.state in ("complete", "pruned") and t.value is not None]


def _value_axis(axes: Any, values: Sequence[float | None]) -> None:
    """A logarithmic axis for positive values of several orders of magnitude."""
    found = [value for value in values if value is not None]
    if not found or min(found) <= 0 or max(found) < _LOG_RATIO * min(found):
        axes.margins(y=0.15)
        return
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    axes.set_ylim(min(found) / 1.6, max(found) * 1.3)
    subs = (1.0, 2.0, 5.0) if max(found) < 500 * min(found) else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _short(key: str) -> str:
    """The end of a long key."""
    return key if len(key) <= _MAX_CHARACTERS else f"…{key[-_MAX_CHARACTERS:]}"
