"""The smoke config on a CUDA device: compiled, mixed precision, no host sync inside a step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import ROOT, SMOKE, TEN_CLASSES, launch

from bigan.checkpoint import Progress, Reader, Saver, TensorShard, snapshots
from bigan.data.streaming.stream import ShardStream
from bigan.distributed.world import World
from bigan.engine import Engine
from bigan.run.state import TrainState
from bigan.run.streams import open_streams
from bigan.run.trainer import train
from bigan.run_config import RunConfig

MakeConfig = Callable[..., RunConfig]
LOSS = "train/discriminator/loss"
R1 = "objective.penalties=[{name: r1, weight: 1.0}]"


def steps(config: RunConfig, num: int) -> tuple[TrainState, dict[str, float], list[str]]:
    """The state after some steps, the means of its scalars, and the printed lines."""
    messages: list[str] = []
    state = TrainState(config, Engine(config, messages.append), TEN_CLASSES)
    state.prepare()
    with open_streams(state) as streams:
        for _ in range(num):
            state.advance(streams)
    means, _ = state.statistics.collect()
    return state, means, messages


def step_without_sync(state: TrainState) -> None:
    """One training step in which waiting for the device is an error."""
    with open_streams(state) as streams:
        torch.cuda.set_sync_debug_mode("error")
        try:
            state.advance(streams)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("penalty", ["objective.penalties=[]", R1, R1.replace("r1", "wgan_gp")])
def test_inductor_agrees_with_eager(make_config: MakeConfig, penalty: str) -> None:
    torch.backends.cudnn.allow_tf32 = False  # tf32 differs between eager and compiled convolutions
    _, eager, _ = steps(make_config(penalty, "compile=eager"), 3)
    _, compiled, messages = steps(make_config(penalty, "compile=inductor"), 3)
    assert not any("failed" in line for line in messages), messages
    for name, value in eager.items():
        assert compiled[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("augment", ["none", "diffaugment", "ada"])
def test_a_step_never_waits_for_the_device(make_config: MakeConfig, augment: str) -> None:
    settings = ["train.batch=40", "train.micro_batch=20", f"augment={{name: {augment}}}"]
    state, _, _ = steps(make_config(R1, *settings), 2)  # compiled, allocated
    step_without_sync(state)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_step_in_half_precision_never_waits_for_the_device(
    make_config: MakeConfig, precision: str
) -> None:
    state, _, _ = steps(make_config(R1, f"precision={precision}"), 2)
    step_without_sync(state)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "rmsprop"])
def test_a_step_of_any_optimizer_never_waits_for_the_device(
    make_config: MakeConfig, optimizer: str
) -> None:
    """RMSprop has no fused update that skips non-finite steps: its gradients are masked."""
    settings = f"{{name: {optimizer}, lr: 1.0e-4, clip_grad_norm: 1.0}}"
    phases = ("generator", "discriminator")
    state, _, _ = steps(make_config(*(f"optimizer.{phase}={settings}" for phase in phases)), 2)
    step_without_sync(state)


@pytest.mark.full
@pytest.mark.parametrize("file", ["gpu", "fsdp", "zero1", "zero2", "zero1-offload"])
def test_every_engine_trains_and_resumes_on_one_device(
    file: str, digits: Path, tmp_path: Path
) -> None:
    """One process under each launch file; its losses are those of the single engine."""
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
        losses[name] = [
            line["train/discriminator/loss"] for line in lines if "train/discriminator/loss" in line
        ]
    assert len(losses[file]) == 10
    assert losses[file] == pytest.approx(losses["gpu"], abs=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_complete_run(make_config: MakeConfig, precision: str) -> None:
    config = make_config(f"precision={precision}", "compile=auto", R1)
    assert train(config, print, lambda *_: None) == 0
    generator = snapshots.load(snapshots.find(config.run_dir)[-1], "cuda").networks["generator"]
    z = torch.randn(10, config.model.z_dim, device="cuda")
    images = generator(z, torch.arange(10, device="cuda"))
    assert images.shape == (10, 1, 16, 16)
    assert images.abs().max() <= 1


def test_batches_in_reused_buffers_are_complete(make_config: MakeConfig) -> None:
    """With the device behind the host, a buffer reused too early would show."""
    config = make_config()
    world, path = Engine(config, print).world, config.streams["images"].path
    settings: dict = {"seed": 0, "batch": 40}
    with ShardStream(path, world=World(), **settings) as stream:
        want = [next(stream) for _ in range(300)]
    with ShardStream(path, world=world, **settings) as stream:
        for expected in want:
            torch.cuda._sleep(200_000)
            batch = next(stream)
            assert batch.pixels.is_cuda
            copied = batch.pixels.clone(), batch.labels.clone()
            del batch
            assert torch.equal(copied[0].cpu(), expected.pixels)
            assert torch.equal(copied[1].cpu(), expected.labels)
        assert stream._transfer._made <= config.streams["images"].prefetch + 4  # type: ignore[attr-defined]


def test_copies_from_the_device_are_taken_at_the_call(tmp_path: Path) -> None:
    """The next step is queued behind the copies; other layouts and host tensors are saved too."""
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
