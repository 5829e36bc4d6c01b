"""Spectral normalization (Miyato et al. 2018, arXiv:1802.05957) with an explicit power iteration.

The forward of a layer uses `weight / sigma` with sigma = u^T W v, where W is the weight as a matrix
with one row per output. The unit vectors u and v are constants: the gradient flows through W alone
(their equation 12). The forward writes nothing, so that it can be differentiated by torch.func and
compiled; the trainer calls `power_iteration` between two steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigan.layers.init import Layer, Scheme, initial_weight
from bigan.layers.precision import without_autocast

# As many as torch's spectral norm begins with; random vectors would give a sigma near 0.
INITIAL_POWER_ITERATIONS = 15


class SpectralNorm(Layer):
    """A raw `weight` and estimates `u`, `v` of its first pair of singular vectors.

    Built with zeros, which give no finite output: call `reset_parameters`, or load a state dict.
    `eps` is the lower bound of the norms that the power iteration divides by.
    """

    u: Tensor
    v: Tensor
    bias: nn.Parameter | None

    def __init__(self, shape: Sequence[int], bias: bool, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(tuple(shape)))
        self.register_parameter("bias", nn.Parameter(torch.zeros(shape[0])) if bias else None)
        rows = self.weight.flatten(1)
        self.register_buffer("u", torch.zeros(rows.shape[0]))
        self.register_buffer("v", torch.zeros(rows.shape[1]))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator, scheme: Scheme = "orthogonal") -> None:
        """Weight by `scheme`, `u` and `v` iterated from a random `v`, bias 0."""
        self.weight.copy_(initial_weight(self.weight.shape, generator, scheme))
        self.v.copy_(F.normalize(torch.empty(self.v.shape).normal_(generator=generator), dim=0))
        for _ in range(INITIAL_POWER_ITERATIONS):
            self.iterate()
        if self.bias is not None:
            self.bias.zero_()

    def singular_value(self) -> Tensor:
        """Scalar sigma = u^T W v; differentiable with respect to `weight`."""
        # Autocast would round the matrix product, hence every weight, to bfloat16.
        with without_autocast(self.weight):
            return torch.dot(self.u, torch.mv(self.weight.flatten(1), self.v))

    def normalized_weight(self) -> Tensor:
        """`weight / sigma`, of the weight's shape; its largest singular value is about 1."""
        return self.weight / self.singular_value()

    @torch.no_grad()
    def iterate(self, eps: float | None = None) -> None:
        """One power iteration in place: u = W v / |W v|, then v = W^T u / |W^T u|."""
        rows = self.weight.flatten(1)
        eps = self.eps if eps is None else eps
        with without_autocast(rows):
            F.normalize(torch.mv(rows, self.v), dim=0, eps=eps, out=self.u)
            F.normalize(torch.mv(rows.t(), self.u), dim=0, eps=eps, out=self.v)


class SNLinear(SpectralNorm):
    """Spectrally normalized linear map [..., in] -> [..., out]."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, eps: float = 1e-4
    ) -> None:
        super().__init__((out_features, in_features), bias, eps)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.normalized_weight(), self.bias)


class SNConv2d(SpectralNorm):
    """Spectrally normalized convolution: odd kernel, stride 1, zero padding that keeps the size."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        bias: bool = True,
        eps: float = 1e-4,
    ) -> None:
        super().__init__((out_channels, in_channels, kernel_size, kernel_size), bias, eps)
        self.padding = kernel_size // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.normalized_weight(), self.bias, padding=self.padding)


class SNEmbedding(SpectralNorm):
    """Spectrally normalized embedding: labels int64 [...] -> [..., dim]."""

    def __init__(self, num_embeddings: int, dim: int, eps: float = 1e-4) -> None:
        super().__init__((num_embeddings, dim), bias=False, eps=eps)

    def forward(self, labels: Tensor) -> Tensor:
        # Dividing the selected rows instead of the table gives equal numbers with less memory.
        return F.embedding(labels, self.weight) / self.singular_value()


def spectral_layers(network: nn.Module) -> Iterator[tuple[str, SpectralNorm]]:
    """(name, layer) of every spectrally normalized layer in `network`, in registration order."""
    for name, module in network.named_modules():
        if isinstance(module, SpectralNorm):
            yield name, module


def power_iteration(network: nn.Module, eps: float | None = None, num: int = 1) -> None:
    """`num` power iterations, in place, of every spectrally normalized layer in `network`.

    Call it once before each training step of the network. (Published code iterates in every
    training forward, so `num` forwards of gradient accumulation iterate `num` times.) `eps`
    overrides that of the layers. Weights and vectors that are equal on all ranks stay equal.
    """
    for _, layer in spectral_layers(network):
        for _ in range(num):
            layer.iterate(eps)


@torch.no_grad()
def singular_values(network: nn.Module) -> dict[str, Tensor]:
    """Layer name -> estimate of its largest singular value, scalars on the layers' device."""
    return {name: layer.singular_value() for name, layer in spectral_layers(network)}
