"""Models that give values and no gradient: numpy inside, ``no_grad``, argmax, integer answers."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from learn2perturb.engine.answers import ask
from learn2perturb.engine.random import isolated_rng
from learn2perturb.errors import InputError
from learn2perturb.evaluation.passes import Model, are_probabilities

# A probability of 0, as a logit: far below all others, and a number.
_SMALLEST = 1e-12
NO_GRADIENT = "its answers carry no gradient"


def no_gradient(model: Model, x: Tensor) -> str:
    """Return why no gradient of the answers with respect to images ``x`` can be had, or nothing.

    A gradient that is zero is one. Of what is no answer at all, nothing is said here.
    """
    images = x.detach().clone().requires_grad_()
    with isolated_rng(), torch.enable_grad():
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


def _answers(model: Model, x: Tensor) -> bool:
    try:
        with torch.no_grad():
            ask(model, x.clone())
    except Exception:
        return False
    return True


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def as_logits(answer: Tensor, images: int, classes: int | None) -> Tensor:
    """Return an answer of any usual kind as logits (N, K): labels as one-hot rows, probabilities as their logarithm.

    What is of another shape is returned as it is, for whoever checks logits to refuse.

    Raises:
        InputError: labels (N,) of a number of classes that is not known, or too small.
    """
    if not (answer.is_floating_point() or answer.is_complex()):
        if answer.ndim == 1 and len(answer) == images:
            return _one_hot(answer.long(), classes)
        answer = answer.float()
    if answer.ndim == 2 and answer.shape[1] > 1 and len(answer) and are_probabilities(answer):
        return answer.clamp_min(_SMALLEST).log()
    return answer


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
        self.model, self.classes = model, classes
        self.training = False  # it has no mode of its own

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) to logits (N, K)."""
        with torch.no_grad():
            answer = ask(self.model, x.detach().clone())
        return as_logits(answer, len(x), self.classes) if isinstance(answer, Tensor) else answer
