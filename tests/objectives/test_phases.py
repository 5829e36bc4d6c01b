"""What a training step consists of: images, draws, phases in order, explicit buffer updates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from parts import make

from bigan import augment, checkpoint
from bigan.augment import discriminator_inputs
from bigan.layers.init import orthogonal_penalty
from bigan.layers.spectral import spectral_layers
from bigan.objectives.losses import LOSSES
from bigan.objectives.penalties import PENALTIES
from bigan.run.trainer import train
from bigan.run_config import RunConfig

Recipe = Callable[..., RunConfig]


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


def test_each_discriminator_step_takes_new_images_and_latents(recipe: Recipe) -> None:
    training, stream = make(recipe("train.num_d_steps=2"))
    taken = []

    class Watched:
        def __next__(self) -> object:
            batch = next(stream)
            taken.append(batch.positions.tolist())
            return batch

        def __iter__(self) -> Watched:
            return self

    with stream:
        training.step(Watched())  # type: ignore[arg-type]
    assert taken == [list(range(40)), list(range(40, 80))]
    assert training.progress.images_seen == 80
    first, second = (training.phases["d"].draws(n, 40)["z"] for n in (0, 40))
    assert not torch.equal(first, second)
    steps = {
        name: next(iter(training.optimizers[name].state.values()))["step"].item() for name in "dg"
    }
    assert steps == {"d": 2, "g": 1}


def test_singular_vectors_are_iterated_once_for_each_phase(recipe: Recipe) -> None:
    """Without the explicit iteration the estimate would stay at its first random value."""
    training, stream = make(recipe())
    layers = [layer for net in training.networks.values() for _, layer in spectral_layers(net)]
    before = [layer.u.clone() for layer in layers]
    with stream:
        for _ in range(20):
            training.step(stream)
    assert all(
        not torch.equal(layer.u, u) for layer, u in zip(layers, before, strict=True) if len(u) > 1
    )
    for network in (training.generator, training.discriminator):
        for name, layer in spectral_layers(network):
            exact = torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)
            estimate = layer.singular_value().detach()
            assert 0.8 < (estimate / exact).item() < 1.001, name


def test_orthogonal_regularisation_enters_the_generators_loss(recipe: Recipe) -> None:
    training, _ = make(recipe("train.orthogonal_weight=0.01"))
    (batch,) = training._micro_batches(
        training.phases["g"], training.phases["g"].terms(0), iter(())
    )
    with torch.no_grad():
        loss, scalars = training.phases["g"](training.discriminator, batch, ("adversarial",))
    expected = 0.01 * orthogonal_penalty(training.generator).item()
    assert scalars["orthogonal_g"].item() == pytest.approx(expected / 0.01)
    assert (loss - scalars["loss_g"]).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_phases_use_the_recipes_loss(recipe: Recipe, name: str) -> None:
    training, stream = make(recipe(f"loss={name}"))
    with stream, torch.no_grad():
        (batch,) = training._micro_batches(
            training.phases["d"], training.phases["d"].terms(0), stream
        )
        loss, scalars = training.phases["d"](training.generator, batch, ("adversarial",))
        # Images that are compared with each other are of the same class.
        labels = batch.labels if LOSSES[name].relativistic else batch.fake_labels
        fake = training.generator(batch.z, labels)
        logits_real = training.discriminator(
            discriminator_inputs.as_images(batch.real, None), batch.labels
        )
        logits_fake = training.discriminator(fake, labels)
    expected = LOSSES[name].discriminator(logits_real, logits_fake)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert scalars["logits_real"].item() == pytest.approx(logits_real.mean().item(), rel=1e-4)


def test_relativistic_generator_is_shown_the_discriminators_real_images(recipe: Recipe) -> None:
    training, stream = make(recipe("loss=relativistic", "data.mirror=true"))
    with stream:
        training.phase_step("d", stream)
    (seen,) = training._last["d"]
    with torch.no_grad():
        phase = training.phases["g"]
        (batch,) = training._micro_batches(phase, phase.terms(40), iter(()))
        loss, _ = phase(training.discriminator, batch, ("adversarial",))
        real = discriminator_inputs.as_images(seen.real, seen.mirror)
        logits_real = training.discriminator(real, seen.labels)
        fake = training.generator(batch.z, seen.labels)
        logits_fake = training.discriminator(fake, seen.labels)
        expected = torch.nn.functional.softplus(logits_real - logits_fake).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_draws_are_those_of_the_seed_alone(recipe: Recipe) -> None:
    one, two = (make(recipe("data.mirror=true", f"train.seed={s}"))[0] for s in (0, 1))
    draws = one.phases["d"].draws(80, 40)
    assert set(draws) == {"z", "fake_labels", "mirror"}
    assert 5 < draws["mirror"].sum() < 35
    assert torch.equal(draws["z"], one.phases["d"].draws(80, 40)["z"])
    assert not torch.equal(draws["z"], two.phases["d"].draws(80, 40)["z"])
    assert not torch.equal(draws["z"], one.phases["g"].draws(80, 40)["z"])


def test_same_seed_same_weights_other_seed_other_weights(recipe: Recipe) -> None:
    torch.manual_seed(1)
    first = make(recipe())[0].generator
    torch.manual_seed(2)
    again, other = make(recipe())[0].generator, make(recipe("train.seed=5"))[0].generator
    pairs = list(zip(first.parameters(), again.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert any(not torch.equal(a, c) for a, _, c in pairs)


def test_grid_shows_the_same_latents_each_time_one_row_per_class(recipe: Recipe) -> None:
    training, stream = make(recipe())
    training.collect_standing_statistics()
    grid = training.sample_grid()
    assert grid.shape == (100, 1, 16, 16)
    assert torch.equal(grid, training.sample_grid())
    assert training.grid_labels() == list(range(10))
    with stream:
        training.step(stream)
    assert not torch.equal(grid, training.sample_grid())


AUGMENT = ["{name: diffaugment}", "{name: ada, fixed: 0.7}"]


@pytest.mark.parametrize("kind", AUGMENT)
def test_discriminator_sees_all_images_augmented(recipe: Recipe, kind: str) -> None:
    """Real ones, fake ones and the generator's, each with draws of their own."""
    training, stream = make(recipe(f"augment={kind}", "loss=wasserstein"))
    config = training.config.augment

    def judge(images: torch.Tensor, draws: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen = augment.apply(config, images, draws, batch.strength)
        assert not torch.equal(seen, images)
        return training.discriminator(seen, labels).mean()

    with stream, torch.no_grad():
        (batch,) = training._micro_batches(
            training.phases["d"], training.phases["d"].terms(0), stream
        )
        _, scalars = training.phases["d"](training.generator, batch, ("adversarial",))
        real = judge(
            discriminator_inputs.as_images(batch.real, None), batch.augment_real, batch.labels
        )
        fake = training.generator(batch.z, batch.fake_labels)
        fake = judge(fake, batch.augment_fake, batch.fake_labels)
        (last,) = training._micro_batches(
            training.phases["g"], training.phases["g"].terms(0), stream
        )
        _, of_g = training.phases["g"](training.discriminator, last, ("adversarial",))
        again = training.generator(last.z, last.fake_labels)
        again = judge(again, last.augment_fake, last.fake_labels)
    assert scalars["logits_real"].item() == pytest.approx(real.item(), rel=1e-4)
    assert scalars["logits_fake"].item() == pytest.approx(fake.item(), rel=1e-4)
    assert of_g["loss_g"].item() == pytest.approx(-again.item(), rel=1e-4)
    draws = (batch.augment_real, batch.augment_fake, last.augment_fake)
    assert not any(torch.equal(a, b) for a, b in zip(draws, draws[1:] + draws[:1], strict=True))


@pytest.mark.parametrize("kind", AUGMENT)
@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_differentiate_by_the_images_before_augmentation(
    recipe: Recipe, name: str, kind: str
) -> None:
    penalties = f"penalties=[{{name: {name}, weight: 1.0}}]"
    training, stream = make(recipe(f"augment={kind}", penalties))
    with stream:
        (batch,) = training._micro_batches(
            training.phases["d"], training.phases["d"].terms(0), stream
        )
    _, scalars = training.phases["d"](training.generator, batch, ("adversarial", name))
    draws = batch.augment_fake if name == "r2" else batch.augment_real

    def network(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen = augment.apply(training.config.augment, images, draws, batch.strength)
        return training.discriminator(seen, labels)

    real, fake = (
        discriminator_inputs.as_images(batch.real, None),
        training.generator(batch.z, batch.fake_labels),
    )
    rest = (real, batch.labels, fake.detach(), batch.fake_labels, batch.mix)
    expected = PENALTIES[name](network, *rest).item()
    assert scalars[name].item() == pytest.approx(expected, rel=1e-4)
    unaugmented = PENALTIES[name](training.discriminator, *rest).item()
    assert expected != pytest.approx(unaugmented, rel=1e-3)


def test_strength_zero_trains_as_without_augmentation(recipe: Recipe) -> None:
    """Bit by bit, R1 included: nothing but the augmentation itself comes in."""
    states = []
    for kind in ("{name: none}", "{name: ada, fixed: 0.0}"):
        training, stream = make(recipe(f"augment={kind}", "penalties=[{name: r1, weight: 1.0}]"))
        with stream:
            for _ in range(2):
                training.step(stream)
        states.append(training.generator.state_dict() | training.discriminator.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize(("certainty", "expected"), [(100.0, 0.66), (-100.0, 0.34)])
def test_strength_grows_while_the_discriminator_is_sure_of_real_images(
    recipe: Recipe, certainty: float, expected: float
) -> None:
    """Two adaptations in four steps of 2 x 40 images, each by 160 / 2000."""
    ada = "augment={name: ada, initial: 0.5, rampup_images: 2000, every_images: 160}"
    training, stream = make(recipe(ada, "train.num_d_steps=2"))
    with torch.no_grad():
        training.discriminator.get_parameter("linear.bias").fill_(certainty)
    with stream:
        for _ in range(4):
            training.step(stream)
    means, _ = training.statistics.collect()
    assert means["sign_real"] == (1 if certainty > 0 else -1)
    assert training.networks["augment"].p.item() == pytest.approx(expected)


def test_fixed_strength_keeps_no_state_and_reports_nothing(recipe: Recipe) -> None:
    training, stream = make(recipe("augment={name: ada, fixed: 0.25}"))
    with stream:
        training.step(stream)
    means, _ = training.statistics.collect()
    assert not {"sign_real", "augment_p"} & set(means)
    assert set(training.networks) == {"g", "d", "ema"}
    assert training.strength is not None
    assert training.strength.p.item() == 0.25


def test_scheduled_strength_follows_the_images_seen_alone(recipe: Recipe) -> None:
    """R3GAN's: half a cosine from `fixed` to `fixed_end`; a run taken up again needs no state."""
    augmented = "augment={name: ada, fixed: 0.1, fixed_end: 0.5}"
    training, stream = make(recipe(augmented, "anneal_images=120"))
    seen = []
    with stream:
        for _ in range(5):
            training.step(stream)
            means, _ = training.statistics.collect()
            seen.append(means["augment_p"])
    assert seen == pytest.approx([0.1, 0.2, 0.4, 0.5, 0.5])
    assert set(training.networks) == {"g", "d", "ema"}
    assert training.strength is not None
    assert training.strength.p.item() == 0.5


def test_adaptive_strength_resumes_bitwise_within_an_interval(
    recipe: Recipe, tmp_path: Path
) -> None:
    """The strength and the signs counted so far are part of a checkpoint."""
    ada = "augment={name: ada, initial: 0.3, rampup_images: 1000, every_images: 120}"
    reports: dict[str, list[dict[str, float]]] = {}
    for run, lengths in (("whole", (400,)), ("parts", (200, 400))):
        for total in lengths:
            extra = (f"run_dir={tmp_path / run}", f"train.total_images={total}")
            config = recipe(ada, "train.tick_images=40", *extra)
            seen = reports.setdefault(run, [])
            assert train(config, lambda _: None, lambda _, r, seen=seen: seen.append(r)) == 0
    strengths = [[r["train/augment_p"] for r in reports[run]] for run in ("whole", "parts")]
    assert strengths[0] == strengths[1]
    steps = torch.tensor(strengths[0]).diff()
    assert steps.abs().max().item() == pytest.approx(0.12)
    assert [i for i, step in enumerate(steps.tolist()) if step] == [2, 5, 8]
    for run in ("whole", "parts"):
        assert all(-1 <= r["train/sign_real"] <= 1 for r in reports[run])
    part = "part-00000-of-00001.safetensors"
    whole, parts = (checkpoint.latest(tmp_path / run) for run in ("whole", "parts"))
    assert whole is not None
    assert parts is not None
    assert (whole / part).read_bytes() == (parts / part).read_bytes()
    assert b"networks/augment.signs" in (whole / part).read_bytes()
