"""Optimizers: settings, schedules, clipping, skipped steps, frozen parameters, weight clipping."""

from __future__ import annotations

import math
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from parts import make
from phase_inputs import evaluate, inputs_of, network, parameters_of, step_of
from short_runs import TINY, advance, differing, resume, save, stored, tensors
from torch import Tensor

from bigan import optimizers
from bigan.augment import discriminator_inputs
from bigan.config import ConfigError
from bigan.optimizers import Adam, AdamW, Constant, Cosine, Linear, RMSprop, StepDecay
from bigan.run_config import RunConfig

MakeConfig = Callable[..., RunConfig]
PHASES = ("discriminator", "generator")

# Settings of each optimizer, and its state besides the number of steps.
SETTINGS = {
    "adam": ("{lr: 1e-3, beta1: 0.5}", {"step", "exp_avg", "exp_avg_sq"}),
    "adamw": (
        "{name: adamw, lr: 1e-3, beta1: 0.5, weight_decay: 0.1}",
        {"step", "exp_avg", "exp_avg_sq"},
    ),
    "sgd": (
        "{name: sgd, lr: 1e-3, momentum: 0.9, nesterov: true, weight_decay: 0.1}",
        {"momentum_buffer"},
    ),
    "plain sgd": ("{name: sgd, lr: 1e-3}", set()),
    "rmsprop": ("{name: rmsprop, lr: 1e-3}", {"step", "square_avg"}),
    "rmsprop with momentum": (
        "{name: rmsprop, lr: 1e-3, momentum: 0.9}",
        {"step", "square_avg", "momentum_buffer"},
    ),
}


@pytest.fixture
def tiny(make_config: MakeConfig) -> MakeConfig:
    """`tiny("rmsprop", ...)`: tiny networks, both trained by an optimizer of `SETTINGS`."""

    def build(optimizer: str, *overrides: str) -> RunConfig:
        settings, _ = SETTINGS[optimizer]
        both = [f"optimizer.{phase}={settings}" for phase in PHASES]
        return make_config(*TINY, *both, *overrides)

    return build


def spoiled(pixels: Tensor, mirror: Tensor | None = None) -> Tensor:
    """Real images whose values are NaN."""
    return pixels.permute(0, 3, 1, 2) * torch.nan


# --- settings ------------------------------------------------------------------------------------


