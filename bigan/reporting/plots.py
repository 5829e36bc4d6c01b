"""The curves of a run as one PNG: what the journal holds, over images_seen.

matplotlib is imported only when something is drawn, and without pyplot: no display, no state that
another thread could share.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bigan import atomic_files
from bigan.reporting.metrics_log import read_metrics, series

# Okabe & Ito's palette: told apart by colour-blind readers, and in grey. One colour, one meaning.
_BLUE, _VERMILION, _GREEN, _PURPLE = "#0072B2", "#D55E00", "#009E73", "#AA4499"
_SPARE = ("#E69F00", "#56B4E9", _PURPLE, "#000000")


@dataclass(frozen=True)
class _Panel:
    """One set of axes: the keys that match `pattern`, or exactly one evaluation metric."""

    title: str
    pattern: str
    log: bool = False


_TRAIN_PANELS = (
    _Panel("Losses", r"train/loss_\w+"),
    _Panel("Discriminator's logits", r"train/logits_\w+"),
    _Panel("Gradient norms", r"train/grad(ient)?_norm_\w+", log=True),
    _Panel("Penalties", r"train/(r1|r2|wgan_gp|penalty\w*|orthogonal\w*)", log=True),
    _Panel("Path lengths", r"train/path_(length|penalty)", log=True),
    _Panel("Strength of the augmentation", r"train/augment_p"),
    _Panel("Largest singular values, generator", r"spectral/g/.+", log=True),
    _Panel("Largest singular values, discriminator", r"spectral/d/.+", log=True),
    _Panel("Throughput (images/s)", r"train/images_per_second\w*"),
)
_MOST_NAMED = 8  # curves in one legend; of more only the highest is named, at its end
_COLORS = {"d": _BLUE, "g": _VERMILION, "real": _GREEN, "fake": _PURPLE}
_NAMES = {"d": "discriminator", "g": "generator"}
_METRICS = {
    "fd": "Frechet distance", "cs": "Classifier score", "fid": "FID", "is": "Inception score",
}  # fmt: skip


def curves(
    run_dir: Path, out_path: Path, lines: Mapping[str, Mapping[str, float]] | None = None
) -> Path:
    """Losses, logits, gradient norms, throughput and every `eval/` metric over images_seen.

    Only what the journal holds is drawn; an empty run gives a picture that says so. `lines` puts
    labelled horizontal lines into panels, {"eval/fd/digits8-cnn-v1": {"floor": 0.6}}. Frechet
    distances, gradient norms and penalties have logarithmic axes. Returns `out_path`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    records = read_metrics(run_dir)
    keys = sorted({key for record in records for key in record})
    panels = [_eval_panel(key) for key in keys if key.startswith("eval/")]
    panels.sort(key=lambda panel: not panel.log)  # Frechet distances come first
    panels += [panel for panel in _TRAIN_PANELS if _matching(panel, keys)]
    most = max((record["images_seen"] for record in records), default=0)
    unit, unit_name = (1e6, "millions") if most > 5_000_000 else (1e3, "thousands")

    num_columns = max(1, min(3, len(panels)))
    num_rows = max(1, math.ceil(len(panels) / num_columns))
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    figure = Figure(figsize=(5.2 * num_columns, 3.4 * num_rows + 0.3), layout=layout)
    FigureCanvasAgg(figure)
    figure.suptitle(run_dir.resolve().name, x=0.012, ha="left", fontsize=14, fontweight="bold")
    if not panels:
        figure.text(0.5, 0.45, "no metrics yet", ha="center", color="#707070", fontsize=12)
    for position, panel in enumerate(panels):
        axes = figure.add_subplot(num_rows, num_columns, position + 1)
        drawn = {key: series(records, key) for key in _matching(panel, keys)}
        reference = (lines or {}).get(re.sub(r"\\(.)", r"\1", panel.pattern), {})
        _draw(axes, panel, {k: (x / unit, y) for k, (x, y) in drawn.items()}, reference)
        axes.set_xlim(0, max(1.03 * most / unit, 1e-9))
        if position + num_columns >= len(panels):  # the lowest of its column
            axes.set_xlabel(f"images seen ({unit_name})")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    out_path.parent.mkdir(parents=True, exist_ok=True)
    atomic_files.write_atomic(out_path, buffer.getvalue())
    return out_path


def _eval_panel(key: str) -> _Panel:
    metric, _, protocol = key.removeprefix("eval/").partition("/")
    name = re.sub(r"^[a-z]+", lambda m: _METRICS.get(m[0], m[0]), metric)
    title = f"{name} ({protocol})" if protocol else name
    return _Panel(title, re.escape(key), log=metric.startswith(("fd", "fid")))


def _matching(panel: _Panel, keys: Sequence[str]) -> list[str]:
    return [key for key in keys if re.fullmatch(panel.pattern, key)]


