"""Pickled batches of CIFAR and idx files of MNIST; no data file executes code."""

from __future__ import annotations

import gzip
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import one_line
from image_folders import num_skipped
from PIL import Image

from bigan.data import DataError
from bigan.data.packing import archives
from bigan.data.packing.sources import open_source

RNG = np.random.default_rng(0)
NUM = 6  # images per batch

# A batch as Python 2 wrote the real ones: uint8 [1, 2] array [[7, 200]] and labels [3], protocol 2.
PYTHON_2 = (
    b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq"
    b"\x04K\x00\x85U\x01b\x87Rq\x05(K\x01K\x01K\x02\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq"
    b"\x07(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x02\x07\xc8tbU\x06labelsq\x08]"
    b"q\tK\x03au."
)


def cifar(root: Path, hundred: bool = False, protocol: int = 2, text: bool = True) -> np.ndarray:
    """Write a small CIFAR to `root`; returns its images, uint8 [N, 32, 32, 3]."""
    root.mkdir(parents=True, exist_ok=True)

    def save(name: str, content: dict[str, Any]) -> None:
        keyed = content if text else {key.encode(): value for key, value in content.items()}
        (root / name).write_bytes(pickle.dumps(keyed, protocol))

    names = ["train", "test"] if hundred else [f"data_batch_{n}" for n in range(1, 6)]
    names += [] if hundred else ["test_batch"]
    images = []
    for n, name in enumerate(names):
        pixels = RNG.integers(0, 256, (NUM, 3072), np.uint8)
        images.append(pixels.reshape(NUM, 3, 32, 32).transpose(0, 2, 3, 1))
        key = "fine_labels" if hundred else "labels"
        save(name, {"data": pixels, key: [(n + i) % 10 for i in range(NUM)], "batch_label": name})
    meta = {"fine_label_names": [f"f{i}" for i in range(100)], "coarse_label_names": ["c"]}
    ten = {"label_names": [f"n{i}" for i in range(10)], "num_vis": 3072}
    save("meta" if hundred else "batches.meta", meta if hundred else ten)
    return np.concatenate(images)


def tarred(root: Path, file: Path) -> Path:
    with tarfile.open(file, "w:gz") as archive:
        archive.add(root, root.name)
    return file


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("text", [True, False])
def test_cifar_10(tmp_path: Path, protocol: int, text: bool) -> None:
    root = tmp_path / "cifar-10-batches-py"
    images = cifar(root, protocol=protocol, text=text)
    for spec in (root, tmp_path, tarred(root, tmp_path / "cifar-10-python.tar.gz")):
        source = open_source(spec, val_fraction=0.4)
        assert (source.name, source.resolution, source.channels) == ("cifar-10", 32, 3)
        assert source.classes == tuple(f"n{i}" for i in range(10))
        assert np.array_equal([image for _, _, image in source], images)
        assert source.labels == tuple((n + i) % 10 for n in range(6) for i in range(NUM))
        assert source.splits[5 * NUM :] == ("test",) * NUM
        assert set(source.splits[: 5 * NUM]) == {"train", "val"}
        assert (source.keys[0], source.keys[-1]) == ("train/000000", "test/000005")
    assert open_source(root, resolution=16).read(0).shape == (16, 16, 3)


def test_cifar_100_has_fine_labels(tmp_path: Path) -> None:
    images = cifar(tmp_path / "cifar-100-python", hundred=True)
    archive = tarred(tmp_path / "cifar-100-python", tmp_path / "x.tar.gz")
    for spec in (tmp_path, archive):
        source = open_source(spec)
        assert source.name == "cifar-100"
        assert source.classes == tuple(f"f{i}" for i in range(100))
        assert source.splits == ("train",) * NUM + ("test",) * NUM
        assert np.array_equal(source.read(NUM), images[NUM])


def test_pickles_of_python_2() -> None:
    batch = archives._load(PYTHON_2, Path("x"))
    assert batch["data"].uint8().tolist() == [[7, 200]]
    assert batch["labels"] == [3]


def test_identity_depends_on_the_content_only(tmp_path: Path) -> None:
    root = tmp_path / "cifar-10-batches-py"
    cifar(root)
    archive = tarred(root, tmp_path / "c.tar.gz")
    assert open_source(root).identity == open_source(archive).identity
    cifar(root)
    assert open_source(root).identity != open_source(archive).identity


