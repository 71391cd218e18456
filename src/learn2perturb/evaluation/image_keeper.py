"""Which images of an evaluation are kept, and where they wait until it is finished."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from learn2perturb.checks import check_count
from learn2perturb.evaluation.attacked import EACH, AttackedImages, Numbers, Pixels, broken_and_held

Choice = Callable[[Numbers], Numbers]  # predictions (draws, images) of a batch -> which of its images are kept


@final
@dataclass(frozen=True, eq=False)
class Kept:
    """Some images of a batch, or of all: their numbers in it, and what the attack made of them."""

    index: Numbers
    images: Pixels

    @classmethod
    def among(cls, images: Tensor, index: Numbers) -> Kept:
        """Return those of ``images`` that ``index`` names."""
        return cls(index, arrays_of(images[index.tolist()]))

    @classmethod
    def joined(cls, parts: Sequence[Kept]) -> Kept | None:
        """Return the images of all parts; None of no part."""
        if not parts:
            return None
        return cls(np.concatenate([part.index for part in parts]), np.concatenate([part.images for part in parts]))

    def moved(self, start: int) -> Kept:
        """Return the same images, counted from ``start`` on."""
        return Kept(self.index + start, self.images)

    def plain(self) -> dict[str, str]:
        """Return them as text, for another process."""
        return {"index": _text(self.index), "images": _text(self.images)}

    @classmethod
    def of(cls, index: str, images: str) -> Kept:
        """Return what :meth:`plain` gave."""
        return cls(_array(index), _array(images))


@final
class ImageKeeper:
    """Asks ``evaluate`` for some of the images that attacks make; afterwards they are in ``found``.

    ::

        keeper = ImageKeeper(8)
        evaluate(model, data, attacks, images=keeper).save("mine.json")
        keeper.found.save(beside(Path("mine.json")))  # where `report` looks for them

    Args:
        each: how many broken and how many held images of each row, the first ones; None: all images, which are held in
            memory until the evaluation ends.

    Raises:
        ConfigError: ``each`` is no count.
    """

    def __init__(self, each: int | None = EACH) -> None:
        check_count("each", each, optional=True)
        self.each = each
        self.found: AttackedImages | None = None

    def choice(self, labels: Tensor, clean: Numbers | None) -> Choice:
        """Return what chooses images of a batch, of which ``labels`` and predictions on the clean row are given."""
        truth = labels.cpu().numpy()

        def choose(predictions: Numbers) -> Numbers:
            if self.each is None:
                return np.arange(len(truth))
            kinds = broken_and_held(predictions, truth, clean)
            return np.sort(np.concatenate([np.flatnonzero(kind)[: self.each] for kind in kinds]))

        return choose


def arrays_of(images: Tensor) -> Pixels:
    """Return images as an array of floats, on the CPU."""
    found: Pixels = (images if images.dtype.itemsize >= 4 else images.float()).detach().cpu().numpy()
    return found


def _text(array: NDArray[Any]) -> str:
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    return base64.b64encode(content.getvalue()).decode("ascii")


def _array(text: str) -> NDArray[Any]:
    found: NDArray[Any] = np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False)
    return found
