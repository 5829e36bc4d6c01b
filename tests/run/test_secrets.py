"""Credentials in the address of the data do not reach a file, a message or MLflow."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from commands import SMOKE
from web import Web, serving

from bigan.cli.main import main

USER, PASSWORD, SIGNATURE = "anna", "pa55word", "s1gnature"
SECRETS = (PASSWORD, SIGNATURE, f"{USER}:", "YW5uYTpwYTU1d29yZA")  # and user:password in base64


def address(web: Web) -> str:
    return web.url.replace("//", f"//{USER}:{PASSWORD}@") + f"?sig={SIGNATURE}"


def leaks(folder: Path, output: str) -> list[str]:
    contents = {str(f): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    contents |= {name: name.encode() for name in contents} | {"output": output.encode()}
    return [
        f"{secret} in {name}"
        for name, content in contents.items()
        for secret in SECRETS
        if secret.encode() in content
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ["{}"],
        ["describe", "{}"],
        ["train", "{}"],
        ["evaluate", "{}"],
        ["verify", "{}", "{}"],
        ["pack", "{}", "set", "--resolution", "8"],
        ["pack", "digits", "{}"],
        ["pack", "digits", "{}", "--debug"],
        ["describe", str(SMOKE), "data.path={}", "data.pth={}", "--debug"],
        ["verify", "{}", "--debug"],
        ["submit", str(SMOKE), "data.path={}", "--debug"],
    ],
)
def test_messages_of_commands(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The port is not valid, so nothing is sent.
    url = f"http://{USER}:{PASSWORD}@127.0.0.1:99999/set?sig={SIGNATURE}"
    with pytest.raises(SystemExit, match="2"):  # of argparse, for unknown arguments
        sys.exit(main([argument.replace("{}", url) for argument in arguments]))
    output = "".join(capsys.readouterr())
    assert output
    assert not leaks(tmp_path, output)


@pytest.mark.full
def test_a_run_from_an_address_with_credentials(
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)  # MLflow stores artifacts in the working folder
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    run_dir = tmp_path / "runs" / "a"
    settings = [f"run_dir={run_dir}", "evaluation.num_samples=100", "tracking.mlflow=true"]
    output = ""

    def start(address: str, images: int, *more: str) -> int:
        nonlocal output
        length = f"train.total_images={images}"
        paths = [str(SMOKE), f"data.path={address}", length]
        status = main(["train", *paths, *settings, *more])
        output += "".join(capsys.readouterr())
        return status

    with serving(digits) as web:
        web.user, web.query = f"{USER}:{PASSWORD}", f"sig={SIGNATURE}"
        assert start(address(web), 40) == 0
        web.query = "sig=renewed"
        renewed = address(web).replace(SIGNATURE, "renewed")
        cached = f"data.cache={tmp_path / 'shards'}"
        # A renewed signature is no change of a setting; a change keeps the credentials.
        assert start(renewed, 80, cached, "--allow-change", "ema.halflife_images=77") == 0
        assert start(renewed, 120, cached) == 0
        assert main(["evaluate", str(run_dir)]) == 2
        error = capsys.readouterr().err
        assert "data.path=" in error
        assert "***" in error
        assert main(["evaluate", str(run_dir), f"data.path={renewed}"]) == 0
        assert start(address(web), 160) == 2  # with the expired signature
    output += "".join(capsys.readouterr())
    assert not leaks(tmp_path, output)
    assert "sig=***" in (run_dir / "config.yaml").read_text()
    assert b"data.path" in (tmp_path / "mlflow.db").read_bytes()
    assert any((tmp_path / "shards").iterdir())
