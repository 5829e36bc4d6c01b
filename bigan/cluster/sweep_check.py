"""Checks a sweep against its config before anything starts, and freezes both in its folder.

Every point of a small grid, and the corner points of ranges, are loaded as complete configs: a
misspelled key or an invalid combination is one error at submission, not a failed job.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from bigan import atomic_files
from bigan import config as configs
from bigan.cluster.sweep import Bayesian, Hyperband, Parameters, Range, Sweep, as_overrides, shown
from bigan.cluster.sweep_folder import SweepFolder
from bigan.config import ConfigError
from bigan.errors import writing
from bigan.run_config import FROM_DATA, RunConfig, check_groups, load_config
from bigan.urls import redacted_text

MAX_POINTS = 256  # that are loaded; of more, each value with the first ones of the others
MAX_TRIALS = 10_000
Check = Callable[[RunConfig], None]
OWN_SETTINGS = ("run_dir", "tracking")  # set by the sweep for each trial
# Of a frozen sweep, these may differ when the sweep is continued.
MAY_CHANGE = ("config", "overrides", "parallel", "method.trials")


def freeze(
    sweep: Sweep, config_path: Path, overrides: Sequence[str], sweep_dir: Path | None = None
) -> SweepFolder:
    """Check the sweep and write `sweep.yaml` and `base.yaml`; the folder of the sweep.

    `overrides` are those of the command line; those of the sweep file come before them.
    `sweep_dir`: None for the run_dir of the config. A folder that has the same sweep is continued,
    also with more trials. Raises `ConfigError` for an invalid combination, and for a folder that
    has something else.
    """
    sweep, base, config = resolved(sweep, config_path, overrides)
    folder = SweepFolder(sweep_dir or config.run_dir)
    store(folder, sweep, base)
    return folder


def store(folder: SweepFolder, sweep: Sweep, base: Mapping[str, Any]) -> None:
    """Write `sweep.yaml` and `base.yaml` of a sweep that `resolved` has checked.

    Raises `ConfigError` for a folder that has another sweep, or something else.
    """
    require_same(folder, sweep, base)
    with writing(folder.path):
        folder.trials.mkdir(parents=True, exist_ok=True)
        if not folder.sweep_file.exists():
            text = yaml.safe_dump(base, sort_keys=False, allow_unicode=True)
            atomic_files.write_atomic(folder.base, text)
        atomic_files.write_atomic(folder.sweep_file, configs.dump(sweep))


def resolved(
    sweep: Sweep, config_path: Path, overrides: Sequence[str], check: Check | None = None
) -> tuple[Sweep, dict[str, Any], RunConfig]:
    """(sweep without None, content of the base config, base config), all checked.

    `check` raises `ConfigError` for a config that the processes of a trial cannot train; None: one
    process. Raises `ConfigError`.
    """
    _check_config_path(sweep, config_path)
    _check_keys(sweep, overrides)
    overrides = [*sweep.overrides, *overrides]
    base, _ = configs.read(config_path, overrides)
    config = load_config(config_path, overrides)
    if sweep.num_trials > MAX_TRIALS:
        raise ConfigError(
            f"sweep: {sweep.num_trials} trials are more than {MAX_TRIALS}; use method.name = random"
        )
    content = f"{base} {sweep.parameters}"
    if redacted_text(content) != content:
        raise ConfigError(
            f"{config_path}: a URL with credentials would be written to the folder of the sweep; "
            "use environment variables (docs/data.md)"
        )
    sweep = _with_defaults(sweep, config)
    known = _from_data(sweep, base, config)
    for parameters in _points(sweep):
        given = [*overrides, *known, *as_overrides(parameters)]
        _check_point(config_path, given, parameters, check or _check_one_process)
    return sweep, base, config


def metric_keys(config: RunConfig) -> list[str]:
    """The metrics that the evaluator logs for this config, the distance first."""
    from bigan.evaluation.evaluator import choose_sampler
    from bigan.evaluation.extractors import INCEPTION
    from bigan.evaluation.metrics import METRICS

    name, _, is_first = choose_sampler(config)
    extractor = config.evaluation.extractor
    parts = [extractor] if is_first else [extractor, name]
    names = [m.published if extractor == INCEPTION else m.name for m in METRICS.values()]
    return ["/".join(["eval", found.key, *parts]) for found in names]


def _with_defaults(sweep: Sweep, config: RunConfig) -> Sweep:
    """The sweep without None: types of ranges, metric, goal."""
    known = metric_keys(config)
    metric = sweep.metric or known[0]
    if metric not in known:
        raise ConfigError(f"sweep: metric = {metric!r}: expected one of {', '.join(known)}")
    method = sweep.method
    if isinstance(method, Bayesian) and isinstance(method.prune, Hyperband):
        images = method.prune.max_images or config.train.total_images
        prune = method.prune.model_copy(update={"max_images": images})
        method = method.model_copy(update={"prune": prune})
    return sweep.model_copy(
        update={
            "metric": metric,
            "goal": sweep.goal or "minimize",
            "method": method,
            "experiment": sweep.experiment or config.tracking.experiment,
            "parameters": {
                key: _typed(key, found, config) if isinstance(found, Range) else found
                for key, found in sweep.parameters.items()
            },
        }
    )


def _typed(key: str, found: Range, config: RunConfig) -> Range:
    """The range with the type of its setting: that of the value in the config, if it has one."""
    bounds = [x for x in (found.min, found.max, found.step) if x is not None]
    integral = all(float(x).is_integer() for x in bounds)
    kind: str | None = found.type
    if kind is None:
        value = dict(configs.leaves(config.model_dump(mode="json"))).get(key)
        is_int = isinstance(value, int) if value is not None else integral
        kind = "int" if is_int else "float"
        if isinstance(value, bool | str) or (kind == "int" and not integral):
            raise ConfigError(
                f"sweep: parameters: {key} = {value!r} in the config; a range of {found.min} to "
                f"{found.max} does not fit"
            )
    convert = int if kind == "int" else float
    step = None if found.step is None else convert(found.step)
    update = {"type": kind, "min": convert(found.min), "max": convert(found.max), "step": step}
    return found.model_copy(update=update)


def _points(sweep: Sweep) -> Iterator[Parameters]:
    """The parameters to check: all combinations of values and ends, or one varied at a time."""
    ends = {
        key: [found.min, found.last] if isinstance(found, Range) else found
        for key, found in sweep.parameters.items()
    }
    if math.prod(map(len, ends.values())) <= MAX_POINTS:
        for values in itertools.product(*ends.values()):
            yield dict(zip(ends, values, strict=True))
        return
    first = {key: found[0] for key, found in ends.items()}
    yield first
    for key, found in ends.items():
        for value in found[1:]:
            yield {**first, key: value}
    yield {key: found[-1] for key, found in ends.items()}


def _from_data(sweep: Sweep, base: dict[str, Any], config: RunConfig) -> list[str]:
    """Overrides with what the base config has from the manifest, which is then read once.

    Empty if settings of the data or of the model vary.
    """
    if any(key.partition(".")[0] in ("data", "model") for key in sweep.parameters):
        return []
    model = config.model.model_dump(mode="json")
    given = base.get("model") or {}
    return as_overrides({f"model.{key}": model[key] for key in FROM_DATA if key not in given})


def _check_one_process(config: RunConfig) -> None:
    check_groups(config, world_size=1)


def _check_point(
    path: Path, overrides: Sequence[str], parameters: Parameters, check: Check
) -> None:
    try:
        check(load_config(path, overrides))
    except ConfigError as error:
        text = str(error).removeprefix("command line: ")
        raise ConfigError(f"sweep: the trial with {shown(parameters)}: {text}") from None


def _check_config_path(sweep: Sweep, config_path: Path) -> None:
    if sweep.config is not None and sweep.config.resolve() != Path(config_path).resolve():
        raise ConfigError(
            f"sweep: config = {sweep.config} is not the config of the command line, {config_path}; "
            "leave one of them out"
        )


def _check_keys(sweep: Sweep, overrides: Sequence[str]) -> None:
    given = {text.partition("=")[0].strip() for text in (*sweep.overrides, *overrides)}
    for key in sweep.parameters:
        if any(key == own or key.startswith(f"{own}.") for own in OWN_SETTINGS):
            raise ConfigError(f"sweep: parameters: {key} cannot vary; a sweep sets it itself")
        clash = [g for g in given if g == key or g.startswith(f"{key}.")]
        if clash:
            raise ConfigError(f"sweep: {clash[0]} is set by an override, and varied; leave one out")


def require_same(folder: SweepFolder, sweep: Sweep, base: Mapping[str, Any]) -> None:
    """Raises `ConfigError` unless the folder is new, or has this sweep of this config."""
    if folder.sweep_file.is_file():
        before = folder.sweep().model_dump(mode="json")
        found = [
            (f"sweep: {key}", old, new)
            for key, old, new in configs.differences(before, sweep.model_dump(mode="json"))
            if key not in MAY_CHANGE
        ]
        old_base, _ = configs.read(folder.base)
        found += [(key, old, new) for key, old, new in configs.differences(old_base, base)]
        if found:
            key, old, new = found[0]
            raise ConfigError(
                f"{folder.path}: this sweep has {key} = {old!r}, not {new!r}; use another "
                "run_dir=... for another sweep"
            )
        return
    if not folder.path.is_dir():
        return
    allowed = {"slurm", folder.base.name}
    others = [p.name for p in folder.path.iterdir() if p.name not in allowed]
    if others := [name for name in others if not name.startswith(".")]:
        what = "is a run" if "config.yaml" in others else f"has {others[0]}"
        raise ConfigError(f"{folder.path}: {what}; a sweep needs a folder of its own, run_dir=...")
