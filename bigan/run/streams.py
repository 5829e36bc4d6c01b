"""The data streams of a run: checked at the start, and opened at the position of `images_seen`."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from bigan.data.format.manifest import Manifest
from bigan.data.settings import DataConfig
from bigan.data.streaming import resampled
from bigan.data.streaming.dataset import open_level, open_manifest
from bigan.data.streaming.resampled import ResampledStream
from bigan.data.streaming.stream import Batch, Endless, ShardStream, lanes_of
from bigan.distributed.world import World, broadcast, gather, on_all_ranks
from bigan.errors import UserError
from bigan.image_size import ratio
from bigan.run.stages import stages
from bigan.run.state import TrainState
from bigan.run_config import IMAGES, RunConfig, load_config, misfits
from bigan.run_folder import RunFolder
from bigan.transparency import has_alpha
from bigan.urls import is_remote, redacted

NAMED_BAD_IMAGES = 10  # maximum per tick


@dataclass(frozen=True)
class Images:
    """Facts about the training images: number of images of each class, and a fingerprint."""

    classes: dict[str, int]
    fingerprint: str


def check_data(config: RunConfig) -> Images:
    """Check the images of every stream; raises `UserError` if they do not fit the model.

    Classes are those of the stream "images", or of the first stream if none has that name.
    """
    found = {name: _check_stream(config, name, data) for name, data in config.streams.items()}
    first = found.get(IMAGES) or next(iter(found.values()))
    if len(found) == 1:
        return first
    joined = "/".join(f"{name}:{images.fingerprint}" for name, images in found.items())
    return Images(first.classes, joined)


def _check_stream(config: RunConfig, name: str, data: DataConfig) -> Images:
    """Check one stream, at every resolution of a growing model."""
    if data.mode == "resampled":  # no manifest: only the URLs are known
        if config.growth:
            raise UserError("growth needs packed images at every resolution: data.mode=resampled")
        resampled.expand(data.path, data.allow_pipe, data.split)
        num_classes = config.model.num_classes
        if data.labels == "none" and num_classes > 1:
            raise UserError(f"data.labels = none needs model.num_classes = 1, not {num_classes}")
        classes = {str(label): 1 for label in range(num_classes)}
        return Images(classes, f"resampled/{redacted(data.path)}")
    if config.growth is None:
        return _images(config, data, open_manifest(data.path, data))
    found = []
    for level in {stage.resolution: stage.config for stage in stages(config)}.values():
        manifest = open_level(data.path, level.model.resolution, data)
        full = manifest.resolution == config.model.resolution  # no pyramid: `Shrunk` downsamples
        found.append(_images(config if full else level, data, manifest))
    if any(images.classes != found[0].classes for images in found):
        raise UserError(
            f"{redacted(data.path)}: the resolutions hold different images; pack them again, "
            "together (`bigan pack --pyramid`)"
        )
    return Images(found[0].classes, "/".join(dict.fromkeys(i.fingerprint for i in found)))


def _images(config: RunConfig, data: DataConfig, manifest: Manifest) -> Images:
    """Raises `UserError` if the images of `manifest` do not fit the model of `config`."""
    counts = manifest.samples_of_class(data.split)
    wrong = [
        f"{what} {found} but model.{key} = {wanted}"
        for what, key, wanted, found in misfits(config.model, manifest)
    ]
    if wrong:
        one = " (one class because of data.labels=none)" if data.labels == "none" else ""
        raise UserError(
            f"{manifest.folder}: the images have {'; '.join(wrong)}{one}; change the config or "
            "pack the images again (`bigan pack --help`)"
        )
    return Images(dict(zip(manifest.classes, counts, strict=True)), manifest.fingerprint)


def staged_splits(config: RunConfig) -> list[tuple[Manifest, DataConfig]]:
    """The data sets, of all resolutions of a growing model, that `data.cache` has a copy of.

    Those in a folder: of a URL, the cache keeps what was read. Raises `DataError`.
    """
    found = []
    for data in config.streams.values():
        if data.cache is None or data.mode == "resampled" or is_remote(data.path):
            continue
        if config.growth is None:
            found.append((open_manifest(data.path, data), data))
            continue
        levels = {stage.resolution: stage.config.model.resolution for stage in stages(config)}
        opened = [open_level(data.path, level, data) for level in levels.values()]
        found += [(manifest, data) for manifest in {m.folder: m for m in opened}.values()]
    return found


def resolve_lanes(config: RunConfig) -> dict[str, int | None]:
    """`data.lanes` of every stream: as set, else those of the run in `run_dir`, else the default.

    None is one lane, of a folder.

    A run keeps its lanes when its data is moved. Raises `DataError` if the data cannot be opened.
    """
    stored = RunFolder(config.run_dir).config
    known = load_config(stored).streams if stored.exists() else {}
    found: dict[str, int | None] = {}
    for name, data in config.streams.items():
        if data.lanes or name not in known:
            found[name] = data.lanes or _default_lanes(config, data)
        else:  # a run without had one lane
            found[name] = known[name].lanes or (1 if is_remote(data.path) else None)
    return found


def _default_lanes(config: RunConfig, data: DataConfig) -> int | None:
    if data.mode == "resampled" or not is_remote(data.path):
        return None
    manifest = open_level(data.path, config.model.resolution, data)
    batches = [stage.config.train.batch for stage in stages(config)]
    return lanes_of(manifest, data.split, batches)


def with_lanes(config: RunConfig, lanes: Mapping[str, int | None]) -> RunConfig:
    """`config` with the lanes of each stream."""
    streams = {
        name: data.model_copy(update={"lanes": lanes[name]})
        for name, data in config.streams.items()
    }
    data = streams if isinstance(config.data, dict) else streams[IMAGES]
    return config.model_copy(update={"data": data})


class Shrunk(Endless):
    """A stream whose images are downsampled by an integer factor.

    On the device, to the bytes that a packed pyramid contains at that resolution: means of f x f
    pixels, of colors weighted by alpha if there is one, rounded half up.
    """

    def __init__(self, stream: Endless, factor: int) -> None:
        self._stream = stream
        self._factor = factor
        self.fingerprint = stream.fingerprint

    def __next__(self) -> Batch:
        batch, f = next(self._stream), self._factor
        tiles = batch.pixels.unflatten(2, (-1, f)).unflatten(1, (-1, f))  # [B, H/f, f, W/f, f, C]
        if not has_alpha(tiles.shape[5]):
            sums = tiles.sum((2, 4), dtype=torch.int32)
            return replace(batch, pixels=((sums + f * f // 2) // (f * f)).to(torch.uint8))
        alpha = tiles[..., -1:].long()
        weight = alpha.sum((2, 4))
        colors = (tiles[..., :-1] * alpha).sum((2, 4))
        colors = (colors + weight.clamp(min=1) // 2) // weight.clamp(min=1)
        means = torch.cat([colors, (weight + f * f // 2) // (f * f)], dim=3)
        return replace(batch, pixels=means.to(torch.uint8))

    def close(self) -> None:
        self._stream.close()


class OpenStreams(dict[str, Endless]):
    """The open streams of a run by name; a context manager that closes them."""

    def __enter__(self) -> OpenStreams:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in self.values():
            stream.close()

    @property
    def fingerprint(self) -> str:
        """Hash of everything that the order of the streams depends on."""
        return "/".join(stream.fingerprint for stream in self.values())


def open_streams(state: TrainState) -> OpenStreams:
    """The streams from `images_seen` on; each rank opens the files that it reads."""
    opened = OpenStreams()
    with contextlib.ExitStack() as stack:
        stack.enter_context(opened)
        for name, data in state.config.streams.items():
            opened[name] = _open_stream(state, data, order_seed(state.config.train.seed, name))
        stack.pop_all()
    return opened


def order_seed(seed: int, stream: str) -> int:
    """Seed of the order of a stream: a function of (seed, stream), `seed` itself for "images"."""
    if stream == IMAGES:
        return seed
    digest = hashlib.blake2b(f"{seed}/stream/{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _open_stream(state: TrainState, data: DataConfig, seed: int) -> Endless:
    config, model = state.config, state.config.model
    if data.mode == "resampled":
        return ResampledStream(
            data.path,
            data.split,
            shape=(model.height, model.width, model.image_channels),
            num_classes=model.num_classes,
            seed=seed,
            world=state.world,
            batch=config.train.batch,
            accumulation=state.accumulation,
            images_seen=state.progress.images_seen,
            fetch=data,
        )
    level: Manifest | None = None  # one resolution of several
    if state.run_config.growth is not None:
        level = open_level(data.path, model.resolution, data)
    stream = ShardStream(
        level or data.path,
        data.split,
        seed=seed,
        world=state.world,
        batch=config.train.batch,
        accumulation=state.accumulation,
        images_seen=state.progress.images_seen,
        block=data.block,
        lanes=data.lanes,
        fetch=data,
    )
    factor = ratio(level.resolution, model.resolution) if level else 1
    return stream if factor == 1 else Shrunk(stream, factor)


def count_bad(state: TrainState) -> None:
    """Count the images that were replaced since the last tick, over all ranks, and report them."""
    if all(data.on_bad == "stop" for data in state.config.streams.values()):
        return
    found = [bad for part in gather(state.world, state.bad) for bad in part]
    state.bad.clear()
    state.progress.bad_images += len(found)
    for bad in sorted(found, key=lambda bad: bad.position)[:NAMED_BAD_IMAGES]:
        state.engine.echo(f"skipped {bad}; the next sample replaced it")


def agree_on_data(world: World, fingerprint: str) -> None:
    """Raises `UserError` unless all ranks read the same files in the same order. A collective."""
    expected = broadcast(world, fingerprint)

    def compare() -> None:
        if fingerprint != expected:
            raise UserError(
                f"rank {world.rank} sees another data set than rank 0 under the same path; give "
                "all nodes the same shards"
            )

    on_all_ranks(world, compare)
