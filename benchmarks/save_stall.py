r"""For how long a checkpoint blocks training, compared with the length of a step.

    python benchmarks/save_stall.py configs/digits.yaml
    python benchmarks/save_stall.py configs/biggan-128.yaml train.batch=2 train.micro_batch=2 \
        model.init=normal compile=eager --out result.json

On synthetic images. A run times training steps without a save, then `Saver.save` (the stall), then
the steps until the background write has ended.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

from bigan.bench.measuring import prepared_state, summary, synthetic_streams, wait
from bigan.bench.script import config_parser, met, scratch_config, spread, to_stderr, write_record
from bigan.checkpoint import Saver
from bigan.run.stages import final_config
from bigan.run_config import RunConfig

WARM_UP_STEPS = 2


def measure(config: RunConfig, runs: int, steps: int) -> dict[str, Any]:
    """`runs` times: `steps` steps, a save, then steps until it is written."""
    state = prepared_state(config, to_stderr)
    streams, device = synthetic_streams(state), state.world.device
    saver = Saver(config.run_dir, state.world, keep=1)

    def step() -> float:
        began = time.perf_counter()
        state.advance(streams)
        wait(device)
        return time.perf_counter() - began

    for _ in range(WARM_UP_STEPS):
        step()
    undisturbed, stalls, written, during = [], [], [], []
    for _ in range(runs):
        undisturbed.append(statistics.median(step() for _ in range(steps)))
        began = time.perf_counter()
        saver.save(state.progress, state.shards())
        wait(device)
        stalls.append(time.perf_counter() - began)
        while saver.poll():
            during.append(step())
        saver.finish()
        written.append(time.perf_counter() - began)
    state.close()
    folder = next(config.run_dir.glob("checkpoints/*/"))
    return {
        "step_seconds": summary(undisturbed),
        "stall_seconds": summary(stalls),
        "stall_in_steps": summary([s / u for s, u in zip(stalls, undisturbed, strict=True)]),
        # The first save also allocates the memory that it copies into.
        "first_stall_seconds": stalls[0],
        "later_stall_seconds": summary(stalls[1:] or stalls),
        "step_seconds_while_writing": summary(during) if during else None,
        "written_after_seconds": summary(written),
        "checkpoint_bytes": sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()),
    }


def as_text(results: dict[str, Any]) -> str:
    share, slowed = results["stall_in_steps"], results["step_seconds_while_writing"]
    lines = [
        f"checkpoint of {results['checkpoint_bytes'] / 1e6:.1f} MB",
        f"step                  {spread(results['step_seconds'], 'ms', 1000, digits=1)}",
        f"stall                 {spread(results['stall_seconds'], 'ms', 1000, digits=1)}; the "
        f"first {1000 * results['first_stall_seconds']:.1f} ms",
        f"stall                 {spread(share, 'steps')}",
    ]
    if slowed:
        lines.append(f"step during the write {spread(slowed, 'ms', 1000, digits=1)}")
    return "\n".join([*lines, f"target, a stall below one step: {met(share['median'] < 1)}"])


def main() -> int:
    parser = config_parser(__doc__, runs=7)
    parser.add_argument("--steps", type=int, default=20, help="before each save (default 20)")
    given = parser.parse_intermixed_args()
    with scratch_config(given) as config:
        results = measure(final_config(config), given.runs, given.steps)
    print(as_text(results))
    write_record("save_stall", given, results, steps_per_run=given.steps)
    return 0 if results["stall_in_steps"]["median"] < 1 else 1


if __name__ == "__main__":
    sys.exit(main())
