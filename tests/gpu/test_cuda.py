"""The same recipe on a CUDA device: compiled, mixed precision, no waiting inside a step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import ROOT, SMOKE, TEN_CLASSES, launch

from bigan.checkpoint import Progress, Reader, Saver, TensorShard, snapshots
from bigan.data.stream import ShardStream
from bigan.distributed.world import World
from bigan.engine import Engine
from bigan.run.state import Training
from bigan.run.trainer import train
from bigan.run_config import RunConfig

Recipe = Callable[..., RunConfig]
R1 = "penalties=[{name: r1, weight: 1.0}]"


def steps(config: RunConfig, num: int) -> tuple[Training, dict[str, float], list[str]]:
    messages: list[str] = []
    training = Training(config, Engine(config, messages.append), TEN_CLASSES)
    training.prepare()
    with ShardStream(
        config.data.path, seed=0, world=training.world, batch=config.train.batch
    ) as stream:
        for _ in range(num):
            training.step(stream)
    means, _ = training.statistics.collect()
    return training, means, messages


@pytest.mark.parametrize("penalty", ["penalties=[]", R1, R1.replace("r1", "wgan_gp")])
def test_inductor_agrees_with_eager(recipe: Recipe, penalty: str) -> None:
    torch.backends.cudnn.allow_tf32 = False  # tf32 differs between eager and compiled convolutions
    _, eager, _ = steps(recipe(penalty, "compile=eager"), 3)
    _, compiled, messages = steps(recipe(penalty, "compile=inductor"), 3)
    assert not any("failed" in line for line in messages), messages
    for name, value in eager.items():
        assert compiled[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("augment", ["none", "diffaugment", "ada"])
def test_a_step_never_waits_for_the_device(recipe: Recipe, augment: str) -> None:
    config = recipe(R1, "train.batch=40", "train.micro_batch=20", f"augment={{name: {augment}}}")
    training, _, _ = steps(config, 2)  # compiled, allocated
    with ShardStream(
        config.data.path, seed=0, world=training.world, batch=40, accumulation=2
    ) as stream:
        torch.cuda.set_sync_debug_mode("error")
        try:
            training.step(stream)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_step_in_half_precision_never_waits_for_the_device(
    recipe: Recipe, precision: str
) -> None:
    training, _, _ = steps(recipe(R1, f"precision={precision}"), 2)
    with ShardStream(training.config.data.path, seed=0, world=training.world, batch=40) as stream:
        torch.cuda.set_sync_debug_mode("error")
        try:
            training.step(stream)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("file", ["gpu", "fsdp", "zero1", "zero2", "zero1-offload"])
def test_every_engine_trains_and_goes_on_alone_on_one_device(
    file: str, digits: Path, tmp_path: Path
) -> None:
    """One process under each launch file; its losses are those of the plain engine."""
    losses = {}
    for name in dict.fromkeys(("gpu", file)):
        run = tmp_path / name
        for total in (200, 400):  # the second time it resumes
            done = launch(
                SMOKE, f"data.path={digits}", f"run_dir={run}", "train.tick_images=40", R1,
                f"train.total_images={total}",
                options=["--config_file", ROOT / "launch" / f"{name}.yaml", "--num_processes", "1"],
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-2000:]
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [line["train/loss_d"] for line in lines if "train/loss_d" in line]
    assert len(losses[file]) == 10
    assert losses[file] == pytest.approx(losses["gpu"], abs=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_whole_run(recipe: Recipe, precision: str) -> None:
    config = recipe(f"precision={precision}", "compile=auto", R1)
    assert train(config, print, lambda *_: None) == 0
    generator, _ = snapshots.load(snapshots.find(config.run_dir)[-1], "cuda")
    z = torch.randn(10, config.model.z_dim, device="cuda")
    images = generator(z, torch.arange(10, device="cuda"))
    assert images.shape == (10, 1, 16, 16)
    assert images.abs().max() <= 1


def test_batches_arrive_whole_from_reused_buffers(recipe: Recipe) -> None:
    """With the device behind the host, a buffer taken again too early would show."""
    config = recipe()
    world = Engine(config, print).world
    settings: dict = {"seed": 0, "batch": 40}
    with ShardStream(config.data.path, world=World(), **settings) as stream:
        want = [next(stream) for _ in range(300)]
    with ShardStream(config.data.path, world=world, **settings) as stream:
        for expected in want:
            torch.cuda._sleep(200_000)
            batch = next(stream)
            assert batch.real.is_cuda
            shown = batch.real.clone(), batch.labels.clone()
            del batch
            assert torch.equal(shown[0].cpu(), expected.real)
            assert torch.equal(shown[1].cpu(), expected.labels)
        assert stream._transfer._made <= config.data.prefetch + 4  # type: ignore[attr-defined]


def test_copies_from_the_device_are_of_the_moment_of_the_call(tmp_path: Path) -> None:
    """The next step is queued behind the copies; odd layouts and host tensors come along."""
    weight = torch.arange(16.0 * 2**20, device="cuda").reshape(64, 64, 64, 64)
    odd = weight.contiguous(memory_format=torch.channels_last)
    step = torch.ones((), device="cuda")
    expected, saver = weight.cpu(), Saver(tmp_path, World(device=weight.device))
    shards = [
        TensorShard(name, tuple(tensor.shape), 0, tensor, replicated=True)
        for name, tensor in (("x", weight), ("y", odd), ("z", step), ("host", torch.ones(3)))
    ]
    for seen in (40, 80):  # the second time into the same memory
        saver.save(Progress(images_seen=seen), shards)
        weight += 1
        odd += 1
        step += 1
        saver.finish()
        reader = Reader(tmp_path / "checkpoints" / str(seen))
        assert torch.equal(reader.read("x"), expected)
        assert torch.equal(reader.read("y"), expected)
        assert reader.read("z").item() == seen // 40
        expected += 1