class Evil:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickles_execute_no_code(tmp_path: Path, protocol: int) -> None:
    root, proof = tmp_path / "cifar-10-batches-py", tmp_path / "proof"
    cifar(root)
    for evil in (Evil(exec, f"open({str(proof)!r}, 'w')"), Evil(np.save, str(proof), 1), Evil):
        (root / "data_batch_2").write_bytes(pickle.dumps({"data": evil}, protocol))
        with pytest.raises(DataError) as error:
            open_source(root)
        one_line(error, "data_batch_2", "executes no code")
    (root / "data_batch_2").write_bytes(b"cbuiltins\ngetattr\n(c_codecs\nencode\nVx\ntR.")
    with pytest.raises(DataError, match=r"builtins\.getattr"):
        open_source(root)
    assert not list(tmp_path.glob("proof*"))


def test_unpickler_creates_no_numpy_object() -> None:
    """A pickle can contain a false type and size of an array; only stand-ins receive them."""
    for array in (np.zeros((2, 2), np.uint8), np.asarray([{}, 1], object)):
        for protocol in (2, 5):
            found = archives._load(pickle.dumps({"data": array}, protocol), Path("x"))["data"]
            assert type(found) is archives._Array
            assert (found.uint8() is None) == (array.dtype == object)


@pytest.mark.parametrize(
    ("batch", "part"),
    [
        ({"labels": [0] * NUM}, "no data and labels"),
        ({"data": np.zeros((NUM, 3072), np.uint8)}, "no data and labels"),
        ({"data": np.zeros((NUM, 3071), np.uint8), "labels": [0] * NUM}, "not uint8 [N, 3072]"),
        ({"data": np.zeros((NUM, 3072), np.int8), "labels": [0] * NUM}, "not uint8 [N, 3072]"),
        ({"data": np.zeros(3072, np.uint8), "labels": [0]}, "not uint8 [N, 3072]"),
        ({"data": np.zeros((NUM, 3072), np.uint8), "labels": [0]}, "needs 6 labels below 10"),
        ({"data": np.zeros((NUM, 3072), np.uint8), "labels": [10] * NUM}, "needs 6 labels below"),
        ([], "is not a CIFAR file"),
    ],
)
def test_batches_of_wrong_content(tmp_path: Path, batch: Any, part: str) -> None:
    root = tmp_path / "cifar-10-batches-py"
    cifar(root)
    (root / "data_batch_3").write_bytes(pickle.dumps(batch, 2))
    with pytest.raises(DataError) as error:
        open_source(root)
    one_line(error, "data_batch_3", part)


