"""Extractors, moments, metrics, sampling: each against an independent computation."""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from parts import evaluated
from torch import Tensor, nn
from torch.utils.data import Dataset
from torch_fidelity import calculate_metrics
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from bigan import models, rng
from bigan.checkpoint import snapshots
from bigan.data.format.manifest import Manifest
from bigan.data.packing import sources
from bigan.data.packing.pack import pack, pack_source
from bigan.distributed.world import World
from bigan.errors import RunError, UserError
from bigan.evaluation import features, metrics, moments, reference, sampling
from bigan.evaluation import train_digits8_cnn as training
from bigan.evaluation.judge import Judge, Task
from bigan.evaluation.moments import Moments
from bigan.run_config import RunConfig


@pytest.fixture(scope="module")
def extractor() -> features.Extractor:
    return features.create(features.DIGITS8)


@pytest.fixture(scope="module")
def digits() -> dict[str, Tensor]:
    return {split: training.load_split(split)[0] for split in ("train", "test")}


def uniform_noise(num: int) -> Tensor:
    values = np.random.default_rng(0).integers(0, 256, (num, 1, 8, 8), dtype=np.uint8)
    return torch.from_numpy(values)


def recipe(**evaluation: object) -> RunConfig:
    return evaluated(Path("runs/x"), Path("data/digits"), **evaluation)


# --- extractors -----------------------------------------------------------------------------


def test_digits_classifier_is_small_and_knows_the_test_digits(
    extractor: features.Extractor,
) -> None:
    assert sum(p.numel() for p in extractor.module.parameters()) == 36_106
    assert features.DIGITS8_WEIGHTS.stat().st_size < 160_000
    network = extractor.module.network
    assert training.accuracy(network, *training.load_split("test")) >= 0.985


def test_digits_extractor_gives_the_same_features_at_every_resolution(
    extractor: features.Extractor, digits: dict[str, Tensor]
) -> None:
    small = digits["test"][:20]
    expected, logits = extractor(small)
    assert expected.shape == (20, 64)
    assert logits.shape == (20, 10)
    assert expected.dtype == logits.dtype == torch.float32
    large = small.repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1)
    torch.testing.assert_close(extractor(large)[0], expected)
    # RGB is averaged, not cut to its first channel
    grey = small // 2
    colours = torch.cat([torch.zeros_like(grey), grey, 2 * grey], dim=1)
    torch.testing.assert_close(extractor(colours)[0], extractor(grey)[0])


def test_digits_extractor_refuses_what_it_cannot_average(extractor: features.Extractor) -> None:
    with pytest.raises(UserError, match=r"12x12.*multiple of 8"):
        extractor(torch.zeros(1, 1, 12, 12, dtype=torch.uint8))
    with pytest.raises(ValueError, match="uint8"):
        extractor(torch.zeros(1, 1, 8, 8))


def test_changed_digits_weights_are_refused(tmp_path: Path) -> None:
    tensors = safetensors.torch.load_file(features.DIGITS8_WEIGHTS)
    tensors["logits.bias"][0] += 1e-6
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(UserError, match="not the weights of digits8-cnn-v1"):
        features.Digits8Extractor(features.DIGITS8, ["logits"], path)


def test_features_are_full_float32_and_the_flags_come_back(
    extractor: features.Extractor, digits: dict[str, Tensor]
) -> None:
    images = digits["test"][:8]
    expected, _ = extractor(images)
    seen = []
    hook = extractor.module.register_forward_pre_hook(
        lambda *_: seen.append(
            (torch.backends.cudnn.conv.fp32_precision, torch.is_autocast_enabled("cpu"))
        )
    )
    convolutions = torch.backends.cudnn.conv
    before, legacy = convolutions.fp32_precision, torch.backends.cudnn.allow_tf32
    convolutions.fp32_precision = "tf32"
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found, _ = extractor(images)
            assert torch.is_autocast_enabled("cpu")
        assert convolutions.fp32_precision == "tf32"
    finally:
        hook.remove()
        convolutions.fp32_precision = before
    assert seen == [("ieee", False)]
    assert torch.backends.cudnn.allow_tf32 == legacy  # raises if old and new flags contradict
    assert torch.equal(found, expected)


def test_inception_is_never_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError) as error:
        features.create(features.INCEPTION)
    line = str(error.value)
    assert "\n" not in line
    assert "downloads none" in line
    assert "evaluation.weights_path" in line
    assert str(tmp_path / "hub" / "checkpoints") in line


