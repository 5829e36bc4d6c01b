"""The summary that `bigan pack` ends with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bigan.data.format.convert import changes
from bigan.data.packing.pack import pack
from bigan.data.packing.summary import summary


def write(path: Path, width: int, height: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), 9, np.uint8)).save(path)


@pytest.mark.parametrize(
    ("size", "resolution", "fit", "expected"),
    [
        ((16, 16), 8, "crop", ()),
        ((16, 12), 8, "crop", ("cropped",)),
        ((16, 7), 8, "crop", ("cropped", "enlarged")),
        ((16, 7), 8, "stretch", ("stretched", "enlarged")),
        ((16, 12), 8, "pad", ("padded",)),
        ((28, 28), 32, "pad", ("padded",)),
        ((32, 20), (10, 16), "crop", ()),
    ],
)
def test_changes_of_an_image(size, resolution, fit, expected) -> None:
    assert changes(size, resolution, fit) == expected


def test_summary_of_a_pack(tmp_path: Path) -> None:
    for n in range(20):
        for split, count in (("train", 2), ("test", 1)):
            for i in range(count):
                write(tmp_path / f"src/{split}/kind{n:02d}/{i}.png", 9, 9)
    write(tmp_path / "src/train/kind03/wide.png", 20, 9)
    write(tmp_path / "src/train/kind03/small.png", 7, 7)
    (tmp_path / "src/train/kind04/bad.png").write_bytes(b"damaged")
    for name in ("a.txt", "b.txt", "c.heic"):
        (tmp_path / "src" / name).write_bytes(b"x")
    packed = pack(tmp_path / "src", tmp_path / "out", resolution=8, allow_upscale=True, max_bad=1)
    assert packed.changes == {"cropped": 1, "enlarged": 1}
    lines = summary(packed).splitlines()
    assert (
        lines[0] == f"{tmp_path / 'out'}: 42 train, 20 test images, 8 px, 3 channel(s), 20 classes"
    )
    assert lines[1].split() == ["number", "class", "train", "test"]
    assert [line.split() for line in lines[2:8]] == [
        *([str(n), f"kind{n:02d}", "4" if n == 3 else "2", "1"] for n in range(5)),
        ["...", "10", "more", "classes"],
    ]
    assert lines[12].split() == ["19", "kind19", "2", "1"]
    assert lines[13:] == [
        "  images: cropped 1, enlarged 1",
        "  skipped 3 files that are not images: 1 .heic, 2 .txt",
        f"  left out 1 unusable images: see {tmp_path / 'out' / 'bad.txt'}",
    ]


def test_summary_names_classes_without_training_images(tmp_path: Path) -> None:
    rows = ["1.png,0,train", "2.png,2,train", "3.png,0,test"]
    for n in (1, 2, 3):
        write(tmp_path / f"src/{n}.png", 8, 8)
    (tmp_path / "src/labels.csv").write_text("\n".join(["file,label,split", *rows]))
    text = summary(pack(tmp_path / "src", tmp_path / "out", resolution=8))
    assert "  without a training image: 1" in text.splitlines()
    (tmp_path / "src/train.csv").write_text("1.png,0")
    text = summary(pack(tmp_path / "src", tmp_path / "none", resolution=8, labels="none"))
    assert "no labels" in text
    assert "skipped 1 files that are not images: 1 train.csv" in text
    assert "labels are read from labels.csv" in text


def test_summary_names_lists_of_splits(tmp_path: Path) -> None:
    """As of CUB and Food-101: test images would be in the training split by the hash."""
    write(tmp_path / "src/images/a/1.png", 8, 8)
    write(tmp_path / "src/images/b/2.png", 8, 8)
    for name in ("train_test_split.txt", "readme.txt"):
        (tmp_path / "src/images" / name).write_text("1 1")
    packed = pack(tmp_path / "src", tmp_path / "out", resolution=8, test_fraction=0)
    assert packed.skipped == ((".txt", 1), ("train_test_split.txt", 1))
    (line,) = [line for line in summary(packed).splitlines() if "splits are not read" in line]
    assert "train_test_split.txt" in line
    assert "readme" not in line
