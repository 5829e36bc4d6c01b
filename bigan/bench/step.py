"""`bigan bench step`: the training step without data loading, each variant in its own process.

Variants are measured in the same run on synthetic images, several timed runs after a warm-up, the
median and the spread reported. A process per variant gives each its own peak memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bigan import config as configs
from bigan.bench.measuring import hardware, peak_memory, summary, synthetic_images, wait
from bigan.engine import Echo, Engine
from bigan.errors import UserError
from bigan.objectives import gan
from bigan.objectives.growth import grown
from bigan.run.state import Training
from bigan.run_config import PenaltyConfig, RunConfig

WARM_UP_STEPS = 3
RUN_SECONDS = 1.0  # a timed run repeats the step for about this long


def bench_step(path: Path, overrides: Sequence[str], runs: int, echo: Echo) -> dict[str, Any]:
    """Measure eager and compiled, without and with R1; returns a JSON-ready record.

    Raises `UserError` for fewer than 5 runs or an unusable recipe.
    """
    if runs < 5:
        raise UserError(f"--runs {runs}: fewer than 5 runs say nothing about the spread")
    config = grown(configs.load(RunConfig, path, overrides))
    compiled = config.compile if config.compile in {"inductor", "aot_eager"} else "inductor"
    variants = []
    for backend in ("eager", compiled):
        for penalties in ((), (PenaltyConfig(name="r1", weight=1.0),)):
            variant = config.model_copy(update={"compile": backend, "penalties": penalties})
            child = subprocess.run(
                [sys.executable, "-m", "bigan.bench", str(runs)],
                input=configs.dump(variant),
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            result = json.loads(child.stdout)
            name = f"{backend}{'+r1' if penalties else ''}"
            echo(f"{name}: {result['images_per_second']['median']:.0f} images/s")
            variants.append({"name": name, "compile": backend, "r1": bool(penalties)} | result)
    rate = {v["name"]: v["images_per_second"]["median"] for v in variants}
    return {
        "benchmark": "step",
        "config": str(path),
        "overrides": list(overrides),
        "environment": hardware(),
        "batch": config.train.batch,
        "runs": runs,
        "variants": variants,
        "speedup_compiled": rate[compiled] / rate["eager"],
        "speedup_compiled_r1": rate[f"{compiled}+r1"] / rate["eager+r1"],
    }


def measure_step(text: str, runs: int) -> dict[str, Any]:
    """Time the phases of a recipe (YAML `text`) on synthetic images, in this process."""
    config = configs.validate(RunConfig, configs.parse_yaml(text, "bench"), "bench")
    messages: list[str] = []
    engine = Engine(config, messages.append)
    device = engine.world.device
    classes = {str(label): 1 for label in range(config.model.num_classes)}
    training = Training(config, engine, classes)
    training.prepare()
    source = synthetic_images(config, training.accumulation, device)
    order = gan.order(config)
    spent: dict[str, list[float]] = {name: [] for name in dict.fromkeys(order)}

    def steps(num: int, record: bool) -> float:
        began = time.perf_counter()
        times = dict.fromkeys(spent, 0.0)
        for _ in range(num):
            for name in order:
                start = time.perf_counter()
                training.phase_step(name, source)
                wait(device)
                times[name] += time.perf_counter() - start
        total = time.perf_counter() - began
        if record:
            for name, seconds in times.items():
                spent[name].append(1000 * seconds / (num * order.count(name)))
        return total / num

    began = time.perf_counter()
    steps(1, record=False)
    first = time.perf_counter() - began
    steps(WARM_UP_STEPS, record=False)
    each = max(1, round(RUN_SECONDS / steps(1, record=False)))
    seconds = [steps(each, record=True) for _ in range(runs)]
    per_step = config.train.batch * config.train.num_d_steps
    return {
        "images_per_second": summary([per_step / s for s in seconds]),
        "ms_per_phase": {name: summary(values) for name, values in spent.items()},
        "first_step_seconds": first,
        "peak_memory_bytes": peak_memory(device),
        "steps_per_run": each,
        "messages": messages,
    }
