"""Packing: content of the shards, encodings, repeated calls."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
from data_helpers import one_line, tree
from packed_folders import drawn, only, unpacked

from bigan.data import DataError
from bigan.data.format.codec import Encoding, decode_into, encode
from bigan.data.format.manifest import Manifest
from bigan.data.packing import pack_plan, sources
from bigan.data.packing.pack import pack, pack_source

DIGITS = {  # hashes of the digits at each size
    8: "938aff570455c5024734dc57a73fcc4d",
    16: "32e4b19e6df8ed176323940622f4827d",
    32: "cb22417fa6cb03542d3e60cfaba0b692",
}


# --- contents -----------------------------------------------------------------------------------


def test_packed_samples_are_the_source(digits: Path) -> None:
    source = sources.open_source("digits")
    manifest = Manifest.load(digits)
    assert (manifest.resolution, manifest.channels, manifest.num_classes) == (16, 1, 10)
    assert manifest.splits == ("train", "test")
    assert manifest.transform == source.transform
    assert (manifest.samples_per_shard, manifest.num_bad, manifest.quality) == (163, 0, None)
    assert manifest.software.keys() >= {"pillow", "libjpeg-turbo"}
    want: dict[bytes, tuple[int, str]] = {
        source.read(i).tobytes(): (source.labels[i], source.splits[i])
        for i in range(len(source.keys))
    }
    got: list[bytes] = []
    for split in manifest.splits:
        index = manifest.load_index(split)
        tars = [(digits / shard.url).read_bytes() for shard in manifest.shards(split)]
        assert len(index.label) == manifest.num_samples(split)
        assert np.bincount(index.label).tolist() == list(manifest.samples_of_class(split))
        shards = index.shards_of(np.arange(len(index.label)))
        columns = (index.offset.tolist(), index.size.tolist(), index.label, shards)
        for offset, size, label, shard in zip(*columns, strict=True):
            out = np.empty((16, 16, 1), np.uint8)
            decode_into(out, tars[shard][offset : offset + size], "npy")
            assert want[out.tobytes()] == (label, split)
            got.append(out.tobytes())
    assert len(got) == 1797
    assert set(got) == set(want)


@pytest.mark.parametrize("resolution", DIGITS)
def test_digits_are_byte_identical_to_earlier_packs(resolution: int, tmp_path: Path) -> None:
    """Shards and index have the bytes of earlier versions."""
    manifest = only(pack("digits", tmp_path / "d", resolution=resolution))
    assert manifest.fingerprint == DIGITS[resolution]


def test_records_name_the_originals(tmp_path: Path) -> None:
    source = drawn(60)
    pack_source(source, tmp_path / "d", shard_size=20)
    found = unpacked(tmp_path / "d")
    assert set(found) == set(source.keys)
    for i, key in enumerate(source.keys):
        assert np.array_equal(found[key], source.read(i))


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    """A file name of other bytes than UTF-8, with a tab and a newline."""
    source = drawn(20, bad=(3,))
    names = ("a\udcff.jpg", "b\tc\n.jpg", "ü.jpg", "d\udcfe\t.jpg", *source.keys[4:])
    source = dataclasses.replace(source, keys=names)
    packed = pack_source(source, tmp_path / "d", max_bad=1)
    assert packed.bad == (("d\\udcfe\\t.jpg", "does not\\tdecode"),)
    assert (tmp_path / "d" / "bad.txt").read_text() == "d\\udcfe\\t.jpg\tdoes not\\tdecode\n"
    assert {"a\\udcff.jpg", "b\\tc\\n.jpg", "ü.jpg"} <= set(unpacked(tmp_path / "d"))


def test_packing_shuffles_globally(photos: Path, tmp_path: Path) -> None:
    """Files are listed by class; every shard has both classes, in an order that depends on seed."""
    orders = []
    for seed in (0, 1):
        options = {"resolution": 8, "shard_size": 18, "seed": seed}
        manifest = only(pack(str(photos), tmp_path / str(seed), **options))  # type: ignore[arg-type]
        train = manifest.shards("train")
        labels = manifest.load_index("train").label
        parts = np.split(labels, np.cumsum([shard.nsamples for shard in train])[:-1])
        assert all(min(np.bincount(part)) > 2 for part in parts if len(part) == 18)
        orders.append(labels.tolist())
    assert orders[0] != orders[1]


def test_three_splits(photos: Path, tmp_path: Path) -> None:
    manifest = only(pack(photos, tmp_path / "d", resolution=8, val_fraction=0.3, test_fraction=0.2))
    assert manifest.splits == ("train", "val", "test")
    assert sum(manifest.num_samples(split) for split in manifest.splits) == 60
    source = sources.open_source(photos, resolution=8, val_fraction=0.3, test_fraction=0.2)
    assert manifest.num_samples("val") == source.splits.count("val") > 5


def test_plain_webdataset_reads_the_shards(digits: Path) -> None:
    import webdataset

    manifest = Manifest.load(digits)
    urls = [str(digits / shard.url) for shard in manifest.shards("test")]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert len(samples) == 500
    assert [sample["cls"] for sample in samples] == manifest.load_index("test").label.tolist()
    assert [sample["__key__"] for sample in samples[:2]] == ["000001297", "000001298"]
    assert samples[0]["npy"].shape == (16, 16, 1)
    assert samples[0]["npy"].dtype == np.uint8


# --- encodings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoding", "quality"),
    [("npy", None), ("png", None), ("jpg", None), ("jpg", 60), ("webp", None), ("webp", 60)],
)
def test_encodings(encoding: Encoding, quality: int | None, tmp_path: Path) -> None:
    source = drawn(20, resolution=32)
    folder = tmp_path / "d"
    manifest = only(pack_source(source, folder, encoding=encoding, quality=quality))
    assert manifest.encoder == encoding
    assert manifest.quality == (95 if (encoding, quality) == ("jpg", None) else quality)
    found = unpacked(folder)
    lossless = encoding in ("npy", "png") or (encoding, quality) == ("webp", None)
    for i, key in enumerate(source.keys):
        image = source.read(i)
        want = image.copy()
        decode_into(want, encode(image, encoding, quality), encoding)
        assert np.array_equal(found[key], want)
        assert np.array_equal(image, want) == lossless


def test_large_images_become_png(tmp_path: Path) -> None:
    source = drawn(12, resolution=129)
    assert only(pack_source(source, tmp_path / "d")).encoder == "png"
    found = unpacked(tmp_path / "d")
    assert all(np.array_equal(found[key], source.read(i)) for i, key in enumerate(source.keys))
    assert only(pack_source(drawn(12, resolution=128), tmp_path / "e")).encoder == "npy"


def test_records_are_in_the_manifest(tmp_path: Path) -> None:
    """Including that of a shard without usable images."""
    lost = pack_plan.make_plan(drawn(50), shard_size=10).members[1]
    packed = pack_source(drawn(50, bad=lost), tmp_path, shard_size=10, max_bad=10, pyramid=4)
    for manifest in packed.manifests:
        noted = [manifest.folder / "plan.json", *manifest.folder.glob("index/*.json")]
        assert len(noted) == 7
        assert manifest.records == {
            file.relative_to(manifest.folder).as_posix(): hashlib.sha256(
                file.read_bytes()
            ).hexdigest()
            for file in noted
        }


def test_unreadable_index(tmp_path: Path) -> None:
    manifest = only(pack_source(drawn(50), tmp_path))
    file = tmp_path / next(iter(manifest.index))
    file.unlink()
    file.mkdir()
    with pytest.raises(DataError) as error:
        manifest.verify_index()
    one_line(error, f"{file}: cannot be read: Is a directory")


# --- again --------------------------------------------------------------------------------------


def test_packing_again_writes_nothing(digits: Path, tmp_path: Path) -> None:
    before = tree(digits)
    pack("digits", tmp_path / "again", jobs=1)
    assert tree(tmp_path / "again") == before
    times = {file: file.stat().st_mtime_ns for file in digits.rglob("*")}
    assert only(pack("digits", digits)) == Manifest.load(digits)
    assert {file: file.stat().st_mtime_ns for file in digits.rglob("*")} == times


def test_progress_counts_images(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []

    def pack_it() -> None:
        pack_source(drawn(50), tmp_path, shard_size=10, progress=lambda *call: calls.append(call))

    pack_it()
    assert calls == [(done, 50) for done in range(51)]
    calls.clear()
    (tmp_path / "train-000002.tar").unlink()
    pack_it()
    assert calls == [(done, 50) for done in range(40, 51)]
    calls.clear()
    pack_it()
    assert calls == [(50, 50)]


def test_packs_of_other_library_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A complete pack is accepted; an incomplete one is not completed with other bytes."""
    pack_source(drawn(50), tmp_path, shard_size=10)
    before = tree(tmp_path)
    monkeypatch.setattr(pack_plan.PIL, "__version__", "99.0")
    assert only(pack_source(drawn(50), tmp_path, shard_size=10)) == Manifest.load(tmp_path)
    assert tree(tmp_path) == before
    (tmp_path / "train-000002.tar").unlink()
    with pytest.raises(DataError) as error:
        pack_source(drawn(50), tmp_path, shard_size=10)
    one_line(error, "already holds another pack (software is", "99.0")
