"""Assertions about data folders and error messages."""

from __future__ import annotations

from pathlib import Path

import pytest

from bigan.data import DataError


def one_line(error: pytest.ExceptionInfo[DataError], *parts: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    assert all(part in text for part in parts), text


def tree(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
