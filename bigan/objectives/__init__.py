"""Training methods: the union of the config sections of all objectives.

A method is one file with a frozen `Config(name: Literal[...])`, whose `build` makes the objective.
Adding its Config to the union registers it (docs/extending.md).
"""

from __future__ import annotations

from bigan.objectives import gan

AnyObjective = gan.Config
