"""Problems whose optimal adversarial images are known in closed form; attacks are tested on them.

Every problem has two classes with logits ``(0, z(x))``, and every image has the label 0, so an attack maximises ``z``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def two_logits(z: Tensor) -> Tensor:
    """Return logits ``(0, z)``, shape (N, 2)."""
    return torch.stack([torch.zeros_like(z), z], dim=1)


class Linear(nn.Module):
    """``z = w . x + b``.

    Optimum in the l_inf ball and the box: ``clip(x + eps sign(w), 0, 1)``. In the l2 ball, where the box does not bind:
    ``x + eps w / |w|``.
    """

    def __init__(self, shape: tuple[int, int, int], bias: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.bias = nn.Parameter(torch.tensor(bias))

    def forward(self, x: Tensor) -> Tensor:
        return two_logits((x * self.weight).flatten(1).sum(dim=1) + self.bias)

    def optimum(self, x: Tensor, eps: float, norm: str) -> Tensor:
        weight = self.weight.detach()
        direction = weight.sign() if norm == "linf" else weight / weight.norm()
        return (x + eps * direction).clamp(0, 1)


class Quadratic(nn.Module):
    """``z = -|x - c|^2``. Optimum: the point of the ball nearest to ``c``, if ``c`` is in the box."""

    def __init__(self, centre: Tensor) -> None:
        super().__init__()
        self.register_buffer("centre", centre)

    def forward(self, x: Tensor) -> Tensor:
        return two_logits(-(x - self.centre).flatten(1).square().sum(dim=1))

    def optimum(self, x: Tensor, eps: float, norm: str) -> Tensor:
        if norm == "linf":
            return self.centre.expand_as(x).clamp(x - eps, x + eps)
        away = self.centre - x
        length = away.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        return x + away * (eps / length).clamp(max=1)


class NoisyLinear(nn.Module):
    """``z = v . relu(A x + sigma n)``, n standard normal: additive noise before an activation.

    ``E[grad z] = A^T (v * Phi(A x / sigma))``; the mean of K independent draws has 1/K of one draw's variance.
    ``shared`` draws one n a forward pass, for all images; else each image has its own. ``draws`` keeps
    every n that was drawn.
    """

    def __init__(
        self, shape: tuple[int, int, int], hidden: int = 16, sigma: float = 1.0, *, shared: bool = False
    ) -> None:
        super().__init__()
        pixels = shape[0] * shape[1] * shape[2]
        self.matrix = nn.Parameter(torch.randn(hidden, pixels) / pixels**0.5)
        self.readout = nn.Parameter(torch.randn(hidden))
        self.sigma = sigma
        self.shared = shared
        self.draws: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn(1 if self.shared else len(x), len(self.matrix))
        self.draws.append(noise)
        return two_logits(torch.relu(x.flatten(1) @ self.matrix.T + self.sigma * noise) @ self.readout)

    def expected_gradient(self, x: Tensor) -> Tensor:
        active = torch.special.ndtr(x.flatten(1) @ self.matrix.T / self.sigma)
        return ((active * self.readout) @ self.matrix).view_as(x).detach()


def as_if_on(kind: str, x: Tensor) -> Tensor:
    """Return ``x``, which is on the CPU, as a tensor that says that it is on a device of another kind."""

    class Elsewhere(Tensor):
        device = property(lambda self: torch.device(kind))  # type: ignore[assignment]

    return x.as_subclass(Elsewhere)
