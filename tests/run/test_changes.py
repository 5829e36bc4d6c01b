"""Settings that change during a run: named, recorded, kept by later starts, or refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from commands import ROOT, SMOKE, launch
from short_runs import advance, resume, save, stored

from bigan import checkpoint
from bigan.cli.main import main
from bigan.config import ConfigError
from bigan.engine import Engine
from bigan.errors import NonFiniteError
from bigan.reporting.metrics_log import read_metrics
from bigan.reporting.tracker import Tracker
from bigan.run import folder
from bigan.run.changes import read_history, with_values_of
from bigan.run.state import TrainState
from bigan.run.streams import open_streams
from bigan.run.trainer import train
from bigan.run_config import RunConfig, load_config
from bigan.run_folder import RunFolder

MakeConfig = Callable[..., RunConfig]
LR = "optimizer.discriminator.lr"
# Learning rate of the generator x 1e38 in the step to 280 images: the next loss is NaN.
EXPLODING = (
    "optimizer.generator.schedule={name: step, every_images: 260, factor: 1.0e38}",
    "train.checkpoint_images=80",
    "train.snapshot_images=400",
    "train.tick_images=40",
)


def lines_of(config: RunConfig, *allowed: str) -> list[str]:
    lines: list[str] = []
    assert train(config, lines.append, lambda *_: None, allow_change=allowed) == 0
    return lines


@pytest.mark.parametrize(
    ("override", "keys"),
    [
        ("optimizer.discriminator.lr=1e-4", {LR}),
        ("optimizer.generator.beta1=0.5", {"optimizer.generator.beta1"}),
        ("optimizer.generator.eps=1e-6", {"optimizer.generator.eps"}),
        ("optimizer.generator.clip_grad_norm=1.0", {"optimizer.generator.clip_grad_norm"}),
        ("optimizer.generator.warmup_images=0", {"optimizer.generator.warmup_images"}),
        (
            "optimizer.generator.schedule={name: linear, end: 0, images: 9}",
            {f"optimizer.generator.schedule.{key}" for key in ("name", "end", "images")},
        ),
        ("objective.loss=least_squares", {"objective.loss"}),
        ("objective.penalties=[{name: r1, weight: 2.0}]", {"objective.penalties"}),
        ("objective.drift_weight=0.001", {"objective.drift_weight"}),
        ("ema={halflife_images: 10}", {"ema.halflife_images", "ema.rampup"}),
        ("anneal_images=1000", {"anneal_images"}),
        ("precision=bf16", {"precision"}),
        ("train.standing_batches=3", {"train.standing_batches"}),
        ("train.snapshot_images=100", set()),  # may differ without notice
    ],
)
def test_settings_that_may_be_changed(
    make_config: MakeConfig, override: str, keys: set[str]
) -> None:
    folder.prepare(make_config())
    key = override.partition("=")[0]
    plan = folder.check(make_config(override), [key])
    assert {change.key for change in plan.changes} == keys
    if keys:  # and not unless they are named
        with pytest.raises(ConfigError, match=re.escape("this run has ") + ".*--allow-change"):
            folder.check(make_config(override), ["ema.start_images"])


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("model.channels=4", "model.channels"),
        ("model.z_dim=24", "model.z_dim"),
        ("train.seed=5", "train.seed"),
        ("train.batch=20", "train.batch"),
        ("data.block=100", "data.images.block"),
        ("data.split=test", "data.images.split"),
        ("objective.discriminator_steps=2", "objective.discriminator_steps"),
        ("optimizer.generator.name=adamw", "optimizer.generator.name"),
        ("augment={name: ada}", "augment.name"),
        ("precision=fp16", "precision"),
        ("trainable=['*.linear.*']", "trainable"),
    ],
)
def test_settings_that_cannot_change(make_config: MakeConfig, override: str, key: str) -> None:
    folder.prepare(make_config())
    before = RunFolder(make_config().run_dir).config.read_text()
    changed = make_config(override)
    with pytest.raises(ConfigError, match=f"^--allow-change {re.escape(key)}: "):
        folder.check(changed, [key])
    assert RunFolder(changed.run_dir).config.read_text() == before


def test_a_setting_of_the_data_is_named_as_in_the_config(make_config: MakeConfig) -> None:
    folder.prepare(make_config("data.lanes=40"))
    for key in ("data.lanes", "data.images.lanes", "data"):
        with pytest.raises(ConfigError, match=r"^--allow-change data\.images\.lanes: "):
            folder.check(make_config("data.lanes=4"), [key])


@pytest.mark.parametrize(("level", "refused"), [("lr: 1e-5", False), ("batch: 16", True)])
def test_only_learning_rates_of_a_growing_model_change(
    digits: Path, tmp_path: Path, level: str, refused: bool
) -> None:
    config = ROOT / "configs" / "smoke" / "progan-digits.yaml"
    where = [f"data.path={digits}", f"run_dir={tmp_path / 'run'}"]
    levels = "growth.levels=[{resolution: 4, batch: 32, lr: 1e-3}]"
    folder.prepare(load_config(config, [*where, levels]))
    other = levels.replace("batch: 32" if refused else "lr: 1e-3", level)
    if refused:
        with pytest.raises(ConfigError, match=r"^--allow-change growth\.levels: "):
            folder.check(load_config(config, [*where, other]), ["growth.levels"])
    else:
        plan = folder.check(load_config(config, [*where, other]), ["growth.levels"])
        assert [change.key for change in plan.changes] == ["growth.levels"]


def test_a_change_needs_a_run(make_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """A mistyped run_dir must not start a new run."""
    config = make_config()
    command = ["train", str(SMOKE), f"data.path={config.streams['images'].path}"]
    command += [f"run_dir={config.run_dir}", "--allow-change", f"{LR}=1e-4"]
    assert main(command) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert str(config.run_dir) in line
    assert not config.run_dir.exists()


def test_a_change_is_recorded_and_kept(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the history, config.yaml, the metrics and MLflow; by the same command without it."""
    sent: list[Mapping[str, str]] = []
    monkeypatch.setattr(Tracker, "log_tags", lambda tracker, values: sent.append(values))
    original = make_config("train.total_images=200")
    lines_of(original)
    before = stored(original.run_dir / "checkpoints" / "200")

    command = ["train", str(SMOKE), f"data.path={original.streams['images'].path}"]
    command += [f"run_dir={original.run_dir}"]
    options = ["--allow-change", f"{LR}=1e-30", "--allow-change", "ema.rampup=0.2"]
    assert main([*command, *options]) == 0
    run = RunFolder(original.run_dir)
    history = read_history(run)
    assert [(h["images_seen"], h["key"], h["old"], h["new"]) for h in history] == [
        (200, LR, 1.6e-3, 1e-30),
        (200, "ema.rampup", 0.1, 0.2),
    ]
    assert load_config(run.config).optimizer["discriminator"].lr == 1e-30
    (row,) = [r for r in read_metrics(original.run_dir) if f"config/{LR}" in r]
    assert (row["images_seen"], row[f"config/{LR}"], row["config/ema.rampup"]) == (200, 1e-30, 0.2)
    tag = {f"changed.{LR}": "0.0016 -> 1e-30 at images_seen = 200"}
    assert tag.items() <= sent[-1].items()
    after = stored(original.run_dir / "checkpoints" / "400")
    weights = [name for name in before if name.startswith("networks/discriminator.")]
    weights = [name for name in weights if name.endswith((".weight", ".bias"))]
    assert all(before[name].equal(after[name]) for name in weights), "lr of the optimizer state"

    # The plain command, and the command with the option once more, keep it; nothing is new.
    for total, options in ((480, []), (560, ["--allow-change", f"{LR}=1e-30"])):
        assert main([*command, f"train.total_images={total}", *options]) == 0
        assert load_config(run.config).optimizer["discriminator"].lr == 1e-30
        last = stored(original.run_dir / "checkpoints" / str(total))
        assert all(before[name].equal(last[name]) for name in weights)
    assert read_history(run) == history
    # Neither the former nor the present value: refused. Back to the former one: named.
    with pytest.raises(ConfigError, match=re.escape(f"{LR} = 1e-30, not 0.0003")):
        folder.check(make_config(f"{LR}=3.0e-4", "ema.rampup=0.2"))
    back = folder.check(make_config(f"{LR}=1.6e-3"), [LR])
    assert [(c.key, c.new) for c in back.changes] == [(LR, 1.6e-3)]


