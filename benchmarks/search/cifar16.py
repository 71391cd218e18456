"""CIFAR-10 at 16 x 16 pixels, a quarter of the work: a level of the search in benchmarks/search/screen.yaml."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from learn2perturb.data import ImageData, load_data
from learn2perturb.registry import DATASETS


def load_cifar16(split: str = "train", *, root: Any = None, download: bool = False) -> ImageData:
    """Return CIFAR-10 with the mean of every 2 x 2 pixels, rounded, in place of the four: uint8 (N, 3, 16, 16)."""
    whole = load_data("cifar10", split, root=root, download=download)
    images = F.avg_pool2d(whole.images.float(), 2).round().to(torch.uint8)
    mean, std = (0.4914, 0.4822, 0.4465), (0.2381, 0.2347, 0.2536)  # of the training images
    return ImageData("cifar16", images, whole.labels, whole.classes, flip=True, crop_padding=2, mean=mean, std=std)


DATASETS.register("cifar16", f"{__name__}:load_cifar16", "CIFAR-10 at 16 x 16 pixels: the mean of every 2 x 2")
