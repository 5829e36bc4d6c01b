"""What a training step consists of: images, draws, phases in order, explicit buffer updates."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from parts import make
from phase_inputs import evaluate, inputs_of, network, step_of
from torch import Tensor

from bigan import augment, checkpoint
from bigan.augment import discriminator_inputs
from bigan.layers.init import orthogonal_penalty
from bigan.layers.spectral import power_iteration, spectral_layers
from bigan.objectives.losses import LOSSES
from bigan.objectives.penalties import PENALTIES, PenaltyBatch
from bigan.reporting import image_grids
from bigan.run import sample_grids
from bigan.run.standing_statistics import collect_standing_statistics
from bigan.run.trainer import train
from bigan.run_config import RunConfig

MakeConfig = Callable[..., RunConfig]


def test_images_are_scaled_and_mirrored() -> None:
    real = torch.tensor([0, 255, 127, 128], dtype=torch.uint8).view(1, 2, 2, 1).expand(2, 2, 2, 3)
    images = discriminator_inputs.as_images(real, torch.tensor([False, True]))
    assert images.shape == (2, 3, 2, 2)
    expected = torch.tensor([[-1, 1], [-1 / 255, 1 / 255]])
    torch.testing.assert_close(images[0, 0], expected)
    torch.testing.assert_close(images[1, 2], expected.flip(1))
    assert discriminator_inputs.as_images(real.contiguous(), None).is_contiguous(
        memory_format=torch.channels_last
    )


def test_each_discriminator_step_reads_new_images_and_latents(make_config: MakeConfig) -> None:
    state, streams = make(make_config("objective.discriminator_steps=2"))
    read = []

    class Watched:
        def __next__(self) -> object:
            batch = next(streams["images"])
            read.append(batch.positions.tolist())
            return batch

        def __iter__(self) -> Watched:
            return self

    with streams:
        state.advance({"images": Watched()})  # type: ignore[dict-item]
    assert read == [list(range(40)), list(range(40, 80))]
    assert state.progress.images_seen == 80
    phase = state.objective.phases["discriminator"]
    first, second = (phase.draws(n, 40, ("adversarial",))["z"] for n in (0, 40))
    assert not torch.equal(first, second)
    steps = {
        name: next(iter(prepared.optimizer.state.values()))["step"].item()
        for name, prepared in state.prepared.items()
    }
    assert steps == {"discriminator": 2, "generator": 1}


def test_singular_vectors_are_iterated_once_for_each_phase(make_config: MakeConfig) -> None:
    """Without the explicit iteration the estimate would stay at its first random value."""
    state, streams = make(make_config())
    layers = [layer for net in state.networks.values() for _, layer in spectral_layers(net)]
    before = [layer.u.clone() for layer in layers]
    with streams:
        for _ in range(20):
            state.advance(streams)
    assert all(
        not torch.equal(layer.u, u) for layer, u in zip(layers, before, strict=True) if len(u) > 1
    )
    for net in state.networks.values():
        for name, layer in spectral_layers(net):
            exact = torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)
            estimate = layer.singular_value().detach()
            assert 0.8 < (estimate / exact).item() < 1.001, name


@pytest.mark.parametrize(("settings", "num"), [([], 1), (["train.power_iterations=3"], 3)])
def test_power_iterations_of_an_optimizer_step(
    make_config: MakeConfig, settings: list[str], num: int
) -> None:
    """Of the trained network and of the one that the phase reads, before the step."""
    state, streams = make(make_config(*settings, "train.micro_batch=10"))
    expected = copy.deepcopy(state.networks)
    for copied in expected.values():
        for _ in range(num):
            power_iteration(copied)
    with streams:
        state.advance(streams, steps=state.objective.steps(0)[:1])
    for name, copied in expected.items():
        found = dict(spectral_layers(state.networks[name]))
        for key, layer in spectral_layers(copied):
            assert found[key].u.equal(layer.u), (name, key)
            assert found[key].v.equal(layer.v), (name, key)


def test_orthogonal_regularization_is_added_to_the_loss_of_the_generator(
    make_config: MakeConfig,
) -> None:
    state, _ = make(make_config("objective.orthogonal_weight=0.01"))
    inputs = inputs_of(state, step_of(state, "generator"))
    with torch.no_grad():
        loss, scalars, _ = evaluate(state, "generator", inputs, ("adversarial",))
    expected = 0.01 * orthogonal_penalty(network(state, "generator")).item()
    assert scalars["orthogonal"].item() == pytest.approx(expected / 0.01)
    assert (loss - scalars["loss"]).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_phases_use_the_loss_of_the_config(make_config: MakeConfig, name: str) -> None:
    state, streams = make(make_config(f"objective.loss={name}"))
    generator, discriminator = (network(state, n) for n in ("generator", "discriminator"))
    with streams, torch.no_grad():
        inputs = inputs_of(state, step_of(state, "discriminator"), streams)
        loss, scalars, _ = evaluate(state, "discriminator", inputs, ("adversarial",))
        # Images that are compared with each other are of the same class.
        real_labels = inputs["images.labels"]
        labels = real_labels if LOSSES[name].relativistic else inputs["labels"]
        fake = generator(inputs["z"], labels)
        real = discriminator_inputs.as_images(inputs["images.pixels"])
        logits_real, logits_fake = discriminator(real, real_labels), discriminator(fake, labels)
    expected = LOSSES[name].discriminator(logits_real, logits_fake)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert scalars["logits_real"].item() == pytest.approx(logits_real.mean().item(), rel=1e-4)


def test_drift_is_added_to_the_loss_of_the_discriminator(make_config: MakeConfig) -> None:
    state, streams = make(make_config("objective.drift_weight=0.5"))
    with streams, torch.no_grad():
        inputs = inputs_of(state, step_of(state, "discriminator"), streams)
        loss, scalars, _ = evaluate(state, "discriminator", inputs, ("adversarial",))
        real = discriminator_inputs.as_images(inputs["images.pixels"])
        logits_real = network(state, "discriminator")(real, inputs["images.labels"])
    drift = logits_real.square().mean().item()
    assert scalars["drift"].item() == pytest.approx(drift, rel=1e-4)
    assert (loss - scalars["loss"]).item() == pytest.approx(0.5 * drift, rel=1e-3)


def test_relativistic_generator_is_shown_the_real_images_of_the_discriminator(
    make_config: MakeConfig,
) -> None:
    state, streams = make(make_config("objective.loss=relativistic", "data.mirror=true"))
    step = step_of(state, "discriminator")
    with streams:
        state.advance(streams, steps=[step])
    seen = inputs_of(state, step)
    generator, discriminator = (network(state, n) for n in ("generator", "discriminator"))
    with torch.no_grad():
        inputs = inputs_of(state, step_of(state, "generator"))
        loss, _, _ = evaluate(state, "generator", inputs, ("adversarial",))
        labels = seen["images.labels"]
        real = discriminator_inputs.as_images(seen["images.pixels"], seen["images.mirror"])
        logits_fake = discriminator(generator(inputs["z"], labels), labels)
        expected = torch.nn.functional.softplus(discriminator(real, labels) - logits_fake).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_draws_are_a_function_of_the_seed(make_config: MakeConfig) -> None:
    one, two = (make(make_config(f"train.seed={s}"))[0].objective.phases for s in (0, 1))
    terms = ("adversarial",)
    draws = one["discriminator"].draws(80, 40, terms)
    assert set(draws) == {"z", "labels"}
    assert torch.equal(draws["z"], one["discriminator"].draws(80, 40, terms)["z"])
    assert not torch.equal(draws["z"], two["discriminator"].draws(80, 40, terms)["z"])
    assert not torch.equal(draws["z"], one["generator"].draws(80, 40, terms)["z"])


def test_images_are_mirrored_by_a_function_of_the_seed(make_config: MakeConfig) -> None:
    mirrored = []
    for seed in (0, 0, 1):
        state, streams = make(make_config("data.mirror=true", f"train.seed={seed}"))
        step = step_of(state, "discriminator")
        with streams:
            mirrored.append(inputs_of(state, step, streams)["images.mirror"])
            again = inputs_of(state, step._replace(at=40), streams)["images.mirror"]
        assert not torch.equal(again, mirrored[-1])
    assert 5 < mirrored[0].sum() < 35
    assert torch.equal(mirrored[0], mirrored[1])
    assert not torch.equal(mirrored[0], mirrored[2])


def test_same_seed_same_weights_other_seed_other_weights(make_config: MakeConfig) -> None:
    torch.manual_seed(1)
    first = network(make(make_config())[0], "generator")
    torch.manual_seed(2)
    again, other = (
        network(make(make_config(*seed))[0], "generator") for seed in ((), ("train.seed=5",))
    )
    pairs = list(zip(first.parameters(), again.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert any(not torch.equal(a, c) for a, _, c in pairs)


def test_grid_shows_the_same_latents_each_time_one_row_per_class(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    state, streams = make(make_config())
    collect_standing_statistics(state)
    saved: list[tuple[Tensor, dict[str, Any]]] = []

    def save_grid(path: Path, images: Tensor, **options: Any) -> None:
        saved.append((images, options))

    with mock.patch.object(image_grids, "save_grid", save_grid), streams:
        for _ in range(2):
            sample_grids.save(tmp_path / "0.png", state, state.objective.samplers["latent"], {})
        state.advance(streams)
        sample_grids.save(tmp_path / "40.png", state, state.objective.samplers["latent"], {})
    (grid, options), (again, _), (later, _) = saved
    assert grid.shape == (100, 1, 16, 16)
    assert options == {"columns": 10, "row_labels": [str(digit) for digit in range(10)]}
    assert torch.equal(grid, again)
    assert not torch.equal(grid, later)


AUGMENT = ["{name: diffaugment}", "{name: ada, fixed: 0.7}"]


@pytest.mark.parametrize("kind", AUGMENT)
def test_discriminator_sees_all_images_augmented(make_config: MakeConfig, kind: str) -> None:
    """Real and fake images and those of the generator's step, each with their own draws."""
    state, streams = make(make_config(f"augment={kind}", "objective.loss=wasserstein"))
    config = state.config.augment
    generator, discriminator = (network(state, n) for n in ("generator", "discriminator"))

    def judge(images: Tensor, draws: Tensor, labels: Tensor) -> float:
        seen = augment.apply(config, images, draws, inputs.get("strength"))
        assert not torch.equal(seen, images)
        logit: float = discriminator(seen, labels).mean().item()
        return logit

    with streams, torch.no_grad():
        inputs = inputs_of(state, step_of(state, "discriminator"), streams)
        scalars = evaluate(state, "discriminator", inputs, ("adversarial",)).scalars
        real = discriminator_inputs.as_images(inputs["images.pixels"])
        real_logit = judge(real, inputs["augment_real"], inputs["images.labels"])
        fake = generator(inputs["z"], inputs["labels"])
        fake_logit = judge(fake, inputs["augment_fake"], inputs["labels"])
        last = inputs_of(state, step_of(state, "generator"))
        generator_scalars = evaluate(state, "generator", last, ("adversarial",)).scalars
        fake = generator(last["z"], last["labels"])
        last_logit = judge(fake, last["augment_fake"], last["labels"])
    assert scalars["logits_real"].item() == pytest.approx(real_logit, rel=1e-4)
    assert scalars["logits_fake"].item() == pytest.approx(fake_logit, rel=1e-4)
    assert generator_scalars["loss"].item() == pytest.approx(-last_logit, rel=1e-4)
    draws = (inputs["augment_real"], inputs["augment_fake"], last["augment_fake"])
    assert not any(torch.equal(a, b) for a, b in zip(draws, draws[1:] + draws[:1], strict=True))


