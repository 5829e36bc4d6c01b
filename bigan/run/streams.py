"""The training images of a run: looked at beforehand, opened where it goes on, and counted."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from bigan.data import resampled
from bigan.data.dataset import open_level, open_manifest
from bigan.data.resampled import ResampledStream
from bigan.data.shards import Manifest
from bigan.data.stream import Batch, Endless, ShardStream
from bigan.distributed.world import World, broadcast, gather, on_all_ranks
from bigan.errors import UserError
from bigan.objectives.growth import stages
from bigan.run.state import Training
from bigan.run_config import RunConfig, misfits

NAMED_BAD_IMAGES = 10  # at most, of those found in one tick


@dataclass(frozen=True)
class Images:
    """What training must know of its images: number of each class by name, and their identity."""

    classes: dict[str, int]
    fingerprint: str


def check_data(config: RunConfig) -> Images:
    """Look at the training images; raises `UserError` if they do not fit the model.

    Those of every resolution that the model grows through, before any of it begins.
    """
    if config.data.mode == "resampled":  # no manifest: nothing is known but where they are
        if config.growth:
            raise UserError("growth needs packed images at every resolution: data.mode=resampled")
        resampled.expand(config.data.path, config.data.allow_pipe)
        classes = {str(label): 1 for label in range(config.model.num_classes)}
        return Images(classes, f"resampled/{config.data.path}")
    if config.growth is None:
        return _images(config, open_manifest(config.data.path, config.data))
    found = []
    for level in {stage.resolution: stage.config for stage in stages(config)}.values():
        manifest = open_level(level.data.path, level.model.resolution, level.data)
        whole = manifest.resolution == config.model.resolution  # no pyramid: `Shrunk` makes one
        found.append(_images(config if whole else level, manifest))
    if any(images.classes != found[0].classes for images in found):
        raise UserError(
            f"{config.data.path}: the resolutions hold different images; pack them anew, together "
            "(`bigan pack --pyramid`)"
        )
    return Images(found[0].classes, "/".join(dict.fromkeys(i.fingerprint for i in found)))


def _images(config: RunConfig, manifest: Manifest) -> Images:
    """Raises `UserError` if the images of `manifest` do not fit the model of `config`."""
    counts = manifest.class_counts(config.data.split)
    wrong = [
        f"{what} {found} but model.{key} = {wanted}"
        for what, key, wanted, found in misfits(config.model, manifest)
    ]
    if wrong:
        raise UserError(
            f"{manifest.folder}: the images have {'; '.join(wrong)}; change the config or pack "
            "the images again (`bigan pack --help`)"
        )
    return Images(dict(zip(manifest.classes, counts, strict=True)), manifest.fingerprint)


class Shrunk(Endless):
    """A stream of images whose resolution is a multiple of the one asked for.

    Shrunk on the device, to the very bytes that a packed pyramid holds at that resolution: means of
    f x f pixels, a half rounded up.
    """

    def __init__(self, stream: Endless, factor: int) -> None:
        self._stream = stream
        self._factor = factor
        self.fingerprint = stream.fingerprint

    def __next__(self) -> Batch:
        batch, f = next(self._stream), self._factor
        tiles = batch.real.unflatten(2, (-1, f)).unflatten(1, (-1, f))  # [B, H/f, f, W/f, f, C]
        sums = tiles.sum((2, 4), dtype=torch.int32)
        return replace(batch, real=((sums + f * f // 2) // (f * f)).to(torch.uint8))

    def close(self) -> None:
        self._stream.close()


def open_stream(training: Training) -> Endless:
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
    level: Manifest | None = None  # one resolution of several
    if training.recipe.growth is not None:
        level = open_level(config.data.path, model.resolution, config.data)
    stream = ShardStream(
        level or config.data.path,
        config.data.split,
        seed=config.train.seed,
        world=training.world,
        batch=config.train.batch,
        accumulation=training.accumulation,
        images_seen=training.progress.images_seen,
        block=config.data.block,
        fetch=config.data,
    )
    factor = level.resolution // model.resolution if level else 1
    return stream if factor == 1 else Shrunk(stream, factor)


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

    on_all_ranks(world, compare)
