"""Endings of an attempt before the end of its run: a stop signal, a state that is not finite."""

from __future__ import annotations

from pathlib import Path

from bigan import checkpoint
from bigan.distributed.signals import write_requeue
from bigan.errors import NonFiniteError
from bigan.run.lock import RunLock
from bigan.run.state import TrainState
from bigan.run_folder import RunFolder


def leave_marker(run_dir: Path, number: int) -> None:
    """Write REQUEUE for an attempt that signal `number` ends, unless the run is complete."""
    if RunFolder(run_dir).done.exists():  # only deliveries were left
        return
    newest = checkpoint.latest(run_dir)
    write_requeue(run_dir, number, int(newest.name) if newest else 0)


def leave_at_once(lock: RunLock, run_dir: Path, number: int) -> None:
    """The marker, unless another trainer has taken the run over; before an exit without saving."""
    if lock.taken_by() is None:
        leave_marker(run_dir, number)
    lock.release()


def give_up(state: TrainState, images_seen: int, means: dict[str, float]) -> None:
    """Raise the `NonFiniteError` of a step: what and when, what is kept, how to continue."""
    names = [name for name, value in means.items() if not abs(value) < float("inf")]
    what = f"{', '.join(names) or 'a loss'} became non-finite at images_seen = {images_seen}; no "
    what += "update was made from that step on and "
    newest, config = checkpoint.latest(state.config.run_dir), state.run_config
    lower = config.precision != "fp32"
    if newest is None:
        raise NonFiniteError(
            f"{what}there is no checkpoint yet; with another run_dir, try a lower learning rate"
            f"{', precision=fp32' if lower else ''}, or a penalty"
        )
    # Of all phases: the network that diverged need not be that of the first non-finite loss.
    options = [
        f"--allow-change optimizer.{name}.lr={settings.lr / 2:g}"
        for name, settings in config.optimizer.items()
    ]
    options += ["--allow-change precision=fp32"] if lower else []
    raise NonFiniteError(
        f"{what}the last checkpoint {newest} is intact; to continue from it, add changes to the "
        f"same command: {' '.join(options)}, or others (docs/runs.md); "
        "collapse.action=rollback lowers the learning rates by itself"
    )
