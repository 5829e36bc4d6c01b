"""What the benchmarks share: prepared states, synthetic images, timing of phases, summaries."""

from __future__ import annotations

import itertools
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from bigan.data.streaming.stream import Batch
from bigan.engine import Echo, Engine
from bigan.objectives.base import Step
from bigan.run.state import Streams, TrainState
from bigan.run_config import RunConfig
from bigan.versions import hardware, versions

Clock = Callable[[], float]


def prepared_state(
    config: RunConfig, echo: Echo, classes: dict[str, int] | None = None
) -> TrainState:
    """A train state after its warm-up pass; `classes` as of `check_data`, None: one image each."""
    classes = classes or {str(label): 1 for label in range(config.model.num_classes)}
    state = TrainState(config, Engine(config, echo), classes)
    state.prepare()
    return state


def synthetic_streams(state: TrainState) -> dict[str, Iterator[Batch]]:
    """Endless streams of one random micro-batch of this rank, already on the device."""
    return {name: itertools.repeat(_synthetic_batch(state)) for name in state.config.streams}


def _synthetic_batch(state: TrainState) -> Batch:
    model, device = state.config.model, state.world.device
    num = state.config.train.batch // state.accumulation // state.world.size
    shape = (num, model.height, model.width, model.image_channels)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, model.num_classes, (num,), generator=generator)
    return Batch(pixels.to(device), labels.to(device), np.arange(num))


class PhaseTimer:
    """Times the phases of training steps through the `on_step` hook of `TrainState.advance`.

    Waiting for other ranks and for images is not part of a phase's time. A separate regularization
    step adds to the main step that it follows. The host waits for the device after each step.
    """

    def __init__(self, state: TrainState, clock: Clock = time.perf_counter) -> None:
        self._state, self._clock = state, clock
        self.seconds: dict[str, list[float]] = {}  # phase -> one value per main step
        self.waited = 0.0  # seconds, for other ranks
        self._last: tuple[str, int] | None = None
        self._began = self._data = 0.0

    def advance(self, streams: Streams, steps: Sequence[Step] | None = None) -> None:
        """One training step; `steps` as in `TrainState.advance`."""
        wait(self._state.world.device)
        self._last = None
        self._restart()
        self._state.advance(streams, steps, on_step=self._on_step)
        wait(self._state.world.device)

    def _restart(self) -> None:
        self._began, self._data = self._clock(), self._state.data_seconds

    def _on_step(self, step: Step) -> None:
        wait(self._state.world.device)
        waited = self._state.engine.waiting.collect().waited
        data = self._state.data_seconds - self._data
        seconds = self._clock() - self._began - waited - data
        times = self.seconds.setdefault(step.phase, [])
        if self._last == (step.phase, step.at):
            times[-1] += seconds
        else:
            times.append(seconds)
        self._last = (step.phase, step.at)
        self.waited += waited
        self._restart()


def device_clock(device: torch.device) -> Clock:
    """On a CPU processor time, which other processes hardly change; on a GPU wall time."""
    return time.process_time if device.type == "cpu" else time.perf_counter


def cpu_seconds() -> float:
    """User and system time of this process and of its children that have ended."""
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, who))


def environment() -> dict[str, Any]:
    """What the results depend on: date, versions, hardware and threads; JSON values."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
    }


def device_name(environment: dict[str, Any]) -> str:
    """The device that an `environment` measured on."""
    found = environment["hardware"]
    return str(found["gpus"][0] if found["gpus"] else found["cpu"])


def summary(values: Sequence[float]) -> dict[str, float]:
    """{"median", "min", "max"}."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def wait(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: of the CUDA allocator, or the peak resident size of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
