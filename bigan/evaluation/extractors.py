"""Feature extractors of the metrics, created through the registry of torch-fidelity.

    digits8-cnn-v1        a small classifier of scikit-learn's handwritten digits, shipped with
                          bigan; its metrics are named fd and cs and are comparable only with
                          those of the same extractor
    inception-v3-compat   torch-fidelity's port of the Inception network that papers use; only its
                          metrics are named fid and is

The sha256 of every weights file is verified, which torch-fidelity does not do. Nothing is
downloaded, and random weights are never used.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
from torch_fidelity.utils import create_feature_extractor

from bigan.errors import UserError
from bigan.hashes import sha256_of_file
from bigan.transparency import has_alpha

DIGITS8 = "digits8-cnn-v1"
DIGITS8_WEIGHTS = Path(__file__).with_name("digits8_cnn_v1.safetensors")
DIGITS8_SHA256 = "b0f45a34e429f6e7401427f496543eb3febbcea7a8ff66b3cde05c428f203244"

INCEPTION = "inception-v3-compat"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d"  # torch.hub's convention: the first digits, in the file's own name
INCEPTION_URL = (
    f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
)


@dataclass(frozen=True)
class Extractor:
    """A feature extractor and the facts about it that are part of the protocol.

    A call maps uint8 images [B, C, H, W] (C = 1 to 4) to float32 (features [B, dim],
    logits [B, num_classes]), computed in full float32: no autocast, no TF32. Images with alpha (C =
    2 or 4) are composited on white first. Raises ValueError for images of another type or shape.
    """

    name: str
    sha256: str  # of the weights file
    preprocessing: str
    dim: int
    num_classes: int
    is_published: bool  # its metrics have the names that papers use (FID, IS)
    device: torch.device
    module: nn.Module

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in range(1, 5):
            shape = tuple(images.shape)
            raise ValueError(f"expected uint8 images [B, 1 to 4, H, W], got {images.dtype} {shape}")
        images = on_white(images.to(self.device))
        if self.is_published:
            images = images.expand(-1, 3, -1, -1)
        with torch.no_grad(), full_float32(self.device):
            features, logits = self.module(images)
        return features, logits


def on_white(images: Tensor) -> Tensor:
    """uint8 images [B, 2 or 4, H, W] -> [B, 1 or 3, H, W] on white; those without alpha unchanged.

    (color * alpha + 255 * (255 - alpha)) / 255, rounded half up in integers.
    """
    if not has_alpha(images.shape[1]):
        return images
    colors, alpha = images[:, :-1].int(), images[:, -1:].int()
    return ((colors * alpha + 255 * (255 - alpha) + 127) // 255).to(torch.uint8)


class Digits8Network(nn.Module):
    """36,106 parameters: two convolutions, a 64-dimensional penultimate layer, ten logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(64)
        self.penultimate = nn.Linear(256, 64)
        self.logits = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 1, 8, 8] in [0, 1] -> (penultimate [B, 64] >= 0, logits [B, 10])."""
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.norm2(self.conv2(x))), 2)
        penultimate = F.relu(self.penultimate(x.flatten(1)))
        return penultimate, self.logits(penultimate)


def to_digits8(images: Tensor) -> Tensor:
    """uint8 images [B, C, H, W] -> gray float32 [B, 1, 8, 8] in [0, 1], by area averaging.

    Raises `UserError` unless height and width are multiples of 8.
    """
    height, width = images.shape[-2:]
    if height % 8 or width % 8:
        raise UserError(
            f"{DIGITS8}: images of {height}x{width} pixels cannot be averaged down to 8x8; "
            "use a resolution that is a multiple of 8"
        )
    gray = images.float().mean(dim=1, keepdim=True)
    return F.avg_pool2d(gray, (height // 8, width // 8)) / 255


class Digits8Extractor(FeatureExtractorBase):
    """`digits8-cnn-v1` for torch-fidelity: layers `penultimate` (64) and `logits` (10).

    `feature_extractor_weights_path` defaults to the shipped file. Raises `UserError` if its sha256
    is not that of the shipped file.
    """

    def __init__(
        self,
        name: str,
        features_list: list[str],
        feature_extractor_weights_path: Path | str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(name, features_list)
        path = Path(feature_extractor_weights_path or DIGITS8_WEIGHTS)
        found = _sha256(path)
        if found != DIGITS8_SHA256:
            raise UserError(
                f"{path}: not the weights of {DIGITS8} (sha256 {found[:8]}..., expected "
                f"{DIGITS8_SHA256[:8]}...); reinstall bigan"
            )
        self.network = Digits8Network()
        self.network.load_state_dict(safetensors.torch.load_file(path))
        self.network.eval()

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("penultimate", "logits")

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "penultimate"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        return torch.zeros(1, 1, 8, 8, dtype=torch.uint8)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """uint8 images [B, C, H, W] -> the requested layers, in the order of `features_list`."""
        penultimate, logits = self.network(to_digits8(images))
        layers = {"penultimate": penultimate, "logits": logits}
        return tuple(layers[name] for name in self.features_list)


if DIGITS8 not in FEATURE_EXTRACTORS_REGISTRY:
    register_feature_extractor(DIGITS8, Digits8Extractor)


def create(
    name: str,
    weights_path: Path | None = None,
    device: torch.device | str = "cpu",
    inception_sha256: str = INCEPTION_SHA256,
) -> Extractor:
    """The extractor `name` on `device`, its weights verified.

    `weights_path` is the Inception weights file; None: the folder of torch.hub is searched.
    `inception_sha256` holds the first hexadecimal digits of its sha256; tests pass that of a small
    file of their own. Raises `UserError` for an unknown name and for missing or wrong weights.
    """
    device = torch.device(device)
    if name == DIGITS8:
        return _digits8(device)
    if name == INCEPTION:
        return _inception(weights_path, device, inception_sha256)
    raise UserError(
        f"evaluation.extractor = {name!r}: expected {DIGITS8!r} (handwritten digits) "
        f"or {INCEPTION!r}"
    )


def _digits8(device: torch.device) -> Extractor:
    module = create_feature_extractor(DIGITS8, ["penultimate", "logits"], cuda=False, verbose=False)
    return Extractor(
        name=DIGITS8,
        sha256=DIGITS8_SHA256,
        preprocessing="mean of channels, area average to 8x8, /255",
        dim=64,
        num_classes=10,
        is_published=False,
        device=device,
        module=module.to(device),
    )


def _inception(weights_path: Path | None, device: torch.device, expected_sha256: str) -> Extractor:
    path = weights_path or Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    sha256 = _verified_inception(path, expected_sha256)
    module = create_feature_extractor(
        INCEPTION,
        ["2048", "logits_unbiased"],
        cuda=False,
        verbose=False,
        feature_extractor_weights_path=str(path),
    )
    return Extractor(
        name=INCEPTION,
        sha256=sha256,
        preprocessing="TensorFlow 1 bilinear to 299x299, (x - 128) / 128",
        dim=2048,
        num_classes=1008,
        is_published=True,
        device=device,
        module=module.to(device),
    )


@contextlib.contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Inside, TF32 and autocast are disabled; the former settings are restored on exit.

    bfloat16 features change FID by 2.7 %, and convolutions use TF32 on NVIDIA GPUs by default.
    """
    backends = (
        torch.backends.cuda.matmul,
        torch.backends.cudnn.conv,  # type: ignore[attr-defined]
        torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
        torch.backends.mkldnn.conv,  # type: ignore[attr-defined]
    )
    saved = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, saved, strict=True):
            backend.fp32_precision = precision


def _verified_inception(path: Path, expected: str) -> str:
    """The sha256 of the weights file at `path`; `UserError` unless it is the expected file."""
    instructions = (
        f"fetch {INCEPTION_URL} (91 MB) on a connected machine and either (a) set "
        f"evaluation.weights_path to the file or (b) leave evaluation.weights_path unset and "
        f"copy it, under its own name, to {Path(torch.hub.get_dir()) / 'checkpoints'}"
    )
    if not path.is_file():
        raise UserError(
            f"{path}: no Inception weights, and bigan does not download them; {instructions}"
        )
    found = _sha256(path)
    if not found.startswith(expected):
        raise UserError(
            f"{path}: not the Inception weights (sha256 begins with {found[:8]}, "
            f"expected {expected}); {instructions}"
        )
    try:
        # torch-fidelity unpickles the file without restriction, and eight digits of a hash do not
        # rule out a forgery. The restricted loader accepts tensors only, no code.
        torch.load(path, map_location="meta", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a plain file of tensors ({reason}); {instructions}") from None
    return found


def _sha256(path: Path) -> str:
    try:
        return sha256_of_file(path)
    except OSError as error:
        raise UserError(f"{path}: cannot read the weights: {error.strerror}") from None
