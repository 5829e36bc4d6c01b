"""BigGAN-deep: published parameter counts, both networks written out again, purity, compilation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from network_parts import R1, batch, built, networks
from torch import Tensor, nn

from bigan import config as configs
from bigan.layers.batchnorm import collecting_statistics
from bigan.layers.spectral import SpectralNorm
from bigan.models import biggan_deep
from bigan.models.biggan_deep import Config, DiscriminatorBlock


def tiny(**changes: object) -> Config:
    values: dict[str, object] = {
        "name": "biggan_deep", "resolution": 16, "num_classes": 5, "z_dim": 7, "channels": 4,
        "image_channels": 1, "shared_dim": 6, "attention_resolutions": [8],
    }  # fmt: skip
    return configs.validate(Config, values | changes, "test")


def trained(network: nn.Module) -> nn.Module:
    """`network` with biases, gains and attention that are no longer neutral."""
    draw = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        if parameter.ndim < 2:
            noise = torch.empty(parameter.shape).normal_(0, 0.3, generator=draw)
            parameter.data += noise.to(parameter) + (0.5 if parameter.numel() == 1 else 0)
    return network


@pytest.fixture
def one_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks of two blocks that change the width, for what takes long: 16 px D, 8 px G."""
    monkeypatch.setitem(biggan_deep.WIDTHS, 16, (8, 4))


# --- parameter counts and shapes -----------------------------------------------------------------


def num_parameters(resolution: int) -> list[int]:
    values = {"name": "biggan_deep", "resolution": resolution, "num_classes": 1000}
    pair = built(configs.validate(Config, values, "test"), "meta")
    return [sum(p.numel() for p in network.parameters()) for network in pair]


def test_parameter_counts_are_the_published_ones() -> None:
    assert num_parameters(128) == [50_244_484, 34_590_210]


@pytest.mark.parametrize(("resolution", "millions"), [(128, 50.4), (256, 55.9), (512, 56.2)])
def test_released_generators_are_as_large(resolution: int, millions: float) -> None:
    """Theirs have 128 output maps, 3 of them used (sizes recalled from their PyTorch port)."""
    unused_maps = (128 - 3) * (3 * 3 * 128 + 1)
    assert round((num_parameters(resolution)[0] + unused_maps) / 1e6, 1) == millions


# Each block's output channels in units of `channels`, from the published tables.
BLOCKS = {
    512: ([16, 16, 16, 8, 8, 8, 8, 4, 4, 2, 2, 1, 1, 1], [1, 1, 2, 2, 4, 4, *[8] * 4, *[16] * 4]),
    256: ([16, 16, 16, 8, 8, 8, 8, 4, 4, 2, 2, 1], [2, 2, 4, 4, *[8] * 4, *[16] * 4]),
    128: ([16, 16, 16, 8, 8, 4, 4, 2, 2, 1], [2, 2, 4, 4, 8, 8, 16, 16, 16, 16]),
    64: ([16, 16, 16, 8, 8, 4, 4, 2], [4, 4, 8, 8, 16, 16, 16, 16]),
    32: ([4] * 6, [4] * 6),
    16: ([4] * 4, [4] * 4),
}


