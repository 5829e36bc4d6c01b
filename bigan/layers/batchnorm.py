"""Batch normalization without running buffers, over one process or all of them.

In training mode a forward uses the statistics of its batch and writes nothing. In evaluation mode
it uses BigGAN's "standing statistics" (Brock et al. 2019, section 4.1), which
`collecting_statistics` accumulates explicitly, for example for the EMA of a generator.

With a process group, statistics are those of the global batch; every rank must have the same number
of images. They are computed in float32 (float64 for float64 input), also under autocast.
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
    """x -> mean of x over the ranks of a group; it is self-adjoint, so backward is the same mean.

    Rank r receives d(sum of all ranks' losses)/dx_r. Averaging parameter gradients over the ranks
    afterwards, as DDP does, gives the gradient of the mean loss.
    """

    @staticmethod
    def forward(x: Tensor, group_name: str, group_size: int) -> Tensor:
        # Only functional collectives work in eager mode, under autograd and in torch.compile.
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


class _Normalize(Layer):
    """x [B, C, H, W] -> gain * (x - mean) / sqrt(var + eps) + bias."""

    standing_mean: Tensor
    standing_var: Tensor

    def __init__(self, num_features: int, eps: float) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        # The name instead of the group: it can be deep-copied and traced by torch.compile.
        self.group_name: str | None = None
        self.group_size = 1
        self.register_buffer("standing_mean", torch.zeros(num_features))
        self.register_buffer("standing_var", torch.ones(num_features))

    def normalize(self, x: Tensor, gain: Tensor | None, bias: Tensor | None) -> Tensor:
        """`gain` and `bias`: [C], or [B, C] if they differ between images, or None."""
        dtype = x.dtype
        x = at_least_float32(x)
        if self.training and self.group_name is not None:
            joined_mean, scale = self._joined_statistics(x)
            # One multiplication and one addition per pixel; everything else has shape [B, C].
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
        """(mean, 1 / sqrt(var + eps)), each [C], over the batches of all ranks in the group.

        E[x^2] - E[x]^2 loses precision where the mean is large compared with the deviation, so it
        is computed in float64, which costs nothing for two numbers per channel.
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
        """Set the standing statistics to mean 0 and variance 1, in place."""
        with torch.no_grad():
            self.standing_mean.zero_()
            self.standing_var.fill_(1)

    def reset_parameters(self, generator: torch.Generator, scheme: Scheme = "orthogonal") -> None:
        """Statistics 0 and 1; nothing is drawn."""
        self.reset_statistics()


class BatchNorm2d(_Normalize):
    """Batch normalization of [B, C, H, W] with a learned gain and bias, if `affine`."""

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
        return self.normalize(x, self.weight, self.bias)


class ConditionalBatchNorm2d(_Normalize):
    """Batch normalization whose gain and bias are linear in a condition (BigGAN appendix B.1).

    x [B, C, H, W], cond [B, cond_dim] -> [B, C, H, W], with gain = 1 + W_g cond, bias = W_b cond.
    Without the 1 the output of a layer with small weights would be close to 0.
    """

    def __init__(
        self, num_features: int, cond_dim: int, eps: float = 1e-4, sn_eps: float = 1e-4
    ) -> None:
        super().__init__(num_features, eps)
        self.gain = SNLinear(cond_dim, num_features, bias=False, eps=sn_eps)
        self.bias = SNLinear(cond_dim, num_features, bias=False, eps=sn_eps)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        gain, bias = at_least_float32(self.gain(cond)), at_least_float32(self.bias(cond))
        return self.normalize(x, 1 + gain, bias)


def _over_map(x: Tensor) -> Tensor:
    return x[..., None, None]


def normalization_layers(network: nn.Module) -> list[_Normalize]:
    """Every batch normalization layer of `network`, in registration order."""
    return [module for module in network.modules() if isinstance(module, _Normalize)]


def set_process_group(network: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Compute the batch statistics of `network` over `group`; None: over each process alone.

    Layers store the name of the group instead of the group, so that networks can be deep-copied.
    """
    size = 1 if group is None else dist.get_world_size(group)
    for layer in normalization_layers(network):
        layer.group_name = group.group_name if group is not None and size > 1 else None
        layer.group_size = size


@contextlib.contextmanager
def collecting_statistics(
    network: nn.Module, reduce: Callable[[Tensor], None] | None = None
) -> Iterator[None]:
    """Context that sets the standing statistics from the forwards inside; gradients are disabled.

    The network is in training mode inside; on exit each module returns to its former mode, and the
    mean and variance of each layer are set to those of all its inputs, pooled. `reduce` sums a
    float64 tensor over the ranks in place, so that all ranks get equal statistics. Forwards must be
    eager, because forward hooks do not run in compiled graphs. Raises RuntimeError if there was no
    forward. After an exception inside, the former statistics are kept.
    """
    layers = normalization_layers(network)
    # Per layer: sum of x, sum of x^2, number of values per channel; pooled in float64.
    sums = [
        torch.zeros(2 * n.num_features + 1, dtype=torch.float64, device=n.standing_mean.device)
        for n in layers
    ]
    handles = [
        layer.register_forward_pre_hook(_adding_to(total))
        for layer, total in zip(layers, sums, strict=True)
    ]
    # Of each module: a ModuleList made of networks in evaluation mode is itself in training mode.
    modes = {module: module.training for module in network.modules()}
    network.train()
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    if not layers:
        return
    joined = torch.cat(sums)
    if reduce is not None:
        reduce(joined)
    for layer, total in zip(layers, joined.split([t.numel() for t in sums]), strict=True):
        if total[-1] == 0:
            raise RuntimeError(
                f"collecting_statistics: {type(network).__name__} had no eager forward inside"
            )
        mean, mean_square = (total[:-1] / total[-1]).chunk(2)
        layer.standing_mean.copy_(mean)
        layer.standing_var.copy_((mean_square - mean.square()).clamp_min(0))


def _adding_to(total: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def add(layer: nn.Module, args: tuple[Any, ...]) -> None:
        x: Tensor = args[0]
        # float32 is accurate enough for the moments of one batch, but not for their sums.
        var, mean = torch.var_mean(at_least_float32(x), dim=(0, 2, 3), correction=0)
        mean, var = mean.double(), var.double()
        num = x.numel() // x.shape[1]
        total.add_(F.pad(torch.cat([mean, var + mean.square()]), (0, 1), value=1.0), alpha=num)

    return add
