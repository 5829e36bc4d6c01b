"""Layers against their formulas, torch's versions, and errors known from other code bases."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigan.layers import init
from bigan.layers.attention import SelfAttention
from bigan.layers.batchnorm import BatchNorm2d, ConditionalBatchNorm2d, collecting_statistics
from bigan.layers.spectral import (
    SNConv2d,
    SNEmbedding,
    SNLinear,
    SpectralNorm,
    power_iteration,
    singular_values,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def initialised(layer: nn.Module, scheme: str = "orthogonal", seed: int = 0) -> nn.Module:
    init.init_weights(layer, torch.Generator().manual_seed(seed), scheme)
    return layer


# --- spectral normalization ----------------------------------------------------------------------

PAIRS = {
    "linear": (lambda: SNLinear(7, 5), lambda: nn.Linear(7, 5), draw(4, 7)),
    "conv3": (lambda: SNConv2d(3, 6, 3), lambda: nn.Conv2d(3, 6, 3, padding=1), draw(2, 3, 5, 5)),
    "conv1": (lambda: SNConv2d(8, 4, 1), lambda: nn.Conv2d(8, 4, 1), draw(2, 8, 3, 3)),
    "embedding": (lambda: SNEmbedding(9, 4), lambda: nn.Embedding(9, 4), torch.tensor([0, 3, 3])),
}


@pytest.mark.parametrize("kind", list(PAIRS))
def test_after_a_power_iteration_equals_torch_spectral_norm_in_training(kind: str) -> None:
    make_ours, make_theirs, x = PAIRS[kind]
    ours, theirs = initialised(make_ours(), "normal"), make_theirs()
    with torch.no_grad():
        theirs.weight.copy_(ours.weight)
        if getattr(theirs, "bias", None) is not None:
            ours.bias.copy_(draw(ours.bias.numel(), seed=3))
            theirs.bias.copy_(ours.bias)
    nn.utils.parametrizations.spectral_norm(theirs, eps=1e-4)
    state = theirs.parametrizations.weight[0]
    ours.v.copy_(F.normalize(draw(ours.v.numel(), seed=1), dim=0))
    state._v.copy_(ours.v)
    state._u.copy_(ours.u)

    for _ in range(2):
        power_iteration(ours)
        expected, found = theirs(x), ours(x)  # torch iterates in its training forward
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        w = draw(*expected.shape, seed=2)
        (found_gradient,) = torch.autograd.grad((found * w).sum(), ours.weight)
        (gradient,) = torch.autograd.grad(
            (expected * w).sum(), theirs.parametrizations.weight.original
        )
        torch.testing.assert_close(found_gradient, gradient, rtol=1e-4, atol=1e-5)


def test_power_iterations_find_the_largest_singular_value_of_every_layer() -> None:
    network = nn.Sequential(SNLinear(6, 4), nn.ReLU(), nn.Sequential(SNConv2d(2, 5, 3)))
    initialised(network, "normal")
    for _ in range(200):
        power_iteration(network)
    found = singular_values(network)
    assert list(found) == ["0", "2.0"]
    for name, value in found.items():
        rows = network.get_submodule(name).weight.flatten(1)
        torch.testing.assert_close(value, torch.linalg.matrix_norm(rows, 2), rtol=1e-4, atol=0)
        assert value.ndim == 0
        assert not value.requires_grad


def test_the_epsilon_bounds_the_norm_divided_by() -> None:
    layer = initialised(SNLinear(3, 3, eps=1e-4))
    with torch.no_grad():
        layer.weight.zero_().fill_diagonal_(1e-6)
    layer.iterate()
    assert layer.u.norm() < 0.02  # 1e-6 / 1e-4
    power_iteration(layer, eps=1e-12)
    torch.testing.assert_close(layer.u.norm(), torch.tensor(1.0))


def test_spectral_norm_is_not_rounded_by_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU autocast does not round torch.mv as CUDA's does, so the autocast state is checked."""
    layer = initialised(SNLinear(64, 64), "normal")
    product, seen = torch.mv, []

    def watched(*args: Tensor) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return product(*args)

    monkeypatch.setattr(torch, "mv", watched)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.normalized_weight().dtype == torch.float32
        layer.iterate()
    assert seen == [False] * 3


# --- batch normalization -------------------------------------------------------------------------


