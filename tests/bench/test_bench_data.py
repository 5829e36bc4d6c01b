"""`bigan bench data`: the simulated traffic of many ranks, and the pipeline of one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import SMOKE
from web import serving

from bigan.cli.main import main


def test_simulated_traffic_of_an_assumed_set(capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers of ranks that fit, that need other lanes, and that the batch does not allow."""
    options = ["--images", "400000", "--image-kb", "100", "--ranks", "1,64,96,512,7"]
    changes = ["train.batch=1536", "train.micro_batch=null", "data.lanes=64", "data.path=nowhere"]
    arguments = ["bench", "data", str(SMOKE), "--simulate", *options, *changes]
    assert main([*arguments, "--images-per-second", "4000", "--ranks-per-node", "8"]) == 0
    printed = capsys.readouterr()
    record = json.loads(printed.out)
    one, fits, more, many, refused = record["ranks"]
    assert record["data"]["images"] == 400_000
    assert record["data"]["set_bytes"] == pytest.approx(400_000 * 102_000, rel=0.01)
    assert (fits["nodes"], fits["ranks_per_lane"], fits["warnings"]) == (8, 1, [])
    assert fits["num_bytes"] == one["num_bytes"]
    assert fits["times_the_set"] == pytest.approx(1, abs=0.01)
    assert fits["node_bytes"] == pytest.approx(fits["num_bytes"] / 8, rel=0.01)
    assert fits["first_batch_bytes"] * 60 < one["first_batch_bytes"]
    assert fits["memory_bytes"] == 2 * 893 * 100_000  # 1/7 of a lane is a block
    assert fits["requests_per_second"] == pytest.approx(fits["requests"] / 100, rel=0.01)
    assert "data.lanes=384" in more["warnings"][0]
    assert "data.lanes=512" in many["warnings"][0]
    assert many["requests"] > 10 * fits["requests"]
    assert "7" in refused["error"]
    assert all(str(n) in printed.err for n in (64, 96, 512))


def test_simulated_traffic_of_a_packed_set(
    digits: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with serving(digits) as web:
        path = f"data.path={web.url}"
        assert main(["bench", "data", str(SMOKE), path, "--simulate", "--ranks", "1,4"]) == 0
        record = json.loads(capsys.readouterr().out)
        assert [row["world_size"] for row in record["ranks"]] == [1, 4]
        one, four = record["ranks"]
        assert four["num_bytes"] == pytest.approx(one["num_bytes"], rel=0.01)
        assert not any(name.endswith(".tar") for name in web.requests)
        gone = f"data.path={web.url}/gone"
        assert main(["bench", "data", str(SMOKE), gone, "--simulate"]) == 2


def test_the_pipeline_of_one_process_is_measured(
    digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bench", "data", str(SMOKE), f"data.path={digits}", "--run-seconds", "0.02"]
    assert main(arguments) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["images_per_second"]["median"] > 0
    assert record["cpu_us_per_image"]["median"] > 0
    assert record["first_batch_seconds"] > 0
    assert main([*arguments, "--runs", "4"]) == 2
