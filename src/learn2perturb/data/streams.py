"""Batches in the user's order: a ``DataLoader``, a source of the user's own; every batch and the length are checked."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset, default_collate

from learn2perturb.data.batches import Batch, BatchSource, as_pair, check_alike, pixels
from learn2perturb.data.subset import known_labels
from learn2perturb.engine.random import derive_seed, isolated_rng, seed_everything
from learn2perturb.errors import InputError


class _Count(NamedTuple):
    """What a pass over an epoch found: batches, images, and images of the last batch."""

    batches: int
    images: int
    last: int


@final
class LoaderSource:
    """The user's ``DataLoader``: every epoch starts from a seed of (seed, epoch), every fetch from one of its batch.

    Batches before ``start`` are fetched and thrown away, so that a loader with a state of its own is where it was. With
    worker processes the batches repeat as long as the workers are started anew each epoch (no ``persistent_workers``).
    An epoch that gives more or fewer images than its length promises is refused, whoever reads it. ``limit`` keeps the
    first images of the loader's order; ``chosen`` says that this order was made here, to stand for the set.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        limit: int | None = None,
        chosen: bool = False,
    ) -> None:
        try:
            batches = len(loader)
        except TypeError:
            raise InputError(
                "the DataLoader has no length; give its dataset a __len__, so that schedules know the epoch"
            ) from None
        if batches < 1:
            raise InputError("the DataLoader is empty; give it at least one batch (is drop_last=True on a small set?)")
        self.loader, self.seed, self.device = loader, seed, torch.device(device)
        self._batches = batches
        self._streams = isinstance(loader.dataset, IterableDataset)
        self._size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
        self._images = self._promised_images()
        whole = self._images or (self._size or self._first_size) * batches
        self.limit = limit if limit is not None and limit < whole else None
        # Of how many images an epoch is a part, where it is one whose order is the user's.
        self.part_of = whole if self.limit is not None and not chosen else None
        self.num_examples = self.limit or whole

    @property
    def known_labels(self) -> Tensor | None:
        """Labels of the whole set, where the data set says them."""
        return known_labels(self.loader.dataset)

    @property
    def num_classes(self) -> int | None:
        """Length of the data set's ``classes``, where it has them."""
        names = classes_of(self.loader.dataset)
        return None if names is None else len(names)

    @property
    def num_batches(self) -> int:
        """Batches in an epoch, the last smaller one included; where no length says so, an epoch is read to count."""
        if self._counted:
            return self._count.batches
        return self._batches if self.limit is None else math.ceil(self.limit / (self._size or 1))

    @property
    def last_batch(self) -> int:
        """Images in the last batch; where no length says so, an epoch is read to count."""
        if self._counted or not self._size or self._images is None:
            return self._count.last
        return self.num_examples - (self.num_batches - 1) * self._size

    @cached_property
    def input_shape(self) -> tuple[int, int, int] | None:
        """Shape of the first image."""
        channels, height, width = self._first().shape[1:]
        return channels, height, width

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of ``epoch`` from batch ``start`` on.

        Raises:
            InputError: a batch is not as it must be, or the loader gives another number of images than it promised.
        """
        for batch, (x, y) in enumerate(self._read(epoch)):
            if batch >= start:
                yield pixels(x.to(self.device)), y.to(self.device)

    # -- what the loader promises -----------------------------------------------------------------------------------

    def _promised_images(self) -> int | None:
        """Return the images that an epoch must have; None where only the number of batches is promised."""
        loader = self.loader
        if loader.batch_size is None or loader.collate_fn is not default_collate:
            return None
        if loader.drop_last:
            return None if self._streams else self._batches * loader.batch_size
        return _length(loader.dataset if self._streams else loader.sampler)

    @property
    def _rounds(self) -> bool:
        """Whether each worker process rounds its share of a stream to batches, so that their number is not known."""
        return self._streams and self.loader.num_workers > 1 and self.loader.batch_size is not None

    @property
    def _counted(self) -> bool:
        return self._rounds or (self.limit is not None and not self._size)

    @cached_property
    def _count(self) -> _Count:
        sizes = [0]
        with isolated_rng():
            sizes += [len(y) for _, y in self._read(0)]
        return _Count(len(sizes) - 1, sum(sizes), sizes[-1])

    @cached_property
    def _first_size(self) -> int:
        # A stream is not touched for an estimate: it may be one that can be read only once.
        return 1 if self._streams else len(self._first())

    def _first(self) -> Tensor:
        """Return the images of a first batch, of one image where the loader makes batches itself."""
        loader = self.loader
        with isolated_rng():
            if self._streams:
                item = next(self._fetched(iter(loader), 0))
            else:
                try:
                    first = loader.dataset[0]
                except (TypeError, KeyError, IndexError):  # a set with other indices, which its sampler knows
                    item = next(self._fetched(iter(loader), 0))
                else:
                    with _explained():
                        item = loader.collate_fn(first if loader.batch_sampler is None else [first])
        return as_pair(item)[0]

    # -- reading ----------------------------------------------------------------------------------------------------

    def _read(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of an epoch, checked, as the loader gives them."""
        seed_everything(self.seed, "loader", epoch)
        for part in (self.loader, self.loader.sampler, self.loader.batch_sampler):
            if isinstance(getattr(part, "generator", None), torch.Generator):
                part.generator.manual_seed(derive_seed(self.seed, "loader", epoch))  # type: ignore[union-attr]
            if callable(getattr(part, "set_epoch", None)):
                part.set_epoch(epoch)  # type: ignore[union-attr]
        shape, done, batch = None, 0, 0
        for batch, item in enumerate(self._fetched(iter(self.loader), epoch), start=1):
            x, y = as_pair(item)
            shape = check_alike(x, shape, batch - 1)
            if self.limit is not None:
                x, y = x[: self.limit - done], y[: self.limit - done]
            done += len(y)
            self._check_length(batch, done, ended=False)
            yield x, y
            if done == self.limit:
                return
        self._check_length(batch, done, ended=True)

    def _check_length(self, batches: int, images: int, *, ended: bool) -> None:
        """Refuse an epoch that is longer, or has ended and is shorter, than the loader's length says."""
        most = self._batches + (self.loader.num_workers if self._rounds else 0)
        least = self._batches - (self.loader.num_workers if self._rounds else 0)
        if self.limit is not None and ended:
            raise InputError(
                f"the DataLoader ended after {images} images, and limit is {self.limit}; make its length that of what "
                "it gives (a stream must start anew at every epoch)"
            )
        if batches > most or (self._images is not None and images > self._images):
            promised = f"{self._batches} batches" if self._images is None else f"{self._images} images"
            hint = "; do all worker processes give the whole of it?" if self._rounds else ""
            raise InputError(
                f"the DataLoader gives more than the {promised} that its length promises{hint}; make its __len__ that "
                "of what it gives"
            )
        if ended and (batches < least or (self._images is not None and images < self._images)):
            promised = f"{self._batches} batches" if self._images is None else f"{self._images} images"
            raise InputError(
                f"the DataLoader ended after {batches} batches of {images} images and its length promises {promised}; "
                "make its __len__ that of what it gives (a stream must start anew at every epoch)"
            )

    def _fetched(self, batches: Iterator[Any], epoch: int) -> Iterator[Any]:
        """Yield what the loader gives, each fetch from a seed of its own."""
        batch = 0
        while True:
            seed_everything(self.seed, "fetch", epoch, batch)
            with _explained(), _without_length_warning(self._streams):
                try:
                    item = next(batches)
                except StopIteration:
                    return
            yield item
            batch += 1


