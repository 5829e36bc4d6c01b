"""Regularisers with steps of their own, path lengths, and settings that change during a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import ROOT
from parts import make
from torch import Tensor

from bigan import config as configs
from bigan.config import ConfigError
from bigan.layers.hashing import keys, normal_field
from bigan.layers.mapping import mean_latent
from bigan.objectives.gan import PATH_NOISE_STREAM, GeneratorBatch
from bigan.run.state import Training
from bigan.run.trainer import remarks, train
from bigan.run_config import RunConfig, corrected, own_step_every, penalty_weight
from bigan.schedules import annealed

STYLE = ROOT / "configs" / "smoke" / "stylegan2-digits.yaml"
Recipe = Callable[..., RunConfig]


@pytest.fixture
def style(digits: Path, tmp_path: Path) -> Recipe:
    def load(*overrides: str) -> RunConfig:
        base = [f"data.path={digits}", f"run_dir={tmp_path / 'run'}"]
        return configs.load(RunConfig, STYLE, [*base, *overrides])

    return load


def num_steps(training: Training) -> dict[str, int]:
    return {
        name: int(next(iter(optimizer.state.values()))["step"])
        for name, optimizer in training.optimizers.items()
    }


# --- steps of their own --------------------------------------------------------------------------


def test_a_lazy_step_follows_every_kth_main_one(style: Recipe) -> None:
    """R1 at every fourth discriminator step, path lengths at every second of the generator."""
    training, stream = make(style())
    taken = []
    with stream:
        for _ in range(5):
            training.step(stream)
            taken.append((num_steps(training)["d"], num_steps(training)["g"]))
    assert taken == [(2, 1), (3, 3), (4, 4), (5, 6), (7, 7)]
    means, _ = training.statistics.collect()
    assert {"r1", "path_length", "path_penalty", "loss_d", "loss_g"} <= means.keys()


def test_the_lazy_step_has_the_gradient_of_its_penalty_alone(style: Recipe) -> None:
    training, stream = make(style("penalties=[{name: r1, weight: 3.0, every: 4, own_step: true}]"))
    phase = training.phases["d"]
    assert phase.terms(0) == ("adversarial",)
    assert phase.own_terms(0) == phase.own_terms(128) == ("r1",)
    assert phase.own_terms(32) == phase.own_terms(96) == ()
    with stream:
        (batch,) = training._micro_batches(phase, phase.terms(0), stream)
    phase.requires_grad_(True)
    parameters = list(phase.network.parameters())

    def gradients(terms: tuple[str, ...]) -> list[Tensor]:
        loss, _ = phase(training.generator, batch, terms)
        return list(torch.autograd.grad(loss, parameters))  # all have one: DDP waits for them

    both, main, own = (gradients(t) for t in (("adversarial", "r1"), ("adversarial",), ("r1",)))
    for joined, a, b in zip(both, main, own, strict=True):
        torch.testing.assert_close(joined, a + b, rtol=1e-4, atol=1e-6)
    assert any(gradient.abs().max() > 1e-4 for gradient in own)


def test_adam_is_corrected_for_the_extra_steps(style: Recipe) -> None:
    """k + 1 steps move and forget as much as k did (Karras et al. 2020, appendix B)."""
    config = style()
    assert own_step_every(config, "d") == 4
    assert own_step_every(config, "g") == 2
    adam = corrected(config.optimizer.d.model_copy(update={"beta1": 0.5}), 4)
    assert adam.lr * 5 == pytest.approx(config.optimizer.d.lr * 4)
    assert adam.beta1**5 == pytest.approx(0.5**4)
    assert adam.beta2**5 == pytest.approx(0.99**4)
    training, stream = make(config)
    with stream:
        training.step(stream)
    for name, c in (("d", 4 / 5), ("g", 2 / 3)):
        (group,) = training.optimizers[name].param_groups
        assert group["lr"] == pytest.approx(2.5e-3 * c)
        assert group["betas"] == pytest.approx((0.0, 0.99**c))
    assert corrected(config.optimizer.d, None) is config.optimizer.d


def test_gamma_has_a_default_and_is_said(style: Recipe) -> None:
    config = style()
    assert penalty_weight(config.penalties[0], config) == pytest.approx(0.0002 * 16**2 / 32)
    training, _ = make(config)
    said = "\n".join(remarks(training))
    assert "weight of r1: 0.0016 = 0.0002 * resolution^2 / batch" in said
    assert "optimizer.d: a step for regularisation alone after every 4, so lr 0.002," in said
    plain = style("penalties=[{name: wgan_gp}]")
    assert penalty_weight(plain.penalties[0], plain) == 10


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            [
                "penalties=[{name: r1, every: 4, own_step: true}, "
                "{name: r2, every: 8, own_step: true}]"
            ],
            "share one optimiser step",
        ),
        (["optimizer.g.lr_end=1e-4"], "optimizer.g.lr_end needs anneal_images"),
        (["penalties=[{name: r1, weight_end: 1.0}]"], "needs anneal_images"),
        (["model={name: r3gan, resolution: 16, num_classes: 10}"], "no intermediate latents"),
    ],
)
def test_impossible_settings_are_config_errors(
    style: Recipe, overrides: list[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        style(*overrides)


# --- path lengths --------------------------------------------------------------------------------


def test_path_length_and_its_gradient_are_those_of_finite_differences(style: Recipe) -> None:
    """In float64: the length by differencing images, the gradient by differencing the penalty."""
    training, _ = make(style("path_length={weight: 2, every: 4}", "model.style_mixing=0"))
    phase = training.phases["g"].double()
    phase.requires_grad_(True)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in phase.parameters():  # noise and biases begin at zero
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
    z, labels = torch.randn(3, 16, generator=draw).double(), torch.zeros(3, dtype=torch.int64)
    batch = GeneratorBatch(z, labels, path_mean=torch.tensor(0.3, dtype=torch.float64))
    network = phase.network

    def length(index: int) -> float:
        """sqrt(mean over layers of |d<images, y>/dw|^2), one entry of w after the other."""
        one = z[index : index + 1]
        ws = network.mapping(one, labels[:1]).detach().clone()
        noise = normal_field(keys(one), PATH_NOISE_STREAM, (1, 16, 16)) / 16
        total = 0.0
        for entry in range(ws.numel()):
            moved = []
            for step in (1e-5, -1e-5):
                there = ws.flatten().clone()
                there[entry] += step
                images = network.synthesis(there.view_as(ws), keys(one))
                moved.append((images * noise).sum().item())
            total += ((moved[0] - moved[1]) / 2e-5) ** 2
        return (total / ws.shape[1]) ** 0.5

    with torch.no_grad():
        lengths = [length(index) for index in range(3)]
    loss, scalars = phase(training.discriminator, batch, ("path_length",))
    assert scalars["path_length"].item() == pytest.approx(sum(lengths) / 3, rel=1e-4)
    expected = sum((value - 0.3) ** 2 for value in lengths) / 3
    assert scalars["path_penalty"].item() == pytest.approx(expected, rel=1e-4)
    assert loss.item() == pytest.approx(2 * 4 * expected, rel=1e-4)
    parameters = list(phase.parameters())
    gradients = torch.autograd.grad(loss, parameters)  # none is missing
    for parameter, gradient in list(zip(parameters, gradients, strict=True))[::5]:
        direction = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
        moved = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                parameter.add_(step * direction)
                moved.append(phase(training.discriminator, batch, ("path_length",))[0].item())
                parameter.sub_(step * direction)
        slope = (moved[0] - moved[1]) / 2e-6
        assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-4, abs=1e-6)


def test_the_mean_length_is_followed_and_part_of_the_state(style: Recipe) -> None:
    config = style("path_length={weight: 2, every: 2, decay: 0.25}")
    training, stream = make(config)
    assert training.path_length is not None
    with stream:
        training.step(stream)
        assert training.path_length.mean.item() == 0
        training.step(stream)
    means, _ = training.statistics.collect()
    assert training.path_length.mean.item() == pytest.approx(0.25 * means["path_length"])
    assert "networks/path_length.mean" in {shard.name for shard in training.shards()}


def test_path_lengths_take_a_part_of_the_batch(style: Recipe) -> None:
    training, _ = make(style())
    phase = training.phases["g"]
    assert phase.num_images(("path_length",)) == 16
    (batch,) = training._micro_batches(phase, ("path_length",), iter(()))
    (main,) = training._micro_batches(phase, ("adversarial",), iter(()))
    assert (len(batch.z), len(main.z)) == (16, 32)
    assert not torch.equal(batch.z, main.z[:16])
    assert batch.path_mean is training.path_length.mean  # type: ignore[union-attr]


def test_the_mean_latent_is_followed(style: Recipe) -> None:
    training, stream = make(style())
    with stream:
        training.step(stream)
        before = training.generator.mapping.w_average.clone()
        training.step(stream)
    (batch,) = training._last["g"]
    expected = before.lerp(mean_latent(training.generator, batch.z, batch.fake_labels), 0.005)
    torch.testing.assert_close(training.generator.mapping.w_average, expected)
    assert torch.equal(training.average.mapping.w_average, training.generator.mapping.w_average)


def test_resumed_it_is_bitwise_the_same(style: Recipe, tmp_path: Path) -> None:
    """Path-length mean, mean latent and where the lazy steps stand are all part of the state."""
    whole = style(f"run_dir={tmp_path / 'whole'}", "train.total_images=320")
    parts = style(f"run_dir={tmp_path / 'parts'}", "train.total_images=320")
    first = parts.model_copy(update={"train": parts.train.model_copy(update={"total_images": 160})})
    for config in (whole, first, parts):
        assert train(config, print, lambda *_: None) == 0
    name = "snapshots/320/weights.safetensors"
    assert (whole.run_dir / name).read_bytes() == (parts.run_dir / name).read_bytes()


# --- what changes during a run -------------------------------------------------------------------


def test_annealing_is_half_a_cosine() -> None:
    assert annealed(0, 2.0, 1.0, 100) == 2.0
    assert annealed(50, 2.0, 1.0, 100) == pytest.approx(1.5)
    assert annealed(25, 2.0, 1.0, 100) == pytest.approx(1 + 0.5 * (1 + 2**-0.5))
    assert annealed(100, 2.0, 1.0, 100) == annealed(500, 2.0, 1.0, 100) == 1.0
    assert annealed(50, 2.0, None, 100) == annealed(50, 2.0, 1.0, None) == 2.0


def test_rates_betas_and_penalties_are_annealed(recipe: Recipe) -> None:
    config = recipe(
        "anneal_images=400", "optimizer.d.lr_end=1e-4", "optimizer.d.beta2_end=0.99",
        "optimizer.d.warmup_images=0", "optimizer.d.beta2=0.9",
        "penalties=[{name: r1, weight: 4.0, weight_end: 2.0}, {name: r2, weight: 1.0}]",
    )  # fmt: skip
    training, stream = make(config)
    with stream:
        training.progress.images_seen = 200
        training.phase_step("d", stream)
    (group,) = training.optimizers["d"].param_groups
    assert group["lr"] == pytest.approx((1.6e-3 + 1e-4) / 2)
    assert group["betas"] == pytest.approx((0.0, 0.945))
    (batch,) = training._last["d"]
    assert batch.weights.tolist() == [3.0, 1.0]
    phase = training.phases["d"]
    with torch.no_grad():
        whole, scalars = phase(training.generator, batch, ("adversarial", "r1", "r2"))
        plain, _ = phase(training.generator, batch, ("adversarial",))
    expected = 3 * scalars["r1"] + scalars["r2"]
    assert (whole - plain).item() == pytest.approx(expected.item(), rel=1e-3)
