"""Settings of the model that are left out are those of the data."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from commands import SMOKE

from bigan import config as configs
from bigan.config import ConfigError
from bigan.data.packing.pack import pack
from bigan.errors import UserError
from bigan.run.describe import describe
from bigan.run.streams import check_data
from bigan.run_config import load_config

KEYS = ("resolution", "image_channels", "num_classes")


@pytest.fixture
def open_config(tmp_path: Path) -> Path:
    """The smoke config without the settings of the model that the data has."""
    content = yaml.safe_load(SMOKE.read_text())
    for key in KEYS:
        del content["model"][key]
    file = tmp_path / "open.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def test_they_are_read_from_the_manifest(open_config: Path, digits: Path) -> None:
    config = load_config(open_config, [f"data.path={digits}"])
    assert [getattr(config.model, key) for key in KEYS] == [16, 1, 10]
    expected = load_config(SMOKE, [f"data.path={digits}"])
    assert config == expected
    stored = yaml.safe_load(configs.dump(config))["model"]
    assert {key: stored[key] for key in KEYS} == {
        "resolution": 16, "image_channels": 1, "num_classes": 10,
    }  # fmt: skip


def test_of_a_pyramid_the_largest_level_counts(open_config: Path, tmp_path: Path) -> None:
    pack("digits", tmp_path / "pyramid", resolution=32, pyramid=8)
    data = f"data.path={tmp_path / 'pyramid'}"
    assert load_config(open_config, [data]).model.resolution == 32
    chosen = load_config(open_config, [data, "model.resolution=16"])
    assert [getattr(chosen.model, key) for key in KEYS] == [16, 1, 10]


def test_of_several_streams_the_one_named_images_counts(
    open_config: Path, digits: Path, tmp_path: Path
) -> None:
    pack("digits", tmp_path / "large", resolution=32)
    streams = f"data={{others: {{path: {tmp_path / 'large'}}}, images: {{path: {digits}}}}}"
    assert load_config(open_config, [streams]).model.resolution == 16


def test_values_that_are_given_stay_and_are_checked_against_the_data(
    open_config: Path, digits: Path
) -> None:
    for key, value in (("resolution", 32), ("image_channels", 3), ("num_classes", 11)):
        config = load_config(open_config, [f"data.path={digits}", f"model.{key}={value}"])
        assert getattr(config.model, key) == value
        with pytest.raises(UserError, match=rf"model\.{key} = {value}"):
            check_data(config)


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ([], "resolution and model.num_classes"),
        (["model.resolution=16"], "num_classes"),
        (["model.num_classes=10", "model.image_channels=1"], "resolution"),
    ],
)
def test_without_data_the_error_names_the_key(
    open_config: Path, tmp_path: Path, given: list[str], key: str
) -> None:
    with pytest.raises(ConfigError, match=rf": model\.{key} not set.*nowhere") as refused:
        load_config(open_config, [f"data.path={tmp_path / 'nowhere'}", *given])
    assert "\n" not in str(refused.value)


def test_a_config_that_sets_them_needs_no_data(tmp_path: Path) -> None:
    config = load_config(SMOKE, [f"data.path={tmp_path / 'nowhere'}"])
    assert describe(config)["parameters"] == {"generator": 60_769, "discriminator": 48_033}


def test_a_wrong_data_section_is_named(open_config: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.thread = 2: unknown key"):
        load_config(open_config, ["data.thread=2"])
