"""`bigan pack` to an object store and `bigan verify` of one, with a real S3 server."""

from __future__ import annotations

import contextlib
import itertools
import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from commands import finish, python
from data_helpers import one_line, tree
from PIL import Image
from s3 import S3, s3_server
from streams import same, take
from web import serving

from bigan.cli.main import main
from bigan.data import DataError
from bigan.data.packing.pack import pack
from bigan.data.packing.summary import summary
from bigan.data.packing.verify import verify
from bigan.data.settings import Fetch
from bigan.data.stores import object_store, outages
from bigan.data.stores.store import Store
from bigan.data.streaming.dataset import open_level

OPTIONS: dict[str, Any] = {"resolution": 16, "shard_size": 10, "max_bad": 1, "jobs": 2}


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with s3_server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture
def url(s3: S3) -> Iterator[str]:
    """A folder, whose name has to be encoded, in a new bucket."""
    yield f"{s3.bucket()}/sets/my photos"
    s3.refuses = lambda method, path: 0


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 images in two classes and a file that is none."""
    root = tmp_path_factory.mktemp("source") / "photos"
    draws = np.random.default_rng(0)
    for i in range(80):
        file = root / f"class{i % 2}" / f"{i:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draws.integers(0, 256, (16, 16, 3), np.uint8)).save(file)
    (root / "class0" / "bad.png").write_bytes(b"<html>404 Not Found</html>")
    return root


@pytest.fixture(scope="module")
def local(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("local") / "set"
    assert pack(source, folder, **OPTIONS).complete
    return folder


def stored(url: str) -> dict[str, bytes]:
    """All objects below `url`."""
    store = Store(url)
    return {name: store.read(name) for name, _ in store.names()}


def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list to which the name of each object is appended that this process writes from now on."""
    names: list[str] = []
    real = Store.write

    def write(self: Store, name: str, data: bytes) -> None:
        real(self, name, data)
        names.append(name)

    monkeypatch.setattr(Store, "write", write)
    return names


