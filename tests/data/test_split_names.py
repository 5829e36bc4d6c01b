"""Splits by the names of folders and shards."""

from __future__ import annotations

import pytest

from bigan.data.packing.split_names import split_of


@pytest.mark.parametrize(
    ("split", "names"),
    [
        (
            "train",
            "train Training TRAIN train-0000 train-0000.tar train_00 train.000 train2017 seg_train "
            "imgs_train train_images trainImages train_set trainset TrainingSet trainA trainB "
            "imagenet1k-train-0000 train-00000-of-00512 cifar10_train trainval train_val trn_001",
        ),
        (
            "val",
            "val valid Validation val-000001 imagenet-val-000000 val2017 valid_01 validation-00 "
            "seg_val valset validation_set dev dev-clean minival2014",
        ),
        (
            "test",
            "test Testing test_00 test01 test.tar seg_test imgs_test test_set testset testA "
            "test-dev2017 mnist-test TEST-5 eval evaluation",
        ),
        (
            None,
            "trainer trainers valley validity testarossa contest latest attestation protest devil "
            "interval medieval retrain cat 000 part-0001 train_test_split train_val_test",
        ),
        (None, ["", "cc12m-0000.tar", "Testarossa", "my trainer", "data_2024-01-01"]),
        ("test", ["My Test", "set (test)", "a b-test.0001"]),
    ],
)
def test_the_split_that_a_name_declares(split: str | None, names: str | list[str]) -> None:
    listed = names.split() if isinstance(names, str) else names
    assert {name: split_of(name) for name in listed} == dict.fromkeys(listed, split)
