"""The trainer over every kind of data source; bad samples are counted over resumes."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import webdataset
import yaml
from commands import SMOKE
from web import serving

from bigan import checkpoint
from bigan.checkpoint import snapshots
from bigan.cli.main import main
from bigan.data import DataError
from bigan.data.format.codec import encode
from bigan.data.format.manifest import Manifest
from bigan.data.packing.sources import open_source
from bigan.data.settings import Fetch
from bigan.data.streaming import fetchers as fetching
from bigan.data.streaming.order import Order
from bigan.data.streaming.stream import Batch, ShardStream
from bigan.distributed.world import World
from bigan.errors import UserError
from bigan.run import streams
from bigan.run.trainer import train
from bigan.run_config import RunConfig, load_config

MakeConfig = Callable[..., RunConfig]


def run(config: RunConfig) -> list[str]:
    """Train; returns the printed lines."""
    lines: list[str] = []
    assert train(config, lines.append, lambda progress, report: None) == 0
    return lines


def weights(config: RunConfig) -> bytes:
    (newest,) = snapshots.find(config.run_dir)[-1:]
    return (newest / "generator_ema.safetensors").read_bytes()


@pytest.fixture
def damaged(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the digits in which the samples at positions 130 and 250 do not decode."""
    folder = tmp_path / "damaged"
    shutil.copytree(digits, folder)
    manifest = Manifest.load(folder)
    index, shards = manifest.load_index("train"), manifest.shards("train")
    order = Order([shard.nsamples for shard in shards], 0, 65_536)
    for position in (130, 250):
        (sample,) = order.samples(position, position + 1)
        file = folder / shards[int(index.shards_of(sample))].url
        content = bytearray(file.read_bytes())
        content[int(index.offset[sample])] ^= 0xFF
        file.write_bytes(bytes(content))
    monkeypatch.setattr(fetching, "CHECKSUM_BYTES", 0)
    return folder


def test_skipped_images_are_named_and_counted_over_resumes(
    make_config: MakeConfig, damaged: Path
) -> None:
    changes = [f"data.path={damaged}", "data.on_bad=skip", "train.tick_images=40"]
    short = make_config(*changes, "train.total_images=200", "train.checkpoint_images=200")
    assert len([line for line in run(short) if ".npy" in line]) == 1
    longer = make_config(*changes, "train.total_images=400", "train.checkpoint_images=200")
    assert len([line for line in run(longer) if ".npy" in line]) == 1
    newest = checkpoint.latest(longer.run_dir)
    assert newest is not None
    assert checkpoint.read_progress(newest).bad_images == 2
    journal = [json.loads(x) for x in (longer.run_dir / "metrics.jsonl").read_text().splitlines()]
    ticks = [x for x in journal if "train/bad_images" in x]
    assert ticks[-1]["train/bad_images"] == 2
    assert all(0 < x["train/data_wait"] < 1 for x in ticks)  # share of the time


def test_a_bad_sample_stops_training_by_default(make_config: MakeConfig, damaged: Path) -> None:
    with pytest.raises(fetching.DataError, match=r"bad sample.*data\.on_bad=skip"):
        run(make_config(f"data.path={damaged}", "train.total_images=400"))