@pytest.mark.parametrize("resolution", list(BLOCKS))
def test_every_resolution_on_the_meta_device(resolution: int) -> None:
    config = tiny(
        resolution=resolution, channels=8, image_channels=3, attention_resolutions=[64]
    )  # fmt: skip
    generator, discriminator = built(config, "meta")
    sizes: list[list[int]] = [[], []]
    for network, seen in zip((generator, discriminator), sizes, strict=True):
        for block in network.blocks:
            block.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out.shape[2]))
    labels = torch.empty(2, dtype=torch.int64, device="meta")
    images = generator(torch.empty(2, 7, device="meta"), labels)
    assert images.shape == (2, 3, resolution, resolution)
    assert discriminator(images, labels).shape == (2,)

    found = tuple(
        [b.conv4.weight.shape[0] // 8 for b in n.blocks] for n in (generator, discriminator)
    )
    assert found == BLOCKS[resolution]
    # A bottleneck of a quarter of the wider end: what enters in G, what leaves in D.
    entering = [BLOCKS[resolution][0][0], *BLOCKS[resolution][0][:-1]]
    assert [b.conv2.weight.shape[:2] for b in generator.blocks] == [
        (2 * u, 2 * u) for u in entering
    ]
    assert [b.conv3.weight.shape[:2] for b in discriminator.blocks] == [
        (2 * u, 2 * u) for u in BLOCKS[resolution][1]
    ]
    # G doubles in the second block of a resolution, D halves in the first.
    count = range(len(entering))
    assert sizes[0] == [4 * 2 ** ((i + 1) // 2) for i in count]
    assert sizes[1] == [resolution // 2 ** (i // 2 + 1) for i in count]
    assert len(generator.attention) == (resolution >= 64)
    assert len(discriminator.attention) == (resolution >= 128)


# --- structure -----------------------------------------------------------------------------------


class Written:
    """Both networks as the paper has them, over a state dict; no layer of ours is called."""

    def __init__(self, network: nn.Module, attention: tuple[int, ...]) -> None:
        self.state = network.state_dict()
        self.attention = attention  # indices of the blocks before it
        self.used: set[str] = set()

    def get(self, name: str) -> Tensor:
        self.used.add(name)
        return self.state[name]

    def weight(self, name: str) -> Tensor:
        weight = self.get(f"{name}.weight")
        return weight / (self.get(f"{name}.u") @ weight.flatten(1) @ self.get(f"{name}.v"))

    def conv(self, name: str, x: Tensor, bias: bool = True) -> Tensor:
        weight = self.weight(name)
        padding = {1: 0, 3: 1}[weight.shape[2]]
        return F.conv2d(x, weight, self.get(f"{name}.bias") if bias else None, padding=padding)

    def whiten(self, x: Tensor) -> Tensor:
        centred = x - x.mean((0, 2, 3), keepdim=True)
        return centred / (centred.square().mean((0, 2, 3), keepdim=True) + 1e-4).sqrt()

    def bn(self, name: str, x: Tensor, cond: Tensor) -> Tensor:
        gain = 1 + cond @ self.weight(f"{name}.gain").T
        bias = cond @ self.weight(f"{name}.bias").T
        return self.whiten(x) * gain[:, :, None, None] + bias[:, :, None, None]

    def attend(self, name: str, x: Tensor) -> Tensor:
        theta = self.conv(f"{name}.theta", x, bias=False).flatten(2)
        phi = F.max_pool2d(self.conv(f"{name}.phi", x, bias=False), 2).flatten(2)
        g = F.max_pool2d(self.conv(f"{name}.g", x, bias=False), 2).flatten(2)
        shares = torch.einsum("bcq,bck->bqk", theta, phi).softmax(2)
        mixed = torch.einsum("bck,bqk->bcq", g, shares).view(x.shape[0], -1, *x.shape[2:])
        return x + self.get(f"{name}.gamma") * self.conv(f"{name}.output", mixed, bias=False)

    def generator(self, z: Tensor, labels: Tensor, out_channels: list[int]) -> Tensor:
        cond = torch.cat([self.get("shared.weight")[labels], z], dim=1)
        x = (cond @ self.weight("first").T + self.get("first.bias")).view(len(z), -1, 4, 4)
        for i, channels in enumerate(out_channels):
            block = f"blocks.{i}"
            h = self.conv(f"{block}.conv1", self.bn(f"{block}.bn1", x, cond).clamp_min(0))
            h = self.bn(f"{block}.bn2", h, cond).clamp_min(0)
            if i % 2:
                h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
                x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            h = self.conv(f"{block}.conv2", h)
            h = self.conv(f"{block}.conv3", self.bn(f"{block}.bn3", h, cond).clamp_min(0))
            h = self.conv(f"{block}.conv4", self.bn(f"{block}.bn4", h, cond).clamp_min(0))
            x = torch.stack([h[:, c] + x[:, c] for c in range(channels)], dim=1)
            assert h.shape[1] == channels
            if i in self.attention:
                x = self.attend(f"attention.{i}", x)
        x = self.whiten(x) * self.get("bn.weight").view(-1, 1, 1)
        return self.conv("to_image", (x + self.get("bn.bias").view(-1, 1, 1)).clamp_min(0)).tanh()

    def discriminator(self, x: Tensor, labels: Tensor, out_channels: list[int]) -> Tensor:
        x = self.conv("from_image", x)
        for i, channels in enumerate(out_channels):
            block = f"blocks.{i}"
            h = self.conv(f"{block}.conv1", x.clamp_min(0))
            h = self.conv(f"{block}.conv2", h.clamp_min(0))
            h = self.conv(f"{block}.conv3", h.clamp_min(0)).clamp_min(0)
            if i % 2 == 0:
                h, x = (t.unflatten(3, (-1, 2)).mean(4) for t in (h, x))
                h, x = (t.unflatten(2, (-1, 2)).mean(3) for t in (h, x))
            h = self.conv(f"{block}.conv4", h)
            if channels > x.shape[1]:
                x = torch.cat([x, self.conv(f"{block}.shortcut", x)], dim=1)
            x = h + x
            if i in self.attention:
                x = self.attend(f"attention.{i}", x)
        x = x.clamp_min(0).sum((2, 3))
        w, b = self.weight("linear")[0], self.get("linear.bias")
        return (x * w).sum(1) + b + (x * self.weight("embedding")[labels]).sum(1)


def test_both_networks_equal_their_definition() -> None:
    """In float64 at 64 px, where widths change; every parameter has its place in the definition."""
    config = tiny(resolution=64, channels=2, image_channels=3, attention_resolutions=[32])
    pair = [trained(network).double() for network in networks(config)]
    z, labels, images = (t.double() if t.is_floating_point() else t for t in batch(config, 3))
    widths = [[2 * units for units in side] for side in BLOCKS[64]]

    # In G the block that reaches 32 px is the sixth; in D 32 px ends with the second.
    written = [Written(pair[0], (5,)), Written(pair[1], (1,))]
    with torch.no_grad():
        torch.testing.assert_close(
            pair[0](z, labels), written[0].generator(z, labels, widths[0]), rtol=1e-9, atol=1e-9
        )
        logits = pair[1](images, labels)
        torch.testing.assert_close(
            logits, written[1].discriminator(images, labels, widths[1]), rtol=1e-9, atol=1e-9
        )
    assert logits.dtype == torch.float64
    for network, definition in zip(pair, written, strict=True):
        standing = {name for name in network.state_dict() if ".standing_" in f".{name}"}
        assert definition.used == set(network.state_dict()) - standing


def test_the_discriminator_does_not_touch_its_input() -> None:
    block = DiscriminatorBlock(8, 8, True, 1e-4)
    biggan_deep.init.init_weights(block, torch.Generator().manual_seed(0))
    x = torch.randn(3, 8, 6, 6, generator=torch.Generator().manual_seed(1))
    original = x.clone()
    block(x)
    assert torch.equal(x, original)
    assert block.shortcut is None


def test_everything_is_spectrally_normalised_but_the_shared_embedding() -> None:
    for network in networks(tiny()):
        matrices = {name for name, p in network.named_parameters() if p.ndim >= 2}
        normalised = {
            f"{name}.weight" for name, m in network.named_modules() if isinstance(m, SpectralNorm)
        }
        assert matrices - normalised <= {"shared.weight"}


def test_the_epsilons_reach_every_layer() -> None:
    pair = networks(tiny(sn_eps=1e-6, bn_eps=1e-5))
    layers = [module for network in pair for module in network.modules() if hasattr(module, "eps")]
    assert {m.eps for m in layers if isinstance(m, SpectralNorm)} == {1e-6}
    assert {m.eps for m in layers if not isinstance(m, SpectralNorm)} == {1e-5}


# --- first values --------------------------------------------------------------------------------


def test_first_values_are_a_function_of_the_generator() -> None:
    states = []
    for global_seed, seed in ((3, 0), (4, 0), (4, 1)):
        torch.manual_seed(global_seed)
        pair = [network.to_empty(device="cpu") for network in built(tiny(), "meta")]
        for network in pair:
            for tensor in network.state_dict().values():
                tensor.fill_(torch.nan)
            network.init_weights(torch.Generator().manual_seed(seed))
        states.append(
            {f"{i}.{k}": t for i, n in enumerate(pair) for k, t in n.state_dict().items()}
        )
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
        if name.endswith(".weight") and tensor.ndim >= 2:
            assert not torch.equal(tensor, states[2][name]), name


def test_the_config_chooses_the_initial_law() -> None:
    orthogonal, normal = (networks(tiny(init=law))[1] for law in ("orthogonal", "normal"))
    rows = orthogonal.blocks[0].conv2.weight.flatten(1)
    torch.testing.assert_close(rows @ rows.t(), torch.eye(len(rows)), rtol=0, atol=1e-5)
    weights = torch.cat([p.flatten() for p in normal.parameters() if p.ndim == 4])
    torch.testing.assert_close(weights.std().item(), 0.02, rtol=0.05, atol=0)


# --- purity, precision, compilation --------------------------------------------------------------


def test_forward_is_pure() -> None:
    config = tiny()
    generator, discriminator = networks(config)
    z, labels, _ = batch(config)
    buffers = [*generator.buffers(), *discriminator.buffers()]
    versions = [buffer._version for buffer in buffers]
    before = [buffer.clone() for buffer in buffers]
    state = torch.get_rng_state()
    images = generator(z, labels)
    logits = discriminator(images, labels)
    logits.sum().backward()
    assert torch.equal(generator(z, labels), images)
    assert torch.equal(discriminator(images, labels), logits)
    assert torch.equal(torch.get_rng_state(), state)
    for buffer, old, version in zip(buffers, before, versions, strict=True):
        assert torch.equal(buffer, old)
        assert buffer._version == version


def test_gradients_of_a_penalty_equal_finite_differences(one_stage: None) -> None:
    config = tiny(channels=4)
    discriminator = trained(networks(config)[1]).double()
    _, labels, images = batch(config, 2)
    penalty = R1(discriminator)
    parameters = list(discriminator.parameters())
    gradients = torch.autograd.grad(penalty(images.double(), labels), parameters)
    draw = torch.Generator().manual_seed(5)
    direction = [torch.randn(p.shape, generator=draw, dtype=p.dtype) for p in parameters]
    step, losses = 1e-6, []
    for sign in (1, -2):
        for parameter, change in zip(parameters, direction, strict=True):
            parameter.data += sign * step * change
        losses.append(penalty(images.double(), labels).item())
    slope = sum((g * d).sum().item() for g, d in zip(gradients, direction, strict=True))
    assert abs(slope) > 1e-2
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("which", ["generator", "penalty"])
def test_one_full_graph_equals_eager(which: str, one_stage: None) -> None:
    config = tiny()
    generator, discriminator = networks(config)
    z, labels, images = batch(config)
    module = trained(generator if which == "generator" else R1(discriminator))
    inputs = (z, labels) if which == "generator" else (images, labels)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=False)
    results = []
    for call in (module, compiled):
        loss = call(*inputs).square().sum()
        results.append([loss, *torch.autograd.grad(loss, list(module.parameters()))])
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-5, atol=1e-6)


def test_bfloat16_stays_close_and_low_all_the_way(one_stage: None) -> None:
    """Identity shortcuts carry a dtype on: after one float32 map, all the others would be so."""
    config = tiny(image_channels=3)
    pair = networks(config)
    z, labels, _ = batch(config)
    images = pair[0](z, labels)
    logits = pair[1](images, labels)
    dtypes: set[torch.dtype] = set()
    for block in (*pair[0].blocks, *pair[1].blocks):
        block.register_forward_hook(lambda _, __, out: dtypes.add(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        low = pair[0](z, labels)
        low_logits = pair[1](images, labels)
    assert dtypes == {torch.bfloat16}
    assert (low.float() - images).abs().max() < 0.1
    assert (low_logits - logits).abs().max() < 0.03 * logits.abs().max()
    (low.float().sum() + low_logits.float().sum()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for n in pair for p in n.parameters())


def test_standing_statistics_make_evaluation_independent_of_the_batch() -> None:
    config = tiny()
    generator, _ = networks(config)
    z, labels, _ = batch(config, num=32)
    with collecting_statistics(generator):
        images = generator(z, labels)
    generator.eval()
    # The batch behind the statistics: evaluation gives what training gave.
    torch.testing.assert_close(generator(z, labels), images, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(generator(z[:3], labels[:3]), images[:3], rtol=1e-3, atol=1e-4)


# --- configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 128, "channels": 7}, "14 channels at 128 px.*; use channels=8"),
        ({"resolution": 512, "channels": 1}, "1 channels at 512 px.*; use channels=4"),
        ({"channels": 3}, "8 has 12 channels"),
        ({"resolution": 64, "channels": 2, "attention_resolutions": [64]}, "64 has 4 channels"),
        ({"attention_resolutions": [48]}, "48 px occurs in no network"),
        ({"resolution": 48}, "resolution = 48"),
        ({"image_channels": 4}, "image_channels = 4"),
        ({"num_classes": 0}, "num_classes = 0"),
        ({"hierarchical": True}, "hierarchical = True: unknown key"),
    ],
)
def test_a_wrong_config_says_what_to_do(changes: dict[str, object], message: str) -> None:
    with pytest.raises(configs.ConfigError, match=message) as caught:
        tiny(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("resolution", "channels"), [(16, 2), (32, 1), (64, 1), (128, 2), (256, 6), (512, 4)]
)
def test_the_narrowest_networks_that_are_allowed_run(resolution: int, channels: int) -> None:
    """What the message of a refused width proposes is a network."""
    config = tiny(resolution=resolution, channels=channels, attention_resolutions=[])
    generator, discriminator = built(config, "meta")
    labels = torch.empty(2, dtype=torch.int64, device="meta")
    images = generator(torch.empty(2, 7, device="meta"), labels)
    assert discriminator(images, labels).shape == (2,)
