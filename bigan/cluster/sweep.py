"""The file of a sweep: which settings vary, how their values are chosen, what is compared.

    config: configs/digits.yaml         # or the config of the command line
    method: {name: random, trials: 20, seed: 0}
    parameters:
      optimizer.generator.lr: {min: 1.0e-4, max: 1.0e-2, log: true}
      train.batch: [20, 40]

The parameters of a trial of grid and random search are a function of (sweep, index), so that any
process, also after a requeue, computes the same ones. Those of Optuna are in its study (study.py).
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from bigan import config as configs
from bigan.config import Frozen, Positive

NonNegativeInt = Annotated[int, Field(ge=0)]
Parameters = dict[str, Any]  # key path of the config -> value of one trial


class Grid(Frozen):
    """Every combination of the values; the last parameter varies fastest."""

    name: Literal["grid"] = "grid"


class Random(Frozen):
    """Independent draws; more `trials` keep the parameters of the earlier ones."""

    name: Literal["random"] = "random"
    trials: Positive
    seed: NonNegativeInt = 0


class Median(Frozen):
    """Prunes a trial whose best value is worse than the median of the others at that snapshot."""

    name: Literal["median"] = "median"
    startup_trials: NonNegativeInt = 5  # complete trials before the first one is pruned
    warmup_images: NonNegativeInt = 0  # of a trial, before it may be pruned


class Hyperband(Frozen):
    """Hyperband (Li et al. 2018): only the best 1 / reduction_factor of a rung continue."""

    name: Literal["hyperband"] = "hyperband"
    min_images: Positive  # of the first rung
    max_images: Positive | None = None  # of a complete trial; None: train.total_images
    reduction_factor: Annotated[int, Field(ge=2)] = 3


class Bayesian(Frozen):
    """Tree-structured Parzen estimator (Bergstra et al. 2011) of Optuna."""

    name: Literal["optuna"] = "optuna"
    trials: Positive
    seed: NonNegativeInt = 0
    startup_trials: NonNegativeInt = 10  # random ones, before the estimator is used
    prune: Annotated[Median | Hyperband, Field(discriminator="name")] | None = None


class Range(Frozen):
    """An interval, ends included. `type`: None for that of the setting in the config."""

    min: int | float
    max: int | float
    log: bool = False
    step: int | float | None = None
    type: Literal["int", "float"] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Range:
        if self.min >= self.max:
            raise ValueError(f"min = {self.min:g} is not below max = {self.max:g}")
        if self.log and self.min <= 0:
            raise ValueError(f"log needs min > 0, not {self.min:g}")
        if self.log and self.step is not None:
            raise ValueError("log and step exclude each other; list the values instead")
        if self.step is not None and not 0 < self.step <= self.max - self.min:
            raise ValueError(f"step = {self.step:g} is not in (0, max - min]")
        if self.type == "int" and not all(
            float(x).is_integer() for x in (self.min, self.max, self.step or 1)
        ):
            raise ValueError("type = int needs integers as min, max and step")
        return self

    @property
    def last(self) -> int | float:
        """The largest value: `max`, or the last one that is a multiple of `step` above `min`."""
        if self.step is None:
            return self.max
        return self.stepped(math.floor((self.max - self.min) / self.step + 1e-9))

    def stepped(self, num: int) -> int | float:
        """The value `num` steps above `min`."""
        value = self.min + num * (self.step or 1)
        return value if isinstance(value, int) else float(f"{value:.12g}")


def _kind(value: Any) -> str:
    return "range" if isinstance(value, Mapping | Range) else "values"


Values = Annotated[list[Any], Field(min_length=1), Tag("values")]
Parameter = Annotated[Values | Annotated[Range, Tag("range")], Discriminator(_kind)]
Method = Annotated[Grid | Random | Bayesian, Field(discriminator="name")]


class Sweep(Frozen):
    """The content of a sweep file. `resolved` (sweep_check.py) fills in what is None."""

    config: Path | None = None
    overrides: tuple[str, ...] = ()  # "a.b=value", of every trial
    method: Method
    metric: str | None = None  # as `bigan evaluate` logs it; None: the distance
    goal: Literal["minimize", "maximize"] | None = None  # None: minimize, for the distance
    value: Literal["last", "best"] = "last"  # of the snapshots of a trial
    evaluate: Literal["during", "after"] | None = None  # None: during, if trials are pruned
    parallel: Positive | None = None  # trials at a time; None: 1, or all of a job array
    experiment: str | None = None  # of MLflow; None: tracking.experiment
    parameters: Annotated[dict[str, Parameter], Field(min_length=1)]

    @field_validator("parameters")
    @classmethod
    def _distinct(cls, parameters: dict[str, list[Any] | Range]) -> dict[str, list[Any] | Range]:
        for key, values in parameters.items():
            if isinstance(values, list) and len({json.dumps(v) for v in values}) < len(values):
                raise ValueError(f"{key} has a value twice")
        for one, other in itertools.permutations(parameters, 2):
            if other.startswith(f"{one}."):
                raise ValueError(f"{other} is a part of {one}; leave one out")
        return parameters

    @model_validator(mode="after")
    def _combinations(self) -> Sweep:
        if self.method.name == "grid":
            ranges = [key for key, found in self.parameters.items() if isinstance(found, Range)]
            if ranges:
                raise ValueError(
                    f"parameters: {ranges[0]} is a range; method.name = grid needs a list of "
                    "values, or use random or optuna"
                )
        if self.prunes and self.evaluate == "after":
            raise ValueError("evaluate = after: method.prune needs evaluate = during")
        if self.metric and self.goal is None:
            raise ValueError("goal: is required with metric; minimize or maximize")
        return self

    @property
    def num_trials(self) -> int:
        if isinstance(self.method, Grid):
            return math.prod(len(_values(p)) for p in self.parameters.values())
        return self.method.trials

    @property
    def prunes(self) -> bool:
        return isinstance(self.method, Bayesian) and self.method.prune is not None

    @property
    def evaluates(self) -> Literal["during", "after"]:
        """When the snapshots of a trial are measured: beside the trainer, or after it."""
        return self.evaluate or ("during" if self.prunes else "after")


def load_sweep(path: Path | str) -> Sweep:
    """Read a sweep file; `ConfigError` if it is unreadable or invalid."""
    return configs.load(Sweep, path)


def point(sweep: Sweep, index: int) -> Parameters:
    """The parameters of trial `index` of a grid or of random search."""
    if isinstance(sweep.method, Grid):
        return _grid_point(sweep, index)
    from bigan.rng import numpy_generator  # imports torch

    assert isinstance(sweep.method, Random)
    return {
        # One stream per parameter: another parameter does not change its values.
        key: _drawn(found, numpy_generator(sweep.method.seed, f"sweep/{key}", index).random())
        for key, found in sweep.parameters.items()
    }


def as_overrides(parameters: Mapping[str, Any]) -> list[str]:
    """The parameters as "a.b=value", for a config."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in parameters.items()]


