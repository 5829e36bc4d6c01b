"""`bigan verify`: damaged shards, and the report."""

from __future__ import annotations

import io
import json
import os
import tarfile
import time
from pathlib import Path

import pytest
from verify_folders import (
    edit,
    flip,
    found,
    has,
    member,
    picture,
    reseal,
    samples,
    sha256,
    write,
)

from bigan.data import DataError
from bigan.data.format.codec import Encoding, encode
from bigan.data.format.tar import shard_bytes
from bigan.data.packing.pack import pack
from bigan.data.packing.verify import verify

# --- nothing wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ["npy", "png", "jpg", "webp"])
def test_a_clean_folder_is_ok(tmp_path: Path, encoder: Encoding) -> None:
    report = verify(write(tmp_path / "animals", samples(encoder), encoder))
    assert report.ok, report.as_text()
    assert (report.num_shards, report.num_images) == (3, 16)
    assert report.as_text() == f"{tmp_path / 'animals'}: ok (3 shards, 16 images decoded)"


def test_packed_digits_are_ok_and_progress_reaches_the_end(tmp_path: Path) -> None:
    pack("digits", tmp_path / "digits", resolution=8, shard_size=500)
    before = {file: sha256(file) for file in tmp_path.rglob("*") if file.is_file()}
    steps: list[tuple[int, int]] = []
    report = verify(tmp_path / "digits", jobs=2, progress=lambda *step: steps.append(step))
    assert report.ok, report.as_text()
    assert report.num_images == 1797
    assert steps == sorted(steps)
    total = sum(file.stat().st_size for file in before if file.suffix == ".tar")
    assert steps[-1] == (total, total)
    assert before == {file: sha256(file) for file in tmp_path.rglob("*") if file.is_file()}


def test_a_folder_that_is_not_a_data_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such data folder"):
        verify(tmp_path / "none")
    with pytest.raises(DataError, match="is not a data set"):
        verify(tmp_path)
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(DataError, match="is an incomplete pack"):
        verify(tmp_path)


# --- one flipped byte ---------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ["npy", "png", "jpg", "webp"])
def test_a_flipped_byte_anywhere_in_a_shard(tmp_path: Path, encoder: Encoding) -> None:
    folder = write(tmp_path / "animals", samples(encoder), encoder)
    file = folder / "train-000001.tar"
    full = file.read_bytes()
    for position in range(3, len(full), 211):
        flip(file, position)
        report = verify(folder, jobs=1)
        assert has(report, "train-000001.tar: sha256 differs"), position
        assert all("train-000001.tar" in line for line in found(report))
        file.write_bytes(full)


def test_a_flipped_byte_that_decodes_is_found(tmp_path: Path) -> None:
    folder = write(tmp_path / "animals", samples("npy"), "npy")
    file = folder / "test-000000.tar"
    image = member(file, "000000013.npy")
    flip(file, image.offset + 150)
    changed, where = found(verify(folder))
    assert changed.startswith("test-000000.tar: sha256 differs from the one in manifest.json")
    assert where == "test-000000.tar: member 000000013.npy: its crc32 differs from the index"
    flip(file, image.offset + 150)
    flip(file, image.offset + image.size)  # the padding behind it
    (changed,) = found(verify(folder))
    assert "the changed one is unknown" in changed


