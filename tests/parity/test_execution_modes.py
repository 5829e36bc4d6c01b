"""The parity table: every way to run a step agrees with the one-process eager reference.

Three training steps in float32 from the same weights and
batches; each cell prints its measured difference (`pytest tests/parity -s`).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cells import CELLS, COMMON
from commands import TEN_CLASSES
from torch._dynamo.utils import counters

from bigan import config as configs
from bigan.engine import Engine
from bigan.run.state import TrainState
from bigan.run.streams import open_streams
from bigan.run.trainer import enter_stage
from bigan.run_config import RunConfig

PENALTIES = {
    "none": "objective.penalties=[]",
    "r1": "objective.penalties=[{name: r1, weight: 10.0}]",
    "wgan_gp": "objective.penalties=[{name: wgan_gp, weight: 10.0}]",
    "lazy_r1": "objective.penalties=[{name: r1, weight: 10.0, every: 2}]",
}
AUGMENT = {
    "diffaugment": ["augment={name: diffaugment}"],
    "ada": [
        # From p = 0.5, steered at every step, so that p moves between the steps too.
        "augment={name: ada, initial: 0.5, every_images: 40, rampup_images: 1000}",
    ],
    "ada_color": ["augment={name: ada, pipeline: bc, fixed: 0.8}"],
}
State = dict[str, torch.Tensor]


def three_steps(config: RunConfig) -> tuple[State, list[str]]:
    """Networks after three steps, and the losses on the way, by the real trainer's parts."""
    messages: list[str] = []
    engine = Engine(config, messages.append)
    state = TrainState(config, engine, TEN_CLASSES)
    state.prepare()
    streams = open_streams(state)
    for _ in range(3):
        state.advance(streams)
        stage = state.stage
        enter_stage(state)
        if state.stage is not stage:
            with streams:
                pass
            streams = open_streams(state)
            state.prepare()
    with streams:
        means, _ = state.statistics.collect()
    found: State = {f"loss/{k}": torch.tensor(v) for k, v in means.items()}
    for name, module in (state.saved_networks | state.state).items():
        found |= {f"{name}.{k}": t.detach().clone() for k, t in module.state_dict().items()}
    return found, messages


def largest_difference(a: State, b: State, relative: bool = False) -> float:
    """Over all tensors; `relative` to the largest entry of those that exceed 1 (gradient norms)."""
    assert a.keys() == b.keys()
    sizes = {k: max(1.0, b[k].abs().max().item()) if relative else 1.0 for k in a}
    return max((a[k].double() - b[k].double()).abs().max().item() / sizes[k] for k in a)


@pytest.fixture(scope="module")
def reference(digits: object) -> Callable[[RunConfig], State]:
    """The eager state of a config, computed once for each."""
    known: dict[str, State] = {}

    def of(config: RunConfig) -> State:
        eager = config.model_copy(update={"compile": "eager"})
        key = configs.dump(eager).partition("\n")[2]  # without run_dir
        if key not in known:
            known[key], _ = three_steps(eager)
        return known[key]

    return of


@pytest.mark.parametrize(
    "penalty",
    [pytest.param(p, marks=[pytest.mark.slow] if p == "lazy_r1" else []) for p in PENALTIES],
)
def test_aot_eager_is_bitwise_eager(
    make_config: Callable[..., RunConfig], reference: Callable[[RunConfig], State], penalty: str
) -> None:
    config = make_config(PENALTIES[penalty], "compile=aot_eager")
    state, messages = three_steps(config)
    assert not any("failed" in m for m in messages), messages
    difference = largest_difference(state, reference(config))
    print(f"\naot_eager  {penalty:8} {difference:.1e}")
    assert difference == 0


