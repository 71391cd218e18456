"""The embedded default: scikit-learn's 1,797 handwritten digits of 8 x 8 pixels; needs no download."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from learn2perturb.data.dataset import ImageData, pixel_statistics
from learn2perturb.engine.random import derive_seed

TEST_PER_CLASS = 50


def load_digits(split: str = "train", *, root: Any = None, download: bool = False) -> ImageData:
    """Load the digits: 1,297 training or 500 test images (50 a class), 1 x 8 x 8; ``root``, ``download`` unused."""
    images, labels, test = _all()
    mean, std = pixel_statistics(torch.from_numpy(images[~test]))
    chosen = test if split == "test" else ~test  # a choice by mask is a copy: nobody changes what the next one gets
    return ImageData(
        "digits",
        torch.from_numpy(images[chosen]),
        torch.from_numpy(labels[chosen]),
        tuple(str(label) for label in range(10)),
        flip=False,
        crop_padding=0,
        mean=mean,
        std=std,
    )


@lru_cache(maxsize=1)
def _all() -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.bool_]]:
    """Return images, labels and which are of the test split; read once a process, which takes as long as an attack."""
    from sklearn import datasets

    values, labels = datasets.load_digits(return_X_y=True)
    images = np.round(values * 255 / 16).astype(np.uint8).reshape(-1, 1, 8, 8)
    test = np.zeros(len(labels), dtype=bool)
    for label in range(10):
        # Ranked by a hash of the index: the same split for ever, whatever the versions of numpy and torch.
        members = sorted(np.flatnonzero(labels == label).tolist(), key=lambda index: derive_seed("digits", index))
        test[members[:TEST_PER_CLASS]] = True
    return images, labels.astype(np.int64), test
