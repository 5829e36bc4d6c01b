r"""The cost of lazy regularization: its share of the training step.

    python benchmarks/lazy.py configs/stylegan2-digits.yaml model.resolution=32 \
        model.channel_base=1024 \
        "objective.penalties=[{name: r1, every: 16, separate_step: true}]"
    python benchmarks/lazy.py configs/stylegan2-256.yaml compile=inductor --out result.json

Every optimizer step of the objective is timed with each combination of its terms, alternately, on
synthetic images. The share of a regularization is the time that its terms add, times how often they
occur, over the training step without any regularization. The target is R1 below 10 %. On a CPU
times are processor time (see overhead.py).
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

from bigan.bench.measuring import (
    PhaseTimer,
    device_clock,
    prepared_state,
    summary,
    synthetic_streams,
)
from bigan.bench.rank import without_penalties
from bigan.bench.script import config_parser, met, scratch_config, spread, to_stderr, write_record
from bigan.objectives.base import Objective, Step, variants
from bigan.run.stages import final_config
from bigan.run_config import RunConfig

MAX_SHARE = 0.10
WARM_UP_RUNS = 2


def kind(step: Step) -> str:
    """ "discriminator: adversarial + r1"."""
    return f"{step.phase}: {' + '.join(step.terms)}"


def frequencies(objective: Objective, images_per_step: int) -> dict[str, float]:
    """How often each kind of optimizer step occurs per training step."""
    starts = range(0, objective.period * images_per_step, images_per_step)
    found = Counter(kind(step) for start in starts for step in objective.steps(start))
    return {name: num / objective.period for name, num in found.items()}


def measure(config: RunConfig, runs: int) -> dict[str, Any]:
    """Milliseconds of every kind of optimizer step, and the share of each regularization."""
    state = prepared_state(config, to_stderr)
    streams = synthetic_streams(state)
    clock = device_clock(state.world.device)
    timed = variants(state.objective, config.images_per_step)
    steps = {kind(step): step for step in [*without_penalties(timed), *timed]}
    timers = {name: PhaseTimer(state, clock) for name in steps}
    for _ in range(WARM_UP_RUNS + runs):
        for name, step in steps.items():
            timers[name].advance(streams, [step])
    state.close()
    times = {name: timers[name].seconds[steps[name].phase][WARM_UP_RUNS:] for name in steps}
    often = frequencies(state.objective, config.images_per_step)
    plain = {name: [kind(s) for s in without_penalties([step])] for name, step in steps.items()}
    shares = {}
    for name in often:
        if plain[name] == [name]:
            continue
        found = []
        for run in range(runs):
            base = sum(often[n] * times[b][run] for n in often for b in plain[n])
            added = times[name][run] - sum(times[b][run] for b in plain[name])
            found.append(often[name] * added / base)
        shares[name] = summary(found)
    return {
        "clock": clock.__name__,
        "ms": {name: summary([1000 * s for s in found]) for name, found in times.items()},
        "share_of_step": shares,
    }


def main() -> int:
    given = config_parser(__doc__, runs=15).parse_intermixed_args()
    with scratch_config(given) as config:
        results = measure(final_config(config), given.runs)
    for name, ms in results["ms"].items():
        print(f"{name:32} {spread(ms, 'ms')}")
    reached = True
    for name, share in results["share_of_step"].items():
        print(f"{name:32} {spread(share, '% of a step', 100, digits=1)}")
        reached &= "r1" not in name or share["median"] < MAX_SHARE
    print(f"target, R1 below {MAX_SHARE:.0%}:", met(reached))
    write_record("lazy", given, results)
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
