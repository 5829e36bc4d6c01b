"""What a recipe amounts to, without any data or weights: everything is built on the meta device."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bigan import augment, models
from bigan.config import leaves
from bigan.objectives import gan, growth
from bigan.objectives.growth import Stage
from bigan.run_config import RunConfig, accumulation_steps, check_groups

Description = dict[str, Any]


def num_parameters(network: nn.Module) -> int:
    """Trained numbers of a network (buffers are not counted)."""
    return sum(parameter.numel() for parameter in network.parameters())


def describe(config: RunConfig, world_size: int = 1) -> Description:
    """Networks, phases, schedule in images, estimated memory per process and resolved values.

    Of a model that grows the last stage is described: its networks are the largest. Raises
    `ConfigError` if the recipe cannot run on `world_size` processes.
    """
    stages = growth.stages(config)
    for stage in stages:
        check_groups(stage.config, world_size)
    recipe, config = config, stages[-1].config
    accumulation = accumulation_steps(config.train, world_size)
    generator, discriminator = models.build(config.model, "meta")
    train = config.train
    per_step = train.batch * train.num_d_steps
    steps, end = num_steps(stages)
    micro = train.batch // (world_size * accumulation)
    return {
        "parameters": {"G": num_parameters(generator), "D": num_parameters(discriminator)},
        "phases": [
            {"name": name, "trains": {"d": "D", "g": "G"}[name], "images": train.batch}
            for name in gan.order(config)
        ],
        "schedule": {
            "total_images": end,
            "steps": steps,
            "images_per_step": per_step,
            "micro_batch": micro,
            "accumulation_steps": accumulation,
            "world_size": world_size,
            "ticks": end // train.tick_images,
            "checkpoints": -(-end // train.checkpoint_images),  # one at the end
            "snapshots": -(-end // train.snapshot_images),
        },
        "stages": [
            {
                "resolution": stage.resolution,
                "fading": stage.fading,
                "images": [stage.start, int(min(stage.end, end))],
                "batch": stage.config.train.batch,
                "lr": [stage.config.optimizer.g.lr, stage.config.optimizer.d.lr],
            }
            for stage in stages
            if len(stages) > 1 and stage.start < end
        ],
        "memory_bytes": estimate_memory(config, generator, discriminator, micro),
        "config": recipe.model_dump(mode="json"),
    }


def num_steps(stages: tuple[Stage, ...]) -> tuple[int, int]:
    """(training steps, images_seen at the end) of a run through these stages."""
    steps = 0
    end = stages[0].config.train.total_images
    for stage in stages:
        if stage.start >= end:
            break
        per_step = stage.config.train.batch * stage.config.train.num_d_steps
        here = math.ceil((min(stage.end, end) - stage.start) / per_step)
        steps, reached = steps + here, stage.start + here * per_step
    return steps, reached


def estimate_memory(
    config: RunConfig, generator: nn.Module, discriminator: nn.Module, micro_batch: int
) -> dict[str, int]:
    """Bytes per process: weights, gradients, Adam moments and what backward keeps.

    The last is counted for the eager phases in float32 by running them on the meta device: with
    bf16 about half of it is kept, and compiled fusion keeps less again. The allocator's slack and
    temporary buffers are not in it.
    """
    weights = 4 * (2 * num_parameters(generator) + num_parameters(discriminator))  # with average
    trained = 4 * (num_parameters(generator) + num_parameters(discriminator))
    activations = max(
        _kept_for_backward(phase, other, config, micro_batch, terms)
        for phase, other in (
            (gan.DiscriminatorPhase(discriminator, config, (1,)), generator),
            (gan.GeneratorPhase(generator, config, (1,)), discriminator),
        )
        for terms in phase.variants()
    )
    parts = {
        "weights": weights,
        "gradients": trained,
        "optimizer": 2 * trained,
        "activations": activations,
    }
    return parts | {"total": sum(parts.values())}


def _kept_for_backward(
    phase: gan.Phase,
    other: nn.Module,
    config: RunConfig,
    micro_batch: int,
    terms: gan.Terms,
) -> int:
    """Bytes made by the forward that are alive after it; then the backward runs, too."""
    model = config.model
    micro_batch = micro_batch * phase.num_images(terms) // config.train.batch
    made = Storages()
    with torch.device("meta"):
        z = torch.empty(micro_batch, model.z_dim)
        labels = torch.zeros(micro_batch, dtype=torch.int64)
        columns, strength = augment.num_columns(config.augment), torch.empty(())
        draws = torch.empty(micro_batch, columns) if columns else None
        batch: tuple
        shape = (micro_batch, model.resolution, model.resolution, model.image_channels)
        real = torch.empty(shape, dtype=torch.uint8)
        if isinstance(phase, gan.DiscriminatorPhase):
            batch = gan.DiscriminatorBatch(
                real,
                labels,
                z,
                labels,
                mix=torch.empty(micro_batch),
                augment_real=draws,
                augment_fake=draws,
                strength=strength,
            )
        else:
            shown = (real, labels, None, draws) if phase.shows_real else ()
            batch = gan.GeneratorBatch(z, labels, draws, strength, *shown)
            batch = batch._replace(path_mean=torch.empty(()))
        other.requires_grad_(False)
        phase.requires_grad_(True)
        with made:
            loss, _ = phase(other, batch, terms)
        kept = made.alive_bytes()
        loss.backward()
        phase.zero_grad()
    return kept


class Storages(TorchDispatchMode):
    """Notes the memory of every tensor made inside.

    Hooks on what autograd saves would tell the same, but torch.func.grad refuses to run under them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self,
        operation: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if _is_tensor(t)}
        for tensor in tree_leaves(result):
            if _is_tensor(tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given:  # neither a view nor written in place
                    self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def alive_bytes(self) -> int:
        """Of those that something still holds."""
        return sum(size for reference, size in self._made.values() if not reference.expired())


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def as_text(description: Description) -> str:
    """The description for people."""
    parameters, schedule = description["parameters"], description["schedule"]
    memory, config = description["memory_bytes"], description["config"]
    model = config["model"]
    gib = {name: f"{size / 2**30:.2f}" for name, size in memory.items()}
    order = " -> ".join(phase["name"] for phase in description["phases"])
    stages = description["stages"]
    lines = [
        f"model      {model['name']} {model['resolution']} px, {model['num_classes']} classes",
        f"networks   G {parameters['G']:,} parameters, D {parameters['D']:,} parameters",
        f"step       {order}: {schedule['images_per_step']:,} images, "
        f"{schedule['accumulation_steps']} x {schedule['micro_batch']} per process on "
        f"{schedule['world_size']} process(es)",
        f"schedule   {schedule['total_images']:,} images in {schedule['steps']:,} steps, "
        f"{schedule['snapshots']} snapshots, {schedule['checkpoints']} checkpoints",
        f"memory     {gib['total']} GiB per process (weights {gib['weights']}, gradients "
        f"{gib['gradients']}, optimizer {gib['optimizer']}, activations {gib['activations']})",
    ]
    for stage in stages:
        start, end = stage["images"]
        how = "fading in" if stage["fading"] else "stable"
        lines.append(
            f"stage      {stage['resolution']:>4} px {how:9}  {start:>12,} to {end:>12,}  "
            f"batch {stage['batch']}, lr G {stage['lr'][0]:g}, D {stage['lr'][1]:g}"
        )
    return "\n".join([*lines, "values", *(f"  {key} = {value}" for key, value in leaves(config))])
