"""`bigan bench scaling`: the prediction by hand, and shares that add up."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT, SMOKE

from bigan.bench import prediction, scaling
from bigan.bench.prediction import Network, PhaseWork, Workload
from bigan.bench.processes import Processes, launch_environment
from bigan.bench.report import as_text
from bigan.bench.scaling import EMA, Options, Point
from bigan.bench.workload import (
    Assumed,
    assumed_workload,
    measured_workload,
    median_of_means,
    workload,
)
from bigan.cli.main import main
from bigan.config import ConfigError
from bigan.errors import RunError, UserError
from bigan.run_config import RunConfig, load_config

FAST = Network(gb_per_second=50, node_gb_per_second=100, ranks_per_node=8, latency_us=0)
SLOW_START = replace(FAST, latency_us=10)
# 10 images: 10 * (1 + 2) ms + 5 ms = 35 ms on one device.
WORK = Workload(
    phases={
        "discriminator": PhaseWork(0.001, 100_000_000, 3),
        "generator": PhaseWork(0.002, 200_000_000, 6),
    },
    batch=80,
    device_batch=10,
    micro_batch=10,
    fixed_seconds=0.005,
    spread=0.0,
)


def load(*overrides: str) -> RunConfig:
    return load_config(SMOKE, overrides)


# --- the model, against figures computed by hand


def test_a_ring_moves_twice_the_bytes() -> None:
    assert prediction.collective_seconds(2, 1e9, 8, FAST) == pytest.approx(2 * 7 / 8 * 0.01)
    assert prediction.collective_seconds(1, 1e9, 2, FAST) == pytest.approx(1 / 2 * 0.01)
    assert prediction.collective_seconds(2, 1e9, 1, SLOW_START) == 0


def test_between_nodes_a_device_carries_its_share() -> None:
    within, between = 7 / 8 * 0.01, 3 / 4 * (1e9 / 8) / 50e9
    assert prediction.collective_seconds(2, 1e9, 32, FAST) == pytest.approx(2 * (within + between))
    one_each = replace(FAST, ranks_per_node=1)
    assert prediction.collective_seconds(1, 1e9, 4, one_each) == pytest.approx(3 / 4 / 50)


def test_latency_grows_with_the_depth_of_a_tree() -> None:
    assert prediction.latency_seconds(1024, SLOW_START) == pytest.approx(100e-6)
    assert prediction.collective_seconds(2, 0, 1024, SLOW_START) == pytest.approx(100e-6)


def test_expected_maximum_of_normals() -> None:
    assert prediction.expected_maximum(1) == 0
    assert prediction.expected_maximum(2) == pytest.approx(1 / math.sqrt(math.pi), abs=1e-5)
    assert prediction.expected_maximum(3) == pytest.approx(1.5 / math.sqrt(math.pi), abs=1e-5)
    assert prediction.expected_maximum(1000) == pytest.approx(3.24144, abs=1e-4)


def test_every_micro_batch_shares_its_statistics() -> None:
    seconds = prediction.step_seconds(replace(WORK, micro_batch=5), 10, 8, SLOW_START)
    assert seconds["batchnorm"] == pytest.approx(2 * 9 * 30e-6)


def test_a_step_by_hand() -> None:
    seconds = prediction.step_seconds(replace(WORK, spread=0.1), 10, 8, SLOW_START)
    latency = 30e-6  # log2(8) * 10 us
    assert seconds == pytest.approx(
        {
            "compute": 0.035,
            "gradients": 2 * 7 / 8 * 0.3e9 / 100e9 + 2 * latency,
            "batchnorm": 9 * latency,
            "agreement": 6 * latency,
            "straggler": 0.0035 * prediction.expected_maximum(8),
        }
    )


def test_weak_and_strong_efficiency_by_hand() -> None:
    free = replace(FAST, gb_per_second=1e12, node_gb_per_second=1e12)
    weak = prediction.predict(WORK, "weak", 64, free)
    assert weak.efficiency == pytest.approx(1)
    assert weak.images_per_second == pytest.approx(64 * 10 / 0.035)
    # 80 images alone take 245 ms; 16 devices take 5 each: 15 + 5 ms.
    strong = prediction.predict(WORK, "strong", 16, free)
    assert strong.step_seconds == pytest.approx(0.020)
    assert strong.efficiency == pytest.approx(0.245 / 16 / 0.020)
    assert prediction.predict(WORK, "strong", 1, SLOW_START).efficiency == pytest.approx(1)


def test_less_than_an_image_each_is_not_predicted() -> None:
    assert prediction.predictable(WORK, "strong", (64, 80, 128)) == [64, 80]
    assert prediction.predictable(WORK, "weak", (64, 1024)) == [64, 1024]


def test_overlap_hides_the_exchange_under_the_last_micro_batch() -> None:
    big = replace(WORK, micro_batch=5, overlap=0.5)
    phase = big.phases["generator"]
    exchange = 2 * 7 / 8 * 0.2e9 / 100e9
    hidden = 0.5 * 0.002 * 5
    assert exchange < hidden
    assert prediction.exchange_seconds(big, phase, 10, 8, FAST) == 0
    small = replace(big, overlap=0.1)
    seconds = prediction.exchange_seconds(small, phase, 10, 8, FAST)
    assert seconds == pytest.approx(exchange - 0.001)


@pytest.mark.parametrize(
    ("engine", "expected"),
    [
        ("ddp", [(2, 100)]),
        ("zero1", [(2, 100), (1, 100)]),
        ("zero2_offload", [(2, 100)] * 3 + [(1, 100)]),
        ("fsdp", [(1, 100), (1, 200), (1, 100)]),
    ],
)
def test_what_an_engine_exchanges(engine: str, expected: list[tuple[int, int]]) -> None:
    phase = PhaseWork(0.001, 100, read_bytes=200)
    work = replace(WORK, engine=engine)
    assert prediction.exchanged(work, phase, micro_batches=3) == expected
    if engine == "fsdp":
        again = replace(phase, gathers=2)
        assert prediction.exchanged(work, again, 3) == [(1, 100), (1, 200)] * 2 + [(1, 100)]


def test_fsdp_gathers_weights_for_the_ema_once_per_training_step() -> None:
    once = 7 / 8 * 0.2e9 / 100e9
    for engine, expected in (("fsdp", once), ("ddp", 0.0)):
        work = replace(WORK, engine=engine, averaged_bytes=200_000_000)
        assert prediction.average_seconds(work, 8, FAST) == pytest.approx(expected)
        without = replace(work, averaged_bytes=0)
        gradients = [prediction.step_seconds(w, 10, 8, FAST)["gradients"] for w in (work, without)]
        assert gradients[0] - gradients[1] == pytest.approx(expected)


def test_sensitivity_ranks_the_assumptions() -> None:
    slow = replace(FAST, gb_per_second=1.0)
    rows = prediction.sensitivity(WORK, slow, ["weak"])
    first = rows[0]
    assert first["change"] == max(row["change"] for row in rows)
    top = [(row["assumption"], row["ranks"]) for row in rows[:4]]
    assert ("bandwidth between nodes", 1024) in top
    assert {row["ranks"] for row in rows} == {64, 1024}
    by_name = {row["assumption"]: row for row in rows if row["ranks"] == 64}
    assert by_name["latency of a collective"]["change"] == 0  # it is 0, and so is twice of it
    halved = prediction.predict(WORK, "weak", 64, replace(slow, gb_per_second=0.5)).efficiency
    assert by_name["bandwidth between nodes"]["halved"] == pytest.approx(halved)
    assert first["assumption"] in prediction.most_sensitive(rows)
    assert len(prediction.sensitivity(WORK, slow, ["strong"])) == len(prediction.ASSUMPTIONS)


# --- configs and measurements as workloads


def test_workload_of_a_config() -> None:
    """Digits: 2 blocks of 2 BatchNorm layers and the last one; D's phase has no backward of G."""
    config = load("objective.discriminator_steps=2", "train.micro_batch=10")
    seconds = {"discriminator": 0.004, "generator": 0.003}
    found = workload(config, seconds, 0.001, 0.02, Assumed())
    d, g = found.phases["discriminator"], found.phases["generator"]
    assert (d.times, g.times) == (2, 1)
    assert (d.seconds_per_image, g.seconds_per_image) == (0.002, 0.003)
    assert (d.batchnorm_collectives, g.batchnorm_collectives) == (5, 10)
    assert (d.read_bytes, g.read_bytes) == (g.parameter_bytes, d.parameter_bytes)
    assert found.averaged_bytes == g.parameter_bytes > 100_000
    assert (found.batch, found.device_batch, found.micro_batch) == (40, 10, 10)
    assert (found.engine, found.overlap) == ("ddp", 0.4)
    assert found.batches == 2
    assert workload(load("compile=auto"), seconds, 0, 0, Assumed()).overlap == 0
    local = load("train.micro_batch=10", "train.batchnorm=local")
    shares = workload(local, seconds, 0.001, 0.02, Assumed()).phases.values()
    assert [phase.batchnorm_collectives for phase in shares] == [0, 0]


