"""BigGAN: its structure against the paper and the published code.

The tests with a parameter `name` are of what BigGAN-deep shares with it.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, make, small
from network_parts import batch, built, networks
from torch import Tensor, nn

from bigan.layers.batchnorm import BatchNorm2d
from bigan.layers.init import init_weights
from bigan.layers.spectral import SpectralNorm
from bigan.models.biggan import Config, DiscriminatorBlock


def tiny(**changes: object) -> Config:
    config = small("biggan", **changes)
    assert isinstance(config, Config)
    return config


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
    """In particular the shortcut receives the block's input before the activation."""
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


# --- with BigGAN-deep ----------------------------------------------------------------------------

both_forms = pytest.mark.parametrize("name", ["biggan", "biggan_deep"])


@both_forms
@pytest.mark.parametrize("resolution", [16, 32, 64, 128, 256, 512])
def test_attention_is_where_a_network_has_maps_of_its_resolution(
    name: str, resolution: int
) -> None:
    config = make(name, FAMILIES[name].full(resolution) | {"resolution": resolution})
    generator, discriminator = built(config, "meta")
    assert config.attention_resolutions == (64,)
    assert len(generator.attention) == (resolution >= 64)
    assert len(discriminator.attention) == (resolution >= 128)
    if isinstance(config, Config):
        assert config.z_chunk == 20


@both_forms
def test_everything_is_spectrally_normalised_but_the_shared_embedding(name: str) -> None:
    generator, discriminator = networks(small(name))
    for network in (generator, discriminator):
        matrices = {key for key, p in network.named_parameters() if p.ndim >= 2}
        normalised = {
            f"{key}.weight" for key, m in network.named_modules() if isinstance(m, SpectralNorm)
        }
        assert matrices - normalised <= {"shared.weight"}
    assert type(generator.shared) is nn.Embedding
    assert type(generator.bn) is BatchNorm2d
    assert generator.bn.weight is not None


@both_forms
def test_the_epsilons_reach_every_layer(name: str) -> None:
    pair = networks(small(name, sn_eps=1e-6, bn_eps=1e-5))
    layers = [module for network in pair for module in network.modules() if hasattr(module, "eps")]
    assert {m.eps for m in layers if isinstance(m, SpectralNorm)} == {1e-6}
    assert {m.eps for m in layers if not isinstance(m, SpectralNorm)} == {1e-5}


@both_forms
def test_the_config_chooses_the_initial_law(name: str) -> None:
    for law in ("orthogonal", "normal"):
        config = small(name, init=law, shared_dim=128, num_classes=3)
        generator, discriminator = networks(config)
        norm = 1.0 if law == "orthogonal" else 0.02 * 128**0.5
        norms = generator.shared.weight.norm(dim=1)
        torch.testing.assert_close(norms, torch.full((3,), norm), rtol=0.3, atol=0)
        rows = discriminator.blocks[0].conv2.weight.flatten(1)
        if law == "orthogonal":
            torch.testing.assert_close(rows @ rows.t(), torch.eye(len(rows)), rtol=0, atol=1e-5)
        for network in (generator, discriminator):
            weights = torch.cat([p.flatten() for p in network.parameters() if p.ndim == 4])
            if law == "normal":
                torch.testing.assert_close(weights.std().item(), 0.02, rtol=0.05, atol=0)


@both_forms
def test_images_are_bounded(name: str) -> None:
    config = small(name)
    generator, _ = networks(config)
    z, labels, _ = batch(config)
    generator.bn.weight.data.fill_(100)
    images = generator(z, labels)
    assert 0.9 < images.abs().max() <= 1