def test_a_run_from_a_url_equals_the_run_from_the_folder(
    make_config: MakeConfig, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streamed, resident and from a cache; the lanes of a run are kept, also on resume."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    length = "train.total_images=120"
    with serving(digits) as web:
        url = f"data.path={web.url}"
        lines = run(make_config(length, f"run_dir={tmp_path / 'a'}", url))
        assert sum(line.startswith("data.lanes = 40: ") for line in lines) == 1
        assert load_config(tmp_path / "a" / "config.yaml").streams["images"].lanes == 40
        run(make_config(length, f"run_dir={tmp_path / 'b'}", "data.lanes=40"))
        run(make_config(length, f"run_dir={tmp_path / 'c'}", url, "data.mode=resident"))
        run(make_config(length, f"run_dir={tmp_path / 'd'}", url, f"data.cache={tmp_path / 'x'}"))
        first = "train.total_images=80"
        run(make_config(first, f"run_dir={tmp_path / 'e'}", url))
        run(make_config(length, f"run_dir={tmp_path / 'e'}"))  # moved to a folder
    run(make_config(length, f"run_dir={tmp_path / 'f'}"))
    assert load_config(tmp_path / "f" / "config.yaml").streams["images"].lanes is None
    a, b, c, d, e, f = (weights(make_config(f"run_dir={tmp_path / name}")) for name in "abcdef")
    assert a == b == c == d == e != f
    with pytest.raises(UserError, match=r"data\.lanes"):
        run(make_config(length, f"run_dir={tmp_path / 'a'}", "data.lanes=8"))


def test_resampled_training_prints_its_limits(make_config: MakeConfig, digits: Path) -> None:
    pattern = str(digits / "train-{000000..000003}.tar")
    config = make_config(f"data.path={pattern}", "data.mode=resampled", "train.total_images=80")
    assert any("data.mode=resampled" in line for line in run(config))


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Shards of digits by plain WebDataset, with the labels 1 to 10."""
    source = open_source("digits", resolution=16)
    folder = tmp_path / "foreign"
    for split, first in (("train", 0), ("val", 200)):
        (folder / split).mkdir(parents=True)
        with webdataset.TarWriter(str(folder / split / "000.tar")) as writer:
            for n in range(first, first + 200):
                image = encode(source.read(n), "png")
                writer.write({"__key__": f"{n}", "png": image, "cls": source.labels[n] + 1})
    return folder


@pytest.mark.parametrize(
    ("mode", "labels", "num_classes"),
    [
        ("auto", "none", 1),
        pytest.param("auto", "given", 10, marks=pytest.mark.full),
        pytest.param("resampled", "none", 1, marks=pytest.mark.full),
    ],
)
def test_existing_shards_with_and_without_their_labels(
    foreign: Path, tmp_path: Path, mode: str, labels: str, num_classes: int
) -> None:
    content = yaml.safe_load(SMOKE.read_text())
    del content["model"]["num_classes"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    overrides = [f"data.path={foreign}", f"data.mode={mode}", f"data.labels={labels}",
                 f"run_dir={tmp_path / 'run'}", "train.total_images=80"]  # fmt: skip
    config = load_config(tmp_path / "config.yaml", overrides)
    assert config.model.num_classes == num_classes
    (line,) = [line for line in run(config) if line.startswith((str(foreign), "data.mode"))]
    if mode == "auto":
        assert "200 train, 200 val images" in line
        assert ("label 1 is class 0, label 10 class 9" in line) == (labels == "given")
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    wrong = ["train", str(tmp_path / "config.yaml"), *overrides, "model.num_classes=3"]
    assert main([*wrong, f"run_dir={tmp_path / 'other'}"]) == 2


def test_unusable_data_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    cases = {
        "pipe:cat /nowhere": "data.allow_pipe=true",
        "gopher://host/x": "unsupported URL scheme",
        str(tmp_path / "empty"): "is not a data set",
    }
    for path, part in cases.items():
        arguments = [str(SMOKE), f"data.path={path}", f"run_dir={tmp_path / 'run'}"]
        assert main(["train", *arguments]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert part in line
    assert not (tmp_path / "run").exists()


def test_only_the_first_bad_images_of_a_tick_are_named() -> None:
    lines: list[str] = []
    bad = [fetching.BadSample(p, "x.tar", f"{p}.npy", "no image") for p in reversed(range(12))]
    state = SimpleNamespace(
        config=SimpleNamespace(streams={"images": Fetch(on_bad="skip")}),
        world=World(),
        bad=bad,
        progress=SimpleNamespace(bad_images=1),
        engine=SimpleNamespace(echo=lines.append),
    )
    streams.count_bad(state)  # type: ignore[arg-type]
    assert [re.findall(r"\d+\.npy", line) for line in lines] == [[f"{p}.npy"] for p in range(10)]
    assert state.progress.bad_images == 13
    assert state.bad == []


def test_data_wait_is_that_of_its_tick(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    really, delays = ShardStream.__next__, [0.4, 0.4]

    def slow_at_first(stream: ShardStream) -> Batch:
        time.sleep(delays.pop() if delays else 0)
        return really(stream)

    monkeypatch.setattr(ShardStream, "__next__", slow_at_first)
    waited: list[float] = []
    before = 0

    def on_tick(images_seen: int, report: dict[str, float]) -> None:
        nonlocal before
        seconds = (images_seen - before) / report["train/images_per_second"]
        waited.append(report["train/data_wait"] * seconds)
        before = images_seen

    assert train(make_config("train.total_images=240"), lambda _: None, on_tick) == 0
    assert waited[0] >= 0.8
    assert all(seconds < 0.4 for seconds in waited[1:])


@pytest.mark.parametrize("mode", ["auto", "resampled"])
def test_streams_are_opened_with_the_settings_of_the_config(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    config = make_config(f"data.mode={mode}", "data.split=val", "data.block=77", "train.seed=5")
    for name in ("ShardStream", "ResampledStream"):
        monkeypatch.setattr(streams, name, lambda *args, **settings: (args, settings))
    progress = SimpleNamespace(images_seen=80)
    state = SimpleNamespace(
        config=config, run_config=config, world=World(), accumulation=2, progress=progress
    )
    opened = streams.open_streams(state)  # type: ignore[arg-type]
    assert list(opened) == ["images"]
    args, settings = opened["images"]  # type: ignore[misc]
    want: dict[str, object] = {
        "seed": 5, "world": World(), "batch": 40, "accumulation": 2, "images_seen": 80,
        "fetch": config.data,
    }  # fmt: skip
    assert args == (config.data.path, "val")
    if mode == "resampled":
        assert settings == {**want, "shape": (16, 16, 1), "num_classes": 10}
    else:
        assert settings == {**want, "block": 77, "lanes": None}


def test_images_are_checked_before_training(make_config: MakeConfig, digits: Path) -> None:
    with pytest.raises(UserError, match=r"model\.num_classes = 11"):
        streams.check_data(make_config("model.num_classes=11"))
    missing = make_config(f"data.path={digits}/x-{{0..3}}.tar", "data.mode=resampled")
    with pytest.raises(DataError, match="no such shard"):
        streams.check_data(missing)
