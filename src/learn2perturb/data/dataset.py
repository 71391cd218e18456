"""A labelled set of images that fits in memory, and the function that loads one by name."""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from learn2perturb.brief import brief
from learn2perturb.data.decoded import rows_on_disk
from learn2perturb.data.subset import balanced_rows
from learn2perturb.engine.random import derive_seed
from learn2perturb.errors import ConfigError, DataError
from learn2perturb.registry import DATASETS

SPLITS = ("train", "test")
ROOT_VARIABLE = "LEARN2PERTURB_DATA_DIR"
_AT_ONCE = 1024  # images


@final
@dataclass(frozen=True, eq=False)
class ImageData:
    """Images and labels, with what is known of the set.

    ``images``: uint8 (N, C, H, W); ``labels``: int64 (N,), from 0 to ``num_classes`` - 1. ``flip`` and ``crop_padding``
    are the augmentation that suits the set; ``mean`` and ``std`` are those of the training pixels, in [0, 1] scale.
    ``published`` tells whether images and labels are those that a set of this name was published with, where known.
    ``whole`` names the split that these are all images of; None for a part of one, or where it is not known. ``cache``
    is the folder of the file that the images lie in; None where they are in memory.

    Raises:
        DataError: a wrong type or shape, no image, or a label outside the classes.
    """

    __repr__ = brief

    name: str
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    flip: bool
    crop_padding: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    published: bool | None = None
    whole: str | None = None
    cache: Path | None = None

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.ndim != 4 or 0 in images.shape:
            raise DataError(
                f"data set {self.name!r}: images are {images.dtype} of shape {tuple(images.shape)}; they must be uint8 "
                "(N, C, H, W), none of the sizes 0"
            )
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise DataError(
                f"data set {self.name!r}: labels are {labels.dtype} of shape {tuple(labels.shape)}; they must be int64 "
                f"of shape ({len(images)},)"
            )
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= len(self.classes):
            raise DataError(
                f"data set {self.name!r}: labels run from {low} to {high}; {len(self.classes)} classes allow 0 to "
                f"{len(self.classes) - 1}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def take(self, n: int) -> ImageData:
        """Return ``n`` images in a fixed random order, balanced over the classes (all if there are fewer).

        ``take(100)`` begins with ``take(10)``, and both have the classes in the shares of the whole set.

        Raises:
            ConfigError: ``n`` is not a whole number >= 1.
        """
        checked_limit(n)
        return self if n >= len(self) else self._select(balanced_rows(self.labels, len(self), n))

    def split(self, fraction: float, seed: int = 0) -> tuple[ImageData, ImageData]:
        """Hold out ``fraction`` of every class, drawn by ``seed``; return (rest, held out), each in its old order.

        Raises:
            ConfigError: the fraction is not inside (0, 1), or leaves one side without an image.
        """
        if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction < 1:
            raise ConfigError(f"split fraction {fraction!r} is not allowed; give a number between 0 and 1, e.g. 0.1")
        generator = torch.Generator().manual_seed(derive_seed(seed, "split"))
        labels = self.labels.cpu()
        held = torch.zeros(len(self), dtype=torch.bool)
        for label in range(self.num_classes):
            members = torch.nonzero(labels == label).flatten()
            members = members[torch.randperm(len(members), generator=generator)]
            held[members[: round(fraction * len(members))]] = True
        if held.all() or not held.any():
            raise ConfigError(
                f"split fraction {fraction!r} of {len(self)} images leaves one side empty; choose another fraction"
            )
        return self._select(~held), self._select(held)

    def _select(self, rows: Tensor) -> ImageData:
        rows = rows.to(self.images.device)
        images = self.images[rows] if self.cache is None else rows_on_disk(self.images, rows, self.cache)
        return replace(self, images=images, labels=self.labels[rows], whole=None)


def load_data(
    name: str,
    split: str = "train",
    *,
    root: str | os.PathLike[str] | None = None,
    download: bool = False,
    limit: int | None = None,
    **options: Any,
) -> ImageData:
    """Load the registered set ``name`` from the folder ``root``: $LEARN2PERTURB_DATA_DIR, else ``.data``, by default.

    ``limit`` takes so many images, balanced over the classes; ``options`` go to the set's own loader (``size``,
    ``labels`` and ``cache`` of ``folder``).

    Raises:
        UnknownNameError: no data set has that name.
        ConfigError: the split, the limit or an option is not allowed.
        DataError: the set is missing or damaged.
    """
    if split not in SPLITS:
        raise ConfigError(
            f"split {split!r} is not allowed; give 'train' or 'test' (a validation set: data.split(0.1, seed))"
        )
    if limit is not None:
        checked_limit(limit)
    entry = DATASETS.entry(name)
    loader = entry.load()
    allowed = set(inspect.signature(loader).parameters) - {"split", "root", "download"}
    for option in options:
        if option not in allowed:
            known = ", ".join(sorted(allowed)) or "none"
            raise ConfigError(f"data set {entry.name!r} has no option {option!r}; its options: {known}")
    data: ImageData = loader(split, root=data_root(root), download=download, **entry.arguments, **options)
    if data.published is not False:
        data = replace(data, whole=split)
    return data if limit is None else data.take(limit)


def data_root(root: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder that holds the data sets: ``root``, else $LEARN2PERTURB_DATA_DIR, else ``.data``."""
    if root is not None and not isinstance(root, (str, os.PathLike)):
        raise ConfigError(f"root is {root!r}; give the folder of the data sets, or leave it out")
    return Path(root or os.environ.get(ROOT_VARIABLE) or ".data").expanduser()


def checked_limit(limit: object) -> int:
    """Return ``limit`` if it is a whole number >= 1.

    Raises:
        ConfigError: it is not.
    """
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise ConfigError(f"limit {limit!r} is not allowed; give a whole number >= 1, or None for all images")
    return limit


def pixel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation over all pixels of each channel of uint8 (N, C, H, W), in [0, 1] scale."""
    # By histogram: exact, and no float copy of the whole set.
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in range(images.shape[1]):
        counts = torch.zeros(256, dtype=torch.float64)
        for part in images.split(_AT_ONCE):  # of a set on disk, a part in memory
            counts += torch.bincount(part[:, channel].flatten().cpu(), minlength=256)
        mean = (counts * values).sum() / counts.sum()
        means.append(float(mean))
        stds.append(float(((counts * (values - mean) ** 2).sum() / counts.sum()).sqrt()))
    return tuple(means), tuple(stds)
