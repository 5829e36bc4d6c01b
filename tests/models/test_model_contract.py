"""What holds for the networks of every family. The configs under test are in `families.py`."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, Values, make, members, sizes, small
from network_parts import R1, batch, built, inputs, networks, trained
from torch import Tensor, nn

from bigan import models
from bigan.config import ConfigError
from bigan.image_size import check_doublings, plain, shown, sides
from bigan.layers.batchnorm import collecting_statistics, normalization_layers
from bigan.layers.mapping import has_latent_average
from bigan.models import AnyModel

# (family, changes to its small config), then the same with the name of each of its networks.
CONFIGS = [
    pytest.param(name, changes, id=f"{name}-{variant}" if variant else name)
    for name, family in FAMILIES.items()
    for variant, changes in {"": {}, **family.variants}.items()
]
NETWORKS = [
    pytest.param(*param.values, kind, id=f"{param.id}-{kind}")
    for param in CONFIGS
    for kind in members()[param.values[0]].networks
]
DISCRIMINATORS = [param for param in NETWORKS if param.values[2] == "discriminator"]
SMALL_NETWORKS = [(name, kind) for name in FAMILIES for kind in members()[name].networks]
NORMALISED = [name for name in FAMILIES if normalization_layers(built(small(name), "meta")[0])]


def initialised(config: AnyModel, kind: str) -> Any:
    """One network of `config`, with no parameter at a neutral value."""
    return trained(networks(config)[config.networks.index(kind)])


def outputs(found: Any) -> tuple[Tensor, ...]:
    """The tensors that a network returns."""
    return found if isinstance(found, tuple) else (found,)


def module_under_test(config: AnyModel, kind: str) -> nn.Module:
    """The network, or the penalty of a discriminator."""
    network = initialised(config, kind)
    return R1(network) if kind == "discriminator" else network


def scalar(found: Any) -> Tensor:
    """A loss that depends on every output, with different weights."""
    weighted = [y * torch.linspace(1, 2, y.numel()).view_as(y) for y in outputs(found)]
    return torch.stack([y.sum() for y in weighted]).sum()


def test_every_family_is_tested() -> None:
    assert FAMILIES.keys() == members().keys()


# --- shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values", "counts"),
    [
        pytest.param(name, *entry, id=f"{name}-{which}")
        for name, family in FAMILIES.items()
        for which, entry in family.counts.items()
    ],
)
def test_parameter_counts_are_the_published_ones(
    name: str, values: Values, counts: tuple[int, ...]
) -> None:
    pair = built(make(name, values), "meta")
    assert tuple(sum(p.numel() for p in network.parameters()) for network in pair) == counts


def check_shapes(config: AnyModel) -> None:
    """Each network runs on the meta device and returns what its kind returns."""
    images = (4, config.image_channels, *sides(config.resolution))
    latents = (4, config.z_dim)
    expected = {
        "generator": [images], "discriminator": [(4,)],
        "encoder": [latents, latents], "decoder": [images],
    }  # fmt: skip
    built_networks = models.build(config, "meta")
    assert tuple(built_networks) == config.networks
    labels = torch.empty(4, dtype=torch.int64, device="meta")
    for name, network in built_networks.items():
        x = torch.empty(latents if name in ("generator", "decoder") else images, device="meta")
        found = network(x, labels)
        assert [y.shape for y in outputs(found)] == expected[name]
        assert all(y.dtype == torch.float32 for y in outputs(found))


@pytest.mark.parametrize(
    ("name", "resolution", "nominal"),
    [
        pytest.param(name, plain(size), nominal, id=f"{name}-{shown(size)}")
        for name in FAMILIES
        for size, nominal in sizes(name)
    ],
)
def test_every_resolution_runs_on_the_meta_device(
    name: str, resolution: int | list[int], nominal: int
) -> None:
    config = make(name, FAMILIES[name].full(nominal) | {"resolution": resolution})
    assert plain(config.resolution) == resolution
    assert config.nominal_resolution == nominal
    assert {config.height % config.base[0], config.width % config.base[1]} == {0}
    check_shapes(config)


@pytest.mark.parametrize("name", FAMILIES)
def test_other_bases_change_only_the_first_and_the_last_layers(name: str) -> None:
    """320 x 192 is the published network of 128 px with maps of 6 x 10 instead of 4 x 4."""
    full = FAMILIES[name].full(128)
    published = models.build(make(name, full | {"resolution": 128}), "meta")
    other = models.build(make(name, full | {"resolution": [192, 320]}), "meta")
    for kind, network in published.items():
        shapes = {key: tensor.shape for key, tensor in other[kind].state_dict().items()}
        assert shapes.keys() == network.state_dict().keys()
        changed = [
            key for key, t in network.named_parameters() if shapes[key] != t.shape
        ]  # fmt: skip
        assert len(changed) <= 2, changed
        for key in changed:
            assert shapes[key].numel() * 16 == network.state_dict()[key].numel() * 60


@pytest.mark.parametrize(
    ("name", "resolution", "nearest"),
    [
        ("biggan", 50, (48, 52)), ("biggan", 8, (16, 20)), ("biggan", 1024, (960, 1088)),
        ("progan", 100, (96, 104)), ("stylegan2", 3, (4, 5)), ("autoencoder", 2048, (1920, 2176)),
        ("stylegan2", [720, 1280], ([704, 1280], [768, 1280])),
        ("r3gan", [4, 64], ([4, 20], [8, 40])),
    ],
)  # fmt: skip
def test_the_message_of_an_impossible_size_has_possible_ones(
    name: str, resolution: object, nearest: tuple[Any, Any]
) -> None:
    with pytest.raises(ConfigError, match="resolution = ") as caught:
        small(name, resolution=resolution)
    found = re.findall(r"\[.*?\]|\d+", str(caught.value).rpartition("nearest sizes are")[2])
    assert {json.dumps(size) for size in nearest} == set(found)
    for size in nearest:
        check_doublings(size if isinstance(size, int) else tuple(size), *members()[name].doublings)


@pytest.mark.parametrize("value", ["64", 0, -8, True, [16], [16, 0], [16, 16, 3], [16.5, 16]])
def test_a_resolution_is_one_or_two_positive_integers(value: object) -> None:
    with pytest.raises(ConfigError, match=r"resolution.*number of pixels, or .height, width"):
        small("biggan", resolution=value)
    assert small("biggan", resolution=[16, 16]) == small("biggan")


@pytest.mark.parametrize(
    ("name", "changes"), [(n, c) for n, family in FAMILIES.items() for c in family.narrowest]
)
def test_the_narrowest_networks_run(name: str, changes: Values) -> None:
    """The configs that the messages of refused widths propose."""
    check_shapes(small(name, **changes))


@pytest.mark.parametrize(("name", "changes"), CONFIGS)
def test_declared_capabilities_are_those_of_the_networks(name: str, changes: Values) -> None:
    config = small(name, **changes)
    pair = networks(config)
    grows = [any(key == "alpha" for key, _ in network.named_buffers()) for network in pair]
    assert all(grows) == any(grows) == config.can_grow
    if config.can_grow:
        assert {network.alpha.item() for network in pair} == {0.0 if config.is_fading else 1.0}
    else:
        assert not config.is_fading
    assert has_latent_average(pair[0]) == (config.latent_space == "w")
    for network, kind in zip(pair, config.networks, strict=True):
        x, labels = inputs(config, kind)
        others = (labels + 1) % config.num_classes
        same = map(torch.equal, outputs(network(x, labels)), outputs(network(x, others)))
        assert all(same) != config.is_conditional, kind
        # FSDP2 does not shard scalars; the engine averages those of attention layers itself.
        assert all(p.ndim or key.endswith("gamma") for key, p in network.named_parameters())


# --- initial values ------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), SMALL_NETWORKS)
def test_initial_weights_are_a_function_of_the_generator(name: str, kind: str) -> None:
    states = []
    for global_seed, seed in ((3, 0), (4, 0), (4, 1)):
        torch.manual_seed(global_seed)
        network = models.build(small(name), "meta")[kind].to_empty(device="cpu")
        for tensor in [*network.parameters(), *network.buffers()]:
            tensor.data.fill_(torch.nan)
        before = torch.get_rng_state()
        network.init_weights(torch.Generator().manual_seed(seed))
        assert torch.equal(torch.get_rng_state(), before)
        states.append(network.state_dict())
    for key, tensor in states[0].items():
        assert torch.equal(tensor, states[1][key]), key
        if tensor.ndim >= 2 and tensor.any():
            assert not torch.equal(tensor, states[2][key]), key


# --- purity --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "changes", "kind"), NETWORKS)
def test_forward_is_pure(name: str, changes: Values, kind: str) -> None:
    """Equal inputs give equal outputs; nothing is drawn and nothing is written."""
    config = small(name, **changes)
    network = initialised(config, kind)
    x, labels = inputs(config, kind)
    tensors = [*network.parameters(), *network.buffers(), x, labels]
    before = [tensor.clone() for tensor in tensors]
    versions = [tensor._version for tensor in tensors]
    state = torch.get_rng_state()
    first, second = outputs(network(x, labels)), outputs(network(x, labels))
    assert all(map(torch.equal, first, second))
    scalar(first).backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, tensors, before))
    assert [tensor._version for tensor in tensors] == versions


@pytest.mark.parametrize(("name", "changes", "kind"), NETWORKS)
def test_images_do_not_depend_on_the_rest_of_the_batch(
    name: str, changes: Values, kind: str
) -> None:
    """Beyond a discriminator's group; training statistics of BatchNorm are of the batch."""
    config = small(name, **changes)
    network = initialised(config, kind)
    x, labels = inputs(config, kind)
    group = config.group if kind == "discriminator" else 1
    for training in (False, True):
        network.train(training)
        if training and normalization_layers(network):
            continue
        together = outputs(network(x, labels))
        apart = outputs(network(x[:group], labels[:group]))
        for one, all_of_them in zip(apart, together, strict=True):
            torch.testing.assert_close(one, all_of_them[:group], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NORMALISED)
