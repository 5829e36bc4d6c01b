"""Gradients directly before an optimizer step: clipping, unscaling and skipping."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def clip(gradients: Sequence[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale `gradients` in place so that their global norm, `norm` (0-d), is at most `max_norm`.

    As `torch.nn.utils.clip_grad_norm_` (Pascanu et al. 2013, arXiv:1211.5063, algorithm 1), which
    accepts no `norm` that was reduced over ranks.
    """
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    if gradients:
        torch._foreach_mul_(list(gradients), factor.to(gradients[0].device))


@torch.no_grad()
def apply_flags(
    optimizer: torch.optim.Optimizer,
    gradients: Sequence[Tensor],
    skip: Tensor,
    loss_scale: Tensor | None,
) -> None:
    """Make the next step unscale gradients, and skip it if `skip` (0-d) is not 0.

    Fused kernels take both as `grad_scale` and `found_inf`, which `torch.amp.GradScaler` sets in
    the same way; a skipped step leaves weights and state unchanged. For optimizers without a fused
    kernel (RMSprop) the gradients are unscaled and zeroed here, and a momentum buffer is zeroed:
    the weights do not change, but the running mean of squared gradients decays.
    """
    if optimizer.defaults.get("fused"):
        _start_momentum(optimizer)
        optimizer.grad_scale = loss_scale  # type: ignore[attr-defined]
        optimizer.found_inf = skip  # type: ignore[attr-defined]
        return
    for gradient in gradients:
        if loss_scale is not None:
            gradient.div_(loss_scale)
        gradient.copy_(torch.where(skip > 0, 0.0, gradient))  # NaN * 0 is NaN
    for state in optimizer.state.values():
        buffer = state.get("momentum_buffer")
        if buffer is not None:
            buffer.mul_(1 - skip)


def _start_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Create momentum buffers of SGD at zero: the kernel would leave one of a skipped first step
    uninitialized. Without a skip the first step sets them to the gradient either way.
    """
    if not optimizer.defaults.get("momentum"):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if parameter.grad is not None and state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter).detach()
