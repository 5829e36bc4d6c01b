"""What all benchmarks share: synthetic images, summaries, and what the figures depend on."""

from __future__ import annotations

import itertools
import os
import platform
import resource
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from bigan.data.streaming.stream import Batch
from bigan.reporting.tracker import cpu_name
from bigan.run_config import RunConfig


def synthetic_images(
    config: RunConfig, accumulation: int, device: torch.device, ranks: int = 1
) -> Iterator[Batch]:
    """An endless stream of one process's random micro-batch, already on the device."""
    num, model = config.train.batch // accumulation // ranks, config.model
    shape = (num, model.resolution, model.resolution, model.image_channels)
    generator = torch.Generator().manual_seed(0)
    real = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, model.num_classes, (num,), generator=generator)
    return itertools.repeat(Batch(real.to(device), labels.to(device), np.arange(num)))


def hardware() -> dict[str, Any]:
    """What the figures depend on."""
    cuda = torch.cuda.is_available()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if cuda else cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def summary(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: of the allocator's on CUDA, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
