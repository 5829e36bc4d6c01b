"""R3GAN: structure and first values against the paper's formulas, purity and compilation."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from network_parts import R1, batch, built, networks
from torch import Tensor, nn

from bigan import config as configs
from bigan.models.r3gan import Config, Conv2d, Discriminator, Generator, ResidualBlock

LRELU_GAIN = 1.3867504905630728  # sqrt(2 / (1 + 0.2^2))


def tiny(**changes: object) -> Config:
    values: dict[str, object] = {
        "name": "r3gan", "resolution": 16, "num_classes": 5, "z_dim": 6, "image_channels": 1,
        "widths": [16, 16, 8], "group_size": 4, "embedding_dim": 4, "conditional": True,
    }  # fmt: skip
    return configs.validate(Config, values | changes, "test")


def trained(config: Config) -> tuple[Generator, Discriminator]:
    """Networks whose zero weights and biases have become small random numbers."""
    pair = networks(config)
    draw = torch.Generator().manual_seed(2)
    for network in pair:
        for parameter in network.parameters():
            scale = 0.5 / math.sqrt(parameter[0].numel())
            noise = torch.randn(parameter.shape, generator=draw) * scale
            parameter.data += noise * (parameter == 0)
    return pair


# --- widths and parameter counts -----------------------------------------------------------------

IMAGENET: dict[str, object] = {"num_classes": 1000, "conditional": True, "group_size": 32}
COUNTS: dict[str, tuple[dict[str, object], int, int]] = {
    "cifar-10": ({"resolution": 32, "num_classes": 10}, 20732160, 20683776),
    "cifar-10, conditional": (
        {"resolution": 32, "num_classes": 10, "conditional": True}, 20781952, 21280512,
    ),
    "ffhq-64": ({"resolution": 64, "num_classes": 1}, 22429824, 22381440),
    "ffhq-256": ({"resolution": 256, "num_classes": 1}, 23057952, 23009568),
    "imagenet-32": (IMAGENET | {"resolution": 32, "widths": [1536] * 4}, 82914304, 86548992),
    "imagenet-64": (IMAGENET | {"resolution": 64, "widths": [1536] * 5}, 103570432, 107205120),
}  # fmt: skip


def block_count(width: int, group_size: int) -> int:
    """Two 1 x 1 convolutions, a grouped 3 x 3 one, and biases of the first two."""
    hidden = 2 * width
    return 2 * width * hidden + hidden * group_size * 9 + 2 * hidden


@pytest.mark.parametrize("which", list(COUNTS))
def test_parameter_counts(which: str) -> None:
    changes, num_g, num_d = COUNTS[which]
    config = configs.validate(Config, {"name": "r3gan", **changes}, "test")
    generator, discriminator = built(config, "meta")
    assert sum(p.numel() for p in generator.parameters()) == num_g
    assert sum(p.numel() for p in discriminator.parameters()) == num_d
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
def test_every_resolution_runs_on_the_meta_device(resolution: int, conditional: bool) -> None:
    values = {"name": "r3gan", "num_classes": 7, "resolution": resolution}
    config = configs.validate(Config, values | {"conditional": conditional}, "test")
    assert list(config.stage_widths) == DEFAULT_WIDTHS[resolution]
    generator, discriminator = built(config, "meta")
    labels = torch.empty(2, dtype=torch.int64, device="meta")
    sizes: list[list[int]] = []
    for network in (generator, discriminator):
        for stage in network.stages:
            stage.register_forward_hook(lambda _, __, out: sizes.append(list(out.shape)))
    images = generator(torch.empty(2, 64, device="meta"), labels)
    assert images.shape == (2, 3, resolution, resolution)
    assert discriminator(images, labels).shape == (2,)
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
    generator, _ = trained(config)
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
    _, discriminator = trained(config)
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


def test_labels_matter_to_conditional_networks_alone() -> None:
    for conditional in (False, True):
        config = tiny(conditional=conditional)
        generator, discriminator = trained(config)
        z, labels, images = batch(config)
        others = (labels + 1) % 5
        assert torch.equal(generator(z, labels), generator(z, others)) != conditional
        logits = discriminator(images, labels)
        assert torch.equal(logits, discriminator(images, others)) != conditional


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


# --- first values --------------------------------------------------------------------------------


def deviation(parameter: Tensor) -> float:
    return parameter.detach().double().square().mean().sqrt().item()


def test_first_values_have_the_papers_variances() -> None:
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


def test_depth_scales_the_first_values_of_blocks() -> None:
    """L is the number of blocks of the whole network: 16 times as many, half the deviation."""
    shallow, deep = (
        networks(tiny(resolution=4, widths=[64], group_size=16, blocks_per_stage=n))[0]
        for n in (1, 16)
    )
    for name in ("conv1", "conv2"):
        pair = [getattr(network.stages[0][0], name).weight for network in (shallow, deep)]
        assert deviation(pair[0]) / deviation(pair[1]) == pytest.approx(2, rel=0.05)


def test_the_networks_begin_as_their_resampling_paths() -> None:
    """Every block begins as the identity, and what is left is linear, in z and in the image."""
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


def test_first_signals_have_unit_scale() -> None:
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


def test_initial_weights_are_a_function_of_the_generator() -> None:
    for which in (0, 1):
        states = []
        for global_seed in (3, 4):
            torch.manual_seed(global_seed)
            network = built(tiny(), "meta")[which].to_empty(device="cpu")
            for tensor in network.state_dict().values():
                tensor.fill_(torch.nan)
            before = torch.get_rng_state()
            network.init_weights(torch.Generator().manual_seed(0))
            assert torch.equal(torch.get_rng_state(), before)
            states.append(network.state_dict())
        assert states[0].keys() == states[1].keys()
        for name, tensor in states[0].items():
            assert torch.equal(tensor, states[1][name]), name


# --- purity, precision, compilation --------------------------------------------------------------


def test_forward_is_pure() -> None:
    config = tiny()
    pair = trained(config)
    z, labels, images = batch(config)
    for network, x in zip(pair, (z, images), strict=True):
        assert not list(network.buffers())
        assert all(parameter.ndim > 0 for parameter in network.parameters())
        before = [parameter.clone() for parameter in network.parameters()]
        original, state = x.clone(), torch.get_rng_state()
        assert torch.equal(network(x, labels), network(x, labels))
        assert torch.equal(x, original)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(map(torch.equal, network.parameters(), before))


def test_samples_do_not_see_each_other() -> None:
    config = tiny()
    pair = trained(config)
    z, labels, images = batch(config)
    for network, x in zip(pair, (z, images), strict=True):
        torch.testing.assert_close(network(x, labels)[:2], network(x[:2], labels[:2]))


@pytest.mark.parametrize("conditional", [False, True])
def test_the_penaltys_gradient_equals_finite_differences(conditional: bool) -> None:
    """Second derivatives of the discriminator, in float64, along a random direction."""
    config = tiny(conditional=conditional, resolution=8, widths=[16, 8])
    module = R1(trained(config)[1]).double()
    _, labels, images = batch(config, num=2)
    parameters = list(module.parameters())
    draw = torch.Generator().manual_seed(3)
    directions = [torch.randn(p.shape, generator=draw, dtype=p.dtype) for p in parameters]
    gradients = torch.autograd.grad(module(images.double(), labels), parameters)
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    values = []
    for step in (1e-9, -2e-9):  # so small that no unit crosses the kink of its leaky ReLU
        for parameter, direction in zip(parameters, directions, strict=True):
            parameter.data += step * direction
        values.append(module(images.double(), labels))
    torch.testing.assert_close((values[0] - values[1]) / 2e-9, slope, rtol=1e-4, atol=0)


@pytest.mark.parametrize("which", ["generator", "penalty"])
def test_one_full_graph_equals_eager(which: str) -> None:
    config = tiny(resolution=8, widths=[16, 8], blocks_per_stage=1)
    generator, discriminator = trained(config)
    z, labels, images = batch(config)
    module = generator if which == "generator" else R1(discriminator)
    inputs = (z, labels) if which == "generator" else (images, labels)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=False)
    results = []
    for call in (module, compiled):
        loss = call(*inputs).square().sum()
        results.append([loss, *torch.autograd.grad(loss, list(module.parameters()))])
    for eager, graph in zip(*results, strict=True):
        assert eager.abs().max() > 0
        torch.testing.assert_close(graph, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("image_channels", "conditional"), [(1, False), (3, True)])
def test_channels_last_and_half_precision_stay_close(
    image_channels: int, conditional: bool
) -> None:
    config = tiny(image_channels=image_channels, conditional=conditional)
    pair = trained(config)
    z, labels, images = batch(config)
    fakes, logits = pair[0](z, labels), pair[1](images, labels)
    last = [copy.deepcopy(n).to(memory_format=torch.channels_last) for n in pair]
    torch.testing.assert_close(last[0](z, labels), fakes, rtol=1e-4, atol=1e-5)
    last_images = images.to(memory_format=torch.channels_last)
    torch.testing.assert_close(last[1](last_images, labels), logits, rtol=1e-4, atol=1e-5)
    for dtype, tolerance in ((torch.bfloat16, 0.05), (torch.float16, 0.01)):
        with torch.autocast("cpu", dtype):
            low_fakes, low_logits = pair[0](z, labels), pair[1](images, labels)
            penalty = R1(pair[1])(images, labels)
        assert low_logits.dtype == torch.float32
        assert (low_fakes.float() - fakes).abs().max() < tolerance * fakes.abs().max()
        assert (low_logits - logits).abs().max() < tolerance * logits.abs().max()
        (low_fakes.float().sum() + penalty).backward()
        assert all(p.grad.isfinite().all() for n in pair for p in n.parameters())


def test_double_precision() -> None:
    config = tiny()
    pair = [copy.deepcopy(n).double() for n in trained(config)]
    z, labels, images = batch(config)
    assert pair[0](z.double(), labels).dtype == torch.float64
    assert pair[1](images.double(), labels).dtype == torch.float64


def test_the_activations_before_the_branch_are_left_alone() -> None:
    """No operation in place: neither the skip nor a saved activation may change under way."""
    block = ResidualBlock(8, tiny())
    for parameter in block.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    x = -torch.rand(2, 8, 4, 4, generator=torch.Generator().manual_seed(1))
    original, version = x.clone(), x._version
    block(x)
    assert torch.equal(x, original)
    assert x._version == version


# --- configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 48}, "resolution = 48"),
        ({"widths": [16, 16]}, "widths has 2 entries, and a 16 px network has 3 stages"),
        ({"widths": []}, "use as many, for example widths=[768, 768, 768]"),
        ({"widths": [16, 17, 8]}, "use 16 for 17, or another group_size"),
        ({"widths": [16, 16, 1]}, "use 2 for 1, or another group_size"),
        ({"group_size": 48}, "2 x 16 hidden channels of a block cannot be split into groups"),
        ({"widths": [16, 0, 8]}, "widths.1 = 0"),
        ({"image_channels": 4}, "image_channels = 4"),
        ({"num_classes": 0}, "num_classes = 0"),
        ({"num_classes": 1}, "projection without labels"),
        ({"blocks_per_stage": 0}, "blocks_per_stage = 0"),
    ],
)
def test_a_wrong_config_says_what_to_do(changes: dict[str, object], message: str) -> None:
    with pytest.raises(configs.ConfigError) as caught:
        tiny(**changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
