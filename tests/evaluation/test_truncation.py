"""Truncation: accumulated statistics, psi, the table over t; on snapshots of tiny networks."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import TEN_CLASSES
from parts import evaluated, make, start_run, untrained_generator, write_snapshot
from PIL import Image
from torch import Tensor, nn

from bigan import models, rng
from bigan.cli.main import main
from bigan.distributed.world import World
from bigan.errors import UserError
from bigan.evaluation import sampling
from bigan.evaluation.evaluator import Evaluator
from bigan.evaluation.records import Record, Task
from bigan.evaluation.truncation import sweep
from bigan.evaluation.watcher import evaluate
from bigan.layers.batchnorm import normalization_layers
from bigan.objectives.samplers import LatentSampler, truncated_normal
from bigan.run.standing_statistics import collect_standing_statistics
from bigan.run_config import RunConfig

FD, CS = "fd/digits8-cnn-v1", "cs/digits8-cnn-v1"
CPU = torch.device("cpu")
COUNTS = (1,) * 10


def run_config(run_dir: Path, data: Path, model: str = "biggan", **evaluation: object) -> RunConfig:
    train: dict[str, object] = {"batch": 20, "standing_batches": 3}
    return evaluated(run_dir, data, model, train, **evaluation)


def run_with_snapshots(config: RunConfig, *images_seen: int) -> None:
    """A run folder with snapshots of untrained generators."""
    start_run(config)
    for seen in images_seen:
        write_snapshot(config, seen)


def sampler_of(config: RunConfig, counts: tuple[int, ...] = COUNTS) -> LatentSampler:
    model = config.model
    return LatentSampler("generator", model.z_dim, counts, truncates=model.latent_space)


def accumulate(
    generator: nn.Module,
    config: RunConfig,
    truncation: float | None,
    counts: tuple[int, ...] = COUNTS,
    images_seen: int = 0,
) -> None:
    networks, batch = {"generator": generator}, sampling.standing_batch(config)
    sampler = sampler_of(config, counts)
    sampling.accumulate_statistics(
        networks, sampler, config.train, images_seen, truncation, batch, World()
    )


def measure(
    config: RunConfig, *truncations: float | None, which: str | None = None, **more: object
) -> list[str]:
    lines: list[str] = []
    sweep(config.run_dir, World(), truncations, which=which, echo=lines.append, **more)
    return lines


def table(config: RunConfig, images_seen: int) -> dict[float | None, dict]:
    path = config.run_dir / "evaluation" / f"truncation-{images_seen}.json"
    content = json.loads(path.read_text())
    assert content["images_seen"] == images_seen
    return {record["protocol"]["truncation"]: record for record in content["records"]}


def journal(config: RunConfig) -> list[dict]:
    return [
        json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().split("\n")[:-1]
    ]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float | None]]:
    """(images_seen, truncation) of every measurement."""
    calls: list[tuple[int, float | None]] = []
    real = Evaluator.measure

    def counted(evaluator: Evaluator, task: Task, truncation: float | None) -> Record:
        calls.append((task.images_seen, truncation))
        return real(evaluator, task, truncation)

    monkeypatch.setattr(Evaluator, "measure", counted)
    return calls


# --- standing statistics --------------------------------------------------------------------


def test_without_a_bound_they_are_those_that_training_stored(
    make_config: Callable[..., RunConfig],
) -> None:
    """The same draws in the same batches: a truncation changes nothing else."""
    config = make_config()
    state, stream = make(config)
    with stream:
        state.progress.images_seen = 200
        collect_standing_statistics(state)
    average = state.averages["generator"]
    assert not any(module.training for module in average.modules())
    again = copy.deepcopy(average)
    for layer in normalization_layers(again):
        layer.reset_statistics()
    accumulate(again, config, None, tuple(TEN_CLASSES.values()), 200)
    expected = average.state_dict()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert not any(module.training for module in again.modules())


def test_they_are_of_latents_truncated_alike(tmp_path: Path) -> None:
    """In evaluation mode every layer gets inputs with the variance of its statistics."""
    config = run_config(tmp_path, tmp_path)
    train = config.train.model_copy(update={"standing_batches": 20})
    config = config.model_copy(update={"train": train})
    generator = untrained_generator(config)

    def mismatch(truncation: float) -> float:
        """The largest ratio (or its inverse) of a layer's variance to its standing one."""
        ratios: list[Tensor] = []

        def look(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            ratios.append(args[0].var(dim=(0, 2, 3)).mean() / layer.standing_var.mean())

        layers = normalization_layers(generator)
        handles = [layer.register_forward_pre_hook(look) for layer in layers]
        z = truncated_normal(5, "test/z", 0, (400, 12), truncation)
        generator(z, torch.arange(400) % 10)
        for handle in handles:
            handle.remove()
        assert len(ratios) == len(layers) > 3
        return max(max(r.item(), 1 / r.item()) for r in ratios)

    for truncation in (0.2, 1.0):
        accumulate(generator, config, truncation)
        assert mismatch(truncation) < 1.2
    assert mismatch(0.2) > 5  # with the statistics of 1.0


def test_batches_and_labels(tmp_path: Path) -> None:
    """`train.standing_batches` of a configurable size; labels by the data's frequencies."""
    config = run_config(tmp_path, tmp_path, standing_batch=7)
    generator = untrained_generator(config)
    seen: list[tuple[Tensor, Tensor]] = []
    generator.register_forward_pre_hook(lambda _, args: seen.append(args))
    accumulate(generator, config, 0.1, (0,) * 9 + (1,))
    assert [len(z) for z, _ in seen] == [7, 7, 7]
    assert all(z.abs().max() <= 0.1 and (labels == 9).all() for z, labels in seen)
    assert len({z.sum().item() for z, _ in seen}) == 3
    sizes = [{}, {"micro_batch": 5}]
    train = [config.train.model_copy(update=update) for update in sizes]
    plain = run_config(tmp_path, tmp_path)
    assert [
        sampling.standing_batch(plain.model_copy(update={"train": settings})) for settings in train
    ] == [20, 5]


def test_a_mean_latent_makes_it_psi(tmp_path: Path) -> None:
    """z is left alone, w moves towards its mean."""
    config = run_config(tmp_path, tmp_path, "stylegan2")
    generator = untrained_generator(config)
    before = copy.deepcopy(generator.state_dict())
    accumulate(generator, config, 0.5)  # there are no statistics
    assert all(torch.equal(before[name], t) for name, t in generator.state_dict().items())
    networks, settings = {"generator": generator}, config.evaluation
    start, images = next(
        sampling.generate(networks, sampler_of(config), settings, 0.5, World(), CPU)
    )
    z = truncated_normal(0, "evaluation/z", 0, (16, 12), None)
    labels = rng.labels(0, "evaluation/labels", 0, 16, COUNTS)
    assert start == 0
    expected = models.to_uint8(generator(z, labels, truncation_psi=torch.full((16,), 0.5)))
    assert torch.equal(images, expected)
    assert not torch.equal(images, models.to_uint8(generator(z, labels)))


# --- the table ------------------------------------------------------------------------------


def test_a_sweep_is_a_table_a_plot_and_log_lines(
    tmp_path: Path, digits: Path, measured: list[tuple[int, float | None]], drawn_plots: None
) -> None:
    config = run_config(tmp_path / "run", digits)
    run_with_snapshots(config, 100, 200)
    lines = measure(config, None, 1.0, 0.2, 1.0)
    assert measured == [(200, 0.2), (200, 1.0), (200, None)]
    records = table(config, 200)
    assert list(records) == [0.2, 1.0, None]
    for truncation, record in records.items():
        assert record["metrics"].keys() == {FD, CS}
        assert record["versions"].keys() >= {"torch", "torch-fidelity"}
        assert ("truncation_method" in record["protocol"]) == (truncation is not None)
    assert len({record["fingerprint"] for record in records.values()}) == 3
    assert len({record["metrics"][FD] for record in records.values()}) == 3
    assert "drawn again" in records[0.2]["protocol"]["truncation_method"]
    assert "3 x 20" in records[0.2]["protocol"]["batch_statistics"]
    assert records[None]["protocol"]["batch_statistics"] == "standing"
    assert any("snapshot 200: the latest" in line for line in lines)
    assert any("truncation 0.2, " in line for line in lines)
    shown = lines[lines.index(f"truncation  {FD}  {CS}") + 1 :]
    assert [line.split()[:2] for line in shown[:3]] == [
        [name, f"{record['metrics'][FD]:.3f}"]
        for name, record in zip(("0.2", "1", "none"), records.values(), strict=True)
    ]
    with Image.open(config.run_dir / "evaluation" / "truncation-200.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 1000
    keys = [sorted(line.keys() - {"images_seen", "time"}) for line in journal(config)]
    assert keys == [
        [f"truncation/0.2/{CS}", f"truncation/0.2/{FD}"],
        [f"truncation/1/{CS}", f"truncation/1/{FD}"],
        [f"eval/{CS}", f"eval/{FD}"],
        [f"truncation/none/{CS}", f"truncation/none/{FD}"],
    ]
    assert {line["images_seen"] for line in journal(config)} == {200}


def test_nothing_is_measured_twice(
    tmp_path: Path, digits: Path, measured: list[tuple[int, float | None]]
) -> None:
    config = run_config(tmp_path / "run", digits)
    run_with_snapshots(config, 100)
    evaluate(config.run_dir, World(), watch=False, echo=lambda _: None)
    measure(config, 0.5, None)  # None is the snapshot's own record
    assert measured == [(100, None), (100, 0.5)]
    before = len(journal(config))
    again = measure(config, None, 0.5)
    assert len(journal(config)) == before
    assert again[-4].startswith("truncation  ")
    measure(config, 0.3)
    assert measured[2:] == [(100, 0.3)]
    assert list(table(config, 100)) == [0.3, 0.5, None]

    measured.clear()
    measure(config, 0.5, overrides=["evaluation.seed=1"])  # another protocol
    assert measured == [(100, 0.5)]
    assert list(table(config, 100)) == [0.5]
    path = config.run_dir / "evaluation" / "truncation-100.json"
    for damaged in ("{", "[]", '{"records": [{"protocol": 3}, 4]}'):
        path.write_text(damaged)
        measure(config, 0.5)
        assert list(table(config, 100)) == [0.5, None]


def test_the_record_without_truncation_is_the_snapshots_own(
    tmp_path: Path, digits: Path, measured: list[tuple[int, float | None]]
) -> None:
    """Where the config truncates, the record with its truncation is."""
    config = run_config(tmp_path / "run", digits, truncation=0.5)
    run_with_snapshots(config, 100)
    measure(config, 0.5, None)
    evaluate(config.run_dir, World(), watch=False, echo=lambda _: None)
    assert measured == [(100, 0.5), (100, None)]
    own = json.loads((config.run_dir / "evaluation" / "100.json").read_text())
    assert own["metrics"] == table(config, 100)[0.5]["metrics"]


def test_an_interrupted_sweep_goes_on(
    tmp_path: Path, digits: Path, measured: list[tuple[int, float | None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = run_config(tmp_path / "run", digits)
    run_with_snapshots(config, 100)
    with monkeypatch.context() as patch:
        counted = Evaluator.measure

        def killed(evaluator: Evaluator, task: Task, truncation: float | None) -> Record:
            if truncation == 0.5:
                raise KeyboardInterrupt
            return counted(evaluator, task, truncation)

        patch.setattr(Evaluator, "measure", killed)
        with pytest.raises(KeyboardInterrupt):
            measure(config, 0.2, 0.5)
    measure(config, 0.2, 0.5)
    assert measured == [(100, 0.2), (100, 0.5)]


def test_a_snapshot_written_again_meanwhile_gives_no_number(
    tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(tmp_path / "run", digits)
    run_with_snapshots(config, 100)
    real = Evaluator.measure

    def replaced(evaluator: Evaluator, task: Task, truncation: float | None) -> Record:
        record = real(evaluator, task, truncation)
        write_snapshot(config, 100, seed=7)
        return record

    monkeypatch.setattr(Evaluator, "measure", replaced)
    with pytest.raises(UserError, match="snapshots/100: was replaced"):
        measure(config, 0.5)
    assert not (config.run_dir / "evaluation" / "truncation-100.json").exists()


def test_which_snapshot(
    tmp_path: Path, digits: Path, measured: list[tuple[int, float | None]]
) -> None:
    config = run_config(tmp_path / "run", digits)
    run_with_snapshots(config, 100, 200, 1000)
    with pytest.raises(UserError, match=r"no snapshot is measured.*--snapshot latest"):
        measure(config, 0.5, which="best")
    evaluate(config.run_dir, World(), watch=False, echo=lambda _: None)
    for seen, distance in ((100, 3.0), (200, 2.0), (1000, 9.0)):
        path = config.run_dir / "evaluation" / f"{seen}.json"
        content = json.loads(path.read_text())
        content["metrics"][FD] = distance
        path.write_text(json.dumps(content))
    measured.clear()
    for which in (None, "best", "latest", "100"):
        measure(config, 0.5, which=which)
    assert measured == [(200, 0.5), (1000, 0.5), (100, 0.5)]
    with pytest.raises(UserError, match="no complete snapshot 300; there are 100, 200, 1000"):
        measure(config, 0.5, which="300")


def test_psi_is_named_and_bounded(tmp_path: Path, digits: Path) -> None:
    config = run_config(tmp_path / "run", digits, "stylegan2")
    run_with_snapshots(config, 100)
    with pytest.raises(UserError, match=r"truncation 1\.5: .*psi.*mean latent"):
        measure(config, 1.5)
    with pytest.raises(UserError, match=r"use 0\.02 or more"):
        measure(config, 0.001)
    measure(config, 0.5)
    protocol = table(config, 100)[0.5]["protocol"]
    assert protocol["truncation_method"].startswith("psi")
    assert protocol["networks"] == ["generator_ema"]
    assert "batch_statistics" not in protocol


def test_micro_batches_are_remarked_on(tmp_path: Path, digits: Path) -> None:
    config = run_config(tmp_path / "run", digits)
    run_with_snapshots(config, 100)
    micro = ["train.micro_batch=5"]
    remark = "evaluation.standing_batch"
    assert any(remark in line for line in measure(config, 0.5, overrides=micro))
    assert not any(remark in line for line in measure(config, None, overrides=micro))
    local = [*micro, "train.batchnorm=local"]  # the same number in training
    assert not any(remark in line for line in measure(config, 0.5, overrides=local))
    chosen = [*micro, "evaluation.standing_batch=10"]
    assert not any(remark in line for line in measure(config, 0.5, overrides=chosen))
    assert "3 x 10" in table(config, 100)[0.5]["protocol"]["batch_statistics"]


def test_the_command(tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = run_config(tmp_path / "run", digits)
    run_with_snapshots(config, 100)
    run = str(config.run_dir)
    assert main(["evaluate", run, "--truncations", "0.5,none", "--snapshot", "latest"]) == 0
    assert list(table(config, 100)) == [0.5, None]
    capsys.readouterr()
    assert main(["evaluate", run, "--snapshot", "100"]) == 2
    assert "--truncations" in capsys.readouterr().err
    for wrong in (
        ["--truncations", "0.5,x"], ["--truncations", "-1"],
        ["--truncations", "1", "--snapshot", "newest"], ["--truncations", "1", "--watch"],
    ):  # fmt: skip
        with pytest.raises(SystemExit) as left:
            main(["evaluate", run, *wrong])
        assert left.value.code == 2
