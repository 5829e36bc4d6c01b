"""StyleGAN2's latents: mixing of styles, truncation, the mean of w."""

from __future__ import annotations

import pytest
import torch
from network_parts import batch
from stylegan2_reference import mapped, networks, tiny

from bigan.layers import hashing
from bigan.layers.mapping import (
    AveragedMapping,
    follow_latents,
    has_latent_average,
    mean_latent,
)


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_styles_are_mixed_in_training_mode(share: float) -> None:
    """A fraction `share` of the images, from layer 1 .. num_ws - 1 on with equal probability."""
    config = tiny(resolution=16, style_mixing=share)
    generator, _ = networks(config)
    z, labels, _ = batch(config, 6000)
    keys = hashing.keys(z)
    ws = generator.latents(z, labels, keys)
    one = generator.mapping(z, labels)
    other = generator.mapping(hashing.normal_field(keys, 0, (config.z_dim,)), labels)
    assert ws.shape == (6000, config.num_ws, config.w_dim)
    is_first = (ws == one).all(2)
    assert torch.equal(ws, torch.where(is_first[..., None], one, other))
    # The other latent applies to all layers from its first one on.
    assert (is_first.int().diff(dim=1) <= 0).all()
    counts = is_first.sum(1).bincount(minlength=config.num_ws + 1)
    assert counts[0] == 0
    expected = [share * 6000 / (config.num_ws - 1)] * (config.num_ws - 1) + [(1 - share) * 6000]
    for count, mean in zip(counts[1:].tolist(), expected, strict=True):
        assert abs(count - mean) <= 4 * mean**0.5
    assert torch.equal(ws, generator.latents(z, labels, keys))
    # Truncation applies to both.
    generator.mapping.w_average.fill_(2.0)
    torch.testing.assert_close(
        generator.latents(z, labels, keys, truncation_psi=0.3), 2 + 0.3 * (ws - 2)
    )
    generator.mapping.w_average.zero_()
    generator.eval()
    assert torch.equal(generator.latents(z, labels, keys), one)


def test_the_second_latent_has_the_same_label_and_its_own_z() -> None:
    config = tiny(style_mixing=1.0, conditional=True)
    generator, _ = networks(config)
    z, labels, _ = batch(config, 100)
    keys = hashing.keys(z)
    second = hashing.normal_field(keys, 0, (config.z_dim,))
    last = generator.latents(z, labels, keys)[:, -1]
    assert torch.equal(last, generator.mapping(second, labels)[:, -1])
    assert abs((second * z).mean()) < 0.2


def test_mixing_can_be_off() -> None:
    config = tiny(style_mixing=0.0)
    generator, _ = networks(config)
    z, labels, _ = batch(config)
    ws = generator.latents(z, labels, hashing.keys(z))
    assert torch.equal(ws, generator.mapping(z, labels))
    assert torch.equal(generator(z, labels), generator.eval()(z, labels))


def test_truncation_moves_w_towards_its_mean() -> None:
    config = tiny()
    generator, _ = networks(config)
    generator.eval()
    z, labels, _ = batch(config)
    w = generator.mapping(z, labels)
    average = torch.linspace(-1, 1, config.w_dim)
    generator.mapping.w_average.copy_(average)
    assert torch.equal(generator.mapping(z, labels), w)
    for psi in (0.0, 0.5):
        torch.testing.assert_close(generator.mapping(z, labels, psi), average + psi * (w - average))
    keys = hashing.keys(z)
    expected = generator.synthesis(generator.mapping(z, labels, 0.5), keys)
    torch.testing.assert_close(generator(z, labels, truncation_psi=0.5), expected)


@pytest.mark.parametrize("training", [False, True])
def test_each_image_can_have_its_own_truncation(training: bool) -> None:
    generator, _ = networks(tiny(style_mixing=0.5))
    generator.train(training)
    z, labels, _ = batch(generator.config)
    generator.mapping.w_average.normal_(generator=torch.Generator().manual_seed(3))
    psi = torch.tensor([0.0, 0.3, 0.7, 1.0]).repeat(2)
    images = generator(z, labels, truncation_psi=psi)
    for value in psi.unique().tolist():
        rows = psi == torch.tensor(value)
        expected = generator(z, labels, truncation_psi=value)[rows]
        torch.testing.assert_close(images[rows], expected, rtol=1e-5, atol=1e-5)
    compiled = torch.compile(generator.mapping, backend="aot_eager", fullgraph=True)
    ws = compiled(z, labels, psi)
    torch.testing.assert_close(ws, generator.mapping(z, labels, psi))


def test_the_mean_latent_follows_on_request_only() -> None:
    config = tiny(w_average_beta=0.75, conditional=True)
    generator, discriminator = networks(config)
    assert has_latent_average(generator)
    assert not has_latent_average(discriminator)
    z, labels, _ = batch(config, 8)
    mean = mean_latent(generator, z, labels)
    assert not mean.requires_grad
    w = mapped(generator.state_dict(), "mapping.network", z, labels, config)
    torch.testing.assert_close(mean, w.mean(0))
    assert (generator.mapping.w_average == 0).all()
    for share in (0.25, 1 - 0.75**2):
        follow_latents(generator, mean)
        torch.testing.assert_close(generator.mapping.w_average, share * mean)
    with pytest.raises(ValueError, match="Discriminator has no mean latent"):
        follow_latents(discriminator, mean)


def test_the_generator_can_be_averaged() -> None:
    """The averaged copy has the mean latent among its buffers."""
    generator, _ = networks(tiny())
    assert [name for name, _ in generator.named_buffers()] == ["mapping.w_average"]
    assert "mapping.w_average" in generator.state_dict()
    assert isinstance(generator.mapping, AveragedMapping)
