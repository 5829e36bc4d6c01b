"""Samplers: how images are made from the networks of a snapshot.

Samplers are the only interface of the sample grid, the standing BatchNorm statistics, the evaluator
and `bigan.sample` to a method. Draws are a function of (seed, stream, counter), so that an image
does not depend on the number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from bigan import rng

Tensors = dict[str, Tensor]
MIN_TRUNCATION = 0.02  # 1.6 % of all normal numbers are within; drawing again takes ever longer
Truncates = Literal["z", "w", ""]


class Sampler(Protocol):
    """Makes images from networks, random inputs and, if `inputs` is set, images of a stream."""

    @property
    def networks(self) -> tuple[str, ...]:
        """Networks that it uses; a snapshot stores them (their EMA where there is one)."""

    @property
    def inputs(self) -> str | None:
        """Data stream that it translates, encodes or enlarges."""

    @property
    def reference(self) -> str:
        """Data stream that its images are compared with."""

    @property
    def truncates(self) -> Truncates:
        """Space of the truncation: "z" (bound on |z|), "w" (psi), or "" for none."""

    @property
    def labeled(self) -> bool:
        """Whether the label determines the class of an image."""

    def draws(self, seed: int, stream: str, at: int, num: int, truncation: float | None) -> Tensors:
        """Random inputs of `num` images on the CPU, first axis `num`."""

    def __call__(self, networks: Mapping[str, nn.Module], inputs: Tensors) -> Tensor:
        """Images float [m, C, H, W], nominally in [-1, 1]. With `inputs` a stream's name, the keys
        "<stream>.pixels" and "<stream>.labels" are in the inputs too."""


def truncation_problem(sampler: Sampler, truncation: float | None) -> str | None:
    """Why a sampler does not support this truncation, or None."""
    if truncation is None:
        return None
    if not sampler.truncates:
        return "the sampler does not support truncation; leave it out"
    if truncation < MIN_TRUNCATION:
        return f"almost no latent is within so small a bound; use {MIN_TRUNCATION} or more"
    if sampler.truncates == "w" and truncation > 1:
        return "it is psi, the factor on a latent's distance from the mean latent; use 1 or less"
    return None


def truncated_normal(
    seed: int, stream: str, counter: int, shape: Sequence[int], truncation: float | None
) -> Tensor:
    """Standard normal float32 of `shape`; values with |z| > truncation are resampled.

    The truncation trick of BigGAN (Brock et al. 2019, section 3.1); None: a plain normal.
    """
    generator = rng.numpy_generator(seed, stream, counter)
    z = generator.standard_normal(shape, dtype=np.float32)
    if truncation is not None:
        while (outside := np.abs(z) > truncation).any():
            z[outside] = generator.standard_normal(int(outside.sum()), dtype=np.float32)
    return torch.from_numpy(z)


@dataclass(frozen=True)
class LatentSampler:
    """Images of latents z and class labels, drawn with the class frequencies of the data.

    A truncation bounds |z| (BigGAN), or, for a generator with a mean latent ("w"), is psi, the
    factor on a latent's distance from it (Karras et al. 2019, arXiv:1812.04948, appendix B).
    """

    network: str
    z_dim: int
    class_counts: tuple[int, ...]
    truncates: Truncates = "z"
    labeled: bool = True
    inputs: str | None = None
    reference: str = "images"

    @property
    def networks(self) -> tuple[str, ...]:
        return (self.network,)

    def draws(self, seed: int, stream: str, at: int, num: int, truncation: float | None) -> Tensors:
        bound = truncation if self.truncates == "z" else None
        draws = {
            "z": truncated_normal(seed, f"{stream}/z", at, (num, self.z_dim), bound),
            "labels": rng.labels(seed, f"{stream}/labels", at, num, self.class_counts),
        }
        if self.truncates == "w" and truncation is not None:
            draws["truncation_psi"] = torch.full((num,), truncation)
        return draws

    def __call__(self, networks: Mapping[str, nn.Module], inputs: Tensors) -> Tensor:
        options = {key: inputs[key] for key in ("truncation_psi",) if key in inputs}
        images: Tensor = networks[self.network](inputs["z"], inputs["labels"], **options)
        return images
