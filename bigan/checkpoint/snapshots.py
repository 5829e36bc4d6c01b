"""Snapshots: the only thing training hands to evaluation and to users.

    <run_dir>/snapshots/<images_seen>/weights.safetensors   averaged generator, parameters + buffers
                                      config.yaml           the complete recipe
                                      COMPLETE              written last; without it, no snapshot

The weights file holds no time stamp: the same training gives the same bytes.
"""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from bigan import atomic_files, models
from bigan import config as configs
from bigan.errors import UserError
from bigan.run_config import RunConfig

DONE = "DONE"  # written into the run folder last: no snapshot will follow


def write(run_dir: Path, images_seen: int, generator: nn.Module, config: RunConfig) -> Path:
    """Write the snapshot of `generator` (standing statistics included); returns its folder."""
    folder = run_dir / "snapshots" / str(images_seen)
    tensors = {name: t.detach().cpu().contiguous() for name, t in generator.state_dict().items()}
    with atomic_files.complete_folder(folder) as temporary:
        safetensors.torch.save_file(tensors, temporary / "weights.safetensors")
        (temporary / "config.yaml").write_text(configs.dump(config))
    return folder


def find(run_dir: Path) -> list[Path]:
    """Complete snapshots of a run, oldest first."""
    return atomic_files.numbered_folders(run_dir / "snapshots")


def load(folder: Path, device: torch.device | str = "cpu") -> tuple[nn.Module, RunConfig]:
    """The generator of a snapshot in evaluation mode, and its recipe.

    Raises `UserError` if the folder is not a complete snapshot or does not fit its own config.
    """
    if not atomic_files.is_complete(folder):
        raise UserError(f"{folder}: not a complete snapshot (no {atomic_files.COMPLETE} in it)")
    config = configs.load(RunConfig, folder / "config.yaml")
    try:
        tensors = safetensors.torch.load_file(folder / "weights.safetensors")
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{folder / 'weights.safetensors'}: cannot be read: {error}") from None
    generator, _ = models.build(config.model, "meta")
    try:
        generator.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"{folder}: the weights do not fit config.yaml: {first}") from None
    return generator.to(device).eval().requires_grad_(False), config
