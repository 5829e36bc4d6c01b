"""The Optuna study of a sweep, shared by all of its trials through a file.

The storage is Optuna's journal: lines appended under a lock that is a symbolic link, which also
works on NFS, where the locks of SQLite do not. A trial of the study has the user attribute `index`
and is created together with it, so that a trial that starts again finds its own one. The sampler
has a seed per trial: a sweep that runs one trial at a time is reproducible.

Optuna is imported in the functions.
"""

from __future__ import annotations

import functools
import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from bigan.cluster.sweep import Bayesian, Hyperband, Parameters, Range, Sweep
from bigan.cluster.sweep_folder import SweepFolder
from bigan.errors import UserError

STUDY = "sweep"
Result = TypeVar("Result")


def _names_damage(function: Callable[..., Result]) -> Callable[..., Result]:
    """Raise `UserError` where a damaged journal is the cause of an exception of Optuna."""

    @functools.wraps(function)
    def wrapped(folder: SweepFolder, *arguments: Any) -> Result:
        try:
            return function(folder, *arguments)
        except Exception as error:
            if not _is_damaged(folder.journal):
                raise
            raise UserError(
                f"{folder.journal}: damaged; delete it: the results of the trials that have ended "
                "are kept, and the search starts again with the next trial"
            ) from error

    return wrapped


def _is_damaged(journal: Path) -> bool:
    """Whether a line that is complete is not JSON."""
    try:
        for line in journal.read_bytes().split(b"\n")[:-1]:
            json.loads(line)
    except OSError:
        return False
    except ValueError:
        return True
    return False


@_names_damage
def ask(folder: SweepFolder, sweep: Sweep, index: int) -> Parameters:
    """The parameters of trial `index`, chosen when it begins for the first time."""
    import optuna

    study = open_study(folder, sweep, index)
    found = _find(study, index)
    if found is None:
        running = optuna.trial.TrialState.RUNNING
        study.add_trial(optuna.trial.create_trial(state=running, user_attrs={"index": index}))
        found = _find(study, index)
    if found.state.is_finished():
        return decoded(sweep, found.params)
    trial = optuna.trial.Trial(study, found._trial_id)
    for key, parameter in sweep.parameters.items():
        _suggest(trial, key, parameter)
    return decoded(sweep, trial.params)


@_names_damage
def report(folder: SweepFolder, sweep: Sweep, index: int, values: Mapping[int, float]) -> bool:
    """Report images_seen -> value of a trial, oldest first; returns whether to prune it."""
    import optuna

    study = open_study(folder, sweep, index)
    found = _find(study, index)
    if found is None or found.state.is_finished():
        return False
    trial = optuna.trial.Trial(study, found._trial_id)
    prune = False
    for images_seen, value in sorted(values.items()):
        if images_seen not in found.intermediate_values:
            trial.report(value, images_seen)
            prune = bool(trial.should_prune())
        if prune:
            break
    return prune


@_names_damage
def tell(
    folder: SweepFolder,
    sweep: Sweep,
    index: int,
    state: Literal["complete", "pruned", "failed"],
    value: float | None,
) -> None:
    """Record the end of a trial; nothing if it has ended before."""
    import optuna

    states = optuna.trial.TrialState
    study = open_study(folder, sweep, index)
    found = _find(study, index)
    if found is not None:
        optuna_state = {
            "complete": states.COMPLETE,
            "pruned": states.PRUNED,
            "failed": states.FAIL,
        }[state]
        study.tell(
            found.number,
            value if state == "complete" else None,
            state=optuna_state,
            skip_if_finished=True,
        )


