"""The training images of a run: looked at beforehand, opened where it goes on, and counted."""

from __future__ import annotations

from dataclasses import dataclass

from bigan.data import resampled
from bigan.data.dataset import open_manifest
from bigan.data.resampled import ResampledStream
from bigan.data.stream import ShardStream
from bigan.errors import UserError
from bigan.recipe import RunConfig, misfits
from bigan.training import Training
from bigan.world import World, broadcast, gather, together

NAMED_BAD_IMAGES = 10  # at most, of those found in one tick


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
