"""The loop: phases over the stream, a tick now and then, a snapshot and a checkpoint when due."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from bigan import checkpoint
from bigan.checkpoint import Progress
from bigan.data import resampled
from bigan.data.stream import Batch, Endless
from bigan.distributed.heartbeat import Heartbeat, is_communication_error
from bigan.distributed.launch import disconnect
from bigan.distributed.replica_check import check_replicas
from bigan.distributed.signals import GRACE_SECONDS, StopFlag, stop_requested, write_requeue
from bigan.distributed.stragglers import SlowRanks
from bigan.distributed.world import barrier, max_over_ranks, on_all_ranks, on_rank_0
from bigan.engine import Echo, Engine
from bigan.errors import RunError
from bigan.layers.batchnorm import normalisation_layers
from bigan.objectives.growth import stage_at
from bigan.reporting.tracker import Status, Tracker
from bigan.run import folder
from bigan.run.artifacts import Outputs
from bigan.run.rollback import Recovery, singular_values
from bigan.run.state import Training
from bigan.run.streams import agree_on_data, check_data, count_bad, open_stream
from bigan.run_config import (
    RunConfig,
    accumulation_steps,
    corrected,
    own_step_every,
    penalty_weight,
)
from bigan.schedules import due

STOP_CHECK_SECONDS = 2.0  # at most, between two looks at the stop flags of all ranks

OnTick = Callable[[Progress, dict[str, float]], None]


def train(config: RunConfig, echo: Echo, on_tick: OnTick, stop: StopFlag | None = None) -> int:
    """Train, or go on training, the run of `config.run_dir`; returns 0, or 128 + the stop signal.

    `echo` prints a line and `on_tick` shows progress; both are called on rank 0 only. `stop` is
    entered already if signals are to be heeded from before this call on. Raises `UserError` before
    anything is written if the input is unusable, `RunError` if the run must stop (a non-finite
    loss, a lost process, replicas that differ).
    """
    engine = Engine(config, echo)
    with contextlib.ExitStack() as stack:
        stop = stop or stack.enter_context(StopFlag())
        beat = stack.enter_context(Heartbeat(engine.world, config.train.lost_after_seconds))
        try:
            code = _train(config, engine, on_tick, stop)
        except Exception as error:
            if engine.world.size > 1 and is_communication_error(error):
                raise beat.lost_rank_error(error) from error
            raise
    # Not before all have said goodbye: the store they beat in may end with rank 0's process group.
    disconnect(engine.world)
    return code


def _train(config: RunConfig, engine: Engine, on_tick: OnTick, stop: StopFlag) -> int:
    world, echo = engine.world, engine.echo
    accumulation_steps(config.train, world.size)
    images = on_rank_0(world, lambda: check_data(config))
    resume_from = on_rank_0(world, lambda: folder.check(config))
    training = Training(config, engine, images.classes)
    progress, total = training.progress, config.train.total_images
    training.progress.data_fingerprint = images.fingerprint
    if resume_from:
        training.resume(resume_from)
        progress = training.progress
        echo(f"resuming {config.run_dir} at images_seen = {progress.images_seen}")
        if progress.images_seen >= total:
            on_rank_0(world, lambda: finish_again(training))
            echo(f"{config.run_dir}: already complete at images_seen = {progress.images_seen}")
            return 0
    enter_stage(training)
    with on_all_ranks(world, lambda: open_stream(training)) as stream:
        agree_on_data(world, stream.fingerprint)
        on_rank_0(world, lambda: folder.prepare(config))
        if world.is_rank_0:
            stop.before_exit = lambda number: leave_marker(config.run_dir, number)
        tracker = (
            Tracker(config.run_dir, config.tracking, role="train") if world.is_rank_0 else None
        )
        outputs = Outputs(training, tracker)
        status: Status = "FAILED"
        try:
            if tracker:
                tracker.log_params(config.model_dump(mode="json"))
            for remark in remarks(training):
                echo(remark)
            loop = Loop(training, outputs, tracker, on_tick, stop)
            code = run_stages(training, loop, stream)
            progress = training.progress
            status = "KILLED" if code else "FINISHED"
        finally:
            patience = 60.0 if status == "FINISHED" else 10.0  # a stopped run has a grace time
            note = tracker.close(status, timeout_seconds=patience) if tracker else None
        if note:
            echo(note)
        if code:
            echo(
                f"stopped by signal {code - 128} at images_seen = {progress.images_seen}; "
                "the same command resumes from there"
            )
        training.close()
    return code


def enter_stage(training: Training) -> None:
    """Go on to the stage that the run has reached; a run that does not grow is in its only one."""
    stage = stage_at(training.stages, training.progress.images_seen)
    if stage is not training.stage:
        training.enter(stage)


def run_stages(training: Training, loop: Loop, stream: Endless) -> int:
    """One stage after the other, `stream` being that of the first; 0, or 128 + a stop signal.

    Where training collapses it may go back: to the former state, perhaps of a former stage.
    """
    world, num = training.world, len(training.stages)
    began = time.monotonic()
    while True:
        with stream:
            training.prepare()
            if num > 1:
                seconds = time.monotonic() - began - training.engine.compile_seconds
                training.engine.echo(
                    f"stage {training.stage.index + 1} of {num}: {training.stage}, batch "
                    f"{training.config.train.batch}, from images_seen = "
                    f"{training.progress.images_seen} (ready in {seconds:.1f} s)"
                )
            code = loop.run(stream)
        began = time.monotonic()
        if loop.recovery.going_back:
            loop.recovery.go_back()
        elif code:
            return code
        elif training.progress.images_seen >= training.config.train.total_images:
            loop.finish()
            return 0
        enter_stage(training)
        stream = on_all_ranks(world, lambda: open_stream(training))
        agree_on_data(world, stream.fingerprint)


def remarks(training: Training) -> list[str]:
    """What a reader of the config might not expect of it."""
    train, recipe = training.config.train, training.recipe
    joined, step = train.batch // training.accumulation, train.batch * train.num_d_steps
    said = []
    if training.config.data.mode == "resampled":
        said.append(resampled.NOTE)
    if joined != train.batch and normalisation_layers(training.generator):
        said.append(
            f"BatchNorm sees {joined} images at a time (micro_batch x processes), not train.batch"
        )
    former = training.former_forward_images
    if former not in (0, joined) and normalisation_layers(training.generator):
        share, rest = divmod(former, training.world.size)
        keep = f"train.micro_batch={share} keeps it" if not rest else "use fewer processes"
        said.append(
            f"BatchNorm saw {former} images at a time before, now {joined}: this is not the same "
            f"training any more ({keep})"
        )
    for penalty in recipe.penalties:
        if penalty.weight is None:
            weight = penalty_weight(penalty, training.config)
            why = "" if penalty.name == "wgan_gp" else " = 0.0002 * resolution^2 / batch"
            said.append(f"weight of {penalty.name}: {weight:.6g}{why}")
    for name in ("g", "d"):
        every = own_step_every(recipe, name)
        if every:
            adam = corrected(getattr(recipe.optimizer, name), every)
            said.append(
                f"optimizer.{name}: a step for regularisation alone after every {every}, so lr "
                f"{adam.lr:.6g}, beta1 {adam.beta1:.6g}, beta2 {adam.beta2:.6g}"
            )
    last = training.stages[-1]
    if last.start >= train.total_images:
        said.append(
            f"train.total_images = {train.total_images} ends the run before {last} begins at "
            f"{last.start}"
        )
    if train.total_images % step and len(training.stages) == 1:
        end = -(-train.total_images // step) * step
        said.append(f"a training step takes {step} images: the run ends at images_seen = {end}")
    if training.progress.rollbacks:
        said.append(
            f"after {training.progress.rollbacks} rollback(s) all learning rates are multiplied by "
            f"{training.progress.lr_factor:g}"
        )
    return said


class Loop:
    """Steps, and at each tick what is due: numbers, pictures, saves, and whether to stop.

    What the ranks must decide alike (to stop, to go on) is agreed at ticks, and at the points in
    between that keep the answer to a signal within `STOP_CHECK_SECONDS`.
    """

    def __init__(
        self,
        training: Training,
        outputs: Outputs,
        tracker: Tracker | None,
        on_tick: OnTick,
        stop: StopFlag,
    ) -> None:
        self.training = training
        self.config, self.world = training.config.train, training.world
        self.outputs = outputs
        self.tracker = tracker
        self.on_tick = on_tick
        self.stop = stop
        self.slow_ranks = SlowRanks(training.world)
        self.recovery = Recovery(training, outputs.saver)
        self.steps_between = self.steps_to_check = 1  # of looking at the stop flags
        self.num_steps = 0  # since the last tick
        self.save_seconds = 0.0  # for which the last save held up the training
        self.began, self.counted = time.monotonic(), training.progress.images_seen

    def run(self, stream: Iterator[Batch]) -> int:
        """Until the stage or the run ends; returns 0, or 128 + the signal that ended it early.

        Also 0 if a collapse has to be gone back from (`recovery.going_back`).
        """
        training, config, progress = self.training, self.config, self.training.progress
        if progress.images_seen == 0:
            training.collect_standing_statistics()
            self.outputs.picture()
        self.began, self.counted, self.num_steps = time.monotonic(), progress.images_seen, 0
        end = min(config.total_images, training.stage.end)
        while progress.images_seen < end:
            before = progress.images_seen
            training.step(stream)
            self.stop.step_boundary()
            self.num_steps += 1
            seen = progress.images_seen
            last, stage_ends = seen >= config.total_images, seen >= end
            at_snapshot = stage_ends or due(before, seen, config.snapshot_images)
            at_checkpoint = last or due(before, seen, config.checkpoint_images)
            at_check = at_checkpoint or due(before, seen, config.replica_check_images)
            at_tick = at_snapshot or at_check or due(before, seen, config.tick_images)
            if not at_tick and not self.stop_agreed():
                continue
            stop = self.tick()
            if self.recovery.going_back:  # before anything of this state is saved
                return 0
            if at_check or stop:
                self.check_replicas()
            with self.stop.suspend_grace_time():  # a save may take longer than the grace time
                if at_snapshot:
                    self.outputs.snapshot()
                if at_checkpoint or stop:
                    self.checkpoint()
                if stop and not last:
                    self.leave(stop)
                    return 128 + stop
            self.began, self.counted, self.num_steps = time.monotonic(), seen, 0
        return 0

    def finish(self) -> None:
        """Once all images have been seen: everything on disk, then the mark that it is."""
        with self.stop.suspend_grace_time():
            self.outputs.close()
            on_rank_0(self.world, self.outputs.finish)
            barrier(self.world)

    def checkpoint(self) -> None:
        """Begin to save; what of it holds up the training is counted."""
        began = time.monotonic()
        self.outputs.checkpoint()
        self.save_seconds = time.monotonic() - began

    def leave(self, number: int) -> None:
        """End this life with its state saved, and say so to the scheduler."""
        run_dir, saver = self.training.config.run_dir, self.outputs.saver
        saver.finish()

        def mark() -> None:
            if self.stop.signal or not stop_requested(
                run_dir
            ):  # a user's STOP is not to be requeued
                leave_marker(run_dir, number)

        on_rank_0(self.world, mark)
        self.outputs.close()

    def tick(self) -> int:
        """Take the numbers off the device, log and show them; returns the stop signal, or 0."""
        training, progress = self.training, self.training.progress
        engine, saver = training.engine, self.outputs.saver
        shared = sum(engine.waiting.collect())
        seconds = max(time.monotonic() - self.began, 1e-9)
        training.statistics.add(singular_values(training))
        means, agreed = training.statistics.collect(
            stop=self.stop_signal(),
            halted_at=engine.halted_at(),
            saving=saver.poll(),
            step_seconds=seconds / self.num_steps,
        )
        if agreed["halted_at"] >= 0:
            saver.finish()  # what was sound is kept
            on_rank_0(self.world, partial(give_up, training, int(agreed["halted_at"]), means))
        self.steps_between = max(1, int(STOP_CHECK_SECONDS / agreed["step_seconds"]))
        self.steps_to_check = self.steps_between
        self.stop.grace_seconds = max(GRACE_SECONDS, 3 * agreed["step_seconds"])
        saver.settle(not agreed["saving"])
        count_bad(training)
        progress.seconds += seconds
        report = {n if "/" in n else f"train/{n}": value for n, value in means.items()}
        if training.config.data.on_bad == "skip":
            report["train/bad_images"] = progress.bad_images
        if len(training.stages) > 1:
            report["train/resolution"] = training.stage.resolution
            report["train/alpha"] = training.alpha
        if progress.rollbacks:
            report["train/lr_factor"] = progress.lr_factor
        report["train/images_per_second"] = (progress.images_seen - self.counted) / seconds
        report["train/data_wait"] = training.data_seconds / seconds  # 0 to 1
        if self.save_seconds:
            report["train/save_stall_seconds"] = self.save_seconds
            self.save_seconds = 0.0
        ranks, remark = self.slow_ranks.report(
            (seconds - shared) / self.num_steps, training.data_seconds / self.num_steps
        )
        training.data_seconds = 0.0
        if remark:
            engine.echo(remark)
        if self.tracker:
            attempt = {"train/attempt": progress.attempt}
            self.tracker.log(progress.images_seen, report | ranks | attempt)
            self.on_tick(progress, report)
        self.recovery.judge(report)
        return int(agreed["stop"])

    def check_replicas(self) -> None:
        """All ranks must hold the same weights before any of them is saved."""
        training = self.training
        try:
            check_replicas(self.world, training.networks, training.progress.images_seen)
        except RunError:
            self.outputs.saver.finish()  # the former state, which was sound
            raise

    def stop_agreed(self) -> bool:
        """Between two ticks, every couple of seconds: whether any rank has been asked to stop."""
        self.steps_to_check -= 1
        if self.steps_to_check > 0:
            return False
        self.steps_to_check = self.steps_between
        return max_over_ranks(self.world, self.stop_signal()) > 0

    def stop_signal(self) -> int:
        """This rank's stop signal, or 0; rank 0 also looks for the file STOP."""
        if (
            self.stop.signal == 0
            and self.world.is_rank_0
            and stop_requested(self.training.config.run_dir)
        ):
            return signal.SIGTERM
        return self.stop.signal


def leave_marker(run_dir: Path, number: int) -> None:
    """REQUEUE of a life that signal `number` ends: the newest checkpoint counts."""
    newest = checkpoint.latest(run_dir)
    write_requeue(run_dir, number, int(newest.name) if newest else 0)


def finish_again(training: Training) -> None:
    """Finish a run whose last checkpoint was its last act, and deliver what the tracker missed."""
    tracker = Tracker(training.config.run_dir, training.config.tracking, role="train")
    Outputs(training, tracker).finish()
    tracker.close("FINISHED")


def give_up(training: Training, images_seen: int, means: dict[str, float]) -> None:
    """Raise the `RunError` of a non-finite step: what and when, what is kept, what to try."""
    names = [name for name, value in means.items() if not abs(value) < float("inf")]
    newest = checkpoint.latest(training.config.run_dir)
    kept = f"the last checkpoint {newest} is intact" if newest else "there is no checkpoint yet"
    raise RunError(
        f"{', '.join(names) or 'a loss'} became non-finite at images_seen = {images_seen}; no "
        f"update was made from that step on and {kept}; with another "
        "run_dir, try a lower learning rate, precision=fp32, or a penalty"
    )