# --- packing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pyramid", [None, 4])
def test_the_objects_are_the_files_of_a_local_pack(
    pyramid: int | None, source: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = written(monkeypatch)
    monkeypatch.chdir(tmp_path)
    packed = pack(source, url, pyramid=pyramid, **OPTIONS)
    assert not list(tmp_path.iterdir())
    expected = pack(source, tmp_path / "set", pyramid=pyramid, **OPTIONS)
    assert stored(url) == tree(tmp_path / "set")
    assert summary(packed) == summary(expected).replace(str(tmp_path / "set"), url)
    assert f"{url}/bad.txt" in summary(packed)
    # Each shard before its record, these before the manifest, which is the last object.
    assert names[-1] == ("pyramid.json" if pyramid else "manifest.json")
    levels = ["r0004/", "r0008/", "r0016/"] if pyramid else [""]
    for level in levels:
        assert names.index(f"{level}train-000000.tar") + 1 == names.index(
            f"{level}index/train-000000.json"
        )
        last = names.index(f"{level}index/test-000000.json")
        assert last < names.index(f"{level}index/train.label.npy")
        assert names.index(f"{level}index/test.label.npy") < names.index(f"{level}manifest.json")


@pytest.mark.parametrize("pyramid", [None, 8])
def test_a_packed_url_is_a_data_path(
    pyramid: int | None, source: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    packed = pack(source, url, pyramid=pyramid, **OPTIONS).manifests[0]
    pack(source, tmp_path / "set", pyramid=pyramid, **OPTIONS)
    resolution = pyramid or 16
    opened = open_level(url, resolution, Fetch())
    local = open_level(str(tmp_path / "set"), resolution, Fetch())
    assert opened.fingerprint == packed.fingerprint == local.fingerprint
    assert opened.remote == packed.remote == (f"{url}/r0008" if pyramid else url)
    assert same(take(opened, 6, batch=20), take(local, 6, batch=20))


def test_a_complete_set_is_kept(
    source: Path, url: str, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pack(source, url, **OPTIONS)
    names = written(monkeypatch)
    s3.requests.clear()
    again = pack(source, url, **OPTIONS)
    assert (again.manifests, again.bad) == (first.manifests, first.bad)
    assert not names
    assert {method for method, _ in s3.requests} <= {"GET", "HEAD"}


KILLED = """
import itertools, os, signal, sys
from bigan.data.packing.pack import pack
from bigan.data.stores.store import Store

def pack_until(moment):
    real, count = Store.write, itertools.count(1)
    def write(self, name, data):
        if next(count) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, name, data)
    Store.write = write
    pack(sys.argv[1], sys.argv[2], resolution=16, shard_size=10, max_bad=1, jobs=2)

for moment in map(int, sys.argv[3:]):
    child = os.fork()  # the transfers of the parent have no threads yet
    if child == 0:
        try:
            pack_until(moment)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
"""


@pytest.mark.slow  # test_killed_at_random_times is similar
def test_killed_before_every_kind_of_upload(
    source: Path, local: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first and a later tar and record, bad.txt, an index column and the manifest."""
    files = len(list(local.glob("*.tar"))) * 2
    columns = len(list(local.glob("index/*.npy")))
    # Each attempt keeps what the former has written, except for a tar without its record.
    moments = [1, 2, 4, files - 4, 1, 2 + columns, 1 + columns]
    finish(python(KILLED, source, url, *moments))
    objects = stored(url)
    assert "manifest.json" not in objects
    kept = {name for name in objects if name.endswith(".tar")}
    assert kept == {file.name for file in local.glob("*.tar")}
    names = written(monkeypatch)
    assert pack(source, url, **OPTIONS).complete
    assert kept.isdisjoint(names)
    assert stored(url) == tree(local)


@pytest.mark.full
def test_killed_at_random_times(source: Path, local: Path, url: str, s3: S3) -> None:
    def puts() -> int:
        return sum(method == "PUT" for method, _ in s3.requests)

    for number in (3, 8, 13):
        s3.requests.clear()
        process = python(KILLED.replace("os.fork()", "0"), source, url, 1000)
        while puts() < number:
            assert process.poll() is None
            time.sleep(0.001)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert pack(source, url, **OPTIONS).complete
    assert stored(url) == tree(local)


def test_a_resumed_pack_makes_few_requests(source: Path, url: str, s3: S3) -> None:
    """One listing, and one request for each record, not for each shard."""
    pack(source, url, part=(0, 2), **OPTIONS)
    s3.requests.clear()
    assert not pack(source, url, part=(0, 2), **OPTIONS).complete
    assert not [path for _, path in s3.requests if path.endswith(".tar")]
    # Plans, stamp and listings; the records of five shards, twice: for this part, and for all.
    assert len(s3.requests) <= 10 + 10


PARTS = """
import os, sys
from bigan.data.packing.pack import pack
children = []
for number in range(3):
    children.append(os.fork())  # the transfers of the parent have no threads yet
    if children[-1] == 0:
        options = {"resolution": 16, "shard_size": 10, "max_bad": 1, "jobs": 2}
        print(pack(*sys.argv[1:3], part=(number, 3), **options).complete, flush=True)
        os._exit(0)
assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
"""


def test_parts_by_three_processes(source: Path, local: Path, url: str) -> None:
    out, _ = finish(python(PARTS, source, url))
    assert "True" in out
    assert stored(url) == tree(local)


def test_one_of_several_plans_wins(source: Path, url: str) -> None:
    pack(source, url, part=(0, 2), **OPTIONS)
    before = stored(url)
    for change, named in [({"seed": 1}, "seed"), ({"shard_size": 20}, "shard_size")]:
        with pytest.raises(DataError) as error:
            pack(source, url, **{**OPTIONS, **change})
        one_line(error, url, "another pack", named)
    assert stored(url) == before
    Store(url).write("source.stamp", b"other\n")
    with pytest.raises(DataError) as error:
        pack(source, url, **OPTIONS)
    one_line(error, url, "modified after this pack was started")


@pytest.mark.parametrize("name", ["notes.txt", "train/0.tar"])
def test_other_objects_are_refused(name: str, source: Path, url: str) -> None:
    Store(url).write(name, b"precious")
    with pytest.raises(DataError) as error:
        pack(source, url, **OPTIONS)
    one_line(error, f"{url}: is not empty", name.partition("/")[0])
    assert stored(url) == {name: b"precious"}


def test_the_object_of_an_empty_folder_is_accepted(source: Path, s3: S3) -> None:
    """Web consoles create an empty object "folder/" for a folder."""
    bucket = s3.bucket()
    name = bucket.removeprefix("s3://")
    boto3.client("s3", endpoint_url=s3.url).put_object(Bucket=name, Key="set/", Body=b"")
    assert pack(source, f"{bucket}/set", **OPTIONS).complete
    assert verify(f"{bucket}/set").ok


def test_a_url_that_can_only_be_read_is_refused(source: Path, s3: S3) -> None:
    with pytest.raises(DataError) as error:
        pack(source, f"{s3.url}/bucket/set", **OPTIONS)
    one_line(error, s3.url, "can only be read")


@pytest.mark.parametrize("path", [Path("s3://bucket/set"), "s3:/bucket/set"])
def test_a_url_with_one_slash_is_no_folder(
    path: str | Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as error:
        pack(source, path, **OPTIONS)
    one_line(error, "s3:/bucket/set", "s3://")
    assert not list(tmp_path.iterdir())


def test_unusable_images_are_listed_in_the_store(source: Path, local: Path, url: str) -> None:
    with pytest.raises(DataError) as error:
        pack(source, url, **{**OPTIONS, "max_bad": 0})
    one_line(error, "1 of 81 images", f"{url}/bad.txt")
    objects = stored(url)
    assert objects["bad.txt"] == (local / "bad.txt").read_bytes()
    assert "manifest.json" not in objects
    assert pack(source, url, **OPTIONS).complete
    assert stored(url) == tree(local)


def test_python_objects(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are spooled into the folder for temporary files, which is empty afterwards."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    images = [(np.full((8, 8, 3), i, np.uint8), i % 2) for i in range(40)]
    pack(iter(images), url)
    pack(iter(images), tmp_path / "set")
    assert stored(url) == tree(tmp_path / "set")
    assert not list((tmp_path / "temporary").iterdir())


def test_a_store_that_refuses_every_third_request(
    source: Path, local: Path, url: str, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outages, "FIRST_WAIT_SECONDS", 0.01)
    count = itertools.count()
    s3.refuses = lambda method, path: 503 if next(count) % 3 == 1 else 0
    assert pack(source, url, **OPTIONS).complete
    assert verify(url).ok
    s3.refuses = lambda method, path: 0
    assert stored(url) == tree(local)


def test_a_large_shard_is_uploaded_in_parts(
    url: str, tmp_path: Path, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part that is refused is repeated, not the shard."""
    images = np.random.default_rng(0).integers(0, 256, (180, 128, 128, 3), np.uint8)
    count = itertools.count()
    s3.requests.clear()
    s3.refuses = lambda method, path: 503 if method == "PUT" and next(count) % 3 == 1 else 0
    options: dict[str, Any] = {"test_fraction": 0, "shard_size": 180}
    pack(images, url, **options)
    puts = [path for method, path in s3.requests if method == "PUT" and path.endswith(".tar")]
    assert len(puts) <= 4  # of 8.9 MB: two parts
    pack(images, tmp_path / "set", **options)
    s3.refuses = lambda method, path: 0
    assert stored(url) == tree(tmp_path / "set")


def test_a_slow_upload_is_not_taken_for_silence(
    source: Path, url: str, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sending counts as time without an answer, so that uploads have a limit of their own."""
    monkeypatch.setattr(object_store, "TIMEOUT_SECONDS", 1)
    slow = "/train-000000.tar"

    def refuses(method: str, path: str) -> int:
        if method == "PUT" and path.endswith(slow):
            time.sleep(1.5)
        return 0

    s3.refuses = refuses
    s3.requests.clear()
    assert pack(source, url, **OPTIONS).complete
    assert len([path for _, path in s3.requests if path.endswith(slow)]) == 1


def test_a_bucket_that_does_not_exist(source: Path, s3: S3) -> None:
    with pytest.raises(DataError) as error:
        pack(source, "s3://no-such-bucket/set", **OPTIONS)
    one_line(error, "s3://no-such-bucket/set", "404")


@pytest.mark.parametrize("status", [409, 412])
def test_a_refused_write_is_an_error(status: int, url: str, s3: S3) -> None:
    s3.refuses = lambda method, path: status if method == "PUT" else 0
    with Store(url) as store, pytest.raises(DataError, match=f"status {status}"):
        store.write("a", b"1")


def test_an_upload_that_fails_for_good(
    source: Path, local: Path, url: str, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line names the object; there is no half one, and the same command resumes."""
    real = Store.__init__

    def impatient(self: Store, base: str, **options: Any) -> None:
        real(self, base, **options | {"patience_seconds": 0.5})

    monkeypatch.setattr(Store, "__init__", impatient)
    monkeypatch.setattr(object_store, "PART_RETRIES", 0)
    for status, advice in [(503, "run the same command again"), (403, "credentials")]:
        s3.refuses = lambda method, path, status=status: (
            status if method == "PUT" and path.endswith("train-000002.tar") else 0
        )
        with pytest.raises(DataError) as error:
            pack(source, url, **OPTIONS)
        one_line(error, f"{url}/train-000002.tar: ", str(status), advice)
        assert "cannot be read" not in str(error.value)
    s3.refuses = lambda method, path: 0
    objects = stored(url)
    assert {name for name in objects if name.endswith(".tar")} == {
        "train-000000.tar",
        "train-000001.tar",
    }
    names = written(monkeypatch)
    assert pack(source, url, **OPTIONS).complete
    assert "train-000001.tar" not in names
    assert stored(url) == tree(local)


def test_a_store_without_conditional_writes(source: Path, local: Path, url: str, s3: S3) -> None:
    s3.refuses = lambda method, path: 501 if method == "CREATE" else 0
    s3.requests.clear()
    assert pack(source, url, **OPTIONS).complete
    assert sum(method == "CREATE" for method, _ in s3.requests) == 2  # plan.json, source.stamp
    assert stored(url) == tree(local)


@pytest.mark.parametrize("command", ["pack", "verify"])
@pytest.mark.parametrize(
    "url", ["az://container/set?sig=SECRET", "https://user:SECRET@127.0.0.1:9/set?sig=SECRET"]
)
def test_secrets_are_not_printed(
    command: str,
    url: str,
    source: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outages.Patience, "repeat", lambda self, what, attempt: attempt())
    given = ["pack", str(source)] if command == "pack" else ["verify"]
    options = ["--resolution", "16", "--max-bad", "1"] if command == "pack" else []
    with contextlib.suppress(outages.TransientError):
        assert main([*given, url, *options]) == 2
    out = capfd.readouterr()
    assert "SECRET" not in out.out + out.err


# --- verifying ----------------------------------------------------------------------------------


@pytest.fixture
def copied(local: Path, url: str) -> Store:
    """A copy of the local set in a store, to damage."""
    store = Store(url)
    for name, data in tree(local).items():
        store.write(name, data)
    return store


def changed(data: bytes) -> bytes:
    return data[:1500] + bytes([data[1500] ^ 1]) + data[1501:]


def test_a_clean_set_is_ok(copied: Store, url: str, local: Path) -> None:
    steps: list[tuple[int, int]] = []
    report = verify(url, progress=lambda *step: steps.append(step))
    total = sum(file.stat().st_size for file in local.glob("*.tar"))
    assert report.as_text() == verify(local).as_text().replace(str(local), url)
    assert steps[-1] == (total, total)


DAMAGES = ["byte", "cut", "missing", "unlisted", "record", "column", "stray", "manifest"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_report_is_that_of_a_local_set(
    damage: str, copied: Store, url: str, local: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "set"
    files = tree(local)
    shard, record, column = "train-000001.tar", "index/train-000001.json", "index/train.label.npy"
    if damage == "byte":
        files[shard] = changed(files[shard])
    elif damage == "cut":
        files[shard] = files[shard][:-700]
    elif damage == "missing":
        del files[shard]
        copied.delete(shard)
    elif damage == "unlisted":
        files["train-000099.tar"] = files[shard]
    elif damage == "record":
        files[record] = files[record].replace(b'"nsamples"', b'"nsample"')
    elif damage == "column":
        files[column] = files[column][:-4]
    elif damage == "stray":
        files["index/notes.txt"] = b"x"
    else:
        files["manifest.json"] = files["manifest.json"].replace(b"class1", b"class2")
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
        copied.write(name, data)
    found, expected = verify(url), verify(folder)
    assert not expected.ok
    assert found.problems == expected.problems
    assert found.num_images == expected.num_images
    assert "upload" in found.advice


def test_a_damaged_transfer_is_repeated(
    copied: Store, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, reads = Store.read, itertools.count()

    def read(self: Store, name: str, **options: Any) -> bytes:
        data = real(self, name, **options)
        damaged = name.endswith("train-000001.tar") and next(reads) == 0
        return changed(data) if damaged else data

    monkeypatch.setattr(Store, "read", read)
    assert verify(url).ok
    assert next(reads) == 2


def test_the_command_reports_a_damaged_byte(
    copied: Store, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    copied.write("train-000001.tar", changed(copied.read("train-000001.tar")))
    assert main(["verify", url, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["folder"] == url
    assert report["problems"][0]["where"] == "train-000001.tar"


def test_deep_draws_the_contact_sheet_of_a_local_set(copied: Store, url: str, local: Path) -> None:
    found, expected = verify(url, deep=True), verify(local, deep=True)
    assert found.notes == expected.notes
    assert found.contact_sheet == f"{url}/contact_sheet.png"
    sheet = local / "contact_sheet.png"
    assert copied.read("contact_sheet.png") == sheet.read_bytes()
    sheet.unlink()


@pytest.mark.full
@pytest.mark.parametrize("command", ["pack", "verify"])
def test_ctrl_c_while_the_store_is_silent(
    command: str, source: Path, copied: Store, url: str, s3: S3
) -> None:
    silent, over = threading.Event(), threading.Event()

    def refuses(method: str, path: str) -> int:
        if path.endswith(".tar") and method in ("GET", "PUT"):
            silent.set()
            over.wait(100)
        return 0

    s3.refuses = refuses
    run = "import sys; from bigan.cli.main import main; sys.exit(main(sys.argv[1:]))"
    given = ["pack", source, f"{url}2", "--resolution", "16", "--max-bad", "1"]
    process = python(run, *(given if command == "pack" else ["verify", url]))
    try:
        assert silent.wait(60)
        time.sleep(1)  # until all threads wait
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=15)
        assert process.returncode == 130, err
        assert "bigan: interrupted" in err.splitlines()
    finally:
        over.set()
        process.kill()


def test_a_pyramid(source: Path, url: str) -> None:
    pack(source, url, pyramid=8, **OPTIONS)
    assert verify(url).ok
    store = Store(url)
    store.write("r0008/train-000001.tar", changed(store.read("r0008/train-000001.tar")))
    store.write("r0032/x", b"")
    places = {problem.where.partition(":")[0] for problem in verify(url).problems}
    assert places == {"r0008/train-000001.tar", "r0032"}


def test_a_set_behind_a_web_server(local: Path, tmp_path: Path) -> None:
    """It cannot be listed or written; everything else is checked."""
    with serving(local) as web:
        report = verify(web.url, deep=True)
        assert report.ok, report.as_text()
        assert {"unlisted", "sheet"} <= {note.kind for note in report.notes}
        assert report.contact_sheet is None
        with pytest.raises(DataError) as error:
            verify(f"{web.url}/nowhere")
        one_line(error, f"{web.url}/nowhere", "not a data set")


@pytest.mark.parametrize("name", ["", "plan.json"])
def test_no_data_set(name: str, url: str) -> None:
    if name:
        Store(url).write(name, b"{}")
    with pytest.raises(DataError) as error:
        verify(url)
    one_line(error, url, "incomplete pack" if name else "not a data set")