def test_a_complete_run_is_not_changed(make_config: MakeConfig) -> None:
    config = make_config("train.total_images=80", "train.snapshot_images=80")
    lines_of(config)
    changed = make_config("train.total_images=80", "train.snapshot_images=80", f"{LR}=1e-4")
    with pytest.raises(ConfigError, match=f"--allow-change {re.escape(LR)}: .* = 80; .*total_im"):
        lines_of(changed, LR)
    assert load_config(RunFolder(config.run_dir).config) == config
    assert read_history(RunFolder(config.run_dir)) == []


@pytest.mark.parametrize(("micro_batch", "kept"), [("null", 20), ("10", 10)])
def test_what_a_kept_setting_needs_is_kept(
    make_config: MakeConfig, micro_batch: str, kept: int
) -> None:
    """batchnorm=local needs micro_batch, which may differ without notice."""
    folder.prepare(make_config())
    changed = make_config("train.micro_batch=20", "train.batchnorm=local")
    plan = folder.check(changed, ["train.batchnorm", "train.micro_batch"])
    folder.prepare(changed, plan.changes)
    plain = make_config("train.total_images=1000", f"train.micro_batch={micro_batch}")
    plan = folder.check(plain)
    train_config = with_values_of(plain, plan.settings, plan.superseded).train
    assert (train_config.batchnorm, train_config.micro_batch) == ("local", kept)
    assert train_config.total_images == 1000


