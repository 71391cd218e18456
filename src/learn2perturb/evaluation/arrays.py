"""Any function of numpy arrays as a model: checked, counted, and asked no faster than it is said to bear."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learn2perturb.checks import check_count, check_flag
from learn2perturb.errors import ConfigError, InputError
from learn2perturb.evaluation.values import Reading
from learn2perturb.progress import Progress, Reporter, duration

Function = Callable[[NDArray[np.float32]], Any]


@final
class BlackBox:
    """A function of arrays, to be called with tensors (N, C, H, W) like any model; gives logits without a gradient.

    Attributes:
        queries: images that were asked about so far.
    """

    def __init__(
        self,
        function: Function,
        num_classes: int | None,
        queries_per_second: float | None,
        channels_last: bool,
        batch_size: int | None,
    ) -> None:
        self.function, self.num_classes = function, num_classes
        self.queries_per_second, self.channels_last, self.batch_size = queries_per_second, channels_last, batch_size
        self.registered_name = getattr(function, "__name__", type(function).__name__)
        self.queries = 0
        self._next = -math.inf
        self._reading = Reading(num_classes)

    def __call__(self, x: Tensor) -> Tensor:
        """Return logits (N, K) of images (N, C, H, W) in [0, 1].

        Raises:
            InputError: the function fails, or returns something else than logits, probabilities or labels.
        """
        images = x.detach().cpu().float().numpy()
        if self.channels_last:
            images = images.transpose(0, 2, 3, 1)
        rows = self._rows(len(x))
        parts = [self._asked(images[start : start + rows]) for start in range(0, len(x), rows)]
        widths = {part.shape[1:] for part in parts}
        if len(widths) > 1:
            raise InputError(f"the black box answered with rows of {sorted(widths)}; they must be of one shape")
        return self._reading.logits(torch.cat(parts)).to(x.device)

    def _rows(self, images: int) -> int:
        """Return how many images to ask about at once: not more than a second's worth."""
        rate = self.queries_per_second
        return min(self.batch_size or images, images if rate is None else max(1, int(rate)))

    def _asked(self, images: NDArray[np.float32]) -> Tensor:
        count = len(images)
        if self.batch_size is not None and count < self.batch_size:
            images = np.concatenate([images, np.repeat(images[-1:], self.batch_size - count, axis=0)])
        self._wait(len(images))
        self.queries += len(images)
        try:
            # A copy: the function may work on its input in place.
            answer = self.function(np.array(images, order="C"))
        except Exception as error:  # a stranger's function may raise anything
            reason = (str(error).splitlines() or [""])[0][:200]
            raise InputError(
                f"the black box failed on an array {images.shape} of float32 after {self.queries} queries: "
                f"{type(error).__name__}: {reason}; retries are its own affair"
            ) from error
        return self._checked(answer, len(images))[:count]

    def _wait(self, queries: int) -> None:
        """Wait until as many queries as there were may have been made, at the rate that is allowed."""
        if self.queries_per_second is None:
            return
        now = time.monotonic()
        if now < self._next:
            time.sleep(self._next - now)
        self._next = max(now, self._next) + queries / self.queries_per_second

    def _checked(self, answer: Any, images: int) -> Tensor:
        array = _array(answer)
        if array.shape == (images, 1):
            array = array[:, 0]
        shape = array.shape
        if array.ndim not in (1, 2) or shape[0] != images or (array.ndim == 2 and shape[1] < 2):
            raise InputError(
                f"the black box must return logits or probabilities ({images}, classes >= 2), or labels ({images},), "
                f"for {images} images; got an array {shape}"
            )
        if array.ndim == 1 and array.dtype.kind == "f":
            raise InputError(
                f"the black box returned one float an image, an array {np.shape(answer)}; return labels as integers, "
                "and of one output the two classes: numpy.stack([1 - p, p], axis=1)"
            )
        if self.num_classes is not None and array.ndim == 2 and shape[1] != self.num_classes:
            raise InputError(f"the black box returned {shape[1]} classes, and num_classes is {self.num_classes}")
        if array.dtype.kind == "f" and not (array < math.inf).all():
            raise InputError("the black box returned NaN or inf; every score must be a number (-inf: never the answer)")
        # float64 is kept: probabilities that are nearly 1 differ there still.
        wanted = array if array.dtype in (np.float32, np.float64) or array.dtype.kind != "f" else array.astype("f4")
        wanted = wanted.astype(np.int64) if wanted.dtype.kind in "iub" else wanted
        return torch.from_numpy(np.array(wanted))


def _array(answer: Any) -> NDArray[Any]:
    """Return an answer as an array of numbers.

    Raises:
        InputError: it is none.
    """
    if isinstance(answer, Tensor):
        answer = answer.detach().cpu().numpy()
    try:
        array = np.asarray(answer)
    except ValueError:  # rows of unequal length
        array = np.empty(0, dtype=object)
    if array.dtype.kind not in "fiub":
        raise InputError(
            f"the black box must return an array of numbers, got a {type(answer).__name__} of {array.dtype}; return "
            "logits (N, K)"
        )
    return array


def tell_queries(told: Progress, model: object, queries: float) -> None:
    """Say how many queries are expected at most, and how long they take at the rate that the model is asked at."""
    rate = model.queries_per_second if isinstance(model, BlackBox) else None
    text = f"up to about {_rounded(queries):,} queries of the model"
    if rate is not None:
        text += f", {duration(queries / rate)} at {rate:g} a second"
    if isinstance(told, Reporter):
        told.line(text)
    else:
        told(0, queries, text)


def _rounded(queries: float) -> int:
    """Return two digits of a number: it is a guess."""
    return int(float(f"{queries:.1e}"))


def black_box(
    function: Function,
    *,
    num_classes: int | None = None,
    queries_per_second: float | None = None,
    channels_last: bool = False,
    batch_size: int | None = None,
) -> BlackBox:
    """Return any function of numpy arrays as a model for ``diagnose`` and ``evaluate``.

    Args:
        function: from images, an array (N, C, H, W) of float32 in [0, 1], to logits or probabilities (N, K) or labels
            (N,). A remote model is a function that asks it; retries are that function's affair.
        num_classes: needed where it returns labels.
        queries_per_second: images a second that it is asked about at most, on average.
        channels_last: give it images (N, H, W, C).
        batch_size: images in one call, always; the last ones are filled up with copies. By default any number.

    Raises:
        ConfigError: a setting is not allowed.
    """
    if not callable(function):
        raise ConfigError(f"function is a {type(function).__name__}, must be callable: images to logits, both arrays")
    if num_classes is not None:
        check_count("num_classes", num_classes)
        if num_classes < 2:
            raise ConfigError(f"num_classes is {num_classes}, must be at least 2")
    if batch_size is not None:
        check_count("batch_size", batch_size)
    check_flag("channels_last", channels_last)
    rate = queries_per_second
    if rate is not None and (isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < math.inf):
        raise ConfigError(f"queries_per_second is {rate!r}, must be a number above 0; None asks as fast as it can")
    return BlackBox(function, num_classes, rate, channels_last, batch_size)
