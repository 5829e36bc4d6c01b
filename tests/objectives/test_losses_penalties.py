"""Losses against their equations, penalties against float64 finite differences."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bigan.objectives.losses import LOSSES
from bigan.objectives.penalties import PENALTIES, PenaltyBatch


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


REAL, FAKE = (2.0, -0.5), (0.25, -3.0)
EQUATIONS: dict[str, tuple[Callable[[float, float], float], Callable[..., float]]] = {
    "hinge": (lambda r, f: max(0, 1 - r) + max(0, 1 + f), lambda f: -f),
    "non_saturating": (
        lambda r, f: -math.log(sigmoid(r)) - math.log(1 - sigmoid(f)),
        lambda f: -math.log(sigmoid(f)),
    ),
    "least_squares": (
        lambda r, f: 0.5 * (r - 1) ** 2 + 0.5 * f**2,
        lambda f: 0.5 * (f - 1) ** 2,
    ),
    "wasserstein": (lambda r, f: f - r, lambda f: -f),
    "relativistic": (
        lambda r, f: -math.log(sigmoid(r - f)),
        lambda f, r: -math.log(sigmoid(f - r)),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_is_the_batch_mean_of_its_equation(name: str) -> None:
    of_d, of_g = EQUATIONS[name]
    real, fake = torch.tensor(REAL), torch.tensor(FAKE)
    expected_d = sum(of_d(r, f) for r, f in zip(REAL, FAKE, strict=True)) / 2
    assert LOSSES[name].discriminator(real, fake).item() == pytest.approx(expected_d, rel=1e-6)
    if LOSSES[name].relativistic:
        expected_g = sum(of_g(f, r) for r, f in zip(REAL, FAKE, strict=True)) / 2
        assert LOSSES[name].generator(real, fake).item() == pytest.approx(expected_g, rel=1e-6)
        return
    expected_g = sum(of_g(f) for f in FAKE) / 2
    assert LOSSES[name].generator(fake).item() == pytest.approx(expected_g, rel=1e-6)


class Critic(nn.Module):
    """A smooth conditional critic without normalization."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.head = nn.Linear(3, 1)
        self.classes = nn.Embedding(4, 3)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        h = torch.tanh(self.conv(x)).sum((2, 3))
        return self.head(h).squeeze(1) + (h * self.classes(labels)).sum(1)


def numeric_norms(critic: Critic, images: Tensor, labels: Tensor, step: float = 1e-6) -> Tensor:
    """||dD/dx||^2 per image by central differences."""
    gradient = torch.zeros_like(images)
    flat = gradient.view(-1)
    for i in range(images.numel()):
        shift = torch.zeros_like(images).view(-1)
        shift[i] = step
        shift = shift.view_as(images)
        with torch.no_grad():
            rise = critic(images + shift, labels) - critic(images - shift, labels)
        flat[i] = rise.sum() / (2 * step)
    return gradient.square().flatten(1).sum(1)


def reference(name: str, critic: Critic, batch: PenaltyBatch) -> Tensor:
    if name == "r1":
        return 0.5 * numeric_norms(critic, batch.real, batch.real_labels).mean()
    if name == "r2":
        return 0.5 * numeric_norms(critic, batch.fake, batch.fake_labels).mean()
    assert batch.mix is not None
    share, target = batch.mix.view(-1, 1, 1, 1), batch.target
    norms = numeric_norms(
        critic, share * batch.real + (1 - share) * batch.fake, batch.real_labels
    ).sqrt()
    return (norms - target).square().mean() / target**2


@pytest.mark.parametrize(
    ("name", "target"), [*((name, 1.0) for name in PENALTIES), ("wgan_gp", 0.2)]
)
def test_value_and_parameter_gradient(name: str, target: float) -> None:
    critic = Critic().double()
    generator = torch.Generator().manual_seed(1)
    real, fake = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64, generator=generator)
    batch = PenaltyBatch(
        real,
        torch.tensor([0, 1, 2]),
        fake,
        torch.tensor([3, 1, 0]),
        torch.rand(3, dtype=torch.float64, generator=generator),
        target,
    )
    value = PENALTIES[name](critic, batch)
    assert value.item() == pytest.approx(reference(name, critic, batch).item(), rel=1e-6)
    value.backward()
    for weight, index in ((critic.conv.weight, (1, 0, 2, 1)), (critic.head.weight, (0, 2))):
        step, values = 1e-5, []
        for sign in (1, -1):
            with torch.no_grad():
                weight[index] += sign * step
                values.append(reference(name, critic, batch).item())
                weight[index] -= sign * step
        numeric = (values[0] - values[1]) / (2 * step)
        assert weight.grad[index].item() == pytest.approx(numeric, rel=1e-4)


def test_wgan_gp_of_a_flat_critic_is_finite() -> None:
    critic = Critic()
    for parameter in critic.parameters():
        nn.init.zeros_(parameter)
    images, labels = torch.zeros(2, 2, 4, 4), torch.zeros(2, dtype=torch.int64)
    batch = PenaltyBatch(images, labels, images, labels, torch.rand(2))
    value = PENALTIES["wgan_gp"](critic, batch)
    value.backward()
    assert value.item() == pytest.approx(1.0, abs=1e-4)
    gradients = [p.grad for p in critic.parameters() if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(g).all() for g in gradients)
