"""What may change between two attempts of a run, and the line that refuses the rest."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from commands import SMOKE

from bigan import config as configs
from bigan.cli.main import main
from bigan.config import ConfigError
from bigan.run import folder
from bigan.run.trainer import train
from bigan.run_config import RunConfig, load_config

MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def begun(make_config: MakeConfig) -> RunConfig:
    """The config of a run whose folder exists."""
    config = make_config()
    folder.prepare(config)
    return config


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("optimizer.generator.name=rmsprop", "optimizer.generator.name"),
        ("optimizer.generator={name: sgd, lr: 2.0e-4}", "optimizer.generator.name"),
        ("optimizer.discriminator.lr=1.0e-3", "optimizer.discriminator.lr"),
        ("objective.loss=wasserstein", "objective.loss"),
        ("data.split=test", "data.split"),
        ("data={a: {path: x}, images: {path: x}}", "data.a"),
    ],
)
def test_another_experiment_is_refused_in_one_line(
    begun: RunConfig,
    make_config: MakeConfig,
    capsys: pytest.CaptureFixture[str],
    override: str,
    key: str,
) -> None:
    stored = (begun.run_dir / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=re.escape(f"this run has {key} = ")):
        folder.check(make_config(override))
    if not override.startswith("data"):  # whose files are checked first
        where = [f"data.path={begun.streams['images'].path}", f"run_dir={begun.run_dir}"]
        assert main(["train", str(SMOKE), *where, override]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert f"{key} = " in line
    assert (begun.run_dir / "config.yaml").read_text() == stored


def test_the_setting_that_resumes_can_be_pasted(begun: RunConfig, make_config: MakeConfig) -> None:
    """Also where it is null, a list or a number."""
    changes = ["anneal_images=80", "objective.penalties=[{name: r1}]", "train.seed=3"]
    for override in changes:
        with pytest.raises(ConfigError) as refused:
            folder.check(make_config(override))
        advice = re.findall(r", or (\S+=.*) to resume$", str(refused.value))
        assert folder.check(make_config(override, *advice)).changes == (), advice


def test_execution_and_length_may_change(make_config: MakeConfig) -> None:
    """Of one stream and of each of several."""
    assert train(make_config("train.total_images=200"), print, lambda *_: None) == 0
    changes = ["train.total_images=400", "train.micro_batch=20", "compile=aot_eager"]
    assert folder.check(make_config(*changes, "data.threads=2", "data.on_bad=skip")).resumes
    config = make_config()
    data = config.streams["images"].model_dump(mode="json")
    two = _changed(config, f"data={{images: {data}, others: {data}}}".replace("None", "null"))
    folder.prepare(two)
    assert folder.check(_changed(two, "data.others.threads=2")).resumes
    with pytest.raises(ConfigError, match=r"data\.others\.mirror = False, not True"):
        folder.check(_changed(two, "data.others.mirror=true"))


def _changed(config: RunConfig, override: str) -> RunConfig:
    """The config with one override."""
    file = config.run_dir.parent / "changed.yaml"
    file.write_text(configs.dump(config))
    return load_config(file, [override])
