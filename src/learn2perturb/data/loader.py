"""Batches on the device: whole sets held there as uint8, cropped and flipped in batches, or the user's loader."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from learn2perturb.data.dataset import ImageData, checked_limit
from learn2perturb.engine.devices import checked_device
from learn2perturb.engine.random import derive_seed, isolated_rng, seed_everything
from learn2perturb.errors import ConfigError, InputError


@runtime_checkable
class BatchSource(Protocol):
    """What training and evaluation read: epochs of batches, each a deterministic function of (seed, epoch)."""

    @property
    def num_examples(self) -> int:
        """Images in an epoch."""
        ...

    @property
    def num_batches(self) -> int:
        """Batches in an epoch, the last smaller one included."""
        ...

    @property
    def input_shape(self) -> tuple[int, int, int] | None:
        """Channels, height and width, where known."""
        ...

    @property
    def num_classes(self) -> int | None:
        """Number of classes, where known."""
        ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches ``start``, ``start + 1``, ... as (x float32 (N, C, H, W) in [0, 1], y int64 (N,))."""
        ...


class MemorySource:
    """A set held on the device; shuffles, crops and flips there, and never drops the last batch.

    The order of an epoch comes from (seed, epoch) and the augmentation of a batch from (seed, epoch, batch), drawn on
    the CPU: any batch is the same on every device and whether or not those before it were read.
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
    ) -> None:
        self.images, self.labels = images.to(device), labels.to(device)
        self.batch_size, self.shuffle, self.flip, self.crop_padding = batch_size, shuffle, flip, crop_padding
        self.num_classes, self.seed = num_classes, seed

    @property
    def num_examples(self) -> int:
        """Images in an epoch."""
        return len(self.labels)

    @property
    def num_batches(self) -> int:
        """Batches in an epoch, the last smaller one included."""
        return math.ceil(self.num_examples / self.batch_size)

    @property
    def input_shape(self) -> tuple[int, int, int] | None:
        """Channels, height and width of an image."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of ``epoch`` from batch ``start`` on."""
        order = None
        if self.shuffle:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
            order = torch.randperm(self.num_examples, generator=generator).to(self.images.device)
        for batch in range(start, self.num_batches):
            rows = slice(batch * self.batch_size, (batch + 1) * self.batch_size)
            if order is None:
                # A copy, for labels and for images of float type: what the caller writes must not reach the set.
                x, y = self.images[rows], self.labels[rows].clone()
                x = x.clone() if x.dtype == torch.float32 else x
            else:
                x, y = self.images[order[rows]], self.labels[order[rows]]
            if self.flip or self.crop_padding:
                generator = torch.Generator().manual_seed(derive_seed(self.seed, "augment", epoch, batch))
                x = augment(x, generator, padding=self.crop_padding, flip=self.flip)
            yield _pixels(x), y


