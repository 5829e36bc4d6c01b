"""`bigan verify`: damaged indexes, manifests and records; shards indexed in place."""

from __future__ import annotations

import io
import json
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from verify_folders import (
    CLASSES,
    check_flips,
    edit,
    flip,
    found,
    has,
    member,
    picture,
    reseal,
    sha256,
    write,
)

from bigan.data.format.codec import encode
from bigan.data.format.manifest import COLUMNS, Manifest
from bigan.data.packing.index_in_place import index_in_place
from bigan.data.packing.pack import pack
from bigan.data.packing.verify import verify

# --- index and manifest -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda f: f.unlink(), "index file is missing"),
        (lambda f: f.write_bytes(f.read_bytes()[:-4]), "cannot be read"),
        (lambda f: f.write_bytes(b"no array"), "cannot be read"),
        (lambda f: flip(f, 130), "sha256 differs"),
        (lambda f: np.save(f, np.zeros(3, np.int32)), "holds int32 [3], expected"),
    ],
)
@pytest.mark.parametrize("column", COLUMNS)
def test_damaged_index_files(
    pngs: Path, column: str, damage: Callable[[Path], object], expected: str
) -> None:
    damage(pngs / "index" / f"train.{column}.npy")
    report = verify(pngs)
    assert has(report, f"index/train.{column}.npy: ", expected), report.as_text()
    assert report.num_images == 16


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ("label", "member 000000001.png: has label 1, but 2 in the index"),
        ("size", "member 000000001.png: has"),
        ("offset", "member 000000001.png: is not in the index"),
        ("label", "index/train.label.npy: holds other numbers of samples of each class"),
        ("crc32", "member 000000001.png: its crc32 differs from the index"),
    ],
)
def test_a_wrong_index_with_the_right_checksum(pngs: Path, column: str, expected: str) -> None:
    file = pngs / "index" / f"train.{column}.npy"
    values = np.load(file)
    values[1] += 1
    np.save(file, values)
    reseal(pngs)
    assert has(verify(pngs), expected), verify(pngs).as_text()


@pytest.mark.parametrize("label", [-1, -(2**31), len(CLASSES), 2**31 - 1])
def test_labels_of_no_class(pngs: Path, label: int) -> None:
    file = pngs / "index" / "train.label.npy"
    values = np.load(file)
    values[1] = label
    np.save(file, values)
    reseal(pngs)
    report = verify(pngs)
    assert has(report, "index/train.label.npy: holds other numbers of samples of each class")
    assert has(report, "member 000000001.png: has label 1, but", "in the index")


def test_an_index_in_another_order(pngs: Path) -> None:
    for column in COLUMNS:
        file = pngs / "index" / f"train.{column}.npy"
        values = np.load(file)
        values[[0, 3]] = values[[3, 0]]
        np.save(file, values)
    reseal(pngs)
    assert found(verify(pngs)) == [
        "train-000000.tar: has offsets in the index that are not in order"
    ]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: m.update(classes=["a", "b", "c"]), "was edited"),
        (lambda m: m.update(classes=[]), "impossible"),
        (lambda m: m.update(fingerprint="f" * 32), "was edited"),
        (lambda m: m.update(resolution=10**9), "was edited"),
        (lambda m: m.update(colour=1), "colour"),
        (lambda m: m.update(schema_version=1), "schema_version 1"),
        (lambda m: m["shardlist"][0].update(nsamples=6), "impossible counts"),
        (lambda m: m["shardlist"][0].update(url="../train-000000.tar"), "not a plain"),
        (lambda m: m["shardlist"].clear(), "lists no shard"),
    ],
)
def test_an_edited_manifest(pngs: Path, change: Callable[[dict], object], expected: str) -> None:
    edit(pngs, change)
    file = pngs / "test-000000.tar"
    file.write_bytes(file.read_bytes()[:-2000])
    report = verify(pngs, deep=True)
    assert has(report, "manifest.json: ", expected), report.as_text()
    assert has(report, "test-000000.tar: "), "other problems are reported"
    assert not any(p.where.startswith("..") for p in report.problems), (
        "paths outside are not followed"
    )


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"a": "\ud800"}'])
def test_invalid_manifests(pngs: Path, text: str) -> None:
    (pngs / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    flip(pngs / "train-000001.tar", 10)
    report = verify(pngs, deep=True)
    assert has(report, "manifest.json: ")
    assert has(report, "train-000001.tar: damaged tar header at byte 0")
    assert len(report.problems) == 2


# --- every file of a packed set -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "step"),
    [("plan.json", 17), ("manifest.json", 17), ("index/*.json", 23), ("index/*.npy", 13)],
)
def test_a_flipped_byte_in_any_other_file(packed: Path, name: str, step: int) -> None:
    files = sorted(packed.glob(name))
    assert files
    check_flips(packed, files, step)


def test_all_other_files_are_listed(packed: Path) -> None:
    listed = Manifest.read(packed)
    assert listed.index.keys() | listed.records.keys() == {
        file.relative_to(packed).as_posix()
        for file in [packed / "plan.json", *packed.glob("index/*")]
    }


def test_missing_and_extra_files_of_the_index(packed: Path) -> None:
    (packed / "plan.json").unlink()
    (packed / "index" / "train-000000.json").rename(packed / "index" / "train-000007.json")
    (packed / "index" / "val.size.npy").write_bytes(b"")
    (packed / "index" / ".train-000000.json.7.tmp").write_bytes(b"")
    (packed / "index" / "train-000001.json").unlink()
    (packed / "index" / "train-000001.json").mkdir()
    assert sorted(found(verify(packed))) == [
        "index/train-000000.json: is missing",
        "index/train-000001.json: cannot be read: Is a directory",
        "index/train-000007.json: is not listed in manifest.json: remove it",
        "index/val.size.npy: is not listed in manifest.json: remove it",
        "plan.json: is missing",
    ]


