"""What the scripts in benchmarks/ share: options, the config, and the record of the results."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bigan.bench.measuring import environment
from bigan.run_config import RunConfig, load_config
from bigan.urls import redacted_text


def argument_parser(description: str) -> argparse.ArgumentParser:
    """A parser with --out; `description` is the docstring of the script, its first line is used."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    return parser


def config_parser(description: str, runs: int) -> argparse.ArgumentParser:
    """`argument_parser` with a config, overrides, and --runs with the default `runs`."""
    parser = argument_parser(description)
    parser.add_argument("config", type=Path, help="for example configs/digits.yaml")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings to change")
    parser.add_argument("--runs", type=int, default=runs, help=f"timed runs (default {runs})")
    return parser


@contextlib.contextmanager
def scratch_config(given: argparse.Namespace) -> Iterator[RunConfig]:
    """The config of `config_parser`, in a temporary run folder and without MLflow."""
    with tempfile.TemporaryDirectory() as folder:
        changes = [*given.overrides, f"run_dir={folder}/run", "tracking.mlflow=false"]
        yield load_config(given.config, changes)


def write_record(
    benchmark: str, given: argparse.Namespace, results: Mapping[str, Any], **options: Any
) -> None:
    """Write `results` to --out with the options and the environment that they depend on."""
    if given.out is None:
        return
    record: dict[str, Any] = {"benchmark": benchmark}
    if "config" in given:
        record |= {"config": str(given.config), "runs": given.runs}
        record["overrides"] = [redacted_text(override) for override in given.overrides]
    record |= {"environment": environment(), **options, **results}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(record, indent=1) + "\n")


def spread(values: Mapping[str, float], unit: str = "", scale: float = 1, digits: int = 2) -> str:
    """A `summary` as "median unit (min to max)", each number times `scale`."""
    median, low, high = (f"{scale * values[key]:.{digits}f}" for key in ("median", "min", "max"))
    return f"{median}{unit and f' {unit}'} ({low} to {high})"


def met(reached: bool) -> str:
    """Whether a target was reached, in the tables."""
    return "met" if reached else "MISSED"


def to_stderr(line: str) -> None:
    """An `Echo` for messages of the engine."""
    sys.stderr.write(line + "\n")
