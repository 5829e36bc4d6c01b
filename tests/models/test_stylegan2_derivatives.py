"""StyleGAN2: purity, gradient penalties, path lengths, compilation and precision."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from network_parts import R1, batch
from stylegan2_reference import networks, tiny
from torch import Tensor, nn

from bigan.layers import hashing
from bigan.models.stylegan2 import Generator


def test_forward_changes_no_buffer_and_no_random_state() -> None:
    config = tiny(conditional=True)
    generator, discriminator = networks(config)
    z, labels, _ = batch(config)
    buffers = [*generator.buffers(), *discriminator.buffers()]
    before = [buffer.clone() for buffer in buffers]
    versions = [buffer._version for buffer in buffers]
    state = torch.get_rng_state()
    images, logits = [], []
    for _ in range(2):
        images.append(generator(z, labels))
        logits.append(discriminator(images[-1], labels))
    assert torch.equal(*images)
    assert torch.equal(*logits)
    logits[0].sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
    for buffer, old, version in zip(buffers, before, versions, strict=True):
        assert torch.equal(buffer, old)
        assert buffer._version == version


class PathLength(nn.Module):
    """The squared length of d(synthesis . y)/dw, as a path length phase computes it."""

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.generator = generator

    def gradient(self, ws: Tensor, keys: Tensor, y: Tensor) -> Tensor:
        return torch.func.grad(lambda ws: (self.generator.synthesis(ws, keys) * y).sum())(ws)

    def forward(self, z: Tensor, labels: Tensor, y: Tensor) -> Tensor:
        keys = hashing.keys(z)
        ws = self.generator.latents(z, labels, keys)
        return self.gradient(ws, keys, y).square().sum(2).mean()


def test_func_grad_through_the_discriminator_equals_autograd() -> None:
    config = tiny(resolution=8, conditional=True)
    discriminator = networks(config)[1].double()
    _, labels, images = batch(config)
    images = images.double()
    parameters = list(discriminator.parameters())
    found = torch.autograd.grad(R1(discriminator)(images, labels), parameters)
    x = images.clone().requires_grad_()
    logits = discriminator(x, labels)
    (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    loss = gradient.square().flatten(1).sum(1).mean() + F.softplus(-logits).mean()
    for a, b in zip(found, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(a, b)


def test_path_length_gradients_equal_finite_differences() -> None:
    config = tiny(resolution=8, style_mixing=0.0, max_channels=3)
    generator = networks(config)[0].double()
    z, labels, y = batch(config, 2)
    y, keys = y.double(), hashing.keys(z)
    ws = generator.mapping(z.double(), labels).detach()
    module = PathLength(generator)
    gradient = module.gradient(ws, keys, y)
    draw = torch.Generator().manual_seed(0)

    def central(function: object, step: float) -> float:
        return ((function(step) - function(-step)) / (2 * step)).item()  # type: ignore[operator]

    for _ in range(3):
        towards = torch.randn(ws.shape, generator=draw, dtype=torch.float64)
        slope = central(
            lambda t, towards=towards: (generator.synthesis(ws + t * towards, keys) * y).sum(), 1e-6
        )
        assert (gradient * towards).sum().item() == pytest.approx(slope, rel=1e-4)

    length = module(z.double(), labels, y)
    gradients = torch.autograd.grad(length, list(generator.parameters()), allow_unused=True)
    for (name, parameter), found in zip(generator.named_parameters(), gradients, strict=True):
        original = parameter.detach().clone()
        towards = torch.randn(original.shape, generator=draw, dtype=torch.float64)

        def moved(
            t: float, parameter: Tensor = parameter, by: Tensor = towards, at: Tensor = original
        ) -> Tensor:
            parameter.data.copy_(at + t * by)
            return module(z.double(), labels, y)

        slope = central(moved, 1e-6)
        parameter.data.copy_(original)
        value = 0.0 if found is None else (found * towards).sum().item()
        assert value == pytest.approx(slope, rel=1e-4, abs=1e-6 * length.item()), name


@pytest.mark.parametrize("which", ["generator", "penalty", "path length"])
def test_one_full_graph_equals_eager(which: str) -> None:
    config = tiny(resolution=8, conditional=True, mapping_layers=1)
    generator, discriminator = networks(config)
    z, labels, images = batch(config)
    module, inputs = {
        "generator": (generator, (z, labels)),
        "penalty": (R1(discriminator), (images, labels)),
        "path length": (PathLength(generator), (z, labels, images)),
    }[which]
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=False)
    results = []
    for call in (module, compiled):
        loss = call(*inputs).square().sum()
        gradients = torch.autograd.grad(
            loss, list(module.parameters()), allow_unused=True, materialize_grads=True
        )
        results.append([loss, *gradients])
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("conditional", [False, True])
def test_channels_last_and_bfloat16_stay_close(conditional: bool) -> None:
    config = tiny(conditional=conditional, image_channels=3)
    pair = networks(config)
    z, labels, _ = batch(config)
    images = pair[0](z, labels)
    logits = pair[1](images, labels)
    last = [copy.deepcopy(n).to(memory_format=torch.channels_last) for n in pair]
    torch.testing.assert_close(last[0](z, labels), images, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last[1](images, labels), logits, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        ws = pair[0].mapping(z, labels)
        low = pair[0](z, labels)
        low_logits = pair[1](images, labels)
    # w, the sum of images and the head keep full precision.
    assert torch.equal(ws, pair[0].mapping(z, labels))
    assert low.dtype == low_logits.dtype == torch.float32
    assert (low - images).abs().max() < 0.03 * images.abs().max()
    assert (low_logits - logits).abs().max() < 0.03 * logits.abs().max()
    (low.sum() + low_logits.sum()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for n in pair for p in n.parameters())