def test_conditional_gain_is_one_plus_linear_of_the_condition() -> None:
    layer = initialised(ConditionalBatchNorm2d(6, 4))
    x, cond = 3 * draw(5, 6, 4, 4) + 1, draw(5, 4, seed=1)
    y = F.batch_norm(x, None, None, training=True, eps=1e-4)
    torch.testing.assert_close(layer(x, torch.zeros(5, 4)), y)  # gain 1, bias 0
    gain = 1 + cond @ layer.gain.normalized_weight().t()
    bias = cond @ layer.bias.normalized_weight().t()
    expected = y * gain[:, :, None, None] + bias[:, :, None, None]
    torch.testing.assert_close(layer(x, cond), expected)
    assert layer.gain.bias is None
    assert layer.bias.bias is None


@pytest.mark.parametrize("affine", [True, False])
def test_plain_batchnorm_equals_torch(affine: bool) -> None:
    ours, theirs = BatchNorm2d(4, eps=1e-5, affine=affine), nn.BatchNorm2d(4, affine=affine)
    if affine:
        with torch.no_grad():
            for p in (ours, theirs):
                p.weight.copy_(draw(4, seed=1))
                p.bias.copy_(draw(4, seed=2))
    x = 2 * draw(6, 4, 3, 3) - 1
    torch.testing.assert_close(ours(x), theirs(x))
    ours.standing_mean.copy_(draw(4, seed=3))
    ours.standing_var.copy_(draw(4, seed=4).square())
    theirs.running_mean.copy_(ours.standing_mean)
    theirs.running_var.copy_(ours.standing_var)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_statistics_are_float32_for_bfloat16_input() -> None:
    x = (1000 + draw(64, 2, 8, 8)).bfloat16()
    found = BatchNorm2d(2)(x)
    assert found.dtype == torch.bfloat16
    expected = F.batch_norm(x.float(), None, None, training=True, eps=1e-4)
    torch.testing.assert_close(found, expected.bfloat16())


def test_training_forward_does_not_change_standing_statistics() -> None:
    layer = BatchNorm2d(3)
    layer(draw(4, 3, 2, 2) + 5)
    assert torch.equal(layer.standing_mean, torch.zeros(3))
    assert torch.equal(layer.standing_var, torch.ones(3))


