"""Save while training goes on: a copy in host memory, then a thread that writes it.

Every process writes its part; the main threads meet at a tick, once all have written, and rank 0
makes the checkpoint complete. The thread calls no collective.
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

from bigan.checkpoint.folder import complete, draft_folder
from bigan.checkpoint.part import Staging, part_name
from bigan.checkpoint.pieces import Piece, require_finite_tensors, share
from bigan.checkpoint.progress import PartSum, Progress
from bigan.checkpoint.retention import prune
from bigan.distributed.world import World, broadcast, gather, together

T = TypeVar("T")
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST}


@dataclass(frozen=True)
class Failure:
    """Why something was not written, and what to do about it."""

    reason: str
    advice: str


class Saver:
    """Asynchronous checkpoints of one run; every method but `poll` is called by all ranks alike.

    Keeps the newest `keep` checkpoints, the first at or beyond each multiple of `milestone_images`,
    and one from before `trusted_until` (images seen), which may be set at any time. A checkpoint
    that cannot be written (a full disk, on any rank) costs one line on `echo`: training goes on,
    the older ones stay, the next one is tried when it is due. `failures` counts them, and `verdict`
    says at the end whether the run's state is on disk.
    """

    def __init__(
        self,
        run_dir: Path,
        world: World,
        *,
        keep: int = 2,
        milestone_images: int | None = None,
        echo: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.failures = 0
        self.trusted_until = 0
        # A process of a former life that has not died yet must not write into this one's drafts.
        self._token = broadcast(world, secrets.token_hex(4))
        self._run_dir, self._world = run_dir, world
        self._keep, self._milestone_images = keep, milestone_images
        self._echo = echo
        self._staging = Staging()
        self._thread: threading.Thread | None = None  # of the save that is not completed yet
        self._progress = Progress()  # of that save
        self._outcome: PartSum | Failure = Failure("nothing was written", "save first")
        self._failed: Failure | None = None  # the newest save, if it failed
        self._checked = False
        self._pruning: threading.Thread | None = None  # on rank 0

    def save(self, progress: Progress, pieces: Iterable[Piece]) -> None:
        """Copy this rank's pieces to host memory and start to write them.

        Returns when the copies are made (CPU) or queued before the next step (CUDA). Finishes the
        save before it, if that is still under way. Raises `RunError`, on all ranks, if a number is
        not finite; nothing is written then.
        """
        self.finish()

        def stage() -> None:
            mine = share(pieces, self._world)
            names, tensors = [p.name for p in mine], [p.data for p in mine]
            require_finite_tensors(progress.images_seen, names, tensors)
            self._staging.fill(mine)

        together(self._world, stage)
        self._progress = replace(progress)
        self._outcome = Failure("the writing thread did not end", "report this")
        # A daemon: a process that has to leave does not wait for a disk that hangs.
        self._thread = threading.Thread(target=self._write, name="checkpoint", daemon=True)
        self._thread.start()

    def poll(self) -> float:
        """1.0 while this rank writes, else 0.0: its maximum over the ranks is for `settle`."""
        return float(self._thread is not None and self._thread.is_alive())

    def settle(self, all_done: bool) -> None:
        """Complete the save under way if `all_done`: no rank is writing any more (`poll`)."""
        if self._thread is None or not all_done:
            return
        self._thread.join()
        self._thread = None
        outcomes = gather(self._world, self._outcome)
        failure = next((o for o in outcomes if isinstance(o, Failure)), None)
        if failure is None:
            parts = [o for o in outcomes if isinstance(o, PartSum)]
            failure = broadcast(self._world, self._complete(parts) if self._world.is_main else None)
        self._failed = failure
        if failure is not None:
            self.failures += 1
            if self._world.is_main:
                shutil.rmtree(self._draft, ignore_errors=True)
            self._say(
                f"checkpoint of images_seen = {self._progress.images_seen} was not saved "
                f"({failure.reason}); training goes on and older checkpoints are intact; "
                f"{failure.advice}, the next one is tried when it is due"
            )

    def finish(self) -> None:
        """Wait until the save under way is written on all ranks, complete it, and prune."""
        self.settle(all_done=True)
        if self._pruning is not None:
            self._pruning.join()

    def verdict(self) -> str | None:
        """For the end of the run, after `finish`: what to tell the user if the newest save failed.

        The same on all ranks.
        """
        if self._failed is None:
            return None
        return (
            f"{self._run_dir}: the checkpoint of images_seen = {self._progress.images_seen} was "
            f"not saved ({self._failed.reason}), {self.failures} failed in all; "
            f"{self._failed.advice}; the same command goes on from the checkpoint before it"
        )

    @property
    def _draft(self) -> Path:
        return draft_folder(self._run_dir, self._progress, self._token)

    def _write(self) -> None:
        """This rank's part; in the thread."""
        world = self._world

        def work() -> PartSum:
            self._draft.mkdir(parents=True, exist_ok=True)
            return self._staging.write(self._draft / part_name(world.rank, world.size))

        self._outcome = _attempt(world.rank, work)

    def _complete(self, parts: list[PartSum]) -> Failure | None:
        """Complete the draft and start to prune; on rank 0."""
        check = not self._checked  # once: who holds what does not change from save to save
        done = _attempt(0, lambda: complete(self._draft, self._progress, parts, check=check))
        if isinstance(done, Failure):
            return done
        self._checked = True
        # To delete gigabytes takes a file system as long as a step takes a GPU, or longer.
        self._pruning = threading.Thread(target=self._prune, name="prune", daemon=True)
        self._pruning.start()
        return None

    def _prune(self) -> None:
        """In a thread; it sees complete checkpoints only, never the draft of the next one."""
        pruned = _attempt(
            0,
            lambda: prune(self._run_dir, self._keep, self._milestone_images, self.trusted_until),
        )
        if isinstance(pruned, Failure):
            self._say(f"an older checkpoint was not deleted ({pruned.reason}); {pruned.advice}")

    def _say(self, line: str) -> None:
        if self._world.is_main:
            self._echo(line)


def _attempt(rank: int, work: Callable[[], T]) -> T | Failure:
    """What `work` returns, or why it failed: neither a thread nor a rank may die of a full disk."""
    try:
        return work()
    except OSError as error:
        if error.errno in FULL:
            advice = "free some space or raise the quota"
        elif error.errno in FORBIDDEN:
            advice = "make run_dir a folder that can be written to"
        else:
            advice = "see to the file system of run_dir"
        return Failure(f"rank {rank}: {error}", advice)
    except Exception as error:
        return Failure(f"rank {rank}: {type(error).__name__}: {error}", "report this")
