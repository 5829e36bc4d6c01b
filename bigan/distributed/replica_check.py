"""Comparison of the replicated weights of all ranks.

A replica that has diverged (faulty memory, a missed update) raises no error in replicated training
and keeps contributing gradients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bigan.distributed.world import World, gather, reported_by_rank_0
from bigan.errors import LostError

INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}  # by size in bytes


def fingerprint(network: nn.Module) -> Tensor:
    """int64 [] on the device: a weighted sum of the bit patterns of all unsharded tensors.

    A change of any single number changes it. Reads every tensor once, makes no copies, does not
    synchronise with the host.
    """
    total: Tensor | None = None
    for index, tensor in enumerate(network.state_dict().values()):
        if hasattr(tensor, "_local_tensor"):  # a DTensor: each rank holds a different shard
            continue
        bits = tensor.detach().view(INTEGERS[tensor.element_size()])
        part = bits.sum(dtype=torch.int64) * (2 * index + 1)
        total = part if total is None else total + part
    return torch.zeros((), dtype=torch.int64) if total is None else total


def check_replicas(world: World, networks: Mapping[str, nn.Module], images_seen: int) -> None:
    """Compare the networks of all ranks; raises `LostError` on all ranks if they differ.

    The weights that most ranks have are taken as correct; in a tie, those of rank 0. A collective.
    """
    if world.size == 1:
        return
    prints = [fingerprint(network).to(world.device) for network in networks.values()]
    rows = [tuple(row) for row in gather(world, torch.stack(prints).tolist())]
    if len(set(rows)) == 1:
        return
    votes = Counter(rows)
    right = max(votes, key=lambda row: (votes[row], row == rows[0]))
    wrong = []
    for rank, row in enumerate(rows):
        names = [n for n, own, good in zip(networks, row, right, strict=True) if own != good]
        wrong += [f"rank {rank} ({', '.join(names)})"] if names else []
    problem = LostError(
        f"the ranks no longer hold the same weights at images_seen = {images_seen}: "
        f"{', '.join(wrong)} {'differs' if len(wrong) == 1 else 'differ'} from the others; this "
        "state is not saved; the same command resumes from the last checkpoint. If it happens "
        "again, test the memory and the device of that rank"
    )
    raise reported_by_rank_0(world, problem)
