"""The curves of a run as one PNG: the metrics log over images_seen.

matplotlib is imported when something is drawn, and without pyplot: no display is needed, and there
is no global figure that another thread could use.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bigan import atomic_files
from bigan.reporting.metrics_log import read_metrics, series

# The palette of Okabe and Ito: distinguishable with colour blindness and in grey.
_BLUE, _VERMILION, _GREEN, _PURPLE = "#0072B2", "#D55E00", "#009E73", "#AA4499"
_SPARE = ("#E69F00", "#56B4E9", _PURPLE, "#000000")
# Names that have the same colour in every panel and run; others take the spare colours in order.
_COLORS = {"discriminator": _BLUE, "generator": _VERMILION, "real": _GREEN, "fake": _PURPLE}
_MAX_NAMED = 8  # curves in a legend; of more curves only the highest is named, at its end
_METRICS = {
    "fd": "Frechet distance", "cs": "Classifier score", "fid": "FID", "is": "Inception score",
}  # fmt: skip


@dataclass(frozen=True)
class _Panel:
    """One set of axes with the curves of `keys`."""

    title: str
    keys: tuple[str, ...]
    log: bool = False


# Scalars of any phase: title, pattern of <scalar> in train/<phase>/<scalar>, logarithmic axis.
_SCALARS = (
    ("Losses", r"loss", False),
    ("Logits", r"logits_\w+", False),
    ("Gradient norms", r"grad_norm", True),
    ("Path lengths", r"path_(length|penalty)", True),
    ("Penalties", r"r1|r2|wgan_gp|\w+_penalty|orthogonal\w*", True),
    ("Augmentation probability", r"augment_p", False),
)


def curves(
    run_dir: Path, out_path: Path, lines: Mapping[str, Mapping[str, float]] | None = None
) -> Path:
    """Draw every `eval/` metric, every scalar of every phase, singular values and throughput.

    lines: labelled horizontal lines, {"eval/fd/digits8-cnn-v1": {"floor": 0.6}}. A run without
    metrics gives a picture that states it. Frechet distances, gradient norms and penalties have
    logarithmic axes. Returns `out_path`, which is written atomically.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    records = read_metrics(run_dir)
    panels = _panels({key for record in records for key in record})
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
        values = {key: series(records, key) for key in panel.keys}
        _draw(axes, panel, {key: (x / unit, y) for key, (x, y) in values.items()}, lines or {})
        axes.set_xlim(0, max(1.03 * most / unit, 1e-9))
        if position + num_columns >= len(panels):  # the lowest of its column
            axes.set_xlabel(f"images seen ({unit_name})")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    out_path.parent.mkdir(parents=True, exist_ok=True)
    atomic_files.write_atomic(out_path, buffer.getvalue())
    return out_path


