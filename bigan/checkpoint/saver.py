"""Asynchronous saving: the state is copied to host memory, and a thread writes the copy.

Every rank writes its part. At the first tick at which all ranks have written, rank 0 completes the
checkpoint. The writer thread calls no collective.
"""

from __future__ import annotations

import errno
import secrets
import shutil
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from bigan.checkpoint.folder import complete, staging_folder
from bigan.checkpoint.part import HostBuffer, part_name
from bigan.checkpoint.progress import PartChecksum, Progress
from bigan.checkpoint.retention import prune
from bigan.checkpoint.tensor_shards import TensorShard, require_finite_tensors, shards_to_write
from bigan.distributed.world import World, broadcast, gather, on_all_ranks

T = TypeVar("T")
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST}


@dataclass(frozen=True)
class Failure:
    """Why a save failed, and what to do."""

    reason: str
    advice: str


class Saver:
    """Asynchronous checkpoints of one run. Every method except `poll` is a collective.

    Keeps the newest `keep` checkpoints, the first at or beyond each multiple of `milestone_images`,
    and one from up to `trusted_until` (images_seen), which may be set at any time. If a checkpoint
    cannot be written (a full disk on any rank), one line is passed to `echo`, training continues,
    older checkpoints are kept and the next save is tried when it is due. `failures` counts failed
    saves; at the end of the run `final_error` returns an error if the newest save failed.
    `superseded`: whether another trainer has taken the run over, asked on rank 0 before a
    checkpoint is completed; it is not, then.
    """

    def __init__(
        self,
        run_dir: Path,
        world: World,
        *,
        keep: int = 2,
        milestone_images: int | None = None,
        echo: Callable[[str], None] = lambda _: None,
        superseded: Callable[[], bool] = lambda: False,
    ) -> None:
        self.failures = 0
        self.trusted_until = 0
        # A process of an earlier attempt may still be running: it must not write to this folder.
        self._token = broadcast(world, secrets.token_hex(4))
        self._run_dir, self._world = run_dir, world
        self._keep, self._milestone_images = keep, milestone_images
        self._echo = echo
        self._superseded = superseded
        self._buffer = HostBuffer()
        self._thread: threading.Thread | None = None  # writes the pending save
        self._progress = Progress()  # of the pending save
        self._outcome: PartChecksum | Failure = Failure("nothing was written", "save first")
        self._failed: Failure | None = None  # of the newest save
        self._checked = False
        self._pruning: threading.Thread | None = None  # on rank 0

    def save(self, progress: Progress, shards: Iterable[TensorShard]) -> None:
        """Copy this rank's shards to host memory and start to write them.

        Returns when the copies are made (CPU) or enqueued before the next step (CUDA). Finishes a
        pending save first. If a number on any rank is not finite, raises `RunError` on all ranks
        and writes nothing.
        """
        self.finish()

        def stage() -> None:
            mine = shards_to_write(shards, self._world)
            names, tensors = [p.name for p in mine], [p.data for p in mine]
            require_finite_tensors(progress.images_seen, names, tensors)
            self._buffer.fill(mine)

        on_all_ranks(self._world, stage)
        self._progress = replace(progress)
        self._outcome = Failure("the writer thread did not end", "report this")
        # A daemon thread: a process that has to exit does not wait for a file system that hangs.
        self._thread = threading.Thread(target=self._write, name="checkpoint", daemon=True)
        self._thread.start()

    def poll(self) -> float:
        """1.0 while this rank is writing, else 0.0; `settle` needs the maximum over the ranks."""
        return float(self._thread is not None and self._thread.is_alive())

    def settle(self, all_done: bool) -> None:
        """Complete the pending save if `all_done`, that is if `poll` is 0.0 on all ranks."""
        if self._thread is None or not all_done:
            return
        self._thread.join()
        self._thread = None
        outcomes = gather(self._world, self._outcome)
        failure = next((o for o in outcomes if isinstance(o, Failure)), None)
        if failure is None:
            parts = [o for o in outcomes if isinstance(o, PartChecksum)]
            failure = broadcast(
                self._world, self._complete(parts) if self._world.is_rank_0 else None
            )
        self._failed = failure
        if failure is not None:
            self.failures += 1
            if self._world.is_rank_0:
                shutil.rmtree(self._staging, ignore_errors=True)
            self._say(
                f"checkpoint of images_seen = {self._progress.images_seen} was not saved "
                f"({failure.reason}); training continues and older checkpoints are intact; "
                f"{failure.advice}, the next save is tried when it is due"
            )

    def finish(self) -> None:
        """Wait until the pending save is written on all ranks, complete it, and prune."""
        self.settle(all_done=True)
        if self._pruning is not None:
            self._pruning.join()

    def abandon(self) -> None:
        """Wait for the pending save on this rank and delete it; no collective."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            shutil.rmtree(self._staging, ignore_errors=True)

    def final_error(self) -> str | None:
        """The error message if the newest save failed, else None; the same on all ranks.

        Call at the end of a run, after `finish`.
        """
        if self._failed is None:
            return None
        return (
            f"{self._run_dir}: the checkpoint of images_seen = {self._progress.images_seen} was "
            f"not saved ({self._failed.reason}), {self.failures} failed in all; "
            f"{self._failed.advice}; the same command resumes from the checkpoint before it"
        )

    @property
    def _staging(self) -> Path:
        return staging_folder(self._run_dir, self._progress, self._token)

    def _write(self) -> None:
        """Write this rank's part; runs in the writer thread."""
        world = self._world

        def work() -> PartChecksum:
            self._staging.mkdir(parents=True, exist_ok=True)
            return self._buffer.write(self._staging / part_name(world.rank, world.size))

        self._outcome = _attempt(world.rank, work)

    def _complete(self, parts: list[PartChecksum]) -> Failure | None:
        """Complete the staging folder and start to prune; runs on rank 0."""
        if self._superseded():
            return Failure("another trainer has taken the run over", "this attempt must end")
        check = not self._checked  # once per run: the sharding does not change between saves
        done = _attempt(0, lambda: complete(self._staging, self._progress, parts, check=check))
        if isinstance(done, Failure):
            return done
        self._checked = True
        # Deleting gigabytes can take a file system longer than a training step.
        self._pruning = threading.Thread(target=self._prune, name="prune", daemon=True)
        self._pruning.start()
        return None

    def _prune(self) -> None:
        """Runs in a thread; deletes complete checkpoints only, never a staging folder."""
        pruned = _attempt(
            0,
            lambda: prune(self._run_dir, self._keep, self._milestone_images, self.trusted_until),
        )
        if isinstance(pruned, Failure):
            self._say(f"an older checkpoint was not deleted ({pruned.reason}); {pruned.advice}")

    def _say(self, line: str) -> None:
        if self._world.is_rank_0:
            self._echo(line)


def _attempt(rank: int, work: Callable[[], T]) -> T | Failure:
    """The result of `work`, or why it failed: a full disk must not end the run."""
    try:
        return work()
    except OSError as error:
        if error.errno in FULL:
            advice = "free some space or raise the quota"
        elif error.errno in FORBIDDEN:
            advice = "make run_dir a writable folder"
        else:
            advice = "check the file system of run_dir"
        return Failure(f"rank {rank}: {error}", advice)
    except Exception as error:
        return Failure(f"rank {rank}: {type(error).__name__}: {error}", "report this")