def test_workload_counts_trained_parameters_and_separate_steps() -> None:
    name = ROOT / "configs" / "smoke" / "stylegan2-digits.yaml"
    seconds = {"discriminator": 0.005, "generator": 0.003}
    full = workload(load_config(name), seconds, 0.0, 0.0, Assumed())
    assert {name: phase.times for name, phase in full.phases.items()} == {
        "discriminator": 1.25,  # R1 after every fourth step
        "generator": 1.5,  # path lengths after every second
    }
    assert full.phases["discriminator"].seconds_per_image == pytest.approx(0.004)
    assert [p.gathers for p in full.phases.values()] == [1, 2]  # again, for the mean latent
    frozen = load_config(name, ["trainable=['generator.mapping.*','discriminator.*']"])
    part = workload(frozen, seconds, 0.0, 0.0, Assumed())
    assert part.phases["generator"].parameter_bytes < full.phases["generator"].parameter_bytes
    assert part.phases["discriminator"].parameter_bytes == (
        full.phases["discriminator"].parameter_bytes
    )


def test_the_rate_of_one_device_is_reproduced() -> None:
    assumed = Assumed(device_images_per_second=500.0, fixed_ms=4.0)
    work = assumed_workload(load("objective.discriminator_steps=2"), assumed)
    for mode in ("weak", "strong"):
        alone = prediction.predict(work, mode, 1, Network())
        assert alone.images_per_second == pytest.approx(500)
    assert work.fixed_seconds == pytest.approx(0.004)


