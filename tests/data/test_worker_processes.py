"""No worker processes and no shared memory: /dev/shm may be small, as in Docker."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import webdataset
from commands import ROOT, SMOKE, environment
from torch.utils.data import DataLoader, Dataset

from bigan.data import DataError
from bigan.data.packing.sources import open_source

NUM, SIZE = 6, 64


class Images(Dataset):
    """(image of the number i, its label, the process that read it as the key's beginning)."""

    def __len__(self) -> int:
        return NUM

    def __getitem__(self, i: int) -> dict[str, object]:
        image = torch.full((SIZE, SIZE, 3), i, dtype=torch.uint8)
        return {"image": image, "label": i % 2, "key": f"{os.getpid()}/{i}"}


@pytest.mark.parametrize("loader", [DataLoader, webdataset.WebLoader])
def test_loaders_are_read_in_this_process(tmp_path: Path, loader: type) -> None:
    items = loader(Images(), batch_size=None, num_workers=2, timeout=60)
    source = open_source(items, resolution=8, scratch=tmp_path / "raw")
    assert source.keys == tuple(f"{os.getpid()}/{i}" for i in range(NUM))
    assert [int(image[0, 0, 0]) for _, _, image in source] == [*range(NUM)]
    assert getattr(items, "num_workers", 2) == 2  # the loader of the caller is unchanged


def test_a_loader_of_batches_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="batch_size=None"):
        open_source(DataLoader(Images()), resolution=8, scratch=tmp_path / "raw")


def can_mount() -> bool:
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "-o", "size=64k", "none", "/dev/shm"]
    return (
        bool(shutil.which("unshare"))
        and not subprocess.run(command, capture_output=True).returncode
    )


@pytest.mark.full
@pytest.mark.skipif(not can_mount(), reason="cannot mount a tmpfs")
def test_a_small_dev_shm(digits: Path, tmp_path: Path) -> None:
    """Packing from a loader with workers, and training in the modes that read existing shards."""
    script = f"""
from pathlib import Path
from torch.utils.data import DataLoader
from test_worker_processes import Images
from bigan import load_config, train
from bigan.data.packing.pack import pack
loader = DataLoader(Images(), batch_size=None, num_workers=2)
assert pack(loader, Path({str(tmp_path / "packed")!r}), resolution=8).complete
for mode in ("random_access", "resampled"):
    run = {str(tmp_path)!r} + "/" + mode
    settings = [f"data.mode={{mode}}", f"run_dir={{run}}", "train.total_images=80"]
    assert train(load_config({str(SMOKE)!r}, [{f"data.path={digits}"!r}, *settings])) == 0
"""
    mount = 'mount -t tmpfs -o size=64k none /dev/shm && exec "$@"'
    command = ["unshare", "-m", "bash", "-c", mount, "bash", sys.executable, "-c", script]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", Path(__file__).parent)))
    done = subprocess.run(
        command,
        env={**environment(), "PYTHONPATH": paths},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
