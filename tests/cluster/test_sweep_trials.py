"""Trials of a sweep with fake runs: begin, prune and end, also again and at once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import optuna
import pytest
from sweeps import GRID, LR, METRIC, OPTUNA, SEED, fake_run, frozen

from bigan.cluster import study, trial
from bigan.cluster.sweep_folder import SweepFolder, Trial
from bigan.errors import UserError
from bigan.run_config import load_config

PRUNED = {"name": "median", "startup_trials": 1, "warmup_images": 300}


def _optuna_trials(folder: SweepFolder) -> list[Any]:
    return study.open_study(folder, folder.sweep(), 0).get_trials()


def _serial(folder: SweepFolder, value: Callable[[dict[str, Any]], float]) -> list[Trial]:
    """All trials one after the other, with `value` of their parameters."""
    for index in range(folder.sweep().num_trials):
        parameters = trial.begin(folder, index).parameters
        fake_run(folder, index, {200: value(parameters) + 1, 400: value(parameters)})
        trial.end(folder, index)
    return folder.read_all()


@pytest.mark.parametrize("content", [GRID, OPTUNA], ids=["grid", "optuna"])
def test_trial_that_begins_again_keeps_its_parameters(
    content: dict[str, Any], tmp_path: Path
) -> None:
    folder = frozen(tmp_path, **content, experiment="mine")
    first = trial.begin(folder, 1)
    trial.begin(folder, 2)
    config = folder.trial_config(1).read_text()
    folder.trial_config(1).unlink()
    assert trial.begin(folder, 1) == first
    assert folder.trial_config(1).read_text() == config
    loaded = load_config(folder.trial_config(1))
    assert loaded.run_dir == folder.path / "001"
    assert (loaded.tracking.parent, loaded.tracking.experiment) == (Path(".."), "mine")
    values = (loaded.optimizer["generator"].lr, loaded.train.seed)
    assert values == (first.parameters[LR], first.parameters[SEED])


def test_killed_begin_finds_its_trial_in_the_study(tmp_path: Path) -> None:
    folder = frozen(tmp_path, **OPTUNA)
    chosen = study.ask(folder, folder.sweep(), 3)  # killed before the record was written
    assert trial.begin(folder, 3).parameters == chosen
    assert len(_optuna_trials(folder)) == 1


def test_damaged_study_is_named(tmp_path: Path) -> None:
    folder = frozen(tmp_path, **OPTUNA)
    trial.begin(folder, 0)
    intact = folder.journal.read_bytes()
    for damaged in (intact[:-20], b"x\n" + intact):  # a line was half written, or is not JSON
        folder.journal.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged"):
            trial.begin(folder, 1)
    folder.journal.unlink()
    assert trial.begin(folder, 1).state == "running"


def test_index_outside_of_the_sweep_is_refused(tmp_path: Path) -> None:
    folder = frozen(tmp_path, **GRID)
    with pytest.raises(UserError, match="4"):
        trial.begin(folder, 4)
    with pytest.raises(UserError, match=r"sweep\.yaml"):
        trial.begin(SweepFolder(tmp_path), 0)


def test_trials_that_begin_at_once_are_different(tmp_path: Path) -> None:
    folder = frozen(tmp_path, **OPTUNA)
    with ThreadPoolExecutor(6) as pool:
        begun = list(pool.map(lambda index: trial.begin(folder, index), range(6)))
    assert len({t.parameters[LR] for t in begun}) == 6
    assert sorted(t.user_attrs["index"] for t in _optuna_trials(folder)) == list(range(6))


@pytest.mark.full
def test_serial_study_is_reproducible_and_uses_its_results(tmp_path: Path) -> None:
    content = {**OPTUNA, "method": {"name": "optuna", "trials": 12, "startup_trials": 4}}
    one, two = (
        _serial(frozen(tmp_path / name, **content), lambda p: abs(p[LR] - 0.01)) for name in "ab"
    )
    assert [t.parameters for t in one] == [t.parameters for t in two]
    errors = [t.value or 0.0 for t in one]
    assert sum(errors[6:]) < sum(errors[:6])


@pytest.mark.parametrize(
    ("settings", "values", "state", "value"),
    [
        ({}, {200: 1.0, 400: 3.0}, "complete", 3.0),
        ({"value": "best"}, {200: 1.0, 400: 3.0}, "complete", 1.0),
        (
            {"value": "best", "goal": "maximize", "metric": METRIC},
            {200: 1.0, 400: 3.0},
            "complete",
            3.0,
        ),
        ({}, {200: 1.0, 400: float("nan")}, "failed", None),
        ({"value": "best"}, {200: 1.0, 400: float("nan")}, "complete", 1.0),
        ({}, {}, "failed", None),
    ],
)
@pytest.mark.parametrize("content", [GRID, OPTUNA], ids=["grid", "optuna"])
def test_value_of_a_complete_run(
    content: dict[str, Any],
    settings: dict[str, Any],
    values: dict[int, float],
    state: str,
    value: float | None,
    tmp_path: Path,
) -> None:
    folder = frozen(tmp_path, **content, **settings)
    trial.begin(folder, 0)
    fake_run(folder, 0, values)
    ended = trial.end(folder, 0)
    assert (ended.state, ended.value) == (state, value)
    assert ended == folder.read(0) == trial.end(folder, 0) == trial.begin(folder, 0)
    if content is OPTUNA:
        (found,) = _optuna_trials(folder)
        assert (found.state.name, found.value) == (
            {"complete": "COMPLETE", "failed": "FAIL"}[state],
            value,
        )


def test_snapshot_that_was_not_measured_is_a_failure(tmp_path: Path) -> None:
    folder = frozen(tmp_path, **GRID)
    trial.begin(folder, 0)
    fake_run(folder, 0, {200: 1.0, 400: 2.0})
    (folder.run(0).evaluation / "400.json").unlink()
    ended = trial.end(folder, 0)
    assert ended.state == "failed"
    assert "400" in ended.error


def test_failure_of_a_run_is_its_first_cause(tmp_path: Path) -> None:
    folder, logs = frozen(tmp_path, **OPTUNA), tmp_path / "logs"
    (logs / "evaluate").mkdir(parents=True)
    (logs / "failure-10-rank-1.txt").write_text("lost\nrank 0 was lost\n")
    (logs / "failure-20-rank-0.txt").write_text("run\nloss became non-finite\n")
    (logs / "evaluate" / "failure-30-rank-0.txt").write_text("bug\nKeyError\n")
    for index in range(2):
        trial.begin(folder, index)
    fake_run(folder, 0, {200: 1.0}, done=False)
    ended = trial.end(folder, 0, logs, "exit code 1")
    assert (ended.state, ended.error) == ("failed", "loss became non-finite")
    assert trial.end(folder, 1, None, "exit code 1").error == "exit code 1"
    assert [t.state.name for t in _optuna_trials(folder)] == ["FAIL", "FAIL"]
    (folder.trials / "000.json").unlink()  # to run it again
    assert trial.begin(folder, 0).parameters == ended.parameters
    fake_run(folder, 0, {200: 1.0})
    assert trial.end(folder, 0).state == "complete"


def test_failure_of_a_job_is_the_verdict_of_its_script(tmp_path: Path) -> None:
    folder = frozen(tmp_path, **GRID)
    trial.begin(folder, 0)
    log = folder.run(0).slurm / "attempts.tsv"
    log.parent.mkdir(parents=True)
    log.write_text(
        "2026-11-28T00:00:00Z\tfailed\ttrial\t7_0\t3\t200\t3 attempts made no progress\n"
    )
    assert trial.end(folder, 0).error == "3 attempts made no progress"


@pytest.mark.parametrize("marker", ["STOP", "REQUEUE"])
def test_run_that_was_stopped_has_not_ended(marker: str, tmp_path: Path) -> None:
    folder = frozen(tmp_path, **OPTUNA)
    trial.begin(folder, 0)
    fake_run(folder, 0, {200: 1.0}, done=False)
    (folder.run(0).path / marker).touch()
    assert trial.end(folder, 0, problem="exit code 143").state == "running"
    assert not _optuna_trials(folder)[0].state.is_finished()


def test_trial_is_pruned_once(tmp_path: Path) -> None:
    method = {**OPTUNA["method"], "prune": PRUNED}
    folder = frozen(tmp_path, **{**OPTUNA, "method": method})
    for index, value in ((0, 1.0), (1, 2.0)):
        trial.begin(folder, index)
        fake_run(folder, index, {200: value}, done=False)
        assert not trial.observe(folder, index)
        fake_run(folder, index, {400: value}, done=index == 0)
        if index == 0:
            assert not trial.observe(folder, index)
            before = folder.journal.stat().st_size
            assert not trial.observe(folder, index)
            assert folder.journal.stat().st_size == before
            trial.end(folder, 0)
    stop = folder.run(1).stop
    assert not stop.exists()
    assert trial.observe(folder, 1)
    assert stop.read_text() == trial.PRUNED
    journal = folder.journal.read_bytes()
    stop.unlink()  # by the start of another attempt
    assert trial.observe(folder, 1)
    assert stop.exists()
    assert folder.journal.read_bytes() == journal  # nothing is reported twice
    again = trial.begin(folder, 1)  # requeued before its end was recorded
    assert (again.state, again.value, again.images_seen) == ("pruned", 2.0, 400)
    assert trial.when_to_evaluate(folder.sweep(), again) == "ended"
    assert _optuna_trials(folder)[1].state == optuna.trial.TrialState.PRUNED
    assert not trial.observe(folder, 1)


def test_trial_that_ends_before_it_stops_is_complete(tmp_path: Path) -> None:
    method = {**OPTUNA["method"], "prune": {"name": "median", "startup_trials": 0}}
    folder = frozen(tmp_path, **{**OPTUNA, "method": method})
    trial.begin(folder, 0)
    fake_run(folder, 0, {200: 1.0})
    folder.pruned(0).write_text("200")
    assert trial.observe(folder, 0)
    assert not folder.run(0).stop.exists()
    assert trial.end(folder, 0).state == "complete"


@pytest.mark.full
def test_hyperband_prunes_the_worse_trials(tmp_path: Path) -> None:
    prune = {"name": "hyperband", "min_images": 100, "reduction_factor": 2}
    method = {"name": "optuna", "trials": 12, "startup_trials": 4, "prune": prune}
    folder = frozen(tmp_path, **{**OPTUNA, "method": method})
    for index in range(12):
        trial.begin(folder, index)
        for images in (100, 200, 400):
            fake_run(folder, index, {images: float(index)}, done=images == 400)
            if trial.observe(folder, index):
                folder.run(index).done.unlink(missing_ok=True)
                break
        trial.end(folder, index)
    states = [t.state for t in folder.read_all()]
    assert states[0] == "complete"
    assert "pruned" in states


def test_categories_of_any_kind(tmp_path: Path) -> None:
    values = {"objective.loss": ["hinge", "least_squares"], "trainable": [None, ["generator.*"]]}
    folder = frozen(tmp_path, method=OPTUNA["method"], parameters=values)
    for found in _serial(folder, lambda parameters: 1.0):
        for key, value in found.parameters.items():
            assert value in values[key]
        load_config(folder.trial_config(found.index))


def test_command_prints_folder_and_time_of_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = frozen(tmp_path, **GRID, evaluate="during")
    assert trial.main(["begin", str(folder.path), "2"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(folder.run(2).path), "during"]
    fake_run(folder, 2, {400: 1.0})
    assert trial.main(["end", str(folder.path), "2"]) == 0
    assert METRIC in capsys.readouterr().out
    assert trial.main(["begin", str(folder.path), "2"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "ended"
    assert trial.main(["begin", str(folder.path), "9"]) == 2
    assert "9" in capsys.readouterr().err
