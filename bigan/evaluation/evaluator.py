"""Measures a snapshot: images of one sampler against the reference images, under a protocol."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from bigan.checkpoint import snapshots
from bigan.data.format.manifest import Manifest
from bigan.data.streaming.dataset import open_level
from bigan.distributed.world import World, on_all_ranks, on_rank_0, reported_by_rank_0
from bigan.errors import UserError
from bigan.evaluation import extractors, metrics, moments, reference, sampling
from bigan.evaluation.metrics import Features
from bigan.evaluation.records import Record, Task
from bigan.image_size import num_pixels
from bigan.layers.resampling import repeated
from bigan.objectives.base import Objective
from bigan.objectives.samplers import Sampler, truncation_problem
from bigan.run_config import EvaluationConfig, RunConfig, misfits, setup_of
from bigan.run_folder import RunFolder
from bigan.transparency import has_alpha

FEW_SAMPLES = 10_000  # fewer images bias a 2048-dimensional FID visibly upwards


def choose_sampler(config: RunConfig) -> tuple[str, Sampler, bool]:
    """(name, sampler, whether it is the first of the objective) of `evaluation.sampler`.

    By default the first one. Raises `UserError` for an unknown name.
    """
    counts = (1,) * config.model.num_classes  # the names and streams do not depend on them
    samplers = config.objective.build(setup_of(config, counts)).samplers
    name = config.evaluation.sampler or next(iter(samplers))
    if name not in samplers:
        raise UserError(
            f"evaluation.sampler = {name!r}: objective.name = {config.objective.name} has the "
            f"sampler(s) {', '.join(samplers)}"
        )
    return name, samplers[name], name == next(iter(samplers))


class Evaluator:
    """Extractor, reference moments and protocol of a run; measures its snapshots.

    All ranks call its methods. Raises `UserError`, on all ranks, for an unknown sampler, a
    truncation that the sampler does not support, missing or wrong weights of the extractor, and
    data that is missing, damaged or does not match the model.
    """

    def __init__(
        self, run_dir: Path, config: RunConfig, world: World, device: torch.device
    ) -> None:
        self.config, self.world, self.device = config, world, device
        self.sampler_name, sampler, is_first = on_all_ranks(world, lambda: choose_sampler(config))
        # Samplers besides the first have metric keys and records of their own.
        self.named_sampler = None if is_first else self.sampler_name
        folder = RunFolder(run_dir).evaluation
        self.folder = folder if is_first else folder / self.sampler_name
        self.manifest = self._open(sampler.reference)
        self.inputs = None if sampler.inputs is None else self._open(sampler.inputs)
        self.settings = self._settings()
        on_all_ranks(world, lambda: self._check_fit(config, "config.yaml"))
        counts = tuple(self.manifest.samples_of_class(self.settings.split))
        objective = config.objective.build(setup_of(config, counts))
        self.sampler = objective.samplers[self.sampler_name]
        self.network_files, self.has_batchnorm = _networks_of(self.sampler, objective)
        self.check_truncation(self.settings.truncation)
        self.extractor = on_all_ranks(
            world,
            lambda: extractors.create(self.settings.extractor, self.settings.weights_path, device),
        )
        self.reference = reference.load_or_compute(
            self.extractor,
            self.manifest,
            self.settings.split,
            world,
            self.settings.batch,
            RunFolder(run_dir).evaluation,
            config.streams[sampler.reference],
        )

    def _open(self, stream: str) -> Manifest:
        data = self.config.streams[stream]
        return on_rank_0(
            self.world, lambda: open_level(data.path, self.config.model.resolution, data)
        )

    def _settings(self) -> EvaluationConfig:
        """The config section; a sampler with inputs makes at most one image of each input."""
        settings = self.config.evaluation
        if self.inputs is None:
            return settings
        num = min(settings.num_samples, self.inputs.num_samples(settings.split))
        return settings.model_copy(update={"num_samples": num})

    @property
    def titles(self) -> dict[str, str]:
        """Key -> title of all metrics."""
        return metrics.titles(self.extractor, self.named_sampler)

    @property
    def truncates_mean(self) -> bool:
        """Whether a truncation is psi, the factor on a latent's distance from its mean."""
        return self.sampler.truncates == "w"

    def check_truncation(self, truncation: float | None) -> None:
        """Raises `UserError`, on all ranks, if the sampler does not support this truncation."""
        why = truncation_problem(self.sampler, truncation)
        if why:
            problem = UserError(f"truncation {truncation:g}: {why} (sampler {self.sampler_name})")
            raise reported_by_rank_0(self.world, problem)

    def protocol(self, truncation: float | None) -> dict[str, object]:
        """Everything that the metrics of a snapshot depend on, besides its networks."""
        settings = self.settings
        content: dict[str, object] = {
            **reference.describe(self.extractor, self.manifest, settings.split),
            "metrics": list(self.titles),
            "sampler": self.sampler_name,
            "networks": self.network_files,
            "num_samples": settings.num_samples,
            "batch": settings.batch,
            "seed": settings.seed,
            "truncation": truncation,
            "quantization": sampling.QUANTIZATION,
            "splits": metrics.num_splits(settings.num_samples, settings.splits),
        }
        if self.inputs is None:
            content["label_distribution"] = f"class counts of split {settings.split}"
        else:
            content["inputs_fingerprint"] = self.inputs.fingerprint
        if self.has_batchnorm:
            content["batch_statistics"] = "standing"
        if has_alpha(self.manifest.channels):
            content["transparency"] = "composited on white"
        if self.config.growth:
            content["upsampling"] = "lower resolutions by repeating pixels"
        if truncation is not None:
            content["truncation_method"] = (
                "psi: latents moved towards their mean"
                if self.truncates_mean
                else "values of z beyond it drawn again"
            )
            if self.has_batchnorm:
                num, size = self.config.train.standing_batches, sampling.standing_batch(self.config)
                content["batch_statistics"] = f"of truncated latents: {num} x {size}"
        return content

    def measure(self, task: Task, truncation: float | None) -> Record:
        """Generate images from the snapshot and compute all metrics; the same on every rank.

        With a truncation, the standing BatchNorm statistics are accumulated from latents with the
        same truncation.
        """
        started = time.perf_counter()
        networks = self._load(task)
        if truncation is not None:
            sampling.accumulate_statistics(
                networks,
                self.sampler,
                self.config.train,
                task.images_seen,
                truncation,
                sampling.standing_batch(self.config),
                replace(self.world, device=self.device),
            )
        features = self._features(networks, truncation)

        def compute() -> Record:
            return Record(
                images_seen=task.images_seen,
                metrics=metrics.compute(features, self.extractor, self.named_sampler),
                protocol={**self.protocol(truncation), "snapshot_sha256": task.sha256},
                seconds=time.perf_counter() - started,
            )

        return on_rank_0(self.world, compute)

    def _load(self, task: Task) -> dict[str, nn.Module]:
        """The networks of the sampler from a snapshot, on the device."""

        def load() -> snapshots.Snapshot:
            snapshot = snapshots.load(task.folder, self.device)
            self._check_fit(snapshot.config, str(task.folder))
            return snapshot

        snapshot = on_all_ranks(self.world, load)
        return {name: snapshot.networks[name] for name in self.sampler.networks}

    def _features(self, networks: Mapping[str, nn.Module], truncation: float | None) -> Features:
        """Features of the images that all ranks generate."""
        settings, extractor = self.settings, self.extractor
        device = moments.accumulation_device(self.device)
        rows = metrics.Rows(settings.num_samples, extractor.num_classes, device)
        fetch = self.config.streams[self.sampler.inputs or self.sampler.reference]

        def local_moments() -> moments.Moments:
            total = moments.empty(extractor.dim, device)
            for start, images in sampling.generate(
                networks,
                self.sampler,
                settings,
                truncation,
                self.world,
                self.device,
                self.inputs,
                fetch,
            ):
                found, logits = extractor(repeated(images, self.manifest.resolution))
                rows.fill(start, logits.to(device))
                total = moments.merge(total, moments.from_features(found))
            return total

        generated = moments.all_reduce(self.world, on_all_ranks(self.world, local_moments))
        return Features(generated, self.reference, rows.gather(self.world), settings.splits)

    def measure_unless_replaced(self, task: Task, truncation: float | None) -> Record | None:
        """The record, or None if a resumed run replaced the snapshot in the meantime."""
        try:
            record: Record | None = self.measure(task, truncation)
        except UserError:
            if on_rank_0(self.world, task.is_current):
                raise
            return None
        return record if on_rank_0(self.world, task.is_current) else None

    def remarks(self, *truncations: float | None) -> list[str]:
        """What a reader of the metrics at these truncations might not expect, a line each."""
        lines = []
        if not self.extractor.is_published:
            names = [m.name_for(self.extractor) for m in metrics.METRICS.values()]
            meaning = ", ".join(f"{name.key} is the {name.title}" for name in names)
            lines.append(f"{meaning} of {self.extractor.name}; not comparable with FID and IS")
        smallest = min(self.settings.num_samples, self.reference.num)
        if self.extractor.is_published and smallest < FEW_SAMPLES:
            lines.append(f"FID of {smallest} images is biased upwards; papers use 50000")
        train = self.config.train
        micro = train.micro_batch if train.batchnorm == "global" else None
        if self.has_batchnorm and any(truncations) and micro and not self.settings.standing_batch:
            lines.append(
                f"BatchNorm statistics of truncated latents are from forwards of {micro} images, "
                f"those of a snapshot from {micro} x the training processes; set "
                "evaluation.standing_batch to that product"
            )
        return lines

    def _check_fit(self, config: RunConfig, where: str) -> None:
        """Raises `UserError` unless the model's images are comparable with the reference's."""
        grows = self.config.growth is not None  # its snapshots may have a lower resolution
        smaller = num_pixels(config.model.resolution) < num_pixels(self.manifest.resolution)
        for _, key, wanted, found in misfits(config.model, self.manifest):
            if grows and key == "resolution" and smaller:
                continue
            raise UserError(
                f"{where}: model.{key} = {wanted}, but the reference images in "
                f"{self.manifest.folder} have {found}; evaluate with the data that the model was "
                "made for (data.path)"
            )


def _networks_of(sampler: Sampler, objective: Objective) -> tuple[list[str], bool]:
    """(names of the sampler's network files, whether any has BatchNorm layers)."""
    found = objective.networks | objective.frozen
    used = {name: found[name] for name in sampler.networks}
    files = [f"{name}_ema" if name in objective.averaged else name for name in used]
    return files, sampling.has_batchnorm(used)
