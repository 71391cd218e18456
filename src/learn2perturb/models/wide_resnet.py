"""Wide residual network (Zagoruyko, Komodakis 2016): pre-activation blocks, few and wide; PixelDP's variant of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, final

import torch.nn.functional as F
from torch import Tensor, nn

from learn2perturb.errors import ConfigError
from learn2perturb.models.blocks import checked_shape, conv3x3, initialize_convolutions, pool_and_flatten
from learn2perturb.models.normalize import normalization_layer

SHORTCUTS = ("conv", "pad")


@final
class PoolShortcut(nn.Module):
    """PixelDP's shortcut: the mean of ``stride`` x ``stride`` pixels, zero channels on both sides; no parameters."""

    def __init__(self, stride: int, extra: int) -> None:
        super().__init__()
        self.stride, self.extra = stride, extra

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C + extra, ceil(H / stride), ceil(W / stride))."""
        x = F.avg_pool2d(x, self.stride, ceil_mode=True)
        return F.pad(x, (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))


@final
class PreActivationBlock(nn.Module):
    """``conv2(act(bn2(conv1(act(bn1(x)))))) + shortcut``: the branch ends in a convolution.

    The shortcut starts from ``act(bn1(x))`` where ``shared`` is set, from ``x`` otherwise.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        *,
        shortcut: nn.Module,
        shared: bool,
        activation: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.shortcut = shortcut
        self.shared, self.activation = shared, activation

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, ceil(H / stride), ceil(W / stride))."""
        active = self.activation(self.bn1(x))
        out = self.conv2(self.activation(self.bn2(self.conv1(active))))
        return out + self.shortcut(active if self.shared else x)


@final
class WideResNet(nn.Module):
    """Three stages of four pre-activation blocks, 160 to 640 channels, a norm before the classifier (WRN-28-10)."""

    def __init__(self, shortcut: str, leak: float, num_classes: int, channels: int, normalize: nn.Module) -> None:
        super().__init__()
        self.activation = functools.partial(F.leaky_relu, negative_slope=leak) if leak else F.relu
        self.normalize = normalize
        self.conv1 = conv3x3(channels, 16)
        self.layer1 = self._stage(shortcut, 16, 160, 1)
        self.layer2 = self._stage(shortcut, 160, 320, 2)
        self.layer3 = self._stage(shortcut, 320, 640, 2)
        self.bn_last = nn.BatchNorm2d(640)
        self.fc = nn.Linear(640, num_classes)
        initialize_convolutions(self)

    def _stage(self, shortcut: str, inputs: int, outputs: int, stride: int) -> nn.Sequential:
        if shortcut == "conv":
            change: nn.Module = nn.Conv2d(inputs, outputs, kernel_size=1, stride=stride, bias=False)
        else:
            change = PoolShortcut(stride, outputs - inputs)
        # With convolutions every block that changes the width shares its first activation with the shortcut, as in the
        # authors' code; with padding the very first one does alone, as in PixelDP's.
        shared = shortcut == "conv" or inputs == 16
        first = PreActivationBlock(
            inputs, outputs, stride, shortcut=change, shared=shared, activation=self.activation
        )  # fmt: skip
        rest = (
            PreActivationBlock(outputs, outputs, 1, shortcut=nn.Identity(), shared=False, activation=self.activation)
            for _ in range(3)
        )
        return nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) in [0, 1] to logits (N, num_classes)."""
        out = self.layer3(self.layer2(self.layer1(self.conv1(self.normalize(x)))))
        return self.fc(pool_and_flatten(self.activation(self.bn_last(out))))


def wrn_28_10(
    num_classes: int = 10,
    input_shape: Sequence[int] = (3, 32, 32),
    normalization: Any = "paper",
    shortcut: str = "conv",
    leak: float = 0.0,
) -> WideResNet:
    """Build WRN-28-10.

    ``shortcut`` is ``conv`` (1 x 1 convolutions, as its authors) or ``pad`` (mean pixels and zero channels, as
    PixelDP); ``leak`` is the slope of the activation below 0 (PixelDP: 0.1).

    Raises:
        ConfigError: an unknown shortcut, a leak outside [0, 1), or a bad shape, class count or constant.
    """
    channels, _, _ = checked_shape(num_classes, input_shape)
    if shortcut not in SHORTCUTS:
        raise ConfigError(f"shortcut is {shortcut!r}; allowed: {', '.join(SHORTCUTS)}")
    if isinstance(leak, bool) or not isinstance(leak, (int, float)) or not 0 <= leak < 1:
        raise ConfigError(f"leak is {leak!r}; it must be a number in [0, 1), such as 0.1")
    return WideResNet(shortcut, leak, num_classes, channels, normalization_layer(normalization, channels))
