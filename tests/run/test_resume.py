"""Resuming where checkpoints are damaged: the newest intact one, and nothing is deleted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import ROOT, SMOKE, launch

from bigan import checkpoint
from bigan.checkpoint import CheckpointError, DamagedError
from bigan.checkpoint.part import part_name
from bigan.reporting import plots
from bigan.run.trainer import train
from bigan.run_config import RunConfig

MakeConfig = Callable[..., RunConfig]
PART = part_name(0, 1)
SAVES = ("train.checkpoint_images=80", "train.checkpoint_keep=9", "train.snapshot_images=400")


def flip(path: Path) -> None:
    """Change one byte; the size and the header stay."""
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))


def corrected(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGE: dict[str, Callable[[Path], None]] = {
    "truncated": lambda folder: (folder / PART).write_bytes((folder / PART).read_bytes()[:999]),
    "empty": lambda folder: (folder / PART).write_bytes(b""),
    "missing": lambda folder: (folder / PART).unlink(),
    "flipped": lambda folder: flip(folder / PART),
    "zeroed": lambda folder: (folder / PART).write_bytes(bytes((folder / PART).stat().st_size)),
    "progress": lambda folder: (folder / "progress.json").write_text("{"),
    "format": lambda folder: corrected(folder / "progress.json", format="1"),
    "no progress": lambda folder: (folder / "progress.json").unlink(),
}


@pytest.fixture(scope="module", autouse=True)
def _empty_plots() -> Iterator[None]:
    """Curves would take a quarter of the time of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "curves", lambda run_dir, path: path.touch())
        yield


@pytest.fixture(scope="module")
def finished(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 400 images with checkpoints at 80, 160, 240, 320 and 400."""
    from bigan.run_config import load_config

    run = tmp_path_factory.mktemp("finished") / "run"
    config = load_config(SMOKE, [f"data.path={digits}", f"run_dir={run}", *SAVES])
    assert train(config, print, lambda *_: None) == 0
    return run


def resumed(config: RunConfig) -> list[str]:
    lines: list[str] = []
    assert train(config, lines.append, lambda *_: None) == 0
    return lines


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(name, marks=() if name in ("flipped", "missing") else pytest.mark.full)
        for name in DAMAGE
    ],
)
def test_the_checkpoint_before_a_damaged_one_is_used(
    make_config: MakeConfig, finished: Path, damage: str
) -> None:
    """The run ends with the same bytes; the damaged checkpoint is kept under another name."""
    config = make_config(*SAVES)
    shutil.copytree(finished, config.run_dir)
    folder = config.run_dir / "checkpoints" / "400"
    DAMAGE[damage](folder)
    kept = {p.name: p.read_bytes() for p in folder.iterdir()}
    lines = resumed(config)
    (line,) = [line for line in lines if "damaged" in line]
    assert str(folder) in line
    assert "400.damaged" in line
    assert any(line.endswith("images_seen = 320") for line in lines)
    aside = config.run_dir / "checkpoints" / "400.damaged"
    assert {p.name: p.read_bytes() for p in aside.iterdir()} == kept
    for name in ("snapshots/400/generator_ema.safetensors", "samples/400.png"):
        assert (config.run_dir / name).read_bytes() == (finished / name).read_bytes()
    newest = checkpoint.latest(config.run_dir)
    assert newest is not None
    assert newest.name == "400"
    checkpoint.Reader(newest)


def test_several_damaged_checkpoints(make_config: MakeConfig, finished: Path) -> None:
    """Each is set aside, also a second one of the same name."""
    config = make_config(*SAVES)
    shutil.copytree(finished, config.run_dir)
    checkpoints = config.run_dir / "checkpoints"
    (checkpoints / "400.damaged").mkdir()
    for name in ("400", "320", "240"):
        flip(checkpoints / name / PART)
    lines = resumed(config)
    assert any(line.endswith("images_seen = 160") for line in lines)
    aside = {p.name for p in checkpoints.iterdir() if not p.name.isdigit()}
    assert aside == {"400.damaged", "400.damaged-2", "320.damaged", "240.damaged"}


def test_no_intact_checkpoint_is_one_error_that_changes_nothing(
    make_config: MakeConfig, finished: Path
) -> None:
    config = make_config(*SAVES)
    shutil.copytree(finished, config.run_dir)
    for folder in (config.run_dir / "checkpoints").iterdir():
        flip(folder / PART)
    before = sorted(p for p in config.run_dir.rglob("*"))
    with pytest.raises(DamagedError, match=r"checkpoints/400/part-.* all 4 older ones") as refused:
        resumed(config)
    assert "\n" not in str(refused.value)
    assert sorted(p for p in config.run_dir.rglob("*")) == before


def test_deleted_checkpoints_are_reported(make_config: MakeConfig, finished: Path) -> None:
    config = make_config(*SAVES)
    shutil.copytree(finished, config.run_dir)
    shutil.rmtree(config.run_dir / "checkpoints")
    lines = resumed(config)
    (line,) = [line for line in lines if str(config.run_dir / "checkpoints") in line]
    assert "images_seen = 400" in line
    newest = checkpoint.latest(config.run_dir)
    assert newest is not None
    assert newest.name == "400"


def test_another_model_or_an_unreadable_file_is_no_damage(
    make_config: MakeConfig, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run must not silently restart from an older checkpoint."""
    config = make_config(*SAVES)
    shutil.copytree(finished, config.run_dir)

    def forbidden(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("bigan.checkpoint.reader.file_checksum", forbidden)
        with pytest.raises(CheckpointError, match="Permission denied") as refused:
            resumed(config)
    assert not isinstance(refused.value, DamagedError)
    assert [p for p in (config.run_dir / "checkpoints").iterdir() if not p.name.isdigit()] == []


@pytest.mark.full
@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_two_ranks_agree_on_the_checkpoint(digits: Path, tmp_path: Path, rank: int) -> None:
    """The part of either rank is damaged: found by checksums that different ranks compute."""
    run = tmp_path / "run"
    options = ["--config_file", ROOT / "launch" / "cpu.yaml"]
    common = [SMOKE, f"data.path={digits}", f"run_dir={run}", *SAVES]
    assert launch(*common, options=options).returncode == 0
    flip(run / "checkpoints" / "400" / part_name(rank, 2))
    done = launch(*common, "train.total_images=480", options=options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("400.damaged") == 1
    assert "images_seen = 320\n" in done.stderr
    assert (run / "checkpoints" / "480" / "COMPLETE").exists()
    assert (run / "checkpoints" / "400.damaged" / part_name(rank, 2)).exists()
