"""Image folders: ROOT/train/CLASS/* and ROOT/test/CLASS/*, or a table of labels, in the common image formats."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from learn2perturb.data.dataset import ImageData, data_root, pixel_statistics
from learn2perturb.data.decoded import checked_cache, in_memory, on_disk
from learn2perturb.data.labelled import by_folders, by_table
from learn2perturb.errors import ConfigError, DataError


def load_folder(
    split: str = "train",
    *,
    root: Any = None,
    download: bool = False,
    size: int | tuple[int, int] | None = None,
    labels: str | None = None,
    cache: str | None = None,
) -> ImageData:
    """Load ROOT/``split``/CLASS/*: one folder a class, in alphabetical order; ``download`` is not used.

    Images must all have one size, or are resized to ``size`` (a side, or (height, width)). A set of grey images has one
    channel; one colour image makes all of them RGB. Classes, channels and statistics are those of ROOT/train.

    Args:
        split: ``train`` or ``test``.
        root: the folder of the images.
        download: has no effect.
        size: of all images.
        labels: a CSV table of files and their labels in place of folders of classes.
        cache: a folder for decoded images: they are decoded once and read from there, in place of memory.

    Raises:
        ConfigError: an option is not allowed.
        DataError: no such folder, a class unknown to train, no image, sizes that differ, or an unreadable file (named).
    """
    folder, size, place = data_root(root), _checked_size(size), checked_cache(cache)
    reference, own = by_folders(folder, split) if labels is None else by_table(folder, split, labels)
    read = in_memory if place is None else partial(on_disk, cache=place)
    train = read(reference, size, None)
    images = train
    if reference != own:
        images = read(own, size, train.shape[1])
        if train.shape[2:] != images.shape[2:]:
            raise DataError(
                f"images of {own.place} are {images.shape[2]} x {images.shape[3]} but those of {reference.place} are "
                f"{train.shape[2]} x {train.shape[3]}; make all images one size, or give size="
            )
    mean, std = pixel_statistics(train)
    return ImageData(
        "folder", images, torch.tensor([label for _, label in own.entries]), own.classes, flip=True,
        crop_padding=images.shape[-1] // 8, mean=mean, std=std, cache=place,
    )  # fmt: skip


def _checked_size(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, (tuple, list)) else ()
    if len(pair) != 2 or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in pair):
        raise ConfigError(f"size {size!r} is not allowed; give a side in pixels, or (height, width)")
    return pair[0], pair[1]