def test_standing_statistics_are_those_of_all_batches_pooled() -> None:
    network = nn.Sequential(BatchNorm2d(3)).eval()
    batches = [5 * draw(n, 3, 4, 4, seed=n) + 100 * n for n in (2, 3, 7)]
    with collecting_statistics(network):
        for batch in batches:
            assert not network(batch).requires_grad
    assert not network.training
    var, mean = torch.var_mean(torch.cat(batches).double(), dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(network[0].standing_mean, mean.float())
    torch.testing.assert_close(network[0].standing_var, var.float())
    before = network[0].standing_mean.clone()
    network.train()(batches[0])  # not collected outside of the context
    assert torch.equal(network[0].standing_mean, before)


def test_standing_statistics_are_kept_on_an_error_and_need_a_forward() -> None:
    layer = BatchNorm2d(2)
    broken = nn.Sequential(layer, nn.Linear(3, 3))
    with pytest.raises(RuntimeError, match="shapes"), collecting_statistics(broken):
        broken(draw(4, 2, 2, 2) + 9)
    assert torch.equal(layer.standing_mean, torch.zeros(2))
    assert not layer._forward_pre_hooks
    with pytest.raises(RuntimeError, match="no eager forward"), collecting_statistics(layer):
        pass


def test_standing_statistics_reduce_once_in_float64() -> None:
    network = nn.Sequential(BatchNorm2d(2), BatchNorm2d(2))
    calls: list[Tensor] = []
    with collecting_statistics(network, reduce=calls.append):
        network(draw(4, 2, 2, 2))
    assert [call.dtype for call in calls] == [torch.float64]


# --- attention -----------------------------------------------------------------------------------


def test_attention_is_initially_the_identity() -> None:
    layer = initialised(SelfAttention(16))
    x = draw(2, 16, 4, 4)
    assert torch.equal(layer(x), x)


def test_attention_equals_the_formula_position_by_position() -> None:
    layer = initialised(SelfAttention(16), "normal")
    with torch.no_grad():
        layer.gamma.fill_(0.7)
    x = draw(1, 16, 4, 6)
    theta, phi, g, output = (
        part.normalized_weight()[:, :, 0, 0]
        for part in (layer.theta, layer.phi, layer.g, layer.output)
    )
    assert [tuple(w.shape) for w in (theta, phi, g, output)] == [(2, 16), (2, 16), (8, 16), (16, 8)]
    keys, values = [], []
    for i in range(0, 4, 2):
        for j in range(0, 6, 2):
            window = x[0, :, i : i + 2, j : j + 2].flatten(1)
            keys.append((phi @ window).amax(1))
            values.append((g @ window).amax(1))
    expected = x.clone()
    for i in range(4):
        for j in range(6):
            query = theta @ x[0, :, i, j]
            weights = torch.softmax(torch.stack([query @ key for key in keys]), dim=0)
            mixed = sum(w * v for w, v in zip(weights, values, strict=True))
            expected[0, :, i, j] += 0.7 * (output @ mixed)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_attention_needs_a_multiple_of_eight_channels() -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        SelfAttention(12)


# --- initial values and regularisation -----------------------------------------------------------


def everything() -> nn.Module:
    return nn.ModuleDict(
        {
            "conv": SNConv2d(3, 8, 3),
            "linear": SNLinear(5, 4),
            "embedding": SNEmbedding(6, 3),
            "shared": nn.Embedding(6, 3),
            "bn": BatchNorm2d(4),
            "cbn": ConditionalBatchNorm2d(4, 3),
            "attention": SelfAttention(8),
        }
    )


@pytest.mark.parametrize("scheme", ["orthogonal", "normal"])
def test_init_weights_sets_everything_from_the_generator_alone(scheme: str) -> None:
    networks = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        network = everything()
        for tensor in network.state_dict().values():
            tensor.fill_(torch.nan)
        networks.append(initialised(network, scheme))
    first, second = (network.state_dict() for network in networks)
    for name in first:
        assert torch.equal(first[name], second[name]), name
        assert first[name].isfinite().all(), name
    other = initialised(everything(), scheme, seed=1).state_dict()
    assert not torch.equal(first["conv.weight"], other["conv.weight"])
    assert not torch.equal(first["shared.weight"], other["shared.weight"])


def test_orthogonal_weights_have_orthonormal_rows_or_columns() -> None:
    network = initialised(everything())
    for part in ("conv", "linear", "embedding", "shared"):
        rows = network[part].weight.flatten(1)
        gram = rows @ rows.t() if rows.shape[0] <= rows.shape[1] else rows.t() @ rows
        torch.testing.assert_close(gram, torch.eye(len(gram)), rtol=0, atol=1e-5)
    for name, module in network.named_modules():
        if isinstance(module, SpectralNorm):
            torch.testing.assert_close(module.singular_value(), torch.tensor(1.0), msg=name)


def test_normal_weights_have_the_deviation_of_the_scheme() -> None:
    layer = initialised(SNLinear(200, 200), "normal")
    assert abs(layer.weight.std().item() - 0.02) < 5e-4
    assert abs(layer.weight.mean().item()) < 5e-4


def test_orthogonal_penalty_equals_equation_3() -> None:
    network = initialised(everything(), "normal")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(30).add_(0.1)
    expected = torch.zeros((), dtype=torch.float64)
    for name, parameter in network.named_parameters():
        if parameter.ndim >= 2 and name != "shared.weight":
            w = parameter.detach().double().flatten(1).t()  # the paper's: one filter per column
            expected += ((w.t() @ w) * (1 - torch.eye(w.shape[1]))).norm().square()
    found = init.orthogonal_penalty(network)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    with_shared = init.orthogonal_penalty(network, skip=())
    assert with_shared > found * 1.001


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
def test_orthogonal_penalty_has_twice_the_gradient_of_the_published_code(
    shape: tuple[int, int],
) -> None:
    layer = SNLinear(shape[1], shape[0])
    with torch.no_grad():
        layer.weight.copy_(draw(*shape))
    (gradient,) = torch.autograd.grad(init.orthogonal_penalty(layer), layer.weight)
    w = layer.weight.detach()
    published = 2 * ((w @ w.t()) * (1 - torch.eye(len(w)))) @ w
    torch.testing.assert_close(gradient, 2 * published, rtol=1e-4, atol=1e-4)


def test_layers_can_be_copied() -> None:
    network = initialised(everything())
    clone = copy.deepcopy(network)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, clone.state_dict()[name])
