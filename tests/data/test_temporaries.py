"""Temporary names of atomic writes, and their removal."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from bigan import atomic_files
from bigan.data.packing.pack import pack


def test_only_abandoned_temporaries_are_removed(tmp_path: Path) -> None:
    """Other processes may write into the same folder, here or on another host."""
    own = atomic_files.temporary_name(tmp_path / "x.tar")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    dead = own.with_name(own.name.replace(f"-{os.getpid()}.", f"-{gone.pid}."))
    dead_folder = dead.with_name(f".spool{dead.name}")
    elsewhere = tmp_path / ".x.tar.0123-4567-1.tmp"
    old = tmp_path / ".y.tar.0123-4567-1.tmp"
    for path in (own, dead, elsewhere, old):
        path.write_bytes(b"half")
    dead_folder.mkdir()
    long_ago = time.time() - atomic_files.ABANDONED_SECONDS - 60
    os.utime(old, (long_ago, long_ago))
    pack("digits", tmp_path, resolution=8)
    left = {path.name for path in tmp_path.iterdir() if path.name.startswith(".")}
    assert left == {own.name, elsewhere.name}
    atomic_files.remove_leftovers(tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_temporary_names_are_unique(tmp_path: Path) -> None:
    names = {atomic_files.temporary_name(tmp_path / "x") for _ in range(100)}
    assert len(names) == 100
