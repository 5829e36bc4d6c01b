"""What holds for every objective: one entry in `CONFIGS` for each kind of training step."""

from __future__ import annotations

import copy
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import TEN_CLASSES
from parts import make
from phase_inputs import evaluate, parameters_of
from short_runs import advance, differing, resume, save, tensors
from torch import Tensor, nn
from torch._dynamo.utils import counters

from bigan import config as configs
from bigan.checkpoint import snapshots
from bigan.config import ConfigError
from bigan.data.streaming.dataset import open_level
from bigan.data.streaming.stream import sequential
from bigan.distributed.world import World
from bigan.engine import Engine
from bigan.objectives import AnyObjective
from bigan.objectives.base import Result, Step, Tensors, variants
from bigan.run.artifacts import Artifacts
from bigan.run.inputs import rows_in_order, taken
from bigan.run.state import TrainState
from bigan.run.streams import open_streams
from bigan.run_config import RunConfig

BATCH = 8
IMAGES = {"resolution": 16, "num_classes": 10, "image_channels": 1}
BIGGAN = IMAGES | {
    "name": "biggan", "z_dim": 6, "channels": 2, "shared_dim": 3, "attention_resolutions": [],
}  # fmt: skip
STYLEGAN2 = IMAGES | {
    "name": "stylegan2", "z_dim": 8, "w_dim": 8, "channel_base": 64, "max_channels": 8,
    "mapping_layers": 2, "style_mixing": 0.5, "minibatch_group": 2,
}  # fmt: skip
R3GAN = IMAGES | {
    "name": "r3gan", "conditional": True, "z_dim": 8, "widths": [8, 8, 8], "blocks_per_stage": 1,
    "group_size": 8, "embedding_dim": 4,
}  # fmt: skip
AUTOENCODER = IMAGES | {"name": "autoencoder", "conditional": True, "z_dim": 4, "channels": 4}
ADAM = {"lr": 1e-3, "beta1": 0.5}
RMSPROP = {"name": "rmsprop", "lr": 1e-3}

CONFIGS: dict[str, dict[str, Any]] = {
    "biggan with r1": {
        "model": BIGGAN,
        "objective": {
            "name": "gan", "orthogonal_weight": 0.01,
            "penalties": [{"name": "r1", "weight": 1.0, "every": 2}, {"name": "wgan_gp"}],
        },
        "augment": {"name": "ada", "initial": 0.5, "every_images": 16, "rampup_images": 100},
    },
    "stylegan2 with path lengths": {
        "model": STYLEGAN2,
        "objective": {
            "name": "gan", "loss": "non_saturating", "path_length": {"every": 3},
            "penalties": [{"name": "r1", "every": 2, "separate_step": True}],
        },
    },
    "r3gan": {
        "model": R3GAN,
        "objective": {
            "name": "gan", "loss": "relativistic",
            "penalties": [{"name": "r1", "weight": 1.0, "weight_end": 0.1}, {"name": "r2"}],
        },
        "anneal_images": 100,
        "data": {"mirror": True},
    },
    "wgan with clipping": {
        "model": R3GAN,
        "objective": {
            "name": "gan", "loss": "wasserstein", "weight_clip": 0.05, "discriminator_steps": 2,
        },
        "optimizer": {"discriminator": RMSPROP, "generator": RMSPROP},
    },
    "vae": {
        "model": AUTOENCODER,
        "objective": {"name": "vae"},
        "optimizer": {"vae": ADAM},
    },
}  # fmt: skip

Build = Callable[..., RunConfig]


@pytest.fixture(params=CONFIGS)
def build(request: pytest.FixtureRequest, digits: Path, tmp_path: Path) -> Build:
    """`build({"compile": "aot_eager"})`: the config under test, some of its keys replaced."""
    defaults = {
        "run_dir": str(tmp_path / "run"),
        "compile": "eager",
        "optimizer": {"discriminator": ADAM, "generator": ADAM},
        "ema": {"halflife_images": 100},
        "train": {"total_images": 10_000, "batch": BATCH, "standing_batches": 2},
        "evaluation": {"extractor": "digits8-cnn-v1"},
        "tracking": {"mlflow": False},
    }

    def content(changes: dict[str, Any] | None = None) -> RunConfig:
        found = copy.deepcopy(defaults | CONFIGS[request.param] | (changes or {}))
        found["data"] = {"path": str(digits)} | found.get("data", {})
        return configs.validate(RunConfig, found, request.param)

    return content


