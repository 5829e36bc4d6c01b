"""The trainer over every kind of data source; bad samples are counted, resumes included."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import run_bigan
from web import serving

from bigan import checkpoint, snapshot
from bigan.data import fetch as fetching
from bigan.data.plan import Order
from bigan.data.shards import Manifest
from bigan.recipe import RunConfig
from bigan.trainer import train

Recipe = Callable[..., RunConfig]


def run(config: RunConfig) -> list[str]:
    """Train; returns what was said."""
    said: list[str] = []
    assert train(config, said.append, lambda progress, report: None) == 0
    return said


def weights(config: RunConfig) -> bytes:
    (newest,) = snapshot.find(config.run_dir)[-1:]
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
    assert any("on average only" in line for line in said)


def test_one_line_for_what_cannot_be_used(tmp_path: Path) -> None:
    from commands import SMOKE

    (tmp_path / "empty").mkdir()
    cases = {
        "pipe:cat /nowhere": "data.allow_pipe=true",
        "gopher://host/x": "unknown kind of URL",
        str(tmp_path / "empty"): "is no data set",
    }
    for path, part in cases.items():
        done = run_bigan("train", SMOKE, f"data.path={path}", f"run_dir={tmp_path / 'run'}")
        assert done.returncode == 2, done.stderr
        assert part in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
