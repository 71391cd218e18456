"""The baseline of the timings: step, attack and loading as research code writes them.

Eager float32, NCHW; a whole ``loss.backward()`` in every step of the attack, so that gradients of all weights are
computed and accumulated there for nothing; one noise map a forward pass, shared by the batch, as in the released
Learn2Perturb code; images loaded and augmented one by one. Nothing here uses the engine, the attacks or the training
loop of this package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from learn2perturb.data import ImageData
from learn2perturb.defenses.settings import Settings
from learn2perturb.models import build_model
from learn2perturb.noise import noise_parameters, perturb

Step = Callable[[Tensor, Tensor], None]


def network(name: str, data: ImageData, *, noise: bool, device: torch.device) -> nn.Module:
    """Return a network with random weights; with ``noise``, one map a forward pass for the whole batch."""
    model = build_model(name, num_classes=data.num_classes, input_shape=data.input_shape)
    if noise:
        perturb(model, input_shape=data.input_shape, sharing="per_batch")
    return model.to(device)


def attack(model: nn.Module, x: Tensor, y: Tensor, *, eps: float, step_size: float, steps: int, eot: int = 1) -> Tensor:
    """Return PGD's adversarial images; the weights' gradients are left in ``.grad``, as such code leaves them."""
    adversarial = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
    for _ in range(steps):
        adversarial = adversarial.detach().requires_grad_()
        for _ in range(eot):
            F.cross_entropy(model(adversarial), y).backward()
        assert adversarial.grad is not None
        moved = adversarial.detach() + step_size * adversarial.grad.sign()
        adversarial = (x + (moved - x).clamp(-eps, eps)).clamp(0, 1)
    return adversarial.detach()


def training_step(model: nn.Module, settings: Settings, gamma: float = 1e-4) -> Step:
    """Return a step of training on clean and adversarial images, with Learn2Perturb's theta where there is noise.

    ``settings`` are those of a recipe, closed; ``attack_steps`` 0 leaves the attack out.
    """
    noise = noise_parameters(model)
    known = {id(parameter) for parameter in noise}
    weights = [parameter for parameter in model.parameters() if id(parameter) not in known]
    common = {"lr": settings.lr, "momentum": settings.momentum, "nesterov": settings.nesterov}
    optimizers = [torch.optim.SGD(weights, weight_decay=settings.weight_decay, **common)]  # type: ignore[arg-type]
    if noise:
        optimizers.append(torch.optim.SGD(noise, **common))  # type: ignore[arg-type]
    eps, step_size, steps = settings.eps, settings.attack_step_size, settings.attack_steps

    def step(x: Tensor, y: Tensor) -> None:
        model.eval()
        adversarial = attack(model, x, y, eps=eps, step_size=step_size, steps=steps)
        model.train()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = settings.alpha * F.cross_entropy(model(x), y)
        loss = loss + settings.beta * F.cross_entropy(model(adversarial), y)
        for theta in noise:
            loss = loss - gamma * theta.sqrt().sum()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            for theta in noise:
                theta.clamp_(min=0.01)

    return step


@final
class OneByOne(Dataset[tuple[Tensor, int]]):
    """Images converted, padded, cropped and mirrored one at a time, as a chain of transforms does it."""

    def __init__(self, data: ImageData) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return one augmented image, float32 (C, H, W) in [0, 1], and its label."""
        image = self.data.images[index].float() / 255
        _, height, width = image.shape
        padding = self.data.crop_padding
        if padding:
            top, left = torch.randint(0, 2 * padding + 1, (2,)).tolist()
            image = F.pad(image, (padding,) * 4)[:, top : top + height, left : left + width]
        if self.data.flip and torch.rand(()) < 0.5:
            image = image.flip(-1)
        return image, int(self.data.labels[index])
