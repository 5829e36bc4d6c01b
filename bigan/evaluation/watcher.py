"""Takes each new snapshot of a run, measures its generator and writes the numbers down.

    <run_dir>/evaluation/<images_seen>.json   metrics and the full protocol they were measured by
    <run_dir>/metrics.jsonl, MLflow           the metrics as `eval/...`, through `tracking`

A separate job on any number of ranks: it meets the trainer only in the run folder. A snapshot is
done when its json carries the fingerprint of the protocol asked for now, so the same command again
measures nothing twice and a changed protocol measures everything anew.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bigan import config as configs
from bigan import files, snapshot
from bigan.curves import curves
from bigan.data.dataset import open_level
from bigan.errors import UserError
from bigan.evaluation import features, metrics, moments, reference, sampling
from bigan.recipe import RunConfig, misfits
from bigan.tracking import Tracker
from bigan.world import World, on_main, together

FOLDER = "evaluation"
SMALL = 10_000  # fewer images than this bias a 2048-dimensional FID visibly upwards


def evaluate(
    run_dir: Path,
    world: World,
    *,
    overrides: Sequence[str] = (),
    watch: bool,
    device: torch.device | str | None = None,
    poll_seconds: float = 2.0,
    echo: Callable[[str], None],
) -> None:
    """Measure every complete snapshot of `run_dir` not yet measured, oldest first.

    All ranks call it. With `watch` it waits for the run folder and for new snapshots, and returns
    once `DONE` is there and every snapshot is measured. `echo` gets one line per snapshot, on
    rank 0. `device` defaults to the world's. `overrides` ("a.b=value") change the run's own recipe
    for this evaluation.

    Raises `UserError`: no run folder or no snapshot (without `watch`), missing or wrong extractor
    weights, a data folder that is missing, damaged or does not fit the model.
    """
    run_dir = Path(run_dir)
    config = _run_config(run_dir, overrides, world, watch, poll_seconds, echo)
    judge = Judge(run_dir, config, world, torch.device(device or world.device))
    ledger = _Ledger(run_dir, judge.protocol)
    tracker = Tracker(run_dir, config.tracking, role="evaluation") if world.is_main else None
    try:
        for line in on_main(world, lambda: judge.remarks() + ledger.lines()):
            if world.is_main:
                echo(line)
        num_measured = 0
        while True:
            task, finished = on_main(world, ledger.next_task)
            if task is None:
                if finished or not watch:
                    break
                time.sleep(poll_seconds)
                continue
            record = _measure_unless_replaced(judge, ledger, world, task)
            if record is not None:
                num_measured += 1
                on_main(world, functools.partial(_publish, record, ledger, tracker, echo))
        if world.is_main and not num_measured:
            echo(f"{run_dir}: every snapshot is already evaluated under this protocol")
    finally:
        note = tracker.close(None) if tracker is not None else None
        if note:
            echo(note)


@dataclass(frozen=True)
class Task:
    """A snapshot to measure: hash, time (ns) and size (bytes) of its weights file."""

    folder: Path
    sha256: str
    stamp: tuple[int, int]


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
        self.manifest = on_main(
            world, lambda: open_level(config.data.path, config.model.resolution, config.data)
        )
        self._check_fit(config, "config.yaml")
        self.extractor = together(
            world, lambda: features.create(settings.extractor, settings.weights_path, device)
        )
        self.protocol: dict[str, object] = {
            **reference.describe(self.extractor, self.manifest, settings.split),
            "num_samples": settings.num_samples,
            "batch": settings.batch,
            "seed": settings.seed,
            "truncation": settings.truncation,
            "label_law": f"class counts of split {settings.split}",
            "quantisation": sampling.QUANTISATION,
            "splits": settings.splits if settings.num_samples >= metrics.SPLITS_FROM else 1,
            "generator": "averaged weights, standing batch statistics",
        }
        if config.growth:
            self.protocol["enlarged"] = "lower resolutions by repeating pixels"
        self.reference = reference.load_or_compute(
            self.extractor,
            self.manifest,
            settings.split,
            world,
            settings.batch,
            run_dir / FOLDER,
            config.data,
        )

    def measure(self, task: Task) -> Record:
        """Sample the snapshot's generator and compare; the same record on every rank."""
        started = time.perf_counter()
        settings, extractor = self.config.evaluation, self.extractor
        home = moments.home(self.device)
        rows = metrics.Rows(settings.num_samples, extractor.num_classes, home)

        def own_part() -> moments.Moments:
            generator, recipe = snapshot.load(task.folder, self.device)
            self._check_fit(recipe, str(task.folder))
            recipe = recipe.model_copy(update={"evaluation": settings})
            counts = self.manifest.class_counts(settings.split)
            total = moments.empty(extractor.dim, home)
            for start, images in sampling.generate(
                generator, recipe, counts, self.world, self.device
            ):
                sampled, logits = extractor(self._as_reference(images))
                rows.fill(start, logits.to(home))
                total = moments.merge(total, moments.of(sampled))
            return total

        total = moments.all_reduce(self.world, together(self.world, own_part))
        logits = rows.gather(self.world)

        def numbers() -> Record:
            distance = metrics.frechet_distance(total, self.reference)
            score = metrics.classifier_score(logits, settings.splits)
            return Record(
                images_seen=int(task.folder.name),
                metrics={extractor.distance_key: distance, extractor.score_key: score.mean},
                protocol={**self.protocol, "generator_sha256": task.sha256},
                score_std=score.std,
                seconds=time.perf_counter() - started,
            )

        return on_main(self.world, numbers)

    def remarks(self) -> list[str]:
        """What a reader of the numbers has to know, said once."""
        if self.extractor.name != features.INCEPTION:
            return [
                f"fd, cs: Frechet distance and classifier score of {self.extractor.name}, "
                "not comparable with FID and IS"
            ]
        smallest = min(self.config.evaluation.num_samples, self.reference.num)
        if smallest < SMALL:
            return [f"FID of {smallest} images is biased upwards; papers use 50000"]
        return []

    def _as_reference(self, images: torch.Tensor) -> torch.Tensor:
        """Images of a stage of growth at the reference's size: every pixel repeated."""
        repeats = self.manifest.resolution // images.shape[-1]
        if repeats == 1:
            return images
        return images.repeat_interleave(repeats, 2).repeat_interleave(repeats, 3)

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


