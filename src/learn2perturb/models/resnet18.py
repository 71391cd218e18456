"""ResNet-18 for small images (He et al. 2016): the Learn2Perturb paper's "V2(18)", in fact post-activation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch.nn.functional as F
from torch import Tensor, nn

from learn2perturb.engine.by_row import exact_by_row
from learn2perturb.models.blocks import (
    checked_shape,
    conv3x3,
    conv_block,
    initialize_convolutions,
    pool_and_flatten,
)
from learn2perturb.models.normalize import normalization_layer


@final
@exact_by_row
class ResNet18(nn.Module):
    """Four stages of two blocks, 64 to 512 channels, 3 x 3 stem without pooling, option-B shortcuts."""

    def __init__(self, num_classes: int, channels: int, normalize: nn.Module) -> None:
        super().__init__()
        self.normalize = normalize
        self.conv1 = conv3x3(channels, 64)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = nn.Sequential(conv_block(64, 64, 1), conv_block(64, 64, 1))
        self.layer2 = nn.Sequential(conv_block(64, 128, 2), conv_block(128, 128, 1))
        self.layer3 = nn.Sequential(conv_block(128, 256, 2), conv_block(256, 256, 1))
        self.layer4 = nn.Sequential(conv_block(256, 512, 2), conv_block(512, 512, 1))
        self.fc = nn.Linear(512, num_classes)
        initialize_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) in [0, 1] to logits (N, num_classes)."""
        out = F.relu(self.bn1(self.conv1(self.normalize(x))))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return self.fc(pool_and_flatten(out))


def resnet18(num_classes: int = 10, input_shape: Sequence[int] = (3, 32, 32), normalization: Any = "paper") -> ResNet18:
    """Build the ResNet-18 for small images.

    Raises:
        ConfigError: a bad shape, class count or normalisation constant.
    """
    channels, _, _ = checked_shape(num_classes, input_shape)
    return ResNet18(num_classes, channels, normalization_layer(normalization, channels))
