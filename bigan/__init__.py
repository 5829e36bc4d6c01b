"""bigan: distributed training of generative adversarial models.

    config = bigan.load_config("configs/digits.yaml", ["train.seed=1"])
    bigan.train(config)
    bigan.evaluate(config.run_dir)
    images = bigan.sample(bigan.load_snapshot(config.run_dir), 16)

Every function raises `bigan.UserError` for bad input, in one line that says what to do. Nothing
heavy is imported before a function needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bigan.errors import RunError, UserError

if TYPE_CHECKING:
    import torch

    from bigan.checkpoint.snapshots import Snapshot
    from bigan.run_config import RunConfig

__all__ = [
    "RunError",
    "UserError",
    "__version__",
    "evaluate",
    "load_config",
    "load_snapshot",
    "sample",
    "train",
]


def __getattr__(name: str) -> str:
    """`__version__`, read from the installed package when it is asked for."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib.metadata

    try:
        return importlib.metadata.version("bigan")
    except importlib.metadata.PackageNotFoundError:  # a source tree that is not installed
        return "0+unknown"


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and validate a YAML config.

    `overrides` are "a.b=value" as on the command line. Raises `UserError` for an unreadable file,
    an unknown key or a value that cannot be used.
    """
    from bigan.run_config import load_config

    return load_config(path, overrides)


def train(
    config: RunConfig,
    *,
    echo: Callable[[str], None] = print,
    on_tick: Callable[[int, Mapping[str, float]], None] | None = None,
    allow_change: Sequence[str] = (),
) -> int:
    """Train the run of `config.run_dir`, or resume it; every process of a launch calls this.

    `echo` receives remarks, one line each, and `on_tick` (images_seen, metrics) at every tick; both
    on rank 0 only. `allow_change` are key paths ("optimizer.discriminator.lr") of settings that a
    run which has begun continues with, although they differ from those it had. Returns 0, or 128 +
    the number of the signal that stopped the run. Raises `UserError` before anything is written if
    the input is unusable, `RunError` if the run has to stop (a non-finite loss, a lost process).
    """
    from bigan.run.trainer import train

    show = on_tick or (lambda images_seen, metrics: None)
    return train(config, echo, show, allow_change=allow_change)


def evaluate(
    run_dir: Path | str,
    *,
    overrides: Sequence[str] = (),
    device: torch.device | str = "cpu",
    echo: Callable[[str], None] = print,
) -> dict[int, dict[str, float]]:
    """Measure every snapshot of a run that has not been measured yet, on this process.

    `overrides` change settings for this evaluation, for example "evaluation.num_samples=10000".
    Returns images_seen -> metrics of all snapshots under these settings. Raises `UserError` for a
    folder without snapshots or data that do not fit the model.
    """
    from bigan.distributed.world import World
    from bigan.evaluation.watcher import evaluate

    return evaluate(
        Path(run_dir), World(), overrides=overrides, watch=False, device=device, echo=echo
    )


def load_snapshot(folder: Path | str, device: torch.device | str = "cpu") -> Snapshot:
    """Read a snapshot: `folder` is one, or a run folder, of which the newest is read.

    The networks are in evaluation mode on `device`. Raises `UserError` if there is no complete
    snapshot.
    """
    from bigan.checkpoint import snapshots

    path = Path(folder)
    found = snapshots.find(path)
    if not found and (path / "config.yaml").exists() and (path / "checkpoints").exists():
        raise UserError(f"{path}: has no complete snapshot yet (train.snapshot_images)")
    return snapshots.load(found[-1] if found else path, device)


def sample(
    snapshot: Snapshot,
    num: int,
    *,
    sampler: str | None = None,
    seed: int = 0,
    labels: Sequence[int] | None = None,
    truncation: float | None = None,
    images: torch.Tensor | None = None,
    batch: int = 64,
) -> torch.Tensor:
    """uint8 images [num, C, H, W] from a snapshot; see `bigan.checkpoint.sampling.sample`."""
    from bigan.checkpoint import sampling

    return sampling.sample(
        snapshot,
        num,
        sampler=sampler,
        seed=seed,
        labels=labels,
        truncation=truncation,
        images=images,
        batch=batch,
    )
