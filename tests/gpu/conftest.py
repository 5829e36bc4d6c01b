"""These tests need a CUDA device; they are collected everywhere and run where there is one."""

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():  # unlike a package, it cannot be installed
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
