"""Trains the classifier `digits8-cnn-v1`, whose weights are shipped with bigan.

    python -m bigan.evaluation.train_digits8_cnn OUT.safetensors

This script documents the origin of the weights. Training again, even with another seed only, gives
a network whose distances differ by a constant factor, so the shipped weights must not be replaced
under this name. It trains on the training split of `bigan pack digits` (1,297 images) and prints
the accuracy on the 500 test images. Label smoothing (Szegedy et al. 2016, section 7) and dropout
keep the logits small, so that the penultimate layer does more than separate classes. The result is
deterministic on one machine; other processors may round differently.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from bigan import atomic_files
from bigan.data.packing.digits import digits
from bigan.evaluation.extractors import Digits8Network, to_digits8

SEED = 0
EPOCHS = 30
BATCH = 64
LEARNING_RATE = 1e-3  # Adam, cosine to zero
LABEL_SMOOTHING = 0.05
DROPOUT = 0.5  # of the penultimate layer


def load_split(name: str) -> tuple[Tensor, Tensor]:
    """One split of the digits: uint8 images [n, 1, 8, 8] and int64 labels [n]."""
    source = digits(8)
    members = [i for i in range(len(source)) if source.splits[i] == name]
    images = np.stack([source.read(i) for i in members])
    labels = torch.tensor([source.labels[i] for i in members])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels


def train(images: Tensor, labels: Tensor, epochs: int = EPOCHS) -> Digits8Network:
    """A network trained on uint8 images [n, 1, 8, 8] and labels [n], in evaluation mode."""
    torch.manual_seed(SEED)
    network = Digits8Network()
    optimizer = torch.optim.Adam(network.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    order = torch.Generator().manual_seed(SEED)
    inputs = to_digits8(images)
    for _ in range(epochs):
        for batch in torch.randperm(len(inputs), generator=order).split(BATCH):
            penultimate, _ = network(inputs[batch])
            logits = network.logits(F.dropout(penultimate, DROPOUT))
            loss = F.cross_entropy(logits, labels[batch], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def accuracy(network: Digits8Network, images: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy on uint8 images [n, 1, 8, 8] and labels [n], 0 to 1."""
    _, logits = network(to_digits8(images))
    return float((logits.argmax(dim=1) == labels).float().mean())


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m bigan.evaluation.train_digits8_cnn OUT.safetensors\n")
        return 2
    torch.set_num_threads(1)  # a fixed order of summation
    torch.use_deterministic_algorithms(True)
    network = train(*load_split("train"))
    content = safetensors.torch.save(network.state_dict())
    atomic_files.write_atomic(Path(arguments[0]), content)
    num = sum(p.numel() for p in network.parameters())
    sys.stdout.write(
        f"{num} parameters, held-out accuracy {accuracy(network, *load_split('test')):.4f}\n"
        f"{len(content)} bytes, sha256 {hashlib.sha256(content).hexdigest()}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