def test_records_outside_the_folder_are_not_read(packed: Path) -> None:
    edit(packed, lambda m: m["records"].update({"../photos/cat/bad.png": "0"}))
    report = verify(packed)
    assert has(report, "manifest.json: was edited or is damaged (checksum)")
    assert has(
        report, "manifest.json: lists '../photos/cat/bad.png', which points outside of the folder"
    )
    assert len(report.problems) == 2


def test_an_edited_name_is_found_with_other_problems(packed: Path) -> None:
    edit(packed, lambda m: m.update(name="x" + m["name"]))
    flip(packed / "train-000001.tar", 20)
    report = verify(packed)
    assert has(report, "manifest.json: was edited or is damaged (checksum)")
    assert has(report, "train-000001.tar: damaged tar header")


def test_the_advice_repairs_damage(packed: Path) -> None:
    before = {file: sha256(file) for file in packed.rglob("*") if file.is_file()}
    for file in (packed / "index" / "train-000000.json", packed / "train-000001.tar"):
        flip(file, 50)
        assert "delete the damaged files and manifest.json" in verify(packed).as_text()
        file.unlink()
        (packed / "manifest.json").unlink()
        options = {"resolution": 8, "shard_size": 8, "test_fraction": 0, "max_bad": 1}
        pack(packed.parent / "photos", packed, **options)
        assert verify(packed).ok
    assert before == {file: sha256(file) for file in packed.rglob("*") if file.is_file()}


# --- shards indexed in place ---------------------------------------------------------------------


def write_tars(folder: Path, kind: str) -> Path:
    """Two tars of six images each, indexed in place, with members by `kind`."""
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"part-{shard}.tar", "w") as tar:
            for number in range(6):
                image = encode(picture(6 * shard + number), "jpg")
                key, label = f"{number:04d}", number % 3
                members = {
                    "jpeg+cls": {"jpeg": image, "cls": b"%d" % label},
                    "jpg+json": {"jpg": image, "json": json.dumps({"label": label}).encode()},
                    "unlabelled": {"jpg": image, "txt": b"a cat"},
                    "dotted folder": {"jpg": image, "cls": b"%d" % label},
                }[kind]
                for suffix, data in members.items():
                    start = "v1.0/" if kind == "dotted folder" else ""
                    info = tarfile.TarInfo(f"{start}{key}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    index_in_place(folder)
    return folder


@pytest.mark.parametrize("kind", ["jpeg+cls", "jpg+json", "unlabelled", "dotted folder"])
def test_shards_indexed_in_place(tmp_path: Path, kind: str) -> None:
    folder = write_tars(tmp_path / "found", kind)
    (folder / "index" / "mine.txt").write_text("the folder is the user's")
    report = verify(folder, deep=True)
    assert report.ok, report.as_text()
    assert (report.num_shards, report.num_images) == (2, 12)
    assert report.contact_sheet is not None
    full = (folder / "manifest.json").read_text()
    for mark in ("plan", "transform"):  # one mark is enough, for a damaged manifest
        edit(folder, lambda m, mark=mark: m.update({mark: "x"}))
        assert {problem.where for problem in verify(folder).problems} == {"manifest.json"}
        (folder / "manifest.json").write_text(full)


def test_damaged_shards_indexed_in_place(tmp_path: Path) -> None:
    folder = write_tars(tmp_path / "found", "jpeg+cls")
    file = folder / "part-0.tar"
    damaged = member(file, "0002.jpeg")
    flip(file, damaged.offset + 1)  # not a JPEG
    later = member(file, "0004.jpeg")
    flip(file, later.offset - 512)  # its header
    flip(folder / "part-1.tar", member(folder / "part-1.tar", "0001.cls").offset, 2)  # 1 to 3
    (folder / "new.tar").write_bytes(b"")
    report = verify(folder)
    assert has(report, "new.tar: is not listed in manifest.json: delete manifest.json and index/")
    assert has(report, "part-0.tar: sha256 differs")
    assert has(report, "part-0.tar: member 0002.jpeg: does not decode")
    assert has(report, f"part-0.tar: damaged tar header at byte {later.offset - 512}")
    assert has(report, "part-1.tar: sha256 differs")
    assert has(report, "part-1.tar: member 0001.jpeg: has label 3, but there are 3 classes")
    assert len(report.problems) == 6, report.as_text()
    assert report.num_images == 11
    advice = report.as_text().splitlines()[-1]
    assert advice.startswith("copy the damaged shards again, then delete manifest.json and index/")
    (folder / "manifest.json").write_text("{")
    assert verify(folder).as_text().splitlines()[-1] == advice, (
        "the advice does not depend on the manifest"
    )


def test_a_lost_label_of_shards_indexed_in_place(tmp_path: Path) -> None:
    folder = write_tars(tmp_path / "found", "jpg+json")
    file = folder / "part-0.tar"
    file.write_bytes(file.read_bytes().replace(b'"label"', b'"lable"', 1))
    report = verify(folder)
    assert has(report, "part-0.tar: member 0000.jpg: has no label")
    assert len(report.problems) == 2


def test_memory_does_not_grow_with_the_size_of_a_shard(tmp_path: Path) -> None:
    noise = [(f"{n:09d}", encode(picture(n, 512), "npy"), 0) for n in range(32)]
    folder = write(tmp_path / "a", {"train-000000.tar": noise}, "npy", 512)  # 24 MiB
    tracemalloc.start()
    try:
        assert verify(folder, jobs=1).ok
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()
