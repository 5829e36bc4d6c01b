"""`bigan status`, `logs` and `cancel` show and end the jobs of a real SLURM."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from slurm.minislurm import Cluster

from bigan.cli.main import main
from bigan.cluster.run_status import Status
from bigan.cluster.status import survey

pytestmark = pytest.mark.full

# What job.sh writes, without a trainer.
SCRIPT = """#!/bin/bash
run={run} job=$SLURM_JOB_ID restart=${{SLURM_RESTART_COUNT:-0}}
record() {{
    printf '%s\\t%s\\ttrain\\t%s\\t%s\\t0\\t%s\\n' "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$1" "$job" \\
        "$restart" "$2" >>"$run/slurm/attempts.tsv"
}}
mkdir -p "$run/slurm/logs/$job-$restart"
record started n1
echo "attempt $restart"
{body}
"""
TRAINS = """printf 'train: {total_images: 48000}\\n' >"$run/config.yaml"
echo '{}' >"$run/environment.json"
rm -f "$run/STOP"
echo '{"images_seen": 8, "time": '"$(date +%s.%N)"', "train/attempt": 1}' >>"$run/metrics.jsonl"
until [ -e "$run/STOP" ]; do sleep 0.1; done
record stopped STOP
"""
# A trainer that is still starting when it is cancelled, and a script that then wants to continue.
STARTS = """trap 'scontrol requeue "$job"; sleep 5; exit 1' TERM
sleep 60 &
wait
"""
BODIES = {
    "trains": TRAINS,
    "starts": STARTS,
    "fails": 'record failed "a.yaml: train.batch = 30: use 28"\nexit 1\n',
    "completes": 'touch "$run/DONE"\nrecord completed\n',
    "queued": "true\n",
}


def submit(cluster: Cluster, run: Path, body: str, *options: str, link: int = 0) -> int:
    """Submit a job as `bigan submit` does."""
    script = run / "slurm" / "001" / "train.sbatch"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(SCRIPT.format(run=run, body=BODIES[body]))
    command = ["--requeue", "--open-mode=append", f"--output={run}/slurm/logs/%j.log"]
    (run / "slurm" / "logs").mkdir(exist_ok=True)
    command = ["sbatch", "--parsable", *command, *options, str(script)]
    job = cluster.run(*command).strip()
    record = {
        "job": job,
        "kind": "train",
        "link": link or 1,
        "links": 2 if link else 1,
        "script": "slurm/001/train.sbatch",
        "command": command,
        "submitted": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    with (run / "slurm" / "jobs.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    return int(job)


def status(run: Path) -> Status:
    found = survey([run])
    assert found.away is None
    only = found.found[0]
    assert isinstance(only, Status)
    return only


def wait_until(state: str, run: Path, timeout: float = 60) -> Status:
    return wait(lambda: status(run) if status(run).state == state else None, timeout)


def wait(condition: Callable[[], Any], timeout: float = 60) -> Any:
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return found


def test_status_logs_and_cancel(
    cluster: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SLURM_CONF", str(cluster.folder / "slurm.conf"))
    monkeypatch.setenv("SQUEUE_STATES", "FAILED")  # a default of the user changes nothing
    runs = {name: tmp_path / name for name in BODIES}
    jobs = {name: submit(cluster, run, name) for name, run in runs.items() if name != "queued"}
    link = submit(
        cluster, runs["trains"], "trains", f"--dependency=afterany:{jobs['trains']}", link=2
    )
    submit(cluster, runs["queued"], "queued", "--begin=now+1hour")

    # running, starting, queued, failed, complete
    running = wait_until("running", runs["trains"])
    assert running.detail.startswith("on n")
    assert running.limit_seconds_left is not None
    assert 0 < running.limit_seconds_left <= 600
    assert running.links_left == 1
    failed = wait_until("failed", runs["fails"])
    assert "train.batch = 30" in failed.detail
    wait_until("complete", runs["completes"])
    queued = status(runs["queued"])
    assert queued.state == "queued"
    assert "start time" in queued.detail
    assert queued.current is not None
    assert queued.current.queued is not None
    assert 3500 < (queued.current.queued.start or 0) - time.time() < 3700

    # requeued by somebody else, and running again
    cluster.run("scontrol", "requeue", jobs["trains"])
    wait_until("requeued", runs["trains"])
    again = wait(lambda: s if (s := status(runs["trains"])).num_attempts == 2 else None)
    assert again.state == "running"
    assert main(["logs", str(runs["trains"])]) == 0
    assert "attempt 0" in (printed := capsys.readouterr().out)
    assert "attempt 1" in printed

    # stopped: the waiting link is cancelled, the running job ends by itself
    wait(lambda: (status(runs["trains"]).facts.tick_time or 0) >= again.current.queued.start)
    assert main(["cancel", str(runs["trains"])]) == 0
    assert f"job {link} " in capsys.readouterr().out
    assert cluster.wait(jobs["trains"], timeout=60) == "COMPLETED"
    assert cluster.state(link) == "CANCELLED"
    assert status(runs["trains"]).state == "stopped"
    # a job that has nothing to save yet: cancelled, although its script wants to requeue it
    wait_until("running", runs["starts"])
    assert main(["cancel", str(runs["starts"])]) == 0
    assert cluster.wait(jobs["starts"], timeout=60) == "CANCELLED"
    assert not (runs["starts"] / "STOP").exists()
    assert main(["cancel", str(runs["queued"])]) == 0
    assert status(runs["queued"]).state == "stopped"
    assert main(["cancel", str(runs["queued"])]) == 0, "again: nothing to do"

    # without SLURM: what the run folders know
    monkeypatch.setenv("PATH", "/nowhere")
    found = survey([runs["fails"], runs["trains"], runs["queued"]])
    assert found.away is not None
    assert "squeue" in found.away
    assert [each.state for each in found.found] == ["failed", "stopped", "unknown"]
