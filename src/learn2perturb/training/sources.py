"""What a training reads: its batches, those it monitors, and what the network needs of their sizes."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

from learn2perturb.data import BatchSource, ImageData, JoinedLast, class_difference, classes_of, load_data, make_source
from learn2perturb.data.transforms import Transforms
from learn2perturb.errors import ConfigError, DataError
from learn2perturb.training.config import TrainConfig


class Sources(NamedTuple):
    """Training batches, batches to monitor, what the latter are, and the names of the classes where known."""

    train: BatchSource
    monitor: BatchSource | None
    monitored: str
    classes: tuple[str, ...] | None


def sources(config: TrainConfig, data: Any, device: torch.device) -> Sources:
    """Return the batches of a training: of the registered set, or of the user's ``data``.

    Raises:
        DataError: the classes of training and monitored set are numbered differently, or validation cannot be split.
    """
    if data is None:
        root, options = config.data_dir, config.dataset_options
        train_set: Any = load_data(config.dataset, "train", root=root, download=config.download, **options)
        watched: Any = None if config.validation else load_data(config.dataset, "test", root=root, **options)
    elif isinstance(data, (tuple, list)) and len(data) == 2 and not isinstance(data[0], (torch.Tensor, np.ndarray)):
        train_set, watched = data
    else:
        train_set, watched = data, None
    _check_classes(train_set, watched)
    label = "test"
    if config.validation:
        if not isinstance(train_set, ImageData):
            raise DataError("validation splits the package's own data sets; give yours as data=(train, validation)")
        train_set, watched = train_set.split(config.validation, config.seed)
        label = "validation"
    batch_size = config.closed().batch_size
    transforms = None if config.transforms is None else Transforms(config.transforms)
    own = transforms is None if config.augment is None else config.augment
    train = make_source(
        train_set, batch_size=batch_size, shuffle=True, augment=own, seed=config.seed, device=device,
        limit=config.limit, transforms=transforms,
    )  # fmt: skip
    monitor = None
    if config.monitor and watched is not None:
        monitor = make_source(watched, batch_size=250, device=device, seed=config.seed, limit=config.monitor)
    return Sources(train, monitor, label, _classes(train_set))


def _classes(data: Any) -> tuple[str, ...] | None:
    return classes_of(data.dataset if isinstance(data, DataLoader) else data)


def _check_classes(train_set: Any, watched: Any) -> None:
    """Refuse sets whose classes have other names, or another order: equal numbers would mean different things.

    Raises:
        DataError: they have.
    """
    first, second = _classes(train_set), _classes(watched)
    differ = None if first is None or second is None else class_difference(first, second)
    if differ is not None:
        raise DataError(
            f"training and monitored set number their classes differently: {differ}; give both the same list of classes"
        )


def joined(source: BatchSource) -> BatchSource:
    """Return the source with a last batch of one image made part of the batch before it.

    Raises:
        ConfigError: every batch is of one image.
    """
    if source.num_examples == 1 or source.num_examples == source.num_batches:
        raise ConfigError(
            "batches are of one image, of which a BatchNorm of the network sees one number a channel; give two "
            "images or more, and batch_size >= 2"
        )
    return JoinedLast(source) if getattr(source, "last_batch", 2) == 1 else source
