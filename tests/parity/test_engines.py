"""The parity table over engines: two real processes agree with the one-process eager reference.

pytest tests/parity -s      prints the table: each cell's measured differences
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cells import CELLS, MICRO, Result, difference, recipe, train_cell
from commands import ROOT, environment, free_port

BOUND = 1e-4  # float32, other orders of summation
ENGINES = ("ddp", "zero1", "zero2", "fsdp")


@pytest.fixture(scope="module")
def reference(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Result]:
    """One eager process on the joined batch, once for each cell."""
    known: dict[str, Result] = {}

    def of(cell: str) -> Result:
        if cell not in known:
            run_dir = tmp_path_factory.mktemp("reference") / "run"
            # The joined micro-batch of two processes is one of twice the size.
            overrides = [o.replace(MICRO, "train.micro_batch=20") for o in CELLS[cell]]
            config = recipe(digits, run_dir, *overrides, "engine=single", "compile=eager")
            losses, _ = train_cell(config, cell)
            known[cell] = Result(losses, run_dir)
        return known[cell]

    return of


def run_engine(engine: str, digits: Path, folder: Path, cells: list[str]) -> dict[str, Result]:
    """All cells in one launch of two processes."""
    script = Path(__file__).with_name("cells.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launcher += ["--master_port", str(free_port())]
    done = subprocess.run(
        [*launcher, script, digits, folder, engine, *cells],
        env=environment() | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=290,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    losses = json.loads((folder / "losses.json").read_text())
    return {cell: Result(losses[cell], folder / cell.replace(" ", "-")) for cell in cells}


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_agree_with_one(
    engine: str, digits: Path, tmp_path: Path, reference: Callable[[str], Result]
) -> None:
    """Losses, weights, averages, spectral norm's vectors and Adam's moments after three steps."""
    results = run_engine(engine, digits, tmp_path, list(CELLS))
    found = {cell: difference(result, reference(cell)) for cell, result in results.items()}
    for cell, value in found.items():
        print(f"\n{engine:6} {cell:24} {value.state:.1e}  gradients {value.gradients:.1e}", end="")
    print()
    for cell, value in found.items():
        assert max(value) < BOUND, cell


def test_the_comparison_sees_a_wrong_gradient(
    reference: Callable[[str], Result], digits: Path, tmp_path: Path
) -> None:
    """A penalty that counts twice is far over the bounds."""
    assert difference(reference("r1"), reference("r1")) == (0, 0)
    doubled = [o.replace("10.0", "20.0") for o in CELLS["r1"]]
    config = recipe(digits, tmp_path / "run", *doubled, "engine=single", "compile=eager")
    losses, _ = train_cell(config, "r1")
    wrong = difference(Result(losses, tmp_path / "run"), reference("r1"))
    assert wrong.gradients > 100 * BOUND
    assert wrong.state > BOUND
