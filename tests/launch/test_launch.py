"""Launches that would start unconnected or unexpected processes are refused."""

from pathlib import Path

import pytest
from commands import ROOT, SMOKE, environment, launch, run_bigan


@pytest.mark.full
def test_accelerates_cpu_launcher_is_refused(digits: Path, tmp_path: Path) -> None:
    """`--cpu --num_processes 2` silently starts one process."""
    run = tmp_path / "run"
    done = launch(
        SMOKE,
        f"data.path={digits}",
        f"run_dir={run}",
        options=["--cpu", "--num_processes", "2", "--num_machines", "1"],
    )
    assert done.returncode != 0
    assert "asked for several processes but started one" in done.stderr
    assert not run.exists()


def test_environment_of_children_has_no_launcher_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "WORLD_SIZE" not in environment()


@pytest.mark.full
def test_single_engine_refuses_several_processes(digits: Path, tmp_path: Path) -> None:
    done = launch(
        SMOKE,
        f"data.path={digits}",
        f"run_dir={tmp_path / 'run'}",
        "engine=single",
        options=["--config_file", ROOT / "launch" / "cpu.yaml"],
    )
    assert "engine = single, but 2 processes were started" in done.stderr
    assert run_bigan("train", SMOKE, "engine=ddp", f"data.path={digits}").returncode == 2
