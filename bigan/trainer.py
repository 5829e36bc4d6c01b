"""The loop: phases over the stream, a tick now and then, a snapshot and a checkpoint when due."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from bigan import checkpoint, pictures, run_folder, snapshot
from bigan.checkpoint import Progress
from bigan.data import resampled
from bigan.data.dataset import open_manifest
from bigan.data.resampled import ResampledStream
from bigan.data.stream import Batch, ShardStream
from bigan.engine import Echo, Engine, disconnect
from bigan.errors import RunError, UserError
from bigan.recipe import RunConfig, accumulation_steps, misfits
from bigan.schedules import due
from bigan.stop import StopFlag
from bigan.tracking import Status, Tracker
from bigan.training import GRID_COLUMNS, Training
from bigan.world import World, barrier, broadcast, gather, on_main, together

NAMED_BAD_IMAGES = 10  # at most, of those found in one tick

OnTick = Callable[[Progress, dict[str, float]], None]


@dataclass(frozen=True)
class Images:
    """What training must know of its images: number of each class by name, and their identity."""

    classes: dict[str, int]
    fingerprint: str


def check_data(config: RunConfig) -> Images:
    """Look at the training images; raises `UserError` if they do not fit the model."""
    if config.data.mode == "resampled":  # no manifest: nothing is known but where they are
        resampled.expand(config.data.path, config.data.allow_pipe)
        classes = {str(label): 1 for label in range(config.model.num_classes)}
        return Images(classes, f"resampled/{config.data.path}")
    manifest = open_manifest(config.data.path, config.data)
    counts = manifest.class_counts(config.data.split)
    wrong = [
        f"{what} {found} but model.{key} = {wanted}"
        for what, key, wanted, found in misfits(config.model, manifest)
    ]
    if wrong:
        raise UserError(
            f"{config.data.path}: the images have {'; '.join(wrong)}; change the config or pack "
            "the images again (`bigan pack --help`)"
        )
    return Images(dict(zip(manifest.classes, counts, strict=True)), manifest.fingerprint)


def save_picture(training: Training, tracker: Tracker | None) -> None:
    """The sample grid of this moment, as a file and in the tracker; on rank 0."""
    seen = training.progress.images_seen
    path = training.config.run_dir / "samples" / f"{seen}.png"
    rows = [training.class_names[label] for label in training.grid_labels()]
    pictures.save_grid(path, training.sample_grid(), columns=GRID_COLUMNS, row_labels=rows)
    if tracker:
        tracker.picture(seen, "samples", path)


def save_snapshot(training: Training, tracker: Tracker | None) -> None:
    """Snapshot, sample grid and curves; every rank takes part in the statistics."""
    training.collect_standing_statistics()

    def write() -> None:
        seen = training.progress.images_seen
        checkpoint.require_finite(seen, training.networks)
        save_picture(training, tracker)
        snapshot.write(training.config.run_dir, seen, training.average, training.config)
        pictures.curves(training.config.run_dir, training.config.run_dir / "curves.png")

    on_main(training.world, write)


def save_checkpoint(training: Training) -> None:
    """Complete state, then prune; rank 0 writes and the others wait for its verdict."""

    def write() -> None:
        run_dir = training.config.run_dir
        checkpoint.save(run_dir, training.progress, training.networks, training.optimizers)
        checkpoint.prune(run_dir, training.config.train.checkpoint_keep)

    on_main(training.world, write)


def train(config: RunConfig, echo: Echo, on_tick: OnTick) -> int:
    """Train, or go on training, the run of `config.run_dir`; returns 0, or 128 + the stop signal.

    `echo` prints a line and `on_tick` shows progress; both are called on rank 0 only. Raises
    `UserError` before anything is written if the input is unusable, `RunError` if the run must
    stop (a non-finite loss).
    """
    engine = Engine(config, echo)
    code = _train(config, engine, on_tick)
    disconnect(engine.world)
    return code


def _train(config: RunConfig, engine: Engine, on_tick: OnTick) -> int:
    world, echo = engine.world, engine.echo
    accumulation_steps(config.train, world.size)
    images = on_main(world, lambda: check_data(config))
    resume_from = on_main(world, lambda: run_folder.check(config))
    training = Training(config, engine, images.classes)
    progress, total = training.progress, config.train.total_images
    training.progress.data_fingerprint = images.fingerprint
    if resume_from:
        together(world, lambda: training.resume(resume_from))
        progress = training.progress
        echo(f"resuming {config.run_dir} at images_seen = {progress.images_seen}")
        if progress.images_seen >= total:
            on_main(world, lambda: finish_again(training))
            echo(f"{config.run_dir}: already complete at images_seen = {progress.images_seen}")
            return 0
    with together(world, lambda: open_stream(training)) as stream:
        agree_on_data(world, stream.fingerprint)
        on_main(world, lambda: run_folder.prepare(config))
        tracker = Tracker(config.run_dir, config.tracking, role="train") if world.is_main else None
        status: Status = "FAILED"
        try:
            if tracker:
                tracker.params(config.model_dump(mode="json"))
            for remark in remarks(training):
                echo(remark)
            training.prepare()
            code = loop(training, stream, tracker, on_tick)
            status = "KILLED" if code else "FINISHED"
        finally:
            patience = 60.0 if status == "FINISHED" else 10.0  # a stopped run has a grace time
            note = tracker.close(status, timeout_seconds=patience) if tracker else None
        if note:
            echo(note)
        if code:
            echo(
                f"stopped by signal {code - 128} at images_seen = {progress.images_seen}; "
                "the same command goes on from there"
            )
    return code


def remarks(training: Training) -> list[str]:
    """What a reader of the config might not expect of it."""
    train = training.config.train
    joined, step = train.batch // training.accumulation, train.batch * train.num_d_steps
    said = []
    if training.config.data.mode == "resampled":
        said.append(resampled.NOTE)
    if joined != train.batch:
        said.append(
            f"BatchNorm sees {joined} images at a time (micro_batch x processes), not train.batch"
        )
    if train.total_images % step:
        end = -(-train.total_images // step) * step
        said.append(f"a training step takes {step} images: the run ends at images_seen = {end}")
    return said


def open_stream(training: Training) -> ShardStream | ResampledStream:
    """The images from `images_seen` on; each rank looks at the files it will read."""
    config, model = training.config, training.config.model
    if config.data.mode == "resampled":
        return ResampledStream(
            config.data.path,
            shape=(model.resolution, model.resolution, model.image_channels),
            num_classes=model.num_classes,
            seed=config.train.seed,
            world=training.world,
            batch=config.train.batch,
            accumulation=training.accumulation,
            images_seen=training.progress.images_seen,
            fetch=config.data,
        )
    return ShardStream(
        config.data.path,
        config.data.split,
        seed=config.train.seed,
        world=training.world,
        batch=config.train.batch,
        accumulation=training.accumulation,
        images_seen=training.progress.images_seen,
        block=config.data.block,
        fetch=config.data,
    )


def count_bad(training: Training) -> None:
    """Count and name the images that had to be replaced since the last tick, over all ranks."""
    if training.config.data.on_bad == "stop":
        return
    found = [bad for part in gather(training.world, training.bad) for bad in part]
    training.bad.clear()
    training.progress.bad_images += len(found)
    for bad in sorted(found, key=lambda bad: bad.position)[:NAMED_BAD_IMAGES]:
        training.engine.echo(f"passed over {bad}; the next sample took its place")


def agree_on_data(world: World, fingerprint: str) -> None:
    """Every rank must read the same order of the same files; raises `UserError` otherwise."""
    expected = broadcast(world, fingerprint)

    def compare() -> None:
        if fingerprint != expected:
            raise UserError(
                f"rank {world.rank} sees another data set than rank 0 under the same path; give "
                "all nodes the same shards"
            )

    together(world, compare)


def loop(
    training: Training, stream: Iterator[Batch], tracker: Tracker | None, on_tick: OnTick
) -> int:
    """Step until `total_images`; returns 0, or 128 + the signal that ended it early."""
    config, world, progress = training.config.train, training.world, training.progress
    if progress.images_seen == 0:
        training.collect_standing_statistics()
        on_main(world, lambda: save_picture(training, tracker))
    began, counted = time.monotonic(), progress.images_seen
    with StopFlag() as stop:
        while progress.images_seen < config.total_images:
            before = progress.images_seen
            training.step(stream)
            seen = progress.images_seen
            last = seen >= config.total_images
            at_snapshot = last or due(before, seen, config.snapshot_images)
            at_checkpoint = last or due(before, seen, config.checkpoint_images)
            if not (at_snapshot or at_checkpoint or due(before, seen, config.tick_images)):
                continue
            means, agreed = training.statistics.collect(
                stop=stop.signal, halted_at=training.engine.halted_at()
            )
            if agreed["halted_at"] >= 0:
                on_main(world, partial(give_up, training, int(agreed["halted_at"]), means))
            count_bad(training)
            now = time.monotonic()
            progress.seconds += now - began
            report = {f"train/{name}": value for name, value in means.items()}
            if training.config.data.on_bad == "skip":
                report["train/bad_images"] = progress.bad_images
            report["train/images_per_second"] = (seen - counted) / max(now - began, 1e-9)
            report["train/data_wait"] = training.data_seconds / max(now - began, 1e-9)  # 0 to 1
            training.data_seconds = 0.0
            if tracker:
                tracker.log(seen, report | {"train/attempt": progress.attempt})
                on_tick(progress, report)
            if at_snapshot:
                save_snapshot(training, tracker)
            if at_checkpoint or agreed["stop"]:
                save_checkpoint(training)
            if agreed["stop"] and not last:
                return 128 + int(agreed["stop"])
            began, counted = time.monotonic(), seen
    on_main(world, lambda: finish(training, tracker))
    barrier(world)
    return 0


def finish_again(training: Training) -> None:
    """Finish a run whose last checkpoint was its last act, and deliver what the tracker missed."""
    tracker = Tracker(training.config.run_dir, training.config.tracking, role="train")
    finish(training, tracker)
    tracker.close("FINISHED")


def finish(training: Training, tracker: Tracker | None) -> None:
    """The pictures of the whole run, then its completion marker; on rank 0."""
    run_dir = training.config.run_dir
    grids = [path for path in (run_dir / "samples").glob("*.png") if path.stem.isdigit()]
    grids.sort(key=lambda path: int(path.stem))
    pictures.contact_sheet([(int(path.stem), path) for path in grids], run_dir / "timeline.png")
    if tracker:
        tracker.artifact(run_dir / "timeline.png")
        tracker.artifact(run_dir / "curves.png")
    run_folder.finish(training.config, training.progress.images_seen)


def give_up(training: Training, images_seen: int, means: dict[str, float]) -> None:
    """Raise the `RunError` of a non-finite step: what and when, what is kept, what to try."""
    names = [name for name, value in means.items() if not abs(value) < float("inf")]
    newest = checkpoint.latest(training.config.run_dir)
    kept = f"the last checkpoint {newest} is intact" if newest else "there is no checkpoint yet"
    raise RunError(
        f"{', '.join(names) or 'a loss'} became non-finite at images_seen = {images_seen}; no "
        f"update was made from that step on and {kept}; try a lower learning rate, "
        "precision=fp32, or a penalty"
    )
