"""Several data streams in one run: their orders, and where a resumed run continues them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from parts import TEN_CLASSES, make

from bigan.data.format.manifest import Manifest
from bigan.data.packing.pack import pack
from bigan.data.streaming.order import Order
from bigan.data.streaming.stream import Batch
from bigan.distributed.world import World
from bigan.engine import Engine
from bigan.errors import UserError
from bigan.run.state import TrainState
from bigan.run.streams import OpenStreams, check_data, open_streams, order_seed
from bigan.run.trainer import train
from bigan.run_config import RunConfig

MakeConfig = Callable[..., RunConfig]
BATCH = 40


@pytest.fixture
def two(make_config: MakeConfig, digits: Path) -> Callable[..., RunConfig]:
    """A config with the digits as two streams."""

    def of(*overrides: str) -> RunConfig:
        return make_config(
            f"data={{others: {{path: {digits}}}, images: {{path: {digits}}}}}", *overrides
        )

    return of


@contextmanager
def opened(config: RunConfig, images_seen: int = 0, world: World | None = None) -> Iterator:
    """The streams of a run that has seen so many images."""
    state = SimpleNamespace(
        config=config,
        run_config=config,
        world=world or World(),
        accumulation=1,
        progress=SimpleNamespace(images_seen=images_seen),
    )
    with open_streams(state) as streams:  # type: ignore[arg-type]
        yield streams


def read(streams: OpenStreams, name: str, num: int = 3) -> list[Batch]:
    return [next(streams[name]) for _ in range(num)]  # type: ignore[misc]


def labels(batches: list[Batch]) -> torch.Tensor:
    return torch.cat([batch.labels for batch in batches])


def test_each_order_is_a_function_of_seed_stream_and_position(
    two: Callable[..., RunConfig], digits: Path
) -> None:
    """That of `images` depends on the seed alone: it is the order of a single stream."""
    manifest = Manifest.load(digits)
    sizes, index = [s.nsamples for s in manifest.shards("train")], manifest.load_index("train")
    for seed in (0, 5):
        with opened(two(f"train.seed={seed}")) as streams:
            assert list(streams) == ["others", "images"]
            for name in streams:
                order = Order(sizes, order_seed(seed, name), 65_536)
                expected = index.label[order.samples(0, 3 * BATCH)]
                assert np.array_equal(labels(read(streams, name)).numpy(), expected), name
    assert order_seed(5, "images") == 5
    assert order_seed(0, "others") == 1443169781821999252  # golden: the same on every platform
    seeds = {order_seed(seed, name) for seed in (0, 5) for name in ("images", "others", "x")}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_stream_named_images_reads_what_a_single_stream_reads(
    two: Callable[..., RunConfig], make_config: MakeConfig
) -> None:
    with opened(two()) as streams, opened(make_config()) as single:
        assert list(single) == ["images"]
        pairs = zip(read(streams, "images"), read(single, "images"), strict=True)
        for batch, other in pairs:
            assert torch.equal(batch.pixels, other.pixels)
            assert np.array_equal(batch.positions, other.positions)
        others = read(streams, "others")
    with opened(two()) as streams:
        assert not torch.equal(labels(others), labels(read(streams, "images")))


def test_ranks_share_each_stream(two: Callable[..., RunConfig]) -> None:
    """Two ranks together read the global batch of one."""
    for name in ("images", "others"):
        with opened(two()) as streams:
            (whole,) = read(streams, name, 1)
        parts = []
        for rank in range(2):
            with opened(two(), world=World(rank=rank, size=2)) as streams:
                parts += read(streams, name, 1)
        assert torch.equal(labels(parts), whole.labels)


def test_a_resumed_run_continues_both_streams(two: Callable[..., RunConfig]) -> None:
    with opened(two()) as streams:
        begun = {name: read(streams, name, 4)[2:] for name in streams}
    with opened(two(), images_seen=2 * BATCH) as streams:
        for name, expected in begun.items():
            for batch, other in zip(read(streams, name, 2), expected, strict=True):
                assert torch.equal(batch.pixels, other.pixels), name


def test_an_objective_with_one_stream_ignores_others(
    two: Callable[..., RunConfig], make_config: MakeConfig
) -> None:
    """It reads the stream `images`, and trains as with that one alone."""
    weights = []
    for config in (two(), make_config()):
        state, streams = make(config)
        with streams:
            state.advance(streams)
        weights.append(state.networks["discriminator"].state_dict())
        state.close()
    for key, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][key]), key


def test_the_fingerprint_covers_every_stream(
    two: Callable[..., RunConfig], make_config: MakeConfig, digits: Path, tmp_path: Path
) -> None:
    """A run refuses other images in any of its streams."""
    config = two("train.total_images=200")
    found, single = check_data(config), check_data(make_config())
    assert found.classes == single.classes
    assert found.fingerprint == f"others:{single.fingerprint}/images:{single.fingerprint}"
    assert train(config, print, lambda *_: None) == 0
    pack("digits", tmp_path / "changed", seed=1)
    with pytest.raises(UserError, match="other images"):
        train(two(f"data.others.path={tmp_path / 'changed'}"), print, lambda *_: None)


def test_images_of_every_stream_are_checked(two: Callable[..., RunConfig], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        check_data(two(f"data.others.path={tmp_path / 'nowhere'}"))


def test_a_stream_that_the_objective_reads_must_be_there(
    make_config: MakeConfig, digits: Path
) -> None:
    with pytest.raises(UserError, match=r"others.*images"):
        make_config(f"data={{others: {{path: {digits}}}}}")


def recording(stream: Iterator[Batch], read: list[Batch]) -> Iterator[Batch]:
    for batch in stream:
        read.append(batch)
        yield batch


@pytest.mark.parametrize("lanes", [1, 8])
def test_draws_of_an_image_do_not_depend_on_ranks_and_accumulation(
    make_config: MakeConfig, lanes: int
) -> None:
    """Flips and latents belong to a position, whoever reads it in whichever micro-batch."""

    def draws(world: World, micro_batch: int) -> dict[int, tuple[bool, bytes]]:
        config = make_config(
            "data.mirror=true", f"data.lanes={lanes}", f"train.micro_batch={micro_batch}"
        )
        engine = Engine(config, print)
        engine.world = world
        state = TrainState(config, engine, TEN_CLASSES)
        state.progress.images_seen = 2 * BATCH
        with open_streams(state) as streams:
            read: list[Batch] = []
            recorded = {"images": recording(streams["images"], read)}
            step = state.objective.steps(2 * BATCH)[0]
            assert step.fresh
            inputs = state._inputs(step, recorded, [{}] * state.accumulation)
        return {
            int(position): (bool(micro["images.mirror"][row]), micro["z"][row].numpy().tobytes())
            for batch, micro in zip(read, inputs, strict=True)
            for row, position in enumerate(batch.positions)
        }

    want = draws(World(), BATCH)
    assert list(want) == sorted(range(2 * BATCH, 3 * BATCH), key=lambda p: p % lanes)
    for size, micro_batch in ((1, 20), (1, 5), (2, 20), (2, 10), (4, 5)):
        found = [draws(World(rank, size), micro_batch) for rank in range(size)]
        assert {p: draw for part in found for p, draw in part.items()} == want
        assert sum(map(len, found)) == BATCH
