"""Actions after a collapse of training: warn, stop, or roll back to the checkpoint before it.

A loss or weight that is not finite always ends an attempt, or rolls it back to the newest
checkpoint, or to the one before it if that did not help.

collapse.py detects it in the reports of the ticks. Rank 0 decides and broadcasts. A decision
depends only on the run folder (the ticks in metrics.jsonl up to the checkpoint, and the
checkpoint's `collapse_began`), so a resumed run makes the same decisions as an uninterrupted one.

A rollback is a resume within the same process: newer checkpoints are deleted, then the healthy one
gets the new number of rollbacks and the lower learning rates. A run killed in between collapses
again and makes the same decision. Newer lines of metrics.jsonl and newer snapshots stay until the
run writes them again, as after any resume.
"""

from __future__ import annotations

import math
from pathlib import Path

from torch import Tensor

from bigan import checkpoint
from bigan.checkpoint import Saver, snapshots
from bigan.distributed.world import broadcast, on_rank_0
from bigan.errors import NonFiniteError, RunError
from bigan.layers import spectral
from bigan.reporting.metrics_log import read_metrics
from bigan.run.collapse import NEVER, SPECTRAL, Detector, Sign, Tick, history, spans
from bigan.run.state import TrainState

MAX_NAMED = 2  # values in a message
SHOWN = ("logits_real", "logits_fake", "loss", "grad_norm")  # scalars of each phase in a message
DISTANCES = ("fd", "fid")  # logged by the evaluator as eval/<distance>/<extractor>


def singular_values(state: TrainState) -> dict[str, Tensor]:
    """ "spectral/<network>/<layer>" -> largest singular value of each spectrally normalized layer.

    0-d tensors on the device, estimated by power iteration; all ranks call it.
    """
    found: dict[str, Tensor] = {}
    for prepared in state.prepared.values():
        for name, network in prepared.phase.named_children():
            if any(True for _ in spectral.spectral_layers(network)):
                with prepared.wrapped.unsharded():
                    values = spectral.singular_values(network)
                found |= {f"{SPECTRAL}{name}/{layer}": value for layer, value in values.items()}
    return found