def test_standing_statistics_reproduce_their_batch(name: str) -> None:
    """Evaluation gives what training gave for the batch that the statistics are of."""
    config = small(name)
    network = initialised(config, config.networks[0])
    z, labels, _ = batch(config, 64)
    with collecting_statistics(network):
        expected = network(z, labels)
    assert all((layer.standing_var != 1).all() for layer in normalization_layers(network))
    network.eval()
    torch.testing.assert_close(network(z, labels), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(network(z[:3], labels[:3]), expected[:3], rtol=1e-3, atol=1e-4)


# --- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "changes", "kind"), NETWORKS)
def test_gradients_equal_finite_differences(name: str, changes: Values, kind: str) -> None:
    """Of every parameter; of a discriminator through a penalty, in float64."""
    config = small(name, **changes)
    module = module_under_test(config, kind).double()
    x, labels = inputs(config, kind, 4)
    x = x.double()

    def loss() -> Tensor:
        return scalar(module(x, labels))

    parameters = dict(module.named_parameters())
    gradients = torch.autograd.grad(loss(), list(parameters.values()))
    draw = torch.Generator().manual_seed(5)
    step = 1e-8  # so small that no unit crosses the kink of its activation
    terms = sum(2 * y.abs().sum().item() for y in outputs(module(x, labels)))
    rounding = terms * 1e-16 / step
    for (key, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        original = parameter.detach().clone()
        towards = torch.randn(original.shape, generator=draw, dtype=torch.float64)
        losses = []
        for sign in (step, -step):
            parameter.data = original + sign * towards
            losses.append(loss().item())
        parameter.data = original
        slope = (losses[0] - losses[1]) / (2 * step)
        expected = (gradient * towards).sum().item()
        assert expected != 0, key
        assert slope == pytest.approx(expected, rel=1e-4, abs=1e-7 * abs(losses[0]) + rounding), key


@pytest.mark.parametrize(("name", "changes", "kind"), DISCRIMINATORS)
def test_func_grad_through_a_discriminator_equals_autograd(
    name: str, changes: Values, kind: str
) -> None:
    config = small(name, **changes)
    discriminator = initialised(config, kind).double()
    _, labels, images = batch(config)
    images = images.double()
    parameters = list(discriminator.parameters())
    loss = R1(discriminator)(images, labels)
    x = images.clone().requires_grad_()
    logits = discriminator(x, labels)
    (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    expected = gradient.square().flatten(1).sum(1).mean() + F.softplus(-logits).mean()
    torch.testing.assert_close(loss, expected)
    pairs = zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters),
        strict=True,
    )  # fmt: skip
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted)


