"""Files at a URL: object stores, web servers, URLs, outages, and permanent failures."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import http.server
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import SMOKE
from s3 import S3, s3_server
from web import Web, served, serving

from bigan.config import ConfigError
from bigan.data import DataError
from bigan.data.stores import answers, outages, transports, urls
from bigan.data.stores.store import Store
from bigan.data.stores.urls import join
from bigan.run_config import load_config
from bigan.urls import is_redacted, redacted, redacted_text

CONTENT = bytes(range(256)) * 4_000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
SIZE = len(CONTENT)
CLOUD = ("AWS_", "GOOGLE_", "AZURE_", "HF_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture(autouse=True)
def no_clouds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No credentials of the user, no metadata service, short waits."""
    for name in list(os.environ):
        if name.upper().startswith(CLOUD):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(outages, "FIRST_WAIT_SECONDS", 0.05)


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with s3_server() as running:
        yield running


@pytest.fixture
def bucket(server: S3, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return server.bucket()


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    (tmp_path / "set" / "bucket").mkdir(parents=True)
    for name in ("a.tar", "bucket/a.tar"):
        (tmp_path / "set" / name).write_bytes(CONTENT)
    with serving(tmp_path / "set") as running:
        yield running


@pytest.fixture(params=["http", "s3"])
def base(web: Web, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """URLs of the files of `web`: as a web server, and as an endpoint of S3."""
    if request.param == "http":
        return web.url
    for name, value in S3(web.url).environment.items():
        monkeypatch.setenv(name, value)
    return "s3://bucket"


def read(store: Store, name: str = "a.tar") -> bytes:
    return store.read(name, size=SIZE, sha256=SHA256)


# --- object stores


@pytest.mark.parametrize("folder", ["set", "", "a b/ü#%20+"])
def test_a_bucket_is_written_listed_and_read(bucket: str, folder: str) -> None:
    with Store(f"{bucket}/{folder}") as store:
        store.write("a b%.tar", CONTENT)
        assert read(store, "a b%.tar") == CONTENT
        assert store.create("part", b"1")
        assert not store.create("part", b"2")
        assert store.read("part") == b"1"
        assert sorted(store.names()) == [("a b%.tar", SIZE), ("part", 1)]
        assert list(store.names("pa")) == [("part", 1)]
        assert (store.size("part"), store.size("none")) == (1, None)
        assert store.has_ranges
        found = store.read_ranges("a b%.tar", [(300, 900), (5, 5), (0, 3)])
        assert found == [CONTENT[300:900], b"", CONTENT[:3]]
        with store.open("a b%.tar") as stream:
            assert stream.read(10) + stream.read() == CONTENT


def test_what_a_bucket_lacks_ends_at_once(bucket: str) -> None:
    with Store(f"{bucket}/set") as store, Store("s3://no-such-bucket/set") as other:
        store.write("a", b"123")
        for call in (
            lambda: store.read("none"),
            lambda: store.read_ranges("a", [(1, 9)]),
            lambda: store.read_ranges("a", [(7, 9)]),
            lambda: other.read("none"),
        ):
            with pytest.raises(DataError) as got:
                call()
            assert "\n" not in str(got.value)


def test_a_profile_has_the_keys(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store(bucket) as store:
        store.write("a", b"1")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    folder = Path.home() / ".aws"
    folder.mkdir(parents=True)
    keys = "aws_access_key_id = k%\naws_secret_access_key = s%\n"
    (folder / "credentials").write_text(f"[mine]\n{keys}")
    (folder / "config").write_text("[profile mine]\nregion = us-east-1\n")
    monkeypatch.setenv("AWS_PROFILE", "mine")
    with Store(bucket) as store:
        assert store.read("a") == b"1"


@pytest.mark.parametrize("base", ["s3://bucket/set", "gs://bucket/set", "az://container/set"])
def test_without_credentials_the_error_comes_at_once(base: str) -> None:
    began = time.monotonic()
    with pytest.raises(DataError, match="no credentials") as got:
        Store(base).read("a")
    assert time.monotonic() - began < 5
    assert "\n" not in str(got.value)


@pytest.mark.parametrize(
    ("base", "sent"),
    [
        ("az://c/a b/ü%20?sv=1&sig=a%2Fb", "/c/a%20b/%C3%BC%2520/m?sv=1&sig=a%2Fb"),
        ("abfss://c@acc.dfs.core.windows.net/x?sig=q", "/c/x/m?sig=q"),
        ("gs://bucket/a b/?", "/bucket/a%20b%2F%3F%2Fm"),
        ("s3://bucket/a?b", "/bucket/a%3Fb/m"),
    ],
)
def test_addresses_in_object_stores(base: str, sent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with recording({}) as (url, seen):
        for name, value in S3(url).environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", url)
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "acc")
        monkeypatch.setenv("GOOGLE_BASE_URL", url)
        monkeypatch.setenv("GOOGLE_SKIP_SIGNATURE", "true")
        with Store(base) as store:
            assert store.read("m") == b"ok"
    assert seen[0].path == sent


def test_the_requester_pays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with recording({}) as (url, seen):
        for name, value in S3(url).environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_REQUEST_PAYER", "requester")
        Store("s3://bucket").read("a")
    assert seen[0].headers["x-amz-request-payer"] == "requester"


# --- URLs


@pytest.mark.parametrize(
    ("base", "name", "sent"),
    [
        ("set", "a b.tar", "/set/a%20b.tar"),
        ("se%20t/ü", "a.tar", "/se%20t/%C3%BC/a.tar"),
        ("se t/100%", "a%20.tar", "/se%20t/100%25/a%2520.tar"),
        ("a+b", "c+d#?.tar", "/a+b/c+d%23%3F.tar"),
        ("a#b/", "x", "/a%23b/x"),
        ("set?sig=a%2Fb+c&x=1", "a.tar", "/set/a.tar?sig=a%2Fb+c&x=1"),
        ("set/?sig=a b", "a.tar", "/set/a.tar?sig=a%20b"),
    ],
)
def test_addresses_as_they_are_sent(base: str, name: str, sent: str) -> None:
    with recording({}) as (url, seen), Store(f"{url}/{base}") as store:
        store.read(name)
    assert seen[0].path == sent


def test_a_password_is_sent_and_follows_no_redirect(web: Web) -> None:
    web.user = "us er:p@ss/ü"
    base = web.url.replace("//", "//us%20er:p%40ss%2F%C3%BC@")
    with Store(base) as store, Store(f"{base}/moved") as moved:
        assert read(store) == read(moved) == CONTENT
    with recording({}) as (elsewhere, seen):
        moved_to = {"Location": f"{elsewhere}/a"}
        with recording(moved_to, 302) as (url, first), Store(with_user(url)) as store:
            store.read("a")
        assert first[0].headers["Authorization"]
        assert seen[0].headers["Authorization"] is None


def test_hugging_face(monkeypatch: pytest.MonkeyPatch) -> None:
    with recording({}) as (url, seen):
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setenv("HF_TOKEN", "hf_x")
        with Store("hf://datasets/me/cats@v1/train") as store:
            store.read("a b.tar")
    assert seen[0].path == "/datasets/me/cats/resolve/v1/train/a%20b.tar"
    assert seen[0].headers["Authorization"] == "Bearer hf_x"


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("https://u:p@h.org:1/a/b?sig=x%20y&t=1#z", "https://***@h.org:1/a/b?sig=***&t=***"),
        ("https://u@h/a", "https://***@h/a"),
        ("https://h/a@b", "https://h/a@b"),
        ("https://h/a?token", "https://h/a?***"),
        ("s3://bucket/a", "s3://bucket/a"),
        ("az://c/a?sv=1&sig=2", "az://c/a?sv=***&sig=***"),
        ("abfss://c@acc.dfs.core.windows.net/a", "abfss://c@acc.dfs.core.windows.net/a"),
        ("pipe:curl 'https://u:p@h/a?s=1' |x", "pipe:curl 'https://***@h/a?s=***' |x"),
        ("pipe:x -u a:b -H 'Authorization: Bearer c'", "pipe:x -u *** -H 'Authorization: ***'"),
        ("pipe:AWS_SECRET_ACCESS_KEY=x aws s3", "pipe:AWS_SECRET_ACCESS_KEY=*** aws s3"),
        ("data/a@b?c=d", "data/a@b?c=d"),
        ("https://u:p?a@h/a", "https://***@h/a"),
        ("https://u:p/a@h/a?sig=1", "https://***@h/a?sig=***"),
        ("http://h:80/a@b", "http://h:80/a@b"),
        ("pipe:curl --oauth2-bearer a x", "pipe:curl --oauth2-bearer *** x"),
        ("pipe:curl -H 'Cookie: a=b; c=d' x", "pipe:curl -H 'Cookie: ***' x"),
        ("pipe:wget --password 'a b' x", "pipe:wget --password *** x"),
        ("pipe:sshpass -p a ssh h", "pipe:sshpass -p *** ssh h"),
    ],
)  # fmt: skip
def test_secrets_are_not_shown(url: str, text: str) -> None:
    assert redacted(url) == text
    assert redacted(text) == text
    assert redacted_text(f"a ({text}): b") == f"a ({text}): b"
    assert is_redacted(text) == ("***" in text)


@pytest.mark.parametrize("key", ["data.pth", "data.mode", "data", "data.block", "data.path.a"])
def test_messages_about_settings_show_no_secrets(key: str) -> None:
    with pytest.raises(ConfigError) as got:
        load_config(SMOKE, [f"{key}=https://anna:secret@host/set?sig=secret"])
    assert "secret" not in str(got.value)
    if key != "data.path.a":
        with pytest.raises(ConfigError) as got:
            load_config(SMOKE, [f"{key}=pipe:curl -u anna:secret host"])
        assert "secret" not in str(got.value)


@pytest.mark.parametrize(
    "base",
    ["http://h:99999", "http://h:x", "http://[::1", "http://..", "http://a b/c", "s3:///x",
     "http://" + "a" * 70 + ".org", "http://u:secret/x@h/a"],
)  # fmt: skip
def test_addresses_that_are_not_valid(base: str) -> None:
    with pytest.raises(DataError, match="valid") as got:
        Store(base)
    assert "secret" not in str(got.value)


@pytest.mark.parametrize("endpoint", ["127.0.0.1:1", "http://", "http://h:x", "s3://h"])
def test_endpoints_that_are_not_valid(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in S3(endpoint).environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(DataError, match="AWS_ENDPOINT_URL"):
        Store("s3://bucket")


@pytest.mark.parametrize("proxy", ["127.0.0.1:1", "http://127.0.0.1:x"])
def test_proxies_that_are_not_valid(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", proxy)
    monkeypatch.setenv("http_proxy", proxy)
    with Store("http://h.example") as store, pytest.raises(DataError, match="proxy"):
        store.read("a")


def test_redirects_to_another_scheme() -> None:
    location = {"Location": "file:///etc/passwd"}
    refused = pytest.raises(DataError, match="redirects")
    with recording(location, 302) as (url, _), Store(url) as store, refused:
        store.read("a")


def test_hosts_outside_of_ascii() -> None:
    assert urls.encoded("https://münchen.example:80/ü") == (
        "https://xn--mnchen-3ya.example:80/%C3%BC"
    )


def test_patience_is_shorter_than_collectives() -> None:
    seconds = load_config(SMOKE).train.collective_timeout_seconds
    with pytest.raises(ConfigError, match=r"patience_seconds.*collective_timeout_seconds"):
        load_config(SMOKE, ["data.path=https://127.0.0.1/x", f"data.patience_seconds={seconds}"])
    assert load_config(SMOKE, [f"data.patience_seconds={seconds}"])  # no store


def test_names_go_before_the_query() -> None:
    assert join("https://h/a/?s=1", "b.tar") == "https://h/a/b.tar?s=1"
    assert join("pipe:cat x?", "b") == "pipe:cat x?/b"
    assert join("data/a?b", "c") == "data/a?b/c"
    for url in ("https://h/a%20b/c%C3%BC.tar?s=1", "s3://b/a?b/c", "s3://b/x%/y.tar", "pipe:cat x"):
        base, name = urls.split_name(url)
        assert not name or join(base, name) == url


# --- web servers


def test_an_object_store_that_ignores_ranges(web: Web, base: str) -> None:
    web.ranges = False
    with Store(base) as store:
        assert store.read_ranges("a.tar", [(5, 9)]) == [CONTENT[5:9]]
        assert not store.has_ranges


def test_ranges(web: Web) -> None:
    parts = [(0, 10), (500_000, 500_020), (7, 7)]
    want = [CONTENT[a:b] for a, b in parts]
    with Store(web.url) as store:
        assert store.read_ranges("a.tar", parts) == want
        assert store.has_ranges
        assert web.bytes["a.tar"] < 100
        assert store.size("a.tar") == SIZE
    web.ranges = False
    with Store(web.url) as store:
        assert store.read_ranges("a.tar", parts) == want
        assert not store.has_ranges
        assert web.requests["a.tar"] <= 3 + 3 + 3
    with Store(web.url) as store:
        read(store)
        assert not store.has_ranges


@pytest.mark.parametrize("encoding", ["gzip", "chunked"])
def test_encodings_of_a_transfer_are_undone(web: Web, encoding: str) -> None:
    (web.folder / "a.tar.gz").write_bytes(CONTENT)
    web.encoding = encoding
    with Store(web.url) as store:
        assert read(store) == CONTENT
        with store.open("a.tar") as stream:
            assert stream.read() == CONTENT
        assert store.size("a.tar") == SIZE
        if encoding == "chunked":
            assert read(store, "a.tar.gz") == CONTENT


def test_a_proxy_is_used(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    with recording({}) as (proxy, seen):
        monkeypatch.setenv("http_proxy", proxy)
        with Store("http://store.invalid/set") as store:
            store.read("a")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        with Store(web.url) as store:
            read(store)
        for name, value in S3("http://store.invalid").environment.items():
            monkeypatch.setenv(name, value)
        with Store("s3://bucket") as store:
            store.read("a")
    assert [each.path for each in seen] == [
        "http://store.invalid/set/a",
        "http://store.invalid/bucket/a",
    ]


# --- outages


FAULTS = ["503", "429", "408", "cut", "close", "corrupt"]


@pytest.mark.parametrize("fault", FAULTS)
def test_transient_failures_are_waited_for(web: Web, base: str, fault: str) -> None:
    web.fault = lambda number, name: fault if number in (1, 2) else ""
    with Store(base) as store:
        assert read(store) == CONTENT
    web.requests.clear()
    with Store(base) as store:
        parts = store.read_ranges("a.tar", [(0, 100), (100, 300)])
    if fault != "corrupt":  # the reader of ranges compares them with the index
        assert parts == [CONTENT[:100], CONTENT[100:300]]
    web.requests.clear()
    with Store(base) as store, store.open("a.tar") as stream:
        assert len(stream.read()) == SIZE


def test_half_of_all_requests_fail_and_every_tenth_is_cut(web: Web, base: str) -> None:
    web.fault = lambda number, name: "503" if number % 2 else "cut" if number % 10 == 4 else ""
    with Store(base) as store:
        parts = [(i * 1000, i * 1000 + 500) for i in range(40)]
        assert store.read_ranges("a.tar", parts) == [CONTENT[a:b] for a, b in parts]


def test_a_silent_server_is_noticed(web: Web, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("web_server", "object_store"):
        monkeypatch.setattr(f"bigan.data.stores.{module}.TIMEOUT_SECONDS", 1)
    web.fault = lambda number, name: "hang" if number == 1 else ""
    with Store(base) as store:
        assert read(store) == CONTENT


@pytest.mark.parametrize(
    ("fault", "num"), [("403", 1), ("401", 1), ("404", 1), ("410", 1), ("login", 1), ("wrong", 3)]
)
def test_what_cannot_pass_ends_at_once(web: Web, base: str, fault: str, num: int) -> None:
    if fault == "wrong":
        for file in web.folder.rglob("*.tar"):
            file.write_bytes(CONTENT[::-1])
    else:
        web.fault = lambda number, name: fault
    began = time.monotonic()
    with Store(f"{base}?sig=secret" if base == web.url else base) as store:
        for call in (lambda: read(store), lambda: store.read_ranges("a.tar", [(0, 9)])):
            if fault == "wrong" and web.requests:
                continue
            web.requests.clear()
            with pytest.raises(DataError, match=r"a\.tar") as got:
                call()
            # One more for the whole file where a store answers a range with status 200.
            assert num <= web.requests.total() <= num + (fault == "login")
            assert "\n" not in str(got.value)
            assert "secret" not in str(got.value)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("status", "code", "hint"),
    [
        (403, "RequestTimeTooSkewed", "clock"),
        (403, "QuotaExceeded", "full"),
        (507, "XMinioStorageFull", "full"),
        (301, "PermanentRedirect", "AWS_REGION"),
        (409, "BlobAlreadyExists", "409"),
        (409, "OperationAborted", ""),
        (409, "ConditionalRequestConflict", ""),
        (400, "RequestTimeout", ""),
    ],
)
def test_the_meaning_of_errors(status: int, code: str, hint: str) -> None:
    """Without a hint, the error can pass."""
    with pytest.raises(DataError if hint else outages.TransientError, match=hint or code):
        answers.refuse(status, f"<Error><Code>{code}</Code></Error>", "s3://bucket/a", 0.0)


@pytest.mark.parametrize("status", ["409", "412", "301"])
def test_statuses_that_obstore_treats_differently(web: Web, base: str, status: str) -> None:
    web.fault = lambda number, name: status
    with Store(base) as store, pytest.raises(DataError, match=f"a.tar.*status {status}") as got:
        read(store)
    assert "\n" not in str(got.value)


def test_patience_ends_with_one_line(
    web: Web, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(outages, "REPORT_SECONDS", 0.3)
    monkeypatch.setattr(outages, "POLL_SECONDS", 0.1)
    web.fault = lambda number, name: "503"
    began = time.monotonic()
    with Store(f"{web.url}?sig=secret", patience_seconds=1.5) as store:
        with pytest.raises(DataError, match=r"a\.tar.*status 503.*patience_seconds") as got:
            read(store)
        assert 1.0 < time.monotonic() - began < 10
        assert "\n" not in str(got.value)
        lines = capsys.readouterr().err.splitlines()
        assert 2 <= len(lines) <= 6
        assert all(
            "unavailable since" in line and web.url in line and "503" in line for line in lines
        )
        web.fault = lambda number, name: ""
        read(store)
    assert "available again" in capsys.readouterr().err
    assert "secret" not in "".join(lines)


def test_the_first_line_comes_early(
    web: Web, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(outages, "FIRST_REPORT_SECONDS", 0.5)
    monkeypatch.setattr(outages, "POLL_SECONDS", 0.1)
    web.fault = lambda number, name: "503"
    with Store(web.url, patience_seconds=2) as store, pytest.raises(DataError):
        read(store)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_one_process_of_a_node_reports(
    web: Web, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(outages, "REPORT_SECONDS", 0.0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    web.fault = lambda number, name: "503" if number < 3 else ""
    with Store(web.url) as store:
        read(store)
    assert not capsys.readouterr().err


def test_a_server_that_is_stopped_and_started(web: Web) -> None:
    with socket_of(web) as port:
        pass
    with Store(f"http://127.0.0.1:{port}") as store:
        other = Web(web.folder)

        def start() -> None:
            time.sleep(1.0)
            with served(other, port):
                done.wait(60)

        done = threading.Event()
        thread = threading.Thread(target=start)
        thread.start()
        try:
            assert read(store) == CONTENT
        finally:
            done.set()
            thread.join()


def test_waits_differ_and_respect_retry_after(web: Web) -> None:
    waits = [[outages.wait_seconds(n, 0.0) for n in range(20)] for _ in range(50)]
    assert all(0 <= wait <= outages.LONGEST_WAIT_SECONDS for row in waits for wait in row)
    assert len({row[-1] for row in waits}) > 40
    assert answers.retry_after("7") == 7.0
    assert answers.retry_after("Fri, 31 Dec 99999999999 23:59:59 GMT") == 0.0
    assert answers.retry_after("soon") == answers.retry_after(None) == 0.0
    assert 50 < answers.retry_after(http_date(60)) < 70
    web.retry_after, web.fault = "1", lambda number, name: "429" if number == 1 else ""
    began = time.monotonic()
    with Store(web.url) as store:
        read(store)
    assert time.monotonic() - began >= 1.0


@pytest.mark.parametrize("state", ["hang", "503"])
def test_close_ends_calls_at_once(web: Web, base: str, state: str) -> None:
    web.fault = lambda number, name: state
    store = Store(base)
    closed: list[float] = []

    def close() -> None:
        closed.append(time.monotonic())
        store.close()

    threading.Timer(0.5, close).start()
    with pytest.raises(InterruptedError):
        read(store)
    assert time.monotonic() - closed[0] < 1.0
    with pytest.raises(InterruptedError):
        store.read_ranges("a.tar", [(0, 1)])


def test_close_before_ranges_begin_prints_nothing(
    base: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(base)
    read(store)
    loop = transports.event_loop()
    loop.call_soon_threadsafe(time.sleep, 0.3)  # all that follows waits
    threading.Timer(0.1, store.close).start()
    with pytest.raises(InterruptedError):
        store.read_ranges("a.tar", [(0, 1), (5, 9)])
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0.1), loop).result()
    gc.collect()
    assert not caplog.records


def test_ranges_are_cancelled_when_one_cannot_be_read(web: Web, base: str) -> None:
    web.fault = lambda number, name: "hang" if number < 4 else "403"
    began = time.monotonic()
    with Store(base) as store, pytest.raises(DataError, match="403"):
        store.read_ranges("a.tar", [(i, i + 2) for i in range(8)])
    assert time.monotonic() - began < 10


# --- helpers


def with_user(url: str) -> str:
    return url.replace("//", "//user:secret@")


def http_date(seconds: float) -> str:
    from email.utils import formatdate

    return formatdate(time.time() + seconds, usegmt=True)


@contextlib.contextmanager
def socket_of(web: Web) -> Iterator[int]:
    """A free port."""
    with serving(web.folder) as other:
        yield int(other.url.rpartition(":")[2])


@contextlib.contextmanager
def recording(headers: dict[str, str], status: int = 200) -> Iterator[tuple[str, list]]:
    """A server with one answer that records (path, headers) of its requests."""
    seen: list[SimpleNamespace] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(SimpleNamespace(path=self.path, headers=self.headers))
            self.send_response(status)
            for name, value in {"Content-Length": "2", "ETag": "1", **headers}.items():
                self.send_header(name, value)
            self.send_header("Last-Modified", http_date(0))
            self.end_headers()
            self.wfile.write(b"ok")

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()
