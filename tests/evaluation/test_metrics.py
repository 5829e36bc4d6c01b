"""Moments and metrics, each compared with an independent computation."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from parts import evaluated, merged, uniform_noise, write_snapshot
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity import calculate_metrics

from bigan.data.packing import sources
from bigan.data.packing.pack import pack_source
from bigan.distributed.world import World
from bigan.evaluation import extractors, metrics, moments, sampling
from bigan.evaluation.evaluator import Evaluator
from bigan.evaluation.moments import Moments
from bigan.evaluation.records import Task

# --- moments --------------------------------------------------------------------------------


def far_off_features(num: int) -> Tensor:
    """Float32 features with a mean 1000 times their spread, where raw sums lose everything."""
    generator = torch.Generator().manual_seed(0)
    return 1e3 + torch.randn(num, 6, generator=generator)


@pytest.mark.parametrize("sizes", [[301], [1] * 301, [7, 250, 44], [300, 1]])
def test_moments_in_any_portions_are_numpys(sizes: list[int]) -> None:
    rows = far_off_features(301)
    total = moments.empty(6)
    for part in rows.split(sizes):
        total = moments.merge(total, moments.from_features(part))
    assert total.num == 301
    expected = rows.double().numpy()
    np.testing.assert_allclose(total.mean, expected.mean(0), rtol=1e-13)
    np.testing.assert_allclose(total.covariance, np.cov(expected.T), rtol=1e-9, atol=1e-11)


def test_moments_do_not_depend_on_the_order() -> None:
    rows = far_off_features(301)
    other = rows[torch.randperm(301, generator=torch.Generator().manual_seed(1))]
    a, b = (merged([moments.from_features(p) for p in r.split(32)]) for r in (rows, other))
    torch.testing.assert_close(a.covariance, b.covariance, rtol=1e-10, atol=1e-11)


def test_moments_refuse_what_is_not_finite() -> None:
    rows = far_off_features(4)
    rows[1, 2] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        moments.from_features(rows)
    with pytest.raises(ValueError, match="2 samples"):
        _ = moments.from_features(far_off_features(1)).covariance


# --- metrics --------------------------------------------------------------------------------


def test_distance_has_its_closed_form_and_is_zero_to_itself() -> None:
    eye = torch.eye(5, dtype=torch.float64)
    a = Moments(100, torch.zeros(5, dtype=torch.float64), eye * 99)
    b = Moments(100, torch.full((5,), 2.0, dtype=torch.float64), 4 * eye * 99)
    # |mu|^2 + sum (1 - 2)^2
    assert metrics.frechet_distance(a, b) == pytest.approx(5 * 4 + 5, abs=1e-10)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-10)


def test_digits_against_themselves_the_test_split_and_noise(
    extractor: extractors.Extractor, digit_images: dict[str, Tensor]
) -> None:
    """Measured: itself 0, test split (floor) 0.31, uniform noise (ceiling) 64.5."""
    train, test, noise = (
        moments.from_features(extractor(images)[0])
        for images in (digit_images["train"], digit_images["test"], uniform_noise(2000))
    )
    assert metrics.frechet_distance(train, train) == pytest.approx(0, abs=1e-9)
    assert metrics.frechet_distance(test, train) < 1
    assert metrics.frechet_distance(noise, train) > 40


def test_few_samples_are_not_split() -> None:
    logits = torch.randn(2000, 10, generator=torch.Generator().manual_seed(0)) * 3
    assert metrics.classifier_score(logits, 10) != metrics.classifier_score(logits, 1)
    assert metrics.classifier_score(logits, 10).std > 0
    assert [metrics.num_splits(num, 10) for num in (1999, 2000)] == [1, 10]
    few = metrics.classifier_score(logits[:1999], 10)
    assert (few, few.std) == (metrics.classifier_score(logits[:1999], 1), 0)


def test_rows_notice_a_missing_and_a_doubled_sample() -> None:
    rows = metrics.Rows(5, 2)
    rows.fill(0, torch.ones(3, 2))
    with pytest.raises(RuntimeError, match="2 of 5"):
        rows.gather(World())
    rows.fill(2, torch.ones(3, 2))
    with pytest.raises(RuntimeError, match="1 of 5"):
        rows.gather(World())


# --- torch-fidelity's numbers ---------------------------------------------------------------


class _Images(Dataset[Tensor]):
    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def test_numbers_are_torch_fidelitys(
    extractor: extractors.Extractor, digit_images: dict[str, Tensor]
) -> None:
    """End to end: the same images through `calculate_metrics` with the registered extractor."""
    images = torch.cat([digit_images["test"], uniform_noise(50)])
    expected = calculate_metrics(
        input1=_Images(images), input2=_Images(digit_images["train"]), cuda=False, fid=True,
        isc=True, isc_splits=1, feature_extractor=extractors.DIGITS8, batch_size=64, verbose=False,
        cache=False, save_cpu_ram=True,  # no worker processes
    )  # fmt: skip
    parts = [extractor(part) for part in images.split(48)]
    generated = merged([moments.from_features(found) for found, _ in parts])
    real = merged(
        [moments.from_features(extractor(part)[0]) for part in digit_images["train"].split(100)]
    )
    distance = metrics.frechet_distance(generated, real)
    score = metrics.classifier_score(torch.cat([logits for _, logits in parts]), 10)
    assert distance == pytest.approx(expected["frechet_inception_distance"], rel=1e-5)
    assert score.value == pytest.approx(expected["inception_score_mean"], rel=1e-6)


@pytest.mark.slow
def test_fid_of_a_run_end_to_end(
    random_inception: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evaluator with Inception, on 30 images, against `calculate_metrics`."""
    source = sources.digits(16)
    few = dataclasses.replace(
        source, keys=source.keys[:30], labels=source.labels[:30], splits=("train",) * 30
    )
    (data,) = pack_source(few, tmp_path / "data").manifests
    digest = extractors._sha256(random_inception)
    monkeypatch.setattr(
        extractors, "create", functools.partial(extractors.create, inception_sha256=digest)
    )
    config = evaluated(
        tmp_path / "run",
        data.folder,
        extractor=extractors.INCEPTION,
        weights_path=str(random_inception),
        num_samples=20,
    )
    folder = write_snapshot(config, 100)
    cpu = torch.device("cpu")
    evaluator = Evaluator(config.run_dir, config, World(), cpu)
    task = Task(folder, "", (0, 0))
    found = evaluator.measure(task, None).values

    networks, settings = evaluator._load(task), config.evaluation
    assert evaluator.sampler.class_counts == tuple(data.samples_of_class("train"))
    blocks = sampling.generate(networks, evaluator.sampler, settings, None, World(), cpu)
    images = [part for _, part in blocks]
    real = torch.stack([torch.from_numpy(source.read(i)) for i in range(30)]).permute(0, 3, 1, 2)
    expected = calculate_metrics(
        input1=_Images(torch.cat(images).expand(-1, 3, -1, -1)),
        input2=_Images(real.expand(-1, 3, -1, -1)),
        feature_extractor_weights_path=str(random_inception),
        cuda=False, fid=True, isc=True, isc_splits=1, batch_size=16, verbose=False, cache=False,
        save_cpu_ram=True,
    )  # fmt: skip
    assert found.keys() == {"fid/inception-v3-compat", "is/inception-v3-compat"}
    assert found["fid/inception-v3-compat"] == pytest.approx(
        expected["frechet_inception_distance"], rel=1e-4
    )
    assert found["is/inception-v3-compat"] == pytest.approx(
        expected["inception_score_mean"], rel=1e-5
    )
