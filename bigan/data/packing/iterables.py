"""Any Python iterable as a source: a list, a generator, a torch Dataset.

The iterable is read once, in this process. Every image is converted at once and appended to a file
of raw pixels, from which it is read later; only keys and labels are kept in memory.
"""

from __future__ import annotations

import copy
import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bigan.data import DataError
from bigan.data.format.codec import BadImageError, Pixels, first_line
from bigan.data.format.convert import MODES, decode_any, plain
from bigan.data.packing.listing import Listing, number_labels, read_at
from bigan.image_size import ImageSize, sides

Shrink = Callable[[Image.Image, ImageSize], Pixels]  # (image, resolution) -> uint8 [H, W, C]


def iterable(
    items: Iterable[Any],
    resolution: ImageSize | None,
    channels: int,
    shrink: Shrink,
    scratch: Path,
    max_pixels: int | None = None,
    with_labels: bool = True,
) -> Listing:
    """Spool the images of `items` to the file `scratch`, or to a file in the folder `scratch`.

    An item is an image, (image, label) or {"image": ..., "label": ..., "key": ...}. An image is a
    PIL image, a uint8 array HW or HWC, a uint8 tensor HWC or CHW, the bytes or the path of an image
    file. An object with a length is indexed from 0 to n - 1, any other one is iterated. Class names
    are those in `items.classes` (torchvision's data sets) if there are enough; there is one class
    without `with_labels`. Unusable items are in `bad`. The caller deletes the file.

    Raises `DataError` if `resolution` is None and the first image is not square, and if the
    iterable itself fails.
    """
    file = scratch / "pixels.raw" if scratch.is_dir() else scratch
    file.parent.mkdir(parents=True, exist_ok=True)
    spooled = _spool(items, resolution, shrink, file, max_pixels)
    given = spooled.labels if with_labels else [None] * len(spooled.labels)
    classes, numbers = number_labels(given, _names(items))
    kept = [i for i, label in enumerate(numbers) if isinstance(label, int)]
    unlabelled = [
        (spooled.keys[i], label) for i, label in enumerate(numbers) if isinstance(label, str)
    ]
    labels = tuple(label for label in numbers if isinstance(label, int))
    spooled.content.update(repr((classes, labels)).encode("utf-8", "surrogatepass"))
    shape = (*sides(spooled.resolution or 0), channels)
    size = shape[0] * shape[1] * shape[2]

    def original(i: int) -> Pixels:
        return np.frombuffer(read_at(file, kept[i] * size, size), np.uint8).reshape(shape)

    return Listing(
        name=type(items).__name__,
        identity=spooled.content.hexdigest(),
        classes=classes,
        keys=tuple(spooled.keys[i] for i in kept),
        labels=labels,
        original=original,
        bad=(*spooled.bad, *unlabelled),
        resolution=spooled.resolution,
        channels=channels,
    )


@dataclass
class _Spooled:
    """The images in the spool file, in order: keys, labels as given, and a hash of the pixels."""

    resolution: ImageSize | None
    keys: list[str] = field(default_factory=list)
    labels: list[Any] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    content: Any = field(default_factory=hashlib.sha256)


def _spool(
    items: Iterable[Any],
    resolution: ImageSize | None,
    shrink: Shrink,
    file: Path,
    max_pixels: int | None,
) -> _Spooled:
    """Convert every item and append its pixels to `file`."""
    spooled = _Spooled(resolution)
    seen: set[str] = set()
    with file.open("wb") as spool:
        for number, item in enumerate(_items(items)):
            key = f"{number:09d}"
            try:
                if isinstance(item, Exception):
                    raise BadImageError(f"raises an error ({first_line(item)})")
                given, label, key = _parts(item, key)
                if key in seen:
                    raise BadImageError("appears twice")
                image = _to_image(given, max_pixels)
                if spooled.resolution is None:
                    spooled.resolution = _square_size(image)
                pixels = shrink(image, spooled.resolution)
            except (BadImageError, OSError) as error:
                spooled.bad.append((key, first_line(error)))
                continue
            seen.add(key)
            spooled.keys.append(key)
            spooled.labels.append(label)
            raw = pixels.tobytes()
            spool.write(raw)
            spooled.content.update(raw)
    return spooled


