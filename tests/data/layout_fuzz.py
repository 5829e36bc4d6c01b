"""Random trees of images, label files and other files, read as a folder and from archives.

`python tests/data/layout_fuzz.py 100000` runs many cases (about 150 a second).
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from bigan.data import DataError
from bigan.data.packing.sources import open_source

NAMES = (
    "cat", "dog", "0", "1", "2", "10", "007", "-1", "train", "test", "val", "Training", "Testing",
    "valid", "seg_train", "seg_test", "seg_pred", "train2017", "trainA", "trainB", "testA",
    "photos", "images", "a b", "caf\N{LATIN SMALL LETTER E WITH ACUTE}",
    "cafe\N{COMBINING ACUTE ACCENT}", "all", "x.y", "__MACOSX",
    ".hidden", "@eaDir", "n01440764", "labels.csv", "dev", "\N{SNOWMAN}",
)  # fmt: skip
CLASSES = ("cat", "dog", "0", "1", "10", "a b")
SPLITS = (("train", "test"), ("Training", "Testing"), ("seg_train", "seg_test"), ("train", "val"))
SUFFIXES = (".png", ".jpg", ".PNG", ".jpeg", ".webp", ".txt", ".json", ".csv", ".heic", "")
LABEL_FILES = ("labels.csv", "dataset.json", "metadata.csv", "metadata.jsonl")
LABELS: tuple[Any, ...] = (
    0,
    1,
    2,
    3,
    "cat",
    "dog",
    "10",
    "",
    None,
    -1,
    1.5,
    [0, 1],
    10**9,
    "train",
)


def random_tree(rng: random.Random) -> dict[str, bytes]:
    """Files by path; folders only as parents of files, as in an archive without folder entries."""
    files: dict[str, bytes] = {}
    depth = rng.choice((0, 1, 1, 2, 2, 3, 4))
    kinds = (NAMES, CLASSES, CLASSES, rng.choice(SPLITS))
    pools = [
        rng.sample(kind, rng.randint(1, min(4, len(kind)))) for kind in rng.choices(kinds, k=depth)
    ]
    wrap = "/".join(rng.choice(NAMES) for _ in range(rng.choice((0, 0, 1, 2))))
    for number in range(rng.choice((0, 1, 3, 8, 20))):
        levels = depth if rng.random() < 0.9 else rng.randint(0, depth)
        folders = [rng.choice(pool) for pool in pools[:levels]]
        suffix = rng.choice(SUFFIXES) if rng.random() < 0.1 else ".png"
        add(files, "/".join(part for part in (wrap, *folders, f"{number}{suffix}") if part), b"?")
    for _ in range(rng.choice((0, 0, 0, 1, 2))):
        place = rng.choice(["", wrap, *(path.rpartition("/")[0] for path in sorted(files))])
        name = rng.choice(LABEL_FILES)
        text = label_file(rng, name, place, sorted(files))
        add(files, f"{place}/{name}".lstrip("/"), text)
    return files


def add(files: dict[str, bytes], path: str, content: bytes) -> None:
    """Add a file unless its path is a folder, or one of its folders is a file."""
    parts = path.split("/")
    above = {"/".join(parts[:n]) for n in range(1, len(parts))}
    if not (above & set(files)) and not any(other.startswith(f"{path}/") for other in files):
        files[path] = content


def label_file(rng: random.Random, name: str, place: str, paths: list[str]) -> bytes:
    """A label file of some kind: usually complete and correct, sometimes neither."""
    if rng.random() < 0.05:
        return rng.choice((b"", b"{", b"\xff\xfe", b"[]", b"a,b,c\n", b"\n\n", b"null", b'"x'))
    inside = [p for p in paths if p.startswith(f"{place}/" if place else "")]
    kept = inside if rng.random() < 0.7 else rng.sample(inside, rng.randint(0, len(inside)))
    cut = len(place) + 1 if place else 0
    names = [path[cut:] for path in kept]
    if rng.random() < 0.1:
        names.append(rng.choice(("gone.png", "../up.png", "/etc/passwd", "a\\b.png", "")))
    choices = LABELS if rng.random() < 0.2 else LABELS[:3] if rng.random() < 0.5 else LABELS[4:6]
    rows = [
        (name, rng.choice(choices), rng.choice(("train", "test", "val", "x"))) for name in names
    ]
    header = rng.choice((("file_name", "label"), ("file", "label", "split"), ("file", "split"),
                         ("file_name", "text"), ("image_id", "breed"), ()))  # fmt: skip
    if name.endswith(".csv"):
        lines = [",".join(header)] if header else []
        lines += [",".join([str(cell) for cell in row][: len(header) or 2]) for row in rows]
        return "\n".join(lines).encode()
    if name.endswith(".jsonl"):
        keys = header or ("file_name", "label")
        dumped = (json.dumps(dict(zip(keys, row, strict=False))) for row in rows)
        return "\n".join(dumped).encode()
    return json.dumps(
        {"labels": [row[:2] for row in rows] if rng.random() < 0.9 else None}
    ).encode()


def outcome(spec: Path, **options: Any) -> dict[str, Any]:
    """What comes out of a source; any exception but a one-line `DataError` is raised."""
    try:
        source = open_source(spec, resolution=8, **options)
    except DataError as error:
        text = str(error)
        assert "\n" not in text
        return {"error": text.replace(str(spec), "SOURCE")}
    assert len(set(source.keys)) == len(source.keys)
    assert all(0 <= label < len(source.classes) for label in source.labels)
    names = ("classes", "keys", "labels", "splits", "bad", "skipped", "identity")
    return {name: getattr(source, name) for name in names}


def check(seed: int, scratch: Path) -> str:
    """One case: "error" or "understood"; AssertionError if an archive differs from the folder."""
    rng = random.Random(seed)
    files = random_tree(rng)
    options = {"labels": rng.choice(("auto", "auto", "auto", "folders", "none"))}
    root = scratch / "data"
    root.mkdir()
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    entries = sorted(root.rglob("*"))
    with zipfile.ZipFile(scratch / "data.zip", "w") as archive:
        for path in entries:
            archive.write(path, path.relative_to(root))
    with tarfile.open(scratch / "data.tar", "w") as archive:
        for path in rng.sample(entries, len(entries)):
            archive.add(path, path.relative_to(root), recursive=False)
    found = [outcome(scratch / name, **options) for name in ("data", "data.zip", "data.tar")]
    assert found[0] == found[1] == found[2], (seed, found)
    declared = any(b"split" in content for content in files.values())
    if "splits" in found[0] and not declared:
        check_splits(found[0], seed)
    shutil.rmtree(root)
    return "error" if "error" in found[0] else "understood"


def check_splits(found: dict[str, Any], seed: int) -> None:
    """No image in a folder of test images trains, unless the folder is a split of training."""
    for key, split in zip(found["keys"], found["splits"], strict=True):
        names = [part.lower() for part in key.split("/")[:-1]]
        first = next(
            (name for name in names if name in ("train", "training", "test", "testing")), ""
        )
        assert not (first.startswith("test") and split == "train"), (seed, key)


def main(num: int, first: int = 0) -> dict[str, int]:
    counts = {"error": 0, "understood": 0}
    for seed in range(first, first + num):
        with tempfile.TemporaryDirectory() as scratch:
            counts[check(seed, Path(scratch))] += 1
    return counts


if __name__ == "__main__":
    print(main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0))
