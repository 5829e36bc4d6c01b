"""Training methods: the union of the config sections of all objectives.

A method is one file with a frozen `Config(name: Literal[...])`, whose `build` returns the
objective. Adding its Config to the union registers it (docs/extending.md).
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Tag

from bigan.objectives import gan, vae


def _name(section: Any) -> str:
    """The tag of the section; `name` may be left out: gan."""
    if isinstance(section, dict):
        return str(section.get("name", "gan"))
    return str(getattr(section, "name", "gan"))  # a number or text: refused as a gan section


AnyObjective = Annotated[
    Annotated[gan.Config, Tag("gan")]
    | Annotated[vae.Config, Tag("vae")],
    Discriminator(_name),
]  # fmt: skip
