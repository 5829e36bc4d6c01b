"""The autoencoder: widths, the range of both outputs, and what `conditional` adds."""

from __future__ import annotations

import torch
from families import small
from network_parts import batch, built, networks


def test_widths_double_at_each_halving_up_to_eight_times() -> None:
    config = small("autoencoder", resolution=256, channels=4)
    encoder, decoder = built(config, "meta")
    found = [encoder.from_image.conv, *(block.conv for block in encoder.blocks)]
    assert [conv.out_channels for conv in found] == [4, 8, 16, 32, 32, 32, 32]
    assert [block.conv.out_channels for block in decoder.blocks] == [32, 32, 32, 16, 8, 4]


def test_outputs_begin_at_the_scale_of_the_prior() -> None:
    """Images in [-1, 1] and latents of about unit scale, so that a first step is not degenerate."""
    config = small("autoencoder", channels=16, z_dim=16)
    encoder, decoder = networks(config)
    z, labels, images = batch(config, 64)
    mean, log_variance = encoder(images, labels)
    assert 0.1 < mean.square().mean().sqrt() < 2
    assert log_variance.abs().max() < 4
    decoded = decoder(z, labels)
    assert 0.1 < decoded.std() < 1
    assert decoder(100 * z, labels).abs().max() <= 1
    decoder.to_image.weight.data.mul_(1000)
    assert 0.9 < decoder(z, labels).abs().max() <= 1


def test_latents_are_in_float32_under_autocast() -> None:
    config = small("autoencoder")
    encoder, _ = networks(config)
    _, labels, images = batch(config)
    with torch.autocast("cpu", torch.bfloat16):
        mean, log_variance = encoder(images, labels)
    assert mean.dtype == log_variance.dtype == torch.float32


def test_only_conditional_networks_have_an_embedding() -> None:
    for conditional in (False, True):
        networks = built(small("autoencoder", conditional=conditional), "meta")
        embeddings = [n for net in networks for n, _ in net.named_parameters() if "embedding" in n]
        assert embeddings == ["embedding.weight"] * (2 * conditional)
