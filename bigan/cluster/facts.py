"""The state of training as the files of a run folder show it, without reading anything large.

Every file may be missing, damaged or half written; what cannot be read is None or empty.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from bigan import atomic_files
from bigan.reporting import metrics_log
from bigan.run.lock import Owner
from bigan.run_folder import RunFolder

_RATE, _ATTEMPT = "train/images_per_second", "train/attempt"


@dataclass(frozen=True)
class Facts:
    """What the files of a run show. Times are unix times."""

    total_images: int | None = None  # of train.total_images
    images_seen: int = 0  # of the last tick, or of the newest checkpoint
    checkpoint: int = 0  # images_seen of the newest complete checkpoint, 0 if there is none
    tick_time: float | None = None  # of the last line of the trainer in metrics.jsonl
    images_per_second: float | None = None  # at the last tick
    attempt: int = 0  # of the last tick: 1 + number of resumes
    train: Mapping[str, float] = field(default_factory=dict)  # last values of train/<key>
    evaluation: Mapping[str, float] = field(default_factory=dict)  # last values of eval/<key>
    evaluated: int = 0  # images_seen of `evaluation`
    done: bool = False
    stop: str | None = None  # content of STOP, "" for a user's; None if there is none
    begun: float | None = None  # when the newest attempt had passed its checks
    owner: Owner | None = None  # of the LOCK
    beat_seconds: float = 0.0  # since the heartbeat of the LOCK
    lives: bool = False  # whether the owner of the LOCK still trains

    @property
    def job(self) -> str | None:
        """The job of the owner of the LOCK."""
        names = self.owner.attempts if self.owner else {}
        found = (name for name in names if name.startswith("SLURM job "))
        return next((name.removeprefix("SLURM job ") for name in found), None)


def read_facts(run_dir: Path) -> Facts:
    """The facts of a run folder, which may be damaged or be deleted meanwhile."""
    folder = RunFolder(run_dir)
    records = metrics_log.read_tail(run_dir)
    ticks = [record for record in records if _RATE in record or _ATTEMPT in record]
    last = ticks[-1] if ticks else {}
    try:
        saved = [int(path.name) for path in atomic_files.numbered_folders(folder.checkpoints)]
    except OSError:
        saved = []
    evaluated, evaluation = _evaluation(folder, records)
    stop = _text(folder.stop)
    owner, beat, lives = _lock(folder.lock)
    return Facts(
        total_images=_total_images(folder),
        images_seen=last.get("images_seen", saved[-1] if saved else 0),
        checkpoint=saved[-1] if saved else 0,
        tick_time=_number(last.get("time")),
        images_per_second=_number(last.get(_RATE)),
        attempt=int(_number(last.get(_ATTEMPT)) or 0),
        train=_values(last, "train/"),
        evaluation=evaluation,
        evaluated=evaluated,
        done=folder.done.exists(),
        stop=None if stop is None else stop.strip(),
        begun=_mtime(folder.environment),
        owner=owner,
        beat_seconds=beat,
        lives=lives,
    )


def _read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file; {} if it cannot be read."""
    try:
        found = json.loads(_text(path) or "")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _read_yaml(path: Path) -> dict[str, Any]:
    """The mapping of a YAML file; {} if it cannot be read."""
    try:
        found = yaml.load(_text(path) or "", Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _total_images(folder: RunFolder) -> int | None:
    """From config.yaml, or before the first attempt from the newest config that was submitted."""
    submitted = sorted(folder.slurm.glob("[0-9]*/config.yaml"), reverse=True)
    for path in (folder.config, *submitted[:1]):
        train = _read_yaml(path).get("train")
        total = _number(train.get("total_images")) if isinstance(train, dict) else None
        if total:
            return int(total)
    return None


def _evaluation(
    folder: RunFolder, records: list[dict[str, Any]]
) -> tuple[int, Mapping[str, float]]:
    """(images_seen, metrics) of the newest measured snapshot; (0, {}) if there is none."""
    numbers = [int(p.stem) for p in folder.evaluation.glob("*.json") if p.stem.isdecimal()]
    for number in sorted(numbers, reverse=True)[:2]:  # the newest may be damaged
        found = _values(_read_json(folder.evaluation / f"{number}.json").get("metrics"), "")
        if found:
            return number, found
    measured = [record for record in records if _values(record, "eval/")]
    if not measured:
        return 0, {}
    last = max(measured, key=lambda record: int(record["images_seen"]))
    return last["images_seen"], _values(last, "eval/")


def _lock(path: Path) -> tuple[Owner | None, float, bool]:
    """(owner of the LOCK, seconds since its heartbeat, whether it still trains)."""
    try:
        with path.open("rb") as file:  # opening it makes NFS read the time from the server
            owner = Owner.read(file.read(1 << 16))
        beat = max(0.0, time.time() - path.stat().st_mtime)
        return owner, beat, owner is not None and owner.lives(None, beat)
    except OSError:
        return None, 0.0, False


def _values(record: Any, prefix: str) -> dict[str, float]:
    """The numbers of a record under keys with `prefix`, which is removed."""
    if not isinstance(record, dict):
        return {}
    return {
        key.removeprefix(prefix): float(value)
        for key, value in record.items()
        if isinstance(key, str) and key.startswith(prefix) and _number(value) is not None
    }


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _text(path: Path) -> str | None:
    """The beginning of a text file; None if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(1 << 22).decode("utf-8", errors="replace")
    except OSError:
        return None


def _mtime(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None
