"""Manifest and index of a remote data set, copied once to each node."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from data_helpers import one_line
from verify_folders import flip, reseal, seal
from web import Web, serving

from bigan.data import DataError
from bigan.data.format.manifest import Manifest, level_folder
from bigan.data.settings import Fetch
from bigan.data.streaming import node_copy
from bigan.data.streaming.dataset import open_manifest

OPEN = """
import sys, time
from pathlib import Path
from bigan.data.settings import Fetch
from bigan.data.streaming import node_copy
print("ready", flush=True)
sys.stdin.readline()
manifest = node_copy.copied(sys.argv[1], Fetch(cache=Path(sys.argv[2])))
print(manifest.fingerprint, len(manifest.load_index("train").label))
"""


@pytest.fixture
def server(digits8: Path, tmp_path: Path) -> Iterator[Web]:
    shutil.copytree(digits8, tmp_path / "served")
    with serving(tmp_path / "served") as web:
        yield web


@pytest.fixture
def start(server: Web, tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Start a process that opens the set once a line is written to it."""
    processes: list[subprocess.Popen[str]] = []

    def run() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", OPEN, server.url, str(tmp_path / "cache")]
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True))
        return processes[-1]

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def proceed(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def names(web: Web) -> set[str]:
    return {"manifest.json", *Manifest.read(web.folder).index}


def opened(web: Web, tmp_path: Path) -> tuple[Manifest, dict[str, int]]:
    """The manifest and the requests for it."""
    web.requests.clear()
    manifest = open_manifest(web.url, Fetch(cache=tmp_path / "cache"))
    assert manifest.load_index("train")
    return manifest, dict(web.requests)


def test_the_processes_of_a_node_fetch_each_file_once(
    server: Web, start: Callable[[], subprocess.Popen[str]]
) -> None:
    processes = [start() for _ in range(4)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        proceed(process)
    found = [process.communicate(timeout=60)[0] for process in processes]
    manifest = Manifest.read(server.folder)
    assert found == [f"{manifest.fingerprint} {manifest.num_samples('train')}\n"] * 4
    assert server.requests == dict.fromkeys(names(server), 1)


def test_a_killed_process_does_not_block_the_others(
    server: Web, start: Callable[[], subprocess.Popen[str]], tmp_path: Path
) -> None:
    server.silent = "index/test.size.npy"
    process = start()
    proceed(process)
    end = time.monotonic() + 60
    while not server.requests[server.silent] and time.monotonic() < end:
        time.sleep(0.02)
    process.kill()
    process.wait()
    server.silent = ""
    _, requests = opened(server, tmp_path)
    assert requests["manifest.json"] == 1
    assert set(requests.values()) == {1}
    assert len(requests) < len(names(server)), "complete files are kept"


def test_a_process_that_opens_the_set_again_fetches_the_manifest_only(
    server: Web, tmp_path: Path
) -> None:
    assert opened(server, tmp_path)[1] == dict.fromkeys(names(server), 1)
    assert opened(server, tmp_path)[1] == {"manifest.json": 1}


def test_a_set_that_is_packed_again_is_noticed(server: Web, tmp_path: Path) -> None:
    old, _ = opened(server, tmp_path)
    index = old.load_index("train")
    seal(Manifest.read(server.folder).model_copy(update={"name": "again"}))
    new, requests = opened(server, tmp_path)
    assert (new.name, requests) == ("again", {"manifest.json": 1})
    file = server.folder / "index" / "train.crc32.npy"
    np.save(file, np.load(file) + np.uint32(1))
    reseal(server.folder)
    changed, requests = opened(server, tmp_path)
    assert requests == {"manifest.json": 1, "index/train.crc32.npy": 1}
    assert (changed.load_index("train").crc32 == index.crc32 + np.uint32(1)).all()
    assert (old.load_index("train").crc32 == index.crc32).all(), "a running process keeps its own"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"url": 1}', '{"folder": "../x"}'])
def test_a_damaged_note_of_the_latest_download(server: Web, tmp_path: Path, text: str) -> None:
    opened(server, tmp_path)
    (latest,) = (tmp_path / "cache").glob("manifests/*/latest")
    assert json.loads(latest.read_text())["began"] <= time.time_ns()
    latest.write_text(text)
    assert opened(server, tmp_path)[1] == {"manifest.json": 1}


def test_an_index_that_was_cut_is_fetched_completely(server: Web, tmp_path: Path) -> None:
    server.cut["index/train.offset.npy"] = 1
    manifest, requests = opened(server, tmp_path)
    assert (manifest.load_index("train").offset > 0).all()
    assert requests["index/train.offset.npy"] > 1


def test_a_wrong_index_at_the_server(server: Web, tmp_path: Path) -> None:
    flip(server.folder / "index" / "train.offset.npy", 300)
    with pytest.raises(DataError) as error:
        opened(server, tmp_path)
    one_line(error, f"{server.url}/index/train.offset.npy", "sha256")
    assert not list((tmp_path / "cache").glob("**/*.tmp"))


def test_another_signature_uses_the_same_copy(server: Web, tmp_path: Path) -> None:
    for number, signature in enumerate(("sig=s3cret1", "sig=s3cret2")):
        server.query = signature
        server.requests.clear()
        manifest = open_manifest(f"{server.url}?{signature}", Fetch(cache=tmp_path / "cache"))
        assert manifest.load_index("train")
        served = {name.partition("?")[0] for name in server.requests}
        assert served == (names(server) if number == 0 else {"manifest.json"})
    written = [file.read_bytes() for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    assert not any(b"s3cret" in content for content in written)


def test_levels_of_a_pyramid_at_a_signed_url() -> None:
    assert level_folder("https://host/set/?sig=1", 8) == "https://host/set/r0008?sig=1"
    assert level_folder("data/set?/", (12, 20)) == "data/set?/r0020x0012"


def test_the_name_of_the_copy_has_no_secret() -> None:
    urls = [
        "https://host/set?X-Amz-Signature=1",
        "https://host/set?X-Amz-Signature=2",
        "https://user:password@host/set/",
        "https://user:other@host/set",
    ]
    assert len({node_copy._bare(url) for url in urls}) == 1
    assert len({node_copy._key(url) for url in urls}) == 3, "a query may select one of two sets"
    assert node_copy._bare("abfs://a@host/set") != node_copy._bare("abfs://b@host/set")
