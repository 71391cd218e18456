"""CIFAR-10 and CIFAR-100 in the official python-pickle and binary layouts (Krizhevsky 2009)."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, final

import numpy as np
import torch

from learn2perturb.data.archive import fetch, unpack
from learn2perturb.data.dataset import ImageData, data_root
from learn2perturb.data.files import read_whole, reason_of
from learn2perturb.data.pickles import read_pickle
from learn2perturb.errors import DataError

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR10_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
CIFAR100_URL = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
CIFAR100_SHA256 = "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7"

_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32

# Of the published images with their labels, see content_digest: the order of files and images does not count, so that a
# set that was packed anew is known too.
PUBLISHED = {
    ("cifar10", "train"): (50_000, "be021e235baec878"),
    ("cifar10", "test"): (10_000, "4d3532c49a44cca1"),
    ("cifar100", "train"): (50_000, "d4a80b2fc433f529"),
    ("cifar100", "test"): (10_000, "e0e3d787456ea077"),
}


@final
@dataclass(frozen=True)
class _Layout:
    """One way a set lies on disk: folder, archive, files of each split, the file of class names, and two readers."""

    folder: str
    archive: str
    files: dict[str, tuple[str, ...]]
    names_file: str
    read: Callable[[Path], tuple[np.ndarray, np.ndarray]]
    read_names: Callable[[Path], tuple[str, ...]]

    def lies_in(self, folder: Path) -> bool:
        """Whether the first file of either split is in ``folder``."""
        return any((folder / files[0]).is_file() for files in self.files.values())


def load_cifar10(split: str = "train", *, root: Any = None, download: bool = False) -> ImageData:
    """Load CIFAR-10: 50,000 training or 10,000 test images, 3 x 32 x 32, 10 classes.

    Raises:
        DataError: the set is missing, or a file is damaged.
    """
    url = (CIFAR10_URL, CIFAR10_SHA256) if download else None
    loaded = _load("cifar10", 10, _CIFAR10, split, data_root(root), url)
    return _image_data("cifar10", loaded, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


def load_cifar100(split: str = "train", *, root: Any = None, download: bool = False) -> ImageData:
    """Load CIFAR-100 with its 100 fine labels: 50,000 training or 10,000 test images, 3 x 32 x 32.

    Raises:
        DataError: the set is missing, or a file is damaged.
    """
    url = (CIFAR100_URL, CIFAR100_SHA256) if download else None
    loaded = _load("cifar100", 100, _CIFAR100, split, data_root(root), url)
    return _image_data("cifar100", loaded, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))


class _Loaded(NamedTuple):
    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    published: bool | None


def _image_data(name: str, loaded: _Loaded, mean: tuple[float, ...], std: tuple[float, ...]) -> ImageData:
    images, labels = torch.from_numpy(loaded.images), torch.from_numpy(loaded.labels)
    return ImageData(
        name, images, labels, loaded.classes, flip=True, crop_padding=4, mean=mean, std=std, published=loaded.published
    )


def content_digest(images: np.ndarray, labels: np.ndarray) -> str:
    """Return 16 hexadecimal digits that follow from the labelled images (N, 3, 32, 32), but not from their order."""
    total = 0
    for image, label in zip(images, labels, strict=True):
        digest = hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=8, salt=int(label).to_bytes(2, "little"))
        total += int.from_bytes(digest.digest(), "little")
    return f"{total % 2**64:016x}"


def _load(
    name: str, classes: int, layouts: tuple[_Layout, ...], split: str, root: Path, url: tuple[str, str] | None
) -> _Loaded:
    layout, folder = _locate(name, layouts, root, url)
    parts = []
    for file in layout.files[split]:
        if not (folder / file).is_file():
            raise DataError(
                f"{name} in {folder} lacks the file {file!r}; remove that folder and fetch it again (download=True)"
            )
        parts.append(_read(layout.read, folder / file))
        highest = int(parts[-1][1].max(initial=0))
        if highest >= classes:
            raise DataError(f"{folder / file} has a label {highest}; {name} has classes 0 to {classes - 1}{_FIX}")
    images = np.concatenate([images for images, _ in parts])
    labels = np.concatenate([labels for _, labels in parts])
    names = _read(layout.read_names, folder / layout.names_file)
    if len(names) != classes:
        raise DataError(f"{folder / layout.names_file} names {len(names)} classes; {name} has {classes}{_FIX}")
    return _Loaded(images, labels, names, _is_published(name, split, folder, images, labels))


def _is_published(name: str, split: str, folder: Path, images: np.ndarray, labels: np.ndarray) -> bool | None:
    """Tell whether these are the published images and labels; warn where they seem to be a damaged copy of them.

    None for a set far smaller than the published one, which someone has made in its layout.
    """
    count, digest = PUBLISHED[name, split]
    if len(images) <= count // 10:
        return None
    if len(images) == count and content_digest(images, labels) == digest:
        return True
    what = "a byte differs" if len(images) == count else f"{len(images)} images and not {count}"
    warnings.warn(
        f"the {split} images in {folder} are not those that {name} was published with ({what}): a damaged file, or "
        "another set in its layout; to be sure, remove the folder and fetch it again (download=True)",
        stacklevel=5,
    )
    return False


_T = TypeVar("_T")
_FIX = "; remove the folder and fetch it again (download=True)"


def _read(read: Callable[[Path], _T], path: Path) -> _T:
    """Return what ``read`` makes of a file; here alone whatever is wrong with it becomes one line.

    Raises:
        DataError: the file is missing, damaged, or of another layout.
    """
    try:
        return read(path)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"cannot read {path}: {reason_of(error)}{_FIX}") from error


def _locate(name: str, layouts: tuple[_Layout, ...], root: Path, url: tuple[str, str] | None) -> tuple[_Layout, Path]:
    """Return the layout found and its folder: in ``root``, below it, in an archive in it, or downloaded into it."""
    for layout in layouts:
        for folder in (root / layout.folder, root):
            if layout.lies_in(folder):
                return layout, folder
    if url is not None:
        layout = layouts[0]
        return layout, unpack(fetch(*url, root), layout.folder, root)
    for layout in layouts:
        if (root / layout.archive).is_file():
            return layout, unpack(root / layout.archive, layout.folder, root)
    wanted = ", ".join(word for layout in layouts for word in (layout.folder, layout.archive))
    raise DataError(
        f"{name} not found in {root.absolute()} (no {wanted}); point --data-dir or LEARN2PERTURB_DATA_DIR there "
        "or fetch it with download=True (--download)"
    )


def _python_reader(label_key: str) -> Callable[[Path], tuple[np.ndarray, np.ndarray]]:
    def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
        content = read_pickle(path)
        images, labels = content.get("data"), content.get(label_key)
        if not isinstance(images, np.ndarray) or images.ndim != 2 or images.shape[1] != _PIXELS:
            raise ValueError(f"'data' is no uint8 array of shape (N, {_PIXELS}); is it the official file?")
        if (
            not isinstance(labels, list)
            or len(labels) != len(images)
            or not all(type(y) is int and 0 <= y < 100 for y in labels)
        ):
            raise ValueError(f"{label_key!r} is no list of {len(images)} class numbers; is it the official file?")
        return images.reshape(-1, *_SHAPE), np.array(labels, dtype=np.int64)

    return read


def _python_names(key: str) -> Callable[[Path], tuple[str, ...]]:
    def read(path: Path) -> tuple[str, ...]:
        names = read_pickle(path).get(key)
        if not isinstance(names, list) or not all(isinstance(name, (bytes, str)) for name in names):
            raise ValueError(f"{key!r} is no list of class names; is it the official file?")
        return tuple(name.decode("utf-8", "replace") if isinstance(name, bytes) else name for name in names)

    return read


def _binary_reader(label_bytes: int) -> Callable[[Path], tuple[np.ndarray, np.ndarray]]:
    def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
        size = label_bytes + _PIXELS
        content = np.frombuffer(bytearray(read_whole(path)), dtype=np.uint8)
        if len(content) == 0 or len(content) % size:
            raise DataError(f"{path} has {len(content)} bytes, no multiple of {size}{_FIX}")
        records = content.reshape(-1, size)
        # The last label byte is the fine one: CIFAR-100 has the coarse label before it.
        return records[:, label_bytes:].reshape(-1, *_SHAPE), records[:, label_bytes - 1].astype(np.int64)

    return read


def _text_names(path: Path) -> tuple[str, ...]:
    lines = read_whole(path).decode("utf-8").splitlines()
    return tuple(line.strip() for line in lines if line.strip())


_CIFAR10 = (
    _Layout(
        "cifar-10-batches-py",
        "cifar-10-python.tar.gz",
        {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)},
        "batches.meta",
        _python_reader("labels"),
        _python_names("label_names"),
    ),
    _Layout(
        "cifar-10-batches-bin",
        "cifar-10-binary.tar.gz",
        {"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)},
        "batches.meta.txt",
        _binary_reader(1),
        _text_names,
    ),
)
_CIFAR100 = (
    _Layout(
        "cifar-100-python",
        "cifar-100-python.tar.gz",
        {"train": ("train",), "test": ("test",)},
        "meta",
        _python_reader("fine_labels"),
        _python_names("fine_label_names"),
    ),
    _Layout(
        "cifar-100-binary",
        "cifar-100-binary.tar.gz",
        {"train": ("train.bin",), "test": ("test.bin",)},
        "fine_label_names.txt",
        _binary_reader(2),
        _text_names,
    ),
)
