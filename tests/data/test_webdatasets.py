"""Existing WebDataset tars and packed folders as a source."""

from __future__ import annotations

import dataclasses
import io
import os
import tarfile
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from data_helpers import one_line
from PIL import Image

from bigan.data import DataError
from bigan.data.format.manifest import Manifest
from bigan.data.packing.index_in_place import index_in_place
from bigan.data.packing.pack import pack_source
from bigan.data.packing.sources import digits, open_source
from bigan.data.packing.tar_samples import Sample, list_samples

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8)


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS[number]).save(file, "PNG")
    return file.getvalue()


def jpeg(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS[number]).save(file, "JPEG")
    return file.getvalue()


def tar(*members: tuple[str, bytes]) -> bytes:
    """A tar written by Python's tarfile."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def shards(root: Path, **fields: Any) -> Path:
    """Four shards of ten images by plain WebDataset; `fields` are functions of the number."""
    root.mkdir(exist_ok=True)
    for shard in range(4):
        with webdataset.TarWriter(str(root / f"{shard:05d}.tar")) as writer:
            for i in range(shard * 10, shard * 10 + 10):
                values = {name: value(i) for name, value in fields.items()}
                writer.write({"__key__": f"sample{i:03d}", "png": PIXELS[i], **values})
    return root


def test_folder_file_and_pattern(tmp_path: Path) -> None:
    root = shards(tmp_path / "birds", cls=lambda i: i % 3, txt=lambda i: f"{i}")
    source = open_source(root, resolution=8)
    assert (source.name, source.classes) == ("birds", ("0", "1", "2"))
    assert source.keys[:2] == ("00000/sample000", "00000/sample001")
    assert source.labels == tuple(i % 3 for i in range(40))
    assert np.array_equal([image for _, _, image in source], PIXELS)
    assert not source.bad
    assert 0 < source.splits.count("test") < 12
    pattern = open_source(f"{root}/{{00001..00002}}.tar", resolution=8)
    assert pattern.keys == source.keys[10:30]
    assert pattern.splits == source.splits[10:30]
    assert pattern.name == "birds"
    one = open_source(root / "00003.tar", resolution=8)
    assert np.array_equal([image for _, _, image in one], PIXELS[30:])
    assert len({s.identity for s in (source, pattern, one)}) == 3
    with ThreadPoolExecutor(4) as executor:
        assert np.array_equal(list(executor.map(source.read, range(40))), PIXELS)


@pytest.mark.parametrize("name", ["label", "cls", "class"])
def test_labels_in_json(tmp_path: Path, name: str) -> None:
    root = shards(tmp_path / "s", json=lambda i: {"caption": "x", name: i % 2})
    source = open_source(root, resolution=8)
    assert source.classes == ("0", "1")
    assert source.labels == (0, 1) * 20


def test_no_labels_at_all_is_one_class(tmp_path: Path) -> None:
    source = open_source(shards(tmp_path / "s", txt=str), resolution=8)
    assert source.classes == ("all",)
    assert set(source.labels) == {0}
    assert len(source) == 40


def test_samples_of_a_tar() -> None:
    image, mask = png(0), png(1)
    data = tar(
        ("./a/x.seg.png", mask), ("./a/x.PNG", image), ("./a/x.cls", b" 7\n"),
        ("b/x.jpg", b"first"), ("b/x.png", image), ("b/x.json", b'{"label": 2}'),
        (".hidden", b""), ("plain", b""), ("y.tiff", image), ("y.txt", b"3"),
    )  # fmt: skip
    for view in (data, memoryview(data)):
        samples, bad = list_samples(view, "w")
        assert [(s.key, s.suffix, s.label) for s in samples] == [
            ("a/x", "png", 7), ("b/x", "jpg", 2), ("y", "tiff", 3),
        ]  # fmt: skip
        assert isinstance(samples[0], Sample)
        found = [data[s.offset : s.offset + s.size] for s in samples]
        assert found == [image, b"first", image]
        assert bad == [("w/plain", "has no image ()")]


def test_unusable_samples_are_named() -> None:
    image = png(0)
    samples, bad = list_samples(
        tar(
            ("good.png", image), ("good.cls", b"1"),
            ("text.txt", b"x"), ("text.cls", b"1"),
            ("good.png", image),
            ("minus.png", image), ("minus.cls", b"-1"),
            ("huge.png", image), ("huge.cls", b"9" * 15),
            ("real.png", image), ("real.json", b'{"label": 0.5}'),
            ("true.png", image), ("true.json", b'{"label": true}'),
            ("broken.png", image), ("broken.json", b"{"),
            ("../up.png", image), ("/etc/abs.png", image), ("a/../../b.png", image),
        ),
        "w",
    )  # fmt: skip
    assert [sample.key for sample in samples] == ["good"]
    assert bad == [
        ("w/text", "has no image (txt cls)"),
        ("w/good", "appears twice"),
        ("w/minus", "label -1 is not a class number"),
        ("w/huge", "label 999999999999999 is not a class number"),
        ("w/real", "label 0.5 is not a class number"),
        ("w/true", "label True is not a class number"),
        ("w/../up.png", "points outside of the tar"),
        ("w//etc/abs.png", "points outside of the tar"),
        ("w/a/../../b.png", "points outside of the tar"),
        ("w/broken", "its .json cannot be read"),
    ]


def test_samples_without_label_among_labelled(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar(("1.png", png(0)), ("2.png", png(1)), ("2.cls", b"3")))
    (tmp_path / "b.tar").write_bytes(tar(("1.png", png(2)), ("2.png", png(3)), ("2.cls", b"0")))
    source = open_source(tmp_path, resolution=8)
    assert source.keys == ("a/2", "b/2")  # keys may be equal in two shards
    assert source.labels == (3, 0)
    assert source.classes == ("0", "1", "2", "3")
    assert source.bad == (("a/1", "has no label"), ("b/1", "has no label"))
    assert np.array_equal(source.read(1), PIXELS[3])


def test_damaged_tars_give_the_samples_before_the_damage(tmp_path: Path) -> None:
    root = shards(tmp_path / "s", cls=lambda i: 0)
    data = (root / "00001.tar").read_bytes()
    samples, _ = list_samples(data, "x")
    cut = samples[4].offset + 10
    (root / "00001.tar").write_bytes(data[:cut])
    rot = bytearray((root / "00002.tar").read_bytes())
    rot[samples[7].offset - 500] ^= 1  # in the header before the image
    (root / "00002.tar").write_bytes(rot)
    (root / "00003.tar").write_bytes(b"")
    source = open_source(root, resolution=8)
    counts = [sum(key.startswith(f"0000{n}/") for key in source.keys) for n in range(4)]
    assert counts == [10, 4, 7, 0]
    damage = {name: reason for name, reason in source.bad if name in ("00001", "00002", "00003")}
    assert "truncated" in damage["00001"]
    assert "damaged" in damage["00002"]
    assert "empty" in damage["00003"]
    (root / "00000.tar").write_bytes(b"<html>" * 200)
    for name in ("00001", "00002"):
        (root / f"{name}.tar").unlink()
    with pytest.raises(DataError) as error:
        open_source(root, resolution=8)
    one_line(error, "no usable image", "00000")


@pytest.mark.parametrize("label", [True, False])
def test_links_in_shards_and_image_tars(tmp_path: Path, label: bool) -> None:
    """A hard link is the image that it names; other links are an error of the whole tar."""
    file = tmp_path / "0.tar"
    for kind, linked in ((tarfile.LNKTYPE, "cat/1.png"), (tarfile.SYMTYPE, "1.png")):
        with tarfile.open(file, "w") as archive:
            for name in ("cat/1.png", "cat/1.cls", "cat/2.png", "cat/2.cls"):
                info = tarfile.TarInfo(name)
                content = png(0) if name.endswith("png") else b"0"
                if name == "cat/2.png":
                    info.type, info.linkname, content = kind, linked, b""
                info.size = len(content)
                if label or name.endswith("png"):
                    archive.addfile(info, io.BytesIO(content))
        if kind == tarfile.LNKTYPE:
            source = open_source(file, resolution=8)
            assert np.array_equal([image for _, _, image in source], PIXELS[[0, 0]])
            assert index_in_place(tmp_path).num_samples("train") == 2
            continue
        for read in (lambda: open_source(file, resolution=8), lambda: index_in_place(tmp_path)):
            with pytest.raises(DataError) as error:
                read()
            one_line(error, "cat/2.png is not a regular file but a symbolic link", "--dereference")


def test_last_complete_sample_before_the_damage_is_used() -> None:
    data = tar(("a.png", png(0)), ("a.cls", b"2"), ("b.png", png(1)))
    samples, bad = list_samples(data[: data.index(b"b.png") + 200], "w")
    assert [(sample.key, sample.label) for sample in samples] == [("a", 2)]
    assert [name for name, _ in bad] == ["w"]


def test_invalid_patterns(tmp_path: Path) -> None:
    root = shards(tmp_path / "s")
    (root / "00002.tar").unlink()
    for spec, parts in [
        (f"{root}/{{00000..00003}}.tar", ("00002.tar", "missing")),
        (f"{root}/{{0..99999999}}.tar", ("more than 1000000",)),
        (f"{root}/{{00000..00003.tar", ("braces",)),
        ("https://example.org/{0..3}.tar", ("not a local file",)),
        ("pipe:cat x.tar", ("not a local file",)),
    ]:
        with pytest.raises(DataError) as error:
            open_source(spec, resolution=8)
        one_line(error, *parts)
    (tmp_path / "t").mkdir()
    for folder in ("s", "t"):
        (tmp_path / folder / "same.tar").write_bytes(tar(("1.png", png(0))))
    with pytest.raises(DataError, match=r"same\.tar is given twice"):
        open_source(f"{tmp_path}/s/{{same,same}}.tar", resolution=8)


def test_tar_beside_images_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "1.png").write_bytes(png(0))
    (tmp_path / "download.tar").write_bytes(tar(("1.png", png(1)), ("2.png", png(2))))
    source = open_source(tmp_path, resolution=8)
    assert source.keys == ("1.png",)


def test_listing_reads_only_what_it_needs(tmp_path: Path) -> None:
    """A tar much larger than may be read: the content of the images is a hole in a sparse file."""
    small = tar(("1.png", png(0)), ("1.cls", b"1"))
    header, size = bytearray(small[:512]), 2**29
    header[124:136] = b"%011o\0" % size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    rest = small[small.index(b"1.cls") :]
    file = tmp_path / "sparse.tar"
    with file.open("wb") as stream:
        stream.write(header)
        stream.seek(512 + size)
        stream.write(rest)
    tracemalloc.start()
    source = open_source(file, resolution=8)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert source.keys == ("sparse/1",)
    assert peak < 2**20


def test_shard_that_shrinks_is_a_bad_image(tmp_path: Path) -> None:
    root = shards(tmp_path / "s")
    source = open_source(root, resolution=8)
    (root / "00000.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="truncated"):
        source.read(0)


def test_packed_folder_keeps_splits_names_and_pixels(tmp_path: Path) -> None:
    pack_source(digits(8), tmp_path / "packed")
    packed = Manifest.load(tmp_path / "packed")
    source = open_source(tmp_path / "packed", test_fraction=0.9)
    assert (source.name, source.resolution, source.channels) == ("digits", 8, 1)
    assert (source.classes, source.transform) == (packed.classes, packed.transform)
    assert source.identity == packed.fingerprint
    assert (source.splits.count("train"), source.splits.count("test")) == (1297, 500)
    want = sorted((image.tobytes(), label) for _, label, image in digits(8))
    assert sorted((image.tobytes(), label) for _, label, image in source) == want
    assert len(set(source.keys)) == 1797
    smaller = open_source(tmp_path / "packed", resolution=4, channels=3, resize="area")
    assert smaller.read(0).shape == (4, 4, 3)
    assert smaller.transform == f"{packed.transform}+center-area-v1"


def test_packed_folder_without_test_split_gets_none(tmp_path: Path) -> None:
    source = dataclasses.replace(digits(8), splits=("train",) * 1797)
    pack_source(source, tmp_path / "packed")
    assert set(open_source(tmp_path / "packed", test_fraction=0.5).splits) == {"train"}


def test_indexing_tars_changes_neither_keys_nor_splits(tmp_path: Path) -> None:
    root = shards(tmp_path / "s", cls=lambda i: i % 3)
    before = open_source(root, resolution=8, val_fraction=0.2, test_fraction=0.2)
    assert before.stamp
    index_in_place(root)
    after = open_source(root, resolution=8, val_fraction=0.2, test_fraction=0.2)
    for field in dataclasses.fields(before):
        if not field.name.startswith("read"):
            assert getattr(before, field.name) == getattr(after, field.name)
    os.utime(root / "00002.tar", ns=(1, 1))
    touched = open_source(root, resolution=8)
    assert (touched.identity, touched.stamp != before.stamp) == (before.identity, True)


def test_tars_that_cannot_be_indexed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, without advice to execute code from the file."""
    file = io.BytesIO()
    np.save(file, np.asarray([{}], object))
    for content in (file.getvalue(), b"damaged" * 20):
        (tmp_path / "0.tar").write_bytes(tar(("1.npy", content)))
        with pytest.raises(DataError) as error:
            index_in_place(tmp_path)
        one_line(error, "0.tar/1 is damaged")
        assert "pickle" not in str(error.value)
    (tmp_path / "0.tar").write_bytes(tar(("1.png", png(0)), ("1.cls", b"900000")))
    with pytest.raises(DataError, match="label 900000 implies too many classes"):
        index_in_place(tmp_path)
    (tmp_path / "0.tar").write_bytes(tar(("1.jfif", jpeg(0)), ("1.cls", b"0")))
    assert index_in_place(tmp_path).encoder == "jpg"

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "some\nfile")

    monkeypatch.setattr("bigan.data.packing.index_in_place._looks", refuse)
    with pytest.raises(DataError, match="cannot be read: Permission denied"):
        index_in_place(tmp_path)


def test_incomplete_pack_is_not_a_source(tmp_path: Path) -> None:
    pack_source(digits(8), tmp_path / "packed")
    (tmp_path / "packed" / "manifest.json").unlink()
    with pytest.raises(DataError, match="incomplete pack"):
        open_source(tmp_path / "packed")
