"""CIFAR ResNet-V1 (He et al. 2016, section 4.2): 3 stages of (depth - 2) / 6 blocks, 16/32/64 channels, widened."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch.nn.functional as F
from torch import Tensor, nn

from learn2perturb.engine.by_row import exact_by_row
from learn2perturb.errors import ConfigError
from learn2perturb.models.blocks import (
    checked_shape,
    conv3x3,
    initialize_convolutions,
    pad_block,
    pool_and_flatten,
)
from learn2perturb.models.normalize import normalization_layer


@final
@exact_by_row
class CifarResNet(nn.Module):
    """Post-activation ResNet with parameter-free (option-A) shortcuts; images in [0, 1] to logits."""

    def __init__(
        self, blocks: int, widths: tuple[int, int, int], num_classes: int, channels: int, normalize: nn.Module
    ) -> None:
        super().__init__()
        self.normalize = normalize
        self.conv1 = conv3x3(channels, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = _stage(blocks, widths[0], widths[0], 1)
        self.layer2 = _stage(blocks, widths[0], widths[1], 2)
        self.layer3 = _stage(blocks, widths[1], widths[2], 2)
        self.fc = nn.Linear(widths[2], num_classes)
        initialize_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) in [0, 1] to logits (N, num_classes)."""
        out = F.relu(self.bn1(self.conv1(self.normalize(x))))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.fc(pool_and_flatten(out))


def resnet_cifar(
    depth: int = 20,
    width: float = 1.0,
    num_classes: int = 10,
    input_shape: Sequence[int] = (3, 32, 32),
    normalization: Any = "paper",
) -> CifarResNet:
    """Build ResNet-V1(``depth``) with 16, 32 and 64 times ``width`` channels.

    Raises:
        ConfigError: a depth that is not 6n + 2, a width that gives no channel, or a bad shape, class count or constant.
    """
    channels, _, _ = checked_shape(num_classes, input_shape)
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 8 or (depth - 2) % 6:
        raise ConfigError(f"depth {depth!r} is not allowed; give 6n + 2, e.g. 20, 32, 44 or 56")
    if not isinstance(width, (int, float)) or not 1 / 16 <= width < 1000:
        raise ConfigError(f"width {width!r} is not allowed; give a factor from 1/16 on, e.g. 1, 1.5, 2 or 4")
    first = round(16 * width)
    normalize = normalization_layer(normalization, channels)
    return CifarResNet((depth - 2) // 6, (first, 2 * first, 4 * first), num_classes, channels, normalize)


def _stage(blocks: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
    rest = (pad_block(outputs, outputs, 1) for _ in range(blocks - 1))
    return nn.Sequential(pad_block(inputs, outputs, stride), *rest)
