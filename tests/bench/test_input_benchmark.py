"""benchmarks/input_pipeline.py measures all pipelines and reports which targets are met."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from commands import script


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return script("input_pipeline")


@pytest.mark.full
def test_all_pipelines_are_measured(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "WORKERS", 1)
    # Above 64 px decoding uses one thread per core; 72 px take less time than the benchmark's 256.
    sizes = {
        named: benchmark.compare(tmp_path / f"{size}", size, 128, runs=1)
        for named, size in ((32, 32), (256, 72))
    }
    for rows in sizes.values():
        assert len(rows) == 8
        for row in rows.values():
            for measure in row.values():
                assert 0 < measure["min"] <= measure["median"] <= measure["max"]
    num = benchmark.many_shards(tmp_path / "many", 10)
    (seconds,) = benchmark.measure(benchmark.RESUME, tmp_path / "many", num * 9 // 10)
    memory = benchmark.measure(benchmark.MEMORY, tmp_path / "32" / "tars", 2_000)
    result = {
        "sizes": sizes, "runs": 1, "workers": 1,
        "resume": {"shards": 10, "first_batch_seconds": benchmark.summary([seconds])},
        "memory": dict(
            zip(("mib_before", "mib_after_a_tenth", "mib_at_the_end"), memory, strict=True),
            images=2_000,
        ),
    }  # fmt: skip
    table = benchmark.as_table(result)
    assert table.count("met") + table.count("MISSED") == 9
    assert "WebDataset README, 1 workers" in table


def test_a_missed_target_is_reported(benchmark: ModuleType) -> None:
    def rows(ours: float) -> dict:
        rate = {"images_per_second": {"median": 100.0}}
        cpu = {"WebDataset README, 2 workers": 400.0, "ImageFolder, 2 workers": 400.0}
        names = {**cpu, "bigan, JPEG": ours, "bigan, raw uint8": 4.0}
        found = {n: {**rate, "cpu_us_per_image": {"median": us}} for n, us in names.items()}
        return found | {"bare decoder": rate}

    def verdicts(ours: float) -> list[bool]:
        result = {
            "sizes": {32: rows(ours), 256: rows(ours)},
            "workers": 2,
            "resume": {"shards": 1, "first_batch_seconds": {"median": 1.0}},
            "memory": {"images": 1, "mib_after_a_tenth": 1.0, "mib_at_the_end": 2.0},
        }
        return [met for *_, met in benchmark.targets(result)]

    assert all(verdicts(40.0))
    assert verdicts(41.0).count(False) == 2
