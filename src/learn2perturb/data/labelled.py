"""Which files a folder of images has, and their labels: by folders of classes, or by a table."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from learn2perturb.errors import ConfigError, DataError
from learn2perturb.reading import read_bytes, reading

MOST_TABLE = 256 << 20  # bytes
_FILE, _LABEL, _SPLIT = ("file", "file_name", "filename", "path", "image"), ("label", "class"), "split"


@final
@dataclass(frozen=True)
class Listing:
    """The files of a split with their labels, in order; ``place`` is what messages call it."""

    place: Path
    classes: tuple[str, ...]
    entries: tuple[tuple[Path, int], ...]


def hidden(path: Path) -> bool:
    """Tell whether a file is none of the user's images."""
    return path.name.startswith(".") or path.name == "Thumbs.db"


# --- folders of classes


def by_folders(root: Path, split: str) -> tuple[Listing, Listing]:
    """Return the files of ROOT/train/CLASS/* and of ROOT/``split``/CLASS/*; the classes are those of train.

    Raises:
        DataError: no such folder, or a class that train does not have.
    """
    reference = root / ("train" if (root / "train").is_dir() else split)
    classes = _classes(reference)
    for name in _classes(root / split):
        if name not in classes:
            raise DataError(f"{root / split / name}: class {name!r} is not among those of train: {', '.join(classes)}")
    train = _in_folders(reference, classes)
    return train, train if reference == root / split else _in_folders(root / split, classes)


def _in_folders(folder: Path, classes: tuple[str, ...]) -> Listing:
    entries = tuple((path, label) for label, name in enumerate(classes) for path in _files(folder / name))
    if not entries:
        raise DataError(f"image folder {folder.absolute()} has no image in its class folders {', '.join(classes)}")
    return Listing(folder, classes, entries)


def _classes(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        raise DataError(
            f"image folder {folder.absolute()} not found; give --data-dir (root=) the folder of train/CLASS/* and "
            "test/CLASS/*"
        )
    classes = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not hidden(entry)))
    if not classes:
        raise DataError(
            f"image folder {folder.absolute()} has no class folders; put the images in {folder}/CLASS/, or give a "
            "table of labels: --dataset-options.labels FILE.csv"
        )
    return classes


def _files(folder: Path) -> list[Path]:
    """Return the files of a class, in order.

    Raises:
        DataError: something else lies there, whose images would be left out.
    """
    paths = sorted(path for path in folder.iterdir() if not hidden(path)) if folder.is_dir() else []
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path} is no file; images must lie in the folder of their class, none deeper")
    return paths


# --- a table


def by_table(root: Path, split: str, table: Any) -> tuple[Listing, Listing]:
    """Return the files that a CSV table lists for train and for ``split``, in its order; classes are those of train.

    Its first line names the columns: ``file`` and ``label``, and ``split`` (train, test) of a table for both. Files
    are given from the folder of the table. ``table`` is a path from ROOT, or, where ROOT/train holds one of that
    name, a table in each split's folder. Classes are in alphabetical order, numbers in the order of numbers.

    Raises:
        ConfigError: ``table`` is no path.
        DataError: it cannot be read, lacks a column or a label, names a file twice or one that is not there, or a class
            that train does not have.
    """
    if not isinstance(table, str) or not table:
        raise ConfigError(f"labels is {table!r}; give the path of a CSV table, from the folder of the images")
    of_split = (root / "train" / table).is_file()
    if of_split:
        rows = {name: _rows(root / name / table, None) for name in ("train", split)}
    else:
        rows = {name: _rows(root / table, name) for name in ("train", split)}
    names = {label for _, label in rows["train"]}
    classes = tuple(sorted(names, key=int) if all(name.isdecimal() for name in names) else sorted(names))
    numbers = {name: number for number, name in enumerate(classes)}
    for path, label in rows[split]:
        if label not in numbers:
            raise DataError(f"{path}: class {label!r} is not among those of train: {', '.join(classes)}")
    place = {name: root / name / table if of_split else root / table for name in rows}
    found = {
        name: Listing(place[name], classes, tuple((path, numbers[label]) for path, label in each))
        for name, each in rows.items()
    }
    return found["train"], found[split]


def _rows(table: Path, split: str | None) -> list[tuple[Path, str]]:
    """Return file and label of the lines of a table, those of ``split`` where it is one for several."""
    what = f"table of labels {table}"
    with reading(f"{what} cannot be read", "give a CSV file with columns file,label", DataError):
        text = read_bytes(table, MOST_TABLE).decode("utf-8-sig")
        lines = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    head = [name.strip().lower() for name in (lines or [[]])[0]]
    columns = [next((head.index(name) for name in names if name in head), None) for names in (_FILE, _LABEL)]
    own = head.index(_SPLIT) if _SPLIT in head else None
    if None in columns or (split is not None and own is None):
        wanted = "file,label" if split is None else "file,label,split"
        raise DataError(f"{what} has the columns {','.join(head) or '(none)'}; its first line must name {wanted}")
    found: dict[Path, str] = {}
    for number, line in enumerate(lines[1:], start=2):
        if not any(cell.strip() for cell in line):
            continue
        if len(line) != len(head):
            raise DataError(f"{what}, line {number}: it has {len(line)} columns and the first line {len(head)}; fix it")
        file, label = (line[column].strip() for column in columns if column is not None)
        part = None if own is None else line[own].strip().lower()
        if part not in (None, "train", "test"):
            raise DataError(f"{what}, line {number}: split is {part!r}; write train or test")
        if split is not None and part != split:
            continue
        if not file or not label:
            raise DataError(f"{what}, line {number}: it has no {'label' if file else 'file'}; fill it in")
        path = table.parent / file
        if path in found:
            raise DataError(f"{what}, line {number}: {file} is listed twice; leave one of the lines out")
        if not path.is_file():
            raise DataError(f"{what}, line {number}: there is no file {path}; files are given from the table's folder")
        found[path] = label
    if not found:
        raise DataError(f"{what} lists no image" + (f" of split {split}" if split else "") + "; add some")
    return list(found.items())
