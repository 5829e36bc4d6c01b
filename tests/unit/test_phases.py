"""What a training step consists of: images, draws, phases in order, explicit buffer updates."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from parts import make

from bigan import phases
from bigan.layers.init import orthogonal_penalty
from bigan.layers.spectral import spectral_layers
from bigan.losses import LOSSES
from bigan.recipe import RunConfig

Recipe = Callable[..., RunConfig]


def test_images_are_scaled_and_mirrored() -> None:
    real = torch.tensor([0, 255, 127, 128], dtype=torch.uint8).view(1, 2, 2, 1).expand(2, 2, 2, 3)
    images = phases.as_images(real, torch.tensor([False, True]))
    assert images.shape == (2, 3, 2, 2)
    expected = torch.tensor([[-1, 1], [-1 / 255, 1 / 255]])
    torch.testing.assert_close(images[0, 0], expected)
    torch.testing.assert_close(images[1, 2], expected.flip(1))
    assert phases.as_images(real.contiguous(), None).is_contiguous(
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
    (batch,) = training._micro_batches(training.phases["g"], iter(()))
    with torch.no_grad():
        loss, scalars = training.phases["g"](training.discriminator, batch, ())
    expected = 0.01 * orthogonal_penalty(training.generator).item()
    assert scalars["orthogonal_g"].item() == pytest.approx(expected / 0.01)
    assert (loss - scalars["loss_g"]).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_phases_use_the_recipes_loss(recipe: Recipe, name: str) -> None:
    training, stream = make(recipe(f"loss={name}"))
    with stream, torch.no_grad():
        (batch,) = training._micro_batches(training.phases["d"], stream)
        loss, scalars = training.phases["d"](training.generator, batch, ())
        fake = training.generator(batch.z, batch.fake_labels)
        logits_real = training.discriminator(phases.as_images(batch.real, None), batch.labels)
        logits_fake = training.discriminator(fake, batch.fake_labels)
    expected = LOSSES[name].discriminator(logits_real, logits_fake)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert scalars["logits_real"].item() == pytest.approx(logits_real.mean().item(), rel=1e-4)


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