def modules(state: TrainState) -> dict[str, Tensor]:
    """Copies of all parameters and buffers: networks, constants, EMAs and the state of the run."""
    groups = (state.saved_networks, state.objective.frozen, state.state)
    return {
        f"{index}/{name}.{key}": tensor.detach().clone()
        for index, group in enumerate(groups)
        for name, module in group.items()
        for key, tensor in module.state_dict().items()
    }


def all_inputs(state: TrainState, streams: Any) -> list[tuple[Step, Tensors]]:
    """Inputs of one step for each combination of phase and terms, in the order of the steps."""
    outputs: Tensors = {}
    found = []
    for step in variants(state.objective, state.config.images_per_step):
        (inputs,) = state._inputs(step, streams, [outputs])
        found.append((step, inputs))
        with torch.no_grad():
            result = evaluate(state, step.phase, inputs, step.terms)
        outputs |= {f"{step.phase}.{name}": tensor for name, tensor in result.outputs.items()}
    return found


def test_every_objective_is_tested() -> None:
    union, *_ = typing.get_args(AnyObjective)
    members = {typing.get_args(tagged)[0].__module__ for tagged in typing.get_args(union)}
    tested = {f"bigan.objectives.{entry['objective']['name']}" for entry in CONFIGS.values()}
    assert members == tested


# --- structure -----------------------------------------------------------------------------------


def test_every_network_is_trained_by_exactly_one_phase(build: Build) -> None:
    config = build()
    objective = TrainState(config, Engine(config, print), TEN_CLASSES).objective
    trained = [name for phase in objective.phases.values() for name in phase.trains]
    assert sorted(trained) == sorted(objective.networks)
    assert set(objective.networks) >= set(config.objective.networks)
    assert tuple(objective.phases) == config.objective.phases
    for phase in objective.phases.values():
        for name, network in phase.named_children():
            assert network is objective.networks[name]
        assert not set(phase.reads) & set(phase.trains)
        assert set(phase.reads) <= {*objective.networks, *objective.frozen}
        assert set(phase.streams) <= set(config.objective.streams)
    assert set(objective.averaged) <= set(objective.networks)
    for sampler in objective.samplers.values():
        assert set(sampler.networks) <= {*objective.networks, *objective.frozen}
        assert sampler.reference in config.streams
        assert sampler.inputs is None or sampler.inputs in config.streams


def test_steps_repeat_after_the_period(build: Build) -> None:
    config = build()
    objective = TrainState(config, Engine(config, print), TEN_CLASSES).objective
    images, period = config.images_per_step, objective.period

    def relative(index: int) -> list[Step]:
        start = index * images
        return [step._replace(at=step.at - start) for step in objective.steps(start)]

    steps = [relative(index) for index in range(3 * period)]
    assert steps[:period] == steps[period : 2 * period] == steps[2 * period :]
    for found in steps:
        assert {step.phase for step in found} == set(objective.phases)
        assert sum(step.num_images for step in found if step.fresh) == images
        assert all(0 <= step.at <= images for step in found)
    occurring = {(step.phase, step.terms) for found in steps for step in found}
    assert {(s.phase, s.terms) for s in variants(objective, images)} == occurring


def test_a_training_step_counts_its_images(build: Build) -> None:
    config = build()
    state, streams = make(config)
    seen: list[Step] = []
    with streams:
        state.advance(streams, on_step=seen.append)
    assert tuple(seen) == state.objective.steps(0)
    assert state.progress.images_seen == config.images_per_step
    means, _ = state.statistics.collect()
    for phase in state.objective.phases:
        assert {f"train/{phase}/loss", f"train/{phase}/grad_norm"} <= means.keys()


# --- phases --------------------------------------------------------------------------------------


