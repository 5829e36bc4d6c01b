"""The files that a run writes: sample grids, snapshots, checkpoints. A full disk does not end it.

Every rank calls these methods; rank 0 draws and writes, except for checkpoints, of which each
rank writes its part in the background.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from bigan import checkpoint
from bigan.checkpoint import Saver, snapshots
from bigan.distributed.world import on_rank_0, reported_by_rank_0
from bigan.errors import RunError
from bigan.reporting import image_grids, plots
from bigan.reporting.tracker import Tracker
from bigan.run import folder, sample_grids
from bigan.run.changes import History
from bigan.run.lock import RunLock, TakenOverError
from bigan.run.standing_statistics import collect_standing_statistics
from bigan.run.state import TrainState
from bigan.run_folder import RunFolder


class Artifacts:
    """The files of one attempt of a run. `tracker` and `lock` are None on all ranks but rank 0."""

    def __init__(
        self,
        state: TrainState,
        tracker: Tracker | None,
        lock: RunLock | None = None,
        history: History | None = None,
    ) -> None:
        config = state.config
        self._state = state
        self._tracker = tracker
        self._lock = lock
        self._history = history or []  # of changed settings
        self._folder = RunFolder(config.run_dir)
        self.saver = Saver(
            config.run_dir,
            state.world,
            keep=config.train.checkpoint_keep,
            milestone_images=config.train.checkpoint_milestone_images,
            echo=state.engine.echo,
            superseded=self.is_taken_over,
        )
        self._grid_inputs: sample_grids.Inputs = {}
        self._unwritten = ""  # the last thing that could not be written, and why

    def sample_grids(self) -> None:
        """The sample grid of every sampler, as a file and in the tracker."""
        self._attempt("a sample grid", self._sample_grids)

    def snapshot(self) -> None:
        """The networks of the samplers with their statistics, sample grids, and the curves."""
        state, run_dir = self._state, self._folder.path
        collect_standing_statistics(state)
        seen = state.progress.images_seen
        networks = state.snapshot_networks

        def write() -> None:
            checkpoint.require_finite(seen, networks)
            self._sample_grids()
            classes = dict(zip(state.class_names, state.class_counts, strict=True))
            snapshots.write(run_dir, seen, networks, state.config, classes)
            plots.curves(run_dir, self._folder.curves)

        self._attempt(f"snapshot {seen}", write)

    def checkpoint(self) -> None:
        """Start to save the complete state; training may continue immediately."""
        self.saver.save(self._state.progress, self._state.shards())

    def is_taken_over(self) -> bool:
        """Whether another trainer has taken the run over; False on all ranks but rank 0."""
        return self._lock is not None and self._lock.taken_by() is not None

    def give_way(self) -> None:
        """Raise `TakenOverError` on all ranks and write nothing any more."""
        self.saver.abandon()
        other = self._lock.taken_by() if self._lock else None
        error = TakenOverError(
            f"{self._folder.path}: this run has been taken over by {other}; stopped at "
            f"images_seen = {self._state.progress.images_seen} without writing"
        )
        raise reported_by_rank_0(self._state.world, error)

    def restore_folder(self) -> None:
        """Write config.yaml again if somebody deleted it or the run folder; on rank 0."""
        with contextlib.suppress(OSError):  # tried again at the next tick
            if folder.restore(self._state.run_config, self._history):
                self._state.engine.echo(
                    f"{self._folder.config}: was deleted while the run trains, and is written "
                    f"again; training continues (to end it: touch {self._folder.stop})"
                )

    def close(self) -> None:
        """Wait for the pending save; raises `RunError` if the newest state is not on disk."""
        self.saver.finish()
        why = self.saver.final_error() or self._unwritten
        if why:
            problem = RunError(f"training ended, but not all of it was saved: {why}")
            raise reported_by_rank_0(self._state.world, problem)

    def finish(self) -> None:
        """The timeline of sample grids, then its completion marker; on rank 0."""
        grids = [path for path in self._folder.samples.glob("*.png") if path.stem.isdigit()]
        numbered = sorted((int(path.stem), path) for path in grids)
        image_grids.contact_sheet(numbered, self._folder.timeline)
        if self._tracker:
            self._tracker.pictures_changed()
        folder.finish(self._state.config, self._state.progress.images_seen)

    def _sample_grids(self) -> None:
        seen = self._state.progress.images_seen
        for index, (name, sampler) in enumerate(self._state.objective.samplers.items()):
            path = self._folder.sample_grid(seen, name if index else None)
            sample_grids.save(path, self._state, sampler, self._grid_inputs)
        if self._tracker:
            self._tracker.pictures_changed()

    def _attempt(self, what: str, write: Callable[[], None]) -> None:
        """Write on rank 0. If the disk is full, report it and continue."""

        def on_disk() -> str:
            try:
                write()
            except OSError as error:
                return f"{what} could not be written ({error.strerror or error})"
            return ""

        why = on_rank_0(self._state.world, on_disk)
        self._unwritten = why
        if why:
            self._state.engine.echo(
                f"{self._folder.path}: {why}; training continues and existing files are intact; "
                "free some space for the next one"
            )
