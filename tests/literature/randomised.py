"""Defenses with draws at test time. Their randomness is real, robust or not, and no check may fail for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.literature.networks import SIDE, Small


class SAP(nn.Module):
    """Stochastic activation pruning (Dhillon et al. 2018): keep activations drawn in proportion to their size.

    Each of ``share * size`` draws keeps one, and what is kept is divided by its chance to be. Real draws with true
    gradients, on an undefended network: EOT breaks it (Athalye et al. 2018).
    """

    def __init__(self, share: float = 1.0) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        size = flat.detach().abs() + 1e-8
        chance = size / size.sum(dim=1, keepdim=True)
        count = max(1, round(self.share * flat.shape[1]))
        kept = torch.zeros_like(flat).scatter_(1, torch.multinomial(chance, count, replacement=True), 1.0)
        kept_at_all = -torch.expm1(count * torch.log1p(-chance.clamp(max=1 - 1e-6)))
        return (flat * kept / kept_at_all).view_as(x)


class DroppedAtTest(nn.Module):
    """Dropout that stays on (Gal, Ghahramani 2016; Feinman et al. 2017), by the function: no module to switch off."""

    def __init__(self, network: Small, p: float = 0.3) -> None:
        super().__init__()
        self.network, self.p = network, p

    def forward(self, x: Tensor) -> Tensor:
        network = self.network
        hidden = F.dropout(F.relu(network.conv1(2 * x - 1)), self.p, training=True)
        hidden = F.relu(network.conv2(hidden)).flatten(1)
        return network.out(F.dropout(hidden, self.p, training=True))


class MonteCarlo(nn.Dropout):
    """A dropout module that ignores eval mode, as is common for Monte Carlo dropout."""

    def train(self, mode: bool = True) -> MonteCarlo:
        return super().train(True)


class DropoutModules(nn.Module):
    """``network`` with a :class:`MonteCarlo` before its last layer."""

    def __init__(self, network: Small, p: float = 0.3) -> None:
        super().__init__()
        self.network, self.dropout = network, MonteCarlo(p)

    def forward(self, x: Tensor) -> Tensor:
        network = self.network
        hidden = F.relu(network.conv2(F.relu(network.conv1(2 * x - 1)))).flatten(1)
        return network.out(self.dropout(hidden))


def resize_pad(x: Tensor) -> Tensor:
    """Resize to 6, 7 or 8 pixels and pad to 8 at a random place (Xie et al. 2018): one draw for the whole pass.

    True gradients through bilinear resizing; falls to EOT on an undefended network (Athalye et al. 2018).
    """
    side = int(torch.randint(SIDE - 2, SIDE + 1, ()))
    left, top = (int(torch.randint(SIDE - side + 1, ())) for _ in range(2))
    small = F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)
    return F.pad(small, (left, SIDE - side - left, top, SIDE - side - top))


class Ensemble(nn.Module):
    """One of the members in each pass, with these chances (Pinot et al. 2020, BAT: .9 and .1).

    ``own``: for each image, not for the pass.
    """

    def __init__(self, members: list[nn.Module], chances: list[float], *, own: bool = False) -> None:
        super().__init__()
        self.members, self.own = nn.ModuleList(members), own
        self.register_buffer("chances", torch.tensor(chances))

    def forward(self, x: Tensor) -> Tensor:
        if not self.own:
            return self.members[int(torch.multinomial(self.chances, 1))](x)
        chosen = torch.multinomial(self.chances, len(x), replacement=True)
        answers = torch.stack([member(x) for member in self.members])
        return answers[chosen, torch.arange(len(x))]


class GaussianInput(nn.Module):
    """Gaussian noise on the images, a draw for each (Cohen et al. 2019, its base network; Zantedeschi et al. 2017)."""

    def __init__(self, network: nn.Module, size: float) -> None:
        super().__init__()
        self.network, self.size = network, size

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x + self.size * torch.randn_like(x))


class Smoothed(nn.Module):
    """Log of the mean probability over noisy copies (Cohen et al. 2019, Salman et al. 2019): draws average to little.

    ``votes``: counts of labels instead, which have no gradient.
    """

    def __init__(self, network: nn.Module, size: float, draws: int = 16, *, votes: bool = False) -> None:
        super().__init__()
        self.network, self.size, self.draws, self.votes = network, size, draws, votes

    def forward(self, x: Tensor) -> Tensor:
        copies = x.repeat(self.draws, 1, 1, 1)
        logits = self.network(copies + self.size * torch.randn_like(copies)).view(self.draws, len(x), -1)
        if self.votes:
            return F.one_hot(logits.argmax(dim=2), logits.shape[2]).sum(dim=0).to(x.dtype)
        return logits.softmax(dim=2).mean(dim=0).clamp_min(1e-12).log()


class WeightNoise(nn.Module):
    """Noise on the weights by a user's own hand, one draw a pass (He et al. 2019 without their module)."""

    def __init__(self, network: Small, size: float) -> None:
        super().__init__()
        self.network, self.size = network, size

    def forward(self, x: Tensor) -> Tensor:
        noisy = {
            name: value + self.size * value.detach().std() * torch.randn_like(value)
            for name, value in self.network.named_parameters()
            if value.ndim > 1
        }
        return torch.func.functional_call(self.network, noisy, (x,))


class RandomFilters(nn.Module):
    """Random projection filters (RPF; Dong, Xu 2023): 12 of 16 filters of the first layer are drawn in each pass."""

    def __init__(self, drawn: int = 12) -> None:
        super().__init__()
        self.network, self.drawn = Small(), drawn

    def forward(self, x: Tensor) -> Tensor:
        conv1 = self.network.conv1
        fresh = torch.randn_like(conv1.weight[: self.drawn]) / 3
        weight = torch.cat([fresh, conv1.weight[self.drawn :]])
        hidden = F.relu(F.conv2d(2 * x - 1, weight, conv1.bias, 2, 1))
        return self.network.out(F.relu(self.network.conv2(hidden)).flatten(1))


class Correlated(nn.Module):
    """WCA-Net (Eustratiadis et al. 2021): correlated Gaussian noise ``L eps`` on the penultimate features."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Small()
        self.factor = nn.Parameter(torch.rand(128, 128).tril() / 8)

    def forward(self, x: Tensor) -> Tensor:
        network = self.network
        hidden = F.relu(network.conv2(F.relu(network.conv1(2 * x - 1)))).flatten(1)
        return network.out(hidden + torch.randn_like(hidden) @ self.factor.T)


class ForeignRSE(nn.Module):
    """RSE (Liu et al. 2018) in plain torch: noise of .2 before the first layer, .1 before the others; none if quiet."""

    def __init__(self, quiet: bool = False) -> None:
        super().__init__()
        self.network, self.quiet = Small(), quiet

    def forward(self, x: Tensor) -> Tensor:
        network = self.network
        hidden = F.relu(network.conv1(2 * self._noisy(x, 0.2) - 1))
        return network.out(F.relu(network.conv2(self._noisy(hidden, 0.1))).flatten(1))

    def _noisy(self, x: Tensor, size: float) -> Tensor:
        return x if self.quiet else x + size * torch.randn_like(x)