def test_wrong_inception_file_is_refused_with_the_recipes(tmp_path: Path) -> None:
    path = tmp_path / features.INCEPTION_FILE
    path.write_bytes(b"something else")
    with pytest.raises(UserError, match=r"expected 6726825d\); fetch https.*\(a\).*\(b\)"):
        features.create(features.INCEPTION, path)


class _RunsCode:
    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.marker,)


def test_inception_file_with_code_is_refused_even_if_its_hash_fits(tmp_path: Path) -> None:
    path, marker = tmp_path / "weights.pth", tmp_path / "ran"
    torch.save(_RunsCode(str(marker)), path)
    with pytest.raises(UserError, match="not a plain file of tensors"):
        features.create(features.INCEPTION, path, inception_sha256=features._sha256(path)[:8])
    assert not marker.exists()


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights file of the right shape: randomly initialised, for there is no network."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    empty = FeatureExtractorInceptionV3.__new__(FeatureExtractorInceptionV3)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        module = "torch_fidelity.feature_extractor_inceptionv3"
        patch.setattr(f"{module}.load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(nn.Module, "load_state_dict", lambda *_, **__: None)
        empty.__init__(features.INCEPTION, ["2048"])
    torch.save(empty.state_dict(), path)
    return path


def test_inception_takes_the_same_way_under_the_published_names(random_inception: Path) -> None:
    digest = features._sha256(random_inception)
    with pytest.raises(UserError, match="not the Inception weights"):
        features.create(features.INCEPTION, random_inception)
    inception = features.create(features.INCEPTION, random_inception, inception_sha256=digest[:8])
    assert inception.sha256 == digest
    keys = (inception.distance_key, inception.score_key)
    assert keys == ("fid/inception-v3-compat", "is/inception-v3-compat")
    grey = uniform_noise(2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    found, logits = inception(grey)
    assert found.shape == (2, 2048)
    assert logits.shape == (2, 1008)
    torch.testing.assert_close(inception(grey.expand(-1, 3, -1, -1))[0], found)


@pytest.mark.slow
def test_fid_of_a_run_end_to_end(
    random_inception: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watcher's own path with Inception, on 30 images, against `calculate_metrics`."""
    source = sources.digits(16)
    few = dataclasses.replace(
        source, keys=source.keys[:30], labels=source.labels[:30], splits=("train",) * 30
    )
    (data,) = pack_source(few, tmp_path / "data").manifests
    digest = features._sha256(random_inception)
    monkeypatch.setattr(
        features, "create", functools.partial(features.create, inception_sha256=digest)
    )
    config = recipe(
        extractor=features.INCEPTION, weights_path=str(random_inception), num_samples=20
    )
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"path": str(data.folder)})}
    )
    generator, _ = models.build(config.model)
    generator.init_weights(rng.torch_generator(0, "test/init"))
    folder = snapshots.write(tmp_path / "run", 100, generator, config)
    judge = Judge(tmp_path / "run", config, World(), torch.device("cpu"))
    found = judge.measure(Task(folder, "", (0, 0)), None).metrics

    counts = data.class_counts("train")
    images = [i for _, i in sampling.generate(generator.eval(), config, counts, World())]
    real = torch.stack([torch.from_numpy(source.read(i)) for i in range(30)]).permute(0, 3, 1, 2)
    expected = calculate_metrics(
        input1=_Images(torch.cat(images).expand(-1, 3, -1, -1)),
        input2=_Images(real.expand(-1, 3, -1, -1)),
        feature_extractor_weights_path=str(random_inception),
        cuda=False, fid=True, isc=True, isc_splits=1, batch_size=16, verbose=False, cache=False,
    )  # fmt: skip
    assert found.keys() == {"fid/inception-v3-compat", "is/inception-v3-compat"}
    assert found["fid/inception-v3-compat"] == pytest.approx(
        expected["frechet_inception_distance"], rel=1e-4
    )
    assert found["is/inception-v3-compat"] == pytest.approx(
        expected["inception_score_mean"], rel=1e-5
    )


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
        total = moments.merge(total, moments.of(part))
    assert total.num == 301
    expected = rows.double().numpy()
    np.testing.assert_allclose(total.mean, expected.mean(0), rtol=1e-13)
    np.testing.assert_allclose(total.covariance, np.cov(expected.T), rtol=1e-9, atol=1e-11)


def test_moments_do_not_depend_on_the_order() -> None:
    rows = far_off_features(301)
    other = rows[torch.randperm(301, generator=torch.Generator().manual_seed(1))]
    a, b = (_merged([moments.of(p) for p in r.split(32)]) for r in (rows, other))
    torch.testing.assert_close(a.covariance, b.covariance, rtol=1e-10, atol=1e-11)


