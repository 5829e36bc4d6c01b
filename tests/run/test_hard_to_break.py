"""Incomplete run folders, unknown files, unusable values: one line each, and nothing is lost."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import SMOKE
from safetensors.torch import load_file, save_file

from bigan import atomic_files, checkpoint
from bigan.checkpoint import CheckpointError, snapshots
from bigan.cli.main import main
from bigan.data.packing.pack import pack
from bigan.errors import RunError
from bigan.run.trainer import train
from bigan.run_config import RunConfig

MakeConfig = Callable[..., RunConfig]


def quiet(config: RunConfig) -> int:
    return train(config, lambda _: None, lambda *_: None)


def error_of_train(capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """The one line with which `bigan train` refuses its input."""
    assert main(["train", str(SMOKE), *overrides]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_killed_while_the_run_folder_was_created(make_config: MakeConfig) -> None:
    config = make_config()
    config.run_dir.mkdir()
    (config.run_dir / ".config.yaml.77.tmp").write_text("half")
    assert quiet(config) == 0
    assert not list(config.run_dir.glob(".config*"))


def test_weights_that_explode_are_never_published(make_config: MakeConfig) -> None:
    """The loss is finite, the update is not: neither snapshot nor checkpoint holds it."""
    config = make_config(
        "train.total_images=40",
        "optimizer.generator.lr=1e39",
        "optimizer.generator.warmup_images=0",
    )
    with pytest.raises(RunError, match="not finite at images_seen = 40"):
        quiet(config)
    assert snapshots.find(config.run_dir) == []
    assert checkpoint.latest(config.run_dir) is None


def test_other_images_under_the_same_path_are_refused(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    for seed in (0, 1):
        pack("digits", tmp_path / f"digits{seed}", seed=seed)
    quiet(make_config(f"data.path={tmp_path / 'digits0'}", "train.total_images=200"))
    with pytest.raises(CheckpointError, match="other images"):
        quiet(make_config(f"data.path={tmp_path / 'digits1'}"))


@pytest.mark.parametrize(
    "change",
    [
        {"images_seen": "x"},
        {"images_seen": 80},
        {"seconds": None},
        {"unknown": 1},
    ],
)
def test_edited_progress_is_refused(make_config: MakeConfig, change: dict[str, object]) -> None:
    quiet(make_config("train.total_images=200"))
    path = make_config().run_dir / "checkpoints" / "200" / "progress.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=r"progress\.json: cannot be read"):
        quiet(make_config())


def test_missing_optimizer_state_is_refused(make_config: MakeConfig) -> None:
    quiet(make_config("train.total_images=200"))
    folder = make_config().run_dir / "checkpoints" / "200"
    path = folder / "part-00000-of-00001.safetensors"
    tensors, prefix = load_file(path), "optimizers/discriminator."
    save_file({key: t for key, t in tensors.items() if not key.startswith(prefix)}, path)
    record = json.loads((folder / "progress.json").read_text())
    content = path.read_bytes()
    record["parts"] = [{"bytes": len(content), "crc32": zlib.crc32(content)}]
    (folder / "progress.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"optimizer state of discriminator\."):
        quiet(make_config())


def test_an_unknown_file_among_the_samples_is_ignored(make_config: MakeConfig) -> None:
    quiet(make_config("train.total_images=200"))
    samples = make_config().run_dir / "samples"
    (samples / "favourite.png").write_bytes((samples / "0.png").read_bytes())
    assert quiet(make_config()) == 0


def test_replacing_a_folder_never_shows_half_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder is renamed before it is deleted."""
    folder, deleted, really = tmp_path / "100", [], atomic_files.shutil.rmtree
    monkeypatch.setattr(
        atomic_files.shutil, "rmtree", lambda path, **k: (deleted.append(path), really(path, **k))
    )
    for content in ("old", "new"):
        with atomic_files.complete_folder(folder) as temporary:
            (temporary / "a").write_text(content)
    assert deleted
    assert folder not in deleted
    assert (folder / "a").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["100"]


def test_run_dir_that_cannot_be_one(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    data = f"data.path={digits}"
    assert "is a file" in error_of_train(capsys, data, f"run_dir={tmp_path / 'file'}")
    assert "not a folder" in error_of_train(capsys, data, f"run_dir={tmp_path / 'file' / 'run'}")
    assert "/proc" in error_of_train(capsys, data, "run_dir=/proc/bigan/run")


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("run_dir={{name}}", "a key must be plain text"),
        ("train.seed=2020-01-01", "train.seed = '2020-01-01'"),
        ("optimizer.generator.lr=.inf", "optimizer.generator.lr = inf"),
        ("optimizer.generator.lr=.nan", "optimizer.generator.lr = nan"),
        ("evaluation.num_samples=1", "evaluation.num_samples = 1"),
        ("evaluation.truncation=1e-9", "evaluation.truncation = 1e-09"),
        ("train.total_images=-5", "train.total_images = -5"),
        ("train.batchnorm=local", "batchnorm = local needs micro_batch"),
        ("train.batchnorm=per_rank", "train.batchnorm = 'per_rank'"),
        ("train.power_iterations=0", "train.power_iterations = 0"),
    ],
)
def test_unusable_values_are_one_line(
    capsys: pytest.CaptureFixture[str], override: str, part: str
) -> None:
    assert part in error_of_train(capsys, override)


def test_a_shard_that_is_a_dangling_link(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack("digits", tmp_path / "digits")
    shard = tmp_path / "digits" / "train-000001.tar"
    shard.unlink()
    shard.symlink_to("/nowhere/train-000001.tar")
    line = error_of_train(capsys, f"data.path={tmp_path / 'digits'}", f"run_dir={tmp_path / 'r'}")
    assert "train-000001.tar: shard cannot be read" in line


@pytest.mark.parametrize("option", [["--world-size", "0"], ["--world-size", "x"]])
def test_unusable_options_exit_with_2(option: list[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["describe", str(SMOKE), *option])
    assert left.value.code == 2


def test_remarks_on_what_a_config_implies(make_config: MakeConfig, tmp_path: Path) -> None:
    lines: list[str] = []
    cache = f"data.cache={tmp_path / 'local'}"
    config = make_config("train.total_images=90", "train.micro_batch=10", cache)
    assert train(config, lines.append, lambda *_: None) == 0
    assert any("BatchNorm sees 10 images" in line for line in lines)
    assert any("ends at images_seen = 120" in line for line in lines)
    assert sum("`bigan stage CONFIG`" in line for line in lines) == 1
    assert not (tmp_path / "local").exists()
    assert [p.name for p in snapshots.find(config.run_dir)] == ["120"]


def test_evaluation_with_other_settings_from_another_folder(
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = make_config()
    quiet(config)
    monkeypatch.chdir(tmp_path)
    command = ["evaluate", str(config.run_dir), "evaluation.num_samples=100"]
    assert main(command) == 0
    assert "(100 samples" in capsys.readouterr().out
    assert main(command) == 0
    again = capsys.readouterr().out
    assert again.count("fd/digits8-cnn-v1") == 2  # both snapshots are shown, not measured again
    assert "already evaluated" in again
