"""BatchNorm statistics of a run: which images share them, standing statistics, resumed runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import ROOT
from parts import make
from short_runs import advance, differing, resume, save, tensors
from torch import Tensor

from bigan.distributed.world import World
from bigan.engine import Engine
from bigan.layers.batchnorm import normalization_layers
from bigan.run import standing_statistics
from bigan.run.remarks import remarks
from bigan.run.standing_statistics import collect_standing_statistics
from bigan.run.state import TrainState
from bigan.run_config import RunConfig, TrainConfig, batchnorm_images, load_config

MakeConfig = Callable[..., RunConfig]
LOCAL = ("train.batchnorm=local", "train.micro_batch=10")


@pytest.mark.parametrize(
    ("batchnorm", "micro_batch", "world_size", "images"),
    [
        ("global", None, 2, 40),
        ("global", 10, 1, 10),
        ("global", 10, 2, 20),
        ("local", 10, 1, 10),
        ("local", 10, 2, 10),
        ("local", 5, 8, 5),
    ],
)
def test_images_that_share_statistics(
    batchnorm: str, micro_batch: int | None, world_size: int, images: int
) -> None:
    settings = {"batch": 40, "micro_batch": micro_batch, "batchnorm": batchnorm}
    train = TrainConfig.model_validate(settings | {"total_images": 400})
    assert batchnorm_images(train, world_size) == images


def standing(state: TrainState, size: int, patch: pytest.MonkeyPatch) -> list[Tensor]:
    """The standing statistics that `size` ranks collect, one rank after another."""
    sums: list[Tensor] = []

    def collect(rank: int, reduce: Callable[[World, Tensor], None]) -> None:
        state.world = World(rank, size)
        patch.setattr(standing_statistics, "sum_over_ranks", reduce)
        collect_standing_statistics(state)

    for rank in range(size):
        collect(rank, lambda _, values: sums.append(values.clone()))
    collect(0, lambda _, values: values.copy_(torch.stack(sums).sum(0)))
    layers = normalization_layers(state.averages["generator"])
    return [t.clone() for layer in layers for t in (layer.standing_mean, layer.standing_var)]


def test_local_standing_statistics_do_not_depend_on_the_world_size(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same forwards of one micro-batch each, divided among the ranks."""
    state, streams = make(make_config(*LOCAL, "train.standing_batches=5"))
    sizes: list[int] = []
    state.averages["generator"].register_forward_pre_hook(lambda _, x: sizes.append(len(x[0])))
    with streams:
        expected = standing(state, 1, monkeypatch)
        assert sizes == [10] * 2 * 5  # `standing` repeats rank 0
        for size in (2, 4):
            found = standing(state, size, monkeypatch)
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("settings", [LOCAL, LOCAL[1:]], ids=["local", "global"])
def test_a_resumed_run_is_bitwise_the_same(
    make_config: MakeConfig, settings: tuple[str, ...]
) -> None:
    config = make_config(*settings, "train.power_iterations=3")
    straight = tensors(advance(*make(config), 4))
    folder = save(advance(*make(config), 2))
    assert differing(tensors(advance(*resume(config, folder), 2)), straight) == []


def test_a_resume_with_other_statistics_is_remarked_on(make_config: MakeConfig) -> None:
    config = make_config(*LOCAL)
    folder = save(advance(*make(config), 1))
    for micro_batch, num_remarks in ((10, 0), (20, 1)):
        state, streams = resume(make_config(LOCAL[0], f"train.micro_batch={micro_batch}"), folder)
        with streams:
            lines = [line for line in remarks(state) if "BatchNorm saw 10 images" in line]
        assert len(lines) == num_remarks
        assert all("train.micro_batch=10 keeps it" in line for line in lines)


@pytest.mark.parametrize(
    ("file", "keys"),
    [
        ("progan-digits.yaml", {"train.batchnorm=local", "train.power_iterations=2"}),
        ("digits.yaml", set()),
    ],
)
def test_settings_without_effect_are_remarked_on(
    digits: Path, tmp_path: Path, file: str, keys: set[str]
) -> None:
    """Of layers that no network has."""
    settings = [f"data.path={digits}", f"run_dir={tmp_path / 'run'}", *LOCAL[:1]]
    settings += ["train.micro_batch=4", "train.power_iterations=2"]
    config = load_config(ROOT / "configs" / "smoke" / file, settings)
    state = TrainState(config, Engine(config, print), {str(digit): 1 for digit in range(10)})
    found = {line.partition(" ")[0] for line in remarks(state) if "has no effect" in line}
    assert found == keys
