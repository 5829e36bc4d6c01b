"""BigGAN: published parameter counts, the structure behind them, purity and compilation."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from network_parts import R1, batch, built, networks
from torch import Tensor, nn

from bigan import config as configs
from bigan.layers.batchnorm import BatchNorm2d, ConditionalBatchNorm2d, collecting_statistics
from bigan.layers.init import init_weights
from bigan.layers.spectral import SpectralNorm
from bigan.models.biggan import Config, DiscriminatorBlock


def tiny(**changes: object) -> Config:
    values: dict[str, object] = {
        "name": "biggan", "resolution": 16, "num_classes": 5, "z_dim": 12, "channels": 4,
        "image_channels": 1, "shared_dim": 6, "attention_resolutions": [8],
    }  # fmt: skip
    return configs.validate(Config, values | changes, "test")


# --- parameter counts ----------------------------------------------------------------------------

COUNTS = {
    "imagenet-128": ({"resolution": 128, "z_dim": 120, "num_classes": 1000}, 70433988, 87982370),
    "imagenet-64": ({"resolution": 64, "z_dim": 100, "num_classes": 1000}, 70083972, 45500449),
    "cifar": (
        {
            "resolution": 32, "z_dim": 80, "num_classes": 10, "attention_resolutions": [16],
            "discriminator_channels": 48,
        },
        9416196, 2415170,
    ),
}  # fmt: skip


@pytest.mark.parametrize("which", list(COUNTS))
def test_parameter_counts_are_the_published_ones(which: str) -> None:
    changes, num_g, num_d = COUNTS[which]
    config = configs.validate(Config, {"name": "biggan", **changes}, "test")
    generator, discriminator = built(config, "meta")
    assert sum(p.numel() for p in generator.parameters()) == num_g
    assert sum(p.numel() for p in discriminator.parameters()) == num_d


@pytest.mark.parametrize(
    ("resolution", "z_dim"), [(16, 60), (32, 80), (64, 100), (128, 120), (256, 140), (512, 160)]
)
def test_every_resolution_runs_on_the_meta_device(resolution: int, z_dim: int) -> None:
    config = tiny(
        resolution=resolution, z_dim=z_dim, channels=96, attention_resolutions=[64],
        image_channels=3,
    )  # fmt: skip
    generator, discriminator = built(config, "meta")
    z = torch.empty(2, z_dim, device="meta")
    labels = torch.empty(2, dtype=torch.int64, device="meta")
    images = generator(z, labels)
    assert images.shape == (2, 3, resolution, resolution)
    assert discriminator(images, labels).shape == (2,)
    assert len(generator.attention) == (resolution >= 64)
    assert len(discriminator.attention) == (resolution >= 128)
    assert config.z_chunk == 20


def test_block_widths_are_the_published_ones() -> None:
    """In units of `channels`: the outputs of all blocks, as in the authors' and Google's code."""
    widths = {
        256: ([16, 8, 8, 4, 2, 1], [1, 2, 4, 8, 8, 16, 16]),
        512: ([16, 8, 8, 4, 2, 1, 1], [1, 1, 2, 4, 8, 8, 16, 16]),
        32: ([4, 4, 4], [4, 4, 4, 4]),
        16: ([4, 4], [4, 4, 4]),
    }
    for resolution, expected in widths.items():
        num_slots = len(expected[0]) + 1
        config = tiny(resolution=resolution, channels=8, z_dim=num_slots, image_channels=3)
        pair = built(config, "meta")
        found = tuple([block.conv2.weight.shape[0] // 8 for block in n.blocks] for n in pair)
        assert found == expected
        assert pair[0].first.weight.shape[0] == 16 * 8 * (4 if resolution < 64 else 16)


# --- structure -----------------------------------------------------------------------------------


def test_everything_is_spectrally_normalised_but_the_shared_embedding() -> None:
    for network in networks(tiny()):
        matrices = {name for name, p in network.named_parameters() if p.ndim >= 2}
        normalised = {
            f"{name}.weight" for name, m in network.named_modules() if isinstance(m, SpectralNorm)
        }
        assert matrices - normalised <= {"shared.weight"}
    generator, _ = networks(tiny())
    assert type(generator.shared) is nn.Embedding
    assert type(generator.bn) is BatchNorm2d
    assert generator.bn.weight is not None


def test_each_slice_of_z_goes_to_its_own_layer() -> None:
    """The first slice makes the 4 x 4 map; slice i + 1, behind the class, conditions block i."""
    config = tiny()
    generator, _ = networks(config)
    z, labels, _ = batch(config)
    seen: list[Tensor] = []
    generator.first.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for block in generator.blocks:
        for bn in (block.bn1, block.bn2):
            bn.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    generator(z, labels)
    shared = generator.shared(labels)
    first, *chunks = z.chunk(3, dim=1)
    conditions = [torch.cat([shared, chunk], dim=1) for chunk in chunks for _ in range(2)]
    assert len(seen) == 5
    for found, expected in zip(seen, [first, *conditions], strict=True):
        assert torch.equal(found, expected)


def test_flat_latent_conditions_blocks_on_the_class_alone() -> None:
    config = tiny(hierarchical=False, z_dim=13)
    generator, _ = networks(config)
    z, labels, _ = batch(config)
    assert generator.first.weight.shape[1] == 13
    assert generator.blocks[0].bn1.gain.weight.shape[1] == config.shared_dim
    assert generator(z, labels).shape == (8, 1, 16, 16)


def test_generator_block_equals_its_definition() -> None:
    generator, _ = networks(tiny())
    block = generator.blocks[1]
    x = torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    cond = torch.randn(3, 10, generator=torch.Generator().manual_seed(2))

    def up(t: Tensor) -> Tensor:
        return t.repeat_interleave(2, 2).repeat_interleave(2, 3)

    h = block.conv1(up(block.bn1(x, cond).clamp_min(0)))
    h = block.conv2(block.bn2(h, cond).clamp_min(0))
    torch.testing.assert_close(block(x, cond), h + block.shortcut(up(x)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("first", "halve", "channels"), [(True, True, 2), (False, True, 8), (False, False, 8)]
)
def test_discriminator_block_equals_its_definition(first: bool, halve: bool, channels: int) -> None:
    """Above all, that the shortcut sees the block's input before the activation."""
    block = DiscriminatorBlock(channels, 8, first, halve, eps=1e-4)
    init_weights(block, torch.Generator().manual_seed(0))
    x = torch.randn(3, channels, 6, 6, generator=torch.Generator().manual_seed(1))
    original = x.clone()
    h = block.conv2(block.conv1(x if first else x.clamp_min(0)).clamp_min(0))
    skip = x if block.shortcut is None else block.shortcut(x)
    expected = F.avg_pool2d(h + skip, 2) if halve else h + skip
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(x, original)
    assert (block.shortcut is None) == (not halve)


