"""`bigan verify`: pyramids, and the statistics of --deep."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from verify_folders import (
    check_flips,
    edit,
    flip,
    found,
    has,
    picture,
    samples,
    sha256,
    write,
)

from bigan.data import DataError
from bigan.data.format.codec import encode
from bigan.data.format.manifest import Manifest
from bigan.data.format.tar import index_shard
from bigan.data.packing.pack import pack
from bigan.data.packing.verify import Report, verify


@pytest.fixture
def pyramid(tmp_path: Path) -> Path:
    folder = tmp_path / "pyramid"
    for resolution in (4, 8):
        write(folder / f"r{resolution:04d}", samples("npy", resolution), "npy", resolution)
    content = {
        "plan": "0" * 32,
        "name": "animals",
        "levels": ["r0004", "r0008"],
        "resolutions": [4, 8],
    }
    (folder / "pyramid.json").write_text(json.dumps(content))
    return folder


# --- pyramids -----------------------------------------------------------------------------------


def test_all_levels_of_a_pyramid_are_checked(pyramid: Path) -> None:
    report = verify(pyramid)
    assert report.ok, report.as_text()
    assert (report.num_shards, report.num_images) == (6, 32)
    flip(pyramid / "r0004" / "test-000000.tar", 20)
    (pyramid / "r0008" / "train-000000.tar").unlink()
    report = verify(pyramid)
    assert has(report, "r0004/test-000000.tar: damaged tar header")
    assert has(report, "r0008/train-000000.tar: shard is missing")
    assert not has(report, "differ from those")


def test_levels_with_other_labels_or_samples(pyramid: Path) -> None:
    import shutil

    shutil.rmtree(pyramid / "r0004")
    shards = samples("npy", 4)
    first, second, *others = shards["train-000000.tar"]
    swapped = [(*first[:2], second[2]), (*second[:2], first[2]), *others]  # the same counts
    shards["train-000000.tar"] = swapped
    shards["test-000000.tar"].pop()
    write(pyramid / "r0004", shards, "npy", 4)
    report = verify(pyramid)
    assert found(report) == [
        "r0004/train-000000.tar: samples or labels differ from those in r0008",
        "r0004/test-000000.tar: samples or labels differ from those in r0008",
    ]
    (pyramid / "r0004" / "train-000001.tar").unlink()
    edit(pyramid / "r0004", lambda m: m["shardlist"].pop(1))
    assert has(verify(pyramid), "r0004: lists other shards than r0008")


def test_a_missing_level_and_a_damaged_pyramid_json(pyramid: Path) -> None:
    (pyramid / "r0004" / "manifest.json").unlink()
    assert found(verify(pyramid)) == [
        "r0004: is not a data set (no manifest.json); run `bigan pack`"
    ]
    for text in (
        "{",
        '{"levels": ["../x"]}',
        '{"levels": [".."]}',
        '{"levels": []}',
        "[]",
        '{"levels": 3}',
    ):
        (pyramid / "pyramid.json").write_text(text)
        report = verify(pyramid)
        assert has(report, "pyramid.json: cannot be read")
        assert report.num_images == 16
    (pyramid / "r0008" / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"pyramid\.json: cannot be read"):
        verify(pyramid)


def test_an_unlisted_level(pyramid: Path) -> None:
    content = json.loads((pyramid / "pyramid.json").read_text())
    (pyramid / "rest").mkdir()  # not the name of a level
    for change in ({"levels": ["r0004"], "resolutions": [4]}, {"levels": ["r0004"]}):
        (pyramid / "pyramid.json").write_text(json.dumps(content | change))
        report = verify(pyramid)
        assert has(report, "r0008: is not listed in pyramid.json")
        assert not has(report, "rest")
    assert has(report, "pyramid.json: its 'resolutions' differs from the levels")
    (pyramid / "pyramid.json").write_text(json.dumps(content | {"levels": ["r0008", "r0004"]}))
    assert has(verify(pyramid), "pyramid.json: its 'resolutions' differs from the levels")
    change = {"levels": ["r0004", "r0008", "r0016"], "resolutions": [4, 8, 16]}
    (pyramid / "pyramid.json").write_text(json.dumps(content | change))
    assert found(verify(pyramid)) == ["r0016: no such data folder; create it with `bigan pack`"]


def test_every_flipped_byte_of_pyramid_json(pyramid: Path) -> None:
    check_flips(pyramid, [pyramid / "pyramid.json"], step=1)


def test_the_plan_beside_pyramid_json(packed: Path) -> None:
    folder = packed.parent / "pyramid"
    pack("digits", folder, resolution=8, shard_size=900, pyramid=4, encoding="npy")
    assert verify(folder).ok, verify(folder).as_text()
    flip(folder / "plan.json", 40)
    assert [problem.where for problem in verify(folder).problems] == ["plan.json"]


# --- a deep look --------------------------------------------------------------------------------


def notes(report: Report, kind: str) -> list[str]:
    return [note.what for note in report.notes if note.kind == kind]


def deep_folder(folder: Path) -> Path:
    shards = samples("png")
    train, more, test = shards.values()
    flat = encode(np.full((8, 8, 3), [7, 8, 9], np.uint8), "png")
    two = picture(99) * np.asarray([0, 1, 1], np.uint8)  # only red is constant
    train[1] = (train[1][0], train[4][1], 1)  # the same image twice, of one class
    more[0] = (more[0][0], train[2][1], 0)  # ... with two labels: 2 and 0
    test[0] = (test[0][0], train[3][1], 0)  # ... in two splits
    more[4] = (more[4][0], flat, 2)
    test[3] = (test[3][0], encode(two, "png"), 0)
    return write(folder, shards, "png")


def test_deep_reports_duplicates_leaks_and_constant_images(tmp_path: Path) -> None:
    report = verify(deep_folder(tmp_path / "animals"), deep=True)
    assert report.ok, report.as_text()
    first = "train-000000.tar: 00000000"
    assert notes(report, "leak") == [
        f"same pixels in train and test (leak): {first}3.png (train), "
        "test-000000.tar: 000000012.png (test)"
    ]
    assert notes(report, "conflict") == [
        f"same pixels with different labels: {first}2.png (train), "
        "train-000001.tar: 000000007.png (train)"
    ]
    assert notes(report, "duplicate") == [
        "6 images are exact duplicates of 3 distinct ones; 1 of these are in several splits",
        f"same pixels: {first}1.png (train), {first}4.png (train)",
    ]
    (constant,) = [note for note in report.notes if note.kind == "constant"]
    assert constant.samples == ("train-000001.tar: 000000011.png (train)",)
    assert notes(verify(tmp_path / "animals"), "leak") == []


def test_deep_uses_the_original_names_if_they_are_known(tmp_path: Path) -> None:
    folder = deep_folder(tmp_path / "animals")
    for shard in Manifest.read(folder).shardlist:
        data = (folder / shard.url).read_bytes()
        offsets = index_shard(data, "png", "")["offset"]
        keys = [f"{shard.split}/{shard.url[-5]}/{row}.jpg" for row in range(len(offsets))]
        record = {"sha256": shard.sha256, "offsets": offsets, "keys": keys}
        (folder / "index" / f"{shard.url[:-4]}.json").write_text(json.dumps(record))
    (leak,) = [note for note in verify(folder, deep=True).notes if note.kind == "leak"]
    assert leak.samples == ("train/0/3.jpg (train)", "test/0/0.jpg (test)")
    record = folder / "index" / "train-000000.json"
    for text in ('{"keys": 3}', json.dumps(json.loads(record.read_text()) | {"sha256": ""})):
        record.write_text(text)
        (leak,) = [note for note in verify(folder, deep=True).notes if note.kind == "leak"]
        assert leak.samples == ("train-000000.tar: 000000003.png (train)", "test/0/0.jpg (test)")


def test_deep_statistics_are_those_of_all_pixels(tmp_path: Path) -> None:
    folder = write(tmp_path / "animals", samples("npy"), "npy")
    pixels = np.stack([picture(n) for n in range(16)]).reshape(-1, 3)
    mean = " ".join(f"{x:.2f}" for x in pixels.mean(0))
    deviation = " ".join(f"{x:.2f}" for x in pixels.std(0))
    (line,) = notes(verify(folder, deep=True), "pixels")
    assert line.endswith(f"mean {mean}, standard deviation {deviation}")


def test_deep_class_balance_is_that_of_the_training_images(tmp_path: Path) -> None:
    made = [(f"{n:09d}", encode(picture(n), "npy"), 0 if n < 14 else 2) for n in range(18)]
    owls = [(f"{n:09d}", encode(picture(n), "npy"), 1) for n in range(20, 50)]
    shards = {"train-000000.tar": made, "test-000000.tar": owls}
    assert notes(verify(write(tmp_path / "a", shards, "npy"), deep=True), "classes") == [
        "classes in train: 4 (owl) to 14 (cat) images, imbalance 3.5",
        "classes without an image in train, 1: dog",
        "classes with fewer than 10 images in train, 1: owl",
    ]


def test_deep_contact_sheet_shows_each_class_in_its_row(tmp_path: Path) -> None:
    colours = np.asarray([[200, 0, 0], [0, 200, 0], [0, 0, 200]], np.uint8)
    made = [
        (f"{n:09d}", encode(np.broadcast_to(colours[n % 3], (8, 8, 3)), "png"), n % 3)
        for n in range(90)
    ]
    folder = write(tmp_path / "animals", {"train-000000.tar": made}, "png")
    report = verify(folder, deep=True)
    assert report.contact_sheet == str(folder / "contact_sheet.png")
    assert report.as_text().endswith(f"contact sheet: {folder / 'contact_sheet.png'}")
    first = sha256(Path(report.contact_sheet))
    with Image.open(report.contact_sheet) as opened:
        sheet = np.asarray(opened)
    down = sheet[:, -60]  # through the last column of images
    rows = [np.flatnonzero((down == colour).all(axis=1)) for colour in colours]
    assert [len(row) for row in rows] == [128, 128, 128]  # two lines of 12 for each of 3 classes
    assert rows[0].max() < rows[1].min() < rows[1].max() < rows[2].min()
    assert sha256(Path(verify(folder, deep=True).contact_sheet)) == first, "deterministic"
    assert verify(folder).ok, "the sheet is not an unlisted file"


def test_deep_of_a_damaged_set_and_of_a_pyramid(pyramid: Path) -> None:
    flip(pyramid / "r0008" / "train-000000.tar", 20)
    (pyramid / "r0008" / "train-000001.tar").unlink()
    report = verify(pyramid, deep=True)
    assert not report.ok
    assert report.contact_sheet == str(pyramid / "contact_sheet.png")
    assert Path(report.contact_sheet).is_file()
    assert len(notes(report, "pixels")) == 1, "of the largest level"
    for file in pyramid.rglob("*.tar"):
        file.unlink()
    report = verify(pyramid, deep=True)
    assert report.num_images == 0
    assert report.contact_sheet is None
