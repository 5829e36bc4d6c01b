"""Resume from the newest checkpoint that is intact.

A run that is requeued without a person must not end because a disk damaged its newest checkpoint.
Rank 0 lists the checkpoints and all ranks try one after the other, the newest first: damage that
any of them finds, in the headers, the checksums or while loading, is damage for all. A damaged
checkpoint is renamed to `<images_seen>.damaged` once an older one has been loaded, so that nothing
is lost and the next start does not read it again. As after any resume, later lines of the metrics
log and later snapshots stay until the run writes them again.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from bigan import checkpoint
from bigan.checkpoint import DamagedError
from bigan.distributed.world import on_rank_0
from bigan.run import folder as folders
from bigan.run.state import TrainState


def resume_newest(state: TrainState, run_dir: Path) -> Path | None:
    """Load the newest intact checkpoint; returns its folder, None if there is none. A collective.

    Raises `DamagedError` on all ranks if there are checkpoints and all of them are damaged, and
    changes nothing on disk then; `CheckpointError` if one does not belong to this run.
    """
    damaged: list[tuple[Path, DamagedError]] = []
    for folder in on_rank_0(state.world, lambda: checkpoint.newest_first(run_dir)):
        try:
            state.resume(folder)
        except DamagedError as error:
            damaged.append((folder, error))
            continue
        for unusable, problem in damaged:
            where = on_rank_0(state.world, partial(_set_aside, unusable))
            state.engine.echo(f"{problem}; {where}; checkpoint {folder.name} is used instead")
        return folder
    if damaged:
        others = f", and all {len(damaged) - 1} older ones are damaged" if len(damaged) > 1 else ""
        raise DamagedError(
            f"{damaged[0][1]}{others}: there is no checkpoint to resume from; restore one from a "
            "backup, or use another run_dir for a new run"
        )
    for line in on_rank_0(state.world, lambda: folders.without_checkpoint(run_dir)):
        state.engine.echo(line)
    return None


def _set_aside(folder: Path) -> str:
    """Rename a damaged checkpoint; returns a statement about it."""
    try:
        return f"kept as {checkpoint.set_aside(folder).name}"
    except OSError as error:
        return f"cannot be renamed ({error.strerror or error})"
