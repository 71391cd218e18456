"""Batches on the device: whole sets held there as uint8, cropped and flipped in batches; other sets as streams."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from learn2perturb.data.batches import Batch, BatchSource, as_pair, pixels
from learn2perturb.data.dataset import ImageData, checked_limit
from learn2perturb.data.streams import CheckedSource, JoinedLast, LoaderSource
from learn2perturb.data.subset import balanced_rows, known_labels
from learn2perturb.data.transforms import Transforms
from learn2perturb.engine.devices import checked_device
from learn2perturb.engine.random import derive_seed
from learn2perturb.errors import ConfigError, InputError


@final
class MemorySource:
    """A set held on the device; shuffles, crops and flips there, and never drops the last batch.

    The order of an epoch comes from (seed, epoch) and the augmentation of a batch from (seed, epoch, batch), drawn on
    the CPU: any batch is the same on every device and whether or not those before it were read. ``on_disk``: images
    stay where they are, and a batch of them is taken to the device.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        batch_size: int,
        shuffle: bool = False,
        flip: bool = False,
        crop_padding: int = 0,
        num_classes: int | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        transforms: Transforms | None = None,
        on_disk: bool = False,
    ) -> None:
        self.images, self.labels = images if on_disk else images.to(device), labels.to(device)
        self.transforms = transforms
        self.batch_size, self.shuffle, self.flip, self.crop_padding = batch_size, shuffle, flip, crop_padding
        self.num_classes, self.seed = num_classes, seed

    def part(self, n: int) -> MemorySource:
        """Return a source of ``n`` of the images, balanced over the classes."""
        rows = balanced_rows(self.labels, len(self.labels), n)
        part = copy.copy(self)
        part.images, part.labels = self.images[rows.to(self.images.device)], self.labels[rows.to(self.labels.device)]
        return part

    @property
    def num_examples(self) -> int:
        """Images in an epoch."""
        return len(self.labels)

    @property
    def num_batches(self) -> int:
        """Batches in an epoch, the last smaller one included."""
        return math.ceil(self.num_examples / self.batch_size)

    @property
    def last_batch(self) -> int:
        """Images in the last batch."""
        return self.num_examples - (self.num_batches - 1) * self.batch_size

    @property
    def input_shape(self) -> tuple[int, int, int] | None:
        """Channels, height and width of an image."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of ``epoch`` from batch ``start`` on."""
        order = None
        if self.shuffle:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
            order = torch.randperm(self.num_examples, generator=generator).to(self.labels.device)
        for batch in range(start, self.num_batches):
            rows = slice(batch * self.batch_size, (batch + 1) * self.batch_size)
            if order is None:
                # A copy, for labels and for images of float type: what the caller writes must not reach the set.
                x, y = self.images[rows], self.labels[rows].clone()
                x = x.clone() if x.dtype == torch.float32 else x
            else:
                x, y = self.images[order[rows].to(self.images.device)], self.labels[order[rows]]
            x = x.to(y.device)
            if self.flip or self.crop_padding:
                generator = torch.Generator().manual_seed(derive_seed(self.seed, "augment", epoch, batch))
                x = augment(x, generator, padding=self.crop_padding, flip=self.flip)
            if self.transforms is not None:
                x = self.transforms(x, self.seed, "transforms", epoch, batch)
            yield pixels(x), y


