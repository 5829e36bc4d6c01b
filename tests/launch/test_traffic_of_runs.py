"""Bytes that runs with 1, 2, 4 and 8 processes fetch from a server, and their prediction."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import ROOT, SMOKE, launch, run_bigan
from web import serving

from bigan.run.traffic import open_source
from bigan.run_config import load_config

TOTAL = 1120  # images: into the last block of the first epoch (1,297 images)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_bytes_of_a_run_are_predicted_and_do_not_grow(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unchanged config: at most one block of the next epoch is read ahead."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    with serving(digits) as web:
        overrides = [f"data.path={web.url}", "data.block=400", f"train.total_images={TOTAL}"]
        source = open_source(load_config(SMOKE, overrides), "images")
        fetched = {}
        for size in (1, 2, 4, 8):
            web.bytes.clear()
            arguments = [SMOKE, *overrides, f"run_dir={tmp_path / str(size)}"]
            options = ["--config_file", ROOT / "launch" / "cpu.yaml", "--num_processes", str(size)]
            done = (
                run_bigan("train", *arguments, timeout=600)
                if size == 1
                else launch(*arguments, options=options, timeout=600)
            )
            assert done.returncode == 0, done.stderr[-3000:]
            fetched[size] = sum(num for name, num in web.bytes.items() if name.endswith(".tar"))
            predicted = source.traffic(size, size)
            ahead = predicted.num_bytes * 400 / 1297
            assert 0.99 * predicted.num_bytes <= fetched[size] <= 1.05 * predicted.num_bytes + ahead
            assert web.requests["manifest.json"] >= 1
    assert max(fetched.values()) <= 1.05 * fetched[1]
