"""The runs and sweeps below a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from bigan.cluster import records
from bigan.cluster.sweep_folder import is_sweep
from bigan.errors import UserError
from bigan.run_folder import RunFolder

DEPTH = 3  # folders below runs/ in which runs are found


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """The runs and sweeps that `folders` are or contain; none: those below runs/.

    Raises `UserError` for a folder that is no run and contains none.
    """
    found: dict[Path, None] = {}
    for folder in folders or [Path("runs")]:
        if not folder.is_dir():
            if not folders:
                raise UserError("runs/: not in this folder; name a run: bigan status RUN")
            raise UserError(f"{folder}: no such run folder{_nearby(folder)}")
        _require_readable(folder)
        below = list(_runs_below(folder, DEPTH))
        if not below:
            raise UserError(
                f"{folder}: no run in it (no config.yaml, sweep.yaml or slurm/jobs.jsonl)"
            )
        found |= dict.fromkeys(below)
    return list(found)


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run, also of one that was only submitted."""
    run = RunFolder(folder)
    files = (run.config, run.jobs, run.attempts)
    return any(records.exists(path) for path in files)


def require_run(folder: Path) -> None:
    """Raises `UserError` for a folder that is neither a run nor a sweep."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder{_nearby(folder)}")
    _require_readable(folder)
    if not is_run(folder) and not is_sweep(folder):
        raise UserError(
            f"{folder}: not a run (no config.yaml, sweep.yaml or slurm/jobs.jsonl in it)"
        )


def _is_readable(folder: Path) -> bool:
    return os.access(folder, os.R_OK | os.X_OK)


def _require_readable(folder: Path) -> None:
    if not _is_readable(folder):
        raise UserError(f"{folder}: permission denied; its owner can make it readable")


def _runs_below(folder: Path, depth: int) -> Iterator[Path]:
    """`folder` if it is a run or a sweep, else those in it."""
    if is_sweep(folder) or is_run(folder):
        yield folder
        return
    if depth == 0:
        return
    try:
        inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError:
        return
    for path in inside:
        if _is_readable(path) and path.is_dir():  # else of another user
            yield from _runs_below(path, depth - 1)


def _nearby(folder: Path) -> str:
    """The names of runs beside a mistyped one."""
    if not folder.parent.is_dir():
        return ""
    found = [run.name for run in _runs_below(folder.parent, 1) if run != folder.parent]
    return f"; {folder.parent} has {', '.join(found[:8])}" if found else ""
