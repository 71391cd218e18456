"""A gradient estimated from values, so that any attack by gradients needs none."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

from learn2perturb.engine.random import isolated_rng
from learn2perturb.evaluation.passes import Model, checked_logits

DIRECTIONS = 16


@final
class Estimated(nn.Module):
    """``model`` with a gradient estimated from its values, so that any attack by gradients needs none.

    ``g = mean_u u (v . (f(x + s u) - f(x - s u))) / 2 s`` over random signs u, the same draws on both sides (Spall
    1992; against masked gradients Uesato et al. 2018). ``size`` is s, [0, 1] pixel scale. ``queries`` counts the images
    that gradients were estimated from.
    """

    def __init__(self, model: Model, size: float, directions: int = DIRECTIONS) -> None:
        super().__init__()
        self.model, self.size, self.directions = model, size, directions
        self.queries = 0
        self.training = False  # as ``model`` is; eval() would switch off the dropouts that it draws by

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) to logits (N, K)."""
        logits: Tensor = _Differences.apply(x, self)
        return logits


class _Differences(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, estimated: Estimated) -> Tensor:
        ctx.save_for_backward(x)
        ctx.estimated = estimated
        return checked_logits(estimated.model, x)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None]:
        (x,), estimated = ctx.saved_tensors, ctx.estimated
        total = torch.zeros_like(x)
        estimated.queries += 2 * estimated.directions * len(x)
        for _ in range(estimated.directions):
            signs = torch.randint_like(x, 2) * 2 - 1
            with isolated_rng():
                up = checked_logits(estimated.model, x + estimated.size * signs)
            down = checked_logits(estimated.model, x - estimated.size * signs)
            slope = (outer[0] * (up - down)).sum(dim=1) / (2 * estimated.size)
            total += signs * slope.view(-1, *[1] * (x.ndim - 1))
        return total / estimated.directions, None
