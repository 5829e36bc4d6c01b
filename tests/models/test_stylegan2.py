"""StyleGAN2: layers, both networks against their definition, initial values and noise."""

from __future__ import annotations

import itertools

import pytest
import torch
from families import make
from network_parts import batch, built
from stylegan2_reference import discriminate, mapped, networks, synthesised, tiny
from torch import Tensor

from bigan.layers import hashing
from bigan.layers.equalized import Equalized
from bigan.models.stylegan2 import Config

# --- parameter counts and shapes -----------------------------------------------------------------


def test_parameters_of_the_conditional_form() -> None:
    """An embedding and a wider first layer in G; an embedding, a mapping and 512 outputs in D."""
    counts = []
    for conditional in (False, True):
        values = {"resolution": 32, "num_classes": 10, "conditional": conditional}
        config = make("stylegan2", values)
        counts.append([sum(p.numel() for p in n.parameters()) for n in built(config, "meta")])
    embedding = 10 * 512 + 512
    assert counts[1][0] - counts[0][0] == embedding + 512 * 512
    assert counts[1][1] - counts[0][1] == embedding + 8 * (512 * 512 + 512) + 511 * 513


@pytest.mark.parametrize("resolution", [4, 8, 16, 32, 64, 128, 256, 512, 1024])
def test_layers_and_widths_of_every_resolution(resolution: int) -> None:
    config = make("stylegan2", {"resolution": resolution, "num_classes": 10})
    assert isinstance(config, Config)
    generator, discriminator = built(config, "meta")
    num_layers = 2 * resolution.bit_length() - 5
    assert len(generator.synthesis.convs) == num_layers
    assert config.num_ws == num_layers + 1
    assert len(discriminator.blocks) == resolution.bit_length() - 3
    widths = {4: 512, 8: 512, 16: 512, 32: 512, 64: 512, 128: 256, 256: 128, 512: 64, 1024: 32}
    assert generator.synthesis.convs[-1].conv.weight.shape[0] == widths[resolution]
    assert discriminator.from_image.weight.shape[0] == widths[resolution]


# --- against the definition ----------------------------------------------------------------------

VARIANTS = {
    "plain": {},
    "conditional": {"conditional": True, "mapping_lr_multiplier": 0.1, "image_channels": 3},
    "deeper mapping of D": {"conditional": True, "discriminator_mapping_layers": 3},
    "widening": {"channel_base": 64, "max_channels": 9, "minibatch_group": 2},
    "4px": {"resolution": 4},
    "clamped": {"activation_clamp": 0.5},
}


@pytest.mark.parametrize("which", list(VARIANTS))
def test_generator_equals_its_definition(which: str) -> None:
    config = tiny(**VARIANTS[which])
    generator = networks(config)[0].double().eval()
    z, labels, _ = batch(config)
    state, keys = generator.state_dict(), hashing.keys(z)
    w = mapped(state, "mapping.network", z.double(), labels, config)
    ws = w[:, None].expand(-1, config.num_ws, -1)
    expected = synthesised(state, ws, keys, config)
    torch.testing.assert_close(generator(z.double(), labels), expected)
    assert expected.std() > 0.1
    # Each layer with its own w.
    ws = ws * torch.linspace(-1, 1, config.num_ws, dtype=torch.float64)[:, None]
    torch.testing.assert_close(generator.synthesis(ws, keys), synthesised(state, ws, keys, config))


@pytest.mark.parametrize("which", list(VARIANTS))
def test_discriminator_equals_its_definition(which: str) -> None:
    config = tiny(**VARIANTS[which])
    discriminator = networks(config)[1].double()
    _, labels, images = batch(config)
    expected = discriminate(discriminator.state_dict(), images.double(), labels, config)
    torch.testing.assert_close(discriminator(images.double(), labels), expected)
    assert expected.std() > 0.005


# --- initial values ------------------------------------------------------------------------------


def test_initial_weights_are_the_published_ones() -> None:
    config = tiny(max_channels=64, channel_base=1024, w_dim=48, z_dim=48, conditional=True)
    for network in built(config):
        for parameter in [*network.parameters(), *network.buffers()]:
            parameter.data.fill_(torch.nan)
        network.init_weights(torch.Generator().manual_seed(0))
        for name, tensor in network.state_dict().items():
            if name.endswith("style.bias"):
                assert (tensor == 1).all(), name
            elif name.endswith(("bias", "noise_strength", "w_average")):
                assert (tensor == 0).all(), name
            else:
                size = 100 if "mapping" in name and "embedding" not in name else 1
                num = tensor.numel()
                assert abs(tensor.mean()) < 5 * size / num**0.5, name
                assert tensor.std().item() == pytest.approx(size, rel=4 / num**0.5), name


def test_every_scale_is_he_s() -> None:
    """Equalized learning rate: weights are used with unit gain over the root of their fan-in."""
    for network in networks(tiny(conditional=True)):
        for name, layer in network.named_modules():
            if isinstance(layer, Equalized):
                multiplier = 0.01 if "mapping" in name and "embedding" not in name else 1
                fan_in = layer.weight[0].numel()
                assert layer.scale == pytest.approx(multiplier / fan_in**0.5), name
                assert layer.lr_multiplier == multiplier, name


# --- noise ---------------------------------------------------------------------------------------


def test_noise_depends_on_the_key_the_layer_and_the_pixel() -> None:
    config = tiny()
    generator, _ = networks(config)
    generator.eval()
    seen: list[Tensor] = []
    for layer in generator.synthesis.convs:
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    z, labels, _ = batch(config)
    images = generator(z, labels)
    assert [noise.shape[1:] for noise in seen] == [(1, r, r) for r in (4, 8, 8, 16, 16)]
    for one, two in itertools.combinations(seen[1:3] + [n[..., :8, :8] for n in seen[3:]], 2):
        assert abs((one * two).mean()) < 4 / one.numel() ** 0.5
    # The key is that of z unless it is given.
    keys = hashing.keys(z)
    assert torch.equal(generator(z, labels, keys), images)
    assert not torch.isclose(generator(z, labels, keys.flip(0)), images).all(0).any()
    for layer in generator.synthesis.convs:
        layer.noise_strength.data.zero_()
    assert torch.equal(generator(z, labels, keys.flip(0)), generator(z, labels))
