"""Launch guards, the non-finite stop, purity of the phases, the compile fall-back."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from commands import TEN_CLASSES
from parts import make

from bigan.augment import discriminator_inputs
from bigan.data.streaming.stream import ShardStream
from bigan.distributed.world import World
from bigan.engine import Engine, compiling, loss_scale
from bigan.engine.compiling import compile_backend
from bigan.engine.loss_scale import LossScale
from bigan.errors import RunError, UserError
from bigan.objectives import ema
from bigan.run.state import Training
from bigan.run.trainer import train
from bigan.run_config import RunConfig

Recipe = Callable[..., RunConfig]


@pytest.mark.parametrize(
    ("penalties", "why"),
    [("[{name: r1, weight: 1}]", "twice.*penalty r1.*engine=fsdp"), ("[]", "not supported.*fsdp")],
)
def test_zero3_is_refused_with_the_way_out(recipe: Recipe, penalties: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        Engine(recipe("engine=zero3", f"penalties={penalties}"), print)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_trains(recipe: Recipe, precision: str) -> None:
    """The losses stay near those of float32; weights and moments are float32."""
    losses = {}
    for name in ("fp32", precision):
        training, stream = make(recipe(f"precision={name}", "penalties=[{name: r1, weight: 1}]"))
        for scale in training.scales.values():
            scale.scale.fill_(256)  # none of these steps overflows
        with stream:
            for _ in range(6):
                training.step(stream)
        losses[name], _ = training.statistics.collect()
        assert training.engine.halted_at() == -1
    for key in ("loss_d", "loss_g", "r1"):
        assert losses[precision][key] == pytest.approx(losses["fp32"][key], rel=0.05, abs=0.05)
    for optimizer in training.optimizers.values():
        for state in optimizer.state.values():
            assert state["exp_avg"].dtype == torch.float32
            assert state["exp_avg"].abs().max() < 1000, "unscaled"


def test_overflow_in_fp16_is_skipped_and_lowers_the_scale(recipe: Recipe) -> None:
    """Scaled gradients beyond float32: no update, half the scale, and the run goes on."""
    training, stream = make(recipe("precision=fp16"))
    scale = training.scales["d"]
    scale.scale.fill_(1e38)
    before = [p.clone() for p in training.discriminator.parameters()]
    with stream:
        training.phase_step("d", stream)
        assert scale.scale.item() == pytest.approx(0.5e38)
        assert scale.good_steps.item() == 0
        pairs = zip(before, training.discriminator.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert training.engine.halted_at() == -1
        scale.scale.fill_(1024.0)
        training.phase_step("d", stream)
    pairs = zip(before, training.discriminator.parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)
    assert (scale.scale.item(), scale.good_steps.item()) == (1024.0, 1.0)
    means, _ = training.statistics.collect()
    assert means["grad_norm_d"] < 1e6, "skipped norms count as zero, the others are unscaled"


def test_loss_scale_grows_after_good_steps_and_the_run_ends_at_the_smallest() -> None:
    scale = LossScale(torch.device("cpu"))
    scale.good_steps.fill_(loss_scale.GROWTH_STEPS - 1)
    scale.update(torch.tensor(0.0))
    assert (scale.scale.item(), scale.good_steps.item()) == (2 * loss_scale.INITIAL, 0)
    for _ in range(40):
        scale.update(torch.tensor(1.0))
    assert scale.scale.item() == loss_scale.SMALLEST


def test_fp16_ends_where_scaling_cannot_help(recipe: Recipe) -> None:
    training, stream = make(recipe("precision=fp16"))
    with (
        stream,
        mock.patch.object(
            discriminator_inputs, "as_images", lambda real, _: real.permute(0, 3, 1, 2) * torch.nan
        ),
    ):
        training.step(stream)
    assert training.engine.halted_at() == 0


def test_non_finite_step_changes_nothing(recipe: Recipe) -> None:
    training, stream = make(recipe())
    with stream:
        training.step(stream)
        assert training.engine.halted_at() == -1
        before = {
            f"{n}.{k}": t.clone()
            for n, net in training.networks.items()
            for k, t in net.named_parameters()
        }
        moment = training.optimizers["d"].state[next(training.discriminator.parameters())]
        moments = {k: t.clone() for k, t in moment.items()}
        with mock.patch.object(
            discriminator_inputs, "as_images", lambda real, _: real.permute(0, 3, 1, 2) * torch.nan
        ):
            training.step(stream)
        training.step(stream)  # sticky: finite again, and still no update
    for name, network in training.networks.items():
        if name == "ema":  # converges to the generator, which stands still
            continue
        for key, parameter in network.named_parameters():
            assert torch.equal(parameter, before[f"{name}.{key}"]), key
    assert all(torch.equal(moment[k], t) for k, t in moments.items())
    assert training.engine.halted_at() == 40
    assert all(torch.isfinite(p).all() for p in training.average.parameters())


@pytest.mark.parametrize("num", [3, 6, 7])
def test_accumulated_steps_are_finite(recipe: Recipe, num: int) -> None:
    """Thirds and sevenths do not add up to one exactly: the check must not be a mean."""
    training, stream = make(recipe(f"train.batch={num * 4}", "train.micro_batch=4"))
    with stream:
        training.phase_step("d", stream)
    assert training.engine.halted_at() == -1


def test_run_stops_with_one_line_and_keeps_the_checkpoint(recipe: Recipe) -> None:
    config = recipe("train.total_images=4000", "train.checkpoint_images=80", "train.tick_images=40")
    original = discriminator_inputs.as_images
    calls = iter(range(10**6))

    def spoiled(real: torch.Tensor, mirror: torch.Tensor | None) -> torch.Tensor:
        images = original(real, mirror)
        return images * torch.nan if next(calls) >= 5 else images

    with (
        mock.patch.object(discriminator_inputs, "as_images", spoiled),
        pytest.raises(RunError, match=r"loss_d.* non-finite at images_seen = 200.*checkpoints/160"),
    ):
        train(config, print, lambda *_: None)
    assert (config.run_dir / "checkpoints" / "160" / "COMPLETE").exists()
    assert not (config.run_dir / "checkpoints" / "200").exists()
    assert train(recipe("train.total_images=240"), print, lambda *_: None) == 0


def test_phases_are_pure(recipe: Recipe) -> None:
    """Twice the same inputs give the same loss, and no parameter or buffer changes."""
    training, stream = make(recipe("penalties=[{name: r1, weight: 1}, {name: wgan_gp, weight: 1}]"))
    networks = training.networks.values()
    before = [t.clone() for n in networks for t in n.state_dict().values()]
    with stream:
        for name, other in (("d", training.generator), ("g", training.discriminator)):
            phase = training.phases[name]
            (batch,) = training._micro_batches(phase, phase.terms(0), stream)
            phase.requires_grad_(True)
            first, second = (phase(other, batch, phase.terms(0))[0] for _ in range(2))
            assert torch.equal(first, second)
            first.backward()
    after = [t for n in networks for t in n.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_phase_registers_only_what_it_trains(recipe: Recipe) -> None:
    training, _ = make(recipe())
    for name, network in (("d", training.discriminator), ("g", training.generator)):
        assert list(training.phases[name].parameters()) == list(network.parameters())


def test_frozen_player_gets_no_gradient(recipe: Recipe) -> None:
    training, stream = make(recipe())
    with stream:
        training.phase_step("d", stream)
        assert all(p.grad is None for p in training.generator.parameters())
        training.optimizers["d"].zero_grad()
        training.phase_step("g", stream)
    assert all(p.grad is None for p in training.discriminator.parameters())


def test_lazy_penalty_is_due_every_kth_step(recipe: Recipe) -> None:
    config = recipe("penalties=[{name: r1, weight: 1, every: 4}]")
    training, stream = make(config)
    phase = training.phases["d"]
    due = ["r1" in phase.terms(n) for n in range(0, 40 * 8, 40)]
    assert due == [True, False, False, False] * 2
    with stream:
        (batch,) = training._micro_batches(phase, phase.terms(0), stream)
        with torch.no_grad():
            plain, _ = phase(training.generator, batch, ("adversarial",))
            lazy, scalars = phase(training.generator, batch, ("adversarial", "r1"))
    assert (lazy - plain).item() == pytest.approx(4 * scalars["r1"].item(), rel=1e-3)


def test_bf16_keeps_penalties_in_float32(recipe: Recipe) -> None:
    penalty = "penalties=[{name: r1, weight: 1}]"
    values = {}
    for precision in ("fp32", "bf16"):
        training, stream = make(recipe(penalty, f"precision={precision}"))
        with stream:
            (batch,) = training._micro_batches(
                training.phases["d"], training.phases["d"].terms(0), stream
            )
        _, scalars = training.phases["d"](training.generator, batch, ("adversarial", "r1"))
        values[precision] = {k: v.item() for k, v in scalars.items()}
    assert values["bf16"]["r1"] == values["fp32"]["r1"]
    assert values["bf16"]["loss_d"] != values["fp32"]["loss_d"]
    assert values["bf16"]["loss_d"] == pytest.approx(values["fp32"]["loss_d"], abs=0.02)


def test_without_a_compiler_auto_is_eager_and_says_so() -> None:
    with mock.patch.object(compiling.shutil, "which", return_value=None):
        backend, reason = compile_backend("auto", torch.device("cpu"))
    assert backend is None
    assert "compiler" in reason
    assert compile_backend("eager", torch.device("cpu")) == (None, "")
    assert compile_backend("auto", torch.device("cuda")) == ("inductor", "")


def test_failing_compilation_falls_back_with_one_line(recipe: Recipe) -> None:
    lines: list[str] = []
    config = recipe("compile=aot_eager")
    runs = {}
    for broken in (True, False):
        eng = Engine(config if broken else recipe(), lines.append)
        if broken:

            def explode(*_: object) -> None:
                raise RuntimeError("no such backend here")

            eng._backend = explode  # type: ignore[assignment]
        training = Training(config, eng, TEN_CLASSES)
        training.prepare()
        with ShardStream(config.data.path, seed=0, world=World(), batch=40) as stream:
            training.step(stream)
        runs[broken] = [p.clone() for p in training.generator.parameters()]
    assert len([line for line in lines if "eager mode for phase" in line]) == 2
    assert all(torch.equal(a, b) for a, b in zip(runs[True], runs[False], strict=True))


def test_learning_rate_warms_up(recipe: Recipe) -> None:
    training, stream = make(recipe("optimizer.g.warmup_images=160", "optimizer.d.warmup_images=0"))
    with stream:
        rates = []
        for _ in range(3):
            training.step(stream)
            rates.append([o.param_groups[0]["lr"] for o in training.optimizers.values()])
    assert rates == [[pytest.approx(r), 1.6e-3] for r in (1e-4, 1.5e-4, 2e-4)]


def test_average_follows_the_generator(recipe: Recipe) -> None:
    training, stream = make(recipe("ema.start_images=1000000"))
    with stream:
        training.step(stream)
    pairs = zip(training.average.parameters(), training.generator.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert ema.averaged_copy(training.generator).training is False
