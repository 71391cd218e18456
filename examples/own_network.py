"""A custom network and custom data, hardened in two calls: train it with learned noise, attack it.

    python examples/own_network.py

The network is any module that maps images in [0, 1] to logits; the data are two tensors (a Dataset or a DataLoader
would do as well).
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

import learn2perturb as l2p
from learn2perturb.evaluation import Evaluation


def bars(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return images (N, 1, 12, 12) in [0, 1] of a horizontal or vertical bar in clutter, and which it is."""
    generator = torch.Generator().manual_seed(seed)
    x = 0.4 * torch.rand(count, 1, 12, 12, generator=generator)
    y = torch.randint(2, (count,), generator=generator)
    for image, label, place in zip(x, y, torch.randint(12, (count,), generator=generator), strict=True):
        image[0, place, :] += 0.5 * (label == 0)
        image[0, :, place] += 0.5 * (label == 1)
    return x.clamp(0, 1), y


def network() -> nn.Module:
    """Return a plain network that knows nothing of this package."""
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 24, 3, stride=2, padding=1), nn.BatchNorm2d(24), nn.ReLU(),
        nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(24, 2),
    )  # fmt: skip


def main(epochs: int = 6) -> Evaluation:
    """Train the network with Learn2Perturb, noise at its two norms, and evaluate it."""
    config = l2p.TrainConfig(
        defense="learn2perturb", options={"sites": ["1", "4"]}, recipe="fast", epochs=epochs, batch_size=64, eps=0.06,
        attack_step_size=0.015, augment=False, engine="plain",
    )  # fmt: skip
    torch.manual_seed(0)
    run = l2p.train(config, model=network(), data=(bars(1024, seed=1), bars(256, seed=2)))
    attack = l2p.attacks.PGD(eps=0.06, step_size=0.0075, steps=20, eot=5)
    return l2p.evaluate(run.model, bars(256, seed=2), {"eot-pgd20": attack})


if __name__ == "__main__":
    print(main(*map(int, sys.argv[1:])))
