"""Images that attacks have made, kept beside a record: exact, in 8 bits to be shown, with the votes. Knows no torch."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np
from numpy.typing import NDArray

from learn2perturb.checks import check_count
from learn2perturb.errors import CheckpointError, ConfigError
from learn2perturb.evaluation.result import Evaluation, Row
from learn2perturb.reading import check_regular, parse_json, reading
from learn2perturb.records import atomic_write

Pixels = NDArray[np.floating[Any]]
Numbers = NDArray[np.int64]
EACH = 8
_SAME = ("attack", "eps", "noise", "predictor", "members")  # what tells the rows of an evaluation apart
_SIGNED = ("model", "weights", "images", "data")  # of the metadata of the record
FIX = "remove it, or evaluate again with --keep-images"


def beside(record: Path) -> Path:
    """Return where the images of a record are kept, if they are."""
    return record.with_name(f"{record.stem}.images.npz")


def broken_and_held(
    predictions: Numbers, labels: Numbers, clean: Numbers | None = None
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Tell which images are broken (wrong in most scorings under attack) and which are held (right in most).

    Of those only that are right in most scorings of the clean row, where there is one. Predictions: (draws, images).
    """
    share = (predictions == labels).mean(axis=0)
    begun = np.ones(len(labels), dtype=bool) if clean is None else (clean == labels).mean(axis=0) > 0.5
    return begun & (share < 0.5), begun & (share > 0.5)


def rule(each: int | None, clean: bool) -> str:
    """Say how images are chosen."""
    if each is None:
        return "all images"
    right = "right in most scorings of the clean row, and " if clean else ""
    return (
        f"the first {each} images that are broken ({right}wrong in most under this attack) and the first {each} that "
        f"are held ({right}right in most under it), in the order of the data"
    )


def eight_bits(images: Pixels) -> NDArray[np.uint8]:
    """Return images in [0, 1] as they are shown."""
    return np.round(255 * np.clip(images.astype(np.float64), 0, 1)).astype(np.uint8)


@final
@dataclass(frozen=True, eq=False)
class AttackedRow:
    """The images of one row: which they are, what the attack made of them, and what each scoring answered.

    Attributes:
        about: what the row is, as the record says it: attack, eps, noise, predictor, members; and its label.
        index: (k) numbers of the images in the evaluation.
        adversarial: (k, C, H, W), exact.
        predictions: (draws, k) under the attack.
        clean_predictions: (draws, k) of the clean row; None without one.
    """

    about: Mapping[str, Any]
    index: Numbers
    adversarial: Pixels
    predictions: Numbers
    clean_predictions: Numbers | None

    @property
    def label(self) -> str:
        """Short description of the row, such as ``pgd 8/255``."""
        return str(self.about["label"])

    @classmethod
    def of(cls, row: Row, index: Numbers, adversarial: Pixels, clean: Numbers | None) -> AttackedRow:
        """Return images with what ``row`` says of them; ``clean`` are the predictions of the clean row, all images."""
        about = {name: getattr(row, name) for name in _SAME} | {"label": row.label}
        votes = row.predictions.unpack()[:, index]
        return cls(about, index, adversarial, votes, None if clean is None else clean[:, index])

    def chosen(self, labels: Numbers, each: int | None) -> AttackedRow:
        """Return the row with the images that the rule chooses of those that are there; ``labels`` are theirs."""
        if each is None:
            return self
        kinds = broken_and_held(self.predictions, labels, self.clean_predictions)
        places = np.sort(np.concatenate([np.flatnonzero(kind)[:each] for kind in kinds]))
        clean = None if self.clean_predictions is None else self.clean_predictions[:, places]
        return AttackedRow(self.about, self.index[places], self.adversarial[places], self.predictions[:, places], clean)


