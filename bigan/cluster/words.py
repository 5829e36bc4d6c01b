"""The words that `bigan submit` puts into options of `sbatch`: strict patterns, parsed or refused.

Every function returns its argument, or raises `ValueError` with one line. What passes needs no
quotes in a shell and no escape in an `#SBATCH` line.
"""

from __future__ import annotations

import re

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,+@-]*")
_CONSTRAINT = re.compile(r"[A-Za-z0-9_\[(!][A-Za-z0-9_.,:=+@&|*()\[\]!-]*")
_VALUE = re.compile(r"[A-Za-z0-9_.,:;=@%+/()\[\]&|*!~^-]+")
_MEMORY = re.compile(r"0|[1-9][0-9]*[KMGT]?")
_TIME = re.compile(
    r"(?P<days>\d+)-(?P<h1>\d+)(:(?P<m1>\d+)(:(?P<s1>\d+))?)?"
    r"|(?P<h2>\d+):(?P<m2>\d+):(?P<s2>\d+)|(?P<m3>\d+)(:(?P<s3>\d+))?",
    re.ASCII,
)


def name(text: str) -> str:
    """A partition, account, QOS or job name: a100, "a100,h100", project@gpu."""
    return _matching(_NAME, text, "a name of letters, digits and _ . , + @ -")


def constraint(text: str) -> str:
    """An expression of node features: "a100&nvlink", "[rack1|rack2]"."""
    return _matching(_CONSTRAINT, text, "a constraint of SLURM like a100 or 'a100&nvlink'")


def value(text: str) -> str:
    """The value of another option of sbatch."""
    return _matching(
        _VALUE, text, "a value without spaces, quotes, backslashes and other signs of a shell"
    )


def memory(text: str) -> str:
    """The memory of a node: 64G, or 0 for all of it."""
    return _matching(_MEMORY, text, "an amount of memory like 64G or 500000M (0: all of the node)")


def time(text: str) -> str:
    """A time limit in a format of SLURM: 30, 90:00, 24:00:00, 2-00, 2-12:00, 2-12:00:00."""
    if not _TIME.fullmatch(text) or seconds(text) < 60:
        raise ValueError(
            f"{text!r} is not a time limit of at least a minute like 90 (minutes), 24:00:00 "
            "(hours:minutes:seconds) or 2-12:00:00 (days-...)"
        )
    return text


def seconds(text: str) -> int:
    """Length of a time limit."""
    found = _TIME.fullmatch(text)
    assert found is not None

    def number(*groups: str) -> int:
        return sum(int(found[group] or 0) for group in groups)

    hours = 24 * number("days") + number("h1", "h2")
    return 3600 * hours + 60 * number("m1", "m2", "m3") + number("s1", "s2", "s3")


def _matching(pattern: re.Pattern[str], text: str, expected: str) -> str:
    if not pattern.fullmatch(text):
        raise ValueError(f"{text!r} is not {expected}")
    return text
