"""Scoring as the released code of the paper scores: to show what that is worth, not to judge by it."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from learn2perturb.engine.modes import in_mode
from learn2perturb.noise import Perturbation, noise_modules


def share_draws(model: nn.Module) -> None:
    """Let all rows of a batch share one draw of feature noise, as in the released code; weight noise does so anyway."""
    for module in noise_modules(model):
        if isinstance(module, Perturbation):
            module.sharing = "per_batch"


@final
class ReleasedScores:
    """Score as the released code does: BatchNorm in train mode, so with the statistics of the batch that is scored.

    No module, so that the evaluation does not put it into eval mode. The running statistics are updated by the test
    images, as there: each batch is attacked with what those before it left behind. Beside the released code's one
    pass a batch there are those that the evaluation itself makes to look at the model.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network

    def __call__(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) to logits (N, K)."""
        with in_mode(self._network, True), torch.no_grad():
            return self._network(x)