@pytest.mark.parametrize(
    "kind", ["ada", *(pytest.param(k, marks=pytest.mark.slow) for k in AUGMENT if k != "ada")]
)
def test_aot_eager_is_bitwise_eager_with_augmentation(
    make_config: Callable[..., RunConfig], reference: Callable[[RunConfig], State], kind: str
) -> None:
    """Hinge loss and R1 through the augmentation, as one full graph."""
    config = make_config(PENALTIES["r1"], *AUGMENT[kind], "compile=aot_eager")
    torch.compiler.reset()
    counters.clear()
    state, messages = three_steps(config)
    assert not any("failed" in m for m in messages), messages
    assert counters["stats"]["unique_graphs"] == 2, "a moving p compiles nothing again"
    if kind == "ada":
        assert abs(state["augment.p"] - 0.5) > 0.01
    difference = largest_difference(state, reference(config))
    print(f"\naot_eager  {kind:11} {difference:.1e}")
    assert difference == 0


@pytest.mark.full
@pytest.mark.parametrize(
    "cell",
    [
        "growth",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("stylegan2", "r3gan")),
        "r1 in a separate step",
        "vae",
        "wgan",
    ],
)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_families_agree(
    make_config: Callable[..., RunConfig],
    reference: Callable[[RunConfig], State],
    cell: str,
    backend: str,
) -> None:
    """Other families and objectives, a stage that fades in, separate regularization steps."""
    config = make_config(*COMMON, *CELLS[cell], f"compile={backend}")
    torch.compiler.reset()
    state, messages = three_steps(config)
    assert not any("failed" in m for m in messages), messages
    # The loss of the VAE is a sum over all pixels.
    difference = largest_difference(state, reference(config), relative=cell == "vae")
    print(f"\n{backend:10} {cell:20} {difference:.1e}")
    assert difference < (1e-6 if backend == "aot_eager" else 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", *AUGMENT])
@pytest.mark.parametrize("penalty", ["r1", "wgan_gp"])
def test_inductor_agrees(
    make_config: Callable[..., RunConfig],
    reference: Callable[[RunConfig], State],
    penalty: str,
    kind: str,
) -> None:
    config = make_config(PENALTIES[penalty], *AUGMENT.get(kind, []), "compile=inductor")
    torch.compiler.reset()  # the other rows' graphs count against the limit of recompilations
    state, messages = three_steps(config)
    assert not any("failed" in m for m in messages), messages
    difference = largest_difference(state, reference(config), relative=kind != "none")
    print(f"\ninductor   {penalty:8} {kind:11} {difference:.1e}")
    # Cut-out zeros meet biases near zero: rounding decides some ReLUs, from the third step on.
    assert difference < (1e-4 if kind == "none" else 1e-3)


def test_a_penalty_matters(
    make_config: Callable[..., RunConfig], reference: Callable[[RunConfig], State]
) -> None:
    """The cells above compare something: without the penalty the weights differ."""
    plain = reference(make_config())
    for name in ("r1", "wgan_gp"):
        assert any(
            not torch.equal(plain[k], t)
            for k, t in reference(make_config(PENALTIES[name])).items()
            if k.startswith("discriminator.") and k in plain
        )


@pytest.mark.parametrize("penalty", ["none", "wgan_gp"])
def test_accumulation_leaves_the_discriminator_step_unchanged(
    make_config: Callable[..., RunConfig], penalty: str
) -> None:
    """The gradient over micro-batches of 10 is that of the joined batch of 40: a mean, not a sum.

    Gradients, because Adam's first step would hide a factor.
    The generator's BatchNorm sees micro-batches, so it is put into evaluation mode here.
    """
    states = []
    for micro_batch in (10, 40):
        config = make_config(PENALTIES[penalty], f"train.micro_batch={micro_batch}")
        state = TrainState(config, Engine(config, print), TEN_CLASSES)
        state.networks["generator"].eval()
        state.prepare()
        with open_streams(state) as streams:
            state.advance(streams, steps=state.objective.steps(0)[:1])
        discriminator = state.networks["discriminator"]
        gradients = {k: p.grad for k, p in discriminator.named_parameters()}
        states.append({k: t for k, t in gradients.items() if t is not None})
    largest = max(t.abs().max().item() for t in states[1].values())
    difference = largest_difference(*states) / largest
    print(f"\naccumulate {penalty:8} {difference:.1e}")
    assert difference < 1e-4  # float32 sums of a bias gradient over 40 maps in another order
