"""Packing: unusable images, refused destinations and options, full disks."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from data_helpers import one_line, tree
from packed_folders import drawn, only, record, unpacked

from bigan import atomic_files
from bigan.data import DataError
from bigan.data.format.manifest import Manifest
from bigan.data.packing import pack_plan
from bigan.data.packing.pack import MAX_EXCESS_BAD, pack, pack_source

# --- unusable images ----------------------------------------------------------------------------


def test_all_bad_images_are_listed(photos: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    for file in photos.rglob("*.jpg"):
        copy = root / file.relative_to(photos)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    (root / "class1" / "image.31.jpg").write_bytes(b"")
    full = (root / "class0" / "image.10.jpg").read_bytes()
    (root / "class0" / "image.10.jpg").write_bytes(full[: len(full) // 2])
    with pytest.raises(DataError) as error:
        pack(root, tmp_path / "d", resolution=8)
    one_line(
        error, "2 of 60 images", "--max-bad 0", "class1/image.31.jpg: ", "class0/image.10.jpg: "
    )
    one_line(error, "bad.txt", f"delete {tmp_path / 'd'} and pack again", "--max-bad 2")
    assert not (tmp_path / "d" / "manifest.json").exists()
    listed = (tmp_path / "d" / "bad.txt").read_text().splitlines()
    assert {line.split("\t")[0] for line in listed} == {
        "class1/image.31.jpg",
        "class0/image.10.jpg",
    }
    assert only(pack(root, tmp_path / "d", resolution=8, max_bad=2)).num_bad == 2


def test_originals_removed_after_the_start(photos: Path, tmp_path: Path) -> None:
    """The error contains the remedy; the same images in other splits are another pack."""
    root, target = shutil.copytree(photos, tmp_path / "root"), tmp_path / "d"
    empty = root / "class1" / "image.31.jpg"
    empty.write_bytes(b"")
    with pytest.raises(DataError, match="1 of 60"):
        pack(root, target, resolution=8, shard_size=20)
    with pytest.raises(DataError) as error:
        pack(root, target, resolution=8, shard_size=20, test_fraction=0.2)
    one_line(error, "already holds another pack (the same images in other splits or classes)")
    empty.unlink()
    for size in (20, None):
        with pytest.raises(DataError) as error:
            pack(root, target, resolution=8, shard_size=size)
        one_line(error, "source files changed", f"delete {target} and run the same")
    shutil.rmtree(target)
    (root / "notes.txt").write_text("not an image")
    packed = pack(root, target, resolution=8, shard_size=20)
    assert packed.complete
    assert packed.skipped == ((".txt", 1),)
    assert pack(root, target, resolution=8, shard_size=20).skipped == packed.skipped  # complete
    (root / "class0" / "image.00.jpg").unlink()
    total = len(list(root.rglob("image*")))
    with pytest.raises(DataError) as error:
        pack(root, target, resolution=8, shard_size=20)
    one_line(error, f"{total + 1} images then, {total} now", "new folder", f"delete {target}")


def test_max_bad(tmp_path: Path) -> None:
    """Unusable images do not change the others, and no image is read again for another limit."""
    bad = (4, 17, 39)
    source = drawn(50, bad=bad)
    source = dataclasses.replace(source, bad=(("x.jpg", "has no label"),))
    with pytest.raises(DataError) as error:
        pack_source(source, tmp_path / "d", shard_size=10, max_bad=3)
    one_line(error, "4 of 51 images", "at most --max-bad 3", "x.jpg: has no label; ")
    tars = {name: data for name, data in tree(tmp_path / "d").items() if name.endswith(".tar")}
    assert len(tars) == 6

    def fail(_: int) -> np.ndarray:
        raise AssertionError("is read again")

    unread = dataclasses.replace(source, read=fail)
    packed = pack_source(unread, tmp_path / "d", shard_size=10, max_bad=4)
    manifest = only(packed)
    assert manifest.num_bad == len(packed.bad) == 4
    assert packed.bad[0] == ("x.jpg", "has no label")
    assert (tmp_path / "d" / "bad.txt").read_text().count("\n") == 4
    assert tars.items() <= tree(tmp_path / "d").items()
    # Every other image has the same place and key as without the bad ones.
    pack_source(drawn(50), tmp_path / "good", shard_size=10)
    found, want = unpacked(tmp_path / "d"), unpacked(tmp_path / "good")
    assert set(found) == {key for i, key in enumerate(source.keys) if i not in bad}
    assert all(np.array_equal(found[key], want[key]) for key in found)
    for shard in manifest.shardlist:
        name = shard.url.removesuffix(".tar")
        kept = [key for key in record(tmp_path / "good", name).keys if key in found]
        assert list(record(tmp_path / "d", name).keys) == kept
    numbers = {name for name, _ in members(tmp_path / "good")}
    assert {name for name, _ in members(tmp_path / "d")} < numbers
    # The limit is not part of the plan.
    assert pack_source(unread, tmp_path / "d", shard_size=10, max_bad=9) == packed
    with pytest.raises(DataError, match="4 of 51 images"):
        pack_source(unread, tmp_path / "d", shard_size=10)
    assert Manifest.load(tmp_path / "d") == manifest


def test_bad_txt_is_deleted_without_bad_images(tmp_path: Path) -> None:
    unlabelled = dataclasses.replace(drawn(50), bad=(("x.jpg", "has no label"),))
    with pytest.raises(DataError, match=r"x\.jpg: has no label; all"):
        pack_source(unlabelled, tmp_path)
    assert only(pack_source(drawn(50), tmp_path)).num_bad == 0
    assert not (tmp_path / "bad.txt").exists()


def members(folder: Path) -> list[tuple[str, int]]:
    import tarfile

    found = []
    for file in sorted(folder.glob("*.tar")):
        with tarfile.open(file) as tar:
            found += [(member.name, member.size) for member in tar if member.name.endswith(".npy")]
    return found


def test_a_shard_of_bad_images_only(tmp_path: Path) -> None:
    plan = pack_plan.make_plan(drawn(50), shard_size=10)
    lost = plan.members[1]
    manifest = only(pack_source(drawn(50, bad=lost), tmp_path, shard_size=10, max_bad=10))
    assert not (tmp_path / "train-000001.tar").exists()
    assert record(tmp_path, "train-000001").nsamples == 0
    assert "train-000001.tar" not in {shard.url for shard in manifest.shardlist}
    assert len(manifest.load_index("train").first) == 4
    assert len(unpacked(tmp_path)) == 40
    everything = tuple(range(50))
    with pytest.raises(DataError, match="no usable training image"):
        pack_source(drawn(50, bad=everything), tmp_path / "none", max_bad=50)


def test_pack_stops_early_with_too_many_bad_images(tmp_path: Path) -> None:
    num, done = MAX_EXCESS_BAD + 500, []
    source = drawn(num, bad=tuple(range(num)))
    with pytest.raises(DataError) as error:
        pack_source(source, tmp_path, max_bad=7, jobs=1, progress=lambda *call: done.append(call))
    one_line(error, f"at least {MAX_EXCESS_BAD + 8} of {num} images", "--max-bad 7")
    assert len(done) <= MAX_EXCESS_BAD + 8
    assert (tmp_path / "bad.txt").read_text().count("\n") == MAX_EXCESS_BAD + 8


def test_a_disk_error_is_not_a_bad_image(tmp_path: Path) -> None:
    """Otherwise a network error would remove images permanently."""
    source = drawn(50)

    def read(i: int) -> np.ndarray:
        if i == 31:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return source.read(i)

    broken = dataclasses.replace(source, read=read)
    with pytest.raises(DataError) as error:
        pack_source(broken, tmp_path / "d", shard_size=10, max_bad=50)
    one_line(error, "0031.jpg cannot be read: Input/output error")
    pack_source(source, tmp_path / "d", shard_size=10)
    pack_source(source, tmp_path / "full", shard_size=10)
    assert tree(tmp_path / "d") == tree(tmp_path / "full")


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (np.zeros((8, 9, 3), np.uint8), "is uint8 [8, 9, 3], expected uint8 [8, 8, 3]"),
        (np.zeros((8, 8, 3), np.float32), "is float32 [8, 8, 3]"),
        (SyntaxError("broken PNG file"), "SyntaxError: broken PNG file"),
    ],
)
def test_invalid_sources(image: np.ndarray | Exception, reason: str, tmp_path: Path) -> None:
    source = drawn(20)

    def read(i: int) -> np.ndarray:
        if i == 5 and isinstance(image, Exception):
            raise image
        return image if i == 5 else source.read(i)  # type: ignore[return-value]

    packed = pack_source(dataclasses.replace(source, read=read), tmp_path, max_bad=1)
    assert [name for name, _ in packed.bad] == ["0005.jpg"]
    assert reason in packed.bad[0][1]


# --- refusals -----------------------------------------------------------------------------------


def test_refusals_change_nothing(digits: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    (tmp_path / "file").write_text("a file")
    before, digits_before, photos_before = tree(tmp_path), tree(digits), tree(photos)
    for spec, destination, options, part in [
        ("digits", tmp_path / "mine", {}, "thesis.txt"),
        ("digits", tmp_path / "file", {}, "is a file"),
        ("digits", digits, {"resolution": 32}, "resolution is 16"),
        ("digits", digits, {"encoding": "png"}, "encoder is 'npy'"),
        ("digits", digits, {"pyramid": 8}, "pyramid is None"),
        (str(photos), digits, {"resolution": 16}, "source is 'digits'"),
        (str(photos), photos / "packed", {"resolution": 16}, "is inside the source"),
        (str(photos), tmp_path / "d", {}, "--resolution"),
        ("didgits", tmp_path / "d", {"resolution": 16}, "no such"),
        ("digits", tmp_path / "d", {"resolution": 20}, "8, 16 or 32"),
        ("digits", tmp_path / "d", {"encoding": "tiff"}, "npy, png, jpg, webp"),
        ("digits", tmp_path / "d", {"quality": 90}, "npy is lossless"),
        ("digits", tmp_path / "d", {"encoding": "jpg", "quality": 101}, "between 1 and 100"),
        ("digits", tmp_path / "d", {"pyramid": 0}, "pyramid from 0 px"),
        ("digits", tmp_path / "d", {"pyramid": 32}, "power of two"),
        ("digits", tmp_path / "d", {"shard_size": 0}, "shard_size 0"),
        ("digits", tmp_path / "d", {"part": (5, 4)}, "part 5/4"),
        ("digits", tmp_path / "d", {"part": (0, 0)}, "part 0/0"),
        ("digits", tmp_path / "d", {"jobs": 0}, "jobs 0: must be positive"),
        ("digits", tmp_path / "d", {"max_bad": -1}, "max_bad -1: must not be negative"),
        ("digits", tmp_path / "file" / "below", {}, "below"),
    ]:
        with pytest.raises(DataError) as error:
            pack(spec, destination, **options)  # type: ignore[arg-type]
        one_line(error, part)
    assert (tree(tmp_path), tree(digits), tree(photos)) == (before, digits_before, photos_before)
    assert not (tmp_path / "d").exists()


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line; finished shards are kept, and the same call writes the others."""
    pack_source(drawn(50), tmp_path / "full", shard_size=10)
    real, left = os.fsync, [6]

    def fsync(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(atomic_files.os, "fsync", fsync)
        with pytest.raises(DataError) as error:
            pack_source(drawn(50), tmp_path / "d", shard_size=10)
    one_line(error, f"{tmp_path / 'd'}: cannot be written: No space left on device")
    # The plan, then tar and record of two shards, and the tar of a third one.
    assert len(list((tmp_path / "d" / "index").glob("*.json"))) == 2
    assert not list((tmp_path / "d").rglob("*.tmp"))
    pack_source(drawn(50), tmp_path / "d", shard_size=10)
    assert tree(tmp_path / "d") == tree(tmp_path / "full")


def test_spool_of_an_iterable_is_deleted(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8)
    manifest = only(pack(((image, i % 2) for i, image in enumerate(images)), tmp_path / "d"))
    assert manifest.num_samples("train") + manifest.num_samples("test") == 40
    assert {image.tobytes() for image in images} == {
        image.tobytes() for image in unpacked(tmp_path / "d").values()
    }
    with pytest.raises(DataError, match="shard_size -1"):
        pack(((image, 0) for image in images), tmp_path / "e", shard_size=-1)
    for folder in (tmp_path / "d", tmp_path / "e"):
        assert not list(folder.rglob(".*"))


def test_nothing_outside_the_destination_is_written(photos: Path, tmp_path: Path) -> None:
    """Every file that is opened for writing, created or renamed, by Python's audit hook."""
    pack(photos, tmp_path / "before", resolution=8)  # files that imports write are written here
    target, written, active = tmp_path / "d", [], [True]
    changes = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink")

    def hook(event: str, arguments: tuple) -> None:
        if not active or event not in ("open", *changes):
            return
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & 3
        if (writes or event in changes) and not isinstance(arguments[0], int):
            written.append(Path(os.fsdecode(arguments[0])))

    sys.addaudithook(hook)  # a hook cannot be removed, only disabled
    pack(photos, target, resolution=8, pyramid=4)
    pack(((np.zeros((8, 8, 3), np.uint8), i % 2) for i in range(50)), target / "more")
    active.clear()
    assert len(written) > 20
    assert [w for w in written if w != target and target not in w.parents] == []
