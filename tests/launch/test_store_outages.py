"""Training from a real S3 server through outages, cut transfers and damage, on two processes."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from commands import ROOT, SMOKE, launch
from faulty_proxy import Proxy, faulty
from s3 import s3_server

from bigan.data.stores.store import Store

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]
TOTAL = 800


def settings(run: Path, *more: str) -> list[str]:
    return [
        f"run_dir={run}", f"train.total_images={TOTAL}", f"train.snapshot_images={TOTAL}",
        "train.checkpoint_images=400", "data.block=800", "data.lanes=40", *more,
    ]  # fmt: skip


def trained(run: Path, *more: str) -> tuple[bytes, str]:
    """(final weights, output) of a run on two processes."""
    options = ["--config_file", ROOT / "launch" / "cpu.yaml"]
    done = launch(SMOKE, *settings(run, *more), options=options, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    snapshot = run / "snapshots" / str(TOTAL) / "generator_ema.safetensors"
    return snapshot.read_bytes(), done.stderr


@pytest.mark.parametrize(
    ("seconds", "every"), [(5, 3), pytest.param(60, 2, marks=pytest.mark.slow)]
)
def test_a_run_survives_its_store(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, every: int
) -> None:
    """Some requests get 503, every tenth transfer is cut, one is corrupted, one outage."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    undisturbed, _ = trained(tmp_path / "local", f"data.path={digits}")
    transfers = itertools.count(1)

    def fault(number: int, path: str) -> str:
        if number == 40:
            proxy.down(seconds)
        if number % every == 0:
            return "503"
        transfer = next(transfers)
        return "corrupt" if transfer == 15 else "cut" if transfer % 10 == 0 else ""

    with s3_server() as s3, faulty(s3.url, fault) as proxy:
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)
        url = f"{s3.bucket('sets')}/digits"
        with Store(url) as store:
            for file in digits.rglob("*"):
                if file.is_file():
                    store.write(file.relative_to(digits).as_posix(), file.read_bytes())
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        lost_after = "train.lost_after_seconds=20"
        disturbed, output = trained(tmp_path / "s3", f"data.path={url}", lost_after)
        check_faults(proxy)
    assert disturbed == undisturbed
    assert "Traceback" not in output
    assert "is slow" not in output
    if seconds > 30:
        assert f"{url}: unavailable since" in output


def check_faults(proxy: Proxy) -> None:
    """Every kind of fault has happened."""
    assert proxy.num_outages == 1
    assert proxy.injected["503"] > 20
    assert proxy.injected["cut"] >= 3
    assert proxy.injected["corrupt"] == 1
