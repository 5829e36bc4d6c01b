"""Folders and zips of images: classes, official splits, label files."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from data_helpers import one_line
from image_folders import both, classes_of, num_skipped, write, zipped
from PIL import Image

from bigan.data import DataError
from bigan.data.format.codec import BadImageError
from bigan.data.packing.sources import open_source


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def test_class_folders(root: Path) -> None:
    write(root, "dog/2.png", "cat/b/1.jpg", "cat/a.b.png", "dog/10.webp")
    write(root, ".cache/x.png", "cat/.hidden.png", "__MACOSX/x.png")
    (root / "__MACOSX" / "x.png").unlink()
    (root / "__MACOSX").rmdir()
    (root / "dog" / "notes.txt").write_text("passed over")
    np.save(root / "dog" / "3.npy", np.zeros((8, 8), np.uint8))
    for source in both(root):
        assert source.classes == ("cat", "dog")
        assert source.keys == (
            "cat/a.b.png",
            "cat/b/1.jpg",
            "dog/10.webp",
            "dog/2.png",
            "dog/3.npy",
        )
        assert source.labels == (0, 0, 1, 1, 1)
        assert source.name == "data"


def test_flat_folder_is_one_class(root: Path) -> None:
    write(root, *(f"{i}.png" for i in range(40)))
    for source in both(root):
        assert source.classes == ("all",)
        assert 0 < source.splits.count("test") < 15
    quarter = open_source(root, resolution=4, test_fraction=0.25)
    assert quarter.splits.count("test") > source.splits.count("test")


def test_split_folders_are_official(root: Path) -> None:
    names = [f"{s}/{c}/{i}.png" for s in ("train", "valid", "test") for c in "ab" for i in "12"]
    write(root, *names)
    for source in both(root):
        assert source.classes == ("a", "b")
        assert dict(zip(source.keys, source.splits, strict=True)) == {
            name: {"valid": "val"}.get(name.split("/")[0], name.split("/")[0]) for name in names
        }
        assert classes_of(source) == {name: name.split("/")[1] for name in names}


def test_split_folders_without_classes(root: Path) -> None:
    write(root, "Train/1.png", "Train/2.png", "Test/1.png")
    for source in both(root):
        assert source.classes == ("all",)
        assert source.splits == ("test", "train", "train")


def test_train_beside_another_folder_is_a_class(root: Path) -> None:
    write(root, "train/1.png", "bus/1.png")
    assert open_source(root, resolution=8).classes == ("bus", "train")


@pytest.mark.parametrize(
    ("names", "folders", "part"),
    [
        ((), (), "contains no images"),
        (("a/1.png",), ("b",), "b: contains no images"),
        (("1.png",), ("a",), "and folders (a)"),
        (("train/a/1.png", "test/1.png"), (), "test: has no class folders"),
        (("train/a/1.png", "test/b/1.png"), (), "class 'b' has no images in train"),
        (("train/a/1.png", "train/2.png", "test/a/1.png"), (), "and folders"),
        (("train/a/1.png",), ("test",), "test: contains no images"),
    ],
)
def test_ambiguous_layouts(
    root: Path, names: tuple[str, ...], folders: tuple[str, ...], part: str
) -> None:
    write(root, *names)
    for folder in folders:
        (root / folder).mkdir(parents=True)
    for spec in (root, zipped(root, root.with_suffix(".zip"))):
        with pytest.raises(DataError) as error:
            open_source(spec, resolution=8)
        one_line(error, part)


def test_unprintable_class_names(root: Path) -> None:
    write(root, "a\nb/1.png", "c/1.png")
    with pytest.raises(DataError) as error:
        open_source(root, resolution=8)
    one_line(error, "a\\nb", "rename")
    os.rename(root / "a\nb", os.fsencode(root) + b"/\xff")  # noqa: PTH104
    with pytest.raises(DataError, match="unprintable name"):
        open_source(root, resolution=8)


def test_links(root: Path, tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", "1.png")
    write(root, "a/1.png")
    (root / "b").symlink_to(tmp_path / "elsewhere")
    (root / "a" / "up").symlink_to(root)  # a cycle
    (root / "a" / "self.png").symlink_to("self.png")
    (root / "a" / "gone.png").symlink_to("nowhere")
    os.mkfifo(root / "a" / "pipe.png")
    source = open_source(root, resolution=8)
    assert {"a/1.png", "b/1.png"} <= set(source.keys)
    assert source.classes == ("a", "b")
    assert [name for name, _ in source.bad] == ["a/gone.png", "a/self.png"]
    assert "No such file" in source.bad[0][1]
    assert len(source) == 2


CSV = "file,label\nx/1.png,cat\n2.png,dog\n3.png,cat\n"


@pytest.mark.parametrize(
    "text",
    [
        CSV,
        "\ufeff" + CSV.replace("\n", "\r\n"),
        CSV.removeprefix("file,label\n"),
        CSV.replace("file,label\n", "image_id,breed\n"),
        "id,Path,Target\n7,x/1.png,cat\n8, 2.png ,dog\n\n9,./3.png,cat\n",
        'class,name\ncat,"x/1"\ndog,2\ncat,x\\..\\3.png\ncat,3\n',
    ],
)
def test_labels_csv(root: Path, text: str) -> None:
    write(root, "x/1.png", "2.png", "3.png")
    (root / "labels.csv").write_text(text, newline="")
    for source in both(root):
        assert classes_of(source) == {"2.png": "dog", "3.png": "cat", "x/1.png": "cat"}
        assert len(source.bad) == text.count("..")


@pytest.mark.parametrize("kind", [list, dict])
def test_dataset_json(root: Path, kind: type) -> None:
    names = ["00000/img0.png", "00000/img1.png", "00001/img2.png"]
    write(root, *names)
    pairs = list(zip(names, [4, 0, 4], strict=True))
    (root / "dataset.json").write_text(json.dumps({"labels": kind(pairs)}))
    for source in both(root):
        assert source.classes == ("0", "1", "2", "3", "4")
        assert source.labels == (4, 0, 4)


def test_dataset_json_without_labels(root: Path) -> None:
    write(root, "00000/img0.png", "00001/img1.png")
    (root / "dataset.json").write_text('{"labels": null}')
    for source in both(root):
        assert (source.classes, source.labels) == (("all",), (0, 0))


def test_label_file_over_split_folders(root: Path) -> None:
    write(root, "train/1.png", "train/2.png", "test/1.png")
    (root / "labels.csv").write_text("train/1.png,b\ntrain/2.png,a\ntest/1.png,b\n")
    for source in both(root):
        assert source.splits == ("test", "train", "train")
        assert classes_of(source) == {"test/1.png": "b", "train/1.png": "b", "train/2.png": "a"}


def test_entries_without_images_and_images_without_entries(root: Path, tmp_path: Path) -> None:
    write(tmp_path, "secret.png")
    write(root, *(f"{i}.png" for i in range(1, 7)), "a/stem.png", "a/stem.jpg")
    rows = ["1.png,a", "1.png,a", "2.png,a", "2.png,b", "3.png,", "gone.png,a", "../secret.png,a",
            f"{tmp_path}/secret.png,a", "4.png,b", "a/stem,b", "a/stem.png,b"]  # fmt: skip
    (root / "labels.csv").write_text("\n".join(rows))
    for source in both(root):
        assert classes_of(source) == {"1.png": "a", "4.png": "b", "a/stem.png": "b"}
        assert sorted(source.bad) == sorted([
            ("2.png", "has several labels in labels.csv"),
            ("3.png", "has no label"),
            ("5.png", "is not in labels.csv"),
            ("6.png", "is not in labels.csv"),
            ("a/stem.jpg", "is not in labels.csv"),
            ("gone.png", "is listed in labels.csv but missing"),
            ("a/stem", "is listed in labels.csv but missing"),
            ("../secret.png", "points outside of the folder (listed in labels.csv)"),
            (f"{tmp_path}/secret.png", "points outside of the folder (listed in labels.csv)"),
        ])  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("labels.csv", b"", "is empty"),
        ("labels.csv", b"a,b,c\n1.png,2,3\n", "no header"),
        ("labels.csv", b"file,x,label\n1.png,2\n", "line 2 has too few columns"),
        ("labels.csv", b"1.png,\xff\n", "not UTF-8"),
        ("labels.csv", b"file;label\n1.png;2\n", "separated by ';'"),
        ("labels.csv", b"1.png\tdog\n", "separated by '\\t'"),
        (
            "labels.csv",
            b"1.png,900000\n",
            "1.png has label 900000, which makes 900001 classes of 1",
        ),
        ("labels.csv", b"other.png,a\n", "names no image that is there"),
        ("dataset.json", b"{", "is invalid"),
        ("dataset.json", b"[" * 100_000, "is invalid"),
        ("dataset.json", b'{"images": []}', 'no "labels"'),
        ("dataset.json", b'{"labels": 3}', "neither a list nor"),
        ("dataset.json", b'{"labels": [["1.png"]]}', "expected"),
        ("dataset.json", b'{"labels": [["1.png", [0, 1]]]}', "[0, 1], several values"),
    ],
)
def test_invalid_label_files(root: Path, name: str, content: bytes, part: str) -> None:
    write(root, "1.png")
    (root / name).write_bytes(content)
    for spec in (root, zipped(root, root.with_suffix(".zip"))):
        with pytest.raises(DataError) as error:
            open_source(spec, resolution=8)
        one_line(error, part)


def test_two_label_files(root: Path) -> None:
    write(root, "1.png")
    (root / "labels.csv").write_text("1.png,a")
    (root / "dataset.json").write_text('{"labels": null}')
    with pytest.raises(DataError, match=r"both labels\.csv and dataset\.json"):
        open_source(root, resolution=8)


def test_identity_changes_with_files_and_labels(root: Path) -> None:
    write(root, "1.png", "2.png")
    (root / "labels.csv").write_text("1.png,a\n2.png,b\n")
    before = both(root)
    assert [s.identity for s in both(root)] == [s.identity for s in before]
    assert open_source(root, resolution=4).identity == before[0].identity
    (root / "labels.csv").write_text("1.png,b\n2.png,a\n")
    labels = both(root)
    write(root, "3.png")
    files = both(root)
    Image.new("RGB", (9, 9)).save(root / "3.png")
    content = both(root)
    for sources in zip(before, labels, files, content, strict=True):
        assert len({source.identity for source in sources}) == 4


def test_damaged_file_is_a_bad_image(root: Path) -> None:
    write(root, "1.png")
    source = open_source(root, resolution=8)
    (root / "1.png").write_bytes(b"")
    with pytest.raises(BadImageError, match="empty"):
        source.read(0)
    (root / "1.png").unlink()
    with pytest.raises(BadImageError, match="No such file"):
        source.read(0)


def test_other_kinds_of_file_are_counted(root: Path) -> None:
    """Images of an unknown format are counted, hidden files are not."""
    write(root, "a/1.png", "a/2.jpg", "b/..dots..png", "b/.hidden.png", ".git/x.png")
    (root / "a" / "2.jpg").rename(root / "a" / "2.JFIF")
    shutil.copy(root / "a" / "2.JFIF", root / "b" / "3.jpe")
    for name in ("README.txt", "a/4.heic", "a/tags.csv", "b/.DS_Store", "b/..heic"):
        (root / name).write_bytes(b"?")
    (root / "labels.csv").write_text("a/1,x\na/2,x\nb/..dots.,y\nb/3,y\n")
    (root / "gone.txt").symlink_to(root / "nowhere")
    folder = open_source(root, resolution=8)
    assert folder.keys == ("a/1.png", "a/2.JFIF", "b/..dots..png", "b/3.jpe")
    assert (num_skipped(folder), folder.bad) == (5, ())
    (root / "gone.txt").unlink()
    with zipfile.ZipFile(root.with_suffix(".zip"), "w") as file:
        for path in (path for path in root.rglob("*") if path.is_file()):  # `write` drops the "./"
            file.writestr(f"./wrap/{path.relative_to(root)}", path.read_bytes())
    archive = open_source(root.with_suffix(".zip"), resolution=8)
    assert (archive.keys, num_skipped(archive), archive.bad) == (folder.keys, 4, ())
    with zipfile.ZipFile(root.with_suffix(".zip"), "a") as file:
        file.writestr("./", b"")
        file.writestr("read-me.txt", b"?")
    archive = open_source(root.with_suffix(".zip"), resolution=8)
    assert (archive.keys, num_skipped(archive), archive.bad) == (folder.keys, 5, ())


def test_stamp_depends_on_modification_times(root: Path) -> None:
    write(root, "a/1.png", "b/2.png")
    before = both(root)
    assert [source.stamp for source in both(root)[:1]] == [before[0].stamp]
    os.utime(root / "b" / "2.png", ns=(1, 1))
    os.utime(root.with_suffix(".zip"), ns=(1, 1))
    after = [open_source(spec, resolution=8) for spec in (root, root.with_suffix(".zip"))]
    for old, new in zip(before, after, strict=True):
        assert old.identity == new.identity
        assert "" != old.stamp != new.stamp
