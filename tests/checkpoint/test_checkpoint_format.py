"""The checkpoint format: ranges of tensors, written and read at any world size."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from bigan import checkpoint
from bigan.checkpoint import CheckpointError, DamagedError, Progress, Reader, TensorShard
from bigan.checkpoint.folder import complete
from bigan.checkpoint.part import HostBuffer, part_name
from bigan.checkpoint.progress import to_json
from bigan.distributed.world import World


def write(folder: Path, parts: Sequence[Sequence[TensorShard]], check: bool = True) -> Path:
    """A checkpoint of `len(parts)` ranks; `check=False` writes an inconsistent one as well."""
    staging = folder.with_name(f".{folder.name}.1.tmp")
    staging.mkdir(parents=True)
    checksums = []
    for index, shards in enumerate(parts):
        buffer = HostBuffer()
        buffer.fill(shards)
        checksums.append(buffer.write(staging / part_name(index, len(parts))))
    progress = Progress(images_seen=int(folder.name))
    if check:
        return complete(staging, progress, checksums)
    (staging / "progress.json").write_text(to_json(progress, checksums))
    return staging.rename(folder)


def unsharded(name: str, tensor: Tensor) -> TensorShard:
    return TensorShard(name, tuple(tensor.shape), 0, tensor, replicated=True)


def sharded(name: str, tensor: Tensor, start: int, stop: int) -> TensorShard:
    part = tensor.reshape(-1)[start:stop]
    return TensorShard(name, tuple(tensor.shape), start, part, replicated=False)


def toy() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))


def trained(network: nn.Module) -> torch.optim.Adam:
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    network(torch.randn(4, 1, 4, 4)).square().sum().backward()
    optimizer.step()
    return optimizer


def state(name: str, network: nn.Module, optimizer: torch.optim.Adam | None) -> list[TensorShard]:
    """The shards of a network and of its optimizer, all unsharded."""
    shards = [unsharded(f"networks/{name}.{k}", t) for k, t in network.state_dict().items()]
    for key, parameter in network.named_parameters() if optimizer else ():
        for kind, tensor in optimizer.state[parameter].items():
            shards.append(unsharded(f"optimizers/{name}.{key}.{kind}", tensor))
    return shards


def test_any_range_is_read_from_any_sharding(tmp_path: Path) -> None:
    tensor = torch.arange(24.0).reshape(3, 4, 2)
    one = [[unsharded("networks/x", tensor)]]
    three = [[sharded("networks/x", tensor, *ends)] for ends in ((7, 17), (0, 7), (17, 24))]
    for images_seen, parts in ((1, one), (3, three)):
        reader = Reader(write(tmp_path / str(images_seen), parts))
        assert reader.shapes() == {"networks/x": (3, 4, 2)}
        assert torch.equal(reader.read("networks/x"), tensor)
        for start in range(25):
            for stop in range(start, 25):
                found = reader.read_range("networks/x", start, stop)
                assert torch.equal(found, tensor.reshape(-1)[start:stop])
        with pytest.raises(IndexError, match=r"\[3, 25\)"):
            reader.read_range("networks/x", 3, 25)
    names = sorted(path.name for path in (tmp_path / "3").iterdir())
    parts_of_3 = [f"part-0000{i}-of-00003.safetensors" for i in range(3)]
    assert names == ["COMPLETE", *parts_of_3, "progress.json"]


def test_every_type_and_layout_is_kept_and_stored_row_major(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 2, 5, 4).to(memory_format=torch.channels_last),
        "b": torch.tensor([True, False, True]),
        "c": torch.randn(7).bfloat16(),
        "d": torch.tensor(3.5),
        "e": torch.randn(3, dtype=torch.float64),
        "f": torch.arange(5),
        "g": torch.empty(0, 4),
        "h": torch.randn(6, 5).T,
    }
    folder = write(tmp_path / "8", [[unsharded(name, tensor) for name, tensor in tensors.items()]])
    plain = safetensors.torch.load_file(folder / part_name(0, 1))  # readable without bigan
    reader = Reader(folder)
    for name, tensor in tensors.items():
        for found in (plain[name], reader.read(name)):
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(found, tensor)
    once = sharded("x", torch.arange(4.0), 0, 2)
    with pytest.raises(ValueError, match="x@0"):
        write(tmp_path / "9", [[once, once]])


def edit(path: Path, change: Callable[[bytearray], object]) -> None:
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)


def rot(content: bytearray) -> None:
    content[-3] ^= 4


def shorten(content: bytearray) -> None:
    del content[-8:]


def scramble(content: bytearray) -> None:
    content[8:12] = b"\xff\xff\xff\xff"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: edit(path, rot), "checksum"),
        (lambda path: edit(path, shorten), "bytes instead of"),
        (lambda path: edit(path, scramble), "damaged or missing"),
        (Path.unlink, "No such file"),
    ],
)
def test_damaged_part_is_reported_with_its_path(
    tmp_path: Path, damage: Callable[[Path], None], reason: str
) -> None:
    tensor = torch.randn(10)
    parts = [[sharded("networks/x", tensor, 0, 4)], [sharded("networks/x", tensor, 4, 10)]]
    folder = write(tmp_path / "5", parts)
    damaged = folder / part_name(1, 2)
    damage(damaged)
    with pytest.raises(DamagedError, match=reason) as caught:
        Reader(folder).read("networks/x")
    assert str(damaged) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_checksums_are_compared_once_and_can_be_skipped(tmp_path: Path) -> None:
    tensor = torch.randn(10)
    parts = [[sharded("networks/x", tensor, 0, 4)], [sharded("networks/x", tensor, 4, 10)]]
    folder = write(tmp_path / "5", parts)
    edit(folder / part_name(1, 2), rot)
    careful = Reader(folder)
    assert torch.equal(careful.read_range("networks/x", 0, 4), tensor[:4]), "of the intact part"
    with pytest.raises(CheckpointError, match="checksum"):
        careful.verify_across_ranks(World())
    trusting = Reader(folder, verify=False)
    trusting.verify_across_ranks(World())
    assert not torch.equal(trusting.read("networks/x"), tensor)


def test_shards_must_cover_every_tensor_once(tmp_path: Path) -> None:
    tensor, name = torch.arange(10.0), "networks/x"
    wrong = {
        "gap or an overlap at element 3": [
            sharded(name, tensor, 0, 3),
            sharded(name, tensor, 4, 10),
        ],
        "gap or an overlap at element 5": [
            sharded(name, tensor, 0, 5),
            sharded(name, tensor, 4, 10),
        ],
        "gap or an overlap at element 0": [
            sharded(name, tensor, 1, 10),
            sharded("y", tensor, 0, 10),
        ],
        "ends at element 9 of 10": [sharded(name, tensor, 0, 5), sharded(name, tensor, 5, 9)],
        "gap or an overlap at element 10": [unsharded(name, tensor), unsharded(name, tensor)],
        "differ in the shape or type of networks/x": [
            sharded(name, tensor, 0, 5),
            sharded(name, tensor.reshape(5, 2), 5, 10),
        ],
        "differ in the shape or type of networks/y": [
            sharded("networks/y", tensor, 0, 5),
            sharded("networks/y", tensor.double(), 5, 10),
        ],
    }
    for index, (reason, shards) in enumerate(wrong.items()):
        folder = write(tmp_path / str(index), [[shard] for shard in shards], check=False)
        with pytest.raises(CheckpointError, match=reason):
            Reader(folder)
    for start, stop in ((-1, 3), (8, 11)):
        with pytest.raises(ValueError, match="range of a tensor"):
            TensorShard(name, (10,), start, torch.zeros(stop - start), replicated=False)


def test_invalid_progress_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "5", [[unsharded("networks/x", torch.zeros(1))]])
    assert checkpoint.read_progress(folder) == Progress(images_seen=5)
    path = folder / "progress.json"
    record = json.loads(path.read_text())
    assert (record["format"], len(record["parts"])) == (1, 1)
    bad = {
        "format 99": {"format": 99},
        "cannot be read": {"parts": []},
        "list of parts": {"parts": [{"bytes": "many", "crc32": 0}]},
        "not a number": {"seconds": "long"},
        "images_seen = 6": {"images_seen": 6},
    }
    for reason, change in bad.items():
        path.write_text(json.dumps(record | change))
        with pytest.raises(CheckpointError, match=reason):
            Reader(folder)


def test_check_fit_reads_the_headers(tmp_path: Path) -> None:
    network, average = toy(), toy()
    optimizer = trained(network)
    shards = [*state("generator", network, optimizer), *state("generator_ema", average, None)]
    shards.append(unsharded("state/augment.p", torch.tensor(0.5)))
    networks = {"generator": network, "generator_ema": average}
    strength = nn.Module()
    strength.register_buffer("p", torch.tensor(0.0))
    reader = Reader(write(tmp_path / "1", [shards]))
    checkpoint.check_fit(reader, networks, {"augment": strength})
    wider = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 4))
    with pytest.raises(CheckpointError, match=r"generator\.2\.weight is \(3, 8\) there"):
        checkpoint.check_fit(reader, {"generator": wider}, {})
    longer = {"generator_ema": nn.Sequential(*toy(), nn.Linear(3, 1))}
    with pytest.raises(CheckpointError, match=r"generator_ema\.3\.weight is absent there"):
        checkpoint.check_fit(reader, longer, {})
    with pytest.raises(CheckpointError, match=r"path_length\.p is absent there"):
        checkpoint.check_fit(reader, {}, {"path_length": strength})


def test_optimizer_state_must_be_that_of_every_parameter(tmp_path: Path) -> None:
    network = toy()
    shards = state("generator", network, trained(network))
    names = [f"generator.{name}" for name, _ in network.named_parameters()]
    found = checkpoint.optimizer_shapes(Reader(write(tmp_path / "1", [shards])), names)
    assert found == {
        f"generator.{name}": {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape}
        for name, p in network.named_parameters()
    }
    short = [p for p in shards if not p.name.endswith("2.bias.exp_avg_sq")]
    with pytest.raises(CheckpointError, match=r"optimizer state of generator\.2\.bias"):
        checkpoint.optimizer_shapes(Reader(write(tmp_path / "2", [short])), names)
    wrong = [p for p in shards if not p.name.endswith("2.bias.exp_avg")]
    wrong.append(unsharded("optimizers/generator.2.bias.exp_avg", torch.zeros(4)))
    with pytest.raises(CheckpointError, match=r"optimizer state of generator\.2\.bias"):
        checkpoint.optimizer_shapes(Reader(write(tmp_path / "3", [wrong])), names)
    reader = Reader(write(tmp_path / "4", [state("generator", network, None)]))
    assert checkpoint.optimizer_shapes(reader, names) == {name: {} for name in names}


def test_modules_are_restored_bitwise_in_their_memory_format(tmp_path: Path) -> None:
    network, strength = toy().to(memory_format=torch.channels_last), nn.BatchNorm1d(3)
    with torch.no_grad():
        strength.running_mean.fill_(0.25)
    shards = state("generator", network, None)
    shards += [unsharded(f"state/norm.{key}", t) for key, t in strength.state_dict().items()]
    reader = Reader(write(tmp_path / "40", [shards]))
    other, norm = toy().to(memory_format=torch.channels_last), nn.BatchNorm1d(3)
    checkpoint.load(reader, {"generator": other}, {"norm": norm})
    for mine, theirs in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.stride() == theirs.stride()
    assert torch.equal(norm.running_mean, torch.full((3,), 0.25))
