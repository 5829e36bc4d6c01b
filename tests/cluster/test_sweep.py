"""The sweep file, the parameters of its trials, and the checks before a sweep starts."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import ROOT, SMOKE, finish, python
from sweeps import GRID, LR, METRIC, SEED, frozen, sweep_of

from bigan.cluster.sweep import Range, load_sweep, point
from bigan.cluster.sweep_check import freeze, metric_keys, resolved
from bigan.cluster.sweep_folder import SweepFolder
from bigan.errors import UserError
from bigan.run_config import load_config

RANDOM: dict[str, Any] = {"method": {"name": "random", "trials": 5, "seed": 1}}


def test_grid_has_every_combination_once(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, **GRID)
    points = [point(sweep, index) for index in range(sweep.num_trials)]
    assert points == [{LR: lr, SEED: seed} for lr in (0.1, 0.2) for seed in (0, 1)]


def test_random_points_are_functions_of_seed_parameter_and_index(tmp_path: Path) -> None:
    ranges = {LR: {"min": 1e-4, "max": 1e-1, "log": True}, "train.batch": [20, 40, 80]}
    one = sweep_of(tmp_path, **RANDOM, parameters=ranges)
    longer = {"method": {"name": "random", "trials": 50, "seed": 1}}
    other = sweep_of(tmp_path, **longer, parameters={SEED: [0, 1], **ranges})
    assert [point(one, i)[LR] for i in range(5)] == [point(other, i)[LR] for i in range(5)]
    assert len({point(one, i)[LR] for i in range(5)}) == 5
    third = sweep_of(tmp_path, method={"name": "random", "trials": 5, "seed": 2}, parameters=ranges)
    assert point(third, 0)[LR] != point(one, 0)[LR]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"min": 0, "max": 3, "type": "int"}, {0, 1, 2, 3}),
        ({"min": 0.0, "max": 0.35, "step": 0.1}, {0.0, 0.1, 0.2, 0.3}),
        ({"min": 2, "max": 9, "step": 3, "type": "int"}, {2, 5, 8}),
        ({"min": 1, "max": 3, "log": True, "type": "int"}, {1, 2, 3}),
        (["a", None, [1, 2]], {"a", None, (1, 2)}),
    ],
)
def test_random_values_are_those_of_the_parameter(
    given: Any, expected: set[Any], tmp_path: Path
) -> None:
    sweep = sweep_of(tmp_path, **RANDOM, parameters={"a.b": given})
    found = [point(sweep, index)["a.b"] for index in range(100)]
    assert {tuple(v) if isinstance(v, list) else v for v in found} == expected


def test_logarithmic_range_is_uniform_in_the_exponent(tmp_path: Path) -> None:
    parameters = {"a.b": {"min": 1e-4, "max": 1.0, "log": True}}
    sweep = sweep_of(tmp_path, **RANDOM, parameters=parameters)
    exponents = [math.log10(point(sweep, index)["a.b"]) for index in range(400)]
    quarters = [sum(low <= e < low + 1 for e in exponents) for low in (-4, -3, -2, -1)]
    assert min(quarters) > 70


def _with(section: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**GRID, **section, **changes}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "misspelled method": (_with({"method": {"name": "grid2"}}), "method.name.*'grid'"),
    "no trials": (_with({"method": {"name": "random"}}), r"method\.trials"),
    "no parameters": (_with({"parameters": {}}), "parameters"),
    "range in a grid": (_with({"parameters": {LR: {"min": 1, "max": 2}}}), f"{LR}.*grid"),
    "no list": (_with({"parameters": {SEED: 3}}), SEED),
    "value twice": (_with({"parameters": {SEED: [3, 3]}}), SEED),
    "nested": (_with({"parameters": {"train": [{}], SEED: [1]}}), f"{SEED}.*train"),
    "misspelled key": (_with({"parameters": {"train.sede": [1]}}), r"train\.sede.*train\.seed"),
    "bad value": (_with({"parameters": {"objective.loss": ["hing"]}}), "hing'.*hinge"),
    "combination": (
        _with({"parameters": {"train.batch": [20, 40], "train.micro_batch": [20, 40]}}),
        r"train\.batch=20 train\.micro_batch=40",
    ),
    "run_dir": (_with({"parameters": {"run_dir": ["a", "b"]}}), "run_dir"),
    "tracking": (_with({"parameters": {"tracking.mlflow": [True, False]}}), "tracking"),
    "metric": (_with({}, metric="eval/fid", goal="minimize"), METRIC),
    "metric without goal": (_with({}, metric=METRIC), "goal"),
    "pruning after training": (
        _with({"method": {"name": "optuna", "trials": 2, "prune": {"name": "median"}}},
              evaluate="after"),
        "evaluate",
    ),
    "empty range": (_with(RANDOM, parameters={LR: {"min": 2, "max": 1}}), "min"),
    "log of zero": (_with(RANDOM, parameters={LR: {"min": 0, "max": 1, "log": True}}), "log"),
    "end of a range": (_with(RANDOM, parameters={LR: {"min": -1, "max": 1}}), f"{LR}=-1"),
    "range of words": (_with(RANDOM, parameters={"objective.loss": {"min": 0, "max": 1}}), "hinge"),
    "fractions of an integer": (_with(RANDOM, parameters={SEED: {"min": 0.5, "max": 2}}), SEED),
    "too many": (
        _with({"parameters": {f"train.{key}": list(range(1, 60)) for key in (
            "seed", "batch", "tick_images")}}),
        "205379",
    ),
    "credentials": (
        _with({"parameters": {"data.path": ["s3://key:secret@store/set", "data"]}}), "credentials",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_found_before_anything_starts(case: str, tmp_path: Path) -> None:
    content, facts = BAD[case]
    with pytest.raises(UserError) as error:
        frozen(tmp_path, **content)
    assert re.search(facts, str(error.value))
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)
    assert not (tmp_path / "sweep").exists()


def test_every_point_of_a_grid_and_the_ends_of_ranges_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bigan.cluster import sweep_check

    loaded: list[list[str]] = []
    monkeypatch.setattr(
        sweep_check, "_check_point", lambda path, overrides, *_: loaded.append(list(overrides))
    )
    resolved(sweep_of(tmp_path, **GRID), SMOKE, [])
    assert [text[-2:] for text in loaded] == [
        [f"{LR}={lr}", f"{SEED}={seed}"] for lr in (0.1, 0.2) for seed in (0, 1)
    ]
    del loaded[:]
    stepped = {LR: {"min": 0.1, "max": 0.75, "step": 0.3}, SEED: [0, 1, 2]}
    resolved(sweep_of(tmp_path, **RANDOM, parameters=stepped), SMOKE, [])
    assert {text[-2] for text in loaded} == {f"{LR}=0.1", f"{LR}=0.7"}
    assert len(loaded) == 6
    del loaded[:]
    many = {f"train.{key}": list(range(1, 31)) for key in ("seed", "tick_images")}
    resolved(sweep_of(tmp_path, method={"name": "grid"}, parameters=many), SMOKE, [])
    assert len(loaded) == 30 + 29 + 1  # each value at least once, not 900 configs
    assert {text for each in loaded for text in each} >= {
        f"{key}={value}" for key, values in many.items() for value in values
    }


def test_defaults_are_filled_in(tmp_path: Path) -> None:
    ranges = {LR: {"min": 1, "max": 2}, SEED: {"min": 0, "max": 9}}
    method = {"name": "optuna", "trials": 2, "prune": {"name": "hyperband", "min_images": 100}}
    sweep = frozen(tmp_path, ["train.total_images=800"], method=method, parameters=ranges).sweep()
    assert (sweep.metric, sweep.goal, sweep.experiment) == (METRIC, "minimize", "bigan")
    assert sweep.evaluates == "during"
    kinds = {k: p.type for k, p in sweep.parameters.items() if isinstance(p, Range)}
    assert kinds == {LR: "float", SEED: "int"}
    assert sweep.method.model_dump()["prune"]["max_images"] == 800


def test_metrics_are_those_of_the_evaluator() -> None:
    assert metric_keys(load_config(SMOKE)) == [METRIC, "eval/cs/digits8-cnn-v1"]
    published = load_config(SMOKE, ["evaluation.extractor=inception-v3-compat"])
    assert metric_keys(published)[0] == "eval/fid/inception-v3-compat"
    vae = load_config(ROOT / "configs/smoke/vae-digits.yaml", ["evaluation.sampler=reconstruction"])
    assert metric_keys(vae)[0] == f"{METRIC}/reconstruction"


def test_frozen_sweep_is_complete_and_its_own_input(tmp_path: Path) -> None:
    folder = frozen(tmp_path, ["train.total_images=80"], **GRID)
    assert folder.path == tmp_path / "sweep"
    base = yaml.safe_load(folder.base.read_text())
    assert base["train"]["total_images"] == 80
    assert "evaluation" in base
    assert "precision" not in base  # defaults are not in it: they may not fit a trial
    again = freeze(folder.sweep(), SMOKE, ["train.total_images=80"])
    assert again.sweep() == folder.sweep()


def test_folder_continues_the_same_sweep_only(tmp_path: Path) -> None:
    random = {"method": {"name": "random", "trials": 5}, "parameters": {SEED: [0, 1]}}
    frozen(tmp_path, **random)
    more = {**random, "method": {"name": "random", "trials": 9}, "parallel": 2}
    assert frozen(tmp_path, **more).sweep().num_trials == 9
    for overrides, change, fact in (
        ([], {"parameters": {SEED: [0, 2]}}, SEED),
        ([], {"value": "best"}, "value"),
        (["train.batch=20"], {}, "train.batch"),
    ):
        with pytest.raises(UserError, match=fact):
            frozen(tmp_path, overrides, **{**more, **change})
    assert SweepFolder(tmp_path / "sweep").sweep().num_trials == 9


@pytest.mark.parametrize("name", ["config.yaml", "notes.txt"])
def test_folder_with_something_else_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "sweep" / "slurm").mkdir(parents=True)
    frozen(tmp_path, **GRID)  # the scripts of `bigan submit` are there before
    other = tmp_path / "other"
    (other / "sweep").mkdir(parents=True)
    (other / "sweep" / name).touch()
    with pytest.raises(UserError, match=re.escape(str(other / "sweep"))):
        frozen(other, **GRID)


def test_config_of_the_command_line_must_agree(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, **GRID)
    with pytest.raises(UserError, match=r"vae-digits\.yaml"):
        freeze(sweep, ROOT / "configs/smoke/vae-digits.yaml", [])
    with pytest.raises(UserError, match=SEED):
        freeze(sweep, SMOKE, [f"{SEED}=1"])


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "sweeps").glob("*.yaml")), ids=str)
def test_example_sweeps_are_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    sweep = load_sweep(path)
    assert sweep.config is not None
    checked, _, config = resolved(sweep, sweep.config, ["compile=eager"])
    assert checked.metric == METRIC
    assert config.run_dir == Path("runs") / path.stem


def test_optuna_is_not_imported_for_a_grid(tmp_path: Path) -> None:
    folder = frozen(tmp_path, **GRID)
    code = """
import sys
from bigan.cluster.trial import main
main(["begin", sys.argv[1], "3"])
assert not {"optuna", "torch", "mlflow"} & set(sys.modules)
"""
    out, _ = finish(python(code, folder.path))
    assert out.splitlines() == [str(folder.run(3).path), "after"]
