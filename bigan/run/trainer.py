"""The training loop: steps, and at each tick metrics, sample grids, snapshots and checkpoints."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial

from bigan.distributed.heartbeat import Heartbeat, is_communication_error
from bigan.distributed.launch import disconnect
from bigan.distributed.replica_check import check_replicas
from bigan.distributed.signals import GRACE_SECONDS, StopFlag, stop_requested
from bigan.distributed.stragglers import SlowRanks
from bigan.distributed.world import barrier, max_over_ranks, on_all_ranks, on_rank_0
from bigan.engine import Echo, Engine, set_float32
from bigan.errors import NonFiniteError, RunError, writing
from bigan.reporting.tracker import Status, Tracker
from bigan.run import changes, folder
from bigan.run.artifacts import Artifacts
from bigan.run.changes import Change
from bigan.run.ending import give_up, leave_at_once, leave_marker
from bigan.run.lock import RunLock, TakenOverError, exclusive
from bigan.run.remarks import remarks
from bigan.run.resume import resume_newest
from bigan.run.rollback import Rollback, singular_values
from bigan.run.stages import stage_at
from bigan.run.standing_statistics import collect_standing_statistics
from bigan.run.state import TrainState
from bigan.run.streams import (
    OpenStreams,
    agree_on_data,
    check_data,
    count_bad,
    open_streams,
    resolve_lanes,
    with_lanes,
)
from bigan.run_config import RunConfig, accumulation_steps
from bigan.schedules import due

STOP_CHECK_SECONDS = 2.0  # at most, between two exchanges of the stop flags of all ranks

OnTick = Callable[[int, dict[str, float]], None]  # (images_seen, metrics)


def train(
    config: RunConfig,
    echo: Echo,
    on_tick: OnTick,
    stop: StopFlag | None = None,
    allow_change: Sequence[str] = (),
) -> int:
    """Train the run of `config.run_dir`, or resume it; returns 0, or 128 + the stop signal.

    `echo` prints a line and `on_tick` shows progress; both are called on rank 0 only. A `stop` that
    is passed in is active already, so that signals before this call count. `allow_change`: key
    paths of settings that this attempt changes (run/changes.py). Raises `UserError`
    before anything is written if the input is unusable, `RunError` if the run must stop (a
    non-finite loss, a lost process, replicas that differ).
    """
    engine = Engine(config, echo)
    with contextlib.ExitStack() as stack:
        stop = stop or stack.enter_context(StopFlag())
        beat = stack.enter_context(Heartbeat(engine.world, config.train.lost_after_seconds))
        try:
            on_rank_0(engine.world, lambda: folder.require_usable(config.run_dir))
            lock = stack.enter_context(exclusive(engine.world, config.run_dir))
            if lock:
                stop.before_exit = lambda _: lock.release()
            code = _train(config, engine, on_tick, stop, lock, allow_change)
        except Exception as error:
            if engine.world.size > 1 and is_communication_error(error):
                raise beat.lost_rank_error(error) from error
            raise
    # Only after the heartbeat has stopped: its store may belong to rank 0's process group.
    disconnect(engine.world)
    return code


def _train(
    config: RunConfig,
    engine: Engine,
    on_tick: OnTick,
    stop: StopFlag,
    lock: RunLock | None,
    allow_change: Sequence[str],
) -> int:
    world, echo = engine.world, engine.echo
    accumulation_steps(config.train, world.size)
    images = on_rank_0(world, lambda: check_data(config))
    config = with_lanes(config, on_rank_0(world, lambda: resolve_lanes(config)))
    plan = on_rank_0(world, lambda: folder.check(config, allow_change))
    config = changes.with_values_of(config, plan.settings, plan.superseded)
    set_float32(config.precision)
    state = TrainState(config, engine, images.classes)
    progress, total = state.progress, config.train.total_images
    state.progress.data_fingerprint = images.fingerprint
    if plan.resumes and resume_newest(state, config.run_dir):
        progress = state.progress
        echo(f"resuming {config.run_dir} at images_seen = {progress.images_seen}")
        if progress.images_seen >= total:
            on_rank_0(world, lambda: finish_again(state, plan))
            echo(f"{config.run_dir}: already complete at images_seen = {progress.images_seen}")
            return 0
    return run_attempt(state, plan, on_tick, stop, lock)


def run_attempt(
    state: TrainState, plan: folder.Plan, on_tick: OnTick, stop: StopFlag, lock: RunLock | None
) -> int:
    """Train a state that has been resumed, or is new, to the end of the run or a stop signal."""
    config, progress = state.run_config, state.progress
    world, echo = state.world, state.engine.echo
    enter_stage(state)
    with on_all_ranks(world, lambda: open_streams(state)) as streams:
        agree_on_data(world, streams.fingerprint)
        prepare = writing(config.run_dir)(folder.prepare)
        history = on_rank_0(world, lambda: prepare(config, plan.changes, progress))
        if lock:
            stop.before_exit = partial(leave_at_once, lock, config.run_dir)
            for line in lock.remarks():
                echo(line)
        tracker = (
            Tracker(config.run_dir, config.tracking, role="train") if world.is_rank_0 else None
        )
        artifacts = Artifacts(state, tracker, lock, history)
        status: Status | None = "FAILED"
        try:
            if tracker:
                log_changes(tracker, plan.changes, history, progress.images_seen)
            for remark in (*folder.remarks(plan, history), *remarks(state)):
                echo(remark)
            loop = Loop(state, artifacts, tracker, on_tick, stop)
            code = run_stages(state, loop, streams)
            progress = state.progress
            status = "KILLED" if code else "FINISHED"
        except TakenOverError:
            status = None  # that of the trainer that continues the run
            raise
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
        state.close()
    return code


def enter_stage(state: TrainState) -> None:
    """Enter the stage that `images_seen` is in; without growth there is one stage."""
    stage = stage_at(state.stages, state.progress.images_seen)
    if stage is not state.stage:
        state.enter(stage)


def run_stages(state: TrainState, loop: Loop, streams: OpenStreams) -> int:
    """Train one stage after the other, the first one from `streams`; 0, or 128 + a stop signal.

    A rollback after a collapse may return to an earlier stage.
    """
    world, num = state.world, len(state.stages)
    began = time.monotonic()
    while True:
        with streams:
            state.prepare()
            if num > 1:
                seconds = time.monotonic() - began - state.engine.compile_seconds
                state.engine.echo(
                    f"stage {state.stage.index + 1} of {num}: {state.stage}, batch "
                    f"{state.config.train.batch}, from images_seen = "
                    f"{state.progress.images_seen} (ready in {seconds:.1f} s)"
                )
            code = loop.run(streams)
        began = time.monotonic()
        if loop.rollback.pending:
            loop.rollback.restore()
        elif code:
            return code
        elif state.progress.images_seen >= state.config.train.total_images:
            loop.finish()
            return 0
        enter_stage(state)
        streams = on_all_ranks(world, lambda: open_streams(state))
        agree_on_data(world, streams.fingerprint)


class Loop:
    """Training steps, and at each tick metrics and the sample grids and saves that are due.

    The ranks exchange stop signals at ticks, and in between often enough that all of them know a
    signal within `STOP_CHECK_SECONDS`.
    """

    def __init__(
        self,
        state: TrainState,
        artifacts: Artifacts,
        tracker: Tracker | None,
        on_tick: OnTick,
        stop: StopFlag,
    ) -> None:
        self.state = state
        self.config, self.world = state.config.train, state.world
        self.artifacts = artifacts
        self.tracker = tracker
        self.on_tick = on_tick
        self.stop = stop
        self.slow_ranks = SlowRanks(state.world)
        self.rollback = Rollback(state, artifacts.saver)
        self.steps_between = self.steps_to_check = 1  # exchanges of the stop flags
        self.num_steps = 0  # since the last tick
        self.save_seconds = 0.0  # time for which the last save stalled training
        self.began, self.counted = time.monotonic(), state.progress.images_seen

    def run(self, streams: OpenStreams) -> int:
        """Train until the stage or the run ends; returns 0, or 128 + the signal that stopped it.

        Also 0 if the run must be rolled back (`Rollback.pending`).
        """
        try:
            return self._run(streams)
        except NonFiniteError as error:
            self.rollback.recover(error)
            return 0

    def _run(self, streams: OpenStreams) -> int:
        state, config, progress = self.state, self.config, self.state.progress
        if progress.images_seen == 0:
            collect_standing_statistics(state)
            self.artifacts.sample_grids()
        self.began, self.counted, self.num_steps = time.monotonic(), progress.images_seen, 0
        end = min(config.total_images, state.stage.end)
        while progress.images_seen < end:
            before = progress.images_seen
            state.advance(streams)
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
            if self.rollback.pending:  # before anything of this state is saved
                return 0
            if at_check or stop:
                self.check_replicas()
            with self.stop.suspend_grace_time():  # a save may take longer than the grace time
                if at_snapshot:
                    self.artifacts.snapshot()
                if at_checkpoint or stop:
                    self.checkpoint()
                if stop and not last:
                    self.leave(stop)
                    return 128 + stop
            self.began, self.counted, self.num_steps = time.monotonic(), seen, 0
        return 0

    def finish(self) -> None:
        """Complete all files, then write DONE; called when all images have been seen."""
        run_dir = self.state.config.run_dir
        with self.stop.suspend_grace_time():
            self.artifacts.close()
            on_rank_0(self.world, writing(run_dir)(self.artifacts.finish))
            barrier(self.world)

    def checkpoint(self) -> None:
        """Start to save, and measure for how long that stalls training."""
        began = time.monotonic()
        self.artifacts.checkpoint()
        self.save_seconds = time.monotonic() - began

    def leave(self, number: int) -> None:
        """End this attempt: complete the pending save and write REQUEUE for the scheduler."""
        run_dir, saver = self.state.config.run_dir, self.artifacts.saver
        saver.finish()

        def mark() -> None:
            # A run that the user stopped by the file STOP is not to be requeued.
            if self.stop.signal or not stop_requested(run_dir):
                leave_marker(run_dir, number)

        on_rank_0(self.world, mark)
        self.artifacts.close()

    def tick(self) -> int:
        """Read metrics from the device, log and show them; returns the stop signal, or 0."""
        state, progress = self.state, self.state.progress
        engine, saver = state.engine, self.artifacts.saver
        shared = sum(engine.waiting.collect())
        seconds = max(time.monotonic() - self.began, 1e-9)
        state.statistics.add(singular_values(state))
        means, agreed = state.statistics.collect(
            stop=self.stop_signal(),
            halted_at=engine.halted_at(),
            saving=saver.poll(),
            step_seconds=seconds / self.num_steps,
            taken_over=self.artifacts.is_taken_over(),
        )
        if agreed["taken_over"]:
            self.artifacts.give_way()
        if self.world.is_rank_0:
            self.artifacts.restore_folder()
        if agreed["halted_at"] >= 0:
            saver.finish()  # the last sound state is kept
            on_rank_0(self.world, partial(give_up, state, int(agreed["halted_at"]), means))
        self.steps_between = max(1, int(STOP_CHECK_SECONDS / agreed["step_seconds"]))
        self.steps_to_check = self.steps_between
        self.stop.grace_seconds = max(GRACE_SECONDS, 3 * agreed["step_seconds"])
        saver.settle(not agreed["saving"])
        count_bad(state)
        progress.seconds += seconds
        report = means | self.counters(seconds)
        ranks, remark = self.slow_ranks.report(
            (seconds - shared) / self.num_steps, state.data_seconds / self.num_steps
        )
        state.data_seconds = self.save_seconds = 0.0
        if remark:
            engine.echo(remark)
        if self.tracker:
            attempt = {"train/attempt": progress.attempt}
            self.tracker.log(progress.images_seen, report | ranks | attempt)
            self.on_tick(progress.images_seen, report)
        self.rollback.check(report)
        return int(agreed["stop"])

    def counters(self, seconds: float) -> dict[str, float]:
        """Metrics of the training loop over the `seconds` since the last tick."""
        state, progress = self.state, self.state.progress
        found: dict[str, float] = {}
        if any(data.on_bad == "skip" for data in state.config.streams.values()):
            found["train/bad_images"] = progress.bad_images
        if len(state.stages) > 1:
            found["train/resolution"] = state.config.model.height
            found["train/alpha"] = state.alpha
        if progress.rollbacks:
            found["train/lr_factor"] = progress.lr_factor
        found["train/images_per_second"] = (progress.images_seen - self.counted) / seconds
        found["train/data_wait"] = state.data_seconds / seconds  # 0 to 1
        if self.save_seconds:
            found["train/save_stall_seconds"] = self.save_seconds
        return found

    def check_replicas(self) -> None:
        """Raises `RunError` if the ranks have different weights, before any of them is saved."""
        state = self.state
        try:
            check_replicas(self.world, state.networks, state.progress.images_seen)
        except RunError:
            self.artifacts.saver.finish()  # the checkpoint before, which is sound
            raise

    def stop_agreed(self) -> bool:
        """Whether any rank got a stop signal; the ranks exchange it every `steps_between` steps."""
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
            and stop_requested(self.state.config.run_dir)
        ):
            return signal.SIGTERM
        return self.stop.signal


def log_changes(
    tracker: Tracker, made: Sequence[Change], history: changes.History, images_seen: int
) -> None:
    """Log the changes of this attempt as metrics `config/<key>`, and all of the run as tags."""
    numbers = {f"config/{c.key}": c.new for c in made if type(c.new) in (int, float)}
    if numbers:
        tracker.log(images_seen, numbers)
    tracker.log_tags({f"changed.{key}": line for key, line in changes.describe(history).items()})


def finish_again(state: TrainState, plan: folder.Plan) -> None:
    """Finish a run that was killed after its last checkpoint, and send missing metrics.

    Raises `ConfigError` if settings were to change, which would have no effect.
    """
    folder.refuse_changes(state.run_config, plan, state.progress.images_seen)
    tracker = Tracker(state.config.run_dir, state.config.tracking, role="train")
    Artifacts(state, tracker).finish()
    tracker.close("FINISHED")
