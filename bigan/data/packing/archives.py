"""Data sets with their own file formats: CIFAR-10/100 (Python version) and MNIST's idx files.

The batches of CIFAR are pickles. They are read without executing code: the constructors that occur
in them are replaced by stand-ins that only store their arguments, and any other one is refused.
Sources: A. Krizhevsky, Learning multiple layers of features from tiny images, 2009,
https://www.cs.toronto.edu/~kriz/cifar.html; Y. LeCun, C. Cortes, C. Burges, The MNIST database.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import pickle
import tarfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigan.data import DataError
from bigan.data.format.codec import Pixels, first_line
from bigan.data.packing.listing import MAX_BYTES, Listing

IDX_LIMIT = 2**33  # bytes; a header with a larger size is damaged


@dataclass(frozen=True)
class _Cifar:
    """A version of CIFAR: its folder, (file, split) of every batch, and its keys of labels."""

    folder: str
    batches: tuple[tuple[str, str], ...]
    labels: str
    meta: str
    names: str

    @property
    def files(self) -> tuple[str, ...]:
        return (*(name for name, _ in self.batches), self.meta)


CIFAR = (
    _Cifar(
        "cifar-10-batches-py",
        (*((f"data_batch_{n}", "train") for n in range(1, 6)), ("test_batch", "test")),
        "labels",
        "batches.meta",
        "label_names",
    ),
    _Cifar(
        "cifar-100-python",
        (("train", "train"), ("test", "test")),
        "fine_labels",
        "meta",
        "fine_label_names",
    ),
)


def find_cifar(root: Path) -> tuple[Path, _Cifar] | None:
    """(folder of the CIFAR batches, version) if `root` is or contains that folder.

    CIFAR-100's files have common names ("train", "test", "meta"), so a folder with another name
    must contain all of them. Raises `DataError` if both versions are there.
    """
    found = [
        (root, kind)
        for kind in CIFAR
        if (any if root.resolve().name == kind.folder else all)(
            (root / name).is_file() for name in kind.files
        )
    ]
    found += [(root / kind.folder, kind) for kind in CIFAR if (root / kind.folder).is_dir()]
    if len(found) > 1:
        names = " and ".join(folder.name for folder, _ in found)
        raise DataError(f"{root}: contains several data sets ({names}); give one of these folders")
    return found[0] if found else None


def cifar_folder(folder: Path, kind: _Cifar) -> Listing:
    """The extracted CIFAR batches in `folder`, with their official test split."""
    contents = {f: (folder / f).read_bytes() for f in kind.files if (folder / f).is_file()}
    return _cifar(contents, kind, folder)


def is_cifar_tar(file: Path) -> bool:
    """Whether a compressed tar starts with a file or folder of CIFAR."""
    try:
        with tarfile.open(file, "r|*") as archive:
            first = archive.next()
            return first is not None and any(
                f"{first.name.removeprefix('./')}/".startswith(f"{kind.folder}/") for kind in CIFAR
            )
    except (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError):
        return False


def cifar_tar(file: Path, opener: Callable[[Path], Any] = gzip.open) -> Listing:
    """CIFAR as downloaded (.tar.gz), opened by `opener`; nothing is extracted to disk.

    Raises `DataError` if the file is damaged or contains no CIFAR.
    """
    wanted = {f"{kind.folder}/{name}": kind for kind in CIFAR for name in kind.files}
    contents: dict[str, bytes] = {}
    kinds: set[_Cifar] = set()
    try:
        with opener(file) as unzipped, tarfile.open(fileobj=unzipped, mode="r|") as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                if name in wanted and member.isreg() and member.size <= MAX_BYTES:
                    content = archive.extractfile(member)
                    assert content is not None  # it is a regular file
                    contents[name.split("/")[1]] = content.read()
                    kinds.add(wanted[name])
            while unzipped.read(2**20):  # the checksum of gzip is at the end
                pass
    except (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError) as error:
        raise DataError(
            f"{file}: is a damaged .tar.gz ({first_line(error)}); download it again"
        ) from None
    if len(kinds) != 1:
        raise DataError(
            f"{file}: contains no CIFAR-10 or CIFAR-100; extract it and give the folder"
        )
    return _cifar(contents, kinds.pop(), file)


def _cifar(contents: Mapping[str, bytes], kind: _Cifar, where: Path) -> Listing:
    for name in kind.files:
        if name not in contents:
            raise DataError(f"{where}: {name} is missing; download {kind.folder} again")
    classes = _load(contents[kind.meta], where / kind.meta).get(kind.names)
    if not (isinstance(classes, list) and classes):
        raise DataError(f"{where / kind.meta}: has no {kind.names}; download it again")
    names = tuple(n.decode() if isinstance(n, bytes) else str(n) for n in classes)
    images: list[Pixels] = []
    labels: list[int] = []
    official: list[str] = []
    for name, split in kind.batches:
        batch = _load(contents[name], where / name)
        rows, found = batch.get("data"), batch.get(kind.labels)
        if not isinstance(rows, _Array) or not isinstance(found, list):
            raise DataError(f"{where / name}: has no data and {kind.labels}; download it again")
        pixels = rows.uint8()
        if pixels is None or pixels.ndim != 2 or pixels.shape[1:] != (3072,):
            raise DataError(f"{where / name}: data is not uint8 [N, 3072]; download it again")
        valid = all(isinstance(x, int) and 0 <= x < len(names) for x in found)
        if len(found) != len(pixels) or not valid:
            raise DataError(
                f"{where / name}: needs {len(pixels)} {kind.labels} below {len(names)}; "
                "download it again"
            )
        images.append(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels += found
        official += [split] * len(found)
    name = kind.folder.removesuffix("-python").removesuffix("-batches-py")
    return _arrays(name, np.concatenate(images), labels, official, names, 3)


def _arrays(
    name: str,
    images: Pixels,
    labels: list[int],
    official: list[str],
    classes: tuple[str, ...],
    channels: int,
) -> Listing:
    content = hashlib.sha256(repr(classes).encode("utf-8", "surrogateescape"))
    content.update(np.asarray(labels, np.int32).tobytes())
    content.update(np.ascontiguousarray(images).data)
    counts = {"train": 0, "test": 0}
    keys: list[str] = []
    for split in official:
        keys.append(f"{split}/{counts[split]:06d}")
        counts[split] += 1
    return Listing(
        name=name,
        identity=content.hexdigest(),
        classes=classes,
        keys=tuple(keys),
        labels=tuple(labels),
        original=lambda i: images[i],
        official=tuple(official),
        resolution=images.shape[1] if images.shape[1] == images.shape[2] else None,
        channels=channels,
    )


class _Dtype:
    """Replaces numpy.dtype: stores its code and ignores its state (byte order)."""

    def __init__(self, code: Any = "", *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        pass


class _Array:
    """Replaces numpy.ndarray: stores the state from which it would be built."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def uint8(self) -> Pixels | None:
        """The array if it is C-contiguous uint8 and complete, else None."""
        match self.state:
            case (_, tuple(shape), _Dtype(code="u1"), False | 0, str() | bytes() as raw):
                raw = raw.encode("latin1") if isinstance(raw, str) else raw
            case _:
                return None
        valid = all(isinstance(n, int) and n >= 0 for n in shape)
        array: NDArray[np.uint8] = np.frombuffer(raw, np.uint8)
        return array.reshape(shape) if valid and array.size == np.prod(shape) else None


