"""The `data` section of a config: the data set, and how its samples are read and decoded."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from typing import Literal

from pydantic import FieldSerializationInfo, field_serializer, field_validator

from bigan.config import CREDENTIALS, Frozen, Positive
from bigan.data import DataError
from bigan.image_size import ImageSize, num_pixels
from bigan.urls import is_remote, redacted

SMALL_PIXELS = 64 * 64


class Fetch(Frozen):
    """How samples are read and decoded. Nothing here changes the images or their order."""

    # auto: random_access for a local folder or with a cache, stream for a URL
    # random_access: index + pread on local shards or on a verified cache on a disk of the node
    # resident: the whole split, decoded once, in the memory of each process
    # stream: shards are read sequentially without a copy on disk; for URLs and slow disks
    # resampled: shards without a manifest, sampled with replacement; no guarantees
    mode: Literal["auto", "random_access", "resident", "stream", "resampled"] = "auto"
    # none: labels are ignored; the images are of one class, for unconditional training
    labels: Literal["given", "none"] = "given"
    # Decoding threads of each process. None: 2, or 1 for images of up to 64 px, whose decoding
    # takes so little time that several threads mostly compete for Python's lock.
    threads: Positive | None = None
    prefetch: Positive = 3  # batches read ahead per process
    on_bad: Literal["stop", "skip"] = "stop"  # skip: replace an undecodable sample by the next one
    allow_pipe: bool = False  # allow `pipe:` URLs to run shell commands
    # Folder on a disk of the node: what was read from a URL, or a copy of the shards of a folder
    # (`bigan stage`). It may contain environment variables of the node, as in $TMPDIR/bigan.
    cache: Path | None = None
    cache_bytes: Positive | None = None  # upper limit of the cache; None: no limit
    resident_bytes: Positive = 8 * 2**30  # upper limit of resident mode per process
    connections: Positive = 4  # concurrent downloads per process
    # How long a store that does not answer is waited for; less than the time-out of collectives.
    patience_seconds: Positive = 300

    def cache_folder(self) -> Path | None:
        """`cache` on this node; raises `DataError` for an environment variable that is not set."""
        if self.cache is None:
            return None

        def value(found: re.Match[str]) -> str:
            name = found[1] or found[2]
            if not os.environ.get(name):
                raise DataError(
                    f"data.cache = {self.cache}: {name} is not set on {socket.gethostname()}; "
                    "export it there, or use another data.cache (null: none)"
                )
            return os.environ[name]

        return Path(re.sub(r"\$(?:(\w+)|\{(\w+)\})", value, str(self.cache))).expanduser()

    def num_threads(self, resolution: ImageSize) -> int:
        """`threads`, or the default for images of this size."""
        return self.threads or (1 if num_pixels(resolution) <= SMALL_PIXELS else 2)


class DataConfig(Fetch):
    """The data set: a folder written by `bigan pack`, or its URL."""

    # A folder, or https://..., s3://... of one; resampled: also a {000..099} pattern of URLs.
    path: str
    split: str = "train"
    mirror: bool = False  # random horizontal flips; unsuitable for digits and text
    block: Positive = 65_536  # images that are shuffled together; the order depends on it
    # Parts of the data set that are read side by side; the order depends on it. Ranks whose number
    # divides it read different shards. None: 1 for a folder; for a URL, chosen from the batch.
    lanes: Positive | None = None

    @field_validator("path", mode="before")
    @classmethod
    def _normalize(cls, value: object) -> object:
        """data/digits/ becomes data/digits; URLs stay unchanged."""
        text = str(value) if isinstance(value, str | Path) else value
        local = isinstance(text, str) and not is_remote(text)
        return str(Path(text)) if local and text else text  # type: ignore[arg-type]

    @field_serializer("path", when_used="json")
    def _without_credentials(self, path: str, info: FieldSerializationInfo) -> str:
        """What is stored (config.yaml, MLflow) has no password and no signature."""
        return path if info.context == CREDENTIALS else redacted(path)
