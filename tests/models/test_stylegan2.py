"""StyleGAN2: published parameter counts, the networks against their definition, first values."""

from __future__ import annotations

import itertools

import pytest
import torch
from network_parts import batch, built
from stylegan2_reference import judged, mapped, networks, synthesised, tiny
from torch import Tensor

from bigan import config as configs
from bigan.layers import hashing
from bigan.layers.equalised import Equalised
from bigan.models.stylegan2 import Config

# --- parameter counts and shapes -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("resolution", "channel_base", "num_g", "num_d"),
    [(1024, 32768, 30370060, 29012513), (256, 16384, 24767458, 24001089)],
)
def test_parameter_counts_are_the_published_ones(
    resolution: int, channel_base: int, num_g: int, num_d: int
) -> None:
    values = {"resolution": resolution, "channel_base": channel_base, "num_classes": 1}
    config = configs.validate(Config, {"name": "stylegan2", **values}, "test")
    generator, discriminator = built(config, "meta")
    assert sum(p.numel() for p in generator.parameters()) == num_g
    assert sum(p.numel() for p in discriminator.parameters()) == num_d


def test_parameters_of_the_conditional_form() -> None:
    """An embedding and a wider first layer in G; an embedding, a mapping and 512 outputs in D."""
    values = {"name": "stylegan2", "resolution": 32, "num_classes": 10}
    counts = []
    for conditional in (False, True):
        config = configs.validate(Config, values | {"conditional": conditional}, "test")
        counts.append([sum(p.numel() for p in n.parameters()) for n in built(config, "meta")])
    embedding = 10 * 512 + 512
    assert counts[1][0] - counts[0][0] == embedding + 512 * 512
    assert counts[1][1] - counts[0][1] == embedding + 8 * (512 * 512 + 512) + 511 * 513


@pytest.mark.parametrize("resolution", [4, 8, 16, 32, 64, 128, 256, 512, 1024])
def test_every_resolution_runs_on_the_meta_device(resolution: int) -> None:
    config = tiny(
        resolution=resolution, z_dim=512, w_dim=512, channel_base=32768, max_channels=512,
        image_channels=3, conditional=True,
    )  # fmt: skip
    generator, discriminator = built(config, "meta")
    z = torch.empty(4, 512, device="meta")
    labels = torch.empty(4, dtype=torch.int64, device="meta")
    images = generator(z, labels)
    assert images.shape == (4, 3, resolution, resolution)
    assert discriminator(images, labels).shape == (4,)
    num_layers = 2 * resolution.bit_length() - 5
    assert len(generator.synthesis.convs) == num_layers
    assert config.num_ws == num_layers + 1
    assert len(discriminator.blocks) == resolution.bit_length() - 3
    widths = {4: 512, 8: 512, 16: 512, 32: 512, 64: 512, 128: 256, 256: 128, 512: 64, 1024: 32}
    assert generator.synthesis.convs[-1].conv.weight.shape[0] == widths[resolution]
    assert discriminator.from_image.weight.shape[0] == widths[resolution]


def test_no_parameter_is_a_scalar() -> None:
    """FSDP2 refuses them."""
    for network in built(tiny(conditional=True), "meta"):
        assert all(parameter.ndim > 0 for parameter in network.parameters())


# --- against the definition ----------------------------------------------------------------------

VARIANTS = {
    "plain": {},
    "conditional": {"conditional": True, "mapping_lr_multiplier": 0.1, "image_channels": 3},
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
    expected = judged(discriminator.state_dict(), images.double(), labels, config)
    torch.testing.assert_close(discriminator(images.double(), labels), expected)
    assert expected.std() > 0.005


# --- first values --------------------------------------------------------------------------------


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


def test_initial_weights_are_a_function_of_the_generator() -> None:
    for which in (0, 1):
        states = []
        for global_seed in (3, 4):
            torch.manual_seed(global_seed)
            network = built(tiny(conditional=True), "meta")[which].to_empty(device="cpu")
            for tensor in [*network.parameters(), *network.buffers()]:
                tensor.data.fill_(torch.nan)
            network.init_weights(torch.Generator().manual_seed(0))
            states.append(network.state_dict())
        for name, tensor in states[0].items():
            assert torch.equal(tensor, states[1][name]), name


def test_every_scale_is_he_s() -> None:
    """Equalised learning rate: weights are used with unit gain over the root of their fan-in."""
    for network in networks(tiny(conditional=True)):
        for name, layer in network.named_modules():
            if isinstance(layer, Equalised):
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


def test_an_image_does_not_depend_on_its_batch() -> None:
    config = tiny()
    generator, _ = networks(config)
    z, labels, _ = batch(config, 6)
    together = generator(z, labels)
    apart = torch.cat([generator(z[i], labels[i]) for i in (slice(0, 1), slice(1, 6))])
    torch.testing.assert_close(apart, together, rtol=1e-4, atol=1e-5)


# --- configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conditional": True, "num_classes": 1}, "num_classes = 1; use conditional=false"),
        ({"channel_base": 8}, "channel_base = 8 leaves no channel at 16 px; use channel_base=16"),
        ({"resolution": 48}, "resolution = 48"),
        ({"image_channels": 4}, "image_channels = 4"),
        ({"style_mixing": 1.5}, "style_mixing = 1.5"),
        ({"mapping_layers": 0}, "mapping_layers = 0"),
        ({"activation_clamp": 0.0}, "activation_clamp = 0.0"),
        ({"num_classes": 0}, "num_classes = 0"),
    ],
)
def test_a_wrong_config_says_what_to_do(changes: dict[str, object], message: str) -> None:
    with pytest.raises(configs.ConfigError, match=message) as caught:
        tiny(**changes)
    assert "\n" not in str(caught.value)
