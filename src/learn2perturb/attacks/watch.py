"""What went wrong on the way of an attack, kept on the device so that nothing waits, and read once when it is over."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from learn2perturb.errors import InputError


@final
class Watch:
    """Whether a logit or gradient was not finite, and how many images had a gradient of exactly zero at first.

    The sign of NaN is 0 and no comparison with NaN holds, so an attack that meets one stands still and the model
    looks robust.
    """

    def __init__(self) -> None:
        self._bad_logits: Tensor | None = None
        self._bad_gradient: Tensor | None = None
        self._zero: Tensor | None = None
        self._unfinished: dict[str, Tensor] = {}

    @torch.no_grad()
    def logits(self, logits: Tensor) -> None:
        """Look at the logits of one pass; -inf is a masked class."""
        self._bad_logits = _either(self._bad_logits, ~(logits < math.inf).all())

    @torch.no_grad()
    def gradient(self, gradient: Tensor, reached: Tensor | None = None) -> None:
        """Look at a gradient with respect to images (N, C, H, W).

        ``reached``: which images the attack has its way with already (N,); of a hinge their gradient is 0, as it
        should be.
        """
        if not len(gradient):
            return
        largest = gradient.abs().amax(dim=tuple(range(1, gradient.ndim)))
        if self._zero is None:
            zero = largest == 0
            self._zero = (zero if reached is None else zero & ~reached).sum()
        self._bad_gradient = _either(self._bad_gradient, ~torch.isfinite(largest).all())

    def first(self, zero_gradients: int | None) -> None:
        """Take over what another attack counted at its first step."""
        if self._zero is None and zero_gradients is not None:
            self._zero = torch.tensor(zero_gradients)

    def unfinished(self, **images: Tensor) -> None:
        """Keep which images (N, bool) each kind of search has not come to its end on."""
        for name, each in images.items():
            self._unfinished[name] = each.sum() + self._unfinished.get(name, 0)

    def unfinished_of(self, name: str) -> int | None:
        """Return how many images that kind of search has not ended on, None where there was none; waits."""
        return int(self._unfinished[name]) if name in self._unfinished else None

    @property
    def zero_gradients(self) -> int | None:
        """Images whose first gradient was exactly zero, None where there was no gradient; waits for the device."""
        return None if self._zero is None else int(self._zero)

    def spoiled(self, x_adv: Tensor) -> Tensor:
        """Return the images, all of them NaN if anything was not finite; this does not wait for the device."""
        for bad in (self._bad_logits, self._bad_gradient):
            x_adv = x_adv if bad is None else x_adv.masked_fill(bad, math.nan)
        return x_adv

    def check(self) -> None:
        """Wait for the device and tell.

        Raises:
            InputError: a gradient or a logit was not finite.
        """
        if self._bad_gradient is not None and bool(self._bad_gradient):
            raise InputError(
                "the attack met a NaN gradient, or an infinite one, with which it stands still: the logits or their "
                "derivatives are not finite near x; fix the model (a root or a log at 0, a division by 0)"
            )
        if self._bad_logits is not None and bool(self._bad_logits):
            raise InputError(
                "the model returned NaN or infinite logits near x; check its weights and its input normalisation"
            )


def _either(flag: Tensor | None, bad: Tensor) -> Tensor:
    return bad if flag is None else flag | bad
