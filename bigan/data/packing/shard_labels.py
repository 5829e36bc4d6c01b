"""Classes and splits of the samples of several shards, from names and labels as written. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from bigan.data import DataError
from bigan.data.format.manifest import UNLABELLED
from bigan.data.packing.listing import class_order, number_labels
from bigan.data.packing.shard_files import common, splits
from bigan.data.packing.split_names import other_words, split_of
from bigan.data.packing.tar_samples import (
    NO_IMAGE,
    TEXT,
    WITHOUT_LABELS,
    Sample,
    UnsuitableError,
)

Keyed = tuple[str, Sample]  # (path of the shard without .tar, sample)


@dataclass(frozen=True)
class Labelled:
    """Class names; of every sample its class number, or the reason it has none, and its split.

    splits: None if no name declares one.
    """

    classes: tuple[str, ...]
    numbers: list[int | str]
    splits: list[str] | None


def label_samples(
    samples: Sequence[Keyed],
    where: str,
    bad: Sequence[tuple[str, str]] = (),
    with_labels: bool = True,
) -> Labelled:
    """The classes and splits of all `samples` of a data set; `bad` are its unusable members.

    Splits are those in the paths of the shards, in the .json of the samples, or of the folders in
    the tars if all of those are splits; other samples are training images.

    Labels are class numbers or class names (`listing.number_labels`) at one place. A `.txt` is a
    label if every sample has one that could be a class name and each text occurs twice on average;
    else it is a caption. Without labels, the class is the folder of the image or shard. With
    neither, and without `with_labels`, there is one class.

    Raises `UnsuitableError` for labels at several places or that contradict each other, images
    without a label beside labels without an image, and tars that may be one class each; `DataError`
    for contradictory splits.
    """
    folders = [tuple(sample.key.split("/")[:-1]) for _, sample in samples]
    folders, in_tars = _split_folders(folders, where)
    shards = [*dict.fromkeys(name for name, _ in samples)]
    declared = dict(zip(shards, splits(shards, where), strict=True))
    in_json = [sample.split for _, sample in samples]
    _check_json(samples, in_json, where)
    found: list[str | None] = []
    for (name, sample), *inner in zip(samples, in_json, in_tars, strict=True):
        named = [split for split in (declared[name], *inner) if split]
        if len(set(named)) > 1:
            raise DataError(
                f"{where}: {name}/{sample.key} names two splits, {named[0]} and {named[-1]}; "
                "rename the shard or the folder in it, or correct its .json"
            )
        found.append(named[0] if named else None)
    official = [split or "train" for split in found] if any(found) else None
    labels = _written(samples, where, bad) if with_labels else None
    if labels is not None:
        _check_kinds(samples, labels, found, where)
        _check_folders(samples, labels, folders, where)
    names = _by_folder(samples, folders, where) if with_labels and labels is None else None
    _check_stray(samples, found, where)
    if names is not None:
        classes = class_order(names)
        number = {name: n for n, name in enumerate(classes)}
        return Labelled(classes, [number[name] for name in names], official)
    if labels is None:
        return Labelled(UNLABELLED, [0] * len(samples), official)
    return Labelled(*number_labels(labels), official)


def _check_json(samples: Sequence[Keyed], in_json: Sequence[str | None], where: str) -> None:
    """Raise `UnsuitableError` if only some samples have a split in their .json."""
    if any(in_json) and not all(in_json):
        has = [bool(split) for split in in_json]
        (a, one), (b, other) = samples[has.index(True)], samples[has.index(False)]
        raise UnsuitableError(
            f"{where}: {a}/{one.key} has a split in its .json but {b}/{other.key} has none; write "
            "a split for every sample, or for none"
        )


def _check_stray(samples: Sequence[Keyed], found: Sequence[str | None], where: str) -> None:
    """Raise `UnsuitableError` for an image in a folder "test" or "val" that is of another split."""
    for (name, sample), split in zip(samples, found, strict=True):
        for folder in sample.key.split("/")[:-1]:
            declared = split_of(folder)
            if declared in ("val", "test") and declared != split and not other_words(folder):
                raise UnsuitableError(
                    f"{where}: {name}/{sample.key} is in a folder with the name of a split, but "
                    "not all images are in such folders at one level; rename the folder"
                )


def _check_kinds(
    samples: Sequence[Keyed],
    labels: Sequence[int | str | None],
    found: Sequence[str | None],
    where: str,
) -> None:
    """Raise `UnsuitableError` if numbers and names of classes are inconsistent.

    They are if one split has only numbers and another one only names, or if the samples with both
    give one number two names, or one name two numbers.
    """
    kinds: dict[str, set[type]] = {}
    partner: dict[int | str, tuple[int | str, str]] = {}
    for (name, sample), label, split in zip(samples, labels, found, strict=True):
        if label is None:
            continue
        kinds.setdefault(split or "train", set()).add(type(label))
        if sample.other is None:
            continue
        for a, b in ((label, sample.other), (sample.other, label)):
            known, first = partner.setdefault(a, (b, f"{name}/{sample.key}"))
            if known != b:
                raise UnsuitableError(
                    f"{where}: {first} has the labels {a} and {known}, but {name}/{sample.key} has "
                    f"{a} and {b}; correct or remove one of the labels; {WITHOUT_LABELS}"
                )
    one = {next(iter(kind)): split for split, kind in kinds.items() if len(kind) == 1}
    if len(one) > 1:
        raise UnsuitableError(
            f"{where}: the labels of {one[int]} are class numbers, but those of {one[str]} are "
            f"class names; write the same for all splits; {WITHOUT_LABELS}"
        )


def _check_folders(
    samples: Sequence[Keyed],
    labels: Sequence[int | str | None],
    folders: Sequence[tuple[str, ...]],
    where: str,
) -> None:
    """Raise `UnsuitableError` for a class name that is the folder of other images."""
    start = common(folders)
    tops = [folder[start] if len(folder) > start else "" for folder in folders]
    known = set(tops)
    for (name, sample), label, top in zip(samples, labels, tops, strict=True):
        if isinstance(label, str) and label != top and label in known:
            raise UnsuitableError(
                f"{where}: {name}/{sample.key} has label {label} in {sample.place}, but there is a "
                f"folder {label} for other images; correct one of them; {WITHOUT_LABELS}"
            )


def _split_folders(
    folders: list[tuple[str, ...]], where: str
) -> tuple[list[tuple[str, ...]], list[str | None]]:
    """(folders without the level of the splits, the split of each) of the folders in the tars.

    The level is the first one in which they differ if all of its folders are splits, else the next
    one (CLASS/SPLIT).
    """
    start = common(folders)
    above = {split_of(part) for part in folders[0][:start]} - {None} if folders else set()
    for level in (start, start + 1):
        names = {folder[level] if len(folder) > level else "" for folder in folders}
        declared = {name: split_of(name) for name in sorted(names)}
        if None not in declared.values():
            break
    else:
        return folders, [above.pop() if len(above) == 1 else None] * len(folders)
    by_split = {split: name for name, split in declared.items()}
    for name, split in declared.items():
        if by_split[split] != name:
            raise UnsuitableError(
                f"{where}: the folders {name} and {by_split[split]} in the tars are both {split} "
                "splits; rename one"
            )
    return (
        [folder[:level] + folder[level + 1 :] for folder in folders],
        [declared[folder[level]] for folder in folders],
    )


def _written(
    samples: Sequence[Keyed], where: str, bad: Sequence[tuple[str, str]]
) -> list[int | str | None] | None:
    """The label of every sample as it is written, None if no sample has one."""
    example: dict[str, str] = {}
    for name, sample in samples:
        example.setdefault(sample.place, f"{name}/{sample.key}")
    texts = [sample.label for _, sample in samples]
    if not (example.keys() == {TEXT} and _are_names(texts)):
        example.pop(TEXT, None)
    places = [place for place in example if place]
    if len(places) > 1:
        a, b = places[:2]
        raise UnsuitableError(
            f"{where}: {example[a]} has its label in {a} but {example[b]} in {b}; write all labels "
            f"in one place; {WITHOUT_LABELS}"
        )
    if places:
        return [s.label if s.place == places[0] else None for _, s in samples]
    alone = next((each for each in bad if each[1].startswith(NO_IMAGE)), None)
    if alone and samples:
        raise UnsuitableError(
            f"{where}: {samples[0][0]}/{samples[0][1].key} has no label, and {' '.join(alone)}; "
            "image and label of a sample need the same name up to the first dot, one after the "
            f"other in one tar, as `tar --sort=name` writes them; {WITHOUT_LABELS}"
        )
    return None


def _are_names(texts: Sequence[int | str | None]) -> bool:
    return None not in texts and 2 * len(set(texts)) <= len(texts)


def _by_folder(
    samples: Sequence[Keyed], folders: Sequence[tuple[str, ...]], where: str
) -> list[str] | None:
    """The folder of each sample in its tar, the first one in which they differ; None without."""
    start = common(folders)
    tops = [folder[start] if len(folder) > start else "" for folder in folders]
    if all(tops) and tops:
        kinds = {split_of(top) is None: top for top in tops}
        if len(kinds) == 2:
            raise UnsuitableError(
                f"{where}: the folder {kinds[False]} in the tars has the name of a split, but "
                f"{kinds[True]} beside it is none; rename one; {WITHOUT_LABELS}"
            )
        return [*tops]
    if any(tops):
        names = [f"{name}/{sample.key}" for name, sample in samples]
        loose, other = tops.index(""), next(n for n, top in enumerate(tops) if top)
        raise UnsuitableError(
            f"{where}: {names[loose]} has no label and {names[other]} is in a folder; move all "
            f"images into class folders, or none; {WITHOUT_LABELS}"
        )
    return _by_tar(samples, where)


def _by_tar(samples: Sequence[Keyed], where: str) -> list[str] | None:
    """The name of the tar if images are named after it, as in ImageNet's n01440764.tar.

    Raises `UnsuitableError` for tars whose names differ in more than numbers and splits: they may
    be classes.
    """
    shards = [*dict.fromkeys(name for name, _ in samples)]
    tars = {name: name.rpartition("/")[2] for name in shards}
    named = all(
        sample.key.rpartition("/")[2].startswith(tars[name]) and re.search(r"[^\W\d_]", tars[name])
        for name, sample in samples
    )
    if named and len(set(tars.values())) > 1:
        return [tars[name] for name, _ in samples]
    kinds = {_without_number(name): name for name in reversed(shards)}
    if len(kinds) > 1:
        a, b, *_ = reversed(kinds.values())
        raise UnsuitableError(
            f"{where}: the images have no labels, and {a}.tar and {b}.tar may be two classes; "
            f"extract each tar into a folder of its name and pack these folders; {WITHOUT_LABELS}"
        )
    return None


def _without_number(name: str) -> tuple[str, ...]:
    """The words in the path of a shard that are neither numbers nor splits."""
    return tuple(word for word in other_words(name) if word != "of")
