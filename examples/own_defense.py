"""A custom defense: adversarial training on softened labels and on noisy images, in one class.

    python examples/own_defense.py
    learn2perturb train --import examples/own_defense.py --defense soft_at --options.smoothing 0.05 \
        --dataset digits --model digits_cnn --recipe fast --epochs 6

A defense is a frozen dataclass. Its fields are its options; it overrides what it does differently from plain training
(here the loss), and the registry makes it a name like any other.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import learn2perturb as l2p
from learn2perturb.defenses import Clock, Defense, Losses, Settings, forward, training_adversary
from learn2perturb.errors import ConfigError
from learn2perturb.evaluation import Evaluation
from learn2perturb.registry import DEFENSES


@dataclass(frozen=True, kw_only=True)
class SoftAdversarialTraining(Defense):
    """Madry's objective (adversarial examples only) with label smoothing and Gaussian noise on the images."""

    smoothing: float = 0.1
    noise: float = 0.05

    def __post_init__(self) -> None:
        """Refuse what makes no sense, and say how to fix it."""
        if not 0 <= self.smoothing < 1:
            raise ConfigError(f"smoothing is {self.smoothing!r}; it must be in [0, 1)")

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, clock: Clock, settings: Settings) -> Losses:
        """Return the smoothed cross-entropy on noisy adversarial examples; the model is in train mode."""
        x_adv = training_adversary(settings).craft(model, x, y)
        logits = forward(model, (x_adv + self.noise * torch.randn_like(x_adv)).clamp(0, 1))
        loss = F.cross_entropy(logits, y, label_smoothing=self.smoothing)
        return Losses(loss, adversarial=loss.detach(), adversarial_correct=logits.detach().argmax(1) == y)


# "module:attribute", as in the registry of the package. The facts: its network draws no noise, its training attacks.
DEFENSES.register(
    "soft_at", f"{__name__}:SoftAdversarialTraining", "adversarial training on softened labels",
    stochastic=False, adversarial=True,
)  # fmt: skip


def main(epochs: int = 6) -> Evaluation:
    """Train the defense on the digits, attack it."""
    config = l2p.TrainConfig(
        defense="soft_at", options={"smoothing": 0.05}, model="digits_cnn", dataset="digits", recipe="fast",
        epochs=epochs, batch_size=64, eps=0.1, attack_step_size=0.025, engine="plain",
    )  # fmt: skip
    run = l2p.train(config)  # out="runs/soft_at" would keep it, with checkpoints and metrics
    attack = l2p.attacks.PGD(eps=0.1, step_size=0.0125, steps=20)
    return l2p.evaluate(run.model, l2p.load_data("digits", "test"), {"pgd20": attack})


if __name__ == "__main__":
    print(main(*map(int, sys.argv[1:])))
