"""What an attack may ask of a model: logits, values and gradients, averaged over draws, counted and checked."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar, final

import torch
from torch import Tensor

from learn2perturb.attacks.gradients import Values, fresh_values, input_gradient, value_and_gradient
from learn2perturb.attacks.inputs import check_classes
from learn2perturb.attacks.listening import listener
from learn2perturb.attacks.losses import LOSSES, Loss, margin
from learn2perturb.attacks.probing import apart, passes_differ
from learn2perturb.attacks.watch import Watch
from learn2perturb.engine import execution
from learn2perturb.engine.answers import ask, check_answer, check_finite, plain_logits
from learn2perturb.engine.by_row import draws_at_once
from learn2perturb.engine.finite import Members, check_members, members_of
from learn2perturb.engine.halving import out_of_memory
from learn2perturb.engine.random import isolated_rng, seed_everything
from learn2perturb.engine.shapes import Flags, Images, Labels, Logits, PerImage
from learn2perturb.errors import InputError

if TYPE_CHECKING:
    from learn2perturb.attacks.base import Attack

Model = Callable[[Tensor], Tensor]
T = TypeVar("T")

_COMPARED = 4  # images on which a finite ensemble is compared with its members


@final
class Query:
    """What an attack may ask of the model it attacks; counts the image passes and checks the first logits.

    Losses and margins come back in the direction of the attack's aim: larger is nearer to it, targeted or not, and a
    margin is positive where the attack has its way.

    Attributes:
        left: how many images are still attacked, kept by the attacks that let some leave: for whoever listens.
    """

    def __init__(self, model: Model, attack: Attack, y: Tensor, *, strict: bool) -> None:
        self.forwards = 0
        self.backwards = 0
        self.left = len(y)
        self.watch = Watch()
        self._listener = listener()
        self.model = model
        self._attack = attack
        self._loss = LOSSES[attack.loss]
        self._labels = y
        self._strict = strict
        self._checked = False
        self._deterministic: bool | None = None if strict else False
        self._held: int | None = None
        self._together = True  # draws in one pass, where that is possible
        self._num_classes: int | None = None

    def logits(self, x: Images) -> Logits:
        """Return the logits (N, K) of one forward pass, at least float32."""
        logits = ask(self.model, x)
        if not self._checked:
            check_answer(logits, len(x))
            if self._strict:
                check_finite(logits)
                check_classes(self._labels, logits.shape[1])
            self._checked = True
            self._num_classes = logits.shape[1]
        self.forwards += len(x)
        if self._listener is not None:
            self._listener(len(x), self.left)
        self.watch.logits(logits)
        return plain_logits(logits)

    def gradient(self, x: Images, y: Labels, *, loss: Loss | None = None) -> Images:
        """Return the direction (N, C, H, W) of the attack's aim: the EOT gradient of the loss, negative if targeted.

        ``loss`` replaces the attack's own, as in :meth:`value_and_gradient`.
        """
        attack = self._attack
        gradient = self._averaged(input_gradient, loss, x, y)
        self.watch.gradient(gradient)
        self.backwards += attack.eot * len(x)
        return -gradient if attack.targeted and loss is None else gradient

    def value_and_gradient(self, x: Images, y: Labels, *, loss: Loss | None = None) -> tuple[Values, Images]:
        """Return what the same ``eot`` draws say: mean loss, margin and logits of each image, and the gradient.

        ``loss``, of logits (N, K) and labels (N,), replaces the attack's own; it is one to be maximised, targeted or
        not, and its sign is not touched.
        """
        attack = self._attack
        values, gradient = self._averaged(value_and_gradient, loss, x, y)
        aimed = self._aimed(values, own=loss is None)
        self.watch.gradient(gradient, reached=aimed.margin > 0)
        self.backwards += attack.eot * len(x)
        return aimed, -gradient if attack.targeted and loss is None else gradient

    def value(self, x: Images, y: Labels, *, loss: Loss | None = None) -> Values:
        """Return the same values from ``eot`` fresh forward passes, without a gradient."""
        with torch.no_grad():
            return self._aimed(self._averaged(fresh_values, loss, x, y), own=loss is None)

    def score(self, x: Images, y: Labels, draws: int) -> PerImage:
        """Return the mean margin (N,) over ``draws`` fresh forward passes, positive where the attack has its way."""
        return self.success(x, y, draws)[1]

    def success(self, x: Images, y: Labels, draws: int) -> tuple[PerImage, PerImage]:
        """Return the share (N,) of ``draws`` fresh passes in which the attack has its way, and the mean margin (N,)."""
        margins = []
        with torch.no_grad():
            for _ in range(draws):
                margins.append(margin(self.logits(x.clone()), y))
        stacked = torch.stack(margins) * (-1 if self._attack.targeted else 1)
        return (stacked > 0).to(stacked.dtype).mean(dim=0), stacked.mean(dim=0)

    def deterministic(self, x: Tensor) -> bool:
        """Tell whether passes over the same images agree, so that an image once broken stays so and may drop out.

        Asked once; in :meth:`Attack.craft`, where nothing may wait for the device, the answer is no.
        """
        if self._deterministic is None:
            self._deterministic = not passes_differ(self.logits, x)
        return self._deterministic

    def broken(self, x: Images, y: Labels, margins: PerImage) -> Flags:
        """Return which images (N, bool) of a deterministic model are broken for good, from their ``margins``.

        At low precision a pass in full precision confirms it: rounding alone must not end an attack.
        """
        broken = margins > 0
        if execution.current().dtype is None or not bool(broken.any()):
            return broken
        with execution.full_precision():
            confirmed = self.score(x[broken], y[broken], 1) > 0
        return broken.masked_scatter(broken, confirmed)

    def num_classes(self, x: Tensor) -> int:
        """Return the number of classes: by a forward pass, if there was none yet."""
        if self._num_classes is None:
            with apart("probe"):
                return self.logits(x.clone()).shape[1]
        return self._num_classes

    def members(self, x: Tensor) -> Members:
        """Return the members of the model, which is a finite ensemble; a model without noise is one of one member.

        Raises:
            InputError: it is none.
        """
        found = members_of(self.model)
        with apart("members"):
            if found is not None:
                check_members(self.model, found, x[:_COMPARED])
            elif self._strict and not self.deterministic(x):
                raise InputError(
                    "the model draws noise and is no finite ensemble, which has members and their probabilities (see "
                    "learn2perturb.models.RandomEnsemble); use pgd with eot"
                )
        return Members((self.model,), (1.0,)) if found is None else found

    @contextlib.contextmanager
    def part(self, attack: Attack, model: Model | None = None) -> Iterator[Query]:
        """Give the query of ``attack``, a part of this one, to call its :meth:`Attack.perturb` with; add its passes.

        ``model`` is asked in place of this one, such as a member of it.
        """
        part = Query(self.model if model is None else model, attack, self._labels, strict=self._strict)
        part._checked, part._deterministic, part.watch = self._checked, self._deterministic, self.watch
        part.left = self.left
        try:
            yield part
        finally:
            self.forwards += part.forwards
            self.backwards += part.backwards
            self.left = part.left

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Give every EOT average in the body the same draws; what judges points still draws afresh."""
        before, self._held = self._held, int(torch.randint(2**62, ()))
        try:
            yield
        finally:
            self._held = before

    def _averaged(self, work: Callable[..., T], loss: Loss | None, x: Images, y: Labels) -> T:
        """Return what ``work`` makes of the draws of an EOT average, several of them in a pass where that is possible.

        Not in :meth:`Attack.craft`, since a training has the same draws on any number of processes; nor where they have
        not fitted into memory.
        """
        attack, before = self._attack, self.forwards
        at_once = draws_at_once(self.model, x) if self._strict and self._together and attack.eot > 1 else 1
        average = {"eot": attack.eot, "average": attack.eot_average, "at_once": at_once}
        try:
            with self._draws():
                return work(self.logits, loss or self._loss, x, y, **average)
        except Exception as error:
            if at_once == 1 or not out_of_memory(error):
                raise
        self._together, self.forwards = False, before
        return self._averaged(work, loss, x, y)

    @contextlib.contextmanager
    def _draws(self) -> Iterator[None]:
        if self._held is None:
            yield
            return
        with isolated_rng():
            seed_everything(self._held, "held draws")
            yield

    def _aimed(self, values: Values, *, own: bool) -> Values:
        if not self._attack.targeted:
            return values
        return Values(-values.loss if own else values.loss, -values.margin, values.logits)
