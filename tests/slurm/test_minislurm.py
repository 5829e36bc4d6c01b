"""The cluster of the tests is a real SLURM: tasks on two nodes know their ranks."""

from __future__ import annotations

import sys

import pytest
from slurm.minislurm import Cluster

pytestmark = pytest.mark.full


def test_tasks_know_their_rank_and_node(cluster: Cluster) -> None:
    names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NODEID", "SLURMD_NODENAME")
    code = f"import os; print(*(os.environ[name] for name in {names}))"
    output = cluster.run("srun", "--nodes=2", "--ntasks=2", sys.executable, "-c", code)
    assert sorted(output.splitlines()) == ["0 2 0 0 n1", "1 2 0 1 n2"]
    output = cluster.run("srun", "--nodes=1", "--ntasks=2", sys.executable, "-c", code)
    assert [line.split()[:4] for line in sorted(output.splitlines())] == [
        ["0", "2", "0", "0"],
        ["1", "2", "1", "0"],
    ]


def test_batch_job_runs_and_ends(cluster: Cluster) -> None:
    job = cluster.submit("#!/bin/bash\nsrun --ntasks=2 echo task\n", "echo", ("--ntasks=2",))
    assert cluster.wait(job, timeout=60) == "COMPLETED"
    assert cluster.output("echo").read_text().split() == ["task", "task"]
