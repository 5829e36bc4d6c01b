"""Refused engines, the stop at non-finite losses, loss scaling, the fallback of compilation."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from commands import TEN_CLASSES
from parts import make
from phase_inputs import evaluate, inputs_of, network, step_of
from torch import Tensor

from bigan.augment import discriminator_inputs
from bigan.engine import Engine, compiling, loss_scale
from bigan.engine.compiling import compile_backend
from bigan.engine.loss_scale import LossScale
from bigan.errors import RunError, UserError
from bigan.run.state import TrainState
from bigan.run.streams import open_streams
from bigan.run.trainer import train
from bigan.run_config import RunConfig

MakeConfig = Callable[..., RunConfig]
R1 = "objective.penalties=[{name: r1, weight: 1}]"
DISCRIMINATOR = "train/discriminator"


def spoiled(pixels: Tensor, mirror: Tensor | None = None) -> Tensor:
    """Real images whose values are NaN."""
    return pixels.permute(0, 3, 1, 2) * torch.nan


def copies(state: TrainState, name: str) -> list[Tensor]:
    return [p.detach().clone() for p in state.networks[name].parameters()]


def are_equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("penalties", ["[{name: r1, weight: 1}]", "[]"])
def test_zero3_is_refused_with_an_alternative(make_config: MakeConfig, penalties: str) -> None:
    with pytest.raises(UserError, match=r"zero3.*penalty.*engine=fsdp"):
        Engine(make_config("engine=zero3", f"objective.penalties={penalties}"), print)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_trains(make_config: MakeConfig, precision: str) -> None:
    """The losses stay near those of float32; weights and moments are float32."""
    losses = {}
    for name in ("fp32", precision):
        state, streams = make(make_config(f"precision={name}", R1))
        for scale in state.scales.values():
            scale.scale.fill_(256)  # none of these steps overflows
        with streams:
            for _ in range(6):
                state.advance(streams)
        losses[name], _ = state.statistics.collect()
        assert state.engine.halted_at() == -1
    for key in (f"{DISCRIMINATOR}/loss", "train/generator/loss", f"{DISCRIMINATOR}/r1"):
        assert losses[precision][key] == pytest.approx(losses["fp32"][key], rel=0.05, abs=0.05)
    for prepared in state.prepared.values():
        for moments in prepared.optimizer.state.values():
            assert moments["exp_avg"].dtype == torch.float32
            assert moments["exp_avg"].abs().max() < 1000, "unscaled"


def test_overflow_in_fp16_is_skipped_and_lowers_the_scale(make_config: MakeConfig) -> None:
    """Scaled gradients beyond float32: no update, half the scale, and the run continues."""
    state, streams = make(make_config("precision=fp16"))
    step = step_of(state, "discriminator")
    scale = state.scales["discriminator"]
    scale.scale.fill_(1e38)
    before = copies(state, "discriminator")
    with streams:
        state.advance(streams, steps=[step])
        assert scale.scale.item() == pytest.approx(0.5e38)
        assert scale.good_steps.item() == 0
        assert are_equal(before, copies(state, "discriminator"))
        assert state.engine.halted_at() == -1
        scale.scale.fill_(1024.0)
        state.advance(streams, steps=[step])
    assert not are_equal(before, copies(state, "discriminator"))
    assert (scale.scale.item(), scale.good_steps.item()) == (1024.0, 1.0)
    means, _ = state.statistics.collect()
    assert means[f"{DISCRIMINATOR}/grad_norm"] < 1e6, "skipped norms are 0, the others unscaled"
    assert means[f"{DISCRIMINATOR}/loss_scale"] == pytest.approx((0.5e38 + 1024) / 2)


def test_loss_scale_is_part_of_the_checkpoint(make_config: MakeConfig) -> None:
    state, _ = make(make_config("precision=fp16"))
    names = {shard.name for shard in state.shards() if shard.name.startswith("state/")}
    assert names == {
        f"state/loss_scale_{phase}.{key}"
        for phase in ("discriminator", "generator")
        for key in ("scale", "good_steps")
    }


def test_loss_scale_grows_after_good_steps_and_has_a_minimum() -> None:
    scale = LossScale(torch.device("cpu"))
    scale.good_steps.fill_(loss_scale.GROWTH_STEPS - 1)
    scale.update(torch.tensor(0.0))
    assert (scale.scale.item(), scale.good_steps.item()) == (2 * loss_scale.INITIAL, 0)
    for _ in range(40):
        scale.update(torch.tensor(1.0))
    assert scale.scale.item() == loss_scale.SMALLEST


def test_fp16_stops_where_scaling_cannot_help(make_config: MakeConfig) -> None:
    state, streams = make(make_config("precision=fp16"))
    with streams, mock.patch.object(discriminator_inputs, "as_images", spoiled):
        state.advance(streams)
    assert state.engine.halted_at() == 0


def test_non_finite_step_changes_nothing(make_config: MakeConfig) -> None:
    state, streams = make(make_config())
    optimizer = state.prepared["discriminator"].optimizer
    with streams:
        state.advance(streams)
        assert state.engine.halted_at() == -1
        before = {name: copies(state, name) for name in state.networks}
        moment = optimizer.state[next(state.networks["discriminator"].parameters())]
        moments = {k: t.clone() for k, t in moment.items()}
        with mock.patch.object(discriminator_inputs, "as_images", spoiled):
            state.advance(streams)
        state.advance(streams)  # finite again, but there are no updates any more
    for name, values in before.items():
        assert are_equal(values, copies(state, name)), name
    assert all(torch.equal(moment[k], t) for k, t in moments.items())
    assert state.engine.halted_at() == 40
    assert all(torch.isfinite(p).all() for p in state.averages["generator"].parameters())


@pytest.mark.parametrize("num", [3, 6, 7])
def test_accumulated_steps_are_finite(make_config: MakeConfig, num: int) -> None:
    """Thirds and sevenths do not add up to one exactly: the check must not be a mean."""
    state, streams = make(make_config(f"train.batch={num * 4}", "train.micro_batch=4"))
    with streams:
        state.advance(streams, steps=[step_of(state, "discriminator")])
    assert state.engine.halted_at() == -1


def test_run_stops_with_one_line_and_keeps_the_checkpoint(make_config: MakeConfig) -> None:
    config = make_config(
        "train.total_images=4000", "train.checkpoint_images=80", "train.tick_images=40"
    )
    original = discriminator_inputs.as_images
    calls = iter(range(10**6))

    def later_spoiled(pixels: Tensor, mirror: Tensor | None = None) -> Tensor:
        images = original(pixels, mirror)
        return images * torch.nan if next(calls) >= 5 else images

    with (
        mock.patch.object(discriminator_inputs, "as_images", later_spoiled),
        pytest.raises(RunError, match=r"discriminator/loss.* images_seen = 200.*checkpoints/160"),
    ):
        train(config, print, lambda *_: None)
    assert (config.run_dir / "checkpoints" / "160" / "COMPLETE").exists()
    assert not (config.run_dir / "checkpoints" / "200").exists()
    assert train(make_config("train.total_images=240"), print, lambda *_: None) == 0


def test_phase_registers_only_what_it_trains(make_config: MakeConfig) -> None:
    state, _ = make(make_config())
    for name, phase in state.objective.phases.items():
        assert phase.trains == (name,)
        assert list(phase.parameters()) == list(state.networks[name].parameters())


def test_networks_that_a_phase_reads_get_no_gradient(make_config: MakeConfig) -> None:
    state, streams = make(make_config())
    discriminator_step, generator_step = state.objective.steps(0)
    with streams:
        state.advance(streams, steps=[discriminator_step])
        assert all(p.grad is None for p in network(state, "generator").parameters())
        state.prepared["discriminator"].optimizer.zero_grad()
        state.advance(streams, steps=[generator_step])
    assert all(p.grad is None for p in network(state, "discriminator").parameters())


def test_lazy_penalty_is_due_every_kth_step(make_config: MakeConfig) -> None:
    state, streams = make(make_config("objective.penalties=[{name: r1, weight: 1, every: 4}]"))
    assert state.objective.period == 4
    due = ["r1" in state.objective.steps(n)[0].terms for n in range(0, 40 * 8, 40)]
    assert due == [True, False, False, False] * 2
    with streams, torch.no_grad():
        inputs = inputs_of(state, step_of(state, "discriminator"), streams)
        plain = evaluate(state, "discriminator", inputs, ("adversarial",)).loss
        lazy, scalars, _ = evaluate(state, "discriminator", inputs, ("adversarial", "r1"))
    assert (lazy - plain).item() == pytest.approx(4 * scalars["r1"].item(), rel=1e-3)


def test_bf16_keeps_penalties_in_float32(make_config: MakeConfig) -> None:
    values = {}
    for precision in ("fp32", "bf16"):
        state, streams = make(make_config(R1, f"precision={precision}"))
        with streams:
            inputs = inputs_of(state, step_of(state, "discriminator"), streams)
        scalars = evaluate(state, "discriminator", inputs, ("adversarial", "r1")).scalars
        values[precision] = {k: v.item() for k, v in scalars.items()}
    assert values["bf16"]["r1"] == values["fp32"]["r1"]
    assert values["bf16"]["loss"] != values["fp32"]["loss"]
    assert values["bf16"]["loss"] == pytest.approx(values["fp32"]["loss"], abs=0.02)


def test_auto_is_eager_without_a_compiler_and_gives_the_reason() -> None:
    with mock.patch.object(compiling.shutil, "which", return_value=None):
        backend, reason = compile_backend("auto", torch.device("cpu"))
    assert backend is None
    assert "compiler" in reason
    assert compile_backend("eager", torch.device("cpu")) == (None, "")
    assert compile_backend("auto", torch.device("cuda")) == ("inductor", "")


def test_failing_compilation_falls_back_with_one_line(make_config: MakeConfig) -> None:
    lines: list[str] = []
    config = make_config("compile=aot_eager")
    runs = {}
    for broken in (True, False):
        engine = Engine(config if broken else make_config(), lines.append)
        if broken:

            def explode(*_: object) -> None:
                raise RuntimeError("no such backend here")

            engine._backend = explode  # type: ignore[assignment]
        state = TrainState(config, engine, TEN_CLASSES)
        state.prepare()
        with open_streams(state) as streams:
            state.advance(streams)
        runs[broken] = copies(state, "generator")
    failed = [line for line in lines if "eager mode for phase" in line]
    assert [line.split()[4].rstrip(":") for line in failed] == ["discriminator", "generator"]
    assert are_equal(runs[True], runs[False])


def test_learning_rate_warms_up(make_config: MakeConfig) -> None:
    warmup = ("optimizer.generator.warmup_images=160", "optimizer.discriminator.warmup_images=0")
    state, streams = make(make_config(*warmup))
    rates = []
    with streams:
        for _ in range(3):
            state.advance(streams)
            rates.append({n: p.optimizer.param_groups[0]["lr"] for n, p in state.prepared.items()})
    assert rates == [
        {"generator": pytest.approx(r), "discriminator": 1.6e-3} for r in (1e-4, 1.5e-4, 2e-4)
    ]


def test_ema_is_a_copy_until_its_start(make_config: MakeConfig) -> None:
    state, streams = make(make_config("ema.start_images=1000000"))
    with streams:
        state.advance(streams)
    average = [p.detach() for p in state.averages["generator"].parameters()]
    assert are_equal(average, copies(state, "generator"))
    assert state.averages["generator"].training is False