def test_forward_is_pure(build: Build) -> None:
    """The same result twice; no parameter, buffer, input or generator of numbers changes."""
    state, streams = make(build())
    with streams:
        steps = all_inputs(state, streams)
    before, random = modules(state), torch.get_rng_state()
    for step, inputs in steps:
        given = {name: tensor.clone() for name, tensor in inputs.items()}
        parameters = parameters_of(state, step.phase)

        def run(step: Step = step, inputs: Tensors = inputs) -> Result:
            return evaluate(state, step.phase, inputs, step.terms)

        first, second = run(), run()
        gradients = [torch.autograd.grad(result.loss, parameters) for result in (first, second)]
        assert first.loss.shape == ()
        assert first.loss.equal(second.loss)
        assert all(map(torch.equal, *gradients))
        for a, b in ((first.scalars, second.scalars), (first.outputs, second.outputs)):
            assert differing(a, b) == []
            assert not any(tensor.requires_grad for tensor in a.values())
        assert all(value.shape == () for value in first.scalars.values())
        assert differing(given, inputs) == []
    assert differing(before, modules(state)) == []
    assert torch.get_rng_state().equal(random)


def test_every_parameter_gets_a_gradient(build: Build) -> None:
    """In every step: DDP would wait for one that no term of it depends on."""
    state, streams = make(build())
    with streams:
        steps = all_inputs(state, streams)
    touched: dict[str, list[bool]] = {}
    for step, inputs in steps:
        parameters = parameters_of(state, step.phase)
        loss = evaluate(state, step.phase, inputs, step.terms).loss
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        names = [name for name, _ in state.objective.phases[step.phase].named_parameters()]
        assert [n for n, g in zip(names, gradients, strict=True) if g is None] == [], step
        assert all(gradient.isfinite().all() for gradient in gradients)
        found = touched.setdefault(step.phase, [False] * len(names))
        touched[step.phase] = [
            old or bool(new.any()) for old, new in zip(found, gradients, strict=True)
        ]
    for phase, found in touched.items():
        assert any(found), phase  # layers before one whose weights are 0 at first get 0


def test_phases_read_frozen_networks_without_gradients(build: Build) -> None:
    state, streams = make(build())
    with streams:
        for step in state.objective.steps(0):
            state.advance(streams, steps=[step])
            trains = state.objective.phases[step.phase].trains
            for name, network in state.networks.items():
                has = [p.grad is not None for p in network.parameters()]
                assert all(has) if name in trains else not any(has), (step, name)
            state.prepared[step.phase].optimizer.zero_grad()


