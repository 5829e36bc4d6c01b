"""The `trainable` patterns of the config, which select the parameters that are trained."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from bigan.config import ConfigError
from bigan.objectives.base import Objective


def is_trainable(patterns: Sequence[str] | None, name: str) -> bool:
    """Whether a parameter ("generator.linear.weight") matches one of the `trainable` patterns."""
    return patterns is None or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def check_trainable(patterns: Sequence[str] | None, objective: Objective) -> None:
    """Raises `ConfigError` if a pattern matches no parameter, or none of a phase is trained."""
    if patterns is None:
        return
    names = {
        phase: [name for name, _ in module.named_parameters()]
        for phase, module in objective.phases.items()
    }
    every = [name for found in names.values() for name in found]
    for pattern in patterns:
        if not fnmatch.filter(every, pattern):
            raise ConfigError(
                f"trainable: {pattern!r} matches no parameter; they are named as {every[0]}"
            )
    for phase, found in names.items():
        if not any(is_trainable(patterns, name) for name in found):
            raise ConfigError(f"trainable: no parameter of phase {phase} is left to train")
