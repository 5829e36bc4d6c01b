"""The jobs of a run: `<run_dir>/slurm/jobs.jsonl`, one JSON object per submitted job.

{"job": "7", "kind": "train" | "evaluate" | "sweep", "link": 1, "links": 1,
 "script": "slurm/001/train.sbatch", "command": [argv of sbatch], "submitted": ISO 8601 in UTC,
 "nodes": 2, "gpus": 8 (per node), "code": {"version", "commit", "dirty", "hash"}}
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigan.run_folder import RunFolder


def append(run_dir: Path, job: Mapping[str, Any]) -> None:
    """Append a job; several processes may do so at once. Raises OSError."""
    line = json.dumps(job, ensure_ascii=True).encode() + b"\n"
    descriptor = os.open(RunFolder(run_dir).jobs, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, line)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(run_dir: Path) -> list[dict[str, Any]]:
    """The jobs of a run, oldest first; lines that are not complete are left out."""
    found = []
    try:
        lines = RunFolder(run_dir).jobs.read_bytes().splitlines()
    except OSError:
        return []
    for line in lines:
        with contextlib.suppress(ValueError):
            job = json.loads(line)
            if isinstance(job, dict) and isinstance(job.get("job"), str):
                found.append(job)
    return found
