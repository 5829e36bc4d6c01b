"""Measures one snapshot: extractor, reference moments and the full protocol of the numbers."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from bigan import models
from bigan.checkpoint import snapshots
from bigan.data.dataset import open_level
from bigan.distributed.world import World, on_all_ranks, on_rank_0, reported_by_rank_0
from bigan.errors import UserError
from bigan.evaluation import features, metrics, moments, reference, sampling
from bigan.layers.batchnorm import normalisation_layers
from bigan.layers.mapping import has_latent_average
from bigan.layers.resampling import repeated
from bigan.run_config import RunConfig, misfits

FOLDER = "evaluation"
WEIGHTS = "weights.safetensors"  # of a snapshot
LEAST = 0.02  # as truncation: less than 1.6 % of all normal numbers are within
SMALL = 10_000  # fewer images than this bias a 2048-dimensional FID visibly upwards


@dataclass(frozen=True)
class Task:
    """A snapshot to measure: hash, time (ns) and size (bytes) of its weights file."""

    folder: Path
    sha256: str
    stamp: tuple[int, int]

    @property
    def images_seen(self) -> int:
        return int(self.folder.name)

    def is_current(self) -> bool:
        """Whether the snapshot is still the one the task was made of."""
        try:
            return stamp(self.folder) == self.stamp
        except FileNotFoundError:
            return False


def stamp(folder: Path) -> tuple[int, int]:
    """Time (ns) and size (bytes) of a snapshot's weights; FileNotFoundError if there are none."""
    status = (folder / WEIGHTS).stat()
    return status.st_mtime_ns, status.st_size


@dataclass(frozen=True)
class Record:
    """What was measured (`metrics`: key -> value) and how (`protocol`: plain data)."""

    images_seen: int
    metrics: dict[str, float]
    protocol: dict[str, object]
    score_std: float
    seconds: float