class Rollback:
    """Checks every tick of a run for a collapse; all methods are collectives.

    A run that logs neither logits of real and generated images nor singular values is not checked.
    """

    def __init__(self, state: TrainState, saver: Saver) -> None:
        self._state, self._saver = state, saver
        self._config, train = state.run_config.collapse, state.run_config.train
        self._lengths = spans(self._config, train.batch, train.tick_images)
        self._run_dir = state.run_config.run_dir
        self._healthy: Path | None = None
        self._restore_detector()

    @property
    def pending(self) -> bool:
        """Whether `restore` must be called before training continues."""
        return self._healthy is not None

    def _restore_detector(self) -> None:
        """Set the detector to its state at this point of the run."""
        progress = self._state.progress
        self._detector = Detector(self._config, self._lengths)

        def restore() -> int:
            if progress.images_seen:
                ticks = history(read_metrics(self._run_dir), progress.images_seen)
                self._detector.restore(ticks, progress.collapse_began)
            return self._detector.began

        progress.collapse_began = on_rank_0(self._state.world, restore)

    def check(self, report: dict[str, float]) -> None:
        """After a tick. Raises `RunError`, on all ranks, if the run must stop."""
        state, progress = self._state, self._state.progress
        tick = Tick.of(progress.images_seen, report)
        if tick is None:
            return
        signs: list[Sign] = []
        began = NEVER
        if state.world.is_rank_0:
            signs = self._detector.update(tick)
            began = self._detector.began
        began, signs = broadcast(state.world, (began, signs))
        known = progress.collapse_began != NEVER
        progress.collapse_began = began
        # The saver keeps a checkpoint from before a collapse, present or not yet detected.
        healthy_until = progress.images_seen - self._lengths.lag if began == NEVER else began
        self._saver.trusted_until = healthy_until
        if not signs or (known and self._config.action == "warn"):
            return
        self._saver.finish()  # the checkpoint being saved may be the one to restore
        self._healthy = on_rank_0(state.world, lambda: self._decide(signs, report))

    def recover(self, error: NonFiniteError) -> None:
        """After a loss or weight that is not finite: roll back if `collapse.action` says so.

        Otherwise, and if that is not possible, raises `error` or a `RunError`, on all ranks.
        """
        if self._config.action != "rollback":
            raise error
        self._saver.finish()  # of an earlier state, which is sound
        self._healthy = on_rank_0(self._state.world, lambda: self._sound(error))

    def _sound(self, error: NonFiniteError) -> Path:
        """The checkpoint to restore after a state that is not finite; on rank 0.

        The newest one; the one before it, if the newest has been restored before: its weights are
        finite, but no sound training continues from them.
        """
        began = self._state.progress.collapse_began
        found = checkpoint.newest_first(self._run_dir)
        found = [f for f in found if began == NEVER or int(f.name) <= began]
        if not found:
            raise error
        # A restored checkpoint has one more rollback than the one before it.
        rollbacks = [checkpoint.read_progress(folder).rollbacks for folder in found[:2]]
        healthy = found[1 if len(found) > 1 and rollbacks[0] > rollbacks[1] else 0]
        self._announce(f"{error.finding}; checkpoint {healthy.name} is from before it")
        return healthy

    def _decide(self, signs: list[Sign], report: dict[str, float]) -> Path | None:
        """The checkpoint to restore, or None to continue; on rank 0. Raises `RunError`."""
        config, progress, echo = self._config, self._state.progress, self._state.engine.echo
        healthy = checkpoint.latest_until(self._run_dir, progress.collapse_began)
        finding = describe(signs, report, progress.images_seen, progress.collapse_began)
        best = best_snapshot(self._run_dir)
        if best:
            finding += f"; the best snapshot so far is {best[0]} ({best[1]} {best[2]:.3g})"
        advice = "use another run_dir with lower learning rates, or --allow-change KEY=VALUE"
        if healthy:
            finding += f"; checkpoint {healthy.name} is from before it"
            advice = (
                f"collapse.action=rollback continues from {healthy.name} with lower learning rates"
            )
        if config.action == "warn":
            kept = " and is kept" if healthy else ""
            echo(f"{finding}{kept}; training continues ({advice})")
            return None
        if config.action == "stop":
            raise RunError(
                f"{finding}; stopped without saving this state; {advice}, collapse.action=warn "
                "continues in spite of it"
            )
        if healthy is None:
            raise RunError(f"{finding}; there is no checkpoint from before it to restore; {advice}")
        self._announce(finding)
        return healthy

    def _announce(self, finding: str) -> None:
        """Print that a rollback follows; raises `RunError` if there were too many."""
        config, progress = self._config, self._state.progress
        if progress.rollbacks >= config.max_rollbacks:
            raise RunError(
                f"{finding}; stopped after {progress.rollbacks} rollback(s) at "
                f"{progress.lr_factor:g} x the learning rates of the config; raise "
                "collapse.max_rollbacks, or continue with other settings (--allow-change KEY=VALUE)"
            )
        self._state.engine.echo(
            f"{finding}; restoring it, all learning rates are multiplied by {config.lr_factor:g} "
            f"(rollback {progress.rollbacks + 1} of {config.max_rollbacks})"
        )

    def restore(self) -> None:
        """Restore the healthy checkpoint with lower learning rates; `TrainState.prepare` follows.

        Raises `RunError`, on all ranks, if checkpoints cannot be deleted or changed.
        """
        state, healthy = self._state, self._healthy
        assert healthy is not None
        rollbacks = state.progress.rollbacks + 1
        lr_factor = state.progress.lr_factor * self._config.lr_factor

        def commit() -> None:
            try:
                checkpoint.discard_after(self._run_dir, int(healthy.name))
                checkpoint.update_progress(healthy, rollbacks=rollbacks, lr_factor=lr_factor)
            except OSError as error:
                raise RunError(
                    f"{healthy.parent}: cannot roll back to {healthy.name} "
                    f"({error.strerror or error}); fix it and run the same command again"
                ) from None

        on_rank_0(state.world, commit)
        attempt = state.progress.attempt
        state.close()
        state.build(state.stages[0])  # not every engine can load into the networks it wrapped
        state.resume(healthy)
        state.engine.forget_compiled()
        state.engine.clear_halt()
        state.progress.attempt = attempt  # a rollback is no new attempt
        state.progress.rollbacks = rollbacks  # a node may read a cached progress.json
        state.progress.lr_factor = lr_factor
        self._healthy = None
        self._restore_detector()


def describe(signs: list[Sign], report: dict[str, float], images_seen: int, began: int) -> str:
    """The values that have changed too far, the worst first, and the scalars of each phase."""
    named = [str(sign) for sign in signs[:MAX_NAMED]]
    if len(signs) > MAX_NAMED:
        named.append(f"and {len(signs) - MAX_NAMED} more values changed as far")
    shown = [
        f"{key.removeprefix('train/')} {value:.3g}"
        for name in SHOWN
        for key, value in report.items()
        if key.startswith("train/") and key.endswith(f"/{name}")
    ]
    return (
        f"training seems to collapse: from images_seen = {began} to {images_seen} "
        f"{', '.join(named)} ({', '.join(shown)})"
    )


def best_snapshot(run_dir: Path) -> tuple[int, str, float] | None:
    """(images_seen, metric, value) of the lowest distance that the evaluator has logged so far.

    Only the metric of the newest evaluation and snapshots that still exist count. A snapshot that
    was evaluated several times has its last value.
    """
    existing = {int(folder.name) for folder in snapshots.find(run_dir)}
    prefixes = tuple(f"eval/{name}/" for name in DISTANCES)
    found = [
        (key.removeprefix("eval/"), record["images_seen"], float(value))
        for record in read_metrics(run_dir)
        for key, value in record.items()
        if key.startswith(prefixes) and record["images_seen"] in existing
        if key.count("/") == 2  # eval/<metric>/<extractor>: of the first sampler
    ]
    if not found:
        return None
    newest = found[-1][0]
    last = {seen: value for metric, seen, value in found if metric == newest}
    ranked = [(value, seen) for seen, value in last.items() if math.isfinite(value)]
    if not ranked:
        return None
    value, seen = min(ranked)
    return seen, newest, value