def test_discriminator_head_sums_positions_and_projects() -> None:
    config = tiny(attention_resolutions=[])
    _, discriminator = networks(config)
    _, labels, images = batch(config)
    h = images
    for block in discriminator.blocks:
        h = block(h)
    assert h.shape[2:] == (4, 4)
    h = h.clamp_min(0).sum((2, 3))
    table = discriminator.embedding.weight / torch.linalg.matrix_norm(
        discriminator.embedding.weight, 2
    )
    expected = (h * table[labels]).sum(1) + discriminator.linear(h)[:, 0]
    torch.testing.assert_close(discriminator(images, labels), expected, rtol=1e-4, atol=1e-4)


def test_halvings_of_the_small_discriminators() -> None:
    for resolution, z_dim, last in ((16, 12, 4), (32, 12, 8)):
        _, discriminator = networks(tiny(resolution=resolution, z_dim=z_dim))
        sizes: list[int] = []
        for block in discriminator.blocks:
            block.register_forward_hook(lambda _, __, out, sizes=sizes: sizes.append(out.shape[2]))
        discriminator(torch.zeros(1, 1, resolution, resolution), torch.zeros(1, dtype=torch.int64))
        assert sizes[-1] == last
        assert sizes[-1] == sizes[-2] or resolution == 16


# --- purity, precision, compilation --------------------------------------------------------------


def test_training_forward_changes_no_buffer() -> None:
    config = tiny()
    generator, discriminator = networks(config)
    z, labels, _ = batch(config)
    buffers = [*generator.buffers(), *discriminator.buffers()]
    before = [buffer.clone() for buffer in buffers]
    versions = [buffer._version for buffer in buffers]
    discriminator(generator(z, labels), labels).sum().backward()
    for buffer, old, version in zip(buffers, before, versions, strict=True):
        assert torch.equal(buffer, old)
        assert buffer._version == version