@final
class CheckedSource:
    """A source of the user's own: its order is kept, its batches are checked, ``limit`` keeps the first images."""

    def __init__(self, source: BatchSource, *, limit: int | None = None) -> None:
        whole = source.num_examples
        self.source = source
        self.limit = limit if limit is not None and limit < whole else None
        self.part_of = whole if self.limit is not None else None
        self.num_examples = self.limit or whole
        self.input_shape, self.num_classes = source.input_shape, source.num_classes
        self.known_labels: Tensor | None = getattr(source, "known_labels", None)

    @cached_property
    def _sizes(self) -> list[int]:
        with isolated_rng():
            return [len(y) for _, y in self.epoch(0)]

    @property
    def num_batches(self) -> int:
        """Batches in an epoch; of a part, an epoch is read to count."""
        return self.source.num_batches if self.limit is None else len(self._sizes)

    @property
    def last_batch(self) -> int:
        """Images in the last batch; an epoch is read to count."""
        return self._sizes[-1]

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of ``epoch`` from batch ``start`` on.

        Raises:
            InputError: a batch is not as it must be.
        """
        shape, done = None, 0
        first = 0 if self.limit is not None else start
        for batch, item in enumerate(self.source.epoch(epoch, first), start=first):
            x, y = as_pair(item)
            shape = check_alike(x, shape, batch)
            if self.limit is not None:
                x, y = x[: self.limit - done], y[: self.limit - done]
            done += len(y)
            if batch >= start:
                yield pixels(x), y
            if done == self.limit:
                return


@final
class JoinedLast:
    """A source whose last batch, of one image, is part of the one before: for networks that cannot train on one."""

    def __init__(self, source: Any) -> None:
        self.source = source
        self.num_batches = source.num_batches - 1
        self.num_examples, self.num_classes = source.num_examples, source.num_classes
        self.input_shape = source.input_shape
        for name in ("labels", "part_of", "known_labels"):
            if hasattr(source, name):
                setattr(self, name, getattr(source, name))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of ``epoch`` from batch ``start`` on, the last two as one."""
        held: Batch | None = None
        for batch, (x, y) in enumerate(self.source.epoch(epoch, start), start=start):
            if batch == self.num_batches and held is not None:
                held = torch.cat([held[0], x]), torch.cat([held[1], y])
                continue
            if held is not None:
                yield held
            held = x, y
        if held is not None:
            yield held


