"""Shards of tensors: an unsharded tensor, or a contiguous range of its elements."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bigan.distributed.world import World
from bigan.errors import NonFiniteError


@dataclass(frozen=True)
class TensorShard:
    """Elements [start, start + data.numel()) of a flattened (row-major) tensor.

    `data` is the unsharded tensor in `shape` and any memory format, or a 1-D range, on any device.
    `replicated`: every rank has the same shard, and one rank writes it. Raises ValueError if `data`
    is not a range of a tensor of `shape`.
    """

    name: str  # "networks/generator.linear.weight"
    shape: tuple[int, ...]  # of the unsharded tensor
    start: int
    data: Tensor
    replicated: bool

    def __post_init__(self) -> None:
        if self.is_unsharded:
            return
        stop = self.start + self.data.numel()
        if self.data.dim() != 1 or self.start < 0 or stop > math.prod(self.shape):
            raise ValueError(
                f"{self.name}: data of shape {tuple(self.data.shape)} at element {self.start} is "
                f"not a range of a tensor of shape {self.shape}"
            )

    @property
    def is_unsharded(self) -> bool:
        """Whether `data` is the unsharded tensor."""
        return self.start == 0 and tuple(self.data.shape) == tuple(self.shape)

    @property
    def num_bytes(self) -> int:
        """Size of `data`."""
        return self.data.numel() * self.data.element_size()


def shards_to_write(shards: Iterable[TensorShard], world: World) -> list[TensorShard]:
    """The shards that this rank writes.

    Replicated shards are assigned by size, the largest first, each to the rank with the fewest
    bytes so far: a function of names, sizes and `world.size`, hence equal on all ranks. Empty
    ranges (FSDP2 has them for tensors with fewer rows than ranks) are left out.
    """
    shards = list(shards)
    mine = [p for p in shards if not p.replicated and (p.is_unsharded or p.data.numel())]
    loads = [(0, rank) for rank in range(world.size)]
    common = [p for p in shards if p.replicated]
    for shard in sorted(common, key=lambda p: (-p.num_bytes, p.name, p.start)):
        num_bytes, rank = loads[0]
        heapq.heapreplace(loads, (num_bytes + shard.num_bytes, rank))
        if rank == world.rank:
            mine.append(shard)
    return mine


def require_finite(images_seen: int, networks: Mapping[str, nn.Module]) -> None:
    """Raise `NonFiniteError` if a network contains a non-finite number: it must not be saved."""
    tensors = {
        f"{name}.{key}": tensor
        for name, network in networks.items()
        for key, tensor in network.state_dict().items()
    }
    require_finite_tensors(images_seen, list(tensors), list(tensors.values()))


@torch.no_grad()
def require_finite_tensors(images_seen: int, names: Sequence[str], tensors: list[Tensor]) -> None:
    """As `require_finite`, with one host synchronization for any number of tensors."""
    groups: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}
    for name, tensor in zip(names, tensors, strict=True):
        if tensor.is_floating_point() and tensor.numel():
            groups.setdefault((tensor.device, tensor.dtype), {})[name] = tensor
    # The extremes are non-finite if any number is, and `aminmax` allocates no temporary tensor.
    found = [
        torch.isfinite(torch.stack([e for t in group.values() for e in torch.aminmax(t)]))
        for group in groups.values()
    ]
    names = [name for group in groups.values() for name in group]
    device = next((flags.device for flags in found if flags.is_cuda), torch.device("cpu"))
    flags = [flags.to(device, non_blocking=True) for flags in found]
    are_finite = torch.cat(flags).reshape(-1, 2).all(1).tolist() if flags else []
    for name, finite in zip(names, are_finite, strict=True):
        if not finite:
            raise NonFiniteError(
                f"{name} is not finite at images_seen = {images_seen}; this state is not saved, "
                "earlier checkpoints are intact; the same command with --allow-change KEY=VALUE "
                "continues from the last one, for example with a lower learning rate "
                "(optimizer.PHASE.lr)"
            )
