"""Shards that bigan did not write: indexed at first use, or resampled without guarantees."""

from __future__ import annotations

import collections
import io
import itertools
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from web import serving

from bigan.cli.main import main
from bigan.data import DataError
from bigan.data.format.manifest import MANIFEST
from bigan.data.packing.pack import pack
from bigan.data.settings import Fetch
from bigan.data.streaming.resampled import ResampledStream
from bigan.data.streaming.stream import ShardStream, sequential
from bigan.distributed.world import World

NUM, SIZE, CLASSES = 90, 16, 5


def jpeg(number: int, size: tuple[int, int] = (SIZE, SIZE), mode: str = "RGB") -> bytes:
    """An image of one grey level, 8 * number + 4."""
    file = io.BytesIO()
    colour = (number % 30) * 8 + 4
    full = {"L": colour, "RGB": (colour,) * 3, "CMYK": (0, 0, 0, 255 - colour)}[mode]
    Image.new(mode, size, full).save(file, "JPEG", quality=95)
    return file.getvalue()


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Tars by plain WebDataset: names with folders, one shard of another split."""
    folder = tmp_path / "tars"
    folder.mkdir()
    for name, numbers in (("set", range(60)), ("val", range(60, NUM))):
        pattern = str(folder / f"{name}-%04d.tar")
        with webdataset.ShardWriter(pattern, maxcount=25, verbose=0) as writer:
            for i in numbers:
                writer.write({"__key__": f"pics/{i:05d}", "jpg": jpeg(i), "cls": i % CLASSES})
    return folder


def numbers(batches: list) -> list[int]:
    return [round((float(im.float().mean()) - 4) / 8) for b in batches for im in b.pixels]


def test_tars_of_webdataset_are_indexed_at_first_use(tars: Path) -> None:
    before = {path.name: path.read_bytes() for path in tars.iterdir()}
    batches = list(sequential(tars, "train", World(), 16))
    assert (tars / MANIFEST).is_file()
    assert numbers(batches) == [i % 30 for i in range(60)]
    assert [int(x) for b in batches for x in b.labels] == [i % CLASSES for i in range(60)]
    assert numbers(list(sequential(tars, "val", World(), 16))) == list(range(30))
    written = (tars / MANIFEST).read_bytes()
    with ShardStream(tars, seed=0, world=World(), batch=20) as stream:
        epoch = [next(stream) for _ in range(3)]
    assert collections.Counter(numbers(epoch)) == dict.fromkeys(range(30), 2)
    assert (tars / MANIFEST).read_bytes() == written
    assert {name: (tars / name).read_bytes() for name in before} == before
    assert main(["verify", str(tars)]) == 0


def add(tars: Path, name: str, members: dict[str, bytes]) -> None:
    with tarfile.open(tars / name, "w") as tar:
        for member, content in members.items():
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize(
    ("members", "part"),
    [
        ({"a.jpg": jpeg(1)}, r"x\.tar/a has no label"),
        ({"a.jpg": jpeg(1, (20, 20)), "a.cls": b"1"}, "image sizes differ: .*20x20"),
        ({"a.jpg": jpeg(1)[:30], "a.cls": b"1"}, "x.tar/a is damaged"),
        ({"a.png": b"", "a.cls": b"1"}, "x.tar/a is damaged"),
        ({"a.cls": b"1"}, "no image"),
        ({"a.jpg": jpeg(1), "a.cls": b"-1"}, "not a class number"),
        ({"../a.jpg": jpeg(1), "../a.cls": b"1"}, "points outside of the tar"),
    ],
)
def test_unsuitable_tars_are_refused_with_advice(
    tars: Path, members: dict[str, bytes], part: str
) -> None:
    add(tars, "x.tar", members)
    with pytest.raises(DataError, match=part) as error:
        ShardStream(tars, seed=0, world=World(), batch=10)
    assert f"bigan pack {tars} DESTINATION" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tars / MANIFEST).exists()


def test_other_unsuitable_folders(tars: Path) -> None:
    cut = tars / "set-0001.tar"
    cut.write_bytes(cut.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"set-0001\.tar.*truncated"):
        ShardStream(tars, seed=0, world=World(), batch=10)
    with pytest.raises(DataError, match="give the folder of the shards"):
        ShardStream(str(tars / "set-{0000..0001}.tar"), seed=0, world=World(), batch=10)


def test_packed_folders_are_never_indexed_in_place(tmp_path: Path) -> None:
    pack("digits", tmp_path / "digits", resolution=8)
    manifest = tmp_path / "digits" / MANIFEST
    before = manifest.read_bytes()
    ShardStream(tmp_path / "digits", seed=0, world=World(), batch=10).close()
    assert manifest.read_bytes() == before
    manifest.unlink()
    with pytest.raises(DataError):
        ShardStream(tmp_path / "digits", seed=0, world=World(), batch=10)
    assert not manifest.exists()


def test_hidden_files_are_ignored(tars: Path) -> None:
    (tars / "._set-0000.tar").write_bytes(b"what a Mac leaves beside a file")
    assert numbers(list(sequential(tars, "train", World(), 60))) == [i % 30 for i in range(60)]


def test_grey_images_in_a_colour_set(tars: Path) -> None:
    add(tars, "x.tar", {"a.jpg": jpeg(29, mode="L"), "a.cls": b"1"})
    batches = list(sequential(tars, "train", World(), 16))
    assert numbers(batches)[-1] == 29


def test_indexed_tars_as_a_source(tars: Path, tmp_path: Path) -> None:
    packed = pack(tars, tmp_path / "packed", resolution=8, test_fraction=0.0)
    (manifest,) = packed.manifests
    assert sum(manifest.num_samples(split) for split in manifest.splits) == NUM


def test_packed_tars_are_read_by_plain_webdataset(tmp_path: Path) -> None:
    pack("digits", tmp_path / "digits", resolution=8, encoding="png")
    urls = sorted(str(path) for path in (tmp_path / "digits").glob("train-*.tar"))
    dataset = webdataset.WebDataset(urls, shardshuffle=False).decode("l8").to_tuple("png", "cls")
    theirs = list(dataset)
    (ours,) = sequential(tmp_path / "digits", "train", World(), 2000)
    assert [label for _, label in theirs] == ours.labels.tolist()
    pairs = zip(theirs, ours.pixels.numpy(), strict=True)
    assert all(np.array_equal(theirs, ours[..., 0]) for (theirs, _), ours in pairs)


# --- resampled ------------------------------------------------------------------------------------


def resample(pattern: str, num: int, **changes: object) -> list:
    settings: dict = {
        "shape": (SIZE, SIZE, 3), "num_classes": CLASSES, "seed": 0, "world": World(), "batch": 20,
        **changes,
    }  # fmt: skip
    with ResampledStream(pattern, **settings) as stream:
        return list(itertools.islice(stream, num))


def test_resampled_draws_shards_at_random(tars: Path) -> None:
    pattern = str(tars / "set-{0000..0002}.tar")
    batches = resample(pattern, 60)
    seen = collections.Counter(numbers(batches))
    assert set(seen) == set(range(30))
    assert len({tuple(numbers([b])) for b in batches}) > 50
    for batch in batches[:5]:
        assert batch.pixels.shape == (20, SIZE, SIZE, 3)
        for number, label in zip(numbers([batch]), batch.labels.tolist(), strict=True):
            assert label == number % CLASSES
    assert [int(b.positions[0]) for b in batches] == list(range(0, 1200, 20))
    again, other = resample(pattern, 3), resample(pattern, 3, world=World(1, 2))
    assert numbers(again) == numbers(batches[:3])
    assert numbers(other) != numbers(batches[:3])[:30]
    resumed = resample(pattern, 3, images_seen=60)
    assert numbers(resumed) != numbers(again)  # not the first images again
    assert [int(b.positions[0]) for b in resumed] == [60, 80, 100]
    assert [len(b.labels) for b in resample(pattern, 4, accumulation=2)] == [10] * 4


def test_resampled_reads_urls_and_resizes(tars: Path) -> None:
    with serving(tars) as web:
        batches = resample(f"{web.url}/set-{{0000..0001}}.tar", 5, shape=(8, 8, 1))
    assert batches[0].pixels.shape == (20, 8, 8, 1)


def test_resampled_bad_samples(tars: Path) -> None:
    add(tars, "x.tar", {"a.jpg": jpeg(1)[:200], "a.cls": b"1", "b.jpg": jpeg(3), "b.cls": b"3"})
    with pytest.raises(DataError, match=r"x\.tar: bad sample a"):
        resample(str(tars / "x.tar"), 3)
    pattern = str(tars / "{x,set-0000}.tar")
    batches = resample(pattern, 40, fetch=Fetch(on_bad="skip"))
    assert sum(len(b.bad) for b in batches) > 0
    assert {bad.member for b in batches for bad in b.bad} == {"a"}
    add(tars, "y.tar", {"a.jpg": jpeg(1), "a.cls": b"5"})
    with pytest.raises(DataError, match=r"label 5, which is not below .* 5"):
        resample(str(tars / "y.tar"), 1)


def test_resampled_missing_and_disallowed_shards(tars: Path) -> None:
    with pytest.raises(DataError, match=r"set-0003\.tar: no such shard"):
        resample(str(tars / "set-{0000..0007}.tar"), 1)
    with pytest.raises(DataError, match=r"data\.allow_pipe"):
        resample(f"pipe:cat {tars}/set-0000.tar", 1)
    allowed = Fetch(allow_pipe=True)
    assert len(resample(f"pipe:cat {tars}/set-0000.tar", 2, fetch=allowed)) == 2


def test_resampled_shards_that_the_server_refuses(tars: Path) -> None:
    with serving(tars) as web:
        web.query = "sig=valid"
        with pytest.raises(DataError, match=r"^http.*status 403") as got:
            resample(f"{web.url}/set-{{0000..0001}}.tar?sig=other", 1)
    assert "BufferedReader" not in str(got.value)


def test_resampled_shards_without_samples_do_not_hang(tmp_path: Path) -> None:
    tmp_path.joinpath("empty").mkdir()
    add(tmp_path / "empty", "x.tar", {})
    with pytest.raises(DataError, match="contain no sample"):
        resample(str(tmp_path / "empty" / "x.tar"), 1)


def test_resampled_reads_json_labels_and_reports_a_truncated_tar_once(tars: Path) -> None:
    members = {f"{i}.{kind}": x for i in range(9) for kind, x in sample_with_json(i).items()}
    add(tars, "x.tar", members)
    cut = (tars / "x.tar").read_bytes().index(b"3.jpg\0") + 512 + 100  # inside that image
    (tars / "x.tar").write_bytes((tars / "x.tar").read_bytes()[:cut])
    batches = resample(str(tars / "x.tar"), 20, fetch=Fetch(on_bad="skip"))
    assert set(numbers(batches)) == {int(x) for b in batches for x in b.labels} <= set(range(3))
    assert [bad.member for b in batches for bad in b.bad].count("(the tar)") == 1


def sample_with_json(number: int) -> dict[str, bytes]:
    return {"jpg": jpeg(number), "json": b'{"label": %d}' % number}


def test_resampled_images_of_one_class_need_no_label(tars: Path) -> None:
    add(tars, "x.tar", {"a.jpg": jpeg(1)})
    (batch,) = resample(str(tars / "x.tar"), 1, num_classes=1)
    assert batch.labels.tolist() == [0] * 20
    with pytest.raises(DataError, match="has no label"):
        resample(str(tars / "x.tar"), 1)


def test_resampled_shards_without_a_usable_image_stop(tars: Path) -> None:
    add(tars, "x.tar", {"a.jpg": jpeg(1)[:200], "a.cls": b"1"})
    with pytest.raises(DataError, match="bad sample a"):
        resample(str(tars / "x.tar"), 1, fetch=Fetch(on_bad="skip"))
    cut = tars / "set-0000.tar"
    cut.write_bytes(cut.read_bytes()[:9000])
    with pytest.raises(DataError, match=r"set-0000\.tar: the tar cannot be read to its end"):
        resample(str(cut), 1)  # not only when the shuffle buffer returns it