def test_the_name_selects_the_optimizer(make_config: MakeConfig) -> None:
    config = make_config("optimizer.discriminator={name: rmsprop, lr: 5e-5, alpha: 0.9}")
    assert config.optimizer["generator"] == Adam(lr=2e-4, warmup_images=10000)
    assert config.optimizer["discriminator"] == RMSprop(name="rmsprop", lr=5e-5, alpha=0.9)
    for name, kind in (("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)):
        entry = make_config(f"optimizer.generator={{name: {name}, lr: 1.0}}").optimizer["generator"]
        assert type(entry.build([torch.zeros(1, requires_grad=True)])) is kind


def test_settings_reach_the_optimizer() -> None:
    weight = [torch.zeros(1, requires_grad=True)]
    adamw = AdamW(name="adamw", lr=0.1, beta1=0.5, beta2=0.9, eps=1e-3, weight_decay=0.2)
    expected = {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.2, "fused": True}
    assert adamw.build(weight).defaults.items() >= expected.items()
    expected = {"lr": 0.1, "betas": (0.0, 0.999), "eps": 1e-8, "weight_decay": 0, "fused": True}
    assert Adam(lr=0.1).build(weight).defaults.items() >= expected.items()
    sgd = optimizers.SGD(name="sgd", lr=0.1, momentum=0.5, nesterov=True, weight_decay=0.2)
    expected = {"lr": 0.1, "momentum": 0.5, "nesterov": True, "weight_decay": 0.2, "fused": True}
    assert sgd.build(weight).defaults.items() >= expected.items()
    rmsprop = RMSprop(name="rmsprop", lr=0.1, alpha=0.5, momentum=0.2, eps=1e-3)
    expected = {"lr": 0.1, "alpha": 0.5, "momentum": 0.2, "eps": 1e-3}
    assert rmsprop.build(weight).defaults.items() >= expected.items()


@pytest.mark.parametrize(
    ("override", "facts"),
    [
        (
            "optimizer.generator.momentum=0.9",
            r"has no setting momentum; leave optimizer\.generator\.momentum = 0\.9 out",
        ),
        ("optimizer.generator.name=lion", r"optimizer\.generator\.name = 'lion': .*'rmsprop'"),
        ("optimizer.generator.lr=0", r"optimizer\.generator\.lr = 0"),
        ("optimizer.generator.clip_grad_norm=0", r"optimizer\.generator\.clip_grad_norm = 0"),
        ("optimizer.generator.beta1=1.0", r"optimizer\.generator\.beta1 = 1"),
        ("optimizer.generator.schedule={name: exponential}", r"schedule.*exponential.*'cosine'"),
        ("optimizer.generator.schedule={name: linear}", r"schedule\.end.*missing"),
        (
            "optimizer.generator.schedule={name: linear, end: 0.0}",
            r"optimizer\.generator\.schedule\.images needs anneal_images",
        ),
        ("optimizer.generator.beta2_end=0.9", r"generator\.beta2_end needs anneal_images"),
        (
            "optimizer.encoder={lr: 1.0}",
            "optimizer.* generator and discriminator and encoder; .* discriminator and generator",
        ),
        ("optimizer={generator: {lr: 1.0}}", "optimizer.*discriminator and generator"),
    ],
)
def test_wrong_settings_are_config_errors(
    make_config: MakeConfig, override: str, facts: str
) -> None:
    with pytest.raises(ConfigError, match=facts) as caught:
        make_config(override)
    assert "\n" not in str(caught.value)


# --- learning rates ------------------------------------------------------------------------------


def rates(schedule: object, *at: int, anneal: int | None = None) -> list[float]:
    settings = Adam(lr=2.0, schedule=schedule)  # type: ignore[arg-type]
    return [settings.lr_at(n, 10, anneal) for n in at]


def test_schedules_are_functions_of_images() -> None:
    assert rates(Constant(), 0, 10**9) == [2, 2]
    linear = Linear(name="linear", end=1.0, images=100)
    assert rates(linear, 0, 25, 50, 100, 500) == pytest.approx([2, 1.75, 1.5, 1, 1])
    cosine = Cosine(name="cosine", end=1.0, images=100)
    quarter = 1 + 0.5 * (1 + math.cos(math.pi / 4))
    assert rates(cosine, 0, 25, 50, 100, 500) == pytest.approx([2, quarter, 1.5, 1, 1])
    step = StepDecay(name="step", every_images=100, factor=0.1)
    assert rates(step, 0, 99, 100, 199, 200) == pytest.approx([2, 2, 0.2, 0.2, 0.02])


def test_schedules_without_a_length_end_with_anneal_images() -> None:
    for schedule in (Linear(name="linear", end=0.0), Cosine(name="cosine", end=0.0)):
        assert rates(schedule, 0, 50, 100, anneal=100) == pytest.approx([2, 1, 0])
        assert Adam(lr=2.0, schedule=schedule).needs_anneal_images == ["schedule.images"]
    assert Adam(lr=2.0, beta2_end=0.9).needs_anneal_images == ["beta2_end"]
    own = Linear(name="linear", end=0.0, images=10)
    assert Adam(lr=2.0, schedule=own).needs_anneal_images == []
    assert rates(own, 5, anneal=100) == pytest.approx([1])


def test_warmup_and_factor_multiply_the_schedule() -> None:
    schedule = Linear(name="linear", end=1.0, images=100)
    settings = RMSprop(name="rmsprop", lr=2.0, schedule=schedule, warmup_images=40)
    found = [settings.lr_at(n, 10, None) for n in (0, 10, 30, 50)]
    assert found == pytest.approx([0.25 * 2, 0.5 * 1.9, 1.7, 1.5])
    assert settings.lr_at(50, 10, None, factor=0.5) == pytest.approx(0.75)


def test_schedules_set_the_rate_of_each_step(tiny: MakeConfig) -> None:
    state, streams = make(
        tiny(
            "rmsprop",
            "optimizer.generator.schedule={name: linear, end: 0.0, images: 32}",
            "optimizer.discriminator.schedule={name: step, every_images: 16, factor: 0.5}",
        )
    )
    found = []
    with streams:
        for _ in range(4):
            state.advance(streams)
            found.append([state.prepared[name].optimizer.param_groups[0]["lr"] for name in PHASES])
    # The step of the generator comes after the images of its training step.
    assert [d for d, _ in found] == pytest.approx([1e-3, 1e-3, 5e-4, 5e-4])
    assert [g for _, g in found] == pytest.approx([7.5e-4, 5e-4, 2.5e-4, 0])


def test_settings_are_corrected_for_separate_regularization_steps() -> None:
    """k + 1 steps move and forget as much as k did (Karras et al. 2020, appendix B)."""
    schedule = Linear(name="linear", end=0.5, images=100)
    adam = Adam(lr=2.0, schedule=schedule, beta1=0.5, beta2=0.9, beta2_end=0.99)
    found = adam.corrected(4)
    assert found.lr * 5 == pytest.approx(2.0 * 4)
    assert found.beta1**5 == pytest.approx(0.5**4)
    assert found.beta2**5 == pytest.approx(0.9**4)
    assert found.beta2_end is not None
    assert found.beta2_end**5 == pytest.approx(0.99**4)
    assert found.lr_at(100, 10, None) == pytest.approx(0.5 * 4 / 5)
    assert adam.corrected(None) is adam
    rmsprop = RMSprop(name="rmsprop", lr=2.0, alpha=0.9, momentum=0.5).corrected(1)
    assert (rmsprop.lr, rmsprop.alpha, rmsprop.momentum) == (1.0, 0.9**0.5, 0.5**0.5)
    step = StepDecay(name="step", every_images=100, factor=0.1)
    sgd = optimizers.SGD(name="sgd", lr=2.0, schedule=step).corrected(3)
    assert sgd.lr_at(100, 10, None) == pytest.approx(2.0 * 3 / 4 * 0.1)


# --- steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("share", [0.25, 4.0])
def test_gradients_are_clipped_to_their_global_norm(
    tiny: MakeConfig, share: float, precision: str
) -> None:
    """As torch.nn.utils.clip_grad_norm_: a plain SGD step of rate 1 moves by the gradient."""
    plain = f"precision={precision}"
    state, streams = make(tiny("plain sgd", plain))
    step = step_of(state, "discriminator")
    parameters = parameters_of(state, "discriminator")
    with streams:
        evaluate(
            state, "discriminator", inputs_of(state, step, streams), step.terms
        ).loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, math.inf).item()
    torch.nn.utils.clip_grad_norm_(parameters, share * norm)
    expected = [p.grad.clone() for p in parameters]
    limit = f"optimizer.discriminator={{name: sgd, lr: 1.0, clip_grad_norm: {share * norm}}}"
    state, streams = make(tiny("plain sgd", limit, plain))
    for scale in state.scales.values():
        scale.scale.fill_(256)
    before = [p.detach().clone() for p in network(state, "discriminator").parameters()]
    with streams:
        state.advance(streams, steps=[step])
    moved = [
        old - new.detach()
        for old, new in zip(before, network(state, "discriminator").parameters(), strict=True)
    ]
    size = torch.stack([m.square().sum() for m in moved]).sum().sqrt().item()
    assert size == pytest.approx(min(share, 1.0) * norm, rel=1e-3)
    if precision == "fp32":
        for found, wanted in zip(moved, expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)
    means, _ = state.statistics.collect()  # the logged norm is that before clipping
    assert means["train/discriminator/grad_norm"] == pytest.approx(norm, rel=1e-3)


def test_gradients_below_the_norm_are_left_alone(tiny: MakeConfig) -> None:
    limit = [f"optimizer.{phase}.clip_grad_norm=1e6" for phase in PHASES]
    found = [tensors(advance(*make(tiny("adam", *extra)), 2)) for extra in ([], limit)]
    assert differing(*found) == []


@pytest.mark.parametrize("optimizer", SETTINGS)
def test_every_optimizer_trains_and_resumes_bitwise(tiny: MakeConfig, optimizer: str) -> None:
    config = tiny(optimizer)
    straight, streams = make(config)
    initial = tensors(straight)
    after = tensors(advance(straight, streams, 5))
    weights = [n for n in initial if n.startswith("networks/") and not n.endswith(".u")]
    moved = [name for name in weights if not initial[name].equal(after[name])]
    assert len(moved) > 0.9 * len(weights)
    folder = save(advance(*make(config), 3))
    named = {name.rpartition(".")[2] for name in stored(folder) if name.startswith("optimizers/")}
    assert named == SETTINGS[optimizer][1]
    resumed, streams = resume(config, folder)
    assert differing(tensors(resumed), stored(folder)) == []
    assert differing(tensors(advance(resumed, streams, 2)), after) == []


@pytest.mark.parametrize("num_before", [0, 1])
@pytest.mark.parametrize("optimizer", SETTINGS)
def test_no_optimizer_updates_from_a_non_finite_loss_on(
    tiny: MakeConfig, optimizer: str, num_before: int
) -> None:
    state, streams = make(tiny(optimizer))
    with streams:
        for _ in range(num_before):
            state.advance(streams)
        before = {n: net.state_dict() for n, net in state.networks.items()}
        before = {n: {k: t.clone() for k, t in found.items()} for n, found in before.items()}
        with mock.patch.object(discriminator_inputs, "as_images", spoiled):
            state.advance(streams)
        state.advance(streams)  # finite again, but there are no updates any more
    assert state.engine.halted_at() == 8 * num_before
    for name, net in state.networks.items():
        assert differing(before[name], dict(net.state_dict())) == [], name
    for name, tensor in tensors(state).items():
        assert tensor.isfinite().all(), name


@pytest.mark.parametrize("optimizer", SETTINGS)
def test_a_step_that_overflows_in_fp16_leaves_no_trace(tiny: MakeConfig, optimizer: str) -> None:
    """Weights are those of a run without it, if it is the first one and if it is a later one."""
    weights = {}
    for overflowing in ((), (0,), (1,)):
        state, streams = make(tiny(optimizer, "precision=fp16"))
        critic, scale = network(state, "discriminator"), state.scales["discriminator"].scale
        first = step_of(state, "discriminator")
        with streams:
            for index in range(2):
                step = first._replace(at=8 * index)
                if index in overflowing:
                    before = [p.detach().clone() for p in critic.parameters()]
                    scale.fill_(1e38)
                    state.advance(streams, steps=[step])
                    step = step._replace(fresh=False)  # again on the same images
                    assert all(map(torch.equal, before, critic.parameters()))
                scale.fill_(1024.0)
                state.advance(streams, steps=[step])
        assert state.engine.halted_at() == -1
        weights[overflowing] = [p.detach().clone() for p in critic.parameters()]
    assert all(tensor.isfinite().all() for tensor in weights[()])
    assert all(map(torch.equal, weights[()], weights[(0,)]))
    # RMSprop's kernel skips nothing: means of squares decay, and a momentum starts again.
    if "rmsprop" not in optimizer:
        assert all(map(torch.equal, weights[()], weights[(1,)]))
    assert all(tensor.isfinite().all() for tensor in weights[(1,)])


# --- frozen parameters ---------------------------------------------------------------------------

HEADS = "trainable=['generator.*', 'discriminator.readout.*', 'discriminator.*.conv3.*']"


def is_frozen(name: str) -> bool:
    kept = ("discriminator.readout.", "generator.")
    return not name.startswith(kept) and ".conv3." not in name


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "rmsprop"])
def test_frozen_parameters_keep_their_bytes_and_have_no_state(
    tiny: MakeConfig, optimizer: str
) -> None:
    state, streams = make(tiny(optimizer, HEADS))
    initial = tensors(state)
    after = tensors(advance(state, streams, 2))
    names = [f"discriminator.{n}" for n, _ in network(state, "discriminator").named_parameters()]
    frozen = [name for name in names if is_frozen(name)]
    assert 5 < len(frozen) < len(names) - 2
    for name in names:
        moved = not initial[f"networks/{name}"].equal(after[f"networks/{name}"])
        has_state = any(key.startswith(f"optimizers/{name}.") for key in after)
        assert (moved, has_state) == (not is_frozen(name),) * 2, name
    optimizer_of = state.prepared["discriminator"].optimizer
    assert sum(len(g["params"]) for g in optimizer_of.param_groups) == len(names) - len(frozen)


