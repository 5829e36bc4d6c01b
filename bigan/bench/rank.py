"""One process of a measured point: it prepares a training, then measures a turn when told to.

Asked on stdin, answered on stdout, a line of JSON each: so it costs nothing while it waits for its
turn, and ends with whoever started it. What a step's time is spent on is found by leaving things
out of it:

    penalty        the step, less the step without penalties
    communication  the step, less the step that neither exchanges gradients nor shares batch
                   statistics; waiting for the others is not in it, nor in D and G
    save           the time for which `Saver.save` holds up training
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TextIO

import torch
import torch.distributed as dist

from bigan import config as configs
from bigan.bench.measuring import synthetic_images, wait
from bigan.checkpoint import Saver
from bigan.data.stream import Batch
from bigan.distributed.launch import disconnect
from bigan.distributed.world import World, barrier, broadcast, on_rank_0
from bigan.engine import Engine
from bigan.errors import RunError, UserError
from bigan.layers.batchnorm import set_process_group
from bigan.objectives.gan import ADVERSARIAL
from bigan.run.state import Training
from bigan.run.streams import check_data, open_stream
from bigan.run_config import RunConfig

WARM_UP_STEPS = 3
MIN_STEPS = 4  # of a timed run, however long they are: fewer have no spread
PROBE_BYTES = 64 * 2**20  # at most, of the tensor that measures the bandwidth


@contextlib.contextmanager
def replaced(owner: object, **methods: Callable[..., Any]) -> Iterator[None]:
    """Inside, `owner` has other methods."""
    vars(owner).update(methods)
    try:
        yield
    finally:
        for name in methods:
            del vars(owner)[name]


@contextlib.contextmanager
def without_penalties(training: Training) -> Iterator[None]:
    only_adversarial = {"terms": lambda _: (ADVERSARIAL,), "own_terms": lambda _: ()}
    with replaced(training.phases["d"], **only_adversarial):
        yield


@contextlib.contextmanager
def without_exchange(training: Training) -> Iterator[None]:
    """Each process trains for itself; of the sharding engines only the batch statistics are."""
    with contextlib.ExitStack() as stack:
        if training.engine.name == "ddp":
            for prepared in training.prepared.values():
                micro_step = prepared.wrapped.micro_step
                alone = partial(_never_last, micro_step)
                stack.enter_context(replaced(prepared.wrapped, micro_step=alone))
        set_process_group(training.generator, None)
        try:
            yield
        finally:
            set_process_group(training.generator, training.engine.process_group)


def _to_stderr(line: str) -> None:
    sys.stderr.write(line + "\n")


def _never_last(micro_step: Callable[..., Any], last: bool) -> Any:
    return micro_step(last=False)


class Rank:
    """A prepared training with its images, and how to time it.

    `synthetic`: random images in memory instead of the recipe's. `seconds`: of a timed run.
    """

    def __init__(self, config: RunConfig, synthetic: bool, seconds: float) -> None:
        self.config = config
        self.engine = Engine(config, _to_stderr)
        self.world = self.engine.world
        if synthetic:
            classes = {str(label): 1 for label in range(config.model.num_classes)}
        else:
            classes = on_rank_0(self.world, lambda: check_data(config)).classes
        self.training = Training(config, self.engine, classes)
        self.training.prepare()
        self.stream: Iterator[Batch] = (
            synthetic_images(config, self.training.accumulation, self.world.device, self.world.size)
            if synthetic
            else open_stream(self.training)
        )
        self.saver = Saver(
            config.run_dir,
            self.world,
            keep=1,
            milestone_images=None,
            echo=self.engine.echo,
        )
        period = math.lcm(*(p.every for p in config.penalties))  # of lazy penalties, in D steps
        self.period = period // math.gcd(period, config.train.num_d_steps)
        for variant in self.variants().values():
            with variant(self.training):
                self.steps(WARM_UP_STEPS)
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()  # the other points' processes are on the same device
        each = max(seconds / max(self.steps(self.period)["step"], 1e-9), MIN_STEPS)
        self.num_steps = broadcast(self.world, self.period * math.ceil(each / self.period))

    def variants(self) -> dict[str, Callable[[Training], contextlib.AbstractContextManager]]:
        """The steps that are timed phase by phase; the whole one first."""
        found: dict[str, Callable[..., contextlib.AbstractContextManager]] = {
            "full": contextlib.nullcontext
        }
        if self.config.penalties:
            found["without_penalties"] = without_penalties
        if self.world.size > 1:
            found["without_exchange"] = without_exchange
        return found

    def steps(self, num: int) -> dict[str, float]:
        """Seconds per step, and of it those spent waiting for images."""
        training, device = self.training, self.world.device
        barrier(self.world)
        wait(device)
        data, began = training.data_seconds, time.perf_counter()
        for _ in range(num):
            training.step(self.stream)
        wait(device)
        seconds = time.perf_counter() - began
        self.engine.waiting.collect()
        training.statistics.collect()
        return {"step": seconds / num, "data": (training.data_seconds - data) / num}

    def steps_by_phase(self, num: int) -> dict[str, Any]:
        """Seconds per step: in all, of each phase's own work, waiting for others and for images.

        "spread" is the standard deviation of a phase's own work over its mean.
        """
        work: dict[str, list[float]] = {name: [] for name in self.training.phases}
        waited: list[float] = []
        phase_step = self.training.phase_step

        def timed(name: str, stream: Iterator[Batch]) -> None:
            data, began = self.training.data_seconds, time.perf_counter()
            phase_step(name, stream)
            wait(self.world.device)
            waited.append(self.engine.waiting.collect().waited)
            seconds = time.perf_counter() - began - waited[-1]
            work[name].append(seconds - (self.training.data_seconds - data))

        with replaced(self.training, phase_step=timed):
            times = self.steps(num)
        spreads = [statistics.stdev(w) / statistics.mean(w) for w in work.values()]
        return {
            **times,
            "waiting": sum(waited) / num,
            "phases": {name: sum(seconds) / num for name, seconds in work.items()},
            "spread": statistics.mean(spreads),
        }

    def turn(self) -> dict[str, Any]:
        """One timed run of everything; all processes of the point take part at once."""
        self.steps(max(1, self.num_steps // 4))  # uses up what was prefetched between turns
        result: dict[str, Any] = {"plain": self.steps(self.num_steps)}
        for name, variant in self.variants().items():
            with variant(self.training):
                result[name] = self.steps_by_phase(self.num_steps)
        result["save"] = self.save_seconds()
        result |= self.network()
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()  # it is the next point's turn, on the same device
        return result

    def save_seconds(self) -> float:
        """For how long a save holds up training; the rest of it goes on in the background."""
        wait(self.world.device)
        barrier(self.world)
        began = time.perf_counter()
        self.saver.save(self.training.progress, self.training.shards())
        wait(self.world.device)
        seconds = time.perf_counter() - began
        self.saver.finish()
        return seconds

    def network(self) -> dict[str, float]:
        """Latency of the smallest collective, bus bandwidth of an all-reduce of the gradients."""
        if self.world.size == 1:
            return {}
        num_bytes = 4 * max(
            sum(p.numel() for p in network.parameters())
            for network in (self.training.generator, self.training.discriminator)
        )
        num_bytes = min(num_bytes, PROBE_BYTES)
        latency = _reduce_seconds(self.world, 4, 50)
        seconds = _reduce_seconds(self.world, num_bytes, 10)
        moved = 2 * (self.world.size - 1) / self.world.size * num_bytes
        return {
            "latency_us": 1e6 * latency,
            "bus_gb_per_second": moved / max(seconds - latency, 1e-9) / 1e9,
        }


def _reduce_seconds(world: World, num_bytes: int, num: int) -> float:
    """Of an all-reduce, the median of `num`."""
    values = torch.zeros(num_bytes // 4, device=world.device)
    times = []
    for _ in range(num + 2):
        wait(world.device)
        began = time.perf_counter()
        dist.all_reduce(values)
        wait(world.device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def serve(questions: TextIO, answer: Callable[[dict[str, Any]], None]) -> None:
    """First the recipe and how to measure it, then a line for each turn, until the end."""
    task = json.loads(questions.readline())
    try:
        config = configs.validate(RunConfig, configs.parse_yaml(task["config"], "bench"), "bench")
        rank = Rank(config, task["synthetic"], task["seconds"])
        answer({"engine": rank.engine.name, "steps_per_run": rank.num_steps})
        while questions.readline():
            answer(rank.turn())
        rank.training.close()
        disconnect(rank.world)
    except (UserError, RunError) as error:
        answer({"error": str(error), "user": isinstance(error, UserError)})


def main() -> None:
    """Libraries may print to stdout: it is theirs, on stderr; the answers keep a copy for us."""
    own = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(record: dict[str, Any]) -> None:
        own.write(json.dumps(record) + "\n")
        own.flush()

    serve(sys.stdin, answer)


if __name__ == "__main__":
    main()
