"""Checkpoints: the complete state of a run at a step boundary, whole or absent.

    <run_dir>/checkpoints/<images_seen>/networks.safetensors    "g.*", "d.*", "ema.*"
                                        optimizers.safetensors  "g.<parameter>.exp_avg", ...
                                        progress.json           format, images_seen, counters
                                        COMPLETE                written last

Random draws and the data order are functions of `images_seen`, so there is no generator or loader
state to keep. Nothing in a checkpoint can run code when it is loaded.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from bigan import files
from bigan.errors import RunError, UserError

FORMAT = 1


@dataclass
class Progress:
    """The counters of a run; everything else that changes is in the networks and optimisers."""

    images_seen: int = 0
    seconds: float = 0.0  # spent training, over all lives of the run
    attempt: int = 1  # lives of the run: 1 + number of resumes
    data_fingerprint: str = ""  # of the images trained on
    bad_images: int = 0  # did not decode; the next sample took their place (data.on_bad=skip)


class CheckpointError(UserError):
    """A checkpoint that cannot be used, in one line."""


def save(
    run_dir: Path,
    progress: Progress,
    networks: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
) -> Path:
    """Write the checkpoint of `progress.images_seen`; call on rank 0. Returns its folder.

    Raises `RunError` instead of writing weights that are not finite.
    """
    tensors = {
        f"{name}.{key}": tensor.detach().cpu().contiguous()
        for name, network in networks.items()
        for key, tensor in network.state_dict().items()
    }
    require_finite(progress.images_seen, networks)
    moments = {
        f"{name}.{key}": tensor.detach().cpu().contiguous()
        for name, optimizer in optimizers.items()
        for key, tensor in _optimizer_tensors(networks[name], optimizer).items()
    }
    folder = run_dir / "checkpoints" / str(progress.images_seen)
    with files.complete_folder(folder) as temporary:
        safetensors.torch.save_file(tensors, temporary / "networks.safetensors")
        safetensors.torch.save_file(moments, temporary / "optimizers.safetensors")
        record = {"format": FORMAT, **vars(progress)}
        (temporary / "progress.json").write_text(json.dumps(record, indent=2) + "\n")
    return folder


def require_finite(images_seen: int, networks: Mapping[str, nn.Module]) -> None:
    """Raise `RunError` if a network holds a number that is not finite: it must not be saved."""
    for name, network in networks.items():
        for key, tensor in network.state_dict().items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise RunError(
                    f"{name}.{key} is not finite at images_seen = {images_seen}; nothing is saved "
                    "of this state, earlier checkpoints are intact; try a lower learning rate"
                )


def latest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint, or None; call on rank 0 and tell the others."""
    found = files.numbered_folders(run_dir / "checkpoints")
    return found[-1] if found else None


def prune(run_dir: Path, keep: int) -> None:
    """Delete all but the newest `keep` complete checkpoints; call after a save, never before."""
    for folder in files.numbered_folders(run_dir / "checkpoints")[:-keep]:
        (folder / files.COMPLETE).unlink()  # from here on it is no checkpoint
        shutil.rmtree(folder)


def read_progress(folder: Path) -> Progress:
    """The counters of a checkpoint; raises `CheckpointError` if it is of another format."""
    path = folder / "progress.json"
    try:
        record = json.loads(path.read_text())
        version = record.pop("format")
        if version == FORMAT:
            progress = Progress(**record)
            if any(type(getattr(progress, k)) is not type(v) for k, v in vars(Progress()).items()):
                raise TypeError("a counter is not a number")
            if str(progress.images_seen) != folder.name:
                raise ValueError(f"it is of images_seen = {progress.images_seen}")
            return progress
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); {_go_back(folder)}") from None
    raise CheckpointError(
        f"{path}: checkpoint format {version}, this bigan reads format {FORMAT}; "
        "use the bigan that wrote it"
    )


def load(
    folder: Path,
    networks: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
) -> Progress:
    """Fill networks and optimisers from a checkpoint; returns its counters.

    Raises `CheckpointError` if a file is damaged or the checkpoint is of another model; nothing
    has been changed then.
    """
    progress = read_progress(folder)
    tensors = _read(folder, "networks.safetensors")
    moments = _read(folder, "optimizers.safetensors")
    for name, network in networks.items():
        _check_fit(folder, name, network, _part(tensors, name))
    for name in optimizers:
        _check_moments(folder, name, networks[name], _part(moments, name))
    for name, optimizer in optimizers.items():
        _fill_optimizer(networks[name], optimizer, _part(moments, name))
    for name, network in networks.items():
        network.load_state_dict(_part(tensors, name))
    return progress


def _optimizer_tensors(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value
        for name, parameter in network.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _check_moments(folder: Path, name: str, network: nn.Module, found: dict[str, Tensor]) -> None:
    """Adam's state of every parameter must be there, in the parameter's shape."""
    expected: dict[str, tuple[int, ...]] = {}
    for key, parameter in network.named_parameters():
        shape = tuple(parameter.shape)
        expected |= {f"{key}.step": (), f"{key}.exp_avg": shape, f"{key}.exp_avg_sq": shape}
    if {key: tuple(tensor.shape) for key, tensor in found.items()} != expected:
        raise CheckpointError(
            f"{folder}: the optimiser state of {name} is not that of this model; {_go_back(folder)}"
        )


def _fill_optimizer(
    network: nn.Module, optimizer: torch.optim.Optimizer, moments: dict[str, Tensor]
) -> None:
    parameters = dict(network.named_parameters())
    for name, tensor in moments.items():
        owner, _, key = name.rpartition(".")
        parameter = parameters[owner]
        if key != "step":  # moments lie in memory as their parameter does (channels-last)
            tensor = torch.empty_like(parameter).copy_(tensor)
        optimizer.state[parameter][key] = tensor.to(parameter.device)


def _read(folder: Path, name: str) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(folder / name)
    except (OSError, safetensors.SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{folder / name}: damaged or missing ({reason}); {_go_back(folder)}"
        ) from None


def _part(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = f"{name}."
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


def _check_fit(folder: Path, name: str, network: nn.Module, found: dict[str, Tensor]) -> None:
    expected = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    shapes = {key: tuple(tensor.shape) for key, tensor in found.items()}
    if shapes == expected:
        return
    key = next(k for k in [*expected, *shapes] if expected.get(k) != shapes.get(k))
    raise CheckpointError(
        f"{folder}: checkpoint of another model: {name}.{key} is {shapes.get(key, 'absent')} there "
        f"and {expected.get(key, 'absent')} in the config; use another run_dir, or that model"
    )


def _go_back(folder: Path) -> str:
    return f"delete {folder} to resume from the checkpoint before it"