def test_a_run_with_frozen_parameters_resumes_bitwise(tiny: MakeConfig) -> None:
    config = tiny("adam", HEADS)
    after = tensors(advance(*make(config), 3))
    folder = save(advance(*make(config), 1))
    resumed, streams = resume(config, folder)
    assert differing(tensors(advance(resumed, streams, 2)), after) == []


@pytest.mark.parametrize(
    ("patterns", "facts"),
    [
        ("['generator.*', 'discriminator.readuot.*']", r"discriminator\.readuot\.\*"),
        ("['generator.*']", "trainable.*phase discriminator"),
        ("[]", "trainable.*phase discriminator"),
    ],
)
def test_wrong_patterns_are_config_errors(tiny: MakeConfig, patterns: str, facts: str) -> None:
    with pytest.raises(ConfigError, match=facts) as caught:
        make(tiny("adam", f"trainable={patterns}"))
    assert "\n" not in str(caught.value)


# --- weight clipping -----------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "rmsprop"])
def test_weights_of_the_critic_are_clipped(tiny: MakeConfig, optimizer: str) -> None:
    """Arjovsky et al. 2017, algorithm 1; from the initial weights on, the generator never."""
    critic = ("objective.loss=wasserstein", "objective.weight_clip=0.02")
    state, streams = make(tiny(optimizer, *critic, "objective.discriminator_steps=2"))

    def largest(name: str) -> float:
        return max(p.abs().max().item() for p in state.networks[name].parameters())

    initial, generator = largest("discriminator"), largest("generator")
    assert initial == pytest.approx(0.02)
    assert generator > 0.1
    at_limit = []
    with streams:
        for _ in range(3):
            state.advance(streams, on_step=lambda _: at_limit.append(largest("discriminator")))
    assert len(at_limit) == 9
    assert max(at_limit) == pytest.approx(0.02, rel=1e-2)
    assert max(at_limit) <= torch.tensor(0.02).item()
    assert largest("generator") > 0.1
