"""Pyramids: the same samples, numbers and shards at each level."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bigan.data import DataError
from bigan.data.format.codec import Pixels
from bigan.data.format.manifest import Manifest
from bigan.data.packing import sources
from bigan.data.packing.pack import Packed, pack, pack_source
from bigan.data.packing.pack_shard import Record, halvings
from bigan.data.streaming.stream import sequential
from bigan.distributed.world import World

LEVELS = ("r0004", "r0008", "r0016", "r0032")


def drawn(resolution: int = 32, num: int = 60) -> sources.Source:
    shape = (num, resolution, resolution, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return sources.Source(
        name="drawn",
        transform="made",
        identity="drawn by the test",
        resolution=resolution,
        channels=3,
        classes=("a", "b", "c"),
        keys=tuple(f"{i:04d}" for i in range(num)),
        labels=tuple(i % 3 for i in range(num)),
        splits=tuple("test" if i % 6 == 5 else "train" for i in range(num)),
        read=lambda i: images[i],
    )


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    folder = tmp_path_factory.mktemp("pyramid") / "d"
    return pack_source(drawn(), folder, pyramid=4, shard_size=16)


def read_all(folder: Path, split: str) -> tuple[Pixels, list[int]]:
    """Images uint8 [N, H, W, C] and labels of a split from the stream."""
    batches = list(sequential(folder, split, World(), 7))
    images = np.concatenate([batch.pixels.numpy() for batch in batches])
    return images, [label for batch in batches for label in batch.labels.tolist()]


def records(folder: Path) -> dict[str, Record]:
    return {
        path.stem: Record.model_validate_json(path.read_bytes())
        for path in sorted(folder.glob("index/*.json"))
    }


def test_every_level_is_a_data_set_of_the_same_samples(packed: Packed) -> None:
    root = packed.manifests[0].folder.parent
    assert [m.folder.name for m in packed.manifests] == list(LEVELS)
    assert json.loads((root / "pyramid.json").read_text())["levels"] == list(LEVELS)
    top = packed.manifests[-1]
    assert len({m.fingerprint for m in packed.manifests}) == 4
    for manifest in packed.manifests:
        assert Manifest.load(manifest.folder) == manifest
        plan = (manifest.folder / "plan.json").read_text()
        assert plan == (root / "plan.json").read_text()  # marks an unfinished level
        assert manifest.resolution == int(manifest.folder.name[1:])
        assert [s.nsamples for s in manifest.shardlist] == [s.nsamples for s in top.shardlist]
        for split in ("train", "test"):
            mine, tops = manifest.load_index(split), top.load_index(split)
            assert mine.label.tolist() == tops.label.tolist()
            assert mine.first.tolist() == tops.first.tolist()
        for name, record in records(manifest.folder).items():
            assert record.keys == records(top.folder)[name].keys


def test_levels_are_exact_means_of_the_top(packed: Packed) -> None:
    """Rounded once, half up; compared with float64 means of NumPy."""
    for split in ("train", "test"):
        top, labels = read_all(packed.manifests[-1].folder, split)
        for manifest in packed.manifests:
            images, found = read_all(manifest.folder, split)
            size, factor = manifest.resolution, 32 // manifest.resolution
            cells = top.reshape(len(top), size, factor, size, factor, 3).astype(np.float64)
            assert np.array_equal(images, np.floor(cells.mean((2, 4)) + 0.5))
            assert found == labels


def test_halvings_round_half_up_and_once() -> None:
    image = np.zeros((4, 4, 1), np.uint8)
    image[:2, :2, 0] = [[1, 1], [0, 0]]  # 0.5 in its cell, 0.125 in all
    small, middle, top = halvings(image, 3)
    assert top is image
    assert middle[..., 0].tolist() == [[1, 0], [0, 0]]
    assert small.tolist() == [[[0]]]
    image[...] = 0
    image[::2, ::2, 0] = 2  # 0.5 in each cell and in all
    assert [level.max() for level in halvings(image, 3)] == [1, 1, 2]
    image[0, 0, 0] = 0  # 0.375 in all; the mean of 0, 1, 1, 1 would become 1
    assert [level.max() for level in halvings(image, 3)] == [0, 1, 2]
    white = np.full((512, 512, 3), 255, np.uint8)
    assert all((level == 255).all() for level in halvings(white, 8))


def test_transform_and_encoding_of_each_level(tmp_path: Path) -> None:
    """The transform is part of reference statistics: a mean of a crop is not a crop."""
    mixed = pack_source(drawn(256, num=8), tmp_path / "mixed", pyramid=64).manifests
    assert [m.transform for m in mixed] == ["made+mean4-v1", "made+mean2-v1", "made"]
    assert [m.encoder for m in mixed] == ["npy", "npy", "png"]
    assert read_all(mixed[-1].folder, "train")[0].shape[1:] == (256, 256, 3)
    jpegs = pack_source(drawn(num=8), tmp_path / "jpg", pyramid=16, encoding="jpg").manifests
    assert [(m.encoder, m.quality) for m in jpegs] == [("jpg", 95), ("jpg", 95)]


def test_originals_are_decoded_once(tmp_path: Path) -> None:
    source, reads = drawn(), []
    counted = {**vars(source), "read": lambda i: (reads.append(i), source.read(i))[1]}
    pack_source(sources.Source(**counted), tmp_path, pyramid=4, shard_size=16)
    assert sorted(reads) == list(range(60))


def test_a_missing_level_is_packed_again(packed: Packed, tmp_path: Path) -> None:
    def tree() -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()}

    pack_source(drawn(), tmp_path, pyramid=4, shard_size=16)
    before = tree()
    (tmp_path / "r0008" / "train-000001.tar").unlink()
    (tmp_path / "r0016" / "manifest.json").unlink()
    pack_source(drawn(), tmp_path, pyramid=4, shard_size=16)
    assert tree() == before
    (tmp_path / "pyramid.json").unlink()
    pack_source(drawn(), tmp_path, pyramid=4, shard_size=16)
    assert tree() == before


def test_level_8_of_the_digits_is_exact(tmp_path: Path) -> None:
    """The enlargement preserves cell means: level 8 equals the original."""
    levels = pack("digits", tmp_path / "pyramid", resolution=32, pyramid=4).manifests
    original = pack("digits", tmp_path / "original", resolution=8).manifests[0]
    assert levels[1].fingerprint == original.fingerprint


@pytest.mark.parametrize(
    ("resolution", "pyramid"), [(36, 4), (100, 4), (32, 64), (32, 0), (32, -4)]
)
def test_impossible_pyramids(resolution: int, pyramid: int, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="doubling does not reach"):
        pack_source(drawn(resolution, num=4), tmp_path / "d", pyramid=pyramid)
    assert not (tmp_path / "d").exists()