def _from_buffer(raw: Any, dtype: Any, shape: Any, order: Any = "C") -> _Array:
    """Replaces the array constructor of pickle protocol 5."""
    array = _Array()
    array.state = (1, shape, dtype, order != "C", bytes(raw))
    return array


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """Replaces the encoding of bytes in pickle protocols before 3."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"unexpected encoding {encoding!r:.20}")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
    ("_codecs", "encode"): _encode,
}
for _core in ("numpy.core", "numpy._core"):
    _ALLOWED[_core + ".multiarray", "_reconstruct"] = _Array
    _ALLOWED[_core + ".numeric", "_frombuffer"] = _from_buffer


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise _CodeError(f"{module}.{name}")
        return _ALLOWED[module, name]


class _CodeError(Exception):
    pass


def _load(content: bytes, where: Path) -> dict[str, Any]:
    """The dict in a pickle, with str keys; only the stand-ins are ever called."""
    try:
        found = _Unpickler(io.BytesIO(content), encoding="latin1").load()
    except _CodeError as error:
        raise DataError(
            f"{where}: refers to {error}; bigan executes no code from data files; download it again"
        ) from None
    except Exception as error:  # a damaged pickle raises anything
        raise DataError(f"{where}: is damaged ({first_line(error)}); download it again") from None
    if not isinstance(found, dict):
        raise DataError(f"{where}: is not a CIFAR file; download it again")
    return {k.decode("latin1") if isinstance(k, bytes) else str(k): v for k, v in found.items()}


def find_idx(root: Path, stem: str) -> Path | None:
    """The file of an idx array such as "train-images-idx3" in `root`, in any common spelling."""
    body, _, kind = stem.rpartition("-")
    names = [f"{body}{dash}{kind}-ubyte{zipped}" for zipped in ("", ".gz") for dash in "-."]
    return next((root / name for name in names if (root / name).is_file()), None)


def is_mnist(root: Path) -> bool:
    return find_idx(root, "train-images-idx3") is not None


def mnist(root: Path) -> Listing:
    """MNIST, Fashion-MNIST and similar sets as idx files; t10k-* is the official test split.

    Class names are "0", "1", ... up to the largest label; labels 1 to K (EMNIST's letters) are K
    classes. Raises `DataError` for a file that is missing, damaged or inconsistent with the others.
    """
    images: list[Pixels] = []
    labels: list[int] = []
    official: list[str] = []
    for prefix, split in (("train", "train"), ("t10k", "test")):
        stems = [f"{prefix}-images-idx3", f"{prefix}-labels-idx1"]
        image_file, classes = (find_idx(root, stem) for stem in stems)
        if split == "test" and image_file is None and classes is None:
            continue
        if image_file is None or classes is None:
            missing = stems[0] if image_file is None else stems[1]
            raise DataError(f"{root}: {missing}-ubyte is missing; download it again")
        pixels, numbers = _idx(image_file, 3), _idx(classes, 1)
        if len(pixels) != len(numbers) or (images and pixels.shape[1:] != images[0].shape[1:]):
            raise DataError(
                f"{image_file}: has images {list(pixels.shape)}, but {len(numbers)} labels "
                "(or another size than the training images); download both again"
            )
        images.append(pixels)
        labels += numbers.tolist()
        official += [split] * len(numbers)
    largest = max(labels, default=-1)
    first = int(set(labels) == set(range(1, largest + 1)))
    names = tuple(str(n) for n in range(first, largest + 1))
    labels = [label - first for label in labels]
    return _arrays(root.resolve().name, np.concatenate(images), labels, official, names, 1)


def _idx(file: Path, num_axes: int) -> Pixels:
    """A uint8 idx array: bytes 0 0 8 axes, the sizes as big-endian u32, the values."""
    header_size = 4 + 4 * num_axes
    try:
        with gzip.open(file) if file.name.endswith(".gz") else file.open("rb") as stream:
            header = stream.read(header_size)
            if len(header) < header_size or header[:4] != bytes((0, 0, 8, num_axes)):
                raise DataError(f"{file}: is not an idx{num_axes}-ubyte file; download it again")
            shape = np.frombuffer(header, ">u4", num_axes, 4).tolist()
            expected = int(np.prod(shape, dtype=object))
            if expected > IDX_LIMIT:
                raise DataError(f"{file}: has the impossible size {shape}; download it again")
            content = stream.read(expected + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{file}: cannot be read ({first_line(error)}); download it again"
        ) from None
    if len(content) != expected:
        found = len(content) if len(content) < expected else "more"
        raise DataError(f"{file}: holds {found} bytes, expected {expected}; download it again")
    return np.frombuffer(content, np.uint8).reshape(shape)
