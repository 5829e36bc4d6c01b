"""`bigan verify`: every kind of damage is found and named, all at once, and nothing else is."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bigan.data import DataError
from bigan.data.format.codec import Encoding, encode
from bigan.data.format.manifest import COLUMNS, Manifest, Shard, index_name
from bigan.data.format.tar import Member, index_shard, shard_bytes, walk_tar
from bigan.data.packing.index_in_place import index_in_place
from bigan.data.packing.pack import pack
from bigan.data.packing.verify import Report, verify

CLASSES = ("cat", "dog", "owl")
Sample = tuple[str, bytes, int]  # key, image bytes, label


def picture(number: int, resolution: int = 8, channels: int = 3) -> np.ndarray:
    shape = (resolution, resolution, channels)
    return np.random.default_rng(number).integers(0, 256, shape, np.uint8)


def samples(encoder: Encoding, resolution: int = 8) -> dict[str, list[Sample]]:
    """Two training shards of 7 and 5 samples, one test shard of 4."""
    made = [
        (f"{n:09d}", encode(picture(n, resolution), encoder), n % len(CLASSES)) for n in range(16)
    ]
    return {
        "train-000000.tar": made[:7],
        "train-000001.tar": made[7:12],
        "test-000000.tar": made[12:],
    }


def write(
    folder: Path, shards: dict[str, list[Sample]], encoder: Encoding, resolution: int = 8
) -> Path:
    """A data folder that is consistent with itself, whatever its images are."""
    (folder / "index").mkdir(parents=True)
    entries, rows = [], {}
    for name, members in shards.items():
        data = shard_bytes(iter(members), encoder)
        (folder / name).write_bytes(data)
        split = name.rpartition("-")[0]
        histogram = np.bincount([label for _, _, label in members], minlength=len(CLASSES))
        entries.append(
            Shard(
                url=name,
                nsamples=len(members),
                filesize=len(data),
                sha256=hashlib.sha256(data).hexdigest(),
                split=split,
                class_histogram=tuple(histogram.tolist()),
            )
        )
        columns = rows.setdefault(split, {name: [] for name in COLUMNS})
        number = len(set(columns["shard"]))
        for offset, size, label in zip(*index_shard(data, encoder, name), strict=True):
            for column, value in zip(COLUMNS, (offset, size, label, number), strict=True):
                columns[column].append(value)
    hashes = {}
    for split, columns in rows.items():
        for column, dtype in COLUMNS.items():
            file = folder / index_name(split, column)
            np.save(file, np.asarray(columns[column], dtype), allow_pickle=False)
            hashes[index_name(split, column)] = sha256(file)
    manifest = Manifest(
        folder=folder,
        name="animals",
        resolution=resolution,
        channels=3,
        classes=CLASSES,
        encoder=encoder,
        transform="none",
        plan="0" * 32,
        fingerprint="",
        index=hashes,
        shardlist=tuple(entries),
    )
    seal(manifest)
    Manifest.load(folder)  # nothing but `verify` can tell what is wrong with the images
    return folder


def seal(manifest: Manifest) -> None:
    (manifest.folder / "manifest.json").write_text(manifest.sealed().dump())


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def found(report: Report) -> list[str]:
    return [f"{problem.where}: {problem.what}" for problem in report.problems]


def has(report: Report, *parts: str) -> bool:
    """Whether one problem says all of `parts`."""
    return any(all(part in line for part in parts) for line in found(report))


def flip(file: Path, position: int, bits: int = 1) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= bits
    file.write_bytes(data)


def member(file: Path, name: str) -> Member:
    return next(m for m in walk_tar(file.read_bytes(), "") if m.name == name)


@pytest.fixture
def pngs(tmp_path: Path) -> Path:
    return write(tmp_path / "animals", samples("png"), "png")


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
    assert steps[-1] == (1797, 1797)
    assert before == {file: sha256(file) for file in tmp_path.rglob("*") if file.is_file()}


def test_a_folder_that_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such data folder"):
        verify(tmp_path / "none")
    with pytest.raises(DataError, match="is not a data set"):
        verify(tmp_path)
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(DataError, match="is an incomplete pack"):
        verify(tmp_path)


# --- one flipped byte ---------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ["npy", "png", "jpg", "webp"])
def test_a_flipped_byte_in_any_place_of_a_shard(tmp_path: Path, encoder: Encoding) -> None:
    folder = write(tmp_path / "animals", samples(encoder), encoder)
    file = folder / "train-000001.tar"
    whole = file.read_bytes()
    for position in range(3, len(whole), 211):
        flip(file, position)
        report = verify(folder, jobs=1)
        assert has(report, "train-000001.tar: sha256 differs"), position
        assert all("train-000001.tar" in line for line in found(report))
        file.write_bytes(whole)


def test_a_flipped_byte_that_still_decodes_is_found_but_its_member_unknown(tmp_path: Path) -> None:
    folder = write(tmp_path / "animals", samples("npy"), "npy")
    file = folder / "test-000000.tar"
    flip(file, member(file, "000000013.npy").offset + 150)
    (line,) = found(verify(folder))
    assert line.startswith("test-000000.tar: sha256 differs from the one in manifest.json")
    assert "the changed one is unknown" in line


def test_a_flipped_byte_in_compressed_pixels_names_the_member(pngs: Path) -> None:
    file = pngs / "train-000000.tar"
    image = member(file, "000000002.png")
    flip(file, image.offset + image.size // 2)
    report = verify(pngs)
    assert len(report.problems) == 2
    assert has(report, "train-000000.tar: sha256 differs")
    assert has(report, "train-000000.tar: member 000000002.png: does not decode")
    assert report.num_images == 15


def test_a_flipped_byte_in_a_header_hides_nothing_behind_it(tmp_path: Path) -> None:
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
    ("digit", "says"),
    [
        (b"0", "has label 0, but 1 in the index"),
        (b"7", "holds label 7, but there are 3 classes"),
        (b"!", "holds b'!', which is not an integer"),
    ],
)
def test_a_flipped_byte_in_a_label(pngs: Path, digit: bytes, says: str) -> None:
    file = pngs / "train-000000.tar"
    label = member(file, "000000004.cls")
    data = bytearray(file.read_bytes())
    data[label.offset : label.offset + 1] = digit
    file.write_bytes(data)
    report = verify(pngs)
    assert has(report, "train-000000.tar: sha256 differs")
    name = "png" if digit == b"0" else "cls"
    assert has(report, f"train-000000.tar: member 000000004.{name}: {says}"), report.as_text()


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
    (pngs / ".train-000009.tar").write_bytes(b"")  # hidden: not ours
    report = verify(pngs)
    assert has(report, "train-000001.tar: shard is missing")
    assert has(report, "train-000007.tar: is not listed in manifest.json")
    assert len(report.problems) == 2
    assert report.num_images == 11


@pytest.mark.parametrize("encoder", ["npy", "png", "jpg", "webp"])
def test_an_undecodable_member_that_only_decoding_can_tell(
    tmp_path: Path, encoder: Encoding
) -> None:
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
        f"train-000001.tar: member 000000007.{encoder}",  # of another size
        f"test-000000.tar: member 000000013.{encoder}",
    ]
    assert report.num_images == 12


def reseal(folder: Path) -> None:
    """Make the manifest agree with the bytes of its shards and index files."""
    old = Manifest.read(folder)
    shards = []
    for shard in old.shardlist:
        file = folder / shard.url
        now = {"filesize": file.stat().st_size, "sha256": sha256(file)}
        shards.append(shard.model_copy(update=now))
    index = {name: sha256(folder / name) for name in old.index}
    seal(old.model_copy(update={"shardlist": tuple(shards), "index": index}))


def test_shards_whose_members_are_not_what_the_index_says(pngs: Path) -> None:
    shards = samples("png")
    shards["train-000000.tar"][2:3] = []  # a sample is gone
    shards["train-000001.tar"][3] = (*shards["train-000001.tar"][3][:2], 2)  # another label
    for name, members in shards.items():
        (pngs / name).write_bytes(shard_bytes(iter(members), "png"))
    reseal(pngs)
    report = verify(pngs)
    assert has(report, "train-000000.tar: holds 6 samples, but manifest.json lists 7")
    assert has(report, "train-000000.tar: has no image at byte")
    where = "train-000001.tar: member 000000010.png"
    assert has(report, f"{where}: has label 2, but 1 in the index")
    assert has(report, "train-000001.tar: holds 1 samples of class 1, but manifest.json lists 2")


def test_members_that_make_no_sample(pngs: Path) -> None:
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


# --- index and manifest -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "says"),
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
    pngs: Path, column: str, damage: Callable[[Path], object], says: str
) -> None:
    damage(pngs / "index" / f"train.{column}.npy")
    report = verify(pngs)
    assert has(report, f"index/train.{column}.npy: ", says), report.as_text()
    assert report.num_images == 16


@pytest.mark.parametrize(
    ("column", "says"),
    [
        ("label", "member 000000001.png: has label 1, but 2 in the index"),
        ("size", "member 000000001.png: has"),
        ("offset", "member 000000001.png: is not in the index"),
        ("shard", "index/train.shard.npy: assigns samples to other shards"),
    ],
)
def test_a_wrong_index_with_the_right_checksum(pngs: Path, column: str, says: str) -> None:
    file = pngs / "index" / f"train.{column}.npy"
    values = np.load(file)
    values[1] += 1
    np.save(file, values)
    reseal(pngs)
    assert has(verify(pngs), says), verify(pngs).as_text()


def test_an_index_in_another_order_than_the_shard(pngs: Path) -> None:
    for column in COLUMNS:
        file = pngs / "index" / f"train.{column}.npy"
        values = np.load(file)
        values[[0, 3]] = values[[3, 0]]
        np.save(file, values)
    reseal(pngs)
    assert found(verify(pngs)) == [
        "train-000000.tar: has offsets in the index that are not in order"
    ]


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    change(content)
    (folder / "manifest.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.update(classes=["a", "b", "c"]), "was edited"),
        (lambda m: m.update(classes=[]), "impossible"),
        (lambda m: m.update(fingerprint="f" * 32), "was edited"),
        (lambda m: m.update(resolution=10**9), "was edited"),
        (lambda m: m.update(colour=1), "colour"),
        (lambda m: m.update(schema_version=2), "schema_version 2"),
        (lambda m: m["shardlist"][0].update(nsamples=6), "impossible counts"),
        (lambda m: m["shardlist"][0].update(url="../train-000000.tar"), "not a plain"),
        (lambda m: m["shardlist"].clear(), "lists no shard"),
    ],
)
def test_an_edited_manifest(pngs: Path, change: Callable[[dict], object], says: str) -> None:
    edit(pngs, change)
    file = pngs / "test-000000.tar"
    file.write_bytes(file.read_bytes()[:-2000])
    report = verify(pngs, deep=True)
    assert has(report, "manifest.json: ", says), report.as_text()
    assert has(report, "test-000000.tar: "), "the search went on"
    assert not any(p.where.startswith("..") for p in report.problems), "but not out of the folder"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"a": "\ud800"}'])
def test_a_manifest_that_is_none(pngs: Path, text: str) -> None:
    (pngs / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    flip(pngs / "train-000001.tar", 10)
    report = verify(pngs, deep=True)
    assert has(report, "manifest.json: ")
    assert has(report, "train-000001.tar: damaged tar header at byte 0")
    assert len(report.problems) == 2


# --- every file of a packed set -----------------------------------------------------------------


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """What `bigan pack` itself writes, of 12 images; one more cannot be used."""
    for number in range(12):
        file = tmp_path / "photos" / CLASSES[number % 3] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(number)).save(file)
    (tmp_path / "photos" / "cat" / "bad.png").write_bytes(b"no image")
    folder = tmp_path / "packed"
    pack(tmp_path / "photos", folder, resolution=8, shard_size=8, test_fraction=0, max_bad=1)
    return folder


def check_flips(folder: Path, files: list[Path], step: int) -> None:
    """Each single flipped byte must be found, unless the JSON still means the same."""
    assert verify(folder).ok, verify(folder).as_text()
    for file in files:
        whole = file.read_bytes()
        for position in range(0, len(whole), step):
            flip(file, position)
            try:
                report = verify(folder, jobs=1)
            except DataError:
                report = None
            where = file.relative_to(folder).as_posix()
            assert report is None or not report.ok, f"byte {position} of {where}"
            file.write_bytes(whole)


@pytest.mark.parametrize(
    ("name", "step"),
    [("plan.json", 17), ("manifest.json", 17), ("index/*.json", 23), ("index/*.npy", 13)],
)
def test_a_flipped_byte_in_any_file_beside_the_shards(packed: Path, name: str, step: int) -> None:
    files = sorted(packed.glob(name))
    assert files
    check_flips(packed, files, step)


def test_the_files_that_hold_no_image_are_all_listed(packed: Path) -> None:
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


def test_records_are_not_looked_up_outside_the_folder(packed: Path) -> None:
    edit(packed, lambda m: m["records"].update({"../photos/cat/bad.png": "0"}))
    report = verify(packed)
    assert has(report, "manifest.json: was edited or is damaged (checksum)")
    assert has(
        report, "manifest.json: lists '../photos/cat/bad.png', which points outside of the folder"
    )
    assert len(report.problems) == 2


def test_an_edited_name_is_found_and_the_search_goes_on(packed: Path) -> None:
    edit(packed, lambda m: m.update(name="x" + m["name"]))
    flip(packed / "train-000001.tar", 20)
    report = verify(packed)
    assert has(report, "manifest.json: was edited or is damaged (checksum)")
    assert has(report, "train-000001.tar: damaged tar header")


def test_the_advice_repairs_what_can_be_damaged(packed: Path) -> None:
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


# --- shards of somebody else ---------------------------------------------------------------------


def foreign(folder: Path, kind: str) -> Path:
    """Two tars of six images each, indexed where they are, in the manner that `kind` says."""
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
def test_shards_that_bigan_only_indexed(tmp_path: Path, kind: str) -> None:
    folder = foreign(tmp_path / "found", kind)
    (folder / "index" / "mine.txt").write_text("the folder is the user's")
    report = verify(folder, deep=True)
    assert report.ok, report.as_text()
    assert (report.num_shards, report.num_images) == (2, 12)
    assert report.contact_sheet is not None
    whole = (folder / "manifest.json").read_text()
    for mark in ("plan", "transform"):  # a damaged manifest does not hide what the shards are
        edit(folder, lambda m, mark=mark: m.update({mark: "x"}))
        assert {problem.where for problem in verify(folder).problems} == {"manifest.json"}
        (folder / "manifest.json").write_text(whole)


def test_damage_to_shards_that_bigan_only_indexed(tmp_path: Path) -> None:
    folder = foreign(tmp_path / "found", "jpeg+cls")
    file = folder / "part-0.tar"
    damaged = member(file, "0002.jpeg")
    flip(file, damaged.offset + 1)  # no JPEG any more
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
    assert verify(folder).as_text().splitlines()[-1] == advice, "they are originals in any case"


def test_a_lost_label_of_shards_that_bigan_only_indexed(tmp_path: Path) -> None:
    folder = foreign(tmp_path / "found", "jpg+json")
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


def test_very_many_problems_are_counted_and_stay_on_one_line_each(tmp_path: Path) -> None:
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


def test_old_temporaries_are_noted(pngs: Path) -> None:
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


# --- pyramids -----------------------------------------------------------------------------------


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
    swapped = [(*first[:2], second[2]), (*second[:2], first[2]), *others]  # the same histogram
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


def test_a_missing_level_and_a_damaged_list(pyramid: Path) -> None:
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


def test_a_level_that_was_dropped_from_the_list(pyramid: Path) -> None:
    content = json.loads((pyramid / "pyramid.json").read_text())
    (pyramid / "rest").mkdir()  # not a level by its name
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
    two = picture(99) * np.asarray([0, 1, 1], np.uint8)  # its red is constant, the rest is not
    train[1] = (train[1][0], train[4][1], 1)  # the same image twice, of one class
    more[0] = (more[0][0], train[2][1], 0)  # ... with two labels: 2 and 0
    test[0] = (test[0][0], train[3][1], 0)  # ... in two splits
    more[4] = (more[4][0], flat, 2)
    test[3] = (test[3][0], encode(two, "png"), 0)
    return write(folder, shards, "png")


def test_deep_names_duplicates_leaks_and_constant_images(tmp_path: Path) -> None:
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
        offsets, _, _ = index_shard(data, "png", "")
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
    assert report.contact_sheet == folder / "contact_sheet.png"
    assert report.as_text().endswith(f"contact sheet: {folder / 'contact_sheet.png'}")
    first = sha256(report.contact_sheet)
    with Image.open(report.contact_sheet) as opened:
        sheet = np.asarray(opened)
    down = sheet[:, -60]  # through the last column of images
    rows = [np.flatnonzero((down == colour).all(axis=1)) for colour in colours]
    assert [len(row) for row in rows] == [128, 128, 128]  # two lines of 12 for each of 3 classes
    assert rows[0].max() < rows[1].min() < rows[1].max() < rows[2].min()
    assert sha256(verify(folder, deep=True).contact_sheet) == first, "the same every time"
    assert verify(folder).ok, "the sheet is no stranger to the folder"


def test_deep_of_a_damaged_set_and_of_a_pyramid(pyramid: Path) -> None:
    flip(pyramid / "r0008" / "train-000000.tar", 20)
    (pyramid / "r0008" / "train-000001.tar").unlink()
    report = verify(pyramid, deep=True)
    assert not report.ok
    assert report.contact_sheet == pyramid / "contact_sheet.png"
    assert report.contact_sheet.is_file()
    assert len(notes(report, "pixels")) == 1, "of the largest level"
    for file in pyramid.rglob("*.tar"):
        file.unlink()
    report = verify(pyramid, deep=True)
    assert report.num_images == 0
    assert report.contact_sheet is None
