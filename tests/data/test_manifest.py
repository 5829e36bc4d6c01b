"""The packed folder and its checks; tar members and pixels."""

from __future__ import annotations

import io
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_helpers import one_line, tree
from verify_folders import reseal

from bigan.data import DataError
from bigan.data.format.codec import BadImageError, decode_into, encode
from bigan.data.format.manifest import Manifest
from bigan.data.format.tar import index_shard, shard_bytes, walk_tar
from bigan.data.packing.pack import pack


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "digits"
    pack("digits", folder)
    return folder


@pytest.fixture
def copy(digits: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    for name, content in tree(digits).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    change(content)
    (folder / "manifest.json").write_text(json.dumps(content))


def append(file: Path, data: bytes = b"\0") -> None:
    file.write_bytes(file.read_bytes() + data)


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda d: (d / "manifest.json").unlink(), "bigan pack"),
        (lambda d: (d / "manifest.json").write_text("{"), "manifest.json: cannot be read"),
        (lambda d: (d / "manifest.json").write_bytes(b"\xff\xfe"), "manifest.json: cannot be read"),
        (lambda d: (d / "manifest.json").write_text("[]"), "is not a data manifest"),
        (lambda d: edit(d, lambda m: m.update(schema_version=1)), "schema_version 1"),
        (lambda d: edit(d, lambda m: m.update(resolution="16")), "resolution"),
        (lambda d: edit(d, lambda m: m.update(resolution=32)), "was edited"),
        (lambda d: edit(d, lambda m: m.update(classes=["x"] * 10)), "was edited"),
        (lambda d: edit(d, lambda m: m["shardlist"][0].update(url="../x.tar")), "../x.tar"),
        (lambda d: edit(d, lambda m: m.update(shardlist=[])), "lists no shard"),
        (lambda d: edit(d, lambda m: m["shardlist"][0].update(nsamples=1)), "impossible counts"),
        (lambda d: (d / "train-000002.tar").unlink(), "train-000002.tar: shard is missing"),
        (lambda d: append(d / "test-000000.tar"), "test-000000.tar: shard has"),
        (lambda d: (d / "train-9.tar").write_bytes(b""), "train-9.tar: shard is not listed"),
        (
            lambda d: (d / "index" / "test.size.npy").unlink(),
            "test.size.npy: index file is missing",
        ),
    ],
)
def test_damaged_folders(copy: Path, damage: Callable[[Path], object], part: str) -> None:
    Manifest.load(copy)
    damage(copy)
    with pytest.raises(DataError) as error:
        Manifest.load(copy)
    one_line(error, str(copy), part)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such data folder; create it with `bigan pack`"):
        Manifest.load(tmp_path / "nowhere")


def test_unknown_split(digits: Path) -> None:
    with pytest.raises(DataError, match="no split 'val'; its splits are: train, test"):
        Manifest.load(digits).num_samples("val")


@pytest.mark.parametrize("name", ["train-000001.tar", "index/train.label.npy"])
def test_one_flipped_bit_is_found(copy: Path, name: str) -> None:
    manifest = Manifest.load(copy)
    assert manifest.verify_checksums()
    data = bytearray((copy / name).read_bytes())
    data[1000] ^= 1
    (copy / name).write_bytes(bytes(data))
    with pytest.raises(DataError) as error:
        Manifest.load(copy).verify_checksums()
    one_line(error, name, "damaged")
    assert not manifest.verify_checksums(limit_bytes=1000)  # too large


@pytest.mark.parametrize(
    "wrong",
    [
        lambda columns: columns["label"].__iadd__(20),
        lambda columns: columns["label"].__ixor__(1),
        lambda columns: columns["label"].__isub__(1),
        lambda columns: columns["offset"].__iadd__(10**9),
        lambda columns: columns["offset"].__isub__(2000),  # wraps around
        lambda columns: columns["size"].__setitem__(-1, 10**6),
        lambda columns: columns["size"].__setitem__(200, 10**6),
    ],
)
def test_inconsistent_index(copy: Path, wrong: Callable[[dict], object]) -> None:
    names = ("offset", "size", "label")
    columns = {name: np.load(copy / "index" / f"train.{name}.npy") for name in names}
    wrong(columns)
    for name in names:
        np.save(copy / "index" / f"train.{name}.npy", columns[name])
    with pytest.raises(DataError, match=r"train\.\w+\.npy: damaged"):
        Manifest.load(copy).load_index("train")
    reseal(copy)
    with pytest.raises(DataError, match="inconsistent"):
        Manifest.load(copy).load_index("train")


