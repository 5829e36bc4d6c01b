"""The report of a sweep, at any time."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sweeps import GRID, LR, OPTUNA, SEED, fake_run, frozen, sweep_file

from bigan.cli.main import main
from bigan.cluster import study, trial
from bigan.cluster.sweep_folder import SweepFolder, best


def _ended(folder: SweepFolder, values: Sequence[float | None]) -> SweepFolder:
    """The sweep with trials that have these values; None: failed."""
    for index, value in enumerate(values):
        trial.begin(folder, index)
        if value is not None:
            fake_run(folder, index, {400: value})
        trial.end(folder, index, problem="out of memory")
    return folder


def test_report_names_the_best_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _ended(frozen(tmp_path, **GRID), [3.0, 1.5, None])
    assert main(["sweep-report", str(folder.path)]) == 0
    out = capsys.readouterr().out
    best = next(line for line in out.splitlines() if line.startswith("best"))
    assert str(folder.path / "001") in best
    assert "1.5" in best
    assert f"{LR}=0.1 {SEED}=1" in best
    assert "002 failed: out of memory" in out
    assert f"delete {folder.trials}" in out
    rows = list(csv.DictReader((folder.path / "report.csv").open()))
    assert [row["state"] for row in rows] == ["complete", "complete", "failed"]
    assert [float(row[LR]) for row in rows] == [0.1, 0.1, 0.2]
    assert rows[1]["run_dir"] == str(folder.path / "001")
    table = (folder.path / "report.md").read_text()
    assert "| 001 * | complete | 0.1 | 1 | 1.5 | 400 |" in table
    with Image.open(folder.path / "sweep.png") as picture:
        assert picture.width > 1000


def test_report_of_a_sweep_that_has_hardly_begun(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = frozen(tmp_path, **OPTUNA)
    out = tmp_path / "elsewhere"
    for num_begun in range(2):
        assert main(["sweep-report", str(folder.path), "--out", str(out)]) == 0
        assert f"{num_begun} running" in capsys.readouterr().out
        trial.begin(folder, num_begun)
    assert {path.name for path in out.iterdir()} == {"report.md", "report.csv", "sweep.png"}
    assert not (folder.path / "report.md").exists()


def test_folder_of_no_sweep_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep-report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path) in error
    assert error.count("\n") == 1


def test_goal_and_value_are_those_of_the_sweep(tmp_path: Path) -> None:
    maximized = {"goal": "maximize", "metric": "eval/fd/digits8-cnn-v1"}
    folder = _ended(frozen(tmp_path, **GRID, **maximized), [3.0, 1.5, 3.0])
    found = best(folder.read_all(), folder.sweep().goal)
    assert found is not None
    assert found.index == 0  # the first of equal ones


def test_importance_is_that_of_the_parameter_that_matters(tmp_path: Path) -> None:
    parameters = {LR: [0.1, 0.2, 0.3], "trainable": [None, ["generator.*"]], SEED: [0]}
    folder = frozen(tmp_path, method={"name": "grid"}, parameters=parameters)
    _ended(folder, [1.0, 1.1, 4.0, 4.1, 9.0, 9.1])
    results = [(t.parameters, t.value or 0.0) for t in folder.read_all()]
    shares = study.importances(folder.sweep(), results)
    assert list(shares) == [LR, "trainable"]
    assert shares[LR] > 0.9
    assert sum(shares.values()) == pytest.approx(1.0)
    assert study.importances(folder.sweep(), results[:3]) == {}
    assert study.importances(folder.sweep(), [(p, 1.0) for p, _ in results]) == {}


def test_damaged_record_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _ended(frozen(tmp_path, **GRID), [1.0])
    path = folder.trials / "000.json"
    for content in ({"index": 0}, [], {"index": 0, "parameters": "x"}):
        path.write_text(json.dumps(content))
        assert main(["sweep-report", str(folder.path)]) == 2
        assert str(path) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"config": None}, "config"),
        ({"overrides": ["run_dir=runs/none", "data.path=no/such/data"]}, "no/such/data"),
        (
            {"overrides": [
                "run_dir=runs/none",
                "evaluation.extractor=inception-v3-compat",
                "evaluation.weights_path=no/weights.pth",
            ]},
            "no/weights.pth",
        ),
    ],
)  # fmt: skip
def test_sweep_on_this_machine_needs_config_data_and_weights(
    change: dict[str, Any], fact: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sweep_file(tmp_path, **{**GRID, **change})
    assert main(["sweep", str(path)]) == 2
    assert fact in capsys.readouterr().err
