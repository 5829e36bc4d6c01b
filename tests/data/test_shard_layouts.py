"""Layouts of existing shards: packed and used directly they give the same images and classes."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from web import serving

from bigan.cli.main import main
from bigan.data import DataError
from bigan.data.format.manifest import MANIFEST
from bigan.data.packing.index_in_place import understood
from bigan.data.packing.sources import open_source
from bigan.data.settings import Fetch
from bigan.data.streaming.dataset import open_manifest
from bigan.data.streaming.resampled import ResampledStream, expand
from bigan.data.streaming.stream import sequential
from bigan.distributed.world import World

SIZE = 8
Tars = Mapping[str, list[str]]  # path of a tar -> names of its members, with "=content"


def picture(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE), (number, number, number)).save(file, "PNG")
    return file.getvalue()


def write(root: Path, tars: Tars) -> Path:
    """Member "a/7.png" is an image of grey level 7, "7.cls=cat" a text."""
    for path, members in tars.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(file, "w") as archive:
            for member in members:
                name, equals, text = member.partition("=")
                grey = int("".join(c for c in name.split("/")[-1].split(".")[0] if c.isdigit()))
                content = text.encode() if equals else picture(grey)
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return root


def packed(root: Path, **options: object) -> dict[int, tuple[str, str]]:
    """(split, class) of every image, by its grey level, as `bigan pack` reads `root`."""
    source = open_source(root, resolution=SIZE, test_fraction=0, **options)
    assert not source.bad
    rows = zip(source, source.splits, strict=True)
    return {int(x[0, 0, 0]): (split, source.classes[label]) for (_, label, x), split in rows}


def direct(root: Path, labels: str = "given") -> dict[int, tuple[str, str]]:
    """The same as training on the folder reads it."""
    fetch = Fetch(labels=labels)  # type: ignore[arg-type]
    manifest = open_manifest(root, fetch)
    return {
        int(image[0, 0, 0]): (split, manifest.classes[label])
        for split in manifest.splits
        for batch in sequential(manifest, split, World(), 4, fetch)
        for image, label in zip(batch.pixels.numpy(), batch.labels.tolist(), strict=True)
    }


def numbered(*labels: object, suffix: str = "cls", first: int = 1) -> list[str]:
    """Members of samples 1, 2, ... with these labels."""
    rows = enumerate(labels, first)
    return [x for n, label in rows for x in (f"{n:03d}.png", f"{n:03d}.{suffix}={label}")]


def classes(*names: str) -> dict[int, tuple[str, str]]:
    return {n: ("train", name) for n, name in enumerate(names, 1)}


def as_json(key: str, *values: object) -> list[str]:
    return numbered(*(json.dumps({key: value}) for value in values), suffix="json")


LAYOUTS: dict[str, tuple[Tars, dict[int, tuple[str, str]]]] = {
    "numbers": ({"0.tar": numbered(1, 0, 2)}, classes("1", "0", "2")),
    "numbers from 1": ({"0.tar": numbered(2, 1, 3)}, classes("2", "1", "3")),
    "ten and more": ({"0.tar": numbered(*range(12))}, classes(*map(str, range(12)))),
    "names in .cls": ({"0.tar": numbered("dog", "cat ", "a b")}, classes("dog", "cat", "a b")),
    "names with commas": ({"0.tar": numbered("tench, T", 1)}, classes("tench, T", "1")),
    "names in json": ({"0.tar": as_json("class_name", "x", "y")}, classes("x", "y")),
    "numbers in json": ({"0.tar": as_json("category", 1, 0.0)}, classes("1", "0")),
    "json without label": ({"0.tar": as_json("caption", "x", "y")}, classes("all", "all")),
    "names in .cls.txt": ({"0.tar": numbered("x", "y", suffix="cls.txt")}, classes("x", "y")),
    "names in .txt": ({"0.tar": numbered("x", "y", "x", "y", suffix="txt")}, classes(*"xyxy")),
    "captions": ({"0.tar": numbered("a cat", "a dog", suffix="txt")}, classes("all", "all")),
    "captions with a class": (
        {"0.tar": ["1.png", "1.txt=a", "1.cls=3", "2.png", "2.txt=a", "2.cls=1"]},
        classes("3", "1"),
    ),
    "an array beside the image": ({"0.tar": ["1.npy=x", "1.png", "1.cls=0"]}, classes("0")),
    "class folders": ({"0.tar": ["photos/cat/1.png", "photos/dog/2.png"]}, classes("cat", "dog")),
    "numbered folders": (
        {"0.tar": ["10/1.png", "9/2.png"], "1.tar": ["10/3.png"]},
        classes("10", "9", "10"),
    ),
    "numbered folders with gaps": (
        {"0.tar": ["000/1.png", "005/2.png"], "1.tar": ["010/3.png"]},
        classes("000", "005", "010"),
    ),
    "splits in class folders": (
        {"0.tar": ["cat/train/1.png", "dog/train/2.png"],
         "1.tar": ["cat/test/3.png", "dog/test/4.png"]},
        {1: ("train", "cat"), 2: ("train", "dog"), 3: ("test", "cat"), 4: ("test", "dog")},
    ),
    "splits in class folders with labels": (
        {"0.tar": ["a/train/1.png", "a/train/1.cls=0"],
         "1.tar": ["a/val/2.png", "a/val/2.cls=1", "b/val/3.png", "b/val/3.cls=0"]},
        {1: ("train", "0"), 2: ("val", "1"), 3: ("val", "0")},
    ),
    "splits in json": (
        {"0.tar": [*as_json("split", "train")], "1.tar": ["2.png", '2.json={"subset": "valid"}']},
        {1: ("train", "all"), 2: ("val", "all")},
    ),
    "a subset that is no split": ({"0.tar": as_json("subset", "x", "y")}, classes("all", "all")),
    "numbers with names": (
        {"0.tar": ["1.png", "1.cls=1", '1.json={"label": "cat", "class_id": 1}',
                   "2.png", "2.cls=0", '2.json={"label": "dog"}']},
        classes("1", "0"),
    ),
    "more suffixes": ({"0.tar": numbered("x", "y", suffix="labels")}, classes("x", "y")),
    "one letter": ({"0.tar": numbered(1, 0, suffix="y")}, classes("1", "0")),
    "labels in .label.json": ({"0.tar": numbered(1, 0, suffix="label.json")}, classes("1", "0")),
    "one tar for each class": (
        {"n1.tar": ["n1_.png"], "n2.tar": ["n2_.png"]}, classes("n1", "n2"),
    ),
    "prefixes": (
        {"train-0.tar": numbered("x"), "val-0.tar": numbered("x", first=2),
         "test-0.tar": numbered("y", first=3)},
        {1: ("train", "x"), 2: ("val", "x"), 3: ("test", "y")},
    ),
    "words": (
        {"imagenet-train-000000.tar": numbered(0), "imagenet-val-000000.tar": numbered(0, first=2)},
        {1: ("train", "0"), 2: ("val", "0")},
    ),
    "without training word": (
        {"000.tar": numbered(0), "test_00.tar": numbered(0, first=2)},
        {1: ("train", "0"), 2: ("test", "0")},
    ),
    "folders": (
        {"train/000.tar": numbered(1, 0), "val/000.tar": numbered(1, first=3)},
        {1: ("train", "1"), 2: ("train", "0"), 3: ("val", "1")},
    ),
    "folders in a tar": (
        {"0.tar": ["x/train/cat/1.png", "x/train/dog/2.png"],
         "1.tar": ["x/test/cat/3.png", "x/test/dog/4.png"]},
        {1: ("train", "cat"), 2: ("train", "dog"), 3: ("test", "cat"), 4: ("test", "dog")},
    ),
    "one split in each tar": (
        {"a-0.tar": ["val/1.png"], "a-1.tar": ["train/2.png"]},
        {1: ("val", "all"), 2: ("train", "all")},
    ),
    "more words": (
        {"Training/a/0.tar": ["1.png"], "Testing/a/0.tar": ["2.png"], "valid/a/0.tar": ["3.png"]},
        {1: ("train", "all"), 2: ("test", "all"), 3: ("val", "all")},
    ),
    "one shard beside a folder": (
        {"0.tar": numbered(0), "test/0.tar": numbered(0, first=2)},
        {1: ("train", "0"), 2: ("test", "0")},
    ),
    "not split names": (
        {"trainer-0.tar": numbered(0), "contest-0.tar": numbered(1, first=2)},
        classes("0", "1"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(tmp_path: Path, name: str) -> None:
    tars, expected = LAYOUTS[name]
    root = write(tmp_path / "shards", tars)
    assert packed(root) == expected
    assert direct(root) == expected
    assert packed(root) == expected  # with the index beside the shards
    assert main(["verify", str(root)]) == 0
    assert direct(root, "none") == {n: (split, "all") for n, (split, _) in expected.items()}


def coded(kind: str, mode: str = "RGB", orientation: int = 1, **options: object) -> bytes:
    """An image file whose pixels all differ."""
    pixels = np.arange(SIZE * SIZE * 4, dtype=np.uint8).reshape(SIZE, SIZE, 4)
    if mode == "I;16":
        image = Image.fromarray(pixels.view(np.uint16)[..., 0])
    elif mode in ("L", "P", "1"):
        image = Image.fromarray(pixels[..., 0]).convert(mode)
    else:
        image = Image.fromarray(pixels[..., : len(mode)], mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, kind, **({"exif": exif} if orientation > 1 else {}), **options)
    return file.getvalue()


IMAGES: dict[str, list[tuple[str, bytes]]] = {
    "jpg": [("jpg", coded("JPEG"))],
    "grey jpg": [("jpg", coded("JPEG", "L")), ("jpg", coded("JPEG"))],
    "upright and turned jpg": [("jpg", coded("JPEG", orientation=n)) for n in range(1, 9)],
    "turned png": [("png", coded("PNG", orientation=6))],
    "turned webp": [("webp", coded("WEBP", orientation=8))],
    "cmyk": [("jpg", coded("JPEG", "CMYK"))],
    "alpha": [("png", coded("PNG", "RGBA")), ("png", coded("PNG"))],
    "webp with alpha": [("webp", coded("WEBP", "RGBA", lossless=True))],
    "transparent colour": [("png", coded("PNG", transparency=(0, 1, 2)))],
    "transparent grey": [("png", coded("PNG", "L", transparency=4))],
    "palette": [("png", coded("PNG", "P"))],
    "16 bits": [("png", coded("PNG", "I;16"))],
    "1 bit": [("png", coded("PNG", "1"))],
    "grey and colour": [("png", coded("PNG", "L")), ("png", coded("PNG"))],
    "several formats": [("jpg", coded("JPEG")), ("png", coded("PNG")), ("bmp", coded("BMP"))],
    "gif": [("gif", coded("GIF", "P"))],
    "tiff": [("tif", coded("TIFF"))],
    "avif": [("avif", coded("AVIF", orientation=6))],
    "jpeg 2000": [("jp2", coded("JPEG2000")), ("j2k", coded("JPEG2000", "L", no_jp2=True))],
    "tga": [("tga", coded("TGA", "RGBA"))],
    "bytes behind the end": [("png", coded("PNG") + b"more")],
    "a png named jpg": [("jpg", coded("PNG")), ("jpeg", coded("PNG"))],
}


@pytest.mark.parametrize("kind", IMAGES)
def test_pixels_are_those_that_pack_stores(tmp_path: Path, kind: str) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for number, (suffix, content) in enumerate(IMAGES[kind]):
            info = tarfile.TarInfo(f"{number}.{suffix}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    manifest = open_manifest(tmp_path)
    (batch,) = sequential(manifest, "train", World(), 100)
    source = open_source(tmp_path, resolution=SIZE, channels=manifest.channels, test_fraction=0)
    assert np.array_equal(batch.pixels.numpy(), [image for _, _, image in source])
    plain = kind in ("jpg", "grey jpg", "a png named jpg")
    assert (manifest.encoder == "any") != plain
    assert main(["verify", str(tmp_path), "--deep"]) == 0


def refused(root: Path, *parts: str, ways: tuple[Any, ...] = (packed, direct)) -> None:
    """Both ways raise one line with these parts, and nothing is written."""
    for read in ways:
        with pytest.raises(DataError) as error:
            read(root)
        assert "\n" not in str(error.value)
        assert all(part in str(error.value) for part in parts), str(error.value)
    assert not (root / MANIFEST).exists()


@pytest.mark.parametrize(
    ("tars", "parts"),
    [
        (
            {"0.tar": ["1.png", "2.png", "1.cls=0", "2.cls=1"]},
            ("0.tar: 1.png and 1.cls are not adjacent", "tar --sort=name"),
        ),
        (
            {"0.tar": numbered(0, 1), "1.tar": ["3.cls=0", "4.cls=0", "3.png", "4.png"]},
            ("1.tar: 3.cls and 3.png", "--sort=name"),
        ),
        ({"images.tar": ["1.png"], "labels.tar": ["1.cls=0"]}, ("1 has no image (cls)", "--sort")),
        ({"0.tar": ["i/1.png", "i/2.png", "l/1.cls=0", "l/2.cls=1"]}, ("l/1 has no image (cls)",)),
        (
            {"0.tar": [*numbered(0), "2.png", "2.label=1"]},
            ("0/001 has its label in .cls but 0/2 in .label", "labels=none"),
        ),
        (
            {"0.tar": numbered(0), "1.tar": numbered('{"label": 1}', suffix="json")},
            (".cls", "1/001 in .json label"),
        ),
        ({"0.tar": numbered("[0, 1]")}, ("0.tar/001: its label is [0, 1] in .cls", "one class")),
        ({"0.tar": numbered("0 0 1 0")}, ("0 0 1 0", "one class number", "--labels none")),
        ({"0.tar": as_json("label", [1, 2])}, ("[1, 2] in .json label", "labels=none")),
        ({"0.tar": as_json("labels", ["a"])}, ("in .json labels",)),
        ({"0.tar": ["1.png", "1.npy=x"]}, ("an array, npy",)),
        ({"0.tar": ["1.png", "1.onehot.npy=x"]}, ("an array, onehot.npy",)),
        ({"0.tar": ["1.png", "1.cls.pyd=x"]}, ("an array, cls.pyd",)),
        ({"0.tar": ["1.png", "a/2.png"]}, ("folder",)),
        ({"cat.tar": ["1.png"], "dog.tar": ["2.png"]}, ("cat.tar and dog.tar may be two classes",)),
        ({"cat/0.tar": ["1.png"], "dog/0.tar": ["2.png"]}, ("may be two classes",)),
        ({"test/train-0.tar": numbered(0)}, ("names two splits, test and train",)),
        (
            {"train-0.tar": ["test/1.png"], "train-1.tar": ["train/2.png"]},
            ("names two splits, train and test",),
        ),
        ({"0.tar": ["trainA/1.png"], "1.tar": ["trainB/2.png"]}, ("trainA and trainB",)),
        (
            {"0.tar": ["1.1.png", "1.2.png"], "1.tar": ["2.2.png"]},
            ("1: has no image (1.png 2.png)", "first dot"),
        ),
        ({"0.tar": ["train/1.png", "bus/2.png"], "1.tar": ["bus/3.png"]}, ("name of a split",)),
        (
            {"0.tar": ["cat/test/1.png"], "1.tar": ["dog/2.png"]},
            ("0/cat/test/1", "name of a split"),
        ),
        (
            {"0.tar": ["cat/1.png", "cat/1.cls=0", "test/2.png", "test/2.cls=1"]},
            ("0/test/2", "name of a split"),
        ),
        (
            {"0.tar": ["x/train/1.png"], "1.tar": ["y/trainA/2.png"]},
            ("train and trainA", "both train"),
        ),
        ({"trainA-0.tar": ["1.png"], "trainB-0.tar": ["2.png"]}, ("may be two classes",)),
        ({"0.tar": as_json("split", "train"), "1.tar": ["2.png"]}, ("0/001", "1/2 has none")),
        (
            {"0.tar": ["1.png"], "1.tar": as_json("split", "unknown")},
            ("'unknown' in .json", "train, val or test"),
        ),
        (
            {"test-0.tar": as_json("split", "train"), "1.tar": as_json("split", "train")},
            ("names two splits, test and train",),
        ),
        (
            {"0.tar": numbered("cat"), "val.tar": numbered(1, first=2)},
            ("labels of val are class numbers", "of train are class names"),
        ),
        (
            {
                "0.tar": [
                    f"{n}.{x}"
                    for n in (1, 2)
                    for x in ("png", "cls=1", f'json={{"class_name": "{n}x"}}')
                ]
            },
            ("0/1 has the labels 1 and 1x", "0/2 has 1 and 2x"),
        ),
        (
            {"0.tar": ["cat/1.png", "cat/1.cls=dog", "dog/2.png", "dog/2.cls=dog"]},
            ("0/cat/1 has label dog in .cls", "folder dog"),
        ),
    ],
)
def test_tars_that_are_not_understood(tmp_path: Path, tars: Tars, parts: tuple[str, ...]) -> None:
    refused(write(tmp_path / "shards", tars), *parts)


def test_splits_in_one_tar_are_packed(tmp_path: Path) -> None:
    tars = {"0.tar": as_json("split", "train", "val", "test")}
    expected = {n: (split, "all") for n, split in enumerate(("train", "val", "test"), 1)}
    root = write(tmp_path, tars)
    assert packed(root) == packed(root / "0.tar") == expected
    assert packed(root, labels="none") == expected
    refused(root, "0.tar holds images of several splits", "bigan pack", ways=(direct,))


def test_packing_needs_training_shards(tmp_path: Path) -> None:
    root = write(tmp_path, {"val-0.tar": numbered(0), "test-0.tar": numbered(0, first=2)})
    with pytest.raises(DataError, match=r"all images are of split test and val by the names"):
        packed(root)
    assert direct(root) == {1: ("val", "0"), 2: ("test", "0")}


@pytest.mark.parametrize(
    ("tars", "reason"),
    [
        ({"0.tar": [*numbered(0), "2.png"]}, ("0/2", "has no label")),
        ({"0.tar": [*numbered(0), "2.png", "2.txt=cat"]}, ("0/2", "has no label")),
        ({"0.tar": [*numbered(0), "2.png", "2.json={}"]}, ("0/2", "has no label")),
        ({"0.tar": numbered(0, 0.5)}, ("0/002", "label 0.5 is not a class number")),
        ({"0.tar": numbered(0, "a\nb")}, ("0/002", r"label 'a\nb' is not a class name")),
        (
            {"0.tar": [*numbered(0), "2.png", "2.cls=1", '2.json={"label": 2}']},
            ("0/2", "has label 1 in .cls and 2 in .json label"),
        ),
        (
            {"0.tar": [*numbered("a"), "2.png", "2.cls=a", '2.json={"label": "b"}']},
            ("0/2", "has label a in .cls and b in .json label"),
        ),
        (
            {"0.tar": [*as_json("label", 1), "2.png", '2.json={"label": 0, "class_id": 1}']},
            ("0/2", "has label 0 in .json label and 1 in .json class_id"),
        ),
    ],
)
def test_single_samples_without_a_class(
    tmp_path: Path, tars: Tars, reason: tuple[str, str]
) -> None:
    """`bigan pack --max-bad` can leave them out; used directly they are an error."""
    root = write(tmp_path / "shards", tars)
    assert open_source(root, resolution=SIZE).bad == (reason,)
    with pytest.raises(DataError, match="cannot be used unchanged: 0") as error:
        direct(root)
    assert reason[1] in str(error.value)
    assert "--max-bad" in str(error.value)


def test_the_start_line_names_what_is_ignored_and_untrained(tmp_path: Path) -> None:
    tars = {"0.tar": [*numbered("a"), "001.seg.png", "001.xml=x"], "val.tar": numbered("b")}
    root = write(tmp_path, tars)
    assert open_source(root, resolution=SIZE).skipped == ((".seg.png", 1), (".xml", 1))
    line = understood(open_manifest(root))
    assert "without a training image: b" in line
    assert "ignored members: .seg.png .xml" in line


def resampled(path: Path | str, num_classes: int = 4, split: str = "train", **fetch: object) -> set:
    """(grey level, label) of 40 images in mode "resampled"."""
    settings: dict = {"shape": (SIZE, SIZE, 3), "num_classes": num_classes, "seed": 0}
    with ResampledStream(
        str(path),
        split,
        world=World(),
        batch=20,
        fetch=Fetch(**fetch),
        **settings,  # type: ignore[arg-type]
    ) as stream:
        batches = [next(stream) for _ in range(2)]
    return {
        (int(image[0, 0, 0]), label)
        for batch in batches
        for image, label in zip(batch.pixels.numpy(), batch.labels.tolist(), strict=True)
    }


def test_resampled_shards_are_those_of_the_split(tmp_path: Path) -> None:
    tars = {
        "a-train-0.tar": numbered(1), "a-test-0.tar": numbered(2, first=2),
        "valid/0.tar": numbered(3, first=3), "x/trainer.tar": numbered(0, first=4),
    }  # fmt: skip
    root = write(tmp_path / "shards", tars)
    for path in (root, f"{root}/{{a-train-0,a-test-0,valid/0,x/trainer}}.tar"):
        assert resampled(path) == {(1, 1), (4, 0)}
        assert resampled(path, split="test") == {(2, 2)}
        assert resampled(path, split="val") == {(3, 3)}
    names = "pipe:cat /test/{train,test}-0.tar", "file://h/test/{train-0,test-0}.tar?val=x/test"
    for pattern in names:  # "test" above all shards declares nothing
        (shard,) = expand(pattern, allow_pipe=True)
        assert "train-0" in shard
    with pytest.raises(DataError, match=r"data\.split = train; their splits: test"):
        resampled(root / "a-test-0.tar")


@pytest.mark.parametrize("on_bad", ["stop", "skip"])
@pytest.mark.parametrize(
    ("members", "parts"),
    [
        (["1.png", "2.png", "1.cls=0", "2.cls=1"], ("1.png and 1.cls are not adj", "--sort=name")),
        (numbered("cat", "dog"), ("class name 'cat'", "class numbers")),
        (numbered(*range(1, 5)), ("label 4, which is not below model.num_classes = 4",)),
        (numbered("[1, 0]"), ("its label is [1, 0]", "data.labels=none")),
        (["1.png", "1.npy=x"], ("an array, npy",)),
        (["train/1.png", "test/2.png"], ("test/2 is not of data.split = train",)),
        (["1.png", '1.json={"cls": 0, "split": "test"}'], ("1 is not of data.split = train",)),
    ],
)
def test_resampled_labels_that_are_no_class_numbers(
    tmp_path: Path, members: list[str], parts: tuple[str, ...], on_bad: str
) -> None:
    root = write(tmp_path / "shards", {"0.tar": members})
    with pytest.raises(DataError) as error:
        resampled(root, on_bad=on_bad)
    assert all(part in str(error.value) for part in parts), str(error.value)
    if "label" in parts[0] or "array" in parts[0]:
        assert {label for _, label in resampled(root, 1, labels="none")} == {0}


def test_labels_apart_from_images_are_not_needed_without_labels(tmp_path: Path) -> None:
    members = ["1.cls=0", "1.png", "2.png", "3.cls=0", "2.cls=1", "3.png"]
    root = write(tmp_path / "s", {"0.tar": members})
    assert resampled(root / "0.tar", 1, labels="none") == {(1, 0), (2, 0), (3, 0)}
    assert packed(root, labels="none") == classes("all", "all", "all")
    assert direct(root, "none") == classes("all", "all", "all")
    assert main(["verify", str(root)]) == 0


def test_resampled_captions_and_missing_labels(tmp_path: Path) -> None:
    root = write(tmp_path / "shards", {"0.tar": numbered("x", "x", suffix="txt")})
    assert {label for _, label in resampled(root, 1)} == {0}
    with pytest.raises(DataError, match=r"has no label \(png txt\).*--sort=name"):
        resampled(root)


COMPRESSORS = {".tar.gz": gzip, ".tgz": gzip, ".tar.bz2": bz2, ".tar.xz": lzma, ".tar.zst": None}


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_compressed_shards(tmp_path: Path, suffix: str) -> None:
    """One archive is packed, and "resampled" reads it, if Python can; else one line says how."""
    root, compressor = tmp_path / "shards", COMPRESSORS[suffix]
    plain = write(tmp_path / "plain", {"0.tar": numbered(0, 1)}) / "0.tar"
    root.mkdir()
    content = compressor.compress(plain.read_bytes()) if compressor else b"\x28\xb5\x2f\xfd..."
    (root / f"0{suffix}").write_bytes(content)
    refused(root, f"0{suffix}: is compressed", "decompress", ways=(direct,))
    if compressor:
        assert packed(root, scratch=tmp_path / "scratch") == packed(plain)
    else:
        refused(root, f"0{suffix}: is compressed", "decompress")
    shutil.copy(root / f"0{suffix}", root / f"1{suffix}")
    refused(root, f"0{suffix}: is compressed", "decompress")
    (root / f"1{suffix}").unlink()
    with pytest.raises(DataError, match="is compressed"):
        packed(f"{root}/{{0..0}}{suffix}")  # type: ignore[arg-type]
    (root / f"0{suffix}").rename(root / "0.tar")
    refused(root, "0.tar: is compressed", "decompress", ways=(direct,))
    (root / "0.tar").rename(root / f"0{suffix}")
    if compressor:
        assert resampled(root) == resampled(f"{root}/0{suffix}") == {(1, 0), (2, 1)}
    else:
        with pytest.raises(DataError, match="is compressed"):
            resampled(root)


@pytest.mark.parametrize("name", [".", "./", "shards", "./shards/", "../q?x/shards"])
def test_paths_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    root = write(
        tmp_path / "q?x" / "shards", {"train/0.tar": numbered(0), "val-0.tar": numbered(1, first=2)}
    )
    monkeypatch.chdir(root if name in (".", "./") else root.parent)
    expected = {1: ("train", "0"), 2: ("val", "1")}
    assert packed(name) == direct(name) == packed(name) == expected  # type: ignore[arg-type]
    assert resampled(name) == {(1, 0)}


def test_an_index_without_labels_is_replaced_when_they_are_needed(tmp_path: Path) -> None:
    root = write(tmp_path / "a", {"0.tar": numbered("cat", "dog")})
    none = Fetch(labels="none")
    before = open_manifest(root, none)
    assert direct(root, "none") == classes("all", "all")
    assert main(["verify", str(root)]) == 0
    assert direct(root) == classes("cat", "dog")
    after = open_manifest(root, none)
    assert before.fingerprint == after.fingerprint != open_manifest(root).fingerprint
    assert direct(root, "none") == classes("all", "all")

    vectors = write(tmp_path / "b", {"0.tar": numbered("[0, 1]", "[1, 0]")})
    for _ in range(2):
        assert direct(vectors, "none") == classes("all", "all")
        with pytest.raises(DataError, match="one class number"):
            direct(vectors)
    with serving(vectors) as web, pytest.raises(DataError, match=r"data\.labels=none"):
        open_manifest(web.url, Fetch(cache=tmp_path / "cache"))


def test_changed_shards_are_indexed_again_on_request(tmp_path: Path) -> None:
    """The advice never is to delete a shard."""
    root = write(tmp_path / "shards", {"0.tar": numbered(0), "1.tar": numbered(1, first=2)})
    direct(root)
    for change in (
        lambda: write(root, {"test/2.tar": numbered(1, first=3)}),
        lambda: write(root, {"1.tar": numbered(1, 0, 0, first=4)}),
        (root / "0.tar").unlink,
    ):
        change()
        with pytest.raises(DataError, match=rf"tar: shard .*; delete {MANIFEST} and index/"):
            direct(root)
    (root / MANIFEST).unlink()
    assert direct(root) == {3: ("test", "1"), **{n: ("train", str(int(n == 4))) for n in (4, 5, 6)}}
