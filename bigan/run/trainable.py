"""The `trainable` patterns of the config, which select the parameters that are trained."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from bigan.config import ConfigError
from bigan.run.stages import Stage


def is_trainable(patterns: Sequence[str] | None, name: str) -> bool:
    """Whether a parameter ("generator.linear.weight") matches one of the `trainable` patterns."""
    return patterns is None or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def check_trainable(
    patterns: Sequence[str] | None, stages: Sequence[Stage], class_counts: tuple[int, ...]
) -> None:
    """Raises `ConfigError` for a pattern that matches no parameter of any stage of the run.

    And for a stage in which no parameter of a phase is trained.
    """
    if patterns is None:
        return
    names = {
        (phase, str(stage)): [name for name, _ in module.named_parameters()]
        for stage in stages
        for phase, module in stage.config.objective.build(stage.setup(class_counts)).phases.items()
    }
    every = {name for found in names.values() for name in found}
    for pattern in patterns:
        if not fnmatch.filter(every, pattern):
            raise ConfigError(
                f"trainable: {pattern!r} matches no parameter; they are named as {min(every)}"
            )
    for (phase, stage_name), found in names.items():
        if not any(is_trainable(patterns, name) for name in found):
            raise ConfigError(
                f"trainable: no parameter of phase {phase} is left to train ({stage_name})"
            )
