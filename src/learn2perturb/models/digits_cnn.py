"""A small residual network for the 8 x 8 digits: an epoch of adversarial training takes about a second."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch.nn.functional as F
from torch import Tensor, nn

from learn2perturb.engine.by_row import exact_by_row
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
class DigitsCNN(nn.Module):
    """A stem and two residual blocks, 16 and 32 channels, option-A shortcuts."""

    def __init__(self, num_classes: int, channels: int, normalize: nn.Module) -> None:
        super().__init__()
        self.normalize = normalize
        self.conv1 = conv3x3(channels, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.block1 = pad_block(16, 16, 1)
        self.block2 = pad_block(16, 32, 2)
        self.fc = nn.Linear(32, num_classes)
        initialize_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) in [0, 1] to logits (N, num_classes)."""
        out = F.relu(self.bn1(self.conv1(self.normalize(x))))
        return self.fc(pool_and_flatten(self.block2(self.block1(out))))


def digits_cnn(
    num_classes: int = 10, input_shape: Sequence[int] = (1, 8, 8), normalization: Any = "paper"
) -> DigitsCNN:
    """Build the digits network; any number of channels and any size will do.

    Raises:
        ConfigError: a bad shape, class count or normalisation constant.
    """
    channels, _, _ = checked_shape(num_classes, input_shape)
    return DigitsCNN(num_classes, channels, normalization_layer(normalization, channels))