@pytest.mark.parametrize("kind", AUGMENT)
@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_differentiate_by_the_images_before_augmentation(
    make_config: MakeConfig, name: str, kind: str
) -> None:
    penalties = f"objective.penalties=[{{name: {name}, weight: 1.0}}]"
    state, streams = make(make_config(f"augment={kind}", penalties))
    step = step_of(state, "discriminator")
    assert step.terms == ("adversarial", name)
    with streams:
        inputs = inputs_of(state, step, streams)
    scalars = evaluate(state, "discriminator", inputs, step.terms).scalars
    draws = inputs["augment_fake" if name == "r2" else "augment_real"]
    generator, discriminator = (network(state, n) for n in ("generator", "discriminator"))

    def judge(images: Tensor, labels: Tensor) -> Tensor:
        seen = augment.apply(state.config.augment, images, draws, inputs.get("strength"))
        logits: Tensor = discriminator(seen, labels)
        return logits

    batch = PenaltyBatch(
        discriminator_inputs.as_images(inputs["images.pixels"]),
        inputs["images.labels"],
        generator(inputs["z"], inputs["labels"]).detach(),
        inputs["labels"],
        inputs.get("mix"),
    )
    expected = PENALTIES[name](judge, batch).item()
    assert scalars[name].item() == pytest.approx(expected, rel=1e-4)
    unaugmented = PENALTIES[name](discriminator, batch).item()
    assert expected != pytest.approx(unaugmented, rel=1e-3)