def _panels(keys: Collection[str]) -> list[_Panel]:
    """The panels of a run in order: evaluation, phases, singular values, throughput."""
    ordered = sorted(keys)
    panels = [_eval_panel(key) for key in ordered if key.startswith("eval/")]
    panels.sort(key=lambda panel: not panel.log)  # Frechet distances first
    rest = [key for key in ordered if re.fullmatch(r"train/[^/]+/.+", key)]
    for title, pattern, log in _SCALARS:
        found = [key for key in rest if re.fullmatch(pattern, _scalar(key))]
        scalars = {_scalar(key) for key in found}
        if len(scalars) == 1 and pattern not in scalars:  # of several possible ones
            title = f"{title}: {scalars.pop().replace('_', ' ')}"
        panels += [_Panel(title, tuple(found), log)] if found else []
        rest = [key for key in rest if key not in found]
    for scalar in sorted({_scalar(key) for key in rest}):
        found = [key for key in rest if _scalar(key) == scalar]
        panels.append(_Panel(scalar.replace("_", " "), tuple(found)))
    for network in sorted({key.split("/")[1] for key in ordered if key.startswith("spectral/")}):
        found = [key for key in ordered if key.startswith(f"spectral/{network}/")]
        found.sort(key=lambda key: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", key)])
        panels.append(_Panel(f"Largest singular values ({network})", tuple(found), log=True))
    if "train/images_per_second" in keys:
        panels.append(_Panel("Throughput (images/s)", ("train/images_per_second",)))
    return panels


def _scalar(key: str) -> str:
    """train/<phase>/<scalar> -> <scalar>."""
    return key.split("/", 2)[2]


def _eval_panel(key: str) -> _Panel:
    metric, _, protocol = key.removeprefix("eval/").partition("/")
    name = re.sub(r"^[a-z]+", lambda m: _METRICS.get(m[0], m[0]), metric)
    title = f"{name} ({protocol})" if protocol else name
    return _Panel(title, (key,), log=metric.startswith(("fd", "fid")))


def _labels(keys: Sequence[str]) -> dict[str, str]:
    """The part of each key that distinguishes it from the others of its panel.

    train/<phase>/<scalar>: the phase if all scalars are equal, the scalar without a common prefix
    (logits_real, logits_fake) if all phases are equal, else both. Other keys: their last part.
    """
    if not all(re.fullmatch(r"train/[^/]+/.+", key) for key in keys):
        return {key: key.split("/", 2)[-1] for key in keys}
    phases = {key: key.split("/")[1] for key in keys}
    scalars = {key: _scalar(key) for key in keys}
    if len(set(scalars.values())) == 1:
        return phases
    prefixes = {scalar.rpartition("_")[0] for scalar in scalars.values()}
    if len(prefixes) == 1:
        scalars = {key: scalar.rpartition("_")[2] for key, scalar in scalars.items()}
    if len(set(phases.values())) == 1:
        return {key: scalar.replace("_", " ") for key, scalar in scalars.items()}
    return {key: f"{phases[key]}, {scalars[key].replace('_', ' ')}" for key in keys}


_Curves = Mapping[str, tuple[np.ndarray, np.ndarray]]  # key -> (x, y)


def _draw(axes: Any, panel: _Panel, drawn: _Curves, lines: Mapping[str, Any]) -> None:
    """One panel; `lines` is that of `curves`."""
    labels = _labels(panel.keys)
    style_axes(axes, _title(panel), grid="y")
    many = len(drawn) > _MAX_NAMED
    spare = iter(_shades(len(drawn)) if many else _SPARE * 2)
    reference = lines.get(panel.keys[0], {}) if len(panel.keys) == 1 else {}
    finite = []
    for key, (x, y) in drawn.items():
        color = _COLORS.get(labels[key].rpartition(" ")[2])
        color = color or (next(spare) if len(drawn) > 1 else _BLUE)
        usable = np.isfinite(y) & ((y > 0) | (not panel.log))
        finite.append(y[usable])
        _line(axes, x, np.where(usable, y, np.nan), color, labels[key])
    _set_limits(axes, panel, np.concatenate(finite), reference)
    for name, value in reference.items():
        axes.axhline(value, color="#606060", linewidth=1.1, linestyle=(0, (4, 3)))
        axes.annotate(
            f"{name} {value:.3g}", (0, value), xycoords=("axes fraction", "data"), fontsize=9,
            xytext=(4, 3), textcoords="offset points", color="#606060",
        )  # fmt: skip
    if many:
        _name_highest(axes, drawn, labels)
    elif len(drawn) > 1:
        axes.legend(frameon=False, fontsize=9, loc="best", handlelength=1.4)
    elif panel.keys[0].startswith("eval/"):
        _mark_last(axes, *next(iter(drawn.values())))


def _title(panel: _Panel) -> str:
    """The title of a panel, with the phase if all of its scalars are of one phase."""
    phases = {key.split("/")[1] for key in panel.keys if re.fullmatch(r"train/[^/]+/.+", key)}
    return f"{panel.title} ({phases.pop()})" if len(phases) == 1 else panel.title


def style_axes(axes: Any, title: str, grid: str = "both") -> None:
    """The look of all plots; `grid`: both, x or y."""
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#808080")
    axes.tick_params(color="#808080", labelcolor="#404040", labelsize=9)
    axes.grid(axis=grid, color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)


def _set_limits(
    axes: Any, panel: _Panel, values: np.ndarray, reference: Mapping[str, float]
) -> None:
    """Limits of the y axis from the finite `values` and the reference lines."""
    if panel.log and len(values):
        low = np.percentile(values, 1) if len(values) > 40 else values.min()  # ignores single dips
        shown = [low, values.max(), *(value for value in reference.values() if value > 0)]
        _log_axis(axes, min(shown), max(shown))
    elif len(values) and values.min() >= 0:
        axes.set_ylim(bottom=0)


def _shades(num: int) -> list[Any]:
    """`num` colours from dark to light, in order of the layers."""
    from matplotlib import colormaps

    return [colormaps["viridis"](position) for position in np.linspace(0, 0.9, num)]


def _name_highest(axes: Any, drawn: _Curves, labels: Mapping[str, str]) -> None:
    key = max(drawn, key=lambda k: drawn[k][1][-1])
    x, y = drawn[key]
    axes.annotate(
        f"{labels[key]} {y[-1]:.3g}", (x[-1], y[-1]), xytext=(-4, 6),
        textcoords="offset points", ha="right", fontsize=9, color="#404040",
    )  # fmt: skip


def _line(axes: Any, x: np.ndarray, y: np.ndarray, color: str, label: str) -> None:
    """A curve; one of more than 40 points is drawn faintly below its running mean."""
    if len(x) < 2:
        axes.plot(x, y, "o", color=color, markersize=4, label=label)
    elif len(x) <= 40:
        marker = {"marker": "o", "markersize": 3.5} if len(x) <= 25 else {}
        axes.plot(x, y, color=color, linewidth=1.7, label=label, **marker)
    else:
        axes.plot(x, y, color=color, linewidth=0.8, alpha=0.3)
        axes.plot(x, _running_mean(y, len(y) // 25), color=color, linewidth=1.8, label=label)


def _running_mean(y: np.ndarray, half_width: int) -> np.ndarray:
    """Mean over 2 * half_width + 1 neighbours (fewer at the ends), without NaN."""
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
