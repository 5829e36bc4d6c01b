"""Snapshots: the networks of the samplers, for evaluation and for users.

    <run_dir>/snapshots/<images_seen>/generator_ema.safetensors   one file per network
                                      config.yaml                 the config of its stage
                                      snapshot.json               images_seen, images of each class
                                      COMPLETE                    written last

The files contain no time stamp: the same training gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from bigan import atomic_files
from bigan import config as configs
from bigan.errors import UserError
from bigan.objectives.samplers import Sampler
from bigan.run_config import RunConfig, load_config, setup_of
from bigan.run_folder import RunFolder


@dataclass(frozen=True)
class Snapshot:
    """A snapshot in memory: its networks in evaluation mode, and how to sample from them."""

    folder: Path
    images_seen: int
    config: RunConfig
    classes: dict[str, int]  # class name -> number of training images
    networks: dict[str, nn.Module]
    samplers: dict[str, Sampler]


def write(
    run_dir: Path,
    images_seen: int,
    networks: Mapping[str, nn.Module],
    config: RunConfig,
    classes: Mapping[str, int],
) -> Path:
    """Write a snapshot; `networks` by file name ("generator_ema"). Returns its folder."""
    folder = RunFolder(run_dir).snapshots / str(images_seen)
    with atomic_files.complete_folder(folder) as temporary:
        for name, network in networks.items():
            state = network.state_dict()
            tensors = {key: t.detach().cpu().contiguous() for key, t in state.items()}
            (temporary / file_name(name)).write_bytes(safetensors.torch.save(tensors))
        (temporary / "config.yaml").write_text(configs.dump(config))
        facts = {"images_seen": images_seen, "classes": dict(classes)}
        (temporary / "snapshot.json").write_text(json.dumps(facts, indent=2) + "\n")
    return folder


def file_name(network: str) -> str:
    """File of a network in a snapshot."""
    return f"{network}.safetensors"


def find(run_dir: Path) -> list[Path]:
    """Complete snapshots of a run, oldest first."""
    return atomic_files.numbered_folders(RunFolder(run_dir).snapshots)


def load(folder: Path, device: torch.device | str = "cpu") -> Snapshot:
    """Read a snapshot.

    Raises `UserError` if the folder is not a complete snapshot or does not fit its own config.
    """
    folder = Path(folder)
    if not atomic_files.is_complete(folder):
        raise UserError(f"{folder}: not a complete snapshot (no {atomic_files.COMPLETE} in it)")
    config = load_config(folder / "config.yaml")
    try:
        facts = json.loads((folder / "snapshot.json").read_text())
        classes = {str(name): int(num) for name, num in facts["classes"].items()}
        images_seen = int(facts["images_seen"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / 'snapshot.json'}: cannot be read ({error})") from None
    objective = config.objective.build(setup_of(config, tuple(classes.values())))
    wanted = {name for sampler in objective.samplers.values() for name in sampler.networks}
    networks = {}
    for name in sorted(wanted):
        network = (objective.networks | objective.frozen)[name]
        stored = f"{name}_ema" if name in objective.averaged else name
        _load_network(network, folder / file_name(stored))
        networks[name] = network.to(device).eval().requires_grad_(False)
    return Snapshot(folder, images_seen, config, classes, networks, objective.samplers)


def _load_network(network: nn.Module, path: Path) -> None:
    """Fill a network that was built on the meta device."""
    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    try:
        network.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"{path}: the weights do not fit config.yaml: {first}") from None
