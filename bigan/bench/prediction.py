"""How fast a recipe would be on more devices: arithmetic on measured compute and stated bandwidth.

The model, per training step of n devices (all times in seconds):

    compute    c + sum over optimiser steps of s * b   c whatever the batch, s per image, b images
                                                       per device
    gradients  k * (n - 1) / n * S / B + L             S bytes on a ring of bus bandwidth B; k = 2
                                                       for an all-reduce, 1 for a reduce-scatter or
                                                       an all-gather. What fits under the share
                                                       `overlap` of a phase's last micro-batch is
                                                       hidden
    latency    L = latency * log2(n)                   of every collective: the depth of a tree
    batchnorm  collectives * L                         two numbers per channel, in each layer's
                                                       forward and again in its backward
    agreement  collectives * L                         whether all are here, and all is finite
    straggler  spread * compute * E[max of n normals]  everyone waits for the slowest; `spread` is
                                                       the standard deviation of a phase's time
                                                       over its mean, independent between phases
                                                       and devices

The ring: Patarasuk & Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of
workstations". Between nodes it has two levels: reduced within a node at its bandwidth, then each
device carries 1/ranks_per_node of the bytes over its own port, then gathered within the node.

Left out: waiting for images (they are taken to keep up), saves, contention with other jobs, and
that a device may be less efficient on a small batch than c + s * b says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist
from typing import Any, Literal

Mode = Literal["weak", "strong"]
RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
SENSITIVITY_RANKS = (64, 1024)
AGREEMENTS = 3  # collectives of one number per optimiser step: two waiting points and the verdict


@dataclass(frozen=True)
class Network:
    """What connects the devices. Bandwidths are bus bandwidths per device, 1 GB = 1e9 bytes."""

    gb_per_second: float = 50.0  # between nodes: a port of 400 Gb/s per device
    node_gb_per_second: float = 300.0  # within a node
    ranks_per_node: int = 8
    latency_us: float = 20.0  # of the smallest collective, per level of its tree


@dataclass(frozen=True)
class PhaseWork:
    """One network's optimiser step; `times` of them make a training step."""

    seconds_per_image: float
    parameter_bytes: int  # also of its gradient: both are float32
    batchnorm_collectives: int = 0  # per micro-batch
    times: int = 1


@dataclass(frozen=True)
class Workload:
    """A recipe on one device."""

    phases: tuple[PhaseWork, ...]
    batch: int  # images per optimiser step over all devices, in strong scaling
    device_batch: int  # images per optimiser step and device, in weak scaling
    micro_batch: int  # images per device and forward, at most
    engine: str = "ddp"
    fixed_seconds: float = 0.0  # per training step, whatever the batch: Adam, average, launches
    spread: float = 0.01
    overlap: float = 0.0

    def images(self, mode: Mode, ranks: int) -> float:
        """Images per optimiser step and device."""
        return self.device_batch if mode == "weak" else self.batch / ranks


@dataclass(frozen=True)
class Prediction:
    """One training step of `ranks` devices; `seconds` by what they are spent on."""

    mode: Mode
    ranks: int
    images_per_second: float
    efficiency: float  # against as many times one device
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())


def expected_maximum(num: int) -> float:
    """Mean of the largest of `num` independent standard normal variables, to 1e-6.

    The integral of 1 - F^num over x > 0 minus that of F^num over x < 0, F the normal distribution.
    """
    if num == 1:
        return 0.0
    step, end = 0.01, 8.0
    grid = [step * i for i in range(round(end / step) + 1)]
    normal = NormalDist()
    values = [1 - normal.cdf(x) ** num - normal.cdf(-x) ** num for x in grid]
    return step * (sum(values) - (values[0] + values[-1]) / 2)


def latency_seconds(ranks: int, network: Network) -> float:
    """Of the smallest collective among `ranks` devices."""
    return 1e-6 * network.latency_us * math.log2(ranks)


def collective_seconds(passes: int, num_bytes: float, ranks: int, network: Network) -> float:
    """An all-reduce (`passes` = 2), reduce-scatter or all-gather (1) of `num_bytes` in all."""
    if ranks == 1:
        return 0.0
    local = min(ranks, network.ranks_per_node)
    nodes = ranks / local
    within = (local - 1) / local * num_bytes / (1e9 * network.node_gb_per_second)
    between = (nodes - 1) / nodes * num_bytes / local / (1e9 * network.gb_per_second)
    return passes * (within + between) + latency_seconds(ranks, network)


def exchanged(workload: Workload, phase: PhaseWork, micro_batches: int) -> list[tuple[int, int]]:
    """(passes, bytes) of each large collective of one optimiser step.

    ddp: its gradient is all-reduced. zero1: the same (DeepSpeed all-reduces its buckets and keeps
    its part), then the new weights are gathered; zero2 reduces at every micro-batch. fsdp: both
    networks are gathered for the power iteration and again for the step, one gradient is
    reduce-scattered; the generator, trained last, is gathered once more for its average.
    """
    own = phase.parameter_bytes
    if workload.engine == "fsdp":
        gathered = [(1, other.parameter_bytes) for other in workload.phases]
        averaged = [(1, own)] if phase is workload.phases[-1] else []
        return [*gathered, *gathered, (1, own), *averaged]
    if workload.engine.startswith("zero"):
        reductions = micro_batches if workload.engine.startswith("zero2") else 1
        return [(2, own)] * reductions + [(1, own)]
    return [(2, own)]


