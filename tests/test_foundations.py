"""World, counter-based draws, whole-or-absent files, statistics, the stop flag, the layers."""

import contextlib
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from bigan import atomic_files, rng
from bigan.distributed.world import World, on_rank_0
from bigan.run.statistics import Statistics


def test_world_divides_everything_once() -> None:
    for size in (1, 2, 3, 8):
        taken = [i for rank in range(size) for i in range(24)[World(rank, size).share(24)]]
        assert taken == list(range(24))
    with pytest.raises(ValueError, match="evenly"):
        World(0, 5).share(24)
    with pytest.raises(ValueError, match="rank 2"):
        World(2, 2)


def test_on_rank_0_at_world_size_1() -> None:
    assert on_rank_0(World(), lambda: 3) == 3


def test_draws_are_functions_of_their_triple() -> None:
    a = rng.normal(0, "g/z", 100, (4, 5))
    assert torch.equal(a, rng.normal(0, "g/z", 100, (4, 5)))
    others = [(1, "g/z", 100), (0, "d/z", 100), (0, "g/z", 140)]
    assert all(not torch.equal(a, rng.normal(*other, (4, 5))) for other in others)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    rng.uniform(0, "x", 0, (3,))
    assert torch.equal(before, torch.get_rng_state())


def test_draws_are_pinned() -> None:
    """The streams of a version are part of what a seed means; changing them is a new version."""
    key = np.frombuffer(hashlib.blake2b(b"0/g/z/40", digest_size=16).digest(), dtype=np.uint64)
    philox = np.random.Generator(np.random.Philox(key=key))
    assert (rng.numpy_generator(0, "g/z", 40).random(9) == philox.random(9)).all()
    z = rng.normal(0, "g/z", 40, (3,))
    assert z.tolist() == pytest.approx([0.93451768, -0.24430668, 1.84578371], abs=1e-6)
    assert rng.labels(0, "g/labels", 40, 8, (1,) * 10).tolist() == [7, 2, 3, 5, 1, 7, 4, 5]


def test_labels_follow_the_class_law() -> None:
    labels = rng.labels(0, "x", 0, 20_000, (1, 0, 3))
    shares = torch.bincount(labels, minlength=3) / 20_000
    assert shares.tolist() == pytest.approx([0.25, 0.0, 0.75], abs=0.02)


def test_folder_is_whole_or_absent(tmp_path: Path) -> None:
    folder = tmp_path / "100"
    with contextlib.suppress(ZeroDivisionError), atomic_files.complete_folder(folder) as temporary:
        (temporary / "a").write_text("half")
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []
    for content in ("one", "two"):
        with atomic_files.complete_folder(folder) as temporary:
            (temporary / "a").write_text(content)
        assert atomic_files.is_complete(folder)
        assert (folder / "a").read_text() == content


def test_incomplete_and_foreign_folders_are_ignored(tmp_path: Path) -> None:
    for name, complete in (("20", True), ("100", True), ("300", False), ("best", True)):
        (tmp_path / name).mkdir()
        if complete:
            (tmp_path / name / atomic_files.COMPLETE).touch()
    assert [p.name for p in atomic_files.numbered_folders(tmp_path)] == ["20", "100"]


def test_write_atomic_leaves_the_old_file_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "x"
    atomic_files.write_atomic(path, "old")
    with pytest.raises(TypeError):
        atomic_files.write_atomic(path, 3)  # type: ignore[arg-type]
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_statistics_are_means_over_the_tick() -> None:
    statistics = Statistics(World())
    for value in (1.0, 2.0, 6.0):
        statistics.add({"loss": torch.tensor(value)})
    statistics.add({"rare": torch.tensor(5.0)})
    means, largest = statistics.collect(stop=15.0)
    assert means == {"loss": 3.0, "rare": 5.0}
    assert largest == {"stop": 15.0}
    assert statistics.collect(stop=0.0) == ({}, {"stop": 0.0})