def test_initial_weights_are_a_function_of_the_generator() -> None:
    states = []
    for global_seed in (3, 4):
        torch.manual_seed(global_seed)
        generator, _ = built(tiny(), "meta")
        generator = generator.to_empty(device="cpu")
        for tensor in generator.state_dict().values():
            tensor.fill_(torch.nan)
        generator.init_weights(torch.Generator().manual_seed(0))
        states.append(generator.state_dict())
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def test_the_config_chooses_the_initial_law() -> None:
    for law, expected in (("orthogonal", 1.0), ("normal", 0.02 * 128**0.5)):
        generator, discriminator = networks(tiny(init=law, shared_dim=128, num_classes=3))
        norms = generator.shared.weight.norm(dim=1)
        torch.testing.assert_close(norms, torch.full((3,), expected), rtol=0.3, atol=0)
        rows = discriminator.blocks[0].conv2.weight.flatten(1)
        deviation = 0.02 * 144**0.5 if law == "normal" else 1.0
        torch.testing.assert_close(rows.norm(dim=1).mean().item(), deviation, rtol=0.1, atol=0)


def with_open_attention(network: nn.Module) -> nn.Module:
    for name, parameter in network.named_parameters():
        if name.endswith("gamma"):
            parameter.data.fill_(0.5)
    return network


def test_func_grad_through_the_discriminator_equals_autograd() -> None:
    config = tiny()
    discriminator = with_open_attention(networks(config)[1])
    _, labels, images = batch(config)
    loss = R1(discriminator)(images, labels)
    found = torch.autograd.grad(loss, list(discriminator.parameters()), allow_unused=True)
    x = images.clone().requires_grad_()
    logits = discriminator(x, labels)
    (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    expected_loss = gradient.square().flatten(1).sum(1).mean() + F.softplus(-logits).mean()
    expected = torch.autograd.grad(
        expected_loss, list(discriminator.parameters()), allow_unused=True
    )
    torch.testing.assert_close(loss, expected_loss)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("which", ["generator", "penalty"])
def test_one_full_graph_equals_eager(which: str) -> None:
    config = tiny()
    generator, discriminator = networks(config)
    z, labels, images = batch(config)
    module = with_open_attention(generator if which == "generator" else R1(discriminator))
    inputs = (z, labels) if which == "generator" else (images, labels)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    results = []
    for call in (module, compiled):
        loss = call(*inputs).square().sum()
        results.append([loss, *torch.autograd.grad(loss, list(module.parameters()))])
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("image_channels", [1, 3])
def test_channels_last_and_bfloat16_stay_close(image_channels: int) -> None:
    config = tiny(image_channels=image_channels)
    pair = networks(config)
    z, labels, _ = batch(config)
    images = pair[0](z, labels)
    logits = pair[1](images, labels)
    assert images.abs().max() <= 1
    last = [copy.deepcopy(n).to(memory_format=torch.channels_last) for n in pair]
    torch.testing.assert_close(last[0](z, labels), images, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        low = pair[0](z, labels)
        assert (low.float() - images).abs().max() < 0.1
        low_logits = pair[1](images, labels)
    assert (low_logits - logits).abs().max() < 0.03 * logits.abs().max()
    (low.float().sum() + low_logits.float().sum()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for n in pair for p in n.parameters())


def test_standing_statistics_make_evaluation_independent_of_the_batch() -> None:
    config = tiny()
    generator, _ = networks(config)
    z, labels, _ = batch(config, num=64)
    with collecting_statistics(generator):
        trained = generator(z, labels)
    generator.eval()
    # The batch behind the statistics: evaluation gives what training gave.
    torch.testing.assert_close(generator(z, labels), trained, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        generator(z[:3], labels[:3]), generator(z, labels)[:3], rtol=1e-3, atol=1e-5
    )
    layers = [m for m in generator.modules() if isinstance(m, ConditionalBatchNorm2d)]
    assert all((layer.standing_var != 1).all() for layer in layers)


# --- configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"z_dim": 13}, "use z_dim=12, or hierarchical=false"),
        ({"z_dim": 1}, "use z_dim=3"),
        ({"resolution": 48}, "resolution = 48"),
        ({"image_channels": 4}, "image_channels = 4"),
        ({"attention_resolutions": [48]}, "48 px occurs in no network"),
        ({"channels": 3}, "8 has 12 channels"),
        ({"num_classes": 0}, "num_classes = 0"),
    ],
)
def test_a_wrong_config_says_what_to_do(changes: dict[str, object], message: str) -> None:
    with pytest.raises(configs.ConfigError, match=message.replace("[", r"\[")) as caught:
        tiny(**changes)
    assert "\n" not in str(caught.value)
