"""For how long a checkpoint holds up training, against the length of a step.

    python benchmarks/save_stall.py configs/digits.yaml
    python benchmarks/save_stall.py configs/biggan-128.yaml train.batch=2 train.micro_batch=2 \\
        model.init=normal compile=eager --out result.json

Images are random ones in memory. Training steps are timed without a save, then `Saver.save` (the
stall), then the steps during which it writes in the background, until it has.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bigan import config as configs
from bigan.bench.measuring import hardware, summary, synthetic_images, wait
from bigan.checkpoint import Saver
from bigan.engine import Engine
from bigan.objectives.growth import grown
from bigan.run.state import Training
from bigan.run_config import RunConfig

WARM_UP_STEPS = 2


def measure(config: RunConfig, saves: int, steps: int) -> dict[str, Any]:
    """`saves` times: `steps` undisturbed steps, a save, then the steps until it is written."""
    engine = Engine(config, lambda line: print(line, file=sys.stderr))
    device = engine.world.device
    classes = {str(label): 1 for label in range(config.model.num_classes)}
    training = Training(config, engine, classes)
    training.prepare()
    stream = synthetic_images(config, training.accumulation, device)
    saver = Saver(config.run_dir, engine.world, keep=1)

    def step() -> float:
        began = time.perf_counter()
        training.step(stream)
        wait(device)
        return time.perf_counter() - began

    for _ in range(WARM_UP_STEPS):
        step()
    undisturbed, stalls, written, during = [], [], [], []
    for _ in range(saves):
        usual = [step() for _ in range(steps)]
        began = time.perf_counter()
        saver.save(training.progress, training.shards())
        wait(device)
        stalls.append(time.perf_counter() - began)
        meanwhile = []
        while saver.poll():
            meanwhile.append(step())
        saver.finish()
        written.append(time.perf_counter() - began)
        undisturbed.append(statistics.median(usual))
        during += meanwhile
    training.close()
    folder = next(config.run_dir.glob("checkpoints/*/"))
    step_seconds = summary(undisturbed)
    return {
        "step_seconds": step_seconds,
        "stall_seconds": summary(stalls),
        "stall_in_steps": summary([s / u for s, u in zip(stalls, undisturbed, strict=True)]),
        # The first save also allocates the memory that it copies into.
        "first_stall_seconds": stalls[0],
        "later_stall_seconds": summary(stalls[1:] or stalls),
        "step_seconds_while_writing": summary(during) if during else None,
        "written_after_seconds": summary(written),
        "checkpoint_bytes": sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()),
    }


def as_text(result: dict[str, Any]) -> str:
    stall, share = result["stall_seconds"], result["stall_in_steps"]
    whole = result["step_seconds"]
    slowed = result["step_seconds_while_writing"]
    lines = [
        f"checkpoint of {result['checkpoint_bytes'] / 1e6:.1f} MB; a step takes "
        f"{1000 * whole['median']:.1f} ms",
        f"stall {1000 * stall['median']:.1f} ms ({1000 * stall['min']:.1f} to "
        f"{1000 * stall['max']:.1f}) = {share['median']:.2f} steps ({share['min']:.2f} to "
        f"{share['max']:.2f}); the first {1000 * result['first_stall_seconds']:.1f} ms",
        f"target, a stall below one step: {'met' if share['median'] < 1 else 'MISSED'}",
    ]
    if slowed:
        lines.insert(2, f"a step while it is written takes {1000 * slowed['median']:.1f} ms")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="a.b=value")
    parser.add_argument("--saves", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20, help="undisturbed steps before each save")
    parser.add_argument("--out", type=Path, help="write the measurements to this JSON file")
    given = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        changes = [*given.overrides, f"run_dir={folder}"]
        config = grown(configs.load(RunConfig, given.config, changes))
        result = measure(config, given.saves, given.steps)
    print(as_text(result))
    record = {
        "benchmark": "save_stall",
        "config": str(given.config),
        "overrides": given.overrides,
        "environment": hardware(),
        "saves": given.saves,
        **result,
    }
    if given.out:
        given.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if result["stall_in_steps"]["median"] < 1 else 1


if __name__ == "__main__":
    sys.exit(main())
