"""benchmarks/peers_data.py counts what a server sends, and which samples ranks get."""

from __future__ import annotations

import itertools
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from commands import script


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return script("peers_data")


def request(url: str, method: str = "GET", **headers: str) -> tuple[int, bytes, str | None]:
    asked = urllib.request.Request(url, method=method, headers=headers)
    with urllib.request.urlopen(asked) as answer:
        return answer.status, answer.read(), answer.headers["Content-Length"]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the URL of its counting server."""
    server = script("counting_server").make_server(tmp_path)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield tmp_path, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_the_server_counts_the_bytes_of_bodies(
    benchmark: ModuleType, served: tuple[Path, str]
) -> None:
    folder, url = served
    (folder / "a b").write_bytes(bytes(range(100)))
    assert request(f"{url}/a%20b") == (200, bytes(range(100)), "100")
    assert request(f"{url}/a%20b", Range="bytes=10-19") == (206, bytes(range(10, 20)), "10")
    assert request(f"{url}/a%20b", Range="bytes=-5") == (206, bytes(range(95, 100)), "5")
    assert request(f"{url}/a%20b", Range="bytes=90-") == (206, bytes(range(90, 100)), "10")
    assert request(f"{url}/a%20b", "HEAD") == (200, b"", "100")
    for missing in ("nothing", "../secret", "%2e%2e/secret"):
        with pytest.raises(urllib.request.HTTPError, match="404"):
            request(f"{url}/{missing}")
    with pytest.raises(urllib.request.HTTPError, match="416"):
        request(f"{url}/a%20b", Range="bytes=100-")
    assert benchmark.take_counts(url) == {"bytes": 125, "requests": 9}
    assert benchmark.take_counts(url) == {"bytes": 0, "requests": 0}


def test_bigan_is_measured_without_the_other_libraries(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = script("peers_worker")

    def in_this_process(_: object, task: dict[str, Any], *__: object) -> dict[str, Any]:
        return worker.convert(task) if "convert" in task else worker.read(task)

    monkeypatch.setattr(benchmark.Runner, "_task", in_this_process)
    monkeypatch.setattr(benchmark, "BATCH", 4)
    result = benchmark.measure(
        tmp_path, None, num=101, each=10, size=16, worlds=(1, 2), runs=2, block=32,
        libraries=("bigan",),
    )  # fmt: skip
    (size,) = result["images"]["bytes"].values()
    assert result["images"]["shards"] == 11
    traffic = result["traffic"]["bigan"]
    assert list(traffic) == ["1 machine", "2 machines", "1 machine, 2 ranks"]
    for row in traffic.values():
        assert (row["repeated"], row["lost"]) == (0, 0)
        assert row["bytes"] > 0.6 * size  # without the gaps between ranges
        assert row["requests"] >= 11
    assert traffic["2 machines"]["images_per_rank"] == [49, 52]
    assert traffic["2 machines"]["second_epoch_bytes_over_set"] > 0
    resumed = result["elastic"]["bigan"]
    assert resumed["stopped_after"] == 32
    assert (resumed["repeated"], resumed["lost"]) == (0, 0)
    assert all(row["min"] > 0 for row in result["cost"]["bigan"].values())
    table = benchmark.as_table(result).splitlines()
    rows = [line for line in table if line.startswith("| bigan |")]
    assert len(rows) == 3
    for line, following in itertools.pairwise(table):  # the columns of a table agree
        if line and following:
            assert line.count("|") in (0, following.count("|")) or "cores" in line


def test_repeated_and_lost_samples_are_counted(benchmark: ModuleType, tmp_path: Path) -> None:
    images = benchmark.Images(tmp_path, 4, (), "", 1, {"a", "b", "c", "d"})
    results = [{"digests": ["a", "b"]}, {"digests": ["a", "a", "c"]}]
    assert benchmark.samples(images, results) == {"repeated": 2, "lost": 1}