def _square_size(image: Image.Image) -> int:
    if image.width != image.height:
        raise DataError(
            f"the first image is {image.width}x{image.height}; set the resolution of the packed "
            "images, e.g. --resolution 64"
        )
    return image.width


def _items(items: Iterable[Any]) -> Iterator[Any]:
    """The items in order; where `items[i]` fails, its exception."""
    if isinstance(items, Mapping):
        raise DataError("a dict is not a list of images; give its values()")
    items = _in_this_process(items)
    if hasattr(items, "__len__") and hasattr(items, "__getitem__"):
        indexed: Any = items
        for i in range(len(indexed)):  # a torch Dataset need not end with IndexError
            try:
                item = indexed[i]
            except Exception as error:  # user code may raise anything
                item = error
            yield item
        return
    number = 0
    try:
        for number, item in enumerate(items, 1):  # noqa: B007
            yield item
    except (DataError, BadImageError):
        raise
    except Exception as error:
        raise DataError(
            f"{type(items).__name__}: fails after {number} images "
            f"({type(error).__name__}: {first_line(error)}); correct the iterable"
        ) from error


def _in_this_process(items: Any) -> Any:
    """A torch DataLoader or WebDataset WebLoader without worker processes; other objects as is.

    Workers send images through /dev/shm. If that is full (64 MiB in Docker), or a worker is killed,
    the loader prints tracebacks and waits forever. Raises `DataError` for a loader of batches.
    """
    torch_data = sys.modules.get("torch.utils.data")  # not imported: no loader
    if torch_data is not None and isinstance(items, torch_data.DataLoader):
        if items.batch_size is not None or items.batch_sampler is not None:
            raise DataError("DataLoader: gives batches, not images; set batch_size=None")
        items = copy.copy(items)
        items.num_workers = items.timeout = 0
    elif isinstance(stages := getattr(items, "pipeline", None), list):
        changed = [_in_this_process(stage) for stage in stages]
        if any(new is not old for new, old in zip(changed, stages, strict=True)):
            items = copy.copy(items)
            items.pipeline = changed
    return items


def _parts(item: Any, key: str) -> tuple[Any, Any, str]:
    """(image, label or None, key) of an item."""
    if isinstance(item, Mapping):
        if "image" not in item:
            raise BadImageError(f"has no 'image' ({', '.join(map(str, item))})")
        key = str(item.get("key", key))
        if not key.isprintable():
            raise BadImageError(f"has the unprintable key {key!r:.60}")
        return item["image"], item.get("label"), key
    if isinstance(item, tuple | list):
        if len(item) != 2:
            raise BadImageError(f"is a {type(item).__name__} of {len(item)}, not (image, label)")
        return item[0], item[1], key
    return item, None, key


def _to_image(value: Any, max_pixels: int | None) -> Image.Image:
    if isinstance(value, str | Path):
        value = Path(value).read_bytes()
    if isinstance(value, bytes | bytearray | memoryview):
        return decode_any(bytes(value), True, max_pixels)
    if hasattr(value, "detach"):  # a torch tensor
        try:
            value = value.detach().cpu().numpy()
        except TypeError as error:  # bfloat16
            raise BadImageError(f"cannot be an array ({first_line(error)})") from error
        if value.ndim == 3 and value.shape[0] in MODES and value.shape[2] not in MODES:
            value = value.transpose(1, 2, 0)
    if not isinstance(value, np.ndarray | Image.Image):
        raise BadImageError(f"is of type {type(value).__name__}, not an image")
    try:
        return plain(value, True, max_pixels)
    except BadImageError:
        raise
    except Exception as error:  # a PIL image decodes its file here
        raise BadImageError(f"cannot be read as an image ({first_line(error)})") from error


def _names(items: Any) -> tuple[str, ...]:
    names = getattr(items, "classes", ())
    texts = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    return tuple(names) if texts else ()