def test_a_flipped_byte_in_compressed_pixels_names_the_member(pngs: Path) -> None:
    file = pngs / "train-000000.tar"
    image = member(file, "000000002.png")
    flip(file, image.offset + image.size // 2)
    report = verify(pngs)
    assert len(report.problems) == 2
    assert has(report, "train-000000.tar: sha256 differs")
    assert has(report, "train-000000.tar: member 000000002.png: does not decode")
    assert report.num_images == 15


def test_images_behind_a_damaged_header_are_checked(tmp_path: Path) -> None:
    shards = samples("png")
    key, data, label = shards["train-000000.tar"][5]
    shards["train-000000.tar"][5] = (key, data[:-20], label)
    folder = write(tmp_path / "animals", shards, "png")
    file = folder / "train-000000.tar"
    image = member(file, "000000003.png")
    later = member(file, "000000005.png")
    flip(file, image.offset - 512 + 130)  # its size
    report = verify(folder)
    place = f"damaged tar header at byte {image.offset - 512}, after member 000000003.cls"
    assert has(report, "train-000000.tar: sha256 differs")
    assert has(report, f"train-000000.tar: {place}")
    assert has(report, f"train-000000.tar: member at byte {later.offset}: is a truncated PNG")
    assert len(report.problems) == 3, report.as_text()
    assert report.num_images == 15


@pytest.mark.parametrize(
    ("digit", "expected"),
    [
        (b"0", "has label 0, but 1 in the index"),
        (b"7", "holds label 7, but there are 3 classes"),
        (b"!", "holds b'!', which is not an integer"),
    ],
)
def test_a_flipped_byte_in_a_label(pngs: Path, digit: bytes, expected: str) -> None:
    file = pngs / "train-000000.tar"
    label = member(file, "000000004.cls")
    data = bytearray(file.read_bytes())
    data[label.offset : label.offset + 1] = digit
    file.write_bytes(data)
    report = verify(pngs)
    assert has(report, "train-000000.tar: sha256 differs")
    name = "png" if digit == b"0" else "cls"
    assert has(report, f"train-000000.tar: member 000000004.{name}: {expected}"), report.as_text()


# --- shards -------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 100, 512, 5000])
def test_a_truncated_shard(pngs: Path, keep: int) -> None:
    file = pngs / "train-000000.tar"
    data = file.read_bytes()
    file.write_bytes(data[:keep])
    report = verify(pngs)
    assert has(report, f"train-000000.tar: has {keep} bytes, expected {len(data)}")
    assert has(report, "train-000000.tar: ", "truncated")
    lost = 16 - report.num_images
    assert has(report, f"train-000000.tar: {lost} of its 7 images are truncated")
    assert len(report.problems) == 3


def test_a_shard_that_lost_its_padding_or_grew(pngs: Path) -> None:
    file = pngs / "train-000000.tar"
    data = file.read_bytes()
    for changed in (data[:-1], data + b"\0" * 512):
        file.write_bytes(changed)
        size = f"has {len(changed)} bytes, expected {len(data)}"
        assert found(verify(pngs)) == [f"train-000000.tar: {size}"]


def test_missing_and_extra_shards(pngs: Path) -> None:
    (pngs / "train-000001.tar").rename(pngs / "train-000007.tar")
    (pngs / ".train-000009.tar").write_bytes(b"")  # hidden: ignored
    report = verify(pngs)
    assert has(report, "train-000001.tar: shard is missing")
    assert has(report, "train-000007.tar: is not listed in manifest.json")
    assert len(report.problems) == 2
    assert report.num_images == 11


@pytest.mark.parametrize("encoder", ["npy", "png", "jpg", "webp"])
def test_undecodable_members(tmp_path: Path, encoder: Encoding) -> None:
    shards = samples(encoder)
    for name, row in (("train-000000.tar", 3), ("train-000000.tar", 6), ("test-000000.tar", 1)):
        key, data, label = shards[name][row]
        shards[name][row] = (key, data[:-30], label)
    key, _, label = shards["train-000001.tar"][0]
    shards["train-000001.tar"][0] = (key, encode(picture(1, 16), encoder), label)
    report = verify(write(tmp_path / "animals", shards, encoder))
    assert [problem.where for problem in report.problems] == [
        f"train-000000.tar: member 000000003.{encoder}",
        f"train-000000.tar: member 000000006.{encoder}",
        f"train-000001.tar: member 000000007.{encoder}",  # has another size
        f"test-000000.tar: member 000000013.{encoder}",
    ]
    assert report.num_images == 12


def test_shards_that_differ_from_the_index(pngs: Path) -> None:
    shards = samples("png")
    shards["train-000000.tar"][2:3] = []  # a missing sample
    shards["train-000001.tar"][3] = (*shards["train-000001.tar"][3][:2], 2)  # another label
    for name, members in shards.items():
        (pngs / name).write_bytes(shard_bytes(iter(members), "png"))
    reseal(pngs)
    report = verify(pngs)
    assert has(report, "train-000000.tar: holds 6 samples, but manifest.json lists 7")
    assert has(report, "train-000000.tar: has no image at byte")
    where = "train-000001.tar: member 000000010.png"
    assert has(report, f"{where}: has label 2, but 1 in the index")


def test_members_that_are_not_samples(pngs: Path) -> None:
    image = encode(picture(0), "png")
    with tarfile.open(pngs / "test-000000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in (
            ("000000012.cls", b"0"),
            ("000000012.png", image),
            ("000000012.png", image),
            ("000000013.cls", b"1"),
            ("000000014.png", image),
            ("readme.txt", b"hello"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    reseal(pngs)
    report = verify(pngs)
    assert has(report, "test-000000.tar: member 000000012.png: appears twice")
    assert has(report, "test-000000.tar: sample 000000013 lacks its image")
    assert has(report, "test-000000.tar: sample 000000014 lacks its label")
    assert has(report, "test-000000.tar: member readme.txt: is neither an image nor a label")


# --- the report ---------------------------------------------------------------------------------


def test_several_problems_are_all_listed(tmp_path: Path) -> None:
    shards = samples("jpg")
    key, data, label = shards["train-000000.tar"][3]
    shards["train-000000.tar"][3] = (key, data[:-30], label)
    folder = write(tmp_path / "animals", shards, "jpg")
    (folder / "train-000001.tar").unlink()
    (folder / "index" / "test.size.npy").unlink()
    (folder / "other.tar").write_bytes(b"")
    flip(folder / "test-000000.tar", 20)
    edit(folder, lambda m: m.update(fingerprint="f" * 32))
    report = verify(folder)
    wheres = [problem.where for problem in report.problems]
    assert wheres == [
        "manifest.json",
        "other.tar",
        "index/test.size.npy",
        "train-000000.tar: member 000000003.jpg",
        "train-000001.tar",
        "test-000000.tar",
        "test-000000.tar",
    ], report.as_text()
    assert not report.ok
    lines = report.as_text().splitlines()
    assert lines[0] == f"{folder}: 7 problems (3 shards, 6 images decoded)"
    assert all(f"  {line}" in lines for line in found(report))
    assert lines[-1].startswith("delete the damaged files")
    assert json.loads(json.dumps(report.as_dict()))["problems"][1] == {
        "where": "other.tar",
        "what": "is not listed in manifest.json: remove it from the folder",
    }


def test_long_reports_are_shortened_to_one_line_per_problem(tmp_path: Path) -> None:
    bad = [(f"{n:09d}", b"no image", 0) for n in range(150)]
    folder = write(tmp_path / "a", {"train-000000.tar": bad, "test-000000.tar": bad[:9]}, "png")
    (folder / "line\nbreak\x1b[2J.tar").write_bytes(b"")
    report = verify(folder)
    assert has(report, "train-000000.tar: has 50 more problems")
    assert len(report.problems) == 1 + 100 + 1 + 9
    lines = report.as_text().split("\n")
    assert len(lines) == 1 + 100 + 1 + 1
    assert lines[1].startswith("  line\\nbreak\\x1b[2J.tar: is not listed")
    assert "... and 11 more" in lines[-2]


def test_old_temporary_files_are_noted(pngs: Path) -> None:
    for name in (".train-000003.tar.7.tmp", "index/.test.size.npy.7.tmp", ".fresh.tar.7.tmp"):
        (pngs / name).write_bytes(b"")
        if "fresh" not in name:
            os.utime(pngs / name, (time.time() - 4000,) * 2)
    report = verify(pngs)
    assert report.ok
    assert [note.what.partition(":")[0] for note in report.notes] == [
        ".train-000003.tar.7.tmp",
        "index/.test.size.npy.7.tmp",
    ]
