"""ProGAN: widths, formulas of both networks, and growth from one stage to the next."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import make, resolutions, small
from network_parts import batch, built
from torch import Tensor, nn

from bigan.models.progan import GAIN, Config, Generator, PooledConv2d

RESOLUTIONS = resolutions("progan")
# Table 2 of the paper, at resolutions 4 to 1024.
PUBLISHED_CHANNELS = (512, 512, 512, 512, 256, 128, 64, 32, 16)


def full(resolution: int, **changes: object) -> Config:
    """A stage of the published networks."""
    config = make("progan", {"resolution": resolution, "num_classes": 1} | changes)
    assert isinstance(config, Config)
    return config


def tiny(**changes: object) -> Config:
    """A conditional stage of 8 px that is not fading in, unless changed."""
    config = small("progan", **({"fading": False} | changes))
    assert isinstance(config, Config)
    return config


def networks(config: Config, seed: int = 0) -> list[Any]:
    """Initialised, with biases that are not 0, so that a missing one changes the result."""
    pair = built(config)
    for number, network in enumerate(pair):
        draw = torch.Generator().manual_seed(2 * seed + number)
        network.init_weights(draw)
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.data.normal_(generator=draw)
    return pair


# --- parameter counts and widths -----------------------------------------------------------------


def num_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def expected_counts(
    resolution: int, z_dim: int, colours: int, widths: dict[int, int], classes: int, fading: bool
) -> tuple[int, int]:
    """Layer by layer, from the paper's table; `widths` are by resolution, 2 px the last of D."""

    def conv3(n_in: int, n_out: int) -> int:
        return 3 * 3 * n_in * n_out + n_out

    # z (and classes) -> 4 x 4, with a bias per channel.
    generator = (z_dim + classes) * 16 * widths[4] + widths[4] + conv3(widths[4], widths[4])
    discriminator = conv3(widths[4] + 1, widths[4])
    discriminator += 16 * widths[4] * widths[2] + widths[2] + widths[2] + 1 + classes * widths[2]
    r = 8
    while r <= resolution:
        generator += conv3(widths[r // 2], widths[r]) + conv3(widths[r], widths[r])
        discriminator += conv3(widths[r], widths[r]) + conv3(widths[r], widths[r // 2])
        r *= 2
    for r in [resolution, resolution // 2] if fading else [resolution]:
        generator += widths[r] * colours + colours
        discriminator += widths[r] * colours + widths[r]
    return generator, discriminator


@pytest.mark.parametrize("fading", [False, True])
@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_every_stage_has_the_layers_of_the_table(
    resolution: int, conditional: bool, fading: bool
) -> None:
    fading = fading and resolution > 4
    config = full(
        resolution, fading=fading, conditional=conditional, num_classes=10, z_dim=128,
        image_channels=1, base_channels=4096, max_channels=128,
    )  # fmt: skip
    generator, discriminator = built(config, "meta")
    # base 4096 and at most 128: what the paper uses for CIFAR.
    widths = dict(zip((2, *RESOLUTIONS), (128,) * 6 + (64, 32, 16, 8), strict=True))
    counts = expected_counts(resolution, 128, 1, widths, 10 * conditional, fading)
    assert (num_parameters(generator), num_parameters(discriminator)) == counts


def test_channels_of_each_resolution_are_the_published_ones() -> None:
    generator, discriminator = built(full(1024), "meta")
    found = [block.conv2.weight.shape[0] for name, block in generator.blocks.items() if name != "4"]
    assert (generator.blocks["4"].conv.weight.shape[0], *found) == PUBLISHED_CHANNELS
    entering = {
        int(name): block.conv1.weight.shape[1]
        for name, block in discriminator.blocks.items()
        if name != "4"
    }
    assert entering == dict(zip(RESOLUTIONS[:0:-1], PUBLISHED_CHANNELS[:0:-1], strict=True))
    assert discriminator.blocks["4"].conv.weight.shape == (512, 513, 3, 3)
    # The last features are those of "2 px": with a high ceiling, twice as many as at 4 px.
    _, discriminator = built(tiny(max_channels=100), "meta")
    assert discriminator.blocks["4"].linear.weight.shape == (16, 16 * 8)


# --- formulas ------------------------------------------------------------------------------------


def rms_norm(x: Tensor) -> Tensor:
    return x / (x.square().sum(1, keepdim=True) / x.shape[1] + 1e-8).sqrt()


def lrelu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.2 * x)


def up(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def down(x: Tensor) -> Tensor:
    return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4


def conv(network: nn.Module, name: str, x: Tensor, gain: float = 2**0.5) -> Tensor:
    """A convolution whose weights have the standard deviation gain / sqrt(fan-in)."""
    state = network.state_dict()
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    fan_in = weight.shape[1] * weight.shape[2] ** 2
    return F.conv2d(x, weight * (gain / fan_in**0.5), bias, padding=weight.shape[2] // 2)


@pytest.mark.parametrize("fading", [False, True])
def test_generator_equals_its_formula(fading: bool) -> None:
    config = tiny(fading=fading)
    generator, _ = networks(config)
    generator.alpha.fill_(0.3)  # without effect when not fading
    z, labels, _ = batch(config)
    one_hot = torch.eye(5)[labels]
    first = generator.blocks["4"]
    weight = first.linear.weight * (2**0.5 / 4 / (7 + 5) ** 0.5)
    h = torch.cat([rms_norm(z), one_hot], dim=1) @ weight.t()
    h = rms_norm(lrelu(h.reshape(8, 6, 4, 4) + first.bias.reshape(1, 6, 1, 1)))
    h4 = rms_norm(lrelu(conv(generator, "blocks.4.conv", h)))
    h = rms_norm(lrelu(conv(generator, "blocks.8.conv1", up(h4))))
    h = rms_norm(lrelu(conv(generator, "blocks.8.conv2", h)))
    expected = conv(generator, "to_image.8", h, gain=1)
    if fading:
        coarse = conv(generator, "to_image.4", h4, gain=1)
        expected = 0.7 * up(coarse) + 0.3 * expected
    torch.testing.assert_close(generator(z, labels), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("fading", [False, True])
def test_discriminator_equals_its_formula(fading: bool, fused: bool) -> None:
    config = tiny(fading=fading, fused_scale=fused)
    _, discriminator = networks(config)
    discriminator.alpha.fill_(0.3)
    _, labels, images = batch(config)
    h = lrelu(conv(discriminator, "from_image.8", images))
    h = lrelu(conv(discriminator, "blocks.8.conv1", h))
    # The mean of the bias is the bias: only the activation sees whether it is before the pooling.
    h = conv(discriminator, "blocks.8.conv2", h)
    h = lrelu(down(h)) if fused else down(lrelu(h))
    if fading:
        h = 0.7 * lrelu(conv(discriminator, "from_image.4", down(images))) + 0.3 * h
    extra = torch.cat(
        [((g.var(0, correction=0) + 1e-8).sqrt().mean()).expand(4, 1, 4, 4) for g in h.split(4)]
    )
    h = lrelu(conv(discriminator, "blocks.4.conv", torch.cat([h, extra], dim=1)))
    last = discriminator.blocks["4"].linear
    h = lrelu(h.reshape(8, -1) @ (last.weight * (2**0.5 / (16 * 6) ** 0.5)).t() + last.bias)
    expected = h @ (discriminator.linear.weight[0] / 6**0.5) + discriminator.linear.bias
    expected = expected + (discriminator.embedding.weight[labels] / 6**0.5 * h).sum(1)
    torch.testing.assert_close(discriminator(images, labels), expected, rtol=1e-4, atol=1e-5)


def test_fused_scale_is_a_strided_convolution_with_the_mean_of_shifted_kernels() -> None:
    """Output and gradients in float64, with a non-square map; and the order that it implies."""
    draw = torch.Generator().manual_seed(5)
    layer = PooledConv2d(3, 4, 3, gain=GAIN).double()
    x = torch.randn(2, 3, 6, 10, generator=draw, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=draw)
    weight = layer.weight * math.sqrt(2 / (9 * 3))
    kernel = torch.zeros(4, 3, 4, 4, dtype=torch.float64)
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
        kernel = kernel + F.pad(weight, (j, 1 - j, i, 1 - i)) / 4
    pooled = down(F.conv2d(x, weight, padding=1)) + layer.bias[:, None, None]
    leaves = [x, layer.weight, layer.bias]
    for expected in (F.conv2d(x, kernel, layer.bias, stride=2, padding=1), pooled):
        results = []
        for y in (layer(x), expected):
            gradients = torch.autograd.grad(y.pow(3).sum(), leaves, create_graph=True)
            penalty = gradients[0].square().sum()
            again = torch.autograd.grad(penalty, leaves, retain_graph=True)
            results.append([y, *gradients, *again])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_fused_scale_keeps_names_and_shapes_of_all_parameters() -> None:
    """And the generator as it is: bias and activation follow its enlarged convolutions anyway."""
    plain, fused = (networks(tiny(fused_scale=value)) for value in (False, True))
    for one, other in zip(plain, fused, strict=True):
        shapes, others = ({n: p.shape for n, p in x.named_parameters()} for x in (one, other))
        assert list(shapes.items()) == list(others.items())
    z, labels, images = batch(tiny())
    assert torch.equal(plain[0](z, labels), fused[0](z, labels))
    assert not torch.allclose(plain[1](images, labels), fused[1](images, labels))


def test_without_conditional_labels_have_no_effect() -> None:
    config = tiny(conditional=False)
    generator, discriminator = networks(config)
    z, labels, images = batch(config)
    assert generator.blocks["4"].linear.weight.shape[1] == 7
    assert discriminator.embedding is None
    others = (labels + 1) % 5
    for network, x in zip(networks(tiny()), (z, images), strict=True):
        difference = network(x, labels) - network(x, others)
        assert (difference.reshape(8, -1).abs().amax(1) > 1e-3).all()


@pytest.mark.parametrize("fading", [False, True])
def test_initial_values(fading: bool) -> None:
    """N(0, 1) for weights and 0 for biases; alpha by `fading`."""
    config = tiny(fading=fading, base_channels=256, max_channels=64, z_dim=64)
    states: list[dict[str, Tensor]] = [{}, {}]
    for global_seed, state in enumerate(states):
        torch.manual_seed(global_seed)
        for number, network in enumerate(built(config, "meta")):
            network.to_empty(device="cpu")
            for tensor in network.state_dict().values():
                tensor.fill_(torch.nan)
            network.init_weights(torch.Generator().manual_seed(number))
            state |= {f"{number}.{name}": tensor for name, tensor in network.state_dict().items()}
            (alpha,) = network.buffers()
            assert (alpha.dtype, alpha.shape, alpha.item()) == (torch.float32, (), 1 - fading)
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
        if name.endswith("bias"):
            assert (tensor == 0).all(), name
        elif name.endswith("weight") and tensor.numel() > 1000:
            tolerance = 4 / math.sqrt(tensor.numel())
            assert abs(tensor.mean()) < tolerance, name
            assert abs(tensor.std() - 1) < tolerance, name


# --- growth --------------------------------------------------------------------------------------


def grow(old: nn.Module, new: nn.Module) -> nn.Module:
    """Copy every parameter that both networks have, as the trainer does."""
    targets = dict(new.named_parameters())
    with torch.no_grad():
        for name, parameter in old.named_parameters():
            if name in targets:
                assert targets[name].shape == parameter.shape, name
                targets[name].copy_(parameter)
    return new


@pytest.mark.parametrize("resolution", RESOLUTIONS[1:])
def test_a_stage_contains_the_one_before_it(resolution: int) -> None:
    """By name and shape; a fading network has the image layers of both resolutions."""
    stages = [
        built(full(r, fading=fading, conditional=True, num_classes=3), "meta")
        for r, fading in ((resolution // 2, False), (resolution, True), (resolution, False))
    ]
    for coarse, fading, fine in zip(*stages, strict=True):
        shapes = [{n: p.shape for n, p in net.named_parameters()} for net in (coarse, fading, fine)]
        assert shapes[0].items() <= shapes[1].items()
        assert shapes[2].items() <= shapes[1].items()
        gone = {n for n in shapes[1] if n not in shapes[2]}
        image = "to_image" if isinstance(coarse, Generator) else "from_image"
        assert gone == {f"{image}.{resolution // 2}.{part}" for part in ("weight", "bias")}
        new = {n for n in shapes[1] if n not in shapes[0]}
        assert {n.rpartition(".")[0] for n in new} == {
            f"blocks.{resolution}.conv1", f"blocks.{resolution}.conv2", f"{image}.{resolution}",
        }  # fmt: skip


@pytest.mark.parametrize("resolution", [8, 16])
def test_growing_is_seamless(resolution: int) -> None:
    """At alpha 0 the networks are those of half the size, at alpha 1 those that do not fade."""
    coarse = networks(tiny(resolution=resolution // 2, max_channels=8))
    fading_config = tiny(resolution=resolution, max_channels=8, fading=True)
    fine_config = tiny(resolution=resolution, max_channels=8)
    pairs = zip(coarse, networks(fading_config, seed=1), strict=True)
    fading = [grow(*pair) for pair in pairs]
    fine = [grow(*pair) for pair in zip(fading, networks(fine_config, seed=2), strict=True)]
    z, labels, images = batch(fading_config)

    for network in fading:
        network.alpha.fill_(0)
    assert torch.equal(fading[0](z, labels), up(coarse[0](z, labels)))
    torch.testing.assert_close(
        fading[1](images, labels), coarse[1](down(images), labels), rtol=1e-5, atol=1e-6
    )
    middle = []
    for alpha in (0.5, 1.0):
        for network in fading:
            network.alpha.fill_(alpha)
        middle.append((fading[0](z, labels), fading[1](images, labels)))
    # Images blend linearly, and half way is neither end.
    half = (up(coarse[0](z, labels)) + fine[0](z, labels)) / 2
    torch.testing.assert_close(middle[0][0], half)
    assert torch.equal(middle[1][0], fine[0](z, labels))
    assert torch.equal(middle[1][1], fine[1](images, labels))
    assert (middle[0][1] - middle[1][1]).abs().min() > 1e-3
    assert (middle[0][1] - coarse[1](down(images), labels)).abs().min() > 1e-3


def test_alpha_is_saved_with_the_weights() -> None:
    for network in networks(tiny(fading=True)):
        network.alpha.fill_(0.25)
        assert network.state_dict()["alpha"].item() == 0.25
        assert copy.deepcopy(network).alpha.item() == 0.25
