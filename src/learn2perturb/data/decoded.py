"""The images of a listing as one tensor: in memory, or decoded once into a file that is read as it is needed."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from learn2perturb.data.images import read_image
from learn2perturb.data.labelled import Listing
from learn2perturb.errors import ConfigError, DataError

_CHUNK = 32 << 20  # bytes of a copy from file to file
_MEMORY = Path("/proc/meminfo")


def in_memory(listing: Listing, size: tuple[int, int] | None, channels: int | None) -> Tensor:
    """Return all images, uint8 (N, C, H, W).

    Raises:
        DataError: one is unreadable, of another size, or in colour where there is one channel; or there is no room.
    """
    arrays: list[np.ndarray] = []
    for array in _read(listing, size, channels):
        if not arrays:
            _check_room(listing, array)
        arrays.append(array)
    colour = channels == 3 or any(array.shape[2] == 3 for array in arrays)
    stacked = np.stack([np.repeat(array, 3, axis=2) if colour and array.shape[2] == 1 else array for array in arrays])
    return torch.from_numpy(np.ascontiguousarray(stacked.transpose(0, 3, 1, 2)))


def on_disk(listing: Listing, size: tuple[int, int] | None, channels: int | None, cache: Path) -> Tensor:
    """Return all images, uint8 (N, C, H, W), in a file of ``cache`` that the system reads as it is needed.

    The file is made where there is none of these files, told by path, length and time of change. Writing into the
    tensor does not reach the file.

    Raises:
        DataError: as :func:`in_memory`, or the file cannot be written.
    """
    target = cache / f"{_key(listing, size, channels)}.images"
    shape = _shape_of(target)
    if shape is None:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            shape = _decode(listing, size, channels, target)
        except OSError as error:
            raise DataError(
                f"the cache {cache} cannot be written ({error.strerror or error}); give another place, or make room"
            ) from None
    # "c": a private copy of what is written to; read-only arrays make torch warn.
    return torch.from_numpy(np.memmap(target, dtype=np.uint8, mode="c", shape=shape))


def rows_on_disk(images: Tensor, rows: Tensor, cache: Path) -> Tensor:
    """Return some rows of images, in a file without a name, that goes when nothing holds it any more."""
    numbers = torch.nonzero(rows).flatten() if rows.dtype == torch.bool else rows
    shape = (len(numbers), *images.shape[1:])
    with tempfile.TemporaryFile(dir=cache) as file:
        file.truncate(max(int(np.prod(shape)), 1))
        held = np.memmap(file, dtype=np.uint8, mode="r+", shape=shape)
    found = torch.from_numpy(held)
    step = max(_CHUNK // max(images[0].numel(), 1), 1)
    for start in range(0, len(numbers), step):
        found[start : start + step] = images[numbers[start : start + step]]
    return found


def _read(listing: Listing, size: tuple[int, int] | None, channels: int | None) -> Iterator[np.ndarray]:
    """Yield the images (H, W, 1 or 3), one after the other, checked against the first."""
    first: tuple[Path, Any] | None = None
    for path, _ in listing.entries:
        array = read_image(path, size)
        if channels == 1 and array.shape[2] == 3:
            raise DataError(f"{path} is a colour image but those of train are grey; make it grey, or train in colour")
        if first is None:
            first = path, array.shape[:2]
        elif array.shape[:2] != first[1]:
            raise DataError(
                f"{path} is {array.shape[0]} x {array.shape[1]} but {first[0]} is {first[1][0]} x {first[1][1]}; make "
                "all images one size, or give size="
            )
        yield array


def _decode(
    listing: Listing, size: tuple[int, int] | None, channels: int | None, target: Path
) -> tuple[int, int, int, int]:
    """Write all images to ``target``, one at a time, and its shape beside it; return the shape.

    Whether a set is in colour is known at its end: three channels are written, and one kept where all are grey.
    """
    partial, colour, shape = target.with_name(f"{target.name}.{os.getpid()}.tmp"), channels == 3, (0, 0)
    try:
        with partial.open("wb") as file:
            for array in _read(listing, size, channels):
                colour, shape = colour or array.shape[2] == 3, array.shape[:2]
                whole = array if array.shape[2] == 3 else np.repeat(array, 3, axis=2)
                file.write(np.ascontiguousarray(whole.transpose(2, 0, 1)).data)
        found = (len(listing.entries), 3 if colour else 1, *shape)
        if not colour:
            _keep_first_channel(partial, found)
        os.replace(partial, target)
        _note(target).write_text(json.dumps(found))
    finally:
        partial.unlink(missing_ok=True)
    return found


def _keep_first_channel(path: Path, shape: tuple[int, int, int, int]) -> None:
    """Keep one of three equal channels of the images in a file, in place: each image moves to the front."""
    count, _, height, width = shape
    plane = height * width
    with path.open("r+b") as file:
        for number in range(count):
            file.seek(3 * plane * number)
            data = file.read(plane)
            file.seek(plane * number)
            file.write(data)
        file.truncate(plane * count)


def _note(target: Path) -> Path:
    return target.with_suffix(".json")


def _shape_of(target: Path) -> tuple[int, int, int, int] | None:
    """Return the shape of a decoded set that is there and whole."""
    try:
        count, channels, height, width = (int(side) for side in json.loads(_note(target).read_text()))
        return (count, channels, height, width) if target.stat().st_size == count * channels * height * width else None
    except (OSError, ValueError, TypeError):
        return None


def _key(listing: Listing, size: tuple[int, int] | None, channels: int | None) -> str:
    digest = hashlib.blake2b(digest_size=8)
    digest.update(repr((1, size, channels, len(listing.entries))).encode())
    for path, _ in listing.entries:
        try:
            facts = path.stat()
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror or error}); replace or remove it") from None
        digest.update(f"{os.path.abspath(path)}\x1f{facts.st_size}\x1f{facts.st_mtime_ns}\x1e".encode(errors="replace"))
    return digest.hexdigest()


def checked_cache(cache: Any) -> Path | None:
    """Return the folder of decoded images.

    Raises:
        ConfigError: it is no path.
    """
    if cache is None:
        return None
    if not isinstance(cache, str | os.PathLike) or not str(cache):
        raise ConfigError(f"cache is {cache!r}; give a folder for decoded images")
    folder = Path(cache).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"cache {folder} is no folder; give a folder for decoded images")
    return folder


def _check_room(listing: Listing, first: np.ndarray) -> None:
    """Refuse a set that would not fit into memory: once as it is read, once as a tensor.

    Raises:
        DataError: it would not.
    """
    needed, free = 2 * len(listing.entries) * first.size, free_memory()
    if free is not None and needed > free:
        raise DataError(
            f"{listing.place}: {len(listing.entries):,} decoded images need {needed / 2**30:.1f} GiB and "
            f"{free / 2**30:.1f} GiB of memory are free; keep them decoded on disk, --dataset-options.cache DIR, or "
            "make them smaller by size"
        )


def free_memory() -> int | None:
    """Return how many bytes of memory a program can still have; None where the system does not say."""
    try:
        lines = _MEMORY.read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None
