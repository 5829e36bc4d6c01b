"""Copies of the shards of a folder on a disk of the node."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT, SMOKE, environment
from data_helpers import one_line, tree
from web import Web

from bigan.atomic_files import pid_scope
from bigan.cli.main import main
from bigan.config import dump
from bigan.data import DataError
from bigan.data.format.manifest import Manifest
from bigan.data.packing.pack import pack
from bigan.data.settings import DataConfig, Fetch
from bigan.data.streaming import staging
from bigan.data.streaming.node_copy import copied
from bigan.data.streaming.staging import is_staged, stage
from bigan.data.streaming.stream import ShardStream, sequential
from bigan.distributed.world import World
from bigan.run.streams import staged_splits
from bigan.run_config import load_config


@pytest.fixture
def source(digits8: Path, tmp_path: Path) -> Manifest:
    """A data set of several shards in two splits, which a test may damage."""
    return Manifest.load(Path(shutil.copytree(digits8, tmp_path / "shared")))


def images(manifest: Manifest, fetch: Fetch) -> tuple[str, bytes]:
    """The fingerprint and the pixels of the first batches of a stream."""
    with ShardStream(manifest, seed=1, world=World(), batch=100, fetch=fetch) as stream:
        batches = list(itertools.islice(stream, 20))
    return stream.fingerprint, b"".join(batch.pixels.numpy().tobytes() for batch in batches)


def damage(manifest: Manifest) -> None:
    """Zeros in place of the shards; their sizes stay the same."""
    for shard in manifest.shardlist:
        (manifest.folder / shard.url).write_bytes(bytes(shard.filesize))


@pytest.mark.parametrize("mode", ["auto", "stream", "resident"])
def test_a_run_reads_the_copy_of_its_split(source: Manifest, tmp_path: Path, mode: str) -> None:
    """Bitwise equal, without the folder; another split is read from the folder."""
    fetch = Fetch(cache=tmp_path / "local", mode=mode)
    plain = images(source, Fetch(mode=mode))
    assert images(source, fetch) == plain  # there is no copy
    lines: list[str] = []
    stage(source, "train", fetch, lines.append)
    assert len(lines) == 1
    assert is_staged(source, "train", fetch)
    assert not is_staged(source, "test", fetch)
    names = sorted(path.name for path in (tmp_path / "local").rglob("*.tar"))
    assert names == [shard.url for shard in source.shards("train")]
    list(sequential(source, "test", World(), 100, fetch))
    damage(source)
    assert images(source, fetch) == plain
    with pytest.raises(DataError):
        list(sequential(source, "test", World(), 100, fetch))


def test_what_is_missing_is_copied_again(source: Manifest, tmp_path: Path) -> None:
    """After a cleanup of the disk, or an interruption; a complete copy is left alone."""
    fetch = Fetch(cache=tmp_path / "local")
    stage(source, "train", fetch, lambda _: None)
    (folder,) = (path for path in (tmp_path / "local" / "staged").iterdir() if path.is_dir())
    complete = tree(folder)
    first, second = source.shards("train")[:2]
    (folder / first.url).unlink()
    (folder / second.url).write_bytes(b"")
    killed = f"{pid_scope()}-{2**22 + 1}"  # above the highest process number
    (folder / f".{first.url}.00000000-{killed}.tmp").write_bytes(b"")
    assert not is_staged(source, "train", fetch)
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar")}
    stage(source, "train", fetch, lambda _: None)
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar")}
    assert {name for name in after if after[name] != before.get(name)} == {first.url, second.url}
    assert tree(folder) == complete
    (folder / "COMPLETE").unlink()
    assert not is_staged(source, "train", fetch)
    stage(source, "train", fetch, lambda _: None)
    damage(source)  # nothing is read again
    stage(source, "train", fetch, lambda _: None)
    assert is_staged(source, "train", fetch)


def test_a_shard_that_differs_from_the_manifest_is_not_copied(
    source: Manifest, tmp_path: Path
) -> None:
    shard = source.shards("train")[1]
    data = bytearray((source.folder / shard.url).read_bytes())
    data[-2000] ^= 1
    (source.folder / shard.url).write_bytes(data)
    fetch = Fetch(cache=tmp_path / "local")
    with pytest.raises(DataError) as error:
        stage(source, "train", fetch, lambda _: None)
    one_line(error, str(source.folder / shard.url))
    names = {path.name for path in (tmp_path / "local").rglob("*") if path.is_file()}
    assert not names & {shard.url, "COMPLETE"}
    assert not any(name.endswith(".tmp") for name in names)


@pytest.mark.parametrize("limit", ["data.cache_bytes", "free space"])
def test_too_little_space_is_reported_before_anything_is_copied(
    source: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    total = sum(shard.filesize for shard in source.shards("train"))
    fetch = Fetch(cache=tmp_path / "local", cache_bytes=total)
    if limit == "free space":
        usage = shutil._ntuple_diskusage(10 * total, 9 * total, total - 1)
        monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: usage)
    else:
        fetch = fetch.model_copy(update={"cache_bytes": total - 1})
    with pytest.raises(DataError) as error:
        stage(source, "train", fetch, lambda _: None)
    one_line(error, limit, f"{total:,}", f"{total - 1:,}")
    assert not list((tmp_path / "local").rglob("*.tar"))


def test_one_process_of_a_node_copies(source: Manifest, tmp_path: Path) -> None:
    fetch, lines = Fetch(cache=tmp_path / "local"), []
    threads = [
        threading.Thread(target=stage, args=(source, "train", fetch, lines.append))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sum("copied" in line for line in lines) == 1, lines
    assert is_staged(source, "train", fetch)


def test_progress_is_reported(
    source: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "LINE_SECONDS", 0.0)
    lines: list[str] = []
    stage(source, "train", Fetch(cache=tmp_path / "local"), lines.append)
    assert sum("MB/s" in line and "left" in line for line in lines) >= len(source.shards("train"))


# --- data.cache -------------------------------------------------------------------------------


def test_the_cache_may_contain_variables_of_the_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stored config keeps them."""
    data = DataConfig(path="data", cache=Path("$NODE_DISK/${JOB}-bigan"))
    monkeypatch.setenv("NODE_DISK", str(tmp_path))
    monkeypatch.setenv("JOB", "7")
    assert data.cache_folder() == tmp_path / "7-bigan"
    assert "cache: $NODE_DISK/${JOB}-bigan\n" in dump(data)
    for empty in (False, True):
        monkeypatch.delenv("JOB", raising=False)
        if empty:
            monkeypatch.setenv("JOB", "")
        with pytest.raises(DataError) as error:
            data.cache_folder()
        one_line(error, "$NODE_DISK/${JOB}-bigan", "JOB is not set")
    assert Fetch().cache_folder() is None


