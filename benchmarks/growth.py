"""The cost of growing: a grown network's step against a fixed one's, and the switch of stages.

    python benchmarks/growth.py configs/progan-digits.yaml data.path=data/digits-pyramid
    python benchmarks/growth.py configs/progan-digits.yaml compile=inductor --out result.json

Two train states of the same config in one process are timed alternately: one that has grown through
all stages (a single step in each), and one whose networks had the last resolution from the start.
The target is a grown step within 2 % of a fixed one, and less than 5 s per switch, without
compilation. On a CPU steps are compared by the processor time of the process (see overhead.py).
"""

from __future__ import annotations

import sys
import time
from typing import Any

from bigan.bench.measuring import device_clock, prepared_state, summary, synthetic_streams, wait
from bigan.bench.script import config_parser, met, scratch_config, spread, to_stderr, write_record
from bigan.run.state import TrainState
from bigan.run.streams import check_data, open_streams
from bigan.run_config import RunConfig

MAX_SLOWDOWN = 0.02
MAX_SWITCH_SECONDS = 5.0
WARM_UP_STEPS = 3


def grow(state: TrainState) -> list[dict[str, float]]:
    """One step in each stage but the last; returns the seconds of each switch."""
    switches = []
    for stage in state.stages[1:]:
        with open_streams(state) as streams:
            state.advance(streams)
            wait(state.world.device)
            began = time.perf_counter()
        state.progress.images_seen = stage.start
        state.enter(stage)
        with open_streams(state):
            state.prepare()
            wait(state.world.device)
            seconds, compiled = time.perf_counter() - began, state.engine.compile_seconds
        switches.append({"seconds": seconds - compiled, "compile_seconds": compiled})
    return switches


def measure(config: RunConfig, runs: int, steps: int) -> dict[str, Any]:
    """`runs` alternating runs of `steps` steps of each state; times per step and their ratio."""
    classes = check_data(config).classes
    grown = prepared_state(config, to_stderr, classes)
    switches = grow(grown)
    fixed = grown.config.model_copy(update={"run_dir": config.run_dir / "fixed"})
    states = {"grown": grown, "fixed": prepared_state(fixed, to_stderr, classes)}
    images = synthetic_streams(grown)
    device = grown.world.device
    clock = device_clock(device)
    times: dict[str, list[float]] = {name: [] for name in states}
    for run in range(runs + 1):
        for name in list(states)[:: 1 if run % 2 else -1]:
            wait(device)
            began = clock()
            for _ in range(steps if run else WARM_UP_STEPS):
                states[name].advance(images)
            wait(device)
            if run:
                times[name].append((clock() - began) / steps)
    for state in states.values():
        state.close()
    ratios = [g / f for g, f in zip(times["grown"], times["fixed"], strict=True)]
    return {
        "clock": clock.__name__,
        "ms_per_step": {name: summary([1000 * s for s in found]) for name, found in times.items()},
        "grown_over_fixed": summary(ratios),
        "switches": switches,
    }


def main() -> int:
    parser = config_parser(__doc__, runs=15)
    parser.add_argument("--steps", type=int, default=5, help="of a run (default 5)")
    given = parser.parse_intermixed_args()
    with scratch_config(given) as config:
        if config.growth is None:
            parser.error(f"{given.config} has no `growth` section; use a config of a growing model")
        results = measure(config, given.runs, given.steps)
    for name, ms in results["ms_per_step"].items():
        print(f"{name:6} {spread(ms, 'ms per step')}")
    print("grown / fixed", spread(results["grown_over_fixed"], digits=4))
    slowest, compiled = (
        max(switch[key] for switch in results["switches"]) for key in ("seconds", "compile_seconds")
    )
    print(f"slowest switch {slowest:.2f} s, and {compiled:.1f} s of compilation")
    slowdown = results["grown_over_fixed"]["median"] - 1
    reached = slowdown < MAX_SLOWDOWN and slowest < MAX_SWITCH_SECONDS
    print(f"targets ({MAX_SLOWDOWN:.0%} and {MAX_SWITCH_SECONDS:g} s):", met(reached))
    write_record("growth", given, results, steps_per_run=given.steps)
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
