r"""What a lazy regulariser costs: its optimiser steps as a share of the training step.

    python benchmarks/lazy.py configs/stylegan2-digits.yaml model.resolution=32 \
        model.channel_base=1024 "penalties=[{name: r1, every: 16, own_step: true}]"
    python benchmarks/lazy.py configs/stylegan2-256.yaml compile=inductor --out result.json

Each phase's main step and its regularising step are timed in turns on images that lie ready; a
regulariser that is due at every k-th step has a k-th of its step's time as its share. The target is
R1 below 10 % of the training step without it. On a CPU times are processor time (see overhead.py).
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
from bigan.objectives import gan
from bigan.objectives.growth import grown
from bigan.run.state import Training
from bigan.run_config import RunConfig, own_step_every

MOST = 0.10
WARM_UP_RUNS = 2


def measure(config: RunConfig, runs: int) -> dict[str, Any]:
    """Milliseconds of every optimiser step and the share of each regulariser's."""
    engine = Engine(config, lambda line: print(line, file=sys.stderr))
    classes = {str(label): 1 for label in range(config.model.num_classes)}
    training = Training(config, engine, classes)
    training.prepare()
    stream = synthetic_images(config, training.accumulation, engine.world.device)
    clock = time.process_time if engine.world.device.type == "cpu" else time.perf_counter
    kinds = {
        f"{name}: {' + '.join(terms)}": (name, terms)
        for name, phase in training.phases.items()
        for terms in (phase.terms(0), phase.own_terms(0))
        if terms
    }
    batches = {}
    for kind, (name, terms) in kinds.items():
        batches[kind] = training._micro_batches(training.phases[name], terms, stream)
        training._last.setdefault(name, batches[kind])
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for run in range(WARM_UP_RUNS + runs):
        for kind, (name, terms) in kinds.items():
            wait(engine.world.device)
            began = clock()
            training._optimise(name, terms, batches[kind])
            wait(engine.world.device)
            if run >= WARM_UP_RUNS:
                times[kind].append(clock() - began)
    training.close()
    shares = {}
    order = gan.order(config)
    main = [kind for kind, (_, terms) in kinds.items() if gan.ADVERSARIAL in terms]
    for kind in kinds.keys() - main:
        every = own_step_every(config, kinds[kind][0]) or 1
        found = []
        for run in range(runs):
            step = sum(order.count(kinds[k][0]) * times[k][run] for k in main)
            found.append(order.count(kinds[kind][0]) * times[kind][run] / every / step)
        shares[kind] = summary(found)
    return {
        "clock": clock.__name__,
        "ms": {kind: summary([1000 * s for s in found]) for kind, found in times.items()},
        "share_of_step": shares,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="a.b=value")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--out", type=Path, help="write the measurements to this JSON file")
    given = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        changes = [*given.overrides, f"run_dir={folder}/run", "tracking.mlflow=false"]
        result = measure(grown(configs.load(RunConfig, given.config, changes)), given.runs)
    for kind, ms in result["ms"].items():
        print(f"{kind:24} {ms['median']:8.2f} ms ({ms['min']:.2f} to {ms['max']:.2f})")
    met = True
    for kind, share in result["share_of_step"].items():
        print(
            f"{kind:24} {share['median']:8.1%} of a step ({share['min']:.1%} to {share['max']:.1%})"
        )
        met &= "r1" not in kind or share["median"] < MOST
    print(f"target, R1 below {MOST:.0%}:", "met" if met else "MISSED")
    record = {
        "benchmark": "lazy",
        "config": str(given.config),
        "overrides": given.overrides,
        "environment": hardware(),
        "runs": given.runs,
        **result,
    }
    if given.out:
        given.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
