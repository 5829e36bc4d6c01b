"""The traffic of a config: in `bigan describe`, and what a run prints at its start."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import SMOKE
from web import Web, serving

from bigan.cli.main import main
from bigan.data.format.manifest import Manifest
from bigan.run import traffic
from bigan.run_config import RunConfig

MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def web(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    with serving(digits) as server:
        yield server


def described(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main(["describe", str(SMOKE), *arguments, "--json"]) == 0
    found: dict = json.loads(capsys.readouterr().out)["data"]["images"]
    return found


def test_describe_counts_what_processes_read_from_a_url(
    web: Web, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = [f"data.path={web.url.replace('//', '//ann:secret@')}", f"run_dir={tmp_path / 'run'}"]
    total = sum(shard.filesize for shard in Manifest.load(digits).shards("train"))
    found = described(capsys, *url, "--world-size", "8", "--ranks-per-node", "4")
    assert "secret" not in json.dumps(found)
    assert (found["set_bytes"], found["lanes"], found["reads"]) == (total, 40, "stream")
    assert (found["world_size"], found["nodes"], found["warnings"]) == (8, 2, [])
    assert found["times_the_set"] == round(found["num_bytes"] / total, 4)
    assert 0.45 * total < found["node_bytes"] < 0.55 * total
    assert 0 < found["first_batch_bytes"] < 1.2 * total / 8
    assert not list(tmp_path.glob("run*"))
    assert not any(name.endswith(".tar") for name in web.requests)

    assert main(["describe", str(SMOKE), *url, "--world-size", "8"]) == 0
    text = capsys.readouterr().out
    assert "secret" not in text
    assert "lanes 40 (" in text
    assert "times the set" in text

    cache = described(capsys, *url, f"data.cache={tmp_path / 'cache'}", "--world-size", "2")
    assert (cache["reads"], cache["memory_bytes"]) == ("cache", 0)
    web.ranges = False
    whole = described(capsys, *url, "--world-size", "8")
    assert not whole["has_ranges"]
    assert whole["times_the_set"] > 1.3
    assert whole["warnings"]


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["data.path=nowhere"], "nowhere"),
        (["data.mode=resident"], "data.mode=resident"),
        (["data.mode=resampled"], "data.mode=resampled"),
    ],
)
def test_describe_works_without_traffic(
    digits: Path, overrides: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = [f"data.path={digits}"]
    assert part in described(capsys, *path, *overrides, "model.image_channels=1")["error"]
    assert main(["describe", str(SMOKE), *path, *overrides, "model.image_channels=1"]) == 0
    assert sum(part in line for line in capsys.readouterr().out.splitlines()) >= 1


def test_describe_does_not_wait_for_a_store(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as a run would, 300 s. Nothing listens on the port."""
    monkeypatch.setattr(traffic, "PATIENCE_SECONDS", 0.2)
    began = time.monotonic()
    found = described(capsys, "data.path=http://127.0.0.1:9/set", "model.image_channels=1")
    assert "http://127.0.0.1:9/set" in found["error"]
    assert time.monotonic() - began < 60


def test_describe_does_not_index_a_folder_of_tars(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(digits / "train-000000.tar", tmp_path)
    found = described(capsys, f"data.path={tmp_path}", "model.image_channels=1")
    assert str(tmp_path) in found["error"]
    assert [file.name for file in tmp_path.iterdir()] == ["train-000000.tar"]


def test_describe_counts_the_images_of_a_folder(
    digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = described(capsys, f"data.path={digits}", "--world-size", "4", "--ranks-per-node", "2")
    index = Manifest.load(digits).load_index("train")
    assert (found["reads"], found["lanes"]) == ("files", 1)
    assert found["num_bytes"] == int(index.size.sum(dtype=int))
    assert found["node_bytes"] == pytest.approx(found["num_bytes"] / 2, rel=0.02)


@pytest.mark.parametrize(
    ("lanes", "world_size", "facts"),
    [
        ([], 8, None),
        (["data.lanes=20"], 4, None),
        (["data.lanes=1"], 1, None),
        (["data.lanes=4"], 8, ("data.lanes = 4", "data.lanes=40", "4 processes")),
        (["data.lanes=7"], 5, ("data.lanes = 7", "data.lanes=40")),
        (["data.lanes=1"], 8, ("data.lanes = 1", "data.lanes=40")),
    ],
)
def test_a_run_warns_of_processes_that_read_the_same_shards(
    make_config: MakeConfig,
    web: Web,
    lanes: list[str],
    world_size: int,
    facts: tuple[str, ...] | None,
) -> None:
    """With the lanes in use and their reason; the remedy does not cause the warning."""
    config = make_config(f"data.path={web.url}", *lanes)
    first, *warned = traffic.remarks(config, world_size, 8)
    expected = lanes[0].partition("=")[2] if lanes else "40"
    assert first.startswith(f"data.lanes = {expected}: ")
    assert ("train.batch = 40" in first) == (not lanes)
    if facts is None:
        assert not warned
        return
    (line,) = warned
    assert all(fact in line for fact in facts)
    assert "times the data set" in line
    remedy = make_config(f"data.path={web.url}", facts[1])
    assert len(traffic.remarks(remedy, world_size, 8)) == 1


def test_a_run_on_a_folder_prints_no_lanes(make_config: MakeConfig) -> None:
    assert traffic.remarks(make_config(), 8, 8) == []
