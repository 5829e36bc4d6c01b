"""One process of a measured point: it prepares a train state, then measures it on request.

Requests arrive on stdin, responses leave on stdout, one line of JSON each, so an idle process uses
no CPU time, and it ends with the process that started it. The shares of the step time are found by
leaving parts of the step out:

    penalty        the step, less the step without penalties
    communication  the step, less the step that neither exchanges gradients nor shares batch
                   statistics; waiting for other ranks is in neither
    save           the time for which `Saver.save` blocks training
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TextIO

import torch
import torch.distributed as dist

from bigan import config as configs
from bigan.bench.measuring import PhaseTimer, prepared_state, synthetic_streams, wait
from bigan.checkpoint import Saver
from bigan.distributed.launch import disconnect
from bigan.distributed.world import World, barrier, broadcast
from bigan.errors import RunError, UserError
from bigan.layers.batchnorm import set_process_group
from bigan.objectives.base import Step, variants
from bigan.objectives.gan_phases import PATH_LENGTH
from bigan.objectives.penalties import PENALTIES
from bigan.run.state import Streams, TrainState
from bigan.run.streams import check_data, open_streams
from bigan.run_config import RunConfig

WARM_UP_STEPS = 3
MIN_STEPS = 4  # of a timed run, however long a step takes: a spread needs several
PROBE_BYTES = 64 * 2**20  # upper limit of the tensor that measures the bandwidth
PENALTY_TERMS = frozenset({*PENALTIES, PATH_LENGTH})


class Variant(NamedTuple):
    """What a measured training step includes."""

    penalties: bool = True
    exchange: bool = True


FULL = Variant()


def without_penalties(steps: Iterable[Step]) -> tuple[Step, ...]:
    """`steps` without their penalty terms; steps that have no other term are dropped."""
    kept = (
        step._replace(terms=tuple(term for term in step.terms if term not in PENALTY_TERMS))
        for step in steps
    )
    return tuple(step for step in kept if step.terms)


@contextlib.contextmanager
def without_exchange(state: TrainState) -> Iterator[None]:
    """Each rank trains alone; sharding engines leave out only the shared batch statistics."""
    engine = state.engine
    engine.reduces_gradients = engine.name != "ddp"
    for network in state.networks.values():
        set_process_group(network, None)
    try:
        yield
    finally:
        engine.reduces_gradients = True
        for network in state.networks.values():
            set_process_group(network, engine.batchnorm_group)


class Rank:
    """A prepared train state with its streams, and methods that time it.

    `synthetic`: random images in memory instead of those of the config. `seconds`: approximate
    length of a timed run.
    """

    def __init__(self, config: RunConfig, synthetic: bool, seconds: float) -> None:
        self.config = config
        classes = None if synthetic else check_data(config).classes
        self.state = state = prepared_state(config, _to_stderr, classes)
        self.engine, self.world = state.engine, state.world
        self.streams: Streams = synthetic_streams(state) if synthetic else open_streams(state)
        self.saver = Saver(config.run_dir, self.world, keep=1, echo=self.engine.echo)
        for variant in self.variants().values():
            self.steps(WARM_UP_STEPS, variant)
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()  # the processes of other points use the same device
        period = state.objective.period  # a run holds all lazy terms in the right proportion
        num = max(seconds / max(self.steps(period)["step"], 1e-9), MIN_STEPS)
        self.num_steps = broadcast(self.world, period * math.ceil(num / period))

    def variants(self) -> dict[str, Variant]:
        """The steps that are timed phase by phase; the complete one first."""
        found = {"full": FULL}
        steps = variants(self.state.objective, self.config.images_per_step)
        if any(not PENALTY_TERMS.isdisjoint(step.terms) for step in steps):
            found["without_penalties"] = Variant(penalties=False)
        if self.world.size > 1:
            found["without_exchange"] = Variant(exchange=False)
        return found

    def steps(
        self, num: int, variant: Variant = FULL, timer: PhaseTimer | None = None
    ) -> dict[str, float]:
        """Seconds per training step, and those of them that it waits for images."""
        state, device = self.state, self.world.device
        advance = timer.advance if timer else state.advance
        barrier(self.world)
        wait(device)
        with contextlib.nullcontext() if variant.exchange else without_exchange(state):
            data, began = state.data_seconds, time.perf_counter()
            for _ in range(num):
                steps = None
                if not variant.penalties:
                    steps = without_penalties(state.objective.steps(state.progress.images_seen))
                advance(self.streams, steps)
            wait(device)
            seconds = time.perf_counter() - began
        self.engine.waiting.collect()
        state.statistics.collect()
        return {"step": seconds / num, "data": (state.data_seconds - data) / num}

    def steps_by_phase(self, num: int, variant: Variant) -> dict[str, Any]:
        """Seconds per step: total, of each phase, waiting for other ranks and for images.

        "spread" is the standard deviation of a phase's time over its mean.
        """
        timer = PhaseTimer(self.state)
        times = self.steps(num, variant, timer)
        work = timer.seconds
        spreads = [statistics.stdev(w) / statistics.mean(w) for w in work.values()]
        return {
            **times,
            "waiting": timer.waited / num,
            "phases": {name: sum(seconds) / num for name, seconds in work.items()},
            "spread": statistics.mean(spreads),
        }

    def measure(self) -> dict[str, Any]:
        """One timed run of all variants; all ranks of the point take part."""
        self.steps(max(1, self.num_steps // 4))  # uses up what was prefetched while it was idle
        result: dict[str, Any] = {"plain": self.steps(self.num_steps)}
        for name, variant in self.variants().items():
            result[name] = self.steps_by_phase(self.num_steps, variant)
        result["save"] = self.save_seconds()
        result |= self.network()
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()  # for the next point on the same device
        return result

    def save_seconds(self) -> float:
        """Time for which a save blocks training; the rest of it runs in the background."""
        wait(self.world.device)
        barrier(self.world)
        began = time.perf_counter()
        self.saver.save(self.state.progress, self.state.shards())
        wait(self.world.device)
        seconds = time.perf_counter() - began
        self.saver.finish()
        return seconds

    def network(self) -> dict[str, float]:
        """Latency of the smallest collective, bus bandwidth of an all-reduce of the gradients."""
        if self.world.size == 1:
            return {}
        num_bytes = 4 * max(
            sum(p.numel() for p in phase.parameters())
            for phase in self.state.objective.phases.values()
        )
        num_bytes = min(num_bytes, PROBE_BYTES)
        latency = _reduce_seconds(self.world, 4, 50)
        seconds = _reduce_seconds(self.world, num_bytes, 10)
        moved = 2 * (self.world.size - 1) / self.world.size * num_bytes
        return {
            "latency_us": 1e6 * latency,
            "bus_gb_per_second": moved / max(seconds - latency, 1e-9) / 1e9,
        }


def _to_stderr(line: str) -> None:
    sys.stderr.write(line + "\n")


def _reduce_seconds(world: World, num_bytes: int, num: int) -> float:
    """Median time of `num` all-reduces."""
    values = torch.zeros(num_bytes // 4, device=world.device)
    times = []
    for _ in range(num + 2):
        wait(world.device)
        began = time.perf_counter()
        dist.all_reduce(values)
        wait(world.device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def serve(requests: TextIO, respond: Callable[[dict[str, Any]], None]) -> None:
    """The first request holds the config and how to measure it; each later one is a timed run."""
    task = json.loads(requests.readline())
    try:
        config = configs.validate(RunConfig, configs.parse_yaml(task["config"], "bench"), "bench")
        rank = Rank(config, task["synthetic"], task["seconds"])
        respond({"engine": rank.engine.name, "steps_per_run": rank.num_steps})
        while requests.readline():
            respond(rank.measure())
        rank.state.close()
        disconnect(rank.world)
    except (UserError, RunError) as error:
        respond({"error": str(error), "user": isinstance(error, UserError)})


def main() -> None:
    """Serve requests on a copy of stdout; what libraries print to stdout goes to stderr."""
    own = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def respond(record: dict[str, Any]) -> None:
        own.write(json.dumps(record) + "\n")
        own.flush()

    serve(sys.stdin, respond)


if __name__ == "__main__":
    main()
