"""Transforms of torchvision as augmentation, by name."""

from __future__ import annotations

import pytest
import torch

from learn2perturb.data.transforms import Transforms
from learn2perturb.errors import ConfigError, UnknownNameError

pytestmark = pytest.mark.compat


def test_transforms_of_torchvision_by_name(torchvision):
    images = torch.arange(2 * 8 * 8, dtype=torch.uint8).view(2, 1, 8, 8)
    flipped = Transforms("RandomHorizontalFlip:p=1 + RandomInvert:p=1")(images, 0)
    assert torch.equal(flipped, 255 - images.flip(3))
    for text in (
        "RandAugment:num_ops=1",
        "RandomErasing:p=1",
        "RandomResizedCrop:size=8",
        "ColorJitter:brightness=1e-1",
    ):
        found = Transforms(text)(images.expand(-1, 3, -1, -1), 1)
        assert (found.dtype, found.shape) == (torch.uint8, (2, 3, 8, 8))
    with pytest.raises(UnknownNameError, match="'RandomFlip': did you mean 'RandomVerticalFlip'"):
        Transforms("RandomFlip")
    for text in ("RandomErasing:p=2", "RandomErasing:q=1"):
        with pytest.raises(ConfigError, match=f"transform {text} cannot be made"):
            Transforms(text)
