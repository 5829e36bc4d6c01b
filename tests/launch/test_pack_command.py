"""The commands `bigan pack` and `bigan verify`: kills, parts, bad input, exit codes."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from commands import environment
from PIL import Image

from bigan.cli.main import main, parser
from bigan.data.packing.options import PackOptions


def photos(root: Path, num: int) -> Path:
    """`num` JPEGs of different sizes in three class folders."""
    generator = np.random.default_rng(0)
    for i in range(num):
        height, width = (int(x) for x in generator.integers(40, 90, 2))
        small = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        file = root / f"class {i % 3}" / f"{i:05d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(file)
    return root


def listing(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bigan(capsys: pytest.CaptureFixture[str]) -> Run:
    """`bigan(...)` in this process: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse
            code = int(str(end.code))
        return code, *capsys.readouterr()

    return run


def kill_while_packing(command: list[str], folder: Path, after_shards: int) -> bool:
    """SIGKILL the command once it has written some shards; returns whether it was running."""
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while process.poll() is None and len(list(folder.glob("*.tar"))) < after_shards:
        time.sleep(0.002)
    time.sleep(random.Random(after_shards).random() * 0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


@pytest.mark.full
@pytest.mark.parametrize("num", [800, pytest.param(5000, marks=pytest.mark.slow)])
def test_killed_twice_gives_the_same_bytes(bigan: Run, tmp_path: Path, num: int) -> None:
    """An interrupted command gives the files of an uninterrupted one."""
    source = photos(tmp_path / "photos", num)
    options = ["--resolution", "32", "--shard-size", str(num // 25), "--jobs", "1"]
    assert bigan("pack", source, tmp_path / "uninterrupted", *options)[0] == 0
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "bigan", "pack", str(source), str(folder), *options]
    kills = [kill_while_packing(command, folder, shards) for shards in (4, 12)]
    assert kills == [True, True]
    assert not (folder / "manifest.json").exists()
    assert bigan("pack", source, folder, *options)[0] == 0
    assert listing(folder) == listing(tmp_path / "uninterrupted")
    assert bigan("verify", folder, "--deep")[0] == 0


def test_parts_from_one_and_from_zero(bigan: Run, tmp_path: Path) -> None:
    source = photos(tmp_path / "photos", 60)
    options = ["--resolution", "16", "--shard-size", "8"]
    bigan("pack", source, tmp_path / "full", *options)
    for name, parts in (("from-0", ("0/3", "1/3", "2/3")), ("from-1", ("1/3", "2/3", "3/3"))):
        for part in parts:
            code, _, errors = bigan("pack", source, tmp_path / name, *options, "--part", part)
            assert code == 0, errors
        assert listing(tmp_path / name) == listing(tmp_path / "full")


def test_bad_images_on_the_command_line(bigan: Run, tmp_path: Path) -> None:
    source = photos(tmp_path / "photos", 60)
    (source / "class 1" / "empty.jpg").write_bytes(b"")
    full = (source / "class 2" / "00002.jpg").read_bytes()
    (source / "class 2" / "cut.jpg").write_bytes(full[: len(full) // 2])
    command = ["pack", source, tmp_path / "d", "--resolution", "16"]
    code, _, errors = bigan(*command)
    assert code == 2
    (line,) = errors.strip().splitlines()
    for part in ("2 of 62 images", "--max-bad 2", "class 1/empty.jpg"):
        assert part in line
    code, printed, _ = bigan(*command, "--max-bad", "2")
    assert code == 0
    assert "left out 2 unusable images" in printed
    assert bigan("verify", tmp_path / "d")[0] == 0
    names = [line.split("\t")[0] for line in (tmp_path / "d" / "bad.txt").read_text().splitlines()]
    assert names == ["class 1/empty.jpg", "class 2/cut.jpg"]


def test_verify_exits_with_1_and_lists_everything(bigan: Run, tmp_path: Path) -> None:
    folder = tmp_path / "d"
    pack = ["pack", photos(tmp_path / "photos", 60), folder, "--resolution", "16"]
    pack += ["--shard-size", "8"]
    bigan(*pack)
    shards = sorted(folder.glob("train-*.tar"))
    flipped = bytearray(shards[0].read_bytes())
    flipped[len(flipped) // 2] ^= 1
    shards[0].write_bytes(bytes(flipped))
    shards[1].write_bytes(shards[1].read_bytes()[:2000])
    shards[2].unlink()
    (folder / "train-000099.tar").write_bytes(shards[3].read_bytes())
    code, printed, _ = bigan("verify", folder)
    assert code == 1
    for name in (*(shard.name for shard in shards[:3]), "train-000099.tar"):
        assert name in printed
    report = json.loads(bigan("verify", folder, "--json")[1])
    assert not report["ok"]
    assert len(report["problems"]) >= 4
    for damaged in (folder / "train-000099.tar", *shards[:2]):
        damaged.unlink()
    code, _, errors = bigan(*pack)
    assert code == 0, errors
    assert bigan("verify", folder)[0] == 0
    assert bigan("verify", tmp_path / "nowhere")[0] == 2


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--part", "4/3"], "not a part like 3/8"),
        (["--test-fraction", "1.5"], "not a fraction"),
        (["--resolution", "0"], "resolution"),
        (["--encoding", "gif"], "invalid choice"),
        (["--resolution", "16", "--encoding", "jpg", "--quality", "200"], "quality"),
        (["--resolution", "16", "--pyramid", "32"], "pyramid"),
        ([], "--resolution"),
    ],
)
def test_bad_options_are_one_line(
    bigan: Run, tmp_path: Path, arguments: list[str], part: str
) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "photos" / "a.png")
    code, _, errors = bigan("pack", tmp_path / "photos", tmp_path / "d", *arguments)
    assert code == 2
    assert part in errors.strip().splitlines()[-1]
    assert not (tmp_path / "d").exists()


def test_options_of_the_command_are_those_of_the_function() -> None:
    omitted = vars(parser().parse_args(["pack", "photos", "data"]))
    arguments = ["--allow-upscale", "--pyramid", "--part", "1/2", "--channels", "3"]
    arguments += ["--resize", "area", "--encoding", "png", "--fit", "pad", "--labels", "none"]
    for name in PackOptions.__dataclass_fields__:
        option = f"--{name.replace('_', '-')}"
        arguments += [] if option in arguments else [option, "0" if "fraction" in name else "1"]
    given = vars(parser().parse_args(["pack", "photos", "data", *arguments]))
    assert given.keys() - omitted.keys() == PackOptions.__dataclass_fields__.keys()
    assert given.keys() & omitted.keys() == omitted.keys()