def classes_of(data: Any) -> tuple[str, ...] | None:
    """Return the names of the classes of a data set, where it has them."""
    while isinstance(data, (Subset, DataLoader)) and not hasattr(data, "classes"):
        data = data.dataset
    names = getattr(data, "classes", None)
    return tuple(str(name) for name in names) if isinstance(names, (list, tuple)) else None


def class_difference(first: Sequence[str], second: Sequence[str]) -> str | None:
    """Return how two lists of classes differ, so that equal numbers mean different things, or None if they do not."""
    if list(first) == list(second):
        return None
    number = next((i for i, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), None)
    if number is None:
        return f"{len(first)} and {len(second)} classes"
    return f"class {number} is {first[number]!r} and {second[number]!r}"


def _length(sized: Any) -> int | None:
    try:
        return len(sized)
    except TypeError:
        return None


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turn torch's complaints about items that make no batch into one line that says how to fix it."""
    try:
        yield
    except (TypeError, RuntimeError) as error:
        text = str(error)
        if not any(words in text for words in ("collate", "stack expects each tensor", "resize storage")):
            raise
        reason = next((line for line in reversed(text.splitlines()) if line.strip()), "")[:160]
        raise InputError(
            f"the data set's items cannot be made a batch: {reason}; give pairs (image, label) of tensors or arrays of "
            "one size, for pictures by transform=ToTensor()"
        ) from error


@contextlib.contextmanager
def _without_length_warning(streams: bool) -> Iterator[None]:
    """Silence torch's guess that a stream is too long: here its images are counted."""
    if not streams:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Length of IterableDataset")
        yield
