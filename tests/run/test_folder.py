"""What may change between two attempts of a run, and the line that refuses the rest."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import SMOKE

from bigan import config as configs
from bigan.cli.main import main
from bigan.config import ConfigError
from bigan.data.packing.pack import pack
from bigan.distributed import signals
from bigan.distributed.world import World
from bigan.evaluation.watcher import evaluate
from bigan.run import folder
from bigan.run.changes import Change
from bigan.run.ending import leave_marker
from bigan.run.trainer import train
from bigan.run_config import RunConfig, load_config
from bigan.run_folder import RunFolder

MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def begun(make_config: MakeConfig) -> RunConfig:
    """The config of a run whose folder exists."""
    config = make_config()
    folder.prepare(config)
    return config


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("optimizer.generator.name=rmsprop", "optimizer.generator.name"),
        ("optimizer.generator={name: sgd, lr: 2.0e-4}", "optimizer.generator.name"),
        ("optimizer.discriminator.lr=1.0e-3", "optimizer.discriminator.lr"),
        ("objective.loss=wasserstein", "objective.loss"),
        ("data.split=test", "data.split"),
        ("data={a: {path: x}, images: {path: x}}", "data.a"),
    ],
)
def test_another_experiment_is_refused_in_one_line(
    begun: RunConfig,
    make_config: MakeConfig,
    capsys: pytest.CaptureFixture[str],
    override: str,
    key: str,
) -> None:
    stored = (begun.run_dir / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=re.escape(f"this run has {key} = ")):
        folder.check(make_config(override))
    if not override.startswith("data"):  # whose files are checked first
        where = [f"data.path={begun.streams['images'].path}", f"run_dir={begun.run_dir}"]
        assert main(["train", str(SMOKE), *where, override]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert f"{key} = " in line
    assert (begun.run_dir / "config.yaml").read_text() == stored


def test_the_setting_that_resumes_can_be_pasted(begun: RunConfig, make_config: MakeConfig) -> None:
    """Also where it is null, a list or a number."""
    changes = ["anneal_images=80", "objective.penalties=[{name: r1}]", "train.seed=3"]
    for override in changes:
        with pytest.raises(ConfigError) as refused:
            folder.check(make_config(override))
        advice = re.findall(r", or (\S+=.*) to resume$", str(refused.value))
        assert folder.check(make_config(override, *advice)).changes == (), advice


def test_execution_and_length_may_change(make_config: MakeConfig) -> None:
    """Of one stream and of each of several."""
    assert train(make_config("train.total_images=200"), print, lambda *_: None) == 0
    changes = ["train.total_images=400", "train.micro_batch=20", "compile=aot_eager"]
    assert folder.check(make_config(*changes, "data.threads=2", "data.on_bad=skip")).resumes
    config = make_config()
    data = config.streams["images"].model_dump(mode="json")
    two = _changed(config, f"data={{images: {data}, others: {data}}}".replace("None", "null"))
    folder.prepare(two)
    assert folder.check(_changed(two, "data.others.threads=2")).resumes
    with pytest.raises(ConfigError, match=r"data\.others\.mirror = False, not True"):
        folder.check(_changed(two, "data.others.mirror=true"))


def _changed(config: RunConfig, override: str) -> RunConfig:
    """The config with one override."""
    file = config.run_dir.parent / "changed.yaml"
    file.write_text(configs.dump(config))
    return load_config(file, [override])


@pytest.mark.parametrize(
    "umask", [0o002, *(pytest.param(mask, marks=pytest.mark.full) for mask in (0o022, 0o077))]
)
def test_files_and_folders_have_the_modes_of_the_umask(
    make_config: MakeConfig, tmp_path: Path, umask: int
) -> None:
    """Of a pack, a run with all its files, its lock, and an evaluation."""
    locked: list[Path] = []

    def on_tick(images_seen: int, _: object) -> None:
        locked.append((run / "LOCK").rename(tmp_path / "out" / "LOCK"))

    run = tmp_path / "out" / "run"
    former = os.umask(umask)
    try:
        pack("digits", tmp_path / "out" / "digits")
        settings = ["train.total_images=40", "train.tick_images=40", f"run_dir={run}"]
        config = make_config(*settings, f"data.path={tmp_path / 'out' / 'digits'}")
        folder.prepare(config, [Change("train.standing_batches", 9, 2)])
        assert train(config, print, on_tick) == 0
        evaluate(run, World(), watch=False, echo=print)
    finally:
        os.umask(former)
    assert locked
    found = list((tmp_path / "out").rglob("*"))
    names = {path.name for path in found}
    assert {"generator_ema.safetensors", "progress.json", "40.json", "manifest.json"} <= names
    assert {"config_history.jsonl", "metrics.jsonl", "part-00000-of-00001.safetensors"} <= names
    wrong = {
        str(path): oct(path.stat().st_mode & 0o777)
        for path in found
        if path.stat().st_mode & 0o777 != (0o777 if path.is_dir() else 0o666) & ~umask
    }
    assert wrong == {}


@pytest.mark.full
def test_a_moved_run_folder_continues_in_its_new_place(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """Nothing is made at the former path; the bytes are those of a run that stayed."""
    half = "train.total_images=200"
    stayed = make_config()
    assert train(stayed, print, lambda *_: None) == 0
    first = make_config(half, f"run_dir={tmp_path / 'before' / 'run'}")
    assert train(first, print, lambda *_: None) == 0
    evaluate(first.run_dir, World(), watch=False, echo=print)
    (tmp_path / "before").rename(tmp_path / "after")
    moved = make_config(f"run_dir={tmp_path / 'after' / 'run'}")
    assert train(moved, print, lambda *_: None) == 0
    measured = evaluate(moved.run_dir, World(), watch=False, echo=print)
    assert sorted(measured) == [200, 400]
    assert not (tmp_path / "before").exists()
    for name in ("snapshots/400/generator_ema.safetensors", "samples/400.png"):
        assert (moved.run_dir / name).read_bytes() == (stayed.run_dir / name).read_bytes()
    former = str(tmp_path / "before")
    texts = [p for p in moved.run_dir.rglob("*") if p.suffix in {".yaml", ".json", ".jsonl"}]
    old = [p for p in texts if former in p.read_text() and "snapshots/200" not in str(p)]
    assert old == []


@pytest.mark.parametrize("deleted", ["run", "config.yaml"])
def test_a_folder_that_is_deleted_while_the_run_trains(
    make_config: MakeConfig, deleted: str
) -> None:
    """One line; the run ends with all that resuming needs."""
    config = make_config("train.tick_images=40", "train.checkpoint_images=80")
    lines: list[str] = []

    def on_tick(images_seen: int, _: object) -> None:
        if images_seen == 120:
            shutil.rmtree(config.run_dir) if deleted == "run" else path.unlink()

    path = config.run_dir / "config.yaml"
    assert train(config, lines.append, on_tick) == 0
    assert len([line for line in lines if str(path) in line]) == 1
    assert load_config(path) == config
    assert (config.run_dir / "environment.json").exists()
    more = make_config("train.total_images=480")
    assert train(more, lines.append, lambda *_: None) == 0
    assert any(line.endswith("at images_seen = 400") for line in lines)


def test_a_run_without_config_yaml_names_the_copy(make_config: MakeConfig) -> None:
    config = make_config("train.total_images=80", "train.snapshot_images=80")
    assert train(config, print, lambda *_: None) == 0
    path = config.run_dir / "config.yaml"
    path.unlink()
    copy = config.run_dir / "snapshots" / "80" / "config.yaml"
    with pytest.raises(ConfigError, match=f"^{re.escape(str(path))}: .*{re.escape(str(copy))} "):
        folder.check(config)
    shutil.copy(copy, path)
    assert folder.check(config).resumes


@pytest.mark.parametrize("name", ["checkpoints", "snapshots", "samples"])
def test_a_file_in_the_place_of_a_folder_is_named(begun: RunConfig, name: str) -> None:
    (begun.run_dir / name).rmdir()
    (begun.run_dir / name).touch()
    with pytest.raises(ConfigError, match=f"/{name}: "):
        folder.check(begun)


def test_a_complete_run_has_no_marker(tmp_path: Path) -> None:
    """A signal while the end is still delivered must not requeue the job for ever."""
    config = load_config(SMOKE, [f"run_dir={tmp_path}"])
    signals.write_requeue(tmp_path, 15, 100)
    folder.finish(config, 400)
    assert not RunFolder(tmp_path).requeue.exists()
    leave_marker(tmp_path, 15)
    assert not RunFolder(tmp_path).requeue.exists()
