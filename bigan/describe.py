"""What a recipe amounts to, without any data or weights: everything is built on the meta device."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bigan import augment, models, phases
from bigan.config import leaves
from bigan.recipe import RunConfig, accumulation_steps

Description = dict[str, Any]


def num_parameters(network: nn.Module) -> int:
    """Trained numbers of a network (buffers are not counted)."""
    return sum(parameter.numel() for parameter in network.parameters())


def describe(config: RunConfig, world_size: int = 1) -> Description:
    """Networks, phases, schedule in images, estimated memory per process and resolved values.

    Raises `ConfigError` if the recipe cannot run on `world_size` processes.
    """
    accumulation = accumulation_steps(config.train, world_size)
    generator, discriminator = models.build(config.model, "meta")
    train = config.train
    per_step = train.batch * train.num_d_steps
    steps = -(-train.total_images // per_step)
    micro = train.batch // (world_size * accumulation)
    return {
        "parameters": {"G": num_parameters(generator), "D": num_parameters(discriminator)},
        "phases": [
            {"name": name, "trains": {"d": "D", "g": "G"}[name], "images": train.batch}
            for name in phases.order(config)
        ],
        "schedule": {
            "total_images": steps * per_step,
            "steps": steps,
            "images_per_step": per_step,
            "micro_batch": micro,
            "accumulation_steps": accumulation,
            "world_size": world_size,
            "ticks": steps * per_step // train.tick_images,
            "checkpoints": -(-steps * per_step // train.checkpoint_images),  # one at the end
            "snapshots": -(-steps * per_step // train.snapshot_images),
        },
        "memory_bytes": estimate_memory(config, generator, discriminator, micro),
        "config": config.model_dump(mode="json"),
    }


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
        _kept_for_backward(phase, other, config, micro_batch)
        for phase, other in (
            (phases.DiscriminatorPhase(discriminator, config, (1,)), generator),
            (phases.GeneratorPhase(generator, config, (1,)), discriminator),
        )
    )
    parts = {
        "weights": weights,
        "gradients": trained,
        "optimizer": 2 * trained,
        "activations": activations,
    }
    return parts | {"total": sum(parts.values())}


def _kept_for_backward(
    phase: phases.Phase, other: nn.Module, config: RunConfig, micro_batch: int
) -> int:
    model = config.model
    storages: dict[int, int] = {}
    keep: list[torch.Tensor] = []  # so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
        keep.append(tensor)
        return tensor

    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        z = torch.empty(micro_batch, model.z_dim)
        labels = torch.zeros(micro_batch, dtype=torch.int64)
        columns, strength = augment.num_columns(config.augment), torch.empty(())
        draws = torch.empty(micro_batch, columns) if columns else None
        batch: tuple
        if isinstance(phase, phases.DiscriminatorPhase):
            shape = (micro_batch, model.resolution, model.resolution, model.image_channels)
            real = torch.empty(shape, dtype=torch.uint8)
            batch = phases.DiscriminatorBatch(
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
            batch = phases.GeneratorBatch(z, labels, draws, strength)
        other.requires_grad_(False)
        phase.requires_grad_(True)
        phase(other, batch, phase.variant(0))
    weights = {p.untyped_storage()._cdata for n in (phase, other) for p in n.parameters()}
    return sum(size for key, size in storages.items() if key not in weights)


def as_text(description: Description) -> str:
    """The description for people."""
    parameters, schedule = description["parameters"], description["schedule"]
    memory, config = description["memory_bytes"], description["config"]
    model = config["model"]
    gib = {name: f"{size / 2**30:.2f}" for name, size in memory.items()}
    order = " -> ".join(phase["name"] for phase in description["phases"])
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
        "values",
    ]
    return "\n".join([*lines, *(f"  {key} = {value}" for key, value in leaves(config))])