class Judge:
    """Extractor, reference moments and protocol of a run, ready to measure one generator."""

    def __init__(
        self, run_dir: Path, config: RunConfig, world: World, device: torch.device
    ) -> None:
        settings = config.evaluation
        self.config, self.world, self.device = config, world, device
        self.manifest = on_rank_0(
            world, lambda: open_level(config.data.path, config.model.resolution, config.data)
        )
        self._check_fit(config, "config.yaml")
        generator, _ = models.build(config.model, "meta")
        self.normalises = bool(normalisation_layers(generator))
        self.has_mean_latent = has_latent_average(generator)
        self.check(settings.truncation)
        self.extractor = on_all_ranks(
            world, lambda: features.create(settings.extractor, settings.weights_path, device)
        )
        self.reference = reference.load_or_compute(
            self.extractor,
            self.manifest,
            settings.split,
            world,
            settings.batch,
            run_dir / FOLDER,
            config.data,
        )

    def check(self, truncation: float | None) -> None:
        """`UserError`, on all ranks, if there is no such truncation for this generator."""
        if truncation is None:
            return
        if truncation < LEAST:
            why = f"so small a bound is hardly ever met; use {LEAST} or more"
        elif self.has_mean_latent and truncation > 1:
            why = (
                f"{self.config.model.name} has a mean latent, so this is psi, the share of a "
                "latent's distance from it; use 1 or less"
            )
        else:
            return
        raise reported_by_rank_0(self.world, UserError(f"truncation {truncation:g}: {why}"))

    def protocol(self, truncation: float | None) -> dict[str, object]:
        """All that the numbers of a generator depend on, but for the generator itself."""
        settings = self.config.evaluation
        content: dict[str, object] = {
            **reference.describe(self.extractor, self.manifest, settings.split),
            "num_samples": settings.num_samples,
            "batch": settings.batch,
            "seed": settings.seed,
            "truncation": truncation,
            "label_law": f"class counts of split {settings.split}",
            "quantisation": sampling.QUANTISATION,
            "splits": settings.splits if settings.num_samples >= metrics.SPLITS_FROM else 1,
            "generator": "averaged weights, standing batch statistics",
        }
        if self.config.growth:
            content["enlarged"] = "lower resolutions by repeating pixels"
        if truncation is not None:
            content["truncation_law"] = (
                "psi: latents moved towards their mean"
                if self.has_mean_latent
                else "values of z beyond it drawn again"
            )
            if self.normalises:
                content["generator"] = (
                    "averaged weights, batch statistics of such latents: "
                    f"{self.config.train.standing_batches} x {sampling.standing_batch(self.config)}"
                )
        return content

    def measure(self, task: Task, truncation: float | None) -> Record:
        """Sample the snapshot's generator and compare; the same record on every rank.

        With a `truncation`, its standing BatchNorm statistics are accumulated anew from latents
        that are truncated alike.
        """
        started = time.perf_counter()
        settings, extractor = self.config.evaluation, self.extractor
        home = moments.home(self.device)
        counts = self.manifest.class_counts(settings.split)
        rows = metrics.Rows(settings.num_samples, extractor.num_classes, home)

        def load() -> tuple[nn.Module, RunConfig]:
            generator, recipe = snapshots.load(task.folder, self.device)
            self._check_fit(recipe, str(task.folder))
            return generator, self.config.model_copy(
                update={
                    "model": recipe.model,  # of the stage, where it grows
                    "evaluation": settings.model_copy(update={"truncation": truncation}),
                }
            )

        generator, recipe = on_all_ranks(self.world, load)
        if truncation is not None:
            sampling.accumulate_statistics(
                generator, recipe, counts, task.images_seen, self.world, self.device
            )

        def own_part() -> moments.Moments:
            total = moments.empty(extractor.dim, home)
            for start, images in sampling.generate(
                generator, recipe, counts, self.world, self.device
            ):
                sampled, logits = extractor(repeated(images, self.manifest.resolution))
                rows.fill(start, logits.to(home))
                total = moments.merge(total, moments.of(sampled))
            return total

        total = moments.all_reduce(self.world, on_all_ranks(self.world, own_part))
        logits = rows.gather(self.world)

        def numbers() -> Record:
            distance = metrics.frechet_distance(total, self.reference)
            score = metrics.classifier_score(logits, settings.splits)
            return Record(
                images_seen=task.images_seen,
                metrics={extractor.distance_key: distance, extractor.score_key: score.mean},
                protocol={**self.protocol(truncation), "generator_sha256": task.sha256},
                score_std=score.std,
                seconds=time.perf_counter() - started,
            )

        return on_rank_0(self.world, numbers)

    def measure_unless_replaced(self, task: Task, truncation: float | None) -> Record | None:
        """The record, or None if the trainer, resumed, wrote the snapshot again meanwhile."""
        try:
            record: Record | None = self.measure(task, truncation)
        except UserError:
            if on_rank_0(self.world, task.is_current):
                raise
            return None
        return record if on_rank_0(self.world, task.is_current) else None

    def remarks(self, *truncations: float | None) -> list[str]:
        """What a reader of the numbers, at these truncations, has to know; said once."""
        settings, said = self.config.evaluation, []
        if self.extractor.name != features.INCEPTION:
            said.append(
                f"fd, cs: Frechet distance and classifier score of {self.extractor.name}, "
                "not comparable with FID and IS"
            )
        smallest = min(settings.num_samples, self.reference.num)
        if self.extractor.name == features.INCEPTION and smallest < SMALL:
            said.append(f"FID of {smallest} images is biased upwards; papers use 50000")
        micro = self.config.train.micro_batch
        if self.normalises and any(truncations) and micro and not settings.standing_batch:
            said.append(
                f"BatchNorm statistics of truncated latents are of {micro} images at a time, a "
                f"snapshot's of {micro} x the processes that trained it; set "
                "evaluation.standing_batch to that"
            )
        return said

    def _check_fit(self, recipe: RunConfig, where: str) -> None:
        """The generator must make images like the reference's, of the classes it has."""
        grown = self.config.growth is not None  # and its snapshots are of lower resolutions, too
        for _, key, wanted, found in misfits(recipe.model, self.manifest):
            if grown and key == "resolution" and wanted < found:
                continue
            raise UserError(
                f"{where}: model.{key} = {wanted}, but the reference images in "
                f"{self.manifest.folder} have {found}; evaluate with the data the model was made "
                "for (data.path)"
            )
