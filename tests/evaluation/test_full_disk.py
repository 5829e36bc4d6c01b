"""Full disks and quotas, and read-only folders: one line, and no file is half-written."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
from commands import ROOT, SMOKE, environment, run_bigan
from disks import fill, largest_file, small_disk
from parts import evaluated, start_run, write_snapshot
from PIL import Image

from bigan.cli.main import main
from bigan.reporting.tracker import read_metrics


def run_of(folder: Path, digits: Path) -> Path:
    config = evaluated(folder, digits)
    start_run(config)
    for images_seen in (100, 200):
        write_snapshot(config, images_seen)
    return folder


def cache_reference(run: Path, digits: Path) -> None:
    """The reference statistics, by the evaluation of another run."""
    other = run_of(run.with_name("other"), digits)
    assert main(["evaluate", str(other)]) == 0
    (run / "evaluation").mkdir()
    for path in (other / "evaluation").glob("reference-*"):
        path.rename(run / "evaluation" / path.name)


def check_files(run: Path) -> None:
    """Every file is complete, and there are no temporary ones."""
    for path in run.rglob("*"):
        if path.is_file() and "snapshots" not in path.parts:
            assert not path.name.endswith(".tmp")
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".safetensors":
                safetensors.torch.load_file(path)
            elif path.suffix == ".png" and path.stat().st_size:  # plots of most tests are empty
                with Image.open(path) as picture:
                    picture.load()
            elif path.suffix == ".jsonl":
                assert all(map(json.loads, path.read_text().splitlines()))


def complete(run: Path) -> None:
    """With free space the same command measures everything, and logs each snapshot once."""
    assert main(["evaluate", str(run)]) == 0
    check_files(run)
    assert {p.name for p in (run / "evaluation").glob("?00.json")} == {"100.json", "200.json"}
    assert [r["images_seen"] for r in read_metrics(run) if "eval/fd/digits8-cnn-v1" in r] == [
        100,
        200,
    ]


@pytest.mark.parametrize(
    ("num_bytes", "is_cached", "options", "name"),
    [
        (2_000, False, [], "reference-"),
        (50, True, [], "metrics.jsonl"),
        (1_000, True, [], "evaluation/100.json"),
        (1_000, True, ["--truncations", "0.5,none"], "evaluation/truncation-200.json"),
    ],
)
def test_file_that_cannot_be_written_is_one_line_that_names_it(
    num_bytes: int,
    is_cached: bool,
    options: list[str],
    name: str,
    digits: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = run_of(tmp_path / "run", digits)
    if is_cached:
        cache_reference(run, digits)
    capsys.readouterr()
    with largest_file(num_bytes):
        assert main(["evaluate", str(run), *options]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert f"bigan: {run}/" in line
    assert name in line
    check_files(run)
    complete(run)


def test_plots_that_cannot_be_written_are_one_line(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], drawn_plots: None
) -> None:
    run = run_of(tmp_path / "run", digits)
    cache_reference(run, digits)
    capsys.readouterr()
    options = ["--truncations", "0.5"]
    for arguments, name in (([], "curves.png"), (options, "evaluation/truncation-200.png")):
        with largest_file(8_000):
            assert main(["evaluate", str(run), *arguments]) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        assert f"bigan: {run / name}: " in line
        check_files(run)
        complete(run)


def test_output_on_a_full_disk_is_one_line(
    digits: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["describe", str(SMOKE), f"data.path={digits}"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "No space left on device" in line


# --- real file systems ------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "2m") as folder:
        yield folder


@pytest.mark.full
@pytest.mark.parametrize("free_kilobytes", [0, 20, 40, 60, 80, 100, 140])
def test_evaluation_on_a_full_disk(
    free_kilobytes: int,
    disk: Path,
    digits: Path,
    capsys: pytest.CaptureFixture[str],
    drawn_plots: None,
) -> None:
    run = run_of(disk / "run", digits)
    others = fill(disk, 1024 * free_kilobytes)
    code = main(["evaluate", str(run)])
    captured = capsys.readouterr().err
    assert (code, captured.count("\n")) in ((0, 0), (2, 1))
    assert code == 2 or free_kilobytes > 80
    check_files(run)
    others.unlink()
    complete(run)


@pytest.mark.full
def test_read_only_folder_is_one_line(
    disk: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(disk / "run", digits)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert main(["evaluate", str(run)]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "Read-only file system" in line
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    complete(run)


@pytest.mark.full
def test_run_and_pack_that_start_on_a_full_disk(disk: Path, digits: Path) -> None:
    fill(disk)
    run, packed = disk / "run", disk / "digits"
    train = ["train", SMOKE, f"data.path={digits}", f"run_dir={run}", "train.total_images=80"]
    for arguments, folder in ((train, run), (["pack", "digits", packed], packed)):
        done = run_bigan(*arguments)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert f"bigan: {folder}" in done.stderr
        assert not [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.full
def test_log_on_a_full_disk_does_not_end_the_run(digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "bigan", "train", str(SMOKE), "train.total_images=80"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*command, f"data.path={digits}", f"run_dir={run}"],
            env=environment(),
            cwd=ROOT,
            stderr=full,
            stdout=subprocess.DEVNULL,
        )
    assert done.returncode == 0
    assert (run / "DONE").exists()


@pytest.mark.full
def test_local_store_of_a_full_disk_is_complete_later(disk: Path) -> None:
    """MLflow cannot use a file whose tables were created in part."""
    code = """
import sys
from pathlib import Path
from bigan.reporting.tracker import Tracker
from bigan.run_config import TrackingConfig
tracker = Tracker(Path(sys.argv[1]), TrackingConfig(experiment="tests"), role="train")
tracker.log(1, {"a": 1.0})
print(tracker.close("FINISHED") or "delivered")
"""
    run = disk / "run"
    others = fill(disk, 300_000)
    command = [sys.executable, "-c", code, str(run)]
    for expected in ("disk is full", "delivered"):
        done = subprocess.run(command, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout
        assert (disk / "mlflow.db").exists() == (expected == "delivered")
        others.unlink(missing_ok=True)
