"""`python -m bigan.cluster.run_dir CONFIG [a.b=value ...]`: print the run folder of a config.

For batch scripts: it reads the YAML and the overrides only and imports nothing heavy. `bigan train`
validates the rest.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from bigan import config as configs
from bigan.config import ConfigError
from bigan.distributed.signals import print_line
from bigan.errors import UserError
from bigan.urls import redacted_text


def run_dir(config: Path | str, overrides: Sequence[str] = ()) -> Path:
    """The run folder of a config; raises `ConfigError`."""
    content, _ = configs.read(config, overrides)
    if "run_dir" not in content:
        raise ConfigError(f"{config}: run_dir: this key is required and missing")
    found = content["run_dir"]
    if not isinstance(found, str) or not found or not found.isprintable():
        raise ConfigError(f"{config}: run_dir = {found!r}: expected the path of a folder")
    return Path(found)


def main(arguments: Sequence[str]) -> int:
    """Print the run folder; returns the exit code, 2 for input that cannot be used."""
    try:
        if not arguments:
            raise UserError("usage: python -m bigan.cluster.run_dir CONFIG [a.b=value ...]")
        sys.stdout.write(f"{run_dir(arguments[0], arguments[1:])}\n")
    except UserError as error:
        print_line(redacted_text(" ".join(str(error).split())))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
