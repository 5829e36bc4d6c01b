"""The trainer's parts without its loop, and runs that look as if it had made them."""

from __future__ import annotations

from pathlib import Path

from commands import TEN_CLASSES

from bigan import config as configs
from bigan.data.streaming.stream import ShardStream
from bigan.engine import Engine
from bigan.run.state import Training
from bigan.run_config import RunConfig


def make(config: RunConfig) -> tuple[Training, ShardStream]:
    """A prepared training of `config` on the digits' classes, and its stream from the start."""
    training = Training(config, Engine(config, print), TEN_CLASSES)
    training.prepare()
    stream = ShardStream(
        config.data.path,
        seed=config.train.seed,
        world=training.world,
        batch=config.train.batch,
        accumulation=training.accumulation,
    )
    return training, stream


MODELS: dict[str, dict[str, object]] = {
    "biggan": {
        "name": "biggan", "resolution": 16, "num_classes": 10, "z_dim": 12,
        "image_channels": 1, "channels": 4, "shared_dim": 4,
    },
    "stylegan2": {
        "name": "stylegan2", "resolution": 16, "num_classes": 10, "z_dim": 12, "w_dim": 12,
        "image_channels": 1, "channel_base": 128, "max_channels": 8, "mapping_layers": 2,
    },
}  # fmt: skip


def evaluated(
    run_dir: Path,
    data: Path,
    model: str = "biggan",
    train: dict[str, object] | None = None,
    **evaluation: object,
) -> RunConfig:
    """A recipe of tiny networks, measured by the digits' extractor on few samples."""
    content = {
        "run_dir": str(run_dir),
        "data": {"path": str(data)},
        "model": MODELS[model],
        "optimizer": {"g": {"lr": 1e-4}, "d": {"lr": 1e-4}},
        "ema": {"halflife_images": 100},
        "train": {"total_images": 100, "batch": 10} | (train or {}),
        "evaluation": {
            "extractor": "digits8-cnn-v1", "batch": 16, "num_samples": 40, **evaluation
        },
        "tracking": {"mlflow": False},
    }  # fmt: skip
    return configs.validate(RunConfig, content, "test")


def start_run(config: RunConfig) -> None:
    """Make its run folder, as training does first."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    (config.run_dir / "config.yaml").write_text(configs.dump(config))
