"""Defenses that were added after the checks were made, of all three kinds: what else is tried."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.literature.masked import levels, median
from tests.literature.networks import SIDE


class PatchCodes(nn.Module):
    """Replace each 2 x 2 patch by the nearest of a book of codes (vector quantisation; Gersho, Gray 1992, VQ 2017).

    False: which code is nearest has no gradient; the identity in its place breaks it.
    """

    def __init__(self, images: Tensor, count: int = 48) -> None:
        super().__init__()
        patches = self._patches(images).flatten(0, 1)
        chosen = torch.randperm(len(patches), generator=torch.Generator().manual_seed(0))[:count]
        codes = patches[chosen]
        for _ in range(10):  # k-means
            nearest = torch.cdist(patches, codes).argmin(dim=1)
            sums = torch.zeros_like(codes).index_add_(0, nearest, patches)
            counts = torch.bincount(nearest, minlength=count).unsqueeze(1)
            codes = torch.where(counts > 0, sums / counts.clamp(min=1), codes)
        self.register_buffer("codes", codes)

    @staticmethod
    def _patches(x: Tensor) -> Tensor:
        return F.unfold(x, 2, stride=2).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        nearest = torch.cdist(self._patches(x), self.codes.expand(len(x), -1, -1)).argmin(dim=2)
        return F.fold(self.codes[nearest].transpose(1, 2), (SIDE, SIDE), 2, stride=2)


class Squashed(nn.Module):
    """Squash the logits by a steep ``tanh``, as bounded logits have been proposed: it is flat in float32.

    False: the order of the logits is the undefended network's.
    """

    def __init__(self, network: nn.Module, slope: float = 1.0) -> None:
        super().__init__()
        self.network, self.slope = network, slope

    def forward(self, x: Tensor) -> Tensor:
        logits = self.network(x)
        return torch.tanh(self.slope * (logits - logits.detach().mean(dim=1, keepdim=True))) + 1e-3 * logits.detach()


class Cut(torch.autograd.Function):
    """The identity, whose gradient loses its largest entries."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Tensor:
        size = slopes[0].flatten(1).abs()
        return slopes[0] * (size <= size.quantile(0.3, dim=1, keepdim=True)).view_as(slopes[0])


def cut_gradient(x: Tensor) -> Tensor:
    """Drop the gradient where it is large: gradient masking as a regulariser is often (mis)implemented.

    False: the values are the undefended network's.
    """
    return Cut.apply(x)


def hashed_noise(x: Tensor, size: float = 0.1) -> Tensor:
    """Add noise made from a hash of the image's bytes: looks random, and is a fixed function that shatters gradients.

    False: noise that follows from the image is no noise; averaged over neighbours it falls.
    """
    rows = []
    for image in x.detach():
        digest = hashlib.sha256((image * 255).round().to(torch.uint8).numpy().tobytes()).digest()
        seed = int.from_bytes(digest[:6], "little")
        rows.append(torch.randn(image.shape, generator=torch.Generator().manual_seed(seed)))
    return x + size * torch.stack(rows).to(x)


class OutputCodes(nn.Module):
    """Error-correcting output codes (Verma, Swami 2019): 15 bits by saturated units, classes by correlation.

    False: the bits fall one by one, and a loss on logits finds how (Tramer et al. 2020).
    """

    def __init__(self, network: nn.Module, bits: int = 16) -> None:
        super().__init__()
        self.network = network
        hadamard = torch.ones(1, 1)
        while len(hadamard) < bits:
            hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
        self.register_buffer("code", hadamard[1 : bits + 1, :10] if bits < len(hadamard) else hadamard[:, :10])

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.network(x)) @ self.code


