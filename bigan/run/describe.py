"""The networks, schedule and memory of a config, built on the meta device without data."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bigan.config import leaves
from bigan.image_size import plain, shown
from bigan.objectives.base import Objective, Step, variants
from bigan.run import traffic
from bigan.run.stages import Stage
from bigan.run.stages import stages as all_stages
from bigan.run_config import RunConfig, accumulation_steps, check_groups

Description = dict[str, Any]


def num_parameters(network: nn.Module) -> int:
    """Number of parameters of a network (buffers are not counted)."""
    return sum(parameter.numel() for parameter in network.parameters())


def describe(config: RunConfig, world_size: int = 1, ranks_per_node: int = 8) -> Description:
    """Networks, phases, schedule in images, memory per process, data traffic and resolved values.

    For a growing model the last stage is described: its networks are the largest. Without access to
    the data, its section contains the reason. Raises `ConfigError` if the config cannot run on
    `world_size` processes.
    """
    stages = all_stages(config)
    for stage in stages:
        check_groups(stage.config, world_size)
    whole_run, config = config, stages[-1].config
    accumulation = accumulation_steps(config.train, world_size)
    # Any classes do: nothing that is described depends on their counts.
    objective = config.objective.build(stages[-1].setup((1,) * config.model.num_classes))
    train = config.train
    steps, end = num_steps(stages)
    micro = train.batch // (world_size * accumulation)
    return {
        "parameters": {n: num_parameters(module) for n, module in objective.networks.items()},
        "phases": [
            {
                "name": step.phase,
                "terms": list(step.terms),
                "trains": list(objective.phases[step.phase].trains),
                "images": step.num_images,
            }
            for step in objective.steps(0)
        ],
        "schedule": {
            "total_images": end,
            "steps": steps,
            "images_per_step": config.images_per_step,
            "micro_batch": micro,
            "accumulation_steps": accumulation,
            "world_size": world_size,
            "ticks": end // train.tick_images,
            "checkpoints": -(-end // train.checkpoint_images),  # one at the end
            "snapshots": -(-end // train.snapshot_images),
        },
        "stages": [
            {
                "resolution": plain(stage.resolution),
                "fading": stage.fading,
                "images": [stage.start, int(min(stage.end, end))],
                "batch": stage.config.train.batch,
                "lr": {name: entry.lr for name, entry in stage.config.optimizer.items()},
            }
            for stage in stages
            if len(stages) > 1 and stage.start < end
        ],
        "memory_bytes": estimate_memory(config, objective, micro),
        "data": traffic.describe_traffic(whole_run, world_size, ranks_per_node),
        "config": whole_run.model_dump(mode="json"),
    }


def num_steps(stages: tuple[Stage, ...]) -> tuple[int, int]:
    """(training steps, images_seen at the end) of a run through these stages."""
    steps = 0
    end = stages[0].config.train.total_images
    for stage in stages:
        if stage.start >= end:
            break
        per_step = stage.config.images_per_step
        here = math.ceil((min(stage.end, end) - stage.start) / per_step)
        steps, reached = steps + here, stage.start + here * per_step
    return steps, reached


def estimate_memory(config: RunConfig, objective: Objective, micro_batch: int) -> dict[str, int]:
    """Bytes per process: weights, gradients, optimizer state and saved activations.

    Activations are counted by running the eager phases in float32 on the meta device: with bf16
    about half as much is saved, and compiled phases save less. Allocator overhead and temporary
    buffers are not included. The optimizer is assumed to be Adam.
    """
    trained = 4 * sum(num_parameters(network) for network in objective.networks.values())
    averaged = 4 * sum(num_parameters(objective.networks[name]) for name in objective.averaged)
    frozen = 4 * sum(num_parameters(network) for network in objective.frozen.values())
    activations = max(
        _kept_for_backward(objective, step, config, micro_batch)
        for step in variants(objective, config.images_per_step)
    )
    parts = {
        "weights": trained + averaged + frozen,
        "gradients": trained,
        "optimizer": 2 * trained,
        "activations": activations,
    }
    return parts | {"total": sum(parts.values())}


def _kept_for_backward(
    objective: Objective, step: Step, config: RunConfig, micro_batch: int
) -> int:
    """Bytes that the forward allocated and that are alive after it; also runs the backward."""
    phase, model = objective.phases[step.phase], config.model
    num = micro_batch * step.num_images // config.train.batch
    inputs = phase.draws(0, num, step.terms) | phase.values(0)
    shape = (micro_batch, model.height, model.width, model.image_channels)
    for name in phase.streams:
        inputs[f"{name}.pixels"] = torch.empty(shape, dtype=torch.uint8, device="meta")
        inputs[f"{name}.labels"] = torch.empty(micro_batch, dtype=torch.int64, device="meta")
    networks = {name: (objective.networks | objective.frozen)[name] for name in phase.reads}
    made = Storages()
    with torch.device("meta"):
        inputs = {key: tensor.to("meta") for key, tensor in inputs.items()}
        for network in networks.values():
            network.requires_grad_(False)
        phase.requires_grad_(True)
        with made:
            result = phase(networks, inputs, step.terms)
        kept = made.alive_bytes()
        result.loss.backward()
        phase.zero_grad()
    return kept


class Storages(TorchDispatchMode):
    """Context that records the storage of every new tensor.

    `saved_tensors_hooks` would give the same, but torch.func.grad does not run under them.
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
        """Bytes of the recorded storages that are still referenced."""
        return sum(size for reference, size in self._made.values() if not reference.expired())


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def _size(content: dict[str, Any]) -> str:
    resolution = content["resolution"]
    return shown(tuple(resolution) if isinstance(resolution, list) else resolution)


def as_text(description: Description) -> str:
    """The description as readable text."""
    schedule, memory = description["schedule"], description["memory_bytes"]
    config, model = description["config"], description["config"]["model"]
    gib = {name: f"{size / 2**30:.2f}" for name, size in memory.items()}
    networks = ", ".join(f"{n} {num:,}" for n, num in description["parameters"].items())
    order = " -> ".join(phase["name"] for phase in description["phases"])
    lines = [
        f"model      {model['name']} {_size(model)} px, {model['num_classes']} classes",
        f"objective  {config['objective']['name']}",
        f"parameters {networks}",
        f"step       {order}: {schedule['images_per_step']:,} images, "
        f"{schedule['accumulation_steps']} x {schedule['micro_batch']} per process on "
        f"{schedule['world_size']} process(es)",
        f"schedule   {schedule['total_images']:,} images in {schedule['steps']:,} steps, "
        f"{schedule['snapshots']} snapshots, {schedule['checkpoints']} checkpoints",
        f"memory     {gib['total']} GiB per process (weights {gib['weights']}, gradients "
        f"{gib['gradients']}, optimizer {gib['optimizer']}, activations {gib['activations']})",
        *traffic.as_lines(description["data"]),
    ]
    for stage in description["stages"]:
        start, end = stage["images"]
        how = "fading in" if stage["fading"] else "stable"
        rates = ", ".join(f"{name} {lr:g}" for name, lr in stage["lr"].items())
        lines.append(
            f"stage      {_size(stage):>4} px {how:9}  {start:>12,} to {end:>12,}  "
            f"batch {stage['batch']}, lr {rates}"
        )
    return "\n".join([*lines, "values", *(f"  {key} = {value}" for key, value in leaves(config))])
