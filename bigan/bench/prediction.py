"""The speed of a config on more devices: arithmetic on measured compute and stated bandwidth.

The model, per training step of n devices (all times in seconds):

    compute    c + sum over optimizer steps of s * b   c fixed, s per image, b images per device
    gradients  k * (n - 1) / n * S / B + L             S bytes on a ring of bus bandwidth B; k = 2
                                                       for an all-reduce, 1 for a reduce-scatter or
                                                       an all-gather. What fits under the share
                                                       `overlap` of a phase's last micro-batch is
                                                       hidden
    latency    L = latency * log2(n)                   of every collective: the depth of a tree
    batchnorm  collectives * L                         two numbers per channel, in each layer's
                                                       forward and again in its backward
    agreement  collectives * L                         synchronization points and the check for
                                                       non-finite gradients
    straggler  spread * compute * E[max of n normals]  waiting for the slowest rank; `spread` is
                                                       the standard deviation of a phase's time
                                                       over its mean, independent between phases
                                                       and devices

The ring: Patarasuk & Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of
workstations". Between nodes it has two levels: reduced within a node at its bandwidth, then each
device carries 1/ranks_per_node of the bytes over its own port, then gathered within the node.

Not modeled: waiting for images, saves, contention with other jobs, and the lower efficiency of a
device on batches that are too small for c + s * b to hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist
from typing import Any, Literal

Mode = Literal["weak", "strong"]
RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
SENSITIVITY_RANKS = (64, 1024)
AGREEMENTS = (
    3  # collectives of one number per optimizer step: two synchronization points and the flags
)


@dataclass(frozen=True)
class Network:
    """The links between the devices. Bandwidths are bus bandwidths per device, 1 GB = 1e9 bytes."""

    gb_per_second: float = 50.0  # between nodes: a port of 400 Gb/s per device
    node_gb_per_second: float = 300.0  # within a node
    ranks_per_node: int = 8
    latency_us: float = 20.0  # of the smallest collective, per level of its tree


@dataclass(frozen=True)
class PhaseWork:
    """One phase's optimizer step; `times` of them, on average, make a training step."""

    seconds_per_image: float
    parameter_bytes: int  # trained; also of the gradient: both are float32
    batchnorm_collectives: int = 0  # per micro-batch
    times: float = 1
    read_bytes: int = 0  # parameters of the phases whose networks it reads
    gathers: int = 1  # of sharded weights per optimizer step: the step, and what follows it


@dataclass(frozen=True)
class Workload:
    """A config on one device."""

    phases: Mapping[str, PhaseWork]  # by name
    batch: int  # images per optimizer step over all devices, in strong scaling
    device_batch: int  # images per optimizer step and device, in weak scaling
    micro_batch: int  # images per device and forward, at most
    batches: int = 1  # of images that a training step reads from each stream
    averaged_bytes: int = 0  # parameters of the phases that an EMA reads, once per training step
    engine: str = "ddp"
    fixed_seconds: float = 0.0  # per training step: optimizers, EMAs, kernel launches
    spread: float = 0.01
    overlap: float = 0.0

    def images(self, mode: Mode, ranks: int) -> float:
        """Images per optimizer step and device."""
        return self.device_batch if mode == "weak" else self.batch / ranks


@dataclass(frozen=True)
class Prediction:
    """One training step of `ranks` devices; `seconds` by use."""

    mode: Mode
    ranks: int
    images_per_second: float
    efficiency: float  # rate over `ranks` times the rate of one device
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
    """Latency of the smallest collective among `ranks` devices."""
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
    """(passes, bytes) of each large collective of one optimizer step.

    ddp: its gradient is all-reduced. zero1: the same (DeepSpeed all-reduces its buckets and keeps
    its part), then the new weights are gathered; zero2 reduces at every micro-batch. fsdp: the
    weights of the phase and those it reads are gathered, its gradient is reduce-scattered.
    """
    own = phase.parameter_bytes
    if workload.engine == "fsdp":
        read = [(1, phase.read_bytes)] if phase.read_bytes else []
        return [(1, own), *read] * phase.gathers + [(1, own)]
    if workload.engine.startswith("zero"):
        reductions = micro_batches if workload.engine.startswith("zero2") else 1
        return [(2, own)] * reductions + [(1, own)]
    return [(2, own)]


def exchange_seconds(
    workload: Workload, phase: PhaseWork, images: float, ranks: int, network: Network
) -> float:
    """Large collectives of one optimizer step on `images` per device, less what is hidden."""
    micro = min(images, workload.micro_batch)
    num = max(1, round(images / micro))
    seconds = sum(
        collective_seconds(passes, num_bytes, ranks, network)
        for passes, num_bytes in exchanged(workload, phase, num)
    )
    return max(0.0, seconds - workload.overlap * phase.seconds_per_image * micro)


def average_seconds(workload: Workload, ranks: int, network: Network) -> float:
    """Gathering sharded weights for the EMAs, per training step."""
    if workload.engine != "fsdp" or not workload.averaged_bytes:
        return 0.0
    return collective_seconds(1, workload.averaged_bytes, ranks, network)


def step_seconds(
    workload: Workload, images: float, ranks: int, network: Network
) -> dict[str, float]:
    """Seconds of a training step by use; `images` per optimizer step and device."""
    latency = latency_seconds(ranks, network)
    micro_batches = max(1, round(images / min(images, workload.micro_batch)))
    compute = workload.fixed_seconds
    gradients, batchnorm, agreement = average_seconds(workload, ranks, network), 0.0, 0.0
    for phase in workload.phases.values():
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
    """Rate and efficiency of `ranks` devices; the efficiency of one is 1.

    Raises ValueError if there is less than one image per device.
    """
    images = workload.images(mode, ranks)
    if images < 1:
        raise ValueError(f"a batch of {workload.batch} cannot be divided among {ranks} devices")
    seconds = step_seconds(workload, images, ranks, network)
    alone = sum(step_seconds(workload, workload.images(mode, 1), 1, network).values())
    alone_rate = workload.images(mode, 1) * workload.batches / alone
    rate = ranks * images * workload.batches / sum(seconds.values())
    return Prediction(mode, ranks, rate, rate / (ranks * alone_rate), seconds)


def predictable(workload: Workload, mode: Mode, ranks: Iterable[int]) -> list[int]:
    """Those of `ranks` with at least one image per device."""
    return [n for n in ranks if workload.images(mode, n) >= 1]


Assumption = Callable[[Workload, Network, float], tuple[Workload, Network]]


def _compute(workload: Workload, factor: float) -> Workload:
    phases = {
        name: replace(phase, seconds_per_image=phase.seconds_per_image / factor)
        for name, phase in workload.phases.items()
    }
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
    `change` is the larger absolute difference of the two; in descending order of `change`.
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


def most_sensitive(rows: Sequence[dict[str, Any]]) -> str:
    """The first row of `sensitivity` as one line."""
    if not rows:
        return "no sensitivity: there is less than one image per device on 64 devices"
    row = rows[0]
    return (
        f"most sensitive to: {row['assumption']}; with it halved or doubled, the {row['mode']} "
        f"efficiency of {row['ranks']} devices becomes {row['halved']:.2f} or "
        f"{row['doubled']:.2f} instead of {row['efficiency']:.2f}"
    )
