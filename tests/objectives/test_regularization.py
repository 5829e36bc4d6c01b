"""Separate regularization steps, path lengths, and settings that change during a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import ROOT
from parts import make
from phase_inputs import evaluate, inputs_of, network, parameters_of, step_of
from torch import Tensor

from bigan import config as configs
from bigan.config import ConfigError
from bigan.layers.hashing import keys, normal_field
from bigan.layers.mapping import mean_latent
from bigan.objectives.base import Step, variants
from bigan.objectives.gan_phases import PATH_NOISE_STREAM
from bigan.run.remarks import remarks
from bigan.run.state import TrainState
from bigan.run.trainer import train
from bigan.run_config import RunConfig
from bigan.schedules import annealed

STYLE = ROOT / "configs" / "smoke" / "stylegan2-digits.yaml"
MakeConfig = Callable[..., RunConfig]
ADVERSARIAL = ("adversarial",)


@pytest.fixture
def style(digits: Path, tmp_path: Path) -> MakeConfig:
    def load(*overrides: str) -> RunConfig:
        base = [f"data.path={digits}", f"run_dir={tmp_path / 'run'}"]
        return configs.load(RunConfig, STYLE, [*base, *overrides])

    return load


def num_steps(state: TrainState) -> tuple[int, int]:
    """Optimizer steps of discriminator and generator."""
    discriminator, generator = (
        int(next(iter(state.prepared[name].optimizer.state.values()))["step"])
        for name in ("discriminator", "generator")
    )
    return discriminator, generator


# --- separate steps ------------------------------------------------------------------------------


def test_a_separate_step_follows_every_kth_main_step(style: MakeConfig) -> None:
    """R1 at every fourth discriminator step, path lengths at every second of the generator."""
    state, streams = make(style())
    taken = []
    with streams:
        for _ in range(5):
            state.advance(streams)
            taken.append(num_steps(state))
    assert taken == [(2, 1), (3, 3), (4, 4), (5, 6), (7, 7)]
    means, _ = state.statistics.collect()
    assert {f"train/discriminator/{key}" for key in ("loss", "r1")} <= means.keys()
    generator = {f"train/generator/{key}" for key in ("loss", "path_length", "path_penalty")}
    assert generator <= means.keys()


def test_the_order_of_steps(style: MakeConfig) -> None:
    objective = make(style())[0].objective
    assert objective.period == 4
    assert objective.steps(0) == (
        Step("discriminator", ADVERSARIAL, 0, 32, fresh=True),
        Step("discriminator", ("r1",), 0, 32),
        Step("generator", ADVERSARIAL, 32, 32),
    )
    assert objective.steps(32) == (
        Step("discriminator", ADVERSARIAL, 32, 32, fresh=True),
        Step("generator", ADVERSARIAL, 64, 32),
        Step("generator", ("path_length",), 64, 16),
    )
    # Lazy terms occur in some steps only; the order is that of the steps all the same.
    assert variants(objective, 32) == [*objective.steps(0), objective.steps(32)[-1]]


def test_the_separate_step_has_the_gradient_of_its_penalty_alone(style: MakeConfig) -> None:
    separate = "objective.penalties=[{name: r1, weight: 3.0, every: 4, separate_step: true}]"
    state, streams = make(style(separate, "objective.path_length=null"))
    objective = state.objective
    terms = [
        [step.terms for step in objective.steps(at) if step.phase == "discriminator"]
        for at in range(0, 160, 32)
    ]
    assert terms == [
        [ADVERSARIAL, ("r1",)], [ADVERSARIAL], [ADVERSARIAL], [ADVERSARIAL], [ADVERSARIAL, ("r1",)]
    ]  # fmt: skip
    with streams:
        inputs = inputs_of(state, step_of(state, "discriminator"), streams)
    parameters = parameters_of(state, "discriminator")

    def gradients(terms: tuple[str, ...]) -> list[Tensor]:
        loss = evaluate(state, "discriminator", inputs, terms).loss
        return list(torch.autograd.grad(loss, parameters))  # all have one: DDP waits for them

    both, main, own = (gradients(t) for t in (("adversarial", "r1"), ADVERSARIAL, ("r1",)))
    for joined, a, b in zip(both, main, own, strict=True):
        torch.testing.assert_close(joined, a + b, rtol=1e-4, atol=1e-6)
    assert any(gradient.abs().max() > 1e-4 for gradient in own)


def test_adam_is_corrected_for_the_separate_steps(style: MakeConfig) -> None:
    """k + 1 steps move and forget as much as k did (Karras et al. 2020, appendix B)."""
    state, streams = make(style())
    assert state.objective.separate_steps == {"discriminator": 4, "generator": 2}
    with streams:
        state.advance(streams)
    for name, c in (("discriminator", 4 / 5), ("generator", 2 / 3)):
        (group,) = state.prepared[name].optimizer.param_groups
        assert group["lr"] == pytest.approx(2.5e-3 * c)
        assert group["betas"] == pytest.approx((0.0, 0.99**c))


def test_gamma_has_a_default_and_is_printed(style: MakeConfig) -> None:
    config = style()
    weight = config.objective.penalties[0].initial_weight(16, 32)
    assert weight == pytest.approx(0.0002 * 16**2 / 32)
    other = config.objective.penalties[0].initial_weight((24, 16), 32)
    assert other == pytest.approx(0.0002 * 24 * 16 / 32)
    state, _ = make(config)
    printed = remarks(state)
    (line,) = (line for line in printed if "of r1" in line)
    assert "0.0016 = 0.0002 * height * width / batch" in line
    (line,) = (line for line in printed if "optimizer.discriminator" in line)
    assert "after every 4" in line
    assert "lr 0.002," in line
    plain = style("objective.penalties=[{name: wgan_gp}]")
    assert plain.objective.penalties[0].initial_weight(16, 32) == 10


@pytest.mark.parametrize(
    ("overrides", "facts"),
    [
        (
            [
                "objective.penalties=[{name: r1, every: 4, separate_step: true}, "
                "{name: r2, every: 8, separate_step: true}]"
            ],
            "separate_step.*every",
        ),
        (["objective.penalties=[{name: r1}, {name: r1}]"], "penalties.*once"),
        (
            ["optimizer.generator.schedule={name: cosine, end: 1e-4}"],
            r"optimizer\.generator\.schedule.* needs anneal_images",
        ),
        (
            ["objective.penalties=[{name: r1, weight_end: 1.0}]"],
            r"r1\.weight_end needs anneal_images",
        ),
        (
            ["model={name: r3gan, resolution: 16, num_classes: 10}"],
            "path_length.*r3gan.*no intermediate latents",
        ),
    ],
)
def test_impossible_settings_are_config_errors(
    style: MakeConfig, overrides: list[str], facts: str
) -> None:
    with pytest.raises(ConfigError, match=facts):
        style(*overrides)


# --- path lengths --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 16), (12, 8)])
def test_path_length_and_its_gradient_are_those_of_finite_differences(
    style: MakeConfig, shape: tuple[int, int]
) -> None:
    """In float64: the length by differencing images, the gradient by differencing the penalty."""
    settings = "objective.path_length={weight: 2, every: 4}", "model.style_mixing=0"
    state, _ = make(style(*settings, f"model.resolution={list(shape)}"))
    parameters = parameters_of(state, "generator")
    phase = state.objective.phases["generator"].double()
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in parameters:  # noise and biases begin at zero
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
    z, labels = torch.randn(3, 16, generator=draw).double(), torch.zeros(3, dtype=torch.int64)
    inputs = {"z": z, "labels": labels, "path_mean": torch.tensor(0.3, dtype=torch.float64)}
    generator = network(state, "generator")

    def length(index: int) -> float:
        """sqrt(mean over layers of |d<images, y>/dw|^2), one entry of w after the other."""
        one = z[index : index + 1]
        ws = generator.mapping(one, labels[:1]).detach().clone()
        noise = normal_field(keys(one), PATH_NOISE_STREAM, (1, *shape)) / math.prod(shape) ** 0.5
        total = 0.0
        for entry in range(ws.numel()):
            moved = []
            for step in (1e-5, -1e-5):
                there = ws.flatten().clone()
                there[entry] += step
                images = generator.synthesis(there.view_as(ws), keys(one))
                moved.append((images * noise).sum().item())
            total += ((moved[0] - moved[1]) / 2e-5) ** 2
        return (total / ws.shape[1]) ** 0.5

    with torch.no_grad():
        lengths = [length(index) for index in range(3)]
    loss, scalars, _ = evaluate(state, "generator", inputs, ("path_length",))
    assert scalars["path_length"].item() == pytest.approx(sum(lengths) / 3, rel=1e-4)
    expected = sum((value - 0.3) ** 2 for value in lengths) / 3
    assert scalars["path_penalty"].item() == pytest.approx(expected, rel=1e-4)
    assert loss.item() == pytest.approx(2 * 4 * expected, rel=1e-4)
    assert parameters == list(phase.parameters())
    gradients = torch.autograd.grad(loss, parameters)  # none is missing
    for parameter, gradient in list(zip(parameters, gradients, strict=True))[::5]:
        direction = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
        moved = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                parameter.add_(step * direction)
                moved.append(evaluate(state, "generator", inputs, ("path_length",)).loss.item())
                parameter.sub_(step * direction)
        slope = (moved[0] - moved[1]) / 2e-6
        assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-4, abs=1e-6)


def test_the_mean_length_is_updated_and_part_of_the_state(style: MakeConfig) -> None:
    state, streams = make(style("objective.path_length={weight: 2, every: 2, decay: 0.25}"))
    mean = state.state["path_length"].get_buffer("mean")
    with streams:
        state.advance(streams)
        assert mean.item() == 0
        state.advance(streams)
    means, _ = state.statistics.collect()
    assert mean.item() == pytest.approx(0.25 * means["train/generator/path_length"])
    assert "state/path_length.mean" in {shard.name for shard in state.shards()}


def test_path_lengths_use_a_part_of_the_batch(style: MakeConfig) -> None:
    state, _ = make(style())
    step = step_of(state, "generator", ("path_length",))
    assert step.num_images == 16
    inputs = inputs_of(state, step)
    main = inputs_of(state, step_of(state, "generator", ADVERSARIAL)._replace(at=step.at))
    assert (len(inputs["z"]), len(main["z"])) == (16, 32)
    assert not torch.equal(inputs["z"], main["z"][:16])
    mean = state.state["path_length"].get_buffer("mean")
    assert inputs["path_mean"].data_ptr() == mean.data_ptr()


def test_the_mean_latent_is_updated(style: MakeConfig) -> None:
    state, streams = make(style("objective.path_length=null"))
    generator = network(state, "generator")
    with streams:
        state.advance(streams)
        before = generator.mapping.w_average.clone()
        (*_, last) = state.objective.steps(32)
        state.advance(streams)
    inputs = inputs_of(state, last)
    expected = before.lerp(mean_latent(generator, inputs["z"], inputs["labels"]), 0.005)
    torch.testing.assert_close(generator.mapping.w_average, expected)
    average = state.averages["generator"].get_submodule("mapping").get_buffer("w_average")
    assert torch.equal(average, generator.mapping.w_average)


def test_the_mean_latent_is_updated_once_after_a_separate_step(style: MakeConfig) -> None:
    """With the latents of the main step, not those of the step for path lengths."""
    state, streams = make(style())
    generator = network(state, "generator")
    with streams:
        state.advance(streams)
        before = generator.mapping.w_average.clone()
        (*_, main, separate) = state.objective.steps(32)
        state.advance(streams)
    assert separate.terms == ("path_length",)
    inputs = inputs_of(state, main)
    expected = before.lerp(mean_latent(generator, inputs["z"], inputs["labels"]), 0.005)
    torch.testing.assert_close(generator.mapping.w_average, expected)


def test_a_resumed_run_is_bitwise_the_same(style: MakeConfig, tmp_path: Path) -> None:
    """Path-length mean, mean latent and the counters of lazy terms are part of the state."""
    straight = style(f"run_dir={tmp_path / 'straight'}", "train.total_images=320")
    parts = style(f"run_dir={tmp_path / 'parts'}", "train.total_images=320")
    first = parts.model_copy(update={"train": parts.train.model_copy(update={"total_images": 160})})
    for config in (straight, first, parts):
        assert train(config, print, lambda *_: None) == 0
    name = "snapshots/320/generator_ema.safetensors"
    assert (straight.run_dir / name).read_bytes() == (parts.run_dir / name).read_bytes()


# --- settings that change during a run -----------------------------------------------------------


def test_annealing_is_half_a_cosine() -> None:
    assert annealed(0, 2.0, 1.0, 100) == 2.0
    assert annealed(50, 2.0, 1.0, 100) == pytest.approx(1.5)
    assert annealed(25, 2.0, 1.0, 100) == pytest.approx(1 + 0.5 * (1 + 2**-0.5))
    assert annealed(100, 2.0, 1.0, 100) == annealed(500, 2.0, 1.0, 100) == 1.0
    assert annealed(50, 2.0, None, 100) == annealed(50, 2.0, 1.0, None) == 2.0


def test_rates_betas_and_penalties_are_annealed(make_config: MakeConfig) -> None:
    config = make_config(
        "anneal_images=400", "optimizer.discriminator.schedule={name: cosine, end: 1e-4}",
        "optimizer.discriminator.beta2_end=0.99", "optimizer.discriminator.warmup_images=0",
        "optimizer.discriminator.beta2=0.9",
        "objective.penalties=[{name: r1, weight: 4.0, weight_end: 2.0}, {name: r2, weight: 1.0}]",
    )  # fmt: skip
    state, streams = make(config)
    with streams:
        state.progress.images_seen = 200
        step, *_ = state.objective.steps(200)
        state.advance(streams, steps=[step])
    (group,) = state.prepared["discriminator"].optimizer.param_groups
    assert group["lr"] == pytest.approx((1.6e-3 + 1e-4) / 2)
    assert group["betas"] == pytest.approx((0.0, 0.945))
    inputs = inputs_of(state, step)
    assert inputs["penalty_weights"].tolist() == [3.0, 1.0]
    with torch.no_grad():
        both, scalars, _ = evaluate(state, "discriminator", inputs, ("adversarial", "r1", "r2"))
        plain = evaluate(state, "discriminator", inputs, ADVERSARIAL).loss
    expected = 3 * scalars["r1"] + scalars["r2"]
    assert (both - plain).item() == pytest.approx(expected.item(), rel=1e-3)