@pytest.mark.parametrize("name", ["data_batch_4", "test_batch", "batches.meta"])
def test_missing_and_damaged_batches(tmp_path: Path, name: str) -> None:
    root = tmp_path / "cifar-10-batches-py"
    cifar(root)
    content = (root / name).read_bytes()
    for damaged in (b"", content[: len(content) // 2], b"\x80\x02\x8a\xff"):
        (root / name).write_bytes(damaged)
        with pytest.raises(DataError) as error:
            open_source(root)
        one_line(error, name, "is damaged")
    (root / name).unlink()
    for spec in (root, tarred(root, tmp_path / "c.tar.gz")):
        with pytest.raises(DataError) as error:
            open_source(spec)
        one_line(error, f"{name} is missing")


def test_two_data_sets_in_one_folder(tmp_path: Path) -> None:
    cifar(tmp_path / "cifar-10-batches-py")
    cifar(tmp_path / "cifar-100-python", hundred=True)
    with pytest.raises(DataError, match="several data sets"):
        open_source(tmp_path)


def test_common_file_names_are_not_cifar(tmp_path: Path) -> None:
    """Files "train" and "test" beside photos; only all three names together are CIFAR-100."""
    (tmp_path / "cats").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "cats" / "1.png")
    for name in ("train", "test"):
        (tmp_path / name).write_text("cats/1.png\n")
    source = open_source(tmp_path, resolution=8)
    assert (source.keys, num_skipped(source)) == (("1.png",), 2)
    images = cifar(tmp_path, hundred=True)
    assert len(open_source(tmp_path)) == len(images)


def test_damaged_and_unrelated_gzip_archives(tmp_path: Path) -> None:
    cifar(tmp_path / "cifar-10-batches-py")
    data = tarred(tmp_path / "cifar-10-batches-py", tmp_path / "c.tar.gz").read_bytes()
    flipped = bytearray(data)
    flipped[-6] ^= 1  # gzip's checksum at the very end
    for name, content in [
        ("cut.tar.gz", data[: len(data) // 2]),
        ("end.tar.gz", data[:-9]),
        ("rot.tar.gz", bytes(flipped)),
        ("photos.tar.gz", gzip.compress(b"text" * 500)[:-9]),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError) as error:
            open_source(tmp_path / name, scratch=tmp_path / "scratch")
        one_line(error, name, "damaged")
    (tmp_path / "x.gz").write_bytes(gzip.compress(b"text" * 500))
    with pytest.raises(DataError) as error:
        open_source(tmp_path / "x.gz", scratch=tmp_path / "scratch")
    one_line(error, "x.gz", "contains no tar")


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + np.asarray(array.shape, ">u4").tobytes() + array.tobytes()


def mnist(root: Path, dash: str = "-", zipped: bool = False) -> np.ndarray:
    root.mkdir(exist_ok=True)
    images = RNG.integers(0, 256, (10, 28, 28), np.uint8)
    labels = np.asarray([3, 1, 4, 1, 5, 9, 2, 6, 5, 3], np.uint8)
    for prefix, rows in (("train", slice(7)), ("t10k", slice(7, 10))):
        for name, array in (("images-idx3", images[rows]), ("labels-idx1", labels[rows])):
            data = idx(array)
            body, _, kind = name.rpartition("-")
            file = f"{prefix}-{body}{dash}{kind}-ubyte" + (".gz" if zipped else "")
            (root / file).write_bytes(gzip.compress(data) if zipped else data)
    return images


@pytest.mark.parametrize("dash", ["-", "."])
@pytest.mark.parametrize("zipped", [False, True])
def test_mnist(tmp_path: Path, dash: str, zipped: bool) -> None:
    images = mnist(tmp_path / "fashion", dash, zipped)
    source = open_source(tmp_path / "fashion")
    assert (source.name, source.resolution, source.channels) == ("fashion", 28, 1)
    assert np.array_equal([image[..., 0] for _, _, image in source], images)
    assert source.labels == (3, 1, 4, 1, 5, 9, 2, 6, 5, 3)
    assert source.classes == tuple(str(i) for i in range(10))
    assert source.splits == ("train",) * 7 + ("test",) * 3
    colour = open_source(tmp_path / "fashion", channels=3, resolution=32, allow_upscale=True)
    assert colour.read(0).shape == (32, 32, 3)


def test_mnist_labels_from_1(tmp_path: Path) -> None:
    """As of EMNIST's letters: no empty class 0."""
    mnist(tmp_path)
    for prefix, labels in (("train", [1, 2, 3, 1, 2, 3, 1]), ("t10k", [3, 2, 1])):
        (tmp_path / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(np.asarray(labels, np.uint8)))
    source = open_source(tmp_path)
    assert source.classes == ("1", "2", "3")
    assert source.labels == (0, 1, 2, 0, 1, 2, 0, 2, 1, 0)


def test_mnist_without_test_files_is_split_by_hash(tmp_path: Path) -> None:
    mnist(tmp_path)
    for file in tmp_path.glob("t10k*"):
        file.unlink()
    source = open_source(tmp_path, test_fraction=0.5)
    assert len(source) == 7
    assert set(source.splits) == {"train", "test"}


@pytest.mark.parametrize(
    ("file", "content", "part"),
    [
        ("train-images-idx3-ubyte", b"", "not an idx3-ubyte"),
        ("train-images-idx3-ubyte", b"<html>not found here</html>", "not an idx3-ubyte"),
        ("train-labels-idx1-ubyte", idx(np.zeros((7, 1), np.uint8)), "not an idx1-ubyte"),
        ("train-images-idx3-ubyte", idx(np.zeros((7, 28, 28), np.uint8))[:-1], "expected 5488"),
        ("train-images-idx3-ubyte", idx(np.zeros((7, 28, 28), np.uint8)) + b"x", "holds more"),
        ("train-labels-idx1-ubyte", idx(np.zeros(6, np.uint8)), "but 6 labels"),
        ("t10k-images-idx3-ubyte", idx(np.zeros((3, 14, 14), np.uint8)), "another size"),
        ("train-images-idx3-ubyte", b"\0\0\x08\3" + b"\xff" * 12, "impossible size"),
        ("t10k-labels-idx1-ubyte", None, "t10k-labels-idx1-ubyte is missing"),
    ],
)
def test_damaged_idx_files(tmp_path: Path, file: str, content: bytes | None, part: str) -> None:
    mnist(tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError) as error:
        open_source(tmp_path)
    one_line(error, part)


def test_damaged_gzip_of_an_idx_file(tmp_path: Path) -> None:
    mnist(tmp_path, zipped=True)
    file = tmp_path / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError) as error:
        open_source(tmp_path)
    one_line(error, "train-images", "cannot be read")
