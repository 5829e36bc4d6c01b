"""The split that the name of a folder or shard declares: train, val or test.

A name is divided into words at punctuation, spaces, digits and changes from lower to upper case. A
word of `WORDS` declares its split, whatever the other words are, as in Hugging Face's `datasets`
(docs, "Structure your repository"): `imagenet-val-000000`, `seg_train`, `train2017`, `testA`. Parts
of words declare nothing: "trainer", "valley", "contest" and "testarossa" are not splits.

A class can have such a name, too ("train" among vehicles, "valid" beside "invalid"). A caller that
reads class folders accepts splits only where all folders beside each other are splits.
"""

from __future__ import annotations

import re
from typing import Literal

Split = Literal["train", "val", "test"]

WORDS: dict[str, Split] = {
    "train": "train", "training": "train", "trainset": "train", "trainingset": "train",
    "traindata": "train", "trainval": "train", "trn": "train",
    "val": "val", "valid": "val", "validation": "val", "valset": "val", "validset": "val",
    "validationset": "val", "valdata": "val", "validate": "val", "validating": "val",
    "dev": "val", "devset": "val", "minival": "val",
    "test": "test", "testing": "test", "tests": "test", "testset": "test", "testingset": "test",
    "testdata": "test", "tst": "test", "eval": "test", "evaluation": "test", "holdout": "test",
}  # fmt: skip

# Further words without a boundary: "trainimages", "testdir".
_COMPOUND = re.compile(
    "(train|training|val|valid|validation|test|testing)"
    "(images?|imgs?|dir|folder|files?|data|sets?|split|photos|pics)"
)
_BOUNDARY = re.compile(r"[\W\d_]+|(?<=[a-z])(?=[A-Z])")


def split_of(name: str) -> Split | None:
    """The split of one path component or shard name, with or without suffix; None without one.

    "test-dev" is test and "train_val" train; a name of training and test data is of no split.
    """
    found = {split for word in _BOUNDARY.split(name) if (split := _of_word(word.lower()))}
    if {"train", "test"} <= found:  # the folder of a complete data set: "train_test_split"
        return None
    return next((split for split in ("test", "train", "val") if split in found), None)


def mentions_splits(name: str) -> bool:
    """Whether a file such as "train.txt" or "train_test_split.csv" may list images of splits."""
    words = [word.lower() for word in _BOUNDARY.split(name)]
    return any(word in ("split", "splits") or _of_word(word) for word in words)


def other_words(name: str) -> tuple[str, ...]:
    """The words of `name` that declare no split, in lower case: ("seg",) of "seg_train2017"."""
    words = (word.lower() for word in _BOUNDARY.split(name))
    return tuple(word for word in words if word and _of_word(word) is None)


def _of_word(word: str) -> Split | None:
    """The split of one word in lower case."""
    if word in WORDS:
        return WORDS[word]
    compound = _COMPOUND.fullmatch(word)
    return WORDS[compound[1]] if compound else None
