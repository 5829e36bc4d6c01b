"""`bigan bench step`: the training step without data loading, each variant in its own process.

All variants are measured in one call on synthetic images: several timed runs after a warm-up, of
which the median and the extremes are reported. With a process each, variants have their own peak
memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bigan import config as configs
from bigan.bench.measuring import (
    PhaseTimer,
    environment,
    peak_memory,
    prepared_state,
    summary,
    synthetic_streams,
)
from bigan.config import ConfigError
from bigan.engine import Echo
from bigan.errors import RunError, UserError
from bigan.objectives.penalties import PenaltyConfig
from bigan.run.stages import final_config
from bigan.run_config import RunConfig, load_config, setup_of
from bigan.urls import redacted_text

MIN_RUNS = 5
WARM_UP_STEPS = 3
RUN_SECONDS = 1.0  # approximate length of a timed run
R1 = (PenaltyConfig(name="r1", weight=1.0),)


def bench_step(path: Path, overrides: Sequence[str], runs: int, echo: Echo) -> dict[str, Any]:
    """Measure all variants of a config; returns a JSON-ready record.

    Raises `UserError` for fewer than `MIN_RUNS` runs or an unusable config, `RunError` if the
    process of a variant fails.
    """
    require_runs(runs)
    config = final_config(load_config(path, overrides))
    compiled = config.compile if config.compile in {"inductor", "aot_eager"} else "inductor"
    measured: list[dict[str, Any]] = []
    for name, variant, r1 in variants(config, ("eager", compiled), echo):
        result = _in_process(name, variant, runs)
        echo(f"{name}: {result['images_per_second']['median']:.0f} images/s")
        measured.append({"name": name, "compile": variant.compile, "r1": r1} | result)
    rate = {found["name"]: found["images_per_second"]["median"] for found in measured}
    record: dict[str, Any] = {
        "benchmark": "step",
        "config": str(path),
        "overrides": [redacted_text(override) for override in overrides],
        "environment": environment(),
        "batch": config.train.batch,
        "runs": runs,
        "variants": measured,
        "speedup_compiled": rate[compiled] / rate["eager"],
    }
    if "eager+r1" in rate:
        record["speedup_compiled_r1"] = rate[f"{compiled}+r1"] / rate["eager+r1"]
    return record


def require_runs(runs: int) -> None:
    """Raises `UserError` for fewer than `MIN_RUNS` runs."""
    if runs < MIN_RUNS:
        raise UserError(f"--runs {runs}: a spread needs at least {MIN_RUNS} runs")


def variants(
    config: RunConfig, backends: Sequence[str], echo: Echo
) -> Iterator[tuple[str, RunConfig, bool]]:
    """(name, config, whether it has R1) of each variant.

    Without and with R1 as the only penalty; as the config is where the objective has no
    `penalties`; without R1 only where the model does not allow it.
    """
    objectives = [(config.objective, "", False)]
    if "penalties" in type(config.objective).model_fields:
        without, with_r1 = (
            config.objective.model_copy(update={"penalties": found}) for found in ((), R1)
        )
        objectives = [(without, "", False)]
        try:
            with_r1.build(setup_of(config, (1,) * config.model.num_classes))
            objectives.append((with_r1, "+r1", True))
        except ConfigError as error:
            echo(f"variants with R1 are left out: {error}")
    for backend in backends:
        for objective, suffix, r1 in objectives:
            update = {"compile": backend, "objective": objective}
            yield f"{backend}{suffix}", config.model_copy(update=update), r1


def _in_process(name: str, config: RunConfig, runs: int) -> dict[str, Any]:
    child = subprocess.run(
        [sys.executable, "-m", "bigan.bench", str(runs)],
        input=configs.dump(config, configs.CREDENTIALS),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if child.returncode:
        raise RunError(f"variant {name}: its process ended with exit code {child.returncode}")
    result: dict[str, Any] = json.loads(child.stdout)
    if "error" in result:
        raise (UserError if result["user"] else RunError)(f"variant {name}: {result['error']}")
    return result


def measure_step(text: str, runs: int) -> dict[str, Any]:
    """Time the training step and its phases, in this process; `text` is the config as YAML."""
    config = configs.validate(RunConfig, configs.parse_yaml(text, "bench"), "bench")
    messages: list[str] = []
    state = prepared_state(config, messages.append)
    streams = synthetic_streams(state)

    def steps(num: int) -> tuple[float, PhaseTimer]:
        """Seconds per training step, and of each phase."""
        timer, began = PhaseTimer(state), time.perf_counter()
        for _ in range(num):
            timer.advance(streams)
        return (time.perf_counter() - began) / num, timer

    first, _ = steps(1)
    steps(WARM_UP_STEPS)
    period = state.objective.period  # a run holds all lazy terms in the right proportion
    each = period * max(1, round(RUN_SECONDS / (steps(period)[0] * period)))
    timed = [steps(each) for _ in range(runs)]
    phases = {
        name: [1000 * sum(t.seconds[name]) / len(t.seconds[name]) for _, t in timed]
        for name in state.objective.phases
    }
    state.close()
    return {
        "images_per_second": summary([config.images_per_step / s for s, _ in timed]),
        "ms_per_phase": {name: summary(values) for name, values in phases.items()},
        "first_step_seconds": first,
        "peak_memory_bytes": peak_memory(state.world.device),
        "steps_per_run": each,
        "messages": messages,
    }