def test_moments_refuse_what_is_not_finite() -> None:
    rows = far_off_features(4)
    rows[1, 2] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        moments.of(rows)
    with pytest.raises(ValueError, match="2 samples"):
        _ = moments.of(far_off_features(1)).covariance


def _merged(parts: list[Moments]) -> Moments:
    total = moments.empty(len(parts[0].mean))
    for part in parts:
        total = moments.merge(total, part)
    return total


# --- metrics --------------------------------------------------------------------------------


def test_distance_has_its_closed_form_and_is_zero_to_itself() -> None:
    eye = torch.eye(5, dtype=torch.float64)
    a = Moments(100, torch.zeros(5, dtype=torch.float64), eye * 99)
    b = Moments(100, torch.full((5,), 2.0, dtype=torch.float64), 4 * eye * 99)
    # |mu|^2 + sum (1 - 2)^2
    assert metrics.frechet_distance(a, b) == pytest.approx(5 * 4 + 5, abs=1e-10)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-10)


def test_digits_against_themselves_the_test_split_and_noise(
    extractor: features.Extractor, digits: dict[str, Tensor]
) -> None:
    """Measured: itself 0, test split (floor) 0.31, uniform noise (ceiling) 64.5."""
    train, test, noise = (
        moments.of(extractor(images)[0])
        for images in (digits["train"], digits["test"], uniform_noise(2000))
    )
    assert metrics.frechet_distance(train, train) == pytest.approx(0, abs=1e-9)
    assert metrics.frechet_distance(test, train) < 1
    assert metrics.frechet_distance(noise, train) > 40


def test_few_samples_are_not_split() -> None:
    logits = torch.randn(2000, 10, generator=torch.Generator().manual_seed(0)) * 3
    assert metrics.classifier_score(logits, 10).splits == 10
    few = metrics.classifier_score(logits[:1999], 10)
    assert (few.splits, few.std) == (1, 0)


class _Images(Dataset[Tensor]):
    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def test_numbers_are_torch_fidelitys(
    extractor: features.Extractor, digits: dict[str, Tensor]
) -> None:
    """End to end: the same images through `calculate_metrics` with the registered extractor."""
    images = torch.cat([digits["test"], uniform_noise(50)])
    expected = calculate_metrics(
        input1=_Images(images), input2=_Images(digits["train"]), cuda=False, fid=True, isc=True,
        isc_splits=1, feature_extractor=features.DIGITS8, batch_size=64, verbose=False,
        cache=False,
    )  # fmt: skip
    parts = [extractor(part) for part in images.split(48)]
    generated = _merged([moments.of(found) for found, _ in parts])
    real = _merged([moments.of(extractor(part)[0]) for part in digits["train"].split(100)])
    distance = metrics.frechet_distance(generated, real)
    score = metrics.classifier_score(torch.cat([logits for _, logits in parts]), 10)
    assert distance == pytest.approx(expected["frechet_inception_distance"], rel=1e-5)
    assert score.mean == pytest.approx(expected["inception_score_mean"], rel=1e-6)


def test_rows_notice_a_missing_and_a_doubled_sample() -> None:
    rows = metrics.Rows(5, 2)
    rows.fill(0, torch.ones(3, 2))
    with pytest.raises(RuntimeError, match="2 of 5"):
        rows.gather(World())
    rows.fill(2, torch.ones(3, 2))
    with pytest.raises(RuntimeError, match="1 of 5"):
        rows.gather(World())


# --- sampling and reference on any number of ranks ------------------------------------------


class _Painter(nn.Module):
    """A generator that depends on every latent and label, and on nothing else."""

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        picture = torch.tanh(z[:, :, None] * torch.linspace(-2, 2, 24) + labels[:, None, None] / 5)
        return picture.reshape(len(z), 1, -1, 16)[:, :, :16]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_the_same_samples_and_numbers_on_any_number_of_ranks(
    extractor: features.Extractor, size: int
) -> None:
    config = recipe(num_samples=83)  # 5 blocks of 16 and one of 3; the seventh rank has none
    counts = [3, 0, 1, 1, 1, 1, 1, 1, 1, 1]
    painter = _Painter().eval()

    def collect(worlds: list[World]) -> tuple[Tensor, Tensor, Moments]:
        images = torch.zeros(83, 1, 16, 16, dtype=torch.uint8)
        rows = metrics.Rows(83, 10)
        totals = []
        for world in worlds:
            total = moments.empty(64)
            for start, part in sampling.generate(painter, config, counts, world):
                images[start : start + len(part)] = part
                found, logits = extractor(part)
                rows.fill(start, logits)
                total = moments.merge(total, moments.of(found))
            totals.append(total)
        return images, rows.gather(World()), _merged(totals)

    images, logits, total = collect([World(rank, size) for rank in range(size)])
    expected_images, expected_logits, expected = collect([World()])
    assert torch.equal(images, expected_images)
    assert torch.equal(logits, expected_logits)
    assert total.num == 83
    torch.testing.assert_close(total.scatter, expected.scatter, rtol=1e-9, atol=1e-9)
    other = Moments(83, expected.mean + 0.1, expected.scatter * 2)
    numbers = [metrics.frechet_distance(m, other) for m in (total, expected)]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-7)


