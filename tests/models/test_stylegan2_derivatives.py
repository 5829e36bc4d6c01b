"""StyleGAN2: path lengths and precision."""

from __future__ import annotations

import pytest
import torch
from network_parts import batch
from stylegan2_reference import networks, tiny
from torch import Tensor, nn

from bigan.layers import hashing
from bigan.models.stylegan2 import Generator


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


def test_the_path_length_is_one_full_graph() -> None:
    config = tiny(resolution=8, conditional=True, mapping_layers=1)
    module = PathLength(networks(config)[0])
    z, labels, images = batch(config)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=False)
    results = []
    for call in (module, compiled):
        loss = call(z, labels, images).square().sum()
        gradients = torch.autograd.grad(
            loss, list(module.parameters()), allow_unused=True, materialize_grads=True
        )
        results.append([loss, *gradients])
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-5, atol=1e-5)


def test_latents_and_outputs_are_in_float32_under_autocast() -> None:
    """w, the sum of the images of all resolutions, and the head of the discriminator."""
    config = tiny(conditional=True)
    generator, discriminator = networks(config)
    z, labels, images = batch(config)
    with torch.autocast("cpu", torch.bfloat16):
        ws = generator.mapping(z, labels)
        outputs = generator(z, labels), discriminator(images, labels)
    assert torch.equal(ws, generator.mapping(z, labels))
    assert [output.dtype for output in outputs] == [torch.float32] * 2
