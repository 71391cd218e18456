"""Defenses whose robustness is what gradient attacks find, or whose gradients at least hide nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.literature.masked import levels


def straight_through(x: Tensor, count: int = 8) -> Tensor:
    """Round activations to ``count`` levels of [0, 2], with the identity's gradient (Rakin et al. 2018, Lin 2019).

    True: trained adversarially through that same gradient, its attacks lead where they must.
    """
    shown = F.relu(x).clamp(max=2.0)
    return shown + (2 * levels(shown / 2, count) - shown).detach()


def smooth(x: Tensor) -> Tensor:
    """Activate smoothly (Xie et al. 2020, smooth adversarial training). True."""
    return F.silu(x)


class Denoiser(nn.Module):
    """A denoiser before the network, trained to undo perturbations (HGD, Liao et al. 2018; Gu, Rigazio 2015).

    Its gradient is true and finds the undefended network behind it: what is claimed is false, yet nothing is hidden.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 1, 3, padding=1)
        self.network = network.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x + self.second(F.relu(self.first(x))))


def smoothing(x: Tensor) -> Tensor:
    """Blur by 3 x 3 (Li, Li 2017): linear, so its gradient is true; it protects from little."""
    kernel = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]], device=x.device).view(1, 1, 3, 3) / 16
    return F.conv2d(x, kernel, padding=1)


class Averaged(nn.Module):
    """The mean of the members' logits (Tramer et al. 2018, Pang et al. 2019): gradients are those of all."""

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([member(x) for member in self.members]).mean(dim=0)
