"""The state of a run on its device, and what can be done to it; `trainer` says when."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bigan import augment, checkpoint, models, rng
from bigan.checkpoint import Progress, Reader, TensorShard
from bigan.data.fetch import BadSample
from bigan.data.stream import Batch
from bigan.distributed.world import on_all_ranks, sum_over_ranks
from bigan.engine import Engine, Prepared
from bigan.engine.loss_scale import LossScale
from bigan.layers.batchnorm import (
    collecting_statistics,
    normalisation_layers,
    set_process_group,
)
from bigan.layers.mapping import follow_latents, has_latent_average, mean_latent
from bigan.layers.resampling import repeated
from bigan.layers.spectral import power_iteration
from bigan.objectives import ema, gan, growth
from bigan.run.statistics import RunningMean, Statistics
from bigan.run_config import (
    AdamConfig,
    RunConfig,
    accumulation_steps,
    check_groups,
    corrected,
    own_step_every,
)
from bigan.schedules import annealed, warmup

GRID_COLUMNS = 10
GRID_ROWS = 16


class Training:
    """Networks, their average, optimisers, counters and prepared phases of one run.

    `recipe` is that of the whole run, `config` that of the stage it is in (`growth`): the same
    where nothing grows. `classes` maps each class name to its number of training images.
    """

    def __init__(self, recipe: RunConfig, engine: Engine, classes: dict[str, int]) -> None:
        self.recipe = recipe
        self.stages = growth.stages(recipe)
        self.engine = engine
        self.world = engine.world
        self.class_names = tuple(classes)
        self.class_counts = tuple(classes.values())
        for stage in self.stages:  # now, not when it begins
            check_groups(stage.config, self.world.size)
        self.networks: dict[str, nn.Module] = {}
        self.strength: augment.Strength | None = None  # of the augmentation, if it has one
        if isinstance(recipe.augment, augment.ada.Config):
            self.strength = augment.Strength(recipe.augment, recipe.anneal_images, self.world)
            if self.strength.adaptive:
                self.networks["augment"] = self.strength.adaptive  # part of the state
        self.path_length: RunningMean | None = None
        if recipe.path_length:
            self.path_length = RunningMean(recipe.path_length.decay).to(self.world.device)
            self.networks["path_length"] = self.path_length
        self.progress = Progress()
        self.former_forward_images = 0  # of the life before this one; 0: there was none
        self.prepared: dict[str, Prepared] = {}
        self._resumed: Reader | None = None
        self.scales: dict[str, LossScale] = {}
        self.build(self.stages[0])
        if recipe.precision == "fp16":
            self.scales = {name: LossScale(self.world.device) for name in self.phases}
            self.networks |= {f"scale_{name}": scale for name, scale in self.scales.items()}
        self.bad: list[BadSample] = []  # replaced on this rank since the last tick
        self.data_seconds = 0.0  # spent waiting for images since the last tick
        self.statistics = Statistics(self.world)

    def build(self, stage: growth.Stage) -> None:
        """New networks of a stage, their average, and the phases that train them."""
        self._last: dict[str, list[Any]] = {}  # micro-batches of the last main step of a phase
        self.stage = stage
        self.config = config = stage.config
        self.generator, self.discriminator = models.build(config.model, "meta")
        for name, network in (("g", self.generator), ("d", self.discriminator)):
            network.to_empty(device="cpu")
            stream = f"init/{name}" if stage.index == 0 else f"init/{name}/{stage.resolution}"
            weights = rng.torch_generator(config.train.seed, stream)
            network.init_weights(weights)  # type: ignore[operator]
            network.to(self.world.device)
            network.to(memory_format=self.engine.memory_format)
        self.average = ema.averaged_copy(self.generator)
        set_process_group(self.generator, self.engine.process_group)
        set_process_group(self.average, self.engine.process_group)
        self.networks |= {"g": self.generator, "d": self.discriminator, "ema": self.average}
        self._adam: dict[str, AdamConfig] = {  # corrected for steps that only regularise
            name: corrected(getattr(config.optimizer, name), own_step_every(config, name))
            for name in ("g", "d")
        }
        self._follows_latents = has_latent_average(self.generator)
        self.accumulation = accumulation_steps(config.train, self.world.size)
        self.progress.forward_images = config.train.batch // self.accumulation
        self.progress.stage = stage.index
        self.phases = gan.build_phases(
            config, self.generator, self.discriminator, self.class_counts
        )

    def enter(self, stage: growth.Stage) -> None:
        """Go on with the networks of the next stage; `prepare` follows.

        They take over all weights that the last ones had. So does the average, and what is new in
        it begins as the generator's; Adam begins anew.
        """
        self.close()
        self._resumed = None
        former = {name: self.networks[name] for name in ("g", "d", "ema")}
        self.build(stage)
        for name, network in former.items():
            growth.inherit(self.networks[name], network)
        self.engine.forget_compiled()

    def resume(self, folder: Path) -> None:
        """Take up the state of a checkpoint; every rank takes part.

        Before `prepare`, which fills in the rest: what the optimisers hold. Raises
        `CheckpointError` on all ranks if it is damaged or not of this run.
        """

        def look() -> tuple[Progress, Reader]:
            progress, reader = checkpoint.read_progress(folder), Reader(folder)
            if not 0 <= progress.stage < len(self.stages):
                raise checkpoint.CheckpointError(
                    f"{folder}: is of stage {progress.stage}, this recipe has {len(self.stages)}"
                )
            if progress.stage != self.stage.index:
                self.build(self.stages[progress.stage])
            checkpoint.check_fit(reader, self.networks, trained=tuple(self.phases))
            expected = self.progress.data_fingerprint
            if expected and progress.data_fingerprint != expected:
                raise checkpoint.CheckpointError(
                    f"{folder}: was trained on other images than {self.config.data.path} holds "
                    "now; restore those, or use another run_dir"
                )
            return progress, reader

        progress, reader = on_all_ranks(self.world, look)
        reader.verify_across_ranks(self.world)  # or one rank alone would find it damaged, later
        on_all_ranks(self.world, lambda: checkpoint.load_networks(reader, self.networks))
        self.former_forward_images = progress.forward_images
        self.progress = replace(
            progress, attempt=progress.attempt + 1, forward_images=self.progress.forward_images
        )
        self._resumed = reader

    def prepare(self) -> None:
        """Hand the phases to the engine; networks must be final by then."""
        self.engine.compile_seconds = 0.0
        self.prepared = {
            name: self.engine.prepare(
                phase,
                self._adam[name],
                accumulation=self.accumulation,
                scale=self.scales.get(name),
            )
            for name, phase in self.phases.items()
        }
        for name, prepared in self.prepared.items():
            if self._resumed is not None:
                prepared.wrapped.load_moments(name, self._resumed.read_range)
        self._resumed = None  # and its files are closed: it may be pruned from now on
        for name, phase in self.phases.items():
            batches = {terms: self._rehearsal(phase, terms) for terms in phase.variants()}
            self.engine.rehearse(self.prepared[name], self._other(name), batches)

    @property
    def optimizers(self) -> dict[str, torch.optim.Adam]:
        """Those of the networks in training, once prepared."""
        return {n: self.prepared[n].optimizer for n in self.networks if n in self.prepared}

    def _other(self, name: str) -> Prepared:
        return self.prepared["g" if name == "d" else "d"]

    def close(self) -> None:
        """Let go of the engines; `prepare` makes new ones, whose Adam begins anew."""
        for prepared in self.prepared.values():
            prepared.wrapped.close()
        self.prepared.clear()

    def shards(self) -> Iterator[TensorShard]:
        """This process's part of everything that a checkpoint holds."""
        trained: set[int] = set()
        for name, prepared in self.prepared.items():
            trained |= {id(parameter) for parameter in self.networks[name].parameters()}
            yield from prepared.wrapped.shards(name)
        for name, network in self.networks.items():
            for key, tensor in network.state_dict(keep_vars=True).items():
                if id(tensor) not in trained:
                    key = f"networks/{name}.{key}"
                    yield TensorShard(key, tuple(tensor.shape), 0, tensor.detach(), replicated=True)

    @property
    def alpha(self) -> float:
        """Share of the newest resolution in the next step; 1 unless it fades in."""
        return self.stage.alpha(self.progress.images_seen)

    def step(self, stream: Iterator[Batch]) -> None:
        """One training step: every phase in order, then the average."""
        before = self.progress.images_seen
        if self.stage.fading:
            for name in ("g", "d"):
                growth.set_alpha(self.networks[name], self.alpha)
        for name in gan.order(self.config):
            self.phase_step(name, stream)
        now = self.progress.images_seen
        with self.prepared["g"].wrapped.whole():
            self._follow_latents()
            ema.update(
                self.average,
                self.generator,
                self.config.ema,
                now,
                now - before,
                self.config.anneal_images,
                self.stage.born,
            )

    def phase_step(self, name: str, stream: Iterator[Batch]) -> None:
        """One optimiser step of one phase, and one more if a regulariser with its own is due.

        A phase that reads images moves `images_seen` on.
        """
        phase, images_seen = self.phases[name], self.progress.images_seen
        if self.strength is not None:
            self.strength.schedule(images_seen)
        terms = phase.terms(images_seen)
        self._last[name] = batches = self._micro_batches(phase, terms, stream)
        scalars = self._optimise(name, terms, batches)
        own_terms = phase.own_terms(images_seen)
        if own_terms:
            if phase.num_images(own_terms) != phase.num_images(terms):
                batches = self._micro_batches(phase, own_terms, stream)
            scalars = self._optimise(name, own_terms, batches) | scalars
        if gan.PATH_LENGTH in own_terms and self.path_length is not None:
            self.path_length.follow(scalars["path_length"], self.world)
        if phase.uses_data:
            self.progress.images_seen += self.config.train.batch
            if self.strength is not None:
                batch = self.config.train.batch
                scalars |= self.strength.follow(scalars, images_seen, batch)
        self.statistics.add(scalars)

    def _optimise(
        self, name: str, terms: gan.Terms, batches: list[tuple]
    ) -> dict[str, torch.Tensor]:
        """One optimiser step of a network on these micro-batches; its scalars."""
        images_seen, anneal = self.progress.images_seen, self.config.anneal_images
        settings = self._adam[name]
        share = warmup(images_seen, self.config.train.batch, settings.warmup_images)
        share *= self.progress.lr_factor
        for group in self.prepared[name].optimizer.param_groups:
            group["lr"] = share * annealed(images_seen, settings.lr, settings.lr_end, anneal)
            if settings.beta2_end is not None:
                beta2 = annealed(images_seen, settings.beta2, settings.beta2_end, anneal)
                group["betas"] = (settings.beta1, beta2)
        with self.prepared["g"].wrapped.whole(), self.prepared["d"].wrapped.whole():
            power_iteration(self.generator)
            power_iteration(self.discriminator)
            return self.engine.step(
                self.prepared[name], self._other(name), batches, terms, images_seen
            )

    def _follow_latents(self) -> None:
        """Move the running mean of a generator's intermediate latents, if it keeps one."""
        if not self._follows_latents:
            return
        batches = self._last["g"]
        mean = torch.stack([mean_latent(self.generator, b.z, b.fake_labels) for b in batches])
        mean = mean.mean(0)
        sum_over_ranks(self.world, mean)
        follow_latents(self.generator, mean / self.world.size)

    def _micro_batches(
        self, phase: gan.Phase, terms: gan.Terms, stream: Iterator[Batch]
    ) -> list[tuple]:
        """This rank's slices of the global micro-batches that make one optimiser step."""
        num, images_seen = phase.num_images(terms), self.progress.images_seen
        draws = phase.draws(images_seen, num, terms)
        batches: list[tuple] = []
        for index in range(self.accumulation):
            mine = self._slice(draws, index, num)
            if phase.uses_data:
                began = time.monotonic()
                images = next(stream)
                self.data_seconds += time.monotonic() - began
                self.bad += images.bad
                mine |= {"real": images.real, "labels": images.labels}
            elif phase.shows_real and gan.ADVERSARIAL in terms:
                seen = self._last["d"][index]
                mine |= {key: getattr(seen, key) for key in ("real", "labels")}
                if seen.mirror is not None:
                    mine["mirror"] = seen.mirror
            batches.append(self._batch(phase, terms, mine))
        return batches

    def _slice(
        self, draws: dict[str, torch.Tensor], index: int, num: int
    ) -> dict[str, torch.Tensor]:
        """This rank's part of the `index`-th micro-batch of `num` global draws."""
        each = num // self.accumulation
        share = self.world.share(each)
        start = index * each
        return {k: t[start + share.start : start + share.stop] for k, t in draws.items()}

    def _batch(self, phase: gan.Phase, terms: gan.Terms, tensors: dict[str, torch.Tensor]) -> tuple:
        on_device = {k: t.to(self.world.device, non_blocking=True) for k, t in tensors.items()}
        if self.strength is not None:
            on_device["strength"] = self.strength.p
        if isinstance(phase, gan.DiscriminatorPhase):
            weights = phase.penalty_weights(self.progress.images_seen)
            if weights is not None:
                on_device["weights"] = weights.to(self.world.device, non_blocking=True)
        if self.path_length is not None and gan.PATH_LENGTH in terms:
            on_device["path_mean"] = self.path_length.mean
        return phase.batch_type(**on_device)

    def _rehearsal(self, phase: gan.Phase, terms: gan.Terms) -> tuple:
        """A micro-batch as of a step, of grey images; it draws nothing from the stream."""
        num = phase.num_images(terms)
        mine = self._slice(phase.draws(0, num, terms), 0, num)
        if phase.shows_real and (phase.uses_data or gan.ADVERSARIAL in terms):
            model, num = self.config.model, len(mine["z"])
            shape = (num, model.resolution, model.resolution, model.image_channels)
            mine["real"] = torch.full(shape, 128, dtype=torch.uint8)
            mine["labels"] = torch.zeros(num, dtype=torch.int64)
            if self.config.data.mirror:
                mine["mirror"] = torch.zeros(num, dtype=torch.bool)
        return self._batch(phase, terms, mine)

    def collect_standing_statistics(self) -> None:
        """Accumulate the average's BatchNorm statistics over fresh latents; all ranks take part.

        Brock et al. 2019, section 4.1, "standing statistics": those of the last training batches
        would be of other weights than the averaged ones. A forward is the joined micro-batch of
        training, so the result does not depend on how many processes share it.
        """
        if not normalisation_layers(self.average):
            return
        config, seen = self.config, self.progress.images_seen
        num = config.train.batch // self.accumulation
        share = self.world.share(num)
        with collecting_statistics(self.average, partial(sum_over_ranks, self.world)):
            for index in range(config.train.standing_batches):
                stream = f"standing/{index}"
                z = rng.normal(config.train.seed, f"{stream}/z", seen, (num, config.model.z_dim))
                labels = rng.labels(
                    config.train.seed, f"{stream}/labels", seen, num, self.class_counts
                )
                self.average(z[share].to(self.world.device), labels[share].to(self.world.device))

    def grid_labels(self) -> list[int]:
        """The class of each row of the sample grid, at most `GRID_ROWS` of them, evenly chosen."""
        num = self.config.model.num_classes
        return [round(i) for i in torch.linspace(0, num - 1, min(num, GRID_ROWS)).tolist()]

    @torch.no_grad()
    def sample_grid(self) -> torch.Tensor:
        """uint8 [rows * columns, C, R, R]: one row per class, the same latents at every call."""
        config = self.config
        labels = torch.tensor(self.grid_labels()).repeat_interleave(GRID_COLUMNS)
        z = rng.normal(config.train.seed, "grid/z", 0, (len(labels), config.model.z_dim))
        chunk = config.train.micro_batch or config.train.batch
        parts = [
            self.average(a.to(self.world.device), b.to(self.world.device))
            for a, b in zip(z.split(chunk), labels.split(chunk), strict=True)
        ]
        images = models.to_uint8(torch.cat(parts)).cpu()
        return repeated(images, self.recipe.model.resolution)  # of a growing model they are smaller
