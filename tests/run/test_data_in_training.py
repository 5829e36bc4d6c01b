"""The trainer over every kind of data source; bad samples are counted, resumes included."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import run_bigan
from web import serving

from bigan import checkpoint
from bigan.checkpoint import snapshots
from bigan.data import DataError
from bigan.data.format.manifest import Manifest
from bigan.data.settings import Fetch
from bigan.data.streaming import fetchers as fetching
from bigan.data.streaming.order import Order
from bigan.data.streaming.stream import Batch, ShardStream
from bigan.distributed.world import World
from bigan.errors import UserError
from bigan.run import streams
from bigan.run.trainer import train
from bigan.run_config import RunConfig

Recipe = Callable[..., RunConfig]


def run(config: RunConfig) -> list[str]:
    """Train; returns what was said."""
    said: list[str] = []
    assert train(config, said.append, lambda progress, report: None) == 0
    return said


def weights(config: RunConfig) -> bytes:
    (newest,) = snapshots.find(config.run_dir)[-1:]
    return (newest / "weights.safetensors").read_bytes()


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
        file = folder / shards[int(index.shard[sample])].url
        content = bytearray(file.read_bytes())
        content[int(index.offset[sample])] ^= 0xFF
        file.write_bytes(bytes(content))
    monkeypatch.setattr(fetching, "CHECKSUM_BYTES", 0)
    return folder


def test_skipped_images_are_named_and_counted_over_resumes(recipe: Recipe, damaged: Path) -> None:
    changes = [f"data.path={damaged}", "data.on_bad=skip", "train.tick_images=40"]
    short = recipe(*changes, "train.total_images=200", "train.checkpoint_images=200")
    said = run(short)
    assert len([line for line in said if "passed over" in line]) == 1
    whole = recipe(*changes, "train.total_images=400", "train.checkpoint_images=200")
    said = run(whole)
    assert len([line for line in said if "passed over" in line and ".npy" in line]) == 1
    newest = checkpoint.latest(whole.run_dir)
    assert newest is not None
    assert checkpoint.read_progress(newest).bad_images == 2
    journal = [json.loads(x) for x in (whole.run_dir / "metrics.jsonl").read_text().splitlines()]
    ticks = [x for x in journal if "train/bad_images" in x]
    assert ticks[-1]["train/bad_images"] == 2
    assert all(0 < x["train/data_wait"] < 1 for x in ticks)  # share of the time


def test_stopping_is_the_default(recipe: Recipe, damaged: Path) -> None:
    with pytest.raises(fetching.DataError, match=r"bad sample.*data\.on_bad=skip"):
        run(recipe(f"data.path={damaged}", "train.total_images=400"))


def test_a_run_from_a_url_is_the_run_from_the_folder(
    recipe: Recipe, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run(recipe("train.total_images=120", f"run_dir={tmp_path / 'a'}"))
    with serving(digits) as web:
        run(recipe("train.total_images=120", f"run_dir={tmp_path / 'b'}", f"data.path={web.url}"))
        resident = ["data.mode=resident", f"run_dir={tmp_path / 'c'}", "train.total_images=120"]
        run(recipe(f"data.path={web.url}", *resident))
    a, b, c = (weights(recipe(f"run_dir={tmp_path / name}")) for name in "abc")
    assert a == b == c


def test_resampled_training_says_what_it_does_not_promise(recipe: Recipe, digits: Path) -> None:
    pattern = str(digits / "train-{000000..000003}.tar")
    config = recipe(f"data.path={pattern}", "data.mode=resampled", "train.total_images=80")
    said = run(config)
    assert any("data.mode=resampled" in line for line in said)


def test_one_line_for_what_cannot_be_used(tmp_path: Path) -> None:
    from commands import SMOKE

    (tmp_path / "empty").mkdir()
    cases = {
        "pipe:cat /nowhere": "data.allow_pipe=true",
        "gopher://host/x": "unsupported URL scheme",
        str(tmp_path / "empty"): "is not a data set",
    }
    for path, part in cases.items():
        done = run_bigan("train", SMOKE, f"data.path={path}", f"run_dir={tmp_path / 'run'}")
        assert done.returncode == 2, done.stderr
        assert part in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_only_the_first_bad_images_of_a_tick_are_named() -> None:
    said: list[str] = []
    bad = [fetching.BadSample(p, "x.tar", f"{p}.npy", "no image") for p in reversed(range(12))]
    training = SimpleNamespace(
        config=SimpleNamespace(data=Fetch(on_bad="skip")),
        world=World(),
        bad=bad,
        progress=SimpleNamespace(bad_images=1),
        engine=SimpleNamespace(echo=said.append),
    )
    streams.count_bad(training)  # type: ignore[arg-type]
    assert [line.split()[5] for line in said] == [f"{p}.npy:" for p in range(10)]
    assert training.progress.bad_images == 13
    assert training.bad == []


def test_data_wait_is_that_of_its_tick(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    really, delays = ShardStream.__next__, [0.4, 0.4]

    def slow_at_first(stream: ShardStream) -> Batch:
        time.sleep(delays.pop() if delays else 0)
        return really(stream)

    monkeypatch.setattr(ShardStream, "__next__", slow_at_first)
    waited: list[float] = []
    before = 0

    def on_tick(progress: checkpoint.Progress, report: dict[str, float]) -> None:
        nonlocal before
        seconds = (progress.images_seen - before) / report["train/images_per_second"]
        waited.append(report["train/data_wait"] * seconds)
        before = progress.images_seen

    assert train(recipe("train.total_images=240"), lambda _: None, on_tick) == 0
    assert waited[0] >= 0.8
    assert all(seconds < 0.4 for seconds in waited[1:])


@pytest.mark.parametrize("mode", ["random_access", "resampled"])
def test_streams_are_opened_as_the_recipe_says(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    config = recipe(f"data.mode={mode}", "data.split=val", "data.block=77", "train.seed=5")
    for name in ("ShardStream", "ResampledStream"):
        monkeypatch.setattr(streams, name, lambda *args, **settings: (args, settings))
    progress = SimpleNamespace(images_seen=80)
    training = SimpleNamespace(
        config=config, recipe=config, world=World(), accumulation=2, progress=progress
    )
    args, settings = streams.open_stream(training)  # type: ignore[arg-type, misc]
    want: dict[str, object] = {
        "seed": 5, "world": World(), "batch": 40, "accumulation": 2, "images_seen": 80,
        "fetch": config.data,
    }  # fmt: skip
    if mode == "resampled":
        assert args == (config.data.path,)
        assert settings == {**want, "shape": (16, 16, 1), "num_classes": 10}
    else:
        assert args == (config.data.path, "val")
        assert settings == {**want, "block": 77}


def test_images_are_checked_before_training(recipe: Recipe, digits: Path) -> None:
    with pytest.raises(UserError, match="change the config or pack"):
        streams.check_data(recipe("model.num_classes=11"))
    missing = recipe(f"data.path={digits}/x-{{0..3}}.tar", "data.mode=resampled")
    with pytest.raises(DataError, match="no such shard"):
        streams.check_data(missing)
