"""Versions and hardware of records."""

from __future__ import annotations

import os
import platform

import torch

from bigan import versions


def test_only_installed_packages_are_listed() -> None:
    found = versions.versions(["numpy", "torch", "no-such-package"])
    assert set(found) == {"python", "numpy", "torch"}
    assert found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__
    assert versions.version("no-such-package") == versions.NOT_INSTALLED


def test_hardware_counts_the_cores_of_this_process() -> None:
    found = versions.hardware()
    assert found["num_cpus"] == len(os.sched_getaffinity(0))
    assert found["cpu"] == versions.cpu_name() != ""
    assert len(found["gpus"]) == torch.cuda.device_count()