def importances(
    sweep: Sweep, results: list[tuple[Parameters, float]], min_trials: int = 4
) -> dict[str, float]:
    """Parameter -> share of the variance of the value (fANOVA, Hutter et al. 2014), largest first.

    `results` of complete trials of any method. Empty for fewer than `min_trials` and if the values
    are all equal; parameters that had a single value are left out.
    """
    if len(results) < min_trials or len({value for _, value in results}) < 2:
        return {}
    encoded = [_encoded(sweep, parameters) for parameters, _ in results]
    varied = [key for key in sweep.parameters if len({e[key] for e in encoded}) > 1]
    if not varied:
        return {}
    import optuna

    _be_quiet()
    kinds = {key: _distribution(sweep.parameters[key]) for key in varied}
    study = optuna.create_study()
    for parameters, (_, value) in zip(encoded, results, strict=True):
        chosen = {key: parameters[key] for key in varied}
        study.add_trial(optuna.trial.create_trial(params=chosen, distributions=kinds, value=value))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {key: float(value) for key, value in found.items()}


def decoded(sweep: Sweep, params: Mapping[str, Any]) -> Parameters:
    """The values of Optuna as those of the config, in the order of the sweep."""
    return {
        key: params[key] if isinstance(found, Range) else json.loads(params[key])
        for key, found in sweep.parameters.items()
    }


def _encoded(sweep: Sweep, parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: parameters[key] if isinstance(found, Range) else json.dumps(parameters[key])
        for key, found in sweep.parameters.items()
    }


def open_study(folder: SweepFolder, sweep: Sweep, index: int) -> Any:
    """The study of Optuna, created if there is none, with the sampler of trial `index`."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    _be_quiet()
    assert isinstance(sweep.method, Bayesian)
    key = hashlib.blake2b(f"{sweep.method.seed}/sweep/{index}".encode(), digest_size=4).digest()
    sampler = optuna.samplers.TPESampler(
        seed=int.from_bytes(key, "little"),
        n_startup_trials=sweep.method.startup_trials,
        constant_liar=True,  # trials that run at once do not get the same parameters
    )
    storage = JournalStorage(JournalFileBackend(str(folder.journal)))
    parts = {"storage": storage, "sampler": sampler, "pruner": _pruner(sweep.method)}
    try:  # first: `create_study` appends a line even if there is a study
        return optuna.load_study(study_name=STUDY, **parts)
    except KeyError:
        return optuna.create_study(
            study_name=STUDY, direction=sweep.goal, load_if_exists=True, **parts
        )


def _pruner(method: Bayesian) -> Any:
    import optuna

    prune = method.prune
    if prune is None:
        return optuna.pruners.NopPruner()
    if isinstance(prune, Hyperband):
        return optuna.pruners.HyperbandPruner(
            min_resource=prune.min_images,
            max_resource=prune.max_images or "auto",
            reduction_factor=prune.reduction_factor,
        )
    return optuna.pruners.MedianPruner(
        n_startup_trials=prune.startup_trials, n_warmup_steps=prune.warmup_images
    )


def _find(study: Any, index: int) -> Any:
    """The first trial of the study with this index, or None."""
    trials = study.get_trials(deepcopy=False)
    return next((t for t in trials if t.user_attrs.get("index") == index), None)


def _distribution(parameter: list[Any] | Range) -> Any:
    """The distribution of a parameter; values of a list are their JSON texts."""
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if isinstance(parameter, list):
        return CategoricalDistribution([json.dumps(value) for value in parameter])
    low, high, log = parameter.min, parameter.last, parameter.log
    if parameter.type == "int":
        return IntDistribution(int(low), int(high), log=log, step=int(parameter.step or 1))
    return FloatDistribution(low, high, log=log, step=parameter.step)


def _suggest(trial: Any, key: str, parameter: list[Any] | Range) -> None:
    kind = _distribution(parameter)
    if isinstance(parameter, list):
        trial.suggest_categorical(key, kind.choices)
    elif parameter.type == "int":
        trial.suggest_int(key, kind.low, kind.high, step=kind.step, log=kind.log)
    else:
        trial.suggest_float(key, kind.low, kind.high, step=kind.step, log=kind.log)


def _be_quiet() -> None:
    """No lines about every trial on stderr, and none about experimental arguments."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