def exchange_seconds(
    workload: Workload, phase: PhaseWork, images: float, ranks: int, network: Network
) -> float:
    """The large collectives of one optimiser step on `images` per device, less what is hidden."""
    micro = min(images, workload.micro_batch)
    num = max(1, round(images / micro))
    seconds = sum(
        collective_seconds(passes, num_bytes, ranks, network)
        for passes, num_bytes in exchanged(workload, phase, num)
    )
    return max(0.0, seconds - workload.overlap * phase.seconds_per_image * micro)


def step_seconds(
    workload: Workload, images: float, ranks: int, network: Network
) -> dict[str, float]:
    """Seconds of a training step by use; `images` per optimiser step and device."""
    latency = latency_seconds(ranks, network)
    micro_batches = max(1, round(images / min(images, workload.micro_batch)))
    compute = workload.fixed_seconds
    gradients = batchnorm = agreement = 0.0
    for phase in workload.phases:
        compute += phase.times * phase.seconds_per_image * images
        batchnorm += phase.times * phase.batchnorm_collectives * micro_batches * latency
        agreement += phase.times * AGREEMENTS * latency
        gradients += phase.times * exchange_seconds(workload, phase, images, ranks, network)
    return {
        "compute": compute,
        "gradients": gradients,
        "batchnorm": batchnorm,
        "agreement": agreement,
        "straggler": workload.spread * compute * expected_maximum(ranks),
    }


def predict(workload: Workload, mode: Mode, ranks: int, network: Network) -> Prediction:
    """The rate and efficiency of `ranks` devices; efficiency is 1 on one.

    Raises ValueError if there is less than an image for each.
    """
    images = workload.images(mode, ranks)
    if images < 1:
        raise ValueError(f"a batch of {workload.batch} cannot be divided among {ranks} devices")
    seconds = step_seconds(workload, images, ranks, network)
    alone = sum(step_seconds(workload, workload.images(mode, 1), 1, network).values())
    num_images = images * images_per_training_step(workload)
    alone_rate = workload.images(mode, 1) * images_per_training_step(workload) / alone
    rate = ranks * num_images / sum(seconds.values())
    return Prediction(mode, ranks, rate, rate / (ranks * alone_rate), seconds)


def images_per_training_step(workload: Workload) -> int:
    """Batches of real images that a training step reads: the first phase, the discriminator's."""
    return workload.phases[0].times


def predictable(workload: Workload, mode: Mode, ranks: Iterable[int]) -> list[int]:
    """Those of `ranks` that get at least an image each."""
    return [n for n in ranks if workload.images(mode, n) >= 1]


Assumption = Callable[[Workload, Network, float], tuple[Workload, Network]]


def _compute(workload: Workload, factor: float) -> Workload:
    phases = tuple(
        replace(p, seconds_per_image=p.seconds_per_image / factor) for p in workload.phases
    )
    return replace(workload, phases=phases)


ASSUMPTIONS: dict[str, Assumption] = {
    "bandwidth between nodes": lambda w, n, f: (w, replace(n, gb_per_second=f * n.gb_per_second)),
    "bandwidth within a node": lambda w, n, f: (
        w,
        replace(n, node_gb_per_second=f * n.node_gb_per_second),
    ),
    "devices per node": lambda w, n, f: (
        w,
        replace(n, ranks_per_node=max(1, round(f * n.ranks_per_node))),
    ),
    "latency of a collective": lambda w, n, f: (w, replace(n, latency_us=f * n.latency_us)),
    "images/s of one device": lambda w, n, f: (_compute(w, f), n),
    "fixed time per step": lambda w, n, f: (replace(w, fixed_seconds=f * w.fixed_seconds), n),
    "spread of step times": lambda w, n, f: (replace(w, spread=f * w.spread), n),
    "overlap of gradients with backward": lambda w, n, f: (
        replace(w, overlap=min(1.0, f * w.overlap)),
        n,
    ),
}


def sensitivity(
    workload: Workload, network: Network, modes: Sequence[Mode]
) -> list[dict[str, Any]]:
    """How each assumption, halved and doubled, changes the efficiency at 64 and 1024 devices.

    Rows of {"assumption", "mode", "ranks", "efficiency", "halved", "doubled", "change"}, where
    `change` is the larger of the two in either direction; the largest first.
    """
    rows = []
    for mode in modes:
        for ranks in predictable(workload, mode, SENSITIVITY_RANKS):
            here = predict(workload, mode, ranks, network).efficiency
            for name, assume in ASSUMPTIONS.items():
                halved, doubled = (
                    predict(w, mode, ranks, n).efficiency
                    for w, n in (assume(workload, network, factor) for factor in (0.5, 2.0))
                )
                change = max(abs(halved - here), abs(doubled - here))
                rows.append(
                    {"assumption": name, "mode": mode, "ranks": ranks, "efficiency": here}
                    | {"halved": halved, "doubled": doubled, "change": change}
                )
    return sorted(rows, key=lambda row: -row["change"])


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    """The first row of `sensitivity` as one sentence."""
    if not rows:
        return "there are too few images for 64 devices: nothing to vary"
    row = rows[0]
    return (
        f"what matters most: {row['assumption']}; with it halved or doubled, the {row['mode']} "
        f"efficiency of {row['ranks']} devices becomes {row['halved']:.2f} or "
        f"{row['doubled']:.2f} instead of {row['efficiency']:.2f}"
    )