class LoaderSource:
    """The user's ``DataLoader``: every epoch starts from a seed of (seed, epoch), every fetch from one of its batch.

    Batches before ``start`` are fetched and thrown away, so that a loader with a state of its own is where it was. With
    worker processes the batches repeat as long as the workers are started anew each epoch (no ``persistent_workers``).
    """

    def __init__(
        self, loader: DataLoader[Any], *, seed: int = 0, device: torch.device | str = "cpu", limit: int | None = None
    ) -> None:
        try:
            batches = len(loader)
        except TypeError:
            raise InputError(
                "the DataLoader has no length; give its dataset a __len__, so that schedules know the epoch"
            ) from None
        if batches < 1:
            raise InputError("the DataLoader is empty; give it at least one batch (is drop_last=True on a small set?)")
        self.loader, self.seed, self.device, self.limit = loader, seed, torch.device(device), limit
        size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
        examples = _length(loader.sampler) if loader.batch_size else None
        examples = _length(loader.dataset) if examples is None else examples
        if size and (examples is None or loader.drop_last or math.ceil(examples / size) != batches):
            examples = batches * size
        self.num_examples = batches if examples is None else examples
        self.num_batches = batches
        if limit is not None and limit < self.num_examples:
            self.num_examples = limit
            if not size:
                raise ConfigError("limit needs a DataLoader with a batch_size; limit its dataset instead (Subset)")
            self.num_batches = math.ceil(limit / size)
        self._shape: tuple[int, int, int] | None = None
        self._peeked = False

    @property
    def num_classes(self) -> int | None:
        """Length of the data set's ``classes``, where it has them."""
        classes = getattr(self.loader.dataset, "classes", None)
        return len(classes) if isinstance(classes, (list, tuple)) else None

    @property
    def input_shape(self) -> tuple[int, int, int] | None:
        """Shape of the data set's first image, where that can be looked at."""
        if not self._peeked and not isinstance(self.loader.dataset, IterableDataset):
            with isolated_rng():
                try:
                    image = self.loader.dataset[0][0]
                except (TypeError, KeyError, IndexError):
                    image = None
            if isinstance(image, Tensor) and image.ndim == 3:
                channels, height, width = image.shape
                self._shape = (channels, height, width)
        self._peeked = True
        return self._shape

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of ``epoch`` from batch ``start`` on."""
        seed_everything(self.seed, "loader", epoch)
        for part in (self.loader, self.loader.sampler, self.loader.batch_sampler):
            if isinstance(getattr(part, "generator", None), torch.Generator):
                part.generator.manual_seed(derive_seed(self.seed, "loader", epoch))  # type: ignore[union-attr]
            if callable(getattr(part, "set_epoch", None)):
                part.set_epoch(epoch)  # type: ignore[union-attr]
        batches, done = iter(self.loader), 0
        for batch in range(self.num_batches):
            seed_everything(self.seed, "fetch", epoch, batch)
            try:
                item = next(batches)
            except StopIteration:
                raise InputError(
                    f"the DataLoader ended after {batch} of its {self.num_batches} batches; mend its __len__"
                ) from None
            except TypeError as error:
                if "collate" not in str(error):
                    raise
                raise InputError(
                    f"the data set's items cannot be made a batch: {str(error).splitlines()[0][:160]}; give pairs of "
                    "tensors (image, label), for pictures by transform=ToTensor()"
                ) from error
            x, y = _pair(item)
            if batch in (0, start):
                check_batch(x, y)
            if self.limit is not None:
                x, y = x[: self.limit - done], y[: self.limit - done]
            done += len(y)
            if batch >= start:
                yield _pixels(x.to(self.device)), y.to(self.device, torch.int64)


def make_source(
    data: Any,
    *,
    batch_size: int = 128,
    shuffle: bool = False,
    augment: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
    limit: int | None = None,
) -> BatchSource:
    """Return ``data`` as a source of batches on ``device``.

    ``data``: an ``ImageData`` (``augment`` turns on the crop and flip that suit it), a pair (images, labels) of tensors
    or arrays, a ``Dataset`` (both batched here, not augmented: a data set has its own transforms), a ``DataLoader``
    (its own batch size and order are kept), or a ``BatchSource`` (returned as it is). ``limit`` keeps the first ones.

    Raises:
        InputError: ``data`` is none of these, or its images or labels are not as they must be.
        ConfigError: the batch size or the limit is not a whole number >= 1.
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
        )
    if isinstance(data, tuple) or (isinstance(data, list) and all(isinstance(p, (Tensor, np.ndarray)) for p in data)):
        x, y = _pair(data)
        check_batch(x, y)
        x, y = x[:limit], y[:limit].to(torch.int64)
        x = x if x.dtype == torch.uint8 else x.to(torch.float32)
        return MemorySource(x, y, batch_size=batch_size, shuffle=shuffle, seed=seed, device=device)
    if isinstance(data, DataLoader):
        return LoaderSource(data, seed=seed, device=device, limit=limit)
    if isinstance(data, BatchSource):
        return data
    sized = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    if isinstance(data, Dataset) or (sized and not isinstance(data, (str, bytes, dict, Tensor, np.ndarray))):
        if isinstance(data, IterableDataset):
            shuffle = False
        elif _length(data) == 0:
            raise InputError("the data set is empty; give at least one image")
        loader: DataLoader[Any] = DataLoader(data, batch_size=batch_size, shuffle=shuffle)
        return LoaderSource(loader, seed=seed, device=device, limit=limit)
    raise InputError(
        f"cannot read batches from a {type(data).__name__}; give load_data(...), a pair (images, labels), a Dataset, "
        "a DataLoader or a BatchSource"
    )


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


def check_batch(x: Tensor, y: Tensor) -> None:
    """Check one batch: ``x`` uint8, or float in [0, 1], (N, C, H, W); ``y`` whole numbers >= 0, (N,).

    Raises:
        InputError: it is not so.
    """
    shape = tuple(x.shape)
    if x.ndim != 4 or 0 in shape:
        raise InputError(f"images have shape {shape}; they must be (N, C, H, W), none of the sizes 0")
    if x.dtype != torch.uint8:
        if not x.is_floating_point():
            raise InputError(f"images are {x.dtype}; they must be uint8, or float in [0, 1]")
        low, high = float(x.min()), float(x.max())
        if not (low >= 0 and high <= 1):  # also true of NaN
            raise InputError(
                f"images run from {low:.4g} to {high:.4g}; floats must lie in [0, 1] (normalising is the network's, "
                "whose first layer it is)"
            )
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool or tuple(y.shape) != shape[:1]:
        raise InputError(
            f"labels are {y.dtype} of shape {tuple(y.shape)}; they must be whole numbers of shape ({shape[0]},)"
        )
    if int(y.min()) < 0:
        raise InputError(f"labels go down to {int(y.min())}; they must be class numbers from 0 on")


def _pixels(x: Tensor) -> Tensor:
    return x.to(torch.float32).div_(255) if x.dtype == torch.uint8 else x.to(torch.float32)


def _pair(item: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        size = f" of {len(item)}" if isinstance(item, (tuple, list)) else ""
        raise InputError(f"a batch must be a pair (images, labels), but it is a {type(item).__name__}{size}")
    x, y = (torch.from_numpy(part) if isinstance(part, np.ndarray) else part for part in item)
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        raise InputError(
            f"a batch must be two tensors (images, labels), but it is ({type(x).__name__}, {type(y).__name__})"
        )
    return x, y


def _length(sized: Any) -> int | None:
    try:
        return len(sized)
    except TypeError:
        return None


def check_labels(y: Tensor, classes: int) -> None:
    """Check that labels are classes of the network.

    Raises:
        InputError: one is not.
    """
    lowest, highest = int(y.min()), int(y.max())
    if lowest < 0 or highest >= classes:
        wrong = lowest if lowest < 0 else highest
        raise InputError(f"label {wrong} is outside 0..{classes - 1}, the network's classes; check data and network")
