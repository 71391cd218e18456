"""Models that give values and no gradient: numpy inside, ``no_grad``, argmax, integer answers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import final

import torch
from torch import Tensor, nn

from learn2perturb.engine.answers import ask
from learn2perturb.engine.modes import in_mode
from learn2perturb.engine.random import isolated_rng
from learn2perturb.errors import InputError
from learn2perturb.evaluation.passes import Model, are_probabilities

# A probability of 0, as a logit: far below all others, and a number.
_SMALLEST = 1e-12
_ROWS = 4  # that tell probabilities
NO_GRADIENT = "its answers carry no gradient"


def no_gradient(model: Model, x: Tensor) -> str:
    """Return why no gradient of the answers with respect to images ``x`` can be had, or nothing.

    A gradient that is zero is one. Of what is no answer at all, nothing is said here.
    """
    images = x.detach().clone().requires_grad_()
    with isolated_rng(), _buffers_kept(model), in_mode(model, None), torch.enable_grad():
        try:
            answer = ask(model, images)
        except Exception as error:  # a stranger's model may raise anything
            return f"a pass with gradients fails: {_line(error)}" if _answers(model, x) else ""
        if not isinstance(answer, Tensor):
            return ""
        if not answer.requires_grad:
            return NO_GRADIENT
        try:
            (gradient,) = torch.autograd.grad(answer.sum(), images, allow_unused=True)
        except Exception as error:
            return f"its gradient cannot be computed: {_line(error)}"
    return NO_GRADIENT if gradient is None else ""


@contextlib.contextmanager
def _buffers_kept(model: Model) -> Iterator[None]:
    """Put back what passes change in buffers: whether they may is not asked here."""
    buffers = list(model.buffers()) if isinstance(model, nn.Module) else []
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, kept in zip(buffers, before, strict=True):
                if not torch.equal(buffer, kept):
                    buffer.copy_(kept)


def _answers(model: Model, x: Tensor) -> bool:
    try:
        with torch.no_grad():
            ask(model, x.clone())
    except Exception:
        return False
    return True


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


@final
class Reading:
    """How the answers of one model become logits (N, K): labels as one-hot rows, probabilities as their logarithm.

    Whether they are probabilities is decided once, by several rows: a single row of scores may sum to 1 by chance.
    """

    def __init__(self, classes: int | None) -> None:
        self.classes = classes
        self._probabilities: bool | None = None

    def logits(self, answer: Tensor) -> Tensor:
        """Return an answer as logits; what is of another shape is returned as it is, for whoever checks logits.

        Raises:
            InputError: labels (N,) of a number of classes that is not known, or too small; or what were probabilities
                are none.
        """
        if not (answer.is_floating_point() or answer.is_complex()):
            if answer.ndim == 1:
                return _one_hot(answer.long(), self.classes)
            answer = answer.float()
        if answer.ndim != 2 or answer.shape[1] < 2 or not len(answer):
            return answer
        found = are_probabilities(answer)
        if self._probabilities is None and len(answer) >= _ROWS:
            self._probabilities = found
        if self._probabilities and not found:
            raise InputError(
                "the model returned probabilities before, and now rows that are none; return either, always"
            )
        wanted = found if self._probabilities is None else self._probabilities
        return answer.clamp_min(_SMALLEST).log() if wanted else answer


def _one_hot(labels: Tensor, classes: int | None) -> Tensor:
    if classes is None:
        raise InputError(
            "the model returned labels (N,), from which the number of classes cannot be told; give "
            "l2p.black_box(function, num_classes=10)"
        )
    lowest, highest = (int(bound) for bound in torch.aminmax(labels))
    if lowest < 0 or highest >= classes:
        raise InputError(
            f"the model returned labels from {lowest} to {highest}, allowed are 0 to {classes - 1}; give "
            f"num_classes={highest + 1}" + (", and labels from 0" if lowest < 0 else "")
        )
    return nn.functional.one_hot(labels, classes).float()


@final
class ValuesOnly(nn.Module):
    """``model`` asked for values only: no gradient is asked for, whatever it answers becomes logits."""

    def __init__(self, model: Model, classes: int | None) -> None:
        super().__init__()
        self.model, self._reading = model, Reading(classes)
        self.training = False  # it has no mode of its own

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) to logits (N, K)."""
        with torch.no_grad():
            answer = ask(self.model, x.detach().clone())
        return self._reading.logits(answer) if isinstance(answer, Tensor) else answer