def test_strength_zero_trains_as_without_augmentation(make_config: MakeConfig) -> None:
    """Bitwise, R1 included: nothing but the augmentation itself is added."""
    states = []
    for kind in ("{name: none}", "{name: ada, fixed: 0.0}"):
        penalties = "objective.penalties=[{name: r1, weight: 1.0}]"
        state, streams = make(make_config(f"augment={kind}", penalties))
        with streams:
            for _ in range(2):
                state.advance(streams)
        states.append(
            {
                f"{n}.{k}": t
                for n, net in state.networks.items()
                for k, t in net.state_dict().items()
            }
        )
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize(("certainty", "expected"), [(100.0, 0.66), (-100.0, 0.34)])
def test_strength_grows_while_the_discriminator_is_sure_of_real_images(
    make_config: MakeConfig, certainty: float, expected: float
) -> None:
    """Two adaptations in four steps of 2 x 40 images, each by 160 / 2000."""
    ada = "augment={name: ada, initial: 0.5, rampup_images: 2000, every_images: 160}"
    state, streams = make(make_config(ada, "objective.discriminator_steps=2"))
    with torch.no_grad():
        network(state, "discriminator").get_parameter("linear.bias").fill_(certainty)
    with streams:
        for _ in range(4):
            state.advance(streams)
    means, _ = state.statistics.collect()
    assert means["train/discriminator/sign_real"] == (1 if certainty > 0 else -1)
    assert state.state["augment"].get_buffer("p").item() == pytest.approx(expected)


