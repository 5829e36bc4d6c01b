"""R3GAN: widths, formulas of both networks, and the initial values of Fixup."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, make, small
from network_parts import batch, built, networks, trained
from torch import Tensor, nn

from bigan.models.r3gan import Config, Conv2d, Generator, ResidualBlock

LRELU_GAIN = 1.3867504905630728  # sqrt(2 / (1 + 0.2^2))


def tiny(**changes: object) -> Config:
    config = small("r3gan", **changes)
    assert isinstance(config, Config)
    return config


# --- widths and parameter counts -----------------------------------------------------------------


def block_count(width: int, group_size: int) -> int:
    """Two 1 x 1 convolutions, a grouped 3 x 3 one, and biases of the first two."""
    hidden = 2 * width
    return 2 * width * hidden + hidden * group_size * 9 + 2 * hidden


@pytest.mark.parametrize("which", FAMILIES["r3gan"].counts)
def test_the_published_counts_follow_from_the_layers(which: str) -> None:
    values, (num_g, num_d) = FAMILIES["r3gan"].counts[which]
    config = make("r3gan", values)
    assert isinstance(config, Config)
    widths = config.stage_widths
    shared = sum(2 * block_count(width, config.group_size) for width in widths)
    shared += sum(a * b for a, b in pairwise(widths) if a != b)
    shared += 3 * widths[-1] + 16 * widths[0]  # image <-> features, the 4 x 4 maps
    if config.conditional:
        assert num_g == shared + (64 + 64) * widths[0] + config.num_classes * 64
        assert num_d == shared + widths[0] ** 2 + config.num_classes * widths[0]
    else:
        assert num_g == shared + 64 * widths[0]
        assert num_d == shared + widths[0]


DEFAULT_WIDTHS = {
    4: [768],
    8: [768, 768],
    16: [768, 768, 768],
    32: [768, 768, 768, 768],
    64: [768, 768, 768, 768, 384],
    128: [768, 768, 768, 768, 384, 192],
    256: [768, 768, 768, 768, 384, 192, 96],
    512: [768, 768, 768, 768, 384, 192, 96, 48],
    1024: [768, 768, 768, 768, 384, 192, 96, 48, 24],
}


@pytest.mark.parametrize("resolution", list(DEFAULT_WIDTHS))
@pytest.mark.parametrize("conditional", [False, True])
def test_widths_and_sizes_of_every_stage(resolution: int, conditional: bool) -> None:
    config = make("r3gan", {"num_classes": 7, "resolution": resolution, "conditional": conditional})
    assert isinstance(config, Config)
    assert list(config.stage_widths) == DEFAULT_WIDTHS[resolution]
    generator, discriminator = built(config, "meta")
    labels = torch.empty(2, dtype=torch.int64, device="meta")
    sizes: list[list[int]] = []
    for network in (generator, discriminator):
        for stage in network.stages:
            stage.register_forward_hook(lambda _, __, out: sizes.append(list(out.shape)))
    images = generator(torch.empty(2, 64, device="meta"), labels)
    discriminator(images, labels)
    up = [[2, w, 4 * 2**i, 4 * 2**i] for i, w in enumerate(DEFAULT_WIDTHS[resolution])]
    assert sizes == up + up[::-1]


# --- structure -----------------------------------------------------------------------------------


def grouped(x: Tensor, conv: Conv2d, groups: int) -> Tensor:
    """A grouped 3 x 3 convolution, group by group."""
    parts = zip(x.chunk(groups, 1), conv.weight.chunk(groups), strict=True)
    maps = torch.cat([F.conv2d(part, weight, padding=1) for part, weight in parts], dim=1)
    return maps + conv.bias[:, None, None]


def pointwise(x: Tensor, conv: Conv2d) -> Tensor:
    y = torch.einsum("oi,bihw->bohw", conv.weight[:, :, 0, 0], x)
    return y if conv.bias is None else y + conv.bias[:, None, None]


def lrelu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.2 * x)


def blocks(x: Tensor, stage: nn.Module, groups: int) -> Tensor:
    assert isinstance(stage, nn.Sequential)
    for block in stage:
        h = lrelu(pointwise(x, block.conv1))
        h = lrelu(grouped(h, block.conv2, groups))
        x = x + pointwise(h, block.conv3)
    return x


def tent(x: Tensor, up: bool) -> Tensor:
    """[1, 3, 3, 1] with stride 2, of unit gain: as a (transposed) convolution of each channel."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    kernel = torch.outer(taps, taps)[None, None]
    flat = x.flatten(0, 1)[:, None]
    if up:
        flat = F.conv_transpose2d(flat, 4 * kernel, stride=2, padding=1)
    else:
        flat = F.conv2d(flat, kernel, stride=2, padding=1)
    return flat[:, 0].unflatten(0, x.shape[:2])