def shown(parameters: Mapping[str, Any]) -> str:
    """The parameters in a line: "optimizer.generator.lr=0.000123 train.batch=40"."""
    return " ".join(f"{key}={shown_value(value)}" for key, value in parameters.items())


def shown_value(value: Any) -> str:
    """A value with at most four digits after the first; text without quotes."""
    if isinstance(value, float | str):
        return f"{value:.5g}" if isinstance(value, float) else value
    return json.dumps(value, ensure_ascii=False)


def _grid_point(sweep: Sweep, index: int) -> Parameters:
    chosen: Parameters = {}
    for key, found in reversed(sweep.parameters.items()):
        values = _values(found)
        index, position = divmod(index, len(values))
        chosen[key] = values[position]
    return {key: chosen[key] for key in sweep.parameters}


def _values(parameter: list[Any] | Range) -> list[Any]:
    assert isinstance(parameter, list)  # checked: a grid has no ranges
    return parameter


def _drawn(parameter: list[Any] | Range, uniform: float) -> Any:
    """The value at quantile `uniform`, in [0, 1), of a parameter."""
    if isinstance(parameter, list):
        return parameter[int(uniform * len(parameter))]
    low, high, is_int = parameter.min, parameter.max, parameter.type == "int"
    if parameter.step is not None:
        num = round((parameter.last - low) / parameter.step) + 1
        return parameter.stepped(int(uniform * num))
    if is_int:  # each integer has an interval of width 1
        low, high = low - 0.5, high + 0.5
    if parameter.log:
        value = math.exp(math.log(low) + uniform * (math.log(high) - math.log(low)))
    else:
        value = low + uniform * (high - low)
    value = min(max(value, parameter.min), parameter.max)
    return round(value) if is_int else value
