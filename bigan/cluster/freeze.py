"""The code and the config of a job, frozen in the run folder when it is submitted.

<run_dir>/slurm/code/<hash>/bigan/          a copy of the package; <hash> is that of its contents
                           /revision.json   {"version", "commit", "dirty"} (reporting/tracker.py)
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bigan
from bigan import atomic_files, hashes
from bigan import config as configs
from bigan.config import CREDENTIALS, ConfigError
from bigan.reporting.tracker import REVISION, revision
from bigan.run_config import RunConfig

PACKAGE = Path(bigan.__file__).parent


@dataclass(frozen=True)
class Code:
    """The package that a job runs: its version, its commit, and the hash of its files."""

    version: str
    commit: str | None  # None: not tracked by git
    dirty: bool | None
    hash: str

    def folder(self, slurm: Path) -> Path:
        """The folder for PYTHONPATH in `<run_dir>/slurm`."""
        return slurm / "code" / self.hash

    def as_dict(self) -> dict[str, Any]:
        """As JSON values, for jobs.jsonl."""
        return asdict(self)


def frozen_config(config: RunConfig) -> str:
    """The YAML text of a resolved config.

    Raises `ConfigError` for an address with credentials, which no file of a run may contain.
    """
    text = configs.dump(config)
    if text != configs.dump(config, CREDENTIALS):
        key = "data.path" if len(config.streams) == 1 else "data.<stream>.path"
        raise ConfigError(
            f"{key}: has credentials or the values of a query, which are not stored in a run "
            "folder, so that the job would lack them; use ~/.netrc or the variables of the store "
            '(docs/data.md, "URLs and credentials")'
        )
    return text


def current_code() -> Code:
    """The package of this process."""
    files = {str(path.relative_to(PACKAGE)): hashes.sha256_of_file(path) for path in _files()}
    known = revision(PACKAGE / "__init__.py") or {"commit": None, "dirty": None}
    return Code(
        version=bigan.__version__,
        commit=known["commit"],
        dirty=known["dirty"],
        hash=hashes.fingerprint(files)[:16],
    )


def freeze_code(code: Code, slurm: Path) -> Path:
    """Copy the package to `<run_dir>/slurm/code/<hash>`, unless it is there; returns that folder.

    Raises OSError. Several processes may do so at once.
    """
    folder = code.folder(slurm)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    atomic_files.remove_leftovers(folder.parent, shared=True)
    staging = atomic_files.temporary_name(folder)
    try:
        for path in _files():
            copy = staging / PACKAGE.name / path.relative_to(PACKAGE)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        known = {"version": code.version, "commit": code.commit, "dirty": code.dirty}
        (staging / REVISION).write_text(json.dumps(known) + "\n")
        try:
            staging.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def _files() -> Iterator[Path]:
    for path in sorted(PACKAGE.rglob("*")):
        if path.is_file() and path.suffix != ".pyc" and not path.name.endswith((".tmp", "~")):
            yield path
