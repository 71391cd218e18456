"""What the residual networks share: the block, its shortcuts, the initialisation, the check of the arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch.nn.functional as F
from torch import Tensor, nn

from learn2perturb.engine.by_row import exact_by_row
from learn2perturb.errors import ConfigError


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """Return a 3 x 3 convolution that keeps the size (at stride 1), without bias: a batch norm follows."""
    return nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False)


@final
@exact_by_row
class PadShortcut(nn.Module):
    """Option-A shortcut of He et al. 2016: every ``stride``-th pixel, ``extra`` channels of zeros; no parameters."""

    def __init__(self, stride: int, extra: int) -> None:
        super().__init__()
        self.stride, self.extra = stride, extra

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C + extra, ceil(H / stride), ceil(W / stride))."""
        return F.pad(_every(x, self.stride), (0, 0, 0, 0, 0, self.extra))


def _is_last(x: Tensor) -> bool:
    """Tell whether features (N, C, H, W) lie in memory as (N, H, W, C)."""
    return not x.is_contiguous()


def _every(x: Tensor, stride: int) -> Tensor:
    """Return every ``stride``-th pixel of (N, C, H, W); the gradient is laid out in memory as ``x`` is.

    That of a slice comes back channels first, whatever the features are, and in bfloat16 an activation whose gradient
    is laid out otherwise takes 2.9 ms in place of 0.1 (32 x 16 x 32 x 32, one core).
    """
    if _is_last(x):
        return x.permute(0, 2, 3, 1)[:, ::stride, ::stride].permute(0, 3, 1, 2)
    return x[:, :, ::stride, ::stride]


def conv_shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Return the option-B shortcut of He et al. 2016: a 1 x 1 convolution and a batch norm."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(outputs))


@final
@exact_by_row
class BasicBlock(nn.Module):
    """``relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))``: the post-activation residual block."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: nn.Module) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, ceil(H / stride), ceil(W / stride))."""
        out = F.relu(self.bn1(self.conv1(x)))
        # Nothing in place: a hook on bn2 may hand out, or keep, the tensor that is added here.
        out = self.bn2(self.conv2(out)) + self.shortcut(x)
        return F.relu(out)


def pad_block(inputs: int, outputs: int, stride: int) -> BasicBlock:
    """Return a block with an option-A shortcut (the identity where nothing changes)."""
    plain = stride == 1 and inputs == outputs
    return BasicBlock(inputs, outputs, stride, nn.Identity() if plain else PadShortcut(stride, outputs - inputs))


def conv_block(inputs: int, outputs: int, stride: int) -> BasicBlock:
    """Return a block with an option-B shortcut (the identity where nothing changes)."""
    plain = stride == 1 and inputs == outputs
    return BasicBlock(inputs, outputs, stride, nn.Identity() if plain else conv_shortcut(inputs, outputs, stride))


def pool_and_flatten(x: Tensor) -> Tensor:
    """Average (N, C, H, W) over its pixels to (N, C), whatever the size; gradients are laid out as ``x`` is."""
    return x.permute(0, 2, 3, 1).mean(dim=(1, 2)) if _is_last(x) else F.adaptive_avg_pool2d(x, 1).flatten(1)


def initialize_convolutions(network: nn.Module) -> None:
    """Draw every convolution's weights from N(0, 2 / (k * k * out)) with torch's global generator."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            height, width = module.kernel_size
            nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / (height * width * module.out_channels)))


def checked_shape(num_classes: int, input_shape: Sequence[int]) -> tuple[int, int, int]:
    """Return ``input_shape`` as (C, H, W) after checking it and ``num_classes``.

    Raises:
        ConfigError: fewer than two classes, or no three positive whole numbers.
    """
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 2:
        raise ConfigError(f"num_classes {num_classes!r} is not allowed; give a whole number >= 2")
    sizes = tuple(input_shape) if isinstance(input_shape, Sequence) and not isinstance(input_shape, str) else ()
    if len(sizes) != 3 or any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in sizes):
        raise ConfigError(
            f"input_shape {input_shape!r} is not allowed; give (channels, height, width), three whole numbers >= 1, "
            "e.g. (3, 32, 32)"
        )
    return sizes