@pytest.mark.parametrize("line", ["{{", '{"images_seen": 200, "ke', "[]", "{}", "3", "\xff"])
def test_a_damaged_history_is_one_line(make_config: MakeConfig, line: str) -> None:
    config = make_config(f"{LR}=1e-4")
    folder.prepare(make_config())
    folder.prepare(config, folder.check(config, [LR]).changes)
    path = RunFolder(config.run_dir).config_history
    path.write_bytes(path.read_bytes() + line.encode("latin-1") + b"\n")
    with pytest.raises(ConfigError, match=f"^{re.escape(str(path))}, line 2: "):
        folder.check(make_config())


def test_a_start_that_was_killed_while_it_recorded(make_config: MakeConfig) -> None:
    """Between history and config: the same command records the change once."""
    config = make_config()
    folder.prepare(config)
    changed = make_config(f"{LR}=1e-4")
    plan = folder.check(changed, [LR])
    text = RunFolder(config.run_dir).config.read_text()
    for _ in range(2):
        assert len(folder.prepare(changed, plan.changes)) == 1
        RunFolder(config.run_dir).config.write_text(text)
    assert len(read_history(RunFolder(config.run_dir))) == 1


def test_new_hyperparameters_reach_the_optimizer(make_config: MakeConfig) -> None:
    config = make_config()
    state = TrainState(config, Engine(config, print), {str(digit): 1 for digit in range(10)})
    state.prepare()

    saved = save(advance(state, open_streams(state), 2))
    changes = ["generator.lr=1e-5", "generator.beta1=0.5", "generator.beta2=0.9"]
    changed = make_config(*(f"optimizer.{change}" for change in changes))
    state, streams = resume(changed, saved)
    advance(state, streams, 1)
    (group,) = state.prepared["generator"].optimizer.param_groups
    assert (group["lr"], group["betas"]) == (pytest.approx(1e-5 * 160 / 10_000), (0.5, 0.9))


def test_the_error_of_a_non_finite_loss_names_the_command_that_continues(
    make_config: MakeConfig,
) -> None:
    config = make_config(*EXPLODING)
    with pytest.raises(NonFiniteError) as stopped:
        train(config, print, lambda *_: None)
    assert "images_seen = 280" in stopped.value.finding
    newest = checkpoint.latest(config.run_dir)
    assert newest is not None
    assert newest.name == "240"
    options = re.findall(r"--allow-change (\S+)=(\S+?)[,; ]", str(stopped.value))
    assert {key for key, _ in options} == {LR, "optimizer.generator.lr"}
    for key, value in options:  # what it names can be pasted
        assert folder.check(make_config(*EXPLODING, f"{key}={value}"), [key]).changes
    key = "optimizer.generator.schedule"
    lines = lines_of(make_config(*EXPLODING[1:]), key)
    assert any("images_seen = 240" in line for line in lines)
    assert (config.run_dir / "DONE").exists()
    assert {h["images_seen"] for h in read_history(RunFolder(config.run_dir))} == {240}


@pytest.mark.full
@pytest.mark.slow  # one process: test_new_hyperparameters_reach_the_optimizer
@pytest.mark.parametrize("engine", ["cpu", "zero1", "zero2", "fsdp"])
def test_every_engine_uses_the_new_learning_rate(engine: str, digits: Path, tmp_path: Path) -> None:
    """Not that of the saved optimizer state: with 1e-30, no weight changes any more."""
    run = tmp_path / "run"
    options = ["--config_file", ROOT / "launch" / f"{engine}.yaml"]
    common = [SMOKE, f"data.path={digits}", f"run_dir={run}"]
    assert launch(*common, "train.total_images=200", options=options).returncode == 0
    done = launch(*common, "--allow-change", f"{LR}=1e-30", options=options)
    assert done.returncode == 0, done.stderr[-3000:]
    history = [json.loads(line) for line in (run / "config_history.jsonl").read_text().splitlines()]
    assert [entry["images_seen"] for entry in history] == [200]
    before, after = (stored(run / "checkpoints" / seen) for seen in ("200", "400"))
    names = [n for n in before if n.startswith("networks/") and n.endswith(".weight")]
    moved = {
        name.split("/")[1].split(".")[0] for name in names if not before[name].equal(after[name])
    }
    assert moved == {"generator", "generator_ema"}