class Gate(nn.Module):
    """Answer by the smoothed image where the plain answer differs from it: squeezing as a detector (Xu et al. 2018).

    False: both fall together; the gate only takes the gradient away.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        plain, squeezed = self.network(x), self.network(median(x)).detach()
        suspicious = (plain.softmax(1) - squeezed.softmax(1)).abs().sum(dim=1, keepdim=True) > 0.5
        return torch.where(suspicious, squeezed, plain)


class Constant(nn.Module):
    """Answer with one constant where the image looks suspicious (Grosse et al. 2017: a class of adversarial ones).

    False as robustness: a refusal is no right answer, and the constant has no gradient.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        plain, squeezed = self.network(x), self.network(median(x)).detach()
        suspicious = (plain.softmax(1) - squeezed.softmax(1)).abs().sum(dim=1, keepdim=True) > 1.0
        return torch.where(suspicious, torch.zeros_like(plain), plain)


class Barrage(nn.Module):
    """A barrage of random transforms (BaRT; Raff et al. 2019): three of six in random order, for the whole pass.

    ``smooth``: only those with a gradient. With the others, rounding takes the gradient away in half of the passes.
    """

    def __init__(self, network: nn.Module, *, smooth: bool) -> None:
        super().__init__()
        self.network = network
        self.transforms: list[Callable[[Tensor], Tensor]] = [
            lambda x: x + 0.05 * torch.randn_like(x),
            lambda x: F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1) * 0.4 + x * 0.6,
            lambda x: 0.7 * x + 0.3 * x.roll(int(torch.randint(-1, 2, ())), dims=3),
            lambda x: (x - 0.5) * (0.8 + 0.4 * torch.rand(())) + 0.5,
        ]
        if not smooth:
            self.transforms += [lambda x: levels(x, int(torch.randint(3, 8, ()))), median]

    def forward(self, x: Tensor) -> Tensor:
        for number in torch.randperm(len(self.transforms))[:3]:
            x = self.transforms[int(number)](x)
        return self.network(x)


class MixupInference(nn.Module):
    """Mix each image with random others before it is classified, and average (Pang, Xu, Zhu 2020). True draws."""

    def __init__(self, network: nn.Module, others: Tensor, share: float = 0.7, draws: int = 5) -> None:
        super().__init__()
        self.network, self.share, self.draws = network, share, draws
        self.register_buffer("others", others)

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros(len(x), 10, device=x.device)
        for _ in range(self.draws):
            mixed = self.others[torch.randint(len(self.others), (len(x),))]
            total = total + self.network(self.share * x + (1 - self.share) * mixed).softmax(dim=1)
        return (total / self.draws).clamp_min(1e-12).log()


def dithered(x: Tensor, count: int = 8) -> Tensor:
    """Round activations at random, up or down, with the identity's gradient (Gupta et al. 2015). True on average."""
    shown = F.relu(x).clamp(max=2.0)
    steps = shown / 2 * (count - 1)
    rounded = torch.floor(steps + torch.rand_like(steps)) / (count - 1) * 2
    return shown + (rounded - shown).detach()


def binary(x: Tensor) -> Tensor:
    """Signs of activations, gradients of their hard ``tanh`` (Hubara et al. 2016; Galloway et al. 2018).

    False, as one step is no staircase: trained adversarially along these gradients it withstands these gradients.
    """
    shown = x.clamp(-1, 1)
    return shown + (torch.where(x > 0, 1.0, -1.0) - shown).detach()


class Largest(nn.Module):
    """The largest of the members' logits, class by class: a gradient that is true almost everywhere."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([member(x).log_softmax(dim=1) for member in self.members]).amax(dim=0)


class Half(nn.Module):
    """A network in half precision (bfloat16), as it is served: values are rounded, gradients lead all the same."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.network(x).float()


def squeezing(logits: Tensor, y: Tensor) -> Tensor:
    """Return cross-entropy with small logits (logit squeezing, Kannan et al. 2018, Shafahi et al. 2019).

    Small logits make small gradients, which hide nothing from their sign (Mosbach et al. 2018).
    """
    return F.cross_entropy(logits, y) + 0.5 * logits.square().sum(dim=1).mean()
