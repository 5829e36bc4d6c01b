"""Packing: what is in the shards, kills, refusals."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bigan.data import DataError, sources
from bigan.data.decode import decode_into
from bigan.data.pack import pack
from bigan.data.shards import Manifest


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "digits"
    pack("digits", folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 JPEG files in two classes."""
    root = tmp_path_factory.mktemp("photos") / "photos"
    random = np.random.default_rng(0)
    for i in range(60):
        file = root / f"class{i % 2}" / f"image.{i:02d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (20, 30, 3), np.uint8)).save(file)
    return root


def tree(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def one_line(error: pytest.ExceptionInfo[DataError], *parts: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    assert all(part in text for part in parts), text


def test_packed_samples_are_the_source(digits: Path) -> None:
    source = sources.digits(16)
    manifest = Manifest.load(digits)
    assert (manifest.resolution, manifest.channels, manifest.num_classes) == (16, 1, 10)
    assert manifest.splits == ("train", "test")
    assert manifest.transform == source.transform
    want: dict[bytes, tuple[int, str]] = {
        image.tobytes(): (label, split)
        for (_, label, image), split in zip(source, source.splits, strict=True)
    }
    got: list[bytes] = []
    for split in manifest.splits:
        index = manifest.load_index(split)
        files = [(digits / shard.url).read_bytes() for shard in manifest.shards(split)]
        assert len(index.label) == manifest.num_samples(split)
        assert np.bincount(index.label).tolist() == list(manifest.class_counts(split))
        for offset, size, label, shard in zip(
            index.offset.tolist(), index.size.tolist(), index.label, index.shard, strict=True
        ):
            out = np.empty((16, 16, 1), np.uint8)
            decode_into(out, files[shard][offset : offset + size], "npy")
            assert want[out.tobytes()] == (label, split)
            got.append(out.tobytes())
    assert len(got) == 1797
    assert set(got) == set(want)


def test_packing_shuffles_globally(photos: Path, tmp_path: Path) -> None:
    """Files come class by class; every shard must hold both classes, in another order per seed."""
    orders = []
    for seed in (0, 1):
        manifest = pack(str(photos), tmp_path / str(seed), resolution=8, shard_size=18, seed=seed)
        train = manifest.shards("train")
        assert all(min(shard.class_histogram) > 2 for shard in train if shard.nsamples == 18)
        orders.append(manifest.load_index("train").label.tolist())
    assert orders[0] != orders[1]


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


def test_packing_again_is_identical_and_does_nothing(digits: Path, tmp_path: Path) -> None:
    before = tree(digits)
    pack("digits", tmp_path / "again", threads=1)
    assert tree(tmp_path / "again") == before
    times = {file: file.stat().st_mtime_ns for file in digits.rglob("*")}
    pack("digits", digits)
    assert {file: file.stat().st_mtime_ns for file in digits.rglob("*")} == times


def test_deleted_shard_is_packed_again(digits: Path, tmp_path: Path) -> None:
    before = tree(digits)
    pack("digits", tmp_path / "d")
    (tmp_path / "d" / "train-000003.tar").unlink()
    with pytest.raises(DataError, match=r"train-000003\.tar: shard is missing"):
        Manifest.load(tmp_path / "d")
    pack("digits", tmp_path / "d")
    assert tree(tmp_path / "d") == before


def killed_pack(source: Path, target: Path, writes: int) -> None:
    """Pack in a child process that SIGKILLs itself during its n-th write of a file."""
    child = os.fork()
    if child == 0:
        real, count = os.fsync, itertools.count(1)

        def fsync(descriptor: int) -> None:
            if next(count) == writes:  # the temporary file is written, but not yet renamed
                os.kill(os.getpid(), signal.SIGKILL)
            real(descriptor)

        os.fsync = fsync
        try:
            pack(str(source), target, resolution=8, shard_size=10)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def test_killed_pack_ends_byte_identical(photos: Path, tmp_path: Path) -> None:
    pack(str(photos), tmp_path / "undisturbed", resolution=8, shard_size=10)
    target = tmp_path / "killed"
    # The first write is plan.json, then one for each of 7 shards, 8 index columns, the manifest.
    for writes, finished in [(1, 0), (4, 2), (3, 4), (6, 7), (9, 7)]:
        killed_pack(photos, target, writes)
        assert len(list(target.glob("[a-z]*.tar"))) == finished
        assert list(target.rglob(".*.tmp"))
        with pytest.raises(DataError, match="bigan pack"):
            Manifest.load(target)
    kept = (target / "train-000000.tar").stat().st_mtime_ns
    pack(str(photos), target, resolution=8, shard_size=10)
    assert tree(target) == tree(tmp_path / "undisturbed")
    assert (target / "train-000000.tar").stat().st_mtime_ns == kept


def test_large_images_become_png(photos: Path, tmp_path: Path) -> None:
    manifest = pack(str(photos), tmp_path / "d", resolution=130)
    assert manifest.encoder == "png"
    index = manifest.load_index("train")
    data = (tmp_path / "d" / manifest.shards("train")[0].url).read_bytes()
    begin, size = int(index.offset[0]), int(index.size[0])
    out = np.empty((130, 130, 3), np.uint8)
    decode_into(out, data[begin : begin + size], "png")
    originals = {sources.read_rgb(file, 130).tobytes() for file in photos.rglob("*.jpg")}
    assert out.tobytes() in originals


def test_bad_image_stops_the_pack_naming_it(photos: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    for file in photos.rglob("*.jpg"):
        copy = root / file.relative_to(photos)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    (root / "class1" / "image.31.jpg").write_bytes(b"")
    with pytest.raises(DataError) as error:
        pack(str(root), tmp_path / "d", resolution=8)
    one_line(error, "class1/image.31.jpg")
    assert not (tmp_path / "d" / "manifest.json").exists()


def test_refusals_leave_everything_as_it_was(digits: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    (tmp_path / "file").write_text("a file")
    before, digits_before, photos_before = tree(tmp_path), tree(digits), tree(photos)
    for spec, destination, resolution, part in [
        ("digits", tmp_path / "mine", None, "thesis.txt"),
        ("digits", tmp_path / "file", None, "is a file"),
        ("digits", digits, 32, "resolution is 16"),
        (str(photos), digits, 16, "source is 'digits'"),
        (str(photos), photos / "packed", 16, "lies inside"),
        (str(photos), tmp_path / "d", None, "--resolution"),
        ("didgits", tmp_path / "d", 16, "no such folder"),
        ("digits", tmp_path / "d", 20, "8, 16 or 32"),
        ("digits", tmp_path / "file" / "below", None, "below"),
    ]:
        with pytest.raises(DataError) as error:
            pack(spec, destination, resolution=resolution)
        one_line(error, part)
    assert (tree(tmp_path), tree(digits), tree(photos)) == (before, digits_before, photos_before)


def test_nothing_outside_the_destination_is_written(tmp_path: Path) -> None:
    """Every file opened for writing, made or renamed, as Python's audit hook sees it."""
    pack("digits", tmp_path / "before", resolution=8)  # whatever imports write is written now
    target, written, active = tmp_path / "d", [], [True]

    def hook(event: str, arguments: tuple) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & 3
        if active and (writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")):
            written.append(Path(os.fsdecode(arguments[0])))

    sys.addaudithook(hook)  # it cannot be taken away again, only silenced
    pack("digits", target, resolution=8)
    active.clear()
    assert len(written) > 20
    assert [w for w in written if w != target and target not in w.parents] == []
