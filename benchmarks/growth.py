"""What growing costs: a grown network's step against a fixed one's, and the switch between stages.

    python benchmarks/growth.py configs/progan-digits.yaml data.path=data/digits-pyramid
    python benchmarks/growth.py configs/progan-digits.yaml compile=inductor --out result.json

Two trainings of the same recipe in one process, step for step in turns: one that has grown through
all stages (a single step in each), and one whose networks had the last resolution from the start.
The target is a grown step within 2 % of a fixed one, and below 5 s to switch, compiling apart. On a
CPU steps are compared by the processor time of the process (see overhead.py).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bigan import config as configs
from bigan.bench.measuring import hardware, summary, synthetic_images, wait
from bigan.engine import Engine
from bigan.run.state import Training
from bigan.run.streams import check_data, open_stream
from bigan.run_config import RunConfig

MOST_SLOWER = 0.02
MOST_SWITCH_SECONDS = 5.0
WARM_UP_STEPS = 3


def begin(config: RunConfig, classes: dict[str, int]) -> Training:
    """A prepared training in its first stage."""
    engine = Engine(config, lambda line: print(line, file=sys.stderr))
    training = Training(config, engine, classes)
    training.prepare()
    return training


def grow(training: Training) -> list[dict[str, float]]:
    """A step in each stage; the seconds of each switch."""
    stream, switches = open_stream(training), []
    for stage in training.stages[1:]:
        training.step(stream)
        wait(training.world.device)
        began = time.perf_counter()
        training.progress.images_seen = stage.start
        training.enter(stage)
        stream.close()
        stream = open_stream(training)
        training.prepare()
        wait(training.world.device)
        seconds, compiled = time.perf_counter() - began, training.engine.compile_seconds
        switches.append({"seconds": seconds - compiled, "compile_seconds": compiled})
    stream.close()
    return switches


def fixed(config: RunConfig, grown: Training) -> RunConfig:
    """The recipe of the last stage, as one that does not grow."""
    return grown.config.model_copy(update={"run_dir": config.run_dir / "fixed"})


def measure(config: RunConfig, runs: int, steps: int) -> dict[str, Any]:
    """`runs` rotations of `steps` steps of each; times per step and their ratio."""
    classes = check_data(config).classes
    grown = begin(config, classes)
    switches = grow(grown)
    images = synthetic_images(grown.config, grown.accumulation, grown.world.device)
    trainings = {"grown": grown, "fixed": begin(fixed(config, grown), classes)}
    clock = time.process_time if grown.world.device.type == "cpu" else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in trainings}
    for turn in range(runs + 1):
        names = list(trainings) if turn % 2 else list(trainings)[::-1]
        for name in names:
            training = trainings[name]
            wait(training.world.device)
            began = clock()
            for _ in range(steps if turn else WARM_UP_STEPS):
                training.step(images)
            wait(training.world.device)
            if turn:
                times[name].append((clock() - began) / steps)
    ratios = [g / f for g, f in zip(times["grown"], times["fixed"], strict=True)]
    for training in trainings.values():
        training.close()
    return {
        "clock": clock.__name__,
        "ms_per_step": {name: summary([1000 * s for s in found]) for name, found in times.items()},
        "grown_over_fixed": summary(ratios),
        "switches": switches,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="a.b=value")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the measurements to this JSON file")
    given = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        changes = [*given.overrides, f"run_dir={folder}/run", "tracking.mlflow=false"]
        config = configs.load(RunConfig, given.config, changes)
        if config.growth is None:
            parser.error(f"{given.config} does not grow (it has no `growth`)")
        result = measure(config, given.runs, given.steps)
    slower = result["grown_over_fixed"]["median"] - 1
    slowest = max(switch["seconds"] for switch in result["switches"])
    for name, ms in result["ms_per_step"].items():
        print(f"{name:6} {ms['median']:8.2f} ms per step ({ms['min']:.2f} to {ms['max']:.2f})")
    ratio = result["grown_over_fixed"]
    print(f"grown / fixed {ratio['median']:.4f} ({ratio['min']:.4f} to {ratio['max']:.4f})")
    compiled = max(switch["compile_seconds"] for switch in result["switches"])
    print(f"slowest switch {slowest:.2f} s, and {compiled:.1f} s of compiling")
    met = slower < MOST_SLOWER and slowest < MOST_SWITCH_SECONDS
    print("targets (2 % and 5 s):", "met" if met else "MISSED")
    record = {
        "benchmark": "growth",
        "config": str(given.config),
        "overrides": given.overrides,
        "environment": hardware(),
        "runs": given.runs,
        "steps_per_run": given.steps,
        **result,
    }
    if given.out:
        given.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
