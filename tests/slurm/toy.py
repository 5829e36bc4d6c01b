"""Takes the place of `python` in tests of job.sh: a trainer without torch.

A config is JSON: {"run_dir", "total", "every", "seconds", "ends", "stages"}. A step of `seconds`
adds 10 images; there is a checkpoint each `every` images. `ends`: images -> how the trainer ends
there, once: "crash", "kill", or the text of a failure file. `stages`: seconds of the first staging.
Of a config of bigan, the run folder and the learning rate of the generator are used: the metric is
its distance from 0.003.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import yaml

STEP = 10
signals: list[int] = []


def newest(run: Path) -> int:
    return max([int(p.parent.name) for p in run.glob("checkpoints/*/COMPLETE")], default=0)


def save(run: Path, seen: int) -> None:
    folder = run / "checkpoints" / str(seen)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "COMPLETE").touch()


def log_folder() -> Path:
    folder = Path(os.environ["BIGAN_LOG_DIR"])
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def end(how: str, run: Path, seen: int) -> None:
    mark = run / f"ended-{seen}"
    if mark.exists():
        return
    mark.touch()
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how != "crash":
        (log_folder() / f"failure-{time.time_ns()}-rank-{rank()}.txt").write_text(how)
    sys.exit(1)


def rank() -> int:
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)


def settings(path: str) -> dict[str, Any]:
    config = yaml.safe_load(Path(path).read_text())
    return {"total": 40, "every": 20, "seconds": 0.05} | config


def train(arguments: list[str]) -> int:
    signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))
    config = settings(arguments[0])
    run = Path(config["run_dir"])
    with (log_folder() / f"rank-{rank()}.log").open("a") as log:
        print(f"rank {rank()} of {os.environ['SLURM_NTASKS']}:", *arguments[1:], file=log)
    if rank() != 0:
        time.sleep(config.get("rank_1", 0))
        return 0
    for name in ("STOP", "REQUEUE"):
        (run / name).unlink(missing_ok=True)
    (run / "checkpoints").mkdir(exist_ok=True)
    (run / "config.yaml").write_text(Path(arguments[0]).read_text())
    seen = newest(run)
    while seen < config["total"]:
        time.sleep(config["seconds"])
        seen += STEP
        with (run / "seen.txt").open("a") as file:
            print(seen, file=file)
        if str(seen) in config.get("ends", {}):
            end(config["ends"][str(seen)], run, seen)
        if signals or (run / "STOP").exists():
            if not config.get("hangs"):
                save(run, seen)
            if signals or not (run / "STOP").exists():
                (run / "REQUEUE").write_text("{}")
            return 128 + signal.SIGTERM
        if seen % config["every"] == 0:
            save(run, seen)
    (run / "DONE").write_text(f"{seen}\n")
    return 0


def stage(arguments: list[str]) -> int:
    config = settings(arguments[0])
    mark = Path(config["run_dir"]) / "staging"
    if not mark.exists():
        mark.touch()
        time.sleep(config["stages"])
    return 0


def evaluate(arguments: list[str]) -> int:
    """Measure snapshots, which are the checkpoints here; with --watch until the run ends."""
    run, until = Path(arguments[0]), None
    if "--until" in arguments:
        until = Path(arguments[arguments.index("--until") + 1])
    (run / "evaluation").mkdir(exist_ok=True)
    if not (run / "evaluating").exists():
        (run / "evaluating").touch()
        time.sleep(float(os.environ.get("TOY_EVALUATION_SECONDS", 0)))  # the first evaluation
    while True:
        over = until is None or until.exists() or (run / "DONE").exists()
        for complete in run.glob("checkpoints/*/COMPLETE"):
            optimizer = settings(str(run / "config.yaml")).get("optimizer", {})
            value = abs(optimizer.get("generator", {}).get("lr", 0) - 0.003)
            record = json.dumps({"metrics": {"fd/digits8-cnn-v1": value}})
            (run / "evaluation" / f"{complete.parent.name}.json").write_text(record)
        if over:
            return 0
        time.sleep(0.2)


def main() -> int:
    module, *arguments = sys.argv[2:]
    if module == "bigan.cluster.run_dir":
        print(json.loads(Path(arguments[0]).read_text())["run_dir"])
        return 0
    if module == "accelerate.commands.launch":
        # Only where -m begins the program: its own rank is that of the machine.
        options, arguments = arguments[: arguments.index("-m")], arguments[arguments.index("-m") :]
        os.environ["RANK"] = options[options.index("--machine_rank") + 1]
        (log_folder() / f"launcher-{os.environ['RANK']}.json").write_text(json.dumps(options))
        arguments = arguments[2:]
    command, *arguments = arguments
    return {"train": train, "evaluate": evaluate, "stage": stage}[command](arguments)


if __name__ == "__main__":
    sys.exit(main())
