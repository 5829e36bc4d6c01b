"""Random existing shards: one line, or the same images, splits and classes packed and direct."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from test_shard_layouts import SIZE, direct, packed, write

from bigan.data import DataError
from bigan.data.packing.sources import open_source
from bigan.data.packing.verify import verify

Images = dict[int, tuple[str, str]]  # (split, class) of each image

SHARDS = ("0", "1", "train-0", "val-0", "test_1", "cat", "dog", "train/0", "val/0", "x/0", "n01")
FOLDERS = ("", "", "train/", "test/", "val/", "cat/", "dog/", "a/cat/", "a/dog/", "10/", "9/")
SUFFIXES = ("cls", "label", "json", "txt", "class", "cls.txt", "npy", "target")
USUAL = ("0", "1", "2", "cat", "dog")
ODD = ("", "[0, 1]", "0 1", "-1", "1.0", "0.5", '{"label": 1}', '{"class": "cat"}', "{}", "null")


def drawn(draw: random.Random) -> dict[str, list[str]]:
    """Tars whose labels are mostly at one place and mostly usual."""
    place = draw.choice((*SUFFIXES, None, None, None))
    folders = draw.choices(FOLDERS, k=draw.choice((1, 1, 2, 3)))
    tars, number = {}, 1
    for shard in draw.sample(SHARDS, draw.choice((2, 2, 3))):
        members: list[str] = []
        for _ in range(draw.randint(1, 4)):
            key, number = f"{draw.choice(folders)}{number}", number + 1
            suffix = place if draw.random() < 0.95 else draw.choice(SUFFIXES)
            label = draw.choice(USUAL if draw.random() < 0.95 else ODD)
            if suffix == "json" and label in USUAL:
                label = f'{{"label": "{label}"}}'
            members += [f"{key}.png", *([f"{key}.{suffix}={label}"] if suffix else [])]
        if draw.random() < 0.05:
            draw.shuffle(members)
        tars[f"{shard}.tar"] = members
    return tars


def outcome(read: Callable[[Path], Images], root: Path) -> Images | str:
    try:
        return read(root)
    except DataError as error:
        return str(error)


def without_bad(root: Path) -> Images:
    source = open_source(root, resolution=SIZE)
    if source.bad:
        raise DataError(f"{len(source.bad)} images cannot be used")
    return packed(root)


# Packing only divides the images of one shard, and only reading needs no training images.
DIFFERENT = re.compile("holds images of several splits|all images are of split")


@pytest.mark.parametrize(
    "seeds", [range(150), pytest.param(range(150, 2000), marks=pytest.mark.full)]
)
def test_random_shards(tmp_path: Path, seeds: range) -> None:
    understood = 0
    for seed in seeds:
        root = write(tmp_path / "shards", drawn(random.Random(seed)))
        by_pack, used = outcome(without_bad, root), outcome(direct, root)
        assert not any(isinstance(x, str) and "\n" in x for x in (by_pack, used)), seed
        if isinstance(by_pack, dict) and isinstance(used, dict):
            assert by_pack == used, seed
            assert verify(root).ok, seed
            understood += 1
        elif isinstance(by_pack, dict) or isinstance(used, dict):
            (refusal,) = (each for each in (by_pack, used) if isinstance(each, str))
            assert DIFFERENT.search(refusal), (seed, refusal)
        shutil.rmtree(root)
    assert understood > len(seeds) // 5