def make_source(
    data: Any,
    *,
    batch_size: int = 128,
    shuffle: bool = False,
    augment: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
    limit: int | None = None,
    transforms: Transforms | None = None,
) -> BatchSource:
    """Return ``data`` as a source of batches on ``device``.

    ``data``: an ``ImageData`` (``augment`` turns on the crop and flip that suit it, and ``transforms`` follow), a pair
    (images, labels) of tensors
    or arrays, a ``Dataset`` (both batched here, not augmented: a data set has its own transforms), a ``DataLoader``
    (its own batch size and order are kept), or a ``BatchSource`` (its batches are checked). ``limit`` takes a part: of
    what is held here, and of a ``Dataset``, one balanced over the classes, of other sources the first images.

    Raises:
        InputError: ``data`` is none of these, or its images or labels are not as they must be.
        ConfigError: ``transforms`` are given for other data than an ``ImageData``; the batch size or limit is not
            a whole number >= 1.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"batch_size {batch_size!r} is not allowed; give a whole number >= 1")
    if limit is not None:
        checked_limit(limit)
    device = checked_device(device)
    if isinstance(data, ImageData):
        data = data if limit is None else data.take(limit)
        return MemorySource(
            data.images,
            data.labels,
            batch_size=batch_size,
            shuffle=shuffle,
            flip=augment and data.flip,
            crop_padding=data.crop_padding if augment else 0,
            num_classes=data.num_classes,
            seed=seed,
            device=device,
            transforms=transforms,
            on_disk=data.cache is not None,
        )
    if transforms is not None:
        raise ConfigError(
            f"transforms {transforms.text!r} are for data sets by name; data of yours, here a {type(data).__name__}, "
            "have their own"
        )
    if isinstance(data, tuple) or (isinstance(data, list) and all(isinstance(p, (Tensor, np.ndarray)) for p in data)):
        x, y = as_pair(data)
        x = x if x.dtype == torch.uint8 else x.to(torch.float32)
        data = MemorySource(x, y, batch_size=batch_size, shuffle=shuffle, seed=seed, device=device)
    if isinstance(data, MemorySource):
        return data if limit is None or limit >= data.num_examples else data.part(limit)
    if isinstance(data, DataLoader):
        return LoaderSource(data, seed=seed, device=device, limit=limit)
    if isinstance(data, BatchSource):
        own = isinstance(data, (LoaderSource, CheckedSource, JoinedLast))
        return data if own and limit is None else CheckedSource(data, limit=limit)
    sized = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    if isinstance(data, Dataset) or (sized and not isinstance(data, (str, bytes, dict, Tensor, np.ndarray))):
        return _of_dataset(data, batch_size=batch_size, shuffle=shuffle, seed=seed, device=device, limit=limit)
    raise InputError(
        f"cannot read batches from a {type(data).__name__}; give load_data(...), a pair (images, labels), a Dataset, "
        "a DataLoader or a BatchSource"
    )


def _of_dataset(
    data: Any, *, batch_size: int, shuffle: bool, seed: int, device: torch.device, limit: int | None
) -> LoaderSource:
    """Return batches of a ``Dataset``, whose order is ours unless it is a stream."""
    if isinstance(data, IterableDataset):
        return LoaderSource(DataLoader(data, batch_size=batch_size), seed=seed, device=device, limit=limit)
    if not len(data):
        raise InputError("the data set is empty; give at least one image")
    if limit is not None and limit < len(data):
        data = Subset(data, balanced_rows(known_labels(data), len(data), limit).tolist())
    loader: DataLoader[Any] = DataLoader(data, batch_size=batch_size, shuffle=shuffle)
    return LoaderSource(loader, seed=seed, device=device)


def augment(images: Tensor, generator: torch.Generator, *, padding: int, flip: bool) -> Tensor:
    """Crop each image at its own random place after padding with zeros, then mirror each with probability 1/2.

    ``images``: (N, C, H, W) of any type, on any device; draws come from the CPU ``generator``. Returns a new tensor.
    """
    n, channels, height, width = images.shape
    device = images.device
    # Only the draws travel, a few kilobytes: a copy of that size does not wait for the device.
    draws = torch.randint(0, 2 * padding + 1, (2, n, 1), generator=generator).to(device, non_blocking=True)
    rows = draws[0] + torch.arange(height, device=device)
    columns = torch.arange(width, device=device)
    if flip:
        mirror = torch.randint(0, 2, (n, 1), generator=generator).to(device, non_blocking=True)
        columns = torch.where(mirror.bool(), columns.flip(0), columns)
    columns = draws[1] + columns
    padded = F.pad(images, (padding,) * 4) if padding else images
    # One flat index a pixel, shared by the channels: half the time of indexing with four broadcast tensors.
    flat = (rows.unsqueeze(2) * padded.shape[3] + columns.unsqueeze(1)).view(n, 1, -1)
    cropped = padded.reshape(n, channels, -1).gather(2, flat.expand(-1, channels, -1))
    return cropped.view(n, channels, height, width)
