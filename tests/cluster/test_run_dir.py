"""`python -m bigan.cluster.run_dir`: the run folder of a config, for batch scripts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from commands import SMOKE, environment

from bigan.cli.main import main
from bigan.cluster import run_dir
from bigan.config import parse_yaml


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], parse_yaml(SMOKE.read_text(), "")["run_dir"]),
        (["run_dir=runs/a b", "train.seed=3"], "runs/a b"),
        (["run_dir=/x/$(touch y)/"], "/x/$(touch y)"),
    ],
)
def test_the_run_folder_is_printed(
    overrides: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_dir.main([str(SMOKE), *overrides]) == 0
    assert capsys.readouterr().out == f"{expected}\n"


@pytest.mark.parametrize(
    ("content", "overrides"),
    [
        (None, []),
        ("a: [", []),
        ("- a", []),
        ("run_dir: a", ["train.seed"]),
        ("model: {}", []),
        ("run_dir: 3", []),
        ("run_dir: null", []),
        ('run_dir: "a\\nb"', []),
    ],
)
def test_an_unusable_config_is_one_line(
    tmp_path: Path, content: str | None, overrides: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    """And exit code 2, as of `bigan train`."""
    config = tmp_path / "a.yaml"
    if content is not None:
        config.write_text(content)
    assert run_dir.main([str(config), *overrides]) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("bigan: ")
    assert captured.err.count("\n") == 1
    if content is None or overrides:
        assert main(["train", str(config), *overrides]) == 2
        assert capfd.readouterr().err == captured.err


def test_it_imports_nothing_heavy() -> None:
    script = (
        "import bigan.cluster.run_dir, sys; sys.exit({'torch', 'numpy'} & set(sys.modules) or 0)"
    )
    assert subprocess.run([sys.executable, "-c", script], env=environment()).returncode == 0