def test_draws_do_not_depend_on_the_world_size(build: Build) -> None:
    """The slices of all ranks and micro-batches, joined, are those of one process."""
    config = build()
    engine = Engine(config, print)
    one = TrainState(config, engine, TEN_CLASSES)
    micro = build({"train": {"total_images": 10_000, "batch": BATCH, "micro_batch": 2}})
    for step in variants(one.objective, config.images_per_step):
        phase = one.objective.phases[step.phase]
        draws = phase.draws(step.at, step.num_images, step.terms)
        assert all(tensor.device.type == "cpu" for tensor in draws.values())
        assert all(len(tensor) == step.num_images for tensor in draws.values())
        again = phase.draws(step.at, step.num_images, step.terms)
        assert differing(draws, again) == []
        later = phase.draws(step.at + BATCH, step.num_images, step.terms)
        for name in draws.keys() - {"labels"}:
            assert not draws[name].equal(later[name]), name
        for sharded, size in ((config, 2), (config, 4), (micro, 1), (micro, 2)):
            parts = []
            for index in range(1 if sharded is config else BATCH // 2 // size):
                for rank in range(size):
                    engine.world = World(rank, size)
                    state = TrainState(sharded, engine, TEN_CLASSES)
                    mine = state.objective.phases[step.phase].draws(*step[2:4], step.terms)
                    rows = rows_in_order(engine.world, step.num_images, state.accumulation)
                    parts.append(taken(mine, rows[index]))
            joined = {name: torch.cat([part[name] for part in parts]) for name in draws}
            assert differing(joined, draws) == [], (sharded.train.micro_batch, size)


def test_one_full_graph_for_each_phase_and_terms(build: Build) -> None:
    """Annealed values, moving strengths and counters compile nothing again; compiled = eager."""
    messages: list[str] = []
    # The gradient of a bias before a normalization is rounding, which Adam would enlarge.
    sgd = {"name": "sgd", "lr": 1e-4, "momentum": 0.9}
    optimizer = {"optimizer": dict.fromkeys(build().optimizer, sgd)}
    config = build({"compile": "aot_eager"} | optimizer)
    torch.compiler.reset()
    counters.clear()
    state = TrainState(config, Engine(config, messages.append), TEN_CLASSES)
    state.prepare()
    num = len(variants(state.objective, config.images_per_step))
    assert [line.split()[2] for line in messages] == list(state.objective.phases), messages
    assert counters["stats"]["unique_graphs"] == num
    steps = max(3, state.objective.period)
    with open_streams(state) as streams:
        advance(state, streams, steps)
    assert counters["stats"]["unique_graphs"] == num
    assert not counters["graph_break"]
    eager = tensors(advance(*make(build(optimizer)), steps))
    compiled = tensors(state)
    assert compiled.keys() == eager.keys()
    for name, tensor in eager.items():
        difference = (compiled[name] - tensor).abs().max() / tensor.abs().max().clamp(min=1)
        assert difference < 1e-5, name


# --- runs ----------------------------------------------------------------------------------------


def test_a_resumed_run_is_bitwise_the_same(build: Build) -> None:
    config = build()
    straight = tensors(advance(*make(config), 4))
    folder = save(advance(*make(config), 2))
    state, streams = resume(config, folder)
    assert state.progress.images_seen == 2 * config.images_per_step
    assert differing(tensors(advance(state, streams, 2)), straight) == []


def test_samplers_make_images_from_a_snapshot(build: Build) -> None:
    config = build()
    state = advance(*make(config), 1)
    Artifacts(state, None).snapshot()
    assert not any(module.training for n in state.averages.values() for module in n.modules())
    images_seen = config.images_per_step
    folder = config.run_dir / "snapshots" / str(images_seen)
    names = {f"{name}_ema" for name in state.averages}
    assert {path.stem for path in folder.glob("*.safetensors")} == names
    snapshot = snapshots.load(folder)
    assert (snapshot.images_seen, snapshot.config) == (images_seen, config)
    assert snapshot.classes == TEN_CLASSES
    grids = [path.name for path in (config.run_dir / "samples").rglob("*.png")]
    assert len(grids) == len(state.objective.samplers), grids
    assert snapshot.samplers.keys() == state.objective.samplers.keys()
    data = config.streams["images"]
    batch = next(iter(sequential(open_level(data.path, 16, data), data.split, World(), 3, data)))
    for name, sampler in snapshot.samplers.items():
        inputs = sampler.draws(0, "test", 0, 3, 0.5 if sampler.truncates else None)
        if sampler.inputs is not None:
            inputs |= {"images.pixels": batch.pixels, "images.labels": batch.labels}
        live: dict[str, nn.Module] = state.sampling_networks(sampler)
        with torch.no_grad():
            images, expected = (sampler(found, inputs) for found in (snapshot.networks, live))
        assert images.shape == (3, 1, 16, 16), name
        assert images.isfinite().all(), name
        assert images.std() > 0, name
        torch.testing.assert_close(images, expected, msg=name)
        assert set(sampler.networks) <= snapshot.networks.keys()


# --- errors --------------------------------------------------------------------------------------


def fails(build: Build, changes: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        build(changes)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_optimizers_must_be_those_of_the_phases(build: Build) -> None:
    phases = " and ".join(build().objective.phases)
    for keys in ((), ("critic",), (*build().objective.phases, "critic")):
        text = fails(build, {"optimizer": dict.fromkeys(keys, ADAM)})
        assert "optimizer: " in text
        assert text.endswith(f"trains {phases}")
        assert all(key in text for key in keys)


def test_the_model_must_build_the_networks(build: Build) -> None:
    config = build()
    other = BIGGAN if config.model.name == "autoencoder" else AUTOENCODER
    text = fails(build, {"model": other, "augment": {"name": "none"}})
    assert f"model.name = {other['name']}" in text
    assert text.endswith(f"needs {' and '.join(config.objective.networks)}")


def test_sections_that_an_objective_does_not_support(build: Build) -> None:
    objective = build().objective
    if not objective.supports_augment:
        text = fails(build, {"augment": {"name": "diffaugment"}})
        assert f"augment: objective.name = {objective.name}" in text
    assert "growth: " in fails(build, {"growth": {"stable_images": 8, "fade_images": 8}})


def test_streams_must_be_those_of_the_objective(build: Build, digits: Path) -> None:
    text = fails(build, {"data": {"a": {"path": str(digits)}, "path": {"path": str(digits)}}})
    assert "data: has the stream(s)" in text
    assert text.endswith("reads images")