def test_fixed_time_is_where_the_line_meets_an_empty_batch() -> None:
    full = {"phases": {"discriminator": 0.02, "generator": 0.01}, "spread": 0.05}
    results = {"plain": {"step": 0.050, "data": 0.010}, "full": full}
    at_half = {"plain": {"step": 0.025, "data": 0.001}}  # 40 ms and 24 ms: 8 ms at nothing
    work = measured_workload(load(), results, at_half, Assumed())
    assert work.fixed_seconds == pytest.approx(0.008)
    assert work.spread == 0.05
    d, g = work.phases.values()
    assert d.seconds_per_image == pytest.approx(2 * g.seconds_per_image)
    assert prediction.predict(work, "weak", 1, Network()).step_seconds == pytest.approx(0.040)


def test_median_of_means() -> None:
    runs = [
        [{"a": {"b": 1.0}}, {"a": {"b": 3.0}}],
        [{"a": {"b": 9.0}}] * 2,
        [{"a": {"b": 4.0}}] * 2,
    ]
    assert median_of_means(runs) == {"a": {"b": 4.0}}


def test_breakdown_adds_up_to_the_step_with_its_save() -> None:
    """With phases of any name, and a penalty in each of them."""
    measured = {
        "full": {"step": 1.0, "data": 0.05, "waiting": 0.1, "phases": {"critic": 0.5, "vae": 0.25}},
        "without_penalties": {"phases": {"critic": 0.3, "vae": 0.24}},
        "without_exchange": {"phases": {"critic": 0.46, "vae": 0.22}},
    }
    found = scaling.breakdown(measured, 0.2, {"vae": 0.01, EMA: 0.02})
    assert found == pytest.approx(
        {"data": 0.05, "critic": 0.26, "vae": 0.2, "penalty": 0.21, "communication": 0.1}
        | {"waiting": 0.1, "save": 0.2, "other": 0.08}
    )
    assert sum(found.values()) == pytest.approx(1.2)


def test_points() -> None:
    config = load("train.micro_batch=10")
    assert scaling.point(config, "weak", 4) == Point(4, 40, 10)
    assert scaling.point(config, "strong", 8) == Point(8, 40, 5)
    assert scaling.halved(Point(1, 10, 10)) == Point(1, 5, 5)
    assert scaling.halved(Point(1, 5, None)) is None
    with pytest.raises(ConfigError, match="3 processes"):
        scaling.point(config, "strong", 3)


