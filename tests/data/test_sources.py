"""Sources: the digits, the split rule, iterables, options."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import one_line
from PIL import Image

from bigan.data import DataError
from bigan.data.format.codec import BadImageError
from bigan.data.format.convert import load
from bigan.data.packing import sources
from bigan.data.packing.listing import assign_splits, number_labels, split_of, unit_hash, unsafe
from bigan.data.packing.sources import open_source

NOISE = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)


@pytest.mark.parametrize("resolution", [8, 16, 32])
def test_digits_average_back_to_the_original_exactly(resolution: int) -> None:
    from sklearn.datasets import load_digits

    bundle = load_digits()
    source = sources.digits(resolution)
    images = np.stack([image for _, _, image in source])
    assert images.shape == (1797, resolution, resolution, 1)
    f = resolution // 8
    means = images.reshape(1797, 8, f, 8, f).mean((2, 4), dtype=np.float64)
    assert np.array_equal(means, np.rint(bundle.images * 255 / 16))
    assert [label for _, label, _ in source] == bundle.target.tolist()


def test_digits_are_smoother_than_repeated_pixels() -> None:
    small = np.stack([image[..., 0] for _, _, image in sources.digits(8)])
    large = np.stack([image[..., 0] for _, _, image in sources.digits(32)]).astype(float)
    bricks = small.repeat(4, 1).repeat(4, 2).astype(float)
    roughness = [np.abs(np.diff(x, 2, axis=1)).mean() for x in (large, bricks)]
    assert roughness[0] < 0.75 * roughness[1]


def test_digits_split_is_fixed_and_balanced() -> None:
    source, other = open_source("digits", resolution=8), open_source("digits", test_fraction=0.5)
    assert (source.resolution, other.resolution) == (8, 16)
    assert source.splits == other.splits
    test = [
        label for label, split in zip(source.labels, source.splits, strict=True) if split == "test"
    ]
    assert np.bincount(test).tolist() == [50] * 10
    assert source.splits.count("train") == 1297
    first = [i for i, split in enumerate(source.splits) if split == "test"][:8]
    assert first == [0, 5, 6, 10, 11, 15, 19, 24]
    val = open_source("digits", val_fraction=0.2).splits
    assert [s == "test" for s in val] == [s == "test" for s in source.splits]
    assert 200 < val.count("val") < 320


def test_digits_are_grey_and_have_three_sizes_only() -> None:
    with pytest.raises(DataError, match="8, 16 or 32"):
        open_source("digits", resolution=64)
    with pytest.raises(DataError, match="are grey"):
        open_source("digits", channels=3)


def test_split_rule() -> None:
    """The split of an image depends on its key alone; a larger fraction only adds images."""
    assert unit_hash("class0/image.00.jpg") == pytest.approx(0.06212582, abs=1e-8)  # pinned
    keys = [f"image{i}" for i in range(5000)]
    splits = [split_of(key, 0.2, 0.1) for key in keys]
    assert 430 < splits.count("test") < 570
    assert 900 < splits.count("val") < 1100
    assert {split_of(key, 0, 0) for key in keys} == {"train"}
    for key, split in zip(keys, splits, strict=True):
        assert (split == "test") <= (split_of(key, 0, 0.15) == "test")
        assert (split == "test") == (split_of(key, 0.5, 0.1) == "test")


def test_official_splits_are_kept() -> None:
    keys = [f"image{i}" for i in range(300)]
    by_hash = tuple(split_of(key, 0.3, 0.2) for key in keys)
    assert assign_splits(keys, None, 0.3, 0.2) == by_hash
    assert assign_splits(keys, ["train"] * 300, 0.3, 0.2) == by_hash
    official = ["train"] * 200 + ["test"] * 100
    splits = assign_splits(keys, official, 0.3, 0.2)
    assert set(splits[200:]) == {"test"}
    assert set(splits[:200]) == {"train", "val"}  # only val is cut from train
    assert splits[:200] == tuple(split_of(key, 0.3, 0) for key in keys[:200])
    official[200:] = ["val"] * 100
    assert assign_splits(keys, official, 0.3, 0.2) == tuple(official)


def test_labels_become_class_numbers() -> None:
    assert number_labels([None, None]) == (("all",), [0, 0])
    assert number_labels(["cat", "ant", "cat"]) == (("ant", "cat"), [1, 0, 1])
    assert number_labels(["2", " 0".strip(), 2]) == (("0", "1", "2"), [2, 0, 2])
    assert number_labels([np.int64(1), torch.tensor(0)], ["x", "y"]) == (("x", "y"), [1, 0])
    assert number_labels([0, 3], ["x", "y"])[0] == ("0", "1", "2", "3")  # too few names
    assert number_labels(["3", 1, 2]) == (("1", "2", "3"), [2, 0, 1])  # 1..K: no class 0
    assert number_labels([10, 7]) == (("7", "10"), [1, 0])
    assert number_labels(["10.5", "9.0"])[0] == ("9.0", "10.5")
    assert number_labels(["10", "b", 2])[0] == ("2", "10", "b")
    for bad, reason in [
        (None, "no label"), ("", "no label"), (-1, "negative"), (10**12, "too large"),
        (1.0, "neither"), (True, "neither"), ([0, 1], "neither"),
    ]:  # fmt: skip
        classes, (zero, good, problem) = number_labels([0, 1, bad])
        assert (classes, zero, good) == (("0", "1"), 0, 1)
        assert isinstance(problem, str)
        assert reason in problem


def test_unsafe_names() -> None:
    assert not any(map(unsafe, ["a.png", "a/b.png", "a..b/c.png", "./a", "ab:c"]))
    assert all(map(unsafe, ["/a", "../a", "a/../b", "a\\..\\b", "C:\\a", "C:a", "\\a", "", "a\0"]))


class Indexed:
    """Like a torch Dataset: a length and items by number, without IndexError at the end."""

    classes = ("left", "right")

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> tuple[Any, int]:
        if i == 5:
            raise OSError("disk error")
        return Image.fromarray(NOISE[i % 12]), i % 2


def test_torch_like_data_set(tmp_path: Path) -> None:
    source = open_source(Indexed(), scratch=tmp_path / "spool")
    assert (source.resolution, source.channels) == (8, 3)
    assert source.classes == ("left", "right")
    assert source.keys == tuple(f"{i:09d}" for i in range(12) if i != 5)
    assert source.labels == tuple(i % 2 for i in range(12) if i != 5)
    assert source.bad == (("000000005", "raises an error (disk error)"),)
    assert np.array_equal(source.read(10), NOISE[11])
    assert os.listdir(tmp_path) == ["spool"]  # noqa: PTH208


def test_labels_of_an_iterable_are_optional(tmp_path: Path) -> None:
    items = [(NOISE[0], [0, 1]), (NOISE[1], 0.5), (NOISE[2], "a")]
    source = open_source(items, scratch=tmp_path / "spool", labels="none")
    assert (source.classes, source.labels, source.bad) == (("all",), (0, 0, 0), ())
    assert len(open_source(items, scratch=tmp_path / "spool").bad) == 2
    with pytest.raises(DataError, match="--labels is for folders"):
        open_source(items, scratch=tmp_path / "spool", labels="folders")


def test_generator_of_every_kind_of_image(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    Image.fromarray(NOISE[2]).save(file)
    chw = torch.from_numpy(NOISE[3]).permute(2, 0, 1)
    items = [
        NOISE[0], Image.fromarray(NOISE[1]), file, chw, torch.from_numpy(NOISE[4]),
        file.read_bytes(), str(file), NOISE[5][..., 0], {"image": NOISE[6], "key": "six"},
    ]  # fmt: skip
    source = open_source((item for item in items), scratch=tmp_path)
    want = [NOISE[0], NOISE[1], NOISE[2], NOISE[3], NOISE[4], NOISE[2], NOISE[2],
            NOISE[5][..., :1].repeat(3, 2), NOISE[6]]  # fmt: skip
    assert np.array_equal([image for _, _, image in source], want)
    assert source.classes == ("all",)
    assert source.keys[-1] == "six"
    assert not source.bad
    assert (tmp_path / "pixels.raw").stat().st_size == 9 * 8 * 8 * 3


def test_bad_items_are_named(tmp_path: Path) -> None:
    items = [
        {"image": NOISE[0], "label": "cat", "key": "a"},
        {"image": NOISE[1], "label": "cat", "key": "a"},
        {"image": NOISE[1].astype(np.float32), "label": "cat", "key": "floats"},
        {"label": "cat"},
        {"image": NOISE[2], "key": "unlabelled"},
        {"image": NOISE[3, :4], "label": "ant", "key": "small"},
        (NOISE[4], "ant", "more"),
        ("/no/such/file.png", "ant"),
        {"image": NOISE[5], "label": "ant", "key": "bad\nkey"},
        (3.5, "ant"),
        (NOISE[7], "ant"),
    ]
    source = open_source(items, scratch=tmp_path / "s")
    assert source.keys == ("a", "000000010")
    assert [source.classes[n] for n in source.labels] == ["cat", "ant"]
    assert np.array_equal(source.read(1), NOISE[7])
    for (name, reason), (want, part) in zip(
        sorted(source.bad),
        sorted([
            ("a", "twice"), ("floats", "float32"), ("000000003", "no 'image'"),
            ("unlabelled", "no label"), ("small", "8x4, smaller than 8"),
            ("000000006", "tuple of 3"), ("000000007", "No such file"),
            ("000000008", "unprintable key"), ("000000009", "type float"),
        ]),
        strict=True,
    ):  # fmt: skip
        assert name == want
        assert part in reason


def test_iterables_are_resized_and_identified(tmp_path: Path) -> None:
    def items(last: int = 0) -> list[tuple[np.ndarray, int]]:
        return [(image, 0) for image in NOISE[:3]] + [(NOISE[3], last)]

    first = open_source(items(), resolution=4, channels=1, scratch=tmp_path / "a")
    assert first.read(0).shape == (4, 4, 1)
    again = open_source(iter(items()), resolution=4, channels=1, scratch=tmp_path / "b")
    other = open_source(items(1), resolution=4, channels=1, scratch=tmp_path / "c")
    assert first.identity == again.identity != other.identity


def test_iterables_that_fail(tmp_path: Path) -> None:
    def stops() -> Any:
        yield NOISE[0]
        raise RuntimeError("connection lost\nretry")

    for items, parts in [
        (stops(), ("fails after 1 images", "connection lost")),
        ([NOISE[0][:4]], ("8x4", "--resolution")),
        ([], ("no usable image",)),
        ([np.zeros((8, 8), float)], ("no usable image", "000000000", "float64")),
        ({"a": NOISE[0]}, ("dict", "values()")),
    ]:
        with pytest.raises(DataError) as error:
            open_source(items, scratch=tmp_path / "s")
        one_line(error, *parts)
    with pytest.raises(DataError, match="scratch"):
        open_source([NOISE[0]])
    with pytest.raises(DataError, match="neither a path nor an iterable"):
        open_source(3)  # type: ignore[arg-type]


def test_options_are_checked(tmp_path: Path) -> None:
    Image.fromarray(NOISE[0]).save(tmp_path / "a.png")
    (tmp_path / "b.txt").write_text("text")
    for spec, options, part in [
        (tmp_path, {}, "--resolution 64"),
        (tmp_path, {"resolution": 0}, "positive"),
        (tmp_path, {"resolution": 100_000}, "pixels"),
        (tmp_path, {"resolution": 8, "channels": 5}, "3 (RGB) or 4"),
        (tmp_path, {"resolution": 8, "test_fraction": 1.0}, "test_fraction 1.0"),
        (tmp_path, {"resolution": 8, "val_fraction": -0.1}, "val_fraction -0.1"),
        (
            tmp_path,
            {"resolution": 8, "val_fraction": 0.5, "test_fraction": 0.5},
            "no training images",
        ),
        (tmp_path / "missing", {"resolution": 8}, "no such file or folder"),
        ("didgits", {"resolution": 8}, "`digits`"),
        (tmp_path / "a.png", {"resolution": 8}, "folder"),
        (tmp_path / "b.txt", {"resolution": 8}, "is not a .zip"),
    ]:
        with pytest.raises(DataError) as error:
            open_source(spec, **options)
        one_line(error, part)


def test_options_reach_the_pixels(tmp_path: Path) -> None:
    Image.fromarray(NOISE[0]).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    lanczos = open_source(str(tmp_path), resolution=4)
    area = open_source(tmp_path, resolution=4, resize="area", channels=1)
    assert (lanczos.transform, area.transform) == ("center-lanczos-v1", "center-area-v1")
    assert np.array_equal(lanczos.read(0), load(data, 4))
    assert np.array_equal(area.read(0), load(data, 4, 1, "area"))
    with pytest.raises(BadImageError, match="smaller than 16"):
        open_source(tmp_path, resolution=16).read(0)
    assert open_source(tmp_path, resolution=16, allow_upscale=True).read(0).shape == (16, 16, 3)


def test_the_limit_of_pixels_is_an_option(tmp_path: Path) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "1.png")
    assert open_source(tmp_path, resolution=8, max_pixels=400).read(0).shape == (8, 8, 3)
    with pytest.raises(BadImageError, match=r"20x20, more than 399 pixels; use --max-pixels"):
        open_source(tmp_path, resolution=8, max_pixels=399).read(0)
    with pytest.raises(DataError, match=r"resolution 20: is more than 399 pixels"):
        open_source(tmp_path, resolution=20, max_pixels=399)
    image = [np.zeros((20, 20, 3), np.uint8)]
    with pytest.raises(DataError, match=r"20x20, more than 399 pixels"):
        open_source(image, resolution=8, max_pixels=399, scratch=tmp_path / "raw")
