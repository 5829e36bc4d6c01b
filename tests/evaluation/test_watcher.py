"""The evaluator as its own job: real snapshots of a tiny BigGAN, packed digits, a run folder."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from pathlib import Path

import pytest
import torch
from parts import Inverter, add_inverter, evaluated, start_run, write_snapshot
from PIL import Image

from bigan import config as configs
from bigan import models
from bigan.checkpoint import snapshots
from bigan.cli.main import main
from bigan.data.packing.pack import pack
from bigan.data.streaming.stream import sequential
from bigan.distributed.world import World
from bigan.errors import RunError, UserError
from bigan.evaluation import extractors, metrics, moments, sampling, silence
from bigan.evaluation.evaluator import Evaluator
from bigan.evaluation.metrics import Estimate, Features, Metric, Name
from bigan.evaluation.records import Record, Records, Task
from bigan.evaluation.truncation import sweep
from bigan.evaluation.watcher import evaluate
from bigan.objectives.samplers import LatentSampler
from bigan.run_config import RunConfig

FD, CS = "fd/digits8-cnn-v1", "cs/digits8-cnn-v1"


def journal(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def run(config: RunConfig, watch: bool = False) -> list[str]:
    lines: list[str] = []
    evaluate(config.run_dir, World(), watch=watch, poll_seconds=0.02, echo=lines.append)
    return lines


def test_every_snapshot_is_measured_once_and_oldest_first(
    tmp_path: Path, digits: Path, drawn_plots: None
) -> None:
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
    with Image.open(config.run_dir / "curves.png") as picture:
        assert picture.width > 500

    record = json.loads((config.run_dir / "evaluation" / "200.json").read_text())
    protocol = record["protocol"]
    assert record["metrics"].keys() == {FD, CS}
    assert journal(config.run_dir)[1][f"eval/{FD}"] == record["metrics"][FD]
    assert journal(config.run_dir)[1][f"eval/{CS}"] == record["metrics"][CS]
    assert f"{FD} {record['metrics'][FD]:.3f}" in lines[2]
    assert "(40 samples, " in lines[2]
    assert protocol["extractor_sha256"] == extractors.DIGITS8_SHA256
    assert (protocol["num_samples"], protocol["num_reference"]) == (40, 1297)
    assert protocol.keys() >= {"seed", "data_fingerprint", "truncation", "splits"}
    assert "split train" in protocol["label_distribution"]
    assert protocol["networks"] == ["generator_ema"]
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

    snapshot = snapshots.load(folder)
    counts = tuple(_train_labels().bincount(minlength=10).tolist())
    sampler = LatentSampler("generator", config.model.z_dim, counts)
    networks, world, cpu = snapshot.networks, World(), torch.device("cpu")
    if truncation:  # its own statistics, not those stored
        batch = sampling.standing_batch(config)
        sampling.accumulate_statistics(
            networks, sampler, config.train, 100, truncation, batch, world
        )
    blocks = sampling.generate(networks, sampler, config.evaluation, truncation, world, cpu)
    images = torch.cat([part for _, part in blocks])
    extractor = extractors.create(extractors.DIGITS8)
    sampled, logits = extractor(images)
    real, _ = extractor(_train_images())
    distance = metrics.frechet_distance(moments.from_features(sampled), moments.from_features(real))
    assert found[FD] == pytest.approx(distance, rel=1e-5)
    assert found[CS] == pytest.approx(metrics.classifier_score(logits, 1).value, rel=1e-5)


def _train_images() -> torch.Tensor:
    from bigan.evaluation.train_digits8_cnn import load_split

    return load_split("train")[0]


def _train_labels() -> torch.Tensor:
    from bigan.evaluation.train_digits8_cnn import load_split

    return load_split("train")[1]


def test_another_protocol_or_generator_is_measured_again(tmp_path: Path, digits: Path) -> None:
    config = evaluated(tmp_path / "run", digits)
    start_run(config)
    for images_seen in (100, 200):
        write_snapshot(config, images_seen)
    run(config)
    changed = evaluated(tmp_path / "run", digits, seed=1)
    start_run(changed)
    run(changed)
    assert [line["images_seen"] for line in journal(config.run_dir)] == [100, 200, 100, 200]
    write_snapshot(config, 200, seed=7)
    run(changed)
    assert [line["images_seen"] for line in journal(config.run_dir)][4:] == [200]


def test_a_change_of_any_network_file_changes_the_fingerprint(tmp_path: Path, digits: Path) -> None:
    config = evaluated(tmp_path / "run", digits)
    start_run(config)
    folder = write_snapshot(config, 100)

    def measured() -> dict:
        run(config)
        return json.loads((config.run_dir / "evaluation" / "100.json").read_text())

    first = measured()
    assert first["protocol"]["sampler"] == "latent"
    (folder / "encoder.safetensors").write_bytes(b"of another sampler")
    second = measured()
    (folder / "encoder.safetensors").rename(folder / "renamed.safetensors")
    third = measured()
    hashes = {record["protocol"]["snapshot_sha256"] for record in (first, second, third)}
    fingerprints = {record["fingerprint"] for record in (first, second, third)}
    assert len(hashes) == len(fingerprints) == 3
    assert first["metrics"] == second["metrics"] == third["metrics"]


def test_a_metric_is_one_function_and_one_entry(
    tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch, drawn_plots: None
) -> None:
    """It is computed, logged and printed, and snapshots without it are measured again."""
    config = evaluated(tmp_path / "run", digits)
    start_run(config)
    write_snapshot(config, 100)
    run(config)

    def mean_distance(features: Features) -> Estimate:
        return Estimate(float((features.generated.mean - features.reference.mean).norm()))

    names = Name("md", "Distance of means"), Name("md", "Distance of means")
    monkeypatch.setitem(metrics.METRICS, "mean_distance", Metric(mean_distance, *names))
    key = "md/digits8-cnn-v1"
    lines = run(config)
    record = json.loads((config.run_dir / "evaluation" / "100.json").read_text())
    assert list(record["metrics"]) == [FD, CS, key]
    assert 0 < record["metrics"][key] ** 2 < record["metrics"][FD]
    assert journal(config.run_dir)[1][f"eval/{key}"] == record["metrics"][key]
    assert any(f"{key} {record['metrics'][key]:.3f}" in line for line in lines)
    sweep(config.run_dir, World(), [None], echo=lines.append)
    assert lines[-3].split() == ["truncation", FD, CS, key]
    with Image.open(config.run_dir / "evaluation" / "truncation-100.png") as picture:
        assert picture.height > 800  # four panels in two rows


# --- samplers -------------------------------------------------------------------------------


def test_an_unknown_sampler_is_one_line(tmp_path: Path, digits: Path) -> None:
    config = evaluated(tmp_path / "run", digits, sampler="inverted")
    start_run(config)
    with pytest.raises(UserError) as error:
        run(config, watch=True)
    line = str(error.value)
    assert "\n" not in line
    assert "evaluation.sampler = 'inverted'" in line
    assert line.endswith("sampler(s) latent")


def test_a_sampler_with_inputs_is_compared_on_their_images(
    tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One image for each input in order; the numbers are those of the inverted digits."""
    add_inverter(monkeypatch)
    config = evaluated(tmp_path / "run", digits, sampler="inverted", split="test", num_samples=9999)
    start_run(config)
    write_snapshot(config, 100)
    run(config)
    record = json.loads((config.run_dir / "evaluation" / "inverted" / "100.json").read_text())
    protocol = record["protocol"]
    assert (protocol["sampler"], protocol["num_samples"]) == ("inverted", 500)
    assert protocol["inputs_fingerprint"] == protocol["data_fingerprint"]
    assert "label_distribution" not in protocol

    (images,) = sequential(digits, "test", World(), 500)
    pixels = images.pixels.permute(0, 3, 1, 2)
    num_blocks = -(-500 // config.evaluation.batch)
    draws = [Inverter().draws(0, "evaluation", b, 16, None)["shift"] for b in range(num_blocks)]
    inverted = models.to_uint8(1 - pixels / 127.5 + torch.cat(draws)[:500] / 8)
    extractor = extractors.create(extractors.DIGITS8)
    generated, real = (moments.from_features(extractor(x)[0]) for x in (inverted, pixels))
    distance = metrics.frechet_distance(generated, real)
    assert distance > 5
    assert record["metrics"][f"{FD}/inverted"] == pytest.approx(distance, rel=1e-5)

    with pytest.raises(UserError, match=r"does not support truncation.*inverted"):
        sweep(config.run_dir, World(), [0.5], echo=lambda _: None)
    plain = evaluated(tmp_path / "run", digits, split="test", num_samples=9999)
    start_run(plain)  # the first sampler of the objective
    run(plain)
    again = json.loads((config.run_dir / "evaluation" / "100.json").read_text())
    assert (again["protocol"]["sampler"], again["protocol"]["num_samples"]) == ("latent", 9999)
    assert FD in again["metrics"]
    unchanged = json.loads((config.run_dir / "evaluation" / "inverted" / "100.json").read_text())
    assert unchanged == record


# --- the run folder -------------------------------------------------------------------------


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


def test_a_run_whose_trainer_is_gone_is_left_after_the_timeout(
    tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = evaluated(tmp_path / "run", digits)
    start_run(config)
    write_snapshot(config, 100)
    monkeypatch.setattr(silence, "SILENT_SECONDS", 0.1)
    lines: list[str] = []

    def watch() -> str:
        with pytest.raises(RunError) as error:
            evaluate(
                config.run_dir,
                World(),
                watch=True,
                timeout_seconds=0.8,
                poll_seconds=0.02,
                echo=lines.append,
            )
        return str(error.value)

    line = watch()
    assert str(config.run_dir) in line
    assert [entry["images_seen"] for entry in journal(config.run_dir)] == [100]
    reports = [line for line in lines if f"{config.run_dir}: nothing written for" in line]
    assert 1 <= len(reports) <= 4  # at doubling intervals
    (config.run_dir / "REQUEUE").write_text("{}")
    assert "REQUEUE" in watch()


@pytest.mark.parametrize("begun", [True, False])
def test_a_file_ends_the_watch_of_a_run_that_is_not_complete(
    tmp_path: Path, digits: Path, begun: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """The training has failed, or was cancelled before it began; the folder of its job is there."""
    config = evaluated(tmp_path / "run", digits)
    (config.run_dir / "slurm").mkdir(parents=True)
    command = ["evaluate", str(config.run_dir), "--until", str(config.run_dir / "slurm" / "ended")]
    if begun:
        start_run(config)
        write_snapshot(config, 100)
    else:  # a wait, not an error
        assert main([*command, "--watch", "--timeout", "0.1", "--poll-seconds", "0.02"]) == 1
    (config.run_dir / "slurm" / "ended").touch()
    capsys.readouterr()
    assert main([*command, "--watch"]) == 0
    assert ("images_seen 100 " in capsys.readouterr().out) == begun
    assert main(command) == 2  # without --watch


@pytest.mark.parametrize(
    ("name", "expected"),
    [("run", "no run for"), ("digit-a", "digits-a"), ("", "digits-a"), ("no/run", "no folder")],
)
def test_a_mistyped_path_is_reported_and_left_after_the_timeout(
    tmp_path: Path,
    digits: Path,
    name: str,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    start_run(evaluated(tmp_path / "runs" / "digits-a", digits))
    monkeypatch.setattr(silence, "ABSENT_SECONDS", 0.1)
    path = tmp_path / "runs" / name
    limits = ["--timeout", "0.5", "--poll-seconds", "0.02"]
    assert main(["evaluate", str(path), "--watch", *limits]) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith(f"waiting for {path / 'config.yaml'}")
    assert captured.out.count("no run for") >= 1
    assert captured.err.count("\n") == 1
    assert expected in captured.err
    assert main(["evaluate", str(path), *limits]) == 2  # without --watch


def test_silence_begins_again_with_each_change(
    tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = evaluated(tmp_path / "run", digits)
    now = [100.0]
    monkeypatch.setattr(silence.time, "monotonic", lambda: now[0])
    found = silence.Silence(config.run_dir, 30, lambda _: None)

    def after(seconds: float) -> None:
        now[0] += seconds
        found.check()
        time.sleep(0.02)  # the resolution of modification times

    after(0)
    after(29)
    start_run(config)
    after(29)
    after(29)
    (config.run_dir / "metrics.jsonl").touch()
    after(2)
    (config.run_dir / "checkpoints" / "100").mkdir(parents=True)
    after(29)
    after(29)
    with pytest.raises(RunError, match=r"for 30 s \(last: checkpoints\)"):
        after(1)


def test_a_snapshot_written_just_before_done_is_not_missed(tmp_path: Path, digits: Path) -> None:
    """The run ends after the snapshots are listed and before `DONE` is read."""
    config = evaluated(tmp_path / "run", digits)
    start_run(config)
    records = Records(config.run_dir, config.run_dir / "evaluation", {})
    real_find = snapshots.find

    def find_then_finish(run_dir: Path) -> list[Path]:
        found = real_find(run_dir)
        write_snapshot(config, 100)
        (run_dir / "DONE").write_text("")
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshots, "find", find_then_finish)
        assert records.next_task() == (None, False)
    task, _ = records.next_task()
    assert task is not None


def test_a_snapshot_replaced_meanwhile_is_taken_again(tmp_path: Path, digits: Path) -> None:
    config = evaluated(tmp_path / "run", digits)
    start_run(config)
    write_snapshot(config, 100)
    real_measure, calls = Evaluator.measure, []

    def replaced(evaluator: Evaluator, task: Task, truncation: float | None) -> Record:
        calls.append(task)
        if len(calls) == 1:
            write_snapshot(config, 100)
            raise UserError("the folder was gone for a moment")
        return real_measure(evaluator, task, truncation)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluator, "measure", replaced)
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
        tmp_path / "run",
        digits,
        extractor=extractors.INCEPTION,
        weights_path=str(tmp_path / "w.pth"),
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
