"""What is done about a collapse: say so, keep the checkpoint from before it, stop, or go back.

`collapse` finds it in the ticks' reports. Rank 0 looks and decides, all are told. All that a
decision depends on is in the run folder: the journal's ticks up to the checkpoint, and the
checkpoint's `collapse_began`. So a resumed run decides as the run that was not interrupted.

To go back is to resume, in the same process: the newer checkpoints are deleted, the healthy one
counts the rollback and lowers the learning rates, in that order. Killed in between, the run
collapses once more and comes to the same. Lines of the journal and snapshots beyond it stay until
the run writes them again, as after any resume.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from torch import Tensor

from bigan import atomic_files, checkpoint
from bigan.checkpoint import Saver
from bigan.distributed.world import broadcast, on_rank_0
from bigan.errors import RunError
from bigan.layers import spectral
from bigan.reporting.metrics_log import read_metrics
from bigan.run.collapse import NEVER, SPECTRAL, Detector, Sign, Tick, history, spans
from bigan.run.state import Training

NUM_NAMED = 2  # signs in a warning
SHOWN = ("logits_real", "logits_fake", "loss_d", "loss_g", "grad_norm_d", "grad_norm_g")


def singular_values(training: Training) -> dict[str, Tensor]:
    """ "spectral/<network>/<layer>" -> largest singular value, of every layer that is normalised.

    Scalars on the device, estimated by power iteration; all ranks take part.
    """
    found: dict[str, Tensor] = {}
    for name, prepared in training.prepared.items():
        network = training.networks[name]
        if any(True for _ in spectral.spectral_layers(network)):
            with prepared.wrapped.whole():
                values = spectral.singular_values(network)
            found |= {f"{SPECTRAL}{name}/{layer}": value for layer, value in values.items()}
    return found


class Recovery:
    """Judges every tick of a run; all methods are called by all ranks."""

    def __init__(self, training: Training, saver: Saver) -> None:
        self._training, self._saver = training, saver
        self._config, train = training.recipe.collapse, training.recipe.train
        self._lengths = spans(self._config, train.batch, train.tick_images)
        self._run_dir = training.recipe.run_dir
        self._healthy: Path | None = None
        self._restore()

    @property
    def going_back(self) -> bool:
        """Whether the run is to leave this state for a former one: `go_back`."""
        return self._healthy is not None

    def _restore(self) -> None:
        """Know what the run knew at this point of its progress."""
        progress = self._training.progress
        self._detector = Detector(self._config, self._lengths)

        def restore() -> int:
            if progress.images_seen:
                ticks = history(read_metrics(self._run_dir), progress.images_seen)
                self._detector.restore(ticks, progress.collapse_began)
            return self._detector.began

        progress.collapse_began = on_rank_0(self._training.world, restore)
        self._trust()

    def _trust(self) -> None:
        """Have the saver keep what a collapse, now or in the next ticks, would be undone with."""
        progress = self._training.progress
        recent = progress.images_seen - self._lengths.hindsight
        ill = progress.collapse_began != NEVER
        self._saver.trusted_until = progress.collapse_began if ill else recent

    def judge(self, report: dict[str, float]) -> None:
        """After a tick. Raises `RunError` if the run must stop."""
        training = self._training
        progress = training.progress
        tick = Tick.of(progress.images_seen, report)
        if tick is None:
            return
        signs: list[Sign] = []
        began = NEVER
        if training.world.is_rank_0:
            signs = self._detector.look(tick)
            began = self._detector.began
        began, signs = broadcast(training.world, (began, signs))
        known = progress.collapse_began != NEVER
        progress.collapse_began = began
        self._trust()
        if not signs or (known and self._config.action == "warn"):
            return
        self._saver.finish()  # the checkpoint under way may be the one to go back to
        self._healthy = on_rank_0(training.world, lambda: self._decide(signs, report))

    def _decide(self, signs: list[Sign], report: dict[str, float]) -> Path | None:
        """The checkpoint to go back to, or None to go on; on rank 0. Raises `RunError`."""
        config, progress = self._config, self._training.progress
        healthy = checkpoint.latest_until(self._run_dir, progress.collapse_began)
        says = describe(signs, report, progress.images_seen, progress.collapse_began)
        best = best_snapshot(self._run_dir)
        if best:
            says += f"; the best snapshot so far is {best[0]} ({best[1]} {best[2]:.3g})"
        way_out = "another run_dir with lower learning rates"
        if healthy:
            says += f"; checkpoint {healthy.name} is from before it"
            way_out = (
                f"collapse.action=rollback goes back to {healthy.name} at lower learning rates"
            )
        if config.action == "warn":
            kept = " and is kept" if healthy else ""
            self._training.engine.echo(f"{says}{kept}; training goes on ({way_out})")
            return None
        if config.action == "stop":
            raise RunError(
                f"{says}; stopped, nothing is saved of this state; {way_out}, "
                "collapse.action=warn goes on regardless"
            )
        if healthy is None:
            raise RunError(
                f"{says}; there is no checkpoint from before it to go back to; use another run_dir "
                "with lower learning rates"
            )
        if progress.rollbacks >= config.max_rollbacks:
            raise RunError(
                f"{says}; stopped after {progress.rollbacks} rollback(s) (collapse.max_rollbacks), "
                f"with learning rates at {progress.lr_factor:g} of the recipe's; raise it, or use "
                "another run_dir with another recipe"
            )
        self._training.engine.echo(
            f"{says}; going back there, all learning rates are multiplied by {config.lr_factor:g} "
            f"(rollback {progress.rollbacks + 1} of {config.max_rollbacks})"
        )
        return healthy

    def go_back(self) -> None:
        """Be in the healthy state again, with lower learning rates; `Training.prepare` follows."""
        training, healthy = self._training, self._healthy
        assert healthy is not None
        rollbacks = training.progress.rollbacks + 1
        lr_factor = training.progress.lr_factor * self._config.lr_factor

        def settle() -> None:
            try:
                checkpoint.discard_after(self._run_dir, int(healthy.name))
                checkpoint.update_progress(healthy, rollbacks=rollbacks, lr_factor=lr_factor)
            except OSError as error:
                raise RunError(
                    f"{healthy.parent}: cannot go back to {healthy.name} "
                    f"({error.strerror or error}); see to it, the same command tries again"
                ) from None

        on_rank_0(training.world, settle)
        attempt = training.progress.attempt
        training.close()
        training.build(training.stages[0])  # an engine's networks cannot always be loaded into
        training.resume(healthy)
        training.engine.forget_compiled()
        training.progress.attempt = attempt  # it is the same life
        training.progress.rollbacks = rollbacks  # whatever a node's file cache says
        training.progress.lr_factor = lr_factor
        self._healthy = None
        self._restore()


def describe(signs: list[Sign], report: dict[str, float], images_seen: int, began: int) -> str:
    """What was seen, the worst first."""
    named = [str(sign) for sign in signs[:NUM_NAMED]]
    if len(signs) > NUM_NAMED:
        named.append(f"so did {len(signs) - NUM_NAMED} more")
    shown = [f"{k} {report[f'train/{k}']:.3g}" for k in SHOWN if f"train/{k}" in report]
    return (
        f"training seems to collapse: from images_seen = {began} to {images_seen} "
        f"{', '.join(named)} ({', '.join(shown)})"
    )


def best_snapshot(run_dir: Path) -> tuple[int, str, float] | None:
    """(images_seen, metric, value) of the lowest distance among the evaluator's results so far.

    By the metric of the newest result; only of snapshots that are still there.
    """
    found = []
    for path in (run_dir / "evaluation").glob("*.json"):
        if not path.stem.isdigit() or not atomic_files.is_complete(
            run_dir / "snapshots" / path.stem
        ):
            continue
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            for metric, value in json.loads(path.read_text())["metrics"].items():
                if metric.startswith(("fd/", "fid/")):
                    found.append((int(path.stem), metric, float(value)))
    if not found:
        return None
    metric = max(found)[1]
    return min((result for result in found if result[1] == metric), key=lambda r: (r[2], r[0]))
