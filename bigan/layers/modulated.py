"""Modulated convolution with demodulation (Karras et al. 2020, arXiv:1912.04958, section 2.2).

Image b is convolved with the weights w_oik s_bi, divided by their norm per output channel o
(equations 1 and 3). This is computed as: scale the input channels, convolve with weights shared by
all images, scale the output channels. The result is the same, without B copies of the weights and
without grouped convolutions, whose second derivatives are slow or missing.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from bigan.layers.blur import blur
from bigan.layers.equalized import Equalized, EqualizedLinear
from bigan.layers.precision import at_least_float32, without_autocast


def modulated_conv2d(
    x: Tensor, weight: Tensor, styles: Tensor, demodulate: bool = True, up: bool = False
) -> Tensor:
    """x [B, in, H, W], weight [out, in, k, k], styles [B, in] -> [B, out, H, W].

    k is odd, and zero padding keeps the size. With `up` the result is [B, out, 2H, 2W], for k = 3:
    zeros between the pixels, convolution, `blur`, times 4. As in the published code, the weight is
    then applied as a convolution instead of a correlation: mirrored compared with `up=False`.
    """
    with without_autocast(x):
        styles = at_least_float32(styles)
        # float16 does not overflow in x * styles if no style is above 1: the largest is divided out
        # before the convolution and multiplied back after it. It cancels, so it needs no gradient.
        largest = styles.detach().abs().amax(dim=1, keepdim=True).clamp_min(1e-8)
        factors = largest
        if demodulate:
            energy = at_least_float32(weight).square().sum(dim=(2, 3))  # [out, in]
            factors = factors * (styles.square() @ energy.t() + 1e-8).rsqrt()  # [B, out]
        if up:
            factors = factors * 4
    x = x * (styles / largest).to(x.dtype)[:, :, None, None]
    if up:
        x = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)  # [B, out, 2H + 1, 2W + 1]
    else:
        x = F.conv2d(x, weight, padding=weight.shape[2] // 2)
    x = x * factors.to(x.dtype)[:, :, None, None]
    return blur(x, padding=1) if up else x


class ModulatedConv2d(Equalized):
    """x [B, in, H, W], w [B, w_dim] -> [B, out, H, W], or [B, out, 2H, 2W] with `up`.

    styles = A w + b, with initial value 1 of b. A bias is added after the convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        w_dim: int,
        demodulate: bool = True,
        up: bool = False,
    ) -> None:
        super().__init__((out_channels, in_channels, kernel_size, kernel_size))
        self.demodulate = demodulate
        self.up = up
        self.style = EqualizedLinear(w_dim, in_channels, initial_bias=1.0)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        with without_autocast(w):
            styles = self.style(w)
        y = modulated_conv2d(x, self.effective_weight(), styles, self.demodulate, self.up)
        assert self.bias is not None
        return y + self.bias.to(y.dtype)[:, None, None]
