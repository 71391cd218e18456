"""Image folders: ROOT/train/CLASS/* and ROOT/test/CLASS/*, in the common image formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from learn2perturb.data.dataset import ImageData, data_root, pixel_statistics
from learn2perturb.data.images import read_image
from learn2perturb.errors import ConfigError, DataError


def load_folder(
    split: str = "train", *, root: Any = None, download: bool = False, size: int | tuple[int, int] | None = None
) -> ImageData:
    """Load ROOT/``split``/CLASS/*: one folder a class, in alphabetical order; ``download`` is not used.

    Images must all have one size, or are resized to ``size`` (a side, or (height, width)). A set of grey images has one
    channel; one colour image makes all of them RGB. Classes, channels and statistics are those of ROOT/train.

    Raises:
        ConfigError: ``size`` is not allowed.
        DataError: no such folder, a class unknown to train, no image, sizes that differ, or an unreadable file (named).
    """
    folder, size = data_root(root), _checked_size(size)
    reference = folder / ("train" if (folder / "train").is_dir() else split)
    classes = _classes(reference)
    for name in _classes(folder / split):
        if name not in classes:
            raise DataError(
                f"{folder / split / name}: class {name!r} is not among those of train: {', '.join(classes)}"
            )
    train, labels = _read(reference, classes, size)
    images = train
    if reference != folder / split:
        images, labels = _read(folder / split, classes, size, channels=train.shape[1])
        if train.shape[2:] != images.shape[2:]:
            raise DataError(
                f"images of {folder / split} are {images.shape[2]} x {images.shape[3]} but those of {reference} are "
                f"{train.shape[2]} x {train.shape[3]}; make all images one size, or give size="
            )
    mean, std = pixel_statistics(train)
    return ImageData(
        "folder", images, labels, classes, flip=True, crop_padding=images.shape[-1] // 8, mean=mean, std=std
    )


def _classes(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        raise DataError(
            f"image folder {folder.absolute()} not found; give --data-dir (root=) the folder of train/CLASS/* and "
            "test/CLASS/*"
        )
    classes = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not _hidden(entry)))
    if not classes:
        raise DataError(f"image folder {folder.absolute()} has no class folders; put the images in {folder}/CLASS/")
    return classes


def _read(
    folder: Path, classes: tuple[str, ...], size: tuple[int, int] | None, *, channels: int | None = None
) -> tuple[Tensor, Tensor]:
    arrays: list[np.ndarray] = []
    labels: list[int] = []
    first: Path | None = None
    for label, name in enumerate(classes):
        for path in _files(folder / name):
            array = read_image(path, size)
            if channels == 1 and array.shape[2] == 3:
                raise DataError(
                    f"{path} is a colour image but those of train are grey; make it grey, or train in colour"
                )
            if first is None:
                first = path
            elif array.shape[:2] != arrays[0].shape[:2]:
                raise DataError(
                    f"{path} is {array.shape[0]} x {array.shape[1]} but {first} is {arrays[0].shape[0]} x "
                    f"{arrays[0].shape[1]}; make all images one size, or give size="
                )
            arrays.append(array)
            labels.append(label)
    if not arrays:
        raise DataError(f"image folder {folder.absolute()} has no image in its class folders {', '.join(classes)}")
    colour = channels == 3 or any(array.shape[2] == 3 for array in arrays)
    stacked = np.stack([np.repeat(array, 3, axis=2) if colour and array.shape[2] == 1 else array for array in arrays])
    return torch.from_numpy(np.ascontiguousarray(stacked.transpose(0, 3, 1, 2))), torch.tensor(labels)


def _files(folder: Path) -> list[Path]:
    """Return the files of a class, in order.

    Raises:
        DataError: something else lies there, whose images would be left out.
    """
    paths = sorted(path for path in folder.iterdir() if not _hidden(path)) if folder.is_dir() else []
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path} is no file; images must lie in the folder of their class, none deeper")
    return paths


def _checked_size(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, (tuple, list)) else ()
    if len(pair) != 2 or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in pair):
        raise ConfigError(f"size {size!r} is not allowed; give a side in pixels, or (height, width)")
    return pair[0], pair[1]


def _hidden(path: Path) -> bool:
    return path.name.startswith(".") or path.name == "Thumbs.db"
