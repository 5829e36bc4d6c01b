"""Lines printed at the start of a run: consequences of its config that are easy to miss."""

from __future__ import annotations

import os
from pathlib import Path

from bigan.data.format.manifest import MANIFEST
from bigan.data.packing.index_in_place import understood
from bigan.data.streaming import resampled
from bigan.data.streaming.dataset import open_manifest
from bigan.data.streaming.staging import is_staged
from bigan.layers.batchnorm import normalization_layers
from bigan.layers.spectral import spectral_layers
from bigan.run import traffic
from bigan.run.state import TrainState
from bigan.run.streams import staged_splits


def remarks(state: TrainState) -> list[str]:
    """One line each."""
    return [
        *([resampled.NOTE] if _is_resampled(state) else []),
        *_existing_shards(state),
        *_staging(state),
        *_traffic(state),
        *_unused_streams(state),
        *_batchnorm(state),
        *_power_iterations(state),
        *state.objective.remarks(),
        *_optimizers(state),
        *_lengths(state),
    ]


def _is_resampled(state: TrainState) -> bool:
    return any(data.mode == "resampled" for data in state.config.streams.values())


def _existing_shards(state: TrainState) -> list[str]:
    """What was understood of shards that bigan did not write."""
    lines = []
    for data in state.config.streams.values():
        folder = Path(data.path)
        if data.mode != "resampled" and (folder / MANIFEST).is_file():
            manifest = open_manifest(folder, data)
            lines += [understood(manifest)] if manifest.is_indexed else []
    return lines


def _staging(state: TrainState) -> list[str]:
    """Folders that are read although `data.cache` is set: the node of rank 0 has no copy."""
    if not state.world.is_rank_0:
        return []
    return [
        f"{manifest.folder} ({data.split}): data.cache is set, but this node has no copy of the "
        "shards; they are read from their folder (`bigan stage CONFIG` copies them)"
        for manifest, data in staged_splits(state.run_config)
        if not is_staged(manifest, data.split, data)
    ]


def _traffic(state: TrainState) -> list[str]:
    """The lanes of data at a URL, and whether the ranks read more than the data set."""
    if not state.world.is_rank_0:
        return []
    ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    return traffic.remarks(state.run_config, state.world.size, ranks_per_node)


def _unused_streams(state: TrainState) -> list[str]:
    """Data streams that the objective does not read."""
    objective = state.config.objective
    unused = [name for name in state.config.streams if name not in objective.streams]
    return [f"data.{name} is not read by objective.name={objective.name}" for name in unused]


def _batchnorm(state: TrainState) -> list[str]:
    """Number of images in the statistics of BatchNorm, and whether a resume changes it."""
    if not any(normalization_layers(network) for network in state.networks.values()):
        if state.config.train.batchnorm == "local":
            return ["train.batchnorm=local has no effect: no network has BatchNorm"]
        return []
    train, lines = state.config.train, []
    joined, former = state.progress.forward_images, state.former_forward_images
    is_local = train.batchnorm == "local"
    if joined != train.batch:
        how = "train.batchnorm=local: micro_batch" if is_local else "micro_batch x processes"
        lines.append(f"BatchNorm sees {joined} images at a time ({how}), not train.batch")
    if former not in (0, joined):
        share, rest = divmod(former, 1 if is_local else state.world.size)
        keep = f"train.micro_batch={share} keeps it" if not rest else "use fewer processes"
        lines.append(
            f"BatchNorm saw {former} images at a time before, now {joined}: this changes the "
            f"training ({keep})"
        )
    return lines


def _power_iterations(state: TrainState) -> list[str]:
    """Power iterations without a layer that uses them."""
    num = state.config.train.power_iterations
    modules = [*state.networks.values(), *state.objective.phases.values()]
    if num == 1 or any(any(spectral_layers(module)) for module in modules):
        return []
    return [f"train.power_iterations={num} has no effect: no network has spectral normalization"]


def _optimizers(state: TrainState) -> list[str]:
    """Hyperparameters that are corrected for separate regularization steps."""
    lines = []
    for name, every in state.objective.separate_steps.items():
        settings = state.optimizers[name]
        betas = "".join(
            f", {key} {getattr(settings, key):.6g}"
            for key in ("beta1", "beta2")
            if key in type(settings).model_fields
        )
        lines.append(
            f"optimizer.{name}: corrected for a separate regularization step after every {every}: "
            f"lr {settings.lr:.6g}{betas}"
        )
    return lines


def _lengths(state: TrainState) -> list[str]:
    """Whether the run ends elsewhere than configured, and the number of rollbacks so far."""
    train, step, last = state.config.train, state.config.images_per_step, state.stages[-1]
    progress, lines = state.progress, []
    if last.start >= train.total_images:
        lines.append(
            f"train.total_images = {train.total_images} ends the run before {last} begins at "
            f"{last.start}"
        )
    if train.total_images % step and len(state.stages) == 1:
        end = -(-train.total_images // step) * step
        lines.append(f"a training step takes {step} images: the run ends at images_seen = {end}")
    if progress.rollbacks:
        lines.append(
            f"after {progress.rollbacks} rollback(s) all learning rates are multiplied by "
            f"{progress.lr_factor:g}"
        )
    return lines
