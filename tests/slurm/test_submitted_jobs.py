"""`bigan submit` on a real SLURM."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from commands import SMOKE
from slurm.minislurm import Cluster

from bigan.cluster import jobs

pytestmark = pytest.mark.full


def submit(cluster: Cluster, *arguments: object) -> str:
    return cluster.run(sys.executable, "-m", "bigan", "submit", SMOKE, *arguments)


def test_test_only_reports_what_slurm_would_do(cluster: Cluster, tmp_path: Path) -> None:
    run = f"run_dir={tmp_path / 'run'}"
    assert "to start at" in submit(cluster, run, "--nodes", 2, "--time", 10, "--test-only")
    with pytest.raises(AssertionError, match="not available"):
        submit(cluster, run, "--nodes", 4, "--time", 10, "--test-only")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_submitted_job_is_the_recorded_one(cluster: Cluster, digits: Path, tmp_path: Path) -> None:
    """In a run folder whose name has spaces, quotes, %j and $(...)."""
    run = tmp_path / 'it\'s a "run" %j $(touch executed) ü'
    quoted = str(run).replace('"', '\\"')
    output = submit(cluster, f'run_dir="{quoted}"', f"data.path={digits}", "--time", 10)
    (job,) = jobs.read(run)
    assert f"job {job['job']} submitted" in output
    shown = cluster.run("scontrol", "show", "job", job["job"])
    assert f"Command={run / job['script']}\n" in shown
    assert f"WorkDir={Path.cwd()}\n" in shown
    assert "JobName=it-s-a-run-j-touch-executed" in shown
    assert "Requeue=1" in shown
    log = run / "slurm" / "logs" / f"{job['job']}.log"
    state = cluster.wait(int(job["job"]), timeout=180)
    assert state == "COMPLETED", log.read_text()
    assert log.exists()
    assert not list(tmp_path.rglob("executed"))
    assert not Path("executed").exists()
