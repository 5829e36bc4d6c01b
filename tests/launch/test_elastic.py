"""A run resumed under another engine, on another world size, continues with the same losses."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import ROOT, SMOKE, launch

from bigan import checkpoint
from bigan.reporting.metrics_log import read_metrics

EVERY, TOTAL = 200, 800  # images, between two checkpoints and in all
STEPS = 10  # compared after the change, of 40 images each
LOSSES = ("train/discriminator/loss", "train/generator/loss")
pytestmark = pytest.mark.full
FILES = {  # engine -> launch file; two processes, except for single
    "single": "gpu.yaml",
    "ddp": "cpu.yaml",
    "fsdp": "fsdp.yaml",
    "zero1": "zero1.yaml",
    "zero2": "zero2.yaml",
    "zero1_offload": "zero1-offload.yaml",
}
Ran = Callable[..., Path]


@pytest.fixture(scope="module")
def ran(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """`ran("ddp", "fsdp")`: the folder of a run that DDP began and FSDP2 resumed.

    Each engine but the last trains `EVERY` images of it; its own run continues elsewhere.
    """

    @functools.cache
    def run_under(*engines: str) -> Path:
        *former, engine = engines
        run = tmp_path_factory.mktemp("-".join(engines)) / "run"
        if former:
            seen = str(EVERY * len(former))
            shutil.copytree(run_under(*former) / "checkpoints" / seen, run / "checkpoints" / seen)
            shutil.copy(run_under(*former) / "config.yaml", run)
        overrides = [f"data.path={digits}", f"run_dir={run}", f"train.total_images={TOTAL}"]
        overrides += ["train.tick_images=40", f"train.checkpoint_images={EVERY}"]
        overrides += ["train.checkpoint_keep=9", f"train.snapshot_images={TOTAL}"]
        options = ["--config_file", ROOT / "launch" / FILES[engine]]
        done = launch(SMOKE, *overrides, options=options)
        assert done.returncode == 0, done.stderr[-3000:]
        return run

    return run_under


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "engines",
    [
        ("ddp", "single"),
        *(
            pytest.param(engines, marks=pytest.mark.slow)
            for engines in (
                ("ddp", "fsdp"),
                ("ddp", "zero1"),  # its shards are tested in test_engines.py
                ("ddp", "fsdp", "single"),
                ("ddp", "zero2"),
                ("ddp", "zero1_offload"),
                ("ddp", "fsdp", "ddp"),
                ("ddp", "zero1", "ddp"),
                ("ddp", "zero1", "single"),
                ("ddp", "zero1_offload", "fsdp"),
                ("ddp", "single", "zero2"),
            )
        ),
    ],
    ids=" -> ".join,
)
def test_losses_continue_as_under_the_former_engine(engines: tuple[str, ...], ran: Ran) -> None:
    """Compared with the run that stayed; rounding grows with the steps, to about 1e-5 here."""
    run, reference = ran(*engines), ran(*engines[:-1])
    changed = EVERY * (len(engines) - 1)
    expected = {row["images_seen"]: row for row in read_metrics(reference)}
    losses = [row for row in read_metrics(run) if LOSSES[0] in row][:STEPS]
    assert [row["images_seen"] for row in losses] == [
        changed + 40 * step for step in range(1, STEPS + 1)
    ]
    for row in losses:
        for name in LOSSES:
            assert row[name] == pytest.approx(expected[row["images_seen"]][name], abs=1e-4)
    progress = checkpoint.read_progress(run / "checkpoints" / str(TOTAL))
    assert progress.attempt == len(engines)
