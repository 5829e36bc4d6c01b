"""Versions of the software and names of the hardware: the one source for every record of them."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

NOT_INSTALLED = "not installed"
PACKAGES = (
    "bigan", "torch", "torchvision", "accelerate", "deepspeed", "webdataset", "torch-fidelity",
    "mlflow", "numpy", "pillow", "simplejpeg", "pydantic", "safetensors", "triton",
    "nvidia-nccl-cu12",
)  # fmt: skip


def version(package: str) -> str:
    """Version of a distribution, torch's with its build ("2.9.0+cu130"), or `NOT_INSTALLED`.

    A source tree on the path that was never installed counts as not installed.
    """
    if package == "torch":
        return str(torch.__version__)
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return NOT_INSTALLED


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Versions of Python and of those `packages` that are installed."""
    found = {name: version(name) for name in packages}
    installed = {name: text for name, text in found.items() if text != NOT_INSTALLED}
    return {"python": platform.python_version()} | installed


def hardware() -> dict[str, Any]:
    """{"cpu", "num_cpus", "gpus": [name], "cuda": version or None} of this process, JSON values."""
    return {
        "cpu": cpu_name(),
        "num_cpus": num_cpus(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
    }


def cpu_name() -> str:
    """Model name of the processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def num_cpus() -> int:
    """Cores that this process may run on: a scheduler may grant fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
