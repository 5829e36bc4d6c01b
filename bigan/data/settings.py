"""The `data` section of a recipe: which images, and how they get from the shards into memory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from bigan.config import Frozen

SMALL_RESOLUTION = 64  # pixels

Positive = Annotated[int, Field(gt=0)]


class Fetch(Frozen):
    """How samples are fetched and decoded; none of it changes which samples come in which order."""

    # auto: exact for a local folder or with a cache, stream for a URL.
    # exact: index + pread on local shards or a verified cache on the node's disk
    # resident: the whole split, decoded once, in each process's memory
    # stream: shards read front to back, nothing on disk; for URLs and for slow disks
    # resampled: foreign shards without a manifest, drawn with replacement; guarantees nothing
    mode: Literal["auto", "exact", "resident", "stream", "resampled"] = "auto"
    backend: Literal["threads", "processes"] = "threads"
    # Decoding threads (or processes) of each training process. None: 2, or 1 for images of up to
    # 64 px, which are decoded so quickly that threads mostly wait for each other's Python.
    threads: Positive | None = None
    prefetch: Positive = 3  # batches read ahead per process
    on_bad: Literal["stop", "skip"] = "stop"  # skip: the next sample takes the place of a bad one
    allow_pipe: bool = False  # let `pipe:` URLs run shell commands
    cache: Path | None = None  # folder on a disk of the node, for exact mode on a URL
    cache_bytes: Positive | None = None  # the cache is kept below it; None: no limit
    resident_bytes: Positive = 8 * 2**30  # what resident mode may take per process
    connections: Positive = 4  # shards downloaded at once per process

    @model_validator(mode="after")
    def _combinations(self) -> Fetch:
        if self.backend == "processes" and self.mode not in ("auto", "exact"):
            raise ValueError(f"backend: processes cannot be used with mode: {self.mode}")
        return self

    def num_threads(self, resolution: int) -> int:
        """`threads`, or what suits images of this size."""
        return self.threads or (1 if resolution <= SMALL_RESOLUTION else 2)


class DataConfig(Fetch):
    """Where the images come from: a folder written by `bigan pack`, or its URL."""

    path: str  # a folder, or https://..., s3://... of one; resampled: URLs as a {000..099} pattern
    split: str = "train"
    mirror: bool = False  # random horizontal flips; wrong for digits and text
    block: Positive = 65_536  # images shuffled together; the order depends on it

    @field_validator("path", mode="before")
    @classmethod
    def _one_spelling(cls, value: object) -> object:
        """data/digits/ and data/digits are the same folder; a URL is left as it is."""
        text = str(value) if isinstance(value, str | Path) else value
        local = isinstance(text, str) and "://" not in text and not text.startswith("pipe:")
        return str(Path(text)) if local and text else text  # type: ignore[arg-type]
