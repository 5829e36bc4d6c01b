"""BigGAN-deep: the tables of the paper, and both networks written again from their definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from families import make, small
from network_parts import batch, built, networks, trained
from torch import Tensor, nn

from bigan.layers.init import init_weights
from bigan.models.biggan_deep import DiscriminatorBlock

# --- parameter counts and shapes -----------------------------------------------------------------


def num_parameters(resolution: int) -> list[int]:
    config = make("biggan_deep", {"resolution": resolution, "num_classes": 1000})
    pair = built(config, "meta")
    return [sum(p.numel() for p in network.parameters()) for network in pair]


@pytest.mark.parametrize(("resolution", "millions"), [(128, 50.4), (256, 55.9), (512, 56.2)])
def test_released_generators_are_as_large(resolution: int, millions: float) -> None:
    """They have 128 output maps, of which 3 are used (sizes recalled from their PyTorch port)."""
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
def test_blocks_are_those_of_the_tables(resolution: int) -> None:
    config = small("biggan_deep",
        resolution=resolution, channels=8, image_channels=3, attention_resolutions=[64]
    )  # fmt: skip
    generator, discriminator = built(config, "meta")
    sizes: list[list[int]] = [[], []]
    for network, seen in zip((generator, discriminator), sizes, strict=True):
        for block in network.blocks:
            block.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out.shape[2]))
    labels = torch.empty(2, dtype=torch.int64, device="meta")
    images = generator(torch.empty(2, 7, device="meta"), labels)
    discriminator(images, labels)

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


# --- structure -----------------------------------------------------------------------------------


class Written:
    """Both networks by the definition of the paper, from a state dict, without bigan's layers."""

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
    """In float64 at 64 px, where widths change; the definition uses every parameter."""
    config = small(
        "biggan_deep", resolution=64, channels=2, image_channels=3, attention_resolutions=[32]
    )
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


def test_the_discriminator_does_not_change_its_input() -> None:
    block = DiscriminatorBlock(8, 8, True, 1e-4)
    init_weights(block, torch.Generator().manual_seed(0))
    x = torch.randn(3, 8, 6, 6, generator=torch.Generator().manual_seed(1))
    original = x.clone()
    block(x)
    assert torch.equal(x, original)
    assert block.shortcut is None


def test_maps_stay_in_half_precision_under_autocast() -> None:
    """An identity shortcut passes a dtype on: one float32 map would make all later ones float32."""
    config = small("biggan_deep", image_channels=3)
    generator, discriminator = networks(config)
    z, labels, _ = batch(config)
    dtypes: set[torch.dtype] = set()
    for block in (*generator.blocks, *discriminator.blocks):
        block.register_forward_hook(lambda _, __, out: dtypes.add(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        discriminator(generator(z, labels), labels)
    assert dtypes == {torch.bfloat16}