# --- compilation and precision -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "changes"),
    [
        *((name, kind, FAMILIES[name].shallow) for name, kind in SMALL_NETWORKS),
        ("stylegan2", "generator", FAMILIES["stylegan2"].variants["wide"]),
        ("r3gan", "discriminator", FAMILIES["r3gan"].variants["upright"]),
    ],
)
def test_one_full_graph_equals_eager(name: str, kind: str, changes: Values) -> None:
    """With its gradients, and for every `alpha` of a network that fades in."""
    config = small(name, **changes)
    module, batch = module_under_test(config, kind), inputs(config, kind)
    alphas = [buffer for key, buffer in module.named_buffers() if key.endswith("alpha")]
    torch.compiler.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for alpha in (0.0, 0.3, 1.0) if alphas else (None,):
            for buffer in alphas:
                buffer.fill_(alpha)
            results = []
            for call in (module, compiled):
                found = outputs(call(*batch))
                gradients = torch.autograd.grad(
                    sum(y.square().sum() for y in found), list(module.parameters())
                )
                results.append([*found, *gradients])
            for eager, graph in zip(*results, strict=True):
                assert eager.any() or alpha in (0.0, 1.0)
                torch.testing.assert_close(graph, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "changes", "kind"), NETWORKS)
def test_channels_last_and_float64_stay_close(name: str, changes: Values, kind: str) -> None:
    config = small(name, **changes)
    network = initialised(config, kind)
    x, labels = inputs(config, kind)
    expected = outputs(network(x, labels))
    last = copy.deepcopy(network).to(memory_format=torch.channels_last)
    x_last = x.to(memory_format=torch.channels_last) if x.ndim == 4 else x
    for found, wanted in zip(outputs(last(x_last, labels)), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    double = outputs(copy.deepcopy(network).double()(x.double(), labels))
    for found, wanted in zip(double, expected, strict=True):
        assert found.dtype == torch.float64
        torch.testing.assert_close(found.float(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)], ids=["bf16", "fp16"]
)
@pytest.mark.parametrize(("name", "changes", "kind"), NETWORKS)
def test_half_precision_stays_close(
    name: str, changes: Values, kind: str, dtype: torch.dtype, tolerance: float
) -> None:
    """Root mean square of the difference, relative to the output's; gradients are finite."""
    config = small(name, **changes)
    network = initialised(config, kind)
    x, labels = inputs(config, kind)
    expected = outputs(network(x, labels))
    with torch.autocast("cpu", dtype):
        found = tuple(low.float() for low in outputs(network(x, labels)))
        penalty = R1(network)(x, labels) if kind == "discriminator" else 0
    for low, wanted in zip(found, expected, strict=True):
        assert (low - wanted).norm() < tolerance * wanted.norm()
    (penalty + scalar(found)).backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())


# --- configuration -------------------------------------------------------------------------------

ALWAYS_WRONG: tuple[tuple[Values, str], ...] = (
    ({"resolution": 50}, "resolution = 50"),
    ({"image_channels": 5}, "image_channels = 5"),
    ({"num_classes": 0}, "num_classes = 0"),
    ({"z_dim": 0}, "z_dim = 0"),
    ({"z_dims": 8}, "z_dims = 8: unknown key; did you mean 'z_dim'"),
)


@pytest.mark.parametrize(
    ("name", "changes", "pattern"),
    [(n, *e) for n, family in FAMILIES.items() for e in (*ALWAYS_WRONG, *family.errors)],
)
def test_a_wrong_config_is_refused_in_one_line(name: str, changes: Values, pattern: str) -> None:
    with pytest.raises(ConfigError, match=pattern) as caught:
        small(name, **changes)
    assert "\n" not in str(caught.value)