def test_the_chunk_cache_has_the_variables_of_the_node(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without them, only the manifest can be read: on a login node."""
    monkeypatch.delenv("NODE_DISK", raising=False)
    fetch = Fetch(cache=Path("$NODE_DISK/bigan"))
    manifest = copied(web.url, fetch)
    assert (tmp_path / "user-cache" / "bigan" / "manifests").is_dir()
    with pytest.raises(DataError, match="NODE_DISK is not set"):
        list(sequential(manifest, "test", World(), 100, fetch))
    monkeypatch.setenv("NODE_DISK", str(tmp_path / "local"))
    found = [batch.pixels.numpy() for batch in sequential(manifest, "test", World(), 100, fetch)]
    assert len(np.concatenate(found)) == manifest.num_samples("test")
    assert (tmp_path / "local" / "bigan").is_dir()


# --- the command --------------------------------------------------------------------------------


def test_the_command_copies_what_the_config_reads(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Manifest.load(digits)
    overrides = [f"data.path={digits}", f"run_dir={tmp_path / 'run'}"]
    command = ["stage", str(SMOKE), *overrides, f"data.cache={tmp_path / 'local'}"]
    for _ in range(2):
        assert main(command) == 0
        assert str(tmp_path / "local") in capsys.readouterr().out
        assert is_staged(source, "train", Fetch(cache=tmp_path / "local"))
    assert main([*command, "data.cache_bytes=1"]) == 0  # nothing is copied
    assert main([*command, "data.cache=$NO_SUCH_VARIABLE"]) == 2
    assert "NO_SUCH_VARIABLE" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_all_resolutions_of_a_growing_model_are_copied(tmp_path: Path) -> None:
    pack("digits", tmp_path / "digits", resolution=16, pyramid=4)
    config = load_config(
        ROOT / "configs" / "smoke" / "progan-digits.yaml",
        [f"data.path={tmp_path / 'digits'}", f"data.cache={tmp_path / 'local'}"],
    )
    assert [manifest.resolution for manifest, _ in staged_splits(config)] == [4, 8, 16]


@pytest.mark.parametrize(
    "overrides", [[], ["data.cache=null"], ["data.path=s3://b/x", "data.cache=/x"]]
)
def test_without_a_copy_to_make_the_command_is_quick(overrides: list[str]) -> None:
    script = (
        "import sys; from bigan.cli.main import main; code = main(sys.argv[1:]); "
        "sys.exit(code or ('torch' in sys.modules))"
    )
    command = [sys.executable, "-c", script, "stage", str(SMOKE), *overrides]
    assert subprocess.run(command, env=environment()).returncode == 0
