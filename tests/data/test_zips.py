"""Zip archives of images: wrapping folders, unsafe and damaged members."""

from __future__ import annotations

import os
import struct
import threading
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from data_helpers import one_line
from image_folders import write, zipped

from bigan.data import DataError
from bigan.data.format.codec import BadImageError
from bigan.data.packing.sources import open_source


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def test_zip_without_wrapping_folder_and_other_files(root: Path) -> None:
    write(root, "a/1.png", "b/1.png")
    plain = zipped(root, root.with_suffix(".zip"), method=zipfile.ZIP_STORED)
    with zipfile.ZipFile(plain, "a") as archive:
        for name in (
            "__MACOSX/a/._1.png",
            "__MACOSX/2.png",
            ".DS_Store",
            ".hidden/1.png",
            "README.txt",
        ):
            archive.writestr(name, b"x")
    source = open_source(plain, resolution=8)
    assert source.keys == ("a/1.png", "b/1.png")
    assert not source.bad
    wrapped = zipped(root, root.with_suffix(".zip"), "photos/")
    with zipfile.ZipFile(wrapped, "a") as archive:
        archive.writestr("README.txt", b"x")
    assert open_source(wrapped, resolution=8).classes == ("a", "b")


def test_unsafe_and_unreadable_members(root: Path, tmp_path: Path) -> None:
    write(root, "1.png", "2.png")
    data = (root / "1.png").read_bytes()
    file = tmp_path / "x.zip"
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("1.png", "../up.png", "/etc/abs.png", "a\\..\\..\\b.png", "c:/d.png"):
            archive.writestr(name, data)
        archive.writestr("bz.png", data, zipfile.ZIP_BZIP2)
        archive.writestr("huge.png", data)
        archive.writestr("long.png", data)
        archive.writestr("secret.png", data)
        archive.writestr("2.png", data)
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("1.png", data)
        infos = {info.filename: info for info in archive.infolist()}
        infos["huge.png"].file_size = 2**30 + 1
        infos["long.png"].compress_size = 2**20
        infos["secret.png"].flag_bits |= 1
    before = sorted(tmp_path.rglob("*"))
    source = open_source(file, resolution=8)
    assert source.keys == ("1.png", "2.png")
    assert dict(source.bad) == {
        "../up.png": "points outside of the archive",
        "/etc/abs.png": "points outside of the archive",
        "a\\..\\..\\b.png": "points outside of the archive",
        "c:/d.png": "points outside of the archive",
        "bz.png": "is compressed by method 12; use deflate",
        "huge.png": "is larger than 1073741824 bytes",
        "long.png": "is truncated",
        "secret.png": "is encrypted",
        "1.png": "appears twice",
    }
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damaged_members(root: Path, method: int) -> None:
    write(root, "1.png", "2.png")
    file = zipped(root, root.with_suffix(".zip"), method=method)
    with zipfile.ZipFile(file) as archive:
        first, second = archive.infolist()
    data = bytearray(file.read_bytes())
    data[first.header_offset + 60] ^= 1
    data[second.header_offset] ^= 1
    file.write_bytes(data)
    source = open_source(file, resolution=8)
    with pytest.raises(BadImageError, match="damaged in the zip"):
        source.read(0)
    with pytest.raises(BadImageError, match="damaged header"):
        source.read(1)


def test_member_that_inflates_beyond_its_size(root: Path) -> None:
    """At most one byte more than announced is inflated."""
    file = root / "x.zip"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.png", bytes(10_000_000))
        archive.infolist()[0].file_size = 100
    source = open_source(file, resolution=8)
    tracemalloc.start()
    with pytest.raises(BadImageError, match="damaged in the zip"):
        source.read(0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


def test_stamp_of_a_zip_depends_on_the_content(root: Path) -> None:
    """An unfinished pack is not continued with other content of the same size and time."""
    found = []
    for value in (0, 1):
        np.save(root / "1.npy", np.full((8, 8), value, np.uint8))
        archive = zipped(root, root.with_suffix(".zip"), method=zipfile.ZIP_STORED)
        os.utime(archive, ns=(1, 1))
        found.append(open_source(archive, resolution=8))
    assert found[0].stamp != found[1].stamp
    assert found[0].identity == found[1].identity == open_source(root, resolution=8).identity


def test_broken_zips(root: Path) -> None:
    write(root, "1.png")
    data = zipped(root, root.with_suffix(".zip")).read_bytes()
    for name, content in [("cut.zip", data[:-40]), ("empty.zip", b""), ("page.zip", b"<html>")]:
        (root / name).write_bytes(content)
        with pytest.raises(DataError) as error:
            open_source(root / name, resolution=8)
        one_line(error, name, "damaged zip")
    (root / "none.zip").write_bytes(b"PK\5\6" + bytes(18))
    with pytest.raises(DataError, match="contains no images"):
        open_source(root / "none.zip", resolution=8)
    bad = bytearray(data)
    at = data.rindex(b"PK\1\2")
    bad[at + 42 : at + 46] = struct.pack("<I", 2**31)  # the member lies beyond the end
    (root / "offset.zip").write_bytes(bad)
    with pytest.raises(BadImageError, match="damaged header"):
        open_source(root / "offset.zip", resolution=8).read(0)


def test_zip_is_read_by_threads_and_processes_concurrently(root: Path) -> None:
    write(root, *(f"{i}.png" for i in range(20)))
    source = open_source(zipped(root, root.with_suffix(".zip")), resolution=8)
    want = [source.read(i) for i in range(20)]
    barrier = threading.Barrier(8)

    def worker(number: int) -> bool:
        barrier.wait()
        order = np.random.default_rng(number).integers(0, 20, 100).tolist()
        return all(np.array_equal(source.read(i), want[i]) for i in order)

    child = os.fork()
    if child == 0:
        fine = all(np.array_equal(source.read(i % 20), want[i % 20]) for i in range(400))
        os._exit(0 if fine else 1)
    with ThreadPoolExecutor(8) as executor:
        assert all(executor.map(worker, range(8)))
    assert os.waitpid(child, 0)[1] == 0
