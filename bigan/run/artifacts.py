"""What a run leaves behind: pictures, snapshots, checkpoints. A full disk does not end it.

Every rank calls these methods; rank 0 draws and writes, except for checkpoints, of which each
rank writes its part in the background.
"""

from __future__ import annotations

from collections.abc import Callable

from bigan import checkpoint
from bigan.checkpoint import Saver, snapshots
from bigan.distributed.world import on_rank_0, reported_by_rank_0
from bigan.errors import RunError
from bigan.reporting import image_grids, plots
from bigan.reporting.tracker import Tracker
from bigan.run import folder
from bigan.run.state import GRID_COLUMNS, Training


class Outputs:
    """The files of one life of a run. `tracker` is None on all ranks but 0."""

    def __init__(self, training: Training, tracker: Tracker | None) -> None:
        config = training.config
        self._training = training
        self._tracker = tracker
        self.saver = Saver(
            config.run_dir,
            training.world,
            keep=config.train.checkpoint_keep,
            milestone_images=config.train.checkpoint_milestone_images,
            echo=training.engine.echo,
        )
        self._unwritten = ""  # the last thing that could not be written, and why

    def picture(self) -> None:
        """The sample grid of this moment, as a file and in the tracker."""
        self._attempt("a sample picture", self._picture)

    def snapshot(self) -> None:
        """The averaged generator with its statistics, its sample grid, and the curves so far."""
        training = self._training
        training.collect_standing_statistics()
        seen, run_dir = training.progress.images_seen, training.config.run_dir

        def write() -> None:
            checkpoint.require_finite(seen, {"ema": training.average})
            self._picture()
            snapshots.write(run_dir, seen, training.average, training.config)
            plots.curves(run_dir, run_dir / "curves.png")

        self._attempt(f"snapshot {seen}", write)

    def checkpoint(self) -> None:
        """Begin to save the complete state; training may go on at once."""
        self.saver.save(self._training.progress, self._training.shards())

    def close(self) -> None:
        """Wait for the save under way; raises `RunError` if the newest state is not on disk."""
        self.saver.finish()
        why = self.saver.final_error() or self._unwritten
        if why:
            problem = RunError(f"trained to the end of this life, but not all was kept: {why}")
            raise reported_by_rank_0(self._training.world, problem)

    def finish(self) -> None:
        """The pictures of the whole run, then its completion marker; on rank 0."""
        run_dir = self._training.config.run_dir
        grids = [path for path in (run_dir / "samples").glob("*.png") if path.stem.isdigit()]
        grids.sort(key=lambda path: int(path.stem))
        image_grids.contact_sheet(
            [(int(path.stem), path) for path in grids], run_dir / "timeline.png"
        )
        if self._tracker:
            self._tracker.log_artifact(run_dir / "timeline.png")
            self._tracker.log_artifact(run_dir / "curves.png")
        folder.finish(self._training.config, self._training.progress.images_seen)

    def _picture(self) -> None:
        training = self._training
        seen = training.progress.images_seen
        path = training.config.run_dir / "samples" / f"{seen}.png"
        rows = [training.class_names[label] for label in training.grid_labels()]
        if not getattr(training.config.model, "conditional", True):
            rows = []  # the rows differ by their latents only
        image_grids.save_grid(path, training.sample_grid(), columns=GRID_COLUMNS, row_labels=rows)
        if self._tracker:
            self._tracker.log_image(seen, "samples", path)

    def _attempt(self, what: str, write: Callable[[], None]) -> None:
        """Write on rank 0. If the disk refuses, say so and go on: the next one may succeed."""

        def on_disk() -> str:
            try:
                write()
            except OSError as error:
                return f"{what} could not be written ({error.strerror or error})"
            return ""

        why = on_rank_0(self._training.world, on_disk)
        self._unwritten = why
        if why:
            run_dir = self._training.config.run_dir
            self._training.engine.echo(
                f"{run_dir}: {why}; training goes on, what is there stays; make room for the next"
            )
