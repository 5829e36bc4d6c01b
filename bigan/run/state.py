"""The state of a run on its devices, and the training step that advances it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from bigan import checkpoint, rng
from bigan.checkpoint import Progress, Reader, TensorShard
from bigan.data.streaming.fetchers import BadSample
from bigan.data.streaming.stream import Batch
from bigan.distributed.world import on_all_ranks
from bigan.engine import Engine, Prepared
from bigan.engine.loss_scale import LossScale
from bigan.layers.batchnorm import set_process_group
from bigan.layers.spectral import power_iteration
from bigan.objectives import ema, growth
from bigan.objectives.base import (
    Objective,
    Step,
    Tensors,
    check_samplers,
    init_stream,
    variants,
)
from bigan.objectives.samplers import Sampler
from bigan.run.inputs import Rows, mirror, rows_at, rows_in_order, taken
from bigan.run.stages import Stage, stages
from bigan.run.statistics import Statistics
from bigan.run.trainable import check_trainable, is_trainable
from bigan.run_config import RunConfig, accumulation_steps, batchnorm_images, check_groups

Streams = Mapping[str, Iterator[Batch]]
OnStep = Callable[[Step], None]


class TrainState:
    """Networks, their EMAs, optimizers, counters and prepared phases of one run.

    `run_config` is that of the run, `config` that of the current stage (run/stages.py): the
    same unless the model grows. `classes` maps each class name to its number of training images.
    """

    def __init__(self, run_config: RunConfig, engine: Engine, classes: dict[str, int]) -> None:
        self.run_config = run_config
        self.stages = stages(run_config)
        self.engine = engine
        self.world = engine.world
        self.class_names = tuple(classes)
        self.class_counts = tuple(classes.values())
        for stage in self.stages:  # check all at the start, not when a stage begins
            check_groups(stage.config, self.world.size)
        check_trainable(run_config.trainable, self.stages, self.class_counts)
        self.progress = Progress()
        self.former_forward_images = 0  # of the previous attempt; 0: there was none
        self.prepared: dict[str, Prepared] = {}
        self.state: dict[str, nn.Module] = {}  # buffers of the run, besides the networks
        self._resumed: Reader | None = None
        self.build(self.stages[0])
        self.scales: dict[str, LossScale] = {}
        if run_config.precision == "fp16":
            self.scales = {name: LossScale(self.world.device) for name in self.objective.phases}
            self.state |= {f"loss_scale_{name}": scale for name, scale in self.scales.items()}
        self.bad: list[BadSample] = []  # replaced on this rank since the last tick
        self.data_seconds = 0.0  # spent waiting for images since the last tick
        self.statistics = Statistics(self.world)

    def build(self, stage: Stage) -> None:
        """New networks of a stage, their EMAs, and the phases that train them."""
        self._batches: dict[str, list[Tensors]] = {}  # current batch of each stream
        self._rows: dict[str, list[Rows]] = {}  # of draws that belong to these images
        self.stage = stage
        self.config = config = stage.config
        self.objective: Objective = config.objective.build(stage.setup(self.class_counts))
        check_samplers(self.objective, config.evaluation.sampler)
        for network in self.objective.frozen.values():
            network.to(self.world.device).eval().requires_grad_(False)
        for name, module in self.objective.state.items():
            module.to(self.world.device)
            if name in self.state:
                module.load_state_dict(self.state[name].state_dict())
        self.state |= self.objective.state
        self.networks = self.objective.networks
        for name, network in self.networks.items():
            network.to_empty(device="cpu")
            suffix = "" if stage.index == 0 else f"/{stage.size}"
            generator = rng.torch_generator(config.train.seed, init_stream(name) + suffix)
            network.init_weights(generator)  # type: ignore[operator]
            network.to(self.world.device)
            network.to(memory_format=self.engine.memory_format)
        for phase in self.objective.phases.values():
            with torch.no_grad():
                phase.constrain(phase.parameters())
        self.averages = {
            name: ema.ema_copy(self.networks[name]) for name in self.objective.averaged
        }
        for network in [*self.networks.values(), *self.averages.values()]:
            set_process_group(network, self.engine.batchnorm_group)
        self.optimizers = {
            name: config.optimizer[name].corrected(self.objective.separate_steps.get(name))
            for name in self.objective.phases
        }
        self.accumulation = accumulation_steps(config.train, self.world.size)
        self.progress.forward_images = batchnorm_images(config.train, self.world.size)
        self.progress.stage = stage.index

    @property
    def saved_networks(self) -> dict[str, nn.Module]:
        """Trained networks and EMAs by the names they have in a checkpoint."""
        averages = {f"{name}_ema": network for name, network in self.averages.items()}
        return self.networks | averages

    @property
    def snapshot_networks(self) -> dict[str, nn.Module]:
        """The networks that the samplers use by their file name: EMAs as "generator_ema"."""
        samplers = self.objective.samplers.values()
        names = sorted({name for sampler in samplers for name in sampler.networks})
        found = self.saved_networks | self.objective.frozen
        return {n: found[n] for n in (f"{n}_ema" if n in self.averages else n for n in names)}

    def sampling_networks(self, sampler: Sampler) -> dict[str, nn.Module]:
        """The networks of a sampler: their EMA where there is one."""
        found = self.networks | self.objective.frozen | self.averages
        return {name: found[name] for name in sampler.networks}

    def enter(self, stage: Stage) -> None:
        """Continue with the networks of the next stage; call `prepare` afterwards.

        They inherit all weights of the previous stage. So does the EMA, whose new layers are copies
        of the network's; the optimizers begin with empty state.
        """
        self.close()
        self._resumed = None
        former = self.saved_networks
        self.build(stage)
        for name, network in self.saved_networks.items():
            growth.inherit(network, former[name])
        self.engine.forget_compiled()

    def resume(self, folder: Path) -> None:
        """Load a checkpoint. A collective.

        Call it before `prepare`, which loads the state of the optimizers. Raises `CheckpointError`
        on all ranks if the checkpoint is damaged or does not belong to this run.
        """

        def look() -> tuple[Progress, Reader]:
            progress, reader = checkpoint.read_progress(folder), Reader(folder)
            if not 0 <= progress.stage < len(self.stages):
                raise checkpoint.CheckpointError(
                    f"{folder}: is of stage {progress.stage}, this config has {len(self.stages)}"
                )
            if progress.stage != self.stage.index:
                self.build(self.stages[progress.stage])
            checkpoint.check_fit(reader, self.saved_networks, self.state)
            expected = self.progress.data_fingerprint
            if expected and progress.data_fingerprint != expected:
                raise checkpoint.CheckpointError(
                    f"{folder}: was trained on other images than the data holds now; restore "
                    "those, or use another run_dir"
                )
            return progress, reader

        progress, reader = on_all_ranks(self.world, look)
        reader.verify_across_ranks(self.world)  # now: so that damage is an error on all ranks
        on_all_ranks(self.world, lambda: checkpoint.load(reader, self.saved_networks, self.state))
        self.former_forward_images = progress.forward_images
        self.progress = replace(
            progress, attempt=progress.attempt + 1, forward_images=self.progress.forward_images
        )
        self._resumed = reader

    def prepare(self) -> None:
        """Wrap the phases with the engine; networks must be final."""
        self.engine.compile_seconds = 0.0
        patterns = self.config.trainable
        for name, phase in self.objective.phases.items():
            self.prepared[name] = self.engine.prepare(
                name,
                phase,
                self.optimizers[name],
                accumulation=self.accumulation,
                scale=self.scales.get(name),
                is_trainable=partial(is_trainable, patterns),
            )
        if self._resumed is not None:
            begun = {step.phase for step in self.objective.steps(0)}  # have state from step 1 on
            for name, prepared in self.prepared.items():
                shapes = checkpoint.optimizer_shapes(
                    self._resumed,
                    prepared.wrapped.trainable,
                    required=self.optimizers[name].has_state and name in begun,
                )
                prepared.wrapped.load_state(shapes, self._resumed.read_range)
        self._resumed = None  # closes its files: the checkpoint may be pruned from now on
        self._warm_up()

    def _warm_up(self) -> None:
        """Warm-up pass: every phase with each combination of terms, on gray images, no update."""
        steps = variants(self.objective, self.config.images_per_step)
        pixels = {name: self._gray(data.mirror) for name, data in self.config.streams.items()}
        outputs: Tensors = {}
        inputs: dict[str, dict[tuple[str, ...], Tensors]] = {}
        for step in steps:
            phase = self.objective.phases[step.phase]
            first = step._replace(at=0)
            self._batches = {name: [pixels[name]] for name in phase.streams}
            (micro_batch,) = self._inputs(first, {}, [outputs], num_micro_batches=1)
            inputs.setdefault(step.phase, {})[step.terms] = micro_batch
            taken = {name for p in self.objective.phases.values() for name in p.takes}
            if any(name.partition(".")[0] == step.phase for name in taken):
                with self._unsharded(step.phase), torch.no_grad():  # eager: nothing is compiled
                    result = phase.forward(self._reads(step.phase), micro_batch, step.terms)
                outputs |= {f"{step.phase}.{k}": v for k, v in result.outputs.items()}
        for name, runs in inputs.items():
            self.engine.warm_up(self.prepared[name], self._others(name), self._reads(name), runs)
        self._batches = {}

    def close(self) -> None:
        """Release the wrapped phases; `prepare` wraps them again, with empty optimizer state."""
        for prepared in self.prepared.values():
            prepared.close()
        self.prepared.clear()

    def shards(self) -> Iterator[TensorShard]:
        """This rank's shards of the content of a checkpoint."""
        trained: set[str] = set()
        for prepared in self.prepared.values():
            trained |= {f"networks/{name}" for name in prepared.wrapped.trainable}
            yield from prepared.wrapped.shards()
        groups = {"networks": self.saved_networks, "state": self.state}
        for group, modules in groups.items():
            for name, module in modules.items():
                for key, tensor in module.state_dict().items():
                    key = f"{group}/{name}.{key}"
                    if key not in trained:
                        yield TensorShard(
                            key, tuple(tensor.shape), 0, tensor.detach(), replicated=True
                        )

    @property
    def alpha(self) -> float:
        """Weight of the newest resolution in the next step; 1 unless it fades in."""
        return self.stage.setup(self.class_counts).alpha(self.progress.images_seen)

    def advance(
        self, streams: Streams, steps: Sequence[Step] | None = None, on_step: OnStep | None = None
    ) -> None:
        """One training step: the optimizer steps of the objective in order, then the EMAs.

        `steps` replace those of the objective; `on_step` is called after each one.
        """
        before = self.progress.images_seen
        self.objective.begin(before)
        outputs: list[Tensors] = [{} for _ in range(self.accumulation)]
        scalars: dict[tuple[str, int], Tensors] = {}  # of a phase and counter; the main step's win
        for step in self.objective.steps(before) if steps is None else steps:
            phase, prepared = self.objective.phases[step.phase], self.prepared[step.phase]
            inputs = self._inputs(step, streams, outputs)
            with self._unsharded(step.phase):
                self._iterate_singular_vectors(step.phase)
                self._set_hyperparameters(step)
                others, reads = self._others(step.phase), self._reads(step.phase)
                result = self.engine.step(prepared, others, reads, inputs, step)
            with self._unsharded(step.phase, phase.after_step_uses_networks):
                logged = result.scalars | phase.after_step(step, result, self.world)
            for collected, new in zip(outputs, result.outputs, strict=True):
                collected |= {f"{step.phase}.{key}": value for key, value in new.items()}
            known = scalars.setdefault((step.phase, step.at), {})
            known |= {f"train/{step.phase}/{k}": v for k, v in logged.items()} | known
            if step.fresh:
                self.progress.images_seen += step.num_images
            if on_step is not None:
                on_step(step)
        for found in scalars.values():
            self.statistics.add(found)
        self._update_averages(before)

    def _inputs(
        self,
        step: Step,
        streams: Streams,
        outputs: Sequence[Tensors],
        num_micro_batches: int | None = None,
    ) -> list[Tensors]:
        """Inputs of each micro-batch of this rank: draws, values, images, earlier outputs."""
        phase, num = self.objective.phases[step.phase], num_micro_batches or self.accumulation
        if step.fresh and streams:
            for name in phase.streams:
                self._batches[name] = self._read(name, streams[name], step)
        draws = phase.draws(step.at, step.num_images, step.terms)
        values = self._on_device(phase.values(step.at))
        rows = rows_in_order(self.world, step.num_images, self.accumulation)
        if phase.streams and step.num_images == self.config.train.batch:
            rows = self._rows.get(phase.streams[0], rows)
        return [
            self._on_device(taken(draws, rows[index]))
            | values
            | {
                f"{name}.{key}": tensor
                for name in phase.streams
                for key, tensor in self._batches[name][index].items()
            }
            | {name: outputs[index][name] for name in phase.takes}
            for index in range(num)
        ]

    def _read(self, name: str, stream: Iterator[Batch], step: Step) -> list[Tensors]:
        """The next batch of a stream: this rank's micro-batches of one optimizer step."""
        data = self.config.streams[name]
        flips = mirror(self.config.train.seed, name, step) if data.mirror else {}
        batches = []
        self._rows[name] = rows_in_order(self.world, step.num_images, self.accumulation)
        for index in range(self.accumulation):
            began = time.monotonic()
            images = next(stream)
            self.data_seconds += time.monotonic() - began
            self.bad += images.bad
            if data.lanes not in (None, 1):
                self._rows[name][index] = rows_at(images.positions, self.progress.images_seen)
            mine = self._on_device(taken(flips, self._rows[name][index]))
            batches.append({"pixels": images.pixels, "labels": images.labels} | mine)
        return batches

    def _gray(self, mirror: bool) -> Tensors:
        """A micro-batch of gray images, for the warm-up."""
        model = self.config.model
        num = self.config.train.batch // self.accumulation // self.world.size
        shape = (num, model.height, model.width, model.image_channels)
        gray: Tensors = {
            "pixels": torch.full(shape, 128, dtype=torch.uint8),
            "labels": torch.zeros(num, dtype=torch.int64),
        }
        if mirror:
            gray["mirror"] = torch.zeros(num, dtype=torch.bool)
        return self._on_device(gray)

    def _on_device(self, tensors: Tensors) -> Tensors:
        return {k: t.to(self.world.device, non_blocking=True) for k, t in tensors.items()}

    def _others(self, phase: str) -> list[Prepared]:
        """The phases that train the networks that a phase reads."""
        reads = set(self.objective.phases[phase].reads)
        return [
            prepared
            for name, prepared in self.prepared.items()
            if name != phase and reads & set(prepared.phase.trains)
        ]

    def _reads(self, phase: str) -> dict[str, nn.Module]:
        found = self.networks | self.objective.frozen
        return {name: found[name] for name in self.objective.phases[phase].reads}

    @contextlib.contextmanager
    def _unsharded(self, phase: str, needed: bool = True) -> Iterator[None]:
        """Context in which, if `needed`, the networks a phase trains or reads are unsharded."""
        with contextlib.ExitStack() as stack:
            for prepared in (self.prepared[phase], *self._others(phase)) if needed else ():
                stack.enter_context(prepared.wrapped.unsharded())
            yield

    def _iterate_singular_vectors(self, phase: str) -> None:
        """Power iterations of every spectral norm in the networks of the step."""
        num = self.config.train.power_iterations
        for network in self.objective.phases[phase].children():
            power_iteration(network, num=num)
        for name in set(self.objective.phases[phase].reads) & set(self.networks):
            power_iteration(self.networks[name], num=num)

    def _set_hyperparameters(self, step: Step) -> None:
        """Learning rate and betas that the schedules set for a step."""
        settings, anneal = self.optimizers[step.phase], self.config.anneal_images
        lr = settings.lr_at(step.at, self.config.train.batch, anneal, self.progress.lr_factor)
        for group in self.prepared[step.phase].optimizer.param_groups:
            group |= {"lr": lr} | settings.group_at(step.at, anneal)

    def _update_averages(self, before: int) -> None:
        """Move the EMA of each averaged network over the images of this training step."""
        now = self.progress.images_seen
        for name, average in self.averages.items():
            (owner,) = (p for p in self.prepared.values() if name in p.phase.trains)
            with owner.wrapped.unsharded():
                ema.update(
                    average,
                    self.networks[name],
                    self.config.ema,
                    now,
                    now - before,
                    self.config.anneal_images,
                    self.stage.born,
                )
