"""Images and reference moments on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from parts import Inverter, evaluated, merged
from torch import Tensor, nn

from bigan import models
from bigan.data.format.manifest import Manifest
from bigan.data.packing.pack import pack
from bigan.data.streaming.stream import sequential
from bigan.distributed.world import World
from bigan.errors import RunError
from bigan.evaluation import extractors, metrics, moments, reference, sampling
from bigan.evaluation.moments import Moments
from bigan.objectives.samplers import LatentSampler, truncated_normal
from bigan.run_config import RunConfig


def tiny(**evaluation: object) -> RunConfig:
    return evaluated(Path("runs/x"), Path("data/digits"), **evaluation)


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
        return images, rows.gather(World()), merged(totals)

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
    packed: Manifest,
    extractor: extractors.Extractor,
    digit_images: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    found = reference.load_or_compute(extractor, packed, "train", World(), 64, tmp_path)
    expected = moments.from_features(extractor(digit_images["train"])[0])
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