@final
@dataclass(frozen=True, eq=False)
class AttackedImages:
    """Images as they were and as attacks made them; one ``.npz`` file, whose arrays numpy reads without this package.

    Attributes:
        about: name, weights and images of the record, its seed, the number of classes, the rule of the choice.
        index: (m) numbers of all kept images in the evaluation, rising.
        labels: (m).
        clean: (m, C, H, W), exact.
        rows: the rows of attacks.
    """

    FORMAT: ClassVar[str] = "learn2perturb.images"
    VERSION: ClassVar[int] = 1

    about: Mapping[str, Any]
    index: Numbers
    labels: Numbers
    clean: Pixels
    rows: tuple[AttackedRow, ...]

    @classmethod
    def of(
        cls, evaluation: Evaluation, rows: Iterable[AttackedRow], clean: Mapping[int, Pixels], each: int | None
    ) -> AttackedImages:
        """Return rows of ``evaluation`` with their clean images, number -> image."""
        rows = tuple(rows)
        index = np.unique(np.concatenate([row.index for row in rows] or [np.empty(0, np.int64)]))
        about = {name: evaluation.metadata.get(name) for name in _SIGNED} | {
            "seed": evaluation.seed, "num_classes": evaluation.num_classes,
            "rule": rule(each, any(row.clean_predictions is not None for row in rows)),
        }  # fmt: skip
        pixels = np.stack([clean[number] for number in index.tolist()]) if len(index) else np.empty((0, 1, 1, 1))
        return cls(about, index, evaluation.labels.unpack()[index], pixels, rows)

    def chosen(self, each: int) -> AttackedImages:
        """Return the first ``each`` broken and held images of each row."""
        check_count("each", each)
        rows = tuple(row.chosen(self.labels[self.places(row)], each) for row in self.rows)
        index = np.unique(np.concatenate([row.index for row in rows] or [np.empty(0, np.int64)]))
        kept = np.searchsorted(self.index, index)
        said = rule(each, any(row.clean_predictions is not None for row in rows))
        return AttackedImages({**self.about, "rule": said}, index, self.labels[kept], self.clean[kept], rows)

    def places(self, row: AttackedRow) -> Numbers:
        """Return where the images of ``row`` are among the clean ones."""
        return np.searchsorted(self.index, row.index)

    def row(self, label: str) -> AttackedRow:
        """Return the row of a label, such as ``pgd 8/255``.

        Raises:
            ConfigError: there is none.
        """
        found = next((row for row in self.rows if row.label == label), None)
        if found is None:
            raise ConfigError(f"no images of {label!r} are kept; there are {', '.join(row.label for row in self.rows)}")
        return found

    def data(self, label: str) -> tuple[Pixels, Numbers]:
        """Return attacked images and their labels, which ``evaluate`` takes as data.

        Raises:
            ConfigError: there is no such row.
        """
        row = self.row(label)
        return row.adversarial, self.labels[self.places(row)]

    def misfit(self, evaluation: Evaluation) -> str | None:
        """Return why these are not the images of ``evaluation``; None where they are."""
        for name in _SIGNED:
            if self.about.get(name) != evaluation.metadata.get(name):
                return f"they are of another {name}"
        labels = evaluation.labels.unpack()
        if self.about.get("seed") != evaluation.seed or (len(self.index) and self.index[-1] >= len(labels)):
            return "they are of another seed, or of more images"
        if not np.array_equal(labels[self.index], self.labels):
            return "their labels are others"
        for row in self.rows:
            own = self.row_of(evaluation, row)
            if own is None or not np.array_equal(own.predictions.unpack()[:, row.index], row.predictions):
                return f"their answers under {row.label} are not those of the record"
        return None

    @staticmethod
    def row_of(evaluation: Evaluation, row: AttackedRow) -> Row | None:
        """Return the row of ``evaluation`` that images are of."""
        named = (one for one in evaluation.rows if all(getattr(one, name) == row.about.get(name) for name in _SAME))
        return next(named, None)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one ``.npz`` file, atomically.

        Raises:
            CheckpointError: it cannot be written.
        """
        about = {"format": self.FORMAT, "version": self.VERSION, **self.about}
        about["rows"] = [dict(row.about) for row in self.rows]
        arrays: dict[str, NDArray[Any]] = {
            "about": np.frombuffer(json.dumps(about).encode(), dtype=np.uint8),
            "index": self.index, "labels": self.labels, "clean": self.clean, "clean_8bit": eight_bits(self.clean),
        }  # fmt: skip
        for number, row in enumerate(self.rows):
            arrays |= {
                f"index_{number}": row.index, f"adversarial_{number}": row.adversarial,
                f"adversarial_8bit_{number}": eight_bits(row.adversarial), f"predictions_{number}": row.predictions,
            }  # fmt: skip
            if row.clean_predictions is not None:
                arrays[f"clean_predictions_{number}"] = row.clean_predictions
        content = io.BytesIO()
        np.savez(content, allow_pickle=False, **arrays)
        return atomic_write(path, content.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AttackedImages:
        """Read what :meth:`save` wrote.

        Raises:
            CheckpointError: missing, damaged, inconsistent, or of a newer version.
        """
        with reading(f"{path} cannot be read as kept images", FIX, CheckpointError):
            arrays = _arrays(path)
            about = parse_json(arrays["about"].tobytes())
            if about.pop("format") != cls.FORMAT or about.pop("version") != cls.VERSION:
                raise ValueError(f"it is of another format or version than {cls.FORMAT} {cls.VERSION}")
            rows = [_row(arrays, number, one) for number, one in enumerate(about.pop("rows"))]
            found = cls(about, arrays["index"], arrays["labels"], arrays["clean"], tuple(rows))
            found._check(arrays)
        return found

    def _check(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Raise ValueError where arrays contradict each other."""
        _check_images(self.clean, self.labels, arrays["clean_8bit"])
        if self.index.shape != self.labels.shape or (np.diff(self.index) <= 0).any() or (self.index < 0).any():
            raise ValueError("the numbers of its images do not rise, or are too few")
        for number, row in enumerate(self.rows):
            if not np.isin(row.index, self.index).all():
                raise ValueError(f"images of {row.label} are not among the clean ones")
            _check_images(row.adversarial, row.index, arrays[f"adversarial_8bit_{number}"])
            if row.adversarial.shape[1:] != self.clean.shape[1:] and len(row.index):
                raise ValueError(f"images of {row.label} have another shape than the clean ones")
            for votes in (row.predictions, row.clean_predictions):
                if votes is not None and (votes.ndim != 2 or votes.shape[1] != len(row.index)):
                    raise ValueError(f"answers of {row.label} are of other images")


def _check_images(images: Pixels, numbers: Numbers, shown: NDArray[Any]) -> None:
    if images.dtype.kind != "f" or numbers.dtype != np.int64 or images.ndim != 4 or len(images) != len(numbers):
        raise ValueError("an array has another shape or type than images have")
    if not (np.isfinite(images).all() and np.array_equal(eight_bits(images), shown)):
        raise ValueError("images and what is shown of them differ")


def _row(arrays: Mapping[str, NDArray[Any]], number: int, about: Mapping[str, Any]) -> AttackedRow:
    if not {*_SAME, "label"} <= {*about}:
        raise ValueError("a row does not say what it is of")
    index, adversarial, votes = (arrays[f"{name}_{number}"] for name in ("index", "adversarial", "predictions"))
    return AttackedRow(about, index, adversarial, votes, arrays.get(f"clean_predictions_{number}"))


def _arrays(path: str | os.PathLike[str]) -> dict[str, NDArray[Any]]:
    """Return the arrays of a file; nothing in it unfolds into more than it has bytes."""
    check_regular(path)
    with zipfile.ZipFile(path) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise ValueError("it is compressed, which kept images never are")
    with np.load(path, allow_pickle=False) as found:
        return {name: found[name] for name in found.files}
