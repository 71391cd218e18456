"""ResNeXt for small images (Xie et al. 2017), as RSE uses it: grouped bottleneck blocks and a 1 x 1 stem."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch.nn.functional as F
from torch import Tensor, nn

from learn2perturb.engine.by_row import exact_by_row
from learn2perturb.models.blocks import checked_shape, conv_shortcut, initialize_convolutions, pool_and_flatten
from learn2perturb.models.normalize import normalization_layer

_EXPANSION = 2


@final
@exact_by_row
class GroupedBlock(nn.Module):
    """``relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut(x))``; conv2 is 3 x 3 and grouped."""

    def __init__(self, inputs: int, width: int, groups: int, stride: int) -> None:
        super().__init__()
        outputs = _EXPANSION * width
        self.conv1 = nn.Conv2d(inputs, width, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, stride=stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        plain = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if plain else conv_shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, 2 * width, ceil(H / stride), ceil(W / stride))."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


@final
@exact_by_row
class ResNeXt(nn.Module):
    """Three stages of three grouped blocks; the width of a group doubles from stage to stage."""

    def __init__(self, groups: int, group_width: int, num_classes: int, channels: int, normalize: nn.Module) -> None:
        super().__init__()
        widths = [groups * group_width * 2**stage for stage in range(3)]
        self.normalize = normalize
        self.conv1 = nn.Conv2d(channels, 64, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = _stage(64, widths[0], groups, 1)
        self.layer2 = _stage(_EXPANSION * widths[0], widths[1], groups, 2)
        self.layer3 = _stage(_EXPANSION * widths[1], widths[2], groups, 2)
        self.fc = nn.Linear(_EXPANSION * widths[2], num_classes)
        initialize_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) in [0, 1] to logits (N, num_classes)."""
        out = F.relu(self.bn1(self.conv1(self.normalize(x))))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.fc(pool_and_flatten(out))


def resnext29_2x64d(
    num_classes: int = 10, input_shape: Sequence[int] = (3, 32, 32), normalization: Any = "paper"
) -> ResNeXt:
    """Build ResNeXt29 (2x64d): cardinality 2, groups of 64, 128 and 256 channels, expansion 2.

    Raises:
        ConfigError: a bad shape, class count or normalisation constant.
    """
    channels, _, _ = checked_shape(num_classes, input_shape)
    return ResNeXt(2, 64, num_classes, channels, normalization_layer(normalization, channels))


def _stage(inputs: int, width: int, groups: int, stride: int) -> nn.Sequential:
    rest = (GroupedBlock(_EXPANSION * width, width, groups, 1) for _ in range(2))
    return nn.Sequential(GroupedBlock(inputs, width, groups, stride), *rest)