def test_one_process_is_launched_without_a_process_group() -> None:
    base = {"RANK": "7", "ACCELERATE_USE_FSDP": "true", "HOME": "/h", "SLURM_PROCID": "3"}
    assert launch_environment(0, 1, 5, 2, base, joined=False) == {
        "HOME": "/h",
        "OMP_NUM_THREADS": "2",
    }
    joined = launch_environment(1, 2, 5, 2, base, joined=True)
    assert (joined["RANK"], joined["WORLD_SIZE"], joined["MASTER_PORT"]) == ("1", "2", "5")


# --- the command


def test_predicts_without_measuring(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    assumed = ["--device-images-per-second", "400", "--bandwidth-gb", "25", "--out", str(out)]
    big = str(ROOT / "configs" / "biggan-128.yaml")
    assert (
        main(["bench", "scaling", big, "train.micro_batch=32", "--engine", "zero1", *assumed]) == 0
    )
    shown = capsys.readouterr()
    record = json.loads(shown.out)
    assert json.loads(out.read_text()) == record
    assert "points" not in record
    points = record["prediction"]["points"]
    assert [p["ranks"] for p in points] == 2 * [8, 16, 32, 64, 128, 256, 512, 1024]
    efficiency = [p["efficiency"] for p in points[:8]]
    assert sorted(efficiency, reverse=True) == efficiency
    assert record["prediction"]["workload"]["engine"] == "zero1"
    assert record["prediction"]["network"]["gb_per_second"] == 25
    assert record["prediction"]["most_sensitive"] in shown.err
    assert record["environment"]["versions"]["torch"]


@pytest.mark.parametrize(
    ("options", "overrides", "message"),
    [
        (Options(runs=4), [], "--runs 4"),
        (Options(synthetic=True), ["engine=single"], "--engine ddp"),
        (Options(ranks=(1, 3), synthetic=True), [], "3 processes"),
        (Options(), ["data.path=/nowhere"], "/nowhere"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    options: Options, overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        scaling.bench_scaling(SMOKE, overrides, options, print)


def test_notes_name_too_many_processes_for_the_cores() -> None:
    assert len(scaling.notes(1, 1)) == 1  # no GPU
    assert "1000 processes" in scaling.notes(1000, 1)[1]


@pytest.mark.full
def test_a_point_fails_with_its_processes() -> None:
    task = {"config": "train: 3", "engine": "auto", "synthetic": True, "seconds": 0.1}
    with Processes("a point", task, 1, 1) as processes:
        with pytest.raises(UserError, match="bench"):
            processes.responses()
        processes._processes[0].wait(20)
        with pytest.raises(RunError, match=r"a point: process 0 .* 0$"):
            processes.measure()


@pytest.mark.slow
@pytest.mark.timeout(600)  # six processes one after the other; half a minute if it is quiet
def test_two_real_processes(capsys: pytest.CaptureFixture[str], digits: Path) -> None:
    """Weak and strong, with a lazy penalty and images from packed shards."""
    changes = [f"data.path={digits}", "objective.penalties=[{name: r1, weight: 1.0, every: 2}]"]
    assert main(["bench", "scaling", str(SMOKE), *changes, "--run-seconds", "0.1"]) == 0
    shown = capsys.readouterr()
    record = json.loads(shown.out)
    points = record["points"]
    assert [(p["mode"], p["ranks"], p["batch"]) for p in points] == [
        ("weak", 1, 40), ("weak", 2, 80), ("strong", 1, 40), ("strong", 2, 40),
    ]  # fmt: skip
    for row in points:
        check_point(row)
    assert as_text(record) in shown.err


def check_point(row: dict[str, Any]) -> None:
    assert sum(row["shares"].values()) == pytest.approx(1)
    # A share that was not measured is exactly 0; on a busy machine a difference may be below 0.
    absent = {"communication", "waiting"} if row["ranks"] == 1 else set()
    assert {name for name, share in row["shares"].items() if share == 0} == absent
    rate = row["images_per_second"]
    assert 0 < rate["min"] <= rate["median"] <= rate["max"]
    if row["ranks"] == 1:
        assert row["efficiency"] == pytest.approx(1)
        assert "prediction_error" not in row
    else:
        assert row["network"]["node_gb_per_second"] > 0
        assert row["predicted_step_seconds"] > 0
        assert row["prediction_error"] > -1
