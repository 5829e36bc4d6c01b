"""Errors of configs: one line with the file, the key, the value and what to use instead."""

from pathlib import Path

import pytest

from bigan import config as configs
from bigan.config import ConfigError
from bigan.run_config import RunConfig, accumulation_steps

ROOT = Path(__file__).parents[1]
SMOKE = ROOT / "configs" / "smoke" / "digits.yaml"


def load(*overrides: str) -> RunConfig:
    return configs.load(RunConfig, SMOKE, overrides)


def message(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_overrides_change_nested_values() -> None:
    config = load("train.seed=7", "optimizer.generator.lr=1e-3", "compile=false")
    assert (config.train.seed, config.optimizer["generator"].lr, config.compile) == (
        7,
        1e-3,
        "eager",
    )


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.total_image=5", ["train.total_image", "5", "did you mean 'train.total_images'"]),
        ("trian.seed=5", ["trian", "did you mean 'train'"]),
        ("model.chanels=5", ["model.chanels", "'model.channels'"]),
        (
            "optimizer.generator={name: sgd, lr: 0.1, beta1: 0.5}",
            ["optimizer.generator.name = sgd: has no setting beta1"],
        ),
        ("objective.name=vae", ["objective.name = vae: has no setting loss"]),
        ("optimizer.generator.Lr=5", ["optimizer.generator.Lr", "'optimizer.generator.lr'"]),
        ("optimizer.generator.momentum=0.5", ["optimizer.generator.momentum = 0.5"]),
        ("train.seed=one", ["train.seed = 'one'", "valid integer"]),
        ("train.seed='1'", ["train.seed = '1'", "valid integer"]),
        ("train.seed=1.5", ["train.seed = 1.5"]),
        ("train.batch=0", ["train.batch = 0", "greater than 0"]),
        ("objective.loss=hing", ["objective.loss = 'hing'", "did you mean 'hinge'"]),
        ("engine=dpp", ["engine = 'dpp'", "did you mean 'ddp'"]),
        ("model.name=bigan", ["model.name = 'bigan'", "'biggan'"]),
        ("model.z_dim=50", ["model", "z_dim = 50", "use z_dim="]),
        ("train=3", ["train = 3"]),
        (
            "objective.penalties=[{name: r3, weight: 1}]",
            ["objective.penalties.0.name = 'r3'", "r1"],
        ),
        ("data={images: {path: x, blok: 3}}", ["data.images.blok = 3", "'data.images.block'"]),
        ("objective.penalties.0.weight=2", ["whole list, objective.penalties=["]),
        ("objective.name=gna", ["objective.name = 'gna'", "did you mean 'gan'"]),
        ("optimizer.generator.name=adamm", ["optimizer.generator.name = 'adamm'", "'adam'"]),
    ],
)
def test_wrong_override_names_key_value_and_fix(override: str, parts: list[str]) -> None:
    text = message(override)
    assert text.startswith("command line")
    for part in parts:
        assert part in text


def test_wrong_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(SMOKE.read_text().replace("  batch: 40", "  bach: 40"))
    with pytest.raises(ConfigError) as caught:
        configs.load(RunConfig, path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "train.bach = 40" in str(caught.value)
    assert "did you mean 'train.batch'" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: [1,", "not valid YAML"),
        ("a: 1\na: 2", "given twice"),
        ("- 1", "expected a mapping"),
        ("a: !!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_broken_yaml(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=part):
        configs.load(RunConfig, path)


def test_missing_file_suggests_a_neighbour() -> None:
    with pytest.raises(ConfigError, match=r"did you mean .*digits\.yaml"):
        configs.load(RunConfig, SMOKE.with_name("digit.yaml"))


def test_missing_key(tmp_path: Path) -> None:
    path = tmp_path / "short.yaml"
    path.write_text("run_dir: x")
    with pytest.raises(ConfigError, match="required and missing"):
        configs.load(RunConfig, path)


def test_exponent_without_dot_is_a_number() -> None:
    assert load("optimizer.discriminator.lr=2e-4").optimizer["discriminator"].lr == 2e-4


def test_dump_round_trip(tmp_path: Path) -> None:
    config = load("objective.penalties=[{name: r1, weight: 1.0}]")
    (tmp_path / "c.yaml").write_text(configs.dump(config))
    assert configs.load(RunConfig, tmp_path / "c.yaml") == config


def test_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load().train.seed = 3  # type: ignore[misc]


def test_differences() -> None:
    old, new = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 5}, "e": 4}
    found = configs.differences(old, new)
    assert found == [("a.c", 2, 5), ("d", 3, None), ("e", None, 4)]


def test_accumulation() -> None:
    train = load("train.batch=40", "train.micro_batch=5").train
    assert accumulation_steps(train, 1) == 8
    assert accumulation_steps(train, 4) == 2
    assert accumulation_steps(load("train.batch=40").train, 4) == 1
    with pytest.raises(ConfigError, match=r"train\.batch = 40 cannot be divided"):
        accumulation_steps(train, 3)
    with pytest.raises(ConfigError, match=r"try train\.micro_batch=5"):
        accumulation_steps(load("train.micro_batch=6").train, 2)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e6", 1_000_000),
        ("5e4", 50_000),
        ("2.5e5", 250_000),
        ("1E+3", 1_000),
        ("1_000_000", 1_000_000),
        ("'2.5e5'", 250_000),
        ("10.0", 10),
        ("1.5e0", None),
        ("1.5", None),
        ("1e-3", None),
        ("1e400", None),
        (".nan", None),
        ("1M", None),
        ("true", None),
        ("1,000", None),
    ],
)
def test_integers_in_other_notations(tmp_path: Path, text: str, value: int | None) -> None:
    """On the command line and in a file; a number that is not integral is named."""
    file = tmp_path / "config.yaml"
    file.write_text(SMOKE.read_text().replace("total_images: 400", f"total_images: {text}"))
    for path, overrides in ((SMOKE, [f"train.total_images={text}"]), (file, [])):
        if value is None:
            with pytest.raises(ConfigError, match=r"train\.total_images = .*integer"):
                configs.load(RunConfig, path, overrides)
        else:
            found = configs.load(RunConfig, path, overrides).train.total_images
            assert (found, type(found)) == (value, int)


def test_integers_below_lists_mappings_and_unions() -> None:
    config = load(
        "data={images: {path: data/digits, block: 1e3}}",
        "model.attention_resolutions=[8e0]",
        "objective.penalties=[{name: r1, every: 4e0, weight: 2e0}]",
        "optimizer.generator.schedule={name: step, every_images: 1e3, factor: 0.5}",
        "ema.halflife_images=1e3",
    )
    assert config.streams["images"].block == 1000
    assert config.model.model_dump()["attention_resolutions"] == (8,)
    assert config.objective.model_dump()["penalties"][0]["every"] == 4
    assert config.optimizer["generator"].schedule.model_dump()["every_images"] == 1000
    assert type(config.ema.halflife_images) is float
