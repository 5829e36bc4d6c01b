"""Extractors, moments, metrics, sampling: each against an independent computation."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from parts import Inverter, evaluated, write_snapshot
from torch import Tensor, nn
from torch.utils.data import Dataset
from torch_fidelity import calculate_metrics
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from bigan import models
from bigan.data.format.manifest import Manifest
from bigan.data.packing import sources
from bigan.data.packing.pack import pack, pack_source
from bigan.data.streaming.stream import sequential
from bigan.distributed.world import World
from bigan.errors import RunError, UserError
from bigan.evaluation import extractors, metrics, moments, reference, sampling
from bigan.evaluation import train_digits8_cnn as training
from bigan.evaluation.evaluator import Evaluator
from bigan.evaluation.moments import Moments
from bigan.evaluation.records import Task
from bigan.objectives.samplers import LatentSampler, truncated_normal
from bigan.run_config import RunConfig


@pytest.fixture(scope="module")
def extractor() -> extractors.Extractor:
    return extractors.create(extractors.DIGITS8)


@pytest.fixture(scope="module")
def digits() -> dict[str, Tensor]:
    return {split: training.load_split(split)[0] for split in ("train", "test")}


def uniform_noise(num: int) -> Tensor:
    values = np.random.default_rng(0).integers(0, 256, (num, 1, 8, 8), dtype=np.uint8)
    return torch.from_numpy(values)


def tiny(**evaluation: object) -> RunConfig:
    return evaluated(Path("runs/x"), Path("data/digits"), **evaluation)


# --- extractors -----------------------------------------------------------------------------


def test_digits_classifier_is_small_and_knows_the_test_digits(
    extractor: extractors.Extractor,
) -> None:
    assert sum(p.numel() for p in extractor.module.parameters()) == 36_106
    assert extractors.DIGITS8_WEIGHTS.stat().st_size < 160_000
    network = extractor.module.network
    assert training.accuracy(network, *training.load_split("test")) >= 0.985


def test_digits_extractor_gives_the_same_features_at_every_resolution(
    extractor: extractors.Extractor, digits: dict[str, Tensor]
) -> None:
    small = digits["test"][:20]
    expected, logits = extractor(small)
    assert expected.shape == (20, 64)
    assert logits.shape == (20, 10)
    assert expected.dtype == logits.dtype == torch.float32
    large = small.repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1)
    torch.testing.assert_close(extractor(large)[0], expected)
    # RGB is averaged, not cut to its first channel
    gray = small // 2
    colors = torch.cat([torch.zeros_like(gray), gray, 2 * gray], dim=1)
    torch.testing.assert_close(extractor(colors)[0], extractor(gray)[0])


def test_digits_extractor_refuses_what_it_cannot_average(extractor: extractors.Extractor) -> None:
    with pytest.raises(UserError, match=r"12x12.*multiple of 8"):
        extractor(torch.zeros(1, 1, 12, 12, dtype=torch.uint8))
    with pytest.raises(ValueError, match="uint8"):
        extractor(torch.zeros(1, 1, 8, 8))


def test_changed_digits_weights_are_refused(tmp_path: Path) -> None:
    tensors = safetensors.torch.load_file(extractors.DIGITS8_WEIGHTS)
    tensors["logits.bias"][0] += 1e-6
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(UserError, match="not the weights of digits8-cnn-v1"):
        extractors.Digits8Extractor(extractors.DIGITS8, ["logits"], path)


def test_features_are_full_float32_and_the_flags_come_back(
    extractor: extractors.Extractor, digits: dict[str, Tensor]
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
        extractors.create(extractors.INCEPTION)
    line = str(error.value)
    assert "\n" not in line
    assert extractors.INCEPTION_URL in line
    assert "evaluation.weights_path" in line
    assert str(tmp_path / "hub" / "checkpoints") in line


def test_wrong_inception_file_is_refused_with_instructions(tmp_path: Path) -> None:
    path = tmp_path / extractors.INCEPTION_FILE
    path.write_bytes(b"something else")
    with pytest.raises(UserError, match=r"expected 6726825d\); fetch https.*\(a\).*\(b\)"):
        extractors.create(extractors.INCEPTION, path)


class _RunsCode:
    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.marker,)


def test_inception_file_with_code_is_refused_even_if_its_hash_fits(tmp_path: Path) -> None:
    path, marker = tmp_path / "weights.pth", tmp_path / "ran"
    torch.save(_RunsCode(str(marker)), path)
    with pytest.raises(UserError, match="not a plain file of tensors"):
        extractors.create(extractors.INCEPTION, path, inception_sha256=extractors._sha256(path)[:8])
    assert not marker.exists()


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights file of the right shape, randomly initialized: tests have no network access."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    empty = FeatureExtractorInceptionV3.__new__(FeatureExtractorInceptionV3)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        module = "torch_fidelity.feature_extractor_inceptionv3"
        patch.setattr(f"{module}.load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(nn.Module, "load_state_dict", lambda *_, **__: None)
        empty.__init__(extractors.INCEPTION, ["2048"])
    torch.save(empty.state_dict(), path)
    return path


def test_inception_takes_the_same_way_under_the_published_names(random_inception: Path) -> None:
    digest = extractors._sha256(random_inception)
    with pytest.raises(UserError, match="not the Inception weights"):
        extractors.create(extractors.INCEPTION, random_inception)
    inception = extractors.create(
        extractors.INCEPTION, random_inception, inception_sha256=digest[:8]
    )
    assert inception.sha256 == digest
    keys = list(metrics.titles(inception))
    assert keys == ["fid/inception-v3-compat", "is/inception-v3-compat"]
    gray = uniform_noise(2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    found, logits = inception(gray)
    assert found.shape == (2, 2048)
    assert logits.shape == (2, 1008)
    torch.testing.assert_close(inception(gray.expand(-1, 3, -1, -1))[0], found)


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
    config = tiny(
        extractor=extractors.INCEPTION, weights_path=str(random_inception), num_samples=20
    )
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"path": str(data.folder)})}
    )
    config = config.model_copy(update={"run_dir": tmp_path / "run"})
    folder = write_snapshot(config, 100)
    cpu = torch.device("cpu")
    evaluator = Evaluator(config.run_dir, config, World(), cpu)
    task = Task(folder, "", (0, 0))
    found = evaluator.measure(task, None).values

    networks, settings = evaluator._load(task), config.evaluation
    assert evaluator.sampler.class_counts == tuple(data.class_counts("train"))
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
    a, b = (_merged([moments.from_features(p) for p in r.split(32)]) for r in (rows, other))
    torch.testing.assert_close(a.covariance, b.covariance, rtol=1e-10, atol=1e-11)


def test_moments_refuse_what_is_not_finite() -> None:
    rows = far_off_features(4)
    rows[1, 2] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        moments.from_features(rows)
    with pytest.raises(ValueError, match="2 samples"):
        _ = moments.from_features(far_off_features(1)).covariance


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
    extractor: extractors.Extractor, digits: dict[str, Tensor]
) -> None:
    """Measured: itself 0, test split (floor) 0.31, uniform noise (ceiling) 64.5."""
    train, test, noise = (
        moments.from_features(extractor(images)[0])
        for images in (digits["train"], digits["test"], uniform_noise(2000))
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


class _Images(Dataset[Tensor]):
    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def test_numbers_are_torch_fidelitys(
    extractor: extractors.Extractor, digits: dict[str, Tensor]
) -> None:
    """End to end: the same images through `calculate_metrics` with the registered extractor."""
    images = torch.cat([digits["test"], uniform_noise(50)])
    expected = calculate_metrics(
        input1=_Images(images), input2=_Images(digits["train"]), cuda=False, fid=True, isc=True,
        isc_splits=1, feature_extractor=extractors.DIGITS8, batch_size=64, verbose=False,
        cache=False, save_cpu_ram=True,  # no worker processes
    )  # fmt: skip
    parts = [extractor(part) for part in images.split(48)]
    generated = _merged([moments.from_features(found) for found, _ in parts])
    real = _merged(
        [moments.from_features(extractor(part)[0]) for part in digits["train"].split(100)]
    )
    distance = metrics.frechet_distance(generated, real)
    score = metrics.classifier_score(torch.cat([logits for _, logits in parts]), 10)
    assert distance == pytest.approx(expected["frechet_inception_distance"], rel=1e-5)
    assert score.value == pytest.approx(expected["inception_score_mean"], rel=1e-6)


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
    """A generator that depends only on latents and labels."""

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        picture = torch.tanh(z[:, :, None] * torch.linspace(-2, 2, 24) + labels[:, None, None] / 5)
        return picture.reshape(len(z), 1, -1, 16)[:, :, :16]


def painted(
    config: RunConfig,
    counts: Sequence[int] = (1,) * 10,
    world: World | None = None,
    painter: nn.Module | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """The images of one rank."""
    sampler = LatentSampler("generator", config.model.z_dim, tuple(counts))
    networks = {"generator": painter or _Painter().eval()}
    cpu = torch.device("cpu")
    return sampling.generate(networks, sampler, config.evaluation, None, world or World(), cpu)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_the_same_samples_and_numbers_on_any_number_of_ranks(
    extractor: extractors.Extractor, size: int
) -> None:
    config = tiny(num_samples=83)  # 5 blocks of 16 and one of 3; the seventh rank has none
    counts = [3, 0, 1, 1, 1, 1, 1, 1, 1, 1]

    def collect(worlds: list[World]) -> tuple[Tensor, Tensor, Moments]:
        images = torch.zeros(83, 1, 16, 16, dtype=torch.uint8)
        rows = metrics.Rows(83, 10)
        totals = []
        for world in worlds:
            total = moments.empty(64)
            for start, part in painted(config, counts, world):
                images[start : start + len(part)] = part
                found, logits = extractor(part)
                rows.fill(start, logits)
                total = moments.merge(total, moments.from_features(found))
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


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_an_input_stream_is_read_in_order_on_any_number_of_ranks(
    packed: Manifest, size: int
) -> None:
    """Image i is made from image i of the split and the i-th random input."""
    images = torch.zeros(500, 1, 8, 8, dtype=torch.uint8)
    filled = torch.zeros(500)
    settings = tiny(num_samples=500, split="test").evaluation
    for rank in range(size):
        for start, part in sampling.generate(
            {}, Inverter(), settings, None, World(rank, size), torch.device("cpu"), packed
        ):
            images[start : start + len(part)] = part
            filled[start : start + len(part)] += 1
    assert (filled == 1).all()
    blocks = -(-500 // settings.batch)
    draws = [Inverter().draws(0, "evaluation", b, settings.batch, None) for b in range(blocks)]
    shift = torch.cat([block["shift"] for block in draws])[:500]
    (split,) = sequential(packed, "test", World(), 500)
    pixels = split.pixels.permute(0, 3, 1, 2)
    assert torch.equal(images, models.to_uint8(1 - pixels / 127.5 + shift / 8))
    few = settings.model_copy(update={"num_samples": 40})
    world, cpu = World(), torch.device("cpu")
    parts = [part for _, part in sampling.generate({}, Inverter(), few, None, world, cpu, packed)]
    assert torch.equal(torch.cat(parts), images[:40])


def test_labels_follow_the_data_and_seeds_change_the_images() -> None:
    seen: list[Tensor] = []

    class Recorder(_Painter):
        def forward(self, z: Tensor, labels: Tensor) -> Tensor:
            seen.append(labels)
            return super().forward(z, labels)

    counts = [300, 0, 100, 0, 0, 0, 0, 0, 0, 0]
    config = tiny(num_samples=1600)
    first = [i for _, i in painted(config, counts, painter=Recorder().eval())]
    drawn = torch.cat(seen).bincount(minlength=10)
    assert drawn[[0, 2]].sum() == 1600
    assert 0.7 < drawn[0] / 1600 < 0.8
    assert not torch.equal(first[0], first[1])
    other = next(painted(tiny(seed=1), counts))[1]
    assert not torch.equal(first[0], other)


def test_truncation_draws_again_only_what_lies_outside() -> None:
    free = truncated_normal(0, "evaluation/z", 3, (200, 50), None)
    cut = truncated_normal(0, "evaluation/z", 3, (200, 50), 0.5)
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
        next(painted(tiny(), painter=Broken().eval()))
    with pytest.raises(ValueError, match="evaluation mode"):
        next(painted(tiny(), painter=_Painter()))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("data") / "digits"
    return pack("digits", folder, shard_size=200, resolution=8).manifests[0]


def test_reference_is_of_every_image_once(
    packed: Manifest, extractor: extractors.Extractor, digits: dict[str, Tensor], tmp_path: Path
) -> None:
    found = reference.load_or_compute(extractor, packed, "train", World(), 64, tmp_path)
    expected = moments.from_features(extractor(digits["train"])[0])
    assert found.num == 1297
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.covariance, expected.covariance, rtol=1e-5, atol=1e-6)


def test_reference_cache_is_used_only_under_its_own_fingerprint(
    packed: Manifest, extractor: extractors.Extractor, tmp_path: Path,
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
