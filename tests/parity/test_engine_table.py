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
import torch
from cells import CELLS, CLIP, MICRO, Result, cell_config, difference, run_dir, train_cell
from commands import ROOT, environment, free_port

pytestmark = pytest.mark.full

BOUND = 1e-4  # float32, other orders of summation
BOUNDS = {"bf16 + r1": 2e-2, "fp16 + r1": 2e-2}  # gradients are rounded to 8 and 11 bits
ENGINES = ("ddp", "zero1", "zero2", "fsdp")


@pytest.fixture(scope="module")
def reference(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Result]:
    """One eager process on the joined batch, once for each cell."""
    known: dict[str, Result] = {}

    def of(cell: str) -> Result:
        if cell not in known:
            place = tmp_path_factory.mktemp("reference")
            # The joined micro-batch of two processes is one of twice the size.
            overrides = [o.replace(MICRO, "train.micro_batch=20") for o in CELLS[cell]]
            config = cell_config(digits, place, *overrides, "engine=single", "compile=eager")
            losses, _ = train_cell(config, cell)
            known[cell] = Result(losses, place)
        return known[cell]

    return of


@pytest.fixture(scope="module")
def results(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Result]]:
    """All cells of all engines, in one launch of two processes."""
    folder = tmp_path_factory.mktemp("engines")
    script = Path(__file__).with_name("cells.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launcher += ["--master_port", str(free_port())]
    done = subprocess.run(
        [*launcher, script, digits, folder, ",".join(ENGINES), ",".join(CELLS)],
        env=environment() | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    losses = json.loads((folder / "losses.json").read_text())
    return {
        engine: {
            cell: Result(losses[engine][cell], run_dir(folder, engine, cell)) for cell in CELLS
        }
        for engine in ENGINES
    }


@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_agree_with_one(
    engine: str, results: dict[str, dict[str, Result]], reference: Callable[[str], Result]
) -> None:
    """Losses, weights, EMAs, spectral norm's vectors and optimizer state after three steps."""
    found = {cell: difference(result, reference(cell)) for cell, result in results[engine].items()}
    for cell, value in found.items():
        print(f"\n{engine:6} {cell:24} {value.state:.1e}  gradients {value.gradients:.1e}", end="")
    print()
    for cell, value in found.items():
        assert max(value) < BOUNDS.get(cell, BOUND), cell


@pytest.mark.timeout(600)
def test_weights_of_the_critic_are_clipped(results: dict[str, dict[str, Result]]) -> None:
    """The optimizer holds slices or flat partitions of them under the sharding engines."""
    limit = torch.tensor(CLIP).item()
    for engine, cells in results.items():
        largest = {
            key: tensor.abs().max().item()
            for key, tensor in cells["wgan"].tensors(-1).items()
            if key.startswith("networks/discriminator.")
        }
        assert len(largest) > 10
        assert max(largest.values()) == limit, engine


@pytest.mark.timeout(600)
def test_frozen_layers_keep_their_bytes(results: dict[str, dict[str, Result]]) -> None:
    """And have no optimizer state; the others have, and move."""
    for engine, cells in results.items():
        first, last = (cells["adamw + frozen layers"].tensors(which) for which in (0, -1))
        trained = ("generator.blocks.1.", "discriminator.blocks.")
        for key, tensor in last.items():
            group, _, name = key.partition("/")
            if group == "networks" and f"optimizers/{name}.exp_avg" in last:
                assert name.startswith(trained), (engine, name)
                assert not tensor.equal(first[key]), (engine, name)
            elif key.endswith((".weight", ".bias")) and not name.startswith("generator_ema."):
                assert tensor.equal(first[key]), (engine, name)


@pytest.mark.timeout(600)
def test_gradients_are_clipped_in_the_cell_that_clips(
    results: dict[str, dict[str, Result]],
) -> None:
    for engine, cells in results.items():
        found = cells["sgd + clip"].losses
        assert found["train/generator/grad_norm"] > 2 * 0.01, engine
        assert found["train/discriminator/grad_norm"] > 2 * 0.1, engine


def test_the_comparison_sees_a_wrong_gradient(
    reference: Callable[[str], Result], digits: Path, tmp_path: Path
) -> None:
    """A penalty that counts twice is far over the bounds."""
    assert difference(reference("r1"), reference("r1")) == (0, 0)
    doubled = [o.replace("10.0", "20.0") for o in CELLS["r1"]]
    config = cell_config(digits, tmp_path / "run", *doubled, "engine=single", "compile=eager")
    losses, _ = train_cell(config, "r1")
    wrong = difference(Result(losses, tmp_path / "run"), reference("r1"))
    assert wrong.gradients > 100 * BOUND
    assert wrong.state > BOUND
