"""Image folders: ROOT/train/CLASS/* and ROOT/test/CLASS/*, any format that Pillow reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from learn2perturb.data.dataset import ImageData, data_root, pixel_statistics
from learn2perturb.errors import ConfigError, DataError


def load_folder(
    split: str = "train", *, root: Any = None, download: bool = False, size: int | tuple[int, int] | None = None
) -> ImageData:
    """Load ROOT/``split``/CLASS/*: one folder a class, in alphabetical order; ``download`` is not used.

    Images must all have one size, or are resized to ``size`` (a side, or (height, width)). A set of grey images has one
    channel; one colour image makes all of them RGB. The classes, and the statistics, are those of ROOT/train.

    Raises:
        ConfigError: ``size`` is not allowed.
        DataError: no such folder, a class unknown to train, no image, sizes that differ, or an unreadable file (named).
    """
    folder, size = data_root(root), _checked_size(size)
    reference = folder / ("train" if (folder / "train").is_dir() else split)
    classes = _classes(reference)
    images, labels = _read(folder / split, classes, size)
    train = images
    if reference != folder / split:
        train, _ = _read(reference, classes, size)
        if train.shape[1:] != images.shape[1:]:
            raise DataError(
                f"images of {folder / split} are {tuple(images.shape[1:])} but those of {reference} are "
                f"{tuple(train.shape[1:])} (C, H, W); make them alike, or give size="
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


def _read(folder: Path, classes: tuple[str, ...], size: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    for name in _classes(folder):
        if name not in classes:
            raise DataError(f"{folder / name}: class {name!r} is not among those of train: {', '.join(classes)}")
    arrays: list[np.ndarray] = []
    labels: list[int] = []
    first: Path | None = None
    for label, name in enumerate(classes):
        paths = sorted((folder / name).iterdir()) if (folder / name).is_dir() else []
        for path in (path for path in paths if path.is_file() and not _hidden(path)):
            array = _read_image(path, size)
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
    colour = any(array.shape[2] == 3 for array in arrays)
    stacked = np.stack([np.repeat(array, 3, axis=2) if colour and array.shape[2] == 1 else array for array in arrays])
    return torch.from_numpy(np.ascontiguousarray(stacked.transpose(0, 3, 1, 2))), torch.tensor(labels)


def _read_image(path: Path, size: tuple[int, int] | None) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(path) as opened:
            image = opened.convert("L" if opened.mode in ("1", "L") else "RGB")
            if size is not None:
                image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
            array = np.array(image, dtype=np.uint8)
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, its own bomb error
        raise DataError(f"cannot read the image {path}: {error}; replace or remove it") from error
    return array[:, :, None] if array.ndim == 2 else array


def _checked_size(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, (tuple, list)) else ()
    if len(pair) != 2 or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in pair):
        raise ConfigError(f"size {size!r} is not allowed; give a side in pixels, or (height, width)")
    return pair[0], pair[1]


def _hidden(path: Path) -> bool:
    return path.name.startswith(".") or path.name == "Thumbs.db"
