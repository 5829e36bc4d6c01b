"""Cross-replica BatchNorm on gloo processes against one process on the joined batch.

Run as a script, this file is one rank: it measures and prints differences as JSON.
"""

from __future__ import annotations

import copy
import datetime
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from bigan.layers.batchnorm import (
    BatchNorm2d,
    ConditionalBatchNorm2d,
    average_over_ranks,
    collecting_statistics,
    normalization_layers,
    set_process_group,
)
from bigan.models.biggan import Config, Generator

PER_RANK = 4
CONFIG = Config(
    name="biggan", resolution=16, num_classes=5, z_dim=30, channels=4, image_channels=1,
    shared_dim=8,
)  # fmt: skip


def new_generator() -> Generator:
    network = Generator(CONFIG)
    network.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():  # away from gain 1, bias 0, so that a wrong gain or bias shows
        network.bn.weight.uniform_(0.5, 2, generator=torch.Generator().manual_seed(1))
        network.bn.bias.uniform_(-1, 1, generator=torch.Generator().manual_seed(2))
    return network


def global_batch(world_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents whose scale differs between ranks, labels, and weights of a linear loss."""
    draw = torch.Generator().manual_seed(3)
    num = PER_RANK * world_size
    z = torch.randn(num, 30, generator=draw) * torch.linspace(0.3, 3, num)[:, None]
    labels = torch.randint(5, (num,), generator=draw)
    return z, labels, torch.randn(num, 1, 16, 16, generator=draw)


def run(network: nn.Module, z: Tensor, labels: Tensor, w: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(images, gradients of mean(images * w) for z and every parameter)."""
    z = z.clone().requires_grad_()
    images = network(z, labels)
    leaves = [z, *network.parameters()]
    return images.detach(), list(torch.autograd.grad((images * w).sum() / len(z), leaves))


def worst(ours: list[Tensor], reference: list[Tensor]) -> float:
    """Largest difference, relative to each tensor's largest entry.

    The floor of 0.1 is for biases before a BatchNorm, whose gradient is zero up to rounding; all
    other tensors here reach 0.7.
    """
    return max(
        float((a - b).abs().max() / b.abs().max().clamp_min(0.1))
        for a, b in zip(ours, reference, strict=True)
    )


def compare(network: nn.Module, rank: int, size: int) -> dict[str, float]:
    """Differences of this rank's outputs and of the averaged gradients from the joined batch."""
    batch = global_batch(size)
    mine = slice(rank * PER_RANK, (rank + 1) * PER_RANK)
    expected_images, expected = run(new_generator(), *batch)
    images, gradients = run(network, *(t[mine] for t in batch))
    for gradient in gradients[1:]:  # what DDP does to the parameters' gradients
        dist.all_reduce(gradient)
        gradient.div_(size)
    gradients[0].div_(size)  # the mean over ranks of the losses
    return {
        "output": worst([images], [expected_images[mine]]),
        "gradient_z": worst(gradients[:1], [expected[0][mine]]),
        "gradient_parameters": worst(gradients[1:], expected[1:]),
    }


def check_function(size: int) -> bool:
    """First and second derivatives in float64; all ranks perturb the same entry at once."""
    name = dist.group.WORLD.group_name
    x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    x.requires_grad_()

    def average(x: Tensor) -> Tensor:
        return average_over_ranks(x, name, size)

    def cubed(x: Tensor) -> Tensor:  # its second derivative is not zero
        return average(x).pow(3)

    first = torch.autograd.gradcheck(average, (x,), fast_mode=False)
    return first and torch.autograd.gradgradcheck(cubed, (x,), grad_outputs=torch.ones_like(x))


def check_adjoint(rank: int, size: int) -> float:
    """Sum over ranks of <g_r, A x_r> equals that of <A g_r, x_r>: the backward's definition."""
    draw = torch.Generator().manual_seed(rank)
    x = torch.randn(5, generator=draw, dtype=torch.float64).requires_grad_()
    g = torch.randn(5, generator=draw, dtype=torch.float64)
    y = average_over_ranks(x, dist.group.WORLD.group_name, size)
    (back,) = torch.autograd.grad(y, x, g)
    both = torch.stack([(g * y).sum().detach(), (back * x).sum().detach()])
    dist.all_reduce(both)
    return float((both[0] - both[1]).abs())


def check_standing(rank: int, size: int) -> float:
    """Standing statistics collected over ranks against one process on the joined batch."""
    z, labels, _ = global_batch(size)
    mine = slice(rank * PER_RANK, (rank + 1) * PER_RANK)
    network, reference = new_generator(), new_generator()
    set_process_group(network, dist.group.WORLD)
    with collecting_statistics(network, reduce=dist.all_reduce):
        network(z[mine], labels[mine])
        network(-z[mine], labels[mine])
    with collecting_statistics(reference):
        reference(z, labels)
        reference(-z, labels)
    return worst(list(network.buffers()), list(reference.buffers()))


def worker() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    rank, size = dist.get_rank(), dist.get_world_size()
    network = new_generator()
    set_process_group(network, dist.group.WORLD)
    found: dict[str, object] = {"joined": compare(network, rank, size)}
    found["copied"] = compare(copy.deepcopy(network), rank, size)
    if "everything" in sys.argv:
        compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
        found["compiled"] = compare(compiled, rank, size)
        found["gradcheck"] = check_function(size)
    set_process_group(network, None)
    found["local"] = compare(network, rank, size)
    found["adjoint"] = check_adjoint(rank, size)
    found["standing"] = check_standing(rank, size)
    dist.destroy_process_group()
    print(json.dumps(found))


def launch(world_size: int, *arguments: str) -> list[dict]:
    """The JSON that each rank prints."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ, "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, *arguments], env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-4000:]
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


@pytest.fixture(scope="module")
def two_ranks() -> list[dict]:
    return launch(2, "everything")


@pytest.mark.full
@pytest.mark.parametrize("case", ["joined", "copied", "compiled"])
def test_two_ranks_equal_one_process_on_the_joined_batch(two_ranks: list[dict], case: str) -> None:
    for found in two_ranks:
        assert max(found[case].values()) < 1e-5, found[case]


@pytest.mark.full
def test_without_a_group_the_statistics_are_local(two_ranks: list[dict]) -> None:
    """Also shows that the comparison above can fail."""
    for found in two_ranks:
        assert found["local"]["output"] > 1e-2
        assert found["local"]["gradient_parameters"] > 1e-2


@pytest.mark.full
def test_the_averaging_function_has_correct_derivatives(two_ranks: list[dict]) -> None:
    for found in two_ranks:
        assert found["gradcheck"]
        assert found["adjoint"] < 1e-12


@pytest.mark.full
def test_standing_statistics_are_pooled_over_ranks(two_ranks: list[dict]) -> None:
    for found in two_ranks:
        assert found["standing"] < 1e-5


@pytest.mark.full
@pytest.mark.slow
def test_three_ranks_equal_one_process_on_the_joined_batch() -> None:
    for found in launch(3):
        assert max(found["joined"].values()) < 1e-5, found["joined"]
        assert found["standing"] < 1e-5


def test_a_group_of_one_process_is_local() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        network = nn.ModuleList([BatchNorm2d(3), ConditionalBatchNorm2d(3, 2)])
        set_process_group(network, dist.group.WORLD)
        assert [layer.group_name for layer in normalization_layers(network)] == [None, None]
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    worker()
