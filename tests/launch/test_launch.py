"""The launch files start what they say; the launches that would train strangers are refused."""

from pathlib import Path

import pytest
import yaml
from commands import ROOT, SMOKE, environment, launch, run_bigan

FILES = sorted((ROOT / "launch").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_launch_file_is_one_accelerate_reads(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    load_config_from_file(str(path))
    content = yaml.safe_load(path.read_text())
    assert content["distributed_type"] == "MULTI_GPU", "the CPU types start strangers"
    assert content["use_cpu"] is False


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


def test_environment_of_children_has_no_launcher_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "WORLD_SIZE" not in environment()


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