@dataclass
class _Ledger:
    """Rank 0's view of what is done and what is to do."""

    run_dir: Path
    protocol: dict[str, object]
    _tasks: dict[Path, Task] = field(default_factory=dict)

    def next_task(self) -> tuple[Task | None, bool]:
        """(oldest snapshot not yet measured or None, whether the run has ended).

        `DONE` is looked at before the snapshots: one written in between is then never missed.
        """
        finished = (self.run_dir / snapshot.DONE).exists()
        for folder in snapshot.find(self.run_dir):
            try:
                task = self._task(folder)
            except FileNotFoundError:  # being replaced by a resumed run: seen at the next look
                finished = False
                continue
            if not self._is_measured(task):
                return task, finished
        return None, finished

    def lines(self) -> list[str]:
        """What was measured before under this protocol, for the reader who comes back."""
        said = []
        for folder in snapshot.find(self.run_dir):
            # One that is being replaced, or whose json was edited, is measured again below.
            with contextlib.suppress(FileNotFoundError, KeyError):
                if self._is_measured(self._task(folder)):
                    r = json.loads(self._path(int(folder.name)).read_text(encoding="utf-8"))
                    said.append(_line(r["images_seen"], r["metrics"], r["protocol"], r["seconds"]))
        return said

    def is_current(self, task: Task) -> bool:
        """Whether the snapshot is still the one the task was made of."""
        try:
            return _stamp(task.folder / "weights.safetensors") == task.stamp
        except FileNotFoundError:
            return False

    def write(self, record: Record) -> None:
        """Write `<images_seen>.json`, whole or not at all; `UserError` if it cannot be written."""
        content = {
            "images_seen": record.images_seen,
            "metrics": record.metrics,
            "score_std": record.score_std,
            "seconds": round(record.seconds, 3),
            "fingerprint": reference.fingerprint(record.protocol),
            "protocol": record.protocol,
            "versions": _versions(),
        }
        path = self._path(record.images_seen)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_atomic(path, json.dumps(content, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None

    def _is_measured(self, task: Task) -> bool:
        try:
            content = json.loads(self._path(int(task.folder.name)).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        wanted = reference.fingerprint({**self.protocol, "generator_sha256": task.sha256})
        return isinstance(content, dict) and content.get("fingerprint") == wanted

    def _path(self, images_seen: int) -> Path:
        return self.run_dir / FOLDER / f"{images_seen}.json"

    def _task(self, folder: Path) -> Task:
        """The task of a snapshot; its file is read again only if its time or size has changed."""
        path = folder / "weights.safetensors"
        stamp = _stamp(path)
        known = self._tasks.get(folder)
        if known is None or known.stamp != stamp:
            with path.open("rb") as file:
                known = Task(folder, hashlib.file_digest(file, "sha256").hexdigest(), stamp)
            self._tasks[folder] = known
        return known


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def _measure_unless_replaced(
    judge: Judge, ledger: _Ledger, world: World, task: Task
) -> Record | None:
    """The record of `task`, or None if the trainer, resumed, wrote the snapshot again meanwhile."""
    try:
        record: Record | None = judge.measure(task)
    except UserError:
        if on_main(world, lambda: ledger.is_current(task)):
            raise
        return None
    return record if on_main(world, lambda: ledger.is_current(task)) else None


def _publish(
    record: Record, ledger: _Ledger, tracker: Tracker | None, echo: Callable[[str], None]
) -> None:
    """Rank 0: say it, log it, and last of all mark it as done."""
    echo(_line(record.images_seen, record.metrics, record.protocol, record.seconds))
    if tracker is not None:
        logged = {f"eval/{key}": value for key, value in record.metrics.items()}
        tracker.log(record.images_seen, logged)
    ledger.write(record)
    curves(ledger.run_dir, ledger.run_dir / "curves.png")


def _run_config(
    run_dir: Path,
    overrides: Sequence[str],
    world: World,
    watch: bool,
    poll_seconds: float,
    echo: Callable[[str], None],
) -> RunConfig:
    """The recipe of the run, waited for if `watch`: its config.yaml."""
    path = run_dir / "config.yaml"

    def look() -> RunConfig | None:
        if path.is_file() and (watch or snapshot.find(run_dir)):
            return configs.load(RunConfig, path, overrides)
        if watch:
            return None
        if not run_dir.is_dir():
            raise UserError(f"{run_dir}: no such run folder; give the run_dir of a training run")
        if not path.is_file():
            raise UserError(f"{run_dir}: not a run folder (no config.yaml in it)")
        raise UserError(
            f"{run_dir}: holds no complete snapshot yet; train longer (train.snapshot_images says "
            "how often one is written) or wait for it with --watch"
        )

    waiting = False
    while (config := on_main(world, look)) is None:
        if world.is_main and not waiting:
            echo(f"waiting for {path}")
        waiting = True
        time.sleep(poll_seconds)
    return config


def _line(
    images_seen: int, values: dict[str, float], protocol: dict[str, object], seconds: float
) -> str:
    (distance_key, distance), (score_key, score) = values.items()
    return (
        f"images_seen {images_seen}  {distance_key} {distance:.3f}  {score_key} {score:.2f}"
        f"  ({protocol['num_samples']} samples, {seconds:.1f} s)"
    )


def _versions() -> dict[str, str]:
    names = ("bigan", "torch", "torch-fidelity", "numpy")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a source tree
            found[name] = "unknown"
    return found
