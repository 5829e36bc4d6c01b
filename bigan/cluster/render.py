"""Batch scripts from the Jinja2 templates in `templates/`.

Every value that a template prints is quoted for bash, because the environment does so and not the
template; only text of the class `Trusted` is not. The files `*.sh` are included verbatim.
"""

from __future__ import annotations

import importlib.resources
import shlex
from typing import Any

import jinja2


class Trusted(str):
    """Shell code: the `setup` of the user's own profile."""


def source(name: str) -> str:
    """The text of a file in `templates/`."""
    return (importlib.resources.files("bigan.cluster") / "templates" / name).read_text("utf-8")


def render(template: str, values: dict[str, Any]) -> str:
    """The script of a template; raises `jinja2.UndefinedError` for a value that is missing."""
    return _environment().get_template(template).render(values)


def _quoted(value: object) -> str:
    return value if isinstance(value, Trusted) else shlex.quote(str(value))


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(_template),
        undefined=jinja2.StrictUndefined,
        finalize=_quoted,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # bash, not HTML
    )


def _template(name: str) -> str:
    text = source(name)
    # bash has ${#array[@]}, and {# begins a comment of Jinja2.
    return text if name.endswith(".j2") else f"{{% raw %}}\n{text}{{% endraw %}}\n"
