"""The networks of the zoo: small, on the digits, each trained once a session, when it is first asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from learn2perturb.attacks import PGD
from learn2perturb.cli.demo import study_of
from learn2perturb.data import load_data
from learn2perturb.engine.random import isolated_rng
from learn2perturb.training import train

EPS = 0.15
EPOCHS = 15
SIDE = 8
SOURCES = ("undefended", "pgd_at", "twin")


class Small(nn.Module):
    """Two strided convolutions and a linear layer; ``activation`` follows each convolution."""

    def __init__(self, channels: int = 1, activation: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, 2, 1)
        self.conv2 = nn.Conv2d(16, 32, 3, 2, 1)
        self.out = nn.Linear(128, 10)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.activation(self.conv1(2 * x - 1))
        return self.out(self.activation(self.conv2(hidden)).flatten(1))


class Behind(nn.Module):
    """``network`` behind a transform of its images."""

    def __init__(self, transform: Callable[[Tensor], Tensor], network: nn.Module) -> None:
        super().__init__()
        self.transform, self.network = transform, network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(self.transform(x))


def fitted(
    network: Callable[[], nn.Module], defense: str = "none", *, seed: int = 0, epochs: int = EPOCHS, **settings: Any
) -> nn.Module:
    """Return ``network()`` trained by a defense of the package with its ``fast`` recipe."""
    with isolated_rng():
        torch.manual_seed(seed)
        (run,) = study_of([defense], "fast", epochs, seed).runs
        config = replace(run.config, device="cpu", attack_steps=5, **settings)
        return train(config, model=network(), progress=False).model.eval()


def squeezed(loss: Callable[[Tensor, Tensor], Tensor], *, size: float = 0.2, seed: int = 0) -> nn.Module:
    """Return a network trained with ``loss`` of logits and labels on noisy images."""
    data = load_data("digits", "train")
    x, y = data.images.float() / 255, data.labels
    with isolated_rng():
        torch.manual_seed(seed)
        return _at(1.0, lambda z, rows: loss(z, y[rows]), x + size * torch.randn_like(x)).eval()


def distilled(temperature: float, *, seed: int = 0) -> nn.Module:
    """Return a student of the plain network's soft labels, both at ``temperature``."""
    data = load_data("digits", "train")
    x, y = data.images.float() / 255, data.labels
    with isolated_rng():
        torch.manual_seed(seed)
        teacher = _at(temperature, lambda z, rows: F.cross_entropy(z, y[rows]), x)
        with torch.no_grad():
            soft = (teacher(x) / temperature).softmax(1)
        return _at(temperature, lambda z, rows: F.cross_entropy(z, soft[rows]), x).eval()


def _at(temperature: float, loss: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> nn.Module:
    network = Small()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(20):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            loss(network(x[rows]) / temperature, rows).backward()
            optimizer.step()
    return network


def paired(weight: float = 0.5, *, seed: int = 0, epochs: int = EPOCHS) -> nn.Module:
    """Return a network trained on clean and adversarial images whose logits are drawn together.

    Adversarial logit pairing (Kannan et al. 2018; Engstrom et al. 2018 find little in it). True.
    """
    data = load_data("digits", "train")
    x, y = data.images.float() / 255, data.labels
    with isolated_rng():
        torch.manual_seed(seed)
        network = Small()
        optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
        attack = PGD(EPS, EPS / 2, 5)
        for _ in range(epochs):
            for rows in torch.randperm(len(x)).split(64):
                adversarial = attack.craft(network.eval(), x[rows], y[rows])
                optimizer.zero_grad()
                clean, moved = network.train()(torch.cat([x[rows], adversarial])).chunk(2)
                loss = F.cross_entropy(moved, y[rows]) + F.cross_entropy(clean, y[rows])
                (loss + weight * (clean - moved).square().mean()).backward()
                optimizer.step()
        return network.eval()


_BASES: dict[str, Callable[[], nn.Module]] = {
    "undefended": lambda: fitted(Small, epochs=10),
    "undefended 2": lambda: fitted(Small, epochs=10, seed=3),
    "pgd_at": lambda: fitted(Small, "madry", seed=1),
    "twin": lambda: fitted(Small, "madry", seed=2),
}


@functools.cache
def base(name: str) -> nn.Module:
    """Return a base network, trained once; nobody changes it."""
    return _BASES[name]()


def sources(names: tuple[str, ...] = SOURCES) -> dict[str, nn.Module]:
    """Return what attacks are transferred from: a user with ``--train-sources`` has the same."""
    return {name: base(name) for name in names}
