"""The files of existing shards, and the splits that their names declare."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path

import braceexpand

from bigan.data import DataError
from bigan.data.format import compression
from bigan.data.format.tar import nested_tar_files
from bigan.data.packing.split_names import Split, split_of
from bigan.urls import is_remote, redacted

MAX_SHARDS = 1_000_000  # of a brace pattern


def in_folder(folder: Path) -> list[Path]:
    """The shards in `folder` and in folders below it, sorted by path.

    Raises `DataError` for compressed ones.
    """
    files = nested_tar_files(folder, (".tar", *compression.SUFFIXES))
    for file in files:
        refuse_compressed(str(file))
    return [file for file in files if file.is_file()]


def refuse_compressed(name: str) -> None:
    """Raise `DataError` if the suffix of `name` is that of a compressed tar."""
    kind = compression.by_name(name)
    if kind:
        raise DataError(
            f"{name}: is compressed, but samples are read at any place of a shard; decompress "
            f"the shards with `{kind.program}`"
        )


def expand(pattern: str) -> list[Path]:
    """The local files of a brace pattern such as "shards/{00000..00003}.tar", in its order.

    Raises `DataError` for a URL, an invalid pattern and a missing file.
    """
    if is_remote(pattern):
        raise DataError(f"{redacted(pattern)}: is not a local file; copy the shards here first")
    ranges = re.findall(r"\{(-?\d{1,18})\.\.(-?\d{1,18})(?:\.\.-?\d+)?\}", pattern)
    if math.prod(abs(int(last) - int(first)) + 1 for first, last in ranges) > MAX_SHARDS:
        raise DataError(f"{pattern}: expands to more than {MAX_SHARDS} shards; correct the braces")
    try:
        names = list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        raise DataError(f"{pattern}: cannot be expanded ({error}); correct the braces") from None
    for name in names:
        refuse_compressed(name)
        if not Path(name).is_file():
            raise DataError(f"{name}: shard is missing (of {pattern}); correct the pattern")
    return [Path(name) for name in names]


def below(files: Sequence[str | Path], root: Path | None = None) -> list[str]:
    """The paths relative to `root` (None: the folder that they have in common), with "/"."""
    if root is not None:
        return [Path(file).relative_to(root).as_posix() for file in files]
    parts = [tuple(str(file).split("/")) for file in files]
    start = common([each[:-1] for each in parts])
    return ["/".join(each[start:]) for each in parts]


def common(paths: Sequence[tuple[str, ...]]) -> int:
    """The number of leading parts that all `paths` have in common."""
    if not paths:
        return 0
    levels = zip(min(paths), max(paths), strict=False)  # what these two share, all share
    return sum(1 for _ in itertools.takewhile(lambda parts: parts[0] == parts[1], levels))


def splits(names: Sequence[str], where: str) -> list[Split | None]:
    """The split that folders and file name of each shard declare; `names` are relative to a root.

    Raises `DataError` for a contradiction such as test/train-0000.tar.
    """
    found: list[Split | None] = []
    for name in names:
        declared = {split_of(part) for part in name.removesuffix(".tar").split("/")} - {None}
        if len(declared) > 1:
            raise DataError(
                f"{where}: {name} names two splits, {' and '.join(sorted(map(str, declared)))}; "
                "rename the folder or the shard"
            )
        found.append(declared.pop() if declared else None)
    return found
