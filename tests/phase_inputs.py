"""Inputs of single phases, as a training step would gather them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bigan.data.streaming.stream import Batch
from bigan.objectives.base import Result, Step, Tensors, Terms, variants
from bigan.run.state import TrainState

NOTHING: Mapping[str, Iterator[Batch]] = {}


def step_of(state: TrainState, phase: str, terms: Terms | None = None) -> Step:
    """The first step of a phase from `images_seen` 0 on, or the first with these terms."""
    steps = variants(state.objective, state.config.images_per_step)
    return next(s for s in steps if s.phase == phase and terms in (None, s.terms))


def inputs_of(
    state: TrainState, step: Step, streams: Mapping[str, Iterator[Batch]] = NOTHING
) -> Tensors:
    """Inputs of the only micro-batch of a step; without streams on the batch read last."""
    (inputs,) = state._inputs(step, streams, [{}])
    return inputs


def evaluate(state: TrainState, phase: str, inputs: Tensors, terms: Terms) -> Result:
    """The forward of a phase, as it is under an engine of one process."""
    result: Result = state.objective.phases[phase](state._reads(phase), inputs, terms)
    return result


def network(state: TrainState, name: str) -> Any:
    """A trained network; its attributes are those of its family."""
    return state.networks[name]


def parameters_of(state: TrainState, phase: str) -> list[Any]:
    """Parameters of a phase, which get gradients as in a step of it."""
    state.prepared[phase].wrapped.freeze(False)
    return list(state.objective.phases[phase].parameters())