def test_labels_follow_the_data_and_seeds_change_the_images() -> None:
    seen: list[Tensor] = []

    class Recorder(_Painter):
        def forward(self, z: Tensor, labels: Tensor) -> Tensor:
            seen.append(labels)
            return super().forward(z, labels)

    counts = [300, 0, 100, 0, 0, 0, 0, 0, 0, 0]
    config = recipe(num_samples=1600)
    first = [i for _, i in sampling.generate(Recorder().eval(), config, counts, World())]
    drawn = torch.cat(seen).bincount(minlength=10)
    assert drawn[[0, 2]].sum() == 1600
    assert 0.7 < drawn[0] / 1600 < 0.8
    assert not torch.equal(first[0], first[1])
    other = next(sampling.generate(_Painter().eval(), recipe(seed=1), counts, World()))[1]
    assert not torch.equal(first[0], other)


def test_truncation_draws_again_only_what_lies_outside() -> None:
    free = sampling.latents(0, "evaluation/z", 3, (200, 50), None)
    cut = sampling.latents(0, "evaluation/z", 3, (200, 50), 0.5)
    assert cut.abs().max() <= 0.5
    inside = free.abs() <= 0.5
    assert torch.equal(cut[inside], free[inside])
    # variance of a normal truncated at t: 1 - 2 t phi(t) / (2 Phi(t) - 1)
    assert cut.var().item() == pytest.approx(1 - 2 * 0.5 * 0.35206533 / 0.38292492, rel=0.03)


def test_quantisation_rounds_and_clamps() -> None:
    values = torch.tensor([-3.0, -1.0, -1 + 1.2 / 127.5, 0.0, 1.0, 1.7])
    assert models.to_uint8(values).tolist() == [0, 0, 1, 128, 255, 255]


def test_generator_with_broken_or_training_state_is_refused() -> None:
    class Broken(_Painter):
        def forward(self, z: Tensor, labels: Tensor) -> Tensor:
            return super().forward(z, labels) * torch.nan

    with pytest.raises(RunError, match="not finite"):
        next(sampling.generate(Broken().eval(), recipe(), [1] * 10, World()))
    with pytest.raises(ValueError, match="evaluation mode"):
        next(sampling.generate(_Painter(), recipe(), [1] * 10, World()))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return pack("digits", tmp_path_factory.mktemp("data") / "digits", shard_size=200).manifests[0]


def test_reference_is_every_image_once(
    packed: Manifest, extractor: features.Extractor, digits: dict[str, Tensor], tmp_path: Path
) -> None:
    found = reference.load_or_compute(extractor, packed, "train", World(), 64, tmp_path)
    expected = moments.of(extractor(digits["train"])[0])
    assert found.num == 1297
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.covariance, expected.covariance, rtol=1e-5, atol=1e-6)


def test_reference_cache_is_used_only_under_its_own_fingerprint(
    packed: Manifest, extractor: features.Extractor, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def get(split: str, manifest: Manifest = packed) -> Moments:
        return reference.load_or_compute(extractor, manifest, split, World(), 64, tmp_path)

    first, other = get("train"), get("test")
    assert (first.num, other.num) == (1297, 500)
    assert len(list(tmp_path.iterdir())) == 2
    train, test = (reference.describe(extractor, packed, split) for split in ("train", "test"))
    assert {key for key in train if train[key] != test[key]} == {"reference_split", "num_reference"}
    computed: list[str] = []
    real_compute = reference.compute

    def counted(*arguments: object) -> Moments:
        computed.append(str(arguments[2]))
        return real_compute(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(reference, "compute", counted)
    again = get("train")
    assert computed == []
    assert torch.equal(again.scatter, first.scatter)
    get("train", packed.model_copy(update={"fingerprint": "another"}))
    assert computed == ["train"]
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:100])
    assert torch.equal(get("train").scatter, first.scatter)
    assert computed == ["train", "train"]
