"""The report of a sweep: a table of its trials, the best one, and a plot.

It is computed from the records of the trials, at any time during the sweep.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bigan import atomic_files
from bigan.cluster import study, sweep_mlflow
from bigan.cluster.sweep import Sweep, shown, shown_value
from bigan.cluster.sweep_folder import SweepFolder, Trial, best
from bigan.cluster.trial import images_seen
from bigan.errors import UserError, writing


def write_report(folder: SweepFolder, out: Path | None = None) -> tuple[str, list[Path]]:
    """(text, files): writes report.md, report.csv and sweep.png to `out`, or the sweep's folder.

    Raises `UserError` if the folder is not that of a sweep, or if it cannot be written.
    """
    from bigan.cluster.sweep_plot import draw

    sweep, trials = folder.sweep(), folder.read_all()
    results = [(t.parameters, t.value) for t in trials if t.state == "complete"]
    shares = study.importances(sweep, [(p, v) for p, v in results if v is not None])
    rows = table(folder, sweep, trials)
    summary = summarize(folder, sweep, trials, shares)
    target = out or folder.path
    files = [target / name for name in ("report.md", "report.csv", "sweep.png")]
    with writing(target):
        target.mkdir(parents=True, exist_ok=True)
        text = "\n\n".join(["# " + folder.path.resolve().name, *summary, markdown(rows)])
        atomic_files.write_atomic(files[0], text + "\n\n![values of the trials](sweep.png)\n")
        atomic_files.write_atomic(files[1], as_csv(folder, sweep, trials))
        draw(folder.path.resolve().name, sweep, trials, shares, files[2])
    return "\n".join([aligned(rows), "", *summary]), files


def publish(folder: SweepFolder) -> str:
    """After the end of a trial: send the best one to MLflow; after the last, write the report.

    Returns one line if something could not be written or delivered, else "".
    """
    ended = [trial for trial in folder.read_all() if trial.state != "running"]
    files: list[Path] = []
    note = ""
    if len(ended) >= folder.sweep().num_trials:
        try:
            _, files = write_report(folder)
        except UserError as error:
            note = str(error)
    return "; ".join(filter(None, [note, sweep_mlflow.deliver(folder, files)]))


def table(folder: SweepFolder, sweep: Sweep, trials: Sequence[Trial]) -> list[list[str]]:
    """Header and one row per trial that has begun, the best one marked."""
    found = best(trials, sweep.goal)
    header = ["trial", "state", *sweep.parameters, sweep.metric or "value", "images", "seconds"]
    rows = [header]
    for trial in trials:
        value = "" if trial.value is None else f"{trial.value:.5g}"
        rows.append(
            [
                folder.name(trial.index) + (" *" if trial is found else ""),
                trial.state,
                *(shown_value(trial.parameters.get(key)) for key in sweep.parameters),
                value,
                str(_images(folder, trial)),
                "" if trial.seconds is None else f"{trial.seconds:.0f}",
            ]
        )
    return rows


def summarize(
    folder: SweepFolder, sweep: Sweep, trials: Sequence[Trial], shares: dict[str, float]
) -> list[str]:
    """Counts, the best trial, the importances and the errors, a line each."""
    counts = {s: sum(t.state == s for t in trials) for s in ("complete", "pruned", "failed")}
    waiting = sweep.num_trials - len(trials)
    lines = [
        f"{sweep.method.name}, {sweep.num_trials} trials: "
        + ", ".join(f"{num} {state}" for state, num in counts.items())
        + f", {len(trials) - sum(counts.values())} running, {max(waiting, 0)} not begun"
    ]
    found = best(trials, sweep.goal)
    if found is None:
        lines.append("best: no trial is complete yet")
    else:
        lines.append(
            f"best: {folder.run(found.index).path}  {sweep.metric} = {found.value:.5g} "
            f"({sweep.goal}, {sweep.value} snapshot)  {shown(found.parameters)}"
        )
    if shares:
        parts = (f"{key} {share:.0%}" for key, share in shares.items())
        lines.append(f"importance (fANOVA): {', '.join(parts)}")
    lines += [f"{folder.name(t.index)} failed: {t.error}" for t in trials if t.error]
    if counts["failed"]:
        record = folder.trials / "TRIAL.json"
        lines.append(f"to run a failed trial again: delete {record} and continue the sweep")
    return lines


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """The rows as text in columns; numbers on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            text.ljust(width) if position < 2 else text.rjust(width)
            for position, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The rows as a Markdown table."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    rule = ["---", "---", *("---:" for _ in rows[0][2:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in [escaped[0], rule, *escaped[1:]])


def as_csv(folder: SweepFolder, sweep: Sweep, trials: Sequence[Trial]) -> str:
    """One line per trial, with all digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    keys = list(sweep.parameters)
    writer.writerow(
        ["trial", "state", *keys, sweep.metric, "images_seen", "seconds", "run_dir", "error"]
    )
    for trial in trials:
        values: list[Any] = [trial.parameters.get(key) for key in keys]
        writer.writerow(
            [
                trial.index,
                trial.state,
                *(v if isinstance(v, int | float | str) else shown_value(v) for v in values),
                "" if trial.value is None else repr(trial.value),
                _images(folder, trial),
                "" if trial.seconds is None else f"{trial.seconds:.1f}",
                folder.run(trial.index).path,
                trial.error,
            ]
        )
    return text.getvalue()


def _images(folder: SweepFolder, trial: Trial) -> int:
    """images_seen of a trial, also of one that runs."""
    return images_seen(folder.run(trial.index)) if trial.state == "running" else trial.images_seen
