"""A custom attack: PGD that forgets no direction, in one class, and its row beside those of the package.

    python examples/own_attack.py
    learn2perturb evaluate RUN --import examples/own_attack.py --attacks pgd20 --attack momentum:eps=0.1,mu=0.75

An attack is a frozen dataclass. Its fields are its options; it only searches. The caller of the package checks the
images, puts the model into eval mode, keeps the result in the ball, counts passes and decides what fooled the model.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import torch
from torch import Tensor

import learn2perturb as l2p
from learn2perturb.attacks import Attack
from learn2perturb.attacks.base import Query
from learn2perturb.errors import ConfigError
from learn2perturb.evaluation import Evaluation
from learn2perturb.registry import ATTACKS


@dataclass(frozen=True)
class Momentum(Attack):
    """Steps along the sign of a decaying sum of gradients (Dong et al. 2018, MI-FGSM).

    Args:
        steps: how many.
        mu: share of the sum that stays, in [0, 1].
    """

    steps: int = field(default=10, kw_only=True)
    mu: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        """Refuse what makes no sense, and say how to fix it."""
        super().__post_init__()
        if not 0 <= self.mu <= 1:
            raise ConfigError(f"mu is {self.mu!r}; it must be in [0, 1]")

    def perturb(self, query: Query, x: Tensor, y: Tensor) -> Tensor:
        """Return the images after all steps; the caller has checked x and clips what comes back."""
        x_adv, total = x, torch.zeros_like(x)
        for _ in range(self.steps):
            gradient = query.gradient(x_adv, y)
            total = self.mu * total + gradient / gradient.abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-12)
            x_adv = self.ball.project(x_adv + self.ball.step(total, self.eps / self.steps), x, self.eps).clamp(0, 1)
        return x_adv


ATTACKS.register("momentum", f"{__name__}:Momentum", "PGD along a decaying sum of gradients")


def main(epochs: int = 3) -> Evaluation:
    """Train a plain network on the digits, and attack it with momentum and without."""
    config = l2p.TrainConfig(
        defense="none", model="digits_cnn", dataset="digits", recipe="fast", epochs=epochs, batch_size=64,
        engine="plain", monitor=0,
    )  # fmt: skip
    run = l2p.train(config)
    attacks = {"momentum": Momentum(0.1), "pgd": l2p.attacks.PGD(eps=0.1, step_size=0.0125, steps=10)}
    return l2p.evaluate(run.model, l2p.load_data("digits", "test", limit=100), attacks)


if __name__ == "__main__":
    print(main(*map(int, sys.argv[1:])))