def test_pickled_index_is_not_loaded(copy: Path) -> None:
    evil = np.asarray([Evil(copy / "ran")], object)
    np.save(copy / "index" / "train.label.npy", evil, allow_pickle=True)
    with pytest.raises(DataError, match=r"train\.label\.npy: cannot be read"):
        Manifest.load(copy).load_index("train")
    assert not (copy / "ran").exists()


# --- tar and pixels -----------------------------------------------------------------------------

SAMPLES = [(f"{i:09d}", encode(np.full((16, 16, 1), i, np.uint8), "npy"), i % 3) for i in range(20)]


def test_shard_bytes_are_indexed_exactly() -> None:
    data = shard_bytes(SAMPLES, "npy")
    columns = index_shard(data, "npy", "x.tar")
    assert columns["label"] == [label for _, _, label in SAMPLES]
    found = [data[o : o + s] for o, s in zip(columns["offset"], columns["size"], strict=True)]
    assert found == [image for _, image, _ in SAMPLES]
    assert columns["crc32"] == [zlib.crc32(image) for image in found]
    assert shard_bytes(SAMPLES, "npy") == data


def test_truncation_and_flipped_headers_are_errors() -> None:
    """Damage that WebDataset's reader ignores: truncation, damaged headers, zeroed pages."""
    data = shard_bytes(SAMPLES, "npy")
    members = list(walk_tar(data, "x.tar"))
    end = -(-(members[-1].offset + members[-1].size) // 512) * 512
    cuts = [*range(0, end + 513, 512), *(m.offset + 7 for m in members), members[5].offset - 100]
    damaged = [data[:cut] for cut in cuts]
    for position in range(members[7].offset - 512, members[7].offset - 12):
        flipped = bytearray(data)
        flipped[position] ^= 0x11
        damaged.append(bytes(flipped))
    zeroed = bytearray(data)
    zeroed[members[7].offset - 512 : members[7].offset + 512] = bytes(1024)
    damaged += [bytes(zeroed), b"", b"<html>" * 1000]
    for broken in damaged:
        with pytest.raises(DataError, match=r"x\.tar: "):
            index_shard(broken, "npy", "x.tar")
    with pytest.raises(DataError, match=r"000000007\.npy is truncated"):
        index_shard(data[: members[15].offset + 7], "npy", "x.tar")


@pytest.mark.parametrize(
    ("members", "part"),
    [
        ([("a.npy", b"x"), ("b.npy", b"x"), ("b.cls", b"1")], "sample a lacks"),
        ([("a.npy", b"x")], "sample a lacks"),
        ([("a.npy", b"x"), ("a.cls", b"one")], "not an integer"),
        ([("a.npy", b"x"), ("a.cls", b"1"), ("a.npy", b"x")], "twice"),
        ([("a.pyd", b"x"), ("a.cls", b"1")], "unexpected member a.pyd"),
    ],
)
def test_incomplete_samples(members: list[tuple[str, bytes]], part: str) -> None:
    import tarfile

    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with pytest.raises(DataError, match=part):
        index_shard(file.getvalue(), "npy", "x.tar")


@pytest.mark.parametrize("encoding", ["npy", "png"])
@pytest.mark.parametrize("channels", [1, 3])
def test_encode_and_decode_round_trip(encoding: str, channels: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (24, 24, channels), np.uint8)
    data = encode(image, encoding)  # type: ignore[arg-type]
    out = np.zeros((2, 24, 24, channels), np.uint8)
    decode_into(out[1], data, encoding)  # type: ignore[arg-type]
    assert np.array_equal(out[1], image)
    assert not out[0].any()
    for broken in [data[:-5], data[: len(data) // 2], b"", b"garbage" * 50]:
        with pytest.raises(BadImageError):
            decode_into(out[0], broken, encoding)  # type: ignore[arg-type]
    for other in [
        np.empty((12, 12, channels), np.uint8),
        np.empty((24, 24, 4 - channels), np.uint8),
    ]:
        with pytest.raises(BadImageError, match="expected"):
            decode_into(other, data, encoding)  # type: ignore[arg-type]


class Evil:
    """Unpickling this creates a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_other_npy_files_are_read_but_never_unpickled(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asfortranarray(image), version=(2, 0))
    out = np.zeros((8, 8, 3), np.uint8)
    decode_into(out, file.getvalue(), "npy")
    assert np.array_equal(out, image)
    evil = io.BytesIO()
    np.save(evil, np.asarray([Evil(tmp_path / "ran")], object), allow_pickle=True)
    with pytest.raises(BadImageError):
        decode_into(out, evil.getvalue(), "npy")
    assert not (tmp_path / "ran").exists()
    floats = io.BytesIO()
    np.save(floats, image.astype(np.float32))
    with pytest.raises(BadImageError, match="float32"):
        decode_into(out, floats.getvalue(), "npy")
