"""A custom data set with a name: bars in clutter, drawn from a seed, for every verb.

    python examples/own_data.py
    learn2perturb train --import examples/own_data.py --dataset bars --model digits_cnn --recipe fast --epochs 3 \
        --eps 0.06

A data set is a function that gives its training or test images as ImageData. It says what may be done to the images
(flip, shift), and its mean and deviation, by which the networks of the package normalise.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

import learn2perturb as l2p
from learn2perturb.data import ImageData
from learn2perturb.data.dataset import pixel_statistics
from learn2perturb.evaluation import Evaluation
from learn2perturb.registry import DATASETS

SEEDS = {"train": 1, "test": 2}


def load_bars(split: str = "train", *, root: Any = None, download: bool = False, count: int = 512) -> ImageData:
    """Return images of 1 x 12 x 12 with a horizontal or a vertical bar in clutter, and which it is."""
    generator = torch.Generator().manual_seed(SEEDS[split])
    x = 0.4 * torch.rand(count, 1, 12, 12, generator=generator)
    y = torch.arange(count) % 2
    for image, label, place in zip(x, y, torch.randint(12, (count,), generator=generator), strict=True):
        (image[0, place, :] if label == 0 else image[0, :, place]).add_(0.5)
    images = (255 * x.clamp(0, 1)).round().to(torch.uint8)
    mean, std = pixel_statistics(images)
    return ImageData(
        "bars", images, y, ("horizontal", "vertical"), flip=False, crop_padding=0, mean=mean, std=std
    )  # fmt: skip


DATASETS.register("bars", f"{__name__}:load_bars", "a horizontal or a vertical bar in clutter, 12 x 12 pixels")


def main(epochs: int = 3) -> Evaluation:
    """Train on the bars by their name, and evaluate."""
    config = l2p.TrainConfig(
        defense="pgd_at", model="digits_cnn", dataset="bars", recipe="fast", epochs=epochs, batch_size=64, eps=0.06,
        attack_step_size=0.015, engine="plain", monitor=0,
    )  # fmt: skip
    run = l2p.train(config)
    attack = l2p.attacks.PGD(eps=0.06, step_size=0.0075, steps=10)
    return l2p.evaluate(run.model, l2p.load_data("bars", "test", limit=100), {"pgd10": attack})


if __name__ == "__main__":
    print(main(*map(int, sys.argv[1:])))
