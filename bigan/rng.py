"""Counter-based draws: every random number is a function of (seed, stream name, images_seen).

Draws are made for the global batch and each rank takes its slice, so that any world size trains on
the same latents and a resume needs no generator state. Philox4x64 (Salmon et al. 2011, "Parallel
random numbers: as easy as 1, 2, 3") is keyed with a 128-bit hash of the triple, so that different
triples have independent streams. Draws are made on the host, outside compiled code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.random.bit_generator import ISeedSequence
from numpy.typing import NDArray
from torch import Tensor


class _Key(ISeedSequence):
    """Passes a key to Philox; `Philox(key=...)` would read entropy from the system first."""

    def __init__(self, key: NDArray[np.uint64]) -> None:
        self._key = key

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> Any:
        return self._key


def numpy_generator(seed: int, stream: str, counter: int) -> np.random.Generator:
    """A Philox generator keyed by blake2b(seed, stream, counter)."""
    digest = hashlib.blake2b(f"{seed}/{stream}/{counter}".encode(), digest_size=16).digest()
    key = np.frombuffer(digest, dtype=np.uint64)
    return np.random.Generator(np.random.Philox(_Key(key)))  # type: ignore[arg-type]


def torch_generator(seed: int, stream: str, counter: int = 0) -> torch.Generator:
    """A CPU torch generator seeded by the triple, for initialisers."""
    digest = hashlib.blake2b(f"{seed}/{stream}/{counter}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def normal(seed: int, stream: str, images_seen: int, shape: Sequence[int]) -> Tensor:
    """Standard normal float32 [*shape] on the CPU."""
    draws = numpy_generator(seed, stream, images_seen).standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(draws)


def uniform(seed: int, stream: str, images_seen: int, shape: Sequence[int]) -> Tensor:
    """Uniform float32 in [0, 1), [*shape], on the CPU."""
    return torch.from_numpy(numpy_generator(seed, stream, images_seen).random(shape, np.float32))


def labels(
    seed: int, stream: str, images_seen: int, num: int, class_counts: Sequence[int]
) -> Tensor:
    """int64 [num] labels, drawn in proportion to `class_counts`, the images of each class.

    For a balanced data set that is the uniform distribution of the papers.
    """
    edges = np.cumsum(np.asarray(class_counts, dtype=np.float64))
    points = numpy_generator(seed, stream, images_seen).random(num) * edges[-1]
    return torch.from_numpy(np.searchsorted(edges, points, side="right").astype(np.int64))