@pytest.mark.parametrize("conditional", [False, True])
def test_generator_equals_its_definition(conditional: bool) -> None:
    config = tiny(conditional=conditional)
    generator, _ = map(trained, networks(config))
    z, labels, _ = batch(config)
    if conditional:
        z_and_class = torch.cat([z, generator.embedding.weight[labels]], dim=1)
    else:
        assert generator.embedding is None
        z_and_class = z
    scales = z_and_class @ generator.basis.linear.weight.T
    h = torch.einsum("bc,chw->bchw", scales, generator.basis.weight)
    h = blocks(h, generator.stages[0], 2 * 16 // 4)
    h = tent(h, up=True)  # of equal widths: no convolution
    h = blocks(h, generator.stages[1], 2 * 16 // 4)
    h = tent(pointwise(h, generator.upsamples[1].conv), up=True)
    h = blocks(h, generator.stages[2], 2 * 8 // 4)
    expected = pointwise(h, generator.to_image)
    torch.testing.assert_close(generator(z, labels), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("conditional", [False, True])
def test_discriminator_equals_its_definition(conditional: bool) -> None:
    config = tiny(conditional=conditional)
    _, discriminator = map(trained, networks(config))
    _, labels, images = batch(config)
    h = blocks(pointwise(images, discriminator.from_image), discriminator.stages[0], 2 * 8 // 4)
    h = pointwise(tent(h, up=False), discriminator.downsamples[0].conv)
    h = tent(blocks(h, discriminator.stages[1], 2 * 16 // 4), up=False)
    h = blocks(h, discriminator.stages[2], 2 * 16 // 4)
    readout = discriminator.readout
    h = F.conv2d(h, readout.weight[:, None], groups=16).flatten(1)  # depth-wise, to 1 x 1
    h = h @ readout.linear.weight.T
    if conditional:
        expected = torch.einsum("be,be->b", h, discriminator.embedding.weight[labels])
    else:
        assert discriminator.embedding is None
        expected = h[:, 0]
    torch.testing.assert_close(discriminator(images, labels), expected, rtol=1e-4, atol=1e-5)


def test_blocks_expansion_and_groups_are_the_configs() -> None:
    config = tiny(blocks_per_stage=3, expansion=3, group_size=8)
    for network in built(config, "meta"):
        widths = (16, 16, 8) if isinstance(network, Generator) else (8, 16, 16)
        assert [len(stage) for stage in network.stages] == [3, 3, 3]
        for width, stage in zip(widths, network.stages, strict=True):
            for block in stage:
                assert block.conv1.weight.shape == (3 * width, width, 1, 1)
                assert block.conv2.weight.shape == (3 * width, 8, 3, 3)
                assert block.conv3.weight.shape == (width, 3 * width, 1, 1)
                assert block.conv3.bias is None


# --- initial values ------------------------------------------------------------------------------


def deviation(parameter: Tensor) -> float:
    return parameter.detach().double().square().mean().sqrt().item()


def test_initial_values_have_the_papers_variances() -> None:
    """He et al.'s for each fan-in; in blocks with the gain of the leaky ReLU and L^(-1/4)."""
    config = tiny(
        resolution=16, widths=[128, 128, 64], group_size=16, z_dim=48, embedding_dim=80,
        num_classes=100, image_channels=3,
    )  # fmt: skip
    generator, discriminator = networks(config)
    scaled = LRELU_GAIN * 6**-0.25  # three stages of two blocks
    expected: dict[str, float] = {
        "embedding.weight": 100**-0.5,
        "basis.weight": 1.0,
        "basis.linear.weight": (48 + 80) ** -0.5,
        "upsamples.1.conv.weight": 128**-0.5,
        "to_image.weight": 64**-0.5,
    }
    expected_d: dict[str, float] = {
        "embedding.weight": 100**-0.5 * 128**-0.5,
        "from_image.weight": 3**-0.5,
        "downsamples.0.conv.weight": 64**-0.5,
        "readout.weight": 1 / 4,
        "readout.linear.weight": 128**-0.5,
    }
    for i, width in enumerate((128, 128, 64)):
        for block in range(2):
            for prefix, stds in (
                (f"stages.{i}.{block}", expected),
                (f"stages.{2 - i}.{block}", expected_d),
            ):
                stds[f"{prefix}.conv1.weight"] = scaled * width**-0.5
                stds[f"{prefix}.conv2.weight"] = scaled * (16 * 9) ** -0.5
                for name in ("conv1.bias", "conv2.bias", "conv3.weight"):
                    stds[f"{prefix}.{name}"] = 0.0
    for network, stds in ((generator, expected), (discriminator, expected_d)):
        parameters = dict(network.named_parameters())
        assert parameters.keys() == stds.keys()
        for name, parameter in parameters.items():
            tolerance = 5 / math.sqrt(2 * parameter.numel())  # five sigma
            assert deviation(parameter) == pytest.approx(stds[name], rel=tolerance), name
            if stds[name]:
                limit = 5 * stds[name] / math.sqrt(parameter.numel())
                assert abs(parameter.mean().item()) < limit, name


def test_depth_scales_the_initial_values_of_blocks() -> None:
    """L counts the blocks of the network: 16 times as many halve the deviation."""
    shallow, deep = (
        networks(tiny(resolution=4, widths=[64], group_size=16, blocks_per_stage=n))[0]
        for n in (1, 16)
    )
    for name in ("conv1", "conv2"):
        pair = [getattr(network.stages[0][0], name).weight for network in (shallow, deep)]
        assert deviation(pair[0]) / deviation(pair[1]) == pytest.approx(2, rel=0.05)


def test_the_networks_are_initially_their_resampling_paths() -> None:
    """Blocks are the identity, so the networks are linear in z and in the image."""
    config = tiny()
    generator, discriminator = networks(config)
    z, labels, images = batch(config)
    x = torch.randn(2, 16, 5, 5, generator=torch.Generator().manual_seed(3))
    assert torch.equal(generator.stages[0](x), x)
    zeros = torch.zeros_like(z)
    torch.testing.assert_close(
        generator(3 * z, labels) - generator(zeros, labels),
        3 * (generator(z, labels) - generator(zeros, labels)),
    )
    torch.testing.assert_close(discriminator(3 * images, labels), 3 * discriminator(images, labels))


def test_initial_activations_have_unit_scale() -> None:
    config = tiny(
        resolution=8, widths=[256, 128], group_size=16, z_dim=64, image_channels=3,
        conditional=False,
    )  # fmt: skip
    generator, discriminator = networks(config)
    z, _, _ = batch(config, num=256)
    assert deviation(generator.basis(z)) == pytest.approx(1, rel=0.15)
    h = torch.randn(256, 256, 4, 4, generator=torch.Generator().manual_seed(3))
    assert deviation(discriminator.readout(h)) == pytest.approx(1, rel=0.2)
    # Before the first activation of a block, L^(-1/4) times the gain.
    h = F.conv2d(h, generator.stages[0][0].conv1.weight)
    assert deviation(h) == pytest.approx(LRELU_GAIN * 4**-0.25, rel=0.05)


def test_a_block_does_not_change_its_input() -> None:
    """No operation is in place: the shortcut and saved activations must not change."""
    block = ResidualBlock(8, tiny())
    for parameter in block.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    x = -torch.rand(2, 8, 4, 4, generator=torch.Generator().manual_seed(1))
    original, version = x.clone(), x._version
    block(x)
    assert torch.equal(x, original)
    assert x._version == version


def test_logits_are_in_float32_under_autocast() -> None:
    config = tiny()
    _, discriminator = networks(config)
    assert not list(discriminator.buffers())
    _, labels, images = batch(config)
    with torch.autocast("cpu", torch.bfloat16):
        assert discriminator(images, labels).dtype == torch.float32