def test_fixed_strength_keeps_no_state_and_reports_nothing(make_config: MakeConfig) -> None:
    state, streams = make(make_config("augment={name: ada, fixed: 0.25}"))
    with streams:
        state.advance(streams)
    means, _ = state.statistics.collect()
    assert not {key.rpartition("/")[2] for key in means} & {"sign_real", "augment_p"}
    assert state.state == {}
    for phase in state.objective.phases.values():
        assert phase.values(40)["strength"].item() == 0.25


def test_scheduled_strength_is_a_function_of_images_seen(make_config: MakeConfig) -> None:
    """As of R3GAN: half a cosine from `fixed` to `fixed_end`; a resumed run needs no state."""
    augmented = "augment={name: ada, fixed: 0.1, fixed_end: 0.5}"
    state, streams = make(make_config(augmented, "anneal_images=120"))
    seen = []
    with streams:
        for _ in range(5):
            state.advance(streams)
            means, _ = state.statistics.collect()
            seen.append(means["train/discriminator/augment_p"])
    assert seen == pytest.approx([0.1, 0.2, 0.4, 0.5, 0.5])
    assert state.state == {}
    assert state.objective.phases["generator"].values(160)["strength"].item() == 0.5


def test_adaptive_strength_resumes_bitwise_within_an_interval(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """The strength and the signs counted so far are part of a checkpoint."""
    ada = "augment={name: ada, initial: 0.3, rampup_images: 1000, every_images: 120}"
    reports: dict[str, list[dict[str, float]]] = {}
    for run, lengths in (("straight", (400,)), ("parts", (200, 400))):
        for total in lengths:
            extra = (f"run_dir={tmp_path / run}", f"train.total_images={total}")
            config = make_config(ada, "train.tick_images=40", *extra)
            seen = reports.setdefault(run, [])
            assert train(config, lambda _: None, lambda _, r, seen=seen: seen.append(r)) == 0
    strengths = [
        [r["train/discriminator/augment_p"] for r in reports[run]] for run in ("straight", "parts")
    ]
    assert strengths[0] == strengths[1]
    steps = torch.tensor(strengths[0]).diff()
    assert steps.abs().max().item() == pytest.approx(0.12)
    assert [i for i, step in enumerate(steps.tolist()) if step] == [2, 5, 8]
    for run in ("straight", "parts"):
        assert all(-1 <= r["train/discriminator/sign_real"] <= 1 for r in reports[run])
    part = "part-00000-of-00001.safetensors"
    straight, parts = (checkpoint.latest(tmp_path / run) for run in ("straight", "parts"))
    assert straight is not None
    assert parts is not None
    assert (straight / part).read_bytes() == (parts / part).read_bytes()
    assert b"state/augment.signs" in (straight / part).read_bytes()