def _draw(
    axes: Any,
    panel: _Panel,
    drawn: Mapping[str, tuple[np.ndarray, np.ndarray]],
    reference: Mapping[str, float],
) -> None:
    axes.set_title(panel.title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#808080")
    axes.tick_params(color="#808080", labelcolor="#404040", labelsize=9)
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    many = len(drawn) > _MOST_NAMED
    spare = iter(_shades(len(drawn)) if many else _SPARE * 2)
    finite = []
    for key, (x, y) in drawn.items():
        color = _COLORS.get(key.rpartition("_")[2]) or (next(spare) if len(drawn) > 1 else _BLUE)
        usable = np.isfinite(y) & ((y > 0) | (not panel.log))
        finite.append(y[usable])
        _line(axes, x, np.where(usable, y, np.nan), color, _label(key, drawn))
    values = np.concatenate(finite)
    if panel.log and len(values):
        low = np.percentile(values, 1) if len(values) > 40 else values.min()  # one dip near zero
        shown = [low, values.max(), *(value for value in reference.values() if value > 0)]
        _log_axis(axes, min(shown), max(shown))
    elif len(values) and values.min() >= 0:
        axes.set_ylim(bottom=0)
    for name, value in reference.items():
        axes.axhline(value, color="#606060", linewidth=1.1, linestyle=(0, (4, 3)))
        axes.annotate(
            f"{name} {value:.3g}", (0, value), xycoords=("axes fraction", "data"), fontsize=9,
            xytext=(4, 3), textcoords="offset points", color="#606060",
        )  # fmt: skip
    if many:
        _name_highest(axes, drawn)
    elif len(drawn) > 1:
        axes.legend(frameon=False, fontsize=9, loc="best", handlelength=1.4)
    elif panel.pattern.startswith("eval/"):
        _mark_last(axes, *next(iter(drawn.values())))
    elif "(" not in panel.title:  # a title for two, and only one of them is there
        only = _label(next(iter(drawn)), drawn)
        axes.set_title(f"{panel.title}: {only}", loc="left", fontsize=11)


def _shades(num: int) -> list[Any]:
    """`num` colours from dark to light, in the order of the layers."""
    from matplotlib import colormaps

    return [colormaps["viridis"](position) for position in np.linspace(0, 0.9, num)]


def _name_highest(axes: Any, drawn: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    key = max(drawn, key=lambda k: drawn[k][1][-1])
    x, y = drawn[key]
    axes.annotate(
        f"{key.split('/', 2)[-1]} {y[-1]:.3g}", (x[-1], y[-1]), xytext=(-4, 6),
        textcoords="offset points", ha="right", fontsize=9, color="#404040",
    )  # fmt: skip


def _label(key: str, drawn: Mapping[str, Any]) -> str:
    name = key.partition("/")[2]
    prefixes = {k.partition("/")[2].rpartition("_")[0] for k in drawn}
    if len(prefixes) == 1:  # loss_d, loss_g: what they share is in the title
        name = name.rpartition("_")[2]
    return _NAMES.get(name, name.replace("_", " "))


def _line(axes: Any, x: np.ndarray, y: np.ndarray, color: str, label: str) -> None:
    """A curve; a long noisy one is shown faintly with its running mean on top."""
    if len(x) < 2:
        axes.plot(x, y, "o", color=color, markersize=4, label=label)
    elif len(x) <= 40:
        marker = {"marker": "o", "markersize": 3.5} if len(x) <= 25 else {}
        axes.plot(x, y, color=color, linewidth=1.7, label=label, **marker)
    else:
        axes.plot(x, y, color=color, linewidth=0.8, alpha=0.3)
        axes.plot(x, _running_mean(y, len(y) // 25), color=color, linewidth=1.8, label=label)


def _running_mean(y: np.ndarray, half_width: int) -> np.ndarray:
    """Mean over 2 * half_width + 1 neighbours (fewer at the ends), leaving out what is NaN."""
    known = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    low = np.maximum(np.arange(len(y)) - half_width, 0)
    high = np.minimum(np.arange(len(y)) + half_width + 1, len(y))
    num = counts[high] - counts[low]
    return np.where(num > 0, (sums[high] - sums[low]) / np.maximum(num, 1), np.nan)


def _log_axis(axes: Any, low: float, high: float) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    axes.set_ylim(low / 1.25, high * 1.25)
    subs = (1.0, 2.0, 5.0) if high < 500 * low else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _mark_last(axes: Any, x: np.ndarray, y: np.ndarray) -> None:
    if np.isfinite(y[-1]):
        axes.annotate(
            f"{y[-1]:.3g}", (x[-1], y[-1]), xytext=(-4, 8), textcoords="offset points",
            ha="right", fontsize=10, fontweight="bold", color=_BLUE,
        )  # fmt: skip
