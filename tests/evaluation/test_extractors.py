"""Feature extractors: their features, weights files and precision."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from parts import uniform_noise
from torch import Tensor

from bigan.errors import UserError
from bigan.evaluation import extractors, metrics
from bigan.evaluation import train_digits8_cnn as training


def test_digits_classifier_is_small_and_knows_the_test_digits(
    extractor: extractors.Extractor,
) -> None:
    assert sum(p.numel() for p in extractor.module.parameters()) == 36_106
    assert extractors.DIGITS8_WEIGHTS.stat().st_size < 160_000
    network = extractor.module.network
    assert training.accuracy(network, *training.load_split("test")) >= 0.985


def test_digits_extractor_gives_the_same_features_at_every_resolution(
    extractor: extractors.Extractor, digit_images: dict[str, Tensor]
) -> None:
    small = digit_images["test"][:20]
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
    extractor: extractors.Extractor, digit_images: dict[str, Tensor]
) -> None:
    images = digit_images["test"][:8]
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
