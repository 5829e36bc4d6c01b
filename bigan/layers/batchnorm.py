"""Batch normalisation without running buffers, over one process or all of them.

In training a forward uses the statistics of its batch and writes nothing. For the averaged
generator, BigGAN's "standing statistics" (Brock et al. 2019, section 4.1) are accumulated on
purpose by `collecting_statistics` and used in evaluation mode.

With a process group set, the batch is the joined batch of its ranks, each of which must bring the
same number of images. Statistics are computed in float32 (float64 for float64 input) whatever
the autocast.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from bigan.layers.init import Layer, Scheme
from bigan.layers.precision import at_least_float32
from bigan.layers.spectral import SNLinear


class _AverageOverRanks(torch.autograd.Function):
    """x -> mean of x over the ranks of a group. Self-adjoint, hence its own backward.

    Rank r receives d(sum of all ranks' losses)/dx_r; averaging parameter gradients over the ranks
    afterwards (DDP) gives the gradient of the mean loss.
    """

    @staticmethod
    def forward(x: Tensor, group_name: str, group_size: int) -> Tensor:
        # Functional collectives: the one form that eager, autograd and torch.compile all take.
        total = torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", group_name)
        return torch.ops._c10d_functional.wait_tensor(total) / group_size

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str, int], output: Tensor) -> None:
        _, ctx.group_name, ctx.group_size = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return average_over_ranks(grad, ctx.group_name, ctx.group_size), None, None


def average_over_ranks(x: Tensor, group_name: str, group_size: int) -> Tensor:
    """Mean of `x` over the ranks of a process group; differentiable any number of times."""
    return _AverageOverRanks.apply(x, group_name, group_size)


class _Normalise(Layer):
    """x [B, C, H, W] -> gain * (x - mean) / sqrt(var + eps) + bias."""

    standing_mean: Tensor
    standing_var: Tensor

    def __init__(self, num_features: int, eps: float) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        # The group by name: a string can be copied with the network and is seen by the compiler.
        self.group_name: str | None = None
        self.group_size = 1
        self.register_buffer("standing_mean", torch.zeros(num_features))
        self.register_buffer("standing_var", torch.ones(num_features))

    def normalise(self, x: Tensor, gain: Tensor | None, bias: Tensor | None) -> Tensor:
        """gain and bias of shape [C] (one per channel), [B, C] (one per image too) or None."""
        dtype = x.dtype
        x = at_least_float32(x)
        if self.training and self.group_name is not None:
            joined_mean, scale = self._joined_statistics(x)
            # One multiplication and one addition over the map, everything else is [B, C].
            scale = scale if gain is None else gain * scale
            shift = -joined_mean * scale if bias is None else bias - joined_mean * scale
            return (x * _over_map(scale) + _over_map(shift)).to(dtype)
        mean = None if self.training else self.standing_mean
        var = None if self.training else self.standing_var
        if gain is None or bias is None or gain.ndim == 1:
            y = F.batch_norm(x, mean, var, gain, bias, training=self.training, eps=self.eps)
        else:
            y = F.batch_norm(x, mean, var, training=self.training, eps=self.eps)
            y = y * _over_map(gain) + _over_map(bias)
        return y.to(dtype)

    def _joined_statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, 1 / sqrt(var + eps)), each [C], of the batch joined over the group.

        E[x^2] - E[x]^2 cancels where a mean is large against the spread: for two numbers per
        channel float64 costs nothing, and keeps what the ranks measured.
        """
        assert self.group_name is not None
        var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
        var, mean = var.double(), mean.double()
        mean, mean_square = average_over_ranks(
            torch.stack([mean, var + mean.square()]), self.group_name, self.group_size
        )
        scale = torch.rsqrt((mean_square - mean.square()).clamp_min(0) + self.eps)
        return mean.to(x.dtype), scale.to(x.dtype)

    def reset_statistics(self) -> None:
        """Standing statistics of a layer that has seen nothing: mean 0, variance 1."""
        with torch.no_grad():
            self.standing_mean.zero_()
            self.standing_var.fill_(1)

    def reset_parameters(self, generator: torch.Generator, scheme: Scheme = "orthogonal") -> None:
        """Statistics 0 and 1; nothing is drawn."""
        self.reset_statistics()


class BatchNorm2d(_Normalise):
    """Batch normalisation of [B, C, H, W] with a learned gain and bias, if `affine`."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, num_features: int, eps: float = 1e-4, affine: bool = True) -> None:
        super().__init__(num_features, eps)
        ones, zeros = torch.ones(num_features), torch.zeros(num_features)
        self.register_parameter("weight", nn.Parameter(ones) if affine else None)
        self.register_parameter("bias", nn.Parameter(zeros) if affine else None)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator, scheme: Scheme = "orthogonal") -> None:
        """Gain 1, bias 0, statistics 0 and 1; nothing is drawn."""
        super().reset_parameters(generator, scheme)
        if self.weight is not None:
            self.weight.fill_(1)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.normalise(x, self.weight, self.bias)


class ConditionalBatchNorm2d(_Normalise):
    """Batch normalisation whose gain and bias are linear in a condition (BigGAN appendix B.1).

    gain = 1 + W_g cond, bias = W_b cond; x [B, C, H, W], cond [B, cond_dim] -> [B, C, H, W].
    The 1 matters: without it a layer with small weights passes nothing on.
    """

    def __init__(
        self, num_features: int, cond_dim: int, eps: float = 1e-4, sn_eps: float = 1e-4
    ) -> None:
        super().__init__(num_features, eps)
        self.gain = SNLinear(cond_dim, num_features, bias=False, eps=sn_eps)
        self.bias = SNLinear(cond_dim, num_features, bias=False, eps=sn_eps)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        gain, bias = at_least_float32(self.gain(cond)), at_least_float32(self.bias(cond))
        return self.normalise(x, 1 + gain, bias)


def _over_map(x: Tensor) -> Tensor:
    return x[..., None, None]


def normalisation_layers(network: nn.Module) -> list[_Normalise]:
    """Every batch normalisation of this file in `network`, in registration order."""
    return [module for module in network.modules() if isinstance(module, _Normalise)]


def set_process_group(network: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Let `network`'s layers share batch statistics over `group`; None: each process its own.

    The name of the group is kept, not the group, so that the network can still be copied.
    """
    size = 1 if group is None else dist.get_world_size(group)
    for layer in normalisation_layers(network):
        layer.group_name = group.group_name if group is not None and size > 1 else None
        layer.group_size = size


@contextlib.contextmanager
def collecting_statistics(
    network: nn.Module, reduce: Callable[[Tensor], None] | None = None
) -> Iterator[None]:
    """Set the standing statistics from the forwards made inside; no gradients are recorded.

    The network is in training mode inside, and back in its former mode afterwards. On leaving,
    each layer's mean and variance are those of all its inputs pooled; `reduce` sums a float64
    tensor over the ranks in place, so that all ranks get the same. Forwards must be eager: a
    compiled graph does not report. Raises RuntimeError if there were none; on an exception the
    old statistics stay.
    """
    layers = normalisation_layers(network)
    # Per layer: sum of x, sum of x^2, number of values per channel; pooled in float64.
    sums = [
        torch.zeros(2 * n.num_features + 1, dtype=torch.float64, device=n.standing_mean.device)
        for n in layers
    ]
    handles = [
        layer.register_forward_pre_hook(_adding_to(total))
        for layer, total in zip(layers, sums, strict=True)
    ]
    was_training = network.training
    network.train()
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        network.train(was_training)
    if not layers:
        return
    joined = torch.cat(sums)
    if reduce is not None:
        reduce(joined)
    for layer, total in zip(layers, joined.split([t.numel() for t in sums]), strict=True):
        if total[-1] == 0:
            raise RuntimeError("collecting_statistics: no eager forward was made inside")
        mean, mean_square = (total[:-1] / total[-1]).chunk(2)
        layer.standing_mean.copy_(mean)
        layer.standing_var.copy_((mean_square - mean.square()).clamp_min(0))


def _adding_to(total: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def add(layer: nn.Module, args: tuple[Any, ...]) -> None:
        x: Tensor = args[0]
        # The mean and variance of one batch are accurate in float32; their sums need float64.
        var, mean = torch.var_mean(at_least_float32(x), dim=(0, 2, 3), correction=0)
        mean, var = mean.double(), var.double()
        num = x.numel() // x.shape[1]
        total.add_(F.pad(torch.cat([mean, var + mean.square()]), (0, 1), value=1.0), alpha=num)

    return add
