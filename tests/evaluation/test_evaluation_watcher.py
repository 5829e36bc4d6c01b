"""The evaluator as its own job: real snapshots of a tiny BigGAN, packed digits, a run folder."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from pathlib import Path

import pytest
import torch
from parts import evaluated, start_run

from bigan import config as configs
from bigan import models, rng
from bigan.checkpoint import snapshots
from bigan.data.packing.pack import pack
from bigan.distributed.world import World
from bigan.errors import UserError
from bigan.evaluation import features, metrics, moments, sampling
from bigan.evaluation.judge import Judge, Record, Task
from bigan.evaluation.ledger import Ledger
from bigan.evaluation.watcher import evaluate
from bigan.run_config import RunConfig

FD, CS = "fd/digits8-cnn-v1", "cs/digits8-cnn-v1"


def write_snapshot(config: RunConfig, images_seen: int) -> Path:
    generator, _ = models.build(config.model)
    generator.init_weights(rng.torch_generator(images_seen, "test/init"))
    return snapshots.write(config.run_dir, images_seen, generator, config)


def journal(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def run(config: RunConfig, watch: bool = False) -> list[str]:
    lines: list[str] = []
    evaluate(config.run_dir, World(), watch=watch, poll_seconds=0.02, echo=lines.append)
    return lines


def test_every_snapshot_is_measured_once_and_oldest_first(tmp_path: Path, digits: Path) -> None:
    config = evaluated(tmp_path / "run", digits)
    start_run(config)
    for images_seen in (100, 1000, 200):
        write_snapshot(config, images_seen)
    lines = run(config)
    assert "not comparable with FID" in lines[0]
    assert [line.split()[:2] for line in lines[1:]] == [
        ["images_seen", str(n)] for n in (100, 200, 1000)
    ]
    assert [line["images_seen"] for line in journal(config.run_dir)] == [100, 200, 1000]

    record = json.loads((config.run_dir / "evaluation" / "200.json").read_text())
    protocol = record["protocol"]
    assert record["metrics"].keys() == {FD, CS}
    assert journal(config.run_dir)[1][f"eval/{FD}"] == record["metrics"][FD]
    assert journal(config.run_dir)[1][f"eval/{CS}"] == record["metrics"][CS]
    assert f"{FD} {record['metrics'][FD]:.3f}" in lines[2]
    assert "(40 samples, " in lines[2]
    assert protocol["extractor_sha256"] == features.DIGITS8_SHA256
    assert (protocol["num_samples"], protocol["num_reference"]) == (40, 1297)
    assert protocol.keys() >= {"seed", "data_fingerprint", "truncation", "label_law", "splits"}
    assert record["versions"].keys() >= {"torch", "torch-fidelity", "python"}

    before = {p.name: p.stat().st_mtime_ns for p in (config.run_dir / "evaluation").iterdir()}
    again = run(config)
    after = {p.name: p.stat().st_mtime_ns for p in (config.run_dir / "evaluation").iterdir()}
    assert before == after
    assert len(journal(config.run_dir)) == 3
    assert "already evaluated" in again[-1]


@pytest.mark.parametrize("truncation", [None, 0.5])
def test_numbers_are_those_of_the_snapshots_generator(
    tmp_path: Path, digits: Path, truncation: float | None
) -> None:
    config = evaluated(tmp_path / "run", digits, truncation=truncation)
    start_run(config)
    folder = write_snapshot(config, 100)
    run(config)
    found = json.loads((config.run_dir / "evaluation" / "100.json").read_text())["metrics"]

    generator, _ = snapshots.load(folder)
    counts = [sum(1 for label in _train_labels() if label == c) for c in range(10)]
    if truncation:  # its own statistics, not those stored
        device = torch.device("cpu")
        sampling.accumulate_statistics(generator, config, counts, 100, World(), device)
    images = torch.cat([i for _, i in sampling.generate(generator, config, counts, World())])
    extractor = features.create(features.DIGITS8)
    sampled, logits = extractor(images)
    real, _ = extractor(_train_images())
    distance = metrics.frechet_distance(moments.of(sampled), moments.of(real))
    assert found[FD] == pytest.approx(distance, rel=1e-5)
    assert found[CS] == pytest.approx(metrics.classifier_score(logits, 1).mean, rel=1e-5)


def _train_images() -> torch.Tensor:
    from bigan.evaluation.train_digits8_cnn import load_split

    return load_split("train")[0]


def _train_labels() -> list[int]:
    from bigan.evaluation.train_digits8_cnn import load_split

    return load_split("train")[1].tolist()


def test_another_protocol_or_generator_is_measured_anew(tmp_path: Path, digits: Path) -> None:
    config = evaluated(tmp_path / "run", digits)
    start_run(config)
    for images_seen in (100, 200):
        write_snapshot(config, images_seen)
    run(config)
    changed = evaluated(tmp_path / "run", digits, seed=1)
    start_run(changed)
    run(changed)
    assert [line["images_seen"] for line in journal(config.run_dir)] == [100, 200, 100, 200]
    generator, _ = models.build(config.model)
    generator.init_weights(rng.torch_generator(7, "test/other"))
    snapshots.write(config.run_dir, 200, generator, config)
    run(changed)
    assert [line["images_seen"] for line in journal(config.run_dir)][4:] == [200]


def test_watching_waits_for_the_run_and_ends_with_it(tmp_path: Path, digits: Path) -> None:
    config = evaluated(tmp_path / "run", digits)
    lines: list[str] = []
    failures: list[Exception] = []

    def watch() -> None:
        try:
            evaluate(config.run_dir, World(), watch=True, poll_seconds=0.02, echo=lines.append)
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()

    def until(text: str) -> None:
        limit = time.monotonic() + 20
        while not any(text in line for line in lines):
            assert time.monotonic() < limit, lines
            assert thread.is_alive(), failures
            time.sleep(0.01)

    until("waiting for")
    start_run(config)
    until("not comparable")  # the reference is ready before there is a snapshot
    half = config.run_dir / "snapshots" / "50"
    half.mkdir(parents=True)
    (half / "config.yaml").write_text(configs.dump(config))  # no COMPLETE: not a snapshot
    write_snapshot(config, 100)
    until("images_seen 100 ")
    assert thread.is_alive()
    write_snapshot(config, 200)
    (config.run_dir / "DONE").write_text("")
    thread.join(20)
    assert not thread.is_alive()
    assert not failures
    assert [line["images_seen"] for line in journal(config.run_dir)] == [100, 200]
    run(config, watch=True)  # a finished run: returns at once, measures nothing
    assert len(journal(config.run_dir)) == 2


def test_a_snapshot_written_just_before_done_is_not_missed(tmp_path: Path, digits: Path) -> None:
    """The end of the run falls between the two looks of the watcher."""
    config = evaluated(tmp_path / "run", digits)
    start_run(config)
    ledger = Ledger(config.run_dir, {})
    real_find = snapshots.find

    def find_then_finish(run_dir: Path) -> list[Path]:
        found = real_find(run_dir)
        write_snapshot(config, 100)
        (run_dir / "DONE").write_text("")
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshots, "find", find_then_finish)
        assert ledger.next_task() == (None, False)
    task, _ = ledger.next_task()
    assert task is not None


def test_a_snapshot_replaced_meanwhile_is_taken_again(tmp_path: Path, digits: Path) -> None:
    config = evaluated(tmp_path / "run", digits)
    start_run(config)
    write_snapshot(config, 100)
    real_measure, calls = Judge.measure, []

    def replaced(judge: Judge, task: Task, truncation: float | None) -> Record:
        calls.append(task)
        if len(calls) == 1:
            write_snapshot(config, 100)
            raise UserError("the folder was gone for a moment")
        return real_measure(judge, task, truncation)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Judge, "measure", replaced)
        run(config)
    assert len(calls) == 2
    assert [line["images_seen"] for line in journal(config.run_dir)] == [100]
    assert dataclasses.replace(calls[0], stamp=calls[1].stamp) == calls[1]


def test_bad_input_is_one_line_and_leaves_no_trace(tmp_path: Path, digits: Path) -> None:
    config = evaluated(tmp_path / "run", digits)
    with pytest.raises(UserError, match="no such run folder"):
        run(config)
    config.run_dir.mkdir()
    with pytest.raises(UserError, match=r"no config\.yaml"):
        run(config)
    start_run(config)
    with pytest.raises(UserError, match="no complete snapshot"):
        run(config)
    missing = evaluated(tmp_path / "run", tmp_path / "nowhere")
    start_run(missing)
    with pytest.raises(UserError, match="nowhere"):
        run(missing, watch=True)
    inception = evaluated(
        tmp_path / "run", digits, extractor=features.INCEPTION, weights_path=str(tmp_path / "w.pth")
    )
    start_run(inception)
    with pytest.raises(UserError, match=r"w\.pth: no Inception weights"):
        run(inception, watch=True)
    assert sorted(p.name for p in config.run_dir.iterdir()) == ["config.yaml"]


def test_data_of_another_size_is_refused(tmp_path: Path, digits: Path) -> None:
    pack("digits", tmp_path / "data", resolution=32)
    config = evaluated(tmp_path / "run", tmp_path / "data")
    start_run(config)
    with pytest.raises(UserError, match=r"config\.yaml: model\.resolution = 16.*have 32"):
        run(config, watch=True)  # before there is any snapshot
    fitting = evaluated(tmp_path / "run", digits)
    start_run(fitting)
    alien = fitting.model_copy(
        update={"model": fitting.model.model_copy(update={"num_classes": 7})}
    )
    write_snapshot(alien, 100)
    with pytest.raises(UserError, match=r"100: model\.num_classes = 7.*have 10"):
        run(fitting)
